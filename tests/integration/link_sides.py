"""What tests of the emulated link share: a slow link, a probe on its far side, and what is still there."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks import link_tun
from benchmarks.link import Joined, Preset
from benchmarks.processes import ROOT

LACKING = link_tun.missing()
NAMESPACES = pytest.param(
    "namespaces", marks=pytest.mark.skipif(LACKING is not None, reason=f"needs {LACKING}")
)
needs_namespaces = pytest.mark.skipif(LACKING is not None, reason=f"needs {LACKING}")
either_kind = pytest.mark.parametrize("kind", ["proxy", NAMESPACES])

SLOW = Preset(name="slow", rtt_ms=30, up_mbit_s=8, down_mbit_s=16)

# Each runs on the edge's side and prints one JSON line.
ECHO = """
import json, os, socket, sys, threading, time
host, _, port = sys.argv[1].rpartition(":")
data = os.urandom(int(sys.argv[2]))
started = time.perf_counter()
with socket.create_connection((host, int(port)), 300) as connection:
    connection.sendall(b"echo\\nx")
    assert connection.recv(1) == b"x"
first_s = time.perf_counter() - started
started = time.perf_counter()
with socket.create_connection((host, int(port)), 300) as connection:
    opened = time.perf_counter()
    connection.sendall(b"echo\\n")
    threading.Thread(target=connection.sendall, args=(data,)).start()
    received = b""
    while len(received) < len(data):
        piece = connection.recv(1 << 16)
        assert piece, "cut off"
        received += piece
    whole_s = time.perf_counter() - started
    times = []
    for _ in range(5):
        at = time.perf_counter()
        connection.sendall(b"x")
        assert connection.recv(1) == b"x"
        times.append(time.perf_counter() - at)
    connection.shutdown(socket.SHUT_WR)
    at = time.perf_counter()
    assert connection.recv(1) == b"", "the end of the stream should come back too"
    times.append(time.perf_counter() - at)
print(json.dumps({"same": received == data, "first_s": first_s, "whole_s": whole_s, "rtt_s": min(times)}))
"""
TAKE = """
import json, socket, sys, time
host, _, port = sys.argv[1].rpartition(":")
with socket.create_connection((host, int(port)), 300) as connection:
    connection.sendall(b"down\\n")
    started, received = time.perf_counter(), 0
    while received < int(sys.argv[2]):
        received += len(connection.recv(1 << 16))
    print(json.dumps({"whole_s": time.perf_counter() - started, "received": received}))
"""


@contextmanager
def probe(link: Joined) -> Iterator[str]:
    """Serve the probe on the cloud's side; yield where the edge finds it."""
    command = [*link.cloud_prefix, sys.executable, "-m", "benchmarks.link_probe", "serve", link.cloud_host]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        yield link.address(int(server.stdout.readline()))
    finally:
        server.kill()
        server.communicate()


def at_the_edge(link: Joined, script: str, *arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [*link.edge_prefix, sys.executable, "-c", script, *arguments],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def namespaces() -> set[str]:
    """Return the names of ours that exist."""
    if LACKING is not None:
        return set()
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return {line.split()[0] for line in listed.splitlines() if line.startswith("privatelora-")}


def runs(pid: int) -> bool:
    """Whether a process is there and more than a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
