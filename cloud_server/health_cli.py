"""``privatelora-cloud health``: what a container's health check runs. Imports no torch."""

import sys
from typing import Annotated

import typer


def health(
    at: Annotated[
        str, typer.Option("--at", metavar="HOST:PORT", help="What `serve --health` was given.")
    ] = "127.0.0.1:50052",
    service: Annotated[
        str,
        typer.Option("--service", metavar="NAME", help="Empty: ready for requests; liveness: alive at all."),
    ] = "",
) -> None:
    """Ask whether a cloud is ready, at the port for probes; ends with 1 if it is not."""
    try:
        from cloud_server.probes import health_of
    except ModuleNotFoundError as error:
        print(f"error: {error}; pip install '.[cloud]' adds it", file=sys.stderr)
        raise typer.Exit(1) from None
    found = health_of(at, service)
    print(found)
    if found != "SERVING":
        raise typer.Exit(1)
