"""Who may call: one interceptor that every RPC passes, and the end of streams whose caller may no longer.

Nothing is open but the health check's ``Check``: load balancers and container probes have no token, and it
tells no more than whether the server is ready. Its request must be short, and come soon. Reflection,
``Describe`` and the health check's ``Watch`` (a stream that could be held open for ever) ask for the same
credentials as everything else.

With a token file, a caller is who its token is for. Without one, but with certificates of clients asked
for, it is who its certificate names; gRPC has then checked that certificate in the handshake. With
neither, everybody is the same anonymous caller.
"""

import asyncio
import contextlib
import inspect
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import grpc
from cryptography import x509

from cloud_server.caller import ANONYMOUS, Caller, set_caller
from cloud_server.logs import event
from cloud_server.metrics import REFUSALS
from cloud_server.open_method import in_brief
from cloud_server.refusal import Refusal, invalid
from cloud_server.streams import Context, abort
from cloud_server.tokens import TokenBook

log = logging.getLogger(__name__)

OPEN_METHODS = frozenset({"/grpc.health.v1.Health/Check"})
WATCH_S = 1.0  # how soon a revoked token's streams end
FAREWELL_S = 5.0  # for an edge to read why its stream ended
MAX_HEADER = 1024  # characters of an authorization header that are looked at; a token has fewer than 60


@dataclass(eq=False)
class _Call:
    """An RPC under way."""

    caller: Caller
    task: "asyncio.Task[Any]"
    ended: str | None = None  # why it was ended from here
    ended_at: float = 0.0  # when last (seconds, monotonic)


class Guard(grpc.aio.ServerInterceptor):
    """Lets callers in, and ends their streams when they may no longer.

    Parameters
    ----------
    tokens
        The tokens known; None asks for none.
    by_certificate
        Whether clients have shown a certificate in the handshake.
    """

    def __init__(self, tokens: TokenBook | None = None, *, by_certificate: bool = False) -> None:
        self.tokens, self.by_certificate = tokens, by_certificate
        self._calls: set[_Call] = set()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Return the RPC's handler, which begins by asking who calls.

        Whatever the method takes, gRPC is told that it takes a stream: else it would read the one message, up
        to megabytes of it, of a caller who has yet to say who it is.
        """
        handler, method = await continuation(handler_call_details), handler_call_details.method
        if handler is None:  # gRPC answers that there is no such method
            return None
        if method in OPEN_METHODS:
            return in_brief(handler)
        inner = getattr(handler, f"{_arity(handler.request_streaming)}_{_arity(handler.response_streaming)}")
        guarded = self._guarded(inner, method, reads_itself=handler.request_streaming)
        return grpc.stream_stream_rpc_method_handler(
            guarded, handler.request_deserializer, handler.response_serializer
        )

    def may_still(self, caller: Caller) -> bool:
        """Whether a caller that was let in would be let in now."""
        if _has_expired(caller):
            return False
        if caller.token_digest is None:
            return True
        return self.tokens is not None and self.tokens.holds(caller.name, caller.token_digest)

    async def watch(self) -> None:
        """End streams whose caller may no longer; run until cancelled."""
        while True:
            await asyncio.sleep(WATCH_S)
            if self.tokens is not None:
                self.tokens.refresh()
            now = time.monotonic()
            for call in [c for c in self._calls if c.ended is None and not self.may_still(c.caller)]:
                what = "certificate expired" if _has_expired(call.caller) else "token was revoked"
                name = call.caller.name
                event(log, "stream_ended", f"ending a stream of {name}: its {what}", identity=name)
                call.ended, call.ended_at = f"your {what}", now
                call.task.cancel()
            # Before Python 3.12 `asyncio.wait_for` may lose a cancellation: who is still here is told again.
            for call in [c for c in self._calls if c.ended and now - c.ended_at > 2 * FAREWELL_S]:
                call.ended_at = now
                call.task.cancel()

    def _guarded(
        self, inner: Callable[[Any, Any], Any], method: str, *, reads_itself: bool
    ) -> Callable[[Any, Context], Any]:
        """Return ``inner``, run only for those who may; what it returns or yields is written."""
        yields = inspect.isasyncgenfunction(inner)
        if not (yields or inspect.iscoroutinefunction(inner)):
            raise TypeError(f"{method} is served by a thread of its own, which nothing could end")

        async def answer(requests: Any, context: Context) -> None:
            async with self._admitted(context, method):
                request = requests if reads_itself else await context.read()
                if request is grpc.aio.EOF:
                    await abort(context, invalid("a call without a request"))
                if yields:
                    async for part in inner(request, context):
                        await context.write(part)
                elif (whole := await inner(request, context)) is not None:
                    await context.write(whole)

        return answer

    @contextlib.asynccontextmanager
    async def _admitted(self, context: Context, method: str) -> AsyncIterator[None]:
        """Ask who calls, refuse those who may not, and say why if the call is ended from here."""
        try:
            who = self._identify(context)
        except Refusal as refusal:
            peer, why = context.peer(), refusal.message
            event(log, "call_refused", f"refused {method} from {peer}: {why}", method=method, peer=peer)
            await abort(context, refusal)
            raise  # which abort does
        task = asyncio.current_task()
        assert task is not None
        set_caller(who)
        call = _Call(who, task)
        self._calls.add(call)
        try:
            yield
        except (grpc.aio.AbortError, Refusal):  # said and counted already
            raise
        except Exception:  # a fault of ours, which gRPC answers with UNKNOWN and logs
            if not context.cancelled():  # gRPC has private errors for a stream that its edge has left
                REFUSALS.labels("UNKNOWN", "fault").inc()
            raise
        except asyncio.CancelledError:
            if call.ended is None:
                raise
            with contextlib.suppress(asyncio.TimeoutError):  # not the built-in one before Python 3.11
                await asyncio.wait_for(abort(context, _unauthenticated(call.ended)), FAREWELL_S)
            raise
        finally:
            self._calls.discard(call)

    def _identify(self, context: Context) -> Caller:
        """Return who calls.

        Raises
        ------
        Refusal
            If it shows nothing that is asked for, or what it shows is not (any more) good. No token is
            ever part of the message.
        """
        if self.tokens is not None:
            found = self.tokens.identity(_bearer(context))
            if found is None:
                raise _unauthenticated("the token is wrong or was revoked; ask this cloud's operator for one")
            return Caller(*found, not_after=_expiry(context) if self.by_certificate else None)
        if self.by_certificate:
            return _of_certificate(context)
        return ANONYMOUS


def _arity(streaming: bool) -> str:
    return "stream" if streaming else "unary"


def _bearer(context: Context) -> str:
    shown = [value for key, value in context.invocation_metadata() or () if key == "authorization"]
    if not shown:
        raise _unauthenticated("this cloud asks for a token; `privatelora-edge --token-file FILE` shows one")
    scheme, _, token = str(shown[0]).partition(" ")
    if len(shown) > 1 or scheme.lower() != "bearer" or len(token) > MAX_HEADER:
        raise _unauthenticated("the authorization must be one bearer token")
    return token


def _of_certificate(context: Context) -> Caller:
    """Return whom the client's certificate names: all its alternative names, else its common name."""
    names = sorted(name.decode("utf-8", "replace") for name in context.peer_identities() or ())
    if not names or not all(name and name.isprintable() for name in names):
        raise _unauthenticated("the client certificate names nobody; give it a common or alternative name")
    return Caller(",".join(names), not_after=_expiry(context))


def _expiry(context: Context) -> datetime:
    """Return when the client's certificate expires."""
    shown = context.auth_context().get("x509_pem_cert", ())
    try:
        return x509.load_pem_x509_certificate(bytes(next(iter(shown)))).not_valid_after_utc
    except (ValueError, StopIteration, x509.InvalidVersion):
        raise _unauthenticated("the client certificate cannot be read") from None


def _has_expired(caller: Caller) -> bool:
    return caller.not_after is not None and datetime.now(timezone.utc) > caller.not_after


def _unauthenticated(why: str) -> Refusal:
    return Refusal(grpc.StatusCode.UNAUTHENTICATED, why, reason="identity")
