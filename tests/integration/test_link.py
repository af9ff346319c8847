"""The emulated link with real sockets and processes: bytes arrive, never too early, and nothing is left.

No test bounds a time from above: a slow machine may be late, the link may never be early.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from benchmarks import link_check, link_tun
from benchmarks.link import PRESETS, Joined, Link, LinkError, Preset
from benchmarks.link_check import deviations
from benchmarks.processes import ROOT, CloudProcess, edge_json
from tests.integration.served import TINY_PLANS, Served

LACKING = link_tun.missing()
NAMESPACES = pytest.param(
    "namespaces", marks=pytest.mark.skipif(LACKING is not None, reason=f"needs {LACKING}")
)
needs_namespaces = pytest.mark.skipif(LACKING is not None, reason=f"needs {LACKING}")
either_kind = pytest.mark.parametrize("kind", ["proxy", NAMESPACES])

SLOW = Preset(name="slow", rtt_ms=30, up_mbit_s=8, down_mbit_s=16)
RTT_S, UP_BYTES_S, DOWN_BYTES_S = 0.030, 1e6, 2e6
PAYLOAD = 300_000  # bytes: 0.3 s up, 0.15 s down
GONE_S = 30.0  # until which something that should vanish may take; then it is taken to stay

# Each runs on the edge's side and prints one JSON line.
ECHO = """
import json, os, socket, sys, threading, time
host, _, port = sys.argv[1].rpartition(":")
data = os.urandom(int(sys.argv[2]))
started = time.perf_counter()
with socket.create_connection((host, int(port)), 60) as connection:
    connection.sendall(b"echo\\nx")
    assert connection.recv(1) == b"x"
first_s = time.perf_counter() - started
started = time.perf_counter()
with socket.create_connection((host, int(port)), 60) as connection:
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
with socket.create_connection((host, int(port)), 60) as connection:
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
        capture_output=True, text=True, timeout=120, check=False,
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


def becomes_true(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + GONE_S
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def runs(pid: int) -> bool:
    """Whether a process is there and more than a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# --- what travels -----------------------------------------------------------------------------------


@either_kind
def test_bytes_arrive_both_ways_and_never_too_early(kind: Any) -> None:
    with Link(SLOW, kind, check=False) as link, probe(link) as address:
        echoed = at_the_edge(link, ECHO, address, str(PAYLOAD))
        taken = at_the_edge(link, TAKE, address, str(PAYLOAD))
        counted = link.statistics()
    assert echoed["same"], "what came back is not what was sent"
    assert echoed["rtt_s"] >= RTT_S
    # Opening a connection takes a round trip, what is sent then another, and its time on the slower way.
    assert echoed["first_s"] >= 2 * RTT_S
    assert echoed["whole_s"] >= 2 * RTT_S + PAYLOAD / UP_BYTES_S
    assert taken["received"] >= PAYLOAD and taken["whole_s"] >= RTT_S + PAYLOAD / DOWN_BYTES_S
    assert counted["up"]["bytes"] > PAYLOAD and counted["down"]["bytes"] > 2 * PAYLOAD
    assert counted["up"]["packets"] >= PAYLOAD / 1500


@either_kind
def test_connections_share_the_link(kind: Any) -> None:
    with Link(SLOW, kind, check=False) as link, probe(link) as address:
        started, taken = time.perf_counter(), []
        threads = [
            threading.Thread(target=lambda: taken.append(at_the_edge(link, TAKE, address, str(PAYLOAD))))
            for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        whole_s = time.perf_counter() - started
    assert len(taken) == 3
    assert whole_s >= RTT_S + 3 * PAYLOAD / DOWN_BYTES_S


@either_kind
def test_a_port_where_nobody_listens_refuses(kind: Any) -> None:
    script = """
import json, socket, sys
host, _, port = sys.argv[1].rpartition(":")
try:
    with socket.create_connection((host, int(port)), 60) as connection:
        refused = connection.recv(1) == b""
except ConnectionError:
    refused = True
print(json.dumps({"refused": refused}))
"""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # and never listens
        with Link(SLOW, kind, check=False) as link:
            assert at_the_edge(link, script, link.address(unused.getsockname()[1]))["refused"]


ASKED = ("--raw", "--prompt", "hello", "--temperature", "0", "--max-new-tokens", "4", "--plan", "r8")


@pytest.fixture(scope="module")
def beside(tiny_cloud: Served) -> dict[str, Any]:
    """Return what an edge is answered without a link."""
    return edge_json("generate", "--cloud", tiny_cloud.address, *ASKED)


@contextmanager
def cloud_beyond(link: Joined, tiny_cloud: Served, log: Path) -> Iterator[CloudProcess]:
    """Yield a tiny cloud on the far side: the one there is, unless that side is a namespace."""
    if not link.cloud_prefix:
        yield tiny_cloud.process
        return
    arguments = ["--cache-dir", str(tiny_cloud.cache_dir), "--plan", TINY_PLANS[0], "--threads", "1"]
    with CloudProcess(
        str(tiny_cloud.folder), arguments=arguments, log=log, host=link.cloud_host, prefix=link.cloud_prefix
    ) as cloud:
        yield cloud


@either_kind
def test_an_edge_decodes_over_it(
    kind: Any, tiny_cloud: Served, beside: dict[str, Any], tmp_path: Path
) -> None:
    with (
        Link(SLOW, kind, check=False) as link,
        cloud_beyond(link, tiny_cloud, tmp_path / "log") as cloud,
    ):
        asked = ("--cloud", link.address(cloud.port), *ASKED, "--cache-dir", str(tmp_path))
        over = edge_json("generate", *asked, prefix=link.edge_prefix)
    assert over["tokens"] == beside["tokens"], "a link changes no token"
    assert over["new_tokens"] > 1, "nothing was decoded, so no rate was bounded"
    assert over["round_trips_per_token"] >= 4  # a layer each
    assert over["decode_tok_s"] <= 1 / (over["round_trips_per_token"] * RTT_S) * 1.01  # rounded figures


# --- what is left -----------------------------------------------------------------------------------


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
    assert left_behind.wait(GONE_S) == -signal.SIGKILL
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
    benchmark.communicate(timeout=GONE_S)
    assert becomes_true(lambda: not set(made["names"]) & namespaces())
    assert becomes_true(lambda: not runs(made["forwarder"]))
    assert becomes_true(lambda: not runs(made["sleeper"]))


@needs_namespaces
def test_namespaces_are_gone_though_the_forwarder_was_killed() -> None:
    before = namespaces()
    with Link(SLOW, "namespaces", check=False) as link:
        os.kill(link.forwarder_pid, signal.SIGKILL)
        with pytest.raises(LinkError, match="forwarder"):
            link.statistics()
    assert namespaces() == before


@needs_namespaces
def test_two_links_at_once_do_not_meet() -> None:
    before = namespaces()
    with Link(SLOW, "namespaces", check=False) as one, Link(SLOW, "namespaces", check=False) as other:
        assert len(namespaces() - before) == 4
        with probe(one) as here, probe(other) as there:
            assert at_the_edge(one, ECHO, here, "1000")["same"]
            assert at_the_edge(other, ECHO, there, "1000")["same"]
        silent = other.statistics()["up"]["packets"]
        with probe(one) as here:
            assert at_the_edge(one, ECHO, here, "1000")["same"]
        assert other.statistics()["up"]["packets"] == silent
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


# --- the check --------------------------------------------------------------------------------------


def test_loopback_joins_nothing() -> None:
    with Link(PRESETS["loopback"], check=False) as link:
        assert (link.cloud_prefix, link.edge_prefix, link.address(5)) == ((), (), "127.0.0.1:5")


def test_a_check_names_what_is_off() -> None:
    right = {"rtt_ms": 20.5, "up_mbit_s": 57.9, "down_mbit_s": 96.5}
    assert deviations(right, PRESETS["5g"]) == []
    assert deviations({**right, "rtt_ms": 23.1}, PRESETS["5g"]) == ["a round trip takes 23.1 ms, not 20"]
    assert deviations({**right, "rtt_ms": 16.9}, PRESETS["5g"]) != []
    assert deviations({**right, "up_mbit_s": 53.0}, PRESETS["5g"]) == ["up carries 53.0 Mbit/s, not 60"]
    assert deviations({**right, "down_mbit_s": 111.0}, PRESETS["5g"]) == [
        "down carries 111.0 Mbit/s, not 100"
    ]


def test_a_link_that_is_not_what_it_says_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proxy is given another delay than the preset says, and its check is a real one."""
    honest = Preset.shape
    slower = {"rtt_ms": SLOW.rtt_ms + 20}
    monkeypatch.setattr(link_check, "CHECKS", 1)
    monkeypatch.setattr(Preset, "shape", lambda self, rate: honest(self.model_copy(update=slower), rate))
    before = set(threading.enumerate())
    with pytest.raises(LinkError, match="a round trip takes .* ms, not 30"), Link(SLOW, "proxy"):
        pytest.fail("it should not have been entered")
    assert set(threading.enumerate()) <= before


@pytest.mark.skipif(LACKING is None, reason="this machine can make namespaces")
def test_asking_for_namespaces_where_there_are_none_says_what_is_missing() -> None:
    with pytest.raises(LinkError, match="which is missing here"), Link(SLOW, "namespaces", check=False):
        pytest.fail("it should not have been entered")
