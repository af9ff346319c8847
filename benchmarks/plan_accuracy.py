"""Are predictions right: ``privatelora-edge plan``, calibrated once on loopback, against decoding over links.

    python -m benchmarks.plan_accuracy --presets loopback 5g wan --tokens 16

One cloud is started on loopback, and the plan command measures it and this side there. From that alone the
speed of every plan over every preset is predicted; then `benchmarks.over_link` measures them, undrafted.
The aim is an error of at most 15 % each. Prints its figures as one JSON line last.
"""

import argparse
import json
import subprocess
import sys
from typing import Any

from benchmarks.link import PRESETS, LinkError, end_on_sigterm, say
from benchmarks.over_link import over
from benchmarks.processes import CloudProcess, ProcessError, edge_json
from edge_client.planning.network import LINKS
from edge_client.planning.predict import Setting, predict
from shared.plan import SHARING_LAYERS, Plan

AIM = 0.15
OFFERS: dict[str, dict[str, Any]] = {
    "per-layer": {},
    "fused": {"layout": "fused"},
    "grouped": {"exchange_layers": [0, 8, 16, 24]},
    "subset": {"layers": [0, 8, 16, 24]},
    "one-trip": {"one_trip": True},
    "one-trip-shared": {"one_trip": True, "share_residual_codes": SHARING_LAYERS},
    "one-trip-lean": {
        "one_trip": True, "edge_tail": False, "layout": "fused", "share_residual_codes": SHARING_LAYERS
    },
    "resident": {"head_layers": 2, "tail_layers": 2},
}  # fmt: skip


def calibrate(options: argparse.Namespace) -> tuple[Setting, dict[str, Plan]]:
    """Return what the plan command measures on loopback, and the offered plans."""
    serve = [word for offer in options.offer for word in ("--plan", offer)]
    with CloudProcess(options.model, options.dtype, [*serve, *options.serve]) as cloud:
        wire = [] if options.wire_dtype is None else ["--wire-dtype", options.wire_dtype]
        found = edge_json("plan", "--cloud", cloud.address, "--link", "loopback", *wire)
        offered = edge_json("info", "--cloud", cloud.address)["plans"]
    say(f"calibrated on loopback: cloud {found['setting']['cloud']}, edge {found['setting']['edge']}")
    return Setting.model_validate(found["setting"]), {plan.name: plan for plan in map(plan_of, offered)}


def plan_of(facts: dict[str, Any]) -> Plan:
    """Return the plan of which ``privatelora-edge info`` prints these facts, among others."""
    return Plan.model_validate({name: fact for name, fact in facts.items() if name in Plan.model_fields})


def compared(predicted: float, measured: float) -> dict[str, float]:
    """Return both speeds (tokens/s) and how far the prediction is off, as a share of what was measured."""
    off = predicted / measured - 1
    return {"predicted": round(predicted, 3), "measured": measured, "error": round(off, 4)}


def main() -> int:
    """Run the benchmark and print its figures as one JSON line last."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--presets", nargs="+", default=list(PRESETS), choices=tuple(PRESETS))
    parser.add_argument("--kind", default="best", choices=("best", "namespaces", "proxy"))
    parser.add_argument(
        "--offer", action="append", help="a plan to offer, as JSON; the named ones by default"
    )
    parser.add_argument("--prompts", type=int, default=1, help="how many of benchmarks/prompts.py")
    parser.add_argument("--tokens", type=int, default=16, help="longest answer (tokens)")
    parser.add_argument("--wire-dtype", help="what numbers travel as; the cloud's dtype by default")
    parser.add_argument("--serve", nargs=argparse.REMAINDER, default=[], help="further words for the cloud")
    options = parser.parse_args()
    options.offer = options.offer or [json.dumps({"name": name, **fields}) for name, fields in OFFERS.items()]
    options.plans = [json.loads(offer)["name"] for offer in options.offer]
    options.draft_tokens, options.adapter = 0, None  # what drafting yields is the text's, not the plan's
    end_on_sigterm()
    figures: dict[str, Any] = {"dtype": options.dtype, "tokens": options.tokens, "prompts": options.prompts}
    errors: list[float] = []
    try:
        setting, plans = calibrate(options)
        figures["calibration"] = setting.model_dump(mode="json", include={"cloud", "edge"})
        for name in options.presets:
            measured = over(name, options)
            figures[name] = {"link": measured["link"], "plans": {}}
            for plan in options.plans:
                there = setting.model_copy(update={"link": LINKS[name]})
                found = compared(predict(plans[plan], there).decode_tok_s, measured["plans"][plan]["tok_s"])
                figures[name]["plans"][plan] = {**found, "steal": measured["plans"][plan]["steal"]}
                errors.append(abs(found["error"]))
                say(f"{name}, plan {plan}: {found}")
    except (LinkError, ProcessError, subprocess.TimeoutExpired) as error:
        say(str(error))
        return 1
    figures["worst_error"], figures["aim"] = max(errors), AIM
    figures["within_aim"] = f"{sum(error <= AIM for error in errors)} of {len(errors)}"
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
