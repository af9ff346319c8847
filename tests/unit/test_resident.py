"""Layers on the edge against Hugging Face's own run of the whole model, for every family."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from edge_client.resident import Resident, _runs
from edge_client.resident_cache import RowCache
from shared.adapter import AdapterError
from shared.edge_parts import EdgePartsError
from shared.lora import factor_shapes, fresh_factors, zero_factors
from shared.plan import Plan, Projection
from shared.reference import Reference, merged
from tests.families import FAMILIES, WINDOW, build, prompts
from tests.plans import lowrank_for, plan_for

HEAD, TAIL, RANK = 2, 1, 3


def resident_plan(model: Any, **options: Any) -> Plan:
    lora = tuple(
        Projection(name=name, d_in=part.in_features, d_out=part.out_features)
        for name, part in model.model.layers[0].named_modules()
        if isinstance(part, torch.nn.Linear)
    )
    facts = {"head_layers": HEAD, "tail_layers": TAIL, "lora": lora, "lora_rank": RANK, **options}
    return plan_for(model, layers=(), **facts)


def resident_of(model: Any, plan: Plan) -> Resident:
    tensors = {layer: model.model.layers[layer].state_dict() for layer in plan.resident_layers}
    return Resident(model.config, plan, tensors, "cpu", model.dtype)


def random_factors(plan: Plan) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: 0.2 * torch.randn(shape, generator=generator) for name, shape in factor_shapes(plan).items()
    }


def layer_ends(model: Any, ids: list[int]) -> tuple[list[Tensor], list[Tensor]]:
    """Return what goes into each layer and what comes out, ``(tokens, hidden_size)`` each."""
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    handles = []
    for layer in model.model.layers:
        handles.append(layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0][0])))
        handles.append(layer.register_forward_hook(lambda _, __, out: outputs.append(out[0])))
    with torch.no_grad():
        model.model(torch.tensor([ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    return inputs, outputs


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_on_the_edge_are_the_models_own(name: str) -> None:
    base = build(name)
    plan = resident_plan(base)
    factors = random_factors(plan)
    model = merged(base, plan, lowrank_for(plan, base), {}, factors)
    resident = resident_of(base, plan).with_factors(factors)
    ids = prompts(1)[0]
    assert len(ids) > WINDOW + 4  # or a window would not show
    half = len(ids) // 2
    inputs, outputs = layer_ends(model, ids)
    for places, first, last in ((range(HEAD), 0, HEAD - 1), (range(HEAD, HEAD + TAIL), -1, -1)):
        wanted, hidden, cache = outputs[last], inputs[first], RowCache()
        with torch.no_grad():
            found = [resident.run(places, hidden[:half], cache)]
            resident.run(places, hidden[:3].flip(0), cache)  # rejected positions, which are cropped
            cache.crop(half)
            twin = cache.fork()
            for at in range(half, len(ids)):
                found.append(resident.run(places, hidden[at : at + 1], cache))
            forked = resident.run(places, hidden[half:], twin)
            whole = resident.run_whole(places, torch.cat([hidden[:7], hidden]), (7, len(ids)))
        torch.testing.assert_close(torch.cat(found), wanted, rtol=0, atol=3e-4)
        torch.testing.assert_close(forked, wanted[half:], rtol=0, atol=3e-4)
        torch.testing.assert_close(whole, torch.cat([wanted[:7], wanted]), rtol=0, atol=3e-4)
    untouched = resident_of(base, plan).with_factors(zero_factors(plan))
    inputs, outputs = layer_ends(base, ids)
    with torch.no_grad():
        plain = untouched.run(range(HEAD), inputs[0], RowCache())
    torch.testing.assert_close(plain, outputs[HEAD - 1], rtol=0, atol=3e-4)
    assert not torch.allclose(plain, wanted_head(model, ids), atol=1e-2)


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_both_references_agree_on_loras(name: str) -> None:
    base = build(name)
    plan = resident_plan(base)
    factors, ab = random_factors(plan), lowrank_for(plan, base)
    ids = torch.tensor(prompts(1))
    with torch.no_grad():
        one = merged(base, plan, ab, {}, factors)(ids).logits
        two = Reference(base, plan, ab, {}, factors)(ids).logits
    torch.testing.assert_close(two, one, rtol=0, atol=3e-4)
    assert not torch.allclose(one, build(name)(ids).logits, atol=1e-2)


def wanted_head(model: Any, ids: list[int]) -> Tensor:
    """Return what the tuned head layers give."""
    return layer_ends(model, ids)[1][HEAD - 1]


def test_fresh_factors_change_nothing_and_are_the_same_every_time() -> None:
    plan = resident_plan(build("phi3"))
    one, two, other = fresh_factors(plan, 0), fresh_factors(plan, 0), fresh_factors(plan, 1)
    assert one.keys() == factor_shapes(plan).keys()
    for name, factor in one.items():
        assert torch.equal(factor, two[name])
        if name.endswith(".up"):
            assert not factor.any()
        else:
            assert not torch.equal(factor, other[name])
            assert factor.abs().max() <= factor.shape[0] ** -0.5 and factor.std() > 0


def test_a_plan_says_what_goes_back() -> None:
    model = build("llama")
    tail = resident_plan(model, head_layers=0, tail_layers=2)
    assert tail.learns_at_the_end_only and tail.lowest_gradient == tail.cloud_layers.stop
    ends = resident_plan(model)
    assert not ends.learns_at_the_end_only and ends.returns_gradient and ends.lowest_gradient == HEAD
    frozen = resident_plan(model, lora=(), lora_rank=0)
    assert not frozen.returns_gradient and frozen.resident_layers == (0, 1, 3)
    for wrong in ({"lora_rank": 0}, {"lora": ()}, {"head_layers": 0, "tail_layers": 0}, {"head_layers": 4}):
        with pytest.raises(ValueError):
            resident_plan(model, **wrong)


def test_a_plan_that_does_not_fit_the_layers_is_refused(tmp_path: Path) -> None:
    model = build("llama")
    for wrong in ({"name": "self_attn.nope"}, {"d_out": 1}):
        lora = (resident_plan(model).lora[0].model_copy(update=wrong),)
        with pytest.raises(EdgePartsError, match="which this model's layers do not have"):
            Resident.read(model.config, resident_plan(model, lora=lora), tmp_path, "cpu", torch.float32)


@pytest.mark.parametrize("lengths", [(5,), (3, 3, 3), (1, 1, 1, 9), (9, 1, 1, 1), (2, 7, 1, 1, 8)])
def test_padding_takes_no_more_than_half(lengths: tuple[int, ...]) -> None:
    runs = _runs(lengths)
    assert [index for lo, hi in runs for index in range(lo, hi)] == list(range(len(lengths)))
    for lo, hi in runs:
        assert (hi - lo) * max(lengths[lo:hi]) <= 2 * sum(lengths[lo:hi])


def test_weights_that_are_infinite_in_what_this_side_computes_in_are_refused() -> None:
    model = build("llama")
    plan = resident_plan(model)
    tensors = {layer: dict(model.model.layers[layer].state_dict()) for layer in plan.resident_layers}
    Resident(model.config, plan, tensors, "cpu", torch.float16)
    large = tensors[1]["mlp.up_proj.weight"].clone()
    large[3, 4] = 1e5
    tensors[1]["mlp.up_proj.weight"] = large
    Resident(model.config, plan, tensors, "cpu", torch.bfloat16)
    with pytest.raises(EdgePartsError, match=r"layer 1: mlp.up_proj.* numbers that float16 cannot"):
        Resident(model.config, plan, tensors, "cpu", torch.float16)


@pytest.mark.parametrize("part", ["down", "up"])
def test_factors_that_are_infinite_in_what_this_side_computes_in_are_refused(part: str) -> None:
    """They made every logit NaN."""
    model = build("llama")
    plan = resident_plan(model)
    tensors = {layer: model.model.layers[layer].state_dict() for layer in plan.resident_layers}
    factors = zero_factors(plan)
    half = Resident(model.config, plan, tensors, "cpu", torch.float16)
    half.with_factors(factors)
    factors[f"layers.1.mlp.up_proj.{part}"][0, 0] = 1e6
    for dtype in (torch.float32, torch.bfloat16):
        Resident(model.config, plan, tensors, "cpu", dtype).with_factors(factors)
    with pytest.raises(AdapterError, match=rf"layers.1.mlp.up_proj.{part} holds numbers that float16 cannot"):
        half.with_factors(factors)
