"""What both command lines' --help has in common: flags take no value, and paragraphs are filled.

typer writes ``<bool>`` after a flag as if a value had to follow, and keeps the line breaks of a docstring,
which are those of the source and not of the terminal.
"""

from typing import Any

import typer
from typer.core import TyperGroup


class Commands(TyperGroup):
    """A group of commands whose help, and its own, is written so."""

    def get_params(self, ctx: typer.Context) -> list[Any]:  # type: ignore[override]
        """Return this group's own options."""
        return _flags_take_nothing(super().get_params(ctx))

    def get_command(self, ctx: typer.Context, cmd_name: str) -> Any:  # type: ignore[override]
        """Return a command of this group, None if there is none of that name."""
        command: Any = super().get_command(ctx, cmd_name)
        if command is not None:
            _flags_take_nothing(command.get_params(ctx))
            if command.help:
                command.help = _filled(command.help)
        return command


def _flags_take_nothing(params: list[Any]) -> list[Any]:
    for param in params:
        if getattr(param, "is_flag", False) and param.metavar is None:
            param.metavar = ""
    return params


def _filled(text: str) -> str:
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.strip().split("\n\n"))
