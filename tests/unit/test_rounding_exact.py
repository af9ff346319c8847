"""A session whose tensors travel rounded is a model that rounds them in the same places, and no other."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from edge_client.personal import PersonalWeights
from edge_client.spans import Span
from shared import int4, int8
from shared.plan import Plan, Target
from shared.reference import Reference
from shared.wire_dtypes import WireDtypes
from tests.families import build, prompts
from tests.inprocess import Cloud, adapter
from tests.splits import PLANS, lowrank_for, matrices_for, plan_for
from tests.tuning import InDouble

KINDS = ("hidden", "codes", "residual_codes")
SERVED = ("per-projection", "fused-asymmetric", "shared")
CODECS = {"int8": int8, "int4": int4}
CASES = [(codec, kind) for codec in CODECS for kind in (*KINDS, "all") if (codec, kind) != ("int4", "hidden")]
MODEL, TOKENS = "llama", 12


def rounded(tensor: Tensor, groups: int = 1, codec: Any = int8) -> Tensor:
    """Return ``(..., width)`` as it comes out on the other side, with a scale for each group of a row."""
    runs = tensor.to(dtype=torch.float32).reshape(-1, tensor.shape[-1] // groups)
    return torch.from_numpy(codec.restore(*codec.quantise(runs.numpy()))).reshape(tensor.shape)


class Rounding(Reference):
    """The reference, with codes and residual codes rounded on their way."""

    def __init__(self, model: Any, plan: Plan, *weights: Any, kinds: set[str], codec: Any) -> None:
        super().__init__(model, plan, *weights)
        self.kinds, self.codec = kinds, codec
        self.personal = PersonalWeights(adapter(plan, weights[1]))

    def residual(self, layer: int, target: Target, columns: slice) -> Tensor:
        plan, codes = self.plan, self.codes[self.plan.source_of(layer)][0]  # of the one row
        if "codes" in self.kinds:
            codes = rounded(codes, plan.groups, self.codec)
        # In float32 and by the edge's own code: other sums would be rounded elsewhere.
        numbers = codes.to(dtype=torch.float32).contiguous().numpy()
        z = torch.from_numpy(self.personal.residual_codes(plan.owner_of(layer), numbers))
        if "residual_codes" in self.kinds:
            z = rounded(z, plan.groups, self.codec)
        group = 0 if plan.layout == "fused" else plan.targets.index(target)
        own = z[:, group * plan.r_d2c : (group + 1) * plan.r_d2c].double()
        return plan.scale * (own @ self._b[layer].double()[:, columns])[None]


def plan_of(name: str) -> Plan:
    options = {"exchange_layers": (0,), "share_residual_codes": 3, "r_c2d": 9, "r_d2c": 5}
    return plan_for(build(MODEL), **(options if name == "shared" else PLANS[name]), name=name)


def kinds_of(codec: str, kind: str) -> set[str]:
    """Return the kinds of tensors that are rounded; hidden states are not, to int4."""
    return (set(KINDS) if kind == "all" else {kind} - {"none"}) - ({"hidden"} if codec == "int4" else set())


def dtypes_of(codec: str, kind: str) -> WireDtypes:
    return WireDtypes.named("float32", **dict.fromkeys(kinds_of(codec, kind), codec))


@pytest.fixture(scope="module")
def cloud(folder_of) -> Iterator[Cloud]:
    """Float64: a sum that differs in its last bits then hardly ever lands on another whole number."""
    model = build(MODEL)
    served = [(plan, lowrank_for(plan, model)) for plan in map(plan_of, SERVED)]
    with Cloud(folder_of(MODEL), served, dtype=torch.float64) as cloud:
        yield cloud
        cloud.close_streams()
        assert cloud.cache.bytes_used == 0


@torch.inference_mode()
def split_hidden(cloud: Cloud, plan: Plan, codec: str, kind: str, h0: Tensor) -> Tensor:
    stream = cloud.open(plan, matrices_for(plan), dtypes=dtypes_of(codec, kind))
    return stream.step(h0, [Span(0, 0, h0.shape[0], h0.shape[0])])


@torch.no_grad()
def reference_hidden(plan: Plan, codec: str, kind: str, h0: Tensor) -> Tensor:
    model, kinds, found = build(MODEL), kinds_of(codec, kind), []
    matrices = matrices_for(plan)
    model.double()
    lowrank = lowrank_for(plan, build(MODEL))
    reference = Rounding(model, plan, lowrank, matrices, kinds=kinds, codec=CODECS[codec])
    model.model.norm.register_forward_pre_hook(lambda _, args: found.append(args[0][0]))
    with InDouble():
        model(inputs_embeds=(rounded(h0) if "hidden" in kinds else h0).double()[None], use_cache=False)
    reference.remove()
    return rounded(found[0]) if "hidden" in kinds else found[0].to(dtype=torch.float32)


def prompt_of(name: str) -> tuple[Plan, Tensor]:
    """Return a plan and h0 of a prompt."""
    h0 = build(MODEL).model.embed_tokens(torch.tensor(prompts(1)[0][:TOKENS])).detach()
    return plan_of(name), h0


@pytest.mark.parametrize("name", SERVED)
@pytest.mark.parametrize(("codec", "kind"), CASES)
def test_a_session_rounds_where_the_reference_does(cloud: Cloud, codec: str, kind: str, name: str) -> None:
    plan, h0 = prompt_of(name)
    found, expected = split_hidden(cloud, plan, codec, kind, h0), reference_hidden(plan, codec, kind, h0)
    apart = (expected - reference_hidden(plan, codec, "none", h0)).abs().max()
    assert apart > 1e-2, "the rounding should be seen"
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", SERVED)
def test_without_it_nothing_is_rounded(cloud: Cloud, name: str) -> None:
    """Else the test above could be one of another reference that is as wrong."""
    plan, h0 = prompt_of(name)
    found = split_hidden(cloud, plan, "int8", "none", h0)
    expected = reference_hidden(plan, "int8", "none", h0)
    assert torch.equal(found, expected)
