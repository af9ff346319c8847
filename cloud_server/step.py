"""A step on its way through the layers, and the slices of it that are scheduled.

A step is everything that happens for one chunk of new positions of one session. It holds what the
layers have made of it so far. Knows nothing about the network or about other steps.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

import torch
from torch import Tensor

from cloud_server.kv_cache import Row
from cloud_server.lean import Rotary
from shared.plan import Plan


@dataclass(frozen=True)
class RowSpan:
    """``count`` new positions of ``row``, from ``start``; the last ``keep`` return their hidden state."""

    row: Row
    start: int
    count: int
    keep: int


@dataclass(eq=False)
class Step:
    """One chunk of new positions of one session.

    ``hidden`` is the input of decoder layer ``layer``; rows ``0..offset-1`` of it are already that
    layer's output when a slice has run. ``stash`` holds the base q, k, v products of ``layer``
    while its codes are in flight.
    """

    number: int
    plan: Plan
    spans: tuple[RowSpan, ...]
    hidden: Tensor  # (tokens, hidden_size)
    on_codes: Callable[["Step", int, Tensor], None]
    on_done: Callable[["Step", Tensor], None]
    owner: object = field(default_factory=object)  # the session that it is a step of
    on_failed: Callable[["Step", Exception], object] = lambda *_: None  # it cannot be run, and is gone
    payer: str = ""  # the identity whose turn it counts as
    before: "Step | None" = None  # the session's previous step: its keys and values must be there first
    layer: int = 0
    offset: int = 0
    normed: Tensor | None = None  # input of the projections, where codes were made: (tokens, hidden_size)
    stash: Tensor | None = None  # (tokens, q_dim + 2 * kv_dim)
    residual_codes: dict[int, Tensor] = field(default_factory=dict)  # owner -> (tokens, residual_width)
    rotary: dict[str, Rotary] = field(default_factory=dict)  # made by the backbone when it first runs
    emitted: int = -1  # last layer whose codes were sent
    emitted_at: float = 0.0  # when (seconds, monotonic)
    submitted_at: float = 0.0  # when the step came (seconds, monotonic)
    cancelled: bool = False
    is_running: bool = False  # a slice of it is on the torch thread
    ready_since: float = 0.0
    serial: int = field(default_factory=count().__next__)  # unlike any other step's, in any session
    positions: Tensor = field(init=False)  # (tokens,)
    tokens: int = field(init=False)  # new positions of all rows together
    longest: int = field(init=False)  # of the longest row: 1 for a decoded token, however many beams
    end: int = field(init=False)  # one past the cloud's last layer

    def __post_init__(self) -> None:
        """Lay the spans' positions end to end; note what is asked for several times an exchange."""
        ranges = [torch.arange(s.start, s.start + s.count) for s in self.spans]
        self.positions = ranges[0] if len(ranges) == 1 else torch.cat(ranges)
        self.layer, self.end = self.plan.cloud_layers.start, self.plan.cloud_layers.stop
        self.tokens, self.longest = len(self.hidden), max(span.count for span in self.spans)

    @property
    def finished(self) -> bool:
        """Whether every layer of the cloud has run."""
        return self.layer >= self.end

    def kept_hidden(self) -> Tensor:
        """Return the hidden states that the edge asked for: ``(sum of keep, hidden_size)``."""
        ends, kept = 0, []
        for span in self.spans:
            ends += span.count
            kept.append(self.hidden[ends - span.keep : ends])
        return kept[0] if len(kept) == 1 else torch.cat(kept)

    def must_emit(self) -> bool:
        """Whether this layer's codes have to be sent: the plan says so and their answer is not here yet."""
        if self.emitted == self.layer:
            return False
        return any(owner not in self.residual_codes for owner in self.plan.fed_by(self.layer))

    def is_blocked(self) -> bool:
        """Whether this layer waits for the edge or for the session's previous step."""
        owner = self.plan.owner_of(self.layer)
        if owner is not None and owner not in self.residual_codes:
            return True
        before = self.before
        return before is not None and not before.finished and before.layer <= self.layer
