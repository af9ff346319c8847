"""int4 with scales: the error is at most half a scale, exactly, and packed numbers come back as they were."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from shared import int4, int8

FLOAT32 = np.finfo(np.float32)
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
RUNS = arrays(np.float32, array_shapes(min_dims=2, max_dims=2, max_side=6), elements=FINITE)
NEAR_TIES = st.builds(
    lambda scale, whole, off: np.float32([[7 * scale, (whole + 0.5) * scale * (1 + off)]]),
    st.floats(min_value=2.0**-20, max_value=2.0**20, width=32),
    st.integers(-7, 6),
    st.sampled_from([0.0, 2.0**-23, -(2.0**-23)]),
)
WHOLE = arrays(np.int8, array_shapes(min_dims=2, max_dims=2, max_side=9), elements=st.integers(-7, 7))


def row(*values: float) -> np.ndarray:
    return np.array([values], np.float32)


@given(runs=RUNS | NEAR_TIES)
@example(row(0.0, -0.0))
@example(row(FLOAT32.smallest_subnormal, 0.0))
@example(row(FLOAT32.smallest_normal, -FLOAT32.smallest_subnormal))
@example(row(FLOAT32.max, FLOAT32.min, FLOAT32.max / 14))
@example(row(1.0, 0.5 / 7, 1.5 / 7, -2.5 / 7))
@example(row(7 * 1.9921875, 1.0))  # a scale whose bits just fit
@example(row(7 * 1.99609375, 1.0))  # and one of which most is cut
def test_the_error_is_at_most_half_a_scale(runs: np.ndarray) -> None:
    whole, scales = int4.quantise(runs)
    restored = int4.restore(whole, int4.unpack_scales(int4.pack_scales(scales)))
    assert restored.dtype == scales.dtype == np.float32 and restored.shape == runs.shape
    assert np.abs(whole.astype(int)).max() <= int4.LARGEST
    for numbers, found, wholes, scale in zip(
        runs, restored, whole, map(Fraction, map(float, scales)), strict=True
    ):
        largest = max(abs(Fraction(float(x))) for x in numbers)
        assert 0 < scale <= max(largest / 7 * (1 + Fraction(1, 1 << 23)), Fraction(2) ** -126)
        for x, back, n in zip(numbers, found, wholes, strict=True):
            assert Fraction(float(back)) == int(n) * scale, "float32 should hold it without rounding"
            assert abs(Fraction(float(x)) - Fraction(float(back))) <= scale / 2


@given(runs=RUNS)
def test_what_was_rounded_stays_as_it_is(runs: np.ndarray) -> None:
    whole, scales = int4.quantise(runs)
    again, scales_again = int4.quantise(int4.restore(whole, scales))
    assert np.array_equal(again, whole) and np.array_equal(scales_again, scales)


@given(whole=WHOLE)
def test_packed_numbers_come_back(whole: np.ndarray) -> None:
    packed = int4.pack(whole)
    rows, width = whole.shape
    assert len(packed) == rows * int4.row_bytes(width) == rows * -(-width // 2)
    assert np.array_equal(int4.unpack(packed, width), whole)


@given(data=st.binary(min_size=6, max_size=6), width=st.sampled_from([3, 4, 11, 12]))
def test_any_bytes_are_numbers_or_an_error(data: bytes, width: int) -> None:
    """And no two packed rows are the same numbers."""
    try:
        whole = int4.unpack(data, width)
    except ValueError:
        odd = [data[i] >> 4 for i in range(6)][width // 2 :: (width + 1) // 2] if width % 2 else []
        assert any(odd) or 8 in {half for byte in data for half in (byte & 15, byte >> 4)}
        return
    assert np.abs(whole.astype(int)).max() <= 7 and int4.pack(whole) == data


def test_the_bytes_are_these() -> None:
    assert int4.pack(np.array([[1, 2, 3], [-1, -7, 7]], np.int8)) == bytes([0x21, 0x03, 0x9F, 0x07])
    assert int4.unpack(b"\x21\x03", 3).tolist() == [[1, 2, 3]]
    assert int4.pack_scales(row(1.0, 0.5)[0]) == np.array([0x3F80, 0x3F00], "<u2").tobytes()


def test_what_cannot_be_is_refused() -> None:
    for data, width in ((b"\x08", 2), (b"\x80", 2), (b"\x08", 1)):
        with pytest.raises(ValueError, match="holds -8; int4 goes from -7 to 7"):
            int4.unpack(data, width)
    with pytest.raises(ValueError, match="behind the end of a row"):
        int4.unpack(b"\x21\x13\x21\x03", 3)


def test_half_goes_to_even() -> None:
    whole, scales = int4.quantise(row(7, 0.5, 1.5, 2.5, -0.5, -1.5, -6.5))
    assert scales.tolist() == [1.0] and whole.tolist() == [[7, 0, 2, 2, 0, -2, -6]]


def test_runs_do_not_share_a_scale() -> None:
    whole, scales = int4.quantise(np.array([[7.0, 1.0], [0.007, 0.001], [0.0, 0.0]], np.float32))
    assert whole.tolist() == [[7, 1], [7, 1], [0, 0]]
    assert scales[0] == 1 and 0.001 * (1 - 2**-7) <= scales[1] <= 0.001 and scales[2] == int8.SMALLEST_SCALE


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_leaves_no_finite_scale(value: float) -> None:
    whole, scales = int4.quantise(np.array([[1.0, value], [1.0, 2.0]], np.float32))
    sent = int4.unpack_scales(int4.pack_scales(scales))
    assert np.isfinite(sent).tolist() == [False, True] and len(int4.pack(whole)) == 2


def test_the_largest_scale_is_the_largest() -> None:
    limit = Fraction(float(FLOAT32.max))
    bits = np.array([int4.LARGEST_SCALE], np.float32).view(np.uint32)
    above = (bits + np.uint32(1 << 16)).view(np.float32)[0]
    assert bits[0] & 0xFFFF == 0
    assert 7 * Fraction(float(int4.LARGEST_SCALE)) <= limit < 7 * Fraction(float(above))
    assert int4.quantise(row(FLOAT32.max))[1] <= int4.LARGEST_SCALE


def test_no_run_at_all() -> None:
    whole, scales = int4.quantise(np.empty((0, 5), np.float32))
    assert whole.shape == (0, 5) and int4.pack(whole) == b"" == int4.pack_scales(scales)
    assert int4.unpack(b"", 5).shape == (0, 5)


def test_the_error_that_is_stated() -> None:
    """About a tenth of normal noise at rank 64, some 18 times that of int8."""
    noise = np.random.default_rng(0).standard_normal((500, 64)).astype(np.float32)
    errors = [
        np.sqrt(np.square(codec.restore(*codec.quantise(noise)) - noise).mean()) for codec in (int4, int8)
    ]
    assert 0.08 < errors[0] < 0.12 and 16 < errors[0] / errors[1] < 20
