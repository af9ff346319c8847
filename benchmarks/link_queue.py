"""One direction of a network link: a queue that says when each packet comes out at the other end.

A packet waits until the link is free, occupies it for its size over the rate (serialisation), and then
travels for the delay (propagation). While it travels the next one is already on the link, so packets
sent together arrive spaced by serialisation alone. Only what waits for the link takes room in the
buffer; a packet that finds it full is refused (drop-tail). Time is always given by the caller, in
seconds on any clock that never goes back. Imports only the standard library.
"""

import math
from collections import deque
from dataclasses import dataclass
from typing import Generic, TypeVar

Item = TypeVar("Item")

MTU = 1500  # bytes, as on Ethernet: the largest packet, IP header included
HEADERS = 52  # bytes of IPv4 (20) and TCP with timestamps (32) in each packet
SHORTEST_BUFFER_S = 0.050  # access networks buffer at least this much, however near the other end is


@dataclass(frozen=True)
class LinkShape:
    """One direction of a link.

    Parameters
    ----------
    delay_s : float
        One-way propagation delay in seconds.
    bytes_per_s : float or None
        Rate in bytes a second, IP and TCP headers included; None is no limit.
    """

    delay_s: float
    bytes_per_s: float | None

    @property
    def buffer_bytes(self) -> float:
        """Bytes that may wait for the link: a round trip's worth at its rate, and at least 50 ms' worth.

        One bandwidth-delay product is what a single TCP needs to keep the link busy after a loss.
        """
        if self.bytes_per_s is None:
            return math.inf
        return max(self.bytes_per_s * max(2 * self.delay_s, SHORTEST_BUFFER_S), 2 * MTU)


class DueTimeQueue(Generic[Item]):
    """Packets on their way through one direction of a link, in order.

    Attributes
    ----------
    packets, bytes : int
        What was accepted so far.
    dropped : int
        Packets refused so far because the buffer was full.
    """

    def __init__(self, shape: LinkShape) -> None:
        self.shape = shape
        self.packets = self.bytes = self.dropped = 0
        self._free_at = -math.inf  # when the link has sent everything accepted so far
        self._waiting: deque[tuple[float, Item]] = deque()  # (due, item), both in order

    def __len__(self) -> int:
        return len(self._waiting)

    def push(self, item: Item, size: int, now: float) -> bool:
        """Accept a packet of ``size`` bytes at the time ``now``; False if the buffer is full."""
        if self.backlog_bytes(now) + size > self.shape.buffer_bytes:
            self.dropped += 1
            return False
        rate = self.shape.bytes_per_s
        self._free_at = max(now, self._free_at) + (size / rate if rate else 0.0)
        self._waiting.append((self._free_at + self.shape.delay_s, item))
        self.packets += 1
        self.bytes += size
        return True

    def next_due(self) -> float | None:
        """Return when the next packet comes out, in seconds on the caller's clock; None if there is none."""
        return self._waiting[0][0] if self._waiting else None

    def pop(self, now: float) -> tuple[float, Item] | None:
        """Take the next packet that is due at ``now``, as (when it was due, packet); None if none is."""
        if self._waiting and self._waiting[0][0] <= now:
            return self._waiting.popleft()
        return None

    def backlog_bytes(self, now: float) -> float:
        """Return the bytes that wait for the link, what is left of the packet on it included."""
        rate = self.shape.bytes_per_s
        return max(0.0, self._free_at - now) * rate if rate else 0.0

    def room_at(self, size: int) -> float:
        """Return from when on ``push`` accepts ``size`` bytes, for a sender that waits instead of losing."""
        rate = self.shape.bytes_per_s
        return self._free_at - (self.shape.buffer_bytes - size) / rate if rate else -math.inf


class Lateness:
    """How late packets left, compared with when they were due: the precision of the emulation."""

    def __init__(self, most: int = 20_000) -> None:
        self._seconds: deque[float] = deque(maxlen=most)

    def note(self, seconds: float) -> None:
        """Note one packet."""
        self._seconds.append(seconds)

    def figures(self) -> dict[str, float]:
        """Return median, 99th percentile and maximum in milliseconds since the last call, and begin anew.

        Where there were very many packets, those of the last ones.
        """
        ordered = sorted(self._seconds)
        self._seconds.clear()
        if not ordered:
            return {}
        ranks = {"median": 0.5, "p99": 0.99, "max": 1.0}
        return {
            name: round(1e3 * ordered[min(len(ordered) - 1, int(rank * len(ordered)))], 3)
            for name, rank in ranks.items()
        }
