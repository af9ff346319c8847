"""``privatelora-edge rank``: which layers and which plans are worth most on one's own data."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from edge_client.flags import (
    AcceptNew,
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
    LossOn,
    MaxTokens,
    MicroBatchTokens,
    OrderSeed,
    Truncate,
    Validation,
    setting,
)

STEPS = 20  # of each short run
HELD_OUT_ROWS = 64

# Flags of this command that are settings of `edge_client.tuning.config`.
SETTINGS = (
    "steps", "batch_size", "lr", "validation", "loss_on", "max_tokens", "truncate", "micro_batch_tokens",
    "seed",
)  # fmt: skip


def rank(
    data: Annotated[
        Path | None,
        typer.Option(
            "--data", metavar="FILE", help="Required: JSONL of chats or completions, or plain text."
        ),
    ] = None,
    adapter: Annotated[
        Path | None,
        typer.Option(
            "--adapter", metavar="NAME|FILE", help="Rank the layers of these weights; else of a short run."
        ),
    ] = None,
    plan: Annotated[
        str | None,
        typer.Option("--plan", metavar="NAME", help="Rank this plan's layers; that with most by default."),
    ] = None,
    layers_only: Annotated[
        bool, typer.Option("--layers-only", help="Do not tune under the other plans on offer.")
    ] = False,
    round_trips: Annotated[
        int, typer.Option("--round-trips", metavar="N", min=1, help="A token's, of the plan to suggest.")
    ] = 4,
    held_out_rows: Annotated[
        int, typer.Option("--held-out-rows", metavar="N", min=2, help="At most so many to judge by.")
    ] = HELD_OUT_ROWS,
    steps: Annotated[
        int | None, setting("--steps", f"Optimiser steps of each short run; {STEPS} by default.")
    ] = None,
    batch_size: BatchSize = None,
    lr: Annotated[
        float | None, setting("--lr", "Learning rate; by default what suits each plan's A and B.", "X")
    ] = None,
    validation: Validation = None,
    loss_on: LossOn = None,
    max_tokens: MaxTokens = None,
    truncate: Truncate = None,
    micro_batch_tokens: MicroBatchTokens = None,
    seed: OrderSeed = None,
    cloud: Cloud = None,
    tls: Tls = None,
    tls_ca: TlsCa = None,
    token_file: TokenFile = None,
    client_cert: ClientCert = None,
    client_key: ClientKey = None,
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
    """Rank layers and plans by what they gain on your own data, and suggest a plan of the best layers.

    Tunes for a few steps under every plan that the cloud offers, and measures on rows that were held out.
    Layers are ranked by what is lost without each. Nothing is kept. What crosses the wire is as in `tune`.
    """
    given = {key: value for key, value in locals().items() if value is not None}
    with one_line_errors(debug):
        from edge_client.config import SettingsError, load_config

        flags = {name: given[name] for name in EDGE_SETTINGS if name in given}
        tuning = {"steps": STEPS, **{name: given[name] for name in SETTINGS if name in given}}
        settings = load_config(config, **flags, tune=tuning)
        if data is None:
            raise SettingsError("no data: give --data FILE")
        if not settings.tune.validation:
            raise SettingsError("rows have to be held out to judge by: give --validation above 0")
        from edge_client.adapters import resolve_adapter
        from edge_client.rank_report import show
        from edge_client.rank_run import RankRun
        from edge_client.tune_progress import Progress
        from edge_client.tuning.rows import read_rows

        file = None if adapter is None else resolve_adapter(adapter)
        rows = read_rows(data)
        with Progress(sys.stderr) as progress:
            run = RankRun(settings, data, rows, held_out_rows, progress)
            found = run.document(file, round_trips, layers_only=layers_only)
        if found["recommended"] is not None:
            found["recommended"]["tune"] += repeated(given)
        if as_json:
            print(json.dumps(found))
        else:
            show(found)
