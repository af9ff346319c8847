"""The tuning benchmark's pure parts: intervals, fixed subsets, where the answers are, the halving."""

import json
import math
import time
from itertools import islice, pairwise
from types import SimpleNamespace

import pytest
import torch

from benchmarks.datasets import DataError, Row, boolq_rows, normalised, split
from benchmarks.plan_quality import entries
from benchmarks.quality import evaluate, majority, wilson
from benchmarks.tuning_learner import Example, Local, by_length, collate, learning_rate, schedule, train
from benchmarks.tuning_runs import Found, Record, Run, Spec, best, rungs, survivors, wider
from benchmarks.tuning_table import markdown
from shared.reference import Reference
from tests.families import build, lowrank_for, plan_for


@pytest.mark.parametrize(
    ("share", "count", "low", "high"),
    [(0.5, 100, 0.4038, 0.5962), (0.0, 10, 0.0, 0.2775), (1.0, 10, 0.7225, 1.0), (0.8, 832, 0.7715, 0.8258)],
)
def test_wilson_interval(share, count, low, high):
    assert wilson(share, count) == pytest.approx((low, high), abs=1e-4)


def test_wilson_needs_trials():
    with pytest.raises(ValueError, match="0 trials"):
        wilson(0.5, 0)


# --- subsets --------------------------------------------------------------------------------------

ROWS = [Row(f"text {i}", " yes" if i % 3 else " no") for i in range(50)]


def test_split_is_fixed_disjoint_and_without_test_rows():
    test = [Row("text 7", " no")]  # the same text with another answer
    train_rows, validation = split(ROWS, 10, test)
    assert split([*reversed(ROWS), ROWS[0]], 10, test) == (train_rows, validation)
    assert len(validation) == 10 and len(train_rows) == 39
    assert not {r.prompt for r in train_rows} & {r.prompt for r in validation}
    assert "text 7" not in {r.prompt for r in train_rows + validation}


def test_split_keeps_one_text_on_one_side():
    twins = [Row(f"text {i}", answer) for i in range(20) for answer in (" yes", " no")]
    train_rows, validation = split(twins, 5)
    assert len(train_rows) + len(validation) == 40
    assert not {r.prompt for r in train_rows} & {r.prompt for r in validation}


def test_split_needs_rows():
    with pytest.raises(DataError, match="50 rows"):
        split(ROWS, 50)


def test_boolq_labels_and_length():
    short, long = {"passage": "a b c", "question": "is it"}, {"passage": "a b c d", "question": "is it"}
    rows = boolq_rows([short | {"label": True}, short | {"label": False}, long | {"label": True}], 3)
    assert [row.completion for row in rows] == [" yes", " no"]
    assert rows[0].prompt == "a b c\nQuestion: is it?\nAnswer (yes or no):"
    assert normalised("Is  the U.S. big?") == normalised("is the u s big")


# --- batches --------------------------------------------------------------------------------------


def test_answers_are_predicted_one_position_earlier():
    batch = collate([Example((5, 6, 7, 8), 1), Example((1, 2, 3, 4, 9, 10), 3)], pad=0)
    assert batch.ids.tolist() == [[5, 6, 7, 0, 0], [1, 2, 3, 4, 9]]
    assert batch.rows.tolist() == [0, 1, 1, 1]
    assert batch.positions.tolist() == [2, 2, 3, 4]
    assert batch.targets.tolist() == [8, 4, 9, 10]
    assert batch.tokens == 8


def test_groups_by_length_hold_every_example_within_the_limit():
    examples = [Example(tuple(range(1, n + 1)), 1) for n in (9, 3, 5, 30, 4, 2)]
    groups = list(by_length(examples, 12))
    assert sorted(map(len, (e.ids for g in groups for e in g))) == [2, 3, 4, 5, 9, 30]
    assert all(len(g) == 1 or max(len(e.ids) for e in g) * len(g) <= 12 for g in groups)


def test_schedule_is_seeded_and_sees_each_example_once_an_epoch():
    examples = [Example((i + 1, 2), 1) for i in range(40)]
    epoch = list(islice(schedule(examples, 8, seed=3), 5))
    assert epoch == list(islice(schedule(examples, 8, seed=3), 5))
    assert epoch != list(islice(schedule(examples, 8, seed=4), 5))
    assert sorted(e.ids[0] for group in epoch for e in group) == list(range(1, 41))


def test_learning_rate_rises_then_falls():
    rates = [learning_rate(step, 50, 2.0) for step in range(50)]
    assert max(rates) == rates[4] == 2.0
    assert all(a < b for a, b in pairwise(rates[:5])) and all(a > b for a, b in pairwise(rates[4:]))
    assert rates[-1] > 0 and learning_rate(0, 1, 2.0) == 2.0


# --- learning, on a model of a few KB ---------------------------------------------------------------

EXAMPLES = [Example((*range(4 + i, 9 + 2 * i), 30 + i % 2), 1) for i in range(12)]


def learner() -> Local:
    model = build("llama").float()
    plan = plan_for(model)
    return Local(model, list(Reference(model, plan, lowrank_for(plan, model)).matrices.parameters()))


def test_padding_changes_nothing():
    tuned = learner()
    alone = torch.cat([tuned.answer_logits(collate([e])) for e in EXAMPLES])
    torch.testing.assert_close(tuned.answer_logits(collate(EXAMPLES)), alone, atol=1e-5, rtol=1e-5)


def test_loss_is_on_the_answer_alone():
    tuned = learner()
    batch = collate(EXAMPLES)
    whole = tuned.model(batch.ids).logits[batch.rows, batch.positions]
    expected = torch.nn.functional.cross_entropy(whole, batch.targets)
    assert tuned.loss_and_grads(batch) == pytest.approx(expected.item(), rel=1e-5)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in tuned.parameters)
    assert all(p.grad is None for p in tuned.model.parameters())


def test_interrupted_training_goes_on_as_if_nothing_happened(tmp_path, monkeypatch):
    arguments = {"steps": 8, "size": 4, "peak": 0.05, "seed": 1}
    whole, halves = learner(), learner()
    progress = train(whole, EXAMPLES, **arguments)
    assert progress.losses[-1] < progress.losses[0]

    saved, clock = tmp_path / "state.pt", iter(range(100))
    clocks = SimpleNamespace(monotonic=lambda: next(clock), perf_counter=time.perf_counter)
    monkeypatch.setattr("benchmarks.tuning_learner.time", clocks)  # and nobody else's
    first = train(halves, EXAMPLES, **arguments, deadline=8, saved=saved)
    assert 0 < first.step < 8 and saved.is_file()
    halves = learner()
    monkeypatch.undo()
    second = train(halves, EXAMPLES, **arguments, saved=saved)
    assert second.losses == progress.losses and second.tokens == progress.tokens
    for a, b in zip(whole.parameters, halves.parameters, strict=True):
        assert torch.equal(a, b)


def test_finished_training_is_kept_and_not_done_again(tmp_path):
    arguments = {"steps": 4, "size": 4, "peak": 0.05, "seed": 1, "saved": tmp_path / "state.pt"}
    first, second = learner(), learner()
    losses = train(first, EXAMPLES, **arguments).losses
    assert train(second, EXAMPLES[::-1], **arguments).losses == losses  # other data would give other losses
    for a, b in zip(first.parameters, second.parameters, strict=True):
        assert torch.equal(a, b) and a.abs().sum() > 0


def test_a_loss_that_is_not_finite_stops_the_run():
    tuned = learner()
    with torch.no_grad():
        tuned.parameters[0].fill_(math.nan)
    progress = train(tuned, EXAMPLES, steps=5, size=4, peak=0.1, seed=0)
    assert progress.step == 0 and math.isnan(progress.losses[0])


def test_evaluation_scores_rows_and_labels():
    tuned = learner()
    scores = evaluate(tuned, EXAMPLES, labels=[30, 31])
    logits = torch.cat([tuned.answer_logits(collate([e])) for e in EXAMPLES])
    nats = [-row.log_softmax(0)[e.ids[-1]].item() for row, e in zip(logits, EXAMPLES, strict=True)]
    assert scores.nats == pytest.approx(sum(nats) / 12, rel=1e-5)
    guesses = [30 if row[30] >= row[31] else 31 for row in logits]
    assert scores.correct == sum(g == e.ids[-1] for g, e in zip(guesses, EXAMPLES, strict=True))
    assert evaluate(tuned, EXAMPLES, labels=[]).accuracy is None


def test_majority_knows_the_counts():
    train_rows = [Row("a", " yes")] * 3 + [Row("b", " no")]
    scores = majority(train_rows, [Row("c", " yes"), Row("d", " no")])
    assert scores.correct == 1
    assert scores.nats == pytest.approx(-(math.log(4 / 6) + math.log(2 / 6)) / 2)


# --- halving and the record -------------------------------------------------------------------------


def test_halving_keeps_the_better_half_and_never_a_diverged_run():
    assert survivors({"a": 3.0, "b": 1.0, "c": math.inf, "d": 2.0, "e": math.nan}, 2) == ["b", "d"]
    assert survivors({"a": math.inf, "b": 1.0}, 2) == ["b"]


def test_rungs_halve_the_field_and_double_the_steps():
    assert rungs(36, 24, 4) == [(36, 24), (18, 48), (9, 96), (5, 192), (4, 384)]
    assert rungs(3, 10, 4) == [(3, 10)]


def test_the_grid_grows_while_the_best_is_at_its_edge():
    assert best({1.0: 2.0, 3.0: 1.0, 9.0: 1.5}) == 3.0
    assert wider({1.0: 2.0, 3.0: 1.0, 9.0: 1.5}, 3, 6) is None
    assert wider({1.0: 2.0, 3.0: 1.5, 9.0: 1.0}, 3, 6) == 27.0
    assert wider({1.0: 1.0, 3.0: 1.5, 9.0: 2.0}, 3, 6) == 0.33
    assert wider({1.0: 1.0, 3.0: 1.5, 9.0: 2.0}, 3, 3) is None
    assert wider({1.0: math.inf, 3.0: math.inf}, 3, 6) is None


def run(score: float | None, **fields) -> Run:
    given = {
        "stage": "compare", "model": "m", "task": "boolq", "method": "lora", "words": 60, "test_words": 60,
        "test_rows": 9, "validation_rows": 9, "lr": 1e-3, "steps": 4, "batch": 2, "rank": 16, "alpha": 32,
    }  # fmt: skip
    scores = Found(rows=100, nats=score, nats_error=0.1, perplexity=2.0, correct=70)
    return Run(
        spec=Spec(**given | fields), validation=scores, test=scores, first_loss=2.0, last_loss=1.0,
        diverged=score is None, trained=5000, wire=None, tokens=100, seconds=2.0, eval_seconds=1.0,
        torch="2", device="cpu", threads=2, date="2024-01-01T00:00:00Z",
    )  # fmt: skip


def test_the_record_is_read_back_and_names_a_bad_line(tmp_path):
    path = tmp_path / "runs.jsonl"
    added = [Record(path).add(run(0.5, seed=seed)) for seed in range(2)]
    assert list(Record(path)) == added and added[0].spec in Record(path).runs
    path.write_text(path.read_text() + '{"spec": 1}\n')
    with pytest.raises(ValueError, match=r"runs\.jsonl:3"):
        Record(path)


def test_lines_from_before_a_field_mean_its_default(tmp_path):
    path = tmp_path / "runs.jsonl"
    line = json.loads(run(0.5).model_dump_json())
    del line["spec"]["transport"], line["spec"]["precision"], line["spec"]["lag"]
    path.write_text(json.dumps(line) + "\n")
    (old,) = Record(path).runs
    assert old == run(0.5).spec and (old.transport, old.precision, old.lag) == ("reference", "float32", 0)


def test_the_table_takes_the_rate_from_runs_that_never_saw_the_test_set(tmp_path):
    record = Record(tmp_path / "runs.jsonl")
    for lr, score in ((1e-3, 0.7), (3e-3, 0.5), (9e-3, 0.9)):
        record.add(run(score, lr=lr, test_rows=0).model_copy(update={"test": None}))
    assert markdown(record) == "no runs yet"
    record.add(run(0.4, lr=3e-3))
    record.add(run(0.4, lr=3e-3, transport="wire"))
    text = markdown(record)
    assert (
        text.count("| 4 x 2 | 0.003 of 3 | 1 | 0.4000 |") == 2
        and "over the wire" not in text.split("| LoRA")[0]
    )


def test_the_table_shows_the_rate_that_validation_chose(tmp_path):
    record = Record(tmp_path / "runs.jsonl")
    assert markdown(record) == "no runs yet"
    for fields in ({"lr": 1e-3, "score": 0.7}, {"lr": 3e-3, "score": 0.5}, {"lr": 9e-3, "score": None}):
        record.add(run(fields.pop("score"), **fields))
    record.add(run(0.6, lr=3e-3, seed=1))
    record.add(run(0.6, method="majority", lr=0, steps=0, batch=0, rank=0, alpha=0))
    text = markdown(record)
    assert "| 4 x 2 | 0.003 of 3 | 2 | 0.5500 ± 0.0707 |" in text
    assert "70.0 [60.4, 78.1]" in text and "does not beat the majority" in text


def test_lagged_runs_are_named_so_and_say_nothing_of_a_plan_on_offer(tmp_path):
    record = Record(tmp_path / "runs.jsonl")
    late = record.add(run(0.5, method="privatelora", layout="lagged", lag=2, initialiser="orthonormal"))
    assert "PrivateLoRA lagged(2) orthonormal" in markdown(record) and "lagged(2)" in str(late.spec)
    assert not entries(record)
    record.add(run(0.5, method="privatelora", layout="one_trip", initialiser="orthonormal"))
    assert [entry["layout"] for entry in entries(record)] == ["one_trip"]
