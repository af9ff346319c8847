"""Options that benchmarks over links share: what edges, clouds and whole models are told."""

import argparse
import json
import re
from collections.abc import Sequence

from benchmarks.link import PRESETS, Preset, preset
from benchmarks.plan_accuracy import OFFERS

KINDS = ("", "hidden_", "codes_", "residual_codes_")  # of tensors, as settings name their wire dtypes
KEEPS_WINDOW = "+window"
SWEPT = re.compile(r"rtt(\d+)")


def link_named(name: str) -> Preset:
    """Return a preset, or for ``rtt40`` the link of 5g and wan with that round-trip time (milliseconds).

    ``wan+window`` is wan between hosts that keep TCP's window through a pause.
    """
    plain = name.removesuffix(KEEPS_WINDOW)
    if plain != name:
        return link_named(plain).model_copy(update={"name": name, "keeps_window": True})
    swept = SWEPT.fullmatch(name)
    if swept is None:
        return preset(name)
    wan = PRESETS["wan"]
    return Preset(name=name, rtt_ms=int(swept[1]), up_mbit_s=wan.up_mbit_s, down_mbit_s=wan.down_mbit_s)


def add_edge_options(parser: argparse.ArgumentParser) -> None:
    """Add what every such benchmark takes."""
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--kind", default="best", choices=("best", "namespaces", "proxy"), help="of link")
    parser.add_argument("--offer", action="append", default=[], help="one more plan, as JSON with a name")
    for kind in KINDS:
        parser.add_argument(f"--{kind.replace('_', '-')}wire-dtype", help="what tensors travel as")
    parser.add_argument("--adapter", help="personal weights; without, M = 0")
    parser.add_argument("--threads", type=int, help="torch threads of each process; all cores by default")
    parser.add_argument("--label", default="default", help="what the run is called in the record")


def offers_of(
    parser: argparse.ArgumentParser, options: argparse.Namespace, wanted: Sequence[str]
) -> dict[str, str]:
    """Return the plans that can be asked for, as JSON by name; end the program if a wanted one is missing."""
    offers = {name: json.dumps({"name": name, **fields}) for name, fields in OFFERS.items()}
    offers |= {json.loads(offer)["name"]: offer for offer in options.offer}
    unknown = [plan for plan in wanted if plan not in offers]
    if unknown:
        parser.error(f"no plan is called {unknown[0]!r}: give it by --offer, or one of {', '.join(offers)}")
    return offers


def edge_words(options: argparse.Namespace, plan: str) -> list[str]:
    """Return the arguments of an edge's driver."""
    given = {"--plan": plan, "--threads": options.threads, "--adapter": options.adapter}
    for kind in KINDS:
        given[f"--{kind.replace('_', '-')}wire-dtype"] = getattr(options, f"{kind}wire_dtype")
    return [word for flag, value in given.items() if value is not None for word in (flag, str(value))]


def cloud_words(options: argparse.Namespace, plans: Sequence[str]) -> list[str]:
    """Return the further arguments of a cloud that offers these plans."""
    offers = [word for plan in plans for word in ("--plan", options.offers[plan])]
    return [*offers, *_threads(options), *options.serve]


def whole_words(options: argparse.Namespace) -> list[str]:
    """Return the arguments of a driver that runs the whole model."""
    return ["--plain", options.model, "--dtype", options.dtype, *_threads(options)]


def wire_of(options: argparse.Namespace) -> str:
    """Return what tensors travel as, in one word: ``bfloat16+residual_codes=int8``."""
    own = {kind: getattr(options, f"{kind}wire_dtype") for kind in KINDS[1:]}
    said = [f"{kind.rstrip('_')}={dtype}" for kind, dtype in own.items() if dtype is not None]
    return "+".join([options.wire_dtype or options.dtype, *said])


def _threads(options: argparse.Namespace) -> list[str]:
    return [] if options.threads is None else ["--threads", str(options.threads)]
