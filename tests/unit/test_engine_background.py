"""When the engine calls its background: tuning, as `cloud_server.tune_queue.TuneQueue` offers it."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Executor

import pytest

from tests.unit.test_engine import LAYERS, Bench


class Work:
    """Background work that notes how it is called.

    Parameters
    ----------
    bench
        Whose steps it is called between.
    count
        Slices there are.
    """

    def __init__(self, bench: Bench, count: int) -> None:
        self.bench, self.count = bench, count
        self.due_at, self.pause_s = 0.0, 0.0  # when a slice is due (monotonic); how long it waits after one
        self.asked: list[bool] = []  # the values of ``spare``
        self.wanted: list[Callable[[], bool] | None] = []
        self.ran: list[float] = []
        self.log: list[int] = []  # how many runs of the backbone came before each slice
        self.seconds, self.is_running = 0.0, False
        bench.engine.background = self

    def ready(self) -> bool:
        return self.count > 0

    def due_in(self, now: float, *, spare: bool) -> float:
        self.asked.append(spare)
        return self.due_at - now

    async def run_one(self, executor: Executor, wanted: Callable[[], bool] | None = None) -> None:
        self.wanted.append(wanted)
        self.count -= 1
        self.log.append(len(self.bench.backbone.log))
        self.is_running = True
        await asyncio.get_running_loop().run_in_executor(executor, time.sleep, self.seconds)
        self.is_running = False
        self.ran.append(time.monotonic())
        self.due_at = self.ran[-1] + self.pause_s


async def test_where_nobody_decodes_it_runs_without_a_pause() -> None:
    bench = Bench()
    work = Work(bench, 5)
    work.due_at = work.pause_s = time.monotonic() + 3600  # its share is used up, but nobody minds
    async with bench.serving():
        await bench.until(lambda: work.count == 0)
    assert all(work.asked), "nobody is kept waiting"
    assert all(wanted is not None and not wanted() for wanted in work.wanted), "it may go on"


async def test_a_long_step_alone_does_not_stop_it_from_waiting_its_turn() -> None:
    bench = Bench()
    work = Work(bench, 1)
    work.due_at = time.monotonic() + 3600
    async with bench.serving():
        bench.submit(1, 40, known=True)
        await bench.until(lambda: bench.done == [1])
        await bench.until(lambda: work.count == 0)
    assert work.log == [LAYERS], "prefill came first"


async def test_what_is_due_goes_before_a_step_that_is_ready() -> None:
    bench = Bench()
    work = Work(bench, 1)
    bench.submit(1)
    async with bench.serving():
        await bench.until(lambda: bench.done == [1])
    assert work.log == [0] and work.asked[0] is False, "somebody is kept waiting"


async def test_what_is_not_due_lets_all_steps_go_first() -> None:
    bench = Bench(fairness_s=3600)  # so long a step has "just" ended
    work = Work(bench, 1)
    work.due_at = time.monotonic() + 3600
    for number in range(3):
        bench.submit(number)
    async with bench.serving():
        await bench.until(lambda: len(bench.done) == 3)
        assert not work.ran
        await bench.settle()
        assert not work.ran, "a step has just ended: the next one comes any moment"


async def test_while_edges_are_at_work_it_is_called_when_due_and_called_spare() -> None:
    bench = Bench(fairness_s=3600)
    bench.answers = False
    work = Work(bench, 2)
    work.due_at = work.pause_s = time.monotonic() + 3600
    async with bench.serving():
        step = bench.submit(1)
        await bench.until(lambda: bench.codes == [(1, 0)])
        due = work.due_at = time.monotonic() + 0.05
        bench.engine._wake.set()  # or it sleeps until the old time
        await bench.until(lambda: len(work.ran) == 1)
        assert work.ran[0] >= due and work.asked[-1] is True
        await bench.settle()
        assert work.count == 1, "its share is used up"
        bench.answers = True
        bench.answer(step)  # wakes the engine long before the next slice is due
        await bench.until(lambda: bench.done == [1])


@pytest.mark.parametrize("tokens", [1, 40])
async def test_no_step_runs_beside_it(tokens: int) -> None:
    bench = Bench(inline_s=0.0)
    work = Work(bench, 20)
    work.seconds = 0.002

    def check() -> None:
        assert not work.is_running

    bench.backbone.before_run = check
    async with bench.serving():
        for number in range(20):
            bench.submit(number, tokens)
        await bench.until(lambda: len(bench.done) == 20 and work.count == 0)
