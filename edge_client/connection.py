"""One connection to a cloud, owned by one asyncio thread; everybody else talks to that thread.

Opens sessions and fetches public parts. Knows nothing about tokens.
"""

import asyncio
import sys
import threading
from collections.abc import Coroutine, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError  # not the built-in one before 3.11
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
import torch
from google.protobuf.message import DecodeError

from edge_client.credentials import Credentials, tls_problem
from edge_client.personal import PersonalWeights
from edge_client.plain import one_line
from edge_client.session import Session
from edge_client.tuning.stream import TuneStream
from shared import PROTOCOL_VERSION
from shared.pb.privatelora.v1 import private_lora_pb2 as pb
from shared.plan import Plan
from shared.wire_dtypes import WireDtypes

SERVICE = "/privatelora.v1.PrivateLoraService/"
T = TypeVar("T")

CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", 4 << 20),  # a hostile cloud cannot make us buffer more
    ("grpc.keepalive_time_ms", 60_000),  # some clouds drop idle TCP after four minutes
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.bdp_probe", 0),  # its pings delay exchanges; a fixed window does instead
    ("grpc.http2.lookahead_bytes", 2 << 20),  # more than 100 Mbit/s x 80 ms has under way
    ("grpc.max_reconnect_backoff_ms", 5_000),  # a cloud that restarts is found again soon
)


@dataclass(frozen=True)
class Timeouts:
    """How long to wait before giving up, in seconds."""

    connect_s: float = 10.0
    step_s: float = 120.0


class CloudConnectionError(ConnectionError):
    """The cloud cannot be reached, or refused; the message says what to do."""


class Connection:
    """A channel to one cloud.

    Parameters
    ----------
    target
        ``host:port``.
    timeouts
        Bounds on waiting.
    credentials
        How to connect; None is in clear.
    """

    def __init__(
        self, target: str, timeouts: Timeouts | None = None, credentials: Credentials | None = None
    ) -> None:
        self.target, self.timeouts = target, timeouts or Timeouts()
        self._credentials = credentials or Credentials()
        self._loop = _new_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="privatelora-connection", daemon=True
        )
        self._thread.start()
        self._sessions: set[Session | TuneStream] = set()
        self._closed = False
        self._channel: grpc.aio.Channel = self._wait(self._open_channel())
        # What the connection's thread computes is too small to share out: waking a second thread costs
        # more. The second call puts back what threads made later start with.
        threads = torch.get_num_threads()
        self._wait(_use_one_thread())
        torch.set_num_threads(threads)

    def describe(self) -> pb.DescribeResponse:
        """Return what the cloud states about itself.

        Raises
        ------
        CloudConnectionError
            If it cannot be reached or answers with no such message.
        """
        raw = self._wait(self._describe())
        try:
            return pb.DescribeResponse.FromString(raw)
        except DecodeError:
            raise CloudConnectionError(f"{self.target} does not speak this protocol") from None

    def fetch_part(self, index: int, offset: int = 0) -> Iterator[bytes]:
        """Yield the pieces of one public part, from byte ``offset`` on."""
        request = pb.FetchEdgePartsRequest(part_index=index, offset_bytes=offset).SerializeToString()

        async def start() -> "grpc.aio.UnaryStreamCall[bytes, bytes]":
            return self._channel.unary_stream(SERVICE + "FetchEdgeParts", as_bytes, as_bytes)(request)

        call = self._wait(start())
        try:
            while True:
                raw = self._wait(self._translated(call.read()), self.timeouts.step_s)
                if raw is grpc.aio.EOF:
                    return
                yield pb.FetchEdgePartsResponse.FromString(raw).data
        except DecodeError:
            raise CloudConnectionError(f"{self.target} sent bytes that are no part") from None
        finally:
            self._loop.call_soon_threadsafe(call.cancel)

    def open_session(
        self,
        personal: PersonalWeights,
        fingerprint: pb.Fingerprint,
        wire_dtypes: WireDtypes,
        limits: pb.Limits,
    ) -> Session:
        """Open a session for one set of personal weights.

        Parameters
        ----------
        personal
            M of the adapter, of the plan that ``fingerprint`` covers.
        fingerprint
            What this edge stands on; the cloud refuses if it differs.
        wire_dtypes
            What each kind of tensor travels in.
        limits
            What the cloud stated.

        Raises
        ------
        SessionError
            With the cloud's status and message, if it refuses.
        """
        request = pb.Open(protocol_version=PROTOCOL_VERSION, fingerprint=fingerprint)
        wire_dtypes.ask(request)

        async def start() -> Session:
            call = self._channel.stream_stream(SERVICE + "Decode", as_bytes, as_bytes)()
            session = Session(
                call, self._loop, personal, wire_dtypes, limits, self.timeouts.step_s, self._sessions.discard
            )
            await session.open(request)
            self._sessions.add(session)
            return session

        return self._wait(start(), self.timeouts.connect_s + self.timeouts.step_s)

    def open_tuning(
        self, plan: Plan, fingerprint: pb.Fingerprint, wire_dtype: "pb.Dtype.ValueType"
    ) -> TuneStream:
        """Open a stream to tune personal weights on.

        Parameters
        ----------
        plan
            The split, one that ``fingerprint`` covers.
        fingerprint
            What this edge stands on; the cloud refuses if it differs.
        wire_dtype
            Element type of every tensor, both ways: not float16 (gradients underflow), int8 or int4.

        Raises
        ------
        SessionError
            With the cloud's status and message, if it refuses.
        """
        request = pb.TuneOpen(
            protocol_version=PROTOCOL_VERSION, fingerprint=fingerprint, wire_dtype=wire_dtype
        )

        async def start() -> TuneStream:
            call = self._channel.stream_stream(SERVICE + "Tune", as_bytes, as_bytes)(wait_for_ready=True)
            stream = TuneStream(
                call, self._loop, plan, wire_dtype, self.timeouts.step_s, self._sessions.discard
            )
            await stream.open(request, self.timeouts.connect_s)
            self._sessions.add(stream)
            return stream

        return self._wait(start(), self.timeouts.connect_s + self.timeouts.step_s)

    def close(self) -> None:
        """End every session in order, then the channel and its thread."""
        if self._closed:
            return
        self._closed = True
        try:
            for session in list(self._sessions):
                session.close()
            self._wait(self._channel.close())
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(timeout=5)

    async def _open_channel(self) -> grpc.aio.Channel:
        return self._credentials.channel(self.target, CHANNEL_OPTIONS)

    async def _describe(self) -> bytes:
        request = pb.DescribeRequest(protocol_version=PROTOCOL_VERSION).SerializeToString()
        call = self._channel.unary_unary(SERVICE + "Describe", as_bytes, as_bytes)
        if self._credentials.tls:
            # Certificates do not become right by waiting; only without waiting does gRPC say what is wrong.
            try:
                return bytes(await call(request, timeout=self.timeouts.connect_s))
            except grpc.aio.AioRpcError as error:
                if problem := tls_problem(error.details() or "", self.target):
                    raise CloudConnectionError(f"{self.target}: {problem}; nothing was sent") from None
        raw: bytes = await self._translated(
            call(request, timeout=self.timeouts.connect_s, wait_for_ready=True)
        )
        return raw

    async def _translated(self, awaitable: Any) -> Any:
        try:
            return await awaitable
        except grpc.aio.AioRpcError as error:
            code = error.code()
            if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                encrypted = (
                    "" if self._credentials.tls else " Or does it serve TLS? Then give --tls-ca or --tls"
                )
                raise CloudConnectionError(
                    f"no cloud answers at {self.target} (waited up to {self.timeouts.connect_s:.0f} s); is "
                    f"`privatelora-cloud serve` running there, and is the address right?{encrypted}"
                ) from None
            details = one_line(error.details() or "")
            raise CloudConnectionError(f"{self.target}: {code.name}: {details}") from None

    def _wait(self, coroutine: Coroutine[Any, Any, T], timeout_s: float | None = None) -> T:
        future: Future[T] = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result(timeout_s)
        except FutureTimeoutError:
            future.cancel()
            raise CloudConnectionError(f"{self.target} did not answer within {timeout_s:.0f} s") from None


def _new_loop() -> asyncio.AbstractEventLoop:
    if sys.platform == "win32":
        return asyncio.new_event_loop()
    import uvloop

    return uvloop.new_event_loop()


async def _use_one_thread() -> None:
    torch.set_num_threads(1)


def as_bytes(raw: bytes) -> bytes:
    """Return raw bytes as they are: messages are parsed where a wrong one can be answered clearly."""
    return raw
