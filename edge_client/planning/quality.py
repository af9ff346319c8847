"""What tuning has reached under a plan: held-out figures, kept in ``quality.json`` with their source.

The file is written by ``python -m benchmarks.plan_quality`` from the record of runs. What is not in it was
not measured, and is said to be so.
"""

import statistics
from functools import cache
from importlib.resources import files
from typing import Literal

from pydantic import BaseModel, Field, TypeAdapter

from edge_client.planning.speeds import FROZEN
from shared.plan import SHARING_LAYERS, Plan


class Scored(BaseModel):
    """One tuned seed on a test set."""

    model_config = FROZEN

    seed: int
    nats: float = Field(description="Mean negative log likelihood of the answer (nats)")
    correct: int = Field(description="Rows whose right label is the likeliest (count)")


class Quality(BaseModel):
    """What one plan reached on one task."""

    model_config = FROZEN

    backbone: str
    layout: Literal["per_projection", "fused", "one_trip", "one_trip_shared"] = Field(
        description="one_trip: the plan of `Plan.one_trip`, shared: with layers that share an M; else every "
        "layer exchanging, in this layout"
    )
    rank: int = Field(description="Of codes and residual codes (elements)")
    initialiser: str
    task: str
    rows: int = Field(description="Test rows (count)")
    steps: int = Field(description="Optimiser steps (count)")
    batch: int = Field(description="Examples a step (count)")
    lr: float = Field(description="Learning rate, chosen on validation rows")
    seeds: tuple[Scored, ...]
    source: str = Field(description="Where the runs are recorded")

    def line(self) -> str:
        """Return the figure in a few words."""
        nats = [run.nats for run in self.seeds]
        right = statistics.mean(run.correct for run in self.seeds) / self.rows
        spread = f" ({min(nats):.2f} to {max(nats):.2f})" if len(nats) > 1 else ""
        amount = f"{self.steps} steps of {self.batch}, {len(nats)} seed" + ("s" if len(nats) > 1 else "")
        return f"{self.task} {statistics.mean(nats):.2f} nats{spread}, {right:.1%} right ({amount})"


@cache
def table() -> tuple[Quality, ...]:
    """Return every figure that was measured."""
    text = (files("edge_client.planning") / "quality.json").read_text("utf-8")
    return TypeAdapter(tuple[Quality, ...]).validate_json(text)


def known(plan: Plan) -> tuple[Quality, ...]:
    """Return what was measured under this very plan; nothing if nothing was."""
    if plan.r_c2d != plan.r_d2c or plan.scale != 1 or len(plan.targets) != 3:
        return ()
    if plan.schedule == "per_layer":
        layout: str = plan.layout
    elif is_one_trip(plan):
        layout = "one_trip"
    elif is_one_trip(plan, SHARING_LAYERS):
        layout = "one_trip_shared"
    else:
        return ()
    key = (plan.backbone, layout, plan.r_c2d, plan.initialiser)
    return tuple(q for q in table() if (q.backbone, q.layout, q.rank, q.initialiser) == key)


def is_one_trip(plan: Plan, sharing: int = 1) -> bool:
    """Whether this is what `Plan.one_trip` makes, with its own LoRA and so many layers to an M."""
    if not plan.lora or plan.num_layers < 2:
        return False
    made = Plan.one_trip(
        plan.lora, name=plan.name, backbone=plan.backbone, num_layers=plan.num_layers,
        hidden_size=plan.hidden_size, rank=plan.r_c2d, initialiser=plan.initialiser,
        share_residual_codes=sharing,
    )  # fmt: skip
    return made == plan
