"""Claim: coarse numbers on the wire, and layers that share an M, cost little of what tuning has reached.

Tunes a plan through a real cloud with the edge's own ``tune`` command, once, then scores the same test rows
over the wire for each way that tensors may travel. Rows are the same, so the codecs compare pair by pair:
the last column is the mean difference to float32 with its standard error.

    python -m benchmarks.codec_quality run --plans one-trip-r64 shared-4
    python -m benchmarks.codec_quality table

Every scored (plan, codec) is a line of ``benchmarks/codec_runs.jsonl`` and is not scored twice; adapters are
kept in the user's cache. Nothing here is timed.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoTokenizer

from benchmarks.datasets import MAX_WORDS, by_digest, load
from benchmarks.processes import CloudProcess, ProcessError, run_edge
from benchmarks.quality import wilson
from benchmarks.tuning_learner import Example, encode
from edge_client.model import PrivateLoraForCausalLM
from edge_client.wire_cost import wire_cost
from shared.cache import cache_folder
from shared.models import DEFAULT_MODEL, resolve

RECORD = Path(__file__).with_name("codec_runs.jsonl")
TRIP = {"one_trip": True, "r_c2d": 64, "r_d2c": 64, "lora_rank": 16}
PLANS: dict[str, tuple[dict[str, Any], str]] = {  # as `--plan` takes them, and a learning rate
    "one-trip-r64": ({**TRIP}, "0.003"),
    "shared-2": ({**TRIP, "share_residual_codes": 2}, "0.003"),
    "shared-4": ({**TRIP, "share_residual_codes": 4}, "0.003"),
    "shared-13": ({**TRIP, "share_residual_codes": 13}, "0.003"),
    "per-layer-r64": ({"r_c2d": 64, "r_d2c": 64}, "0.01"),
}
CODECS = {  # hidden states, codes, residual codes
    "float32": ("float32", "float32", "float32"),
    "bfloat16": ("bfloat16", "bfloat16", "bfloat16"),
    "int8": ("int8", "int8", "int8"),
    "int8 and int4": ("int8", "int8", "int4"),
    "int4 codes": ("bfloat16", "int4", "int4"),
}


def tuned(address: str, plan: str, lr: str, o: argparse.Namespace) -> Path:
    """Return the adapter of a plan, tuned through the cloud at ``address`` unless it is there already."""
    name = f"{o.task}-{plan}-{o.steps}x{o.batch}-{lr}-{o.seed}-{o.dtype}"
    path: Path = cache_folder() / "codec_quality" / f"{name}.safetensors"
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.jsonl"
        rows = [{"prompt": row.prompt, "completion": row.completion} for row in load(o.task, MAX_WORDS).train]
        data.write_text("\n".join(map(json.dumps, rows)), "utf-8")
        done = run_edge(
            *("tune", "--data", str(data), "--out", str(path), "--name", "codecs", "--plan", plan),
            *("--cloud", address, "--steps", str(o.steps), "--batch-size", str(o.batch), "--lr", lr),
            *("--seed", str(o.seed), "--validation", "0.02", "--validate-every", str(o.steps)),
            timeout_s=3600.0,
            env={"PRIVATELORA_CONFIG_DIR": folder, "PRIVATELORA_DATA_DIR": folder},
        )  # fmt: skip
    if done.returncode:
        raise ProcessError(f"tuning {plan} ended with status {done.returncode}:\n{done.stderr[-2000:]}")
    return path


def scores(
    edge: PrivateLoraForCausalLM, examples: Sequence[Example], labels: Sequence[int]
) -> dict[str, Any]:
    """Return each row's nats over the wire, and how many answers are the likeliest label."""
    nats, right, choices = [], 0, torch.tensor(labels)
    for example in examples:
        targets = torch.tensor(example.ids[-example.answer :])
        out = edge(torch.tensor([example.ids[:-1]]), logits_to_keep=example.answer, use_cache=False)
        logits = out.logits[0].float()  # (answer tokens, vocab_size)
        nats.append(float(F.cross_entropy(logits, targets, reduction="sum")))
        right += int(choices[logits[0, choices].argmax()] == targets[0])
    return {"nats": nats, "correct": right}


def run(o: argparse.Namespace) -> None:
    """Tune and score what the record lacks."""
    known = {(r["plan"], r["codec"], r["rows"], r["settings"]) for r in records(o.record)}
    settings = f"{o.task} {o.steps}x{o.batch} seed {o.seed}"
    checkpoint, task = resolve(o.model), load(o.task, MAX_WORDS)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder)
    examples = encode(tokenizer, by_digest(task.test)[: o.rows])
    labels = [ids[0] for ids in tokenizer(list(task.labels), add_special_tokens=False)["input_ids"]]
    for name in o.plans:
        wanted = [c for c in o.codecs if (name, c, len(examples), settings) not in known]
        if not wanted:
            continue
        offer, lr = PLANS[name]
        arguments = ["--plan", json.dumps({"name": name, **offer})]
        with CloudProcess(o.model, o.dtype, arguments) as cloud:
            adapter = tuned(cloud.address, name, lr, o)
            for codec in wanted:
                hidden, codes, residual = CODECS[codec]
                with (
                    tempfile.TemporaryDirectory() as pins,
                    PrivateLoraForCausalLM.from_cloud(
                        cloud.address, adapter, plan=name, wire_dtype="float32", hidden_wire_dtype=hidden,
                        codes_wire_dtype=codes, residual_codes_wire_dtype=residual, config_dir=Path(pins),
                    ) as edge,
                ):  # fmt: skip
                    with torch.inference_mode():
                        found = scores(edge, examples, labels)
                    up, down = position_bytes(edge)
                line = {"plan": name, "codec": codec, "rows": len(examples), "settings": settings,
                        "dtype": o.dtype, "lr": lr, "bytes_up": up, "bytes_down": down, **found}  # fmt: skip
                with o.record.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({**line, "nats": [round(n, 5) for n in found["nats"]]}) + "\n")
                mean = statistics.fmean(found["nats"])
                print(f"{name}, {codec}: {mean:.4f} nats, {found['correct']} right", flush=True)


def position_bytes(edge: PrivateLoraForCausalLM) -> tuple[float, float]:
    """Return what one decoded position sends up and down (bytes)."""
    cost = wire_cost(edge.adapter.plan, edge.wire_dtypes)
    return cost.up, cost.down


def records(path: Path) -> list[dict[str, Any]]:
    """Return the record's lines."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.is_file() else []


def table(o: argparse.Namespace) -> None:
    """Print the record in markdown."""
    lines = records(o.record)
    exact = {(r["plan"], r["rows"], r["settings"]): r["nats"] for r in lines if r["codec"] == "float32"}
    print("| plan | on the wire | KB a position | nats per answer | right | against float32 |")
    print("|---|---|---|---|---|---|")
    for r in lines:
        low, high = wilson(r["correct"] / r["rows"], r["rows"])
        base, against = exact.get((r["plan"], r["rows"], r["settings"])), "-"
        if base and r["codec"] != "float32":
            differences = [a - b for a, b in zip(r["nats"], base, strict=True)]
            error = statistics.stdev(differences) / math.sqrt(len(differences))
            against = f"{statistics.fmean(differences):+.4f} ± {error:.4f}"
        print(
            f"| {r['plan']} | {r['codec']} | {(r['bytes_up'] + r['bytes_down']) / 1000:.2f} | "
            f"{statistics.fmean(r['nats']):.4f} | {r['correct']}/{r['rows']} [{100 * low:.1f}, "
            f"{100 * high:.1f}] % | {against} |"
        )


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    own = commands.add_parser("run", help="tune and score")
    own.add_argument("--model", default=DEFAULT_MODEL)
    own.add_argument("--dtype", default="bfloat16", help="what the cloud computes in")
    own.add_argument("--task", default="reuters8", choices=("reuters8", "boolq"))
    own.add_argument("--plans", nargs="+", choices=PLANS, default=list(PLANS))
    own.add_argument("--codecs", nargs="+", choices=CODECS, default=list(CODECS))
    own.add_argument("--rows", type=int, default=200, help="test rows")
    own.add_argument("--steps", type=int, default=24, help="optimiser steps")
    own.add_argument("--batch", type=int, default=8, help="examples in a batch")
    own.add_argument("--seed", type=int, default=0)
    shown = commands.add_parser("table", help="print the record")
    for command in (own, shown):
        command.add_argument("--record", type=Path, default=RECORD)
    options = parser.parse_args()
    {"run": run, "table": table}[options.command](options)


if __name__ == "__main__":
    main()
