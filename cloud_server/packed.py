"""Attention of whole sequences laid end to end, without a cache: what tuning runs.

Exact and differentiable. Every sequence starts at position 0 and sees itself only. Knows nothing about
layers, codes or gradients.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from cloud_server.attention import Asked, visible

BLOCK_POSITIONS = 128  # fewest queries that attend together within a window: fewer would be many small calls


@dataclass
class PackedAttention:
    """Causal attention of sequences with these ``lengths``; see `cloud_server.attention.Attends`.

    No mask is larger than a block of queries and the keys that they see, so memory grows with the tokens
    and not with their square; only with a soft cap are the logits kept, for no kernel has one.
    """

    lengths: Sequence[int]
    _masks: dict[tuple[int, int, int, int], Tensor] = field(default_factory=dict)

    def attend(self, asked: Asked, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return ``(heads, tokens, head_dim)`` for ``q (heads, tokens, head_dim)``.

        Query heads that share a key head are a batch over one view of it: keys and values are not copied.
        """
        _, scale, window, softcap = asked
        heads, tokens, head_dim = q.shape
        kv_heads, group = k.shape[0], heads // k.shape[0]
        grouped = q.view(kv_heads, group, tokens, head_dim)
        k, v = (part[:, None].expand(-1, group, -1, -1) for part in (k, v))
        outs = []
        for length, *sequence in zip(self.lengths, *map(self._by_sequence, (grouped, k, v)), strict=True):
            for lo, hi, first in _blocks(length, window):
                queries, keys, values = sequence
                if hi - lo < length:
                    queries, keys, values = queries[:, :, lo:hi], keys[:, :, first:hi], values[:, :, first:hi]
                if softcap is None and hi - first == hi - lo and (window is None or hi - lo <= window):
                    outs.append(
                        F.scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=scale)
                    )
                    continue
                mask = self._mask(lo, hi, first, window, q)
                if softcap is None:
                    outs.append(F.scaled_dot_product_attention(queries, keys, values, mask, scale=scale))
                else:
                    outs.append(_capped(queries, keys, values, mask, scale, softcap))
        out = outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)
        return out.reshape(heads, tokens, head_dim)

    def owns(self, address: int) -> bool:
        """Whether this is the address of a mask: layers share them."""
        return any(mask.untyped_storage().data_ptr() == address for mask in self._masks.values())

    def _by_sequence(self, heads: Tensor) -> Sequence[Tensor]:
        """Cut ``(kv_heads, group, tokens, head_dim)``. Slices would each fill a gradient of all tokens."""
        return (heads,) if len(self.lengths) == 1 else torch.split(heads, list(self.lengths), dim=2)

    def _mask(self, lo: int, hi: int, first: int, window: int | None, like: Tensor) -> Tensor:
        """Return what is added to the logits, 0 or -inf: ``(hi - lo, hi - first)``. Equal blocks share it."""
        key = (lo - first, hi - first, window or 0, like.element_size())
        if key not in self._masks:
            seen = visible(lo, hi, first, window, like.device)
            mask = torch.zeros(seen.shape, dtype=like.dtype, device=like.device)
            self._masks[key] = mask.masked_fill_(~seen, float("-inf"))
        return self._masks[key]


def block_positions(length: int, window: int | None) -> int:
    """Return how many queries of a sequence attend together at most."""
    return length if window is None or length <= window else min(length, max(window, BLOCK_POSITIONS))


def _blocks(length: int, window: int | None) -> list[tuple[int, int, int]]:
    """Return ``(lo, hi, first)`` of blocks of queries ``lo..hi-1``, which see keys from ``first`` on."""
    size = block_positions(length, window)
    starts = range(0, length, size)
    return [(lo, min(lo + size, length), 0 if window is None else max(0, lo + 1 - window)) for lo in starts]


def _capped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float) -> Tensor:
    """Attend with bounded logits (Gemma 2, arXiv 2408.00118 section 2); ``(..., positions, head_dim)``."""
    logits = torch.tanh(q @ k.transpose(-2, -1) * (scale / softcap)) * softcap + mask
    wide = torch.promote_types(q.dtype, torch.float32)
    return torch.softmax(logits, dim=-1, dtype=wide).to(q.dtype) @ v
