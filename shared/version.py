"""The version that is installed, for ``--version`` of both command lines."""

from importlib.metadata import version
from typing import Annotated

import typer


def _show(wanted: bool) -> None:
    if wanted:
        typer.echo(version("privatelora"))
        raise typer.Exit


ShowVersion = Annotated[
    bool, typer.Option("--version", callback=_show, is_eager=True, help="Show the version and exit.")
]
