"""Small random models of every supported family, in which every feature of the family matters.

A random model with default initialisation hides mistakes: its attention is nearly flat, its biases
are zero and its norms are ones, so a window, a soft cap or a bias that is ignored changes no token.
Here weights are scaled so that attention is peaked and nothing is neutral, and each family lists its
features with the edit that switches each one off. `tests/unit/test_families.py` proves that every
such edit changes the tokens; a split path that ignored the feature would be caught the same way.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from shared.families import geometry
from shared.lowrank import LowRank, make
from shared.plan import Plan, Target
from shared.reference import projections

WINDOW = 8  # positions; every prompt below is longer
SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>")
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
VOCAB = len(SPECIALS) + len(BYTES)  # 260: any text can be encoded, no merges

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


@dataclass(frozen=True)
class Family:
    """How to build one family: configuration over the common one, features, and gains over `GAINS`."""

    model_type: str
    seed: int  # one whose greedy outputs are varied and far from ties
    config: Config
    features: tuple[Feature, ...]
    gains: Mapping[str, float] = field(default_factory=dict)


# --- switching features off -----------------------------------------------------------------------


def _set(**values: Any) -> Callable[[Config, Weights], None]:
    def off(config: Config, weights: Weights) -> None:
        config.update(values)

    return off


def _neutral(fragment: str, value: float) -> Callable[[Config, Weights], None]:
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


def _rope(**values: Any) -> Callable[[Config, Weights], None]:
    def off(config: Config, weights: Weights) -> None:
        config["rope_parameters"] = values

    return off


GQA = Feature("gqa_order", _interleave_heads)
NO_WINDOW = Feature("window", _set(sliding_window=4096))
OFF_BY_ONE = Feature("window_off_by_one", _set(sliding_window=WINDOW + 1))
LAYER_TYPES = Feature("layer_types", _swap_layer_types)
BIAS = Feature("bias", _neutral("_proj.bias", 0.0))
NORMS = Feature("norms", _neutral("layernorm.weight", 1.0))
GEMMA_NORMS = Feature("norms", _neutral("layernorm.weight", 0.0))  # Gemma multiplies by 1 + weight
EMBED_SCALE = Feature("embedding_scale", _unscaled_embeddings, side="edge")
FINAL_CAP = Feature("final_softcap", _set(final_logit_softcapping=None), shows_in="sampling", side="edge")
QUERY_SCALE = Feature("query_pre_attn_scalar", _set(query_pre_attn_scalar=16))

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
            (GQA, BIAS, NORMS, Feature("rope_scaling", _rope(rope_type="default", rope_theta=10_000.0))),
        ),
        Family("mistral", 2, {"sliding_window": WINDOW, "head_dim": 16}, (GQA, NO_WINDOW, OFF_BY_ONE, NORMS)),
        Family(
            "qwen2",
            10,
            {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": MIXED},
            (GQA, NO_WINDOW, OFF_BY_ONE, LAYER_TYPES, BIAS, NORMS),
        ),
        Family(
            "qwen3",
            3,
            {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": MIXED, "head_dim": 16},
            (
                GQA,
                NO_WINDOW,
                LAYER_TYPES,
                NORMS,
                Feature("q_norm", _neutral("q_norm.weight", 1.0)),
                Feature("k_norm", _neutral("k_norm.weight", 1.0)),
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
                GQA,
                NO_WINDOW,
                OFF_BY_ONE,
                LAYER_TYPES,
                GEMMA_NORMS,
                EMBED_SCALE,
                QUERY_SCALE,
                FINAL_CAP,
                Feature("attention_softcap", _set(attn_logit_softcapping=None)),
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
                GQA,
                NO_WINDOW,
                OFF_BY_ONE,
                LAYER_TYPES,
                GEMMA_NORMS,
                EMBED_SCALE,
                QUERY_SCALE,
                FINAL_CAP,
                Feature("rope_local", _one_rope),
                Feature("q_norm", _neutral("q_norm.weight", 0.0)),
                Feature("k_norm", _neutral("k_norm.weight", 0.0)),
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
                GQA,
                NO_WINDOW,
                OFF_BY_ONE,
                NORMS,
                Feature(
                    "partial_rotary",
                    _rope(rope_type="default", rope_theta=10_000.0, partial_rotary_factor=1.0),
                ),
            ),
        ),
    )
}

CASES = [(family.model_type, feature) for family in FAMILIES.values() for feature in family.features]
CASE_IDS = [f"{model_type}-{feature.name}" for model_type, feature in CASES]

# Settings that models of these families have and that the models above do not; each is served too.
ROPE = {"rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 128}
VARIANTS: dict[str, tuple[str, Config]] = {
    "llama-one_kv_head": ("llama", {"num_key_value_heads": 1}),
    "llama-no_grouping": ("llama", {"num_key_value_heads": 6}),
    "llama-mlp_bias": ("llama", {"mlp_bias": True}),
    "llama-linear_rope": ("llama", {"rope_parameters": {"rope_type": "linear", **ROPE}}),
    "llama-yarn": ("llama", {"rope_parameters": {"rope_type": "yarn", **ROPE}}),
    "mistral-no_window": ("mistral", {"sliding_window": None}),
    "qwen2-no_window": ("qwen2", {"use_sliding_window": False, "layer_types": None}),
    "qwen2-upper_layers_slide": ("qwen2", {"max_window_layers": 2, "layer_types": None}),
    "qwen3-bias": ("qwen3", {"attention_bias": True}),
    "gemma2-no_caps": ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gemma2-untied": ("gemma2", {"tie_word_embeddings": False}),
    "gemma3-all_slide": ("gemma3_text", {"layer_types": ["sliding_attention"] * 4}),
    "gemma3-none_slides": ("gemma3_text", {"layer_types": ["full_attention"] * 4}),
    "gemma3-bias": ("gemma3_text", {"attention_bias": True}),
    "phi3-no_window": ("phi3", {"sliding_window": None}),
}

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
    """Write ``build(model_type, **options)`` and its tokenizer as a Hugging Face folder; return the folder."""
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


def plan_for(model: PreTrainedModel, *, layers: tuple[int, ...] | None = None, **options: Any) -> Plan:
    """Return a plan for a model made here: every layer unless ``layers`` names a subset."""
    config = model.config
    return Plan.subset(
        layers,
        **{
            "name": "test",
            "backbone": f"tiny-{config.model_type}",
            "num_layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "rank": 8,
            **options,
        },
    )


def lowrank_for(plan: Plan, model: PreTrainedModel) -> LowRank:
    """Return A and B of a plan, made as the cloud makes them."""

    def weight_of(layer: int, target: Target) -> Tensor:
        linear, rows = projections(model, layer)[target]
        return linear.weight[rows].detach().T

    return make(plan, geometry(model.config), weight_of)


def matrices_for(plan: Plan, *, seed: int = 0, std: float = 0.5) -> dict[int, Tensor]:
    """Return random M (groups, r_c2d, r_d2c) by adapted layer; 0.5 moves q, k and v by about a third."""
    generator = torch.Generator().manual_seed(2000 + seed)
    shape = (plan.groups, plan.r_c2d, plan.r_d2c)
    return {layer: std * torch.randn(shape, generator=generator) for layer in plan.adapted_layers}
