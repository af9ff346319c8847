"""lagged(k), an experiment: residuals from the codes of k positions before. No process serves this.

Where the paper has, at layer l and position t, the residual ``c_l[t] M_l B_l``, this has

    (c_l[t - k] M_l  +  c_0[t] N_l) B_l        c_l[t - k] = 0 where the sequence has no position t - k

with a second personal matrix N on the codes of the cloud's first layer, which the edge makes itself. So all
that a position needs is known before it runs: one round trip a token with nothing resident, and the bytes of
the paper's plan. But a step of one round trip holds at most k positions, for a later one needs codes of the
step itself: k - 1 drafts, none for k = 1; and a prompt exchanges at every layer, as in the paper's plan.

Only the single-process form is here, to find out by tuning (`benchmarks.tuning`) whether to build it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from shared import hf_names
from shared.lowrank import LowRank
from shared.plan import Plan, Target
from shared.reference import Matrices, Reference


def shifted(codes: Tensor, positions: Tensor, lag: int) -> Tensor:
    """Return the codes of ``lag`` positions before in the same sequence, zero where there are none.

    Parameters
    ----------
    codes
        ``(rows, tokens, width)``.
    positions
        ``(rows or 1, tokens)``: of each token in its own sequence; several sequences may follow each other
        in a row, each counting from 0.
    lag
        At least 1 (positions).
    """
    tokens = codes.shape[1]
    far = min(lag, tokens)
    moved = F.pad(codes[:, : tokens - far], (0, 0, far, 0))  # (rows, tokens, width)
    return moved.masked_fill((positions < lag)[..., None], 0)


class Lagged(Reference):
    """A Hugging Face model with lagged residuals added to its projections by hooks.

    Runs whole sequences only (``use_cache=False``): side by side, padded on the right, or several in one row
    with ``position_ids`` that begin at 0 for each.

    Parameters
    ----------
    model
        A plain Hugging Face causal language model; it gets hooks, its weights stay as they are.
    plan, lowrank
        The split and its frozen A and B; each adapted layer feeds itself, the cloud's first among them.
    lag
        k, at least 1 (positions).
    matrices, current
        M and N (groups, r_c2d, r_d2c) by adapted layer; zeros if None.

    Attributes
    ----------
    current : nn.ParameterDict
        Trainable copies of N under the layer's decimal name; ``matrices`` those of M.

    Raises
    ------
    ValueError
        If there is no such thing for the plan, or a matrix has another shape than it says.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        plan: Plan,
        lowrank: LowRank,
        lag: int,
        matrices: Matrices | None = None,
        current: Matrices | None = None,
    ) -> None:
        if lag < 1:
            raise ValueError(f"the lag is {lag} positions; it must be 1 or more")
        if not plan.first_codes_on_edge or plan.exchange_layers != plan.adapted_layers:
            raise ValueError(
                f"plan {plan.name!r}: a lagged residual needs a plan whose adapted layers all exchange, the "
                "cloud's first among them"
            )
        shape = (plan.groups, plan.r_c2d, plan.r_d2c)
        for layer, matrix in (current or {}).items():  # before there are hooks, which would stay
            if matrix.shape != shape:
                raise ValueError(f"N of layer {layer} has shape {tuple(matrix.shape)}, the plan says {shape}")
        super().__init__(model, plan, lowrank, matrices)
        self.lag, self.current = lag, nn.ParameterDict()
        for layer in plan.adapted_layers:
            start = torch.zeros(shape) if current is None else current[layer].detach().clone()
            self.current[str(layer)] = nn.Parameter(start.to(model.device))
        self._positions = torch.zeros(1, 0, dtype=torch.int64)
        decoder = model.get_submodule("model")
        self._handles.append(decoder.register_forward_pre_hook(self._begin, with_kwargs=True))

    def _begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note where each sequence of the forward that begins has its positions."""
        given = kwargs.get("input_ids", args[0] if args else None)
        given = kwargs.get("inputs_embeds") if given is None else given
        cache, positions = kwargs.get(hf_names.CACHE), kwargs.get("position_ids")
        if given is None or (cache is not None and cache.get_seq_length()):
            raise ValueError("lagged residuals are made for whole sequences: use_cache=False")
        tokens = given.shape[1]
        if positions is None:
            positions = torch.arange(tokens, device=given.device)[None]
        begins = positions == 0
        follows = F.pad(positions[:, 1:] == positions[:, :-1] + 1, (1, 0))  # the first follows nothing
        if positions.shape[-1] != tokens or not bool((begins | follows).all()):
            raise ValueError("each sequence's position_ids have to count from 0, without a gap")
        self._positions = positions

    def residual(self, layer: int, target: Target, columns: slice) -> Tensor:
        """Return scale * (c_l[t - k] M + c_0[t] N) B of one target for the positions under way."""
        before = shifted(self.codes[layer], self._positions.to(self.codes[layer].device), self.lag)
        known = self.codes[self.plan.exchange_layers[0]]  # (rows, tokens, groups * r_c2d)
        group = 0 if self.plan.layout == "fused" else self.plan.targets.index(target)
        own = slice(group * self.plan.r_c2d, (group + 1) * self.plan.r_c2d)
        m, n = (weights[str(layer)][group].to(before.dtype) for weights in (self.matrices, self.current))
        b = self._b[layer].to(before.dtype)[:, columns]
        out: Tensor = self.plan.scale * ((before[..., own] @ m + known[..., own] @ n) @ b)
        return out
