"""The adapter file: someone's personal weights M, and what they were made for.

A safetensors file, mode 0600, with one tensor per owner (`Plan.owners`), ``layers.{l}.M`` (G, r_c2d, r_d2c)
float32, the LoRA factors of layers on the edge (`shared.lora`), and one metadata entry that holds JSON:
format version, name, creation time, plan, fingerprint and a digest of the tensors. `Adapter.load` accepts
exactly that. Nothing in the file is code, and nothing is allocated before the sizes in it are checked
against the file's own size.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError
from safetensors.torch import save
from torch import Tensor

from shared.cache import replacing
from shared.fingerprint import Fingerprint, merkle_root, plan_digest, tensor_digest
from shared.lora import factor_shapes, zero_factors
from shared.plan import Plan
from shared.tensor_file import TensorFileError, check_tensors, read_float32, read_header

FORMAT_VERSION = 1
METADATA_KEY = "privatelora_adapter"
MAX_HEADER_BYTES = 2 * 1024 * 1024  # the entries of 4096 layers take 0.4 MiB, the metadata is capped below
MAX_FILE_BYTES = 2 * 1024**3  # a 70B model at r = 512, per projection, has 0.25 GiB
MAX_METADATA_CHARS = 256 * 1024  # plans with many layers and a training summary

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class AdapterError(ValueError):
    """An adapter that is malformed, truncated, hostile, or not what was asked for."""


class Branches(BaseModel):
    """The fingerprint's branches, SHA-256 in hex."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    plan: Digest = Field(description="Digest of the plan's canonical JSON (hex)")
    lowrank: Digest = Field(description="Digest of A and B (hex)")
    layers: Digest = Field(description="Digest of the decoder layers (hex)")
    edge: Digest = Field(description="Digest of the edge parts (hex)")


class Metadata(BaseModel):
    """What the adapter file says about itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = Field(description="Version of this file format (count)")
    name: str = Field(pattern=r"^[^\x00-\x1f\x7f]{1,128}$", description="What its owner calls it")
    created: str = Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$", description="When it was made (UTC)")
    plan: Plan = Field(description="The split that it was made for")
    fingerprint: Branches = Field(description="The model that it was made for, as digests (hex)")
    root: Digest = Field(description="SHA-256 over the fingerprint's branches (hex)")
    matrices: Digest = Field(description="Merkle root over the tensors, against silent damage (hex)")
    training: dict[str, JsonValue] | None = Field(default=None, description="Summary of how it was tuned")


def _now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass
class Adapter:
    """Personal weights: one M of shape (G, r_c2d, r_d2c), float32, for each owner of ``plan``.

    ``factors`` are the LoRA factors of its resident layers, by name (`shared.lora`), float32.
    """

    plan: Plan
    fingerprint: Fingerprint
    matrices: dict[int, Tensor] = field(repr=False)
    name: str = "unnamed"
    created: str = field(default_factory=_now)
    training: Mapping[str, JsonValue] | None = None
    factors: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def zeros(cls, plan: Plan, fingerprint: Fingerprint, name: str = "unnamed") -> "Adapter":
        """Return an adapter that changes nothing."""
        shape = m_shape(plan)
        matrices = {layer: torch.zeros(shape) for layer in plan.owners}
        return cls(plan, fingerprint, matrices, name, factors=zero_factors(plan))

    @classmethod
    def random(
        cls, plan: Plan, fingerprint: Fingerprint, seed: int, std: float, name: str = "random"
    ) -> "Adapter":
        """Return an adapter with M and factors ~ N(0, std^2), for tests and benchmarks."""
        generator = torch.Generator().manual_seed(seed)
        shape = m_shape(plan)
        matrices = {layer: torch.randn(shape, generator=generator) * std for layer in plan.owners}
        factors = {
            key: torch.randn(shape, generator=generator) * std for key, shape in factor_shapes(plan).items()
        }
        return cls(plan, fingerprint, matrices, name, factors=factors)

    def save(self, path: Path | str) -> None:
        """Write the file, readable by its owner only, replacing ``path`` in one step or not at all.

        Raises
        ------
        AdapterError
            If a matrix is missing, of another shape or dtype, or not finite, or a text is unfit.
        """
        path = Path(path)
        if tuple(sorted(self.matrices)) != self.plan.owners:
            raise AdapterError(
                f"M is given for layers {sorted(self.matrices)}, the plan adapts {self.plan.adapted_layers} "
                f"and has one for {self.plan.owners}"
            )
        tensors = {f"layers.{layer}.M": matrix for layer, matrix in self.matrices.items()} | self.factors
        expected = tensor_shapes(self.plan)
        if tensors.keys() != expected.keys():
            raise AdapterError("the LoRA factors given are not those of the plan's resident layers")
        for name, tensor in tensors.items():
            if tuple(tensor.shape) != expected[name] or tensor.dtype != torch.float32:
                raise AdapterError(
                    f"{name} is {tensor.dtype} {tuple(tensor.shape)}, expected float32 {expected[name]}"
                )
            if not torch.isfinite(tensor).all():
                raise AdapterError(f"{name} holds NaN or Inf; training diverged?")
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        try:
            metadata = Metadata(
                format_version=FORMAT_VERSION,
                name=self.name,
                created=self.created,
                plan=self.plan,
                fingerprint=Branches(**self.fingerprint.to_hex()),
                root=self.fingerprint.root.hex(),
                matrices=_digest(tensors),
                training=dict(self.training) if self.training is not None else None,
            )
        except ValidationError as error:
            raise AdapterError(f"cannot be saved: {_first(error)}") from None
        text = metadata.model_dump_json()
        if len(text) > MAX_METADATA_CHARS:
            raise AdapterError(
                f"metadata has {len(text)} characters, at most {MAX_METADATA_CHARS}: shorten `training`"
            )
        with replacing(path) as file:
            file.write(save(tensors, metadata={METADATA_KEY: text}))

    @classmethod
    def load(cls, path: Path | str) -> "Adapter":
        """Read an adapter file.

        Raises
        ------
        AdapterError
            If the file is anything but a complete, well-formed adapter; the message says what is
            wrong, what was expected and what to do.
        """
        path = Path(path)
        try:
            size = path.stat().st_size
        except OSError as error:
            raise AdapterError(f"cannot read adapter {path}: {error.strerror}") from None
        if size > MAX_FILE_BYTES:
            raise AdapterError(f"{path} has {size} bytes; an adapter has at most {MAX_FILE_BYTES}")
        try:
            header = read_header(path, max_header_bytes=MAX_HEADER_BYTES)
        except TensorFileError as error:
            raise AdapterError(f"not an adapter: {error}") from None
        metadata = _metadata(path, header.metadata)
        plan = metadata.plan
        expected = tensor_shapes(plan)
        try:
            check_tensors(path, header.tensors, expected, f"an adapter for plan {plan.name!r}")
        except TensorFileError as error:
            raise AdapterError(f"{error}; the file was altered or made by another program") from None
        # The ranges in the header fill the file exactly, so what is read now is no larger than the file.
        tensors = {name: read_float32(info) for name, info in header.tensors.items()}
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise AdapterError(f"{path}: {name} holds NaN or Inf; restore the file from a copy")
        if _digest(tensors) != metadata.matrices:
            raise AdapterError(
                f"{path} is damaged: what it holds does not match its digest; restore it from a copy"
            )
        return cls(
            plan=plan,
            fingerprint=_fingerprint(metadata),
            matrices={layer: tensors[f"layers.{layer}.M"] for layer in plan.owners},
            name=metadata.name,
            created=metadata.created,
            training=metadata.training,
            factors={name: tensors[name] for name in factor_shapes(plan)},
        )


def tensor_shapes(plan: Plan) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor of an adapter for ``plan``."""
    matrices: dict[str, tuple[int, ...]] = {f"layers.{layer}.M": m_shape(plan) for layer in plan.owners}
    return matrices | factor_shapes(plan)


def m_shape(plan: Plan) -> tuple[int, int, int]:
    """Return the shape of one owner's M: (G, r_c2d, r_d2c)."""
    return plan.groups, plan.r_c2d, plan.r_d2c


def _digest(tensors: Mapping[str, Tensor]) -> str:
    return merkle_root((name, tensor_digest(name, tensor)) for name, tensor in tensors.items()).hex()


def _metadata(path: Path, entries: Mapping[str, str]) -> Metadata:
    text = entries.get(METADATA_KEY)
    if text is None:
        raise AdapterError(
            f"{path} has no {METADATA_KEY} metadata: a safetensors file, but not an adapter of this project"
        )
    if len(entries) > 1 or len(text) > MAX_METADATA_CHARS:
        raise AdapterError(f"{path}: expected one metadata entry of at most {MAX_METADATA_CHARS} characters")
    try:
        metadata = Metadata.model_validate_json(text)
    except ValidationError as error:
        raise AdapterError(
            f"{path}: bad adapter metadata: {_first(error)}. Format version {FORMAT_VERSION} is expected; a "
            "newer file needs a newer release of this program"
        ) from None
    fingerprint = _fingerprint(metadata)
    if fingerprint.root.hex() != metadata.root:
        raise AdapterError(
            f"{path}: fingerprint root and branches contradict each other; the file was altered"
        )
    if plan_digest(metadata.plan) != fingerprint.plan:
        raise AdapterError(f"{path}: plan and fingerprint contradict each other; the file was altered")
    return metadata


def _fingerprint(metadata: Metadata) -> Fingerprint:
    branches: dict[str, str] = metadata.fingerprint.model_dump()
    return Fingerprint(**{name: bytes.fromhex(text) for name, text in branches.items()})


def _first(error: ValidationError) -> str:
    """Return what is wrong first, without the value that is wrong."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    return f"{'.'.join(map(str, first['loc'])) or 'metadata'}: {first['msg']}"[:300]
