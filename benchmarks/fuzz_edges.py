"""Honest edges for the fuzzing: what a right edge would say next on a stream, given what it has heard.

They know the protocol and nothing else: tensors hold noise, so nothing is computed here. What they say is
mutated by others; then the cloud may answer what they do not expect, and they just go on.
"""

import random
from collections import Counter, deque

import numpy as np
import torch

from shared import wire
from shared.pb.privatelora.v1 import private_lora_pb2 as pb
from shared.plan import Plan
from shared.wire_dtypes import WireDtypes

CODES_DTYPES = ("float32", "bfloat16", "float16", "int8", "int4", "float64")
HIDDEN_DTYPES = CODES_DTYPES[:4]
TUNE_DTYPES = (pb.DTYPE_FLOAT32, pb.DTYPE_BFLOAT16, pb.DTYPE_FLOAT64)
MOST_ROWS, MOST_POSITIONS = 6, 100  # a session's, less than the cloud takes
LARGEST_STEP = (1 << 64) - 1  # that the field holds
NOISE = np.random.default_rng(0).normal(size=1 << 16).astype(np.float32)


def noise(rng: random.Random, rows: int, width: int) -> wire.Array:
    """Return noise ``(rows, width)``, a view of what was made once."""
    count = rows * width
    start = rng.randrange(len(NOISE) - count) if count < len(NOISE) else 0
    return np.resize(NOISE[start : start + count], (rows, width))


class DecodeEdge:
    """One session of an edge.

    Parameters
    ----------
    rng
        Chooses what to do among what is right.
    plan, fingerprint
        Of the session.
    session_id
        Of a dropped session to pick up, else empty.
    """

    def __init__(
        self, rng: random.Random, plan: Plan, fingerprint: pb.Fingerprint, session_id: bytes = b""
    ) -> None:
        self.rng, self.plan = rng, plan
        kinds = rng.choice(CODES_DTYPES), rng.choice(CODES_DTYPES)
        self.dtypes = WireDtypes.named(rng.choice(HIDDEN_DTYPES), None, *kinds)
        hello = pb.Open(protocol_version=1, fingerprint=fingerprint, session_id=session_id)
        self.dtypes.ask(hello)
        self.session_id = b""
        self._lengths: list[int] = []  # of the rows, once all steps are done
        self._number = 0
        self._flying: dict[int, int] = {}  # positions of the steps in flight, by number
        self._outbox: deque[pb.DecodeRequest] = deque([pb.DecodeRequest(open=hello)])

    def waits(self) -> bool:
        """Whether the cloud is to say something before this edge goes on."""
        if self._outbox:
            return False
        return (
            not self.session_id or len(self._flying) > 1 or (bool(self._flying) and self.rng.random() < 0.9)
        )

    def says(self) -> pb.DecodeRequest:
        """Return the next message."""
        return self._outbox.popleft() if self._outbox else self._step()

    def hears(self, raw: bytes) -> None:
        """Take an answer."""
        message = pb.DecodeResponse.FromString(raw)
        if message.HasField("opened"):
            self.session_id = message.opened.session_id
            self._lengths = list(message.opened.row_lengths)
            self._number = message.opened.last_step
        elif message.HasField("hidden"):
            self._flying.pop(message.hidden.step, None)
        elif message.HasField("codes"):
            answer = pb.DecodeRequest()
            answer.residual_codes.step = message.codes.step
            tokens = self._flying.get(message.codes.step, message.codes.codes.shape[0])
            for layer in self.plan.fed_by(message.codes.layer):
                self._codes(answer.residual_codes.residual_codes.add(), layer, tokens)
            self._outbox.append(answer)

    def _step(self) -> pb.DecodeRequest:
        rng, request = self.rng, pb.DecodeRequest()
        step = request.step
        self._number += rng.choice((1, 1, 1, 7))
        step.step = min(self._number, LARGEST_STEP)  # a mutant may have left the session's count at its end
        if self._lengths and not self._flying and rng.random() < 0.1:  # beams
            step.parents[:] = [rng.randrange(len(self._lengths)) for _ in range(rng.choice((1, 2, 3)))]
            self._lengths = [self._lengths[parent] for parent in step.parents]
        held = len(self._lengths)
        rows = [rng.randrange(held)] if held and (held >= MOST_ROWS or rng.random() < 0.8) else []
        more = rng.choice((0, 0, 1, 2) if rows else (1, 2, 3))
        rows += range(held, min(held + more, MOST_ROWS))
        tokens = 0
        for row in rows:
            if row == len(self._lengths):
                self._lengths.append(0)
            start = self._lengths[row]
            if not self._flying and (start > MOST_POSITIONS or rng.random() < 0.15):
                start = rng.randrange(min(start, MOST_POSITIONS) + 1)  # crops
            count = rng.choice((1, 1, 1, 2, 5, 17, 40))
            step.spans.add(row=row, start=start, count=count, keep=rng.choice((0, 1, count)))
            self._lengths[row] = start + count
            tokens += count
        wire.fill_array(step.hidden, noise(rng, tokens, self.plan.hidden_size), self.dtypes.hidden)
        if rng.random() < 0.2:  # a replay, or the first codes made on this side
            one = self.plan.fed_by(rng.choice(self.plan.exchange_layers))
            owners = self.plan.owners if rng.random() < 0.5 else one
            for layer in owners:
                self._codes(step.residual_codes.add(), layer, tokens)
        self._flying[step.step] = tokens
        return request

    def _codes(self, answer: pb.LayerCodes, layer: int, tokens: int) -> None:
        answer.layer = layer
        z = noise(self.rng, tokens, self.plan.residual_width)
        wire.fill_array(answer.codes, z, self.dtypes.residual_codes, self.plan.groups)


class TuneEdge:
    """One tuning run of an edge; parameters as for `DecodeEdge`."""

    def __init__(self, rng: random.Random, plan: Plan, fingerprint: pb.Fingerprint) -> None:
        self.rng, self.plan = rng, plan
        self.dtype = rng.choice(TUNE_DTYPES)
        hello = pb.TuneOpen(protocol_version=1, fingerprint=fingerprint, wire_dtype=self.dtype)
        self._number = self._tokens = 0
        self._is_open = self._is_busy = self._forward_only = False
        self._sent: Counter[tuple[str, int]] = Counter()
        self._heard: Counter[tuple[str, int]] = Counter()
        self._outbox: deque[pb.TuneRequest] = deque([pb.TuneRequest(open=hello)])

    def waits(self) -> bool:
        """Whether the cloud is to say something before this edge goes on."""
        return not self._outbox and (not self._is_open or self._is_busy)

    def says(self) -> pb.TuneRequest:
        """Return the next message."""
        if not self._outbox:
            self._begin()
        return self._outbox.popleft()

    def hears(self, raw: bytes) -> None:
        """Take an answer."""
        message = pb.TuneResponse.FromString(raw)
        kind = message.WhichOneof("message")
        if kind == "opened":
            self._is_open = True
        elif kind == "done":
            self._is_busy = False
        elif kind is not None:
            rows: pb.Rows = getattr(message, kind)
            self._heard[kind, rows.layer] = rows.first + (rows.rows.shape[0] if rows.rows.shape else 0)
            self._answer(kind, rows.layer)

    def _begin(self) -> None:
        rng = self.rng
        lengths = [rng.choice((1, 2, 3, 7, 20)) for _ in range(rng.choice((1, 1, 2, 5)))]
        self._number += rng.choice((1, 1, 3))
        self._tokens, self._forward_only, self._is_busy = sum(lengths), rng.random() < 0.3, True
        self._sent.clear()
        self._heard.clear()
        batch = pb.Batch(batch=self._number, lengths=lengths, forward_only=self._forward_only)
        self._outbox.append(pb.TuneRequest(batch=batch))
        self._rows("hidden", 0, self._tokens, self.plan.hidden_size)

    def _answer(self, kind: str, layer: int) -> None:
        plan, fed = self.plan, self.plan.fed_by
        if kind == "codes":
            for owner in fed(layer):
                self._rows("residual_codes", owner, self._heard[kind, layer], plan.residual_width)
        elif kind == "hidden" and not self._forward_only:
            self._rows("hidden_gradient", 0, self._heard[kind, layer], plan.hidden_size)
        elif kind == "residual_codes_gradient" and layer in plan.owners:
            source = plan.source_of(layer)
            if source in plan.exchange_layers[0 if plan.returns_gradient else 1 :]:
                there = min(self._heard[kind, owner] for owner in fed(source))
                self._rows("codes_gradient", source, there, plan.codes_width)

    def _rows(self, kind: str, layer: int, until: int, width: int) -> None:
        """Send rows of a tensor up to ``until``, in one message or several."""
        first = self._sent[kind, layer]
        while first < min(until, self._tokens):
            count = min(until, self._tokens) - first
            count = count if self.rng.random() < 0.7 else self.rng.randint(1, count)
            request = pb.TuneRequest()
            rows: pb.Rows = getattr(request, kind)
            rows.batch, rows.layer, rows.first = self._number, layer, first
            wire.fill(rows.rows, torch.from_numpy(noise(self.rng, count, width)), self.dtype)
            self._outbox.append(request)
            first += count
        self._sent[kind, layer] = first


Edge = DecodeEdge | TuneEdge
