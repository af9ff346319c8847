"""What every stream of the service needs: messages from bytes, refusals as statuses, traffic counted."""

import asyncio
import logging
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from cloud_server.logs import Field, event
from cloud_server.metrics import REFUSALS
from cloud_server.refusal import Refusal, invalid
from shared.wire import FRAME_BYTES

# gRPC ends the requests of a broken stream like those of a closed one, and cancels the handler just after.
BROKEN_NOTICE_S = 0.01
Context: TypeAlias = "grpc.aio.ServicerContext[bytes, bytes]"
M = TypeVar("M", bound=Message)
log = logging.getLogger(__name__)


@dataclass
class Traffic:
    """Messages and bytes since the start, framing included."""

    messages_in: int = 0
    messages_out: int = 0
    bytes_in: int = 0
    bytes_out: int = 0

    def received(self, raw: bytes) -> None:
        """Count a message that came."""
        self.messages_in += 1
        self.bytes_in += len(raw) + FRAME_BYTES

    def sent(self, raw: bytes) -> None:
        """Count a message that went."""
        self.messages_out += 1
        self.bytes_out += len(raw) + FRAME_BYTES


def parse(kind: type[M], raw: bytes) -> M:
    """Return the message in ``raw``.

    Raises
    ------
    Refusal
        If the bytes are no such message.
    """
    try:
        return kind.FromString(raw)
    except DecodeError:
        raise invalid(f"{len(raw)} bytes that are not a {kind.DESCRIPTOR.name}") from None


async def read(kind: type[M], context: Context, traffic: Traffic) -> M | None:
    """Return the next message, None at the stream's orderly end."""
    raw = await context.read()
    if not isinstance(raw, bytes):  # grpc.aio.EOF
        return None
    traffic.received(raw)
    return parse(kind, raw)


async def first(kind: type[M], context: Context, traffic: Traffic, patience_s: float) -> M | None:
    """Return the first message; a stream that never speaks is not kept.

    Raises
    ------
    Refusal
        If nothing has come after ``patience_s`` seconds.
    """
    try:
        return await asyncio.wait_for(read(kind, context, traffic), patience_s)
    except asyncio.TimeoutError:  # not the built-in one before Python 3.11
        raise Refusal(
            grpc.StatusCode.DEADLINE_EXCEEDED,
            f"no first message within {patience_s:g} seconds",
            reason="silent",
        ) from None


async def abort(context: Context, refusal: Refusal) -> None:
    """End a stream with the refusal's status; does not return."""
    REFUSALS.labels(refusal.code.name, refusal.reason).inc()
    trailers = []
    if refusal.retry_after_s is not None:
        trailers.append(("retry-after-ms", str(int(refusal.retry_after_s * 1000))))
    if refusal.successor is not None:
        trailers.append(("privatelora-successor", refusal.successor))
    await context.abort(refusal.code, refusal.message, trailing_metadata=tuple(trailers))


def log_refusal(what: str, refusal: Refusal, **fields: Field) -> None:
    """Log that a stream of some kind (session, tuning ...) is refused or cut off; call it before `abort`."""
    status, message = refusal.code.name, refusal.message
    fields |= {"status": status, "reason": refusal.reason, "retry_after_s": refusal.retry_after_s}
    event(log, f"{what}_refused", f"{what} refused: {status}: {message}", **fields)


async def begin(context: Context) -> None:
    """Send the headers of an accepted stream.

    They would go with the first message, but if the stream is refused while that is on its way, gRPC
    sends them a second time, fails, and leaves the edge waiting.
    """
    await context.send_initial_metadata(())
