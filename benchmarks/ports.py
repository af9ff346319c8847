"""Ports on localhost for processes that are started later: chosen so that nobody takes them before.

A port that was bound to an unused one, and let go, is soon given to somebody's connection. Those here are
outside of what the system gives out, and each test worker has a thousand of its own.
"""

import contextlib
import os
import socket
from collections.abc import Iterator
from functools import cache
from itertools import cycle, islice
from pathlib import Path

EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")  # Linux's
FIRST_PORT, PORTS_EACH = 10_000, 1_000  # of one test worker


def free_port() -> int:
    """Return a TCP port on localhost that nothing uses at this moment.

    Nor soon, as it is used only later: it is none that the system would give to a connection meanwhile, nor
    one that another test worker would choose, nor one that this process was told lately.
    """
    for port in islice(_own_ports(), PORTS_EACH):
        with contextlib.suppress(OSError):
            return _bound(port)
    return _bound(0)


def _bound(port: int) -> int:
    """Return the port that could be bound: this one, or any if it is 0."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("127.0.0.1", port))
        bound: int = probe.getsockname()[1]
        return bound


@cache
def _own_ports() -> Iterator[int]:
    """Return this process's ports in turn, again and again, from a place that others do not begin at."""
    given_out = (49_152, 65_535)  # by most systems
    if EPHEMERAL.exists():
        low, high = EPHEMERAL.read_text().split()
        given_out = (int(low), int(high))
    own = port_range(os.environ.get("PYTEST_XDIST_WORKER", ""), given_out)
    turn = cycle(own)
    next(islice(turn, os.getpid() * 617 % PORTS_EACH, None), None)
    return turn


def port_range(worker: str, given_out: tuple[int, int]) -> range:
    """Return the ports that one test worker chooses from.

    Parameters
    ----------
    worker
        ``gw0``, ``gw1`` and so on; empty for whoever is none.
    given_out
        First and last port of those that the system gives to connections.

    Returns
    -------
    range
        None of those; empty if the system leaves too few.
    """
    low, high = given_out
    firsts = [
        *range(FIRST_PORT, low - PORTS_EACH + 1, PORTS_EACH),
        *range(max(FIRST_PORT, high + 1), 65_536 - PORTS_EACH + 1, PORTS_EACH),
    ]
    if not firsts:
        return range(0)
    first = firsts[(int(worker[2:]) + 1 if worker else 0) % len(firsts)]
    return range(first, first + PORTS_EACH)
