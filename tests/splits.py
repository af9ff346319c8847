"""Families x plans, each with the merged model that the split must equal, and clouds that serve them."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shared.lowrank import LowRank
from shared.plan import Plan
from shared.reference import Matrices, merged
from tests.families import build
from tests.inprocess import Cloud
from tests.plans import lowrank_for, matrices_for, plan_for

ATOL = 3e-4  # logits spread by about 3; two orders of fp32 sums differ by some 5e-5 here
NEW_TOKENS = 12

PLANS: dict[str, dict[str, Any]] = {
    "per-projection": {},
    "fused": {"layout": "fused", "rank": 12},
    "asymmetric": {"r_c2d": 5, "r_d2c": 9, "scale": 1.7},
    "fused-asymmetric": {"layout": "fused", "r_c2d": 9, "r_d2c": 5},
    "subset": {"layers": (1, 3)},
    "query-and-value": {"targets": ("q", "v"), "layers": (0, 2, 3)},
    "fused-key-and-value": {"layout": "fused", "targets": ("k", "v"), "rank": 6},
}


@dataclass(frozen=True, eq=False)
class Split:
    """A model, a plan with A and B, M, and the merged model that the split must equal."""

    model: PreTrainedModel
    plan: Plan
    lowrank: LowRank
    matrices: Matrices
    reference: PreTrainedModel


@cache
def split_of(name: str, kind: str = "per-projection", seed: int = 0, std: float = 0.5) -> Split:
    model = model_of(name)
    plan = plan_for(model, **PLANS[kind], name=kind)
    lowrank, matrices = lowrank_for(plan, model), matrices_for(plan, seed=seed, std=std)
    return Split(model, plan, lowrank, matrices, merged(model, plan, lowrank, matrices))


model_of = cache(build)


def serve(name: str, folder: Path, engine: dict[str, Any] | None = None) -> Cloud:
    """Return a cloud with every plan of `PLANS`."""
    splits = [split_of(name, kind) for kind in PLANS]
    return Cloud(folder, [(split.plan, split.lowrank) for split in splits], engine)


@torch.no_grad()
def logits_of(model: Any, ids: list[int]) -> Tensor:
    """Return the logits at every position: ``(len(ids), vocabulary)``."""
    return model(torch.tensor([ids])).logits[0]


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=ATOL)
