"""How soon there will be room again, by how fast it has become free lately: what refused callers are told."""

import random
import time
from collections import deque
from collections.abc import Callable

WINDOW_S = 60.0  # what is older says little about now
MOST_KEPT = 1024  # releases that are remembered; more of them within the window say enough
LEAST_S, MOST_S = 0.25, 60.0  # bounds on a hint
JITTER = 0.25  # callers that were refused together come back apart: a hint varies by this share, both ways


class Releases:
    """What was given back lately, of something that callers wait for (blocks, streams ...).

    Parameters
    ----------
    unknown_s
        The hint while nothing has been given back (seconds).
    clock
        Seconds that only grow.
    """

    def __init__(self, unknown_s: float = 5.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._unknown_s, self._clock = unknown_s, clock
        self._seen: deque[tuple[float, int]] = deque(maxlen=MOST_KEPT)
        self._began = clock()

    def note(self, amount: int = 1) -> None:
        """Count what was given back just now."""
        if amount > 0:
            self._seen.append((self._clock(), amount))

    def rate(self) -> float:
        """Return how much was given back a second, lately; 0 if nothing was."""
        now = self._clock()
        while self._seen and now - self._seen[0][0] > WINDOW_S:
            self._seen.popleft()
        if not self._seen:
            return 0.0
        since = self._seen[0][0] if len(self._seen) == MOST_KEPT else max(self._began, now - WINDOW_S)
        return sum(amount for _, amount in self._seen) / max(now - since, LEAST_S)

    def hint_s(self, amount: int = 1) -> float:
        """Return in how many seconds so much will probably be given back; it varies from call to call."""
        rate = self.rate()
        expected = amount / rate if rate else self._unknown_s
        return max(LEAST_S, min(MOST_S, expected)) * random.uniform(1 - JITTER, 1 + JITTER)
