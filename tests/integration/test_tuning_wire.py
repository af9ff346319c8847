"""The benchmark's learner through a cloud process equals its learner in one process, on four tiny layers."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from benchmarks.tuning_learner import Example, Local, collate, private_lora, train
from benchmarks.tuning_wire import Wire, cut, examples_of, through_cloud
from edge_client.model import PrivateLoraForCausalLM
from shared import lowrank
from shared.models import resolve
from shared.plan import Plan
from tests.families import build
from tests.integration.served import Served

EXAMPLES = [Example((*range(4 + i, 9 + 2 * i), *range(30, 31 + i % 3)), 1 + i % 3) for i in range(12)]


@pytest.fixture(params=["r8", "fused"])
def pair(tiny_cloud: Served, request: pytest.FixtureRequest, tmp_path) -> Iterator[tuple[Wire, Local]]:
    """Both learners, with the same M."""
    with PrivateLoraForCausalLM.from_cloud(
        tiny_cloud.address, plan=request.param, config_dir=tmp_path, cache_dir=tmp_path
    ) as edge:
        plan, _ = edge.offer.plan(request.param)
        a_and_b, _ = lowrank.ensure(
            plan, resolve(str(tiny_cloud.folder), progress=False), tiny_cloud.cache_dir
        )
        split, local = Wire(edge, plan, "float32"), private_lora(build("llama").float(), plan, a_and_b)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for mine, other in zip(split.parameters, local.parameters, strict=True):
                other.copy_(mine.normal_(std=0.3, generator=generator))
        yield split, local
        split.close()


def test_gradients_are_the_references(pair: tuple[Wire, Local]) -> None:
    split, local = pair
    losses = [learner.loss_and_grads(collate(EXAMPLES)) for learner in pair]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for mine, other in zip(split.parameters, local.parameters, strict=True):
        assert mine.grad is not None and other.grad is not None and other.grad.norm() > 1e-4
        assert (mine.grad - other.grad).norm() / other.grad.norm() <= 1e-4
    once = [p.grad.clone() for p in split.parameters if p.grad is not None]
    split.loss_and_grads(collate(EXAMPLES))
    for gradient, parameter in zip(once, split.parameters, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * gradient)  # added, as autograd does


def test_scores_and_training_are_the_references(pair: tuple[Wire, Local]) -> None:
    batch = collate(EXAMPLES)
    before, expected = (learner.answer_logits(batch) for learner in pair)
    torch.testing.assert_close(before, expected, atol=1e-4, rtol=1e-4)
    losses = [train(learner, EXAMPLES, steps=12, size=4, peak=0.03, seed=1).losses for learner in pair]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    after, expected = (learner.answer_logits(batch) for learner in pair)
    torch.testing.assert_close(after, expected, atol=1e-2, rtol=1e-2)
    assert F.cross_entropy(after, batch.targets) < F.cross_entropy(before, batch.targets) - 0.1


def test_a_cloud_is_started_for_a_plan_and_refused_for_another(
    tiny_cloud: Served, tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("PRIVATELORA_CACHE_DIR", str(tmp_path))
    checkpoint = resolve(str(tiny_cloud.folder), progress=False)
    g = checkpoint.geometry
    plan = Plan.subset(
        name="r4", backbone=checkpoint.id, num_layers=g.num_layers, hidden_size=g.hidden_size, rank=4,
        initialiser="gaussian",
    )  # fmt: skip
    with through_cloud(str(tiny_cloud.folder), plan, "float32") as split:
        assert split.loss_and_grads(collate(EXAMPLES)) > 0
    # Not every layer, which is what the cloud that is started will offer.
    other = plan.model_copy(update={"exchange_layers": (0,)})
    with (
        pytest.raises(ValueError, match="another one"),
        through_cloud(str(tiny_cloud.folder), other, "float32"),
    ):
        pass


def test_examples_survive_being_laid_side_by_side() -> None:
    for given, found in zip(EXAMPLES, examples_of(collate(EXAMPLES)), strict=True):
        assert found.ids.tolist() == list(given.ids)
        assert found.targets == given.answer
        assert found.labels[-given.answer :].tolist() == list(given.ids[-given.answer :])


def test_cut_keeps_order_and_bound() -> None:
    examples = examples_of(collate(EXAMPLES))
    groups = list(cut(examples, 20))
    assert [e for g in groups for e in g] == examples
    assert all(len(g) == 1 or sum(len(e.ids) for e in g) <= 20 for g in groups) and len(groups) > 1
