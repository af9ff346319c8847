"""One decoder layer of Hugging Face's, with its q, k and v products taken out in front.

A layer cannot be paused inside its projection, so the projections are computed before it is called. What
follows runs in the fewest calls (`cloud_server.lean`) if a probe shows that this equals Hugging Face's own
code, else in that code, with the products handed to it through stand-ins. Knows nothing about codes,
residuals or sessions.
"""

import copy
import logging
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cloud_server.attention import Asked, Attends, attend_one, visible
from cloud_server.lean import Call, LeanLayer, Rotary, UnknownStructureError, fused_norm
from shared import hf_names
from shared.families import UnsupportedModelError
from shared.few_rows import product

logger = logging.getLogger(__name__)

PROBE_TOKENS = 8
PROBE_TOLERANCE = 1e-5  # of the largest value; two orders of float32 sums differ by some 1e-6


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


class Layer:
    """One decoder layer with its q, k and v projections taken out in front, as one stacked product.

    Parameters
    ----------
    module
        The decoder layer; it is taken apart.
    rotary_key
        Which of the batch's rotary embeddings it uses.
    lean
        Whether to run it in the fewest calls; see `Probe`.

    Raises
    ------
    UnsupportedModelError
        If the module has no projections where they are expected.
    UnknownStructureError
        If it is to run lean and has parts that are not known.
    """

    def __init__(self, module: nn.Module, rotary_key: str, *, lean: bool) -> None:
        attention: Any = getattr(module, "self_attn", None)
        norm = getattr(module, "input_layernorm", None)
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
        self.norm: Call = module.input_layernorm.forward  # type: ignore[union-attr]
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
        self.lean = LeanLayer(module, sum(self.base_product.widths), self._asked()) if lean else None
        self._addresses: set[int] | None = None

    def base(self, x: Tensor) -> Tensor:
        """Return the base q|k|v products of ``x (tokens, hidden_size)``: ``(tokens, q_dim + 2 kv_dim)``."""
        weight, bias = self.base_product.weight, self.base_product.bias
        qkv = product(x, weight).contiguous()
        return qkv if bias is None else qkv + bias

    def owns(self, address: int) -> bool:
        """Whether this is the address of one of the layer's weights, as it runs them."""
        if self._addresses is None:
            modules: list[Any] = list(self.module.modules())
            if self.lean is not None and self.lean.head_norm is not None:
                modules.append(self.lean.head_norm.__self__)  # type: ignore[attr-defined]
            tensors = [t for m in modules for t in (*vars(m).values(), *m.parameters(), *m.buffers())]
            self._addresses = {t.untyped_storage().data_ptr() for t in tensors if isinstance(t, Tensor)}
        return address in self._addresses

    def base_gradient(self, gradient: Tensor) -> Tensor:
        """Return dL/dx ``(tokens, hidden_size)`` of the base products for dL/dqkv."""
        return gradient @ self.base_product.weight

    def __call__(self, hidden: Tensor, qkv: Tensor, rotary: Rotary, batch: Attends) -> Tensor:
        """Run the layer on ``hidden (tokens, hidden_size)`` with finished q, k, v products."""
        if self.lean is not None:
            return self.lean(hidden, qkv, rotary, batch)
        self.hand[:] = torch.split(qkv[None], self.base_product.widths, dim=2)
        out: Tensor = self.module(hidden[None], **_arguments(rotary, batch))
        return out[0]

    def _asked(self) -> Asked:
        """Return what the module asks of attention, seen by asking it for one token."""
        attention: Any = self.module.self_attn
        weight, head_dim, listener = self.base_product.weight, attention.head_dim, _Listener()
        self.hand[:] = torch.split(weight.new_zeros(1, 1, len(weight)), self.base_product.widths, dim=2)
        rotary = Rotary.of(weight.new_ones(1, 1, head_dim), weight.new_zeros(1, 1, head_dim))
        with torch.no_grad():
            attention(hidden_states=weight.new_zeros(1, 1, weight.shape[1]), **_arguments(rotary, listener))
        if listener.asked is None:
            raise UnknownStructureError(f"{type(attention).__name__} attends in another way")
        return listener.asked


class Probe:
    """Tells whether a layer may run lean: Hugging Face's own code, run untouched, is the truth.

    A layer is tried with random weights in place of its own: trained ones can be so near to neutral (a
    bias of zeros, a norm of ones) that leaving something out would not show. What is alike is tried once.

    Parameters
    ----------
    rotary
        The model's rotary embeddings of some `PROBE_TOKENS` positions, by key.
    """

    def __init__(self, rotary: Mapping[str, Rotary]) -> None:
        self._rotary = rotary
        self._verdicts: dict[Hashable, bool] = {}

    def agrees(self, module: nn.Module, rotary_key: str) -> bool:
        """Return whether the lean layer equals ``module``, which is left as it is."""
        kind = (rotary_key, _kind(module))
        if kind not in self._verdicts:
            try:
                difference = self._difference(module, rotary_key)
                reason = f"results differ by {difference:.1e}"
                self._verdicts[kind] = difference <= PROBE_TOLERANCE  # false for a NaN
            except (UnknownStructureError, AttributeError, RuntimeError) as error:  # parts or shapes differ
                self._verdicts[kind], reason = False, str(error)
            if not self._verdicts[kind]:
                name = type(module).__name__
                logger.info("%s runs in Hugging Face's own code, which is slower: %s", name, reason)
        return self._verdicts[kind]

    @torch.no_grad()
    def _difference(self, module: nn.Module, rotary_key: str) -> float:
        """Return by how much the two differ, relative to the largest value, in float32 at least."""
        weight = next(module.parameters())
        dtype, device = torch.promote_types(weight.dtype, torch.float32), weight.device
        trial: Any = copy.deepcopy(module).to(dtype)
        generator = torch.Generator(device).manual_seed(0)
        for name, parameter in trial.named_parameters():
            parameter.normal_(generator=generator)
            if parameter.ndim > 1:  # products of variance four: attention is peaked
                parameter.mul_(2 / math.sqrt(parameter.shape[-1]))
            else:  # norms around one, biases around zero
                parameter.mul_(0.3).add_(1.0 if "norm" in name else 0.0)
        size = trial.input_layernorm.weight.shape[0]
        hidden = torch.randn(PROBE_TOKENS, size, generator=generator, dtype=dtype, device=device)
        rotary, batch = Rotary(*(part.to(dtype) for part in self._rotary[rotary_key])), _Causal()
        expected = trial(hidden[None], **_arguments(rotary, batch))[0]
        layer = Layer(trial, rotary_key, lean=True)
        found = layer(hidden, layer.base(layer.norm(hidden)), rotary, batch)
        return float((found - expected).abs().max() / expected.abs().max())


class _Listener:
    """Notes what is asked of attention; see `Attends`."""

    asked: Asked | None = None

    def attend(self, asked: Asked, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return something of the right shape."""
        self.asked = asked
        return q


class _Causal:
    """Attention of one row from its first position on, without a cache; see `Attends`."""

    def attend(self, asked: Asked, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend within the window."""
        hidden = ~visible(0, q.shape[1], 0, asked.window, q.device).repeat(q.shape[0] // k.shape[0], 1)
        mask = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device).masked_fill(hidden, -math.inf)
        return attend_one(q, k, v, asked.scale, mask, asked.softcap)


def _arguments(rotary: Rotary, batch: Attends) -> dict[str, Any]:
    """Return what a layer or its attention is called with besides hidden states."""
    return {
        "position_embeddings": (rotary.cos, rotary.sin),
        "attention_mask": None,
        hf_names.CACHE: None,
        "batch": batch,
    }


def _kind(module: nn.Module) -> Hashable:
    """Return a value that differs between layers whose code, sizes or settings differ."""
    plain = (bool, int, float, str, type(None))
    return tuple(
        (
            path,
            type(part),
            getattr(part.forward, "__func__", part.forward),  # someone may have replaced it
            tuple((n, v) for n, v in vars(part).items() if isinstance(v, plain) and n != "layer_idx"),
            tuple(
                (n, t.shape, t.dtype)
                for n, t in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False))
            ),
        )
        for path, part in module.named_modules()
    )
