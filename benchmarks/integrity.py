"""Claim: personal weights are worth something only with the A and B that they were tuned with.

``run``    tunes an adapter, then scores it with A or B disturbed by growing amounts, and with one of them
           drawn anew. The fingerprint check, which refuses such a cloud before the first activation, is
           bypassed: this is what it protects from. Runs on the single-process reference.
``clouds`` shows the check with real processes: a cloud whose B is another one is refused by an edge
           with that adapter; one that lies about it is not, and does the harm that ``run`` says.
``table``, ``plot``  what the record says.

Every scored model is a line of ``benchmarks/integrity_runs.jsonl`` and is never scored twice; the adapter
is kept in the user's cache. Ctrl-C or the end of ``--budget-minutes`` loses minutes: run the same command
again to go on. The figures come as one JSON line last.
"""

import os

# Before torch: spinning OpenMP threads steal the cores of whatever else runs.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import json
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, get_args

import torch

from benchmarks import integrity_record
from benchmarks.datasets import MAX_WORDS, TASKS
from benchmarks.integrity_bench import Experiment, OutOfTimeError, digest
from benchmarks.integrity_record import Finding, Record
from benchmarks.perturbation import Change, Part
from benchmarks.tuning_bench import found
from shared.models import DEFAULT_MODEL
from shared.plan import Initialiser, Layout

RECORD = Path(__file__).with_name("integrity_runs.jsonl")
CLOUDS = Path(__file__).with_name("integrity_clouds.json")
PLOT = Path(__file__).parent.parent / "docs" / "integrity.png"
# Of the matrix's own root mean square; None is re-drawn. Those that say most come first.
AMOUNTS = (1.0, None, 3.0, 0.3, 0.1, 0.03, 0.01)
PARTS: tuple[Part, ...] = get_args(Part)


def changes(draws: int) -> Iterator[Change]:
    """Yield everything that is done to A or B: whole draws one after the other."""
    for draw in range(draws):
        for amount in AMOUNTS:
            for part in PARTS:
                yield Change(part, amount, draw)


def run(experiment: Experiment) -> dict[str, Any]:
    """Tune and score whatever is not in the record yet; return the figures."""
    o, record = experiment.options, Record(experiment.options.record)
    adapter = experiment.adapter()
    name = digest(adapter)
    subject = experiment.subject(adapter)
    test, longest = experiment.test(o.rows), 0.0
    for uses_m, change in [(False, None), (True, None), *((True, change) for change in changes(o.draws))]:
        if (name, len(test), uses_m, change) in record.findings:
            continue
        if time.monotonic() + longest >= experiment.deadline:  # it would not be finished
            raise OutOfTimeError
        started = time.perf_counter()
        scored = found(subject.scores(test, experiment.labels, change, uses_m=uses_m))
        longest = max(longest, time.perf_counter() - started)
        record.add(
            Finding(
                tuned=experiment.tuned, adapter=name, uses_m=uses_m, change=change, found=scored,
                seconds=round(time.perf_counter() - started, 2), torch=torch.__version__, device=o.device,
                threads=torch.get_num_threads(),
                date=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            )
        )  # fmt: skip
        what = change or ("as tuned" if uses_m else "untuned")
        print(f"{what!s:<16} {scored.nats:.4f} nats per answer, {scored.correct}/{scored.rows}", flush=True)
    return {row.name: round(row.nats, 4) for row in integrity_record.rows(record.latest())}


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    record = argparse.ArgumentParser(add_help=False)
    record.add_argument("--record", type=Path, default=RECORD, help="the JSONL file of scores")
    tuned = argparse.ArgumentParser(add_help=False)
    tuned.add_argument("--model", default=DEFAULT_MODEL, help="packaged name, folder, GGUF file or hub id")
    tuned.add_argument("--device", default="cpu", help="cpu, cuda or mps")
    tuned.add_argument("--task", choices=TASKS, default="reuters8")
    tuned.add_argument("--words", type=int, default=MAX_WORDS, help="longest text")
    tuned.add_argument("--rank", type=int, default=64)
    tuned.add_argument("--initialiser", choices=get_args(Initialiser), default="orthonormal")
    tuned.add_argument("--layout", choices=get_args(Layout), default="per_projection")
    tuned.add_argument("--lr", type=float, default=1e-2, help="highest learning rate")
    tuned.add_argument("--steps", type=int, default=40, help="optimiser steps")
    tuned.add_argument("--batch", type=int, default=16, help="examples in a batch")
    tuned.add_argument("--seed", type=int, default=0, help="of the order of examples")
    tuned.add_argument("--budget-minutes", type=float, help="stop cleanly after this time")
    out = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = out.add_subparsers(dest="command", required=True)
    own = commands.add_parser("run", parents=[tuned, record], help="tune, then score with other A and B")
    own.add_argument("--rows", type=int, default=200, help="at most this many test rows")
    own.add_argument("--draws", type=int, default=1, help="noises for each amount")
    own = commands.add_parser("clouds", parents=[tuned], help="real clouds whose B is another one")
    own.add_argument("--rows", type=int, default=20, help="test rows that are answered over the wire")
    own.add_argument(
        "--amount", type=float, help="noise on B, of its root mean square; re-drawn if not given"
    )
    own.add_argument("--out", type=Path, default=CLOUDS, help="the JSON file to write")
    commands.add_parser("table", parents=[record], help="print the record in markdown")
    own = commands.add_parser("plot", parents=[record], help="quality by amount of noise, as PNG")
    own.add_argument("--out", type=Path, default=PLOT)
    return out


def main() -> int:
    """Parse the command line and run."""
    options = parser().parse_args()
    if options.command in ("table", "plot"):
        findings = Record(options.record).latest()
        if options.command == "plot":
            integrity_record.plot(findings, options.out)
        else:
            print(f"{integrity_record.title(findings)}\n\n{integrity_record.markdown(findings)}")
        return 0
    figures: dict[str, Any] = {"benchmark": f"integrity {options.command}", "finished": False}
    try:
        if options.command == "run":
            figures["results"] = run(Experiment(options))
        else:
            from benchmarks import integrity_clouds  # gRPC and the edge: the rest works without them

            figures["results"] = integrity_clouds.show(Experiment(options))
            options.out.write_text(json.dumps(figures["results"], indent=1) + "\n", "utf-8")
        figures["finished"] = True
    except OutOfTimeError:
        print("the budget is spent; the same command goes on from here")
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here")
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
