"""What a cloud refuses before it fetches or loads a model, in words that say what to do."""

import asyncio
import socket
import sys

import pytest
from typer.testing import CliRunner

from cloud_server import cli
from cloud_server.config import CloudConfig
from cloud_server.server import serve

NOWHERE = "no such model"  # looked for only after all else was found in order


def start(**settings: str) -> None:
    asyncio.run(serve(CloudConfig(model=NOWHERE, **settings), lambda address, service: None))


def test_a_taken_port_is_found_before_the_model_is_looked_for():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(OSError, match=f"cannot listen on {listen}: the port is taken"):
            start(listen=listen)


@pytest.mark.parametrize("device", ["cuda:99", "abacus"])
def test_a_device_that_is_not_there_is_found_before_the_model_is_looked_for(device):
    with pytest.raises(ValueError, match=f"cannot compute on device '{device}': "):
        start(device=device)


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "localhost:0", "[::1]:0", "0.0.0.0:0"])
def test_a_free_address_is_not_in_the_way(listen):
    with pytest.raises(ValueError, match=NOWHERE):
        start(listen=listen)


def test_an_environment_with_the_edge_only_is_told_what_it_lacks(monkeypatch):
    monkeypatch.setitem(sys.modules, "cloud_server.server", None)  # as where an extra's package is missing
    result = CliRunner().invoke(cli.app, ["serve"])
    assert result.exit_code == 1 and ".[cloud]" in result.stderr and "Traceback" not in result.output
