"""What an edge can get wrong in a step, by mistake or on purpose, against a real cloud process.

Each time: a status and a message that say what is wrong, an honest session beside it whose tokens do
not change, a cloud that goes on serving, and KV bytes in use that return to what they were (all by the
fixture `edge`).
"""

from collections.abc import Callable

import grpc
import numpy as np
import pytest

from shared.pb.privatelora.v1 import private_lora_pb2 as pb
from tests.integration.raw_edge import RawEdge, RawStream, tensor

Code = grpc.StatusCode
HIDDEN, WIDTH = 48, 24  # of the tiny model and its plan r8
UINT32 = 2**32 - 1


# --- steps that are refused -------------------------------------------------------------------------------


def _step(**fields: object) -> Callable[[RawStream], object]:
    return lambda stream: stream.step(**fields)  # type: ignore[arg-type]


def _shape(*shape: int) -> pb.Tensor:
    return tensor(np.zeros(shape))


def _with(value: float) -> np.ndarray:
    values = np.zeros((3, HIDDEN))
    values[1, 7] = value
    return values


def _claims(shape: list[int], size: int) -> pb.Tensor:
    return pb.Tensor(dtype=pb.DTYPE_FLOAT32, shape=shape, data=bytes(size))


NEXT = [(0, 4, 3, 1)]  # the session below holds four positions of row 0
BAD_STEPS: dict[str, tuple[Callable[[RawStream], object], Code, str]] = {
    "too few positions": (
        _step(spans=NEXT, hidden=_shape(2, HIDDEN)),
        Code.INVALID_ARGUMENT,
        "shape is (2, 48)",
    ),
    "too wide": (_step(spans=NEXT, hidden=_shape(3, HIDDEN + 1)), Code.INVALID_ARGUMENT, "expected (3, 48)"),
    "flat": (_step(spans=NEXT, hidden=_shape(3 * HIDDEN)), Code.INVALID_ARGUMENT, "shape"),
    "rank three": (_step(spans=NEXT, hidden=_shape(1, 3, HIDDEN)), Code.INVALID_ARGUMENT, "shape"),
    "a thousand dimensions": (
        _step(spans=NEXT, hidden=_claims([1] * 1000, 4)),
        Code.INVALID_ARGUMENT,
        "shape",
    ),
    "no tensor": (_step(spans=NEXT, hidden=pb.Tensor()), Code.INVALID_ARGUMENT, "dtype"),
    "too few bytes": (_step(spans=NEXT, hidden=_claims([3, HIDDEN], 8)), Code.INVALID_ARGUMENT, "8 bytes"),
    "too many bytes": (
        _step(spans=NEXT, hidden=_claims([3, HIDDEN], 577)),
        Code.INVALID_ARGUMENT,
        "577 bytes",
    ),
    "a giant shape": (_step(spans=NEXT, hidden=_claims([UINT32] * 4, 16)), Code.INVALID_ARGUMENT, "shape"),
    "float16": (
        _step(spans=NEXT, hidden=tensor(_with(0), pb.DTYPE_FLOAT16)),
        Code.INVALID_ARGUMENT,
        "dtype is float16, this session agreed on float32",
    ),
    "an unknown dtype": (
        _step(spans=NEXT, hidden=pb.Tensor(dtype=99, shape=[3, HIDDEN], data=bytes(576))),  # type: ignore[arg-type]
        Code.INVALID_ARGUMENT,
        "unknown dtype 99",
    ),
    "NaN": (_step(spans=NEXT, hidden=_with(np.nan)), Code.INVALID_ARGUMENT, "NaN or infinity"),
    "infinity": (_step(spans=NEXT, hidden=_with(np.inf)), Code.INVALID_ARGUMENT, "NaN or infinity"),
    "minus infinity": (_step(spans=NEXT, hidden=_with(-np.inf)), Code.INVALID_ARGUMENT, "NaN or infinity"),
    "a gap": (_step(spans=[(0, 5, 1, 1)]), Code.FAILED_PRECONDITION, "position gap: row 0 holds 4"),
    "a gap in a new row": (_step(spans=[(1, 1, 1, 1)]), Code.FAILED_PRECONDITION, "row 1 holds 0"),
    "a start of 2^32": (_step(spans=[(0, UINT32, 1, 1)]), Code.FAILED_PRECONDITION, "position gap"),
    "a count of 2^32": (
        _step(spans=[(0, 4, UINT32, 1)], hidden=_shape(1, HIDDEN)),
        Code.INVALID_ARGUMENT,
        "at most 512 positions, got 4294967295",
    ),
    "counts that overflow": (
        _step(spans=[(0, 4, UINT32, 1), (1, 0, 2, 1)], hidden=_shape(1, HIDDEN)),
        Code.INVALID_ARGUMENT,
        "at most 512 positions",
    ),
    "an oversized chunk": (_step(spans=[(0, 0, 513, 1)]), Code.INVALID_ARGUMENT, "send it in chunks"),
    "past the context": (_step(spans=[(0, 4, 509, 1)]), Code.OUT_OF_RANGE, "context ends at 512"),
    "no spans": (_step(spans=[], hidden=_shape(0, HIDDEN)), Code.INVALID_ARGUMENT, "1 to 64 spans"),
    "an empty span": (
        _step(spans=[(0, 4, 0, 0)], hidden=_shape(0, HIDDEN)),
        Code.INVALID_ARGUMENT,
        "count >= 1",
    ),
    "keeps more than it has": (_step(spans=[(0, 4, 1, 2)]), Code.INVALID_ARGUMENT, "keep <= count"),
    "a keep of 2^32": (_step(spans=[(0, 4, 1, UINT32)]), Code.INVALID_ARGUMENT, "keep <= count"),
    "a row twice": (_step(spans=[(0, 4, 1, 1), (0, 5, 1, 1)]), Code.INVALID_ARGUMENT, "named twice"),
    "row 64": (_step(spans=[(64, 0, 1, 1)]), Code.INVALID_ARGUMENT, "beyond the 64"),
    "row 2^32": (_step(spans=[(UINT32, 0, 1, 1)]), Code.INVALID_ARGUMENT, "beyond the 64"),
    "a row left out": (_step(spans=[(2, 0, 1, 1)]), Code.INVALID_ARGUMENT, "without gaps"),
    "65 rows": (_step(spans=[(row, 0, 1, 1) for row in range(65)]), Code.INVALID_ARGUMENT, "1 to 64 spans"),
    "65 parents": (_step(spans=NEXT, parents=[0] * 65), Code.INVALID_ARGUMENT, "at most 64 rows"),
    "a parent out of range": (
        _step(spans=NEXT, parents=[0, 1]),
        Code.INVALID_ARGUMENT,
        "beyond the session's 1",
    ),
    "a parent of 2^32": (
        _step(spans=NEXT, parents=[UINT32]),
        Code.INVALID_ARGUMENT,
        "beyond the session's 1",
    ),
    "an old number": (_step(spans=NEXT, step=1), Code.INVALID_ARGUMENT, "step number 1 is not above"),
    "number 0": (_step(spans=NEXT, step=0), Code.INVALID_ARGUMENT, "not above"),
    "codes of an unknown layer": (
        _step(spans=NEXT, known={77: _shape(3, WIDTH)}),
        Code.INVALID_ARGUMENT,
        "layer 77 is not adapted",
    ),
    "codes too narrow": (
        _step(spans=NEXT, known={0: _shape(3, WIDTH - 1)}),
        Code.INVALID_ARGUMENT,
        "(3, 24)",
    ),
    "codes with NaN": (
        _step(spans=NEXT, known={0: np.full((3, WIDTH), np.nan)}),
        Code.INVALID_ARGUMENT,
        "residual codes of layer 0: holds NaN",
    ),
}


@pytest.mark.parametrize(("act", "code", "words"), BAD_STEPS.values(), ids=BAD_STEPS)
def test_a_step_that_cannot_be(edge: RawEdge, act: Callable, code: Code, words: str) -> None:
    stream = edge.open()
    stream.run([(0, 0, 4, 1)])
    act(stream)
    end = stream.refused()
    assert end.code is code, end
    assert words in end.message
    # the session itself is unharmed: it can be picked up again with what it held, and goes on
    again = edge.open(session_id=stream.opened.session_id)
    assert list(again.opened.row_lengths) == [4]
    again.number = 10
    assert np.isfinite(again.run([(0, 4, 2, 2)])).all()
    again.finish()


def _answer(layer: int, codes: pb.Tensor, step: int | None = None) -> Callable[[RawStream], object]:
    return lambda stream: stream.answer(layer, codes, step)


BAD_ANSWERS: dict[str, tuple[Callable[[RawStream], object], str]] = {
    "a later layer": (_answer(1, _shape(3, WIDTH)), "layer 1 out of order: step 2 stands at layer 0"),
    "the last layer": (_answer(3, _shape(3, WIDTH)), "out of order"),
    "a layer of 2^32": (_answer(UINT32, _shape(3, WIDTH)), "out of order"),
    "a step never sent": (_answer(0, _shape(3, WIDTH), 9), "step 9, which was never sent"),
    "a step of 2^64": (_answer(0, _shape(3, WIDTH), 2**64 - 1), "never sent"),
    "too few positions": (_answer(0, _shape(2, WIDTH)), "expected (3, 24)"),
    "too wide": (_answer(0, _shape(3, HIDDEN)), "expected (3, 24)"),
    "another rank": (_answer(0, _shape(3, 3, 8)), "expected (3, 24)"),
    "another dtype": (_answer(0, tensor(np.zeros((3, WIDTH)), pb.DTYPE_FLOAT16)), "dtype is float16"),
    "NaN": (_answer(0, tensor(np.full((3, WIDTH), np.nan))), "NaN or infinity"),
    "infinity": (_answer(0, tensor(np.full((3, WIDTH), -np.inf))), "NaN or infinity"),
    "no layer": (
        lambda stream: stream.send(pb.DecodeRequest(residual_codes=pb.ResidualCodes(step=2))),
        "without any layer",
    ),
    "one layer twice": (
        lambda stream: stream.send(
            pb.DecodeRequest(
                residual_codes=pb.ResidualCodes(
                    step=2, residual_codes=[pb.LayerCodes(layer=0, codes=_shape(3, WIDTH))] * 2
                )
            )
        ),
        "out of order",
    ),
}


@pytest.mark.parametrize(("act", "words"), BAD_ANSWERS.values(), ids=BAD_ANSWERS)
def test_residual_codes_that_cannot_be(edge: RawEdge, act: Callable, words: str) -> None:
    stream = edge.open()
    stream.run([(0, 0, 4, 1)])
    stream.step(NEXT)
    assert stream.receive().codes.layer == 0
    act(stream)
    end = stream.refused()
    assert end.code is Code.INVALID_ARGUMENT, end
    assert words in end.message


def test_an_answer_given_twice(edge: RawEdge) -> None:
    stream = edge.open()
    stream.step()
    assert stream.receive().codes.layer == 0
    stream.answer(0, _shape(3, WIDTH))
    assert stream.receive().codes.layer == 1
    stream.answer(0, _shape(3, WIDTH))
    end = stream.refused()
    assert end.code is Code.INVALID_ARGUMENT and "out of order" in end.message


def test_the_other_plan_keeps_its_own_layers(edge: RawEdge) -> None:
    """Plan `fused` adapts layers 1 and 3 with other widths; codes for layer 0 are none of its business."""
    stream = edge.open("fused")
    stream.run([(0, 0, 4, 1)])
    stream.step(NEXT, known={0: _shape(3, 9)})
    end = stream.refused()
    assert end.code is Code.INVALID_ARGUMENT and "layer 0 is not adapted in plan 'fused'" in end.message


def test_more_steps_in_flight_than_allowed(edge: RawEdge) -> None:
    stream = edge.open()
    for row in range(edge.limits.max_steps_in_flight + 1):
        stream.step([(row, 0, 1, 1)])
    end = stream.refused()
    assert end.code is Code.INVALID_ARGUMENT
    assert f"more than {edge.limits.max_steps_in_flight} steps in flight" in end.message


def test_rows_rearranged_under_a_step_in_flight(edge: RawEdge) -> None:
    stream = edge.open()
    stream.run([(0, 0, 4, 1), (1, 0, 4, 1)])
    stream.step([(0, 4, 1, 1)])
    stream.step([(0, 4, 1, 1)], parents=[1, 0])
    end = stream.refused()
    assert end.code is Code.INVALID_ARGUMENT and "rearranged while steps are in flight" in end.message


def test_a_gap_where_a_step_was_overwritten(edge: RawEdge) -> None:
    """Positions of a step that a newer one cancels were never written: nothing may build on them."""
    stream = edge.open()
    stream.run([(0, 0, 4, 1)])
    stream.step([(0, 4, 10, 1)])
    stream.step([(0, 9, 1, 1)])
    end = stream.refused()
    assert end.code is Code.FAILED_PRECONDITION
    assert "row 0 holds 4 positions, the step starts at 9" in end.message
