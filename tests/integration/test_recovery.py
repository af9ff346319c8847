"""Real clouds that are killed, frozen, drained or cut off in the middle of an answer: no token is lost."""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.ports import free_port
from benchmarks.processes import CloudProcess
from edge_client.connection import Timeouts
from edge_client.model import PrivateLoraForCausalLM
from shared.adapter import Adapter
from tests.integration.answers import NEW, answer
from tests.integration.secured import Relay
from tests.integration.served import TINY_PLANS

# What takes long is not lost.
PATIENT = Timeouts(connect_s=60.0, step_s=120.0, recover_s=600.0)
# A cloud is left that does not answer a step for so long. Whoever is slow only is left, or picked up, too.
HASTY = Timeouts(connect_s=30.0, step_s=3.0, recover_s=600.0)


class Pair:
    """Two replicas of one model, of which the first names the second as its successor."""

    def __init__(self, model: Path, folder: Path) -> None:
        ports = [free_port(), free_port()]
        self.folder, self.lost = folder, threading.Event()
        common = ["--threads", "1", "--kv-bytes", str(16 << 20), "--plan", TINY_PLANS[0]]
        common += ["--cache-dir", str(folder / "cache")]
        common += ["--grace-period-s", "3600", "--drain-timeout-s", "120"]
        successor = ["--successor", f"127.0.0.1:{ports[1]}"]
        self.one, self.two = (
            CloudProcess(str(model), arguments=[*common, *more], port=port, log=folder / f"log-{port}")
            for port, more in zip(ports, (successor, []), strict=True)
        )
        self.alive: dict[CloudProcess, bool] = dict.fromkeys((self.one, self.two), False)
        self.edges: list[PrivateLoraForCausalLM] = []

    def up(self) -> tuple[CloudProcess, CloudProcess]:
        """Start those that are not there, at the same time; they share a folder, which one has to fill."""
        if not any(self.alive.values()) and not (self.folder / "cache").exists():
            self.start(self.one)
        missing = [cloud for cloud, alive in self.alive.items() if not alive]
        starting = [threading.Thread(target=self.start, args=(cloud,)) for cloud in missing]
        [thread.start() for thread in starting]
        [thread.join() for thread in starting]
        return self.one, self.two

    def start(self, cloud: CloudProcess) -> None:
        cloud.start()
        self.alive[cloud] = True

    def kill(self, cloud: CloudProcess) -> None:
        cloud.kill()
        self.alive[cloud] = False

    def edge(self, cloud: str, **options: Any) -> PrivateLoraForCausalLM:
        """Return an edge with an M that is not zero."""
        self.edges.append(
            PrivateLoraForCausalLM.from_cloud(
                cloud, config_dir=self.folder, cache_dir=self.folder,
                **{"timeouts": PATIENT} | options,
            )
        )  # fmt: skip
        model = self.edges[-1]
        model.set_adapter(Adapter.random(model.adapter.plan, model.adapter.fingerprint, seed=3, std=0.5))
        return model


@pytest.fixture(scope="module")
def pair(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    made = Pair(small_model, tmp_path_factory.mktemp("pair"))
    yield made
    for model in made.edges:
        model.close()
    logs = ""
    for cloud in made.alive:
        cloud.kill()  # told to stop, it would wait for the sessions that went elsewhere
        logs += cloud.logs()
    assert "Traceback" not in logs and "never retrieved" not in logs, logs[-3000:]


def test_a_stream_that_is_cut_is_picked_up_again(pair: Pair) -> None:
    one, _ = pair.up()
    with Relay(one.address) as relay:
        said: list[str] = []
        model = pair.edge(relay.address, say=said.append)
        expected = answer(model)
        before = model.positions()
        assert answer(model, relay.cut) == expected
        assert len(said) == 1 and "reconnecting" in said[0]
        # one step of the answer ran again at most: a replay would have run the prompt once more
        assert model.positions() - before <= NEW + 1
        model.close()


def test_a_frozen_cloud_is_left_and_a_lost_step_is_done_elsewhere(pair: Pair) -> None:
    one, two = pair.up()
    model = pair.edge(f"{one.address},{two.address}", timeouts=HASTY)
    expected = answer(model)
    try:
        assert answer(model, lambda: os.kill(one.pid, signal.SIGSTOP)) == expected
        assert model.connection is not None and model.connection.target == two.address
    finally:
        os.kill(one.pid, signal.SIGCONT)
    alone = pair.edge(one.address, timeouts=HASTY)
    assert answer(alone) == expected
    # longer than a step may take, and nowhere else to go: the session is picked up when it wakes

    def freeze() -> None:
        os.kill(one.pid, signal.SIGSTOP)
        threading.Timer(4.0, os.kill, (one.pid, signal.SIGCONT)).start()

    assert answer(alone, freeze) == expected


def test_a_drained_cloud_hands_over_and_ends_well(pair: Pair) -> None:
    one, two = pair.up()
    said: list[str] = []
    model = pair.edge(one.address, say=said.append)
    expected = answer(model)
    process = one._process
    assert process is not None
    assert answer(model, lambda: process.send_signal(signal.SIGTERM)) == expected
    pair.alive[one] = False
    assert process.wait(120) == 0
    assert model.connection is not None and model.connection.target == two.address
    # gRPC loses the notice to an edge that is sending a step just then; it is told when it asks again
    assert len(said) == 1 and ("shutting down" in said[0] or "being sent" in said[0])


def test_a_cloud_that_was_killed_and_started_again_loses_no_token(pair: Pair) -> None:
    """The other one is started at the same time, for the test after this one."""
    if not pair.alive[pair.two]:
        pair.up()
    model = pair.edge(pair.two.address)
    expected = answer(model)
    starting: list[threading.Thread] = []

    def kill_and_start() -> None:
        pair.kill(pair.two)
        starting.append(threading.Thread(target=pair.up))
        starting[0].start()

    assert answer(model, kill_and_start) == expected
    starting[0].join()


def test_two_replicas_one_killed_lose_no_token(pair: Pair) -> None:
    one, two = pair.up()
    # An edge that waited for the dead one, which stays dead, would give up.
    model = pair.edge(
        f"{one.address},{two.address}", timeouts=Timeouts(connect_s=60.0, step_s=120.0, recover_s=120.0)
    )
    expected = answer(model)
    assert answer(model, lambda: pair.kill(one)) == expected
    assert model.connection is not None and model.connection.target == two.address
