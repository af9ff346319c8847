"""One edge's session: its rows in the KV cache and its steps in flight.

Checks every message against the plan and the limits before anything is changed. Knows nothing about
gRPC streams; what it has to say goes to ``outbox``.
"""

import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

import grpc
from torch import Tensor

from cloud_server.caller import ANONYMOUS, Caller
from cloud_server.engine import Engine
from cloud_server.kv_cache import KvFullError, Row
from cloud_server.outbox import Outbox
from cloud_server.refusal import Refusal, invalid, no_memory
from cloud_server.step import RowSpan, Step
from shared import wire
from shared.pb.privatelora.v1 import private_lora_pb2 as pb
from shared.plan import Plan
from shared.wire_dtypes import WireDtypes

if TYPE_CHECKING:
    from cloud_server.allowance import Allowance


@dataclass(frozen=True)
class Limits:
    """Bounds on one session, stated in ``Describe``. Positions unless said otherwise."""

    max_context_tokens: int
    max_step_tokens: int
    max_rows: int
    max_steps_in_flight: int


@dataclass(eq=False)
class Session:
    """One edge's rows and steps."""

    plan: Plan
    wire_dtypes: WireDtypes
    limits: Limits
    engine: Engine
    make_room: Callable[[], bool] = lambda: False  # frees something in the cache; False if nothing can be
    id: bytes = field(default_factory=lambda: secrets.token_bytes(16))
    rows: list[Row] = field(default_factory=list)
    steps: dict[int, Step] = field(default_factory=dict)  # in flight, by number
    last_number: int = 0  # steps count from 1, so that 0 is none
    outbox: Outbox = field(default_factory=Outbox)
    dropped_at: float | None = None  # when the stream was lost, None while connected
    opened_at: float = field(default_factory=time.monotonic)
    heard_at: float = field(default_factory=time.monotonic)  # when the edge last said something
    claim: int = 0  # blocks that are there for it whenever it asks, see `cloud_server.admission`
    claim_lapses: bool = False  # between two answers: its edge says anew what each needs
    may_take: Callable[["Session", int], bool] = lambda *_: True  # so many blocks more, once room is made
    cut_off: Callable[[str | Refusal], object] = lambda _: None  # ends the stream, for the reason given
    caller: Caller = ANONYMOUS  # whose it is; nobody else may resume it
    allowance: "Allowance | None" = None  # what that identity may use; None is anything
    make_own_room: Callable[[], bool] = lambda: False  # frees something of this identity's only

    def __post_init__(self) -> None:
        """Look up once what every exchange asks for."""
        self._groups = self.plan.groups

    def step(self, message: pb.Step) -> None:
        """Check a new step, make room for it and hand it to the engine.

        Raises
        ------
        Refusal
            With nothing changed, unless the cache has no room: the session is then fit to be dropped only.
        """
        spans = self._checked_spans(message)
        overwritten = self._overwritten(spans, message.parents)
        self._check_positions(spans, message.parents, overwritten)
        in_flight = len(self.steps) - len(overwritten)
        if in_flight >= self.limits.max_steps_in_flight:
            raise invalid(f"more than {self.limits.max_steps_in_flight} steps in flight; wait for answers")
        if message.parents and in_flight:
            raise invalid("rows cannot be rearranged while steps are in flight")
        tokens = sum(span.count for span in spans)
        shape = (tokens, self.plan.hidden_size)
        hidden = self._tensor(message.hidden, self.wire_dtypes.hidden, shape, "hidden")
        for answer in message.residual_codes:
            if answer.layer not in self.plan.owners:
                raise invalid(
                    f"layer {answer.layer} is not adapted in plan {self.plan.name!r}, or shares the residual "
                    "codes of another"
                )
        known = {answer.layer: self._residual(answer, tokens) for answer in message.residual_codes}
        if self.allowance is not None:
            self.allowance.spend(tokens)
        self.last_number = message.step  # from here on it has begun: an edge that comes back is told so
        if overwritten:
            self._cancel(overwritten, {} if message.parents else self._ends(spans))
        if message.parents:
            self._rearrange(message.parents)
        while len(self.rows) <= max(span.row for span in spans):
            self.rows.append(Row())
        row_spans = []
        for span in spans:
            row = self.rows[span.row]
            if span.start < row.length:
                self.engine.cache.crop(row, span.start, span.start + span.count)
            self._reserve(row, span.start, span.start + span.count)
            row_spans.append(RowSpan(row, span.start, span.count, span.keep))
        for taken in row_spans:
            taken.row.length = taken.start + taken.count
        step = Step(
            number=message.step,
            plan=self.plan,
            spans=tuple(row_spans),
            hidden=hidden,
            on_codes=self._send_codes,
            on_done=self._send_hidden,
            owner=self,
            on_failed=self._failed,
            payer=self.caller.name,
            before=next(reversed(self.steps.values()), None),
            residual_codes=known,
        )
        self.steps[step.number] = step
        self.engine.submit(step)

    def answer(self, message: pb.ResidualCodes) -> None:
        """Check residual codes and hand them to the engine.

        Raises
        ------
        Refusal
            If the step is not in flight, or does not wait for these layers, or the tensors are wrong.
        """
        step = self.steps.get(message.step)
        if step is None:
            if message.step <= self.last_number:
                return  # a late answer to a step that was cancelled or overwritten
            raise invalid(f"residual codes for step {message.step}, which was never sent")
        if not message.residual_codes:
            raise invalid("residual codes without any layer")
        awaited = self.plan.fed_by(step.emitted) if step.emitted >= 0 else ()
        answers = {}
        for answer in message.residual_codes:
            if (
                answer.layer not in awaited
                or answer.layer < step.layer
                or answer.layer in step.residual_codes
                or answer.layer in answers
            ):
                raise invalid(
                    f"residual codes for layer {answer.layer} out of order: step {step.number} stands at "
                    f"layer {step.layer} and waits for {[a for a in awaited if a not in step.residual_codes]}"
                )
            answers[answer.layer] = self._residual(answer, step.tokens)
        self.engine.answer(step, answers)

    def silent_since(self) -> float | None:
        """Return since when the edge owes an answer and says nothing (monotonic); None if it owes none."""
        asked = [
            step.emitted_at
            for step in self.steps.values()
            if step.emitted >= 0
            and (owner := self.plan.owner_of(step.layer)) is not None
            and owner not in step.residual_codes
        ]
        return max(self.heard_at, max(asked)) if asked else None

    def row_lengths(self) -> list[int]:
        """Return the positions that each row really holds."""
        return [row.written for row in self.rows]

    def drop(self) -> None:
        """Forget what is in flight and keep what is written: the stream is gone."""
        self._cancel(list(self.steps.values()))
        for row in self.rows:
            self.engine.cache.crop(row, row.written)
        self.engine.leave(self)
        self.outbox.clear()
        self.dropped_at = time.monotonic()

    def close(self) -> None:
        """Give everything back."""
        self._cancel(list(self.steps.values()))
        self.engine.leave(self)
        while self.rows:
            self.engine.cache.free(self.rows.pop())

    def _checked_spans(self, message: pb.Step) -> list[pb.Span]:
        limits = self.limits
        if message.step <= self.last_number:
            raise invalid(f"step number {message.step} is not above the last one, {self.last_number}")
        if not 1 <= len(message.spans) <= limits.max_rows:  # before a million become objects
            raise invalid(f"a step has 1 to {limits.max_rows} spans, got {len(message.spans)}")
        spans = list(message.spans)
        tokens = sum(span.count for span in spans)
        if tokens > limits.max_step_tokens:
            raise invalid(
                f"a step has at most {limits.max_step_tokens} positions, got {tokens}; send it in chunks"
            )
        owners, brought = len(self.plan.owners), len(message.residual_codes)
        if brought > owners:
            raise invalid(
                f"{brought} residual codes in one step; plan {self.plan.name!r} takes {owners} at most"
            )
        if len(message.parents) > limits.max_rows:
            raise invalid(f"a session has at most {limits.max_rows} rows, got {len(message.parents)} parents")
        if any(parent >= len(self.rows) for parent in message.parents):
            raise invalid(f"parents name rows beyond the session's {len(self.rows)}")
        rows = len(message.parents) or len(self.rows)
        seen = set()
        for span in spans:
            if span.count < 1 or span.keep > span.count:
                raise invalid(f"a span has count >= 1 and keep <= count, got {span.count} and {span.keep}")
            if span.row in seen or span.row >= limits.max_rows:
                raise invalid(
                    f"row {span.row} is named twice or beyond the {limits.max_rows} a session may have"
                )
            seen.add(span.row)
        if max(seen) >= rows + len(seen - set(range(rows))):
            raise invalid("rows are numbered without gaps")
        return spans

    def _check_positions(self, spans: list[pb.Span], parents: Sequence[int], overwritten: list[Step]) -> None:
        """Refuse a span that leaves a gap behind what its row holds once overwritten steps are gone."""
        held = {id(row): row.length for row in self.rows}
        for step in overwritten:
            for s in step.spans:
                held[id(s.row)] = min(held[id(s.row)], s.start)
        for span in spans:
            row = self._old_row(span.row, parents)
            length = 0 if row is None else held[id(row)]
            if span.start > length:
                raise Refusal(
                    grpc.StatusCode.FAILED_PRECONDITION,
                    f"position gap: row {span.row} holds {length} positions, the step starts at {span.start}",
                    reason="gap",
                )
            if span.start + span.count > self.limits.max_context_tokens:
                raise Refusal(
                    grpc.StatusCode.OUT_OF_RANGE,
                    f"row {span.row} would hold {span.start + span.count} positions; the context ends at "
                    f"{self.limits.max_context_tokens}",
                    reason="context",
                )

    def _old_row(self, index: int, parents: Sequence[int]) -> Row | None:
        """Return the row that row ``index`` of a new step continues; None if that one is new."""
        if parents:
            return self.rows[parents[index]] if index < len(parents) else None
        return self.rows[index] if index < len(self.rows) else None

    def _tensor(
        self,
        message: pb.Tensor,
        dtype: "pb.Dtype.ValueType",
        shape: tuple[int, int],
        what: str,
        groups: int = 1,
    ) -> Tensor:
        try:
            tensor = wire.decode(message, dtype=dtype, shape=shape, what=what, groups=groups)
        except wire.WireError as error:
            raise invalid(str(error)) from None
        backbone = self.engine.backbone
        if tensor.dtype == backbone.dtype and backbone.device.type == "cpu":  # torch's calls let others in
            return tensor
        return tensor.to(device=backbone.device, dtype=backbone.dtype)

    def _residual(self, answer: pb.LayerCodes, tokens: int) -> Tensor:
        shape, what = (tokens, self.plan.residual_width), f"residual codes of layer {answer.layer}"
        return self._tensor(answer.codes, self.wire_dtypes.residual_codes, shape, what, self._groups)

    def _overwritten(self, spans: list[pb.Span], parents: Sequence[int]) -> list[Step]:
        """Return the steps in flight from the first one whose positions a new step overwrites."""
        starts: dict[int, int] = {}
        for span in spans:
            row = self._old_row(span.row, parents)
            starts[id(row)] = min(span.start, starts.get(id(row), span.start))
        for number, step in self.steps.items():
            if any(starts.get(id(s.row), s.start + s.count) < s.start + s.count for s in step.spans):
                return [later for n, later in self.steps.items() if n >= number]
        return []

    def _ends(self, spans: list[pb.Span]) -> dict[int, int]:
        """Return up to where (positions) a step writes to rows that there are, by the row's ``id``."""
        return {id(self.rows[s.row]): s.start + s.count for s in spans if s.row < len(self.rows)}

    def _cancel(self, steps: list[Step], ends: Mapping[int, int] = MappingProxyType({})) -> None:
        """Drop steps and the positions that they would have written; blocks up to ``ends`` stay the row's."""
        for step in steps:
            self.engine.cancel(step)
            self.steps.pop(step.number, None)
            for span in step.spans:
                row = span.row
                self.engine.cache.crop(row, min(row.length, span.start), ends.get(id(row), 0))

    def _reserve(self, row: Row, start: int, end: int) -> None:
        cache, allowance = self.engine.cache, self.allowance
        needed = cache.blocks_needed(row, start, end)
        if needed == 0:
            return
        while allowance is not None and allowance.lacks_kv(needed, cache.block_bytes):
            if not self.make_own_room():
                raise allowance.kv_refusal()
        if not self.may_take(self, needed):
            raise Refusal(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "the KV cache is full: the rest is claimed by others, and this session needs more than "
                "it said; open one that claims as much, or try again later",
                retry_after_s=1.0,
                reason="kv",
            )
        while True:
            try:
                return cache.reserve(row, start, end)
            except KvFullError as error:
                if not self.make_room():
                    raise Refusal(
                        grpc.StatusCode.RESOURCE_EXHAUSTED,
                        f"the KV cache is full ({error}); try again later",
                        retry_after_s=1.0,
                        reason="kv",
                    ) from None

    def _rearrange(self, parents: Iterable[int]) -> None:
        """Make row i continue old row parents[i]."""
        old, used, new = self.rows, set[int](), []
        for parent in parents:
            new.append(self.engine.cache.fork(old[parent]) if parent in used else old[parent])
            used.add(parent)
        for index, row in enumerate(old):
            if index not in used:
                self.engine.cache.free(row)
        self.rows = new

    def _failed(self, step: Step, error: Exception) -> None:
        """End the stream: a step of it could not be run for want of memory."""
        self.steps.pop(step.number, None)
        self.cut_off(no_memory("this step"))

    def _send_codes(self, step: Step, layer: int, codes: Tensor) -> None:
        message = pb.DecodeResponse()
        message.codes.step, message.codes.layer = step.number, layer
        wire.fill(message.codes.codes, codes, self.wire_dtypes.codes, self._groups)
        self.outbox.put(message)

    def _send_hidden(self, step: Step, hidden: Tensor) -> None:
        self.steps.pop(step.number, None)
        for span in step.spans:
            span.row.written = span.start + span.count
        message = pb.DecodeResponse()
        message.hidden.step = step.number
        wire.fill(message.hidden.hidden, hidden, self.wire_dtypes.hidden)
        self.outbox.put(message)
