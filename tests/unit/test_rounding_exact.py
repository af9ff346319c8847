"""A session whose tensors travel as int8 is a model that rounds them in the same places, and no other."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from edge_client.personal import PersonalWeights
from edge_client.spans import Span
from shared import int8
from shared.plan import Plan, Target
from shared.reference import Reference
from shared.wire_dtypes import WireDtypes
from tests.families import build, prompts
from tests.inprocess import Cloud, adapter
from tests.splits import PLANS, lowrank_for, matrices_for, plan_for
from tests.tuning import InDouble

KINDS = ("hidden", "codes", "residual_codes")
SERVED = ("per-projection", "fused-asymmetric")
MODEL, TOKENS = "llama", 12


def rounded(tensor: Tensor, groups: int = 1) -> Tensor:
    """Return ``(..., width)`` as it comes out on the other side, with a scale for each group of a row."""
    runs = tensor.to(dtype=torch.float32).reshape(-1, tensor.shape[-1] // groups)
    return torch.from_numpy(int8.restore(*int8.quantise(runs.numpy()))).reshape(tensor.shape)


class Rounding(Reference):
    """The reference, with codes and residual codes rounded on their way."""

    def __init__(self, model: Any, plan: Plan, *weights: Any, kinds: set[str]) -> None:
        super().__init__(model, plan, *weights)
        self.kinds = kinds
        self.personal = PersonalWeights(adapter(plan, weights[1]))

    def residual(self, layer: int, target: Target, columns: slice) -> Tensor:
        plan, codes = self.plan, self.codes[self.plan.source_of(layer)][0]  # of the one row
        if "codes" in self.kinds:
            codes = rounded(codes, plan.groups)
        # In float32 and by the edge's own code: other sums would be rounded elsewhere.
        z = torch.from_numpy(
            self.personal.residual_codes(layer, codes.to(dtype=torch.float32).contiguous().numpy())
        )
        if "residual_codes" in self.kinds:
            z = rounded(z, plan.groups)
        group = 0 if plan.layout == "fused" else plan.targets.index(target)
        own = z[:, group * plan.r_d2c : (group + 1) * plan.r_d2c].double()
        return plan.scale * (own @ self._b[layer].double()[:, columns])[None]


def kinds_of(kind: str) -> set[str]:
    return set(KINDS) if kind == "all" else {kind} - {"none"}


def dtypes_of(kind: str) -> WireDtypes:
    return WireDtypes.named("float32", **dict.fromkeys(kinds_of(kind), "int8"))


@pytest.fixture(scope="module")
def cloud(folder_of) -> Iterator[Cloud]:
    """Float64: a sum that differs in its last bits then hardly ever lands on another whole number."""
    model = build(MODEL)
    plans = [plan_for(model, **PLANS[name], name=name) for name in SERVED]
    served = [(plan, lowrank_for(plan, model)) for plan in plans]
    with Cloud(folder_of(MODEL), served, dtype=torch.float64) as cloud:
        yield cloud
        cloud.close_streams()
        assert cloud.cache.bytes_used == 0


@torch.inference_mode()
def split_hidden(cloud: Cloud, plan: Plan, kind: str, h0: Tensor) -> Tensor:
    stream = cloud.open(plan, matrices_for(plan), dtypes=dtypes_of(kind))
    return stream.step(h0, [Span(0, 0, h0.shape[0], h0.shape[0])])


@torch.no_grad()
def reference_hidden(plan: Plan, kind: str, h0: Tensor) -> Tensor:
    model, kinds, found = build(MODEL), kinds_of(kind), []
    matrices = matrices_for(plan)
    model.double()
    reference = Rounding(model, plan, lowrank_for(plan, build(MODEL)), matrices, kinds=kinds)
    model.model.norm.register_forward_pre_hook(lambda _, args: found.append(args[0][0]))
    with InDouble():
        model(inputs_embeds=(rounded(h0) if "hidden" in kinds else h0).double()[None], use_cache=False)
    reference.remove()
    return rounded(found[0]) if "hidden" in kinds else found[0].to(dtype=torch.float32)


def prompt_of(name: str) -> tuple[Plan, Tensor]:
    """Return a plan and h0 of a prompt."""
    model = build(MODEL)
    h0 = model.model.embed_tokens(torch.tensor(prompts(1)[0][:TOKENS])).detach()
    return plan_for(model, **PLANS[name], name=name), h0


@pytest.mark.parametrize("name", SERVED)
@pytest.mark.parametrize("kind", [*KINDS, "all"])
def test_int8_rounds_where_the_reference_does(cloud: Cloud, kind: str, name: str) -> None:
    plan, h0 = prompt_of(name)
    found, expected = split_hidden(cloud, plan, kind, h0), reference_hidden(plan, kind, h0)
    assert (expected - reference_hidden(plan, "none", h0)).abs().max() > 1e-2, "the rounding should be seen"
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", SERVED)
def test_without_it_nothing_is_rounded(cloud: Cloud, name: str) -> None:
    """Else the test above could be one of another reference that is as wrong."""
    plan, h0 = prompt_of(name)
    assert torch.equal(split_hidden(cloud, plan, "none", h0), reference_hidden(plan, "none", h0))
