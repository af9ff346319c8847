"""A batch under way on this side: what is kept of it until its gradients are back.

Cut into blocks of whole sequences that are multiplied together, so that bits do not depend on how the cloud
cuts its messages. Only values; `stream.py` moves them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from shared.plan import Plan

BLOCK_TOKENS = (
    64  # fewest that are multiplied at once, if a batch has as many: fewer would be many small calls
)

Matrices = Mapping[int, Tensor]  # owner -> M (groups, r_c2d, r_d2c)


@dataclass(eq=False)
class Batch:
    """What is kept of the batch under way until its gradients are back."""

    number: int
    lengths: Sequence[int]
    matrices: Matrices
    codes: dict[int, Tensor] = field(default_factory=dict)  # exchanging layer -> (tokens, groups * r_c2d)

    def __post_init__(self) -> None:
        """Count tokens; cut the batch into blocks."""
        self.tokens = sum(self.lengths)
        self.ends: list[int] = []  # of blocks: whole sequences that are multiplied together
        begin = end = 0
        for length in self.lengths:
            end += length
            if end - begin >= BLOCK_TOKENS or end == self.tokens:
                self.ends.append(end)
                begin = end

    @property
    def dtype(self) -> torch.dtype:
        """What codes are multiplied in: the dtype of M."""
        return next((matrix.dtype for matrix in self.matrices.values()), torch.float32)


def by_group(rows: Tensor, plan: Plan) -> Tensor:
    """Return ``(tokens, groups * width)`` as a view ``(groups, tokens, width)``."""
    return rows.view(rows.shape[0], plan.groups, -1).transpose(0, 1)
