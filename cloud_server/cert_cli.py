"""``privatelora-cloud cert``: certificates for development and private networks. Imports no torch."""

import socket
import sys
from pathlib import Path
from typing import Annotated

import typer

from shared.complaint import in_words
from shared.help_text import Commands

app = typer.Typer(cls=Commands, help="Make certificates to begin with.", no_args_is_help=True)


@app.callback()
def cert() -> None:
    """Make certificates to begin with."""


@app.command()
def dev(
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Where the files go.")] = Path("certs"),
    name: Annotated[
        list[str] | None,
        typer.Option(
            "--name",
            metavar="HOST|IP",
            help="A name or address by which edges reach the cloud; repeatable. By default localhost, "
            "127.0.0.1, ::1 and this machine's name.",
        ),
    ] = None,
    client: Annotated[
        list[str] | None,
        typer.Option("--client", metavar="NAME", help="A client to make a certificate for; repeatable."),
    ] = None,
    days: Annotated[float, typer.Option(min=0, max=36_500, help="How long they are valid (days).")] = 90.0,
) -> None:
    """Make a CA of your own (kept once made), a server's certificate and those of clients.

    Run it again to renew: a running cloud takes the new files by itself. Keep ca.key safe.
    """
    try:
        from cloud_server.dev_certs import make

        ca, server, clients = make(out, name or _own_names(), client or ["edge"], days)
    except ModuleNotFoundError as error:
        print(f"error: {error}; pip install '.[cloud]' adds it", file=sys.stderr)
        raise typer.Exit(1) from None
    except (ValueError, OSError) as error:
        print(f"error: {in_words(error)}", file=sys.stderr)
        raise typer.Exit(1) from None
    print(
        f"cloud: privatelora-cloud serve --tls-cert {server.cert} --tls-key {server.key} [--client-ca {ca}]"
    )
    for pair in clients:
        print(
            f"edge:  privatelora-edge ... --tls-ca {ca} [--client-cert {pair.cert} --client-key {pair.key}]"
        )


def _own_names() -> list[str]:
    host = socket.gethostname()
    usable = host.isascii() and all(c.isalnum() or c in ".-" for c in host)
    return list(dict.fromkeys(["localhost", "127.0.0.1", "::1", *([host] if host and usable else [])]))
