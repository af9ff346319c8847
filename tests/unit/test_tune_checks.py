"""A tuning run's checks: what is refused with which status, and that a refusal changes nothing."""

import weakref
from typing import Any

import grpc
import pytest
import torch

from cloud_server.allowance import Allowance
from cloud_server.backbone import Backbone
from cloud_server.config.identity import IdentityLimits
from cloud_server.config.tuning import TuningConfig
from cloud_server.refusal import Refusal
from cloud_server.tune_outbox import Budget, Rows, TuneOutbox
from cloud_server.tune_queue import TuneQueue
from cloud_server.tune_session import TuneLimits, TuneSession, most_tokens
from shared import wire
from shared.models import resolve
from shared.pb.privatelora.v1 import private_lora_pb2 as pb
from shared.plan import Plan
from tests.families import build, plan_for
from tests.plans import lowrank_for

Code = grpc.StatusCode
HIDDEN = 48
UINT32, UINT64 = 2**32 - 1, 2**64 - 1
LIMITS = TuneLimits(max_batch_tokens=200, max_sequence_tokens=50)


@pytest.fixture(scope="module")
def backbone(folder_of) -> Backbone:
    """Two exchanges: layer 0 feeds 0 and 1, layer 2 feeds 2 and 3; in plan `s` with one M each."""
    model = build("llama")
    base = plan_for(model, r_c2d=2, r_d2c=3)
    plan = Plan.model_validate(
        {**base.model_dump(), "exchange_layers": (0, 2), "schedule": "grouped", "name": "p"}
    )
    checkpoint = resolve(str(folder_of("llama")), progress=False)
    shared = Plan.model_validate({**plan.model_dump(), "owner_layers": (0, 2), "name": "s"})
    return Backbone(checkpoint, {plan.name: (plan, lowrank_for(plan, model)) for plan in (plan, shared)})


class Talk:
    """A tuning run, what a test says to it, and a queue that runs when told to."""

    def __init__(self, backbone: Backbone, max_bytes: int = 8 << 20, plan: str = "p", **options: Any) -> None:
        config = TuningConfig(**{"piece_tokens": 4} | options)
        self.plan = backbone.plans[plan]
        self.queue, self.budget = TuneQueue(config, 0.005, lambda: None), Budget(max_bytes)
        self.session = TuneSession(
            self.plan, pb.DTYPE_FLOAT32, LIMITS, backbone, self.queue, self.budget, config, 0.01
        )
        self.sent: list[pb.TuneResponse] = []

    async def begin(self, *lengths: int, batch: int = 1, **fields: Any) -> None:
        await self.session.begin(pb.Batch(batch=batch, lengths=lengths, **fields))

    def rows(self, name: str, shape: tuple[int, ...], *, layer: int = 0, first: int = 0, **more: Any) -> None:
        tensor = more.pop("tensor", wire.encode(torch.zeros(shape), more.pop("dtype", pb.DTYPE_FLOAT32)))
        batch = more.pop("batch", 1)
        self.session.rows(name, pb.Rows(batch=batch, layer=layer, first=first, rows=tensor))

    async def run(self) -> list[tuple[str | None, int]]:
        """Run all that can run; return what was sent, as (kind, layer)."""
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(1) as executor:
            while self.queue.ready():
                await self.queue.run_one(executor)
        kinds = []
        while self.session.outbox._waiting:
            message = await self.session.outbox.get()
            kind = message.WhichOneof("message")
            kinds.append((kind, getattr(getattr(message, kind or ""), "layer", -1)))
            self.sent.append(message)
        return list(dict.fromkeys(kinds))

    def state(self) -> tuple[Any, ...]:
        current = self.session.current
        counts = None if current is None else (current.number, dict(current.sent), dict(current.came))
        return counts, self.session.last_number, self.budget.used, len(self.queue._jobs)

    def refuses(
        self, words: str, *args: Any, code: grpc.StatusCode = Code.INVALID_ARGUMENT, **more: Any
    ) -> None:
        before = self.state()
        with pytest.raises(Refusal, match=words) as refusal:
            self.rows(*args, **more)
        assert refusal.value.code is code
        assert self.state() == before, "a refused message changed something"


@pytest.fixture
def talk(backbone: Backbone) -> Talk:
    return Talk(backbone)


# --- batches ------------------------------------------------------------------------------------------------

BAD_BATCHES: dict[str, tuple[list[int], dict[str, Any], grpc.StatusCode, str]] = {
    "no sequence": ([], {}, Code.INVALID_ARGUMENT, "1 to 4096 sequences, got 0"),
    "many sequences": ([1] * 4097, {}, Code.INVALID_ARGUMENT, "got 4097"),
    "empty sequence": ([3, 0], {}, Code.INVALID_ARGUMENT, "at least one token"),
    "long sequence": ([3, 51], {}, Code.OUT_OF_RANGE, "51 tokens; the context ends at 50"),
    "huge sequence": ([UINT32], {}, Code.OUT_OF_RANGE, "context ends at 50"),
    "oversized": (
        [50] * 40,
        {},
        Code.RESOURCE_EXHAUSTED,
        "2000 tokens takes .* MiB here, more than the 8 MiB",
    ),
    "number": ([3], {"batch": 5}, Code.INVALID_ARGUMENT, "batch number 5 is not above the last one, 5"),
    "number zero": ([3], {"batch": 0}, Code.INVALID_ARGUMENT, "not above"),
}


@pytest.mark.parametrize(("lengths", "fields", "code", "words"), BAD_BATCHES.values(), ids=BAD_BATCHES)
async def test_a_batch_that_cannot_be(
    backbone: Backbone, lengths: list[int], fields: Any, code: grpc.StatusCode, words: str
) -> None:
    talk = Talk(backbone)
    talk.session.last_number = 5
    before = talk.state()
    with pytest.raises(Refusal, match=words) as refusal:
        await talk.begin(*lengths, **{"batch": 6} | fields)
    assert refusal.value.code is code and talk.state() == before
    await talk.begin(3, batch=6)


async def test_one_batch_at_a_time(talk: Talk) -> None:
    await talk.begin(3, 2)
    with pytest.raises(Refusal, match="batch 1 is under way; one batch of a stream at a time"):
        await talk.begin(3, batch=2)


async def test_batches_share_a_budget(backbone: Backbone) -> None:
    talk, other = Talk(backbone, 5 << 20), Talk(backbone)
    other.session.budget = talk.budget
    await talk.begin(50, 50, 50, 50, 50, 50, 50)
    assert talk.budget.used > talk.budget.total / 2
    with pytest.raises(Refusal, match="other tuning batches hold .* of 5 MiB") as refusal:
        await other.begin(50, 50, 50, 50, 50, 50, 50)
    assert refusal.value.retry_after_s
    talk.session.close()
    assert talk.budget.used == 0
    await other.begin(50, 50, 50, 50, 50, 50, 50)


# --- rows ---------------------------------------------------------------------------------------------------


async def test_rows_need_a_batch(talk: Talk) -> None:
    talk.refuses("hidden of batch 1, but none is under way", "hidden", (3, HIDDEN))
    await talk.begin(3, 2)
    talk.refuses("hidden of batch 2, but batch 1 is under way", "hidden", (3, HIDDEN), batch=2)
    talk.refuses("hidden of batch 0, but batch 1", "hidden", (3, HIDDEN), batch=0)


BAD_ROWS: dict[str, tuple[tuple[int, ...], dict[str, Any], str]] = {
    "width": ((2, HIDDEN + 1), {}, r"hidden: shape is \(2, 49\), expected \(2, 48\)"),
    "no rows": ((0, HIDDEN), {}, "expected one or more rows"),
    "rank one": ((HIDDEN,), {}, "expected one or more rows"),
    "rank three": ((1, 2, HIDDEN), {}, "expected one or more rows"),
    "no tensor": ((), {"tensor": pb.Tensor()}, "expected one or more rows"),
    "too many": ((6, HIDDEN), {}, "hidden: 6 rows, of which 5 are waited for"),
    "gap": ((2, HIDDEN), {"first": 1}, "hidden out of order: rows from 1, expected from 0"),
    "far away": ((2, HIDDEN), {"first": UINT32}, "out of order"),
    "dtype": ((2, HIDDEN), {"dtype": pb.DTYPE_BFLOAT16}, "dtype is bfloat16, this session agreed on float32"),
    "bytes": (
        (),
        {"tensor": pb.Tensor(dtype=pb.DTYPE_FLOAT32, shape=[2, HIDDEN], data=b"1234")},
        "4 bytes of data",
    ),
    "huge": ((), {"tensor": pb.Tensor(dtype=pb.DTYPE_FLOAT32, shape=[UINT32, UINT32])}, "of which 5"),
    "NaN": ((), {"tensor": wire.encode(torch.full((2, HIDDEN), torch.nan), pb.DTYPE_FLOAT32)}, "NaN"),
    "infinity": (
        (),
        {"tensor": wire.encode(torch.full((2, HIDDEN), torch.inf), pb.DTYPE_FLOAT32)},
        "infinity",
    ),
}


@pytest.mark.parametrize(("shape", "fields", "words"), BAD_ROWS.values(), ids=BAD_ROWS)
async def test_rows_that_cannot_be(talk: Talk, shape: tuple[int, ...], fields: Any, words: str) -> None:
    await talk.begin(3, 2)
    talk.refuses(words, "hidden", shape, **fields)
    talk.rows("hidden", (5, HIDDEN))


async def test_rows_do_not_overlap(talk: Talk) -> None:
    await talk.begin(3, 2)
    talk.rows("hidden", (3, HIDDEN))
    talk.refuses("rows from 0, expected from 3", "hidden", (2, HIDDEN))
    talk.refuses("rows from 2, expected from 3", "hidden", (2, HIDDEN), first=2)
    talk.refuses("6 rows, of which 5 are waited for", "hidden", (3, HIDDEN), first=3)
    talk.rows("hidden", (2, HIDDEN), first=3)
    talk.refuses("6 rows, of which 5", "hidden", (1, HIDDEN), first=5)


async def test_answers_come_when_they_are_waited_for(talk: Talk) -> None:
    """There and back; at every station all that comes too early, twice or wrongly is refused."""
    wide, dc = talk.plan.residual_width, talk.plan.codes_width

    def nothing_else(*but: tuple[str, int]) -> None:
        for name, layer, width in (
            ("residual_codes", 0, wide), ("residual_codes", 1, wide), ("residual_codes", 2, wide),
            ("residual_codes", 3, wide), ("hidden_gradient", 0, HIDDEN), ("codes_gradient", 2, dc),
        ):  # fmt: skip
            if (name, layer) not in but:
                talk.refuses("out of order|waited for", name, (5, width), layer=layer)
        talk.refuses("not adapted in plan 'p'", "residual_codes", (5, wide), layer=4)
        talk.refuses("not adapted", "residual_codes", (5, wide), layer=UINT32)
        for layer in (0, 1, 3, UINT32):  # nothing below the first exchange has anything to learn
            talk.refuses("nothing below layer", "codes_gradient", (5, dc), layer=layer)

    await talk.begin(3, 2)
    nothing_else()
    talk.rows("hidden", (3, HIDDEN))
    assert await talk.run() == [("codes", 0)]  # of the first piece only
    talk.refuses("5 rows, of which 3", "residual_codes", (5, wide), layer=0)
    talk.rows("hidden", (2, HIDDEN), first=3)
    assert await talk.run() == [("codes", 0)]
    nothing_else(("residual_codes", 0), ("residual_codes", 1))
    talk.rows("residual_codes", (5, wide), layer=0)
    talk.rows("residual_codes", (5, wide), layer=1)
    assert await talk.run() == [("codes", 2)]
    talk.rows("residual_codes", (5, wide), layer=2)
    assert await talk.run() == []
    talk.rows("residual_codes", (5, wide), layer=3)
    assert await talk.run() == [("hidden", 0)]
    nothing_else(("hidden_gradient", 0))
    talk.rows("hidden_gradient", (5, HIDDEN))
    assert await talk.run() == [("residual_codes_gradient", 3), ("residual_codes_gradient", 2)]
    nothing_else(("codes_gradient", 2))
    talk.rows("codes_gradient", (5, dc), layer=2)
    assert await talk.run() == [
        ("residual_codes_gradient", 1),
        ("residual_codes_gradient", 0),
        ("done", -1),
    ]
    assert talk.session.current is None and talk.budget.used == 0 and not talk.queue._jobs
    await talk.begin(1, batch=2)


async def test_layers_that_share_are_answered_once(backbone: Backbone) -> None:
    """Residual codes of an owner serve two layers; their gradient is sent when both have added to it."""
    talk = Talk(backbone, plan="s")
    wide, dc = talk.plan.residual_width, talk.plan.codes_width
    await talk.begin(3, 2)
    talk.rows("hidden", (5, HIDDEN))
    assert await talk.run() == [("codes", 0)]
    for layer in (1, 3):
        words = f"residual codes of layer {layer}: it is not adapted in plan 's', or shares"
        talk.refuses(words, "residual_codes", (5, wide), layer=layer)
    talk.rows("residual_codes", (5, wide), layer=0)
    assert await talk.run() == [("codes", 2)]
    talk.rows("residual_codes", (5, wide), layer=2)
    assert await talk.run() == [("hidden", 0)]
    talk.rows("hidden_gradient", (5, HIDDEN))
    assert await talk.run() == [("residual_codes_gradient", 2)]
    talk.rows("codes_gradient", (5, dc), layer=2)
    assert await talk.run() == [("residual_codes_gradient", 0), ("done", -1)]
    assert talk.session.current is None and talk.budget.used == 0 and not talk.queue._jobs


async def test_a_forward_only_batch_has_no_way_back(talk: Talk) -> None:
    await talk.begin(3, forward_only=True)
    talk.rows("hidden", (3, HIDDEN))
    await talk.run()
    for name in ("hidden_gradient", "codes_gradient"):
        talk.refuses("announced as forward only", name, (3, HIDDEN), layer=2)
    for layer in range(4):
        talk.rows("residual_codes", (3, talk.plan.residual_width), layer=layer) if layer < 2 else None
    await talk.run()
    for layer in (2, 3):
        talk.rows("residual_codes", (3, talk.plan.residual_width), layer=layer)
    assert await talk.run() == [("hidden", 0), ("done", -1)]
    assert talk.budget.used == 0


async def test_leaving_in_the_middle_frees_everything(talk: Talk) -> None:
    await talk.begin(3, 2)
    talk.rows("hidden", (5, HIDDEN))
    await talk.run()
    batch = talk.session.current.job.batch  # type: ignore[union-attr]
    talk.session.close()
    assert not batch.pieces and not batch._gathered
    assert talk.budget.used == 0 and not talk.queue._jobs
    talk.session.close()


async def test_leaving_on_the_way_back_frees_what_was_kept_for_it(talk: Talk) -> None:
    await talk.begin(3, 2)
    talk.rows("hidden", (5, HIDDEN))
    for layer in talk.plan.owners:
        await talk.run()
        talk.rows("residual_codes", (5, talk.plan.residual_width), layer=layer)
    await talk.run()
    batch = talk.session.current.job.batch  # type: ignore[union-attr]
    kept = [weakref.ref(kept) for piece in batch.pieces for kept in piece.kept.values()]
    assert len(kept) == 8, "four layers of two pieces"
    talk.session.close()
    assert not any(reference() for reference in kept), "no collector sees the graphs that hold these"


async def test_a_batch_that_fails_is_its_own_edges_matter(talk: Talk, backbone: Backbone) -> None:
    failures: list[Exception] = []
    talk.session.on_failed = failures.append
    await talk.begin(3)
    talk.rows("hidden", (3, HIDDEN))
    talk.session.current.job.batch.run = lambda _: torch.empty(1)[5]  # type: ignore[union-attr, method-assign]
    await talk.run()
    assert isinstance(failures[0], IndexError)
    assert talk.session.current is None and talk.budget.used == 0 and not talk.queue._jobs


async def test_the_next_batch_takes_the_memory_of_the_one_before(talk: Talk) -> None:
    seen = []
    for number in (1, 2):
        await talk.begin(3, batch=number)
        job = talk.session.current.job  # type: ignore[union-attr]
        arena = job.batch._arena
        assert arena is not None and talk.budget.arenas.bytes == 0
        seen.append(arena)
        talk.queue.remove(job)
        talk.session.current = None
        assert talk.budget.used == 0 and talk.budget.arenas.bytes == arena.size
    assert seen[0] is seen[1]
    await talk.begin(3, batch=3)
    talk.session.close()
    assert talk.budget.used == talk.budget.arenas.bytes == 0, "nobody is there to use it again"


async def test_a_stream_that_ends_leaves_no_memory_with_whoever_remembers_it(talk: Talk) -> None:
    await talk.begin(3)
    job = talk.session.current.job  # type: ignore[union-attr]
    arena = weakref.ref(job.batch._arena)  # type: ignore[arg-type]
    talk.session.close()
    assert arena() is None and job.is_cancelled


async def test_idle_memory_makes_room_for_a_batch(backbone: Backbone) -> None:
    talk = Talk(backbone)
    await talk.begin(50, 50, 50)
    used, job = talk.budget.used, talk.session.current.job  # type: ignore[union-attr]
    talk.queue.remove(job)
    talk.session.current = None
    idle = talk.budget.arenas.bytes
    assert 0 < idle <= used
    talk.budget.total = used + idle // 2
    talk.session.config = talk.session.config.model_copy(update={"checkpointing": True})
    await talk.begin(50, 50, batch=2, forward_only=True)  # needs no arena
    assert talk.budget.used + talk.budget.arenas.bytes <= talk.budget.total


async def test_a_batch_that_cannot_be_made_gives_its_memory_back(
    talk: Talk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_: object, **__: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr("cloud_server.arena.Arena", no_memory)
        with pytest.raises(MemoryError):
            await talk.begin(3)
    assert talk.budget.used == 0 and talk.session.current is None
    await talk.begin(3)  # and the next one finds room


# --- bounds -------------------------------------------------------------------------------------------------


async def test_a_tensor_goes_out_in_messages_of_bounded_size() -> None:
    outbox, tensor = TuneOutbox(pb.DTYPE_FLOAT32), torch.randn(1500, 576)
    outbox.put(Rows(7, "hidden", 0, 40, tensor))
    at, parts = 40, []
    while outbox._waiting:
        part = (await outbox.get()).hidden
        assert part.batch == 7 and part.first == at and len(part.rows.data) <= wire.ROWS_BYTES
        shape = tuple(part.rows.shape)
        parts.append(wire.decode(part.rows, dtype=pb.DTYPE_FLOAT32, shape=shape, what="it"))
        at += shape[0]
    assert len(parts) == 4 and torch.equal(torch.cat(parts), tensor) and outbox._elements == 0


def test_most_tokens() -> None:
    assert [most_tokens(lambda n, m=m: n <= m, 100) for m in (-1, 0, 1, 57, 99, 100, 500)] == [
        0, 0, 1, 57, 99, 100, 100,
    ]  # fmt: skip


@pytest.mark.parametrize(("spare", "share"), [(True, 0.5), (False, 0.1)])
def test_tuning_is_due_at_its_share(spare: bool, share: float) -> None:
    queue = TuneQueue(TuningConfig(min_share=0.1, spare_share=0.5), 0.005, lambda: None)
    queue._ended, queue._took = 100.0, 0.02
    assert queue.due_in(100.0, spare=spare) == pytest.approx(0.02 / share - 0.02)
    assert queue.due_in(100.3, spare=spare) < 0


async def test_memory_of_one_identity_is_counted_and_comes_back(backbone: Backbone) -> None:
    """Across its runs; what a run gives up, by whatever way, is free for the next."""
    one, two = Talk(backbone), Talk(backbone)
    size = one.session.bytes_of([6])
    mine = Allowance(IdentityLimits(max_tuning_bytes=size + size // 2))
    await one.session.begin(pb.Batch(batch=1, lengths=[6]), mine)
    assert mine.tuning_bytes == size
    with pytest.raises(Refusal, match="bytes for tuning batches") as refused:
        await two.session.begin(pb.Batch(batch=1, lengths=[6]), mine)
    assert refused.value.code is Code.RESOURCE_EXHAUSTED and two.budget.used == 0
    one.session.close()
    assert mine.tuning_bytes == 0
    await two.session.begin(pb.Batch(batch=2, lengths=[6]), mine)
    two.session.close()
    full = Talk(backbone, max_bytes=size)
    full.budget.used = 1  # somebody else's: the cloud has no memory in time, and the identity's is not lost
    with pytest.raises(Refusal, match="other tuning batches"):
        await full.session.begin(pb.Batch(batch=1, lengths=[6]), mine)
    assert mine.tuning_bytes == 0
