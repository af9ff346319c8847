"""A session's checks: what is refused with which status, and that a refusal changes nothing.

Also what overwriting, dropping and rearranging do to rows. The engine is a stand-in that only takes
steps; a test plays the engine by calling the step's own callbacks.
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
import torch

from cloud_server.kv_cache import BLOCK_TOKENS, KvCache, Row
from cloud_server.session import OUTBOX_MESSAGES, Limits, Outbox, Refusal, Session
from cloud_server.step import Step
from shared import wire
from shared.families import geometry
from shared.pb.privatelora.v1 import private_lora_pb2 as pb
from shared.plan import Plan
from tests.families import build

Code = grpc.StatusCode
WIDTH = 8
PLAN = Plan.subset((0, 2), name="p", backbone="b", num_layers=4, hidden_size=WIDTH, r_c2d=2, r_d2c=3)
LIMITS = Limits(max_context_tokens=100, max_step_tokens=50, max_rows=4, max_steps_in_flight=3)
GEOMETRY = geometry(build("llama").config)
BLOCK_BYTES = 2 * 4 * GEOMETRY.kv_dim * 4 * BLOCK_TOKENS
UINT32, UINT64 = 2**32 - 1, 2**64 - 1


class StandIn:
    """Takes steps and runs none."""

    def __init__(self, blocks: int) -> None:
        self.cache = KvCache(GEOMETRY, range(4), blocks * BLOCK_BYTES, torch.float32, torch.device("cpu"))
        self.backbone = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)
        self.steps: list[Step] = []
        self.answers: list[tuple[int, list[int]]] = []

    def submit(self, step: Step) -> None:
        self.steps.append(step)

    def cancel(self, step: Step) -> None:
        self.steps.remove(step)

    def answer(self, step: Step, codes: dict[int, torch.Tensor]) -> None:
        self.answers.append((step.number, list(codes)))
        step.residual_codes.update(codes)


class Talk:
    """A session and what a test says to it."""

    def __init__(self, blocks: int = 64, **options: Any) -> None:
        self.engine = StandIn(blocks)
        self.session = Session(PLAN, pb.DTYPE_FLOAT32, LIMITS, self.engine, **options)  # type: ignore[arg-type]
        self.number = 0

    def step(self, *spans: tuple[int, int, int, int], finish: bool = False, **fields: Any) -> Step:
        self.number = fields.pop("step", self.number + 1)
        tokens = min(sum(span[2] for span in spans), 1000)
        message = pb.Step(
            **{
                "step": self.number,
                "spans": [pb.Span(row=r, start=s, count=c, keep=k) for r, s, c, k in spans],
                "hidden": zeros(tokens, WIDTH),
            }
            | fields
        )
        self.session.step(message)
        step = self.engine.steps[-1]
        if finish:
            self.finish(step)
        return step

    def finish(self, step: Step) -> None:
        self.engine.steps.remove(step)
        step.on_done(step, step.kept_hidden())

    def stand(self, step: Step, layer: int, *, emitted: bool = True) -> None:
        step.layer, step.emitted = layer, layer if emitted else step.emitted

    def answer(self, *answers: tuple[int, pb.Tensor], step: int | None = None) -> None:
        codes = [pb.LayerCodes(layer=layer, codes=tensor) for layer, tensor in answers]
        number = self.number if step is None else step
        self.session.answer(pb.ResidualCodes(step=number, residual_codes=codes))

    def state(self) -> tuple[object, ...]:
        rows = [(id(row), tuple(row.blocks), row.length, row.written) for row in self.session.rows]
        flying = list(self.session.steps), [step.number for step in self.engine.steps]
        return rows, flying, self.session.last_number, self.engine.cache.bytes_used

    def refuses(self, code: Code, words: str, *spans: tuple[int, int, int, int], **fields: Any) -> None:
        before, number = self.state(), self.number
        with pytest.raises(Refusal, match=words) as refusal:
            self.step(*spans, **fields)
        self.number = number
        assert refusal.value.code is code
        assert self.state() == before, "a refused step changed something"

    @property
    def lengths(self) -> list[int]:
        return [row.length for row in self.session.rows]


def zeros(*shape: int, dtype: int = pb.DTYPE_FLOAT32) -> pb.Tensor:
    return wire.encode(torch.zeros(shape), dtype)


def filled(value: float) -> pb.Tensor:
    return wire.encode(torch.full((2, WIDTH), value), pb.DTYPE_FLOAT32)


@pytest.fixture
def talk() -> Talk:
    """Two rows: five positions and three, and nothing in flight."""
    talk = Talk()
    talk.step((0, 0, 5, 1), (1, 0, 3, 1), finish=True)
    return talk


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


# --- overwriting --------------------------------------------------------------------------------------------


def test_a_step_cancels_those_that_it_overwrites_and_later_ones(talk: Talk) -> None:
    for start in (5, 7, 9):
        talk.step((0, start, 2, 1))
    talk.step((0, 7, 1, 1))
    assert list(talk.session.steps) == [2, 5] and talk.lengths == [8, 3]
    assert talk.session.steps[5].before is talk.session.steps[2]


def test_nothing_is_built_on_positions_that_were_cancelled(talk: Talk) -> None:
    """Positions 5 and 6 would go with the step that starts at 5: a start at 7 leaves a gap."""
    talk.step((0, 5, 10, 1))
    talk.refuses(Code.FAILED_PRECONDITION, "row 0 holds 5 positions, the step starts at 7", (0, 7, 1, 1))
    talk.step((0, 4, 1, 1))
    assert talk.lengths == [5, 3] and list(talk.session.steps) == [3]


def test_other_rows_of_a_cancelled_step_lose_its_positions_too(talk: Talk) -> None:
    talk.step((0, 5, 1, 1), (1, 3, 1, 1))
    talk.step((0, 5, 1, 1))
    assert talk.lengths == [6, 3]
    talk.refuses(Code.FAILED_PRECONDITION, "row 1 holds 3 positions, the step starts at 4", (1, 4, 1, 1))


def test_parents_are_followed_to_find_what_is_overwritten(talk: Talk) -> None:
    """New row 0 is old row 1, whose third position a step in flight is writing."""
    talk.step((1, 2, 2, 1))
    talk.step((0, 2, 1, 1), parents=[1, 0])
    assert list(talk.session.steps) == [3] and talk.lengths == [3, 5]


def test_untouched_rows_keep_their_steps(talk: Talk) -> None:
    talk.step((0, 5, 1, 1))
    talk.step((1, 1, 1, 1))
    assert list(talk.session.steps) == [2, 3] and talk.lengths == [6, 2]


# --- rows ---------------------------------------------------------------------------------------------------


def test_parents_reorder_fork_and_free(talk: Talk) -> None:
    first, second = talk.session.rows
    talk.step((0, 3, 1, 1), (1, 3, 1, 1), parents=[1, 1], finish=True)
    assert talk.session.rows[0] is second and first.blocks == []
    assert talk.lengths == [4, 4]
    talk.step((0, 4, 1, 1), parents=[1], finish=True)
    assert talk.lengths == [5] and talk.engine.cache.bytes_used == BLOCK_BYTES


def test_closing_gives_everything_back(talk: Talk) -> None:
    talk.step((0, 5, 40, 1), (1, 3, 1, 1), (2, 0, 1, 1))
    talk.session.close()
    assert talk.engine.cache.bytes_used == 0 and talk.engine.steps == [] and talk.session.rows == []
    talk.session.close()  # twice is no harm


def test_a_dropped_session_holds_what_is_written(talk: Talk) -> None:
    talk.step((0, 5, 40, 1), (1, 3, 10, 1))
    talk.step((0, 45, 5, 1))
    assert talk.session.row_lengths() == [5, 3]
    talk.session.drop()
    assert talk.lengths == talk.session.row_lengths() == [5, 3]
    assert talk.engine.steps == [] and talk.engine.cache.bytes_used == 2 * BLOCK_BYTES
    talk.step((0, 5, 1, 1), finish=True)
    assert talk.session.row_lengths() == [6, 3]


def test_a_crop_takes_what_was_written(talk: Talk) -> None:
    talk.step((0, 2, 1, 1))
    talk.session.drop()
    assert talk.session.row_lengths() == [2, 3]


# --- a full cache -------------------------------------------------------------------------------------------


def test_a_full_cache_is_refused_with_a_hint() -> None:
    talk = Talk(blocks=2)
    talk.step((0, 0, 40, 1), finish=True)
    with pytest.raises(
        Refusal, match=r"the KV cache is full \(1 blocks needed, 0 of 2 free\); try again later"
    ) as e:
        talk.step((0, 40, 1, 1), (1, 0, 1, 1))
    assert e.value.code is Code.RESOURCE_EXHAUSTED and e.value.retry_after_s
    talk.session.drop()
    assert talk.session.row_lengths() == [40, 0]
    assert talk.engine.cache.bytes_used == 2 * BLOCK_BYTES


def test_room_is_made_once_a_step_not_once_a_try() -> None:
    """Rows are rearranged before room is asked for; a second try must not rearrange them again."""
    hoard: list[Row] = []
    talk = Talk(blocks=4, make_room=lambda: bool(hoard) and (talk.engine.cache.free(hoard.pop()) or True))
    talk.step((0, 0, 5, 1), (1, 0, 3, 1), finish=True)
    first, second = talk.session.rows
    for _ in range(2):
        hoard.append(Row())
        talk.engine.cache.reserve(hoard[-1], 0, 1)
    talk.step((0, 3, 1, 1), (1, 5, 1, 1), (2, 5, 1, 1), parents=[1, 0, 0], finish=True)
    assert talk.session.rows[0] is second and talk.session.rows[1] is first
    assert talk.lengths == [4, 6, 6] and len(hoard) == 1


# --- the outbox ---------------------------------------------------------------------------------------------


async def test_the_outbox_keeps_order_and_says_when_it_is_full() -> None:
    outbox = Outbox()
    messages = [pb.DecodeResponse(codes=pb.Codes(step=number)) for number in range(OUTBOX_MESSAGES)]
    for message in messages:
        assert not outbox.is_full
        outbox.put(message)
    assert outbox.is_full
    assert await outbox.get() is messages[0]
    await outbox.has_room()
    assert [await outbox.get() for _ in messages[1:]] == messages[1:]
    outbox.put(messages[0])
    outbox.clear()
    outbox.put(messages[1])
    assert await outbox.get() is messages[1]
