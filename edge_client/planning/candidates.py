"""Schedules that a cloud could offer for its model: the named ones, at usual sizes."""

from collections.abc import Iterable
from typing import Any

from edge_client.planning.model_shape import ModelShape
from shared.plan import SHARING_LAYERS, Plan

GROUP_LAYERS = 8  # that one exchange serves in the grouped plan
SUBSET_EVERY = 4  # layers, of which one is adapted in the subset plan


def candidates(offered: Iterable[Plan], shape: ModelShape, rank: int = 64) -> list[Plan]:
    """Return the named schedules for the offered plans' model that are not among these plans.

    ``per-layer``, ``subset`` (every fourth layer), ``grouped`` (an exchange every eight layers, for all up to
    the next), ``one-trip`` (`Plan.one_trip`) and ``one-trip-shared`` (`SHARING_LAYERS` to an M), all with one
    A·M·B per projection of ``rank``.
    """
    plans = list(offered)
    layers = shape.num_layers
    facts: dict[str, Any] = {
        "backbone": plans[0].backbone, "num_layers": layers, "hidden_size": shape.hidden_size, "rank": rank,
    }  # fmt: skip
    every = tuple(range(layers))
    named = [
        Plan.subset(name="per-layer", **facts),
        Plan.subset(every[::SUBSET_EVERY], name="subset", **facts),
        Plan.subset(every, exchange_layers=every[::GROUP_LAYERS], name="grouped", **facts),
    ]
    if layers > 2:
        named.append(Plan.one_trip(shape.products, name="one-trip", **facts))
        facts["share_residual_codes"] = SHARING_LAYERS
        named.append(Plan.one_trip(shape.products, name="one-trip-shared", **facts))
    seen, found = {_costs(plan) for plan in plans}, []
    for plan in named:
        if _costs(plan) not in seen:
            seen.add(_costs(plan))
            found.append(plan)
    return found


def _costs(plan: Plan) -> tuple[object, ...]:
    """Return everything about a plan that time and memory depend on."""
    return (
        plan.exchange_layers, plan.adapted_layers, plan.owners, plan.head_layers, plan.tail_layers,
        plan.codes_width, plan.residual_width, plan.lora_rank, len(plan.lora),
    )  # fmt: skip
