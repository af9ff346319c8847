"""Schedules that a cloud could offer for its model: the named ones, at usual sizes."""

from collections.abc import Iterable, Mapping
from typing import Any

from edge_client.planning.model_shape import ModelShape
from shared.plan import SHARING_LAYERS, Plan, Projection

GROUP_LAYERS = 8  # that one exchange serves in the grouped plan
SUBSET_EVERY = 4  # layers, of which one is adapted in the subset plan
LEAN: Any = {"tail": False, "layout": "fused", "share_residual_codes": SHARING_LAYERS}  # fewest bytes


def schedules(products: tuple[Projection, ...], *, num_layers: int, **facts: Any) -> Mapping[str, Plan]:
    """Return a plan of every named schedule.

    ``per-layer`` and ``fused`` (one A·M·B for q|k|v; the others have one per projection), ``subset`` (every
    fourth layer), ``grouped`` (an exchange every eight layers, for all up to the next), ``one-trip``
    (`Plan.one_trip`), ``one-trip-shared`` (`SHARING_LAYERS` to an M), ``one-trip-lean`` (that, fused and
    without a tail on the edge), ``resident`` (the layers of ``one-trip`` on the edge, and nothing for those
    in between). The last four need three layers, and products.

    Parameters
    ----------
    products
        Of a layer, for LoRA; may be none.
    num_layers
        Of the whole model (count).
    facts
        As `Plan.subset` takes them.
    """
    facts["num_layers"] = num_layers
    every = tuple(range(num_layers))
    named = [
        Plan.subset(name="per-layer", **facts),
        Plan.subset(name="fused", layout="fused", **facts),
        Plan.subset(every[::SUBSET_EVERY], name="subset", **facts),
        Plan.subset(every, exchange_layers=every[::GROUP_LAYERS], name="grouped", **facts),
    ]
    if num_layers > 2 and products:
        trip = Plan.one_trip(products, name="one-trip", **facts)
        sides: dict[str, Any] = trip.model_dump(include={"head_layers", "tail_layers", "lora_rank"})
        named += [
            trip,
            Plan.one_trip(products, name="one-trip-shared", share_residual_codes=SHARING_LAYERS, **facts),
            Plan.one_trip(products, name="one-trip-lean", **LEAN, **facts),
            Plan.subset((), name="resident", lora=products, **sides, **facts),
        ]
    return {plan.name: plan for plan in named}


def candidates(offered: Iterable[Plan], shape: ModelShape, rank: int = 64) -> list[Plan]:
    """Return the named schedules for the offered plans' model that are not among these plans."""
    plans = list(offered)
    named = schedules(
        shape.products,
        num_layers=shape.num_layers,
        backbone=plans[0].backbone,
        hidden_size=shape.hidden_size,
        rank=rank,
    )
    seen = {effect(plan) for plan in plans}
    return [plan for plan in named.values() if effect(plan) not in seen]


def effect(plan: Plan) -> str:
    """Return all of a plan that time, memory and quality depend on, once A and B are given.

    Where nothing is adapted, codes have no width.
    """
    without = {"name", "initialiser", "scale"}
    if not plan.adapted_layers:
        without |= {"r_c2d", "r_d2c", "layout", "targets"}
    in_order = tuple(sorted(plan.lora, key=lambda product: product.name))  # a checkpoint's is another
    return plan.model_copy(update={"lora": in_order}).model_dump_json(exclude=without)
