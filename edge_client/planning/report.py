"""Predictions and a recommendation as plain values, and as people read them."""

from typing import Any

from rich.console import Console

from edge_client.plain import printable
from edge_client.planning.network import called
from edge_client.planning.predict import Setting, UnknownSpeedError, predict
from edge_client.planning.quality import known
from edge_client.planning.recommend import recommend
from edge_client.planning.survey import Survey
from edge_client.tables import Columns, print_rows

NOT_MEASURED = "not measured"
COLUMNS = Columns(
    (
        *("plan", "tok/s", "first,\ns", "prefill,\ntok/s", "trips", "kB up", "kB down", "MiB", "GFLOP"),
        *("share", "J"),
    )
)


def document(survey: Survey, setting: Setting, memory_bytes: int | None = None) -> dict[str, Any]:
    """Return every prediction, what it rests on, and the recommendation, as plain values.

    Names carry their units; see the models of `edge_client.planning` for each.
    """
    plans, left_out = [], []
    for plan, offered in [*((p, True) for p in survey.offered), *((p, False) for p in survey.possible)]:
        try:
            plans.append((plan, predict(plan, setting, offered=offered)))
        except UnknownSpeedError as error:
            left_out.append(str(error))
    # A name that is offered wins over one that only could be.
    quality = {plan.name: known(plan, survey.shape.products) for plan, _ in reversed(plans)}
    chosen = recommend([found for _, found in plans], quality, memory_bytes)
    return {
        "cloud": survey.cloud_address,
        "link": setting.link.model_dump(),
        "measured_link": survey.link.model_dump(),
        "setting": setting.model_dump(mode="json"),
        "plans": [
            {
                **found.model_dump(),
                "edge_memory_bytes": found.edge.memory_bytes,
                "quality": [one.model_dump() for one in measured] or NOT_MEASURED,
                "quality_line": "; ".join(one.line() for one in measured) or NOT_MEASURED,
            }
            for found, measured in ((found, known(plan, survey.shape.products)) for plan, found in plans)
        ],
        "left_out": left_out,
        "recommended": chosen.plan,
        "reasons": list(chosen.reasons),
    }


def show(found: dict[str, Any]) -> None:
    """Print a document for people."""
    console = Console(highlight=False, markup=False)
    link = found["link"]
    console.print(
        f"{found['cloud']} over {called(link['name'])}: {1e3 * link['rtt_s']:.3g} ms round trip, "
        f"{_rate(link['up_bit_s'])} up, {_rate(link['down_bit_s'])} down",
        soft_wrap=True,
    )
    setting = found["setting"]
    rows = [
        (
            printable(plan["plan"]) + ("" if plan["offered"] else " *"),
            f"{plan['decode_tok_s']:.2f}",
            f"{plan['time_to_first_token_s']:.2f}",
            f"{plan['prefill_tok_s']:.0f}",
            f"{plan['round_trips_per_token']:.3g}",
            f"{plan['bytes_up_per_token'] / 1e3:.1f}",
            f"{plan['bytes_down_per_token'] / 1e3:.1f}",
            f"{plan['edge_memory_bytes'] / 2**20:.0f}",
            f"{plan['edge']['flops_per_token'] / 1e9:.3f}",
            f"{plan['edge']['backbone_share']:.0%}",
            f"{plan['energy_per_token_j']:.2f}",
        )
        for plan in found["plans"]
    ]
    print_rows(console, COLUMNS, rows, "predictions (* could be offered, is not)")
    drafting, power = setting["drafting"], setting["power"]
    console.print(
        f"First token of {setting['prompt_tokens']} tokens; {drafting['tokens_per_step']:g} tokens a step of "
        f"{drafting['positions']} positions. Trips, bytes, operations and energy are for one decoded token; "
        "memory, operations (share: of the backbone's) and energy are this side's. Energy assumes "
        f"{power['busy_w']:g} W while computing and {power['idle_w']:g} W while waiting.",
        soft_wrap=True,
    )
    for plan in found["plans"]:
        if plan["offered"]:
            said = plan["quality_line"]
            console.print(f"quality of {printable(plan['plan'])}: {said}", soft_wrap=True)
    for line in found["left_out"]:
        console.print(printable(line), soft_wrap=True)
    console.print(f"recommended: {printable(str(found['recommended'] or 'none'))}", soft_wrap=True)
    for reason in found["reasons"]:
        console.print(f"  {printable(reason)}", soft_wrap=True)


def _rate(bit_s: float | None) -> str:
    return "no bound found" if bit_s is None else f"{bit_s / 1e6:.3g} Mbit/s"
