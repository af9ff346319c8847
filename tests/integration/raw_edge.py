"""An edge that says whatever a test wants: messages are made by hand, refusals are looked at as they are.

Everything goes over a real channel. Nothing here is shared with the edge client, so that a mistake
which both sides make would be seen.
"""

import queue
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import grpc
import numpy as np

from shared.pb.privatelora.v1 import private_lora_pb2 as pb
from shared.plan import Plan

SERVICE = "/privatelora.v1.PrivateLoraService/"
TIMEOUT_S = 300.0  # for a whole stream; only a server that hangs gets there
NUMPY = {pb.DTYPE_FLOAT32: "<f4", pb.DTYPE_FLOAT16: "<f2"}


@dataclass(frozen=True)
class Refused:
    """How a stream ended."""

    code: grpc.StatusCode
    message: str
    trailers: dict[str, str]


def tensor(values: Any, dtype: int = pb.DTYPE_FLOAT32) -> pb.Tensor:
    """Return an array as a message."""
    array = np.asarray(values, dtype=NUMPY[dtype])
    return pb.Tensor(dtype=dtype, shape=array.shape, data=array.tobytes())


def array(message: pb.Tensor) -> np.ndarray:
    """Return a message as an array."""
    return np.frombuffer(message.data, NUMPY[message.dtype]).reshape(tuple(message.shape))


class RawEdge:
    """A channel to one cloud."""

    def __init__(
        self, address: str, credentials: grpc.ChannelCredentials | None = None, **options: Any
    ) -> None:
        own = [("grpc.use_local_subchannel_pool", 1)]
        if credentials is None:
            self.channel = grpc.insecure_channel(address, options=own, **options)
        else:
            self.channel = grpc.secure_channel(address, credentials, options=own, **options)
        self._streams: list[RawStream] = []
        self.offers = {Plan.parse(o.plan_json).name: o for o in self.describe().plans}
        self.limits = self.describe().limits

    def __enter__(self) -> "RawEdge":
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.close()

    def describe(self, raw: bytes = b"") -> pb.DescribeResponse:
        call = self.channel.unary_unary(SERVICE + "Describe")
        return pb.DescribeResponse.FromString(call(raw, timeout=TIMEOUT_S))

    def fetch(self, index: int, offset: int = 0) -> Iterator[bytes]:
        """Yield the pieces of a part."""
        request = pb.FetchEdgePartsRequest(part_index=index, offset_bytes=offset)
        call = self.channel.unary_stream(SERVICE + "FetchEdgeParts")
        for raw in call(request.SerializeToString(), timeout=TIMEOUT_S):
            yield pb.FetchEdgePartsResponse.FromString(raw).data

    @property
    def kv_used(self) -> int:
        return self.describe().kv_bytes_used

    def settled(self, used: int = 0) -> bool:
        """Wait for the KV bytes in use to be ``used``; return whether they came to it."""
        deadline = time.monotonic() + 120
        while self.kv_used != used and time.monotonic() < deadline:
            time.sleep(0.05)
        return self.kv_used == used

    def stream(self, metadata: Sequence[tuple[str, str]] = ()) -> "RawStream":
        """Return a stream on which nothing has been said but these headers."""
        self._streams.append(RawStream(self.channel, metadata))
        return self._streams[-1]

    def end_all(self) -> None:
        """End in order every session that was opened here and left: nobody waits for its grace to pass."""
        for left in self._streams.copy():
            if left.has_ended or (hello := left.picks_up()) is None:
                continue
            again = self.stream()
            again.send(hello)
            try:
                again.receive()
                again.finish()
            except grpc.RpcError as error:
                assert error.code() is grpc.StatusCode.NOT_FOUND, error  # ended under another stream
        self._streams.clear()

    def hello(self, plan: str = "r8", **changes: Any) -> pb.DecodeRequest:
        """Return a right first message, with fields changed."""
        fields: dict[str, Any] = {
            "protocol_version": 1,
            "fingerprint": self.offers[plan].fingerprint,
            "wire_dtype": pb.DTYPE_FLOAT32,
        }
        return pb.DecodeRequest(open=pb.Open(**fields | changes))

    def open(self, plan: str = "r8", **changes: Any) -> "RawStream":
        """Return a stream whose handshake is done."""
        stream = self.stream()
        stream.plan = Plan.parse(self.offers[plan].plan_json)
        stream.send(self.hello(plan, **changes))
        stream.opened = stream.receive().opened
        return stream

    def hello_refused(self, message: pb.DecodeRequest | bytes) -> Refused:
        """Send a first message that is refused; return how."""
        stream = self.stream()
        stream.send(message)
        return stream.refused()

    def resumed(self, stream: "RawStream", metadata: Sequence[tuple[str, str]] = ()) -> "RawStream":
        """Open a dropped session again, as soon as the cloud has noticed that it was dropped."""
        while True:
            again = self.stream(metadata)
            again.plan = stream.plan
            again.send(self.hello(session_id=stream.opened.session_id))
            try:
                again.opened = again.receive().opened
                return again
            except grpc.RpcError as error:
                assert error.code() is grpc.StatusCode.NOT_FOUND
                time.sleep(0.01)


class RawStream:
    """One Decode stream. `M = 0` unless a test answers otherwise."""

    plan: Plan
    opened: pb.Opened

    def __init__(self, channel: grpc.Channel, metadata: Sequence[tuple[str, str]] = ()) -> None:
        self.number = 0
        self.has_ended = False
        self._hello: pb.DecodeRequest | None = None
        self._session_id = b""
        self._outbox: queue.Queue[bytes | None] = queue.Queue()
        self._call = channel.stream_stream(SERVICE + "Decode")(
            iter(self._outbox.get, None), timeout=TIMEOUT_S, metadata=tuple(metadata)
        )

    @property
    def headers(self) -> dict[str, str]:
        """What came before the first answer."""
        return {key: str(value) for key, value in self._call.initial_metadata() or ()}

    def __enter__(self) -> "RawStream":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.drop()

    def picks_up(self) -> pb.DecodeRequest | None:
        """Return the first message that would pick this stream's session up; None if it never had one."""
        if self._hello is None or not self._session_id:
            return None
        hello = pb.DecodeRequest(open=self._hello.open)
        hello.open.session_id = self._session_id
        return hello

    def send(self, message: pb.DecodeRequest | bytes) -> None:
        if self._hello is None and isinstance(message, pb.DecodeRequest) and message.HasField("open"):
            self._hello = message
        self._outbox.put(message if isinstance(message, bytes) else message.SerializeToString())

    def receive(self) -> pb.DecodeResponse:
        message = pb.DecodeResponse.FromString(next(self._call))
        if message.HasField("opened"):
            self._session_id = message.opened.session_id
        return message

    def finish(self) -> None:
        """End the stream in order and wait for the cloud to agree."""
        self._outbox.put(None)
        for _ in self._call:
            pass
        assert self._call.code() is grpc.StatusCode.OK
        self.has_ended = True

    def drop(self) -> None:
        """End the stream as a broken connection would."""
        self._call.cancel()  # before the requests end: that would be an orderly close
        self._outbox.put(None)

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

    # --- steps ------------------------------------------------------------------------------------------

    def step(
        self,
        spans: Sequence[tuple[int, int, int, int]] = ((0, 0, 3, 1),),
        hidden: Any = None,
        known: Any = None,
        **fields: Any,
    ) -> int:
        """Send a step with spans (row, start, count, keep); h0 is noise unless given. Return its number."""
        self.number += 1
        tokens = sum(span[2] for span in spans)
        if hidden is None:
            hidden = np.random.default_rng(self.number).normal(size=(tokens, self.plan.hidden_size))
        if not isinstance(hidden, pb.Tensor):
            hidden = tensor(hidden)
        message = pb.Step(
            **{
                "step": self.number,
                "spans": [pb.Span(row=r, start=s, count=c, keep=k) for r, s, c, k in spans],
                "hidden": hidden,
                "residual_codes": [
                    pb.LayerCodes(layer=layer, codes=z if isinstance(z, pb.Tensor) else tensor(z))
                    for layer, z in (known or {}).items()
                ],
            }
            | fields
        )
        self.send(pb.DecodeRequest(step=message))
        return self.number

    def zeros(self, tokens: int, value: float = 0.0) -> dict[int, np.ndarray]:
        """Return residual codes of every adapted layer, all the same value."""
        codes = np.full((tokens, self.plan.residual_width), value)
        return dict.fromkeys(self.plan.adapted_layers, codes)

    def answer(self, layer: int, codes: Any, step: int | None = None) -> None:
        """Send residual codes for the current step, or another."""
        if not isinstance(codes, pb.Tensor):
            codes = tensor(codes)
        answers = [pb.LayerCodes(layer=layer, codes=codes)]
        number = self.number if step is None else step
        self.send(pb.DecodeRequest(residual_codes=pb.ResidualCodes(step=number, residual_codes=answers)))

    def run(
        self, spans: Sequence[tuple[int, int, int, int]], hidden: Any = None, **fields: Any
    ) -> np.ndarray:
        """Run a step to its end, answering every exchange with M = 0; return hL of the kept positions."""
        self.step(spans, hidden, **fields)
        tokens = sum(span[2] for span in spans)
        while True:
            message = self.receive()
            if message.HasField("hidden"):
                return array(message.hidden.hidden)
            self.answer(message.codes.layer, self.zeros(tokens)[message.codes.layer])
