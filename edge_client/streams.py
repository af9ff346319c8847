"""What every stream to the cloud needs: its traffic counted, its end said in words, an orderly close.

Knows nothing about what the messages mean.
"""

import asyncio
from dataclasses import dataclass

import grpc

from edge_client.plain import one_line
from shared.wire import FRAME_BYTES

MAX_RETRY_AFTER_S = 3600.0  # longer hints are cut: a cloud must not be able to stop an edge for good
MAX_ADDRESS_CHARS = 260  # longest name and port
CLOSE_TIMEOUT_S = 1.0  # for the cloud to confirm the end of a stream
UNSENT = "Internal error from Core"  # what gRPC's client makes of a stream that ended while it was sending


class SessionError(ConnectionError):
    """The session ended: the cloud refused something, or the connection broke.

    ``code`` is the gRPC status, None if the fault is not the cloud's to name. ``retry_after_s`` is the
    cloud's hint, None if it gave none. ``successor`` is where a cloud that drains says to go instead: a
    claim, see `edge_client.replicas`. ``address`` is where it happened, ``route`` on which channel there, see
    `edge_client.routes`; None if nobody has noted it.
    """

    def __init__(
        self,
        message: str,
        code: grpc.StatusCode | None = None,
        retry_after_s: float | None = None,
        successor: str | None = None,
        address: str | None = None,
    ) -> None:
        super().__init__(message)
        self.code, self.retry_after_s, self.successor = code, retry_after_s, successor
        self.address = address
        self.route: object | None = None

    def note(self, stream: object) -> None:
        """Take that it happened on a stream, unless it is known where."""
        if self.address is None:
            self.address, self.route = getattr(stream, "address", None), getattr(stream, "route", None)


def forget_frames(error: BaseException) -> None:
    """Let go of what an error that nobody will raise again keeps alive: the frames it came through.

    They hold the step's tensors, the session and its channel, and those hold the error. Of such a ring
    Python's collector lets go in its own time, which in a process of this size is minutes.
    """
    left, seen = [error], set[int]()
    while left:
        one = left.pop()
        seen.add(id(one))
        one.__traceback__ = None
        behind = (one.__cause__, one.__context__)
        left += [error for error in behind if error is not None and id(error) not in seen]


@dataclass
class Traffic:
    """What crossed the wire: protobuf messages plus gRPC's framing."""

    round_trips: int = 0
    messages_up: int = 0
    messages_down: int = 0
    bytes_up: int = 0
    bytes_down: int = 0

    def sent(self, raw: bytes) -> None:
        """Count a message that goes up."""
        self.messages_up += 1
        self.bytes_up += len(raw) + FRAME_BYTES

    def received(self, raw: bytes) -> None:
        """Count a message that came down."""
        self.messages_down += 1
        self.bytes_down += len(raw) + FRAME_BYTES

    def __sub__(self, other: "Traffic") -> "Traffic":
        """Return what was added since ``other``."""
        return Traffic(
            self.round_trips - other.round_trips,
            self.messages_up - other.messages_up,
            self.messages_down - other.messages_down,
            self.bytes_up - other.bytes_up,
            self.bytes_down - other.bytes_down,
        )

    def copy(self) -> "Traffic":
        """Return the figures as they are now."""
        return self - Traffic()


async def failure(call: "grpc.aio.StreamStreamCall[bytes, bytes]") -> SessionError:
    """Return why a stream ended, in words."""
    code = await call.code()
    details = one_line(await call.details() or "")
    trailers = dict(await call.trailing_metadata() or ())
    if code == grpc.StatusCode.OK:
        return SessionError("the cloud ended the session", code)
    retry, named = trailers.get("retry-after-ms"), trailers.get("privatelora-successor")
    hint = None
    if isinstance(retry, str) and retry.isascii() and retry.isdigit():
        hint = min(int(retry[:15]) / 1000, MAX_RETRY_AFTER_S)
    successor = one_line(named[:MAX_ADDRESS_CHARS]) if isinstance(named, str) and named else None
    if code == grpc.StatusCode.INTERNAL and details == UNSENT:  # the status that the cloud gave is lost
        return SessionError("the stream to the cloud ended while a message was being sent", code)
    if code == grpc.StatusCode.UNAVAILABLE:
        what = "the connection to the cloud was lost" if hint is None else "the cloud cannot serve now"
        return SessionError(f"{what} ({details})", code, hint, successor)
    return SessionError(f"the cloud refused ({code.name}): {details}", code, hint, successor)


async def end(call: "grpc.aio.StreamStreamCall[bytes, bytes]") -> None:
    """End a stream in order if it is still there, so that the cloud frees what it holds at once."""
    if call.done():
        return
    try:
        await call.done_writing()
        await asyncio.wait_for(call.code(), CLOSE_TIMEOUT_S)
    except Exception:  # gRPC has private errors too for a stream that broke this very moment
        call.cancel()
