"""The tuning stream against a scripted cloud: the products, and that nothing malformed is believed."""

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import grpc
import pytest
import torch
from torch import Tensor

from edge_client.streams import SessionError
from edge_client.tuning import batch as batch_module
from edge_client.tuning.stream import TuneStream
from shared import wire
from shared.pb.privatelora.v1 import private_lora_pb2 as pb
from shared.plan import Plan

WIDTH, TOKENS = 6, 7
WAIT_S = 300.0  # only what hangs takes as long, however slow the machine
FACTS: dict[str, Any] = {
    "name": "p", "backbone": "b", "num_layers": 4, "hidden_size": WIDTH, "r_c2d": 2, "r_d2c": 3,
    "layout": "per_projection", "initialiser": "orthonormal",
}  # fmt: skip
PER_LAYER = Plan(**FACTS, exchange_layers=(0, 2), adapted_layers=(0, 2), schedule="subset")
GROUPED = Plan(**FACTS, exchange_layers=(0, 2), adapted_layers=(1, 2, 3), schedule="grouped")
SHARED = Plan.model_validate({**GROUPED.model_dump(), "owner_layers": (1, 2)})  # layer 3 has that of 2
DOUBLE = pb.DTYPE_FLOAT64


class Call:
    """What a stream needs of a gRPC call; the test is the other end."""

    def __init__(self) -> None:
        self.up: asyncio.Queue[bytes] = asyncio.Queue()
        self.down: asyncio.Queue[Any] = asyncio.Queue()
        self.status: grpc.StatusCode | None = None
        self.sizes: list[int] = []

    async def write(self, raw: bytes) -> None:
        self.sizes.append(len(raw))
        await self.up.put(raw)

    async def read(self) -> Any:
        return await self.down.get()

    async def done_writing(self) -> None:
        await self.up.put(b"")

    def cancel(self) -> None:
        self.status = self.status or grpc.StatusCode.CANCELLED

    def done(self) -> bool:
        return self.status is not None

    async def code(self) -> grpc.StatusCode:
        return self.status or grpc.StatusCode.OK

    async def details(self) -> str:
        return "said the test"

    async def trailing_metadata(self) -> Any:
        return ()


class Scripted:
    """A cloud that makes codes and gradients up, and checks what the edge makes of them."""

    def __init__(
        self, plan: Plan, chunk: int = 3, spoil: Callable[[pb.TuneResponse], Any] | None = None
    ) -> None:
        self.plan, self.chunk = plan, chunk
        self.spoil = spoil or (lambda message: None)
        generator = torch.Generator().manual_seed(1)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        self.h0, self.last, self.upstream = (draw(TOKENS, WIDTH) for _ in range(3))
        self.codes = {layer: draw(TOKENS, plan.codes_width) for layer in plan.exchange_layers}
        self.dz = {layer: draw(TOKENS, plan.residual_width) for layer in plan.owners}
        shape = (plan.groups, plan.r_c2d, plan.r_d2c)
        self.m = {layer: draw(*shape) for layer in plan.owners}
        self.heard: list[tuple[str, int]] = []
        self.number = 0
        self.waits_for_answers = False
        self.loop = asyncio.new_event_loop()
        self.serving: list[asyncio.Task[None]] = []
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()

    def connect(self, timeout_s: float = WAIT_S, dtype: Any = DOUBLE) -> TuneStream:
        async def start() -> TuneStream:
            self.call = Call()
            self.serving.append(self.loop.create_task(self.serve()))
            stream = TuneStream(self.call, self.loop, self.plan, dtype, timeout_s, lambda _: None)
            await stream.open(pb.TuneOpen(protocol_version=1, wire_dtype=dtype), timeout_s)
            return stream

        return asyncio.run_coroutine_threadsafe(start(), self.loop).result(2 * WAIT_S)

    async def serve(self) -> None:
        assert (await self.take()).HasField("open")
        await self.give(pb.TuneResponse(opened=pb.TuneOpened(max_batch_tokens=50, max_sequence_tokens=40)))
        plan = self.plan
        while True:
            batch = (await self.take()).batch
            self.number = batch.batch
            assert list(batch.lengths) == [3, 4]
            assert torch.equal(await self.gather("hidden", 0, WIDTH), self.h0)
            for exchange in plan.exchange_layers:
                await self.rows("codes", exchange, self.codes[exchange])
                found = await self.gather_all("residual_codes", plan.fed_by(exchange), plan.residual_width)
                for layer, z in found.items():
                    torch.testing.assert_close(z, self.by_group(self.codes[exchange], self.m[layer]))
            await self.rows("hidden", 0, self.last)
            if not batch.forward_only:
                assert torch.equal(await self.gather("hidden_gradient", 0, WIDTH), self.upstream)
                await self.back()
            await self.give(pb.TuneResponse(done=pb.BatchDone(batch=self.number)))

    async def back(self) -> None:
        plan = self.plan
        for layer in reversed(plan.owners):
            await self.rows("residual_codes_gradient", layer, self.dz[layer])
            source = plan.source_of(layer)
            if layer == plan.fed_by(source)[0] and source != plan.exchange_layers[0]:
                dc = await self.gather("codes_gradient", source, plan.codes_width)
                parts = [self.by_group(self.dz[f], self.m[f].transpose(1, 2)) for f in plan.fed_by(source)]
                torch.testing.assert_close(dc, sum(parts))

    def by_group(self, rows: Tensor, matrix: Tensor) -> Tensor:
        return torch.cat(
            [part @ m for part, m in zip(rows.chunk(self.plan.groups, 1), matrix, strict=True)], 1
        )

    async def take(self) -> pb.TuneRequest:
        return pb.TuneRequest.FromString(await self.call.up.get())

    async def gather(self, kind: str, layer: int, width: int) -> Tensor:
        self.heard.append((kind, layer))
        return (await self.gather_all(kind, (layer,), width))[layer]

    async def gather_all(self, kind: str, layers: Sequence[int], width: int) -> dict[int, Tensor]:
        """Take the rows of some layers, each layer's in order, however they alternate."""
        parts: dict[int, list[Tensor]] = {layer: [] for layer in layers}
        while any(sum(map(len, part)) < TOKENS for part in parts.values()):
            message = await self.take()
            assert message.WhichOneof("message") == kind
            rows = getattr(message, kind)
            part = parts[rows.layer]
            assert (rows.batch, rows.first) == (self.number, sum(map(len, part)))
            shape = (rows.rows.shape[0], width)
            part.append(wire.decode(rows.rows, dtype=DOUBLE, shape=shape, what=kind))
        return {layer: torch.cat(part) for layer, part in parts.items()}

    async def rows(self, kind: str, layer: int, tensor: Tensor) -> None:
        for first in range(0, TOKENS, self.chunk):
            piece = wire.encode(tensor[first : first + self.chunk], DOUBLE)
            message = pb.Rows(batch=self.number, layer=layer, first=first, rows=piece)
            await self.give(pb.TuneResponse(**{kind: message}))
            answered = {("codes", 0), ("codes", 2), ("residual_codes_gradient", 2)}
            if self.waits_for_answers and first == 0 and (kind, layer) in answered:
                deadline = self.loop.time() + WAIT_S
                while self.call.up.empty():
                    assert self.loop.time() < deadline, "one sequence is not answered on its own"
                    await asyncio.sleep(0.001)

    async def give(self, message: pb.TuneResponse) -> None:
        replaced = self.spoil(message)
        await self.call.down.put(message.SerializeToString() if replaced is None else replaced)

    def settle(self) -> None:
        """Raise what the cloud's script found wrong."""
        for task in self.serving:
            if task.done():
                task.result()

    def fall_silent(self) -> None:
        """Say nothing any more."""

        async def stop() -> None:
            for task in self.serving:
                task.cancel()
            if self.serving:
                await asyncio.wait(self.serving)

        asyncio.run_coroutine_threadsafe(stop(), self.loop).result(2 * WAIT_S)

    def end(self) -> None:
        self.fall_silent()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


@pytest.fixture
def scripted() -> Iterator[Callable[..., Scripted]]:
    with ExitStack() as stack:

        def make(*args: Any, **options: Any) -> Scripted:
            cloud = Scripted(*args, **options)
            stack.callback(cloud.end)
            return cloud

        yield make


def batch_of(cloud: Scripted, stream: TuneStream) -> dict[int, Tensor]:
    last = stream.forward(cloud.h0, [3, 4], cloud.m)
    assert torch.equal(last, cloud.last)
    return stream.backward(cloud.upstream)


@pytest.mark.parametrize("plan", [PER_LAYER, GROUPED, SHARED], ids=["per-layer", "grouped", "shared"])
@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("block", [1, 100], ids=["a block a sequence", "one block"])
def test_a_batch_there_and_back(
    plan: Plan, chunk: int, block: int, monkeypatch: pytest.MonkeyPatch, scripted: Any
) -> None:
    monkeypatch.setattr(batch_module, "BLOCK_TOKENS", block)
    monkeypatch.setattr(wire, "ROWS_BYTES", 100)  # tensors take several messages
    cloud = scripted(plan, chunk)
    stream = cloud.connect()
    assert (stream.limits.max_batch_tokens, stream.limits.max_sequence_tokens) == (50, 40)
    for _ in range(2):
        gradients = batch_of(cloud, stream)
        cloud.settle()
        assert tuple(gradients) == plan.owners
        for layer, found in gradients.items():
            codes, dz = cloud.codes[plan.source_of(layer)], cloud.dz[layer]
            pairs = zip(codes.chunk(plan.groups, 1), dz.chunk(plan.groups, 1), strict=True)
            torch.testing.assert_close(found, torch.stack([c.T @ g for c, g in pairs]))
    assert torch.equal(stream.forward(cloud.h0, [3, 4], cloud.m, forward_only=True), cloud.last)
    ways = [kind for kind, layer in cloud.heard]
    assert ways.count("hidden_gradient") == 2 and ways.count("codes_gradient") == 2
    assert [layer for kind, layer in cloud.heard if kind == "codes_gradient"] == [2, 2]
    assert max(cloud.call.sizes) < 200 and stream.traffic.bytes_up > sum(cloud.call.sizes)
    stream.close()


@pytest.mark.parametrize("block", [1, 100], ids=["a block a sequence", "one block"])
def test_gradients_do_not_depend_on_how_the_cloud_cuts(
    block: int, monkeypatch: pytest.MonkeyPatch, scripted: Any
) -> None:
    monkeypatch.setattr(batch_module, "BLOCK_TOKENS", block)
    found = [batch_of(cloud, cloud.connect()) for cloud in (scripted(GROUPED, 1), scripted(GROUPED, 100))]
    assert all(torch.equal(found[0][layer], found[1][layer]) for layer in GROUPED.adapted_layers)


def test_rows_are_answered_while_others_are_awaited(monkeypatch: pytest.MonkeyPatch, scripted: Any) -> None:
    monkeypatch.setattr(batch_module, "BLOCK_TOKENS", 1)
    cloud = scripted(PER_LAYER, chunk=3)  # the first sequence, then the second in two parts
    cloud.waits_for_answers = True
    batch_of(cloud, cloud.connect())
    cloud.settle()


def spoiled(kind: str, **changes: Any) -> Callable[[pb.TuneResponse], Any]:
    """Change the first message of a kind."""
    left = [1]

    def spoil(message: pb.TuneResponse) -> Any:
        if message.WhichOneof("message") == kind and left.pop() if left else False:
            part = getattr(message, kind)
            for name, value in changes.items():
                if callable(value):
                    value(part)
                else:
                    setattr(part, name, value)
        return None

    return spoil


def nan(rows: pb.Rows) -> None:
    rows.rows.data = b"\xff" * len(rows.rows.data)


def reshaped(*shape: int) -> Callable[[pb.Rows], None]:
    def change(rows: pb.Rows) -> None:
        del rows.rows.shape[:]
        rows.rows.shape.extend(shape)

    return change


def single(rows: pb.Rows) -> None:
    rows.rows.dtype = pb.DTYPE_FLOAT32


def in_place_of_codes(raw: bytes) -> Callable[[pb.TuneResponse], Any]:
    return lambda message: raw if message.HasField("codes") else None


DONE = pb.TuneResponse(done=pb.BatchDone(batch=1)).SerializeToString()
WRONG: dict[str, tuple[Callable[[pb.TuneResponse], Any], str]] = {
    "no message": (in_place_of_codes(b"\xff\xff"), "2 bytes that are no message"),
    "empty": (in_place_of_codes(b""), "expected codes, got 'nothing known'"),
    "other kind": (in_place_of_codes(DONE), "expected codes, got 'done'"),
    "codes of layer 1": (spoiled("codes", layer=1), "codes of layer 0 should have come, but .* layer 1"),
    "gradient of layer 0": (spoiled("residual_codes_gradient", layer=0), "layer 2 should have come"),
    "another batch": (spoiled("codes", batch=9), "of batch 9, expected batch 1"),
    "a gap": (spoiled("codes", first=1), "3 rows from row 1, expected rows from 0 of 7"),
    "no rows": (spoiled("codes", change=reshaped(0, 6)), "0 rows from row 0"),
    "too many rows": (spoiled("codes", change=reshaped(8, 6)), "8 rows from row 0, expected .* 0 of 7"),
    "flat": (spoiled("codes", change=reshaped(18)), "0 rows"),
    "too wide": (spoiled("codes", change=reshaped(3, 7)), "shape is"),
    "other dtype": (spoiled("codes", change=single), "dtype is float32"),
    "NaN codes": (spoiled("codes", change=nan), "codes of layer 0: holds NaN"),
    "NaN hidden": (spoiled("hidden", change=nan), "hidden: holds NaN"),
    "NaN gradient": (spoiled("residual_codes_gradient", change=nan), "gradient of layer 2: holds NaN"),
    "done with another": (spoiled("done", batch=2), "batch 2 is said to be done, expected batch 1"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_malformed_is_refused(wrong: str, scripted: Any) -> None:
    spoil, words = WRONG[wrong]
    cloud = scripted(PER_LAYER, spoil=spoil)
    stream = cloud.connect()
    with pytest.raises(SessionError, match=f"the cloud broke the protocol: .*{words}") as refusal:
        batch_of(cloud, stream)
    assert refusal.value.code is None and cloud.call.done()


@pytest.mark.parametrize("wrong", ["limits", "kind"])
def test_a_strange_handshake_is_refused(wrong: str, scripted: Any) -> None:
    spoil = spoiled("opened", max_batch_tokens=0) if wrong == "limits" else (lambda message: DONE)
    with pytest.raises(SessionError, match="broke the protocol"):
        scripted(PER_LAYER, spoil=spoil).connect()


def test_an_end_is_told_with_its_status(scripted: Any) -> None:
    cloud = scripted(PER_LAYER, spoil=lambda m: grpc.aio.EOF if m.HasField("hidden") else None)
    stream = cloud.connect()
    cloud.call.status = grpc.StatusCode.RESOURCE_EXHAUSTED
    with pytest.raises(SessionError, match=r"refused \(RESOURCE_EXHAUSTED\): said the test") as refusal:
        batch_of(cloud, stream)
    assert refusal.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_silence_ends_a_stream(scripted: Any) -> None:
    cloud = scripted(PER_LAYER)
    stream = cloud.connect()
    stream._timeout_s = 0.5
    cloud.fall_silent()
    with pytest.raises(SessionError, match="nothing was heard of the cloud") as refusal:
        batch_of(cloud, stream)
    assert refusal.value.code is grpc.StatusCode.DEADLINE_EXCEEDED and cloud.call.done()


def test_gradients_never_travel_in_half_precision(scripted: Any) -> None:
    with pytest.raises(ValueError, match="float16 cannot carry gradients"):
        scripted(PER_LAYER).connect(dtype=pb.DTYPE_FLOAT16)


def test_a_batch_is_run_back_once_and_before_the_next(scripted: Any) -> None:
    cloud = scripted(PER_LAYER)
    stream = cloud.connect()
    with pytest.raises(RuntimeError, match="no batch"):
        stream.backward(cloud.upstream)
    stream.forward(cloud.h0, [3, 4], cloud.m)
    with pytest.raises(RuntimeError, match="has not been run back"):
        stream.forward(cloud.h0, [3, 4], cloud.m)
    with pytest.raises(ValueError, match="sequences of 6 tokens"):
        cloud.connect().forward(cloud.h0, [3, 3], cloud.m)
