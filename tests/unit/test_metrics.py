"""Metrics: exact counts of what really ran, told over HTTP, and nothing that tells callers apart."""

import socket
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import Any

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families

from cloud_server.batch_statistics import STEPS, BatchStatistics, Distribution
from cloud_server.config.cloud import CloudConfig
from cloud_server.guard import Guard
from cloud_server.metrics import MetricsServer, Scrape, open_metrics
from cloud_server.refusal import Refusal
from cloud_server.service import Service
from cloud_server.streams import Traffic, abort
from edge_client.spans import Span
from tests.inprocess import LIMITS, Cloud
from tests.splits import split_of

WAIT_S = 300.0  # only what hangs takes as long, however slow the machine
Sample = tuple[str, tuple[tuple[str, str], ...]]


def scrape(server: MetricsServer) -> dict[Sample, float]:
    with urllib.request.urlopen(f"http://{server.address}/metrics", timeout=WAIT_S) as answer:
        text = answer.read().decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def key(name: str, **labels: str) -> Sample:
    return f"privatelora_{name}", tuple(sorted(labels.items()))


@pytest.fixture
def cloud(folder_of: Any) -> Iterator[Cloud]:
    split = split_of("llama")
    with Cloud(folder_of("llama"), [(split.plan, split.lowrank)], {"short_step_tokens": 4}) as cloud:
        yield cloud


def service_of(cloud: Cloud) -> Service:
    return Service(CloudConfig(), cloud.engine, {}, [], LIMITS)


def test_values_are_counted_by_size():
    sizes = Distribution((1, 2, 4))
    for value in (1, 2, 2, 3, 4, 5, 100):
        sizes.add(value)
    assert sizes.counts == [1, 2, 2, 2] and sizes.total == 117 and sizes.count == 7


def test_batches_by_their_first_layer():
    seen = BatchStatistics(4)
    seen.add(0, 1, 1, 0.0, 0.002)
    seen.add(0, 3, 3, 0.01, 0.002)
    seen.add(2, 256, 300, 0.0, 0.1)
    assert (seen.count, seen.steps, seen.tokens) == (3, 260, 304) and seen.mean_steps == 260 / 3
    assert {layer: sizes.count for layer, sizes in seen.by_layer.items()} == {0: 2, 2: 1}
    assert seen.by_layer[2].counts[STEPS.index(256)] == 1
    assert seen.ran.total == pytest.approx(0.104) and seen.queued.total == pytest.approx(0.01)
    seen.ended(4, 8, 1.0)
    seen.ended(5, 5, 2.0)
    assert seen.positions == {"decode": 8, "prefill": 5}
    assert (seen.decoding.total, seen.prefill.total) == (1.0, 2.0)


def test_what_ran_is_what_is_told(cloud: Cloud) -> None:
    split = split_of("llama")
    edge, stream = cloud.edge(split.plan, split.matrices), cloud.open(split.plan, split.matrices)
    service = service_of(cloud)
    server = MetricsServer("127.0.0.1:0", service)
    try:
        before = scrape(server)
        assert before[key("kv_used_bytes")] == 0
        stream.step(edge._embed(list(range(3, 43))), [Span(0, 0, 40, 1)])
        for position in (40, 41):
            stream.step(edge._embed([5]), [Span(0, position, 1, 1)])
        after = scrape(server)
    finally:
        server.close()
    assert after[key("positions_total", kind="prefill")] == 40
    assert after[key("positions_total", kind="decode")] == 2
    assert after[key("step_seconds_count", kind="decode")] == 2
    assert after[key("step_seconds_count", kind="prefill")] == 1
    assert after[key("step_seconds_sum", kind="prefill")] > 0
    per_layer = [
        after[key("batch_steps_count", layer=str(layer))] for layer in split.plan.exchange_layers
    ]  # one session alone: each segment ran at least once a step, in batches of one
    assert min(per_layer) >= 3
    assert sum(per_layer) == after[key("batch_run_seconds_count")] == cloud.engine.batches.count
    layer = str(split.plan.exchange_layers[0])
    assert after[key("batch_steps_bucket", layer=layer, le="1")] == per_layer[0]
    assert after[key("batch_queue_seconds_count")] == cloud.engine.batches.count
    assert after[key("kv_used_bytes")] == cloud.cache.bytes_used > 0
    assert after[key("kv_budget_bytes")] == cloud.cache.bytes_total
    assert after[key("steps_in_flight")] == 0
    assert any(name == "process_resident_memory_bytes" for name, _ in after)


def test_labels_are_words_of_this_program(cloud: Cloud) -> None:
    service = service_of(cloud)
    server = MetricsServer("127.0.0.1:0", service)
    try:
        samples = scrape(server)
    finally:
        server.close()
    allowed = {
        *("status", "reason", "how", "outcome", "state", "layer", "le", "kind", "stream", "direction"),
        *("version", "protocol", "dtype", "device", "python", "torch"),  # of the build
    }
    found = {label for _, labels in samples for label, _ in labels}
    assert found <= allowed, found - allowed
    assert samples[next(k for k in samples if k[0] == "privatelora_build_info")] == 1


class Ending:
    """Takes a stream's end as gRPC would."""

    def __init__(self) -> None:
        self.trailers: dict[str, str] = {}
        self.gone = False

    def cancelled(self) -> bool:
        return self.gone

    async def abort(self, code: grpc.StatusCode, message: str, trailing_metadata: Any) -> None:
        self.trailers = dict(trailing_metadata)


async def test_every_refusal_is_counted_by_status_and_reason(cloud: Cloud) -> None:
    server = MetricsServer("127.0.0.1:0", service_of(cloud))
    here = key("refusals_total", status="RESOURCE_EXHAUSTED", reason="kv")
    try:
        before = scrape(server).get(here, 0.0)
        ending: Any = Ending()
        refusal = Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", retry_after_s=0.25, reason="kv")
        await abort(ending, refusal)
        assert scrape(server)[here] == before + 1 and ending.trailers == {"retry-after-ms": "250"}
    finally:
        server.close()


async def test_a_fault_is_counted_as_what_grpc_makes_of_it(cloud: Cloud) -> None:
    server = MetricsServer("127.0.0.1:0", service_of(cloud))
    here = key("refusals_total", status="UNKNOWN", reason="fault")

    async def faulty(request: Any, context: Any) -> None:
        raise ValueError("a bug")

    try:
        before = scrape(server).get(here, 0.0)
        context: Any = Ending()
        with pytest.raises(ValueError, match="a bug"):
            await Guard()._guarded(faulty, "/a/Method", reads_itself=True)(None, context)
        assert scrape(server)[here] == before + 1
        context.gone = True  # who has left is no fault
        with pytest.raises(ValueError, match="a bug"):
            await Guard()._guarded(faulty, "/a/Method", reads_itself=True)(None, context)
        assert scrape(server)[here] == before + 1
    finally:
        server.close()


def test_bytes_by_stream_and_direction(cloud: Cloud) -> None:
    service = service_of(cloud)
    service.decoding.traffic.received(bytes(95))
    service.tuning.traffic.sent(bytes(15))
    server = MetricsServer("127.0.0.1:0", service)
    try:
        samples = scrape(server)
    finally:
        server.close()
    of = {
        (stream, way): samples[key("wire_bytes_total", stream=stream, direction=way)]
        for stream in ("decode", "tune", "parts")
        for way in ("in", "out")
    }
    assert of.pop(("decode", "in")) == 100 and of.pop(("tune", "out")) == 20 and set(of.values()) == {0}
    assert samples[key("wire_messages_total", stream="decode", direction="in")] == 1
    assert Traffic().bytes_in == 0


def test_who_does_not_finish_a_request_is_cut_off(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scrape, "timeout", 0.5)
    monkeypatch.setattr(Scrape, "places", threading.BoundedSemaphore(3))
    server = open_metrics("127.0.0.1:0", service_of(cloud))
    assert server is not None
    with ExitStack() as held:
        held.callback(server.close)
        host, _, port = server.address.rpartition(":")
        lines = [held.enter_context(socket.create_connection((host, int(port)), WAIT_S)) for _ in range(8)]
        for line in lines:
            line.sendall(b"GET /metr")
        for line in lines:
            with suppress(ConnectionResetError):
                assert line.recv(1) == b""
        monkeypatch.setattr(Scrape, "timeout", WAIT_S)  # who asks in full may take its time here
        assert scrape(server)


def test_a_taken_port_is_an_error_only_where_it_was_asked_for(
    cloud: Cloud, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = service_of(cloud)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(OSError, match=f"cannot serve metrics on {address}: the port is taken"):
            open_metrics(address, service)
        monkeypatch.setattr("cloud_server.metrics.METRICS_ADDRESS", address)
        assert (
            open_metrics(None, service) is None
            and f"no metrics: cannot serve metrics on {address}" in caplog.text
        )
    assert open_metrics("off", service) is None


@pytest.mark.parametrize("address", ["9464", "nowhere", "127.0.0.1:port", ":9464", "127.0.0.1:99999", ""])
def test_what_is_no_place_for_metrics(address: str) -> None:
    with pytest.raises(ValueError, match="HOST:PORT or off"):
        CloudConfig(metrics=address)
