"""Decoder layers of which every rank holds a share, and where their results are summed.

    hidden (the same on all ranks) ─► norm ─► q, k, v of this rank's heads ─► attention over its own cache
      ─► its columns of o ─► SUM ─► + hidden ─► norm ─► its gate, up ─► its columns of down ─► SUM ─► + hidden

Two sums a layer, and hidden states are the same on all ranks after each. On the way back a sum passes the
gradient on as it is, and what was the same on all ranks (the input of gate and up, of q, k and v, the
residual codes) gets the sum of what the ranks have to say of it. Which layer runs is chosen when it is
loaded: a replica of one rank has none of this.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from cloud_server.backbone import Backbone
from cloud_server.layer import Layer
from cloud_server.lean import Product
from cloud_server.parallel_ranks import Ranks
from cloud_server.parallel_shard import ShardedCheckpoint, sharded_lowrank
from cloud_server.residuals import Residuals
from shared.families import Geometry
from shared.few_rows import product
from shared.lowrank import LowRank
from shared.plan import Plan


class _Sum(torch.autograd.Function):
    """The sum over ranks; its gradient is the same on all of them already."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, ranks: Ranks) -> Tensor:
        return ranks.sum(part.clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Same(torch.autograd.Function):
    """What is the same on all ranks and goes into products of which each has a part."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return whole.view_as(whole)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.ranks.sum(gradient.clone(memory_format=torch.contiguous_format)), None


def summed(part: Tensor, ranks: Ranks) -> Tensor:
    """Return the sum over ranks of ``part``, which nobody else looks at."""
    if torch.is_grad_enabled():
        total: Tensor = _Sum.apply(part, ranks)  # type: ignore[no-untyped-call]
        return total
    return ranks.sum(part.contiguous())


def same(whole: Tensor, ranks: Ranks) -> Tensor:
    """Return ``whole``, with the sum over ranks as its gradient."""
    if torch.is_grad_enabled():
        found: Tensor = _Same.apply(whole, ranks)  # type: ignore[no-untyped-call]
        return found
    return whole


class Summed(Product):
    """A projection of which this rank has some input columns; the bias is added once, to the sum."""

    def __init__(self, share: Product, ranks: Ranks) -> None:
        self.weight, self.bias, self.ranks = share.weight, share.bias, ranks

    def __call__(self, x: Tensor) -> Tensor:
        """Return the whole projection of this rank's ``x (tokens, share)``: ``(tokens, out_features)``."""
        total = summed(product(x, self.weight), self.ranks)
        return total if self.bias is None else total + self.bias

    def onto(self, base: Tensor, x: Tensor) -> Tensor:
        """Return ``base (tokens, out_features)`` plus the projection."""
        return base + self(x)


class Fed(Product):
    """A projection of which this rank has some output columns, of an input that all ranks have."""

    def __init__(self, share: Product, ranks: Ranks) -> None:
        self.weight, self.bias, self.ranks = share.weight, share.bias, ranks

    def __call__(self, x: Tensor) -> Tensor:
        """Return this rank's columns for ``x (tokens, in_features)``."""
        return super().__call__(same(x, self.ranks))


class SummedModule(nn.Module):
    """`Summed` for a layer that runs in Hugging Face's own code."""

    def __init__(self, share: nn.Linear, ranks: Ranks) -> None:
        super().__init__()
        self.share, self.ranks = share, ranks

    def forward(self, x: Tensor) -> Tensor:
        """Return the whole projection of this rank's ``x``."""
        total = summed(F.linear(x, self.share.weight), self.ranks)
        return total if self.share.bias is None else total + self.share.bias


class FedModule(nn.Module):
    """`Fed` for a layer that runs in Hugging Face's own code."""

    def __init__(self, share: nn.Module, ranks: Ranks) -> None:
        super().__init__()
        self.share, self.ranks = share, ranks

    def forward(self, x: Tensor) -> Tensor:
        """Return this rank's columns for ``x``."""
        found: Tensor = self.share(same(x, self.ranks))
        return found


class ParallelLayer(Layer):
    """One rank's share of a decoder layer; see `Layer`."""

    def __init__(self, module: nn.Module, rotary_key: str, *, lean: bool, ranks: Ranks) -> None:
        super().__init__(module, rotary_key, lean=lean)
        self.ranks = ranks
        if self.lean is not None:
            self.lean.out = Summed(self.lean.out, ranks)
            self.lean.down = Summed(self.lean.down, ranks)
            self.lean.gate_up = Fed(self.lean.gate_up, ranks)
            return
        attention: Any = module.self_attn
        mlp: Any = module.mlp
        attention.o_proj = SummedModule(attention.o_proj, ranks)
        mlp.down_proj = SummedModule(mlp.down_proj, ranks)
        name = "gate_up_proj" if hasattr(mlp, "gate_up_proj") else "gate_proj"
        setattr(mlp, name, FedModule(getattr(mlp, name), ranks))

    def base_gradient(self, gradient: Tensor) -> Tensor:
        """Return dL/dx ``(tokens, hidden_size)`` of all ranks' base products for this rank's dL/dqkv."""
        return self.ranks.sum(super().base_gradient(gradient).contiguous())


class ParallelResiduals(Residuals):
    """A whole, and this rank's columns of B; see `Residuals`."""

    ranks: Ranks

    def residual_codes_gradient(
        self, gradient: Tensor, plan: Plan, layer: int, onto: Tensor | None = None
    ) -> Tensor:
        """Return dL/dz of all ranks for this rank's dL/dqkv, added to ``onto`` in place."""
        dz = self.ranks.sum(super().residual_codes_gradient(gradient, plan, layer))
        return dz if onto is None else onto.add_(dz)


class ParallelBackbone(Backbone):
    """One rank's share of all decoder layers; see `Backbone`.

    Parameters
    ----------
    checkpoint
        This rank's share of the weights.
    plans
        Name to (plan, A and the whole of B).
    whole
        Sizes of the whole model.
    ranks
        The others.
    dtype, device, progress
        As in `Backbone`.
    """

    def __init__(
        self,
        checkpoint: ShardedCheckpoint,
        plans: Mapping[str, tuple[Plan, LowRank]],
        whole: Geometry,
        ranks: Ranks,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        progress: bool = False,
    ) -> None:
        self.ranks = ranks
        mine = {
            name: (plan, sharded_lowrank(lowrank, plan, whole, checkpoint.shard))
            for name, (plan, lowrank) in plans.items()
        }
        super().__init__(checkpoint, mine, dtype=dtype, device=device, progress=progress)
        self.plan_list = list(self.plans.values())  # commands name a plan by its place; the same on all ranks

    def _layer(self, module: nn.Module, rotary_key: str, *, lean: bool) -> Layer:
        return ParallelLayer(module, rotary_key, lean=lean, ranks=self.ranks)

    def _residuals(self, plans: Mapping[str, tuple[Plan, LowRank]]) -> Residuals:
        found = ParallelResiduals(plans, self.geometry, dtype=self.dtype, device=self.device)
        found.ranks = self.ranks
        return found
