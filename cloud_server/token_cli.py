"""``privatelora-cloud token``: who may use a cloud. Imports no torch."""

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from shared.complaint import in_words
from shared.help_text import Commands

app = typer.Typer(
    cls=Commands, help="Make, list and revoke the tokens by which edges are let in.", no_args_is_help=True
)

TokensFile = Annotated[
    Path,
    typer.Option(
        "--tokens",
        envvar="PRIVATELORA_CLOUD_TOKENS",
        metavar="FILE",
        help="The token file, the one given to `serve`; it holds names and digests, no token.",
    ),
]
Name = Annotated[str, typer.Argument(help="Who the token is for; limits and logs go by this name.")]


@app.command()
def add(
    name: Name,
    tokens: TokensFile,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Write it to this new file, for its owner only."),
    ] = None,
) -> None:
    """Make a token and print it, once: it is kept nowhere else.

    A running cloud knows it at once. Bring it to the edge by a safe way.
    """
    from cloud_server.tokens import add as add_token
    from cloud_server.tokens import revoke as revoke_token

    with _one_line_errors():
        if out is None:
            print(add_token(tokens, name))
            print(f"the token of {name}; it cannot be shown again", file=sys.stderr)
            return
        # Never over another token, and open to its owner only from the first byte on.
        try:
            number = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            raise FileExistsError(
                f"{out} exists already: remove it (rm {shlex.quote(str(out))}), or give another --out"
            ) from None
        with open(number, "w") as file:
            try:
                token = add_token(tokens, name)
            except BaseException:
                out.unlink()
                raise
            try:
                print(token, file=file, flush=True)
            except OSError:  # a token that nobody has seen is of no use
                revoke_token(tokens, name)
                raise
        print(f"wrote the token of {name} to {out}", file=sys.stderr)


@app.command("list")
def list_tokens(tokens: TokensFile) -> None:
    """List names and when their tokens were made."""
    from cloud_server.tokens import entries

    with _one_line_errors():
        for name, entry in sorted(entries(tokens).items()):
            print(f"{name}\t{entry.created}")


@app.command()
def revoke(name: Name, tokens: TokensFile) -> None:
    """Revoke a token. Running clouds end its streams within seconds."""
    from cloud_server.tokens import revoke as revoke_token

    with _one_line_errors():
        revoke_token(tokens, name)
        print(f"revoked the token of {name}", file=sys.stderr)


@contextmanager
def _one_line_errors() -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError) as error:
        print(f"error: {in_words(error)}", file=sys.stderr)
        raise typer.Exit(1) from None
