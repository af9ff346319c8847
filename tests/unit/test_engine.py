"""The scheduler alone, over a backbone that only counts: who runs with whom, and in which order."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
import torch

from cloud_server.backbone import Slice
from cloud_server.config.engine import EngineConfig
from cloud_server.engine import Engine
from cloud_server.kv_cache import KvCache, Row
from cloud_server.step import RowSpan, Step
from shared.families import geometry
from shared.plan import Plan
from tests.families import build

LAYERS, WIDTH = 3, 4
PLAN = Plan.subset(name="p", backbone="b", num_layers=LAYERS, hidden_size=WIDTH, rank=2)
OTHER = Plan.subset((1,), name="other", backbone="b", num_layers=LAYERS, hidden_size=WIDTH, rank=3)
CACHE = KvCache(geometry(build("llama").config), range(LAYERS), 1 << 16, torch.float32, torch.device("cpu"))


PATIENCE_S = 10_000.0  # longer than `Bench.until`: who is waited for in vain fails a test


class Counting:
    """A backbone that does what the engine relies on, and keeps a log of (what, layer, slices)."""

    def __init__(self) -> None:
        self.log: list[tuple[str, int, list[tuple[int, int, int]]]] = []
        self.before_run: Callable[[], object] = lambda: None

    def emit(self, steps: Sequence[Step]) -> list[torch.Tensor]:
        assert len({step.layer for step in steps}) == 1
        self.log.append(("emit", steps[0].layer, [(s.number, 0, s.tokens) for s in steps]))
        for step in steps:
            step.stash, step.emitted = step.hidden, step.layer
        return [torch.zeros(step.tokens, step.plan.codes_width) for step in steps]

    def stash(self, steps: Sequence[Step]) -> None:
        assert all(step.stash is not None for step in steps)

    def run(self, slices: Sequence[Slice], cache: KvCache) -> None:
        layer = slices[0].step.layer
        self.log.append(("run", layer, [(s.step.number, s.lo, s.hi) for s in slices]))
        self.before_run()
        for s in slices:
            step = s.step
            assert step.layer == layer and step.offset == s.lo
            assert layer not in step.plan.adapted_layers or layer in step.residual_codes
            if step.before is not None:
                assert step.before.layer > layer, "a chunk ran before the one in front of it"
            step.offset = s.hi
            if s.hi == step.tokens:
                step.layer, step.offset, step.stash = layer + 1, 0, None

    def runs(self, layer: int) -> list[list[tuple[int, int, int]]]:
        return [slices for what, at, slices in self.log if what == "run" and at == layer]


class Bench:
    """An engine over `Counting`, with an edge that answers when told to."""

    def __init__(self, **config: Any) -> None:
        self.backbone = Counting()
        self.engine = Engine(self.backbone, CACHE, EngineConfig(**{"gather_wait_s": 0.0} | config))  # type: ignore[arg-type]
        self.codes: list[tuple[int, int]] = []  # (step, layer)
        self.done: list[int] = []
        self.answers = True

    def step(
        self, number: int, tokens: int = 1, *, known: bool = False, plan: Plan = PLAN, **more: Any
    ) -> Step:
        step = Step(
            number, plan, (RowSpan(Row(), 0, tokens, 1),), torch.zeros(tokens, WIDTH),
            self._codes, lambda step, _: self.done.append(step.number), **more,
        )  # fmt: skip
        if known:
            step.residual_codes = {
                layer: torch.zeros(tokens, plan.residual_width) for layer in plan.adapted_layers
            }
        return step

    def submit(self, *args: Any, **more: Any) -> Step:
        step = self.step(*args, **more)
        self.engine.submit(step)
        return step

    def _codes(self, step: Step, layer: int, codes: torch.Tensor) -> None:
        assert codes.shape == (step.tokens, step.plan.codes_width)
        self.codes.append((step.number, layer))
        if self.answers:
            self.answer(step)

    def answer(self, step: Step) -> None:
        z = torch.zeros(step.tokens, step.plan.residual_width)
        self.engine.answer(step, {layer: z for layer in step.plan.fed_by(step.layer)})

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Serve; an engine that fails raises here."""
        task = asyncio.create_task(self.engine.serve())
        try:
            yield
            assert not task.done(), task
        finally:
            if task.done():
                task.result()
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for what must come about; pytest's own limit finds what does not."""
        while not condition():
            await asyncio.sleep(0.0005)

    async def settle(self) -> None:
        """Let the engine do more than it should."""
        for _ in range(20):
            await asyncio.sleep(0.001)


# --- who runs with whom -------------------------------------------------------------------------------------


async def test_whoever_is_ready_at_a_layer_runs_together() -> None:
    bench = Bench()
    for number in range(5):
        bench.submit(number)
    async with bench.serving():
        await bench.until(lambda: len(bench.done) == 5)
    together = [(number, 0, 1) for number in range(5)]
    for layer in range(LAYERS):
        assert bench.backbone.runs(layer) == [together]
    assert bench.engine.batches.mean_steps == 5
    assert not bench.engine.steps and not bench.engine.ready


async def test_the_batch_key_is_the_layer_not_the_plan() -> None:
    """Plan `other` exchanges at layer 1 only, where it meets a session of the first plan."""
    bench = Bench()
    bench.answers = False
    one, two = bench.submit(1), bench.submit(2, plan=OTHER)
    async with bench.serving():
        await bench.until(lambda: len(bench.codes) == 2)
        assert set(bench.codes) == {(1, 0), (2, 1)}
        bench.answer(one)
        await bench.until(lambda: (1, 1) in bench.codes)
        bench.answer(one)
        bench.answer(two)
        await bench.until(lambda: len(bench.backbone.runs(1)) > 0)
    assert sorted(bench.backbone.runs(1)[0]) == [(1, 0, 1), (2, 0, 1)]


async def test_a_session_that_waits_for_its_edge_holds_nobody_up() -> None:
    bench = Bench()
    bench.answers = False
    bench.submit(1)
    async with bench.serving():
        await bench.until(lambda: bench.codes == [(1, 0)])
        bench.answers = True
        bench.submit(2)
        await bench.until(lambda: bench.done == [2])
    assert all(
        number != 1 for layer in range(LAYERS) for run in bench.backbone.runs(layer) for number, *_ in run
    )


async def test_a_batch_has_a_largest_size() -> None:
    bench = Bench(max_batch_steps=4)
    for number in range(10):
        bench.submit(number)
    async with bench.serving():
        await bench.until(lambda: len(bench.done) == 10)
    assert max(len(slices) for _, _, slices in bench.backbone.log) == 4


async def test_waiting_a_moment_brings_a_batch_together() -> None:
    """Two answers that arrive one after the other still run as one."""
    bench = Bench(gather_wait_s=PATIENCE_S, fairness_s=PATIENCE_S)
    bench.engine._short_batch_s = PATIENCE_S  # running apart would take as long
    bench.answers = False
    steps = [bench.submit(1), bench.submit(2)]
    async with bench.serving():
        await bench.until(lambda: len(bench.codes) == 2)
        bench.answer(steps[0])
        await bench.settle()
        assert not bench.backbone.runs(0)
        bench.answer(steps[1])
        await bench.until(lambda: bool(bench.backbone.runs(0)))
    assert sorted(bench.backbone.runs(0)[0]) == [(1, 0, 1), (2, 0, 1)]


async def test_everybody_who_was_waited_with_may_be_cancelled() -> None:
    bench = Bench(gather_wait_s=PATIENCE_S, fairness_s=PATIENCE_S)
    bench.engine._short_batch_s = PATIENCE_S  # running apart would take as long
    bench.answers = False
    steps = [bench.submit(1), bench.submit(2)]
    async with bench.serving():
        await bench.until(lambda: len(bench.codes) == 2)
        bench.answer(steps[0])
        await bench.settle()
        assert not bench.backbone.runs(0)
        for step in steps:
            bench.engine.cancel(step)
        bench.engine._wake.set()
        await bench.settle()
        bench.answers = True
        bench.submit(3)
        await bench.until(lambda: bench.done == [3])


@pytest.fixture
def nobody_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take nobody who rests for a person that reads, however slow the machine."""
    monkeypatch.setattr("cloud_server.company.GONE_S", PATIENCE_S)


async def test_sessions_that_have_a_token_now_are_waited_for(nobody_is_gone: None) -> None:
    """The next step of one waits at the first layer for the next step of the other."""
    bench = Bench(start_wait_share=1.0, fairness_s=PATIENCE_S)
    async with bench.serving():
        for number, owner in enumerate("ab"):
            bench.submit(number, owner=owner)
        await bench.until(lambda: len(bench.done) == 2)
        bench.engine._pass_s = PATIENCE_S
        bench.submit(2, owner="a")
        await bench.settle()
        assert len(bench.done) == 2, "it should wait for the other session"
        bench.submit(3, owner="b")
        await bench.until(lambda: len(bench.done) == 4)
    assert bench.backbone.runs(0)[-1] == [(2, 0, 1), (3, 0, 1)]


async def test_a_session_does_not_wait_for_itself_whatever_its_rows(nobody_is_gone: None) -> None:
    """Beams: a token's rows are forked and rearranged, so the next step's first row is another one."""
    bench = Bench(start_wait_share=1.0, fairness_s=PATIENCE_S)
    async with bench.serving():
        for number in range(3):
            bench.submit(number, owner="a")  # of a new row each
            await bench.until(lambda count=number + 1: len(bench.done) == count)
            bench.engine._pass_s = PATIENCE_S


async def test_a_session_that_left_is_not_waited_for(nobody_is_gone: None) -> None:
    bench = Bench(start_wait_share=1.0, fairness_s=PATIENCE_S)
    async with bench.serving():
        for number, owner in enumerate("ab"):
            bench.submit(number, owner=owner)
        await bench.until(lambda: len(bench.done) == 2)
        bench.engine._pass_s = PATIENCE_S
        bench.submit(2, owner="a")
        await bench.settle()
        assert len(bench.done) == 2
        bench.engine.leave("b")
        await bench.until(lambda: len(bench.done) == 3)


# --- short before long --------------------------------------------------------------------------------------


async def test_decoding_goes_before_prefill() -> None:
    bench = Bench(fairness_s=PATIENCE_S)
    bench.submit(1, 200, known=True)
    bench.submit(2, 1, known=True)
    async with bench.serving():
        await bench.until(lambda: len(bench.done) == 2)
    assert bench.done == [2, 1]
    assert [slices[0][0] for _, _, slices in bench.backbone.log][:LAYERS] == [2] * LAYERS


async def test_a_long_step_yields_between_slices() -> None:
    """While somebody decodes, 100 positions run in slices, and decoding goes in between them."""
    bench = Bench(slice_s=1e-9, fairness_s=PATIENCE_S)
    long = bench.submit(1, 100, known=True)
    waiting = bench.submit(2)
    bench.answers = False
    async with bench.serving():
        await bench.until(lambda: bench.codes == [(2, 0)] and bench.done == [1])
        assert long.layer == LAYERS
        bench.answer(waiting)
        await bench.settle()
    slices = [s for run in bench.backbone.runs(0) for s in run if s[0] == 1]
    assert [lo for _, lo, _ in slices] == [0, *[hi for _, _, hi in slices[:-1]]] and slices[-1][2] == 100
    assert all(hi - lo <= 16 for _, lo, hi in slices)
    assert bench.done == [1]

    bench = Bench(slice_s=1e-9, fairness_s=PATIENCE_S)
    log: list[str] = []
    loop = asyncio.get_running_loop()

    def note() -> None:
        if (
            not log
        ):  # during the first slice, wherever that runs: a fast machine is done before a test can poll
            loop.call_soon_threadsafe(bench.submit, 2)
        log.append("s" if bench.backbone.log[-1][2][0][0] == 2 else "l")

    bench.backbone.before_run = note
    bench.submit(1, 100, known=True)
    async with bench.serving():
        await bench.until(lambda: len(bench.done) == 2)
    assert bench.done == [2, 1]
    assert "l" in "".join(log)[: "".join(log).rindex("s")], "the decode should have cut in"


async def test_a_long_step_alone_is_not_cut() -> None:
    bench = Bench()
    bench.submit(1, 100, known=True)
    async with bench.serving():
        await bench.until(lambda: bench.done == [1])
    assert [bench.backbone.runs(layer) for layer in range(LAYERS)] == [[[(1, 0, 100)]]] * LAYERS


async def test_long_steps_take_turns() -> None:
    bench = Bench(slice_s=1e-9)
    bench.submit(9, 1)
    bench.answers = False  # a decode in flight, so that long steps are cut
    bench.submit(1, 64, known=True)
    bench.submit(2, 64, known=True)
    async with bench.serving():
        await bench.until(lambda: len(bench.done) == 2)
    order = [slices[0][0] for what, _, slices in bench.backbone.log if what == "run"]
    assert order[:4] == [1, 2, 1, 2]


async def test_a_group_that_waited_long_goes_before_a_larger_one() -> None:
    bench = Bench(fairness_s=0.001)
    old = bench.step(1, known=True)
    old.layer = 2
    bench.engine.submit(old)
    await asyncio.sleep(0.01)
    for number in (2, 3, 4):
        bench.submit(number, known=True)
    assert [s.step.number for s in bench.engine.gather()[0]] == [1]
    bench.engine.config = EngineConfig(fairness_s=PATIENCE_S)
    assert [s.step.number for s in bench.engine.gather()[0]] == [2, 3, 4]


# --- chunks of one session ----------------------------------------------------------------------------------


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("tokens", [1, 40])
async def test_chunks_follow_each_other_through_the_layers(tokens: int, known: bool) -> None:
    bench = Bench(slice_s=1e-9)
    before = None
    steps = []
    for number in range(6):
        before = bench.submit(number, tokens, known=known, before=before)
        steps.append(before)
    async with bench.serving():
        await bench.until(lambda: len(bench.done) == 6)  # `Counting.run` checks the order at every layer
    assert bench.done == sorted(bench.done)
    assert all(step.before is None for step in steps), "a chain of steps keeps all that a stream ever sent"


# --- cancelling ---------------------------------------------------------------------------------------------


async def test_a_cancelled_step_is_forgotten_wherever_it_stands() -> None:
    bench = Bench()
    bench.answers = False
    ready, waiting = bench.submit(1), bench.submit(2)
    async with bench.serving():
        await bench.until(lambda: len(bench.codes) == 2)
        bench.answer(ready)
        bench.engine.cancel(ready)
        bench.engine.cancel(waiting)
        bench.engine.cancel(waiting)  # twice is no harm
        bench.answer(waiting)  # a late answer neither
        await bench.settle()
    assert not bench.backbone.runs(0) and not bench.engine.steps and not bench.engine.ready


async def test_a_running_step_is_cancelled_without_an_answer() -> None:
    bench = Bench(inline_s=0.0)
    entered, go_on = threading.Event(), threading.Event()

    def pause() -> None:
        entered.set()
        go_on.wait()

    bench.backbone.before_run = pause
    step = bench.submit(1, known=True)
    async with bench.serving():
        await bench.until(entered.is_set)
        bench.engine.cancel(step)
        go_on.set()
        bench.submit(2, known=True)
        await bench.until(lambda: bench.done == [2])
    assert bench.codes == []
