"""What layers and plans are worth: against a planted truth, autograd and the plain model."""

import itertools
import json
import math
import statistics
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from cloud_server.config.plans import plan_config
from cloud_server.server import plan_of
from edge_client import cli
from edge_client.rank_report import advice, plan_rows
from edge_client.ranking import (
    Estimate,
    LayerWorth,
    PlanWorth,
    Ranking,
    RowLosses,
    border,
    choose_layers,
    gradient_norms,
    held_out,
    rank_layers,
    tune_briefly,
)
from edge_client.tuning.config import TuneConfig
from edge_client.tuning.examples import IGNORED, Example
from edge_client.tuning.learner import Learner, TuningError, embedding
from edge_client.tuning.loss import Head
from edge_client.tuning.rows import DataError
from edge_client.tuning.stream import TuneLimits
from shared.models import resolve
from shared.plan import Plan
from shared.reference import Reference, merged
from shared.wire_dtypes import WireDtypes
from tests.families import VOCAB, build, save
from tests.plans import lowrank_for, matrices_for, plan_for
from tests.tuning import InDouble
from tests.unit.tuning_fake import Cloud, FakeStream, direct_loss, examples

# Of M by layer, in the model that wrote the rows. Far apart: early layers move more with the same M.
STRENGTHS = {0: 0.05, 1: 0.0, 2: 0.7, 3: 0.4}


class Planted:
    """Four tiny layers, and rows written by the model with an M that is known."""

    def __init__(self) -> None:
        self.model = build("llama").double().requires_grad_(False)
        self.plan = plan_for(self.model, rank=8)
        self.lowrank = lowrank_for(self.plan, self.model)
        drawn = matrices_for(self.plan, std=1.0)
        self.matrices = {layer: STRENGTHS[layer] * m.double() for layer, m in drawn.items()}
        self.reference = Reference(self.model, self.plan, self.lowrank, self.matrices)

    def learner(self) -> Learner:
        head = Head(self.model.model.norm, self.model.lm_head, None)
        embed = embedding(self.model.model.embed_tokens, torch.device("cpu"))
        return Learner(head, embed, lambda: FakeStream(self.reference))

    def plain_loss(self, rows: list[Example], left_out: int | None) -> float:
        """Return the mean loss of the model with M merged into its weights, but for one layer's."""
        kept = {layer: m * (layer != left_out) for layer, m in self.matrices.items()}
        plain = merged(build("llama").double(), self.plan, self.lowrank, kept)
        return float(direct_loss(plain, rows).detach())

    @torch.no_grad()
    def rows(self, count: int, written: int) -> list[Example]:
        """Return rows that begin at random and go on as the model with its M would, sampled."""
        generator = torch.Generator().manual_seed(5)
        ids = torch.randint(4, VOCAB, (count, 4), generator=generator)
        for _ in range(written):
            likely = self.reference(ids, use_cache=False).logits[:, -1].softmax(-1)
            ids = torch.cat([ids, torch.multinomial(likely, 1, generator=generator)], dim=1)
        labels = ids.clone()
        labels[:, :4] = IGNORED
        return [Example(*pair, line) for line, pair in enumerate(zip(ids, labels, strict=True), 1)]


def test_layers_are_ranked_by_what_was_planted_in_them() -> None:
    planted = Planted()
    rows = planted.rows(count=40, written=12)
    passes = itertools.count()
    ranking = rank_layers(planted.learner(), planted.plan, rows, planted.matrices, lambda: next(passes))
    assert next(passes) == 1 + len(STRENGTHS)
    assert [one.layer for one in ranking.layers] == sorted(STRENGTHS, key=STRENGTHS.get, reverse=True)
    *_, last = ranking.layers
    assert last.layer == 1 and last.worth == Estimate(0.0, 0.0) and not last.worth.is_beyond_chance
    assert ranking.layers[0].worth.is_beyond_chance
    whole = planted.plain_loss(rows, left_out=None)
    for one in ranking.layers:
        lost = planted.plain_loss(rows, left_out=one.layer) - whole
        assert one.worth.nats == pytest.approx(lost, abs=1e-6)  # float32 roundings inside the model


def test_the_second_column_is_the_gradient_at_zero() -> None:
    cloud = Cloud("llama")
    batch = examples(5)
    used = {layer: m.double() for layer, m in matrices_for(cloud.plan).items()}
    with InDouble():
        found = gradient_norms(cloud.learner(), cloud.plan, batch, used)
        plain = Reference(cloud.model, cloud.plan, cloud.lowrank, cloud.zeros())
        cloud.reference.remove()
        direct_loss(plain, batch).backward()
    wanted = {int(layer): float(m.grad.norm()) for layer, m in plain.matrices.items()}
    assert found == pytest.approx(wanted, rel=1e-9) and min(wanted.values()) > 1e-4


# --- figures and their errors -------------------------------------------------------------------------


def losses(nats: list[float], targets: list[float]) -> RowLosses:
    return RowLosses(torch.tensor(nats).double(), torch.tensor(targets).double())


def test_rows_of_one_length_have_the_usual_standard_error() -> None:
    nats = [3.0, 7.0, 4.0, 9.0]
    found = losses(nats, [2.0] * 4).mean()
    assert found.nats == pytest.approx(statistics.mean(nats) / 2)
    assert found.error == pytest.approx(statistics.stdev(nats) / 2 / math.sqrt(4))


def test_the_error_is_that_of_rows_drawn_again() -> None:
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(1, 30, (200,), generator=generator).double()
    nats = targets * 0.8 + torch.randn(200, generator=generator).double() * targets.sqrt()
    found = RowLosses(nats, targets).mean()
    drawn = torch.randint(200, (4000, 200), generator=generator)
    again = nats[drawn].sum(1) / targets[drawn].sum(1)
    assert found.error == pytest.approx(float(again.std()), rel=0.1)


def test_rows_are_compared_with_themselves() -> None:
    one, other = losses([10.0, 1.0, 5.0], [1, 1, 1]), losses([9.0, 0.0, 4.0], [1, 1, 1])
    assert one.above(other) == Estimate(1.0, 0.0) and one.above(other).is_beyond_chance
    assert one.mean().error > 2
    assert losses([1.0], [2.0]).mean() == Estimate(0.5, None)
    assert not losses([1.0], [2.0]).mean().is_beyond_chance


def test_examples_of_one_line_are_one_row() -> None:
    cloud = Cloud("llama")
    batch = examples(4)
    twice = [Example(e.ids, e.labels, line) for e, line in zip(batch, (7, 3, 7, 3), strict=True)]
    apart = RowLosses.measure(cloud.learner(), batch, cloud.zeros())
    found = RowLosses.measure(cloud.learner(), twice, cloud.zeros())
    assert found.nats.tolist() == pytest.approx([float(apart.nats[at].sum()) for at in ([1, 3], [0, 2])])
    assert float(found.targets.sum()) == sum(e.targets for e in batch)
    assert found.mean().nats == pytest.approx(cloud.learner().loss(batch, cloud.zeros()), rel=1e-12)


def test_weights_that_say_nothing_are_told_of() -> None:
    cloud = Cloud("llama")
    broken = {layer: torch.full_like(m, math.nan) for layer, m in cloud.zeros().items()}
    with pytest.raises(TuningError, match="not finite"):
        RowLosses.measure(cloud.learner(), examples(2), broken)


def test_rows_to_judge_by_are_some_of_those_that_tune_holds_out() -> None:
    batch = examples(40)
    train, few = held_out(batch, 0.5, 6, seed=1)
    same, all_of_them = held_out(batch, 0.5, 100, seed=1)
    assert len(few) == 6 and len(all_of_them) == 20
    assert {e.line for e in few} < {e.line for e in all_of_them}
    assert [e.line for e in train] == [e.line for e in same]
    assert held_out(batch, 0.5, 6, seed=2)[1] != few


# --- what to choose -----------------------------------------------------------------------------------


def ranking(worths: dict[int, float], errors: float = 0.01) -> Ranking:
    """Return a ranking as it would be measured on two rows."""
    whole = losses([10.0, 12.0], [1, 1])
    found = []
    for layer, worth in worths.items():
        spread = errors * (1 + layer)
        without = RowLosses(whole.nats + torch.tensor([worth - spread, worth + spread]), whole.targets)
        found.append(LayerWorth(layer, without.above(whole), 1.0, without))
    return Ranking(whole, tuple(sorted(found, key=lambda one: -one.worth.nats)))


@pytest.mark.parametrize(
    ("worths", "trips", "chosen"),
    [
        ({0: 0.5, 1: 0.4, 2: 0.9, 3: 0.7}, 3, (0, 2, 3)),  # layer 0 costs nothing
        ({0: -0.1, 1: 0.4, 2: 0.9, 3: 0.7}, 3, (2, 3)),
        ({0: 0.5, 1: 0.4, 2: -0.9, 3: 0.0}, 4, (0, 1)),
        ({0: 0.5, 1: 0.4}, 1, (0,)),
        ({1: 0.5, 2: 0.4}, 1, ()),
        ({0: -0.5, 1: -0.4}, 4, ()),
    ],
)
def test_the_layers_chosen_help_and_fit_the_round_trips(worths, trips, chosen) -> None:
    assert choose_layers(ranking(worths), trips) == chosen
    if chosen:
        plan = Plan.subset(chosen, name="x", backbone="b", num_layers=5, hidden_size=8, rank=2)
        assert plan.round_trips <= trips


def test_the_line_between_chosen_and_left_out_has_an_error_too() -> None:
    found = border(ranking({0: 0.1, 1: 0.4, 2: 0.9, 3: 0.7}), (0, 2, 3))
    assert (found.last_in, found.first_out) == (3, 1)
    assert found.difference.nats == pytest.approx(0.3) and found.difference.is_beyond_chance
    close = border(ranking({1: 0.4, 2: 0.9, 3: 0.41}, errors=0.5), (2, 3))
    assert not close.difference.is_beyond_chance
    assert border(ranking({0: 0.1, 1: 0.4}), (0, 1)) is None


@pytest.mark.parametrize("options", [{}, {"layout": "fused", "r_c2d": 5, "r_d2c": 7, "initialiser": "svd"}])
def test_what_is_suggested_is_what_a_cloud_would_serve(tmp_path: Path, options) -> None:
    model = save("llama", tmp_path / "model")
    ranked = plan_for(build("llama"), **options)
    taken = [ranked.model_copy(update={"name": name}) for name in ("best-3-r8", "best-3-r5")]
    found = advice(
        ranking({0: 0.5, 1: 0.4, 2: 0.9, 3: 0.7}), ranked, taken, 3, WireDtypes.named("bfloat16"),
        Path("my letters.jsonl"),
    )  # fmt: skip
    served = plan_of(plan_config(json.dumps(found["serve_plan"])), resolve(str(model), progress=False))
    assert served.adapted_layers == served.exchange_layers == (0, 2, 3) and served.schedule == "subset"
    for name in ("r_c2d", "r_d2c", "layout", "initialiser", "scale", "targets"):
        assert getattr(served, name) == getattr(ranked, name)
    assert served.name.endswith("-2"), "the other name was taken"
    assert found["round_trips_per_token"] == served.round_trips == 3
    assert f"'{json.dumps(found['serve_plan'])}'" in found["serve"]
    assert found["tune"].endswith(f"--data 'my letters.jsonl' --plan {served.name}")
    assert advice(ranking({1: -1.0}), ranked, [], 3, WireDtypes.named("float32"), Path("x")) is None


def test_a_plan_that_is_offered_already_is_not_to_be_served_again() -> None:
    ranked = plan_for(build("llama"))
    found = advice(
        ranking({0: 0.5, 1: 0.4, 2: 0.9, 3: 0.7}), ranked, [ranked], 4, WireDtypes.named("float32"), Path("x")
    )
    assert found["layers"] == [0, 1, 2, 3] and found["serve"] is None and found["border"] is None
    assert found["tune"].endswith("--plan test")


# --- plans --------------------------------------------------------------------------------------------


def test_a_short_run_is_the_same_run_every_time_and_gains() -> None:
    train, held = examples(24), examples(8, seed=1)
    config = TuneConfig(steps=12, batch_size=4, lr=0.02)
    found = []
    for _ in range(2):
        cloud = Cloud("llama")
        weights, lr = tune_briefly(cloud.learner(), cloud.plan, config, train, torch.float64)
        found.append(weights)
        before = RowLosses.measure(cloud.learner(), held, cloud.zeros())
        gain = before.above(RowLosses.measure(cloud.learner(), held, weights))
    assert lr == 0.02 and gain.nats > 0.05
    assert all(torch.equal(found[0][layer], found[1][layer]) for layer in found[0])


def test_examples_that_another_plan_does_not_take_are_told_of() -> None:
    cloud = Cloud("llama")
    cloud.limits = TuneLimits(max_batch_tokens=9, max_sequence_tokens=9)
    with pytest.raises(DataError, match="9 tokens at a time under plan 'test', an example has"):
        tune_briefly(cloud.learner(), cloud.plan, TuneConfig(steps=1), examples(8), torch.float64)


def test_plans_come_with_their_cost_the_lowest_loss_first() -> None:
    model = build("llama")
    few, all_layers = plan_for(model, layers=(1,), name="few"), plan_for(model, name="all")
    figures = Estimate(0.5, 0.1), Estimate(0.2, 0.1)
    found = plan_rows(
        [PlanWorth(few, Estimate(0.7, 0.1), Estimate(0.0, 0.1), 1e-3), PlanWorth(all_layers, *figures, 1e-3)],
        WireDtypes.named("float32"),
    )
    assert [row["plan"] for row in found] == ["all", "few"]
    assert [row["round_trips_per_token"] for row in found] == [4, 2]
    assert found[0]["bytes_up_per_token"] > found[1]["bytes_up_per_token"]


# --- the command --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        ((), 2, "no data: give --data FILE"),
        (("--data", "/nowhere.jsonl"), 1, "no data file at /nowhere.jsonl"),
        (("--data", "/x.jsonl", "--validation", "0"), 2, "rows have to be held out"),
        (("--data", "/x.jsonl", "--steps", "0"), 2, "tune.steps"),
        (("--data", "/x.jsonl", "--adapter", "mine"), 1, "no adapter 'mine'"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(args, code, words, tmp_path, monkeypatch) -> None:
    for kind in ("CONFIG", "DATA"):
        monkeypatch.setenv(f"PRIVATELORA_{kind}_DIR", str(tmp_path))
    result = CliRunner().invoke(cli.app, ["rank", *args])
    assert result.exit_code == code and words in result.stderr and result.stderr.count("\n") == 1
