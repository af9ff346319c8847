"""Tuning quality: PrivateLoRA against PEFT LoRA, the untuned model and the majority class.

``compare``  same data, steps and batch; each method with its best of at least three learning rates,
             chosen on validation rows; then more seeds at that rate; scored on the whole test set.
``sweep``    ranks x initialisers x layouts x learning rates in short runs, judged on validation rows;
             each round keeps the better half and doubles the steps.
``table``    what the record says, in markdown; ``plot`` draws the sweep or the persona.

Every run is a line of ``benchmarks/tuning_runs.jsonl`` and is never run twice. Ctrl-C or the end of
``--budget-minutes`` loses at most two minutes: run the same command again to go on. Runs on the
single-process reference, those of ``--wire-seeds`` once more through a cloud process; the figures come
as one JSON line last.
"""

import os

# Before torch: spinning OpenMP threads steal the cores of whatever else runs.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import dataclasses
import itertools
import json
import sys
from pathlib import Path
from typing import Any, get_args

from benchmarks import tuning_table
from benchmarks.datasets import MAX_WORDS, TASKS, VALIDATION_ROWS
from benchmarks.tuning_bench import DTYPES, Bench, OutOfTimeError
from benchmarks.tuning_runs import Record, Schedule, Spec, best, mean_of, rungs, survivors, wider
from shared.models import DEFAULT_MODEL
from shared.plan import Initialiser, Layout

PLOTS = {"sweep": tuning_table.plot, "persona": tuning_table.plot_persona}
METHODS = ("lora", "privatelora")
RECORD = Path(__file__).with_name("tuning_runs.jsonl")
LORA_RATES = (3e-4, 1e-3, 3e-3)
# PrivateLoRA's are these divided by the gain of A and B (see `unit_rate`), for M sits between the two:
# N(0, 0.02^2) factors make it need larger entries, singular values smaller ones.
PRIVATE_RATES = (3e-3, 1e-2, 3e-2)
SWEEP_RATES = (4e-3, 1.6e-2)
RATE_FACTOR, MOST_RATES = 3.0, 6
RANKS: tuple[int, ...] = (16, 64, 128)
INITIALISERS: tuple[Initialiser, ...] = ("gaussian", "orthonormal", "svd")
LAYOUTS: tuple[Layout, ...] = ("per_projection", "fused")


def compare(bench: Bench) -> dict[str, Any]:
    """Run every method on every task and return the test scores."""
    o, out = bench.options, {}
    for task in o.tasks:
        for method in ("base", "majority") if bench.task(task).labels else ("base",):
            bench.run(bench.spec(stage="compare", task=task, method=method))
        chosen = {method: _chosen(bench, task, method) for method in o.methods}
        scored: dict[str, list[float]] = {method: [] for method in o.methods}
        for seed, method in itertools.product(range(o.seeds), o.methods):  # so that less time is fewer seeds
            run = bench.run(dataclasses.replace(chosen[method], seed=seed))
            bench.forget([run.spec])
            if run.test and run.test.nats is not None:
                scored[method].append(run.test.nats)
        for seed in range(o.wire_seeds if "privatelora" in o.methods else 0):
            wired = dataclasses.replace(chosen["privatelora"], seed=seed, transport="wire")
            bench.run(wired.choosing)  # validation first: it says already whether the split run is equal
            bench.run(wired)
            bench.forget([wired])
        for method, nats in scored.items():
            lr = chosen[method].lr
            out[f"{task} {method}"] = {"lr": lr, "test_nats": mean_of(nats), "seeds": len(nats)}
    return out


def _chosen(bench: Bench, task: str, method: str) -> Spec:
    """Return a method's run at its best learning rate, which validation rows choose."""
    o = bench.options
    spec = bench.spec(stage="compare", task=task, method=method)
    if method == "privatelora":
        spec = dataclasses.replace(
            spec, rank=o.rank, initialiser=o.initialiser, layout=o.layout,
            lag=o.lag if o.layout == "lagged" else 0,
        )  # fmt: skip
        rates = [bench.rate(spec, relative) for relative in PRIVATE_RATES]
    else:
        rates = list(LORA_RATES)
    # Only the chosen rate's runs get to see the test set.
    tried = {lr: dataclasses.replace(spec, lr=lr) for lr in rates}
    scores = {lr: bench.run(tried[lr].choosing).score for lr in rates}
    while (more := wider(scores, RATE_FACTOR, MOST_RATES)) is not None:
        tried[more] = dataclasses.replace(spec, lr=more)
        scores[more] = bench.run(tried[more].choosing).score
    chosen = tried.pop(best(scores))
    bench.forget(tried.values())
    return chosen


def sweep(bench: Bench) -> dict[str, Any]:
    """Halve the field of plans and learning rates round by round and return the last ones' scores."""
    o = bench.options
    arms: list[Spec] = []
    for rank, initialiser, layout in itertools.product(RANKS, INITIALISERS, LAYOUTS):
        spec = bench.spec(
            stage="sweep", task=o.tasks[0], method="privatelora", test_rows=0, layout=layout,
            rank=3 * rank if layout == "fused" else rank, initialiser=initialiser,
        )  # fmt: skip
        arms += [dataclasses.replace(spec, lr=bench.rate(spec, relative)) for relative in SWEEP_RATES]
    scores: dict[Spec, float] = {}
    for count, steps in rungs(len(arms), o.steps, o.last):
        arms = (survivors(scores, count) if scores else arms)[:count]
        print(f"round of {len(arms)} runs with {steps} steps", flush=True)
        arms = [dataclasses.replace(arm, steps=steps) for arm in arms]
        scores = {arm: bench.run(arm).score for arm in arms}
    return {str(arm): scores[arm] for arm in survivors(scores, len(scores))}


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--record", type=Path, default=RECORD, help="the JSONL file of runs")
    runs = argparse.ArgumentParser(add_help=False, parents=[common])
    runs.add_argument("--model", default=DEFAULT_MODEL, help="packaged name, folder, GGUF file or hub id")
    runs.add_argument("--device", default="cpu", help="cpu, cuda or mps")
    runs.add_argument("--budget-minutes", type=float, help="stop cleanly after this time")
    runs.add_argument("--words", type=int, default=MAX_WORDS, help="longest text in train and validation")
    runs.add_argument("--test-words", type=int, default=MAX_WORDS, help="longest text in test")
    runs.add_argument("--test-rows", type=int, default=100_000, help="at most this many test rows")
    runs.add_argument(
        "--precision", choices=DTYPES, default="float32",
        help="of the frozen layers; what is trained, the head and the loss are float32 in any case",
    )  # fmt: skip
    runs.add_argument("--validation-rows", type=int, default=VALIDATION_ROWS, help="at most this many")
    out = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = out.add_subparsers(dest="command", required=True)
    own = commands.add_parser("compare", parents=[runs], help="PrivateLoRA against LoRA and no tuning")
    own.add_argument("--tasks", nargs="+", choices=TASKS, default=["reuters8", "boolq"])
    own.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    own.add_argument("--steps", type=int, default=120, help="optimiser steps")
    own.add_argument("--batch", type=int, default=16, help="examples in a batch")
    own.add_argument("--seeds", type=int, default=3, help="runs at the best learning rate")
    own.add_argument("--wire-seeds", type=int, default=0, help="of these, how many also through a cloud")
    own.add_argument("--rank", type=int, default=64, help="rank of the plan")
    own.add_argument("--initialiser", choices=INITIALISERS, default="orthonormal")
    own.add_argument(
        "--layout", choices=(*LAYOUTS, *get_args(Schedule)), default="per_projection",
        help="or a whole plan: fewer layers, fewer exchanges, one round trip a token, the same where layers "
        "share an M, of LoRA on the edge alone (resident); lagged: an experiment, see shared/lagged.py",
    )  # fmt: skip
    own.add_argument("--lag", type=int, default=1, help="of layout lagged: residuals so many positions late")
    own = commands.add_parser("sweep", parents=[runs], help="ranks x initialisers x layouts")
    own.add_argument("--tasks", nargs=1, choices=TASKS, default=["reuters8"])
    own.add_argument("--steps", type=int, default=24, help="optimiser steps in the first round")
    own.add_argument("--batch", type=int, default=8, help="examples in a batch")
    own.add_argument("--last", type=int, default=6, help="runs in the last round")
    commands.add_parser("table", parents=[common], help="print the record in markdown")
    own = commands.add_parser("plot", parents=[common], help="the sweep or the persona, as PNG")
    own.add_argument("what", choices=PLOTS, nargs="?", default="sweep")
    own.add_argument("--out", type=Path, help="docs/tuning_<what>.png by default")
    return out


def main() -> int:
    """Parse the command line and run."""
    options = parser().parse_args()
    if options.command == "table":
        print(tuning_table.markdown(Record(options.record)))
        return 0
    if options.command == "plot":
        out = options.out or Path(f"docs/tuning_{options.what}.png")
        PLOTS[options.what](Record(options.record), out)
        return 0
    if options.command == "compare" and options.layout == "lagged" and options.wire_seeds:
        raise SystemExit("lagged residuals are an experiment on the reference: no cloud serves them")
    bench = Bench(options)
    figures: dict[str, Any] = {"benchmark": f"tuning {options.command}", "finished": False}
    try:
        figures |= {"results": {"compare": compare, "sweep": sweep}[options.command](bench), "finished": True}
    except OutOfTimeError:
        print("the budget is spent; the same command goes on from here")
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here")
    print(json.dumps(figures | {"runs": len(bench.record.runs)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
