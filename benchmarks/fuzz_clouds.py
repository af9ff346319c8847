"""Honest clouds for the fuzzing: what a right cloud would answer to an edge. Tensors hold noise."""

import random
from collections import Counter

import torch

from benchmarks.fuzz_edges import noise
from shared import wire
from shared.pb.privatelora.v1 import private_lora_pb2 as pb
from shared.plan import Plan
from shared.wire_dtypes import WireDtypes


class DecodeCloud:
    """Answers one session."""

    def __init__(self, rng: random.Random, plan: Plan) -> None:
        self.rng, self.plan = rng, plan
        self.dtypes = WireDtypes.all(pb.DTYPE_FLOAT32)
        self._steps: dict[int, tuple[int, int, set[int]]] = {}  # positions, kept ones, layers answered

    def answers(self, raw: bytes) -> list[pb.DecodeResponse]:
        """Return what is said to a message."""
        message = pb.DecodeRequest.FromString(raw)
        if message.HasField("open"):
            self.dtypes = WireDtypes.asked(message.open)
            return [pb.DecodeResponse(opened=pb.Opened(session_id=self.rng.randbytes(16)))]
        if message.HasField("step"):
            step = message.step
            tokens, keep = sum(s.count for s in step.spans), sum(s.keep for s in step.spans)
            self._steps[step.step] = tokens, keep, {answer.layer for answer in step.residual_codes}
            return [self._next(step.step)]
        number = message.residual_codes.step
        if number not in self._steps:
            return []
        self._steps[number][2].update(answer.layer for answer in message.residual_codes.residual_codes)
        return [self._next(number)]

    def _next(self, number: int) -> pb.DecodeResponse:
        plan, response = self.plan, pb.DecodeResponse()
        tokens, keep, answered = self._steps[number]
        for layer in plan.exchange_layers:
            if not answered.issuperset(plan.fed_by(layer)):
                response.codes.step, response.codes.layer = number, layer
                codes = noise(self.rng, tokens, plan.codes_width)
                wire.fill_array(response.codes.codes, codes, self.dtypes.codes, plan.groups)
                return response
        del self._steps[number]
        response.hidden.step = number
        wire.fill_array(response.hidden.hidden, noise(self.rng, keep, plan.hidden_size), self.dtypes.hidden)
        return response


class TuneCloud:
    """Answers one tuning run."""

    def __init__(self, rng: random.Random, plan: Plan) -> None:
        self.rng, self.plan = rng, plan
        self.dtype: pb.Dtype.ValueType = pb.DTYPE_FLOAT32
        self._batch = pb.Batch()
        self._came: Counter[tuple[str, int]] = Counter()
        self._waiting: list[tuple[str, int]] = []  # tensors yet to be sent, in order

    def answers(self, raw: bytes) -> list[pb.TuneResponse]:
        """Return what is said to a message."""
        message = pb.TuneRequest.FromString(raw)
        kind = message.WhichOneof("message")
        if kind == "open":
            self.dtype = message.open.wire_dtype
            return [pb.TuneResponse(opened=pb.TuneOpened(max_batch_tokens=512, max_sequence_tokens=256))]
        if kind == "batch":
            self._batch = message.batch
            self._came.clear()
            self._waiting = self._outgoing()
            return []
        assert kind is not None
        rows: pb.Rows = getattr(message, kind)
        self._came[kind, rows.layer] += rows.rows.shape[0]
        said: list[pb.TuneResponse] = []
        while self._waiting and self._may(*self._waiting[0]):
            said += self._tensor(*self._waiting.pop(0))
        if said and not self._waiting:
            said.append(pb.TuneResponse(done=pb.BatchDone(batch=self._batch.batch)))
        return said

    def _outgoing(self) -> list[tuple[str, int]]:
        plan, tensors = self.plan, [("codes", layer) for layer in self.plan.exchange_layers]
        tensors.append(("hidden", 0))
        if not self._batch.forward_only:
            tensors += [("residual_codes_gradient", layer) for layer in reversed(plan.owners)]
            tensors += [("hidden_gradient", 0)] if plan.returns_gradient else []
        return tensors

    def _may(self, kind: str, layer: int) -> bool:
        """Whether the edge has sent all that comes before a tensor."""
        plan, tokens = self.plan, sum(self._batch.lengths)
        needed = [("hidden", 0)]
        below = plan.exchange_layers if kind != "codes" else [e for e in plan.exchange_layers if e < layer]
        needed += [("residual_codes", owner) for e in below for owner in plan.fed_by(e)]
        if kind in ("residual_codes_gradient", "hidden_gradient"):
            needed.append(("hidden_gradient", 0))
            above = layer if kind == "residual_codes_gradient" else -1
            needed += [
                ("codes_gradient", e)
                for e in plan.exchange_layers[0 if plan.returns_gradient else 1 :]
                if e > above
            ]
        return all(self._came[tensor] >= tokens for tensor in needed)

    def _tensor(self, kind: str, layer: int) -> list[pb.TuneResponse]:
        widths = {"codes": self.plan.codes_width, "residual_codes_gradient": self.plan.residual_width}
        width, tokens, at, said = widths.get(kind, self.plan.hidden_size), sum(self._batch.lengths), 0, []
        while at < tokens:
            count = tokens - at if self.rng.random() < 0.7 else self.rng.randint(1, tokens - at)
            response = pb.TuneResponse()
            rows: pb.Rows = getattr(response, kind)
            rows.batch, rows.layer, rows.first = self._batch.batch, layer, at
            wire.fill(rows.rows, torch.from_numpy(noise(self.rng, count, width)), self.dtype)
            said.append(response)
            at += count
        return said
