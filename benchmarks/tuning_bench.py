"""What all tuning runs share: the model, the data, the record, the deadline; and how one run is done."""

import argparse
import gc
import hashlib
import math
import time
from collections.abc import Iterable
from contextlib import ExitStack
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from benchmarks import quality, tuning_learner, tuning_wire
from benchmarks.datasets import Row, Task, by_digest, load
from benchmarks.quality import Scores
from benchmarks.tuning_learner import Learner, Progress
from benchmarks.tuning_runs import Found, Record, Run, Spec, mean_of, significant
from edge_client.planning.candidates import schedules
from shared import lowrank
from shared.cache import cache_folder
from shared.checkpoint import Checkpoint
from shared.models import resolve
from shared.plan import Plan

LORA_RANK, LORA_ALPHA = 16, 32
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class OutOfTimeError(Exception):
    """The budget is spent; what is done is in the record."""


def unit_rate(plan: Plan, matrices: lowrank.LowRank) -> float:
    """Return the learning rate at which a step of AdamW changes W as much as for orthonormal factors.

    One step changes each entry of M by about the rate, so W by that times the lengths of A's columns
    and B's rows; over more ranks the changes add up, hence the root. 1 without any factors.
    """
    if not matrices.a:  # the LoRAs of the layers here are all that learns
        return 1.0
    a = torch.stack([x.square().sum(dim=0).mean() for x in matrices.a.values()]).mean().sqrt()
    width = plan.groups  # rows of B hold one part per group
    b = torch.stack([x.square().sum(dim=1).mean() / width for x in matrices.b.values()]).mean().sqrt()
    return float((64 / plan.r_c2d) ** 0.5 / (a * b))


def found(scores: Scores) -> Found:
    """Return scores as they are recorded."""
    return Found(
        rows=scores.rows, nats=mean_of([scores.nats]), nats_error=mean_of([scores.nats_error]),
        perplexity=mean_of([scores.perplexity]) if scores.nats < 100 else None, correct=scores.correct,
    )  # fmt: skip


def plan_of(spec: Spec, checkpoint: Checkpoint) -> Plan:
    """Return the plan of a PrivateLoRA run."""
    g = checkpoint.geometry
    assert spec.initialiser and spec.layout, f"{spec} needs an initialiser and a layout"
    facts: dict[str, Any] = {
        "backbone": checkpoint.id, "num_layers": g.num_layers, "hidden_size": g.hidden_size,
        "rank": spec.rank, "initialiser": spec.initialiser,
    }  # fmt: skip
    if spec.layout == "per_projection" or spec.layout == "fused":
        return Plan.subset(name=f"{spec.layout}-{spec.initialiser}-r{spec.rank}", layout=spec.layout, **facts)
    if spec.layout == "lagged":  # the paper's plan and its A and B; only the residual differs
        return Plan.subset(name=f"per_projection-{spec.initialiser}-r{spec.rank}", **facts)
    return schedules(checkpoint.projections(), **facts)[spec.layout.replace("_", "-")]


class Bench:
    """What all runs share: options, the record, the model's files, the data, the deadline."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.record = options, Record(options.record)
        budget = options.budget_minutes
        self.deadline = math.inf if budget is None else time.monotonic() + 60 * budget
        self._tasks: dict[str, Task] = {}
        self._units: dict[tuple[object, ...], float] = {}

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The model's files."""
        return resolve(self.options.model)

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return AutoTokenizer.from_pretrained(self.checkpoint.folder)

    def task(self, name: str) -> Task:
        """Return a task's rows."""
        if name not in self._tasks:
            self._tasks[name] = load(name, self.options.words, self.options.test_words)
        return self._tasks[name]

    def spec(self, **fields: Any) -> Spec:
        """Return a spec with the options' values, and these."""
        o = self.options
        own: dict[str, Any] = {
            "model": self.checkpoint.id, "words": o.words, "test_words": o.test_words,
            "test_rows": o.test_rows, "validation_rows": o.validation_rows,
        }  # fmt: skip
        if fields["method"] != "majority":
            own |= {"precision": o.precision}
        if fields["method"] in ("lora", "privatelora"):
            own |= {"steps": o.steps, "batch": o.batch}
        if fields["method"] == "lora":
            own |= {"rank": LORA_RANK, "alpha": LORA_ALPHA}
        return Spec(**{**own, **fields})

    def factors(self, spec: Spec) -> tuple[Plan, lowrank.LowRank]:
        """Return the plan of a PrivateLoRA run, and its A and B."""
        plan = plan_of(spec, self.checkpoint)
        return plan, lowrank.ensure(plan, self.checkpoint, progress=True)[0]

    def rate(self, spec: Spec, relative: float) -> float:
        """Return the learning rate of a PrivateLoRA run that stands for ``relative`` whatever A and B are."""
        key = (spec.rank, spec.initialiser, spec.layout)
        if key not in self._units:
            self._units[key] = unit_rate(*self.factors(spec))
        return significant(relative * self._units[key])

    def labels(self, task: Task) -> list[int]:
        """Return the labels' ids: one token each, which is what makes one forward enough."""
        ids = self.tokenizer(list(task.labels), add_special_tokens=False)["input_ids"] if task.labels else []
        for label, tokens in zip(task.labels, ids, strict=True):
            if len(tokens) != 1:
                raise SystemExit(f"{label!r} is {len(tokens)} tokens in this model; labels must be one token")
        return [tokens[0] for tokens in ids]

    def run(self, spec: Spec) -> Run:
        """Return a run from the record, else do it and record it.

        Raises
        ------
        OutOfTimeError
            If the budget is spent before training is done.
        """
        if spec in self.record.runs:
            return self.record.runs[spec]
        if time.monotonic() >= self.deadline:
            raise OutOfTimeError
        print(f"{spec}", flush=True)
        task = self.task(spec.task)
        # What chose the learning rate has trained the same, and looked at the same validation rows.
        before = self.record.runs.get(spec.choosing)
        scores: dict[str, Found] = {}
        if before and before.validation and before.trained:
            scores["validation"] = before.validation
        parts: dict[str, list[Row]] = {"validation": task.validation[: spec.validation_rows]}
        if spec.test_rows:
            parts["test"] = by_digest(task.test)[: spec.test_rows]
        parts = {part: rows for part, rows in parts.items() if part not in scores}
        if spec.method == "majority":
            scores = {part: found(quality.majority(task.train, rows)) for part, rows in parts.items()}
            return self._add(spec, scores, Progress(), 0.0, 0, None)

        with ExitStack() as stack:  # a cloud process ends with the run
            learner, wire = self._learner(spec, stack)
            progress = Progress()
            if spec.steps:
                progress = tuning_learner.train(
                    learner, tuning_learner.encode(self.tokenizer, task.train), steps=spec.steps,
                    size=spec.batch, peak=spec.lr, seed=spec.seed, deadline=self.deadline,
                    saved=self._saved(spec), show=True,
                )  # fmt: skip
                if time.monotonic() >= self.deadline:
                    raise OutOfTimeError
            started = time.perf_counter()
            if progress.step == spec.steps:  # else it diverged
                for part, rows in parts.items():
                    examples = tuning_learner.encode(self.tokenizer, rows)
                    scores[part] = found(quality.evaluate(learner, examples, self.labels(task)))
            count = sum(p.numel() for p in learner.parameters)
            run = self._add(spec, scores, progress, time.perf_counter() - started, count, wire)
        del learner
        gc.collect()  # a wrapped model is held in cycles, and half a gigabyte
        return run

    def _saved(self, spec: Spec) -> Path:
        """Return where a run's state is kept: the same for the run that chooses and the one that scores."""
        key = hashlib.sha256(repr(spec.choosing).encode()).hexdigest()[:24]
        return cache_folder() / "tuning" / f"{key}.pt"

    def forget(self, specs: Iterable[Spec]) -> None:
        """Remove the states of runs that nobody will go on with."""
        for spec in specs:
            self._saved(spec).unlink(missing_ok=True)

    def _learner(self, spec: Spec, stack: ExitStack) -> tuple[Learner, int | None]:
        base = (self.checkpoint, self.options.device, DTYPES[spec.precision])
        if spec.method == "privatelora":
            plan, matrices = self.factors(spec)
            codes, residuals = plan.codes_width, plan.residual_width
            wire = (len(plan.exchange_layers) - plan.first_codes_on_edge) * codes
            wire += len(plan.owners) * residuals
            wire += 2 * plan.hidden_size
            if spec.transport == "wire":
                split = tuning_wire.through_cloud(self.options.model, plan, spec.precision)
                return stack.enter_context(split), wire
            model = tuning_learner.base_model(*base)
            if spec.lag:
                return tuning_learner.lagged(model, plan, matrices, spec.lag), wire
            return tuning_learner.private_lora(model, plan, matrices), wire
        model = tuning_learner.base_model(*base)
        if spec.method == "base":
            return tuning_learner.Local(model, []), None
        return tuning_learner.lora(model, spec.rank, spec.alpha, spec.seed), None

    def _add(
        self, spec: Spec, scores: dict[str, Found], progress: Progress, seconds: float, trained: int,
        wire: int | None,
    ) -> Run:  # fmt: skip
        tenth = max(1, spec.steps // 10)
        run = Run(
            spec=spec,
            validation=scores.get("validation"),
            test=scores.get("test"),
            first_loss=mean_of(progress.losses[:tenth]),
            last_loss=mean_of(progress.losses[-tenth:]),
            diverged=progress.step < spec.steps or any(s.nats is None for s in scores.values()),
            trained=trained,
            wire=wire,
            tokens=progress.tokens,
            seconds=round(progress.seconds, 2),
            eval_seconds=round(seconds, 2),
            torch=torch.__version__,
            device=self.options.device,
            threads=torch.get_num_threads(),
            date=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        )
        test = f", test {run.test.nats:.4f}" if run.test and run.test.nats is not None else ""
        print(f"  validation {run.score:.4f}{test} nats per answer", flush=True)
        return self.record.add(run)
