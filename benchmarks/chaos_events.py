"""What happens to the cloud and to the link, and when: drawn from a seed, so that a run can be had again.

Needs nothing but the standard library, and does nothing: `benchmarks.chaos` carries it out.
"""

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import cycle, islice

KINDS = ("kill", "restart", "pause", "drain", "cut")
WHAT = {
    "kill": "SIGKILL, then started again on the same port",
    "restart": "SIGTERM, waited for, then started again on the same port",
    "pause": "SIGSTOP, later SIGCONT",
    "drain": "a successor is started and new connections go to it, then SIGTERM",
    "cut": "the link",
}
# reset: both ends are told, nobody can connect until it is restored.
# silence: nothing passes; restored, what was sent arrives after all.
# forgotten: nothing passes; restored, the old connections are gone.
CUTS = ("reset", "silence", "forgotten")


@dataclass(frozen=True)
class Event:
    """One disturbance.

    Attributes
    ----------
    kind
        One of `KINDS`.
    how
        Of a cut: one of `CUTS`; else empty.
    share
        How long the calm before it is, compared with others (no unit; 1 on average).
    hold_s
        How long a pause or a cut lasts, or a killed cloud stays away (seconds).
    aimed
        Whether it waits for bytes of a step to pass and strikes then; a cut takes half of them.
    """

    kind: str
    how: str
    share: float
    hold_s: float
    aimed: bool


def schedule(seed: int, counts: Mapping[str, int], shortest_s: float, longest_s: float) -> list[Event]:
    """Return so many events of every kind, in any order.

    Parameters
    ----------
    seed
        Of everything that is drawn.
    counts
        Events by kind (count).
    shortest_s, longest_s
        Bounds on how long one lasts (seconds); short ones are as frequent as long ones.
    """
    draw = random.Random(seed)
    found = []
    for kind in KINDS:
        hows = list(islice(cycle(CUTS if kind == "cut" else ("",)), counts.get(kind, 0)))
        for number, how in enumerate(hows):
            hold_s = math.exp(draw.uniform(math.log(shortest_s), math.log(longest_s)))
            share = min(draw.expovariate(1.0), 4.0)
            found.append(Event(kind, how, share, round(hold_s, 3), aimed=number % 2 == 0))
    draw.shuffle(found)
    return found
