"""The engine on a real backbone: plans together, and rows that go while a slice runs on them."""

import asyncio
import threading
from collections.abc import Sequence

import pytest
import torch

from cloud_server.backbone import Slice
from cloud_server.kv_cache import KvCache
from edge_client.spans import Span
from shared import wire
from shared.pb.privatelora.v1 import private_lora_pb2 as pb
from tests.families import build, plan_for, save
from tests.inprocess import Cloud, Stream
from tests.splits import lowrank_for, matrices_for


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory):
    model = build("llama")
    plans = [plan_for(model, name="a"), plan_for(model, name="b", layout="fused", layers=(1, 3), r_d2c=5)]
    return save("llama", tmp_path_factory.mktemp("llama")), [
        (plan, lowrank_for(plan, model)) for plan in plans
    ]


def h0(seed: int, tokens: int) -> torch.Tensor:
    return torch.randn(tokens, 48, generator=torch.Generator().manual_seed(seed))


async def _decode(stream: Stream, seed: int) -> torch.Tensor:
    """Prefill 20 positions in chunks, then decode ten; close; return every hidden state."""
    hidden = h0(seed, 30)
    out = [await stream.step_async(hidden[:20], [Span(0, 0, 20, 20)])]
    out += [await stream.step_async(hidden[at : at + 1], [Span(0, at, 1, 1)]) for at in range(20, 30)]
    stream.session.close()
    return torch.cat(out)


def test_several_plans_on_one_backbone_equal_each_alone(split) -> None:
    folder, plans = split
    with Cloud(folder, plans, {"gather_wait_s": 0.05}) as cloud:

        def opened(user: int) -> Stream:
            plan = plans[user % 2][0]
            return cloud.open(plan, matrices_for(plan, seed=user), chunk_tokens=7)

        alone = [cloud.call(_decode(opened(user), user)) for user in range(6)]
        batches = cloud.engine.batches
        before = batches.steps - batches.count

        async def together() -> list[torch.Tensor]:
            return await asyncio.gather(*(_decode(opened(user), user) for user in range(6)))

        for found, expected in zip(cloud.call(together()), alone, strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        assert batches.steps - batches.count > before + 50, "hardly any step met another"
        assert cloud.cache.bytes_used == 0


def _paused(cloud: Cloud) -> tuple[threading.Event, threading.Event]:
    """Make the next slice stop before its first layer; return (it is there, let it go on)."""
    entered, go_on, run = threading.Event(), threading.Event(), cloud.backbone.run

    def slow(slices: Sequence[Slice], cache: KvCache) -> None:
        if not go_on.is_set():
            entered.set()
            go_on.wait()
        run(slices, cache)

    cloud.backbone.run = slow  # type: ignore[method-assign]
    return entered, go_on


@pytest.mark.parametrize("how", ["close", "drop", "overwrite"])
def test_rows_may_go_while_a_slice_runs_on_them(split, how: str) -> None:
    """The slice finishes into blocks that nobody else has; the engine and other sessions go on."""
    folder, plans = split
    plan = plans[0][0]
    matrices = matrices_for(plan)
    with Cloud(folder, plans, {"inline_s": 0.0}) as cloud:
        expected = cloud.call(_decode(cloud.open(plan, matrices), 1))
        stream = cloud.open(plan, matrices)
        entered, go_on = _paused(cloud)

        async def act() -> torch.Tensor:
            z = wire.encode(torch.zeros(70, plan.residual_width), pb.DTYPE_FLOAT32)
            stream.number += 1
            stream.session.step(
                pb.Step(
                    step=stream.number,
                    spans=[pb.Span(row=0, start=0, count=70, keep=1)],
                    hidden=wire.encode(h0(5, 70), pb.DTYPE_FLOAT32),
                    residual_codes=[pb.LayerCodes(layer=layer, codes=z) for layer in plan.adapted_layers],
                )
            )
            while not entered.is_set():
                await asyncio.sleep(0.001)
            again = cloud.open(plan, matrices)
            if how == "close":
                stream.session.close()
            elif how == "drop":
                stream.session.drop()
                assert stream.session.row_lengths() == [0]
                again.session = stream.session
            else:  # the next step overwrites it
                again.session = stream.session
            again.number = stream.number
            task = asyncio.ensure_future(_decode(again, 1))
            await asyncio.sleep(0.02)
            go_on.set()
            return await task

        torch.testing.assert_close(cloud.call(act()), expected, rtol=0, atol=1e-4)
        assert cloud.cache.bytes_used == 0
        assert cloud._serving is not None and not cloud._serving.done()
