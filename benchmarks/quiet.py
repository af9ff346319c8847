"""Alternate two measurements, and know which pairs the host disturbed.

On a rented machine the hypervisor may take the cores away for seconds at a time. Linux counts that as
*steal*. A pair with more of it than a few percent compares two different machines, so it is repeated;
how many were is reported, never hidden. Knows nothing about what is measured.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import psutil

MOST_STEAL = 0.05  # of all cores' time, over one pair
MOST_TRIES = 4  # pairs tried for each one wanted

Ours = TypeVar("Ours")
Theirs = TypeVar("Theirs")


@dataclass
class Pairs(Generic[Ours, Theirs]):
    """What both returned, pair by pair, with the share of the cores' time that the host took."""

    ours: list[Ours] = field(default_factory=list)
    theirs: list[Theirs] = field(default_factory=list)
    steal: list[float] = field(default_factory=list)

    def quiet(self) -> "Pairs[Ours, Theirs]":
        """Return the undisturbed pairs, or all of them if none was."""
        kept = [i for i, share in enumerate(self.steal) if share <= MOST_STEAL] or range(len(self.steal))
        return Pairs(
            [self.ours[i] for i in kept], [self.theirs[i] for i in kept], [self.steal[i] for i in kept]
        )


def stolen_s() -> float:
    """Return the seconds that the host has kept from this machine's cores so far; 0 where not counted."""
    return float(getattr(psutil.cpu_times(), "steal", 0.0))


def in_turn(rounds: int, ours: Callable[[], Ours], theirs: Callable[[], Theirs]) -> Pairs[Ours, Theirs]:
    """Run both alternately after one warm-up each, until `rounds` pairs were undisturbed.

    Gives up after four times as many; `Pairs.quiet` has those that count.
    """
    ours(), theirs()
    pairs: Pairs[Ours, Theirs] = Pairs()
    cores = psutil.cpu_count() or 1
    for _ in range(MOST_TRIES * rounds):
        taken, started = stolen_s(), time.perf_counter()
        # Whichever goes first changes from pair to pair: neither always follows the other's caches.
        if len(pairs.ours) % 2:
            theirs_now, ours_now = theirs(), ours()
        else:
            ours_now, theirs_now = ours(), theirs()
        pairs.ours.append(ours_now)
        pairs.theirs.append(theirs_now)
        pairs.steal.append((stolen_s() - taken) / (cores * (time.perf_counter() - started)))
        if sum(share <= MOST_STEAL for share in pairs.steal) == rounds:
            break
    return pairs


def compared(pairs: Pairs[float, float]) -> dict[str, Any]:
    """Return medians of the undisturbed pairs, their ratio with its spread, and what was left out."""
    kept = pairs.quiet()
    ratios = sorted(a / b for a, b in zip(kept.ours, kept.theirs, strict=True))
    ours, theirs = statistics.median(kept.ours), statistics.median(kept.theirs)
    figures = {
        "split": round(ours, 2),
        "plain": round(theirs, 2),
        "ratio": round(ours / theirs, 3),
        "pairs": [round(ratio, 3) for ratio in (ratios[0], ratios[-1])],
        "counted": len(ratios),
        "tried": len(pairs.ours),
        "most_steal": round(max(kept.steal), 3),
    }
    print(figures, flush=True)
    return figures
