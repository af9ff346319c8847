"""What a cloud offers, as ``privatelora-edge info`` shows it. Nothing but a `Describe` is sent."""

from typing import Any

from rich.console import Console
from rich.table import Table

from edge_client.config import EdgeConfig
from edge_client.connection import Connection, Timeouts
from edge_client.credentials import Credentials
from edge_client.offer import CloudOffer
from edge_client.plain import printable
from shared import PROTOCOL_VERSION, __version__
from shared.wire import WIRE_DTYPES, dtype_name


def describe(settings: EdgeConfig) -> dict[str, Any]:
    """Return what the cloud states, checked for contradictions, as plain values."""
    timeouts = Timeouts(settings.connect_timeout_s, settings.step_timeout_s)
    connection = Connection(settings.cloud, timeouts, Credentials.of(settings))
    try:
        described = connection.describe()
        offer = CloudOffer.check(connection.target, described)
    finally:
        connection.close()
    return {
        "cloud": offer.target,
        "server_version": printable(offer.server_version),
        "edge_version": __version__,
        "protocol_version": PROTOCOL_VERSION,
        "compute_dtype": dtype_name(WIRE_DTYPES[offer.compute_dtype]),
        "limits": vars(offer.limits),
        "kv_bytes_used": offer.kv_bytes_used,
        "kv_bytes_total": offer.kv_bytes_total,
        "plans": [
            {
                **plan.model_dump(mode="json"),
                "round_trips": plan.round_trips,
                "fingerprint": {"root": p.root.hex(), **p.to_hex()},
            }
            for plan, p in offer.plans.values()
        ],
        "edge_parts": [
            {"name": part.name, "bytes": part.size, "sha256": part.sha256.hex()} for part in offer.parts
        ],
    }


def show(facts: dict[str, Any]) -> None:
    """Print the facts for people."""
    console = Console(highlight=False, markup=False)
    limits = facts["limits"]
    console.print(
        f"{facts['cloud']}: version {facts['server_version']} (this edge: {facts['edge_version']}), "
        f"protocol {facts['protocol_version']}, computes in {facts['compute_dtype']}",
        soft_wrap=True,
    )
    console.print(
        f"context {limits['max_context_tokens']} tokens, {limits['max_rows']} rows a session, "
        f"{limits['max_step_tokens']} tokens a step; KV cache {facts['kv_bytes_used'] / 2**20:.1f} of "
        f"{facts['kv_bytes_total'] / 2**20:.1f} MiB in use",
        soft_wrap=True,
    )
    for plan in facts["plans"]:
        table = Table(title=f"plan {printable(plan['name'])}", title_justify="left", show_header=False)
        exchanging, adapted = plan["exchange_layers"], plan["adapted_layers"]
        shared = f" with {len(plan['owner_layers'])} M" if plan["owner_layers"] else ""
        table.add_row("backbone", printable(plan["backbone"]))
        own = plan["head_layers"] + plan["tail_layers"]
        here = f", {own} of them on this side" if own else ""
        table.add_row("layers", f"{plan['num_layers']}, width {plan['hidden_size']}{here}")
        table.add_row(
            "exchanges",
            f"{len(exchanging)} a step ({plan['schedule']}), {len(adapted)} adapted layers{shared}",
        )
        table.add_row("round trips", f"{plan['round_trips']} a token")
        table.add_row(
            "ranks", f"{plan['r_c2d']} down, {plan['r_d2c']} up; {plan['layout']}, {plan['initialiser']}"
        )
        console.print(table)
        console.print(f"fingerprint {plan['fingerprint']['root']}", soft_wrap=True)
    total = sum(part["bytes"] for part in facts["edge_parts"])
    console.print(f"edge parts: {len(facts['edge_parts'])} files, {total / 2**20:.1f} MiB, fetched once")
