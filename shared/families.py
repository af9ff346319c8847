"""Model families that can be split, and the geometry that a split needs to know.

The one place that knows family names. Anything not known to work is refused by name, because a
feature that is silently ignored (a soft cap, a window, a rotary scheme) gives wrong tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

# Rotary schemes whose frequencies do not depend on the length of the sequence at hand. The others
# (dynamic, longrope) change the rotation of cached keys, which plain Hugging Face decoding itself
# only approximates.
STATIC_ROPE = frozenset({"default", "linear", "llama3", "yarn"})

FAMILIES: Mapping[str, str] = {
    "llama": "Llama, SmolLM",
    "mistral": "Mistral",
    "qwen2": "Qwen 2 / 2.5",
    "qwen3": "Qwen 3",
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3 (text)",
    "phi3": "Phi-3",
}


class UnsupportedModelError(ValueError):
    """A model that would not run exactly; the message names what is missing."""


@dataclass(frozen=True)
class Geometry:
    """Sizes of a decoder, all in elements or counts.

    ``windows[layer]`` is the sliding window of a layer in positions, None for full attention.
    ``has_head_norms``: queries and keys are normed head by head; ``has_sandwich_norms``: a layer norms what
    it adds as well; ``has_attention_cap``: its attention bounds the logits.
    """

    model_type: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    tied_head: bool
    windows: tuple[int | None, ...]
    has_head_norms: bool
    has_sandwich_norms: bool
    has_attention_cap: bool

    @property
    def q_dim(self) -> int:
        """Width of the query projection's output."""
        return self.num_heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        """Width of the key projection's output; the value projection's is the same."""
        return self.num_kv_heads * self.head_dim

    def out_dim(self, target: str) -> int:
        """Return the output width of projection ``target`` (q, k or v)."""
        return self.q_dim if target == "q" else self.kv_dim


def check_supported(config: PreTrainedConfig) -> None:
    """Refuse what this project cannot run exactly.

    Raises
    ------
    UnsupportedModelError
        Naming the family or feature that is missing.
    """
    family = config.model_type
    if family not in FAMILIES:
        known = ", ".join(f"{name} ({label})" for name, label in FAMILIES.items())
        raise UnsupportedModelError(f"model type {family!r} is not supported; supported: {known}")
    for layer_type, rope in rope_parameters(config).items():
        kind = rope.get("rope_type", "default")
        if not isinstance(kind, str):
            raise UnsupportedModelError(
                f"the rotary scheme ({layer_type}) must be a name, got {type(kind).__name__}; supported: "
                f"{', '.join(sorted(STATIC_ROPE))}"
            )
        if kind not in STATIC_ROPE:
            raise UnsupportedModelError(
                f"rotary scheme {kind!r} ({layer_type}) depends on the sequence length and is not supported; "
                f"supported: {', '.join(sorted(STATIC_ROPE))}"
            )
    unknown_types = set(layer_types(config)) - {"full_attention", "sliding_attention"}
    if unknown_types:
        raise UnsupportedModelError(f"attention of type {sorted(unknown_types)} is not supported")
    if getattr(config, "use_bidirectional_attention", None):
        raise UnsupportedModelError("bidirectional attention is not supported: a decoder must be causal")
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModelError(
            "a quantised checkpoint cannot be split: its products are not plain matrices. Use the unquantised"
            " checkpoint, or a GGUF file (dequantised on load)"
        )


def layer_types(config: PreTrainedConfig) -> tuple[str, ...]:
    """Return the attention type of each layer, as the family's own code decides it."""
    given = getattr(config, "layer_types", None)
    if given is not None:
        return tuple(given)
    windowed = config.model_type in ("mistral", "phi3") and getattr(config, "sliding_window", None)
    kind = "sliding_attention" if windowed else "full_attention"
    return (kind,) * int(config.num_hidden_layers)


def rope_parameters(config: PreTrainedConfig) -> dict[str, dict[str, Any]]:
    """Return the rotary parameters by layer type; families with one scheme have one entry, "all"."""
    given = getattr(config, "rope_parameters", None) or {}
    if given and all(isinstance(value, dict) for value in given.values()):
        return dict(given)
    return {"all": dict(given)}


def geometry(config: PreTrainedConfig) -> Geometry:
    """Return the sizes of the decoder that ``config`` describes.

    Raises
    ------
    UnsupportedModelError
        If the family is not supported, or sizes contradict each other.
    """
    check_supported(config)
    heads, kv_heads = int(config.num_attention_heads), int(config.num_key_value_heads)
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise UnsupportedModelError(f"{heads} query heads cannot share {kv_heads} key/value heads evenly")
    window = getattr(config, "sliding_window", None)
    types = layer_types(config)
    if len(types) != config.num_hidden_layers:
        raise UnsupportedModelError(f"{len(types)} layer types for {config.num_hidden_layers} layers")
    return Geometry(
        model_type=config.model_type,
        num_layers=int(config.num_hidden_layers),
        hidden_size=int(config.hidden_size),
        intermediate_size=int(config.intermediate_size),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
        vocab_size=int(config.vocab_size),
        max_positions=int(config.max_position_embeddings),
        tied_head=bool(config.tie_word_embeddings),
        windows=tuple(int(window) if kind == "sliding_attention" and window else None for kind in types),
        has_head_norms=config.model_type in ("qwen3", "gemma3_text"),
        has_sandwich_norms=config.model_type.startswith("gemma"),
        has_attention_cap=getattr(config, "attn_logit_softcapping", None) is not None,
    )
