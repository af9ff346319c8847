"""One edge's tuning run: its batch under way, and what it may say next.

Checks every message against the plan, the limits and what has been sent, before anything is changed.
Knows nothing about gRPC streams; what it has to say goes to ``outbox``.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import grpc
import torch
from torch import Tensor

from cloud_server.allowance import Allowance
from cloud_server.arena import Arena
from cloud_server.backbone import Backbone
from cloud_server.config.tuning import TuningConfig
from cloud_server.refusal import Refusal, invalid
from cloud_server.tune_outbox import Budget, Rows, TuneOutbox
from cloud_server.tune_queue import Job, TuneQueue
from cloud_server.tune_slice import most_workers
from cloud_server.tuning import TuneBatch
from cloud_server.tuning_memory import kept_bytes, tuning_bytes
from shared import wire
from shared.pb.privatelora.v1 import private_lora_pb2 as pb
from shared.plan import Plan

MAX_SEQUENCES = 4096  # of one batch: a length costs a byte on the wire and a call in every layer here
ARENA_SLACK = 64 << 10  # bytes a sequence, for what is kept of a norm and for alignment
PARTS = ("hidden", "residual_codes", "hidden_gradient", "codes_gradient")  # what an edge sends in rows


@dataclass(frozen=True)
class TuneLimits:
    """Bounds on one batch, stated in ``TuneOpened`` (tokens)."""

    max_batch_tokens: int
    max_sequence_tokens: int


@dataclass(eq=False)
class Current:
    """The batch under way: how many rows of each (tensor, layer) were sent and came."""

    number: int
    tokens: int
    job: Job
    sent: Counter[tuple[str, int]] = field(default_factory=Counter)
    came: Counter[tuple[str, int]] = field(default_factory=Counter)


@dataclass(eq=False)
class TuneSession:
    """One edge's tuning run."""

    plan: Plan
    wire_dtype: "pb.Dtype.ValueType"
    limits: TuneLimits
    backbone: Backbone
    queue: TuneQueue
    budget: Budget
    config: TuningConfig
    patience_s: float  # how long a batch may wait for memory
    payer: str = ""  # the identity whose turn its batches count as
    make_batch: Callable[..., TuneBatch] = TuneBatch
    on_failed: Callable[[Exception], object] = lambda _: None
    cut_off: Callable[[Refusal], object] = lambda _: None  # ends the stream
    last_number: int = -1
    current: Current | None = None
    waits_for_memory: bool = False
    closed: bool = False
    touched_at: float = field(default_factory=time.monotonic)  # when the edge or its batch last did something

    def __post_init__(self) -> None:
        """Make the outbox."""
        self.outbox = TuneOutbox(self.wire_dtype)

    def bytes_of(self, lengths: Sequence[int]) -> int:
        """Return what a batch takes at most."""
        return tuning_bytes(
            self.backbone.geometry,
            self.plan,
            sum(lengths),
            self.backbone.dtype,
            self.config.checkpointing,
            longest=max(lengths),
            piece_tokens=self.config.piece_tokens,
            side_by_side=most_workers(self.backbone),
        )

    async def begin(self, message: pb.Batch, allowance: Allowance | None = None) -> None:
        """Check a new batch, wait for room for it, and hand it to the queue.

        Parameters
        ----------
        message
            The batch.
        allowance
            What its tokens count against; None is nothing.

        Raises
        ------
        Refusal
            With nothing changed.
        """
        lengths = self._checked_lengths(message)
        size, tokens = self.bytes_of(lengths), sum(lengths)
        if size > self.budget.total:
            raise Refusal(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"a batch of {tokens} tokens takes {size / 2**20:.0f} MiB here, more than the "
                f"{self.budget.total / 2**20:.0f} MiB that there are; send at most "
                f"{self.limits.max_batch_tokens} tokens",
                reason="tuning_memory",
            )
        if allowance is not None:
            allowance.spend(tokens)
            allowance.take_tuning(size)

        arena: Arena | None = None

        def freed() -> None:
            nonlocal arena
            self.budget.give_back(size)
            if arena is not None and not self.closed:
                self.budget.arenas.put(arena)
            arena = None  # or whoever still holds this function holds hundreds of megabytes
            if allowance is not None:
                allowance.tuning_bytes -= size

        self.waits_for_memory = True
        try:
            await self.budget.take(size, self.patience_s)
        except BaseException:
            if allowance is not None:
                allowance.tuning_bytes -= size
            raise
        finally:
            self.waits_for_memory = False
        try:
            arena = self._arena(lengths, message.forward_only)
            self.budget.trim()
            batch = self.make_batch(
                self.backbone,
                self.plan,
                lengths,
                lambda *_: None,  # the queue sees to it
                forward_only=message.forward_only,
                checkpointing=self.config.checkpointing,
                piece_tokens=self.config.piece_tokens,
                arena=arena,
            )
        except BaseException:  # no memory after all: what was set aside for the batch is not lost with it
            freed()
            raise
        job = Job(batch, self._send, self._done, self._failed, freed, self.payer)
        widest = max(self.plan.hidden_size, self.plan.codes_width, self.plan.residual_width)
        self.outbox.most = 2 * tokens * widest
        self.last_number = message.batch
        self.current = Current(message.batch, tokens, job)
        self.queue.add(job)

    def rows(self, name: str, message: pb.Rows) -> None:
        """Check rows of one of `PARTS` and hand them to the batch.

        Raises
        ------
        Refusal
            With nothing changed.
        """
        current = self.current
        what = name.replace("_", " ")
        if current is None or message.batch != current.number:
            under_way = "none is" if current is None else f"batch {current.number} is"
            raise invalid(f"{what} of batch {message.batch}, but {under_way} under way")
        layer = message.layer if name in ("residual_codes", "codes_gradient") else 0
        if name in ("residual_codes", "codes_gradient"):
            what += f" of layer {layer}"
        awaited = self._awaited(current, name, layer, what)
        shape, came = tuple(message.rows.shape), current.came[name, layer]
        if len(shape) != 2 or shape[0] < 1:
            raise invalid(f"{what}: shape is {shape[:8]}, expected one or more rows")
        if message.first != came:
            raise invalid(f"{what} out of order: rows from {message.first}, expected from {came}")
        if came + shape[0] > awaited:
            raise invalid(f"{what}: {came + shape[0]} rows, of which {awaited} are waited for")
        width = {"residual_codes": self.plan.residual_width, "codes_gradient": self.plan.codes_width}
        expected = (shape[0], width.get(name, self.plan.hidden_size))
        try:
            tensor = wire.decode(message.rows, dtype=self.wire_dtype, shape=expected, what=what)
        except wire.WireError as error:
            raise invalid(str(error)) from None
        # What waits is kept in the backbone's dtype, whatever it travelled in: the budget counts that.
        current.job.batch.put(name, layer, came, tensor.to(self.backbone.dtype))
        current.came[name, layer] = came + shape[0]
        self.queue.wake()

    def is_waiting_for_the_edge(self) -> bool:
        """Whether nothing goes on until the edge says something."""
        if self.current is None:
            return not self.waits_for_memory
        job = self.current.job
        return not job.is_running and job.batch.next() is None

    def close(self) -> None:
        """Give everything back: the stream is gone."""
        self.closed = True
        if self.current is not None:
            self.queue.remove(self.current.job)
            self.current = None

    def _arena(self, lengths: Sequence[int], forward_only: bool) -> Arena | None:
        """Return memory for what a batch keeps; None if it keeps nothing, or on a GPU."""
        b = self.backbone
        if forward_only or b.device.type != "cpu":
            return None
        size = kept_bytes(
            b.geometry, self.plan, sum(lengths), b.dtype, self.config.checkpointing, longest=max(lengths)
        )
        return self.budget.arenas.get(size + ARENA_SLACK * len(lengths))

    def _checked_lengths(self, message: pb.Batch) -> list[int]:
        limits = self.limits
        if self.current is not None:
            raise invalid(f"batch {self.current.number} is under way; one batch of a stream at a time")
        if message.batch <= self.last_number:
            raise invalid(f"batch number {message.batch} is not above the last one, {self.last_number}")
        if not 1 <= len(message.lengths) <= MAX_SEQUENCES:  # counted before they are looked at
            raise invalid(f"a batch has 1 to {MAX_SEQUENCES} sequences, got {len(message.lengths)}")
        lengths = list(message.lengths)
        if min(lengths) < 1:
            raise invalid("a sequence has at least one token")
        if max(lengths) > limits.max_sequence_tokens:
            raise Refusal(
                grpc.StatusCode.OUT_OF_RANGE,
                f"a sequence of {max(lengths)} tokens; the context ends at {limits.max_sequence_tokens}",
                reason="context",
            )
        return lengths

    def _awaited(self, current: Current, name: str, layer: int, what: str) -> int:
        """Return how many rows of this tensor may have come by now."""
        plan, tokens = self.plan, current.tokens
        if name == "hidden":
            return tokens
        if name == "residual_codes":
            if layer not in plan.owners:
                raise invalid(
                    f"{what}: it is not adapted in plan {plan.name!r}, or shares the codes of another"
                )
            awaited = current.sent["codes", plan.source_of(layer)]
        elif current.job.batch.forward_only:
            raise invalid(f"{what} in a batch that was announced as forward only")
        elif name == "hidden_gradient":
            awaited = current.sent["hidden", 0]
        else:
            if layer not in plan.exchange_layers[0 if plan.returns_gradient else 1 :]:
                raise invalid(f"{what}: nothing below layer {layer} of plan {plan.name!r} waits for it")
            awaited = min(current.sent["residual_codes_gradient", fed] for fed in plan.fed_by(layer))
        if awaited == 0:
            raise invalid(f"{what} out of order: nothing was sent that it could answer")
        return awaited

    def _send(self, name: str, layer: int, first: int, rows: Tensor) -> None:
        assert self.current is not None
        self.current.sent[name, layer] = first + len(rows)
        self.touched_at = time.monotonic()
        self.outbox.put(Rows(self.current.number, name, layer, first, rows.detach()))

    def _done(self) -> None:
        assert self.current is not None
        number, self.current = self.current.number, None
        self.touched_at = time.monotonic()
        self.outbox.put(pb.TuneResponse(done=pb.BatchDone(batch=number)))

    def _failed(self, error: Exception) -> None:
        self.current = None
        self.on_failed(error)


def most_tokens(fits: Callable[[int], bool], at_most: int) -> int:
    """Return the largest number up to ``at_most`` that fits, 0 if none does."""
    low, high = 0, at_most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def gradients_underflow(dtype: torch.dtype) -> bool:
    """Whether gradients are too small for ``dtype``: its least positive number is 6e-8."""
    return dtype is torch.float16
