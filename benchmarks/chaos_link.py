"""A link that can be cut: a TCP proxy on a thread of its own, which hands on bytes as they come.

Edges connect to one address for good, as to a load balancer; behind it the cloud may move to another
port. Knows nothing about what passes. Delay and rate are those of this machine's loopback
(`benchmarks.link_proxy` emulates others, and cannot be cut). Imports only the standard library.
"""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar, cast

HOST = "127.0.0.1"
LEAST_BYTES = 200  # of what counts as a piece of a step: more than pings, headers and settings have
T = TypeVar("T")


class Side(asyncio.Protocol):
    """One side of a connection through the gate; what comes here goes out at its ``peer``.

    ``aimed_at``: whether it is an edge's of whose steps bytes may be waited for.
    """

    def __init__(self, gate: "Gate", aimed_at: bool) -> None:
        self._gate, self._aimed_at = gate, aimed_at
        self.transport: asyncio.Transport | None = None
        self.peer: Side | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport; nothing is read before the other side is there."""
        self.transport = cast(asyncio.Transport, transport)
        self.transport.pause_reading()
        self._gate.connected(self)

    def data_received(self, data: bytes) -> None:
        """Hand it on; if something is to happen in the middle of it, half before and half after."""
        gate = self._gate
        if self._aimed_at and len(data) >= LEAST_BYTES and gate.aim is not None:
            aim, gate.aim = gate.aim, None
            self._write(data[: len(data) // 2])
            aim.strike()
            rest = data[len(data) // 2 :]
            if aim.cuts:
                gate.lose(self, rest)
            else:
                self._write(rest)
            return
        self._write(data)

    def _write(self, data: bytes) -> None:
        if self.peer is not None and self.peer.transport is not None:
            self.peer.transport.write(data)

    def pause_writing(self) -> None:
        """Let the other side wait: whoever is connected here does not read."""
        if self.peer is not None and self.peer.transport is not None:
            self.peer.transport.pause_reading()

    def resume_writing(self) -> None:
        """Let the other side go on."""
        if self.peer is not None:
            self._gate.let_read(self.peer)

    def eof_received(self) -> bool:
        """Pass the end of the stream on; the other direction stays open."""
        if self.peer is not None and self.peer.transport is not None:
            with contextlib.suppress(OSError):
                self.peer.transport.write_eof()
        return True

    def connection_lost(self, error: Exception | None) -> None:
        """End the other side as this one ended."""
        self._gate.sides.discard(self)
        if self.peer is not None and self.peer.transport is not None:
            if error is None:
                self.peer.transport.close()
            else:
                self.peer.transport.abort()


class Aim:
    """Something to do while bytes of a step pass upward, from an edge that is aimed at.

    Parameters
    ----------
    strike
        What to do, on the gate's thread, when half of those bytes are through: their step cannot be over.
    cuts
        Whether it cuts the link, so that the other half does not get through.
    """

    def __init__(self, strike: Callable[[], object], cuts: bool) -> None:
        self.strike, self.cuts = strike, cuts


class Gate:
    """The link, open at first. `close` ends it.

    Parameters
    ----------
    port
        Where the cloud listens.

    Attributes
    ----------
    address, other_address
        ``host:port`` for the edges, the second one for those at whose steps nobody aims.
    """

    def __init__(self, port: int) -> None:
        self._port, self._how = port, ""
        self.aim: Aim | None = None
        self.sides: set[Side] = set()
        self._lost: list[tuple[Side, bytes]] = []
        self._opening: set[asyncio.Task[None]] = set()
        self._waiting: list[Side] = []  # connected while nothing passes
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="chaos-link", daemon=True)
        self._thread.start()
        self._servers = [self._do(self._listen(aimed_at)) for aimed_at in (True, False)]
        ports = (server.sockets[0].getsockname()[1] for server in self._servers)
        self.address, self.other_address = (f"{HOST}:{port}" for port in ports)

    def route(self, port: int) -> None:
        """Let new connections go to another port; those there are stay."""
        self._port = port

    def at_a_step(self, act: Callable[[], object], aim_s: float, cuts: bool = False) -> tuple[float, float]:
        """Do something in the middle of a step; return when (monotonic seconds), before and after.

        Parameters
        ----------
        act
            What to do, on the gate's thread; it must not fail and not wait.
        aim_s
            How long to wait for bytes of a step, to act when half of them are through (seconds); 0, or none
            in time: at once.
        cuts
            Whether it cuts the link.
        """
        done = threading.Event()
        when: list[float] = []

        def strike() -> None:
            if not done.is_set():
                when.append(time.monotonic())
                act()
                when.append(time.monotonic())
                done.set()

        if aim_s:
            self.aim = Aim(strike, cuts)
            done.wait(aim_s)
            self.aim = None
        if not done.is_set():
            self._loop.call_soon_threadsafe(strike)
            done.wait()
        return when[0], when[1]

    def cut(self, how: str, aim_s: float = 0.0) -> tuple[float, float]:
        """Cut the link, one of `benchmarks.chaos_events.CUTS`; the rest is as in `at_a_step`."""
        return self.at_a_step(lambda: self._cut(how), aim_s, cuts=True)

    def restore(self) -> None:
        """Let everything pass again."""

        async def restore() -> None:
            how, self._how = self._how, ""
            if how == "forgotten":
                self._abort()
            lost, self._lost = self._lost, []
            for side, data in lost:
                if how == "silence":
                    side._write(data)
            for side in list(self.sides):
                if side.peer is not None:
                    self.let_read(side)
            waiting, self._waiting = self._waiting, []
            for side in waiting:
                self._open(side)

        self._do(restore())

    def close(self) -> None:
        """End every connection and the thread."""

        async def end() -> None:
            for server in self._servers:
                server.close()
            for task in self._opening:
                task.cancel()
            self._abort()
            await asyncio.gather(*self._opening, return_exceptions=True)
            await asyncio.sleep(0)  # the transports close their sockets

        self._do(end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # --- on the gate's thread from here on ----------------------------------------------------------------

    async def _listen(self, aimed_at: bool) -> asyncio.Server:
        return await self._loop.create_server(lambda: Side(self, aimed_at), HOST, 0)

    def connected(self, side: Side) -> None:
        """Open the other side of what an edge has connected to, unless the link is cut."""
        self.sides.add(side)
        if side.peer is not None:
            return
        if self._how == "reset":
            assert side.transport is not None
            side.transport.abort()
        elif self._how:
            self._waiting.append(side)
        else:
            self._open(side)

    def let_read(self, side: Side) -> None:
        """Go on reading, if the link is not cut."""
        if not self._how and side.transport is not None and not side.transport.is_closing():
            side.transport.resume_reading()

    def lose(self, side: Side, rest: bytes) -> None:
        """Keep what did not get through; if the link only was silent, it arrives in the end."""
        self._lost.append((side, rest))

    def _cut(self, how: str) -> None:
        self._how = how
        if how == "reset":
            self._abort()
        for side in self.sides:
            if side.transport is not None and not side.transport.is_closing():
                side.transport.pause_reading()

    def _abort(self) -> None:
        for side in list(self.sides):
            if side.transport is not None:
                side.transport.abort()

    def _open(self, edge: Side) -> None:
        task = self._loop.create_task(self._connect(edge, self._port))
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    async def _connect(self, edge: Side, port: int) -> None:
        cloud = Side(self, aimed_at=False)
        cloud.peer = edge
        assert edge.transport is not None
        try:
            await self._loop.create_connection(lambda: cloud, HOST, port)
        except OSError:
            edge.transport.abort()  # nobody listens there
            return
        edge.peer = cloud
        if edge.transport.is_closing():
            assert cloud.transport is not None
            cloud.transport.abort()
        self.let_read(edge)
        self.let_read(cloud)

    def _do(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(30)
