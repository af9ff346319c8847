"""A piece of a tuning batch: whole sequences, and what the layers have made of them so far.

Only values; what is done with them is `cloud_server.tuning`'s matter.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from cloud_server.lean import Rotary
from cloud_server.packed import PackedAttention


class Stage(IntEnum):
    """What happens next to a piece. The order is that in which pieces at one layer are served.

    Only codes do not wait for pieces at lower layers: while those run, the edge answers.
    """

    EMIT = 0  # norm, codes xA
    STASH = 1  # base q, k, v products, while the codes are in flight
    RUN = 2  # the layer itself, as soon as its residual codes are here
    GRADIENT = 3  # back through the layer to its input and to q, k, v: dL/dz
    PULL = 4  # back through the base products, while dL/dz is in flight
    CLOSE = 5  # back through xA, as soon as dL/dc is here, and through the norm
    DONE = 6


@dataclass
class Kept:
    """What a layer's way back needs. ``end`` and ``qkv`` are None if the layer is run again for it."""

    hidden: Tensor  # the layer's input: (tokens, hidden_size)
    residual_codes: Tensor | None = None  # (tokens, residual_width)
    qkv: Tensor | None = None  # q, k, v products with the residual: (tokens, q_dim + 2 kv_dim)
    end: GradientEdge | None = None  # where the graph from these two ends: at the layer's output


@dataclass(eq=False)
class Piece:
    """Tokens ``lo..hi-1`` of a batch, whole sequences; ``stage`` is what happens next, at ``layer``."""

    index: int
    lo: int
    hi: int
    attention: PackedAttention
    rotary: dict[str, Rotary]
    layer: int
    stage: Stage
    hidden: Tensor | None = None  # input of the layer: (tokens, hidden_size)
    normed: Tensor | None = None  # (tokens, hidden_size)
    qkv: Tensor | None = None  # (tokens, q_dim + 2 kv_dim); on the way back, its gradient
    residual_codes: Tensor | None = None  # of the owner passed last, for layers that share them
    gradient: Tensor | None = None  # of what lies above: (tokens, hidden_size)
    normed_gradient: Tensor | None = None  # (tokens, hidden_size)
    residual_codes_gradient: Tensor | None = None  # summed over layers that share them, so far
    kept: dict[int, Kept] = field(default_factory=dict)  # by layer

    @property
    def tokens(self) -> int:
        """Tokens of all its sequences."""
        return self.hi - self.lo

    @property
    def order(self) -> tuple[bool, bool, int, int, int]:
        """Rank among pieces that are ready: least first. Rows of one tensor then leave in order."""
        back, layer, stage = self.unit
        return stage != Stage.EMIT, not back, layer, stage, self.index

    @property
    def unit(self) -> tuple[bool, int, int]:
        """Say what comes next for it; what comes later is greater."""
        back = self.stage >= Stage.GRADIENT
        return back, -self.layer if back else self.layer, self.stage


@dataclass
class Gathered:
    """A tensor that comes from the edge in rows and is taken in rows, both in order.

    Rows are put together by who takes them: the event loop, where they come, must not wait for that.
    """

    filled: int = 0  # rows that came
    taken: int = 0  # rows that went
    _parts: deque[Tensor] = field(default_factory=deque)  # (rows, width) each
    _first: int = 0  # row that the first part begins with

    def put(self, rows: Tensor) -> None:
        """Append ``rows (rows, width)``."""
        self._parts.append(rows)
        self.filled += len(rows)

    def take(self, count: int) -> Tensor:
        """Return the next rows, which have to be there: ``(count, width)``."""
        lo, hi = self.taken, self.taken + count
        while self._first + len(self._parts[0]) <= lo:
            self._first += len(self._parts.popleft())
        found: list[Tensor] = []
        at = self._first
        while at < hi:  # by index: more may be put meanwhile
            part = self._parts[len(found)]
            found.append(part[max(lo - at, 0) : hi - at])
            at += len(part)
        self.taken = hi
        return found[0] if len(found) == 1 else torch.cat(found)


def cut(lengths: Sequence[int], piece_tokens: int) -> list[list[int]]:
    """Return the lengths in groups of at most ``piece_tokens`` tokens; a longer sequence is a group."""
    groups: list[list[int]] = []
    for length in lengths:
        if groups and sum(groups[-1]) + length <= piece_tokens:
            groups[-1].append(length)
        else:
            groups.append([length])
    return groups
