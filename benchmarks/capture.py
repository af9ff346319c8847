"""A recording relay: what the cloud's operator, or anyone on the unencrypted link, sees of a session.

Sits between the two real processes and passes every gRPC message on, byte for byte, keeping a copy.
Neither side knows: the edge is given the relay's address in place of the cloud's. It knows no model
and no weights, only the published proto.
"""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType

import grpc
import numpy as np
import numpy.typing as npt

from shared.pb.privatelora.v1 import private_lora_pb2 as pb

DECODE = "/privatelora.v1.PrivateLoraService/Decode"
_OPTIONS = (
    ("grpc.max_receive_message_length", -1),  # the two ends have their own limits; the relay adds none
    ("grpc.max_send_message_length", -1),
)
_SKIPPED_METADATA = ("user-agent", "grpc-", "te", "content-type")  # set anew by each hop

Rows = npt.NDArray[np.float32]


@dataclass
class Recording:
    """What crossed the relay, in order of arrival, as serialised messages.

    Attributes
    ----------
    up, down : list of (stream, bytes)
        Messages of ``Decode`` from the edge and from the cloud; `stream` counts the connections' streams.
    """

    up: list[tuple[int, bytes]] = field(default_factory=list)
    down: list[tuple[int, bytes]] = field(default_factory=list)

    def requests(self) -> Iterator[tuple[int, pb.DecodeRequest]]:
        """Yield (stream, message) for everything the edge said."""
        for stream, data in list(self.up):
            yield stream, pb.DecodeRequest.FromString(data)

    def responses(self) -> Iterator[tuple[int, pb.DecodeResponse]]:
        """Yield (stream, message) for everything the cloud said."""
        for stream, data in list(self.down):
            yield stream, pb.DecodeResponse.FromString(data)

    def hidden_up(self) -> Rows:
        """Return all rows of h0 in the order they were sent, (positions, hidden_size)."""
        return np.concatenate([rows(m.step.hidden) for _, m in self.requests() if m.HasField("step")])

    def hidden_down(self) -> Rows:
        """Return all rows of hL in the order they came back, (positions, hidden_size)."""
        return np.concatenate([rows(m.hidden.hidden) for _, m in self.responses() if m.HasField("hidden")])

    def codes(self) -> dict[tuple[int, int, int], Rows]:
        """Return xA by (stream, step, layer), each (tokens, groups * r_c2d)."""
        return {
            (stream, m.codes.step, m.codes.layer): rows(m.codes.codes)
            for stream, m in self.responses()
            if m.HasField("codes")
        }

    def residual_codes(self) -> dict[tuple[int, int, int], Rows]:
        """Return xAM by (stream, step, layer), each (tokens, groups * r_d2c)."""
        found: dict[tuple[int, int, int], Rows] = {}
        for stream, m in self.requests():  # answers come alone, or with the step where no codes were needed
            part = m.step if m.HasField("step") else m.residual_codes
            found |= {(stream, part.step, one.layer): rows(one.codes) for one in part.residual_codes}
        return found


def rows(tensor: pb.Tensor) -> Rows:
    """Return a tensor message as float32 rows, as anyone who has the proto file can."""
    data = tensor.data
    if tensor.dtype == pb.DTYPE_INT8:  # a scale for each row, or for each group of one
        scales = np.frombuffer(tensor.scales, "<f4")
        flat = (np.frombuffer(data, "<i1").reshape(len(scales), -1) * scales[:, None]).astype(np.float32)
    elif tensor.dtype == pb.DTYPE_INT4:  # the same, two a byte, with the upper half of a float32 for a scale
        bits = np.frombuffer(tensor.scales, "<u2").astype(np.uint32) << 16
        halves = np.frombuffer(data, "<u1").reshape(tensor.shape[0], -1)
        both = np.stack((halves & 15, halves >> 4), axis=2).reshape(len(halves), -1)[:, : tensor.shape[1]]
        signed = ((both.astype(np.int16) + 8) % 16 - 8).reshape(len(bits), -1)
        flat = (signed * bits.view(np.float32)[:, None]).astype(np.float32)
    elif tensor.dtype == pb.DTYPE_BFLOAT16:  # the upper half of a float32
        flat = (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        flat = np.frombuffer(data, "<f2" if tensor.dtype == pb.DTYPE_FLOAT16 else "<f4").astype(np.float32)
    shaped: Rows = flat.reshape(tuple(tensor.shape))
    return shaped


class Relay(grpc.GenericRpcHandler):
    """Passes every call on to `upstream` (host:port) and records ``Decode``; use as a ``with`` block.

    Attributes
    ----------
    address : str
        ``host:port`` to give to the edge in place of the cloud's.
    recording : Recording
        What has crossed so far.
    """

    def __init__(self, upstream: str) -> None:
        self.recording = Recording()
        self._streams = 0
        self._lock = threading.Lock()
        self._channel = grpc.insecure_channel(upstream, options=_OPTIONS)
        self._server = grpc.server(ThreadPoolExecutor(max_workers=32), options=_OPTIONS)
        self._server.add_generic_rpc_handlers((self,))
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> "grpc.RpcMethodHandler[bytes, bytes]":
        """Handle any method as a stream of bytes both ways, which is what every gRPC call is on the wire."""
        method = handler_call_details.method

        def passes_on(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
            return self._pass_on(method, requests, context)

        handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.stream_stream_rpc_method_handler(passes_on)
        return handler

    def _pass_on(
        self, method: str, requests: Iterator[bytes], context: grpc.ServicerContext
    ) -> Iterator[bytes]:
        with self._lock:
            self._streams += 1
            stream = self._streams
        is_recorded = method == DECODE
        metadata = tuple(
            pair for pair in context.invocation_metadata() if not pair[0].startswith(_SKIPPED_METADATA)
        )

        def recorded() -> Iterator[bytes]:
            for message in requests:
                if is_recorded:
                    self.recording.up.append((stream, message))
                yield message

        onward: grpc.StreamStreamMultiCallable[bytes, bytes] = self._channel.stream_stream(method)
        call = onward(recorded(), metadata=metadata)  # the deadline comes as the edge hanging up

        def hang_up() -> None:
            call.cancel()

        context.add_callback(hang_up)
        try:
            for message in call:
                if is_recorded:
                    self.recording.down.append((stream, message))
                yield message
            context.set_trailing_metadata(call.trailing_metadata())
        except grpc.RpcError:
            context.set_trailing_metadata(call.trailing_metadata())
            context.abort(call.code(), call.details())

    def __enter__(self) -> "Relay":
        self._server.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.stop(grace=0.5).wait()
        self._channel.close()
