"""A tuning edge made by hand: every message as a test wants it, over a real channel."""

import queue
from collections.abc import Sequence
from typing import Any

import grpc
import torch
from torch import Tensor

from shared import wire
from shared.pb.privatelora.v1 import private_lora_pb2 as pb
from shared.plan import Plan
from tests.integration.raw_edge import SERVICE, TIMEOUT_S, RawEdge, Refused
from tests.tuning import Learner


class RawTune:
    """One Tune stream."""

    def __init__(self, edge: RawEdge, plan: str, wire_dtype: int = pb.DTYPE_FLOAT64) -> None:
        self.edge, self.wire_dtype, self.number = edge, wire_dtype, 0
        self.name, self.plan = plan, Plan.parse(edge.offers[plan].plan_json)
        self._outbox: queue.Queue[bytes | None] = queue.Queue()
        self._call = edge.channel.stream_stream(SERVICE + "Tune")(
            iter(self._outbox.get, None), timeout=TIMEOUT_S
        )

    def __enter__(self) -> "RawTune":
        return self

    def __exit__(self, *_: object) -> None:
        self.drop()

    def hello(self, **changes: Any) -> pb.TuneRequest:
        fields: dict[str, Any] = {
            "protocol_version": 1,
            "fingerprint": self.edge.offers[self.name].fingerprint,
            "wire_dtype": self.wire_dtype,
        }
        return pb.TuneRequest(open=pb.TuneOpen(**fields | changes))

    def open(self) -> "RawTune":
        self.send(self.hello())
        self.opened = self.receive().opened
        return self

    def send(self, message: pb.TuneRequest | bytes) -> None:
        self._outbox.put(message if isinstance(message, bytes) else message.SerializeToString())

    def receive(self) -> pb.TuneResponse:
        return pb.TuneResponse.FromString(next(self._call))

    def drop(self) -> None:
        self._call.cancel()
        self._outbox.put(None)

    def finish(self) -> None:
        self._outbox.put(None)
        for _ in self._call:
            pass
        assert self._call.code() is grpc.StatusCode.OK

    def refused(self) -> Refused:
        """Read until the stream ends, which must be by a refusal."""
        try:
            for _ in self._call:
                pass
        except grpc.RpcError:
            pass
        trailers = {key: str(value) for key, value in self._call.trailing_metadata() or ()}
        self._outbox.put(None)
        return Refused(self._call.code(), self._call.details(), trailers)

    def begin(self, lengths: Sequence[int], **fields: Any) -> int:
        self.number = fields.pop("batch", self.number + 1)
        self.send(pb.TuneRequest(batch=pb.Batch(batch=self.number, lengths=lengths, **fields)))
        return self.number

    def rows(self, kind: str, layer: int, tensor: Tensor, *, first: int = 0, step: int = 10_000) -> None:
        """Send a tensor in messages of ``step`` rows."""
        for at in range(0, len(tensor), step):
            part = pb.Rows(batch=self.number, layer=layer, first=first + at)
            part.rows.CopyFrom(wire.encode(tensor[at : at + step], self.wire_dtype))
            self.send(pb.TuneRequest(**{kind: part}))

    def expect(self, kind: str, layer: int, tokens: int, width: int) -> Tensor:
        """Receive one whole tensor, ``(tokens, width)``, which has to be this one."""
        parts: list[Tensor] = []
        at = 0
        while at < tokens:
            message = self.receive()
            assert message.WhichOneof("message") == kind, message.WhichOneof("message")
            part: pb.Rows = getattr(message, kind)
            assert (part.batch, part.first) == (self.number, at)
            assert kind == "hidden" or part.layer == layer
            count = part.rows.shape[0]
            parts.append(wire.decode(part.rows, dtype=self.wire_dtype, shape=(count, width), what=kind))
            at += count
        return torch.cat(parts)

    def forward(
        self, learner: Learner, hidden: Tensor, lengths: Sequence[int], *, step: int = 10_000, **fields: Any
    ) -> Tensor:
        """Run a batch forward; return hL."""
        self.begin(lengths, **fields)
        tokens, plan = sum(lengths), self.plan
        self.rows("hidden", 0, hidden, step=step)
        for exchange in plan.exchange_layers:
            learner.codes[exchange] = self.expect("codes", exchange, tokens, plan.codes_width)
            for layer in plan.fed_by(exchange):
                self.rows("residual_codes", layer, learner.residual_codes(layer), step=step)
        return self.expect("hidden", 0, tokens, plan.hidden_size)

    def backward(self, learner: Learner, gradient: Tensor, *, step: int = 10_000) -> None:
        """Run it back; dL/dM is added up in ``learner``."""
        tokens, plan = len(gradient), self.plan
        self.rows("hidden_gradient", 0, gradient, step=step)
        for exchange in reversed(plan.exchange_layers):
            for layer in reversed(plan.fed_by(exchange)):
                dz = self.expect("residual_codes_gradient", layer, tokens, plan.residual_width)
                learner.learn(layer, dz)
            if exchange != plan.exchange_layers[0]:
                self.rows("codes_gradient", exchange, learner.codes_gradients.pop(exchange), step=step)
        self.done()

    def done(self) -> None:
        assert self.receive().done.batch == self.number
