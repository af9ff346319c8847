"""Tensors on the wire: raw little-endian bytes with a dtype and a shape.

Checks everything a peer could get wrong before it allocates. Knows nothing about sessions, layers
or what a tensor means.
"""

import sys
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from shared.pb.privatelora.v1 import private_lora_pb2 as pb

if sys.byteorder != "little":
    raise ImportError("the wire format is little-endian raw memory; big-endian machines are not supported")

TORCH_DTYPES = {
    pb.DTYPE_FLOAT32: torch.float32,
    pb.DTYPE_FLOAT16: torch.float16,
    pb.DTYPE_BFLOAT16: torch.bfloat16,
}
WIRE_DTYPES = {dtype: number for number, dtype in TORCH_DTYPES.items()}
_NUMPY = {pb.DTYPE_FLOAT32: np.float32, pb.DTYPE_FLOAT16: np.float16}
DTYPE_NAMES = {
    "float32": pb.DTYPE_FLOAT32,
    "float16": pb.DTYPE_FLOAT16,
    "bfloat16": pb.DTYPE_BFLOAT16,
}


class WireError(ValueError):
    """A tensor on the wire that is not what was agreed."""


def dtype_name(dtype: int) -> str:
    """Return the plain name of a wire dtype, for messages."""
    return next((name for name, number in DTYPE_NAMES.items() if number == dtype), f"unknown dtype {dtype}")


def encode(tensor: Tensor, dtype: "pb.Dtype.ValueType") -> pb.Tensor:
    """Return ``tensor`` as wire bytes in ``dtype``.

    Parameters
    ----------
    tensor
        Any shape, floating point, any device.
    dtype
        The session's wire dtype. Values beyond float16's range become infinite and are refused by
        the peer, so that an overflow is never silent.
    """
    plain = tensor.detach().to(device="cpu", dtype=TORCH_DTYPES[dtype]).contiguous()
    if dtype == pb.DTYPE_BFLOAT16:  # numpy has no bfloat16; the bits are what matters
        plain = plain.view(torch.int16)
    return pb.Tensor(dtype=dtype, shape=plain.shape, data=plain.numpy().tobytes())


def decode(message: pb.Tensor, *, dtype: "pb.Dtype.ValueType", shape: Sequence[int], what: str) -> Tensor:
    """Return the tensor in ``message``, on the CPU.

    Parameters
    ----------
    message
        What the peer sent.
    dtype, shape
        What was agreed; anything else is refused before memory is allocated.
    what
        Name of the tensor, for messages.

    Returns
    -------
    Tensor
        In the wire dtype, contiguous, writable, all elements finite.

    Raises
    ------
    WireError
        On a wrong dtype, shape or byte count, or on NaN or infinity.
    """
    if message.dtype != dtype:
        raise WireError(
            f"{what}: dtype is {dtype_name(message.dtype)}, this session agreed on {dtype_name(dtype)}"
        )
    if tuple(message.shape) != tuple(shape):
        raise WireError(f"{what}: shape is {tuple(message.shape)[:8]}, expected {tuple(shape)}")
    data = message.data  # one read: every access copies
    torch_dtype = TORCH_DTYPES[dtype]
    expected = torch_dtype.itemsize
    for size in shape:
        expected *= size
    if len(data) != expected:
        raise WireError(f"{what}: {len(data)} bytes of data, expected {expected} for {tuple(shape)}")
    buffer = bytearray(data)  # writable, so that torch may own it
    if dtype == pb.DTYPE_BFLOAT16:
        bits = np.frombuffer(buffer, dtype=np.uint16)
        finite = bool(((bits & 0x7F80) != 0x7F80).all())
    else:
        finite = bool(np.isfinite(np.frombuffer(buffer, _NUMPY[dtype])).all())
    if not finite:
        raise WireError(f"{what}: holds NaN or infinity; every element must be finite")
    if not buffer:
        return torch.empty(tuple(shape), dtype=torch_dtype)
    return torch.frombuffer(buffer, dtype=torch_dtype).view(tuple(shape))
