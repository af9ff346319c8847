"""int8 with scales: the error is at most half a scale, exactly, for every finite float32."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from shared import int8

FLOAT32 = np.finfo(np.float32)
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
# Hypothesis draws the ends of a range often: zero, subnormal numbers and the largest ones are in each.
RUNS = arrays(np.float32, array_shapes(min_dims=2, max_dims=2, max_side=6), elements=FINITE)
NEAR_TIES = st.builds(
    lambda scale, whole, off: np.float32([[127 * scale, (whole + 0.5) * scale * (1 + off)]]),
    st.floats(min_value=2.0**-20, max_value=2.0**20, width=32),
    st.integers(-127, 126),
    st.sampled_from([0.0, 2.0**-23, -(2.0**-23)]),
)


def row(*values: float) -> np.ndarray:
    return np.array([values], np.float32)


@given(runs=RUNS | NEAR_TIES)
@example(row(0.0, -0.0))
@example(row(FLOAT32.smallest_subnormal, 0.0))
@example(row(FLOAT32.smallest_normal, -FLOAT32.smallest_subnormal))
@example(row(FLOAT32.max, FLOAT32.min, FLOAT32.max / 254))
@example(row(1.0, 0.5 / 127, 1.5 / 127, -2.5 / 127))
def test_the_error_is_at_most_half_a_scale(runs: np.ndarray) -> None:
    whole, scales = int8.quantise(runs)
    restored = int8.restore(whole, scales)
    assert restored.dtype == scales.dtype == np.float32 and restored.shape == runs.shape
    assert np.abs(whole.astype(int)).max() <= int8.LARGEST
    for numbers, found, wholes, scale in zip(
        runs, restored, whole, map(Fraction, map(float, scales)), strict=True
    ):
        largest = max(abs(Fraction(float(x))) for x in numbers)
        assert 0 < scale <= max(largest / 127 * (1 + Fraction(1, 1 << 23)), Fraction(2) ** -126)
        for x, back, n in zip(numbers, found, wholes, strict=True):
            assert Fraction(float(back)) == int(n) * scale, "float32 should hold it without rounding"
            assert abs(Fraction(float(x)) - Fraction(float(back))) <= scale / 2


@given(runs=RUNS)
def test_what_was_rounded_stays_as_it_is(runs: np.ndarray) -> None:
    """So a value that crosses twice is rounded once."""
    whole, scales = int8.quantise(runs)
    again, scales_again = int8.quantise(int8.restore(whole, scales))
    assert np.array_equal(again, whole) and np.array_equal(scales_again, scales)


def test_half_goes_to_even() -> None:
    numbers = row(127, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5)
    whole, scales = int8.quantise(numbers)
    assert scales.tolist() == [1.0]
    assert whole.tolist() == [[127, 0, 2, 2, 0, -2, -126]]


def test_runs_do_not_share_a_scale() -> None:
    whole, scales = int8.quantise(np.array([[127.0, 1.0], [0.127, 0.001], [0.0, 0.0]], np.float32))
    assert whole.tolist() == [[127, 1], [127, 1], [0, 0]]
    assert scales[0] == 1 and scales[1] == pytest.approx(0.001, rel=2**-16)
    assert scales[2] == int8.SMALLEST_SCALE


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_leaves_no_finite_scale(value: float) -> None:
    _, scales = int8.quantise(np.array([[1.0, value], [1.0, 2.0]], np.float32))
    assert np.isfinite(scales).tolist() == [False, True]


def test_the_largest_scale_is_the_largest() -> None:
    limit = Fraction(float(FLOAT32.max))
    above = np.nextafter(int8.LARGEST_SCALE, np.float32(np.inf))
    assert 127 * Fraction(float(int8.LARGEST_SCALE)) <= limit < 127 * Fraction(float(above))
    assert int8.quantise(row(FLOAT32.max))[1] <= int8.LARGEST_SCALE


def test_no_run_at_all() -> None:
    whole, scales = int8.quantise(np.empty((0, 5), np.float32))
    assert whole.shape == (0, 5) and scales.shape == (0,) and int8.restore(whole, scales).shape == (0, 5)
