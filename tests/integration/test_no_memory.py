"""A step that no memory can be had for: its session is refused, everybody else goes on."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch

from cloud_server.backbone import Slice
from cloud_server.config.cloud import CloudConfig
from cloud_server.handshake import Offer
from cloud_server.kv_cache import KvCache
from cloud_server.service import Service
from shared.fingerprint import Fingerprint, plan_digest
from tests.families import save
from tests.inprocess import LIMITS, Cloud
from tests.integration.raw_edge import RawEdge, array
from tests.splits import split_of

Code = grpc.StatusCode
TOO_MANY = 13  # positions of a step that takes more memory than there is


@pytest.fixture
def edge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RawEdge]:
    """Serve tiny layers from this process, so that memory can be made to be lacking for certain steps."""
    split = split_of("llama")
    branches = {name: bytes(32) for name in ("lowrank", "layers", "edge")}
    root = Fingerprint(plan=plan_digest(split.plan), **branches)
    with Cloud(save("llama", tmp_path), [(split.plan, split.lowrank)]) as cloud:
        run = cloud.backbone.run

        def sometimes(slices: Sequence[Slice], cache: KvCache) -> None:
            if any(s.step.tokens == TOO_MANY for s in slices):
                torch.empty(1 << 60, dtype=torch.uint8)  # torch's own refusal, as no machine has that
            run(slices, cache)

        monkeypatch.setattr(cloud.backbone, "run", sometimes)
        service = Service(
            CloudConfig(grace_period_s=0), cloud.engine, {root.plan: Offer(split.plan, root)}, [], LIMITS
        )

        async def start() -> tuple[grpc.aio.Server, int]:
            server = grpc.aio.server(interceptors=(service.guard,))
            server.add_generic_rpc_handlers((service.handlers(),))
            port = server.add_insecure_port("127.0.0.1:0")
            await server.start()
            return server, port

        server, port = cloud.call(start())
        with RawEdge(f"127.0.0.1:{port}") as raw:
            yield raw
            assert raw.settled()
        cloud.call(server.stop(0))


def test_only_its_session_is_refused(edge: RawEdge, caplog: pytest.LogCaptureFixture) -> None:
    name = next(iter(edge.offers))
    h0 = np.random.default_rng(1).normal(size=(40, 48))
    alone = edge.open(name)
    expected = alone.run([(0, 0, 40, 40)], h0)
    alone.finish()
    good, bad = edge.open(name), edge.open(name)
    start = good.run([(0, 0, 20, 20)], h0[:20])
    good.step([(0, 20, 10, 10)], h0[20:30], known=good.zeros(10))
    bad.step([(0, 0, TOO_MANY, 1)], known=bad.zeros(TOO_MANY))
    end = bad.refused()
    assert end.code is Code.RESOURCE_EXHAUSTED and "ran out of memory over this step" in end.message
    assert int(end.trailers["retry-after-ms"]) > 0
    rest = [array(good.receive().hidden.hidden), good.run([(0, 30, 10, 10)], h0[30:])]
    np.testing.assert_allclose(np.concatenate([start, *rest]), expected, atol=1e-3)
    good.finish()
    assert "largest is given up" in caplog.text and "Traceback" in caplog.text


def test_a_message_that_cannot_be_taken_in_is_refused(edge: RawEdge, monkeypatch: pytest.MonkeyPatch) -> None:
    from shared import wire

    decode = wire.decode

    def sometimes(message: Any, **options: Any) -> torch.Tensor:
        if options["shape"][0] == TOO_MANY:
            raise MemoryError
        return decode(message, **options)

    monkeypatch.setattr(wire, "decode", sometimes)
    name = next(iter(edge.offers))
    good, bad = edge.open(name), edge.open(name)
    bad.step([(0, 0, TOO_MANY, 1)])
    end = bad.refused()
    assert end.code is Code.RESOURCE_EXHAUSTED and "ran out of memory over this message" in end.message
    assert good.run([(0, 0, 5, 1)]).shape == (1, 48)
    good.finish()
