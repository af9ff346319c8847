"""What is learned: M of the layers that the cloud runs, LoRA factors of those that run here.

One mapping holds both: M by the number of its owner (`Plan.owners`), factors by their names (`shared.lora`).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from shared.adapter import m_shape
from shared.lora import factor_shapes, fresh_factors
from shared.plan import Plan

Weights = dict[int | str, Tensor]
SomeWeights = Mapping[int, Tensor] | Mapping[int | str, Tensor]


def start_weights(plan: Plan, seed: int, dtype: torch.dtype) -> Weights:
    """Return weights that change nothing yet: where tuning starts."""
    zeros = {layer: torch.zeros(m_shape(plan), dtype=dtype) for layer in plan.owners}
    return joined(zeros, {name: factor.to(dtype) for name, factor in fresh_factors(plan, seed).items()})


def weight_shapes(plan: Plan) -> dict[int | str, tuple[int, ...]]:
    """Return the shape of everything that is learned under ``plan``."""
    shapes: dict[int | str, tuple[int, ...]] = {layer: m_shape(plan) for layer in plan.owners}
    shapes.update(factor_shapes(plan).items())
    return shapes


def joined(*parts: Mapping[int, Tensor] | Mapping[str, Tensor]) -> Weights:
    """Return several mappings as one, in their order."""
    whole: Weights = {}
    for part in parts:
        whole.update(part.items())
    return whole


def matrices_of(weights: SomeWeights) -> dict[int, Tensor]:
    """Return M by owner."""
    return {key: tensor for key, tensor in weights.items() if isinstance(key, int)}


def factors_of(weights: SomeWeights) -> dict[str, Tensor]:
    """Return the LoRA factors by name."""
    return {key: tensor for key, tensor in weights.items() if isinstance(key, str)}
