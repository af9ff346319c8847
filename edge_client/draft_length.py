"""How many tokens to draft: what a longer step costs, what it is likely to yield, and what may be risked.

    n = argmax over 0..limit of  E(n) - rate * T(n)

``T(n)`` is the time of a step with n drafted tokens, measured (the link's round trips are in it);
``E(n) = 1 + p (1 + q + ... + q^(n-1))`` the tokens that it yields if the first draft is right with
probability p and each further one with q; ``rate`` the tokens a second of this answer so far, the price
of time. That is the choice that maximises tokens a second over the answer, not over the one step.

An `Allowance` bounds the loss whatever the estimates say: rejected drafts may cost half a step and 3 %
of an answer beyond what accepted ones have saved.
"""

import statistics
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

# The longest. More than these made no mixed prompt faster over a slow link, and cost its bytes: RESULTS.
DEFAULT_DRAFT_TOKENS = 8

# Steps; medians over them forget stalls, and their end forgets another network.
KEPT_PLAIN, KEPT_LONGER = 32, 64
# Before anything longer than one position was measured, and as weak evidence afterwards: two cores in
# fp32, where five positions take about twice as long as one. Nothing that serves is dearer than that.
PRIOR_SLOPE = 0.25  # of a step with one position, for each further position
PRIOR_POSITIONS = 4  # that this counts for
TRUST = 16.0  # steps of one length at which their own median weighs as much as the line through all

FADE = 0.95  # what evidence about acceptance keeps with each further draft of its kind
IDLE_FADE = 0.98  # and with each time that a draft was at hand but not worth its cost, so that it is retried
PRIOR_WEIGHT = 4.0  # drafts that the prior counts for
PRIOR_LATER = 0.8  # a second token is more likely right: that the first was shows that the text is the same
MATCH_LENGTHS = (1, 2, 3, 5, 9)  # lower ends of the classes that acceptance is told apart by

MIN_GAIN = 0.02  # tokens that a draft has to promise; less is noise
CREDIT_STEPS = 0.5
CREDIT_SHARE = 0.03


class StepTimes:
    """Running estimates of what a step with a given number of positions takes (seconds)."""

    def __init__(self) -> None:
        self._plain: deque[float] = deque(maxlen=KEPT_PLAIN)
        self._longer: deque[tuple[int, float]] = deque(maxlen=KEPT_LONGER)

    def note(self, positions: int, seconds: float) -> None:
        """Take one measurement."""
        if positions == 1:
            self._plain.append(seconds)
        else:
            self._longer.append((positions, seconds))

    def estimate(self, limit: int) -> list[float] | None:
        """Return T(0) to T(limit) in seconds; None before a step with one position.

        A line whose slope is the median over all steps (each weighing as many times as it has further
        positions: a stall or two move it little), blended with the median of the length itself.
        """
        if not self._plain:
            return None
        base = statistics.median(self._plain)
        own: dict[int, list[float]] = {}
        slopes = [(PRIOR_SLOPE * base, PRIOR_POSITIONS)]
        for positions, seconds in self._longer:
            own.setdefault(positions - 1, []).append(seconds)
            slopes.append(((seconds - base) / (positions - 1), positions - 1))
        slope = max(0.0, _weighted_median(slopes))
        times = [base]
        for drafted in range(1, limit + 1):
            line, seen = base + slope * drafted, own.get(drafted, [])
            middle = statistics.median(seen) if seen else line
            times.append(max(base, (len(seen) * middle + TRUST * line) / (len(seen) + TRUST)))
        return times


def _weighted_median(values: list[tuple[float, int]]) -> float:
    half, passed = sum(weight for _, weight in values) / 2, 0
    for value, weight in sorted(values):
        passed += weight
        if passed >= half:
            return value
    raise ValueError("no values")


@dataclass
class Tally:
    """Decayed counts of right and wrong drafts: of first tokens, and of those after a right one."""

    first_right: float = 0.0
    first_wrong: float = 0.0
    later_right: float = 0.0
    later_wrong: float = 0.0

    def fade(self, keep: float) -> None:
        """Weigh what was seen so far less."""
        self.first_right *= keep
        self.first_wrong *= keep
        self.later_right *= keep
        self.later_wrong *= keep


class Acceptance:
    """How likely drafts are right, by where they come from and how long their match is."""

    def __init__(self) -> None:
        self._tallies: dict[Hashable, Tally] = {}

    def rates(self, source: str, length: int) -> tuple[float, float]:
        """Return p and q: that a first token is right, and that one after a right one is."""
        low = _class_of(length)
        tally = self._tallies.get((source, low), Tally())
        first_prior = low / (low + 2)
        first = (tally.first_right + PRIOR_WEIGHT * first_prior) / (
            tally.first_right + tally.first_wrong + PRIOR_WEIGHT
        )
        later = (tally.later_right + PRIOR_WEIGHT * PRIOR_LATER) / (
            tally.later_right + tally.later_wrong + PRIOR_WEIGHT
        )
        return first, later

    def note(self, source: str, length: int, drafted: int, accepted: int) -> None:
        """Take the outcome of one draft (counts of tokens)."""
        tally = self._tallies.setdefault((source, _class_of(length)), Tally())
        tally.fade(FADE)
        tally.first_right += accepted > 0
        tally.first_wrong += accepted == 0
        tally.later_right += max(accepted - 1, 0)
        tally.later_wrong += 0 < accepted < drafted

    def idle(self, source: str, length: int) -> None:
        """Note that a draft was at hand and not used."""
        if tally := self._tallies.get((source, _class_of(length))):
            tally.fade(IDLE_FADE)


def _class_of(length: int) -> int:
    return max(low for low in MATCH_LENGTHS if low <= length)


def expected_tokens(first: float, later: float, limit: int) -> list[float]:
    """Return E(0) to E(limit): the tokens that a step yields (count)."""
    tokens, chance = [1.0], first
    for _ in range(limit):
        tokens.append(tokens[-1] + chance)
        chance *= later
    return tokens


def best_length(tokens: Sequence[float], times: Sequence[float], rate: float) -> tuple[int, float]:
    """Return the number of tokens to draft and what it gains over none.

    Parameters
    ----------
    tokens
        E(0) to E(limit), counts.
    times
        T(0) to T(limit), seconds.
    rate
        Tokens a second that time is worth.

    Returns
    -------
    tuple
        The shortest of the best lengths, and its gain in tokens; (0, 0.0) below `MIN_GAIN`.
    """
    none = tokens[0] - rate * times[0]
    gains = [e - rate * t - none for e, t in zip(tokens, times, strict=True)]
    best = max(range(len(gains)), key=lambda n: (gains[n], -n))
    return (best, gains[best]) if gains[best] >= MIN_GAIN else (0, 0.0)


class Allowance:
    """What drafting has cost one answer so far, in steps of one position, and what it may risk."""

    def __init__(self) -> None:
        self._lost = 0.0  # below 0: saved
        self._tokens = 0

    def affordable(self, times: Sequence[float]) -> int:
        """Return the longest draft that may be rejected whole: times are T(0) to T(limit) in seconds."""
        room = CREDIT_STEPS + CREDIT_SHARE * self._tokens - self._lost
        return max(n for n, time in enumerate(times) if n == 0 or time / times[0] - 1 <= room)

    def note(self, tokens: int, time: float, base: float) -> None:
        """Take a step: what it yielded (tokens), what it and a plain one take (seconds)."""
        self._lost += time / base - tokens
        self._tokens += tokens
