"""What --help says, of every command of both command lines."""

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from cloud_server import cli as cloud_cli
from edge_client import cli as edge_cli

APPS = {"cloud": cloud_cli.app, "edge": edge_cli.app}


def commands(app, group=None, before=()):
    """Yield the words of every command, the program itself first."""
    yield before
    for name, command in getattr(group or get_command(app), "commands", {}).items():
        yield from (
            commands(app, command, (*before, name)) if hasattr(command, "commands") else [(*before, name)]
        )


EVERY = [(side, words) for side, app in APPS.items() for words in commands(app)]


def help_of(side, words, columns=80):
    told = CliRunner().invoke(APPS[side], [*words, "--help"], env={"COLUMNS": str(columns)})
    assert told.exit_code == 0
    return told.output


def test_all_commands_are_looked_at():
    assert {("cloud", ("token", "add")), ("edge", ("adapter", "list")), ("edge", ("plan",))} < set(EVERY)


@pytest.mark.parametrize("side, words", EVERY)
def test_no_flag_asks_for_a_value(side, words):
    shown = help_of(side, words)
    assert "<bool>" not in shown and "--help" in shown


@pytest.mark.parametrize("words", [("plan",), ("rank",), ("doctor",)])
def test_paragraphs_are_filled(words):
    told = help_of("edge", words, 300).split("Options")[0].splitlines()
    assert all(line.rstrip().endswith((".", "[OPTIONS]", "─")) for line in told if line.strip(" ╭─")), told


@pytest.mark.parametrize("command", ["tune", "rank"])
def test_what_has_to_be_given_is_said(command):
    (line,) = [line for line in help_of("edge", (command,), 200).splitlines() if " --data " in line]
    assert "equired" in line
