"""Callers whom the cloud does not know: what they send is not read, and they are so many and no more."""

import socket
import time
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest

from benchmarks.processes import CloudProcess, memory_bytes
from tests.integration.raw_edge import SERVICE
from tests.integration.secured import Secured
from tests.integration.served import TINY_PLANS

CALLS, MESSAGE = 80, (4 << 20) - 100
MOST_GROWTH = 80 << 20  # of what is sent, 320 MiB; gRPC's own windows are in it


@pytest.mark.parametrize("method", ["Describe", "FetchEdgeParts", "Decode"])
def test_megabytes_of_a_stranger_are_not_held(shut: Secured, method: str) -> None:
    before, _ = memory_bytes(shut.process.pid)
    with grpc.secure_channel(shut.address, shut.tls()) as channel:
        call = channel.unary_stream(SERVICE + method)
        calls = [call(bytes(MESSAGE), timeout=300) for _ in range(CALLS)]
        for ended in calls:
            with pytest.raises(grpc.RpcError) as refused:
                list(ended)
            assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
    after, _ = memory_bytes(shut.process.pid)
    assert after - before < MOST_GROWTH, f"{after - before} bytes more"


def test_connections_are_so_many_and_no_more(small_model: Path) -> None:
    arguments = ["--plan", TINY_PLANS[0], "--kv-bytes", str(4 << 20), "--threads", "1"]
    arguments += ["--cache-dir", str(small_model.with_name(f"{small_model.name}-cache"))]
    with CloudProcess(
        str(small_model), arguments=arguments, env={"PRIVATELORA_CLOUD_MAX_CONNECTIONS": "4"}
    ) as cloud:
        host, _, port = cloud.address.rpartition(":")
        with ExitStack() as held:
            # One that is let in is greeted, another is closed: the cloud has decided on each before the next.
            # It accepts on several threads, and who asked whether it was up may still count for a while.
            let_in = 0
            for _ in range(200):
                connection = held.enter_context(socket.create_connection((host, int(port)), 300))
                if _greeting(connection):
                    let_in += 1
                elif let_in < 4:
                    time.sleep(0.1)
                else:
                    break
            assert let_in == 4
            with grpc.insecure_channel(cloud.address) as edge, pytest.raises(grpc.RpcError) as refused:
                edge.unary_unary(SERVICE + "Describe")(b"", timeout=2)
            assert refused.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
        with grpc.insecure_channel(cloud.address) as edge:
            edge.unary_unary(SERVICE + "Describe")(b"", timeout=120, wait_for_ready=True)


def _greeting(connection: socket.socket) -> bytes:
    try:
        return connection.recv(9)
    except ConnectionResetError:
        return b""
