"""A decoder layer's own arithmetic in the fewest calls.

Decoding one token spends half of a layer's time in the calls around its products: modules, decorators,
rotary embedding and norms in dozens of small kernels. Here is the same arithmetic with little around it,
for the structures that the supported families have. Whether it is the same is not assumed:
`cloud_server.layer` compares it with Hugging Face's layer before it is used. Nothing here writes into
what it was given, so a gradient can be taken through it.
"""

import copy
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cloud_server.attention import Asked, Attends
from cloud_server.gated import Gated
from shared.few_rows import product

Call = Callable[[Tensor], Tensor]

LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
SANDWICH = {"pre_feedforward_layernorm", "post_feedforward_layernorm"}  # Gemma norms what it adds as well
DROPOUTS = {"resid_attn_dropout", "resid_mlp_dropout"}  # Phi-3's; nothing in a layer that is not trained
ATTENTION = ({"q_proj", "k_proj", "v_proj", "o_proj"}, {"qkv_proj", "o_proj"})
HEAD_NORMS = {"q_norm", "k_norm"}
MLP = ({"gate_proj", "up_proj", "down_proj", "act_fn"}, {"gate_up_proj", "down_proj", "activation_fn"})


class UnknownStructureError(ValueError):
    """A layer with parts that are not known here; the message names them."""


class Rotary(NamedTuple):
    """What rotates a batch's queries and keys, ``(1, tokens, rotary_dim)`` each."""

    cos: Tensor
    sin: Tensor
    signed_sin: Tensor  # first half negated: what it multiplies is rolled, not negated

    @classmethod
    def of(cls, cos: Tensor, sin: Tensor) -> "Rotary":
        """Return what `rotate` needs, from what Hugging Face's layers need."""
        first, second = sin.chunk(2, dim=-1)
        return cls(cos, sin, torch.cat((-first, second), dim=-1))


def rotate(heads: Tensor, rotary: Rotary) -> Tensor:
    """Rotate the first ``rotary_dim`` of ``heads (heads, tokens, head_dim)``, half against half."""
    width = rotary.cos.shape[-1]
    if width == heads.shape[-1]:
        return torch.addcmul(heads * rotary.cos, heads.roll(width // 2, -1), rotary.signed_sin)
    turned = heads[..., :width]
    turned = torch.addcmul(turned * rotary.cos, turned.roll(width // 2, -1), rotary.signed_sin)
    return torch.cat((turned, heads[..., width:]), dim=-1)


class FusedNorm(nn.Module):
    """An RMS norm in the fewest kernels, computed in float32 at least.

    Parameters
    ----------
    weight
        What the normed values are multiplied with: ``(size,)``, or ``(heads, 1, size)`` for one each.
    eps
        Added to the mean of squares.
    rounds_first
        Whether normed values are rounded to the layer's dtype before they are multiplied (Llama) or
        after (Gemma).
    """

    def __init__(self, weight: Tensor, eps: float, rounds_first: bool) -> None:
        super().__init__()
        self.accumulator = torch.promote_types(weight.dtype, torch.float32)
        self.weight = weight if rounds_first else weight.to(self.accumulator)
        self.eps, self.rounds_first, self.size = eps, rounds_first, weight.shape[-1]
        self.eps_tensor = torch.tensor(eps, dtype=self.accumulator, device=weight.device)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the normed ``hidden (..., size)``, of the same shape."""
        if hidden.is_cuda:  # one kernel there, in float32 inside; elsewhere it falls apart into ten
            wide = hidden if self.rounds_first else hidden.to(self.accumulator)
            weight = self.weight if self.weight.ndim == 1 else None
            normed = F.rms_norm(wide, (self.size,), weight, self.eps)
            return (normed if weight is not None else normed * self.weight).to(hidden.dtype)
        wide = hidden if hidden.dtype == self.accumulator else hidden.to(self.accumulator)
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        # In place only on what was made here and what no gradient looks at again.
        scaled = wide * torch.addcmul(self.eps_tensor, norm, norm, value=1 / self.size).rsqrt_()
        if wide is hidden:
            return scaled.mul_(self.weight)
        if self.rounds_first:
            return scaled.to(hidden.dtype).mul_(self.weight)
        return scaled.mul_(self.weight).to(hidden.dtype)


def fused_norm(norm: nn.Module) -> nn.Module:
    """Return ``norm`` in fewer kernels if that gives the same numbers on a probe, else ``norm`` itself.

    Families differ in what they multiply with (Gemma with 1 + weight), so equality is tried, not assumed.
    """
    weight, eps = getattr(norm, "weight", None), getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if not isinstance(weight, Tensor) or weight.ndim != 1 or not isinstance(eps, float):
        return norm
    wide = torch.promote_types(weight.dtype, torch.float32)
    probe = torch.randn(8, *weight.shape, generator=torch.Generator().manual_seed(0)).to(weight.device, wide)
    weight, exact = weight.detach(), copy.deepcopy(norm).to(wide)
    with torch.no_grad():  # not inference mode: the weights are kept, and a gradient may pass them
        expected = exact(probe)
        for offset, rounds_first in ((0.0, True), (1.0, False)):
            found = FusedNorm(weight.to(wide) + offset, eps, rounds_first)(probe)
            if torch.allclose(found, expected, rtol=2e-6, atol=1e-6, equal_nan=True):
                return FusedNorm(weight if rounds_first else weight.to(wide) + offset, eps, rounds_first)
    return norm


class Product:
    """A projection as one call."""

    def __init__(self, linear: Any) -> None:
        if not isinstance(getattr(linear, "weight", None), Tensor):
            raise UnknownStructureError(f"a {type(linear).__name__} where a projection is expected")
        self.weight: Tensor = linear.weight.detach()  # (out_features, in_features)
        self.bias: Tensor | None = None if linear.bias is None else linear.bias.detach()

    def __call__(self, x: Tensor) -> Tensor:
        """Return the projection of ``x (tokens, in_features)``: ``(tokens, out_features)``."""
        return product(x, self.weight) if self.bias is None else product(x, self.weight) + self.bias

    def onto(self, base: Tensor, x: Tensor) -> Tensor:
        """Return ``base (tokens, out_features)`` plus the projection of ``x``."""
        if x.shape[0] == 1:  # one call fewer counts there
            return torch.addmm(base if self.bias is None else base + self.bias, x, self.weight.t())
        return base + self(x)


class LeanLayer:
    """What a decoder layer does with its q, k and v products.

    Parameters
    ----------
    module
        The decoder layer, its gate and up projections already stacked.
    qkv_width
        ``q_dim + 2 kv_dim``.
    asked
        What the module itself asks of attention.

    Raises
    ------
    UnknownStructureError
        If the module has other parts than those of the supported families.
    """

    def __init__(self, module: Any, qkv_width: int, asked: Asked) -> None:
        self.asked = asked
        attention, mlp = module.self_attn, module.mlp
        self.sandwich = _parts(module, LAYER, LAYER | SANDWICH, but=DROPOUTS) == 1
        _parts(attention, *ATTENTION, but=HEAD_NORMS)
        joined = _parts(mlp, *MLP) == 1  # Phi-3 keeps gate and up in one projection
        self.out, self.down = Product(attention.o_proj), Product(mlp.down_proj)
        self.gate_up = Product(mlp.gate_up_proj if joined else mlp.gate_proj)
        self.activation: Call = (mlp.activation_fn if joined else mlp.act_fn).forward
        # Calling a module costs a few microseconds more than calling its forward.
        self.after_attention: Call = module.post_attention_layernorm.forward
        if self.sandwich:
            self.before_mlp: Call = module.pre_feedforward_layernorm.forward
            self.after_mlp: Call = module.post_feedforward_layernorm.forward
        self.width: int = mlp.down_proj.in_features  # of gate, and of up
        self.head_dim: int = attention.head_dim
        self.heads: int = attention.o_proj.in_features // self.head_dim
        kv_heads = (qkv_width // self.head_dim - self.heads) // 2
        self.rotated = self.heads + kv_heads  # heads of query and key together
        norm = _stacked_norm(attention, self.heads, kv_heads)
        self.head_norm: Call | None = None if norm is None else norm.forward

    def __call__(self, hidden: Tensor, qkv: Tensor, rotary: Rotary, batch: Attends) -> Tensor:
        """Run the layer on ``hidden (tokens, hidden_size)`` and ``qkv (tokens, q_dim + 2 kv_dim)``."""
        tokens, heads = hidden.shape[0], self.heads
        all_heads = qkv.view(tokens, -1, self.head_dim).transpose(0, 1)
        qk, v = torch.split(all_heads, [self.rotated, len(all_heads) - self.rotated])
        if self.head_norm is not None:
            qk = self.head_norm(qk)
        qk = rotate(qk, rotary)  # (heads + kv_heads, tokens, head_dim): both in one go
        q, k = torch.split(qk, [heads, self.rotated - heads])
        seen = batch.attend(self.asked, q, k, v)
        seen = seen.transpose(0, 1).reshape(tokens, -1)  # (tokens, q_dim)
        if not self.sandwich:
            hidden = self.out.onto(hidden, seen)
            return self.down.onto(hidden, self._gated(self.after_attention(hidden)))
        hidden = hidden + self.after_attention(self.out(seen))
        return hidden + self.after_mlp(self.down(self._gated(self.before_mlp(hidden))))

    def _gated(self, x: Tensor) -> Tensor:
        """Return ``activation(gate) * up`` of ``x (tokens, hidden_size)``: ``(tokens, width)``."""
        products = self.gate_up(x)
        if torch.is_grad_enabled():
            found: Tensor = Gated.apply(products, self.activation)  # type: ignore[no-untyped-call]
            return found
        return self.activation(products[:, : self.width]) * products[:, self.width :]


def _parts(module: nn.Module, *known: set[str], but: Collection[str] = ()) -> int:
    """Return which of the known sets the module's parts are, some parts being optional: all or none."""
    found = {name for name, _ in module.named_children()}
    loose = [name for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers())]
    rest = found - set(but) if found >= set(but) else found
    if rest not in known or loose:
        wanted = min(known, key=lambda parts: len(parts ^ rest))
        odd = sorted(wanted ^ rest) + loose
        raise UnknownStructureError(f"{type(module).__name__} differs in {', '.join(odd)}")
    return known.index(rest)


def _stacked_norm(attention: Any, heads: int, kv_heads: int) -> FusedNorm | None:
    """Return the norms of query and key heads as one norm of all of them, None if there are none."""
    if not hasattr(attention, "q_norm"):
        return None
    q, k = fused_norm(attention.q_norm), fused_norm(attention.k_norm)
    if not isinstance(q, FusedNorm) or not isinstance(k, FusedNorm):
        raise UnknownStructureError(f"{type(attention).__name__} norms its heads in another way")
    if (q.eps, q.rounds_first) != (k.eps, k.rounds_first):
        raise UnknownStructureError(f"{type(attention).__name__} norms queries and keys differently")
    weight = torch.cat((q.weight.expand(heads, 1, -1), k.weight.expand(kv_heads, 1, -1)))
    return FusedNorm(weight, q.eps, q.rounds_first)
