"""A session's checks: what is refused with which status, and that a refusal changes nothing."""

import tracemalloc
from collections.abc import Sequence
from typing import Any

import grpc
import numpy as np
import pytest
import torch

from cloud_server.refusal import Refusal
from shared import wire
from shared.pb.privatelora.v1 import private_lora_pb2 as pb
from shared.plan import Plan
from shared.wire_dtypes import WireDtypes
from tests.unit.session_talk import UINT32, UINT64, WIDTH, Talk, two_rows, zeros

Code = grpc.StatusCode


@pytest.fixture
def talk() -> Talk:
    return two_rows()


def filled(value: float) -> pb.Tensor:
    return wire.encode(torch.full((2, WIDTH), value), pb.DTYPE_FLOAT32)


def test_a_million_spans_are_only_counted(talk: Talk) -> None:
    """A message may hold two million empty ones; as objects they would stop everybody for seconds."""
    message = pb.Step(step=99, spans=[pb.Span()] * 1_000_000)
    tracemalloc.start()
    try:
        with pytest.raises(Refusal, match="1 to 4 spans, got 1000000"):
            talk.session.step(message)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


# --- steps --------------------------------------------------------------------------------------------------

Spans = Sequence[tuple[int, int, int, int]]
NEXT: Spans = [(0, 5, 2, 1)]
BAD: dict[str, tuple[Spans, dict[str, Any], Code, str]] = {
    "shape": (NEXT, {"hidden": zeros(3, WIDTH)}, Code.INVALID_ARGUMENT, r"hidden: shape is \(3, 8\)"),
    "width": (NEXT, {"hidden": zeros(2, WIDTH + 1)}, Code.INVALID_ARGUMENT, r"expected \(2, 8\)"),
    "rank one": (NEXT, {"hidden": zeros(2 * WIDTH)}, Code.INVALID_ARGUMENT, "shape"),
    "rank three": (NEXT, {"hidden": zeros(1, 2, WIDTH)}, Code.INVALID_ARGUMENT, "shape"),
    "dtype": (NEXT, {"hidden": zeros(2, WIDTH, dtype=pb.DTYPE_FLOAT16)}, Code.INVALID_ARGUMENT, "float16"),
    "no tensor": (NEXT, {"hidden": pb.Tensor()}, Code.INVALID_ARGUMENT, "dtype"),
    "NaN": (NEXT, {"hidden": filled(float("nan"))}, Code.INVALID_ARGUMENT, "NaN or infinity"),
    "infinity": (NEXT, {"hidden": filled(float("inf"))}, Code.INVALID_ARGUMENT, "NaN or infinity"),
    "gap": ([(0, 6, 2, 1)], {}, Code.FAILED_PRECONDITION, "position gap: row 0 holds 5 positions"),
    "gap in another row": ([(0, 5, 1, 1), (1, 4, 1, 1)], {}, Code.FAILED_PRECONDITION, "row 1 holds 3"),
    "gap in a new row": ([(2, 1, 1, 1)], {}, Code.FAILED_PRECONDITION, "row 2 holds 0"),
    "huge start": ([(0, UINT32, 2, 1)], {}, Code.FAILED_PRECONDITION, "gap"),
    "oversized": (
        [(0, 5, 51, 1)],
        {},
        Code.INVALID_ARGUMENT,
        "at most 50 positions, got 51; send it in chunks",
    ),
    "oversized together": ([(0, 5, 26, 1), (1, 3, 25, 1)], {}, Code.INVALID_ARGUMENT, "got 51"),
    "huge count": ([(0, 5, UINT32, 1)], {}, Code.INVALID_ARGUMENT, "at most 50"),
    "codes again and again": (
        NEXT,
        {"residual_codes": [pb.LayerCodes(layer=0, codes=zeros(2, 9))] * 3},
        Code.INVALID_ARGUMENT,
        "3 residual codes in one step; plan 'p' takes 2 at most",
    ),
    "no span": ([], {}, Code.INVALID_ARGUMENT, "1 to 4 spans, got 0"),
    "many spans": ([(row, 0, 1, 1) for row in range(5)], {}, Code.INVALID_ARGUMENT, "1 to 4 spans, got 5"),
    "empty span": ([(0, 5, 0, 0)], {}, Code.INVALID_ARGUMENT, "count >= 1"),
    "keep": ([(0, 5, 2, 3)], {}, Code.INVALID_ARGUMENT, "keep <= count"),
    "huge keep": ([(0, 5, 2, UINT32)], {}, Code.INVALID_ARGUMENT, "keep <= count"),
    "row twice": ([(0, 5, 1, 1), (0, 6, 1, 1)], {}, Code.INVALID_ARGUMENT, "row 0 is named twice"),
    "row beyond": ([(4, 0, 2, 1)], {}, Code.INVALID_ARGUMENT, "beyond the 4"),
    "huge row": ([(UINT32, 0, 2, 1)], {}, Code.INVALID_ARGUMENT, "beyond the 4"),
    "row left out": ([(3, 0, 2, 1)], {}, Code.INVALID_ARGUMENT, "without gaps"),
    "row left out after parents": ([(2, 0, 2, 1)], {"parents": [0]}, Code.INVALID_ARGUMENT, "without gaps"),
    "many parents": (NEXT, {"parents": [0] * 5}, Code.INVALID_ARGUMENT, "at most 4 rows, got 5 parents"),
    "parent": (NEXT, {"parents": [0, 2]}, Code.INVALID_ARGUMENT, "beyond the session's 2"),
    "huge parent": (NEXT, {"parents": [UINT32]}, Code.INVALID_ARGUMENT, "beyond the session's 2"),
    "gap after parents": ([(0, 5, 1, 1)], {"parents": [1, 0]}, Code.FAILED_PRECONDITION, "row 0 holds 3"),
    "same number": (NEXT, {"step": 1}, Code.INVALID_ARGUMENT, "step number 1 is not above the last one, 1"),
    "number zero": (NEXT, {"step": 0}, Code.INVALID_ARGUMENT, "not above"),
    "codes of no layer": (
        NEXT,
        {"residual_codes": [pb.LayerCodes(layer=1, codes=zeros(2, 9))]},
        Code.INVALID_ARGUMENT,
        "layer 1 is not adapted in plan 'p'",
    ),
    "huge layer": (
        NEXT,
        {"residual_codes": [pb.LayerCodes(layer=UINT32, codes=zeros(2, 9))]},
        Code.INVALID_ARGUMENT,
        "not adapted",
    ),
    "codes' shape": (
        NEXT,
        {"residual_codes": [pb.LayerCodes(layer=2, codes=zeros(2, 6))]},
        Code.INVALID_ARGUMENT,
        r"residual codes of layer 2: shape is \(2, 6\), expected \(2, 9\)",
    ),
}


@pytest.mark.parametrize(("spans", "fields", "code", "words"), BAD.values(), ids=BAD)
def test_a_step_that_cannot_be(talk: Talk, spans: Spans, fields: dict, code: Code, words: str) -> None:
    talk.refuses(code, words, *spans, **fields)
    talk.step(*NEXT, finish=True)
    assert talk.lengths == [7, 3]


def test_the_context_ends_where_it_says() -> None:
    talk = Talk()
    talk.step((0, 0, 50, 1), finish=True)
    talk.step((0, 50, 49, 1), finish=True)
    talk.refuses(Code.OUT_OF_RANGE, "row 0 would hold 101 positions; the context ends at 100", (0, 99, 2, 1))
    talk.step((0, 99, 1, 1), finish=True)
    talk.refuses(Code.OUT_OF_RANGE, "would hold 101", (0, 100, 1, 1))


def test_steps_count_from_one() -> None:
    """An edge whose first step was lost must not read 0, which is no step, as that one's number."""
    talk = Talk()
    talk.refuses(Code.INVALID_ARGUMENT, "not above the last one, 0", (0, 0, 3, 1), step=0)
    talk.step((0, 0, 3, 1), step=1)


def test_the_largest_number_is_the_last() -> None:
    talk = Talk()
    talk.step((0, 0, 1, 1), step=UINT64, finish=True)
    talk.refuses(Code.INVALID_ARGUMENT, "not above", (0, 1, 1, 1), step=UINT64)


def test_only_so_many_steps_fly(talk: Talk) -> None:
    for start in (5, 6, 7):
        talk.step((0, start, 1, 1))
    talk.refuses(Code.INVALID_ARGUMENT, "more than 3 steps in flight", (0, 8, 1, 1))
    talk.step((0, 7, 1, 1))  # overwrites the third
    assert list(talk.session.steps) == [2, 3, 5]


def test_rows_stay_as_they_are_under_a_step(talk: Talk) -> None:
    talk.step((0, 5, 1, 1))
    talk.refuses(Code.INVALID_ARGUMENT, "rearranged while steps are in flight", (0, 3, 1, 1), parents=[1, 0])


# --- residual codes -----------------------------------------------------------------------------------------


def test_answers_come_in_order(talk: Talk) -> None:
    step = talk.step(*NEXT)
    with pytest.raises(Refusal, match=r"layer 0 out of order: step 2 stands at layer 0 and waits for \[\]"):
        talk.answer((0, zeros(2, 9)))  # no codes were sent yet
    talk.stand(step, 0)
    for layer in (1, 2, 3, UINT32):
        with pytest.raises(Refusal, match=f"layer {layer} out of order") as refusal:
            talk.answer((layer, zeros(2, 9)))
        assert refusal.value.code is Code.INVALID_ARGUMENT
    with pytest.raises(Refusal, match="out of order"):
        talk.answer((0, zeros(2, 9)), (0, zeros(2, 9)))
    with pytest.raises(Refusal, match="without any layer"):
        talk.answer()
    assert talk.engine.answers == []
    talk.answer((0, zeros(2, 9)))
    with pytest.raises(Refusal, match="out of order"):
        talk.answer((0, zeros(2, 9)))
    talk.stand(step, 2)
    with pytest.raises(Refusal, match="layer 0 out of order"):
        talk.answer((0, zeros(2, 9)))
    talk.answer((2, zeros(2, 9)))
    assert talk.engine.answers == [(2, [0]), (2, [2])]


def test_answers_to_steps_that_are_gone_are_ignored(talk: Talk) -> None:
    talk.step(*NEXT)
    talk.step((0, 5, 1, 1))  # overwrites it
    talk.answer((0, pb.Tensor()), step=2)
    talk.answer((0, pb.Tensor()), step=1)
    with pytest.raises(Refusal, match="step 4, which was never sent"):
        talk.answer((0, zeros(2, 9)), step=4)
    assert talk.engine.answers == []


@pytest.mark.parametrize(
    ("codes", "words"),
    [
        (zeros(1, 9), r"shape is \(1, 9\), expected \(2, 9\)"),
        (zeros(2, 6), "shape"),
        (zeros(18), "shape"),
        (zeros(2, 9, dtype=pb.DTYPE_BFLOAT16), "dtype is bfloat16"),
        (wire.encode(torch.full((2, 9), float("nan")), pb.DTYPE_FLOAT32), "NaN or infinity"),
    ],
)
def test_answers_are_checked_like_steps(talk: Talk, codes: pb.Tensor, words: str) -> None:
    talk.stand(talk.step(*NEXT), 0)
    with pytest.raises(Refusal, match=words) as refusal:
        talk.answer((0, codes))
    assert refusal.value.code is Code.INVALID_ARGUMENT and talk.engine.answers == []


# --- int8 ---------------------------------------------------------------------------------------------------


def scaled(rows: int, width: int, *scales: float) -> pb.Tensor:
    raw = np.array(scales, "<f4").tobytes()
    return pb.Tensor(dtype=wire.INT8, shape=[rows, width], data=bytes(rows * width), scales=raw)


BAD_SCALES: dict[str, tuple[list[float], str]] = {
    "none": ([], r"0 bytes of scales, expected \d+"),
    "too few": ([1], r"4 bytes of scales, expected \d+"),
    "too many": ([1] * 7, r"28 bytes of scales, expected \d+"),
    "negative": ([1, -1], "a scale is negative"),
    "not a number": ([1, float("nan")], "holds NaN or infinity"),
    "infinite": ([1, float("inf")], "holds NaN or infinity"),
    "too large": ([1, 3e36], "a scale is so large that 127 times it is infinite"),
}


@pytest.mark.parametrize(("scales", "words"), BAD_SCALES.values(), ids=BAD_SCALES)
def test_scales_that_cannot_be(scales: list[float], words: str) -> None:
    talk = Talk(dtypes=WireDtypes.all(wire.INT8))
    talk.step((0, 0, 2, 1), hidden=scaled(2, WIDTH, 1, 1))
    talk.refuses(Code.INVALID_ARGUMENT, f"^hidden: {words}", (0, 2, 2, 1), hidden=scaled(2, WIDTH, *scales))
    talk.stand(talk.engine.steps[-1], 0)
    of_groups = scales if len(scales) != 2 else [*scales, 1, 1, 1, 1]  # three groups in each of two rows
    with pytest.raises(Refusal, match=f"^residual codes of layer 0: {words}") as refusal:
        talk.answer((0, scaled(2, 9, *of_groups)))
    assert refusal.value.code is Code.INVALID_ARGUMENT and talk.engine.answers == []
    talk.answer((0, scaled(2, 9, *[1] * 6)))
    assert talk.engine.answers == [(1, [0])]


def test_int8_that_was_not_agreed(talk: Talk) -> None:
    words = "^hidden: dtype is int8, this session agreed on float32"
    talk.refuses(Code.INVALID_ARGUMENT, words, *NEXT, hidden=scaled(2, WIDTH, 1, 1))
    talk.stand(talk.step(*NEXT), 0)
    with pytest.raises(Refusal, match="^residual codes of layer 0: dtype is int8"):
        talk.answer((0, scaled(2, 9, *[1] * 6)))


def test_each_kind_has_its_dtype() -> None:
    talk = Talk(dtypes=WireDtypes.named("float32", codes="float16", residual_codes="int8"))
    step = talk.step((0, 0, 2, 1))
    talk.stand(step, 0)
    with pytest.raises(Refusal, match="layer 0: dtype is float32, this session agreed on int8"):
        talk.answer((0, zeros(2, 9)))
    talk.answer((0, scaled(2, 9, *[1] * 6)))
    step.on_codes(step, 2, torch.ones(2, 6))
    talk.finish(step)
    sent = list(talk.session.outbox._messages)
    assert sent[0].codes.codes.dtype == pb.DTYPE_FLOAT16 and sent[1].hidden.hidden.dtype == pb.DTYPE_FLOAT32


# --- layers that share --------------------------------------------------------------------------------------


def test_only_owners_take_residual_codes() -> None:
    facts = {"name": "p", "backbone": "b", "num_layers": 4, "hidden_size": WIDTH, "r_c2d": 2, "r_d2c": 3}
    shared = Plan.subset(exchange_layers=(0,), share_residual_codes=2, **facts)
    talk = Talk(plan=shared)
    known = [pb.LayerCodes(layer=1, codes=zeros(2, 9))]
    words = "layer 1 is not adapted in plan 'p', or shares"
    talk.refuses(Code.INVALID_ARGUMENT, words, (0, 0, 2, 1), residual_codes=known)
    many = [pb.LayerCodes(layer=0, codes=zeros(2, 9))] * 3
    talk.refuses(Code.INVALID_ARGUMENT, "takes 2 at most", (0, 0, 2, 1), residual_codes=many)
    step = talk.step((0, 0, 2, 1))
    assert step.must_emit() and step.is_blocked()
    talk.stand(step, 0)
    with pytest.raises(Refusal, match=r"for layer 1 out of order: .* waits for \[0, 2\]"):
        talk.answer((1, zeros(2, 9)))
    talk.answer((0, zeros(2, 9)))
    assert not step.is_blocked()
    talk.stand(step, 1)
    assert not step.is_blocked(), "what layer 0 was sent serves layer 1"
    step.emitted = 0
    talk.stand(step, 2)
    assert step.is_blocked()
