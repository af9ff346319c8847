"""How much memory a tuning batch takes, from sizes alone: what it is admitted by."""

import torch

from cloud_server.packed import block_positions
from shared.families import Geometry
from shared.plan import Plan

HOLES = 1.06  # what the process takes for each byte that is asked for
WIDE_BYTES = 4  # norms and softmax compute in float32 at least


def tuning_bytes(
    geometry: Geometry,
    plan: Plan,
    tokens: int,
    dtype: torch.dtype,
    checkpointing: bool,
    *,
    longest: int | None = None,
    piece_tokens: int = 128,
    side_by_side: int = 1,
) -> int:
    """Return the most bytes that a batch holds at any moment, weights and messages on their way aside.

    With ``e`` bytes an element, ``d`` the hidden size, ``qkv = q_dim + 2 kv_dim``, ``w`` the width of the
    MLP and ``n`` the layers from the lowest adapted one up (below it nothing has anything to learn), or all
    if the edge learns in layers below the cloud's::

        1.06 * (tokens * (n * kept + passing) + pieces * working)

    *kept*, per token and layer, until the batch is done:
        its input ``d`` and, with checkpointing, residual codes ``groups * r_d2c`` (once, where layers
        share them): the layer is run again.
        Without: q|k|v ``qkv``, rotated queries and keys ``q_dim + kv_dim``, what attention returns
        ``q_dim`` with a log-sum a head, the sum before the MLP ``d``, and ``2 w``: gate and up.
        Where a layer norms what it adds (Gemma), ``2 d`` more. Inputs of norms count in
        float32 if ``e`` is smaller, those of the norms of heads (Qwen 3, Gemma 3) only then. Where it
        bounds its logits (Gemma 2), copies of keys and values for every query head, and twice the logits:
        ``2 heads * visible positions``.
    *passing*, per token, at one layer at a time:
        three gradients on the way back, ``2 d + qkv``, and the residual codes that one
        exchange asks for, on their way in or their gradients out.
    *working*, per token of as many of the largest pieces as run side by side:
        gradients inside one layer, ``6 w + 2 d + 2 qkv``, and all that it computes, as under *kept*
        without checkpointing: before it is copied to where it is kept, or when it is run again.
    *1.06*:
        holes that short-lived tensors leave in the allocator's heap, messages on their way and what the
        first batch wakes; a server's peak rose by 1.05 to 1.07 of the rest, with checkpointing by 0.98 to
        1.01 (`benchmarks.tune_memory`).

    It holds for layers that run lean (`cloud_server.lean`); Hugging Face's own code keeps more.

    Parameters
    ----------
    geometry, plan
        Sizes.
    tokens
        Tokens of all sequences.
    dtype
        What the backbone computes in.
    checkpointing
        Whether layers are run again on the way back.
    longest
        Tokens of the longest sequence, ``tokens`` if not given.
    piece_tokens
        Most tokens in a piece; see `cloud_server.tuning.TuneBatch`.
    side_by_side
        Most pieces that run at a time; see `cloud_server.tune_slice.TuneSlice`.

    Returns
    -------
    int
        Bytes.
    """
    e, d, w = dtype.itemsize, geometry.hidden_size, geometry.intermediate_size
    qkv, longest = geometry.q_dim + 2 * geometry.kv_dim, longest or tokens
    kept = kept_bytes(geometry, plan, tokens, dtype, checkpointing, longest=longest)
    codes = e * plan.residual_width
    fed = max((len(plan.fed_by(layer)) for layer in plan.exchange_layers), default=0)
    pieces = min(tokens, side_by_side * max(piece_tokens, longest))
    working = e * (6 * w + 2 * d + 2 * qkv)
    passing = e * (2 * d + qkv) + fed * codes
    working += max((_graph_bytes(geometry, layer, longest, e) for layer in _kept_layers(plan)), default=0)
    return int(HOLES * (kept + tokens * passing + pieces * working))


def kept_bytes(
    geometry: Geometry, plan: Plan, tokens: int, dtype: torch.dtype, checkpointing: bool, *, longest: int
) -> int:
    """Return the bytes that all layers keep of a batch: *kept* in `tuning_bytes`, which see."""
    e, layers = dtype.itemsize, _kept_layers(plan)
    if checkpointing:
        codes = len(plan.owners) * plan.residual_width
        return tokens * e * (len(layers) * geometry.hidden_size + codes)
    return tokens * sum(_graph_bytes(geometry, layer, longest, e) for layer in layers)


def _kept_layers(plan: Plan) -> range:
    return range(plan.lowest_gradient, plan.cloud_layers.stop)


def _graph_bytes(geometry: Geometry, layer: int, longest: int, e: int) -> int:
    """Return what a layer with its graph keeps of one token (bytes)."""
    g, wide = geometry, max(e, WIDE_BYTES)
    d, heads, window = g.hidden_size, g.num_heads, g.windows[layer]
    kept = e * (d + (g.q_dim + 2 * g.kv_dim) + (g.q_dim + g.kv_dim) + g.q_dim + 2 * g.intermediate_size)
    norms = wide * (3 * d if g.has_sandwich_norms else d)
    if g.has_head_norms and e < wide:
        norms += wide * (g.q_dim + g.kv_dim)
    if not g.has_attention_cap:
        return kept + norms + wide * heads
    visible = longest if window is None else min(longest, block_positions(longest, window) + window - 1)
    return kept + norms + e * 2 * g.q_dim + heads * visible * (e + wide + (e if e < wide else 0))
