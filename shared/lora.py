"""LoRA factors of resident layers: their names, shapes and first values (arXiv 2106.09685).

``layers.{l}.{projection}.down (d_in, rank)`` and ``.up (rank, d_out)``, float32. They belong to the adapter
and act on the edge alone; A and B of the plan are something else, frozen and in the cloud.
"""

import math

import torch
from torch import Tensor

from shared.plan import Plan


def factor_shapes(plan: Plan) -> dict[str, tuple[int, int]]:
    """Return the shape of each factor of ``plan``, by name, in ascending order of layers."""
    shapes: dict[str, tuple[int, int]] = {}
    for layer in plan.resident_layers:
        for projection in plan.lora:
            path = f"layers.{layer}.{projection.name}"
            shapes[f"{path}.down"] = (projection.d_in, plan.lora_rank)
            shapes[f"{path}.up"] = (plan.lora_rank, projection.d_out)
    return shapes


def zero_factors(plan: Plan) -> dict[str, Tensor]:
    """Return factors that change nothing."""
    return {name: torch.zeros(shape) for name, shape in factor_shapes(plan).items()}


def fresh_factors(plan: Plan, seed: int) -> dict[str, Tensor]:
    """Return factors that change nothing yet and can learn: ``down`` is random, ``up`` zero."""
    factors, generator = zero_factors(plan), torch.Generator().manual_seed(seed)
    for name, factor in factors.items():
        if name.endswith(".down"):
            bound = math.sqrt(1 / factor.shape[0])  # Kaiming's uniform start with a = sqrt(5), as PEFT's
            factor.uniform_(-bound, bound, generator=generator)
    return factors
