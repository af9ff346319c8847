"""When the cloud is lost: pick the session up again, or replay it elsewhere, until the step is done.

A step whose answer never came is asked for again. On the replica that had the session it is *resumed*: the
keys and values are still there, and only what was not finished runs again. Anywhere else it is *replayed*:
a fresh session is given the tokens so far, which only this side knows. Either way the step returns what it
would have returned, and its caller notices nothing but the time. Knows no tokens: what is done again is its
caller's.
"""

import logging
import time
from collections.abc import Callable
from typing import Protocol, TypeVar

import grpc

from edge_client.backoff import Backoff, may_pass
from edge_client.config import DEFAULT_RECOVER_S
from edge_client.replicas import Replicas
from edge_client.session import Resumed
from edge_client.streams import SessionError, forget_frames

log = logging.getLogger(__name__)

Code = grpc.StatusCode
# What says that a session cannot be had back, but its tokens can be replayed.
GONE = {Code.NOT_FOUND, Code.FAILED_PRECONDITION, Code.OUT_OF_RANGE, Code.INVALID_ARGUMENT}
# What one address refuses for good, though another may not.
THERE_ONLY = {Code.UNAUTHENTICATED, Code.PERMISSION_DENIED, Code.NOT_FOUND, Code.FAILED_PRECONDITION,
              Code.UNIMPLEMENTED}  # fmt: skip
MAX_REASON_CHARS = 300

T = TypeVar("T")
Say = Callable[[str], object]


class Place(Protocol):
    """What is needed of `edge_client.connection.Connection`."""

    @property
    def replicas(self) -> Replicas:
        """Its addresses."""

    def lost(self, error: ConnectionError, without: frozenset[str]) -> str | None:
        """Go on to the next address; return a successor that is not followed."""


class Held(Protocol):
    """What is needed of `edge_client.pool.HeldSession`."""

    @property
    def session(self) -> object:
        """The session."""

    @property
    def broken(self) -> bool:
        """Whether it is of no use as it is."""

    def resume(self, pick_up: Callable[..., Resumed]) -> None:
        """Pick it up again."""


class Attempts:
    """One recovery: where to go after each failure, how long to wait before, and when to give up.

    Parameters
    ----------
    place
        The connection; None has nowhere else to go.
    backoff
        The waits.
    say
        Takes one line for the person.
    """

    def __init__(self, place: Place | None, backoff: Backoff, say: Say = lambda line: None) -> None:
        self._place, self._backoff, self._say = place, backoff, say
        self._refused: dict[str, ConnectionError] = {}  # by addresses that will not change their mind
        self._besides: str | None = None  # what else was wrong, for who gives up

    @classmethod
    def nowhere_else(cls) -> "Attempts":
        """Return the attempts of who has one address only."""
        return cls(None, Backoff(DEFAULT_RECOVER_S))

    def next_wait_s(self, error: ConnectionError) -> float:
        """Return how long to wait before the next attempt (seconds), and see to where that will be.

        Then the error is dealt with: it keeps nothing alive any more.

        Raises
        ------
        ConnectionError
            If it will not pass, or was tried for long enough.
        """
        seconds = self._wait_s(error)
        forget_frames(error)
        return seconds

    def _wait_s(self, error: ConnectionError) -> float:
        replicas = None if self._place is None else self._place.replicas
        if not may_pass(error):
            if replicas is None or not isinstance(error, SessionError) or error.code not in THERE_ONLY:
                raise error
            self._refused[error.address or replicas.current] = error
            if set(replicas.addresses) <= self._refused.keys():
                raise error
            self._besides = str(error)[:MAX_REASON_CHARS]
            self._say(f"{self._besides}; trying another address")
        if self._place is None or replicas is None:
            hint_s = (error.retry_after_s or 0.0) if isinstance(error, SessionError) else 0.0
            return self._backoff.wait_s(error, hint_s=hint_s)
        self._heed(self._place.lost(error, frozenset(self._refused)), error)
        rounds = self._backoff.attempts // len(replicas.addresses)
        try:
            return self._backoff.wait_s(error, doublings=rounds, hint_s=replicas.wait_s())
        except SessionError as last:
            if self._besides is None or last.args[0].startswith(self._besides):
                raise
            raise SessionError(f"{last}; {self._besides}", last.code, last.retry_after_s) from None

    def _heed(self, foreign: str | None, error: ConnectionError) -> None:
        if foreign is None:
            return
        words = (
            f"{getattr(error, 'address', None)} sends this edge to {foreign}, which is neither in --cloud "
            "nor allowed by --allow-redirect: not followed"
        )
        if words != self._besides:
            self._besides = words
            self._say(words)


class Recovery:
    """Does a step again until it is done.

    Parameters
    ----------
    place
        The connection.
    pick_up
        Picks a session up again at the cloud.
    patience_s
        How long to go on (seconds); 0 is not at all.
    say
        Takes one line for the person; None is the log.
    sleep
        Waits for some seconds.
    backoff
        Makes the waits of one recovery.
    """

    def __init__(
        self,
        place: Place,
        pick_up: Callable[..., Resumed],
        patience_s: float,
        say: Say | None = None,
        sleep: Callable[[float], object] = time.sleep,
        backoff: Callable[[float], Backoff] = Backoff,
    ) -> None:
        self._place, self._pick_up, self._patience_s = place, pick_up, patience_s
        self._say: Say = say if say is not None else log.warning
        self._sleep, self._backoff = sleep, backoff

    def begin(self) -> Attempts:
        """Return the attempts of one recovery, which begins now."""
        return Attempts(self._place, self._backoff(self._patience_s), self._say)

    def again(self, error: ConnectionError, held: Callable[[], Held | None], work: Callable[[], T]) -> T:
        """Return what ``work`` returns, once the cloud is there again.

        Parameters
        ----------
        error
            How it was lost.
        held
            The session in use; it changes when ``work`` takes another.
        work
            Runs the step, on that session or, if that is broken, on a new one.

        Raises
        ------
        ConnectionError
            If that does not pass, or took too long.
        """
        if self._patience_s <= 0:
            raise error
        attempts = self.begin()
        gone: set[Held] = set()  # sessions that are known to be held no longer
        told = False
        while True:
            seconds = attempts.next_wait_s(_located(error, held()))
            if not told:
                self._say(f"{str(error)[:MAX_REASON_CHARS]}; reconnecting")
                told = True
            self._sleep(seconds)
            try:
                return self._attempt(held, work, gone)
            except ConnectionError as failed:
                error = failed

    def _attempt(self, held: Callable[[], Held | None], work: Callable[[], T], gone: set[Held]) -> T:
        resumed = self._resume(held(), gone)
        try:
            return work()
        except SessionError as error:
            if resumed is None or error.code not in GONE:
                raise
            forget_frames(error)
            gone.add(resumed)  # it does not hold what it should
        return work()

    def _resume(self, held: Held | None, gone: set[Held]) -> Held | None:
        """Pick the session up again if it is where the next attempt goes; else leave it broken."""
        if held is None or not held.broken or held in gone:
            return None
        if getattr(held.session, "address", None) != self._place.replicas.current:
            _abandon(held)
            return None
        try:
            held.resume(self._pick_up)
        except SessionError as error:
            if error.code not in GONE:
                raise
            forget_frames(error)
            gone.add(held)
            return None
        return held


def _located(error: ConnectionError, held: Held | None) -> ConnectionError:
    """Return an error that knows where it happened, as one of a step does not."""
    if isinstance(error, SessionError) and held is not None:
        error.note(held.session)
    return error


def _abandon(held: Held) -> None:
    """Break off what is left of a stream: to close one in order that nobody answers takes its time."""
    abandon = getattr(held.session, "abandon", None)
    if abandon is not None:
        abandon()
