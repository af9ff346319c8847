"""One tuning run, from a data file and a model to an adapter file.

`start` turns rows into a `Trainer` that saves itself in a folder of its own under the user's data;
`finish` writes the adapter with a summary in numbers, draws the loss curve beside it, and removes the
folder. In between anything may be interrupted and started again with what the folder holds.
"""

import math
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from pydantic import JsonValue

from edge_client.adapters import data_folder
from edge_client.model import PrivateLoraForCausalLM
from edge_client.offer import CloudOffer, fingerprint_message
from edge_client.recovery import Attempts
from edge_client.tuning.checkpoint import (
    CheckpointError,
    Identity,
    State,
    load_checkpoint,
    save_checkpoint,
)
from edge_client.tuning.config import TuneConfig
from edge_client.tuning.curve import save_curve
from edge_client.tuning.examples import digest, make_examples, split
from edge_client.tuning.learner import Learner, TuningStream, Waiting, embedding
from edge_client.tuning.loss import Head
from edge_client.tuning.rows import DataError, Row
from edge_client.tuning.stream import WIRE_DTYPES, no_gradients
from edge_client.tuning.trainer import Trainer, Watcher
from edge_client.tuning.weights import factors_of, matrices_of, start_weights
from shared import wire
from shared.adapter import Adapter
from shared.pb.privatelora.v1 import private_lora_pb2 as pb

CHECKPOINT_FILE = "checkpoint.safetensors"


@dataclass(frozen=True)
class Job:
    """What is asked for: an adapter ``name`` in the file ``out``, from the file ``data``."""

    name: str
    data: Path
    out: Path
    config: TuneConfig
    data_dir: Path | None = None  # the user's data; None is the usual one

    @property
    def folder(self) -> Path:
        """Where the run is kept until it is finished."""
        return runs_folder(self.data_dir) / self.name

    @property
    def checkpoint(self) -> Path:
        """The run's file."""
        return self.folder / CHECKPOINT_FILE


@dataclass(frozen=True)
class Outcome:
    """What a run has made. ``curve`` is None if there was nothing to draw, or nothing to draw it with."""

    adapter: Path
    curve: Path | None
    summary: dict[str, JsonValue]


def runs_folder(data_dir: Path | None = None) -> Path:
    """Return the folder of the unfinished runs."""
    return data_folder(data_dir) / "runs"


def unfinished(data_dir: Path | None = None) -> list[str]:
    """Return the names of the runs that can be resumed, in alphabetical order."""
    return sorted(path.parent.name for path in runs_folder(data_dir).glob(f"*/{CHECKPOINT_FILE}"))


def held(job: Job) -> AbstractContextManager[object]:
    """Hold a run for this process.

    Raises
    ------
    CheckpointError
        If another process has it.
    """
    folder = runs_folder(job.data_dir)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = FileLock(folder / f".{job.name}.lock")
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        raise CheckpointError(f"run {job.name!r} is under way in another process") from None


def saved_run(name: str, data_dir: Path | None = None) -> tuple[Identity, State]:
    """Return an unfinished run; raises CheckpointError, saying what there is, if there is none."""
    path = runs_folder(data_dir) / name / CHECKPOINT_FILE
    if not path.is_file():
        names = ", ".join(unfinished(data_dir)[:20])
        raise CheckpointError(
            f"there is no run {name!r} to resume (there is: {names})"
            if names
            else f"there is no run {name!r} to resume, nor any other"
        )
    return load_checkpoint(path)


def start(
    model: PrivateLoraForCausalLM,
    job: Job,
    rows: Sequence[Row],
    *,
    wire_dtype: str | None = None,
    saved: tuple[Identity, State] | None = None,
    watcher: Watcher | None = None,
    waiting: Waiting = lambda error, seconds: None,
    advance: Callable[[], object] = lambda: None,
) -> Trainer:
    """Return the trainer of a run, new or resumed.

    Parameters
    ----------
    model
        From `from_cloud`; its adapter says which plan is tuned. Weights start where they change nothing.
    job
        What is asked for.
    rows
        Of the data file, all good.
    wire_dtype
        Element type on the wire; None is what the cloud computes in.
    saved
        The run to go on with.
    watcher, waiting
        Hear of steps, and of waits for a cloud that is lost.
    advance
        Called for each row that has become examples.

    Raises
    ------
    DataError
        If rows cannot be used; it lists all of them.
    CheckpointError
        If the saved run is of other data, settings or another model.
    SessionError
        If the cloud does not tune.
    """
    offer, tokenizer = model.offer, model.tokenizer
    if offer is None or tokenizer is None:
        raise ValueError("only a model made by from_cloud can be tuned")
    plan = model.adapter.plan
    if not plan.adapted_layers and not plan.lora:
        raise DataError(f"plan {plan.name!r} has no personal weights: there is nothing to tune in it")
    fingerprint = offer.plans[plan.name][1]
    on_wire = wire_for(wire_dtype, offer.compute_dtype)
    learner = learner_for(model, on_wire, waiting)
    limits = learner.limits()
    config = job.config.settled(plan, limits.max_batch_tokens, limits.max_sequence_tokens)
    assert config.max_tokens is not None
    examples = make_examples(
        rows,
        tokenizer,
        max_tokens=config.max_tokens,
        loss_on=config.loss_on,
        truncate=config.truncate,
        source=str(job.data),
        advance=advance,
    )
    train, validation = split(examples, config.validation, config.seed)
    identity = Identity(
        name=job.name,
        data=str(job.data.absolute()),
        cloud=offer.target if model.connection is None or model.recovery is None else model.connection.cloud,
        data_digest=digest(examples),
        config=config,
        plan=plan,
        fingerprint=fingerprint.root.hex(),
        wire_dtype=wire.dtype_name(on_wire),
        dtype=str(model.lm_head.weight.dtype).removeprefix("torch."),
        device=str(model.device),
        threads=torch.get_num_threads(),
    )
    if saved is not None:
        saved[0].check(identity)
        state = saved[1]
    else:
        state = State.begin(start_weights(plan, config.seed, precision_for(offer)))

    def save(state: State) -> None:
        save_checkpoint(job.checkpoint, identity, state)

    return Trainer(config, learner, train, validation, state, save, watcher)


def learner_for(
    model: PrivateLoraForCausalLM,
    on_wire: "pb.Dtype.ValueType",
    waiting: Waiting = lambda error, seconds: None,
) -> Learner:
    """Return what asks the model's cloud for losses and gradients, under the plan of the model's adapter.

    Parameters
    ----------
    model
        From `from_cloud`.
    on_wire
        Element type on the wire, see `wire_for`.
    waiting
        Hears of waits for a cloud that is lost.
    """
    offer, connection, plan = model.offer, model.connection, model.adapter.plan
    if offer is None or connection is None:
        raise ValueError("only a model made by from_cloud can be tuned")
    fingerprint, recovery = offer.plans[plan.name][1], model.recovery
    attempts = Attempts.nowhere_else if recovery is None else recovery.begin

    def open_stream() -> TuningStream:
        address = connection.target  # read once: another thread's recovery may move on at any time
        if recovery is not None:  # this model's cloud may be another replica by now
            offer.same_at(address, connection.described(address), plan)
        return connection.open_tuning(plan, fingerprint_message(fingerprint), on_wire, address)

    head = Head(model.norm, model.lm_head, model.softcap)
    embed = embedding(model.embed_tokens, model.device)
    return Learner(head, embed, open_stream, waiting, resident=model.resident, attempts=attempts)


def precision_for(offer: CloudOffer) -> torch.dtype:
    """Return what personal weights are tuned in."""
    return torch.float64 if offer.compute_dtype == torch.float64 else torch.float32


def finish(model: PrivateLoraForCausalLM, job: Job, trainer: Trainer) -> Outcome:
    """Write the adapter that a trainer has arrived at, and the loss curve; remove the run's folder.

    Raises
    ------
    AdapterError
        If M cannot be saved.
    """
    state, plan = trainer.state, model.adapter.plan
    step, weights = trainer.kept
    summary = summarised(trainer)
    made = Adapter(
        plan,
        model.adapter.fingerprint,
        {layer: matrix.to(torch.float32) for layer, matrix in matrices_of(weights).items()},
        job.name,
        training=summary,
        factors={name: factor.to(torch.float32) for name, factor in factors_of(weights).items()},
    )
    job.out.parent.mkdir(parents=True, exist_ok=True)
    made.save(job.out)
    curve: Path | None = job.out.with_suffix(".png")
    try:
        assert curve is not None
        save_curve(curve, state.train_losses, state.validation_losses, step, title=job.name)
    except (ImportError, ValueError, OSError):  # the adapter is what matters, and it is written
        curve = None
    shutil.rmtree(job.folder, ignore_errors=True)
    return Outcome(job.out, curve, summary)


def summarised(trainer: Trainer) -> dict[str, JsonValue]:
    """Return a run in numbers, none of which is about a single example."""
    state, config = trainer.state, trainer.config
    last = [loss for _, loss in state.train_losses[-trainer.batches_an_epoch :]]
    validation = dict(state.validation_losses)
    numbers: dict[str, JsonValue] = {
        "examples": len(trainer.train),
        "validation_examples": len(trainer.validation),
        "steps": state.step,
        "kept_step": trainer.kept[0],
        "epochs": round(state.step / trainer.batches_an_epoch, 2),
        "batch_size": config.batch_size,
        "lr": trainer.lr,
        "tokens": state.tokens,
        "seconds": round(state.seconds, 1),
        "train_loss_last_epoch": _rounded(math.fsum(last) / len(last)) if last else None,
    }
    if validation:
        numbers["validation_loss_before"] = _rounded(validation.get(0))
        numbers["validation_loss_after"] = _rounded(validation.get(trainer.kept[0]))
    return numbers


def wire_for(name: str | None, compute_dtype: torch.dtype) -> "pb.Dtype.ValueType":
    """Return the wire dtype called ``name``, or the one for a cloud that computes in ``compute_dtype``.

    Raises
    ------
    ValueError
        If it cannot carry gradients.
    """
    if name is None:
        number = wire.WIRE_DTYPES[compute_dtype]
        return number if number in WIRE_DTYPES else pb.DTYPE_FLOAT32
    if wire.DTYPE_NAMES.get(name) not in WIRE_DTYPES:
        raise ValueError(f"{no_gradients(name)}; use bfloat16 or float32")
    return wire.DTYPE_NAMES[name]


def _rounded(loss: float | None) -> float | None:
    return None if loss is None else round(loss, 6)
