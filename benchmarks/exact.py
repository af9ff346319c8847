"""Token for token: the two real processes against plain Hugging Face ``generate`` with M merged in.

``python -m benchmarks.exact`` compares 20 prompts x 64 tokens with M = 0 and with a random M, then
other plans (fused, unequal ranks, a subset of layers), prefill chunk sizes and sessions that run
together; ``--small`` does the same on 4 x 16 for CI. Exit status 1 if anything differs, except at ties
as `shared.exactness` defines them. The figures come as one JSON line last.
"""

import os

# Before torch, as both command lines do: spinning OpenMP threads steal the cores of the other process.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.processes import CloudProcess
from benchmarks.prompts import PROMPTS
from edge_client.model import PrivateLoraForCausalLM
from shared import lowrank
from shared.adapter import Adapter
from shared.checkpoint import Checkpoint
from shared.exactness import Comparison, Greedy, combined, compare, continuation, greedy
from shared.models import DEFAULT_MODEL, resolve
from shared.reference import merged

MIN_DIFFERENT = 0.9  # of the prompts, against the base model's output
MIN_DISTINCT = 20 / 64  # different tokens per new token, in each output
MAIN = "per-projection"


@dataclass(frozen=True)
class Size:
    """How much is compared; counts."""

    prompts: int
    tokens: int
    plan_prompts: int
    plan_tokens: int
    chunks: tuple[int, ...]
    sessions: int


# Found by trying: large enough to change every answer, small enough to leave it fluent.
STD, SEED = 0.05, 0
FULL = Size(prompts=20, tokens=64, plan_prompts=4, plan_tokens=32, chunks=(1, 7, 64), sessions=10)
SMALL = Size(prompts=4, tokens=16, plan_prompts=1, plan_tokens=12, chunks=(7,), sessions=5)


@dataclass
class Case:
    """One line of the table: a verdict, and what the outputs were like."""

    name: str
    verdict: Comparison
    seconds: float
    different: int | None = None  # outputs that differ from the base model's
    distinct: int | None = None  # fewest different tokens in one output

    def row(self) -> dict[str, Any]:
        """Return the figures for the JSON line."""
        return {
            "name": self.name,
            "exact": self.verdict.exact,
            "prompts": self.verdict.prompts,
            "tokens": self.verdict.tokens,
            "mismatches": self.verdict.mismatches,
            "ties": self.verdict.ties,
            "smallest_gap": self.verdict.smallest_gap,
            "different": self.different,
            "distinct": self.distinct,
            "seconds": round(self.seconds, 1),
        }


@dataclass
class Bench:
    """The plain model, the running cloud's address, and what was found so far."""

    base: PreTrainedModel
    checkpoint: Checkpoint
    address: str
    folder: Path  # for the edge's pins, which are nobody else's
    seed: int
    cases: list[Case] = field(default_factory=list)
    expected: dict[str, list[Greedy]] = field(default_factory=dict)  # by the edge's name
    edges: dict[str, PrivateLoraForCausalLM] = field(default_factory=dict)

    def edge(self, name: str, plan: str, std: float) -> PrivateLoraForCausalLM:
        """Return an edge with M ~ N(0, std^2) for a plan of the cloud; zeros if std is 0."""
        model = PrivateLoraForCausalLM.from_cloud(
            self.address, plan=plan, wire_dtype="float32", config_dir=self.folder
        )
        if std:
            empty = model.adapter
            model.set_adapter(Adapter.random(empty.plan, empty.fingerprint, seed=self.seed, std=std))
        self.edges[name] = model
        return model

    def reference(self, adapter: Adapter) -> PreTrainedModel:
        """Return the plain model with the adapter merged into its weights."""
        matrices, _ = lowrank.ensure(adapter.plan, self.checkpoint)
        return merged(self.base, adapter.plan, matrices, adapter.matrices)

    def compare(self, name: str, plan: str, std: float, prompts: Sequence[list[int]], tokens: int) -> Case:
        """Compare one plan and M over some prompts."""
        started = time.monotonic()
        edge = self.edge(name, plan, std)
        model = self.reference(edge.adapter) if std else self.base
        self.expected[name] = [greedy(model, prompt, tokens) for prompt in prompts]
        verdict = compare(self.expected[name], continuation(edge))
        case = Case(name, verdict, 0.0, distinct=min(len(set(e.tokens)) for e in self.expected[name]))
        if std:
            base = self.expected["zero M"]
            case.different = sum(
                ours.tokens != theirs.tokens[:tokens]
                for ours, theirs in zip(self.expected[name], base, strict=False)
            )
        return self.add(case, started)

    def add(self, case: Case, started: float) -> Case:
        """Keep and print a line."""
        case.seconds = time.monotonic() - started
        self.cases.append(case)
        different = "-" if case.different is None else f"{case.different}/{case.verdict.prompts}"
        print(
            f"{case.name:<22}{case.verdict.prompts:>8}{case.verdict.tokens:>8}{case.verdict.mismatches:>12}"
            f"{case.verdict.ties:>6}{case.verdict.smallest_gap:>12.1e}{different:>11}"
            f"{case.distinct if case.distinct is not None else '-':>10}{case.seconds:>8.0f} s",
            flush=True,
        )
        for difference in case.verdict.differences:
            print(f"  {difference}", flush=True)
        return case


def plans_for(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """Return the plans that the cloud is told to offer, by name, fields as its ``--plan`` takes them."""
    g = checkpoint.geometry
    rank = min(64, g.kv_dim)
    layers = sorted({0, g.num_layers // 3, 2 * g.num_layers // 3, g.num_layers - 1})
    return {
        MAIN: {"r_c2d": rank, "r_d2c": rank},
        "fused": {"r_c2d": rank, "r_d2c": rank, "layout": "fused"},
        "unequal ranks": {"r_c2d": rank // 2, "r_d2c": rank * 3 // 4},
        "subset of layers": {"r_c2d": rank, "r_d2c": rank, "layers": layers},
    }


def in_chunks(edge: PrivateLoraForCausalLM, size: int) -> Any:
    """Return a candidate that prefills ``size`` positions at a time."""

    def generate(ids: list[int], new_tokens: int) -> list[int]:
        past = edge.new_cache()
        for at in range(0, len(ids) - 1, size):
            piece = torch.tensor([ids[at : min(at + size, len(ids) - 1)]])
            edge(piece, past_key_values=past, use_cache=True, logits_to_keep=1)
        return continuation(edge, past_key_values=past)(ids, new_tokens)

    return generate


def together(bench: Bench, sessions: int) -> Comparison:
    """Compare sessions that run at the same time: plans, M, prompts and starts in any mix."""
    names = list(bench.edges)
    jobs = []
    for i in range(sessions):
        name = names[i % len(names)]
        texts = bench.expected[name]
        jobs.append((name, texts[i // len(names) % len(texts)]))

    def run(job: tuple[int, tuple[str, Greedy]]) -> Comparison:
        place, (name, expected) = job
        time.sleep(0.05 * place)  # so that prefills meet decodes
        return compare([expected], continuation(bench.edges[name]))

    with ThreadPoolExecutor(sessions) as pool:
        return combined(list(pool.map(run, enumerate(jobs))))


def run(options: argparse.Namespace) -> int:
    """Run every case and return the exit status."""
    size = SMALL if options.small else FULL
    checkpoint = resolve(options.model)
    base = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32)
    plans = plans_for(checkpoint)
    slugs = {name: name.replace(" ", "-") for name in plans}
    arguments = [
        part for name in plans for part in ("--plan", json.dumps({"name": slugs[name], **plans[name]}))
    ]
    print(
        f"{'case':<22}{'prompts':>8}{'tokens':>8}{'mismatches':>12}{'ties':>6}{'least gap':>12}"
        f"{'different':>11}{'distinct':>10}{'time':>10}"
    )
    with (
        CloudProcess(options.model, "float32", arguments) as cloud,
        tempfile.TemporaryDirectory() as folder,
    ):
        bench = Bench(base, checkpoint, cloud.address, Path(folder), options.seed)
        prompts = tokenized(bench, slugs[MAIN], size.prompts)
        bench.compare("zero M", slugs[MAIN], 0.0, prompts, size.tokens)
        main = bench.compare("random M", slugs[MAIN], options.std, prompts, size.tokens)
        for name in list(plans)[1:]:
            bench.compare(name, slugs[name], options.std, prompts[: size.plan_prompts], size.plan_tokens)
        for chunk in size.chunks:
            started = time.monotonic()
            verdict = compare(bench.expected["random M"][:1], in_chunks(bench.edges["random M"], chunk))
            bench.add(Case(f"prefill by {chunk}", verdict, 0.0), started)
        started = time.monotonic()
        bench.add(Case(f"{size.sessions} sessions at once", together(bench, size.sessions), 0.0), started)
        for edge in bench.edges.values():
            edge.close()

    total = combined([case.verdict for case in bench.cases])
    enough_different = (main.different or 0) >= math.ceil(MIN_DIFFERENT * size.prompts)
    enough_distinct = (main.distinct or 0) >= math.ceil(MIN_DISTINCT * size.tokens)
    if not enough_different:
        print(
            f"M changed only {main.different} of {size.prompts} outputs: raise --std, this proves too little"
        )
    if not enough_distinct:
        print(f"an output has only {main.distinct} different tokens: lower --std, this proves too little")
    print(str(total).splitlines()[0])
    figures = {
        "benchmark": "exact",
        "model": checkpoint.id,
        "dtype": "float32",
        "exact": total.exact,
        "tokens": total.tokens,
        "mismatches": total.mismatches,
        "ties": total.ties,
        "m_std": options.std,
        "m_seed": options.seed,
        "different": main.different,
        "distinct": main.distinct,
        "cases": [case.row() for case in bench.cases],
    }
    print(json.dumps(figures))
    return 0 if total.exact and enough_different and enough_distinct else 1


def tokenized(bench: Bench, plan: str, count: int) -> list[list[int]]:
    """Return prompts as token ids, made by the edge's tokenizer and chat template."""
    tokenizer = PrivateLoraForCausalLM.from_cloud(bench.address, plan=plan, config_dir=bench.folder).tokenizer
    if tokenizer is None or tokenizer.chat_template is None:
        raise SystemExit("this model has no chat template; exactness is stated for chat prompts")
    chats = [[{"role": "user", "content": text}] for text in PROMPTS[:: len(PROMPTS) // count]]
    return [tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=False) for c in chats]


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--small", action="store_true", help="4 prompts x 16 tokens, for CI")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="packaged name, folder, GGUF file or hub id")
    parser.add_argument("--std", type=float, default=STD, help="standard deviation of the random M")
    parser.add_argument("--seed", type=int, default=SEED, help="seed of the random M")
    return run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
