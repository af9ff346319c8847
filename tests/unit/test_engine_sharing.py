"""Identities share the engine in turn, and who takes too much memory is given up alone."""

import errno
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cloud_server.config.cloud import CloudConfig
from cloud_server.config.plans import PlanConfig
from cloud_server.config.tuning import TuningConfig
from cloud_server.kv_cache import KvCache
from cloud_server.memory import available_bytes, is_out_of_memory, needing_memory
from cloud_server.server import build_service, check_memory
from cloud_server.step import Step
from cloud_server.tune_queue import Job, TuneQueue
from cloud_server.turns import Turns
from shared.families import geometry
from tests.families import build, save
from tests.unit.test_engine import LAYERS, Bench

LONG = 40  # positions of a step that counts as prefill


def exhausted() -> Exception:
    """Return what torch says when memory is really lacking."""
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 60, dtype=torch.uint8)
    return error.value


# --- turns ------------------------------------------------------------------------------------------------


def test_who_had_least_is_next_whoever_asks_most_often() -> None:
    turns, given = Turns(), Counter[str]()
    for _ in range(60):  # alice has nine things waiting, bob one
        name = turns.order(["alice"] * 9 + ["bob"], str)[0]
        turns.charge(name, 3.0)
        given[name] += 1
    assert given == {"alice": 30, "bob": 30}


def test_shares_are_of_amounts_not_of_turns() -> None:
    turns, given = Turns(), Counter[str]()
    for _ in range(90):
        name = turns.order(["large", "small"], str)[0]
        amount = 8 if name == "large" else 1
        turns.charge(name, amount)
        given[name] += amount
    assert abs(given["large"] - given["small"]) <= 8


def test_who_was_away_has_no_claim_to_what_it_missed() -> None:
    turns, given = Turns(), Counter[str]()
    for _ in range(50):
        turns.charge("alice", 1.0)
    for _ in range(20):
        name = turns.order(["alice", "bob"], str)[0]
        turns.charge(name, 1.0)
        given[name] += 1
    assert given == {"alice": 10, "bob": 10}


async def test_prefill_is_shared_by_identity_not_by_session() -> None:
    """One prefills eight prompts and one a single one: the single one does not wait for all eight."""
    bench = Bench(max_batch_tokens=8, slice_s=1e-9)
    for number in range(8):
        bench.submit(number, LONG, known=True, payer="alice")
    bench.submit(100, LONG, known=True, payer="bob")
    async with bench.serving():
        await bench.until(lambda: len(bench.done) == 9)
    assert bench.done.index(100) <= 1, bench.done
    ran = Counter[str]()
    for _, _, slices in bench.backbone.log:
        for number, lo, hi in slices:
            ran["bob" if number == 100 else "alice"] += hi - lo
        if ran["bob"] < LONG * LAYERS:
            assert abs(ran["bob"] - ran["alice"]) <= 2 * LONG
    assert ran == {"alice": 8 * LONG * LAYERS, "bob": LONG * LAYERS}


class Batch:
    """Tuning work that is always ready; a slice is one unit of it, of three seconds by the test's clock."""

    tokens, finished, may_share, pieces = 1, False, False, ()

    def __init__(self) -> None:
        self.ran, self.changed = 0, threading.Condition()

    def next(self, running: Any = ()) -> Any:
        return type("Piece", (), {"stage": 0, "tokens": 1})()

    def run(self, piece: Any) -> None:
        self.ran += 1

    def free(self) -> None: ...


async def test_tuning_is_shared_by_identity_not_by_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    queue, now = TuneQueue(TuningConfig(), 0.0, lambda: None), [0.0]

    def clock() -> float:
        now[0] += 1.0
        return now[0]

    for module in ("tune_queue", "tune_slice"):
        times = SimpleNamespace(monotonic=clock, perf_counter=clock)
        monkeypatch.setattr(f"cloud_server.{module}.time", times)
    jobs = [_job("alice") for _ in range(5)] + [_job("bob")]
    for job in jobs:
        queue.add(job)
    with ThreadPoolExecutor(1) as executor:
        for _ in range(40):
            await queue.run_one(executor)
    ran = [job.batch.ran for job in jobs]
    assert ran == [4] * 5 + [20], "and those of one identity take turns too"


def _job(payer: str) -> Any:
    batch: Any = Batch()
    return Job(batch, *(lambda *_: None,) * 4, payer)


# --- no memory --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inline", [True, False])
async def test_a_step_without_memory_is_given_up_and_the_others_go_on(inline: bool) -> None:
    bench = Bench(**{} if inline else {"inline_s": 0.0})
    failed: list[tuple[int, Exception]] = []

    def fail(step: Step, error: Exception) -> None:
        failed.append((step.number, error))

    def before_run() -> None:
        if any(number == 7 for number, *_ in bench.backbone.log[-1][2]):
            torch.empty(1 << 60, dtype=torch.uint8)  # no machine has that

    bench.backbone.before_run = before_run
    for number in range(5):
        bench.submit(number, on_failed=fail)
    bench.submit(7, 3, on_failed=fail)
    bench.submit(50, LONG, known=True, on_failed=fail)
    async with bench.serving():
        await bench.until(lambda: len(bench.done) == 6)
    assert [number for number, _ in failed] == [7] and is_out_of_memory(failed[0][1])
    assert sorted(bench.done) == [0, 1, 2, 3, 4, 50] and not bench.engine.steps and not bench.engine.ready


async def test_codes_that_could_not_be_computed_are_computed_again() -> None:
    bench, tried = Bench(), []
    emit = bench.backbone.emit

    def sometimes(steps: Any) -> Any:
        found = emit(steps)  # marks them as emitted, as the real one does before its last product
        tried.append([step.number for step in steps])
        if len(tried) == 1:
            raise MemoryError
        return found

    bench.backbone.emit = sometimes  # type: ignore[method-assign]
    failed: list[int] = []
    for number, tokens in ((1, 2), (2, 1), (3, 1)):
        bench.submit(number, tokens, on_failed=lambda step, _: failed.append(step.number))
    async with bench.serving():
        await bench.until(lambda: len(bench.done) == 2)
    assert failed == [1] and tried[:2] == [[1, 2, 3], [2, 3]] and sorted(bench.done) == [2, 3]


async def test_any_other_fault_still_ends_the_engine() -> None:
    bench = Bench()

    def fault() -> None:
        raise RuntimeError("the sizes of tensors must match")

    bench.backbone.before_run = fault
    bench.submit(1)
    with pytest.raises(RuntimeError, match="sizes of tensors"):
        async with bench.serving():
            await bench.settle()


def test_what_says_that_memory_is_lacking() -> None:
    assert is_out_of_memory(exhausted()) and is_out_of_memory(MemoryError())
    assert is_out_of_memory(OSError(errno.ENOMEM, "x")) and not is_out_of_memory(OSError(errno.ENOSPC, "x"))
    assert not is_out_of_memory(RuntimeError("the sizes of tensors must match"))


@pytest.mark.parametrize("size", [1 << 62, 1 << 70])
def test_a_cache_that_no_machine_holds_names_the_flag(size: int) -> None:
    with pytest.raises(ValueError, match="lower --kv-bytes"), needing_memory("lower --kv-bytes"):
        KvCache(geometry(build("llama").config), range(4), size, torch.float32, torch.device("cpu"))


def test_a_cloud_does_not_start_with_a_cache_that_no_machine_holds(tmp_path: Path) -> None:
    plans = (PlanConfig(name="r8", r_c2d=8, r_d2c=8),)
    config = CloudConfig(
        model=str(save("llama", tmp_path / "m")), cache_dir=tmp_path / "cache", kv_bytes=1 << 50, plans=plans
    )
    with pytest.raises(ValueError, match=r"no memory for a KV cache of .* lower --kv-bytes \(1125"):
        build_service(config, progress=False)


def test_more_than_there_is_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    check_memory(1, 1)
    assert not caplog.text
    check_memory(1 << 60, 0)
    assert "lower --kv-bytes" in caplog.text


def test_memory_that_is_free_within_a_container(tmp_path: Path) -> None:
    assert available_bytes(tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    2048 kB\n")
    assert available_bytes(tmp_path) == 2 << 20
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    assert available_bytes(tmp_path) == 2 << 20
    (group / "memory.max").write_text(f"{3 << 20}\n")
    (group / "memory.current").write_text(f"{2 << 20}\n")
    assert available_bytes(tmp_path) == 1 << 20
