"""A ranking as plain values, as people read it, and as what to do next."""

import json
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from edge_client.plain import printable
from edge_client.ranking import Border, Estimate, PlanWorth, Ranking, border, choose_layers
from edge_client.tables import Columns, print_rows
from edge_client.wire_cost import wire_cost
from shared.plan import Plan
from shared.wire_dtypes import WireDtypes

CHANCE = "*"  # marks what two standard errors do not tell from nothing


def advice(
    ranking: Ranking, plan: Plan, offered: Sequence[Plan], round_trips: int, dtypes: WireDtypes, data: Path
) -> dict[str, Any] | None:
    """Return the subset plan of the best layers, and the commands that serve it and tune under it.

    Parameters
    ----------
    ranking
        Of the layers of ``plan``, whose ranks, layout and initialiser the new plan has.
    offered
        Plans that the cloud has: where the new plan is one of them there is nothing to serve.
    round_trips
        At most so many a token.
    dtypes
        What tensors travel in.
    data
        The data file.

    Returns
    -------
    dict
        None if no layer helps.
    """
    layers = choose_layers(ranking, round_trips)
    if not layers:
        return None
    made = Plan.subset(
        layers,
        name=_name(f"best-{len(layers)}-r{plan.r_c2d}", {one.name for one in offered}),
        backbone=plan.backbone,
        num_layers=plan.num_layers,
        hidden_size=plan.hidden_size,
        r_c2d=plan.r_c2d,
        r_d2c=plan.r_d2c,
        layout=plan.layout,
        initialiser=plan.initialiser,
        targets=plan.targets,
        scale=plan.scale,
    )
    same = next((one for one in offered if one.model_copy(update={"name": made.name}) == made), None)
    # As `privatelora-cloud serve --plan` reads it; everything is said, so that no default matters.
    served = {
        "name": made.name,
        "r_c2d": made.r_c2d,
        "r_d2c": made.r_d2c,
        "layout": made.layout,
        "initialiser": made.initialiser,
        "layers": list(layers),
        "scale": made.scale,
    }
    return {
        **_cost(made, dtypes),
        "layers": list(layers),
        "serve_plan": None if same else served,
        "serve": None if same else f"privatelora-cloud serve --plan {shlex.quote(json.dumps(served))}",
        "tune": f"privatelora-edge tune --data {shlex.quote(str(data))} --plan {(same or made).name}",
        "border": _border(border(ranking, layers)),
    }


def _name(wanted: str, taken: set[str]) -> str:
    """Return a name that no plan has yet."""
    number = 2
    name = wanted
    while name in taken:
        name, number = f"{wanted}-{number}", number + 1
    return name


def _border(found: Border | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {
        "last_in": found.last_in,
        "first_out": found.first_out,
        **_estimate("difference", found.difference),
    }


def layer_rows(ranking: Ranking) -> list[dict[str, Any]]:
    """Return a ranking's layers as plain values, in its order."""
    return [
        {"layer": one.layer, **_estimate("worth", one.worth), "gradient_norm": one.gradient}
        for one in ranking.layers
    ]


def plan_rows(found: Sequence[PlanWorth], dtypes: WireDtypes) -> list[dict[str, Any]]:
    """Return plans as plain values, the lowest loss first."""
    return [
        {
            "plan": one.plan.name,
            "schedule": one.plan.schedule,
            "adapted_layers": len(one.plan.adapted_layers),
            **_estimate("loss", one.after),
            **_estimate("gain", one.gain),
            **_cost(one.plan, dtypes),
            "lr": one.lr,
        }
        for one in sorted(found, key=lambda one: (one.after.nats, one.plan.round_trips))
    ]


def _cost(plan: Plan, dtypes: WireDtypes) -> dict[str, int]:
    cost = wire_cost(plan, dtypes)
    return {
        "round_trips_per_token": cost.round_trips,
        "bytes_up_per_token": cost.up,
        "bytes_down_per_token": cost.down,
    }


def _estimate(name: str, found: Estimate) -> dict[str, Any]:
    return {
        f"{name}_nats_per_token": found.nats,
        f"{name}_error": found.error,
        **({} if name == "loss" else {f"{name}_beyond_chance": found.is_beyond_chance}),
    }


# --- for people ---------------------------------------------------------------------------------------


def show(found: dict[str, Any]) -> None:
    """Print a document (see `edge_client.rank_cli`) for people."""
    console = Console(highlight=False, markup=False)
    rows, tokens = found["held_out_rows"], found["held_out_tokens"]
    console.print(
        f"judged on {rows:,} rows held out ({tokens:,} tokens to predict); without tuning "
        f"{found['untuned_nats_per_token']:.4f} nats per token",
        soft_wrap=True,
    )
    _show_layers(console, found)
    if found["plans"]:
        _show_plans(console, found)
    for line in found["left_out"]:
        console.print(printable(line), soft_wrap=True)
    console.print(
        f"± is one standard error over these rows, of one run with one seed; {CHANCE} is within two of zero. "
        "Rows that chose a plan flatter it: judge what you tune by others.",
        soft_wrap=True,
    )
    _show_advice(console, found)


def _show_layers(console: Console, found: dict[str, Any]) -> None:
    console.print(
        f"layers of plan {printable(found['layers_of'])}, {printable(found['weights'])} "
        f"({found['layers_nats_per_token']:.4f} nats per token with all)",
        soft_wrap=True,
    )
    rows = [
        (str(row["layer"]), *_shown(row, "worth"), f"{row['gradient_norm']:.3g}") for row in found["layers"]
    ]
    print_rows(console, Columns(("layer", "worth, nats/token", "±", "gradient at M = 0")), rows)


def _show_plans(console: Console, found: dict[str, Any]) -> None:
    console.print(f"plans, each after the same {found['steps']} steps", soft_wrap=True)
    columns = ("plan", "nats/token", "gained", "±", "trips", "kB up", "kB down", "adapted", "rate")
    rows = [
        (
            printable(row["plan"]),
            f"{row['loss_nats_per_token']:.4f}",
            *_shown(row, "gain"),
            str(row["round_trips_per_token"]),
            f"{row['bytes_up_per_token'] / 1e3:.1f}",
            f"{row['bytes_down_per_token'] / 1e3:.1f}",
            str(row["adapted_layers"]),
            f"{row['lr']:g}",
        )
        for row in found["plans"]
    ]
    print_rows(console, Columns(columns), rows)


def _shown(row: dict[str, Any], name: str) -> tuple[str, str]:
    """Return a figure and its error, with as many places as the error allows."""
    nats, error = row[f"{name}_nats_per_token"], row[f"{name}_error"]
    mark = " " if row[f"{name}_beyond_chance"] else CHANCE
    places = 4 if not error else min(9, max(2, 1 - math.floor(math.log10(error))))
    return f"{nats:+.{places}f}{mark}", "-" if error is None else f"{error:.{places}f}"


def _show_advice(console: Console, found: dict[str, Any]) -> None:
    best = found["recommended"]
    if not found["layers_stand_alone"]:
        return  # it is said above why there is no advice
    if best is None:
        console.print(
            "no layer helps on the rows held out, so no plan is made of any: give more --steps, or more rows",
            soft_wrap=True,
        )
        return
    layers = ", ".join(map(str, best["layers"]))
    free = "; layer 0 costs no round trip" if 0 in best["layers"] else ""
    console.print(
        f"best layers for {found['round_trips']} round trips a token: {layers} "
        f"({best['round_trips_per_token']} trips{free}). To use them:",
        soft_wrap=True,
    )
    for line in (best["serve"], best["tune"]):  # unwrapped, to be copied
        if line is not None:
            console.print(f"  {printable(line)}", soft_wrap=True)
    edge = best["border"]
    if edge is not None and not edge["difference_beyond_chance"]:
        console.print(
            f"layers {edge['last_in']} (taken) and {edge['first_out']} (not) cannot be told apart on these "
            "rows",
            soft_wrap=True,
        )
