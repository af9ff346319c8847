"""Parts of the model that this side needs, fetched from a cloud that is not trusted.

Names come from a fixed list, sizes are capped before a byte is asked for, and a file gets its name
only after its SHA-256 has been checked. A broken transfer leaves a ``.partial`` file that the next
one continues. Everything lies in ``<cache>/edge/<digest of the manifest>``; nothing else is written.
"""

import hashlib
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import CONFIG_MAPPING, GenerationConfig, PreTrainedConfig

from shared.cache import cache_folder, locked, progress_bar
from shared.checkpoint import DTYPES, SIZE_LIMITS, ModelError, read_json
from shared.edge_parts import (
    TENSORS_FILE,
    EdgePart,
    EdgePartsError,
    check_tensors_file,
    layer_file,
    parts_of,
)
from shared.families import FAMILIES, Geometry, UnsupportedModelError, geometry
from shared.fingerprint import edge_digest
from shared.plan import Plan
from shared.tensor_file import TensorFileError, read_header

# What this side needs of config.json; the rest describes layers, which run elsewhere, or names code.
CONFIG_KEYS = (
    *SIZE_LIMITS,
    *("rms_norm_eps", "tie_word_embeddings", "final_logit_softcapping", "sliding_window", "layer_types"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)
# What else of it says how a decoder layer computes: numbers and names of known functions, see `_is_plain`.
LAYER_KEYS = (
    *("hidden_act", "hidden_activation", "attention_bias", "mlp_bias", "attn_logit_softcapping"),
    *("query_pre_attn_scalar", "rope_parameters", "rope_theta", "rope_scaling", "rope_local_base_freq"),
    *("partial_rotary_factor", "original_max_position_embeddings", "use_sliding_window", "max_window_layers"),
)
PLAIN_TEXT = re.compile(r"[a-z0-9_]{1,40}")
# What of generation_config.json is honoured: numbers that steer sampling, and where to stop.
GENERATION_KEYS = {
    "bos_token_id": (0, 1 << 24),
    "eos_token_id": (0, 1 << 24),
    "pad_token_id": (0, 1 << 24),
    "do_sample": (0, 1),
    "temperature": (0.0, 100.0),
    "top_k": (0, 1 << 24),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0),
}


class Source(Protocol):
    """What is needed of `edge_client.connection.Connection`."""

    def fetch_part(self, index: int, offset: int = 0) -> Iterator[bytes]:
        """Yield a part's bytes from ``offset`` on."""


def fetch(
    source: Source,
    manifest: Sequence[EdgePart],
    cache_dir: Path | None = None,
    *,
    plan: Plan | None = None,
    progress: bool = True,
) -> Path:
    """Return a folder that holds exactly the parts that are needed, fetching what is missing.

    Parameters
    ----------
    source
        The connection.
    manifest
        Parts that `shared.edge_parts.check_manifest` has accepted, in the cloud's order.
    cache_dir
        The cache folder.
    plan
        Says which decoder layers run here; None is all that there are parts of.
    progress
        Whether to show a bar on stderr.

    Raises
    ------
    EdgePartsError
        If the cloud sends too much, too little or other bytes than the manifest says; or the disk is full.
    """
    needed = list(manifest) if plan is None else parts_of(plan, manifest)
    return _fetch_these(source, manifest, needed, cache_dir, progress)


def fetch_config(source: Source, manifest: Sequence[EdgePart], cache_dir: Path | None = None) -> Path:
    """Return a folder that holds config.json alone: all that is needed to know a model's sizes.

    Raises
    ------
    EdgePartsError
        As `fetch`.
    """
    needed = [part for part in manifest if part.name == "config.json"]
    return _fetch_these(source, manifest, needed, cache_dir, progress=False)


def _fetch_these(
    source: Source,
    manifest: Sequence[EdgePart],
    needed: Sequence[EdgePart],
    cache_dir: Path | None,
    progress: bool,
) -> Path:
    folder = cache_folder(cache_dir) / "edge" / edge_digest(needed).hex()
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / "parts"):
        numbered = [(i, part) for i, part in enumerate(manifest) if part in needed]
        missing = [(i, part) for i, part in numbered if not _is_verified(folder / part.name, part)]
        total = sum(part.size for _, part in missing)
        if total > shutil.disk_usage(folder).free:
            raise EdgePartsError(f"{folder} has no room for {total} bytes; free some, or set --cache-dir")
        if missing:
            with progress_bar("Fetching this side's parts of the model", total, progress) as advance:
                for index, part in missing:
                    _fetch_one(source, index, part, folder, advance)
    return folder


def _is_verified(path: Path, part: EdgePart) -> bool:
    """Whether ``path`` is the part; read in full each time, so that a damaged cache is noticed."""
    if path.is_symlink() or not path.is_file() or path.stat().st_size != part.size:
        return False
    return _sha256(path) == part.sha256


def _sha256(path: Path) -> bytes:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.digest()


def _fetch_one(
    source: Source, index: int, part: EdgePart, folder: Path, advance: Callable[[int], object]
) -> None:
    partial = folder / f"{part.name}.partial"
    if partial.is_symlink():
        partial.unlink()
    resumed = partial.is_file() and partial.stat().st_size <= part.size
    _append(source, index, part, partial, advance, afresh=not resumed)
    if resumed and _sha256(partial) != part.sha256:
        advance(-part.size)  # what was left over may have been damaged: once more, from the start
        _append(source, index, part, partial, advance, afresh=True)
    if _sha256(partial) != part.sha256:
        partial.unlink()
        raise EdgePartsError(f"{part.name}: the cloud sent other bytes than it announced (SHA-256)")
    partial.replace(folder / part.name)


def _append(
    source: Source,
    index: int,
    part: EdgePart,
    partial: Path,
    advance: Callable[[int], object],
    *,
    afresh: bool,
) -> None:
    with partial.open("wb" if afresh else "ab") as file:
        left = part.size - file.tell()
        advance(part.size - left)
        if left == 0:
            return
        for piece in source.fetch_part(index, part.size - left):
            if not piece:
                raise EdgePartsError(f"{part.name}: the cloud sends empty pieces")  # it might do so forever
            left -= len(piece)
            if left < 0:
                raise EdgePartsError(
                    f"{part.name}: the cloud sends more than the announced {part.size} bytes"
                )
            file.write(piece)
            advance(len(piece))
            if left == 0:
                return
    raise EdgePartsError(f"{part.name}: the cloud stopped {left} bytes early; start again to continue there")


def read_config(folder: Path) -> tuple[PreTrainedConfig, Geometry]:
    """Build the model's configuration from the few listed keys of config.json.

    Raises
    ------
    EdgePartsError
        If the file is malformed, names code, or states sizes out of bounds.
    """
    try:
        raw = read_json(folder / "config.json")
        family = raw.get("model_type")
        if not isinstance(family, str) or family not in FAMILIES:
            raise EdgePartsError(f"config.json: model type {str(family)[:60]!r} is not supported")
        chosen = {key: raw[key] for key in CONFIG_KEYS if raw.get(key) is not None}
        for key, value in chosen.items():
            _check_value(key, value, int(raw.get("num_hidden_layers", 0)))
        for key in LAYER_KEYS:
            if (value := raw.get(key)) is None:
                continue
            if not _is_plain(value, depth=2):
                raise EdgePartsError(f"config.json: {key} is nothing that a supported model has")
            chosen[key] = value
        config = CONFIG_MAPPING[family](**chosen)
        return config, geometry(config)
    except (ModelError, UnsupportedModelError) as error:
        raise EdgePartsError(str(error)) from None
    except EdgePartsError:
        raise
    except Exception as error:  # transformers validates with many exception types
        raise EdgePartsError(
            f"config.json is not valid: {type(error).__name__}: {str(error)[:200]}"
        ) from None


def _is_plain(value: Any, depth: int) -> bool:
    """Whether a value is a number, a short name, or a small table of such."""
    if isinstance(value, dict):
        named = all(isinstance(key, str) and PLAIN_TEXT.fullmatch(key) for key in value)
        return (
            depth > 0 and len(value) <= 16 and named and all(_is_plain(v, depth - 1) for v in value.values())
        )
    if isinstance(value, str):
        return PLAIN_TEXT.fullmatch(value) is not None
    return value is None or (isinstance(value, int | float) and math.isfinite(value) and abs(value) < 1e12)


def _check_value(key: str, value: Any, layers: int) -> None:
    limit = SIZE_LIMITS.get(key, 1 << 28)
    if key == "layer_types":
        good = isinstance(value, list) and len(value) == layers and all(isinstance(v, str) for v in value)
    elif key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = value if isinstance(value, list) else [value]
        good = len(ids) <= 64 and all(type(v) is int and -1 <= v <= limit for v in ids)
    elif key == "tie_word_embeddings":
        good = isinstance(value, bool)
    elif key in ("rms_norm_eps", "final_logit_softcapping"):
        good = type(value) in (int, float) and 0 < value < 1e6
    else:
        good = type(value) is int and 1 <= value <= limit
    if not good:
        raise EdgePartsError(f"config.json: {key} is {str(value)[:60]}, which no supported model has")


def read_generation_config(folder: Path, config: PreTrainedConfig) -> GenerationConfig:
    """Return generation defaults: listed numbers only, the rest as transformers has it."""
    given: dict[str, Any] = {
        key: getattr(config, key, None) for key in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    if (folder / "generation_config.json").is_file():
        try:
            raw = read_json(folder / "generation_config.json")
        except ModelError as error:
            raise EdgePartsError(str(error)) from None
        for key, (low, high) in GENERATION_KEYS.items():
            value = raw.get(key)
            for number in value if isinstance(value, list) else [value]:
                if number is None:
                    continue
                if type(number) not in (int, float, bool) or not low <= number <= high:
                    raise EdgePartsError(f"generation_config.json: {key} must be {low} to {high}")
            if isinstance(value, list) and (key != "eos_token_id" or len(value) > 64):
                raise EdgePartsError(f"generation_config.json: {key} must be one number")
            if value is not None:
                given[key] = value
    if not given.get("do_sample"):  # transformers warns of sampling values that greedy search ignores
        given = {k: v for k, v in given.items() if k not in ("temperature", "top_k", "top_p", "min_p")}
    return GenerationConfig(**given)  # type: ignore[no-untyped-call]


def read_tensors(folder: Path, sizes: Geometry) -> dict[str, Tensor]:
    """Read the tensors, after their header has been compared with the configuration.

    Returns
    -------
    dict
        ``embed_tokens.weight``, ``norm.weight`` and, if not tied, ``lm_head.weight``, as stored.

    Raises
    ------
    EdgePartsError
        If a name, shape or dtype is not the expected one.
    """
    header = check_tensors_file(
        folder / TENSORS_FILE,
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        tied_head=sizes.tied_head,
    )
    with safe_open(folder / TENSORS_FILE, framework="pt") as reader:
        return {name: reader.get_tensor(name) for name in header.tensors}


def read_layer(folder: Path, layer: int, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Read a decoder layer, after its header has been compared with the shapes that the model's code has.

    Raises
    ------
    EdgePartsError
        If a name, shape or dtype is not the expected one, or a value is not finite.
    """
    return read_exact(folder / layer_file(layer), shapes)


def read_exact(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Read a file that holds exactly these tensors, floating point and finite.

    Raises
    ------
    EdgePartsError
        If it does not.
    """
    try:
        header = read_header(path, max_header_bytes=1 << 16)
    except TensorFileError as error:
        raise EdgePartsError(str(error)) from None
    found = {name: info.shape for name, info in header.tensors.items()}
    if found != dict(shapes):
        differing = sorted(set(found.items()) ^ set(shapes.items()))[0][0]
        raise EdgePartsError(
            f"{path}: {differing} is missing, unknown or of another shape than config.json says"
        )
    if any(info.dtype not in DTYPES for info in header.tensors.values()):
        raise EdgePartsError(f"{path}: expected tensors of {', '.join(DTYPES)}")
    with safe_open(path, framework="pt") as reader:
        tensors = {name: reader.get_tensor(name) for name in header.tensors}
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor.sum(dtype=torch.float64)):
            raise EdgePartsError(f"{path}: {name} holds NaN or infinity; these parts are damaged or hostile")
    return tensors
