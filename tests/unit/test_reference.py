"""The two forms of the single-process reference are the same model, and neither touches the other's."""

from typing import Any

import pytest
import torch

from shared.exactness import compare, continuation, greedy
from shared.plan import Plan
from shared.reference import Reference, merged, projections
from tests.families import FAMILIES, build, plan_for, prompts
from tests.splits import lowrank_for, matrices_for

PLANS: dict[str, dict[str, Any]] = {
    "per_projection": {},
    "fused": {"layout": "fused", "rank": 12},
    "asymmetric": {"r_c2d": 5, "r_d2c": 9, "scale": 1.7},
    "fused_asymmetric": {"layout": "fused", "r_c2d": 9, "r_d2c": 5, "scale": 0.6},
    "subset": {"layers": (1, 3)},
    "query_and_value": {"targets": ("q", "v")},
    "fused_key_and_value": {"layout": "fused", "targets": ("k", "v")},
}


@pytest.mark.parametrize("options", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("name", FAMILIES)
def test_merged_equals_reference_in_fp64(name: str, options: dict[str, Any]) -> None:
    model = build(name).double()
    plan = plan_for(model, **options)
    lowrank, matrices = lowrank_for(plan, model), matrices_for(plan)
    ids = torch.tensor(prompts(1))
    with torch.no_grad():
        base = model(ids).logits
        one = merged(model, plan, lowrank, matrices)(ids).logits
        two = Reference(model, plan, lowrank, matrices)(ids).logits
    assert (one - base).abs().max() > 0.5  # M matters
    torch.testing.assert_close(two, one, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", FAMILIES)
def test_merged_and_reference_generate_the_same(name: str) -> None:
    model = build(name)
    plan = plan_for(model)
    lowrank, matrices = lowrank_for(plan, model), matrices_for(plan)
    changed = merged(model, plan, lowrank, matrices)
    expected = [greedy(changed, prompt, 16) for prompt in prompts(2)]
    assert not compare(expected, continuation(model)).exact
    reference = Reference(model, plan, lowrank, matrices)
    assert compare(expected, continuation(reference)).exact


def test_the_model_given_is_left_alone() -> None:
    model = build("phi3")
    plan = plan_for(model)
    lowrank, matrices = lowrank_for(plan, model), matrices_for(plan)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.tensor(prompts(1))
    base = model(ids).logits
    merged(model, plan, lowrank, matrices)
    reference = Reference(model, plan, lowrank, matrices)
    assert not torch.equal(model(ids).logits, base)
    reference.remove()
    assert torch.equal(model(ids).logits, base)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_zero_matrices_are_the_base_model_bit_for_bit() -> None:
    model = build("qwen2")
    plan, ids = plan_for(model), torch.tensor(prompts(1))
    base = model(ids).logits
    assert torch.equal(
        merged(model, plan, lowrank_for(plan, model), matrices_for(plan, std=0)).lm_head.weight,
        model.lm_head.weight,
    )
    assert torch.equal(Reference(model, plan, lowrank_for(plan, model))(ids).logits, base)


@pytest.mark.parametrize("layout", ["per_projection", "fused"])
def test_gradients_of_m_follow_from_the_merged_weights_gradients(layout: str) -> None:
    model = build("mistral").double()
    plan = plan_for(model, layout=layout, r_c2d=5, r_d2c=7, scale=1.3)
    lowrank, matrices = lowrank_for(plan, model), matrices_for(plan)
    ids = torch.tensor(prompts(1))

    plain = merged(model, plan, lowrank, matrices)
    plain(ids, labels=ids).loss.backward()
    reference = Reference(model.requires_grad_(False), plan, lowrank, matrices)
    reference(ids, labels=ids).loss.backward()

    for layer in plan.adapted_layers:
        found = reference.matrices[str(layer)].grad
        assert found is not None
        a, b = lowrank.a[layer].double(), lowrank.b[layer].double()
        start = 0
        expected = torch.zeros(plan.groups, 5, 7, dtype=torch.float64)
        for index, target in enumerate(plan.targets):
            linear, rows = projections(plain, layer)[target]
            width = rows.stop - rows.start
            group = index if layout == "per_projection" else 0
            # dL/dM = scale A^T (dL/dW)^T B^T, with W stored as (d_out, hidden)
            own_a = a[:, group * 5 : group * 5 + 5]
            expected[group] += 1.3 * own_a.T @ linear.weight.grad[rows].T @ b[:, start : start + width].T
            start += width
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def grouped(model: Any) -> Plan:
    config = model.config
    return Plan(
        name="grouped",
        backbone="tiny",
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        exchange_layers=(0, 2),
        adapted_layers=(0, 1, 2, 3),
        r_c2d=6,
        r_d2c=4,
        layout="per_projection",
        schedule="grouped",
        initialiser="orthonormal",
    )


def test_a_grouped_plan_feeds_a_layer_with_another_layers_codes() -> None:
    model = build("llama").double()
    plan = grouped(model)
    lowrank, matrices = lowrank_for(plan, model), matrices_for(plan)
    with pytest.raises(ValueError, match=r"layer 1 .* takes its codes from layer 0"):
        merged(model, plan, lowrank, matrices)

    reference = Reference(model, plan, lowrank, matrices)
    seen: dict[tuple[int, str], torch.Tensor] = {}
    for layer in (0, 1):
        linear = model.get_submodule(f"model.layers.{layer}.self_attn.k_proj")
        linear.register_forward_hook(
            lambda module, args, out, layer=layer: seen.update({(layer, "x"): args[0], (layer, "y"): out})
        )
    with torch.no_grad():
        reference(torch.tensor(prompts(1)))
        x, linear = seen[1, "x"], model.get_submodule("model.layers.1.self_attn.k_proj")
        base = x @ linear.weight.T + linear.bias
        q_dim, kv_dim = model.config.hidden_size, linear.out_features
        codes = seen[0, "x"] @ lowrank.a[0].double()[:, 6:12]
        added = codes @ matrices[1][1].double() @ lowrank.b[1].double()[:, q_dim : q_dim + kv_dim]
    torch.testing.assert_close(seen[1, "y"], base + added, rtol=0, atol=1e-9)
    assert reference.codes.keys() == {0, 2}


def test_m_of_another_shape_is_refused() -> None:
    model = build("llama")
    plan = plan_for(model)
    matrices = matrices_for(plan)
    matrices[2] = matrices[2][:, :4]
    with pytest.raises(ValueError, match=r"M of layer 2 has shape \(3, 4, 8\), the plan says \(3, 8, 8\)"):
        Reference(model, plan, lowrank_for(plan, model), matrices)


@pytest.mark.parametrize("layout", ["per_projection", "fused"])
def test_a_shared_m_is_the_same_m_in_every_layer_that_shares_it(layout: str) -> None:
    """Its gradient is the sum of theirs; nothing else differs from a plan where each has its own."""
    model = build("llama").double().requires_grad_(False)
    options = {"exchange_layers": (0,), "layout": layout, "r_c2d": 5, "r_d2c": 7, "scale": 1.3}
    alone, shared = plan_for(model, **options), plan_for(model, **options, share_residual_codes=3)
    lowrank, own = lowrank_for(alone, model), matrices_for(shared)
    assert own.keys() == {0, 3} and shared.served_by(0) == (0, 1, 2)
    ids, found = torch.tensor(prompts(1)), []
    for plan, matrices in ((shared, own), (alone, {0: own[0], 1: own[0], 2: own[0], 3: own[3]})):
        doubled = {layer: m.double() for layer, m in matrices.items()}
        reference = Reference(model, plan, lowrank, doubled)
        out = reference(ids, labels=ids)
        out.loss.backward()
        found.append((out.logits, {int(layer): m.grad for layer, m in reference.matrices.items()}))
        reference.remove()
    (logits, gradients), (expected, each) = found
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)
    assert gradients.keys() == {0, 3}
    assert each[1].norm() > 1e-3 * each[0].norm() < 1e3 * each[2].norm()
    # Norms and the softmax are in float32, forward and back, so sums of gradients agree to that.
    torch.testing.assert_close(gradients[0], each[0] + each[1] + each[2], rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(gradients[3], each[3], rtol=1e-5, atol=1e-8)


def test_a_shared_m_cannot_be_merged() -> None:
    model = build("llama")
    plan = plan_for(model, exchange_layers=(0, 2), share_residual_codes=2)
    assert plan.owners == (0, 2)
    with pytest.raises(ValueError, match=r"layer 1 .* takes its codes from layer 0"):
        merged(model, plan, lowrank_for(plan, model), matrices_for(plan))
