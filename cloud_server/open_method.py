"""Methods that are open to everybody: their one request must be short, and come soon.

gRPC reads the message of a unary call before anybody sees the call, waits for it without end, and holds what
has come of it meanwhile: depending on its version up to the size that the message claims to have, whatever
``max_receive_message_length`` says. As a stream the call is ours from its headers on. gRPC still holds what
comes before the time is over.
"""

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from cloud_server.refusal import Refusal, invalid
from cloud_server.streams import Context, abort

PATIENCE_S = 5.0  # for the request to come
MAX_BYTES = 4096  # of it


def in_brief(handler: Any) -> Any:
    """Return the handler of a unary method, which a coroutine serves, as one that waits for so long only."""
    return grpc.stream_stream_rpc_method_handler(_answering(handler), None, handler.response_serializer)


def _answering(handler: Any) -> Callable[[Any, Context], Any]:
    async def answer(_: Any, context: Context) -> None:
        try:
            request = handler.request_deserializer(_short(await asyncio.wait_for(context.read(), PATIENCE_S)))
        except asyncio.TimeoutError:  # not the built-in one before Python 3.11
            why = f"no request within {PATIENCE_S:g} seconds"
            await abort(context, Refusal(grpc.StatusCode.DEADLINE_EXCEEDED, why, reason="silent"))
        except DecodeError:
            await abort(context, invalid("bytes that are no such request"))
        except Refusal as refusal:
            await abort(context, refusal)
        else:
            await context.write(await handler.unary_unary(request, context))

    return answer


def _short(raw: Any) -> bytes:
    if not isinstance(raw, bytes):  # grpc.aio.EOF
        raise invalid("a call without a request")
    if len(raw) > MAX_BYTES:
        raise invalid(f"a request of {len(raw)} bytes; {MAX_BYTES} is the most")
    return raw
