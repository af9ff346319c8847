"""lagged(k) by its definition: one position at a time, with nothing that its step could not know."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from benchmarks.tuning_learner import Example, collate, lagged, train
from shared.lagged import Lagged, shifted
from shared.lowrank import LowRank
from shared.plan import Plan
from shared.reference import Matrices, projections
from tests.families import build, plan_for, prompts
from tests.plans import lowrank_for, matrices_for
from tests.tuning import InDouble

LAGS = (1, 2, 5)


class Case:
    """A tiny model in float64, a plan, M and N."""

    def __init__(self, name: str = "llama", **options: Any) -> None:
        self.model = build(name).double().requires_grad_(False)
        self.plan = plan_for(self.model, **{"rank": 6, **options})
        self.lowrank = lowrank_for(self.plan, self.model)
        self.m = {layer: m.double() for layer, m in matrices_for(self.plan).items()}
        self.n = {layer: n.double() for layer, n in matrices_for(self.plan, seed=1).items()}

    def lagged(self, lag: int, m: Matrices | None = None, n: Matrices | None = None) -> Lagged:
        return Lagged(self.model, self.plan, self.lowrank, lag, m, n)

    @torch.no_grad()
    def logits(self, lag: int, ids: Tensor, m: Any = None, n: Any = None, **options: Any) -> Tensor:
        """Return (rows, tokens, vocabulary); the model is left without hooks."""
        whole = self.lagged(lag, m, n)
        with InDouble():
            found: Tensor = whole(ids, use_cache=False, **options).logits
        whole.remove()
        return found


@torch.no_grad()
def one_by_one(
    model: Any, plan: Plan, lowrank: LowRank, m: Matrices, n: Matrices, lag: int, ids: list[int]
) -> Tensor:
    """Return (tokens, vocabulary), computed as two sides would: a step a token, residuals made before it."""
    groups, rank = plan.groups, plan.r_c2d
    history: list[dict[int, Tensor]] = []  # of each position: the codes that the cloud sent back
    added: dict[int, Tensor] = {}  # layer -> residual codes (groups, r_d2c) that the edge sent up
    seen: dict[int, Tensor] = {}
    handles = []

    def in_groups(codes: Tensor) -> Tensor:
        return codes.view(groups, 1, rank)

    for layer in plan.adapted_layers:
        rows, start = projections(model, layer), 0
        for index, target in enumerate(plan.targets):
            linear, owned = rows[target]
            stop = start + owned.stop - owned.start

            def change(
                _: Any, args: Any, y: Tensor, layer: int = layer, index: int = index,
                cut: slice = slice(start, stop),
            ) -> Tensor:  # fmt: skip
                seen[layer] = args[0][0, 0]
                z = added[layer][index if groups > 1 else 0]  # (r_d2c,)
                return y + plan.scale * (z @ lowrank.b[layer].double()[:, cut])

            handles.append(linear.register_forward_hook(change))
            start = stop
    cache, found = DynamicCache(), []
    first = plan.exchange_layers[0]
    for position, token in enumerate(ids):
        x = model.model.layers[first].input_layernorm(model.model.embed_tokens(torch.tensor([[token]])))[0, 0]
        known = in_groups(x @ lowrank.a[first].double())
        for layer in plan.adapted_layers:
            z = known @ n[layer]  # (groups, 1, r_d2c)
            if position >= lag:
                z = z + in_groups(history[position - lag][layer]) @ m[layer]
            added[layer] = z[:, 0]
        out = model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
        history.append({layer: seen[layer] @ lowrank.a[layer].double() for layer in plan.adapted_layers})
        found.append(out.logits[0, 0])
    for handle in handles:
        handle.remove()
    return torch.stack(found)


PLANS: dict[str, dict[str, Any]] = {
    "every-layer": {},
    "fused": {"layout": "fused", "r_c2d": 9, "r_d2c": 5, "scale": 1.3},
    "some": {"layers": (0, 2)},
}


@pytest.mark.parametrize(("lag", "kind"), [*product(LAGS, ["every-layer"]), (2, "fused"), (1, "some")])
def test_it_is_a_step_a_token_with_all_residuals_known_before(lag: int, kind: str) -> None:
    case = Case(**PLANS[kind])
    (ids,) = prompts(1, shortest=17)
    with InDouble():
        expected = one_by_one(case.model, case.plan, case.lowrank, case.m, case.n, lag, ids)
        base = case.model(torch.tensor([ids])).logits[0]
    found = case.logits(lag, torch.tensor([ids]), case.m, case.n)[0]
    assert (expected - base).abs().max() > 0.5  # M and N matter
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("lag", LAGS)
def test_m_sees_the_position_k_before_and_none_after_it(lag: int) -> None:
    case = Case()
    whole = case.lagged(lag, case.m, case.n)
    tokens = 9
    whole._positions = torch.arange(tokens)[None]
    whole.codes = {
        layer: torch.randn(1, tokens, case.plan.codes_width, dtype=torch.float64, requires_grad=True)
        for layer in case.plan.adapted_layers
    }
    layer, at = 2, 6
    out = whole.residual(layer, "q", slice(0, 48))[0, at]
    own, first = torch.autograd.grad(out.sum(), [whole.codes[layer], whole.codes[0]])
    moved = own[0].abs().sum(-1).nonzero().flatten().tolist()
    assert moved == [at - lag], "of its own layer, no other position"
    assert first[0].abs().sum(-1).nonzero().flatten().tolist() == [at], "of layer 0, the token itself"
    whole.remove()


def test_a_step_of_k_positions_needs_no_code_of_its_own() -> None:
    """With N = 0, the first k positions are those of the base model, bit for bit; the next one is not."""
    case = Case()
    ids = torch.tensor(prompts(1, shortest=12))
    with InDouble(), torch.no_grad():
        base = case.model(ids, use_cache=False).logits
    for lag in LAGS:
        found = case.logits(lag, ids, case.m)
        assert torch.equal(found[:, :lag], base[:, :lag])
        assert not torch.isclose(found[:, lag], base[:, lag]).all()
    assert torch.equal(case.logits(50, ids, case.m), base), "a lag longer than the text"
    assert torch.equal(case.logits(1, ids), base), "zeros change nothing"


@pytest.mark.parametrize("lag", LAGS)
def test_packed_sequences_do_not_know_of_each_other(lag: int) -> None:
    case = Case()
    texts = [ids[:length] for ids, length in zip(prompts(4), (7, 1, 4, 9), strict=True)]
    packed = torch.tensor([[token for ids in texts for token in ids]])
    positions = torch.tensor([[at for ids in texts for at in range(len(ids))]])
    found = case.logits(lag, packed, case.m, case.n, position_ids=positions)[0]
    alone = [case.logits(lag, torch.tensor([ids]), case.m, case.n)[0] for ids in texts]
    torch.testing.assert_close(found, torch.cat(alone), rtol=0, atol=1e-9)


def test_rows_and_what_pads_them_do_not_know_of_each_other() -> None:
    case = Case("qwen2")
    one, two = prompts(2, shortest=8)
    side_by_side = torch.tensor([one + [0] * (len(two) - len(one)), two])
    found = case.logits(2, side_by_side, case.m, case.n)
    for row, ids in zip(found, (one, two), strict=True):
        alone = case.logits(2, torch.tensor([ids]), case.m, case.n)[0]
        torch.testing.assert_close(row[: len(ids)], alone, rtol=0, atol=1e-9)


def test_codes_are_moved_within_each_sequence() -> None:
    codes = torch.arange(1.0, 7.0).view(1, 6, 1)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    assert shifted(codes, positions, 1).flatten().tolist() == [0, 1, 2, 0, 4, 5]
    assert shifted(codes, positions, 2).flatten().tolist() == [0, 0, 1, 0, 0, 4]
    assert shifted(codes, positions, 9).flatten().tolist() == [0] * 6


def test_it_can_be_tuned() -> None:
    examples = [Example((*range(4 + i, 9 + 2 * i), 30 + i % 2), 1) for i in range(12)]
    case = Case()
    tuned = lagged(case.model.float(), case.plan, case.lowrank, 1)
    shape = (case.plan.groups, case.plan.r_c2d, case.plan.r_d2c)
    assert len(tuned.parameters) == 2 * len(case.plan.adapted_layers)
    assert all(p.shape == shape and not p.any() for p in tuned.parameters)
    progress = train(tuned, examples, steps=12, size=4, peak=0.05, seed=1)
    assert progress.losses[-1] < 0.5 * progress.losses[0]
    assert all(p.abs().sum() > 0 for p in tuned.parameters)
    assert tuned.answer_logits(collate(examples)).isfinite().all()


def test_what_cannot_be_is_refused() -> None:
    case = Case()
    with pytest.raises(ValueError, match="1 or more"):
        case.lagged(0)
    with pytest.raises(ValueError, match="the cloud's first among them"):
        other = plan_for(case.model, rank=6, layers=(1, 2))
        Lagged(case.model, other, lowrank_for(other, case.model), 1)
    with pytest.raises(ValueError, match=r"N of layer 0 has shape \(1, 6, 6\)"):
        case.lagged(1, case.m, {layer: n[:1] for layer, n in case.n.items()})
    whole, ids = case.lagged(1, case.m, case.n), torch.tensor(prompts(1))
    with pytest.raises(ValueError, match="use_cache=False"):
        cache = DynamicCache()
        whole(ids[:, :4], past_key_values=cache)
        whole(ids[:, 4:6], past_key_values=cache)
    with pytest.raises(ValueError, match="count from 0"):
        whole(ids, position_ids=torch.arange(3, 3 + ids.shape[1])[None], use_cache=False)
    whole.remove()
