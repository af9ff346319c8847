"""What the engine has run: how full its batches were, and how long steps waited and took.

Written to by the engine's own thread, a few list elements a batch and no lock; read from the thread that
answers Prometheus (`cloud_server.metrics`). Knows nothing of who runs, or of what is in a batch.
"""

from bisect import bisect_left
from collections.abc import Sequence

STEPS = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # in one batch (count)
SECONDS = (5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Distribution:
    """Values by how large they are.

    Parameters
    ----------
    bounds
        Upper ends of the buckets, ascending; a last one without end is added.
    """

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    @property
    def count(self) -> int:
        """Values so far."""
        return sum(self.counts)


class BatchStatistics:
    """Batches and steps since the start.

    Parameters
    ----------
    short_step_tokens
        Longest row of a step that counts as decoding (positions).
    """

    def __init__(self, short_step_tokens: int) -> None:
        self._short = short_step_tokens
        self.count = self.steps = self.tokens = 0
        self.by_layer: dict[int, Distribution] = {}  # steps in a batch, by the segment's first layer
        self.queued = Distribution(SECONDS)  # of each batch, the step that was ready longest before it ran
        self.ran = Distribution(SECONDS)  # how long each batch took
        self.decoding = Distribution(SECONDS)  # short steps, from their arrival to their end
        self.prefill = Distribution(SECONDS)  # long ones
        self.positions = {"decode": 0, "prefill": 0}  # of steps that ended

    def add(self, layer: int, steps: int, tokens: int, queued_s: float, took_s: float) -> None:
        """Count one batch: its first layer, steps and positions, and what they waited and took (seconds)."""
        self.count += 1
        self.steps += steps
        self.tokens += tokens
        sizes = self.by_layer.get(layer)
        if sizes is None:
            sizes = self.by_layer[layer] = Distribution(STEPS)
        sizes.add(steps)
        self.queued.add(queued_s)
        self.ran.add(took_s)

    def ended(self, longest: int, tokens: int, took_s: float) -> None:
        """Count one step that ended: its longest row and all its positions, and the seconds since it came."""
        if longest <= self._short:
            self.decoding.add(took_s)
            self.positions["decode"] += tokens
        else:
            self.prefill.add(took_s)
            self.positions["prefill"] += tokens

    @property
    def mean_steps(self) -> float:
        """Mean number of steps that ran together."""
        return self.steps / self.count if self.count else 0.0
