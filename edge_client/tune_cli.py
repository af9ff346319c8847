"""``privatelora-edge tune``: personal weights from a data file, through a cloud that is never sent it."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edge_client.flags import (
    AcceptNew,
    AllowRedirect,
    AsJson,
    CacheDir,
    ClientCert,
    ClientKey,
    Cloud,
    ConfigFile,
    Debug,
    Device,
    Dtype,
    FingerprintHex,
    PlanName,
    Tls,
    TlsCa,
    TokenFile,
    WireDtype,
    one_line_errors,
    repeated,
)
from edge_client.tune_flags import (
    EDGE_SETTINGS,
    BatchSize,
    Data,
    LossOn,
    MaxTokens,
    MicroBatchTokens,
    OrderSeed,
    Truncate,
    Validation,
    setting,
)

if TYPE_CHECKING:
    from edge_client.config import EdgeConfig
    from edge_client.tuning.checkpoint import Identity, State
    from edge_client.tuning.config import TuneConfig
    from edge_client.tuning.run import Job, Outcome

# Flags of this command that are settings of `edge_client.tuning.config`.
SETTINGS = (
    "epochs", "steps", "batch_size", "lr", "schedule", "warmup", "weight_decay", "clip", "validation",
    "validate_every", "patience", "loss_on", "max_tokens", "truncate", "micro_batch_tokens", "seed",
    "checkpoint_every",
)  # fmt: skip


def tune(
    data: Data = None,
    name: Annotated[
        str | None, typer.Option("--name", help="Of the adapter; the data file's name by default.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Write the adapter here, not among yours.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run, with the settings it began with.")
    ] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Forget an interrupted run of this name, and begin anew.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an adapter that has this name.")
    ] = False,
    epochs: Annotated[int | None, setting("--epochs", "Times each example is seen; 3 by default.")] = None,
    steps: Annotated[int | None, setting("--steps", "Optimiser steps, whatever the epochs.")] = None,
    batch_size: BatchSize = None,
    lr: Annotated[
        float | None, setting("--lr", "Learning rate; by default what suits the plan's A and B.", "X")
    ] = None,
    schedule: Annotated[
        str | None, setting("--schedule", "constant, linear or cosine (the default).", "NAME")
    ] = None,
    warmup: Annotated[
        float | None, setting("--warmup", "Part of the steps in which the rate rises; 0.1.", "X")
    ] = None,
    weight_decay: Annotated[float | None, setting("--weight-decay", "Of AdamW; 0 by default.", "X")] = None,
    clip: Annotated[float | None, setting("--clip", "Longest gradient; 1 by default, 0: any.", "X")] = None,
    validation: Validation = None,
    validate_every: Annotated[
        int | None, setting("--validate-every", "Steps between validations; about ten in all.")
    ] = None,
    patience: Annotated[
        int | None, setting("--patience", "End after so many validations without a better one; 3, 0: never.")
    ] = None,
    loss_on: LossOn = None,
    max_tokens: MaxTokens = None,
    truncate: Truncate = None,
    micro_batch_tokens: MicroBatchTokens = None,
    seed: OrderSeed = None,
    checkpoint_every: Annotated[
        int | None, setting("--checkpoint-every", "Steps between checkpoints; 10 by default.")
    ] = None,
    cloud: Cloud = None,
    allow_redirect: AllowRedirect = None,
    tls: Tls = None,
    tls_ca: TlsCa = None,
    token_file: TokenFile = None,
    client_cert: ClientCert = None,
    client_key: ClientKey = None,
    plan: PlanName = None,
    wire_dtype: WireDtype = None,
    dtype: Dtype = None,
    device: Device = None,
    fingerprint: FingerprintHex = None,
    accept_new_fingerprint: AcceptNew = None,
    cache_dir: CacheDir = None,
    as_json: AsJson = False,
    config: ConfigFile = None,
    debug: Debug = False,
) -> None:
    """Learn personal weights from your own data. Text, labels and what is learned stay on this machine.

    What crosses the wire can be decoded, labels too (see the project's threat model).

    Ctrl-C keeps what was learned so far; --resume goes on from there.
    """
    given = {key: value for key, value in locals().items() if value is not None}
    with one_line_errors(debug):
        from edge_client.config import SettingsError, load_config
        from edge_client.tuning.run import held

        edge = {name: given[name] for name in EDGE_SETTINGS if name in given}
        settings = load_config(config, **edge, tune=_tune_flags(given) or None)
        if resume and restart:
            raise SettingsError("give either --resume or --restart")
        if data is None and not resume:
            raise SettingsError("no data: give --data FILE")
        job, saved = _job(data, name, out, settings.tune, _tune_flags(given), resume)
        if saved is not None:
            settings = _as_before(settings, saved[0], given)
        with held(job):
            _check_free(job, out, resume=resume, restart=restart, overwrite=overwrite)
            _run(job, settings, saved, as_json=as_json, flags=repeated(given))


def _tune_flags(given: dict[str, Any]) -> dict[str, Any]:
    return {name: given[name] for name in SETTINGS if name in given}


def _job(
    data: Path | None,
    name: str | None,
    out: Path | None,
    config: "TuneConfig",
    flags: dict[str, Any],
    resume: bool,
) -> tuple["Job", "tuple[Identity, State] | None"]:
    """Return what is asked for, and the run to go on with."""
    from edge_client.adapters import AdapterStore
    from edge_client.tuning.checkpoint import CheckpointError
    from edge_client.tuning.config import TuneConfig
    from edge_client.tuning.run import Job, saved_run, unfinished
    from shared.cache import slug

    store, saved = AdapterStore(), None
    source = out or data
    if resume:
        if name is None and source is None and len(names := unfinished()) != 1:
            raise CheckpointError(
                f"which run? give --name ({', '.join(names)})" if names else "there is no run to resume"
            )
        name = name or (slug(source.stem) if source else unfinished()[0])
        store.path(name)
        saved = saved_run(name)
        data = data or Path(saved[0].data)
        config = TuneConfig.model_validate(saved[0].config.model_dump() | flags)
    assert data is not None
    name = name or slug((source or data).stem)
    # Whatever the name, it has to be one that the folder of runs can have too.
    target = store.path(name)
    return Job(name, data, out.expanduser() if out else target, config), saved


def _as_before(settings: "EdgeConfig", before: "Identity", given: dict[str, Any]) -> "EdgeConfig":
    """Return the settings of a resumed run: those it began with, where none were given now."""
    return settings.model_copy(
        update={
            "cloud": given.get("cloud", before.cloud),
            "plan": given.get("plan", before.plan.name),
            "wire_dtype": given.get("wire_dtype", before.wire_dtype),
            "dtype": given.get("dtype", before.dtype),
            "device": given.get("device", before.device),
            "threads": settings.threads or before.threads,
        }
    )


def _check_free(job: "Job", out: Path | None, *, resume: bool, restart: bool, overwrite: bool) -> None:
    """Refuse before any work what would overwrite something at its end."""
    from edge_client.adapters import StoreError
    from edge_client.tuning.checkpoint import CheckpointError

    if not overwrite and (job.out.exists() or job.out.is_symlink()):
        what = f"{job.out} exists" if out else f"there is an adapter {job.name!r} already"
        raise StoreError(f"{what}: --overwrite replaces it, --name NAME makes another")
    if job.checkpoint.is_file() and not resume:
        if not restart:
            raise CheckpointError(
                f"there is an interrupted run {job.name!r}: --resume goes on with it, --restart forgets it"
            )
        job.checkpoint.unlink()


def _run(
    job: "Job",
    settings: "EdgeConfig",
    saved: "tuple[Identity, State] | None",
    *,
    as_json: bool,
    flags: str,
) -> None:
    """Tune; ``flags`` are those that a command which is suggested has to repeat."""
    from edge_client.opened import opened
    from edge_client.tune_progress import Progress
    from edge_client.tuning.rows import read_rows
    from edge_client.tuning.run import finish, start

    rows = read_rows(job.data)
    with opened(settings, None) as model, Progress(sys.stderr) as progress:
        progress.reading(len(rows))
        trainer = start(
            model,
            job,
            rows,
            wire_dtype=settings.wire_dtype,
            saved=saved,
            watcher=progress,
            waiting=progress.waiting,
            advance=progress.advance,
        )
        progress.training(trainer)
        try:
            trainer.run()
        except BaseException as error:
            progress.close()
            if job.checkpoint.is_file():
                again = f"`privatelora-edge tune --resume --name {job.name}{flags}` goes on from there"
                kept = f"kept up to step {trainer.state.step} of {trainer.total_steps}"
                print(f"{kept}; {again}", file=sys.stderr)
            if isinstance(error, KeyboardInterrupt):
                raise typer.Exit(130) from None
            raise
        finally:
            trainer.learner.close()
        outcome = finish(model, job, trainer)
    if as_json:
        curve = str(outcome.curve) if outcome.curve else None
        print(json.dumps({"adapter": str(outcome.adapter), "curve": curve, **outcome.summary}))
    else:
        _say(job, outcome, flags)


def _say(job: "Job", outcome: "Outcome", flags: str) -> None:
    import shlex

    from edge_client.adapters import AdapterStore

    numbers: dict[str, Any] = outcome.summary
    rate = numbers["tokens"] / max(numbers["seconds"], 1e-9)
    spent = f"{numbers['steps']} steps, {numbers['epochs']:g} epochs, {numbers['tokens']:,} tokens"
    print(f"tuned {job.name} ({spent}, {rate:.0f} tok/s, {numbers['seconds'] / 60:.1f} min)")
    if numbers.get("validation_loss_after") is not None:
        before, after = numbers["validation_loss_before"], numbers["validation_loss_after"]
        print(f"validation loss {before:.4f} -> {after:.4f} nats per token, step {numbers['kept_step']} kept")
        if not numbers["kept_step"]:
            print("no step was better than the base model: M is zero; more data or another --lr may help")
    elif numbers["train_loss_last_epoch"] is not None:
        print(f"loss {numbers['train_loss_last_epoch']:.4f} nats per token; nothing was held out to judge by")
    print(f"adapter: {outcome.adapter}")
    if outcome.curve:
        print(f"loss curve: {outcome.curve}")
    if outcome.adapter.parent == AdapterStore().folder:  # it has a name
        print(f"try it: `privatelora-edge chat --adapter {job.name}{flags}`")
        print(f"keep it: `privatelora-edge adapter use {job.name}`")
    else:
        file = shlex.quote(str(outcome.adapter.absolute()))
        print(f"try it: `privatelora-edge chat --adapter {file}{flags}`")
