"""What counting costs the engine: nanoseconds a batch and a step, and what one scrape takes.

    python -m benchmarks.metrics_cost

Beside it, the same with the library's own histograms, which take a lock for each bucket. The engine pays for
one batch at each segment and for one step at its end. A scrape is rendered in a thread of its own, which the
engine waits for at most as long as the interpreter lets one thread run (5 ms).
"""

import json
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

from prometheus_client import CollectorRegistry, Histogram, generate_latest

from cloud_server.batch_statistics import SECONDS, STEPS, BatchStatistics
from cloud_server.metrics import COUNTERS, State
from cloud_server.service import Service

REPEATS, ROUNDS, LAYERS = 20_000, 7, 30


def nanoseconds(work: Callable[[int], object]) -> float:
    """Return what one call takes, the median of some rounds."""
    took = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        for number in range(REPEATS):
            work(number)
        took.append((time.perf_counter() - started) / REPEATS * 1e9)
    return sorted(took)[ROUNDS // 2]


def by_library() -> Callable[[int], None]:
    """Return the counting of one batch with the library's histograms."""
    registry = CollectorRegistry()
    sizes = Histogram("steps", "", ["layer"], buckets=STEPS, registry=registry)
    queued, ran = (Histogram(name, "", buckets=SECONDS, registry=registry) for name in ("queued", "ran"))

    def count(number: int) -> None:
        sizes.labels(str(number % LAYERS)).observe(4)
        queued.observe(0.001)
        ran.observe(0.002)

    return count


def service(batches: BatchStatistics) -> Service:
    """Return as much of a service as is scraped: what it has counted, and nobody connected."""
    from cloud_server.config.cloud import CloudConfig
    from cloud_server.streams import Traffic

    nobody = SimpleNamespace(bytes_used=0, bytes_total=0)
    tuning = SimpleNamespace(
        sessions={},
        traffic=Traffic(),
        budget=SimpleNamespace(used=0, total=0),
        queue=SimpleNamespace(tokens=0),
    )
    found: Any = SimpleNamespace(
        config=CloudConfig(),
        sessions={},
        engine=SimpleNamespace(cache=nobody, steps=set(), batches=batches),
        tuning=tuning,
        decoding=SimpleNamespace(traffic=Traffic()),
        part_service=SimpleNamespace(under_way=0, traffic=Traffic()),
        admission=SimpleNamespace(claimed_bytes=0, waiting=0),
    )
    return cast(Service, found)


def main() -> None:
    """Measure, and print the figures as one JSON line."""
    seen = BatchStatistics(16)
    batch = nanoseconds(lambda number: seen.add(number % LAYERS, 4, 4, 0.001, 0.002))
    step = nanoseconds(lambda number: seen.ended(1, 1, 0.05))
    library = nanoseconds(by_library())
    registry = CollectorRegistry()
    for collector in (*COUNTERS, State(service(seen))):
        registry.register(collector)
    scrapes = []
    for _ in range(20):
        started = time.perf_counter()
        size = len(generate_latest(registry))
        scrapes.append(time.perf_counter() - started)
    figures = {
        "batch_ns": round(batch),
        "step_ns": round(step),
        "batch_by_library_ns": round(library),
        "scrape_ms": round(sorted(scrapes)[10] * 1e3, 2),
        "scrape_bytes": size,
        "layers": LAYERS,
    }
    token = LAYERS * batch + step
    print(f"a decoded token of {LAYERS} exchanges: {token / 1e3:.1f} us of counting, if no batch is shared")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
