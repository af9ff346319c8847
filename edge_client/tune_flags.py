"""Flags that more than one command which tunes has, each with the words of its help."""

from pathlib import Path
from typing import Annotated, Any

import typer

# Flags of such a command that are settings of `edge_client.config`; the others are of `tuning.config`.
EDGE_SETTINGS = (
    "cloud", "allow_redirect", "tls", "tls_ca", "token_file", "client_cert", "client_key", "plan",
    "wire_dtype", "dtype", "device", "fingerprint", "accept_new_fingerprint", "cache_dir",
)  # fmt: skip


def setting(flag: str, text: str, metavar: str = "N") -> Any:
    """Return a flag whose default is the setting's own."""
    return typer.Option(flag, metavar=metavar, help=text)


Data = Annotated[
    Path | None,
    typer.Option(
        "--data",
        metavar="FILE",
        help="Required, but with --resume: JSONL of chats or completions, or plain text.",
    ),
]
BatchSize = Annotated[int | None, setting("--batch-size", "Examples a step; 16 by default.")]
Validation = Annotated[
    float | None,
    setting("--validation", "Part of the rows held out to judge by; 0.1 by default.", "FRACTION"),
]
LossOn = Annotated[
    str | None, setting("--loss-on", "completions (the default), or all: learn prompts too.", "WHAT")
]
MaxTokens = Annotated[
    int | None, setting("--max-tokens", "Longest example; what the cloud takes by default.")
]
Truncate = Annotated[
    bool | None, typer.Option("--truncate", help="Cut the start of prompts that are too long.")
]
MicroBatchTokens = Annotated[
    int | None,
    setting("--micro-batch-tokens", "Tokens sent at a time; what the cloud takes, up to 4096."),
]
OrderSeed = Annotated[int | None, setting("--seed", "Of the order and the split; 0 by default.")]
