"""What a fetched model's settings may say: a few listed keys of two JSON files from a stranger.

What is not listed is not read: it describes layers that run elsewhere, or names code. What is listed is a
number, a flag or the name of a known function, within bounds, or the file is refused.
"""

import math
import re
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, GenerationConfig, PreTrainedConfig

from shared.checkpoint import SIZE_LIMITS, ModelError, read_json
from shared.edge_parts import EdgePartsError
from shared.families import FAMILIES, Geometry, UnsupportedModelError, geometry

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
