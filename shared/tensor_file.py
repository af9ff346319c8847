"""The safetensors format, as far as it must be distrusted: headers checked before anything is allocated.

A file is an 8-byte little-endian header length, a JSON header, then the tensors' bytes end to end.
`read_header` accepts exactly that and says what is wrong with anything else; a header that passes
names byte ranges that lie inside the file, do not overlap and leave no gap. No tensor is read here.
"""

import json
import math
import os
import stat
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

ELEMENT_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip

MAX_HEADER_BYTES = 32 * 1024 * 1024  # the largest sharded checkpoints have headers under 1 MiB
MAX_DIMS = 8
PIECE_BYTES = 1 << 20
ALIGNMENT = 64  # where the first tensor starts in files written here: a cache line


class TensorFileError(ValueError):
    """A file that is not a well-formed safetensors file."""


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: ``size`` bytes of ``file`` from ``offset``, row-major, little-endian.

    ``dtype`` is the safetensors name (``F32``, ``BF16``, ...).
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int


@dataclass(frozen=True)
class Header:
    """What a safetensors file says it holds."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]


def read_header(path: Path, *, max_header_bytes: int = MAX_HEADER_BYTES) -> Header:
    """Read and check the header of the safetensors file at ``path``.

    Raises
    ------
    TensorFileError
        If the file is missing, unreadable, truncated, has trailing bytes, or its header is malformed.
    """
    try:
        # O_NONBLOCK: opening a named pipe must not hang before the check below refuses it.
        with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise TensorFileError(f"{path} is not a regular file; expected a .safetensors file")
            return _parse(path, file, status.st_size, max_header_bytes)
    except OSError as error:
        raise TensorFileError(f"cannot read {path}: {error.strerror or type(error).__name__}") from None


def _parse(path: Path, file: BinaryIO, file_bytes: int, max_header_bytes: int) -> Header:
    if file_bytes < 8:
        raise TensorFileError(f"{path} has {file_bytes} bytes; a safetensors file has 8 or more (truncated?)")
    (header_bytes,) = struct.unpack("<Q", file.read(8))
    if header_bytes > max_header_bytes:
        raise TensorFileError(
            f"{path} is no safetensors file, or a damaged one: its first 8 bytes announce a header of "
            f"{header_bytes} bytes, and at most {max_header_bytes} are accepted"
        )
    if header_bytes > file_bytes - 8:
        raise TensorFileError(f"{path} ends inside its header (truncated?); fetch or make it again")
    try:
        header = json.loads(file.read(header_bytes), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError):
        raise TensorFileError(f"{path}: header is not valid JSON; this is not a safetensors file") from None
    if not isinstance(header, dict):
        raise TensorFileError(f"{path}: header must be a JSON object")
    try:
        "".join(header).encode()
    except UnicodeEncodeError:
        raise TensorFileError(f"{path}: a tensor's name is no text (half a surrogate pair)") from None
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise TensorFileError(f"{path}: __metadata__ must map names to strings")
    try:
        "".join([*metadata, *metadata.values()]).encode()
    except UnicodeEncodeError:
        raise TensorFileError(f"{path}: __metadata__ holds what is no text (half a surrogate pair)") from None
    start = 8 + header_bytes
    tensors = {name: _entry(path, name, entry, start) for name, entry in header.items()}
    end = start
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].size)):
        if info.offset != end:
            raise TensorFileError(f"{path}: tensor {_show(name)} overlaps another or leaves a gap")
        end += info.size
    if end != file_bytes:
        raise TensorFileError(
            f"{path} has {file_bytes} bytes where its header describes {end} (truncated or altered?)"
        )
    return Header(tensors, metadata)


def _entry(path: Path, name: str, entry: Any, start: int) -> TensorInfo:
    def is_count(value: Any) -> bool:
        return type(value) is int and 0 <= value < 1 << 63

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise TensorFileError(f"{path}: tensor {_show(name)} must have dtype, shape and data_offsets only")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ELEMENT_BYTES:
        raise TensorFileError(
            f"{path}: tensor {_show(name)} has an unknown dtype; known: {', '.join(ELEMENT_BYTES)}"
        )
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(map(is_count, shape)):
        raise TensorFileError(f"{path}: tensor {_show(name)} has a malformed shape")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(is_count, offsets)):
        raise TensorFileError(f"{path}: tensor {_show(name)} has malformed data_offsets")
    size = math.prod(shape) * ELEMENT_BYTES[dtype]
    if offsets[1] - offsets[0] != size:
        raise TensorFileError(
            f"{path}: tensor {_show(name)} needs {size} bytes for its shape and dtype, "
            f"its offsets span {offsets[1] - offsets[0]}"
        )
    return TensorInfo(path, dtype, tuple(shape), start + offsets[0], size)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("duplicate key")
    return result


def _show(name: str) -> str:
    """Return a name taken from a file, fit for an error message."""
    return repr(name if len(name) <= 80 else name[:77] + "...")


def pieces(info: TensorInfo) -> Iterator[bytes]:
    """Yield the stored bytes of one tensor, at most ``PIECE_BYTES`` at a time.

    Raises
    ------
    TensorFileError
        If the file ends early: it changed since its header was read.
    """
    left = info.size
    with info.file.open("rb") as file:
        file.seek(info.offset)
        while left:
            piece = file.read(min(left, PIECE_BYTES))
            if not piece:
                raise TensorFileError(f"{info.file} became shorter while it was read")
            left -= len(piece)
            yield piece


def read_float32(info: TensorInfo) -> Tensor:
    """Read a tensor whose stored dtype is F32 and which has no dimension of size 0."""
    tensor = torch.empty(info.shape, dtype=torch.float32)
    raw, done = tensor.view(torch.uint8).reshape(-1).numpy(), 0
    for piece in pieces(info):
        raw[done : done + len(piece)] = np.frombuffer(piece, np.uint8)
        done += len(piece)
    return tensor


def copy_tensors(
    target: BinaryIO, tensors: Mapping[str, TensorInfo], advance: Callable[[int], object] | None = None
) -> None:
    """Write a safetensors file that holds ``tensors`` under the given names, bytes unchanged.

    The bytes written depend on names, dtypes, shapes and tensor bytes alone: sorted names, no
    metadata, a header padded with spaces to ``ALIGNMENT``. ``advance`` is called with bytes copied.
    """
    header: dict[str, Any] = {}
    end = 0
    for name, info in sorted(tensors.items()):
        header[name] = {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "data_offsets": [end, end + info.size],
        }
        end += info.size
    text = json.dumps(header, separators=(",", ":"), sort_keys=True).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    target.write(struct.pack("<Q", len(text)) + text)
    for name in sorted(tensors):
        for piece in pieces(tensors[name]):
            target.write(piece)
            if advance is not None:
                advance(len(piece))


def check_tensors(
    path: Path, found: Mapping[str, TensorInfo], expected: Mapping[str, tuple[int, ...]], what: str
) -> None:
    """Refuse a file whose tensors are not exactly ``expected`` (name to shape), all float32.

    Raises
    ------
    TensorFileError
        Naming the first difference; ``what`` says what the file should have been.
    """
    missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or unknown:
        raise TensorFileError(
            f"{path} is not {what}: "
            + _listing("missing", missing)
            + ("; " if missing and unknown else "")
            + _listing("unknown", unknown)
        )
    for name, shape in expected.items():
        info = found[name]
        if info.dtype != "F32":
            raise TensorFileError(f"{path}: tensor {name} is {info.dtype}, expected F32")
        if info.shape != shape:
            raise TensorFileError(
                f"{path}: tensor {name} has shape {info.shape}, expected {shape} for {what}"
            )


def _listing(label: str, names: Iterable[str]) -> str:
    shown = [_show(name) for name in names]
    more = f" and {len(shown) - 3} more" if len(shown) > 3 else ""
    return f"{label} tensors {', '.join(shown[:3])}{more}" if shown else ""
