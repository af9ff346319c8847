"""Tuning the packaged model over localhost in float32: gradients are those of autograd on the reference."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from benchmarks.processes import CloudProcess
from benchmarks.prompts import PROMPTS
from edge_client.model import PrivateLoraForCausalLM
from edge_client.offer import fingerprint_message
from edge_client.tuning.examples import IGNORED, Example
from edge_client.tuning.learner import Learner, embedding
from edge_client.tuning.loss import Head
from shared import lowrank
from shared.models import DEFAULT_MODEL, resolve
from shared.pb.privatelora.v1 import private_lora_pb2 as pb
from shared.reference import Reference
from tests.plans import matrices_for

STD = 0.05  # as in test_exact.py: changes nearly every answer and leaves it fluent
PLANS = (
    '{"name": "apart", "r_c2d": 64, "r_d2c": 64}',
    '{"name": "together", "r_c2d": 192, "r_d2c": 96, "layout": "fused"}',
)

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def cloud() -> Iterator[CloudProcess]:
    """Serve the packaged model with both layouts; pieces so small that the batch is several."""
    arguments = [part for plan in PLANS for part in ("--plan", plan)]
    environment = {"PRIVATELORA_CLOUD_TUNING__PIECE_TOKENS": "64"}
    with CloudProcess(DEFAULT_MODEL, arguments=arguments, env=environment) as process:
        yield process


@pytest.fixture(scope="module")
def base() -> Any:
    folder = resolve(DEFAULT_MODEL, progress=False).folder
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)


def chats(edge: PrivateLoraForCausalLM) -> list[Example]:
    """Return questions of different lengths, of which the second half is learned."""
    made = []
    for line, text in enumerate(PROMPTS[:4], start=1):
        said = [{"role": "user", "content": text}]
        ids = torch.tensor(edge.tokenizer.apply_chat_template(said, return_dict=False))
        labels = ids.clone()
        labels[: len(ids) // 2] = IGNORED
        made.append(Example(ids, labels, line))
    return made


@pytest.mark.parametrize("name", ["apart", "together"])
def test_gradients_are_the_references(cloud: CloudProcess, base: Any, name: str, tmp_path: Path) -> None:
    with PrivateLoraForCausalLM.from_cloud(cloud.address, plan=name, config_dir=tmp_path) as edge:
        plan, fingerprint = edge.offer.plans[name]
        learner = Learner(
            Head(edge.norm, edge.lm_head, edge.softcap),
            embedding(edge.embed_tokens, edge.device),
            lambda: edge.connection.open_tuning(plan, fingerprint_message(fingerprint), pb.DTYPE_FLOAT32),
        )
        batch, matrices = chats(edge), matrices_for(plan, std=STD)
        found = learner.gradients(batch, matrices)
        learner.close()

    a_and_b, _ = lowrank.ensure(plan, resolve(DEFAULT_MODEL, progress=False))
    reference = Reference(base, plan, a_and_b, matrices)
    try:
        total, expected = sum(example.targets for example in batch), 0.0
        for example in batch:
            logits = reference(example.ids[None, :-1], use_cache=False).logits[0]
            loss = F.cross_entropy(logits, example.labels[1:], ignore_index=IGNORED, reduction="sum") / total
            loss.backward()
            expected += float(loss.detach())
    finally:
        reference.remove()
    assert found.loss == pytest.approx(expected, rel=1e-5)
    errors = {}
    for layer in plan.adapted_layers:
        wanted = reference.matrices[str(layer)].grad
        assert wanted is not None and wanted.norm() > 0
        errors[layer] = float((found.gradients[layer] - wanted).norm() / wanted.norm())
    assert len(errors) == base.config.num_hidden_layers and max(errors.values()) <= 1e-4, errors
    print(f"largest relative error of a layer: {max(errors.values()):.1e}")
