"""The paper's estimates beside what links with latency make of the same plan, as values and for people."""

from typing import Any

from rich.console import Console

from edge_client.planning.network import LINKS
from edge_client.planning.paper import PAPER_LINK, PAPER_MODELS, estimate
from edge_client.tables import Columns, print_rows

WITH_LATENCY = tuple(link for link in LINKS.values() if link.rtt_s)


def document() -> dict[str, Any]:
    """Return each model's published figure, the formula's, and those over real links (tokens/s)."""
    return {
        "models": [
            {
                **model.model_dump(),
                "rank": 64,
                "reproduced": estimate(model).model_dump(),
                "with_hidden_states": estimate(model, with_hidden=True).model_dump(),
                "over_links": [estimate(model, link, with_hidden=True).model_dump() for link in WITH_LATENCY],
            }
            for model in PAPER_MODELS
        ],
        "paper_link": PAPER_LINK.model_dump(),
    }


def show(found: dict[str, Any]) -> None:
    """Print a document for people."""
    console = Console(highlight=False, markup=False)
    links = [f"{link.name},\n{1e3 * link.rtt_s:g} ms" for link in WITH_LATENCY]
    columns = Columns(("model", "paper", "its\nformula", "with\nh0, hL", "trips", *links))
    rows = [
        (
            model["name"],
            f"{model['published_tok_s']:g}",
            f"{model['reproduced']['tok_s']:.1f}",
            f"{model['with_hidden_states']['tok_s']:.1f}",
            str(model["reproduced"]["round_trips"]),
            *(f"{over['tok_s']:.2f}" for over in model["over_links"]),
        )
        for model in found["models"]
    ]
    print_rows(console, columns, rows, "tok/s at r = 64, every layer exchanging, batch 1")
    console.print(
        "The paper (arXiv 2311.14030) counts no latency: A100 80G, iPhone 13 Pro Max, fp16, 60 Mbit/s up "
        "and 100 down. Each layer exchanges one after the other, so a real link's round-trip time counts as "
        "often as there are layers.",
        soft_wrap=True,
    )
