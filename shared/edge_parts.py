"""The edge parts: the public files an edge needs, and the manifest that names them.

`build` writes them from a checkpoint: `edge.safetensors` (embeddings, final norm, and the head where
it is not tied, in their stored dtype) beside the allowlisted config and tokenizer files, and a
`layer-N.safetensors` for each decoder layer that some plan keeps on the edge, and a `codes-PLAN.safetensors`
for each plan whose first codes the edge makes itself. The same checkpoint always gives the same bytes, and a
plan's edge fetches and digests the parts of that plan alone. `check_manifest`
is the other side's first look at a manifest from a cloud it does not trust.
"""

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from shared.cache import cache_folder, file_sha256, locked, make_folder, progress_bar, slug
from shared.checkpoint import EDGE_FILES, MAX_CONFIG_BYTES, MAX_TOKENIZER_BYTES, Checkpoint, ModelError
from shared.merkle import tensor_digests
from shared.plan import Plan
from shared.tensor_file import Header, TensorFileError, TensorInfo, copy_tensors, pieces, read_header

log = logging.getLogger(__name__)

TENSORS_FILE = "edge.safetensors"
# Embeddings and head of the largest public vocabulary (262k x 8192), float32: 17 GB.
MAX_TENSORS_BYTES = 32 * 1024**3
MAX_LAYER_BYTES = 16 * 1024**3  # a layer of the largest public dense model (405B), float32: 13 GB
LAYOUT_VERSION = 1
LAYER_NAME = re.compile(r"layer-(0|[1-9][0-9]{0,3})\.safetensors")
CODES_NAME = re.compile(r"codes-[a-z0-9][a-z0-9._-]{0,63}\.safetensors")
CODES_NORM, CODES_A = "norm.weight", "A"  # what such a file holds


class EdgePartsError(ValueError):
    """Edge parts, or a manifest of them, that are not what an edge may accept."""


@dataclass(frozen=True)
class EdgePart:
    """One file: its name, size in bytes and SHA-256. ``path`` is None where the file is elsewhere."""

    name: str
    path: Path | None
    size: int
    sha256: bytes


def layer_file(layer: int) -> str:
    """Return the name of the part that holds one decoder layer."""
    return f"layer-{layer}.safetensors"


def codes_file(plan: Plan) -> str:
    """Return the name of the part that an edge makes the first codes of ``plan`` with."""
    return f"codes-{plan.name}.safetensors"


def common_parts(manifest: Sequence[EdgePart]) -> list[EdgePart]:
    """Return the parts that every plan needs."""
    return [part for part in manifest if not _is_of_some_plans(part.name)]


def digested_parts(plan: Plan, manifest: Sequence[EdgePart]) -> list[EdgePart]:
    """Return the parts that the fingerprint's edge branch of ``plan`` covers.

    That is `parts_of` without the file of the first codes. What it holds belongs to the branches of A/B and
    backbone, and a cloud that alters it gains nothing: it could as well have sent such codes itself.
    """
    return [part for part in parts_of(plan, manifest) if part.name != codes_file(plan)]


def parts_of(plan: Plan, manifest: Sequence[EdgePart]) -> list[EdgePart]:
    """Return the parts that an edge uses under ``plan``, in the manifest's order.

    Raises
    ------
    EdgePartsError
        If a layer that the plan keeps on the edge is not among them.
    """
    wanted = {layer_file(layer) for layer in plan.resident_layers}
    if lacking := sorted(wanted - {part.name for part in manifest}):
        raise EdgePartsError(f"edge part {lacking[0]} is missing, which plan {plan.name!r} needs")
    wanted.add(codes_file(plan))
    return [part for part in manifest if part.name in wanted or not _is_of_some_plans(part.name)]


def _is_of_some_plans(name: str) -> bool:
    """Whether a part is there for certain plans only."""
    return LAYER_NAME.fullmatch(name) is not None or CODES_NAME.fullmatch(name) is not None


def size_limit(name: str) -> int:
    """Return the most bytes that the part ``name`` may have."""
    if _is_of_some_plans(name):
        return MAX_LAYER_BYTES
    if name == TENSORS_FILE:
        return MAX_TENSORS_BYTES
    return MAX_TOKENIZER_BYTES if name == "tokenizer.json" else MAX_CONFIG_BYTES


def check_manifest(manifest: Sequence[EdgePart]) -> None:
    """Refuse a manifest with unknown, repeated, missing or oversized parts.

    Names are compared with a fixed list, so none can lead out of the folder they are kept in.

    Raises
    ------
    EdgePartsError
        Saying what is wrong.
    """
    names = [part.name for part in manifest]
    known = (TENSORS_FILE, *EDGE_FILES)
    if unknown := [name for name in names if name not in known and not _is_of_some_plans(name)]:
        raise EdgePartsError(
            f"unknown edge part {unknown[0][:80]!r}; known: {', '.join(known)}, layer-N and codes-PLAN files"
        )
    if len(set(names)) != len(names):
        raise EdgePartsError("an edge part is named twice")
    if missing := [name for name in (TENSORS_FILE, "config.json") if name not in names]:
        raise EdgePartsError(f"edge part {missing[0]} is missing")
    for part in manifest:
        if not 0 < part.size <= size_limit(part.name):
            raise EdgePartsError(
                f"edge part {part.name} has {part.size} bytes; expected 1 to {size_limit(part.name)}"
            )
        if len(part.sha256) != 32:
            raise EdgePartsError(f"edge part {part.name}: sha256 must be 32 bytes, got {len(part.sha256)}")


def check_tensors_file(path: Path, *, vocab_size: int, hidden_size: int, tied_head: bool) -> Header:
    """Check the header of an `edge.safetensors` against the sizes of config.json; read no tensor.

    Raises
    ------
    EdgePartsError
        If tensors are missing, unknown, of another shape or not floating point.
    """
    expected = {"embed_tokens.weight": (vocab_size, hidden_size), "norm.weight": (hidden_size,)}
    if not tied_head:
        expected["lm_head.weight"] = (vocab_size, hidden_size)
    try:
        header = read_header(path, max_header_bytes=1 << 16)
    except TensorFileError as error:
        raise EdgePartsError(str(error)) from None
    if header.tensors.keys() != expected.keys():
        raise EdgePartsError(f"{path} must hold exactly {', '.join(sorted(expected))}")
    for name, info in header.tensors.items():
        if info.dtype not in ("F32", "F16", "BF16", "F64") or info.shape != expected[name]:
            raise EdgePartsError(f"{path}: {name} is {info.dtype} {info.shape}, expected {expected[name]}")
    return header


def build(
    checkpoint: Checkpoint,
    cache_dir: Path | None = None,
    *,
    plans: Iterable[tuple[Plan, Path]] = (),
    progress: bool = False,
) -> list[EdgePart]:
    """Write the edge parts of ``checkpoint`` into the cache, once, and return their manifest.

    The config and tokenizer files are copied too, so that what was digested is what is served. ``plans``
    are those that are served, each with its A/B file.

    Raises
    ------
    ModelError
        If config.json ties head and embeddings which the checkpoint stores with different values,
        or a file is too large.
    """
    tensors = {local: checkpoint.tensors[name] for local, name in checkpoint.edge_tensors().items()}
    head = checkpoint.tensors.get(checkpoint.head_name())
    if checkpoint.geometry.tied_head and head is not None and not _same(head, tensors["embed_tokens.weight"]):
        raise ModelError(
            f"{checkpoint.folder}: config.json ties the head to the embeddings, but lm_head.weight has other "
            'values. Set "tie_word_embeddings": false in config.json if the head is meant'
        )
    files = {path.name: path for path in checkpoint.tokenizer_files()}
    for name, path in files.items():
        if not 0 < path.stat().st_size <= size_limit(name):
            raise ModelError(f"{path} has {path.stat().st_size} bytes; expected 1 to {size_limit(name)}")
    digests = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}

    def fill(draft: Path) -> None:
        for name, path in files.items():
            shutil.copyfile(path, draft / name)

    folder = _written(checkpoint, TENSORS_FILE, tensors, digests, fill, cache_dir, progress)
    paths = [folder / name for name in (*EDGE_FILES, TENSORS_FILE) if (folder / name).is_file()]
    served = list(plans)
    for layer in sorted({layer for plan, _ in served for layer in plan.resident_layers}):
        own = {local: checkpoint.tensors[name] for local, name in checkpoint.layer_tensors(layer).items()}
        name = layer_file(layer)
        paths.append(_written(checkpoint, name, own, {}, lambda _: None, cache_dir, progress) / name)
    for plan, lowrank in served:
        if plan.first_codes_on_edge:
            first, name = plan.exchange_layers[0], codes_file(plan)
            norm = checkpoint.layer_tensors(first)["input_layernorm.weight"]
            own = {
                CODES_NORM: checkpoint.tensors[norm],
                CODES_A: read_header(lowrank).tensors[f"layers.{first}.A"],
            }
            paths.append(_written(checkpoint, name, own, {}, lambda _: None, cache_dir, progress) / name)
    manifest = [EdgePart(p.name, p, p.stat().st_size, file_sha256(p, cache_dir)) for p in paths]
    check_manifest(manifest)
    return manifest


def _written(
    checkpoint: Checkpoint,
    name: str,
    tensors: Mapping[str, TensorInfo],
    beside: Mapping[str, str],
    fill_beside: Callable[[Path], None],
    cache_dir: Path | None,
    progress: bool,
) -> Path:
    """Return the folder of the file ``name`` with ``tensors``, and what else is to lie there, made once.

    The folder is named by its content; ``beside`` has the digests of the other files.
    """
    content = {tensor: digest.hex() for tensor, digest in tensor_digests(tensors, cache_dir).items()}
    text = json.dumps([LAYOUT_VERSION, name, content | dict(beside)], sort_keys=True)
    key = hashlib.sha256(text.encode()).hexdigest()[:32]

    def fill(draft: Path) -> None:
        fill_beside(draft)
        total = sum(info.size for info in tensors.values())
        with (
            progress_bar(f"Writing {name} of {checkpoint.id} for edges", total, progress) as advance,
            (draft / name).open("wb") as file,
        ):
            copy_tensors(file, tensors, advance)

    target = cache_folder(cache_dir) / "served" / f"{slug(checkpoint.id)}-{key}"
    folder = make_folder(target, fill)
    if not _holds(folder, name, content, beside, cache_dir):
        log.warning("%s is damaged, and is made again", folder)
        with locked(target):  # who waited here finds it made anew
            if not _holds(folder, name, content, beside, cache_dir):
                shutil.rmtree(folder, ignore_errors=True)
        make_folder(target, fill)
    return folder


def _holds(
    folder: Path, name: str, content: Mapping[str, str], beside: Mapping[str, str], cache_dir: Path | None
) -> bool:
    """Whether a folder holds what it is named by: every edge would trust what lies there now."""
    try:
        tensors = tensor_digests(read_header(folder / name).tensors, cache_dir)
        files = {other: hashlib.sha256((folder / other).read_bytes()).hexdigest() for other in beside}
    except (TensorFileError, OSError):
        return False
    return {tensor: digest.hex() for tensor, digest in tensors.items()} == content and files == dict(beside)


def _same(one: TensorInfo, other: TensorInfo) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return all(a == b for a, b in zip(pieces(one), pieces(other), strict=True))
