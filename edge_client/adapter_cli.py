"""``privatelora-edge adapter``: list, show, use and remove adapters. Asks no cloud."""

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edge_client.flags import AsJson, Debug, one_line_errors
from shared.help_text import Commands

if TYPE_CHECKING:
    from edge_client.adapters import Entry

SHORT_DIGITS = 12  # of a fingerprint: enough to tell two apart at a glance

app = typer.Typer(
    cls=Commands,
    help="Your adapters: files of personal weights, each under a name, one of them in use.",
    no_args_is_help=True,
)

Name = Annotated[str, typer.Argument(metavar="NAME", help="As `adapter list` shows it.")]


@app.command("list")
def list_adapters(as_json: AsJson = False, debug: Debug = False) -> None:
    """Show all adapters, and which one is in use."""
    with one_line_errors(debug):
        from edge_client.adapters import AdapterStore, StoreError

        store = AdapterStore()
        try:
            used, doubt = store.in_use(), ""
        except StoreError as error:
            used, doubt = None, str(error)
        facts = [_facts(entry, used) for entry in store.entries()]
        if as_json:
            print(json.dumps(facts))
        elif facts:
            _print_table(facts)
        else:
            print(f"no adapters in {store.folder}; `privatelora-edge tune` makes one")
        if doubt:
            print(f"warning: {doubt}", file=sys.stderr)
        elif used is not None and used not in [entry["name"] for entry in facts]:
            print(f"warning: adapter {used!r} is in use, but no longer there", file=sys.stderr)


@app.command()
def show(name: Name, as_json: AsJson = False, debug: Debug = False) -> None:
    """Show all that an adapter's file says: what it was made for, and a summary of its tuning."""
    with one_line_errors(debug):
        from edge_client.adapters import AdapterStore, StoreError

        store = AdapterStore()
        entry = store.entry(name)
        if entry.problem:
            raise StoreError(f"adapter {name!r} cannot be used: {entry.problem}")
        try:
            used = store.in_use()
        except StoreError:
            used = None
        facts = _facts(entry, used, everything=True)
        if as_json:
            print(json.dumps(facts))
        else:
            _print_facts(facts)


@app.command()
def use(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="As `adapter list` shows it.")] = None,
    none: Annotated[bool, typer.Option("--none", help="Go back to the base model.")] = False,
    debug: Debug = False,
) -> None:
    """Make an adapter the one that `generate` and `chat` use when they are given none."""
    if (name is None) != none:
        raise typer.BadParameter("give either a NAME, or --none for the base model")
    with one_line_errors(debug):
        from edge_client.adapters import AdapterStore

        AdapterStore().use(name)
        print(f"in use: {name or 'the base model'}")


@app.command()
def remove(
    name: Name,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    debug: Debug = False,
) -> None:
    """Delete an adapter. It cannot be brought back."""
    with one_line_errors(debug):
        from edge_client.adapters import AdapterStore

        store = AdapterStore()
        path = store.entry(name).path
        if not yes and not _agreed(f"Delete adapter {name!r} ({path})?"):
            print("kept")
            raise typer.Exit(1)
        was_in_use = store.remove(name)
        print(f"deleted {name}" + ("; the base model is in use now" if was_in_use else ""))


def _agreed(question: str) -> bool:
    try:
        return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        print()
        return False


def _facts(entry: "Entry", used: str | None, *, everything: bool = False) -> dict[str, Any]:
    """Return an adapter as plain values; none of M."""
    facts: dict[str, Any] = {
        "name": entry.name,
        "in_use": entry.name == used,
        "path": str(entry.path),
        "size_bytes": entry.size_bytes,
    }
    if entry.adapter is None:
        return {**facts, "problem": entry.problem}
    adapter = entry.adapter
    facts |= {
        "created": adapter.created,
        "backbone": adapter.plan.backbone,
        "plan": adapter.plan.name,
        "fingerprint": adapter.fingerprint.root.hex(),
    }
    if everything:
        facts |= {
            "name_in_file": adapter.name,
            "plan": adapter.plan.model_dump(mode="json"),
            "fingerprint": {"root": adapter.fingerprint.root.hex(), **adapter.fingerprint.to_hex()},
            "parameters": sum(t.numel() for t in (*adapter.matrices.values(), *adapter.factors.values())),
            "training": dict(adapter.training) if adapter.training is not None else None,
        }
    return facts


def _print_table(facts: list[dict[str, Any]]) -> None:
    from rich.console import Console

    from edge_client.tables import Columns, print_rows

    console = Console(highlight=False, markup=False)
    # Names are there to be copied and fingerprints to be compared: neither is cut short or folded.
    columns = Columns(("", "name", "made", "base model", "plan", "fingerprint", "size"), keys=2, right=False)
    rows, broken = [], []
    for entry in facts:
        mark, name, size = "*" if entry["in_use"] else "", _shown(entry["name"]), _size(entry["size_bytes"])
        if "problem" in entry:
            rows.append((mark, name, "unusable", "", "", "", size))
            broken.append(f"{name}: {_shown(entry['problem'])}")
        else:
            made = entry["created"].replace("T", " ")[:16]
            short = entry["fingerprint"][:SHORT_DIGITS]
            backbone, plan = _shown(entry["backbone"]), _shown(entry["plan"])
            rows.append((mark, name, made, backbone, plan, short, size))
    print_rows(console, columns, rows)
    for line in broken:
        console.print(line, soft_wrap=True)
    if any(entry["in_use"] for entry in facts):
        console.print("* in use: what `generate` and `chat` take when they are given no --adapter")


def _print_facts(facts: dict[str, Any]) -> None:
    from rich.console import Console

    plan = facts["plan"]
    shared = f" with {len(plan['owner_layers'])} M" if plan["owner_layers"] else ""
    rows = {
        "name": facts["name"] + (" (in use)" if facts["in_use"] else ""),
        "name in the file": facts["name_in_file"],
        "file": facts["path"],
        "size": f"{_size(facts['size_bytes'])}, {facts['parameters']:,} parameters",
        "made": facts["created"],
        "base model": f"{plan['backbone']} ({plan['num_layers']} layers, width {plan['hidden_size']})",
        "plan": f"{plan['name']}: {len(plan['exchange_layers'])} exchanges a step ({plan['schedule']}), "
        f"{len(plan['adapted_layers'])} adapted layers{shared}, on {' '.join(plan['targets'])}",
        "ranks": f"{plan['r_c2d']} down, {plan['r_d2c']} up; {plan['layout']}, {plan['initialiser']}, "
        f"scale {plan['scale']:g}",
        **(
            {
                "on this side": f"{plan['head_layers']} + {plan['tail_layers']} layers, LoRA of rank "
                f"{plan['lora_rank']} in {len(plan['lora'])} products each"
            }
            if plan["lora"]
            else {}
        ),
        **{f"fingerprint, {part}": digest for part, digest in facts["fingerprint"].items()},
    }
    for key, value in (facts["training"] or {}).items():
        rows[f"tuning, {key}"] = value if isinstance(value, str) else json.dumps(value)
    width = max(map(len, rows)) + 2
    console = Console(highlight=False, markup=False)
    for label, value in rows.items():  # no table: it would cut a fingerprint in two
        console.print(f"{_shown(label):<{width}}{_shown(str(value))}", soft_wrap=True)


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"


def _shown(text: str) -> str:
    """Return text that cannot steer a terminal: a file may come from anyone."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
