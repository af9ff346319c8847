"""Real ranks: one replica in several processes decodes and tunes as one, and ends as one."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.processes import CloudProcess
from benchmarks.prompts import PROMPTS
from cloud_server.config.cloud import CloudConfig
from cloud_server.parallel_children import BOOT
from edge_client.model import PrivateLoraForCausalLM
from shared import lowrank
from shared.adapter import Adapter
from shared.exactness import compare, continuation, greedy
from shared.models import DEFAULT_MODEL, resolve
from shared.reference import merged
from tests.families import build, prompts
from tests.integration.raw_tune import RawTune
from tests.integration.served import TINY_PLANS, Served
from tests.integration.test_tune import Truth
from tests.parallel import ParallelCloud
from tests.plans import lowrank_for, matrices_for, plan_for
from tests.waiting import until

PATIENCE_S = 300.0


def replica(folder: Path, cache_dir: Path, *arguments: str, dtype: str = "float64") -> CloudProcess:
    """Return a cloud of two ranks, not started."""
    options = ["--kv-bytes", str(16 << 20), "--cache-dir", str(cache_dir), "--threads", "1", *arguments]
    log = cache_dir / f"log-{time.monotonic_ns()}"
    return CloudProcess(str(folder), dtype, [*options, "--plan", TINY_PLANS[0]], log=log)


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def below(pid: int) -> list[int]:
    """Return the processes that a process has started, and those that they have."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            child = int(stat.parent.name)
            found += [child, *below(child)]
    return found


def gone(pids: list[int]) -> bool:
    """Whether none of these runs."""
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


def ended(process: CloudProcess) -> int:
    """Wait for the end of a cloud and return its status."""
    assert process._process is not None
    return process._process.wait(PATIENCE_S)


class Decoding:
    """An edge with an M of its own, and what the merged model says to a prompt."""

    def __init__(self, address: str, folder: Path, cache_dir: Path, prompt: list[int]) -> None:
        pins = cache_dir / f"edge-{len(prompt)}"
        self.edge = PrivateLoraForCausalLM.from_cloud(address, config_dir=pins)
        plan, fingerprint = self.edge.adapter.plan, self.edge.adapter.fingerprint
        self.edge.set_adapter(adapter := Adapter.random(plan, fingerprint, seed=len(prompt), std=0.5))
        ab, _ = lowrank.ensure(plan, resolve(str(folder), progress=False), cache_dir)
        self.expected = [greedy(merged(build("llama"), plan, ab, adapter.matrices), prompt, 16)]

    def verdict(self) -> str:
        """Generate, and return what differs."""
        with self.edge:
            found = compare(self.expected, continuation(self.edge))
        return "" if found.exact else str(found)


def test_edges_decode_while_another_tunes_until_a_rank_is_killed(small_model: Path, cache_dir: Path) -> None:
    with replica(small_model, cache_dir, "--tensor-parallel", "2") as process:
        served = Served(process, small_model, cache_dir)
        decode_and_tune(served)
        (follower,) = below(process.pid)
        os.kill(follower, signal.SIGKILL)
        assert ended(process) == 1
        said = process.logs()
        assert "rank 1 of this replica ended (signal 9)" in said or "out of step" in said  # who noticed first
        assert "the replica ends. Start it again" in said


def decode_and_tune(served: Served) -> None:
    """Let three edges decode and a fourth tune at the same time."""
    with served.raw() as edge, ThreadPoolExecutor() as pool:
        truth = Truth(served, edge, "r8")
        at = (served.address, served.folder, served.cache_dir)
        # Made one after the other: transformers sets torch's default dtype while it makes a model.
        edges = [Decoding(*at, prompt) for prompt in prompts(3, shortest=40)]
        verdicts = [pool.submit(edge.verdict) for edge in edges]
        with RawTune(edge, "r8").open() as stream:
            truth.check(stream)  # gradients of the reference within 1e-9
            truth.check(stream, step=7)
            stream.finish()
        for verdict in verdicts:
            assert not verdict.result(PATIENCE_S)
        assert edge.settled(), "KV bytes leaked"


@pytest.mark.slow
def test_sigterm_ends_all_ranks_in_order(small_model: Path, cache_dir: Path) -> None:
    """Rank 0 says what the status of the others was, if it was not 0; what they say is in the same log."""
    with replica(small_model, cache_dir, "--tensor-parallel", "2", dtype="float32") as process:
        ranks = below(process.pid)
        assert len(ranks) == 1
        os.kill(process.pid, signal.SIGTERM)
        assert ended(process) == 0
        until(lambda: gone(ranks))
        said = process.logs()
        assert "stopping: " in said and "did not end in order" not in said
        assert "Fatal Python error" not in said and "Traceback" not in said


def test_a_rank_does_not_outlive_rank_0(small_model: Path, cache_dir: Path) -> None:
    """Not even where it waits for the others to come, which may take an hour."""
    config = CloudConfig(model=str(small_model), cache_dir=cache_dir, tensor_parallel=2)
    told = {"rank": 1, "size": 2, "store": str(cache_dir / "store"), "config": config.model_dump_json()}
    command = [sys.executable, "-I", "-c", BOOT, json.dumps(sys.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as rank:
        assert rank.stdin is not None
        rank.stdin.write(json.dumps(told).encode() + b"\n")
        rank.stdin.flush()
        until((cache_dir / "store").exists, lambda: rank.poll() is None)
        assert rank.poll() is None, "it should wait"
        rank.stdin.close()  # as the system does when rank 0 is killed
        assert rank.wait(PATIENCE_S) == 1


@pytest.mark.slow
def test_torchrun_starts_the_same_replica(small_model: Path, cache_dir: Path) -> None:
    process = replica(small_model, cache_dir, dtype="float32")
    at = process.command.index("-m")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process.command[at:at] = torchrun
    with process:
        assert not Decoding(process.address, small_model, cache_dir, prompts(1)[0]).verdict()
        ranks = below(process.pid)
        assert len(ranks) >= 2
        os.kill(process.pid, signal.SIGTERM)
        ended(process)  # torchrun itself calls every end by a signal an error
        until(lambda: gone(ranks))
        assert "stopping: " in process.logs() and "cannot go on" not in process.logs()


@pytest.mark.model
def test_the_packaged_model_on_three_ranks() -> None:
    """Nine heads, three key/value heads: three of the one and one of the other on each rank."""
    checkpoint = resolve(DEFAULT_MODEL, progress=False)
    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32)
    plan = plan_for(model, rank=64)
    ab, matrices = lowrank_for(plan, model), matrices_for(plan, std=0.15)
    reference = merged(model, plan, ab, matrices)
    with (
        ParallelCloud(checkpoint.folder, [(plan, ab)], size=3, kv_bytes=64 << 20) as cloud,
        cloud.edge(plan, matrices) as edge,
    ):
        assert cloud.replica.cache.pool.shape[2] == 1
        prompt = AutoTokenizer.from_pretrained(checkpoint.folder)(PROMPTS[0])["input_ids"]
        expected = [greedy(reference, prompt, 8)]
        assert not compare(expected, continuation(model)).exact, "M should matter"
        verdict = compare(expected, continuation(edge))
        assert verdict.exact, str(verdict)
