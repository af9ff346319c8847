"""What tuning has reached under a plan: held-out figures, kept in ``quality.json`` with their source.

The file is written by ``python -m benchmarks.plan_quality`` from the record of runs. What is not in it was
not measured, and is said to be so.
"""

import statistics
from functools import cache
from importlib.resources import files
from typing import Literal

from pydantic import BaseModel, Field, TypeAdapter

from edge_client.planning.candidates import effect, schedules
from edge_client.planning.speeds import FROZEN
from shared.plan import Plan, Projection

Layout = Literal["per_projection", "fused"]
Schedule = Literal["subset", "grouped", "one_trip", "one_trip_shared", "one_trip_lean", "resident"]


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
    layout: Layout | Schedule = Field(
        description="A layout is that of a plan in which every layer exchanges; else a named schedule"
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


def known(plan: Plan, products: tuple[Projection, ...]) -> tuple[Quality, ...]:
    """Return what was measured under this very plan; nothing if nothing was.

    Parameters
    ----------
    plan
        Any.
    products
        Of a layer of its model: where layers stay on the edge, all of them had a LoRA.
    """
    layout = layout_of(plan, products)
    found = [q for q in table() if (q.backbone, q.layout) == (plan.backbone, layout)]
    if plan.adapted_layers:
        found = [q for q in found if (q.rank, q.initialiser) == (plan.r_c2d, plan.initialiser)]
        if plan.scale != 1:
            found = []
    return tuple(found)


def layout_of(plan: Plan, products: tuple[Projection, ...]) -> str | None:
    """Return what the record calls a plan that is a named schedule at some rank; None of any other."""
    named = schedules(
        products, backbone=plan.backbone, num_layers=plan.num_layers, hidden_size=plan.hidden_size,
        rank=plan.r_c2d,
    )  # fmt: skip
    for name, one in named.items():
        if effect(one) == effect(plan):
            return "per_projection" if name == "per-layer" else name.replace("-", "_")
    return None
