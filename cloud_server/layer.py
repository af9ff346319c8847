"""One decoder layer of Hugging Face's, with its q, k and v products taken out in front.

A layer cannot be paused inside its projection, so the projections are computed before it is called and
handed to it through stand-ins. Knows nothing about batches, codes or residuals.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cloud_server.attention import CachedAttention
from shared.families import UnsupportedModelError


class Handed(nn.Module):
    """Stands in for a projection of a decoder layer and hands out what was computed before the call.

    ``hand`` is a plain list: setting an attribute of a module costs ten microseconds, every layer.
    """

    def __init__(self, hand: list[Tensor], index: int) -> None:
        super().__init__()
        self.hand, self.index = hand, index

    def forward(self, _: Tensor) -> Tensor:
        """Return the handed value: ``(1, tokens, out_features)``."""
        return self.hand[self.index]


class Stacked(nn.Module):
    """Several projections of one input as one product; the first hands out its part, the others wait.

    Waking a second core for a product costs as much as a small product itself.
    """

    def __init__(self, linears: Sequence[nn.Linear], hand: list[Tensor]) -> None:
        super().__init__()
        self.weight = torch.cat([linear.weight.detach() for linear in linears])
        biases = [linear.bias for linear in linears]
        self.bias = None if biases[0] is None else torch.cat([bias.detach() for bias in biases])
        self.widths, self.hand = [linear.out_features for linear in linears], hand

    def forward(self, x: Tensor) -> Tensor:
        """Return the first projection of ``x`` and leave all of them in ``hand``."""
        self.hand[:] = torch.split(F.linear(x, self.weight, self.bias), self.widths, dim=-1)
        return self.hand[0]


class FusedNorm(nn.Module):
    """An RMS norm as one kernel instead of eight."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the normed ``hidden``, of the same shape."""
        return F.rms_norm(hidden, self.weight.shape, self.weight, self.eps)


def fused_norm(norm: nn.Module) -> nn.Module:
    """Return ``norm`` as one kernel if that gives the same numbers on a probe, else ``norm`` itself.

    Families differ in what they multiply with (Gemma with 1 + weight) and in where they round, so equality
    is tried, not assumed.
    """
    weight, eps = getattr(norm, "weight", None), getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if not isinstance(weight, Tensor) or not isinstance(eps, float):
        return norm
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(8, *weight.shape, generator=generator).to(weight.device, weight.dtype)
    with torch.inference_mode():
        expected = norm(probe)
        for candidate in (weight.detach(), 1 + weight.detach()):
            fused = FusedNorm(candidate, eps)
            if torch.allclose(fused(probe), expected, rtol=1e-6, atol=1e-6):
                return fused
    return norm


class Layer:
    """One decoder layer with its q, k and v projections taken out in front, as one stacked product."""

    def __init__(self, module: nn.Module, rotary_key: str) -> None:
        attention, norm = getattr(module, "self_attn", None), getattr(module, "input_layernorm", None)
        if (
            attention is None
            or norm is None
            or not (hasattr(attention, "qkv_proj") or all(hasattr(attention, f"{p}_proj") for p in "qkv"))
        ):
            raise UnsupportedModelError(
                f"{type(module).__name__} has no self_attn with q/k/v (or qkv) projections "
                "behind an input_layernorm"
            )
        for name, child in list(module.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                setattr(module, name, fused_norm(child))
        self.module, self.rotary_key = module, rotary_key
        self.norm: nn.Module = module.input_layernorm  # type: ignore[assignment]
        module.input_layernorm = nn.Identity()  # the norm runs in front, for the codes
        names = ("qkv_proj",) if hasattr(attention, "qkv_proj") else ("q_proj", "k_proj", "v_proj")
        self.hand: list[Tensor] = []
        self.base_product = Stacked([getattr(attention, name) for name in names], self.hand)
        for index, name in enumerate(names):
            setattr(attention, name, Handed(self.hand, index))
        mlp: Any = getattr(module, "mlp", None)
        if isinstance(getattr(mlp, "gate_proj", None), nn.Linear) and hasattr(mlp, "up_proj"):
            hand: list[Tensor] = []
            mlp.gate_proj = Stacked([mlp.gate_proj, mlp.up_proj], hand)
            mlp.up_proj = Handed(hand, 1)

    def base(self, x: Tensor) -> Tensor:
        """Return the base q|k|v products of ``x (tokens, hidden_size)``: ``(tokens, q_dim + 2 kv_dim)``."""
        product = self.base_product
        return F.linear(x, product.weight, product.bias)

    def __call__(
        self, hidden: Tensor, qkv: Tensor, rotary: tuple[Tensor, Tensor], batch: CachedAttention
    ) -> Tensor:
        """Run the layer on ``hidden (tokens, hidden_size)`` with finished q, k, v products."""
        self.hand[:] = torch.split(qkv[None], self.base_product.widths, dim=2)
        out: Tensor = self.module(
            hidden[None], attention_mask=None, position_embeddings=rotary, past_key_values=None, batch=batch
        )
        return out[0]
