"""Ragged attention: queries of many rows laid end to end, each over its own keys and values.

Registered with transformers under a name, so that unmodified decoder layers call it after their
projections, norms and rotary embedding. Knows nothing about residuals, steps or sessions.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from cloud_server.kv_cache import KvCache, Table

ATTENTION_NAME = "privatelora_ragged"
# Rows with one new position each attend together up to this many positions of the longest. Their keys
# and values are copied side by side for that, which beyond it costs more than the calls it saves.
TOGETHER_POSITIONS = {"cpu": 384, "cuda": 8192}


class Asked(NamedTuple):
    """What a layer asks of attention besides its queries, keys and values."""

    layer: int
    scale: float
    window: int | None
    softcap: float | None


class Attends(Protocol):
    """What a batch must offer: attention of its own tokens at one layer."""

    def attend(self, asked: Asked, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return ``(heads, tokens, head_dim)`` for ``q (heads, tokens, head_dim)``."""


def ragged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    batch: Attends,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers asks: ``(1, heads, tokens, head_dim)`` in, ``(1, tokens, heads, head_dim)`` out.

    ``attention_mask`` is unused: ``batch`` knows what is visible.
    """
    asked = Asked(module.layer_idx, scaling, sliding_window, softcap)  # type: ignore[arg-type]
    out = batch.attend(asked, query[0], key[0], value[0])
    return out.transpose(0, 1).unsqueeze(0), None


AttentionInterface.register(ATTENTION_NAME, ragged_attention)


@dataclass
class Part:
    """Tokens ``lo..hi-1`` of a batch: positions ``start..`` of the row with this block table."""

    table: Table
    lo: int
    hi: int
    start: int

    @property
    def end(self) -> int:
        """Positions of the row that exist once this part is written."""
        return self.start + self.hi - self.lo


@dataclass
class CachedAttention:
    """Attention of new positions over the paged KV cache.

    One serves all layers of a batch, so what is the same in each of them is made once.
    """

    cache: KvCache
    parts: list[Part]
    _slots: Tensor | None = None
    _masks: dict[tuple[int, int | None], Tensor] = field(default_factory=dict)
    _together: dict[int | None, tuple[Tensor, Tensor] | None] = field(default_factory=dict)  # by window

    def attend(self, asked: Asked, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write k and v of the new positions, then attend row by row."""
        pool = self.cache.keys_values(asked.layer)  # (2, kv_heads, slots, head_dim)
        if self._slots is None:
            self._slots = torch.cat([p.table.slots(p.end)[p.start :] for p in self.parts]).to(pool.device)
        pool[0].index_copy_(1, self._slots, k)
        pool[1].index_copy_(1, self._slots, v)
        if len(self.parts) > 1:
            together = self._laid_out(asked.window, q.dtype, q.device)
            if together is not None:
                return _attend_rows(q, pool, *together, asked.scale, asked.softcap)
        outs = [
            self._attend_part(index, pool, q[:, part.lo : part.hi], asked)
            for index, part in enumerate(self.parts)
        ]
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)  # (heads, tokens, head_dim)

    def _laid_out(
        self, window: int | None, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, Tensor] | None:
        """Return each row's slots, ``(rows * longest,)``, and the mask, ``(rows, 1, 1, longest)``.

        None if not all rows have one new position, or if their pasts are too long to be copied.
        """
        if window not in self._together:
            self._together[window] = None
            firsts = [0 if window is None else max(0, p.start + 1 - window) for p in self.parts]
            lengths = [p.end - first for p, first in zip(self.parts, firsts, strict=True)]
            longest = max(lengths)
            if all(p.hi - p.lo == 1 for p in self.parts) and longest <= TOGETHER_POSITIONS.get(
                device.type, 0
            ):
                slots = torch.zeros(len(lengths), longest, dtype=torch.int64)
                mask = torch.full((len(lengths), 1, 1, longest), float("-inf"), dtype=dtype)
                for row, (part, first, length) in enumerate(zip(self.parts, firsts, lengths, strict=True)):
                    slots[row] = part.table.slots(part.end)[first]  # what is hidden must still be finite
                    slots[row, :length] = part.table.slots(part.end)[first:]
                    mask[row, ..., :length] = 0.0
                self._together[window] = slots.view(-1).to(device), mask.to(device)
        return self._together[window]

    def _attend_part(self, index: int, pool: Tensor, q: Tensor, asked: Asked) -> Tensor:
        part, (_, scale, window, softcap) = self.parts[index], asked
        first = 0 if window is None else max(0, part.start + 1 - window)
        if part.table.contiguous:
            base = part.table.base
            kv = pool[:, :, base + first : base + part.end]
        else:
            kv = pool.index_select(2, part.table.slots(part.end)[first:].to(pool.device))
        k, v = kv[0], kv[1]  # (kv_heads, visible, head_dim)
        if part.hi - part.lo == 1:  # one position sees all that is there
            return attend_one(q, k, v, scale, None, softcap)
        if part.start == 0 and softcap is None and (window is None or part.end <= window):
            return attend_from_start(q, k, v, scale)
        return attend_one(q, k, v, scale, self._mask(index, first, window, q, k.shape[0]), softcap)

    def _mask(self, index: int, first: int, window: int | None, q: Tensor, kv_heads: int) -> Tensor:
        """Return what is added to the logits, 0 or -inf, in every layer: ``(group * tokens, visible)``."""
        mask = self._masks.get((index, window))
        if mask is None:
            part = self.parts[index]
            seen = visible(part.start, part.end, first, window, q.device)
            mask = torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill(~seen, float("-inf"))
            mask = mask.repeat(q.shape[0] // kv_heads, 1)
            self._masks[index, window] = mask
        return mask


def visible(start: int, end: int, first: int, window: int | None, device: torch.device) -> Tensor:
    """Return ``(end - start, end - first)`` bool: may position ``start + i`` see position ``first + j``."""
    queries = torch.arange(start, end, device=device)[:, None]
    keys = torch.arange(first, end, device=device)[None, :]
    mask = keys <= queries
    if window is not None:
        mask &= keys > queries - window
    return mask


def attend_from_start(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attend for a row's first positions: the kernel skips what causality hides, half of the work.

    Shapes as in `attend_one`, with as many visible positions as tokens.
    """
    group = q.shape[0] // k.shape[0]
    if group > 1:
        k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    return F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, scale=scale)[0]


def _attend_rows(
    q: Tensor, pool: Tensor, slots: Tensor, mask: Tensor, scale: float, softcap: float | None
) -> Tensor:
    """Attend for many rows with one new position each: ``q (heads, rows, head_dim)``, and so the result."""
    heads, rows, head_dim = q.shape
    kv_heads = pool.shape[1]
    kv = pool.index_select(2, slots).view(2, kv_heads, rows, -1, head_dim).transpose(1, 2)
    k, v = kv[0], kv[1]  # (rows, kv_heads, longest, head_dim)
    grouped = q.transpose(0, 1).reshape(rows, kv_heads, heads // kv_heads, head_dim)
    return _attend(grouped, k, v, scale, mask, softcap).reshape(rows, heads, head_dim).transpose(0, 1)


def attend_one(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, softcap: float | None
) -> Tensor:
    """Attend for one row, query heads grouped over their key heads.

    Parameters
    ----------
    q
        ``(heads, tokens, head_dim)``.
    k, v
        ``(kv_heads, visible, head_dim)``.
    mask
        Added to the logits, ``(heads / kv_heads * tokens, visible)``; None if all is visible.
    softcap
        Bound on the logits (Gemma 2, arXiv 2408.00118 section 2), None for none.

    Returns
    -------
    Tensor
        ``(heads, tokens, head_dim)``.
    """
    heads, tokens, head_dim = q.shape
    kv_heads = k.shape[0]
    grouped = q.reshape(kv_heads, heads // kv_heads * tokens, head_dim)  # group's heads stacked: no copy of k
    out = _attend(grouped[None], k[None], v[None], scale, mask, softcap)
    return out.reshape(heads, tokens, head_dim)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, softcap: float | None
) -> Tensor:
    """Attend where every query head has its own key head: ``(rows, heads, positions, head_dim)`` each."""
    if softcap is None:
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale)
    logits = torch.tanh(q @ k.transpose(-2, -1) * (scale / softcap)) * softcap
    if mask is not None:
        logits = logits + mask
    return torch.softmax(logits, dim=-1, dtype=torch.float32).to(q.dtype) @ v
