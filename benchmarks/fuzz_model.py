"""A random model of a few KB, and a cloud that serves it with little of everything, for the fuzzing."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

from cloud_server.config.cloud import CloudConfig
from cloud_server.config.plans import PlanConfig

PLANS = (
    '{"name": "per-layer", "r_c2d": 4, "r_d2c": 4}',
    '{"name": "fused", "r_c2d": 3, "r_d2c": 5, "layout": "fused", "layers": [0, 2]}',
    '{"name": "grouped", "r_c2d": 2, "r_d2c": 2, "exchange_layers": [0], "share_residual_codes": 2}',
    '{"name": "resident", "r_c2d": 2, "r_d2c": 2, "layers": [1, 2], "head_layers": 1, "lora_rank": 2}',
)
KV_BYTES = 128 * 6144  # blocks of 32 positions: a few long sessions fill it
TUNING_BYTES = 4 << 20


def save_model(folder: Path) -> Path:
    """Write a Llama of three layers and its tokenizer to ``folder`` and return it."""
    if (folder / "config.json").is_file():
        return folder
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 260,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = CONFIG_MAPPING["llama"](**sizes)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    model.save_pretrained(folder)
    known = ("<pad>", "<bos>", "<eos>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet()))
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(known)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", pad_token="<pad>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<bos>{{ m['role'] }}: {{ m['content'] }}<eos>{% endfor %}"
        "{% if add_generation_prompt %}<bos>assistant: {% endif %}"
    )
    tokenizer.save_pretrained(folder)
    return folder


def cloud_config(model: Path, folder: Path) -> CloudConfig:
    """Return a cloud that has too little of everything, so that bounds are met."""
    return CloudConfig.model_validate(
        {
            "model": str(model),
            "cache_dir": folder / "cache",
            "threads": 1,
            "plans": [PlanConfig.model_validate_json(text) for text in PLANS],
            "kv_bytes": KV_BYTES,
            "max_step_tokens": 128,
            "max_rows": 8,
            "max_sessions": 32,
            "max_fetches": 12,
            "max_steps_in_flight": 3,
            "grace_period_s": 0.5,
            "write_timeout_s": 2.0,
            "engine": {"gather_wait_s": 0.0, "start_wait_share": 0.0},
            "tuning": {"max_streams": 16, "max_bytes": TUNING_BYTES, "piece_tokens": 16},
            "per_identity": {"max_sessions": 24, "max_tuning_streams": 10, "max_kv_bytes": KV_BYTES // 2},
        }
    )
