"""Decode over an emulated link: a cloud process on one side, an edge process on the other.

    python -m benchmarks.over_link --presets loopback 5g wan --tokens 8
    python -m benchmarks.over_link --offer '{"name": "r16", "r_c2d": 16, "r_d2c": 16}' --plans r16

For every preset one cloud is started on its side of the link, and for every plan and prompt one edge on
the other, through their own command lines; what the edge counts is what is reported. Rates are over all
prompts of a plan: tokens after the first, over the time after it. The link's own check and what the
emulation cost meanwhile stand beside them. Prints its figures as one JSON line last.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from typing import Any

from benchmarks.link import PRESETS, Joined, Link, LinkError, end_on_sigterm, preset, say
from benchmarks.processes import CloudProcess, ProcessError, edge_json
from benchmarks.prompts import PROMPTS
from benchmarks.quiet import stolen_s

DEFAULT_PLAN = "default"  # whatever the cloud offers first
TIMEOUT_S = 600.0  # of one answer; the first one may fetch the edge's parts over the link
KEPT = (
    "prompt_tokens", "new_tokens", "time_to_first_token_s", "decode_tok_s", "round_trips_per_token",
    "bytes_up_per_token", "bytes_down_per_token",
)  # fmt: skip


def decode(link: Joined, address: str, arguments: list[str], prompt: str, tokens: int) -> dict[str, Any]:
    """Run one edge for one answer, always the likeliest token, and return what it counted."""
    figures = edge_json(
        *("generate", "--cloud", address, "--prompt", prompt, "--temperature", "0"),
        *("--max-new-tokens", str(tokens), *arguments),
        prefix=link.edge_prefix,
        timeout_s=TIMEOUT_S,
    )
    return {name: figures[name] for name in KEPT}


def together(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of several answers as if they were one, each token weighing the same."""
    runs_that_decoded = [run for run in runs if run["new_tokens"] > 1]
    decoded = [int(run["new_tokens"]) - 1 for run in runs_that_decoded]
    if not decoded:
        raise LinkError("no answer was longer than one token, so there is no rate to report")

    def per_token(name: str) -> float:
        pairs = zip(runs_that_decoded, decoded, strict=True)
        total = sum(float(run[name]) * count for run, count in pairs)
        return round(total / sum(decoded), 2)

    seconds = sum(n / run["decode_tok_s"] for run, n in zip(runs_that_decoded, decoded, strict=True))
    names = ("round_trips_per_token", "bytes_up_per_token", "bytes_down_per_token")
    return {"tok_s": round(sum(decoded) / seconds, 3), **{name: per_token(name) for name in names}}


def over(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of every plan over one link."""
    serve = [word for plan in options.offer for word in ("--plan", plan)]
    given = {
        "--wire-dtype": options.wire_dtype,
        "--draft-tokens": options.draft_tokens,
        "--adapter": options.adapter,
    }
    edge = [word for flag, value in given.items() if value is not None for word in (flag, str(value))]
    opened = Link(preset(name), options.kind)
    with opened as link:
        figures: dict[str, Any] = {"link": opened.checked, "plans": {}}
        arguments = [*serve, *options.serve]
        with CloudProcess(
            options.model, options.dtype, arguments, host=link.cloud_host, prefix=link.cloud_prefix
        ) as cloud:
            address = link.address(cloud.port)
            for plan in options.plans:
                chosen = [] if plan == DEFAULT_PLAN else ["--plan", plan]
                before, taken_s, started = link.statistics(), stolen_s(), time.perf_counter()
                runs = [
                    decode(link, address, [*chosen, *edge], prompt, options.tokens)
                    for prompt in PROMPTS[: options.prompts]
                ]
                after, seconds = link.statistics(), time.perf_counter() - started
                steal = (stolen_s() - taken_s) / (seconds * (os.cpu_count() or 1))
                result = {**together(runs), "steal": round(steal, 4)}
                if after:
                    share = (after["cpu_s"] - before["cpu_s"]) / seconds
                    late = {way: after[way]["late_ms"] for way in ("up", "down")}
                    result["emulation"] = {"cpu_share": round(share, 4), "late_ms": late}
                say(f"{name}, plan {plan}: {result}")
                figures["plans"][plan] = {**result, "runs": runs}
    return figures


def main() -> int:
    """Run the benchmark and print its figures as one JSON line last."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--presets", nargs="+", default=["loopback", "5g", "wan"], choices=tuple(PRESETS))
    parser.add_argument("--kind", default="best", choices=("best", "namespaces", "proxy"))
    parser.add_argument("--offer", action="append", default=[], help="a plan for the cloud to offer, as JSON")
    parser.add_argument("--plans", nargs="+", default=[DEFAULT_PLAN], help="names of plans to decode with")
    parser.add_argument("--prompts", type=int, default=1, help="how many of benchmarks/prompts.py")
    parser.add_argument("--tokens", type=int, default=8, help="longest answer (tokens)")
    parser.add_argument("--wire-dtype", help="what numbers travel as; the cloud's dtype by default")
    parser.add_argument("--draft-tokens", type=int, help="most tokens the edge guesses ahead")
    parser.add_argument("--adapter", help="personal weights; without, the base model")
    parser.add_argument("--serve", nargs=argparse.REMAINDER, default=[], help="further words for the cloud")
    options = parser.parse_args()
    end_on_sigterm()
    figures: dict[str, Any] = {"dtype": options.dtype, "tokens": options.tokens, "prompts": options.prompts}
    try:
        for name in options.presets:
            figures[name] = over(name, options)
    except (LinkError, ProcessError, subprocess.TimeoutExpired) as error:
        say(str(error))
        return 1
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
