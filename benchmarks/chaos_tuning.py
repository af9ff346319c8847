"""An edge that tunes all the while: the process of a chaos run that holds it.

One run after another with the same rows and settings, through the same code as ``privatelora-edge tune``;
each ends in an adapter file, whose tensors must have the bits of the first one's. Started by
`benchmarks.child.Child`.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import gc
import hashlib
import json
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.child import answering, arguments
from benchmarks.step_log import StepLog
from edge_client.connection import Timeouts
from edge_client.model import PrivateLoraForCausalLM
from edge_client.tuning.config import TuneConfig
from edge_client.tuning.rows import read_rows
from edge_client.tuning.run import Job, finish, start
from edge_client.tuning.trainer import Trainer
from shared.adapter import Adapter

ROWS = 12


def write_rows(file: Path) -> None:
    """Write rows of different lengths; what they say does not matter."""
    rows = [
        {"prompt": f"say {number}: ", "completion": f"{number * number % 7} it is" + " indeed" * (number % 4)}
        for number in range(ROWS)
    ]
    file.write_text("\n".join(map(json.dumps, rows)))


def digest(adapter: Adapter) -> str:
    """Return SHA-256 over the tensors of an adapter (hex)."""
    found = hashlib.sha256()
    for _, matrix in sorted(adapter.matrices.items()):
        found.update(matrix.numpy().tobytes())
    for _, factor in sorted(adapter.factors.items()):
        found.update(factor.numpy().tobytes())
    return found.hexdigest()


class Tuning:
    """Runs without end.

    Parameters
    ----------
    given
        ``cloud``, ``plan``, ``folder``, ``steps``, ``batch_size``, ``micro_batch_tokens``,
        ``step_timeout_s``, ``connect_timeout_s``, ``recover_s`` and ``cache_dir``.
    """

    def __init__(self, given: dict[str, Any]) -> None:
        self.folder = Path(given["folder"])
        self.model = PrivateLoraForCausalLM.from_cloud(
            given["cloud"],
            plan=given["plan"],
            wire_dtype="float32",
            config_dir=self.folder / "config",
            cache_dir=Path(given["cache_dir"]) if given.get("cache_dir") else None,
            timeouts=Timeouts(
                *(given[f"{name}_s"] for name in ("connect_timeout", "step_timeout", "recover"))
            ),
        )
        self.config = TuneConfig(
            steps=given["steps"],
            batch_size=given["batch_size"],
            micro_batch_tokens=given["micro_batch_tokens"],
            lr=0.01,
            validation=0.0,
            checkpoint_every=2,
        )
        self.file = self.folder / "rows.jsonl"
        write_rows(self.file)
        self.log, self.digests, self.errors, self.waits = StepLog(), list[str](), list[str](), 0
        self.steps = 0
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def once(self) -> dict[str, Any]:
        """Tune one adapter."""
        name = f"run-{len(self.digests)}"
        job = Job(name, self.file, self.folder / f"{name}.safetensors", self.config, self.folder / "data")
        trainer = start(
            self.model, job, read_rows(self.file), wire_dtype="float32", watcher=None, waiting=self._waiting
        )
        self._watch(trainer)
        try:
            trainer.run()
        finally:
            trainer.learner.close()
        finish(self.model, job, trainer)
        self.digests.append(digest(Adapter.load(job.out)))
        gc.collect()  # the picture's own cycles, 1.4 MB a run, are collected rarely; a run has one, ever
        return {"digest": self.digests[-1]}

    def begin(self) -> dict[str, Any]:
        """Tune one adapter after another on a thread of its own."""

        def run() -> None:
            while not self._over.is_set():
                try:
                    self.once()
                except Exception as error:  # whatever it is, this run has not finished
                    self.errors.append(f"{type(error).__name__}: {error}")
                    print(f"tuning: {traceback.format_exc()}", file=sys.stderr, flush=True)
                    time.sleep(0.5)

        self._over.clear()
        self._thread = threading.Thread(target=run, name="tuning", daemon=True)
        self._thread.start()
        return {}

    def stop(self, patience_s: float) -> list[str]:
        """Let it finish the run it is at; return what has not finished."""
        self._over.set()
        if self._thread is not None:
            self._thread.join(patience_s)
            if self._thread.is_alive():
                return ["tuning"]
        return []

    def report(self) -> dict[str, Any]:
        """Return what it has done so far; the first digest is that of the undisturbed run."""
        return {
            "runs": len(self.digests) - 1,
            "steps": self.steps,
            "differ": sum(one != self.digests[0] for one in self.digests[1:]),
            "digest": self.digests[0] if self.digests else None,
            "unfinished": len(self.errors),
            "errors": list(dict.fromkeys(self.errors))[:10],  # each once
            "waits": self.waits,
            "batches": self.log.intervals(),
        }

    def close(self) -> dict[str, Any]:
        """Close the connection."""
        self.model.close()
        return {}

    def _waiting(self, error: Exception, seconds: float) -> None:
        self.waits += 1

    def _watch(self, trainer: Trainer) -> None:
        """Note when each optimiser step's gradients were asked for, and when they were there."""
        gradients = trainer.learner.gradients

        def noted(*args: Any, **kwargs: Any) -> Any:
            began = time.monotonic()
            try:
                return gradients(*args, **kwargs)
            finally:
                self.log.note(began, time.monotonic())
                self.steps += 1

        trainer.learner.gradients = noted  # type: ignore[method-assign]


def main() -> None:
    """Answer until there are no more questions."""
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    given = arguments()
    torch.set_num_threads(1)
    tuning = Tuning(given)
    names = ("once", "begin", "stop", "report", "close")
    answering({name: getattr(tuning, name) for name in names})


if __name__ == "__main__":
    main()
