"""A session without a cloud: a stand-in for the engine, and a test's way of speaking to the session."""

from types import SimpleNamespace
from typing import Any

import grpc
import pytest
import torch

from cloud_server.kv_cache import BLOCK_TOKENS, KvCache
from cloud_server.refusal import Refusal
from cloud_server.session import Limits, Session
from cloud_server.step import Step
from shared import wire
from shared.families import geometry
from shared.pb.privatelora.v1 import private_lora_pb2 as pb
from shared.plan import Plan
from shared.wire_dtypes import WireDtypes
from tests.families import build

Code = grpc.StatusCode
WIDTH = 8
PLAN = Plan.subset((0, 2), name="p", backbone="b", num_layers=4, hidden_size=WIDTH, r_c2d=2, r_d2c=3)
LIMITS = Limits(max_context_tokens=100, max_step_tokens=50, max_rows=4, max_steps_in_flight=3)
GEOMETRY = geometry(build("llama").config)
BLOCK_BYTES = 2 * 4 * GEOMETRY.kv_dim * 4 * BLOCK_TOKENS
FLOAT32 = WireDtypes.all(pb.DTYPE_FLOAT32)
UINT32, UINT64 = 2**32 - 1, 2**64 - 1


class StandIn:
    """Takes steps and runs none."""

    def __init__(self, blocks: int) -> None:
        self.cache = KvCache(GEOMETRY, range(4), blocks * BLOCK_BYTES, torch.float32, torch.device("cpu"))
        self.backbone = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)
        self.steps: list[Step] = []
        self.answers: list[tuple[int, list[int]]] = []
        self.left: list[object] = []

    def submit(self, step: Step) -> None:
        self.steps.append(step)

    def cancel(self, step: Step) -> None:
        self.steps.remove(step)

    def leave(self, owner: object) -> None:
        self.left.append(owner)

    def answer(self, step: Step, codes: dict[int, torch.Tensor]) -> None:
        self.answers.append((step.number, list(codes)))
        step.residual_codes.update(codes)


class Talk:
    """A session and what a test says to it."""

    def __init__(
        self, blocks: int = 64, dtypes: WireDtypes = FLOAT32, plan: Plan = PLAN, **options: Any
    ) -> None:
        self.engine = StandIn(blocks)
        self.session = Session(plan, dtypes, LIMITS, self.engine, **options)  # type: ignore[arg-type]
        self.number = 0

    def step(self, *spans: tuple[int, int, int, int], finish: bool = False, **fields: Any) -> Step:
        self.number = fields.pop("step", self.number + 1)
        tokens = min(sum(span[2] for span in spans), 1000)
        message = pb.Step(
            **{
                "step": self.number,
                "spans": [pb.Span(row=r, start=s, count=c, keep=k) for r, s, c, k in spans],
                "hidden": zeros(tokens, WIDTH),
            }
            | fields
        )
        self.session.step(message)
        step = self.engine.steps[-1]
        if finish:
            self.finish(step)
        return step

    def finish(self, step: Step) -> None:
        self.engine.steps.remove(step)
        step.on_done(step, step.kept_hidden())

    def stand(self, step: Step, layer: int, *, emitted: bool = True) -> None:
        step.layer, step.emitted = layer, layer if emitted else step.emitted

    def answer(self, *answers: tuple[int, pb.Tensor], step: int | None = None) -> None:
        codes = [pb.LayerCodes(layer=layer, codes=tensor) for layer, tensor in answers]
        number = self.number if step is None else step
        self.session.answer(pb.ResidualCodes(step=number, residual_codes=codes))

    def state(self) -> tuple[object, ...]:
        rows = [(id(row), tuple(row.blocks), row.length, row.written) for row in self.session.rows]
        flying = list(self.session.steps), [step.number for step in self.engine.steps]
        return rows, flying, self.session.last_number, self.engine.cache.bytes_used

    def refuses(self, code: Code, words: str, *spans: tuple[int, int, int, int], **fields: Any) -> None:
        before, number = self.state(), self.number
        with pytest.raises(Refusal, match=words) as refusal:
            self.step(*spans, **fields)
        self.number = number
        assert refusal.value.code is code
        assert self.state() == before, "a refused step changed something"

    @property
    def lengths(self) -> list[int]:
        return [row.length for row in self.session.rows]


def zeros(*shape: int, dtype: int = pb.DTYPE_FLOAT32) -> pb.Tensor:
    return wire.encode(torch.zeros(shape), dtype)


def two_rows() -> Talk:
    """Return a session with two rows: five positions and three, and nothing in flight."""
    talk = Talk()
    talk.step((0, 0, 5, 1), (1, 0, 3, 1), finish=True)
    return talk
