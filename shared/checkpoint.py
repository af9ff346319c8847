"""A checkpoint: a folder with config.json and safetensors files, read tensor by tensor.

Opening one reads the config and the headers only; `Checkpoint.load` then reads the tensors that a
side needs and no others. No code from a checkpoint is ever run: `auto_map` and pickle are refused.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import CONFIG_MAPPING, PreTrainedConfig

from shared.cache import progress_bar
from shared.families import Geometry, geometry
from shared.plan import Projection
from shared.tensor_file import TensorFileError, TensorInfo, read_header

# What an edge needs besides its tensors; nothing else of a model folder is ever sent or used.
EDGE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
MAX_CONFIG_BYTES = 4 * 1024 * 1024  # tokenizer_config.json with many added tokens reaches 1 MiB
MAX_TOKENIZER_BYTES = 128 * 1024 * 1024  # the largest tokenizer.json (Gemma's) has 33 MB

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
PREFIXES = ("model.", "language_model.model.", "model.language_model.", "")
INDEX = "model.safetensors.index.json"

# config.json keys that choose code rather than numbers. transformers fetches kernels from a hub
# when an attention implementation is written like a repository id.
CODE_KEYS = ("auto_map", "custom_pipelines", "trust_remote_code")
IMPLEMENTATION_KEYS = ("attn_implementation", "experts_implementation")
SIZE_LIMITS = {
    "num_hidden_layers": 4096,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 22,
    "num_attention_heads": 1 << 14,
    "num_key_value_heads": 1 << 14,
    "head_dim": 1 << 16,
    "vocab_size": 1 << 24,
    "max_position_embeddings": 1 << 28,
}


class ModelError(ValueError):
    """A model that cannot be found, read or trusted; the message says what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint. ``tensors`` comes from headers; no weight has been read.

    ``prefix`` is what precedes ``layers.0...`` in this checkpoint's tensor names.
    """

    id: str
    folder: Path
    config: PreTrainedConfig
    tensors: Mapping[str, TensorInfo] = field(repr=False)
    prefix: str = "model."

    @property
    def geometry(self) -> Geometry:
        """The sizes of the decoder."""
        return geometry(self.config)

    def layer_tensors(self, layer: int) -> dict[str, str]:
        """Return, for one decoder layer, each tensor's name within the layer and in the checkpoint."""
        start = f"{self.prefix}layers.{layer}."
        # inv_freq: old Llama exports stored this buffer; the config alone decides it.
        return {
            name[len(start) :]: name
            for name in sorted(self.tensors)
            if name.startswith(start) and not name.endswith("rotary_emb.inv_freq")
        }

    def projections(self) -> tuple[Projection, ...]:
        """Return the products of a decoder layer, by the shapes of its weights: all may get a LoRA."""
        shapes = {local: self.tensors[name].shape for local, name in self.layer_tensors(0).items()}
        return tuple(
            Projection(name=local.removesuffix(".weight"), d_in=shape[1], d_out=shape[0])
            for local, shape in shapes.items()
            if local.endswith(".weight") and len(shape) == 2
        )

    def edge_tensors(self) -> dict[str, str]:
        """Return the edge's tensors: local name to name in the checkpoint; no head where it is tied."""
        found = {local: self.prefix + local for local in ("embed_tokens.weight", "norm.weight")}
        if not self.geometry.tied_head:
            found["lm_head.weight"] = self.head_name()
        return found

    def head_name(self) -> str:
        """Return the name of the head's weight, present in the checkpoint or not."""
        return "language_model.lm_head.weight" if self.prefix == "language_model.model." else "lm_head.weight"

    def tokenizer_files(self) -> list[Path]:
        """Return the files of `EDGE_FILES` that exist, in that order."""
        return [self.folder / name for name in EDGE_FILES if (self.folder / name).is_file()]

    def load(
        self,
        names: Iterable[str],
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        progress: bool = False,
    ) -> dict[str, torch.Tensor]:
        """Read tensors by their names in the checkpoint.

        Returns tensors that own their memory (aligned, not mapped from the file), cast to ``dtype``
        where one is given.

        Raises
        ------
        ModelError
            If a name is not in the checkpoint, or is stored in a quantised or integer dtype, or a file
            cannot be read.
        """
        by_file: dict[Path, list[str]] = {}
        for name in names:
            info = self.tensors.get(name)
            if info is None:
                raise ModelError(f"{self.id} has no tensor {name!r}; is the checkpoint complete?")
            if info.dtype not in DTYPES:
                raise ModelError(f"{name} is stored as {info.dtype}; expected one of {', '.join(DTYPES)}")
            by_file.setdefault(info.file, []).append(name)
        total = sum(self.tensors[name].size for group in by_file.values() for name in group)
        loaded: dict[str, torch.Tensor] = {}
        with progress_bar(f"Loading {self.id}", total, progress) as advance:
            for file, group in by_file.items():
                try:
                    with safe_open(file, framework="pt") as reader:
                        for name in group:
                            stored = self._read(reader, name)
                            loaded[name] = stored.to(device=device, dtype=dtype or stored.dtype, copy=True)
                            advance(self.tensors[name].size)
                except (SafetensorError, UnicodeError) as error:  # the header was ours to check: it changed?
                    raise ModelError(
                        f"{file} cannot be read ({_brief(error)}); fetch or make it again"
                    ) from None
        return loaded

    def _read(self, reader: Any, name: str) -> torch.Tensor:
        """Return a tensor of the open file that holds it, as it is stored."""
        found: torch.Tensor = reader.get_tensor(name)
        return found


def open_folder(folder: Path, model_id: str | None = None) -> Checkpoint:
    """Open the checkpoint in ``folder``; ``model_id`` defaults to the folder's name.

    Raises
    ------
    ModelError
        If the folder is not a complete checkpoint in safetensors.
    shared.families.UnsupportedModelError
        If the model's family cannot be split.
    """
    config = read_config(folder)
    sizes = geometry(config)
    for name in ("tokenizer_config.json", "generation_config.json"):
        if (folder / name).exists():
            read_json(folder / name)
    tensors = _tensors(folder)
    prefix = next((p for p in PREFIXES if p + "embed_tokens.weight" in tensors), None)
    if prefix is None:
        raise ModelError(f"{folder} has no embed_tokens.weight: not a decoder-only language model")
    checkpoint = Checkpoint(model_id or folder.resolve().name, folder, config, tensors, prefix)
    expected = {
        "embed_tokens.weight": (sizes.vocab_size, sizes.hidden_size),
        "norm.weight": (sizes.hidden_size,),
        "lm_head.weight": (sizes.vocab_size, sizes.hidden_size),
    }
    for local, name in checkpoint.edge_tensors().items():
        if name not in tensors:
            hint = " (config.json does not tie the head to the embeddings)" if "lm_head" in name else ""
            raise ModelError(f"{folder} has no tensor {name}{hint}; is the download complete?")
        if tensors[name].shape != expected[local]:
            raise ModelError(
                f"{folder}: {name} has shape {tensors[name].shape}, config.json says {expected[local]}"
            )
    held = {name[len(prefix) + 7 :].split(".")[0] for name in tensors if name.startswith(f"{prefix}layers.")}
    if lacking := [layer for layer in range(sizes.num_layers) if str(layer) not in held]:
        raise ModelError(
            f"{folder}: config.json says {sizes.num_layers} layers, tensors of {lacking[:5]} are missing"
        )
    return checkpoint


def read_config(folder: Path) -> PreTrainedConfig:
    """Read config.json without running anything it names.

    Raises
    ------
    ModelError
        If the file is missing, malformed, asks for remote code, or states impossible sizes.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(f"{folder} has no config.json; expected a Hugging Face model folder")
    raw = read_json(path)
    for key in IMPLEMENTATION_KEYS:  # this project chooses how attention is computed, not the file
        raw.pop(key, None)
        raw.pop(f"_{key}", None)
        raw.pop(f"_{key}_internal", None)
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise ModelError(f"{path}: model_type {_brief(model_type)} is not known to transformers")
    for key, limit in SIZE_LIMITS.items():
        value = raw.get(key)
        if value is not None and (type(value) is not int or not 1 <= value <= limit):
            raise ModelError(f"{path}: {key} must be an integer from 1 to {limit}, got {_brief(value)}")
    try:
        config = CONFIG_MAPPING[model_type].from_dict(raw)
    except Exception as error:  # transformers validates with many exception types
        raise ModelError(f"{path} is not a valid {model_type} config: {_brief(error)}") from None
    if not isinstance(config, PreTrainedConfig):
        raise ModelError(f"{path}: {model_type} has no model config in transformers")
    return config


def read_json(path: Path) -> dict[str, Any]:
    """Read one of the small JSON files of a model folder.

    Raises
    ------
    ModelError
        If it is too large, not a JSON object, or names code to run.
    """
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ModelError(f"{path} has {path.stat().st_size} bytes, at most {MAX_CONFIG_BYTES} accepted")
        raw = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{path} is not valid JSON") from None
    if not isinstance(raw, dict):
        raise ModelError(f"{path} must hold a JSON object")
    pending: list[Any] = [raw]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            if found := [key for key in CODE_KEYS if value.get(key)]:
                raise ModelError(
                    f"{path} names code to run ({found[0]}); code from a model is never run here. "
                    "Use a model whose family is part of transformers"
                )
            pending.extend(value.values())
        elif isinstance(value, list):
            pending.extend(value)
    return raw


def _brief(value: object) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 200 else text[:197] + "..."


def _tensors(folder: Path) -> dict[str, TensorInfo]:
    weight_map: Any = {}
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
            raise ModelError(f"{folder / INDEX}: weight_map must map tensor names to file names")
        names = sorted(set(weight_map.values()))
        for name in names:
            if name != os.path.basename(name) or not name.endswith(".safetensors") or "\\" in name:
                raise ModelError(f"{folder / INDEX} names {_brief(name)!r}: not a .safetensors file in it")
    else:
        names = ["model.safetensors"]
        if not (folder / names[0]).is_file():
            names = sorted(path.name for path in folder.glob("*.safetensors"))
    if not names:
        if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
            raise ModelError(
                f"{folder} holds only pickled weights, which can run code when they are read. Convert them "
                "to safetensors on a machine you can afford to lose: model.save_pretrained(folder)"
            )
        raise ModelError(f"{folder} has no *.safetensors file; is the download complete?")
    tensors: dict[str, TensorInfo] = {}
    for name in names:
        try:
            found = read_header(folder / name).tensors
        except TensorFileError as error:
            raise ModelError(str(error)) from None
        if both := tensors.keys() & found.keys():
            raise ModelError(f"{folder}: tensor {min(both)!r} is in two files")
        tensors.update(found)
    if lost := weight_map.keys() - tensors.keys():
        raise ModelError(f"{folder}: tensor {min(lost)!r} is in the index and in no file")
    return tensors
