"""Small random models of every supported family, in which every feature of the family matters.

A random model with default initialisation hides mistakes: its attention is nearly flat, its biases
are zero and its norms are ones, so a window, a soft cap or a bias that is ignored changes no token.
Here weights are scaled so that attention is peaked and nothing is neutral, and each family lists its
features (`tests/features.py`), each with the edit that switches it off. `tests/unit/test_families.py`
proves that every such edit changes the tokens, so a split path that ignored it would be caught.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from tests import features
from tests.features import WINDOW, Config, Feature
from tests.plans import lowrank_for, matrices_for, plan_for

__all__ = [
    "CASES", "CASE_IDS", "COMMON", "FAMILIES", "VOCAB", "WINDOW", "Family", "Feature", "build", "lowrank_for",
    "matrices_for", "plan_for", "prompts", "save", "tokenizer",
]  # fmt: skip

SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>")
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
VOCAB = len(SPECIALS) + len(BYTES)  # 260: any text can be encoded, no merges


@dataclass(frozen=True)
class Family:
    """How to build one family: configuration over the common one, features, and gains over `GAINS`."""

    model_type: str
    seed: int  # one whose greedy outputs are varied and far from ties
    config: Config
    features: tuple[Feature, ...]
    gains: Mapping[str, float] = field(default_factory=dict)


# --- the families -----------------------------------------------------------------------------------

COMMON: Config = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            "llama",
            7,
            {
                "tie_word_embeddings": True,
                "attention_bias": True,
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 10_000.0,
                    "factor": 4.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                },
            },
            (
                features.GQA,
                features.BIAS,
                features.NORMS,
                Feature("rope_scaling", features.rope(rope_type="default", rope_theta=10_000.0)),
            ),
        ),
        Family(
            "mistral",
            2,
            {"sliding_window": WINDOW, "head_dim": 16},
            (features.GQA, features.NO_WINDOW, features.OFF_BY_ONE, features.NORMS),
        ),
        Family(
            "qwen2",
            10,
            {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": MIXED},
            (
                features.GQA,
                features.NO_WINDOW,
                features.OFF_BY_ONE,
                features.LAYER_TYPES,
                features.BIAS,
                features.NORMS,
            ),
        ),
        Family(
            "qwen3",
            3,
            {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": MIXED, "head_dim": 16},
            (
                features.GQA,
                features.NO_WINDOW,
                features.LAYER_TYPES,
                features.NORMS,
                Feature("q_norm", features.neutral("q_norm.weight", 1.0)),
                Feature("k_norm", features.neutral("k_norm.weight", 1.0)),
            ),
            {"q_norm": 1.6, "k_norm": 1.6},
        ),
        Family(
            "gemma2",
            10,
            {
                "sliding_window": WINDOW,
                "layer_types": MIXED,
                "head_dim": 16,
                "query_pre_attn_scalar": 9,
                "attn_logit_softcapping": 2.0,
                "final_logit_softcapping": 10.0,
                "tie_word_embeddings": True,
            },
            (
                features.GQA,
                features.NO_WINDOW,
                features.OFF_BY_ONE,
                features.LAYER_TYPES,
                features.GEMMA_NORMS,
                features.EMBED_SCALE,
                features.QUERY_SCALE,
                features.FINAL_CAP,
                Feature("attention_softcap", features.setting(attn_logit_softcapping=None)),
            ),
        ),
        Family(
            "gemma3_text",
            5,
            {
                "sliding_window": WINDOW,
                "layer_types": MIXED,
                "head_dim": 16,
                "query_pre_attn_scalar": 9,
                "final_logit_softcapping": 10.0,
                "tie_word_embeddings": True,
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                },
            },
            (
                features.GQA,
                features.NO_WINDOW,
                features.OFF_BY_ONE,
                features.LAYER_TYPES,
                features.GEMMA_NORMS,
                features.EMBED_SCALE,
                features.QUERY_SCALE,
                features.FINAL_CAP,
                features.ROPE_LOCAL,
                Feature("q_norm", features.neutral("q_norm.weight", 0.0)),
                Feature("k_norm", features.neutral("k_norm.weight", 0.0)),
            ),
            {"q_norm": 1.3, "k_norm": 1.3},
        ),
        Family(
            "phi3",
            9,
            {
                "sliding_window": WINDOW,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10_000.0,
                    "partial_rotary_factor": 0.5,
                },
            },
            (
                features.GQA,
                features.NO_WINDOW,
                features.OFF_BY_ONE,
                features.NORMS,
                Feature(
                    "partial_rotary",
                    features.rope(rope_type="default", rope_theta=10_000.0, partial_rotary_factor=1.0),
                ),
            ),
        ),
    )
}

CASES = [(family.model_type, feature) for family in FAMILIES.values() for feature in family.features]
CASE_IDS = [f"{model_type}-{feature.name}" for model_type, feature in CASES]

# Standard deviation of a product's output for an input of variance one. Query and key gains make the
# attention scores spread by about 2.5, so that it matters which position is seen.
GAINS = {"q_proj": 1.6, "k_proj": 1.6, "qkv_proj": 1.4, "o_proj": 1.5, "down_proj": 1.5, "lm_head": 3.0}


def _randomise(model: PreTrainedModel, family: Family, generator: torch.Generator) -> None:
    """Fill every parameter in place; see the module's docstring for why."""
    gemma = family.model_type.startswith("gemma")
    gains = {**GAINS, **family.gains}

    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        gain = next((g for part, g in gains.items() if f".{part}." in f".{name}."), 1.0)
        if name == "model.norm.weight":
            # Random signs, or a tied head would find the last input token again and again.
            value = noise * (6.0 if gemma else 1.0)
        elif "norm" in name:
            value = gain * (1 + 0.3 * noise) - (1.0 if gemma else 0.0)
        elif name.endswith(".bias"):
            value = 0.4 * noise
        elif "embed_tokens" in name:
            value = 0.6 * noise / (parameter.shape[1] ** 0.5 if gemma else 1.0)
        else:
            value = gain * noise / parameter.shape[1] ** 0.5
        parameter.copy_(value)


@torch.no_grad()
def build(
    model_type: str, *, without: Feature | None = None, seed: int | None = None, **changes: Any
) -> PreTrainedModel:
    """Return a small fp32 model of the family in eval mode; equal arguments give equal bits.

    ``without`` switches one feature off and leaves the rest of the model as it was. ``changes`` are
    fields of the configuration, for a model of another kind.
    """
    family = FAMILIES[model_type]
    config = CONFIG_MAPPING[model_type](**COMMON | family.config | changes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    _randomise(model, family, torch.Generator().manual_seed(family.seed if seed is None else seed))
    if without is None:
        return model

    changed, weights = config.to_dict(), {name: t.clone() for name, t in model.state_dict().items()}
    without.off(changed, weights)
    stripped = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**changed), dtype=torch.float32)
    stripped.load_state_dict(weights)
    return stripped.eval()


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer of `VOCAB` entries with a one-line chat template."""
    vocab = {token: index for index, token in enumerate((*SPECIALS, *BYTES))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
    )
    fast.chat_template = (
        "{% for m in messages %}<bos>{{ m['role'] }}: {{ m['content'] }}<eos>{% endfor %}"
        "{% if add_generation_prompt %}<bos>assistant: {% endif %}"
    )
    return fast


def save(model_type: str, folder: Path, **options: Any) -> Path:
    """Write ``build(model_type, **options)`` and a tokenizer as a Hugging Face folder; return it."""
    build(model_type, **options).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["model_type"] == model_type
    return folder


def prompts(count: int = 4, *, seed: int = 0, shortest: int = 2 * WINDOW + 3) -> list[list[int]]:
    """Return random prompts, each a few tokens longer than the one before; all exceed the window."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return [
        torch.randint(len(SPECIALS), VOCAB, (shortest + 3 * i,), generator=generator).tolist()
        for i in range(count)
    ]
