"""Digests of tensors, and the Merkle tree over named digests.

A leaf covers a tensor's name, dtype, shape and stored bytes, so it is the same however a checkpoint
is sharded and whatever dtype it is served in. Bytes are read from the file in pieces, never as a
whole. Leaves and nodes are hashed with different tags (RFC 6962), so that no tree passes for another.
"""

import hashlib
import struct
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

import torch

from shared.cache import remembered_digests
from shared.tensor_file import TensorInfo, pieces

DTYPE_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
VERSION = b"privatelora fingerprint v1 "


class MerkleError(ValueError):
    """Leaves that cannot form a tree, or a tensor that cannot be a leaf."""


def tensor_digests(tensors: Mapping[str, TensorInfo], cache_dir: Path | None = None) -> dict[str, bytes]:
    """Return the leaf of each tensor, read from its file in pieces or remembered from an earlier start."""
    by_file: dict[Path, dict[str, TensorInfo]] = {}
    for name, info in tensors.items():
        by_file.setdefault(info.file, {})[name] = info
    digests: dict[str, bytes] = {}
    for file, group in by_file.items():
        # The label holds the range too: one name may stand for different tensors in different uses.
        labels = {name: f"{name}@{info.offset}+{info.size}" for name, info in group.items()}
        found = remembered_digests(
            file, {labels[name]: partial(_file_leaf, name, info) for name, info in group.items()}, cache_dir
        )
        digests.update({name: found[label] for name, label in labels.items()})
    return digests


def tensor_digest(name: str, tensor: torch.Tensor) -> bytes:
    """Return the leaf of a tensor in memory; equal to the leaf of the same tensor in a file."""
    if tensor.dtype not in DTYPE_NAMES:
        raise MerkleError(f"{name} has dtype {tensor.dtype}; expected one of {list(DTYPE_NAMES)}")
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return _leaf(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), [raw])


def merkle_root(leaves: Iterable[tuple[str, bytes]]) -> bytes:
    """Return the Merkle root over (name, digest) pairs, whatever their order.

    Raises
    ------
    MerkleError
        If two leaves have the same name.
    """
    ordered = sorted(leaves)
    if len({name for name, _ in ordered}) != len(ordered):
        raise MerkleError("two leaves have the same name")
    level = [digest for _, digest in ordered] or [tagged_hash(b"empty")]
    while len(level) > 1:
        paired = [tagged_hash(b"node", *level[i : i + 2]) for i in range(0, len(level) - 1, 2)]
        level = paired + level[len(paired) * 2 :]  # an odd one out moves up as it is
    return level[0]


def _file_leaf(name: str, info: TensorInfo) -> bytes:
    return _leaf(name, info.dtype, info.shape, pieces(info))


def _leaf(name: str, dtype: str, shape: tuple[int, ...], raw: Iterable[bytes]) -> bytes:
    dimensions = struct.pack(f"<{len(shape)}Q", *shape)
    digest = hashlib.sha256(_framed(b"tensor", name.encode(), dtype.encode(), dimensions))
    for piece in raw:  # last, so that nothing after it needs a length
        digest.update(piece)
    return digest.digest()


def tagged_hash(tag: bytes, *fields: bytes) -> bytes:
    """Return the SHA-256 of tag and fields, so framed that no two inputs hash alike."""
    return hashlib.sha256(_framed(tag, *fields)).digest()


def _framed(tag: bytes, *fields: bytes) -> bytes:
    """Return tag and fields, each with its length before it, so that no two inputs read alike."""
    return VERSION + b"".join(struct.pack("<Q", len(field)) + field for field in (tag, *fields))
