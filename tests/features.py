"""Features of model families that a careless split would get wrong, and the edit that removes each.

An edit changes a configuration and weights in place, so it applies to a plain model and to a served
folder alike. Knows nothing about particular families.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

WINDOW = 8  # positions; every prompt of tests/families.py is longer

Weights = dict[str, Tensor]
Config = dict[str, Any]


@dataclass(frozen=True)
class Feature:
    """Something a family does that a careless split would get wrong.

    ``off`` edits the configuration and the weights in place so that the feature is gone.
    ``shows_in`` says where that is seen: a soft cap on the final logits keeps their order, so it
    shows only when sampling. ``side`` says which process has to get it right.
    """

    name: str
    off: Callable[[Config, Weights], None]
    shows_in: Literal["greedy", "sampling"] = "greedy"
    side: Literal["cloud", "edge"] = "cloud"


def setting(**values: Any) -> Callable[[Config, Weights], None]:
    """Give fields of the configuration other values."""

    def off(config: Config, weights: Weights) -> None:
        config.update(values)

    return off


def neutral(fragment: str, value: float) -> Callable[[Config, Weights], None]:
    """Fill every tensor whose name contains ``fragment``, as if it had not been loaded."""

    def off(config: Config, weights: Weights) -> None:
        hit = [name for name in weights if fragment in name]
        assert hit, f"no tensor is called *{fragment}*"
        for name in hit:
            weights[name].fill_(value)

    return off


def _interleave_heads(config: Config, weights: Weights) -> None:
    """Give query head h the key/value head h mod n_kv, where the families use h // (n_q / n_kv)."""
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    order = torch.arange(heads).reshape(-1, kv_heads).T.flatten()  # (heads,)
    index = (order[:, None] * head_dim + torch.arange(head_dim)).flatten()  # (heads * head_dim,)
    for name, tensor in weights.items():
        if "q_proj" in name or "qkv_proj" in name:
            tensor[: len(index)] = tensor[index]
        elif "o_proj.weight" in name:
            tensor.copy_(tensor[:, index])


def _unscaled_embeddings(config: Config, weights: Weights) -> None:
    """Undo the factor sqrt(hidden_size) on the embeddings, but leave the tied head as it was."""
    embeddings = weights["model.embed_tokens.weight"]
    weights["lm_head.weight"] = embeddings.clone()
    embeddings.div_(config["hidden_size"] ** 0.5)
    config["tie_word_embeddings"] = False


def _swap_layer_types(config: Config, weights: Weights) -> None:
    other = {"full_attention": "sliding_attention", "sliding_attention": "full_attention"}
    config["layer_types"] = [other[kind] for kind in config["layer_types"]]


def _one_rope(config: Config, weights: Weights) -> None:
    rope = config["rope_parameters"]
    rope["sliding_attention"] = dict(rope["full_attention"])


def rope(**values: Any) -> Callable[[Config, Weights], None]:
    """Use other rotary parameters."""

    def off(config: Config, weights: Weights) -> None:
        config["rope_parameters"] = values

    return off


GQA = Feature("gqa_order", _interleave_heads)
NO_WINDOW = Feature("window", setting(sliding_window=4096))
OFF_BY_ONE = Feature("window_off_by_one", setting(sliding_window=WINDOW + 1))
LAYER_TYPES = Feature("layer_types", _swap_layer_types)
BIAS = Feature("bias", neutral("_proj.bias", 0.0))
NORMS = Feature("norms", neutral("layernorm.weight", 1.0))
GEMMA_NORMS = Feature("norms", neutral("layernorm.weight", 0.0))  # Gemma multiplies by 1 + weight
EMBED_SCALE = Feature("embedding_scale", _unscaled_embeddings, side="edge")
FINAL_CAP = Feature("final_softcap", setting(final_logit_softcapping=None), shows_in="sampling", side="edge")
QUERY_SCALE = Feature("query_pre_attn_scalar", setting(query_pre_attn_scalar=16))
ROPE_LOCAL = Feature("rope_local", _one_rope)
