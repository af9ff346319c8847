"""The addresses at which an edge may find its cloud, and which one is next.

The person's own list comes first. An address that a cloud returns when it drains is followed only to a
name that the person has given (in that list or with ``--allow-redirect``) or, over TLS, to a server whose
certificate is good for the name that the person called: then it is the same cloud elsewhere. A cloud
can thus move its edges, but hand them to nobody. Knows nothing about streams.
"""

import re
import threading
import time
from collections.abc import Callable, Collection, Sequence

from edge_client.streams import SessionError

ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9_.-]{1,253}):(\d{1,5})")  # HOST:PORT, no scheme
MAX_LEARNED = 16  # addresses that clouds have returned; the oldest are forgotten


def addresses_of(cloud: str) -> list[str]:
    """Return the addresses in a comma-separated list, each once.

    Raises
    ------
    ValueError
        If there is none.
    """
    found = list(dict.fromkeys(part.strip() for part in cloud.split(",") if part.strip()))
    if not found:
        raise ValueError("no address of a cloud was given; needed: HOST:PORT, or several with commas")
    return found


def host_of(address: str) -> str:
    """Return the name in an address, as names are compared."""
    return address.rpartition(":")[0].strip("[]").rstrip(".").lower()


class Replicas:
    """Where the cloud may be. Safe to use from several threads.

    Parameters
    ----------
    cloud
        ``host:port``, or several separated by commas, in order of preference.
    allowed
        Names that a cloud may send to besides: ``host``, ``host:port`` or ``*.domain``.
    tls
        Whether certificates are checked.
    clock
        Seconds that only grow.

    Attributes
    ----------
    current
        Where to go next.
    """

    def __init__(
        self,
        cloud: str,
        allowed: Sequence[str] = (),
        *,
        tls: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.own = tuple(addresses_of(cloud))
        self.current = self.own[0]
        self._allowed = [name.strip().rstrip(".").lower() for name in allowed]
        self._tls, self._clock = tls, clock
        self._learned: dict[str, str | None] = {}  # address -> name its certificate has to be good for
        self._not_before: dict[str, float] = {}  # address -> when it wants to be asked again
        self._lock = threading.Lock()

    @property
    def addresses(self) -> list[str]:
        """All addresses known, the person's own first."""
        with self._lock:
            return self._all()

    def certificate_name(self, address: str) -> str | None:
        """Return the name that the certificate at an address has to be good for; None is its own.

        An address that nobody here has heard of, or that was forgotten since, is no exception: its own name
        is good enough for those only that the person has named.
        """
        with self._lock:
            if (name := self._learned.get(address)) is not None:
                return name
            return None if address in self.own or self._is_named(address) else host_of(self.own[0])

    def forget(self, address: str) -> None:
        """Go no more to an address that a cloud returned; whatever the person gave stays."""
        with self._lock:
            self._learned.pop(address, None)

    def failed(self, address: str, error: ConnectionError, without: Collection[str] = ()) -> str | None:
        """Go on to the next address after one has failed.

        Parameters
        ----------
        address
            Where.
        error
            How; it may name a successor, and say when to come again.
        without
            Addresses that are out of the question.

        Returns
        -------
        str or None
            A successor that is not followed, None if there is none or it is.
        """
        named = error.successor if isinstance(error, SessionError) else None
        hint_s = (error.retry_after_s or 0.0) if isinstance(error, SessionError) else 0.0
        with self._lock:
            now = self._clock()
            self._not_before = {a: until for a, until in self._not_before.items() if until > now}
            self._not_before[address] = now + hint_s
            if named == address or named in without:
                named = None
            if named is not None and self._admit(named, address):
                self._not_before.pop(named, None)
                self.current = named
                return None
            if address == self.current or self.current in without:
                self.current = self._next(address, without, now)
            return named

    def wait_s(self) -> float:
        """Return how long the current address wants to be left alone (seconds)."""
        with self._lock:
            return max(0.0, self._not_before.get(self.current, 0.0) - self._clock())

    def _all(self) -> list[str]:
        return [*self.own, *(address for address in self._learned if address not in self.own)]

    def _next(self, address: str, without: Collection[str], now: float) -> str:
        """Return the address after this one that may be asked now, else the one that may soonest."""
        known = self._all()
        at = known.index(address) + 1 if address in known else 0
        turn = [a for a in known[at:] + known[:at] if a not in without] or [address]
        waits = [max(0.0, self._not_before.get(a, 0.0) - now) for a in turn]
        return turn[waits.index(min(waits))]

    def _admit(self, address: str, sender: str) -> bool:
        """Whether an address that a cloud returned may be followed; if so, it is known from now on."""
        match = ADDRESS.fullmatch(address)
        if match is None or not 0 < int(match[2]) < 1 << 16:
            return False
        if address in self.own:
            return True
        if self._is_named(address):
            name = None
        elif self._tls:  # only whoever holds the certificate for what the person called gets anything
            name = self._learned.get(sender) or host_of(sender)
        else:
            return False
        self._learned.pop(address, None)
        while len(self._learned) >= MAX_LEARNED:
            self._learned.pop(next(iter(self._learned)))
        self._learned[address] = name
        return True

    def _is_named(self, address: str) -> bool:
        host = host_of(address)
        if host in {host_of(own) for own in self.own}:
            return True
        return any(
            name in (host, address.lower()) or (name.startswith("*.") and host.endswith(name[1:]))
            for name in self._allowed
        )
