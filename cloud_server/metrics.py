"""What a cloud tells Prometheus, on a port of its own: totals of the whole cloud, nothing of anybody.

No label is an identity, a session, an address or anything that came over the wire; the values of labels
are words of this program. What happens often is counted by who does it (`cloud_server.batch_statistics`,
`cloud_server.streams.Traffic`) and read here when Prometheus asks; what happens seldom is counted by the
library's own counters, for the whole process.
"""

import contextlib
import logging
import platform
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

import torch
from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from cloud_server.addresses import cannot_serve_metrics
from cloud_server.batch_statistics import Distribution
from cloud_server.config.observation import METRICS_ADDRESS, METRICS_OFF, host_and_port
from cloud_server.exposure import is_local
from cloud_server.logs import event, warning
from shared import PROTOCOL_VERSION, __version__

if TYPE_CHECKING:
    from cloud_server.service import Service

log = logging.getLogger(__name__)

PREFIX = "privatelora_"


def _counter(name: str, what: str, *labels: str) -> Counter:
    return Counter(PREFIX + name, what, labels, registry=None)


REFUSALS = _counter("refusals", "Calls ended by a status, by it and by why", "status", "reason")
OPENED = _counter("sessions_opened", "Sessions opened (how: new or resumed)", "how")
CLOSED = _counter("sessions_closed", "Sessions whose memory was freed, by why", "reason")
DROPPED = _counter("sessions_dropped", "Streams that broke and whose session was held to be resumed")
TUNED = _counter("tuning_batches", "Tuning batches that ended (outcome: done, failed or left)", "outcome")
DRAINS = _counter("drains", "Times this process was told to drain or stop")
WAITED = Histogram(
    PREFIX + "admission_wait_seconds",
    "How long those waited who did not find room at once, refused or not",
    registry=None,
    buckets=(0.01, 0.05, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0),
)
COUNTERS = (WAITED, REFUSALS, OPENED, CLOSED, DROPPED, TUNED, DRAINS)


class State(Collector):
    """What a service is and has done, read when it is asked for.

    Parameters
    ----------
    service
        Read from another thread than its own: only numbers, and copies of what may change.
    """

    def __init__(self, service: "Service") -> None:
        self.service = service

    def describe(self) -> Iterable[Metric]:
        """Return nothing: names are not looked up before the first scrape."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Yield every metric."""
        yield self._build()
        yield from self._occupancy()
        yield from self._batches()
        yield from self._wire()

    def _build(self) -> Metric:
        config = self.service.config
        labels = {
            "version": __version__,
            "protocol": str(PROTOCOL_VERSION),
            "dtype": config.dtype,
            "device": config.device,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
        }
        return _gauge("build_info", "What runs; always 1", {tuple(labels.values()): 1.0}, tuple(labels))

    def _occupancy(self) -> Iterator[Metric]:
        service = self.service
        cache, tuning = service.engine.cache, service.tuning
        sessions = list(service.sessions.values())
        dropped = sum(session.dropped_at is not None for session in sessions)
        states = {("connected",): len(sessions) - dropped, ("dropped",): dropped}
        yield _gauge("sessions", "Sessions; dropped ones are held to be resumed", states, ("state",))
        yield _gauge("sessions_limit", "Most sessions, dropped ones included", service.config.max_sessions)
        yield _gauge("waiting", "Sessions that wait for room", service.admission.waiting)
        yield _gauge("waiting_limit", "Most that may wait to be opened", service.config.queue.max_waiting)
        yield _gauge("steps_in_flight", "Steps that have come and not ended", len(service.engine.steps))
        yield _gauge("kv_used_bytes", "KV cache in use", cache.bytes_used)
        claimed = service.admission.claimed_bytes
        yield _gauge("kv_claimed_bytes", "KV cache that sessions hold or were admitted for", claimed)
        yield _gauge("kv_budget_bytes", "KV cache in all", cache.bytes_total)
        yield _gauge("tuning_streams", "Tuning runs connected", len(tuning.sessions))
        yield _gauge("tuning_streams_limit", "Most tuning runs at a time", service.config.tuning.max_streams)
        yield _gauge("tuning_used_bytes", "Memory set aside for tuning batches under way", tuning.budget.used)
        yield _gauge("tuning_budget_bytes", "Memory for tuning batches in all", tuning.budget.total)
        yield _gauge("part_fetches", "Edges that are fetching parts", service.part_service.under_way)

    def _batches(self) -> Iterator[Metric]:
        seen, tuning = self.service.engine.batches, self.service.tuning
        by_layer = {(str(layer),): sizes for layer, sizes in sorted(list(seen.by_layer.items()))}
        what = "Steps that ran together, by the segment's first layer"
        yield _histogram("batch_steps", what, by_layer, ("layer",))
        what = "How long the step of a batch that was ready first waited for it to run"
        yield _histogram("batch_queue_seconds", what, {(): seen.queued})
        yield _histogram("batch_run_seconds", "How long a batch ran", {(): seen.ran})
        steps = {("decode",): seen.decoding, ("prefill",): seen.prefill}
        what = "From a step's arrival to its end, waits for its edge included"
        yield _histogram("step_seconds", what, steps, ("kind",))
        positions = {(kind,): count for kind, count in seen.positions.items()}
        positions["tuning",] = tuning.queue.tokens
        yield _total("positions", "Positions processed: tokens, or rows of a batch", positions, ("kind",))

    def _wire(self) -> Iterator[Metric]:
        service = self.service
        parts = service.part_service.traffic
        traffic = {"decode": service.decoding.traffic, "tune": service.tuning.traffic, "parts": parts}
        counted = {
            (stream, direction): (size, messages)
            for stream, t in traffic.items()
            for direction, size, messages in (
                ("in", t.bytes_in, t.messages_in),
                ("out", t.bytes_out, t.messages_out),
            )
        }
        labels = ("stream", "direction")
        sizes = {key: size for key, (size, _) in counted.items()}
        yield _total("wire_bytes", "Bytes of messages, gRPC's framing included", sizes, labels)
        messages = {key: count for key, (_, count) in counted.items()}
        yield _total("wire_messages", "Messages", messages, labels)


class Scrape(WSGIRequestHandler):
    """One scrape. Who does not say what it wants is cut off, and so are more than a few at a time."""

    timeout = 5.0  # of each read and write (seconds)
    places = threading.BoundedSemaphore(16)  # each has a thread

    def handle(self) -> None:
        """Answer, if there is a place."""
        if not self.places.acquire(blocking=False):
            return
        try:
            with contextlib.suppress(OSError):  # gone, or too slow
                super().handle()
        finally:
            self.places.release()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing of a scrape."""


class MetricsServer:
    """Answers Prometheus until it is closed.

    Parameters
    ----------
    address
        HOST:PORT to listen on; port 0 is any. Nobody is asked who they are there.
    service
        What it tells of.

    Raises
    ------
    OSError
        If the port is taken or the address is not ours.
    ValueError
        If that is no HOST:PORT.
    """

    def __init__(self, address: str, service: "Service") -> None:
        host, port = host_and_port(address)
        self.registry = CollectorRegistry()
        for collector in (*COUNTERS, State(service)):
            self.registry.register(collector)
        ProcessCollector(registry=self.registry)
        try:
            served = start_http_server(port, host, self.registry)
        except OSError:
            raise cannot_serve_metrics(address) from None
        self._server: WSGIServer = served[0]
        # The library's own waits for ever for the rest of a request.
        self._server.RequestHandlerClass = Scrape
        self._thread: threading.Thread = served[1]
        self.address = f"{address.rpartition(':')[0]}:{self._server.server_port}"

    def close(self) -> None:
        """Stop answering."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5)


def open_metrics(address: str | None, service: "Service") -> MetricsServer | None:
    """Answer Prometheus, if it is wanted.

    Parameters
    ----------
    address
        HOST:PORT, or off. None is the default address, and nothing if that is taken: nobody asked for it,
        and another cloud on this machine may have it.
    service
        What is told of.

    Raises
    ------
    OSError
        If an address that was asked for cannot be listened on.
    """
    if address == METRICS_OFF:
        return None
    try:
        server = MetricsServer(address or METRICS_ADDRESS, service)
    except OSError as error:
        if address is not None:
            raise
        warning(log, "metrics_off", f"no metrics: {error.strerror}")
        return None
    if not is_local(server.address):
        words = f"metrics on {server.address} are told to everybody who gets there: nobody is asked who it is"
        warning(log, "metrics_open", words, address=server.address)
    event(log, "metrics_served", f"metrics on http://{server.address}/metrics", address=server.address)
    return server


def _gauge(name: str, what: str, values: float | Mapping[Any, float], labels: tuple[str, ...] = ()) -> Metric:
    family = GaugeMetricFamily(PREFIX + name, what, labels=labels)
    for key, value in (values if isinstance(values, Mapping) else {(): values}).items():
        family.add_metric(key, value)
    return family


def _total(name: str, what: str, values: Mapping[Any, float], labels: tuple[str, ...]) -> Metric:
    family = CounterMetricFamily(PREFIX + name, what, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family


def _histogram(
    name: str, what: str, values: Mapping[Any, Distribution], labels: tuple[str, ...] = ()
) -> Metric:
    family = HistogramMetricFamily(PREFIX + name, what, labels=labels)
    for key, distribution in values.items():
        at, buckets = 0, []
        bounds = (*map(str, distribution.bounds), "+Inf")
        for bound, count in zip(bounds, list(distribution.counts), strict=True):
            at += count
            buckets.append((bound, float(at)))
        family.add_metric(key, buckets, distribution.total)
    return family
