"""The shell around the layers: embeddings, final norm and head of the base model, and nothing else.

The modules are the Hugging Face family's own, so that an embedding scale, a norm that multiplies by
1 + weight or a soft cap is computed by the same code as in one process. The decoder layers of the
model that they are taken from are never given memory.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from edge_client.hollow import hollow
from edge_client.precision import fitted


@dataclass
class Shell:
    """What an edge computes itself. ``softcap`` bounds the final logits, None leaves them."""

    embed_tokens: nn.Module
    norm: nn.Module
    lm_head: nn.Linear
    softcap: float | None


def build_shell(
    config: PreTrainedConfig, tensors: Mapping[str, Tensor], device: torch.device | str, dtype: torch.dtype
) -> Shell:
    """Return the shell of the model that ``config`` describes.

    Parameters
    ----------
    config
        Of a supported family (`shared.families`).
    tensors
        ``embed_tokens.weight`` and, if the head is not tied, ``lm_head.weight``, both
        ``(vocab_size, hidden_size)``, and ``norm.weight`` ``(hidden_size,)``.
    device, dtype
        Where and in what the shell computes.

    Raises
    ------
    ValueError
        If a weight holds NaN or infinity, as stored or in ``dtype``.
    """
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(hollow(config), dtype=dtype)  # type: ignore[no-untyped-call]
    base = whole.model
    softcap = getattr(config, "final_logit_softcapping", None)
    shell = Shell(base.embed_tokens, base.norm, whole.lm_head, softcap)
    weights = {name: _weight(name, tensor, device, dtype) for name, tensor in tensors.items()}
    shell.embed_tokens.weight = weights["embed_tokens.weight"]
    shell.norm.weight = weights["norm.weight"]
    shell.lm_head.weight = weights.get("lm_head.weight", weights["embed_tokens.weight"])
    scale = getattr(shell.embed_tokens, "scalar_embed_scale", None)
    if scale is not None:  # a buffer that is not in any file, so it is still on the meta device
        shell.embed_tokens.embed_scale = torch.tensor(scale, device=device, dtype=torch.float32)
    modules = (shell.embed_tokens, shell.norm, shell.lm_head)
    left = [name for module in modules for name, tensor in _all(module) if tensor.is_meta]
    if left:
        raise ValueError(f"the family {config.model_type!r} has parts that no file holds: {left}")
    return shell


def _weight(name: str, tensor: Tensor, device: torch.device | str, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(fitted(name, tensor, dtype, device), requires_grad=False)


def _all(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]
