"""The single-process reference: what the split must equal.

Two forms of the same claim. `merged` writes scale * A M B into the weights of a plain Hugging Face
model, so that nothing of this project runs when it generates. `Reference` leaves the weights alone
and adds the residual from hooks; it also covers plans whose residual depends on another layer and
cannot be merged, and is differentiable in M. Both share no code with the split path beyond the plan
and the A/B initialisers, nor with each other where they compute: shared mistakes would hide.
"""

import copy
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shared.lora import fresh_factors
from shared.lowrank import LowRank
from shared.plan import Plan, Target

Matrices = Mapping[int, Tensor]  # owner -> M (groups, r_c2d, r_d2c)
Rows = dict[Target, tuple[nn.Linear, slice]]
ModelT = TypeVar("ModelT", bound=PreTrainedModel)


def projections(model: PreTrainedModel, layer: int) -> Rows:
    """Return, for q, k and v of a layer, the product that computes it and the rows it owns there."""
    attention: Any = model.get_submodule(f"model.layers.{layer}.self_attn")
    if not hasattr(attention, "qkv_proj"):
        q, k, v = attention.q_proj, attention.k_proj, attention.v_proj
        return {
            "q": (q, slice(0, q.out_features)),
            "k": (k, slice(0, k.out_features)),
            "v": (v, slice(0, v.out_features)),
        }
    # Phi-3 stacks the rows of q, k and v in one product.
    config, stacked = model.config, attention.qkv_proj
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    first, width = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    return {
        "q": (stacked, slice(0, first)),
        "k": (stacked, slice(first, first + width)),
        "v": (stacked, slice(first + width, first + 2 * width)),
    }


def _columns(plan: Plan, rows: Rows) -> dict[Target, slice]:
    """Return the columns of B that belong to each target, in the plan's order."""
    columns: dict[Target, slice] = {}
    start = 0
    for target in plan.targets:
        owned = rows[target][1]
        columns[target] = slice(start, start + owned.stop - owned.start)
        start = columns[target].stop
    return columns


def delta(plan: Plan, lowrank: LowRank, matrices: Matrices, layer: int, rows: Rows) -> dict[Target, Tensor]:
    """Return scale * A M B per target of one layer, as (hidden_size, d_out) in fp64.

    The paper's W' = W + A M B in row-vector form (arXiv 2311.14030, section 3.1).

    Raises
    ------
    ValueError
        If the layer's codes come from another layer: then no matrix equals its residual.
    """
    if plan.source_of(layer) != layer:
        raise ValueError(
            f"layer {layer} of plan {plan.name!r} takes its codes from layer {plan.source_of(layer)}, so its "
            "residual cannot be merged into its weights; use Reference instead"
        )
    # A layer that takes its own codes shares the M of no other: it is the first that they feed.
    a, m, b = lowrank.a[layer].double(), matrices[layer].double(), lowrank.b[layer].double()
    columns, out = _columns(plan, rows), {}
    for index, target in enumerate(plan.targets):
        if plan.layout == "fused":
            product = a @ m.squeeze(0) @ b  # (hidden_size, d_out of all targets)
            out[target] = plan.scale * product[:, columns[target]]
        else:
            a_own = a.chunk(plan.groups, dim=1)[index]  # (hidden_size, r_c2d)
            out[target] = plan.scale * (a_own @ m[index] @ b[:, columns[target]])
    return out


def merged(
    model: ModelT,
    plan: Plan,
    lowrank: LowRank,
    matrices: Matrices,
    factors: Mapping[str, Tensor] = MappingProxyType({}),
) -> ModelT:
    """Return a copy of ``model`` whose q, k and v weights hold W + scale * A M B.

    Parameters
    ----------
    model
        A plain Hugging Face causal language model of a supported family; it is not changed.
    plan, lowrank, matrices
        The split, its frozen A and B, and M (groups, r_c2d, r_d2c) by owner.
    factors
        LoRA factors of resident layers (`shared.lora`): their weights hold W + lora_scale * down up.

    Raises
    ------
    ValueError
        If the plan has a layer that is fed by another layer's codes.

    Notes
    -----
    Sums are taken in fp64 and rounded once to the weights' dtype.
    """
    result = copy.deepcopy(model)
    with torch.no_grad():
        for layer in plan.adapted_layers:
            rows = projections(result, layer)
            for target, change in delta(plan, lowrank, matrices, layer, rows).items():
                linear, owned = rows[target]
                weight = linear.weight[owned]  # (d_out, hidden_size), a view
                weight.copy_(weight.double() + change.T.to(weight.device))
        for layer in plan.resident_layers:
            for projection in plan.lora if factors else ():
                weight = result.get_parameter(f"model.layers.{layer}.{projection.name}.weight")
                down, up = (factors[f"layers.{layer}.{projection.name}.{part}"] for part in ("down", "up"))
                change = plan.lora_scale * (down.double() @ up.double())  # (d_in, d_out)
                weight.copy_(weight.double() + change.T.to(weight.device))
    return result


class Reference(nn.Module):
    """A Hugging Face model with scale * ((x A) M) B added to its projections by hooks.

    Parameters
    ----------
    model
        A plain Hugging Face causal language model; it gets hooks, its weights stay as they are.
    plan, lowrank
        The split and its frozen A and B; any schedule in which a layer is fed by an earlier one.
    matrices
        M (groups, r_c2d, r_d2c) by owner (`Plan.owners`); zeros if None.
    factors
        LoRA factors of resident layers by name (`shared.lora`); those that tuning starts from if None.

    Attributes
    ----------
    matrices : nn.ParameterDict
        Trainable copies of M under its owner's decimal name. Freeze the rest with
        ``model.requires_grad_(False)`` to train M and the factors alone.
    factors : nn.ParameterDict
        Trainable copies of the factors, with "/" for "." in their names.
    codes : dict[int, Tensor]
        x A of the last forward by exchange layer, (..., groups * r_c2d): what the edge would see.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        plan: Plan,
        lowrank: LowRank,
        matrices: Matrices | None = None,
        factors: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.model, self.plan = model, plan
        self.matrices, self.factors = nn.ParameterDict(), nn.ParameterDict()
        self.codes: dict[int, Tensor] = {}
        device, shape = model.device, (plan.groups, plan.r_c2d, plan.r_d2c)
        self._a = {layer: lowrank.a[layer].to(device) for layer in plan.exchange_layers}
        self._b = {layer: lowrank.b[layer].to(device) for layer in plan.adapted_layers}
        for layer in plan.owners:
            start = torch.zeros(shape) if matrices is None else matrices[layer].detach().clone()
            if start.shape != shape:
                raise ValueError(f"M of layer {layer} has shape {tuple(start.shape)}, the plan says {shape}")
            self.matrices[str(layer)] = nn.Parameter(start.to(device))
        self._handles = [
            handle
            for layer in sorted({*plan.exchange_layers, *plan.adapted_layers})
            for handle in self._hook(layer)
        ]
        for name, factor in (fresh_factors(plan, 0) if factors is None else factors).items():
            self.factors[name.replace(".", "/")] = nn.Parameter(factor.detach().clone().to(device))
        for layer in plan.resident_layers:
            for projection in plan.lora:
                module = model.get_submodule(f"model.layers.{layer}.{projection.name}")
                path = f"layers/{layer}/{projection.name.replace('.', '/')}"
                self._handles.append(module.register_forward_hook(self._beside(path)))

    def _hook(self, layer: int) -> list[Any]:
        rows, handles = projections(self.model, layer), []

        if layer in self.plan.exchange_layers:

            def emit(_: nn.Module, args: tuple[Tensor, ...]) -> None:
                (x,) = args  # (..., hidden_size)
                self.codes[layer] = x @ self._a[layer].to(x.dtype)  # (..., groups * r_c2d)

            # The query product runs first in every family, and sees the same x as the others.
            handles.append(rows["q"][0].register_forward_pre_hook(emit))

        if layer in self.plan.adapted_layers:
            for target, columns in _columns(self.plan, rows).items():
                linear, owned = rows[target]

                def add(
                    _: nn.Module, __: Any, y: Tensor, target: Target = target,
                    owned: slice = owned, columns: slice = columns,
                ) -> Tensor:  # fmt: skip
                    changed = y.clone()
                    changed[..., owned] += self.residual(layer, target, columns)
                    return changed

                handles.append(linear.register_forward_hook(add))
        return handles

    def _beside(self, path: str) -> Any:
        """Return a hook that adds a LoRA to what a product returns."""

        def add(_: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
            (x,) = args  # (..., d_in)
            down, up = (self.factors[f"{path}/{part}"].to(x.dtype) for part in ("down", "up"))
            beside: Tensor = self.plan.lora_scale * ((x @ down) @ up)  # (..., d_out)
            return y + beside

        return add

    def residual(self, layer: int, target: Target, columns: slice) -> Tensor:
        """Return scale * ((x A) M) B of one target for the positions of the forward under way."""
        codes = self.codes[self.plan.source_of(layer)]
        owner = max(owner for owner in self.plan.owners if owner <= layer)
        m, b = self.matrices[str(owner)].to(codes.dtype), self._b[layer].to(codes.dtype)
        group = 0 if self.plan.layout == "fused" else self.plan.targets.index(target)
        own = codes[..., group * self.plan.r_c2d : (group + 1) * self.plan.r_c2d]  # (..., r_c2d)
        out: Tensor = self.plan.scale * (own @ m[group] @ b[:, columns])  # (..., d_out of the target)
        return out

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model; arguments and result are the model's own."""
        return self.model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate with the model; arguments and result are the model's own."""
        return self.model.generate(*args, **kwargs)  # type: ignore[operator]

    def remove(self) -> None:
        """Take the hooks off, which leaves the model as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.codes.clear()
