"""Plans for the models of tests/families.py, with A, B and M to go with them."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shared.families import geometry
from shared.lowrank import LowRank, make
from shared.plan import Plan, Target
from shared.reference import projections


def plan_for(model: PreTrainedModel, *, layers: tuple[int, ...] | None = None, **options: Any) -> Plan:
    """Return a plan for a model made here: every layer unless ``layers`` names a subset."""
    config = model.config
    return Plan.subset(
        layers,
        **{
            "name": "test",
            "backbone": f"tiny-{config.model_type}",
            "num_layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "rank": 8,
            **options,
        },
    )


def lowrank_for(plan: Plan, model: PreTrainedModel) -> LowRank:
    """Return A and B of a plan, made as the cloud makes them."""

    def weight_of(layer: int, target: Target) -> Tensor:
        linear, rows = projections(model, layer)[target]
        return linear.weight[rows].detach().T

    return make(plan, geometry(model.config), weight_of)


def matrices_for(plan: Plan, *, seed: int = 0, std: float = 0.5) -> dict[int, Tensor]:
    """Return random M (groups, r_c2d, r_d2c) by owner; 0.5 moves q, k and v by about a third."""
    generator = torch.Generator().manual_seed(2000 + seed)
    shape = (plan.groups, plan.r_c2d, plan.r_d2c)
    return {layer: std * torch.randn(shape, generator=generator) for layer in plan.owners}
