"""A gRPC stream inside this process: what the cloud's handlers ask of theirs, and no network.

Statuses, aborts and cancellations behave as in `grpc.aio`. What gRPC could not send (details or trailers that
are no text) is a failure here; so is an end without a status.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import grpc

from benchmarks.fuzz_cases import Failure, words

MOST_DETAILS = 4096  # characters; gRPC cuts off headers of 8 KiB and more
DEADLINE_S = 20.0  # for one case; only what hangs gets there, on a busy machine too
PIECES = 40  # in which the deadline is waited for
PATIENCE_S = 0.04  # for an answer that may never come, because what was asked is not what the edge believes
TURNS = 6  # of the event loop, before a clock is looked at: most messages are taken at once
FORBIDDEN = (grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL)


class StreamContext:
    """One RPC as its handler sees it.

    Parameters
    ----------
    metadata
        What the caller shows.
    reads
        Whether the caller ever reads an answer.
    """

    def __init__(self, metadata: Iterable[tuple[str, str]] = (), *, reads: bool = True) -> None:
        self._metadata, self._reads = tuple(metadata), reads
        self._inbox: deque[bytes] = deque()
        self._closed = False
        self._changed = asyncio.Event()
        self.answers: deque[bytes] = deque()
        self.taken: list[bytes] = []
        self.code: grpc.StatusCode | None = None
        self.details = ""
        self.on_change: Callable[[], object] = lambda: None
        self.asked = 0  # how often the handler wanted a message

    # --- the caller's side --------------------------------------------------------------------------------

    def send(self, raw: bytes) -> None:
        """Give the handler a message."""
        self._inbox.append(raw)
        self._changed.set()

    def end(self) -> None:
        """Say that no message will follow."""
        self._closed = True
        self._changed.set()

    @property
    def untaken(self) -> int:
        """Messages that the handler has not asked for yet."""
        return len(self._inbox)

    # --- the handler's side -------------------------------------------------------------------------------

    async def read(self) -> Any:
        """Return the next message, EOF at the end."""
        self.asked += 1
        self.on_change()
        while not self._inbox:
            if self._closed:
                return grpc.aio.EOF
            self._changed.clear()
            await self._changed.wait()
        self.taken.append(self._inbox.popleft())
        return self.taken[-1]

    async def write(self, raw: bytes) -> None:
        """Send an answer."""
        if not self._reads:
            await asyncio.Event().wait()
        self.answers.append(raw)
        self.on_change()

    async def abort(
        self, code: grpc.StatusCode, details: str = "", trailing_metadata: tuple[Any, ...] = ()
    ) -> None:
        """End the RPC with a status."""
        if self.code is not None:
            raise grpc.aio.UsageError("Abort already called!")
        self.code, self.details = code, details
        details.encode()
        for key, value in trailing_metadata:
            if not (key.isascii() and str(value).isascii() and str(value).isprintable()):
                raise ValueError(f"no metadata: {key!r}: {value!r}")
        raise grpc.aio.AbortError("Locally aborted.")

    async def send_initial_metadata(self, metadata: Any) -> None:
        """Send headers."""

    def set_trailing_metadata(self, metadata: Any) -> None:
        """Set what goes with the status."""

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        """Return what the caller shows."""
        return self._metadata

    def peer(self) -> str:
        """Return where the caller is."""
        return "ipv4:127.0.0.1:1"

    def peer_identities(self) -> None:
        """Return whom a certificate names."""

    def auth_context(self) -> dict[str, Any]:
        """Return what TLS has found out."""
        return {}

    # --- the end ------------------------------------------------------------------------------------------

    def outcome(self, task: "asyncio.Task[Any]", *, was_cancelled: bool) -> str:
        """Return how the RPC ended.

        Raises
        ------
        Failure
            If it ended as none may.
        """
        if self.code is not None:
            if self.code in FORBIDDEN:
                raise Failure(f"answered with {self.code.name}: {self.details}")
            if len(self.details) > MOST_DETAILS:
                raise Failure(f"answered with {len(self.details)} characters of details")
            error = None if task.cancelled() else task.exception()
            if error is not None and not isinstance(error, grpc.aio.AbortError | grpc.aio.UsageError):
                raise Failure(f"failed after its status {self.code.name}: {words(error)}")
            return self.code.name
        if task.cancelled():
            if not was_cancelled:
                raise Failure("ended without a status: its caller would wait for ever")
            return "cancelled"
        if (error := task.exception()) is not None:
            raise Failure(f"would be answered with UNKNOWN: {words(error)}")
        return "OK"


class Edge(Protocol):
    """Whoever talks to a handler: see `benchmarks.fuzz_edges`."""

    def waits(self) -> bool:
        """Whether an answer is due first."""

    def hears(self, raw: bytes) -> None:
        """Take an answer."""


async def quiet(
    context: StreamContext, task: "asyncio.Task[str]", changed: asyncio.Event, edge: Edge, patience_s: float
) -> bool:
    """Wait until the edge has something to say; return False if it probably never will have."""
    until, turns = time.monotonic() + patience_s, 0
    while True:
        while context.answers:
            edge.hears(context.answers.popleft())
        if task.done() or not edge.waits():
            return True
        if (turns := turns + 1) < TURNS:
            await asyncio.sleep(0)
            continue
        if (left := until - time.monotonic()) <= 0:
            return False
        changed.clear()
        await _within(changed, left)


async def taken(context: StreamContext, task: "asyncio.Task[str]", changed: asyncio.Event) -> None:
    """Wait until the handler has taken a message and asks for the next, or has ended; not for long."""
    until, asked, turns = time.monotonic() + PATIENCE_S, context.asked, 0
    while not task.done() and (context.untaken or context.asked == asked):
        if (turns := turns + 1) < TURNS:
            await asyncio.sleep(0)
            continue
        if (left := until - time.monotonic()) <= 0:
            return
        changed.clear()
        await _within(changed, left)


async def _within(event: asyncio.Event, seconds: float) -> None:
    with contextlib.suppress(asyncio.TimeoutError):  # not the built-in one before Python 3.11
        await asyncio.wait_for(event.wait(), seconds)


async def ended(task: "asyncio.Future[Any]") -> None:
    """Wait for a handler.

    Raises
    ------
    Failure
        If it takes too long.
    """
    for _ in range(PIECES):  # a machine that gives this process no time for long is no hang
        done, _ = await asyncio.wait([task], timeout=DEADLINE_S / PIECES)
        if done:
            break
    else:
        where = stack(task)
        task.cancel()
        raise Failure(f"hangs: still there after {DEADLINE_S:.0f} s: {where}")


def stack(task: "asyncio.Future[Any]") -> str:
    """Return where a task waits, from its handler inwards."""
    lines: list[str] = []
    inner: Any = getattr(task, "get_coro", lambda: None)()
    while (frame := getattr(inner, "cr_frame", None)) is not None:
        lines.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}")
        inner = inner.cr_await
    return " > ".join(lines)
