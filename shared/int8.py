"""Rows of numbers as int8 with one float32 scale each: a quarter of float32, half of bfloat16.

``x`` becomes ``n = x / scale``, rounded to the nearest whole number (half to even, computed in float64), and
comes back as ``n * scale``. The scale is ``max|x| / 127`` of its run of numbers, cut to 17 significant bits
and never below ``SMALLEST_SCALE``. So ``n * scale`` needs at most 24 bits, float32 holds it as it is, and

    |x - restore(quantise(x))| <= scale / 2,    scale <= max(max|x| / 127, 2^-126)

holds for every finite float32 with no rounding error on top (also for the largest, which come back finite).

A *run* is a row, or one of the equal groups of a row. Codes have a scale for each group: with one for the
row, the groups of q, k and v share the largest one's. At rank 64 the relative error of normal noise is 0.6 %
in every group for 4 bytes more a group (4 % of the row); with one scale it is 0.7 % where all groups are as
large, 2.4 % in one a quarter as large as the largest, 6 % in one a tenth as large, 59 % at a hundredth.

Knows nothing about messages.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Whole = npt.NDArray[np.int8]

LARGEST = 127  # -128 is not used, so that both signs reach as far
SMALLEST_SCALE = np.float32(2.0**-126)  # of the normal float32; a run of zeros has it too
LARGEST_SCALE = np.nextafter(np.float32(np.finfo(np.float32).max / LARGEST), np.float32(0))  # 127 x is finite
SCALE_BYTES = 4
_SEVENTEEN_BITS = np.uint32(0xFFFFFF80)  # sign, exponent and the first 16 bits after the point


def quantise(runs: "npt.NDArray[Any]") -> tuple[Whole, Array]:
    """Return runs of numbers as whole numbers and their scales.

    Parameters
    ----------
    runs
        ``(runs, length)`` float32, length at least 1.

    Returns
    -------
    Whole
        ``(runs, length)``, each within -127 to 127.
    Array
        Scales ``(runs,)``, positive. That of a run that holds NaN or infinity is not finite, and its
        numbers mean nothing: whoever takes it has to refuse such a scale.
    """
    return quantise_to(runs, LARGEST, _SEVENTEEN_BITS)


def quantise_to(runs: "npt.NDArray[Any]", largest: int, kept: np.uint32) -> tuple[Whole, Array]:
    """Do as `quantise` does within -largest to largest, with the bits ``kept`` of a scale; the rest is cut.

    What is cut may not make the largest quotient reach ``largest + 1/2``.
    """
    most = np.maximum.reduce(np.abs(runs), axis=1)  # (runs,), NaN where a run holds one
    scales: Array = most / np.float32(largest)
    scales = np.maximum((scales.view(np.uint32) & kept).view(np.float32), SMALLEST_SCALE)
    with np.errstate(invalid="ignore"):
        whole = np.divide(runs, scales[:, None], dtype=np.float64)  # (runs, length)
        # The largest quotient is at most 127 + 2^-8, of int4 7 + 2^-4.
        return np.rint(whole, out=whole).astype(np.int8), scales


def restore(whole: Whole, scales: Array) -> Array:
    """Return ``whole (runs, length)`` times ``scales (runs,)`` as float32 ``(runs, length)``."""
    found: Array = np.multiply(whole, scales[:, None], dtype=np.float32)
    return found


def row_bytes(width: int) -> int:
    """Return the bytes of a packed row of ``width`` numbers."""
    return width


def pack(whole: Whole) -> bytes:
    """Return ``whole (rows, width)`` as packed rows, a byte a number."""
    return whole.tobytes()


def unpack(data: bytes | bytearray, width: int) -> Whole:
    """Return packed rows as ``(rows, width)``.

    Raises
    ------
    ValueError
        If they hold what `quantise` never makes.
    """
    whole: Whole = np.frombuffer(data, np.int8)
    if whole.size and np.minimum.reduce(whole) < -LARGEST:
        raise ValueError(f"holds -{LARGEST + 1}; int8 goes from -{LARGEST} to {LARGEST}")
    return whole.reshape(-1, width)


def pack_scales(scales: Array) -> bytes:
    """Return scales as float32."""
    return scales.tobytes()


def unpack_scales(raw: bytes) -> Array:
    """Return float32 scales."""
    return np.frombuffer(raw, np.float32)
