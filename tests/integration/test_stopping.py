"""Real clouds that are told to stop, once or twice: how they end, and what is left of a step under way."""

import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from benchmarks.processes import CloudProcess
from tests.integration.raw_edge import RawEdge
from tests.integration.served import TINY_PLANS
from tests.waiting import until

Serve = Callable[[], tuple[CloudProcess, "subprocess.Popen[bytes]"]]
DRAIN_S = 600.0  # far longer than anything here may take


@pytest.fixture
def serve(small_model: Path, tmp_path: Path) -> Iterator[Serve]:
    """Start clouds that give a step under way much time to finish."""
    clouds: list[CloudProcess] = []

    def start() -> tuple[CloudProcess, "subprocess.Popen[bytes]"]:
        arguments = ["--threads", "1", "--kv-bytes", str(16 << 20), "--plan", TINY_PLANS[0]]
        arguments += ["--cache-dir", str(small_model.with_name(f"{small_model.name}-cache"))]
        arguments += ["--drain-timeout-s", str(DRAIN_S)]
        clouds.append(CloudProcess(str(small_model), arguments=arguments, log=tmp_path / "log").start())
        process = clouds[-1]._process
        assert process is not None
        return clouds[-1], process

    yield start
    for cloud in clouds:
        cloud.kill()
        logs = cloud.logs()
        assert "Traceback" not in logs and "never retrieved" not in logs, logs[-3000:]


def test_asked_twice_without_streams_it_ends_well_all_the_same(serve: Serve) -> None:
    """Until it has ended: a signal that finds no handler any more would kill it."""
    _, process = serve()

    def ends() -> bool:
        process.send_signal(signal.SIGTERM)
        return process.poll() is not None

    until(ends)
    assert process.wait(0) == 0


def test_at_its_end_nothing_is_left_in_the_cache(serve: Serve) -> None:
    """Nor of sessions that are held to be resumed; it says so last."""
    cloud, process = serve()
    with RawEdge(cloud.address) as edge:
        stream = edge.open()
        stream.run([(0, 0, 4, 1)])
        assert edge.kv_used > 0
        process.send_signal(signal.SIGTERM)
        assert stream.refused().code is grpc.StatusCode.UNAVAILABLE
        assert process.wait(DRAIN_S / 2) == 0
    logs = cloud.logs()
    assert "closed: stopped" in logs and "stopped: 0 bytes of KV cache" in logs, logs


def test_asked_twice_in_the_middle_of_a_step_it_stops_at_once(serve: Serve) -> None:
    cloud, process = serve()
    with RawEdge(cloud.address) as edge:
        stream = edge.open()
        stream.step()
        assert stream.receive().codes.layer == 0  # from here on the cloud waits for this edge
        process.send_signal(signal.SIGTERM)
        until(lambda: "told to move" in cloud.logs())
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)  # the step may still be finished
        process.send_signal(signal.SIGTERM)
        assert process.wait(DRAIN_S / 2) == 1
        end = stream.refused()
    assert end.code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED), end
    assert "1 streams are cut off" in cloud.logs()
