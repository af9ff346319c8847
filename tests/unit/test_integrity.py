"""Another A or B: how much it differs, that nothing else does, and that it does harm to a tuned model."""

import dataclasses
import math

import pytest
import torch

from benchmarks.integrity import AMOUNTS, changes
from benchmarks.integrity_bench import Subject
from benchmarks.integrity_record import Finding, Record, Tuned, markdown, plot, rows
from benchmarks.perturbation import Change, changed, widths
from benchmarks.tuning_learner import Example, collate, private_lora, train
from benchmarks.tuning_runs import Found
from shared.families import geometry
from shared.lowrank import LowRank
from tests.families import build, lowrank_for, plan_for

KINDS = [
    {"initialiser": "gaussian"},
    {"initialiser": "orthonormal"},
    {"initialiser": "orthonormal", "layout": "fused"},
    {"initialiser": "svd"},
    {"initialiser": "svd", "layout": "fused", "r_c2d": 6, "r_d2c": 10},
]
IDS = ["-".join(str(value) for value in kind.values()) for kind in KINDS]


@pytest.fixture(scope="module", params=KINDS, ids=IDS)
def split(request):
    """Plan, sizes, A and B of a model whose q is wider than its k."""
    model = build("llama")
    plan = plan_for(model, **request.param)
    return plan, geometry(model.config), lowrank_for(plan, model)


def tensors(lowrank: LowRank) -> dict[tuple[str, int], torch.Tensor]:
    return {("A", layer): a for layer, a in lowrank.a.items()} | {
        ("B", layer): b for layer, b in lowrank.b.items()
    }


def blocks(split_, lowrank: LowRank, part: str) -> list[torch.Tensor]:
    plan, sizes, _ = split_
    own = lowrank.a if part == "A" else lowrank.b
    return [b.double() for t in own.values() for b in torch.split(t, widths(plan, sizes)[part], dim=1)]


def rms(block: torch.Tensor) -> float:
    return float(block.square().mean().sqrt())


# --- the change itself ------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["A", "B"])
@pytest.mark.parametrize("amount", [0.01, 1.0, 3.0])
def test_noise_has_the_size_asked_for_in_every_block(split, part, amount):
    plan, sizes, original = split
    other = changed(original, plan, sizes, Change(part, amount))
    pairs = list(zip(blocks(split, original, part), blocks(split, other, part), strict=True))
    assert len(pairs) == 4 * plan.groups
    ratios = [rms(new - old) / rms(old) for old, new in pairs]
    # The smallest block has 128 entries: its sample of the noise is right to 1 / sqrt(2 * 128) = 6 %.
    assert all(ratio == pytest.approx(amount, rel=0.25) for ratio in ratios)
    assert sum(ratios) / len(ratios) == pytest.approx(amount, rel=0.1)


@pytest.mark.parametrize("change", [Change("A", 0.5), Change("B", 0.5), Change("A", None), Change("B", None)])
def test_one_part_changes_and_the_original_does_not(split, change):
    plan, sizes, original = split
    before = {place: tensor.clone() for place, tensor in tensors(original).items()}
    other = tensors(changed(original, plan, sizes, change))
    assert all(torch.equal(tensor, before[place]) for place, tensor in tensors(original).items())
    for (part, layer), tensor in other.items():
        assert tensor.shape == before[part, layer].shape and tensor.dtype == torch.float32
        assert torch.equal(tensor, before[part, layer]) == (part != change.part)


@pytest.mark.parametrize("amount", [0.3, None])
def test_equal_changes_give_equal_bits_and_other_draws_other_ones(split, amount):
    plan, sizes, original = split
    one, again, other = (
        tensors(changed(original, plan, sizes, Change("B", amount, draw))) for draw in (0, 0, 1)
    )
    assert all(torch.equal(one[place], again[place]) for place in one)
    assert not any(torch.equal(one[place], other[place]) for place in one if place[0] == "B")
    layers = [one["B", layer] for layer in plan.adapted_layers]
    old = [original.b[layer] for layer in plan.adapted_layers]
    noises = torch.stack([new - before for new, before in zip(layers, old, strict=True)]).flatten(1)
    assert torch.corrcoef(noises).fill_diagonal_(0).abs().max() < 0.9  # each layer has its own


def test_growing_amounts_walk_along_one_line(split):
    plan, sizes, original = split
    small, large = (tensors(changed(original, plan, sizes, Change("A", x))) for x in (0.1, 0.4))
    for place, old in tensors(original).items():
        torch.testing.assert_close(large[place] - old, 4 * (small[place] - old), atol=1e-6, rtol=1e-4)


def test_no_noise_is_no_change(split):
    plan, sizes, original = split
    same = tensors(changed(original, plan, sizes, Change("A", 0.0)))
    assert all(torch.equal(same[place], tensor) for place, tensor in tensors(original).items())


@pytest.mark.parametrize("part", ["A", "B"])
def test_a_redrawn_matrix_is_of_the_same_kind_and_has_nothing_of_the_old_one(split, part):
    plan, sizes, original = split
    other = changed(original, plan, sizes, Change(part, None))
    olds, news = blocks(split, original, part), blocks(split, other, part)
    together = [torch.cat([m.flatten() / rms(m) for m in part_]) for part_ in (olds, news)]
    assert abs(float(torch.corrcoef(torch.stack(together))[0, 1])) < 0.1
    for old, new in zip(olds, news, strict=True):
        assert rms(new) == pytest.approx(rms(old), rel=0.25)
        if plan.initialiser == "orthonormal":
            gram = new.T @ new if part == "A" else new @ new.T
            torch.testing.assert_close(gram, torch.eye(len(gram), dtype=torch.float64), atol=1e-5, rtol=0)


@pytest.mark.parametrize("amount", [-0.1, math.nan, math.inf])
def test_an_amount_that_makes_no_sense_is_refused(split, amount):
    plan, sizes, original = split
    with pytest.raises(ValueError, match="amount of noise"):
        changed(original, plan, sizes, Change("A", amount))


# --- a tuned model of a few KB ----------------------------------------------------------------------

LABELS = (30, 31)
EXAMPLES = [Example((*range(4 + i, 9 + 2 * i), LABELS[i % 2]), 1) for i in range(12)]


@pytest.fixture(scope="module")
def subject() -> Subject:
    """Return a model that has learnt `EXAMPLES` by heart."""
    model = build("llama")
    plan = plan_for(model)
    factors = lowrank_for(plan, model)
    learner = private_lora(model, plan, factors)
    train(learner, EXAMPLES, steps=60, size=12, peak=0.05, seed=0)
    matrices = dict(zip(plan.adapted_layers, learner.parameters, strict=True))
    return Subject(build("llama"), geometry(model.config), plan, factors, matrices)


def test_a_tuned_model_needs_the_a_and_b_it_was_tuned_with(subject):
    def nats(change, **options):
        return subject.scores(EXAMPLES, LABELS, change, **options).nats

    untuned, tuned = nats(None, uses_m=False), nats(None)
    assert tuned < 0.1 * untuned
    for part in ("A", "B"):
        assert nats(Change(part, 0.0)) == tuned
        assert tuned < 2 * nats(Change(part, 0.01)) < nats(Change(part, 0.3)) < nats(Change(part, 3.0))
        assert nats(Change(part, None)) > 10 * tuned
        # Without M there is no residual, so A and B are nothing.
        assert nats(Change(part, 3.0), uses_m=False) == untuned


def test_scoring_leaves_the_model_as_it_was(subject):
    batch = collate(EXAMPLES)
    plain = subject.model.model(batch.ids).last_hidden_state
    subject.scores(EXAMPLES, LABELS, Change("B", None))
    assert torch.equal(subject.model.model(batch.ids).last_hidden_state, plain)


# --- the record -------------------------------------------------------------------------------------

TUNED = Tuned("tiny", "toy", 60, 8, "orthonormal", "per_projection", 0.01, 40, 16, 0)


def finding(change: Change | None, nats: float, *, uses_m: bool = True, adapter: str = "ab") -> Finding:
    scores = Found(
        rows=100, nats=nats, nats_error=0.05, perplexity=math.exp(nats), correct=int(90 - 10 * nats)
    )
    return Finding(
        tuned=TUNED, adapter=adapter, uses_m=uses_m, change=change, found=scores, seconds=1.0, torch="2",
        device="cpu", threads=1, date="2026-01-01T00:00:00Z",
    )  # fmt: skip


def full_record(path) -> Record:
    record = Record(path)
    for adapter in ("older", "newer"):
        record.add(finding(None, 2.0, uses_m=False, adapter=adapter))
        record.add(finding(None, 0.5, adapter=adapter))
        for change in changes(2):
            nats = 4.0 if change.amount is None else 0.5 + change.amount + 0.2 * change.draw
            record.add(finding(change, nats, adapter=adapter))
    return record


def test_a_record_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "runs.jsonl"
    written = full_record(path)
    again = Record(path)
    assert again.findings == written.findings
    assert len(again.findings) == 2 * (2 + 2 * 2 * len(AMOUNTS))
    assert ("newer", 100, True, Change("B", 0.3, 1)) in again.findings
    with pytest.raises(ValueError, match="make integrity"):
        Record(tmp_path / "none").latest()


def test_the_table_is_of_the_latest_adapter_and_takes_draws_together(tmp_path):
    latest = full_record(tmp_path / "runs.jsonl").latest()
    assert {f.adapter for f in latest} == {"newer"}
    table = rows(latest)
    assert [row.name for row in table[:3]] == ["untuned, M = 0", "as tuned", "A + 0.01 noise"]
    assert [row.name for row in table].index("A re-drawn") == 1 + len(AMOUNTS)
    row = table[2]
    assert (
        row.draws == 2 and row.nats == pytest.approx(0.61) and row.nats_range == pytest.approx((0.51, 0.71))
    )
    assert row.nats_half == pytest.approx(1.96 * 0.05, rel=1e-3)
    assert "| A + 0.01 noise | 0.610 ± 0.098 | 0.510 to 0.710 (2) | 83.0 [" in markdown(latest)


def test_a_score_that_is_not_finite_is_not_passed_over():
    bad = finding(None, 1.0)
    bad = bad.model_copy(update={"found": bad.found.model_copy(update={"nats": None})})
    with pytest.raises(ValueError, match="as tuned"):
        rows([bad])


def test_the_plot_is_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "new" / "integrity.png"
    plot(full_record(tmp_path / "runs.jsonl").latest(), path)
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") and 5_000 < path.stat().st_size < 150_000


def test_changes_cover_both_parts_and_every_draw():
    todo = list(changes(3))
    assert len(todo) == len(set(todo)) == 3 * 2 * len(AMOUNTS)
    assert [change.draw for change in todo] == sorted(change.draw for change in todo)
    assert dataclasses.replace(todo[0], draw=2) in todo
