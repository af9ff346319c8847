"""gRPC's channel as the edge sees it, without a network: streams whose answers a liar makes.

A `Liar` is `benchmarks.fuzz_hostile`'s matter; here it is who is asked for answers to a message.
"""

import asyncio
import random
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol, cast

import grpc

from benchmarks.fuzz_bytes import damaged
from edge_client.affinity import HEADER
from edge_client.credentials import Credentials

CODES = [code for code in grpc.StatusCode if code is not grpc.StatusCode.UNAVAILABLE]


class Answers(Protocol):
    """Who makes the answers of one case."""

    rng: random.Random
    silence_s: float  # after which a stream on which nothing is said ends

    def answers(self, raw: bytes) -> list[bytes]:
        """Return what is said to a message."""


class Call:
    """A stream as the edge sees it."""

    def __init__(self, liar: Answers) -> None:
        self.liar, self._answers, self._changed = liar, deque[bytes](), asyncio.Event()
        self._code: grpc.StatusCode | None = None

    async def initial_metadata(self) -> tuple[tuple[str, str], ...]:
        """Return the first headers, with one that the edge shows to a cloud again."""
        return ((HEADER, damaged(self.liar.rng, b"a replica").decode("latin-1")),)

    async def write(self, raw: bytes) -> None:
        """Take a message."""
        if self._code is not None:
            raise asyncio.InvalidStateError
        self._answers.extend(self.liar.answers(raw))
        self._changed.set()

    async def read(self) -> Any:
        """Return an answer; after a while without any, the stream's end."""
        while not self._answers and self._code is None:
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), self.liar.silence_s)
            except asyncio.TimeoutError:  # not the built-in one before Python 3.11
                self._code = self._code or self.liar.rng.choice(CODES)
        return self._answers.popleft() if self._answers and self._code is None else grpc.aio.EOF

    async def done_writing(self) -> None:
        """End the requests."""
        self._code = self._code or grpc.StatusCode.OK
        self._changed.set()

    def cancel(self) -> bool:
        """Break the stream off."""
        self._code = self._code or grpc.StatusCode.CANCELLED
        self._changed.set()
        return True

    def done(self) -> bool:
        """Whether the stream has ended."""
        return self._code is not None

    async def code(self) -> grpc.StatusCode:
        """Return how it ended."""
        return self._code or grpc.StatusCode.OK

    async def details(self) -> str:
        """Return why."""
        return damaged(self.liar.rng, b"the cloud says why").decode("latin-1")

    async def trailing_metadata(self) -> tuple[tuple[str, str], ...]:
        """Return a hint, good or bad."""
        return (("retry-after-ms", damaged(self.liar.rng, b"1000").decode("latin-1")),)


class LyingCredentials(Credentials):
    """Gives channels to a cloud that lies as ``liar`` says at the moment."""

    liar: Answers

    def channel(self, target: str, options: Any) -> grpc.aio.Channel:
        """Return a channel without a network."""
        return cast(grpc.aio.Channel, _Channel(self))


class _Channel:
    def __init__(self, credentials: LyingCredentials) -> None:
        self._credentials = credentials

    def stream_stream(self, path: str, *_: Any, **__: Any) -> Callable[..., Call]:
        return lambda *_, **__: Call(self._credentials.liar)

    def unary_unary(self, path: str, *_: Any, **__: Any) -> Callable[..., Any]:
        async def ask(raw: bytes, **_: Any) -> bytes:
            return b""  # what `Connection.describe` makes of it is `benchmarks.fuzz_offers`'s matter

        return ask

    def unary_stream(self, path: str, *_: Any, **__: Any) -> Callable[..., Call]:
        def begin(raw: bytes, **_: Any) -> Call:
            call = Call(self._credentials.liar)
            call._answers.extend(call.liar.answers(raw))
            return call

        return begin

    async def close(self, grace: float | None = None) -> None:
        pass
