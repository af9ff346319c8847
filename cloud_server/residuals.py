"""The low-rank matrices of every plan: codes c = xA on the way out, residuals zB on the way in.

Frozen, the same for all users. Knows nothing about layers' own weights, steps or personal weights.
"""

from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from shared.families import Geometry
from shared.lowrank import LowRank
from shared.plan import Plan

# Columns of z, columns of q|k|v (None: all), and what the former are multiplied with for the latter.
Residual: TypeAlias = "tuple[slice | None, slice | None, Tensor]"


class Residuals:
    """A and B of plans, ready to be multiplied with.

    Parameters
    ----------
    plans
        Name to (plan, A and B).
    geometry
        The model's widths.
    dtype, device
        What to compute in and on.
    """

    def __init__(
        self,
        plans: Mapping[str, tuple[Plan, LowRank]],
        geometry: Geometry,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        wide = torch.promote_types(dtype, torch.float32)
        self._a: dict[tuple[str, int], Tensor] = {}
        self._products: dict[tuple[str, int], list[Residual]] = {}
        for name, (plan, lowrank) in plans.items():
            for layer, a in lowrank.a.items():
                self._a[name, layer] = a.to(device, dtype)
            for layer, b in lowrank.b.items():
                scaled = (b.to(wide) * plan.scale).to(device, dtype)
                self._products[name, layer] = _products(scaled, plan, geometry)
        self._spread = {
            (name, layer): _spread_out(products, plans[name][0], geometry)
            for (name, layer), products in self._products.items()
        }

    def a(self, plan: Plan, layer: int) -> Tensor:
        """Return A of an exchanging layer: ``(hidden_size, codes_width)``."""
        return self._a[plan.name, layer]

    def add(self, qkv: Tensor, z: Tensor, plan: Plan, layer: int) -> None:
        """Add ``scale * zB`` in place. ``z (tokens, groups * r_d2c)``."""
        if z.shape[0] == 1:  # one product with zeros in it costs less there than one for each projection
            qkv.addmm_(z, self._spread[plan.name, layer])
            return
        for of_z, of_qkv, b in self._products[plan.name, layer]:
            _columns(qkv, of_qkv).addmm_(_columns(z, of_z), b)

    def residual_codes_gradient(
        self, gradient: Tensor, plan: Plan, layer: int, onto: Tensor | None = None
    ) -> Tensor:
        """Return dL/dz ``(tokens, groups * r_d2c)`` for dL/dqkv ``(tokens, q_dim + 2 kv_dim)``.

        It is added to ``onto``, in place: the gradient by way of others that share these residual codes.
        """
        dz = gradient.new_zeros(gradient.shape[0], plan.residual_width) if onto is None else onto
        for of_z, of_qkv, b in self._products[plan.name, layer]:
            _columns(dz, of_z).addmm_(_columns(gradient, of_qkv), b.t())
        return dz


def _products(b: Tensor, plan: Plan, g: Geometry) -> list[Residual]:
    """Return the products that make up ``scale * zB``, for ``b (r_d2c, d_out)`` with the scale in it."""
    if plan.layout == "fused" and len(plan.targets) == 3:
        return [(None, None, b)]
    at = {"q": 0, "k": g.q_dim, "v": g.q_dim + g.kv_dim}
    products: list[Residual] = []
    column = 0
    for index, target in enumerate(plan.targets):
        width = g.out_dim(target)
        group = None if plan.layout == "fused" else slice(index * plan.r_d2c, (index + 1) * plan.r_d2c)
        rows = slice(at[target], at[target] + width)
        products.append((group, rows, b[:, column : column + width]))
        column += width
    return products


def _spread_out(products: list[Residual], plan: Plan, g: Geometry) -> Tensor:
    """Return the products as one matrix ``(groups * r_d2c, q_dim + 2 kv_dim)`` with zeros in between."""
    if len(products) == 1 and products[0][:2] == (None, None):
        return products[0][2]
    spread = products[0][2].new_zeros(plan.residual_width, g.q_dim + 2 * g.kv_dim)
    for of_z, of_qkv, b in products:
        _columns(spread if of_z is None else spread[of_z], of_qkv).copy_(b)
    return spread


def _columns(tensor: Tensor, which: slice | None) -> Tensor:
    return tensor if which is None else tensor[:, which]
