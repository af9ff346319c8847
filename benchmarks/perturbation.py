"""What another A or B is: the same matrix with noise on it, or one drawn anew.

A *block* is one matrix of the paper: A or B of one layer and one group. Layout ``per_projection`` has
three side by side in a stored tensor, with sizes that differ, so each gets noise by its own size. The
noise of a block depends on its name and the draw, not on the amount: growing amounts walk along one
line, and differences between them are not luck of the draw.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from shared.families import Geometry
from shared.lowrank import LowRank, gaussian, orthonormal
from shared.plan import Initialiser, Plan

Part = Literal["A", "B"]


@dataclass(frozen=True)
class Change:
    """What is done to A or to B.

    ``amount`` is the noise's standard deviation over the block's root mean square; None is a block drawn
    anew, as its initialiser would with another seed. ``draw`` seeds either.
    """

    part: Part
    amount: float | None
    draw: int = 0

    def __str__(self) -> str:
        """Say it in a few words."""
        return f"{self.part} " + ("re-drawn" if self.amount is None else f"+ {self.amount:g} noise")


def widths(plan: Plan, geometry: Geometry) -> dict[Part, list[int]]:
    """Return the columns of each block in a stored A (hidden, G * r_c2d) and B (r_d2c, sum of d_out)."""
    outs = [geometry.out_dim(target) for target in plan.targets]
    return {"A": [plan.r_c2d] * plan.groups, "B": outs if plan.layout == "per_projection" else [sum(outs)]}


def changed(lowrank: LowRank, plan: Plan, geometry: Geometry, change: Change) -> LowRank:
    """Return a copy of A and B with ``change`` made to every layer of one of them.

    The copy shares the tensors of the part that is left alone; nothing of ``lowrank`` is written to.

    Raises
    ------
    ValueError
        If the amount is negative or not finite.
    """
    columns = widths(plan, geometry)[change.part]
    tensors = lowrank.a if change.part == "A" else lowrank.b
    new = {layer: _changed(m, columns, plan.initialiser, layer, change) for layer, m in tensors.items()}
    return LowRank(new, dict(lowrank.b)) if change.part == "A" else LowRank(dict(lowrank.a), new)


def _changed(
    tensor: Tensor, columns: Sequence[int], initialiser: Initialiser, layer: int, change: Change
) -> Tensor:
    blocks = []
    for index, block in enumerate(torch.split(tensor.double(), list(columns), dim=1)):
        label = f"{change.part} {layer} {index} draw {change.draw}"
        blocks.append(
            redrawn(block, initialiser, change.part, label)
            if change.amount is None
            else noisy(block, change.amount, label)
        )
    return torch.cat(blocks, dim=1).float()  # (rows, sum of columns)


def noisy(block: Tensor, amount: float, label: str) -> Tensor:
    """Return ``block`` + N(0, (``amount`` * its root mean square)^2), float64, seeded by ``label``."""
    if not 0 <= amount < float("inf"):
        raise ValueError(f"an amount of noise is finite and at least 0, not {amount}")
    seed = int.from_bytes(hashlib.sha256(f"integrity {label}".encode()).digest()[:7], "little")
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(block.shape, generator=generator, dtype=torch.float64)
    return block.double() + amount * block.double().square().mean().sqrt() * noise


def redrawn(block: Tensor, initialiser: Initialiser, part: Part, label: str) -> Tensor:
    """Return another block of the same shape and kind, float64, seeded by ``label``.

    An SVD has no seed: there it is a Gaussian one with the block's root mean square.
    """
    rows, columns = block.shape
    if initialiser == "orthonormal":  # A has orthonormal columns, B orthonormal rows
        if part == "A":
            return orthonormal((rows, columns), f"redrawn {label}")
        return orthonormal((columns, rows), f"redrawn {label}").T
    drawn = gaussian((rows, columns), f"redrawn {label}")
    if initialiser == "gaussian":
        return drawn
    return drawn * (block.double().square().mean() / drawn.square().mean()).sqrt()
