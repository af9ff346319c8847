"""One connection to a cloud, owned by one asyncio thread; everybody else talks to that thread.

Opens sessions, picks dropped ones up again, and fetches public parts, at whichever of the cloud's addresses
is next. Knows nothing about tokens.
"""

import atexit
import contextlib
from collections.abc import Collection, Coroutine, Iterator, Sequence
from concurrent.futures import TimeoutError as FutureTimeoutError  # not the built-in one before 3.11
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
import torch
from google.protobuf.message import DecodeError

from edge_client import claims
from edge_client.affinity import shown
from edge_client.chunking import CHUNK_TOKENS
from edge_client.config import DEFAULT_RECOVER_S
from edge_client.credentials import Credentials
from edge_client.describing import CloudConnectionError, Describing
from edge_client.loop_thread import ClosedError, LoopThread
from edge_client.personal import PersonalWeights
from edge_client.replicas import Replicas
from edge_client.routes import Route, Routes
from edge_client.session import Resumed, Session
from edge_client.streams import SessionError
from edge_client.tuning.stream import TuneStream
from shared import PROTOCOL_VERSION
from shared.pb.privatelora.v1 import private_lora_pb2 as pb
from shared.plan import Plan
from shared.wire_dtypes import WireDtypes

__all__ = ["ClosedError", "CloudConnectionError", "Connection", "Timeouts"]

SERVICE = "/privatelora.v1.PrivateLoraService/"
T = TypeVar("T")


@dataclass(frozen=True)
class Timeouts:
    """How long to wait before giving up, in seconds."""

    connect_s: float = 10.0
    step_s: float = 120.0
    recover_s: float = DEFAULT_RECOVER_S


class Connection:
    """Channels to one cloud, which may have several addresses.

    Parameters
    ----------
    cloud
        ``host:port``, or several with commas: replicas that serve the same model.
    timeouts
        Bounds on waiting.
    credentials
        How to connect; None is in clear.
    allow_redirect
        Names that a cloud which drains may send this edge to, see `edge_client.replicas`.
    """

    def __init__(
        self,
        cloud: str,
        timeouts: Timeouts | None = None,
        credentials: Credentials | None = None,
        allow_redirect: Sequence[str] = (),
    ) -> None:
        self.cloud, self.timeouts = cloud, timeouts or Timeouts()
        own = credentials or Credentials()
        self.replicas = Replicas(cloud, allow_redirect, tls=own.tls)
        self._routes = Routes(own, self.replicas)
        patience_s = self.timeouts.connect_s
        self._describing = Describing(self._routes, self.replicas, tls=own.tls, patience_s=patience_s)
        self._thread = LoopThread("privatelora-connection")
        self._loop = self._thread.loop
        self._streams: dict[Session | TuneStream, Route] = {}
        self._closed = False
        # What the connection's thread computes is too small to share out: waking a second thread costs
        # more. The second call puts back what threads made later start with.
        threads = torch.get_num_threads()
        self._wait(_use_one_thread())
        torch.set_num_threads(threads)
        # Whatever nobody closes the cloud would hold for its whole grace period.
        atexit.register(self._end_at_exit)

    @property
    def target(self) -> str:
        """The address in use."""
        return self.replicas.current

    def describe(self) -> pb.DescribeResponse:
        """Return what the cloud states about itself, at the first of its addresses that answers.

        Raises
        ------
        CloudConnectionError
            If it cannot be reached or answers with no such message.
        """
        raw = self._wait(self._describing.first())
        try:
            return pb.DescribeResponse.FromString(raw)
        except DecodeError:
            raise CloudConnectionError(f"{self.target} does not speak this protocol") from None

    def described(self, address: str) -> pb.DescribeResponse:
        """Return what an address stated; asks it if it is new, or has failed since it was asked.

        Raises
        ------
        SessionError
            If it does not answer at once.
        """
        raw = self._wait(self._describing.at_once(address))
        try:
            return pb.DescribeResponse.FromString(raw)
        except DecodeError:
            raise SessionError(f"{address} does not speak this protocol", address=address) from None

    def fetch_part(self, index: int, offset: int = 0) -> Iterator[bytes]:
        """Yield the pieces of one public part, from byte ``offset`` on."""
        request = pb.FetchEdgePartsRequest(part_index=index, offset_bytes=offset).SerializeToString()

        async def start() -> "tuple[grpc.aio.UnaryStreamCall[bytes, bytes], Route]":
            async with self._routes.use(self.target) as route:
                call = route.channel.unary_stream(SERVICE + "FetchEdgeParts", as_bytes, as_bytes)(request)
                route.streams += 1  # until `stop`
                return call, route

        def stop() -> None:
            call.cancel()
            route.streams -= 1

        call, route = self._wait(start())
        try:
            while True:
                raw = self._wait(self._describing.translated(call.read()), self.timeouts.step_s)
                if raw is grpc.aio.EOF:
                    return
                yield pb.FetchEdgePartsResponse.FromString(raw).data
        except DecodeError:
            raise CloudConnectionError(f"{self.target} sent bytes that are no part") from None
        finally:
            self._loop.call_soon_threadsafe(stop)

    def open_session(
        self,
        personal: PersonalWeights,
        fingerprint: pb.Fingerprint,
        wire_dtypes: WireDtypes,
        limits: pb.Limits,
        address: str | None = None,
        chunk_tokens: int = CHUNK_TOKENS,
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
        address
            Where; None is the one in use.
        chunk_tokens
            Most positions in one message (count).

        Raises
        ------
        SessionError
            With the cloud's status and message, if it refuses.
        """
        claim = claims.present()
        request = pb.Open(
            protocol_version=PROTOCOL_VERSION,
            fingerprint=fingerprint,
            claim=None if claim is None else claim.message(),
        )
        wire_dtypes.ask(request)

        async def start() -> Session:
            async with self._routes.use(address or self.target) as route:
                call = self._decode(route)
                waits_s, forget = self.timeouts.step_s, self._forget
                session = Session(
                    call, self._loop, personal, wire_dtypes, limits, waits_s, forget, chunk_tokens
                )
                session.address, session.route = route.address, route
                await session.open(request)
                self._adopt(session, route)
                return session

        return self._wait(start(), self.timeouts.connect_s + self.timeouts.step_s)

    def resume(self, session: Session, fingerprint: pb.Fingerprint) -> Resumed:
        """Pick a session up again whose stream was lost, where it was lost.

        Parameters
        ----------
        session
            One that `open_session` returned; used by nobody at the moment.
        fingerprint
            As for `open_session`.

        Raises
        ------
        SessionError
            If the cloud no longer has it (NOT_FOUND), cannot be reached, or refuses.
        """
        request = pb.Open(protocol_version=PROTOCOL_VERSION, fingerprint=fingerprint, session_id=session.id)
        session.wire_dtypes.ask(request)

        async def again() -> Resumed:
            await self._describing.at_once(session.address)  # who is frozen says nothing to this either
            async with self._routes.use(session.address) as route:
                await session.rebind(self._decode(route, session.replica))
                self._forget(session)
                session.route = route
                found = await session.open(request)
                self._adopt(session, route)
                await self._routes.tidy()  # the lost stream was the last on its channel, maybe
                return found

        return self._wait(again(), self.timeouts.connect_s + self.timeouts.step_s)

    def lost(self, error: ConnectionError, without: Collection[str] = ()) -> str | None:
        """Take that the cloud has failed, and go on to its next address.

        Parameters
        ----------
        error
            How; its ``address`` is where, its ``route`` on which channel. Another thread may have set that
            aside already, and what has taken its place works.
        without
            Addresses that are out of the question.

        Returns
        -------
        str or None
            A successor that the cloud named and that is not followed.
        """
        address, noted = getattr(error, "address", None) or self.target, getattr(error, "route", None)

        async def aside() -> None:
            route = noted if isinstance(noted, Route) else self._routes.known(address)
            if route is not None:
                await self._routes.set_aside(route)

        self._wait(aside())
        return self.replicas.failed(address, error, without)

    def open_tuning(
        self,
        plan: Plan,
        fingerprint: pb.Fingerprint,
        wire_dtype: "pb.Dtype.ValueType",
        address: str | None = None,
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
        address
            Where; None is the one in use.

        Raises
        ------
        SessionError
            With the cloud's status and message, if it refuses.
        """
        request = pb.TuneOpen(
            protocol_version=PROTOCOL_VERSION, fingerprint=fingerprint, wire_dtype=wire_dtype
        )

        async def start() -> TuneStream:
            async with self._routes.use(address or self.target) as route:
                call = route.channel.stream_stream(SERVICE + "Tune", as_bytes, as_bytes)(wait_for_ready=True)
                stream = TuneStream(call, self._loop, plan, wire_dtype, self.timeouts.step_s, self._forget)
                stream.address, stream.route = route.address, route
                await stream.open(request, self.timeouts.connect_s)
                self._adopt(stream, route)
                return stream

        return self._wait(start(), self.timeouts.connect_s + self.timeouts.step_s)

    def close(self) -> None:
        """End every session in order, then the channel and its thread."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self._end_at_exit)
        try:
            for stream in list(self._streams):
                stream.close()
            self._thread.wait(self._routes.close())
        finally:
            self._thread.close()

    def _end_at_exit(self) -> None:
        """Close before the interpreter takes the thread away; a cloud that is gone is no error any more."""
        if self._thread.is_alive:  # not in a fork, which has the process's memory and none of its threads
            with contextlib.suppress(Exception):
                self.close()

    def _decode(self, route: Route, replica: str | None = None) -> "grpc.aio.StreamStreamCall[bytes, bytes]":
        return route.channel.stream_stream(SERVICE + "Decode", as_bytes, as_bytes)(metadata=shown(replica))

    def _adopt(self, stream: Session | TuneStream, route: Route) -> None:
        route.streams += 1
        self._streams[stream] = route

    def _forget(self, stream: Session | TuneStream) -> None:
        if (route := self._streams.pop(stream, None)) is not None:
            route.streams -= 1

    def _wait(self, coroutine: Coroutine[Any, Any, T], timeout_s: float | None = None) -> T:
        if self._closed:
            coroutine.close()
            raise ClosedError
        try:
            return self._thread.wait(coroutine, timeout_s)
        except FutureTimeoutError:
            raise CloudConnectionError(f"{self.target} did not answer within {timeout_s:.0f} s") from None


async def _use_one_thread() -> None:
    torch.set_num_threads(1)


def as_bytes(raw: bytes) -> bytes:
    """Return raw bytes as they are: messages are parsed where a wrong one can be answered clearly."""
    return raw
