"""The emulated link with real sockets and processes: bytes arrive, and never too early.

No test bounds a time from above: a slow machine may be late, the link may never be early.
"""

import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks.link import Joined, Link
from benchmarks.link_check import tcp_s
from benchmarks.processes import CloudProcess, edge_json
from tests.integration.link_sides import (
    ECHO,
    SLOW,
    TAKE,
    at_the_edge,
    either_kind,
    namespaces,
    needs_namespaces,
    probe,
)
from tests.integration.served import TINY_PLANS, Served

pytestmark = pytest.mark.alone

RTT_S, UP_BYTES_S, DOWN_BYTES_S = 0.030, 1e6, 2e6
PAYLOAD = 300_000  # bytes: 0.3 s up, 0.15 s down


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
def test_bytes_swapped_over_tcp_take_what_the_link_asks_at_least(kind: Any) -> None:
    with Link(SLOW, kind, check=False) as link:
        taken = tcp_s(link, PAYLOAD, 2 * PAYLOAD)
    assert taken >= RTT_S + PAYLOAD / UP_BYTES_S + 2 * PAYLOAD / DOWN_BYTES_S


@needs_namespaces
@pytest.mark.parametrize("keeps", [False, True])
def test_hosts_keep_their_window_through_a_pause_only_if_asked(keeps: bool) -> None:
    with Link(SLOW.model_copy(update={"keeps_window": keeps}), "namespaces", check=False) as link:
        for prefix in (link.cloud_prefix, link.edge_prefix):
            setting = ["cat", "/proc/sys/net/ipv4/tcp_slow_start_after_idle"]
            found = subprocess.run([*prefix, *setting], capture_output=True, text=True, check=True).stdout
            assert int(found) == (0 if keeps else 1)


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
