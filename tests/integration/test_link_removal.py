"""What is left of an emulated link after its end, however that came: nothing."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress

import pytest

from benchmarks.link import Link, LinkError
from benchmarks.processes import ROOT
from tests.integration.link_sides import SLOW, namespaces, needs_namespaces, runs
from tests.waiting import until

pytestmark = pytest.mark.alone


class Ordinary(Exception):
    pass


@needs_namespaces
def test_namespaces_and_what_runs_there_are_gone_after_an_exception() -> None:
    before = namespaces()
    with pytest.raises(Ordinary), Link(SLOW, "namespaces", check=False) as link:
        # It ignores SIGTERM, as a process that hangs would.
        stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True)"
        command = [*link.edge_prefix, sys.executable, "-c", f"{stubborn}; time.sleep(600)"]
        left_behind = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert left_behind.stdout is not None and left_behind.stdout.readline()
        assert len(namespaces() - before) == 2
        raise Ordinary
    assert left_behind.wait() == -signal.SIGKILL
    left_behind.stdout.close()
    assert namespaces() == before
    assert not [name for name in os.listdir("/sys/class/net") if name.startswith("pl")]


@needs_namespaces
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_namespaces_are_gone_after_a_signal(number: signal.Signals) -> None:
    """Even SIGKILL: the forwarder notices that whoever started it is gone."""
    script = """
import json, subprocess, sys, time
from benchmarks.link import Link, Preset, end_on_sigterm
end_on_sigterm()
with Link(Preset(name="any", rtt_ms=2, up_mbit_s=8, down_mbit_s=8), "namespaces", check=False) as link:
    sleeper = subprocess.Popen([*link.cloud_prefix, "sleep", "600"])
    names = [link.cloud_prefix[3], link.edge_prefix[3]]
    print(json.dumps({"names": names, "sleeper": sleeper.pid, "forwarder": link.forwarder_pid}), flush=True)
    time.sleep(600)
"""
    benchmark = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert benchmark.stdout is not None
    made = json.loads(benchmark.stdout.readline())
    assert set(made["names"]) <= namespaces() and runs(made["forwarder"])
    benchmark.send_signal(number)
    benchmark.communicate()
    until(lambda: not set(made["names"]) & namespaces())
    until(lambda: not runs(made["forwarder"]))
    until(lambda: not runs(made["sleeper"]))


@needs_namespaces
def test_namespaces_are_gone_though_the_forwarder_was_killed() -> None:
    before = namespaces()
    with Link(SLOW, "namespaces", check=False) as link:
        os.kill(link.forwarder_pid, signal.SIGKILL)
        with pytest.raises(LinkError, match="forwarder"):
            link.statistics()
    assert namespaces() == before


def test_the_proxy_is_gone_after_an_exception() -> None:
    before = set(threading.enumerate())
    with (
        socket.create_server(("127.0.0.1", 0)) as cloud,
        pytest.raises(Ordinary),
        Link(SLOW, "proxy", check=False) as link,
    ):
        host, _, port = link.address(cloud.getsockname()[1]).rpartition(":")
        edge = socket.create_connection((host, int(port)), 60)
        edge.sendall(b"hello")
        accepted, _ = cloud.accept()
        accepted.settimeout(60)
        assert accepted.recv(5) == b"hello"
        raise Ordinary
    with edge, accepted:
        edge.settimeout(60)
        for end in (edge, accepted):  # cut, not left to wait
            with suppress(ConnectionError):
                assert end.recv(1) == b""
    assert set(threading.enumerate()) <= before
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)), 60)
