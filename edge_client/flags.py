"""The flags that several commands have, and how commands show their errors. Imports no torch."""

import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from edge_client.plain import printable
from shared.complaint import in_words, is_want_of_memory

Cloud = Annotated[
    str | None,
    typer.Option(
        "--cloud",
        metavar="HOST:PORT",
        help="Where `privatelora-cloud serve` listens; 127.0.0.1:50051 by default. Several with commas are "
        "replicas: if one dies, the next goes on.",
    ),
]
AllowRedirect = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-redirect",
        metavar="NAME",
        help="Let a cloud that shuts down send this edge to NAME (a host, or *.domain) too; repeatable. "
        "Those in --cloud, and over TLS whoever has the cloud's certificate, are allowed anyway.",
    ),
]
Tls = Annotated[
    bool | None,
    typer.Option("--tls", help="Encrypt; the cloud's certificate is from a public CA. Not with --tls-ca."),
]
TlsCa = Annotated[
    Path | None,
    typer.Option("--tls-ca", metavar="FILE", help="Encrypt; the cloud's certificate is from this CA (PEM)."),
]
TokenFile = Annotated[
    Path | None,
    typer.Option(
        "--token-file",
        metavar="FILE",
        help="This edge's token, where one is asked for; or set PRIVATELORA_EDGE_TOKEN. Only sent over TLS.",
    ),
]
ClientCert = Annotated[
    Path | None,
    typer.Option(
        "--client-cert", metavar="FILE", help="This edge's certificate (PEM), where mTLS is asked for."
    ),
]
ClientKey = Annotated[
    Path | None, typer.Option("--client-key", metavar="FILE", help="Private key of that certificate (PEM).")
]
AdapterName = Annotated[
    Path | None,
    typer.Option(
        "--adapter",
        metavar="NAME|FILE",
        help="Your personal weights, by name (`adapter list`) or file; without, those in use; none: the base "
        "model.",
    ),
]
PlanName = Annotated[
    str | None,
    typer.Option(
        "--plan",
        metavar="NAME",
        help="Split of the model to use; `info` lists them. A name's -r<digits> may be left out if one fits.",
    ),
]
WireDtype = Annotated[
    str | None,
    typer.Option(
        "--wire-dtype",
        help="float32, bfloat16, float16 or (not for tuning) int8: what numbers travel as; the cloud's by "
        "default.",
    ),
]
HiddenWireDtype = Annotated[
    str | None,
    typer.Option("--hidden-wire-dtype", help="The same for hidden states alone: not int4."),
]
CodesWireDtype = Annotated[
    str | None,
    typer.Option("--codes-wire-dtype", help="The same for codes (cloud to edge) alone: int4 too."),
]
ResidualCodesWireDtype = Annotated[
    str | None,
    typer.Option(
        "--residual-codes-wire-dtype", help="The same for residual codes (edge to cloud) alone: int4 too."
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype", help="float32, bfloat16 or float16: what this side computes in; the cloud's by default."
    ),
]
Device = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda or mps: where this side computes; cpu by default.")
]
MaxNewTokens = Annotated[
    int | None, typer.Option("--max-new-tokens", metavar="N", help="Longest answer (tokens); 256 by default.")
]
Temperature = Annotated[
    float | None,
    typer.Option(
        "--temperature",
        help="0: always the likeliest token; higher: more varied; the model's own by default.",
    ),
]
TopP = Annotated[
    float | None,
    typer.Option(
        "--top-p", help="Sample only from the likeliest tokens that reach this probability together (0 to 1)."
    ),
]
Seed = Annotated[
    int | None, typer.Option("--seed", help="Makes sampling repeatable; a whole number, 0 or more.")
]
DraftTokens = Annotated[
    int | None,
    typer.Option(
        "--draft-tokens",
        metavar="N",
        help="Guess up to N tokens ahead where that saves time, and check them in one step; 8 by default, 64 "
        "at most, 0: never.",
    ),
]
DraftFrom = Annotated[
    list[Path] | None,
    typer.Option(
        "--draft-from",
        metavar="FILE",
        help="A text of yours to guess from; may be given several times. It stays here, but what is guessed "
        "crosses the wire as a prompt does.",
    ),
]
System = Annotated[str | None, typer.Option("--system", metavar="TEXT", help="System message to begin with.")]
FingerprintHex = Annotated[
    str | None,
    typer.Option("--fingerprint", metavar="HEX", help="The model's fingerprint, from a trusted source."),
]
AcceptNew = Annotated[
    bool | None,
    typer.Option("--accept-new-fingerprint", help="Trust a cloud whose model has changed, and remember it."),
]
CacheDir = Annotated[
    Path | None, typer.Option("--cache-dir", help="Folder for embeddings, head and tokenizer.")
]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="TOML file with any of these settings.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]


CONNECTING = ("config", "cloud", "allow_redirect", "tls", "tls_ca", "token_file", "client_cert", "client_key")


def repeated(given: Mapping[str, Any], names: Sequence[str] = (*CONNECTING, "cache_dir")) -> str:
    """Return those of the given flags that another command needs to reach the same cloud, to be pasted.

    Parameters
    ----------
    given
        The command's flags by their names in Python; None and False are not given.
    names
        Which of them to repeat.
    """
    words = []
    for name in names:
        value, flag = given.get(name), "--" + name.replace("_", "-")
        if value is True:
            words.append(flag)
        elif isinstance(value, list):
            words += [f"{flag} {shlex.quote(str(one))}" for one in value]
        elif value is not None and value is not False:
            words.append(f"{flag} {shlex.quote(str(value))}")
    return "".join(f" {word}" for word in words)


@contextmanager
def one_line_errors(debug: bool) -> Iterator[None]:
    """Turn every expected error into one line and an exit code: 2 for settings, 130 for Ctrl-C, else 1."""
    try:
        yield
    except typer.Exit:  # a RuntimeError, but no error
        raise
    except (ValueError, OSError, RuntimeError, MemoryError, ImportError) as error:
        if debug or (isinstance(error, ImportError) and not is_want_of_memory(error)):
            raise
        # A cloud's words, and what it calls its plans, are in some messages.
        print(f"error: {printable(in_words(error))}", file=sys.stderr)
        raise typer.Exit(2 if _is_of_settings(error) else 1) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _is_of_settings(error: BaseException) -> bool:
    config = sys.modules.get("edge_client.config")  # what was never imported has raised nothing
    return config is not None and isinstance(error, config.SettingsError)
