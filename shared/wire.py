"""Tensors on the wire: raw little-endian bytes with a dtype and a shape, and scales if they are rounded.

Checks everything a peer could get wrong before it allocates. Knows nothing about sessions, layers
or what a tensor means.
"""

import math
import sys
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shared import int4, int8
from shared.pb.privatelora.v1 import private_lora_pb2 as pb

if sys.byteorder != "little":
    raise ImportError("the wire format is little-endian raw memory; big-endian machines are not supported")

FRAME_BYTES = 5  # gRPC's own header on each message
ROWS_BYTES = 1 << 20  # of one tuning message's elements: far from gRPC's cap, and the next is made meanwhile

INT8, INT4 = pb.DTYPE_INT8, pb.DTYPE_INT4
TORCH_DTYPES = {  # of the dtypes that are sent as they are computed with: all that are not rounded
    pb.DTYPE_FLOAT32: torch.float32,
    pb.DTYPE_FLOAT16: torch.float16,
    pb.DTYPE_BFLOAT16: torch.bfloat16,
    pb.DTYPE_FLOAT64: torch.float64,
}
WIRE_DTYPES = {dtype: number for number, dtype in TORCH_DTYPES.items()}
_NUMPY: dict[int, type[np.generic]] = {
    pb.DTYPE_FLOAT32: np.float32,
    pb.DTYPE_FLOAT16: np.float16,
    pb.DTYPE_BFLOAT16: np.uint16,  # numpy has no bfloat16; the bits are what matters
    pb.DTYPE_FLOAT64: np.float64,
}
_ITEM_BYTES = {number: np.dtype(kind).itemsize for number, kind in _NUMPY.items()}
DTYPE_NAMES = {
    "float32": pb.DTYPE_FLOAT32,
    "float16": pb.DTYPE_FLOAT16,
    "bfloat16": pb.DTYPE_BFLOAT16,
    "float64": pb.DTYPE_FLOAT64,
    "int8": pb.DTYPE_INT8,
    "int4": pb.DTYPE_INT4,
}

Array = npt.NDArray[np.float32]


class Rounding(Protocol):
    """What is needed of `shared.int8` and `shared.int4`: numbers rounded to whole ones, with scales."""

    LARGEST: int
    SCALE_BYTES: int
    LARGEST_SCALE: Any

    def quantise(self, runs: "npt.NDArray[Any]") -> tuple[int8.Whole, Array]:
        """Return runs as whole numbers and scales."""

    def restore(self, whole: int8.Whole, scales: Array) -> Array:
        """Return whole numbers times scales."""

    def row_bytes(self, width: int) -> int:
        """Return the bytes of a packed row."""

    def pack(self, whole: int8.Whole) -> bytes:
        """Return rows of whole numbers as bytes."""

    def unpack(self, data: bytes | bytearray, width: int) -> int8.Whole:
        """Return rows of whole numbers; ValueError if there cannot be such bytes."""

    def pack_scales(self, scales: Array) -> bytes:
        """Return scales as bytes."""

    def unpack_scales(self, raw: bytes) -> Array:
        """Return scales."""


ROUNDINGS: dict[int, Rounding] = {INT8: int8, INT4: int4}


class WireError(ValueError):
    """A tensor on the wire that is not what was agreed."""


def dtype_name(dtype: int) -> str:
    """Return the plain name of a wire dtype, for messages."""
    return next((name for name, number in DTYPE_NAMES.items() if number == dtype), f"unknown dtype {dtype}")


def row_bytes(dtype: int, width: int, groups: int = 1) -> int:
    """Return what a row of ``width`` elements in ``groups`` groups takes, without protobuf's overhead."""
    rounding = ROUNDINGS.get(dtype)
    if rounding is not None:
        return rounding.row_bytes(width) + groups * rounding.SCALE_BYTES
    return width * _ITEM_BYTES[dtype]


def encode(tensor: Tensor, dtype: "pb.Dtype.ValueType", groups: int = 1) -> pb.Tensor:
    """Return ``tensor`` as wire bytes in ``dtype``; `fill` says what may be passed."""
    message = pb.Tensor()
    fill(message, tensor, dtype, groups)
    return message


def fill(message: pb.Tensor, tensor: Tensor, dtype: "pb.Dtype.ValueType", groups: int = 1) -> None:
    """Put ``tensor`` into an empty message as wire bytes: one made elsewhere would be copied into its parent.

    Parameters
    ----------
    message
        Where to; often a field of a message that is being made.
    tensor
        Any shape, floating point, any device.
    dtype
        What was agreed. NaN, infinity and values beyond float16's range (for int8 and int4: float32's) are
        refused by the peer, so that an overflow is never silent.
    groups
        Equal parts of a row, each with a scale of its own if ``dtype`` is int8 or int4.
    """
    if dtype in ROUNDINGS:
        array = tensor.detach().to(device="cpu", dtype=torch.float32).numpy()
        return _fill_rounded(message, array, dtype, groups)
    plain, wanted = tensor, TORCH_DTYPES[dtype]
    if plain.dtype != wanted or not plain.is_cpu or plain.requires_grad:  # torch's calls let other threads in
        plain = plain.detach().to(device="cpu", dtype=wanted)
    if dtype == pb.DTYPE_BFLOAT16:  # numpy has no bfloat16; the bits are what matters
        plain = plain.view(torch.int16)
    _fill(message, plain.numpy(), dtype)


def fill_array(message: pb.Tensor, array: Array, dtype: "pb.Dtype.ValueType", groups: int = 1) -> None:
    """Do as `fill` does with a float32 array: an exchange is faster without torch."""
    if dtype == pb.DTYPE_FLOAT32:
        _fill(message, array, dtype)
    elif dtype in ROUNDINGS:
        _fill_rounded(message, array, dtype, groups)
    else:
        fill(message, torch.from_numpy(array), dtype)


def _fill(message: pb.Tensor, array: "npt.NDArray[Any]", dtype: "pb.Dtype.ValueType") -> None:
    message.dtype = dtype
    message.shape.extend(array.shape)
    message.data = array.tobytes()  # in row-major order, whatever the strides


def _fill_rounded(message: pb.Tensor, array: Array, dtype: "pb.Dtype.ValueType", groups: int) -> None:
    rounding = ROUNDINGS[dtype]
    whole, scales = rounding.quantise(array.reshape(_runs(array.shape, groups)))
    message.dtype = dtype
    message.shape.extend(array.shape)
    message.data = rounding.pack(whole.reshape(math.prod(array.shape[:-1]), array.shape[-1]))
    message.scales = rounding.pack_scales(scales)


def _runs(shape: Sequence[int], groups: int) -> tuple[int, int]:
    """Return how many numbers have a scale together, as (runs, length)."""
    return math.prod(shape[:-1]) * groups, shape[-1] // groups


def decode(
    message: pb.Tensor, *, dtype: "pb.Dtype.ValueType", shape: Sequence[int], what: str, groups: int = 1
) -> Tensor:
    """Return the tensor in ``message``, on the CPU.

    Parameters
    ----------
    message
        What the peer sent.
    dtype, shape
        What was agreed; anything else is refused before memory is allocated.
    what
        Name of the tensor, for messages.
    groups
        As `fill` takes it; divides the width.

    Returns
    -------
    Tensor
        In the wire dtype (int8, int4: in float32), contiguous, writable, all elements finite.

    Raises
    ------
    WireError
        On a wrong dtype, shape or byte count, on NaN or infinity, or on scales that cannot be.
    """
    if dtype in ROUNDINGS:
        return torch.from_numpy(_decode_rounded(message, dtype, shape, what, groups))
    elements = torch.from_numpy(_checked_floats(message, dtype, shape, what).reshape(shape))
    return elements.view(torch.bfloat16) if dtype == pb.DTYPE_BFLOAT16 else elements


def decode_array(
    message: pb.Tensor, *, dtype: "pb.Dtype.ValueType", shape: Sequence[int], what: str, groups: int = 1
) -> Array:
    """Do as `decode` does, but return a float32 array: an exchange is faster without torch.

    So float64 is refused too if it is beyond float32's range.
    """
    if dtype in ROUNDINGS:
        return _decode_rounded(message, dtype, shape, what, groups)
    bits = _checked_floats(message, dtype, shape, what)
    if dtype == pb.DTYPE_BFLOAT16:
        return (bits.astype(np.uint32) << 16).view(np.float32).reshape(shape)
    if dtype == pb.DTYPE_FLOAT64:
        return _narrowed(bits, what).reshape(shape)
    return bits.astype(np.float32, copy=False).reshape(shape)


def _narrowed(elements: "npt.NDArray[Any]", what: str) -> Array:
    """Return finite float64 elements as float32, also finite."""
    with np.errstate(over="ignore"):  # it is said below, as an error
        found = elements.astype(np.float32)
    if not np.isfinite(found).all():
        raise WireError(f"{what}: holds a number beyond float32's range, in which it is computed with")
    return found


def _decode_rounded(
    message: pb.Tensor, dtype: "pb.Dtype.ValueType", shape: Sequence[int], what: str, groups: int
) -> Array:
    """Return the tensor in a message of rounded numbers, float32."""
    rounding = ROUNDINGS[dtype]
    data = _checked(message, dtype, shape, what)
    runs, length = _runs(shape, groups)
    raw, expected = message.scales, runs * rounding.SCALE_BYTES  # one read, every access copies
    if len(raw) != expected:
        raise WireError(f"{what}: {len(raw)} bytes of scales, expected {expected} for {tuple(shape)}")
    scales = rounding.unpack_scales(raw)
    if not np.logical_and.reduce((scales >= 0) & (scales <= rounding.LARGEST_SCALE)):
        if not np.isfinite(scales).all():
            raise WireError(f"{what}: holds NaN or infinity in a scale; every element must be finite")
        large = f"so large that {rounding.LARGEST} times it is infinite"
        raise WireError(f"{what}: a scale is {'negative' if (scales < 0).any() else large}")
    try:
        whole = rounding.unpack(data, shape[-1])
    except ValueError as error:
        raise WireError(f"{what}: {error}") from None
    return rounding.restore(whole.reshape(runs, length), scales).reshape(shape)


def _checked_floats(
    message: pb.Tensor, dtype: "pb.Dtype.ValueType", shape: Sequence[int], what: str
) -> "npt.NDArray[Any]":
    """Return the message's elements, all finite, ``(count,)``, in memory of their own."""
    buffer = _checked(message, dtype, shape, what)
    elements = np.frombuffer(buffer, _NUMPY[dtype])
    finite = (elements & 0x7F80) != 0x7F80 if dtype == pb.DTYPE_BFLOAT16 else np.isfinite(elements)
    if not np.logical_and.reduce(finite):
        raise WireError(f"{what}: holds NaN or infinity; every element must be finite")
    return elements


def _checked(message: pb.Tensor, dtype: "pb.Dtype.ValueType", shape: Sequence[int], what: str) -> bytearray:
    """Return the message's data, as much as the shape says, in a buffer of its own."""
    if message.dtype != dtype:
        raise WireError(
            f"{what}: dtype is {dtype_name(message.dtype)}, this session agreed on {dtype_name(dtype)}"
        )
    if len(message.shape) != len(shape) or tuple(message.shape) != tuple(shape):
        raise WireError(f"{what}: shape is {tuple(message.shape[:8])}, expected {tuple(shape)}")
    buffer = bytearray(message.data)  # one read, every access copies; writable, so that torch may own it
    expected = math.prod(shape[:-1]) * row_bytes(dtype, shape[-1], groups=0)
    if len(buffer) != expected:
        raise WireError(f"{what}: {len(buffer)} bytes of data, expected {expected} for {tuple(shape)}")
    return buffer
