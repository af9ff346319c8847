"""Rows of numbers as int4, two a byte, with one bfloat16 scale each: an eighth of float32.

The same as int8 (`shared.int8`) with 7 for 127: ``n = x / scale``, rounded half to even, comes back as
``n * scale``. The scale is ``max|x| / 7`` of its run, cut to the 8 significant bits of a bfloat16 and never
below ``SMALLEST_SCALE``. Cutting makes ``max|x| / scale`` at most 7 + 1/16, which still rounds to 7, so

    |x - restore(quantise(x))| <= scale / 2,    scale <= max(max|x| / 7, 2^-126)

holds for every finite float32 with no rounding error on top, and the coarse scale costs no accuracy.

At rank 64 the error of normal noise is about 10 % of its size, 18 times that of int8. It is meant for
residual codes and may be used for codes; hidden states do not take it.

Packed, each row begins a byte; number 2i is in the low half of byte i, number 2i + 1 in the high half, both
in two's complement. Of a row with an odd width the last high half is 0. Knows nothing about messages.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from shared.int8 import Array, Whole, quantise_to, restore

__all__ = [
    "LARGEST", "LARGEST_SCALE", "SCALE_BYTES", "pack", "pack_scales", "quantise", "restore", "row_bytes",
    "unpack", "unpack_scales",
]  # fmt: skip

LARGEST = 7  # -8 is not used, so that both signs reach as far
SCALE_BYTES = 2
_EIGHT_BITS = np.uint32(0xFFFF0000)  # sign, exponent and the first 7 bits after the point: a bfloat16
LARGEST_SCALE = (
    np.array([np.finfo(np.float32).max / LARGEST], np.float32).view(np.uint32) & _EIGHT_BITS
).view(np.float32)[0]  # 7 x is finite


def quantise(runs: "npt.NDArray[Any]") -> tuple[Whole, Array]:
    """Return runs of numbers as whole numbers within -7 to 7 and their scales; see `shared.int8.quantise`."""
    return quantise_to(runs, LARGEST, _EIGHT_BITS)


def row_bytes(width: int) -> int:
    """Return the bytes of a packed row of ``width`` numbers."""
    return (width + 1) // 2


def pack(whole: Whole) -> bytes:
    """Return ``whole (rows, width)``, each within -7 to 7, as packed rows."""
    if whole.shape[-1] % 2:
        whole = np.pad(whole, ((0, 0), (0, 1)))
    halves = whole.view(np.uint8)
    return ((halves[:, 0::2] & 0x0F) | (halves[:, 1::2] << 4)).tobytes()


def unpack(data: bytes | bytearray, width: int) -> Whole:
    """Return packed rows as ``(rows, width)``.

    Raises
    ------
    ValueError
        If they hold what `pack` never makes.
    """
    packed = np.frombuffer(data, np.int8).reshape(-1, row_bytes(width))
    whole: Whole = np.empty((*packed.shape, 2), np.int8)
    np.left_shift(packed, 4, out=whole[..., 0])
    whole[..., 0] >>= 4  # with the sign
    np.right_shift(packed, 4, out=whole[..., 1])
    if whole.size and np.minimum.reduce(whole, axis=None) < -LARGEST:
        raise ValueError(f"holds -{LARGEST + 1}; int4 goes from -{LARGEST} to {LARGEST}")
    whole = whole.reshape(len(packed), 2 * packed.shape[1])
    if whole.shape[1] == width:
        return whole
    if whole[:, width:].any():
        raise ValueError("holds a number behind the end of a row")
    return whole[:, :width]


def pack_scales(scales: Array) -> bytes:
    """Return scales as bfloat16; they are cut already, see `quantise`."""
    return (scales.view(np.uint32) >> 16).astype(np.uint16).tobytes()


def unpack_scales(raw: bytes) -> Array:
    """Return bfloat16 scales as float32."""
    return (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32)
