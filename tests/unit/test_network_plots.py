"""The points of the two plots: from the records, and nothing but them."""

import pytest

from benchmarks import network_plots
from benchmarks.network_plots import Quality, Speed, plot_quality, plot_speed, qualities, speeds
from benchmarks.tuning_runs import Record
from tests.unit.test_decode_record import row


def test_a_line_has_a_point_for_each_link_in_order():
    rows = [
        row(preset="rtt80", rtt_ms=80.4, seconds=2.0),
        row(preset="rtt20", rtt_ms=20.3, seconds=1.0),
        row(preset="rtt20", rtt_ms=20.3, seconds=3.0, prompt=1),
        row(preset="rtt20", rtt_ms=20.3, seconds=4.0, drafted=False),
        row(preset="none", rtt_ms=0.0, plan="plain", drafted=False, loopback_s=None),
        row(preset="rtt80", rtt_ms=80.4, plan="grouped", drafted=False, tokens=0, steps=0, seconds=0.0),
    ]
    assert speeds(rows) == {
        "one-trip, drafting": [Speed(20.3, 6.0), Speed(80.4, 6.0)],
        "one-trip": [Speed(20.3, 3.0)],
        "plain": [Speed(0.0, 12.0)],
    }


def test_plots_are_written(tmp_path):
    lines = {"one-trip": [Speed(0.0, 20.0), Speed(80.0, 9.0)], "plain": [Speed(0.0, 15.0)]}
    plot_speed(lines, "decoding", tmp_path / "new" / "speed.png")
    points = [
        Quality("reuters8", "untuned", 0, 0.74, 0.71, 0.77, 1, 1102),
        Quality("reuters8", "one-trip", 13000, 0.88, 0.86, 0.9, 3, 1102),
        Quality("boolq", "majority class", 0, 0.6, 0.57, 0.63, 1, 832),
    ]
    plot_quality(points, tmp_path / "quality.png")
    for path in (tmp_path / "new" / "speed.png", tmp_path / "quality.png"):
        assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.model
def test_quality_is_the_records_and_bytes_are_the_wires():
    points = {(one.task, one.method): one for one in qualities()}
    layer = points["reuters8", "PrivateLoRA per projection orthonormal r=64"]
    # The README's formula, bf16: 30 layers exchange, the first one's codes are made on the edge.
    up = (576 * 2 + 26 + 5) + (3 * 64 * 2 + 18) + 29 * (3 * 64 * 2 + 23 + 5)
    down = (576 * 2 + 18 + 5) + 29 * (3 * 64 * 2 + 20 + 5)
    assert layer.bytes_per_token == pytest.approx(up + down, rel=0.001)  # numbers take a byte or two
    trip = points["reuters8", "PrivateLoRA one trip orthonormal r=64"]
    assert trip.bytes_per_token < layer.bytes_per_token / 1.5
    for one in points.values():
        assert 0 <= one.low <= one.share <= one.high <= 1
        assert (one.bytes_per_token > 0) == one.method.startswith("PrivateLoRA")
    scored = {
        (run.spec.seed, run.test.correct)
        for run in Record(network_plots.TUNING_RECORD)
        if run.spec.task == "reuters8" and run.spec.layout == "one_trip" and run.test is not None
    }
    assert trip.seeds == len(scored)
    assert trip.share == pytest.approx(sum(right for _, right in scored) / len(scored) / trip.rows)
