"""What the integrity experiment works on: an adapter that is tuned once, and its model with any A and B."""

import argparse
import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel

from benchmarks import quality, tuning_learner
from benchmarks.datasets import Task, by_digest, load
from benchmarks.integrity_record import BYTES_OF_DIGEST, Tuned
from benchmarks.perturbation import Change, changed
from benchmarks.quality import Scores
from benchmarks.tuning_learner import Example, Local, Progress
from shared import edge_parts, fingerprint, lowrank
from shared.adapter import Adapter
from shared.cache import cache_folder
from shared.checkpoint import Checkpoint
from shared.families import Geometry
from shared.lowrank import LowRank
from shared.models import resolve
from shared.plan import Plan
from shared.reference import Matrices, Reference


class OutOfTimeError(Exception):
    """The budget is spent; what is done is kept."""


@dataclass(frozen=True)
class Subject:
    """A tuned model in one process, to be scored with any A and B."""

    model: PreTrainedModel
    geometry: Geometry
    plan: Plan
    lowrank: LowRank
    matrices: Matrices

    def scores(
        self, examples: Sequence[Example], labels: Sequence[int], change: Change | None, uses_m: bool = True
    ) -> Scores:
        """Score with ``change`` made to A or B; without M if not ``uses_m``."""
        factors = self.lowrank
        if change is not None:
            factors = changed(factors, self.plan, self.geometry, change)
        reference = Reference(self.model, self.plan, factors, self.matrices if uses_m else None)
        try:
            return quality.evaluate(Local(self.model, []), examples, labels)
        finally:
            reference.remove()


class Experiment:
    """Options, model files, data and the adapter, each made when it is first needed."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        budget = options.budget_minutes
        self.deadline = math.inf if budget is None else time.monotonic() + 60 * budget

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The model's files."""
        return resolve(self.options.model)

    @cached_property
    def task(self) -> Task:
        """The rows, short texts only."""
        return load(self.options.task, self.options.words)

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return AutoTokenizer.from_pretrained(self.checkpoint.folder)

    @cached_property
    def tuned(self) -> Tuned:
        """How the adapter is made."""
        o = self.options
        return Tuned(
            self.checkpoint.id, o.task, o.words, o.rank, o.initialiser, o.layout, o.lr, o.steps, o.batch,
            o.seed,
        )  # fmt: skip

    @cached_property
    def plan(self) -> Plan:
        """The split, named as a cloud names it that is told nothing but rank and layout."""
        g, t = self.checkpoint.geometry, self.tuned
        suffix = "" if t.initialiser == "orthonormal" else f"-{t.initialiser}"
        return Plan.subset(
            name=f"per-layer-r{t.rank}" + ("-fused" if t.layout == "fused" else "") + suffix,
            backbone=t.model, num_layers=g.num_layers, hidden_size=g.hidden_size, rank=t.rank,
            layout=t.layout, initialiser=t.initialiser,
        )  # fmt: skip

    @cached_property
    def factors(self) -> tuple[LowRank, Path]:
        """A and B, and their file, which is the cloud's own."""
        return lowrank.ensure(self.plan, self.checkpoint, progress=True)

    @property
    def path(self) -> Path:
        """Where the adapter is kept."""
        key = hashlib.sha256(repr(self.tuned).encode()).hexdigest()[:24]
        return cache_folder() / "integrity" / f"{key}.safetensors"

    def test(self, count: int) -> list[Example]:
        """Return the first test rows in the order of their digests: the same ones every time."""
        return tuning_learner.encode(self.tokenizer, by_digest(self.task.test)[:count])

    @cached_property
    def labels(self) -> list[int]:
        """The labels' ids, one token each."""
        ids = self.tokenizer(list(self.task.labels), add_special_tokens=False)["input_ids"]
        if not ids or any(len(tokens) != 1 for tokens in ids):
            raise SystemExit(f"task {self.task.name} has no labels of one token each in this model")
        return [tokens[0] for tokens in ids]

    def base(self) -> PreTrainedModel:
        """Return the plain model, loaded anew."""
        return tuning_learner.base_model(self.checkpoint, self.options.device)

    def adapter(self) -> Adapter:
        """Return the adapter, tuning it first if it is not there.

        Raises
        ------
        OutOfTimeError
            If the budget is spent before tuning is done; the same call goes on later.
        """
        if self.path.is_file():
            return Adapter.load(self.path)
        t, (factors, file) = self.tuned, self.factors
        print(f"tuning: {t}", flush=True)
        learner = tuning_learner.private_lora(self.base(), self.plan, factors)
        state = self.path.with_suffix(".pt")
        progress = tuning_learner.train(
            learner, tuning_learner.encode(self.tokenizer, self.task.train), steps=t.steps, size=t.batch,
            peak=t.lr, seed=t.seed, deadline=self.deadline, saved=state, show=True,
        )  # fmt: skip
        if progress.step < t.steps:
            if progress.losses and not math.isfinite(progress.losses[-1]):
                raise SystemExit(f"the loss is not finite after {progress.step} steps: lower --lr")
            raise OutOfTimeError
        matrices = dict(zip(self.plan.owners, learner.parameters, strict=True))
        print_ = fingerprint.for_model(
            self.plan, self.checkpoint, file, edge_parts.build(self.checkpoint, plans=[(self.plan, file)])
        )
        adapter = Adapter(
            self.plan, print_, {layer: m.detach().cpu() for layer, m in matrices.items()}, "integrity",
            training=summary(t, progress),
        )  # fmt: skip
        self.path.parent.mkdir(parents=True, exist_ok=True)
        adapter.save(self.path)
        state.unlink(missing_ok=True)
        return adapter

    def subject(self, adapter: Adapter) -> Subject:
        """Return the model with M of ``adapter``, its base loaded anew."""
        return Subject(self.base(), self.checkpoint.geometry, self.plan, self.factors[0], adapter.matrices)


def summary(tuned: Tuned, progress: Progress) -> dict[str, Any]:
    """Return what an adapter file says about its tuning; nothing of the data."""
    tenth = max(1, tuned.steps // 10)
    first, last = (sum(part) / len(part) for part in (progress.losses[:tenth], progress.losses[-tenth:]))
    return {"task": tuned.task, "lr": tuned.lr, "steps": tuned.steps, "first_loss": first, "last_loss": last}


def digest(adapter: Adapter) -> str:
    """Return the first bytes of the digest of M, in hex."""
    leaves = ((str(layer), fingerprint.tensor_digest(str(layer), m)) for layer, m in adapter.matrices.items())
    return fingerprint.merkle_root(leaves)[:BYTES_OF_DIGEST].hex()
