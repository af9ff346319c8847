"""docs/operations.md: the page's own commands, run in a fresh folder, give a closed cloud that answers."""

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.ports import free_port
from benchmarks.processes import ROOT, child_environment
from edge_client.config import load_config
from edge_client.connection import CloudConnectionError, Connection, Timeouts
from edge_client.credentials import Credentials
from shared.pb.privatelora.v1 import private_lora_pb2 as pb

PAGE = (ROOT / "docs" / "operations.md").read_text()
SECTION = PAGE.split("\n## ")[1]
BLOCKS = re.findall(r"```sh\n(.*?)```", SECTION, flags=re.DOTALL)
PORT = "50051"


class Place:
    """A fresh folder in which the page's blocks are run, with its installation in place."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, str(free_port())
        bin_folder = folder / ".venv" / "bin"
        bin_folder.mkdir(parents=True)
        (bin_folder / "activate").write_text(f"export PATH={shlex.quote(str(bin_folder))}:$PATH\n")
        for side in ("cloud", "edge"):
            module = {"cloud": "cloud_server", "edge": "edge_client"}[side]
            command = bin_folder / f"privatelora-{side}"
            command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m {module}.cli "$@"\n')
            command.chmod(0o755)
        # The packaged model is in the user's cache; what is pinned and tuned is not the user's.
        self.environment = child_environment({"PRIVATELORA_CONFIG_DIR": str(folder / "config")})
        self.environment["PATH"] = f"{bin_folder}{os.pathsep}{self.environment['PATH']}"

    def start(self, block: str) -> subprocess.Popen[str]:
        """Begin to run a block's commands, each of which must succeed; only the port is another one."""
        text = block.replace(PORT, self.port)
        return subprocess.Popen(
            ["bash", "-eu", "-c", text], cwd=self.folder, env=self.environment, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip

    def settings(self) -> Credentials:
        """Return what the settings file on the page says to show."""
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.folder)
            config = load_config(Path("edge.toml"))
            assert config.cloud == f"localhost:{self.port}"
            return Credentials.of(config)

    def run(self, block: str) -> tuple[int, str]:
        process = self.start(block)
        output, _ = process.communicate(timeout=800)
        return process.returncode, output


def describe(place: Place, credentials: Credentials) -> pb.DescribeResponse:
    """Ask the running cloud what it offers."""
    connection = Connection(f"localhost:{place.port}", Timeouts(connect_s=60.0), credentials)
    try:
        return connection.describe()
    finally:
        connection.close()


def commands(block: str) -> list[str]:
    """Return the commands of a block; a here-document is part of its own."""
    text = re.sub(r"<<'(\w+)'\n.*?\n\1\n", "...\n", block, flags=re.DOTALL)
    return [line for line in text.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Run the block that ends with `serve`, and leave that running."""
    place = Place(tmp_path_factory.mktemp("newcomer"))
    cloud = place.start(BLOCKS[1])
    try:
        assert cloud.stdout is not None
        lines = []
        while not (lines and lines[-1].startswith("serving ")):
            lines.append(cloud.stdout.readline())
            assert lines[-1], "".join(lines)
        yield place
    finally:
        if cloud.poll() is None:
            os.killpg(cloud.pid, signal.SIGTERM)
        cloud.communicate(timeout=120)


def test_there_are_fewer_than_ten_commands() -> None:
    deployment = [line for block in BLOCKS[:3] for line in commands(block)]
    assert len(deployment) == 9 and "nine commands" in SECTION
    makefile = (ROOT / "Makefile").read_text()
    assert deployment[0] == "make install" and re.search(r"^install:", makefile, flags=re.MULTILINE)


@pytest.mark.model
def test_a_newcomer_gets_an_answer(place: Place) -> None:
    status, output = place.run(BLOCKS[2])
    assert status == 0, output
    assert "can be used" in output and "failed" not in output
    assert "ok       token" in output and "TLSv1.3" in output
    assert "Paris" in output


@pytest.mark.model
def test_without_token_or_certificate_nobody_gets_in(place: Place) -> None:
    status, output = place.run(BLOCKS[3])
    assert status == 1 and "failed   tls" in output and "give --client-cert FILE" in output, output
    with pytest.raises(CloudConnectionError, match="--client-cert"):
        describe(place, replace(place.settings(), client_cert=None, client_key=None))
    with pytest.raises(CloudConnectionError, match=r"UNAUTHENTICATED.*--token-file"):
        describe(place, replace(place.settings(), token=None))
    with pytest.raises(CloudConnectionError, match="UNAUTHENTICATED"):
        describe(place, replace(place.settings(), token="plora_" + "x" * 43))
    assert describe(place, place.settings()).plans


@pytest.mark.model
def test_a_revoked_token_is_of_no_use(place: Place) -> None:
    """Last in this file: laptop is shut out afterwards."""
    settings = place.settings()
    status, output = place.run(BLOCKS[4])
    assert status == 0, output
    with pytest.raises(CloudConnectionError, match="UNAUTHENTICATED.*revoked"):
        describe(place, settings)
