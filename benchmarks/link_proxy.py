"""The link where no namespace can be made: a TCP proxy with the same queues, inside this process.

The edge connects to the proxy's port instead of the cloud's. Bytes are cut into pieces of a packet's
size, each as large on the link as its packet would be, headers included; all connections share one
queue per direction. What is not as on a network: a proxy must not lose bytes, so a sender waits where
a packet would be dropped, and TCP's own caution (its slow start, what it does after a loss) is not
seen, nor do acknowledgements take bandwidth. A connection's first round trip is there: data flows only
once its opening has travelled both ways.
"""

import asyncio
import selectors
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any, cast

from benchmarks.link_queue import HEADERS, MTU, DueTimeQueue, Lateness, LinkShape

Action = Callable[[], None]
SEGMENT = MTU - HEADERS  # payload bytes of a full packet
LOCALHOST = "127.0.0.1"


class Way:
    """One direction: a queue of actions, each done when its packet is due."""

    def __init__(self, loop: asyncio.AbstractEventLoop, shape: LinkShape) -> None:
        self._loop = loop
        self.queue: DueTimeQueue[Action] = DueTimeQueue(shape)
        self.lateness = Lateness()
        self._held: deque[tuple[Action, int]] = deque()  # (action, bytes): found the buffer full
        self._expecting = False

    def send(self, action: Action, payload: int = 0) -> None:
        """Do ``action`` once a packet with so many bytes of payload has reached the other end."""
        self._held.append((action, payload + HEADERS))
        if len(self._held) == 1:
            self._fill()

    def send_then(self, data: bytes, write: Callable[[bytes], None], sent: Action) -> None:
        """Send ``data`` in packets, each for ``write`` when due; call ``sent`` once the buffer has all."""
        for start in range(0, len(data), SEGMENT):
            piece = data[start : start + SEGMENT]
            self.send(partial(write, piece), len(piece))
        if self._held:
            self._held.append((sent, 0))  # no packet: done as soon as what is before it has room
        else:
            sent()

    def _fill(self) -> None:
        """Put what is held into the buffer; come back when there is room for more."""
        while self._held:
            action, size = self._held[0]
            now = self._loop.time()
            if size and (room_at := self.queue.room_at(size)) > now:
                # A little later than the very moment: the sums of floats need not be exact.
                self._loop.call_at(room_at + 1e-6, self._fill)
                return
            self._held.popleft()
            if not size:
                action()
            else:
                self.queue.push(action, size, now)
                self._expect()

    def _expect(self) -> None:
        """See to it that the next packet is delivered; one timer at a time, as packets are due in order."""
        if not self._expecting and (next_due := self.queue.next_due()) is not None:
            self._expecting = True
            self._loop.call_at(next_due, self._deliver)

    def _deliver(self) -> None:
        while (due := self.queue.pop(now := self._loop.time())) is not None:
            self.lateness.note(now - due[0])
            due[1]()
        self._expecting = False
        self._expect()

    def figures(self) -> dict[str, Any]:
        """Return counts, and how late packets left."""
        queue = self.queue
        return {
            "packets": queue.packets,
            "bytes": queue.bytes,
            "dropped": queue.dropped,
            "late_ms": self.lateness.figures(),
        }


class End(asyncio.Protocol):
    """One end of a proxied connection; what it receives goes its way to the other end, its ``peer``."""

    def __init__(self, way: Way, ends: set["End"]) -> None:
        self._way, self._ends = way, ends
        self.transport: asyncio.Transport | None = None
        self.peer: End | None = None
        self._reasons_to_wait: set[str] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport; an end without a peer does not read yet."""
        self.transport = cast(asyncio.Transport, transport)
        self._ends.add(self)
        if self.peer is None:
            self.wait("no peer")

    def wait(self, reason: str) -> None:
        """Stop reading."""
        self._reasons_to_wait.add(reason)
        if self.transport is not None:
            self.transport.pause_reading()

    def go_on(self, reason: str) -> None:
        """Read again, unless there is another reason not to."""
        self._reasons_to_wait.discard(reason)
        if not self._reasons_to_wait and self.transport is not None and not self.transport.is_closing():
            self.transport.resume_reading()

    def data_received(self, data: bytes) -> None:
        """Send it on its way, and read no more until all of it found room."""
        assert self.peer is not None
        self.wait("full buffer")
        self._way.send_then(data, self.peer.write, lambda: self.go_on("full buffer"))

    def write(self, data: bytes) -> None:
        """Hand on what has arrived from the other end."""
        if self.transport is not None and not self.transport.is_closing():
            self.transport.write(data)

    def pause_writing(self) -> None:
        """Let the other end wait: whoever is connected here does not read."""
        if self.peer is not None:
            self.peer.wait("slow reader")

    def resume_writing(self) -> None:
        """Let the other end go on."""
        if self.peer is not None:
            self.peer.go_on("slow reader")

    def eof_received(self) -> bool:
        """Send the end of the stream on its way; the other direction stays open."""
        if self.peer is not None:
            self._way.send(self.peer.end_stream)
        return True

    def end_stream(self) -> None:
        """End this end's outgoing stream."""
        if self.transport is not None and not self.transport.is_closing() and self.transport.can_write_eof():
            self.transport.write_eof()

    def connection_lost(self, error: Exception | None) -> None:
        """Let the other end know, when that has travelled."""
        self._ends.discard(self)
        if self.peer is not None:
            self._way.send(self.peer.close)

    def close(self) -> None:
        """Close this end once what was written has been sent."""
        if self.transport is not None:
            self.transport.close()


class Proxy:
    """A link for any number of ports, on a thread of its own; `close` ends everything.

    Parameters
    ----------
    up, down : LinkShape
        The two directions; up is from the edge to the cloud.
    """

    kind = "proxy"
    cloud_prefix: tuple[str, ...] = ()
    edge_prefix: tuple[str, ...] = ()
    cloud_host = LOCALHOST

    def __init__(self, up: LinkShape, down: LinkShape) -> None:
        # select takes microseconds; the default selector and uvloop round times up to milliseconds.
        self._loop = asyncio.SelectorEventLoop(selectors.SelectSelector())
        self._up, self._down = Way(self._loop, up), Way(self._loop, down)
        self._ends: set[End] = set()
        self._servers: dict[int, asyncio.Server] = {}
        self._opening: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, name="link-proxy", daemon=True)
        self._thread.start()

    def address(self, port: int) -> str:
        """Return where the edge reaches a server that listens, or will listen, on the cloud's ``port``."""

        async def listen() -> int:
            if port not in self._servers:
                server = await self._loop.create_server(lambda: self._accepted(port), LOCALHOST, 0)
                self._servers[port] = server
            number: int = self._servers[port].sockets[0].getsockname()[1]
            return number

        return f"{LOCALHOST}:{asyncio.run_coroutine_threadsafe(listen(), self._loop).result()}"

    def statistics(self) -> dict[str, Any]:
        """Return counts per direction and the CPU seconds of the thread."""
        reply: Future[dict[str, Any]] = Future()

        def answer() -> None:
            ways = {"up": self._up.figures(), "down": self._down.figures()}
            reply.set_result({**ways, "cpu_s": round(time.thread_time(), 3)})

        self._loop.call_soon_threadsafe(answer)
        return reply.result()

    def close(self) -> None:
        """Cut every connection and end the thread."""
        if self._loop.is_closed():
            return

        async def end() -> None:
            for server in self._servers.values():
                server.close()
            for task in self._opening:
                task.cancel()
            for one in list(self._ends):
                if one.transport is not None:
                    one.transport.abort()
            await asyncio.gather(*self._opening, return_exceptions=True)
            await asyncio.sleep(0)  # the transports close their sockets

        asyncio.run_coroutine_threadsafe(end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _accepted(self, port: int) -> End:
        """Make the edge's end of a new connection; the cloud's is opened when the news has arrived there."""
        edge = End(self._up, self._ends)

        def arrived() -> None:
            task = self._loop.create_task(self._open(edge, port))
            self._opening.add(task)
            task.add_done_callback(self._opening.discard)

        self._up.send(arrived)
        return edge

    async def _open(self, edge: End, port: int) -> None:
        def cloud_end() -> End:
            end = End(self._down, self._ends)
            end.peer = edge
            return end

        try:
            _, cloud = await self._loop.create_connection(cloud_end, LOCALHOST, port)
        except OSError:
            self._down.send(edge.close)  # nobody listens there
            return

        def opened() -> None:
            edge.peer = cloud
            edge.go_on("no peer")
            if edge.transport is None or edge.transport.is_closing():
                cloud.close()  # the edge has left meanwhile

        self._down.send(opened)
