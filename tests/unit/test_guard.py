"""Who may go on: whose token is still known and whose certificate has not expired, if shown."""

import asyncio
from collections.abc import AsyncIterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_health.v1._async import HealthServicer

from benchmarks.fuzz_context import StreamContext
from cloud_server import tokens
from cloud_server.caller import ANONYMOUS, Caller
from cloud_server.guard import Guard
from cloud_server.open_method import MAX_BYTES
from cloud_server.probes import handlers
from cloud_server.tokens import TokenBook

HOUR = timedelta(hours=1)


def test_a_caller_may_go_on_while_all_that_it_has_shown_is_good(tmp_path: Path) -> None:
    file = tmp_path / "tokens.json"
    digest = tokens.digest(tokens.add(file, "alice"))
    guard, now = Guard(TokenBook(file), by_certificate=True), datetime.now(timezone.utc)
    assert guard.may_still(ANONYMOUS)
    assert guard.may_still(Caller("alice", digest))
    assert guard.may_still(Caller("alice", digest, not_after=now + HOUR))
    assert not guard.may_still(Caller("alice", digest, not_after=now - HOUR))
    assert not guard.may_still(Caller("alice", not_after=now - HOUR))
    assert not guard.may_still(Caller("alice", tokens.digest("another"), not_after=now + HOUR))
    assert not guard.may_still(Caller("bob", digest))
    tokens.revoke(file, "alice")
    assert guard.tokens is not None
    guard.tokens.refresh()
    assert not guard.may_still(Caller("alice", digest, not_after=now + HOUR))


# --- before a caller is known -----------------------------------------------------------------------------


async def _asked(guard: Guard, inner: Any, context: StreamContext, kind: str = "unary_unary") -> Any:
    """Make a call through the guard; return how it ended."""

    async def continuation(_: Any) -> Any:
        return getattr(grpc, f"{kind}_rpc_method_handler")(inner)

    details: Any = SimpleNamespace(method="/service/Method", invocation_metadata=())
    handler = await guard.intercept_service(continuation, details)
    task = asyncio.ensure_future(handler.stream_stream(None, context))
    await asyncio.wait([task])
    return context.outcome(task, was_cancelled=False)


async def test_of_an_unknown_caller_nothing_is_read(tmp_path: Path) -> None:
    """GRPC itself would read the one message of a unary call, megabytes of it, before it asks who calls."""
    token = tokens.add(tmp_path / "tokens.json", "alice")
    guard = Guard(TokenBook(tmp_path / "tokens.json"))

    async def twice(raw: bytes, context: Any) -> bytes:
        return raw * 2

    async def pieces(raw: bytes, context: Any) -> AsyncIterator[bytes]:
        yield raw
        yield raw

    for inner, kind, expected in ((twice, "unary_unary", [b"aa"]), (pieces, "unary_stream", [b"a", b"a"])):
        for shown in ((), [("authorization", "Bearer wrong")]):
            stranger = StreamContext(shown)
            stranger.send(b"a")
            assert await _asked(guard, inner, stranger, kind) == "UNAUTHENTICATED"
            assert stranger.asked == 0 and not stranger.answers
        known = StreamContext([("authorization", f"Bearer {token}")])
        known.send(b"a")
        assert await _asked(guard, inner, known, kind) == "OK" and list(known.answers) == expected
        silent = StreamContext([("authorization", f"Bearer {token}")])
        silent.end()
        assert await _asked(guard, inner, silent, kind) == "INVALID_ARGUMENT"


@pytest.mark.parametrize("at", ["the service's port", "the probes' port"])
async def test_a_health_check_is_short_and_comes_soon(
    at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one method that is open to strangers: they may hold no megabytes there, and nothing for long."""
    tokens.add(tmp_path / "tokens.json", "alice")
    guard, health = Guard(TokenBook(tmp_path / "tokens.json")), HealthServicer()
    details: Any = SimpleNamespace(method="/grpc.health.v1.Health/Check", invocation_metadata=())

    async def continuation(_: Any) -> Any:
        return grpc.unary_unary_rpc_method_handler(health.Check, health_pb2.HealthCheckRequest.FromString)

    if at == "the probes' port":
        handler = handlers(health).service(details)
    else:
        handler = await guard.intercept_service(continuation, details)

    async def check(raw: bytes | None) -> tuple[str, list[Any]]:
        context = StreamContext()
        if raw is not None:
            context.send(raw)
        task = asyncio.ensure_future(handler.stream_stream(None, context))
        await asyncio.wait([task], timeout=60)
        return context.outcome(task, was_cancelled=False), list(context.answers)

    serving = health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)
    assert await check(b"") == ("OK", [serving])
    another, long = (health_pb2.HealthCheckRequest(service=name) for name in ("another", "x" * MAX_BYTES))
    assert await check(another.SerializeToString()) == ("NOT_FOUND", [])
    for raw in (long.SerializeToString(), b"\xff"):
        assert await check(raw) == ("INVALID_ARGUMENT", [])
    monkeypatch.setattr("cloud_server.open_method.PATIENCE_S", 0.05)
    assert await check(None) == ("DEADLINE_EXCEEDED", [])
