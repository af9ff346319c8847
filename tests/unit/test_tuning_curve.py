"""The loss curve: drawn whole, from any numbers, without a display, and only when asked for."""

import math
import stat
import subprocess
import sys

import pytest

from edge_client.tuning.curve import save_curve, smoothed

PNG = b"\x89PNG\r\n\x1a\n"
TRAIN = [(step, 3 / (step + 1)) for step in range(40)]


@pytest.mark.parametrize(
    ("train", "validation", "best"),
    [
        (TRAIN, [(10, 2.0), (20, 1.0), (30, 1.5)], 20),
        (TRAIN[:1], (), None),
        ([], [(10, 2.0)], 10),
        (TRAIN, [(10, math.nan), (20, math.inf)], 10),
        ([(0, math.nan), (1, 1.0)], (), 99),
    ],
)
def test_a_picture_is_written_for_its_owner(tmp_path, train, validation, best):
    path = tmp_path / "curve.png"
    path.write_bytes(b"older")
    save_curve(path, train, validation, best, title="a $broken_formula \u6f22 {x}")
    assert path.read_bytes().startswith(PNG) and path.stat().st_size > 5000
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and list(tmp_path.iterdir()) == [path]


def test_the_same_numbers_give_the_same_picture(tmp_path):
    for name in ("a", "b"):
        save_curve(tmp_path / name, TRAIN, [(10, 2.0)], 10)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_failure_leaves_the_older_picture(tmp_path):
    path = tmp_path / "curve.png"
    path.write_bytes(b"older")
    for train in ([], [(0, math.nan)]):
        with pytest.raises(ValueError, match="no finite loss"):
            save_curve(path, train)
    with pytest.raises(FileNotFoundError):
        save_curve(tmp_path / "absent" / "curve.png", TRAIN)
    assert path.read_bytes() == b"older" and list(tmp_path.iterdir()) == [path]


def test_the_running_mean_follows_and_skips_what_is_not_finite():
    assert smoothed([2.0] * 5) == pytest.approx([2.0] * 5)
    assert smoothed([1.0, 3.0])[0] == 1.0 and 1.0 < smoothed([1.0, 3.0])[1] < 3.0
    first, *rest = smoothed([math.nan, 4.0, math.inf, 4.0])
    assert math.isnan(first) and rest == pytest.approx([4.0] * 3)
    noisy = [1.0, 0.0] * 100
    assert max(abs(value - 0.5) for value in smoothed(noisy)[60:]) < 0.2


def test_nothing_pays_for_matplotlib_before():
    code = "import sys, edge_client.tuning.curve, edge_client.cli; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=600, check=False).returncode == 0
