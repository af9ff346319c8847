"""Layers on the edge, over two real processes: tokens, gradients, and what crosses the wire."""

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.generation.stopping_criteria import StoppingCriteria

from benchmarks.processes import CloudProcess
from edge_client.model import PrivateLoraForCausalLM
from edge_client.offer import fingerprint_message
from edge_client.tuning.config import TuneConfig
from edge_client.tuning.examples import IGNORED, Example
from edge_client.tuning.learner import Learner, embedding
from edge_client.tuning.loss import Head
from edge_client.tuning.rows import DataError
from edge_client.tuning.run import Job, start
from edge_client.tuning.weights import joined
from edge_client.wire_cost import wire_cost
from shared import lowrank
from shared.adapter import Adapter
from shared.checkpoint import Checkpoint
from shared.exactness import compare, continuation, greedy
from shared.models import resolve
from shared.pb.privatelora.v1 import private_lora_pb2 as pb
from shared.plan import Plan
from shared.reference import Reference, merged
from tests.families import build, prompts, save
from tests.tuning import InDouble

PLANS: tuple[dict[str, Any], ...] = (
    {"name": "whole", "r_c2d": 4, "r_d2c": 4},
    {"name": "ends", "head_layers": 1, "tail_layers": 1, "lora_rank": 3},
    {"name": "tail", "tail_layers": 2, "lora_rank": 3},
    {"name": "head", "head_layers": 2, "lora_rank": 0},
    {"name": "mixed", "head_layers": 1, "tail_layers": 1, "lora_rank": 2, "layers": [1, 2],
     "r_c2d": 7, "r_d2c": 5},
    {"name": "trip", "one_trip": True, "lora_rank": 2, "r_c2d": 6, "r_d2c": 4},
    {"name": "trip-shared", "one_trip": True, "lora_rank": 2, "r_c2d": 6, "r_d2c": 4,
     "share_residual_codes": 2},
    {"name": "trip-lean", "one_trip": True, "edge_tail": False, "lora_rank": 2, "r_c2d": 6, "r_d2c": 4,
     "share_residual_codes": 2, "layout": "fused"},
    {"name": "shared", "head_layers": 1, "lora_rank": 2, "layers": [2, 3], "exchange_layers": [2],
     "share_residual_codes": 2, "r_c2d": 7, "r_d2c": 5, "layout": "fused"},
)  # fmt: skip


NOT_MERGED = ("trip", "trip-shared", "trip-lean", "shared")
STEP_TOKENS = 7


@dataclass(frozen=True)
class Served:
    """A cloud of one family, in float64, and the plain model beside it."""

    name: str
    process: CloudProcess
    checkpoint: Checkpoint
    model: Any
    folder: Path

    def edge(self, plan: str, **options: Any) -> PrivateLoraForCausalLM:
        """Return an edge with random personal weights."""
        folders = {"config_dir": self.folder / "pins", "cache_dir": self.folder / "edge"}
        edge = PrivateLoraForCausalLM.from_cloud(self.process.address, plan=plan, **folders, **options)
        empty = edge.adapter
        edge.set_adapter(Adapter.random(empty.plan, empty.fingerprint, seed=0, std=0.4))
        return edge

    def lowrank(self, plan: Plan) -> lowrank.LowRank:
        """Return the plan's A and B."""
        return lowrank.ensure(plan, self.checkpoint, self.folder / "cloud")[0]


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    saved = save(name, folder / "model")
    arguments = [
        "--threads",
        "1",
        "--cache-dir",
        str(folder / "cloud"),
        "--max-step-tokens",
        str(STEP_TOKENS),
    ]
    arguments += ["--kv-bytes", str(16 << 20)]
    for plan in PLANS:
        arguments += ["--plan", json.dumps(plan)]
    with CloudProcess(str(saved), dtype="float64", arguments=arguments, log=folder / "log") as process:
        yield Served(name, process, resolve(str(saved), progress=False), build(name).double(), folder)
        assert "Traceback" not in process.logs()


@pytest.mark.parametrize(
    "plan", ["ends", "tail", "head", "mixed", "trip", "trip-shared", "trip-lean", "shared"]
)
def test_tokens_are_those_of_the_merged_model(served: Served, plan: str) -> None:
    with served.edge(plan) as edge:
        adapter = edge.adapter
        matrices = served.lowrank(adapter.plan)
        weights = matrices, adapter.matrices, adapter.factors
        if plan in NOT_MERGED:  # a residual that depends on another layer cannot be merged
            mine = Reference(copy.deepcopy(served.model), adapter.plan, *weights)
        else:
            mine = merged(served.model, adapter.plan, *weights)
        wanted = [greedy(mine, prompt, 12) for prompt in prompts(2)]
        verdict = compare(wanted, continuation(edge))
        assert verdict.exact, str(verdict)
        assert compare(wanted, continuation(served.model)).exact == (plan == "head")  # which has no weights
        before = edge.traffic()
        compare(wanted[:1], continuation(edge))
        steps = -(-len(wanted[0].prompt) // STEP_TOKENS) + 11  # the last chunk of the prompt gives a token
        trips = {"mixed": 2, "shared": 2}.get(plan, 1)  # its first exchange is done on this side
        assert (edge.traffic() - before).round_trips == steps * trips == steps * adapter.plan.round_trips
        beams = {"num_beams": 3, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        ids = torch.tensor(prompts(1))
        assert torch.equal(edge.generate(ids, **beams), mine.generate(ids, **beams))
        drafted = edge.generate(
            ids, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=4, pad_token_id=0
        )
        assert drafted[0].tolist() == [*wanted[0].prompt, *wanted[0].tokens]


def test_a_prompt_is_cut_as_the_user_says_and_means_the_same(served: Served) -> None:
    traffic, tokens = [], []
    for most in (None, 3):
        with served.edge("trip-lean", prefill_chunk_tokens=most) as edge:
            wanted = greedy(edge, prompts(1)[0], 6)
            traffic.append(edge.traffic().round_trips)
            tokens.append(wanted.tokens)
    assert tokens[0] == tokens[1]
    chunks = [-(-len(wanted.prompt) // most) for most in (STEP_TOKENS, 3)]
    assert chunks[0] < chunks[1], "else nothing was cut"
    assert traffic == [count + 5 for count in chunks]


class Interrupt(StoppingCriteria):
    """Ctrl-C after some tokens."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize("plan", ["ends", "trip"])
def test_a_chat_with_layers_on_the_edge_goes_on_and_changes_adapters(served: Served, plan: str) -> None:
    with served.edge(plan) as edge:
        first = edge.adapter
        matrices = served.lowrank(first.plan)

        def wanted(adapter: Adapter, prompt: list[int]) -> Any:
            weights = matrices, adapter.matrices, adapter.factors
            model: Any = (
                Reference(copy.deepcopy(served.model), adapter.plan, *weights)
                if plan in NOT_MERGED
                else merged(served.model, adapter.plan, *weights)
            )
            return greedy(model, prompt, 8)

        (turn,) = prompts(1)
        answered = wanted(first, turn)
        with pytest.raises(KeyboardInterrupt):
            edge.generate(torch.tensor([turn]), max_new_tokens=8, stopping_criteria=[Interrupt(3)])
        assert compare([answered], continuation(edge)).exact
        # The next turn sends what is new alone: the cloud and this side's layers hold the rest.
        longer = [*answered.prompt, *answered.tokens, 5, 7, 9]
        before = edge.positions()
        assert compare([wanted(first, longer)], continuation(edge)).exact
        assert edge.positions() - before == 1 + 3 + 7  # one left over, three new, an answer
        second = Adapter.random(first.plan, first.fingerprint, seed=1, std=0.4)
        edge.set_adapter(second)
        other = wanted(second, longer)
        assert other.tokens != wanted(first, longer).tokens
        assert compare([other], continuation(edge)).exact


def example(ids: list[int]) -> Example:
    labels = torch.tensor(ids)
    labels[: len(ids) // 2] = IGNORED
    return Example(torch.tensor(ids), labels, line=1)


class Added(nn.Module):
    """A product with a LoRA beside it, written down once more for the reference."""

    def __init__(self, base: nn.Module, down: Tensor, up: Tensor, scale: float) -> None:
        super().__init__()
        self.base, self.down, self.up, self.scale = base, down, up, scale

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scale * (x @ self.down @ self.up)


def reference(served: Served, adapter: Adapter, examples: list[Example]) -> tuple[float, dict[Any, Tensor]]:
    """Return the mean loss and its gradients from autograd on one process."""
    plan, model = adapter.plan, build(served.name).double().requires_grad_(False)
    whole = Reference(model, plan, served.lowrank(plan), {k: m.double() for k, m in adapter.matrices.items()})
    leaves = {name: factor.double().requires_grad_() for name, factor in adapter.factors.items()}
    for layer in plan.resident_layers:
        for projection in plan.lora:
            parent, _, name = projection.name.rpartition(".")
            owner = model.model.layers[layer].get_submodule(parent)
            pair = (leaves[f"layers.{layer}.{projection.name}.{part}"] for part in ("down", "up"))
            setattr(owner, name, Added(getattr(owner, name), *pair, plan.lora_scale))
    with InDouble():
        parts = []
        for one in examples:
            logits = model(one.ids[None, :-1], use_cache=False).logits[0]
            parts.append(
                nn.functional.cross_entropy(logits, one.labels[1:], ignore_index=IGNORED, reduction="sum")
            )
        loss = sum(parts) / sum(one.targets for one in examples)
        loss.backward()
    whole.remove()
    gradients = {int(layer): m.grad for layer, m in whole.matrices.items()}
    return float(loss.detach()), joined(gradients, {name: leaf.grad for name, leaf in leaves.items()})


@pytest.mark.parametrize("plan", ["ends", "tail", "mixed", "trip", "trip-shared", "trip-lean", "shared"])
def test_gradients_are_those_of_one_process(served: Served, plan: str) -> None:
    with served.edge(plan) as edge:
        adapter, connection, offer = edge.adapter, edge.connection, edge.offer
        examples = [example(ids) for ids in prompts(3)]
        loss, expected = reference(served, adapter, examples)
        message = fingerprint_message(offer.plans[plan][1])
        learner = Learner(
            Head(edge.norm, edge.lm_head, edge.softcap),
            embedding(edge.embed_tokens, edge.device),
            lambda: connection.open_tuning(adapter.plan, message, pb.DTYPE_FLOAT64),
            resident=edge.resident,
        )
        learner.micro_batch_tokens = 45  # two micro-batches
        weights = joined(adapter.matrices, adapter.factors)
        weights = {key: tensor.double() for key, tensor in weights.items()}
        with InDouble():
            measured = learner.gradients(examples, weights)
            assert learner.loss(examples, weights) == pytest.approx(loss, rel=1e-12)
        learner.close()
        assert measured.loss == pytest.approx(loss, rel=1e-12)
        assert measured.gradients.keys() == expected.keys()
        for key, gradient in expected.items():
            difference = (measured.gradients[key] - gradient).norm()
            assert difference <= 1e-9 * gradient.norm(), key


@pytest.mark.parametrize("plan", ["trip", "trip-shared", "trip-lean", "shared"])
@pytest.mark.parametrize("residual_codes", ["float32", "int4"])
def test_what_is_shared_is_sent_once(served: Served, plan: str, residual_codes: str) -> None:
    """The formula's bytes, of steps that each give one token."""
    with served.edge(plan, wire_dtype="float32", residual_codes_wire_dtype=residual_codes) as edge:
        ids, options = torch.tensor(prompts(1)), {"do_sample": False, "pad_token_id": 0}
        short = edge.generate(ids, max_new_tokens=12, min_new_tokens=12, **options)
        before = edge.traffic()
        longer = edge.generate(ids, max_new_tokens=36, min_new_tokens=36, **options)
        spent = edge.traffic() - before
        assert torch.equal(longer[:, : short.shape[1]], short)
        found, cost = edge.adapter.plan, wire_cost(edge.adapter.plan, edge.wire_dtypes)
        assert len(found.owners) == {"trip": 3, "trip-shared": 2, "trip-lean": 2, "shared": 1}[plan]
        steps = spent.round_trips // cost.round_trips
        assert 24 <= steps <= 36
        assert spent.bytes_up == pytest.approx(steps * cost.up, rel=0.08)  # sizes below 128 take a byte less
        assert spent.bytes_down == pytest.approx(steps * cost.down, rel=0.08)


def test_an_edge_fetches_the_layers_of_its_plan_and_no_others(served: Served) -> None:
    with served.edge("tail") as edge:
        folder = served.folder / "edge" / "edge" / edge.adapter.fingerprint.edge.hex()
        assert sorted(path.name for path in folder.glob("layer-*")) == [
            "layer-2.safetensors",
            "layer-3.safetensors",
        ]
    damaged = folder / "layer-2.safetensors"
    raw = bytearray(damaged.read_bytes())
    raw[-1] ^= 1
    damaged.write_bytes(raw)
    with served.edge("tail") as again:  # fetched once more
        assert again.resident is not None and damaged.read_bytes() != bytes(raw)


def test_a_plan_with_nothing_to_learn_is_refused_for_tuning(served: Served, tmp_path: Path) -> None:
    with served.edge("head") as edge, pytest.raises(DataError, match="'head' has no personal weights"):
        start(edge, Job("nothing", tmp_path / "rows.jsonl", tmp_path / "out.safetensors", TuneConfig()), [])
