"""Which of several replicas a session is on, where a proxy in front of them says so by a header.

The proxy gives the header when a session is opened and reads it when that is picked up again. What it holds
is the proxy's matter: it is shown to the address that it came from, and to nobody else.
"""

from collections.abc import Iterable
from typing import Any

HEADER = "privatelora-replica"
MAX_CHARS = 512


def replica_in(headers: Iterable[Any] | None) -> str | None:
    """Return what a stream's first headers say of its replica, None if nothing that could be shown again."""
    for key, value in headers or ():
        if key == HEADER and isinstance(value, str) and 0 < len(value) <= MAX_CHARS:
            return value if value.isascii() and value.isprintable() else None
    return None


def shown(replica: str | None) -> tuple[tuple[str, str], ...]:
    """Return the headers of a stream that has to get to ``replica``; None is any."""
    return () if replica is None else ((HEADER, replica),)
