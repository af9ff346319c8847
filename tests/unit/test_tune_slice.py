"""A slice of tuning: pieces side by side give the bits that they give in turn, and keep their order."""

import gc
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from cloud_server.backbone import Backbone
from cloud_server.tune_piece import Piece, Stage
from cloud_server.tune_slice import TuneSlice
from cloud_server.tuning import TuneBatch
from shared.models import resolve
from tests.families import build, plan_for, prompts
from tests.plans import lowrank_for, matrices_for
from tests.tuning import Head, tune_directly

HANG_S = 900.0  # only what hangs takes as long


@pytest.fixture(scope="module")
def backbone(folder_of) -> Backbone:
    model = build("llama")
    plan = plan_for(model)
    return Backbone(
        resolve(str(folder_of("llama")), progress=False), {"test": (plan, lowrank_for(plan, model))}
    )


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    with ThreadPoolExecutor(3) as made:
        yield made
    torch.set_num_threads(before)


def batch_of(backbone: Backbone, pieces: int, **options: Any) -> TuneBatch:
    batch = TuneBatch(
        backbone, backbone.plans["test"], [4] * pieces, lambda *_: None, piece_tokens=4, **options
    )
    batch.put("hidden", 0, 0, torch.randn(4 * pieces, 48, generator=torch.Generator().manual_seed(0)))
    return batch


def slice_of(batch: TuneBatch, pool: ThreadPoolExecutor, **more: Any) -> TuneSlice:
    options: dict[str, Any] = {"slice_s": 0.0, "is_cancelled": lambda: False} | more
    return TuneSlice(batch, {}, options.pop("slice_s"), options.pop("is_cancelled"), pool, **options)


def test_pieces_side_by_side_give_the_same_bits(backbone: Backbone, pool: ThreadPoolExecutor) -> None:
    model = build("llama")
    plan, sequences = backbone.plans["test"], [*prompts(3), *prompts(2)]
    head, matrices = Head(model), matrices_for(backbone.plans["test"])
    torch.set_num_threads(1)
    loss, expected, hidden = tune_directly(backbone, plan, matrices, head, sequences, piece_tokens=20)
    torch.set_num_threads(3)
    for _ in range(5):
        found = tune_directly(backbone, plan, matrices, head, sequences, pool=pool, piece_tokens=20)
        assert found[0] == loss and torch.equal(found[2], hidden)
        assert all(torch.equal(found[1][layer], gradient) for layer, gradient in expected.items())


def test_as_many_run_at_once_as_there_are_threads(
    backbone: Backbone, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, meeting, run = batch_of(backbone, 2), threading.Barrier(2), TuneBatch.run
    threads: list[int] = []

    def meet(self: TuneBatch, piece: Piece) -> None:
        if (piece.index, piece.stage) in ((0, Stage.STASH), (1, Stage.EMIT)):
            meeting.wait(HANG_S)
            threads.append(torch.get_num_threads())
        run(self, piece)

    monkeypatch.setattr(TuneBatch, "run", meet)
    slice_of(batch, pool, is_wanted=lambda: False).run()
    assert threads == [1, 1] and torch.get_num_threads() == 3


def test_who_is_behind_does_not_overtake(backbone: Backbone) -> None:
    batch = batch_of(backbone, 3)
    first = batch.next()
    assert first is batch.pieces[0]
    assert batch.next([first]) is None, "all others are where it is"
    batch.run(first)
    assert first.stage is Stage.STASH
    second = batch.next([first])
    assert second is batch.pieces[1] and second.stage is Stage.EMIT
    assert batch.next([first, second]) is None
    batch.run(second)
    assert batch.next([second]) is batch.pieces[2] or batch.next([second]) is first


@pytest.mark.parametrize("forward_only", [False, True])
def test_who_is_behind_comes_to_a_tensor_when_who_is_in_front_has_sent_its_rows(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch, forward_only: bool
) -> None:
    """Whoever looks for work while rows are about to leave must not find what sends those after them."""
    batch, plan = batch_of(backbone, 2, forward_only=forward_only), backbone.plans["test"]
    send, sent = TuneBatch._send, 0
    began: tuple[bool, int, int]  # the unit under way

    def look(self: TuneBatch, name: str, layer: int, piece: Piece, rows: torch.Tensor) -> None:
        nonlocal sent
        behind = self.next([piece])
        assert behind is None or behind.index < piece.index or behind.unit < began, f"{name} may overtake"
        sent += 1
        send(self, name, layer, piece, rows)

    monkeypatch.setattr(TuneBatch, "_send", look)
    for layer in plan.owners:
        batch.put("residual_codes", layer, 0, torch.zeros(8, plan.residual_width))
    if not forward_only:
        batch.put("hidden_gradient", 0, 0, torch.zeros(8, 48))
        for layer in plan.exchange_layers[1:]:
            batch.put("codes_gradient", layer, 0, torch.zeros(8, plan.codes_width))
    messages = 2 * len(batch._left)
    while (piece := batch.next()) is not None:
        began = piece.unit
        batch.run(piece)
    assert batch.finished and sent == messages


def test_a_single_piece_has_all_threads(backbone: Backbone, pool: ThreadPoolExecutor) -> None:
    one = slice_of(batch_of(backbone, 1), pool)
    assert (one.workers, one.threads) == (1, 3)
    two = slice_of(batch_of(backbone, 2), pool)
    assert (two.workers, two.threads) == (2, 1)


def test_layers_that_keep_products_in_their_modules_run_alone(
    backbone: Backbone, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backbone.layers[1], "lean", None)
    assert slice_of(batch_of(backbone, 3), pool).workers == 1


def test_what_a_unit_raises_reaches_who_runs_the_slice(
    backbone: Backbone, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, run, failed = batch_of(backbone, 3), TuneBatch.run, threading.Event()

    def fail(self: TuneBatch, piece: Piece) -> None:
        if piece.index == 1:
            failed.set()
            raise IndexError("broken")
        run(self, piece)

    monkeypatch.setattr(TuneBatch, "run", fail)
    with pytest.raises(IndexError, match="broken"):
        slice_of(batch, pool, is_wanted=lambda: False).run()
    assert failed.is_set() and torch.get_num_threads() == 3


def test_what_a_unit_raised_is_gone_when_it_was_dealt_with(
    backbone: Backbone, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its frames hold what the unit computed with; a collector may come late, to a cloud that is idle."""
    batch, run = batch_of(backbone, 2), TuneBatch.run
    caller, failed, began = threading.current_thread(), threading.Event(), False

    class Broken(Exception):  # the built-in ones know no weak references
        pass

    def fail(self: TuneBatch, piece: Piece) -> None:
        nonlocal began
        if threading.current_thread() is not caller:
            failed.set()
            raise Broken
        if began:
            failed.wait(HANG_S)
        else:  # without it there is nothing for a second thread to do
            began = True
            run(self, piece)

    monkeypatch.setattr(TuneBatch, "run", fail)
    gc.disable()
    try:
        with ThreadPoolExecutor(1) as others:
            slice_of(batch, others, is_wanted=lambda: False).run()
        pytest.fail("the other thread's error got lost")
    except Broken as error:
        left = weakref.ref(error)
    finally:
        gc.enable()
    assert left() is None


def test_where_no_thread_can_be_started_nothing_runs_on_behind_the_batch(
    backbone: Backbone, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever has the batch frees it then, and gives its memory to the next one."""
    batch, run, start = batch_of(backbone, 3), TuneBatch.run, threading.Thread.start
    made = slice_of(batch, pool, is_wanted=lambda: False)
    began, over = threading.Event(), threading.Event()
    running: list[Piece] = []

    def held(self: TuneBatch, piece: Piece) -> None:
        running.append(piece)
        began.set()
        while not (made._failed or over.wait(0.001)):
            pass
        run(self, piece)
        running.remove(piece)

    def refuse(self: threading.Thread) -> None:
        if began.is_set():
            raise RuntimeError("can't start new thread")
        start(self)
        assert began.wait(HANG_S)

    monkeypatch.setattr(TuneBatch, "run", held)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    try:
        with pytest.raises(RuntimeError, match="can't start new thread"):
            made.run()
        assert not running
    finally:
        over.set()
    pool.submit(int).result()  # the call that waited for a thread has had its turn
    assert [piece.stage for piece in batch.pieces] == [Stage.STASH, Stage.EMIT, Stage.EMIT]


def test_a_slice_ends_with_its_time_or_when_somebody_wants_to_compute(
    backbone: Backbone, pool: ThreadPoolExecutor
) -> None:
    def ran(**options: Any) -> int:
        batch, units = batch_of(backbone, 1), 0
        run = batch.run

        def count(piece: Piece) -> None:
            nonlocal units
            units += 1
            run(piece)

        batch.run = count  # type: ignore[method-assign]
        slice_of(batch, pool, **options).run()
        return units

    assert ran(slice_s=0.0) == 1, "one unit at least"
    assert ran(is_wanted=lambda: True) == 1
    assert ran(is_wanted=lambda: False) == 2, "codes and the base products; then it waits for the edge"
    assert ran(is_cancelled=lambda: True) == 0
