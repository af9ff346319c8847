"""What is computed from the record of answers over links, against figures worked out by hand."""

import pytest

from benchmarks import decode_record
from benchmarks.decode_over_link import row_of
from benchmarks.decode_record import Answered, Length
from benchmarks.edge_options import link_named
from benchmarks.link import PRESETS, LinkError
from benchmarks.processes import ProcessError

FACTS = {
    "label": "default", "preset": "wan", "rtt_ms": 80.0, "plan": "one-trip", "layers": 30, "drafted": True,
    "prompt": 0, "kind": "code", "dtype": "bfloat16", "wire": "bfloat16", "threads": None, "limit": 128,
    "tokens": 12, "steps": 8, "positions": 20, "seconds": 1.0, "loopback_s": 0.36, "round_trips": 8,
    "bytes_up": 9000, "bytes_down": 2520, "lengths": (), "first_s": 0.3, "steal": 0.01,
    "loopback_steal": 0.0, "date": "2026-11-22T00:00:00Z",
}  # fmt: skip


def row(**changes):
    return Answered.model_validate(FACTS | changes)


def test_the_bound_is_round_trips_and_the_same_steps_on_loopback():
    one = decode_record.summary([row()])
    # 8 x 80 ms and 0.36 s are 1.0 s: the answer took exactly what it has to.
    assert one.bound_tok_s == pytest.approx(12.0) and one.against_bound == pytest.approx(1.0)
    # The issue's own form: tokens per step / (RTT + the step's mean time on loopback).
    assert one.bound_tok_s == pytest.approx(one.tokens_per_step / (0.080 + one.loopback_step_ms / 1e3))
    assert decode_record.summary([row(seconds=1.25)]).against_bound == pytest.approx(0.8)
    # A plan with more round trips a step is held against what it has to wait.
    assert decode_record.summary([row(round_trips=24)]).bound_tok_s == pytest.approx(
        12 / (1.92 + 0.36), abs=1e-3
    )


def test_answers_together_weigh_by_their_tokens():
    slow = row(prompt=1, tokens=4, steps=4, positions=4, seconds=3.0, round_trips=4, loopback_s=0.68)
    one = decode_record.summary([row(), slow])
    assert (one.answers, one.tokens, one.tok_s) == (2, 16, 4.0)
    assert one.tokens_per_step == pytest.approx(16 / 12, abs=1e-3)
    assert one.bound_tok_s == pytest.approx(16 / (1.0 + 1.0))
    assert one.bytes_up_per_token == 1125.0 and one.bytes_down_per_token == 315.0


def test_bytes_are_compared_with_the_papers():
    # fp16, r = 128, three projections, codes and residual codes: 1,536 bytes a layer and token.
    assert decode_record.summary([row()]).of_papers_bytes == pytest.approx(960 / (30 * 1536), abs=1e-4)


def test_only_answers_whose_steps_were_taken_again_are_held_against_a_bound():
    later = row(round=1, seconds=9.0, loopback_s=None)
    one = decode_record.summary([later])
    assert one.bound_tok_s is None and one.against_bound is None and one.loopback_step_ms is None
    one = decode_record.summary([row(), later])
    assert (one.answers, one.tok_s) == (2, 2.4) and one.against_bound == pytest.approx(1.0)


def test_a_disturbed_answer_or_replay_does_not_count_for_the_bound():
    disturbed = [row(prompt=1, seconds=9.0, steal=0.2), row(prompt=2, loopback_s=9.0, loopback_steal=0.2)]
    one = decode_record.summary([row(), *disturbed])
    assert (one.answers, one.quiet, one.most_steal) == (3, 1, 0.2)
    assert one.against_bound == pytest.approx(1.0) and one.bound_tok_s == pytest.approx(12.0)
    assert one.tok_s == pytest.approx(36 / 11, abs=1e-3)  # what was seen is shown as it was
    assert decode_record.summary(disturbed).against_bound is None


def test_answers_of_one_token_say_nothing():
    short = row(prompt=1, tokens=0, steps=0, positions=0, seconds=0.0, loopback_s=0.0, round_trips=0)
    assert decode_record.summary([short]) is None
    assert decode_record.summary([row(), short]) == decode_record.summary([row()])
    assert decode_record.slowdowns([short, row(prompt=1, drafted=False)]) == []


def length(positions, steps, median_s):
    return Length(positions=positions, steps=steps, median_s=median_s)


def test_a_slowdown_is_per_token_and_at_median_times_leaves_out_what_one_answer_suffered():
    plain = row(drafted=False, tokens=10, steps=10, seconds=1.0, lengths=(length(1, 10, 0.1),))
    # Half of the steps take 0.2 s for two tokens each: nothing is gained, and a stall of 1 s on top.
    drafted = row(tokens=15, steps=10, seconds=2.5, lengths=(length(1, 5, 0.1), length(3, 5, 0.2)))
    (one,) = decode_record.slowdowns([plain, drafted])
    assert one.measured == pytest.approx(2.5 / 15 / 0.1 - 1, abs=1e-4)
    assert one.at_medians == pytest.approx(1.5 / 1.5 - 1, abs=1e-4)
    assert decode_record.slowdowns([drafted]) == []


def test_a_slowdown_is_the_median_of_rounds_that_were_answered_both_ways():
    rows = [
        row(drafted=False, round=n, tokens=10, seconds=1.0, lengths=(length(1, 10, 0.1),)) for n in range(4)
    ]
    rows += [
        row(round=n, tokens=10, seconds=s, lengths=(length(1, 10, 0.1),))
        for n, s in enumerate((5.0, 0.9, 1.1))
    ]
    (one,) = decode_record.slowdowns(rows)
    assert (one.measured, one.rounds) == (pytest.approx(0.1), 3)


def test_the_typical_time_of_a_step_weighs_steps():
    rows = [row(lengths=(length(1, 9, 0.1), length(2, 1, 0.5))), row(lengths=(length(1, 2, 9.0),))]
    assert decode_record.median_times(rows) == {1: 0.1, 2: 0.5}


def test_steps_are_told_apart_by_their_length():
    found = decode_record.lengths([(1, 0.1), (5, 0.4), (1, 0.3), (1, 0.2)])
    assert found == (length(1, 3, 0.2), length(5, 1, 0.4))


def answer(*steps, tokens=(7, 8, 9, 10)):
    spent = {"round_trips": len(steps), "bytes_up": 1, "bytes_down": 2, "first_s": 0.1, "steal": 0.0}
    return {"tokens": list(tokens), "steps": [list(step) for step in steps], **spent}


def test_a_line_is_made_of_an_answer_and_its_steps_taken_again():
    facts = {name: FACTS[name] for name in list(FACTS)[:12]}
    found = row_of(answer((1, 1, 0.2), (4, 2, 0.3)), answer((1, 1, 0.1), (4, 2, 0.15)), **facts)
    assert (found.tokens, found.steps, found.positions, found.round_trips) == (3, 2, 5, 2)
    assert (found.seconds, found.loopback_s) == (pytest.approx(0.5), pytest.approx(0.25))
    assert row_of(answer((1, 1, 0.2)), None, **facts).loopback_s is None
    for other in (answer((1, 1, 0.1), (3, 2, 0.1)), answer((1, 1, 0.1), (4, 2, 0.1), tokens=(7, 8, 9, 11))):
        with pytest.raises(ProcessError, match="taken again"):
            row_of(answer((1, 1, 0.2), (4, 2, 0.3)), other, **facts)


def test_a_record_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "runs.jsonl"
    rows = [row(lengths=(length(1, 9, 0.1),)), row(prompt=1, loopback_s=None)]
    for one in rows:
        decode_record.append(path, one)
    assert decode_record.read(path, Answered) == rows
    assert decode_record.read(tmp_path / "none.jsonl", Answered) == []
    with path.open("a") as file:
        file.write('{"label": "half a li\n')
    with pytest.raises(ValueError, match=r"runs.jsonl:3 is no line"):
        decode_record.read(path, Answered)


def test_a_link_may_be_named_by_its_round_trip():
    swept, wan = link_named("rtt160"), PRESETS["wan"]
    assert (swept.rtt_ms, swept.up_mbit_s, swept.down_mbit_s) == (160, wan.up_mbit_s, wan.down_mbit_s)
    assert link_named("5g") is PRESETS["5g"]
    kept = link_named("wan+window")
    assert kept == wan.model_copy(update={"name": "wan+window", "keeps_window": True})
    assert link_named("rtt40+window").rtt_ms == 40 and not wan.keeps_window
    for wrong in ("rtt", "+window", "rtt-5", "rtt5ms", "moon"):
        with pytest.raises(LinkError, match="no link is called"):
            link_named(wrong)
