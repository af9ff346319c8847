"""A tuning run on disk: where it stands, and what it belongs to, so that it can go on bit for bit.

One safetensors file, mode 0600, replaced in one step: M, AdamW's two moments of it, the best M so far,
the losses, and in its header one JSON text with the counters and the run's identity. A run goes on
only with the same data, settings and model; `Identity.check` says what differs. Holds no data: of the
examples only a digest, of the losses only numbers.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from edge_client.tuning.config import TuneConfig
from edge_client.tuning.weights import SomeWeights, Weights, weight_shapes
from shared.cache import replacing
from shared.merkle import merkle_root, tensor_digest
from shared.plan import Plan

METADATA_KEY = "privatelora_tuning"
GROUPS = ("matrices", "first_moments", "second_moments", "best")  # of tensors, see `weights`
LOSSES = ("train_losses", "validation_losses")
COUNTERS = ("step", "best_step", "stale", "tokens", "seconds")

# What reading a damaged file may raise: the JSON of its header can be of any shape.
_DAMAGED = (
    *(SafetensorError, ValidationError, KeyError, ValueError, OSError),
    *(TypeError, IndexError, OverflowError, RecursionError),
)

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Losses = list[tuple[int, float]]  # (step, nats per target)


class CheckpointError(ValueError):
    """A tuning run that cannot go on; the message says why and what to do."""


class Identity(BaseModel):
    """What a run belongs to. Equal identities give equal bits on the same CPU."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(description="Name of the run and of the adapter that it makes")
    data: str = Field(description="Path of the data file, as it was given")
    cloud: str = Field(description="Address of the cloud (HOST:PORT); another one may take its place")
    data_digest: Digest = Field(description="SHA-256 over the examples' ids and labels (hex)")
    config: TuneConfig = Field(description="All settings, with nothing left open")
    plan: Plan = Field(description="The split")
    fingerprint: Digest = Field(description="Root over all that the model consists of (hex)")
    wire_dtype: str = Field(description="Element type on the wire")
    dtype: str = Field(description="Element type of embeddings and head")
    device: str = Field(description="Torch device of embeddings and head")
    threads: int = Field(ge=1, description="Torch threads (count): sums have other bits with another count")

    def check(self, now: "Identity") -> None:
        """Compare this run with what it would be resumed as.

        Raises
        ------
        CheckpointError
            If anything that decides the result differs.
        """
        differ = []
        if now.plan != self.plan:
            differ.append(f"the plan ({self.plan.name!r} then, {now.plan.name!r} now)")
        if now.fingerprint != self.fingerprint:
            differ.append("the model that the cloud serves (its fingerprint)")
        if now.data_digest != self.data_digest:
            differ.append("the data (the examples made of it are not those that the run began with)")
        differ += self.config.differences(now.config)
        for name in ("wire_dtype", "dtype", "device", "threads"):
            old, new = getattr(self, name), getattr(now, name)
            if old != new:
                differ.append(f"{name} ({old} then, {new} now)")
        if differ:
            raise CheckpointError(
                f"run {self.name!r} cannot go on, because this differs: {'; '.join(differ)}. Restore it, or "
                "begin anew with --restart"
            )


@dataclass(eq=False)
class State:
    """Where a run stands after ``step`` optimiser steps.

    ``stale`` counts validations since the best one. ``best`` is the M of the best validation, if there
    is validation. ``tokens`` and ``seconds`` are what its steps have cost so far, validations not counted.
    """

    matrices: Weights = field(repr=False)
    first_moments: Weights = field(repr=False)
    second_moments: Weights = field(repr=False)
    best: Weights = field(repr=False)
    _: KW_ONLY
    step: int = 0
    best_step: int = 0
    stale: int = 0
    train_losses: Losses = field(default_factory=list)
    validation_losses: Losses = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0

    @classmethod
    def begin(cls, matrices: SomeWeights) -> "State":
        """Return the state of a run that starts at ``matrices``."""
        copies: list[Weights] = [
            {layer: matrix.detach().clone() for layer, matrix in matrices.items()} for _ in GROUPS
        ]
        for moments in copies[1:3]:
            for moment in moments.values():
                moment.zero_()
        return cls(*copies)


class _Header(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = Field(default=1, description="Version of this file format (count)")
    identity: Identity = Field(description="What the run belongs to")
    step: int = Field(ge=0, description="Optimiser steps done (count)")
    best_step: int = Field(ge=0, description="Step of the best validation (count)")
    stale: int = Field(ge=0, description="Validations since the best one (count)")
    tokens: int = Field(ge=0, description="Tokens learned from so far (count)")
    seconds: float = Field(ge=0, description="Time that the steps have taken (seconds)")
    tensors: Digest = Field(description="Merkle root over the tensors, against silent damage (hex)")


def save_checkpoint(path: Path, identity: Identity, state: State) -> None:
    """Write a checkpoint, replacing ``path`` in one step or not at all; makes its folder (mode 0700)."""
    tensors = {
        f"{group}.{layer}": tensor for group in GROUPS for layer, tensor in getattr(state, group).items()
    }
    for name in LOSSES:
        tensors[name] = torch.tensor(getattr(state, name), dtype=torch.float64).reshape(-1, 2)
    header = _Header(
        identity=identity,
        tensors=_digest(tensors),
        **{name: getattr(state, name) for name in COUNTERS},
    )
    path.parent.parent.mkdir(parents=True, exist_ok=True)
    path.parent.mkdir(mode=0o700, exist_ok=True)
    with replacing(path) as file:
        file.write(save(tensors, metadata={METADATA_KEY: header.model_dump_json()}))
    _sync_folder(path.parent)


def load_checkpoint(path: Path) -> tuple[Identity, State]:
    """Read a checkpoint.

    Raises
    ------
    CheckpointError
        If there is none, or it is damaged or of another version.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no run to resume at {path}")
    try:
        raw = path.read_bytes()  # once: the file may be replaced while it is being read
        header = _Header.model_validate_json(_metadata(raw))
        # into memory of their own, whose alignment, and so the bits of products, is torch's
        tensors = {name: tensor.clone() for name, tensor in load(raw).items()}
        state = _state(header, tensors)
    except _DAMAGED as error:
        raise CheckpointError(
            f"{path} is damaged, or written by another version of this program ({type(error).__name__}); "
            "begin anew with --restart"
        ) from None
    return header.identity, state


def _metadata(raw: bytes) -> str:
    """Return our text in the header of a safetensors file: its length in 8 bytes, then JSON."""
    length = int.from_bytes(raw[:8], "little")
    text: str = json.loads(raw[8 : 8 + length])["__metadata__"][METADATA_KEY]
    return text


def _state(header: _Header, tensors: dict[str, Tensor]) -> State:
    if _digest(tensors) != header.tensors:
        raise KeyError("digest")
    shapes = weight_shapes(header.identity.plan)
    state = State(
        *({key: tensors[f"{group}.{key}"] for key in shapes} for group in GROUPS),
        **{name: getattr(header, name) for name in COUNTERS},
    )
    for group in GROUPS:
        if any(tuple(tensor.shape) != shapes[key] for key, tensor in getattr(state, group).items()):
            raise KeyError("shape")
    for name in LOSSES:
        setattr(state, name, [(int(step), loss) for step, loss in tensors[name].tolist()])
    return state


def _digest(tensors: Mapping[str, Tensor]) -> str:
    return merkle_root((name, tensor_digest(name, tensor)) for name, tensor in tensors.items()).hex()


def _sync_folder(folder: Path) -> None:
    """Make sure that the new name is on the disk, where the system can do that."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
