"""What one rank of a replica holds: its heads, its columns of the MLP, its columns of B.

transformers states for every family which products are cut by their output (*colwise*: q, k, v, gate, up)
and which by their input (*rowwise*: o, down). That plan is the only source here; what it says of a
decoder layer is checked, and what it leaves open is refused by name. A rank's share is a smaller layer of
the same family, so Hugging Face's own modules run it unchanged; what they lack, the sums over ranks, is
added by `cloud_server.parallel_backbone`. Reads slices of tensors, never the whole. Knows no processes.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from shared.checkpoint import Checkpoint
from shared.families import Geometry, UnsupportedModelError, geometry
from shared.lowrank import LowRank
from shared.plan import Plan

# Styles of transformers' plans, by what they cut. Gathering and splitting in between is what DTensor needs
# around a fused product; here each of its parts is cut by itself, so none of that happens.
BY_OUTPUT = frozenset({"colwise", "colwise_rep", "colwise_gather_output"})
BY_INPUT = frozenset({"rowwise", "rowwise_rep", "rowwise_split_input"})
WHOLE = frozenset({"replicated_with_grad_allreduce"})  # norms of heads: each rank norms its own


@dataclass(frozen=True)
class Shard:
    """Which of how many equal shares."""

    rank: int
    ranks: int

    def part(self, width: int) -> slice:
        """Return this share of ``width`` rows or columns."""
        each = width // self.ranks
        return slice(self.rank * each, (self.rank + 1) * each)


@dataclass(frozen=True)
class Cut:
    """How a tensor is cut: along ``dim``, each of ``parts`` (widths, which lie side by side) by itself."""

    dim: int
    parts: tuple[int, ...]


@dataclass(frozen=True)
class ShardedCheckpoint(Checkpoint):
    """A checkpoint of which `load` reads one rank's share; ``config`` describes that share."""

    shard: Shard = Shard(0, 1)
    cuts: Mapping[str, Cut] = field(default_factory=dict)  # by the tensor's name in the checkpoint

    def _read(self, reader: Any, name: str) -> Tensor:
        cut = self.cuts.get(name)
        if cut is None:
            return super()._read(reader, name)
        stored, found, at = reader.get_slice(name), [], 0
        for width in cut.parts:
            part = self.shard.part(width)
            rows = slice(at + part.start, at + part.stop)
            found.append(stored[rows] if cut.dim == 0 else stored[:, rows])
            at += width
        return found[0] if len(found) == 1 else torch.cat(found, dim=cut.dim)


def sharded(checkpoint: Checkpoint, shard: Shard) -> ShardedCheckpoint:
    """Return one rank's share of a checkpoint.

    Raises
    ------
    UnsupportedModelError
        If heads or columns cannot be divided among so many ranks, or transformers has no plan for a product.
    """
    whole = checkpoint.geometry
    check_divisible(whole, shard.ranks)
    config = copy.deepcopy(checkpoint.config)
    config.head_dim = whole.head_dim  # else it follows from the number of heads
    config.num_attention_heads = whole.num_heads // shard.ranks
    config.num_key_value_heads = whole.num_kv_heads // shard.ranks
    config.intermediate_size = whole.intermediate_size // shard.ranks
    cuts: dict[str, Cut] = {}
    for layer in range(whole.num_layers):
        for local, name in checkpoint.layer_tensors(layer).items():
            cut = _cut(local, checkpoint.tensors[name].shape, checkpoint.config, whole)
            if cut is not None:
                cuts[name] = cut
    found = ShardedCheckpoint(
        checkpoint.id, checkpoint.folder, config, checkpoint.tensors, checkpoint.prefix, shard, cuts
    )
    expected = replace(
        whole,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        intermediate_size=config.intermediate_size,
    )
    if geometry(config) != expected:  # a family that derives other sizes from these would run wrong
        raise UnsupportedModelError(f"{whole.model_type}: a share of its heads is no model of its own")
    return found


def check_divisible(whole: Geometry, ranks: int) -> None:
    """Refuse a number of ranks that heads or the MLP's columns cannot be divided among.

    Raises
    ------
    UnsupportedModelError
        With the counts, and the numbers of ranks that would do.
    """
    counts = {
        "query heads": whole.num_heads,
        "key/value heads": whole.num_kv_heads,
        "MLP columns": whole.intermediate_size,
    }
    if odd := [f"{count} {what}" for what, count in counts.items() if count % ranks]:
        most = math.gcd(*counts.values())
        fitting = ", ".join(str(n) for n in range(1, most + 1) if most % n == 0)
        raise UnsupportedModelError(
            f"{' and '.join(odd)} cannot be divided among {ranks} ranks; this model runs on {fitting}"
        )


def sharded_lowrank(lowrank: LowRank, plan: Plan, whole: Geometry, shard: Shard) -> LowRank:
    """Return A as it is, and of B the columns that belong to this rank's part of each projection."""
    widths = [whole.out_dim(target) for target in plan.targets]
    columns, at = [], 0
    for width in widths:
        part = shard.part(width)
        columns.append(torch.arange(at + part.start, at + part.stop))
        at += width
    mine = torch.cat(columns) if columns else torch.empty(0, dtype=torch.int64)
    return LowRank(lowrank.a, {layer: b[:, mine] for layer, b in lowrank.b.items()})


def _cut(local: str, shape: tuple[int, ...], config: PreTrainedConfig, whole: Geometry) -> Cut | None:
    """Return how a decoder layer's tensor is cut, None if every rank holds all of it."""
    module, _, kind = local.rpartition(".")
    style = (config.base_model_tp_plan or {}).get(f"layers.*.{module}")
    if style in BY_OUTPUT:
        fused = {
            "qkv_proj": (whole.q_dim, whole.kv_dim, whole.kv_dim),
            "gate_up_proj": (whole.intermediate_size, whole.intermediate_size),
        }
        parts = fused.get(module.rpartition(".")[2], (shape[0],))
        if sum(parts) == shape[0]:
            return Cut(0, parts)
    elif style in BY_INPUT:
        return Cut(1, (shape[1],)) if kind == "weight" else None
    elif len(shape) == 1 and (style is None or style in WHOLE):
        return None
    raise UnsupportedModelError(
        f"{whole.model_type}: transformers' tensor-parallel plan says {style!r} of {local} {tuple(shape)}, "
        "which is not known here; serve it with one rank"
    )
