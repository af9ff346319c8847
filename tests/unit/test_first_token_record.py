"""Times to a first token against the ideal, worked out by hand."""

import pytest

from benchmarks import first_token_record
from benchmarks.first_token_record import EXCHANGING_AIM, RESIDENT_AIM, FirstToken

FACTS = {
    "label": "default", "preset": "wan", "rtt_ms": 80.0, "up_mbit_s": 60.0, "plan": "one-trip",
    "resident": True, "round_trips": 1, "dtype": "bfloat16", "wire": "bfloat16", "threads": None,
    "tokens": 512, "chunk": 128, "in_flight": 8, "embeddings_bytes": 600_000, "bytes_up": 5, "bytes_down": 6,
    "seconds": 1.3, "local_s": 0.84, "steal": 0.0, "local_steal": 0.0, "date": "2026-11-22T00:00:00Z",
}  # fmt: skip


def row(**changes):
    return FirstToken.model_validate(FACTS | changes)


def test_the_ideal_is_a_round_trip_the_embeddings_and_the_prefill():
    assert row().ideal_s == pytest.approx(0.08 + 0.08 + 0.84)
    assert row().ratio == pytest.approx(1.3)
    assert row(up_mbit_s=None).ideal_s == pytest.approx(0.92)


def test_only_measurements_that_the_host_let_be_count():
    rows = [row(), row(seconds=9.0, steal=0.2), row(seconds=9.0, local_steal=0.2), row(seconds=1.1)]
    one = first_token_record.summary(rows)
    assert (one.counted, one.tried, one.ratio) == (2, 4, pytest.approx(1.2))
    assert (one.lowest, one.highest) == (pytest.approx(1.1), pytest.approx(1.3))
    disturbed = first_token_record.summary(rows[1:3])
    assert (disturbed.counted, disturbed.ratio) == (0, pytest.approx(9.0))


def test_each_ratio_is_against_the_prefill_right_before():
    slower = row(seconds=2.6, local_s=1.84)  # the machine was half as fast
    assert first_token_record.summary([row(), slower]).ratio == pytest.approx(1.3)


def test_beside_the_ideal_stands_what_tcp_took_for_the_same_bytes():
    assert row().tcp_ratio is None and first_token_record.summary([row()]).tcp_ratio is None
    assert row(tcp_s=0.46).tcp_ratio == pytest.approx(1.0)
    one = first_token_record.summary([row(), row(tcp_s=0.46), row(tcp_s=1.76), row(tcp_s=0.46)])
    assert (one.tcp_s, one.tcp_ratio, one.ratio) == (0.46, pytest.approx(1.0), pytest.approx(1.3))


def test_the_aim_depends_on_the_plan_and_on_what_its_round_trips_allow():
    exchanging = {"resident": False, "plan": "grouped"}
    assert first_token_record.summary([row()]).aim == RESIDENT_AIM
    assert first_token_record.summary([row(**exchanging, round_trips=4)]).aim == EXCHANGING_AIM
    assert first_token_record.summary([row(**exchanging, round_trips=18)]).aim == EXCHANGING_AIM  # 1.44 s
    assert first_token_record.summary([row(**exchanging, round_trips=19)]).aim is None  # 1.52 s
