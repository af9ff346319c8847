"""Fingerprints: what both sides must agree on, as a Merkle root that can name the part that differs.

    root = H(plan, lowrank, layers, edge)
    plan      the plan's canonical JSON
    lowrank   the tensors of the A/B file
    layers    the decoder layers, each tensor in its stored dtype
    edge      the edge parts (name, size, digest of each file), which an edge can verify alone

The leaves do not depend on sharding or serving dtype (`shared.merkle`).
"""

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from shared.checkpoint import Checkpoint
from shared.edge_parts import EdgePart, digested_parts
from shared.merkle import merkle_root, tagged_hash, tensor_digest, tensor_digests
from shared.plan import Plan
from shared.tensor_file import read_header

__all__ = [
    "Fingerprint",
    "FingerprintError",
    "edge_digest",
    "for_model",
    "layers_digest",
    "lowrank_digest",
    "merkle_root",
    "plan_digest",
    "tensor_digest",
]

DIGEST_BYTES = 32


class FingerprintError(ValueError):
    """A fingerprint that is malformed or contradicts itself."""


@dataclass(frozen=True)
class Fingerprint:
    """The four branches, 32 bytes each."""

    plan: bytes
    lowrank: bytes
    layers: bytes
    edge: bytes

    def __post_init__(self) -> None:
        for name, branch in self.branches().items():
            if not isinstance(branch, bytes) or len(branch) != DIGEST_BYTES:
                raise FingerprintError(f"fingerprint branch {name} must be {DIGEST_BYTES} bytes")

    def branches(self) -> dict[str, bytes]:
        """Return the branches by field name."""
        return {"plan": self.plan, "lowrank": self.lowrank, "layers": self.layers, "edge": self.edge}

    @property
    def root(self) -> bytes:
        """SHA-256 over the four branches."""
        return tagged_hash(b"root", self.plan, self.lowrank, self.layers, self.edge)

    def differs_from(self, other: "Fingerprint") -> list[str]:
        """Return, in plain words, the parts in which two fingerprints differ; empty if they are equal."""
        words = {"plan": "plan", "lowrank": "A/B", "layers": "backbone", "edge": "edge parts"}
        theirs = other.branches()
        return [words[name] for name, mine in self.branches().items() if mine != theirs[name]]

    def to_hex(self) -> dict[str, str]:
        """Return the branches in hex, for JSON."""
        return {name: branch.hex() for name, branch in self.branches().items()}


def plan_digest(plan: Plan) -> bytes:
    """Return the plan branch."""
    return tagged_hash(b"plan", plan.canonical_json().encode())


def lowrank_digest(path: Path, cache_dir: Path | None = None) -> bytes:
    """Return the branch of the A/B file at ``path``."""
    return merkle_root(tensor_digests(read_header(path).tensors, cache_dir).items())


def layers_digest(plan: Plan, checkpoint: Checkpoint, cache_dir: Path | None = None) -> bytes:
    """Return the branch of the decoder layers that the cloud runs under ``plan``."""
    leaves = {
        f"layers.{layer}.{local}": checkpoint.tensors[name]
        for layer in plan.cloud_layers
        for local, name in checkpoint.layer_tensors(layer).items()
    }
    return merkle_root(tensor_digests(leaves, cache_dir).items())


def edge_digest(manifest: Iterable[EdgePart]) -> bytes:
    """Return the edge branch: a Merkle root over (name, size, sha256) of each part, in any order."""
    return merkle_root(
        (part.name, tagged_hash(b"part", part.name.encode(), struct.pack("<Q", part.size), part.sha256))
        for part in manifest
    )


def for_model(
    plan: Plan,
    checkpoint: Checkpoint,
    lowrank: Path,
    manifest: Sequence[EdgePart],
    cache_dir: Path | None = None,
) -> Fingerprint:
    """Return the fingerprint of a served model.

    Parameters
    ----------
    plan, checkpoint
        What is served, and from what.
    lowrank
        The A/B file that `shared.lowrank.ensure` made.
    manifest
        What `shared.edge_parts.build` returned.
    cache_dir
        Where digests of unchanged files are remembered.
    """
    return Fingerprint(
        plan=plan_digest(plan),
        lowrank=lowrank_digest(lowrank, cache_dir),
        layers=layers_digest(plan, checkpoint, cache_dir),
        edge=edge_digest(digested_parts(plan, manifest)),
    )
