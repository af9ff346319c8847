"""A Llama-shaped checkpoint of a few KB, written by hand: no model is built, no download needed."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from shared.plan import Plan

HIDDEN, HEADS, KV_HEADS, LAYERS, VOCAB, MLP = 16, 4, 2, 3, 32, 24
KV = HIDDEN // HEADS * KV_HEADS

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": MLP,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "num_hidden_layers": LAYERS,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


def weights(dtype: torch.dtype = torch.float32, *, tied: bool = True, prefix: str = "model.") -> dict:
    shapes = {f"{prefix}embed_tokens.weight": (VOCAB, HIDDEN), f"{prefix}norm.weight": (HIDDEN,)}
    if not tied:
        shapes["lm_head.weight"] = (VOCAB, HIDDEN)
    for layer in range(LAYERS):
        start = f"{prefix}layers.{layer}."
        shapes |= {
            f"{start}input_layernorm.weight": (HIDDEN,),
            f"{start}self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            f"{start}self_attn.k_proj.weight": (KV, HIDDEN),
            f"{start}self_attn.v_proj.weight": (KV, HIDDEN),
            f"{start}self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            f"{start}mlp.down_proj.weight": (HIDDEN, MLP),
        }
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def write(folder: Path, tensors: dict | None = None, **config: Any) -> Path:
    """Write config.json, model.safetensors and a stand-in tokenizer; return ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "notes.txt").write_text("not for the edge")
    if tensors is None:
        tensors = weights(tied=config.get("tie_word_embeddings", True))
    save_file(tensors, folder / "model.safetensors")
    return folder


def write_sharded(folder: Path, tensors: dict) -> Path:
    """Write the same in two files and an index."""
    write(folder, tensors)
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def plan(**changes: Any) -> Plan:
    facts: dict[str, Any] = {"name": "tiny", "backbone": "tiny", "num_layers": LAYERS, "hidden_size": HIDDEN}
    return Plan.subset(**(facts | {"rank": 4} | changes))


def grouped_plan(**changes: Any) -> Plan:
    """Codes at layer 0 feed 0 and 1, codes at layer 2 feed 2."""
    facts: dict[str, Any] = plan(**changes).model_dump()
    facts |= {"exchange_layers": (0, 2), "adapted_layers": (0, 1, 2), "schedule": "grouped"}
    return Plan.model_validate(facts)
