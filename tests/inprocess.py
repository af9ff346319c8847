"""The whole split in one process: the real backbone, engine, session and edge model, without gRPC.

`Cloud` runs an engine on a thread of its own; `Cloud.open` gives what `edge_client.pool` needs of a
session, so `Cloud.edge` is a real `PrivateLoraForCausalLM`. Tests that need no network use this:
it starts in milliseconds, and everything but the stream is the code that serves.
"""

import asyncio
import threading
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import Tensor

from cloud_server.backbone import Backbone
from cloud_server.config.engine import EngineConfig
from cloud_server.engine import Engine
from cloud_server.kv_cache import KvCache
from cloud_server.session import Limits, Session
from edge_client.model import PrivateLoraForCausalLM
from edge_client.personal import PersonalWeights
from edge_client.shell import build_shell
from edge_client.spans import Span, cut
from edge_client.streams import Traffic
from shared import wire
from shared.adapter import Adapter
from shared.checkpoint import Checkpoint
from shared.fingerprint import Fingerprint
from shared.lowrank import LowRank
from shared.models import resolve
from shared.pb.privatelora.v1 import private_lora_pb2 as pb
from shared.plan import Plan
from shared.wire_dtypes import WireDtypes

T = TypeVar("T")
Matrices = Mapping[int, Tensor]
TIMEOUT_S = 600.0  # only what hangs takes as long, however slow the machine
LIMITS = Limits(max_context_tokens=512, max_step_tokens=512, max_rows=64, max_steps_in_flight=64)
FLOAT32 = WireDtypes.all(pb.DTYPE_FLOAT32)
NOTHING = Fingerprint(plan=bytes(32), lowrank=bytes(32), layers=bytes(32), edge=bytes(32))


def adapter(plan: Plan, matrices: Matrices) -> Adapter:
    """Return an adapter with these matrices; its fingerprint is nobody's."""
    return Adapter(plan, NOTHING, {layer: m.float() for layer, m in matrices.items()})


class Stream:
    """One session, with an edge that answers every exchange; a `edge_client.pool.SessionLike`."""

    def __init__(
        self,
        cloud: "Cloud",
        personal: PersonalWeights,
        chunk_tokens: int = 512,
        dtypes: WireDtypes = FLOAT32,
    ) -> None:
        self.cloud, self.personal, self.chunk_tokens, self.dtypes = cloud, personal, chunk_tokens, dtypes
        self.plan = personal.plan
        self.session = Session(self.plan, dtypes, LIMITS, cloud.engine)
        self.answers: dict[int, dict[int, pb.Tensor]] = {}  # step -> layer -> residual codes that were sent
        self.traffic = Traffic()  # nothing is on a wire
        self.number = 0

    def step(self, hidden: Tensor, spans: Sequence[Span], parents: Sequence[int] | None = None) -> Tensor:
        """Run new positions from any thread; see `edge_client.session.Session.step`."""
        return self.cloud.call(self.step_async(hidden, spans, parents))

    async def step_async(
        self,
        hidden: Tensor,
        spans: Sequence[Span],
        parents: Sequence[int] | None = None,
        known: Mapping[int, pb.Tensor] | None = None,
    ) -> Tensor:
        """Do as `step`, on the cloud's thread. ``known`` are residual codes that are sent up front."""
        at, waiting, kept = 0, {}, {}
        for piece in cut(spans, self.chunk_tokens):
            tokens, keep = sum(s.count for s in piece), sum(s.keep for s in piece)
            self.number += 1
            waiting[self.number] = (tokens, keep)
            self.session.step(
                pb.Step(
                    step=self.number,
                    parents=parents or (),
                    spans=[pb.Span(row=s.row, start=s.start, count=s.count, keep=s.keep) for s in piece],
                    hidden=wire.encode(hidden[at : at + tokens], self.dtypes.hidden),
                    residual_codes=[pb.LayerCodes(layer=n, codes=z) for n, z in (known or {}).items()],
                )
            )
            parents, at = None, at + tokens
        while waiting:
            message = await self.cloud.guarded(self.session.outbox.get())
            if message.HasField("codes"):
                self._exchange(message.codes, waiting[message.codes.step][0])
            else:
                tokens, keep = waiting.pop(message.hidden.step)
                shape = (keep, self.plan.hidden_size)
                kept[message.hidden.step] = wire.decode(
                    message.hidden.hidden, dtype=self.dtypes.hidden, shape=shape, what="hidden"
                )
        return torch.cat([kept[number] for number in sorted(kept)])  # (sum of keep, hidden_size)

    def _exchange(self, message: pb.Codes, tokens: int) -> None:
        shape, groups = (tokens, self.plan.codes_width), self.plan.groups
        codes = wire.decode_array(
            message.codes, dtype=self.dtypes.codes, shape=shape, what="codes", groups=groups
        )
        sent = self.answers.setdefault(message.step, {})
        fed = self.plan.fed_by(message.layer)
        for layer in fed:
            z = self.personal.residual_codes(layer, codes)
            sent[layer] = pb.Tensor()
            wire.fill_array(sent[layer], z, self.dtypes.residual_codes, groups)
        answers = [pb.LayerCodes(layer=layer, codes=sent[layer]) for layer in fed]
        self.session.answer(pb.ResidualCodes(step=message.step, residual_codes=answers))

    def cancel(self) -> None:
        """Nothing is ever in flight between two calls here."""

    def close(self) -> None:
        """Free the session's rows."""

        async def close() -> None:
            self.session.close()

        self.cloud.call(close())


class Cloud:
    """A backbone and an engine, on a thread, until the ``with`` block ends.

    Parameters
    ----------
    folder
        A Hugging Face folder.
    plans
        (plan, A and B) of every plan to serve; names must differ.
    engine
        Fields of `EngineConfig` that are not the default.
    kv_bytes
        Budget of the KV cache in bytes.
    dtype
        What the backbone computes in.
    """

    def __init__(
        self,
        folder: Path | str,
        plans: Sequence[tuple[Plan, LowRank]],
        engine: Mapping[str, Any] | None = None,
        kv_bytes: int = 16 << 20,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.checkpoint: Checkpoint = resolve(str(folder), progress=False)
        served = {plan.name: (plan, ab) for plan, ab in plans}
        self.backbone, self.cache = self.build(served, kv_bytes, dtype)
        self._config = EngineConfig(**engine or {})
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._serving: asyncio.Task[None] | None = None
        self._streams: list[Stream] = []

    def build(
        self, plans: Mapping[str, tuple[Plan, LowRank]], kv_bytes: int, dtype: torch.dtype
    ) -> tuple[Backbone, KvCache]:
        """Return what the engine runs on."""
        b = Backbone(self.checkpoint, plans, dtype=dtype)
        return b, KvCache(b.geometry, b.served, kv_bytes, b.dtype, b.device)

    def __enter__(self) -> "Cloud":
        async def start() -> None:
            self.engine = Engine(self.backbone, self.cache, self._config)
            self._serving = asyncio.get_running_loop().create_task(self.engine.serve())

        self.call(start())
        return self

    def __exit__(self, *_: object) -> None:
        async def stop() -> None:
            assert self._serving is not None
            self._serving.cancel()
            await asyncio.wait([self._serving])

        self.call(stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the cloud's thread and wait for it."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(TIMEOUT_S)

    async def guarded(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Wait, but not for an engine that has failed: then its error is raised here."""
        task = asyncio.ensure_future(coroutine)
        assert self._serving is not None
        await asyncio.wait([task, self._serving], timeout=TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()
            if self._serving.done():
                self._serving.result()
            raise TimeoutError("the engine did not answer")
        return task.result()

    def open(
        self, plan: Plan, matrices: Matrices, chunk_tokens: int = 512, dtypes: WireDtypes = FLOAT32
    ) -> Stream:
        """Open a session for these personal weights; a step is cut into chunks, all in flight at once."""
        return self._open(PersonalWeights(adapter(plan, matrices)), chunk_tokens, dtypes)

    def _open(self, personal: PersonalWeights, chunk_tokens: int, dtypes: WireDtypes = FLOAT32) -> Stream:
        self._streams.append(Stream(self, personal, chunk_tokens, dtypes))
        return self._streams[-1]

    def close_streams(self) -> None:
        """Close every session that was opened; closing one twice does no harm."""
        while self._streams:
            self._streams.pop().close()

    def edge(self, plan: Plan, matrices: Matrices, chunk_tokens: int = 512) -> PrivateLoraForCausalLM:
        """Return the edge's model on this cloud."""
        names = self.checkpoint.edge_tensors()
        tensors = self.checkpoint.load(names.values(), dtype=torch.float32)
        shell = build_shell(
            self.checkpoint.config,
            {local: tensors[name] for local, name in names.items()},
            "cpu",
            torch.float32,
        )
        limits: Any = SimpleNamespace(max_context_tokens=LIMITS.max_context_tokens, max_rows=LIMITS.max_rows)
        return PrivateLoraForCausalLM(
            self.checkpoint.config,
            shell,
            limits,
            adapter(plan, matrices),
            lambda personal: self._open(personal, chunk_tokens),
        )
