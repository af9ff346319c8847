"""How long a lost cloud is tried again: exponential waits with full jitter, under one deadline for all.

Says what may pass and when the next attempt is due. Knows nothing about streams, addresses or tokens.
"""

import random
import time
from collections.abc import Callable

import grpc

from edge_client.streams import SessionError

Code = grpc.StatusCode
# What a cloud that is restarted, drained, full or cut off may answer; anything else will not pass.
PASSING = {
    Code.OK, Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED, Code.RESOURCE_EXHAUSTED, Code.ABORTED,
    Code.UNKNOWN, Code.INTERNAL, Code.CANCELLED,
}  # fmt: skip
FIRST_WAIT_S, LONGEST_WAIT_S = 0.2, 10.0  # bounds of the wait: twice as long each time

_random = random.Random()  # its own: a person's seed is for the samples, and stays as it is


def may_pass(error: ConnectionError) -> bool:
    """Whether a lost stream is worth another attempt."""
    return not isinstance(error, SessionError) or error.code in PASSING


class Backoff:
    """The waits between the attempts to get one thing done.

    Begins when the first attempt has failed.

    Parameters
    ----------
    patience_s
        How long to go on (seconds); 0 is not at all.
    clock
        Seconds that only grow.
    uniform
        A random number between two others.
    """

    def __init__(
        self,
        patience_s: float,
        clock: Callable[[], float] = time.monotonic,
        uniform: Callable[[float, float], float] = _random.uniform,
    ) -> None:
        self._clock, self._uniform = clock, uniform
        self._began = clock()
        self._until = self._began + patience_s
        self.attempts = 0  # that have failed

    def wait_s(self, error: ConnectionError, *, doublings: int | None = None, hint_s: float = 0.0) -> float:
        """Return how long to wait before the next attempt (seconds).

        Anything from 0 to the bound is as likely: edges that have lost the same cloud at the same moment do
        not all come back at the same moment.

        Parameters
        ----------
        error
            Why the last attempt failed.
        doublings
            How often the bound has doubled; None is once for each attempt after the first.
        hint_s
            What the cloud asks to wait at least.

        Raises
        ------
        ConnectionError
            Like ``error``, saying for how long it was tried, if the next attempt would come too late.
        """
        self.attempts += 1
        if doublings is None:
            doublings = self.attempts - 1
        bound = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2.0 ** min(doublings, 30))
        seconds = max(hint_s, self._uniform(0.0, bound))
        now = self._clock()
        if now + seconds > self._until:
            raise self._given_up(error, now - self._began, hint_s) from error
        return seconds

    def _given_up(self, error: ConnectionError, tried_s: float, hint_s: float) -> ConnectionError:
        if self._until <= self._began:
            return error
        hint = f"; it asks to come back in {hint_s:.0f} s" if hint_s > 1 else ""
        words = f"{error}; gave up after {self.attempts} attempts in {tried_s:.0f} s{hint}"
        if isinstance(error, SessionError):
            return SessionError(words, error.code, error.retry_after_s)
        return type(error)(words)
