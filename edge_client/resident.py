"""Decoder layers that live on the edge: the model's first and last few, with a LoRA in each product.

Hugging Face's own layers of the model's family, run on one row of a session after another, or on whole
sequences when tuning. Their personal weights act here and are never exercised on the wire. Knows nothing
about sessions, the cloud or tokens.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig

from edge_client.hollow import hollow
from edge_client.part_tensors import read_layer
from edge_client.precision import check_factor, fitted
from edge_client.resident_cache import RowCache
from shared import hf_names
from shared.edge_parts import EdgePartsError
from shared.families import geometry, layer_types, rope_parameters
from shared.plan import Plan

Factors = Mapping[str, Tensor]  # by name, see `shared.lora`


class LoraLinear(nn.Module):
    """A frozen product and what personal weights add to it (arXiv 2106.09685): ``xW + scale (x down) up``."""

    def __init__(self, base: nn.Module, down: Tensor, up: Tensor, scale: float) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        self.factors = (down, up)  # not parameters of this module: whoever made it owns them

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(..., d_out)`` of ``x (..., d_in)``."""
        down, up = (factor.to(device=x.device, dtype=x.dtype) for factor in self.factors)
        y: Tensor = self.base(x)
        return torch.add(y, (x @ down) @ up, alpha=self.scale)


class Resident:
    """The resident layers of one plan, head and tail.

    Parameters
    ----------
    config
        The model's.
    plan
        Says which layers are here and what their LoRAs are.
    tensors
        Layer to local name to weight, as stored.
    device, dtype
        Where and in what they compute.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        plan: Plan,
        tensors: Mapping[int, Mapping[str, Tensor]],
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        self.plan, self.device, self.dtype = plan, torch.device(device), dtype
        own = _config_of(config, plan)
        with torch.device("meta"):
            skeleton = AutoModel.from_config(own)  # type: ignore[no-untyped-call]
        self.rotary_module = type(skeleton.rotary_emb)(own).to(self.device)
        kinds, windows = layer_types(config), geometry(config).windows
        self.rotary_kinds = tuple(k for k in rope_parameters(config) if k == "all" or k in kinds)
        self.kinds = [kinds[i] if kinds[i] in self.rotary_kinds else "all" for i in plan.resident_layers]
        self.windows = [windows[i] for i in plan.resident_layers]
        self.layers: list[nn.Module] = []
        for place, layer in enumerate(plan.resident_layers):
            module = skeleton.layers[place]
            weights = {
                name: fitted(f"layer {layer}: {name}", tensor, dtype, self.device)
                for name, tensor in tensors[layer].items()
            }
            module.load_state_dict(weights, strict=True, assign=True)
            self.layers.append(module.eval().requires_grad_(False))

    @classmethod
    def read(
        cls,
        config: PreTrainedConfig,
        plan: Plan,
        folder: Path,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> "Resident":
        """Read the layers from verified parts.

        Raises
        ------
        EdgePartsError
            If the plan or a layer's file does not fit the model's code, or numbers do not fit ``dtype``.
        """
        with torch.device("meta"):
            skeleton = AutoModel.from_config(_config_of(config, plan))  # type: ignore[no-untyped-call]
        tensors = {}
        products = {
            name: (part.in_features, part.out_features)
            for name, part in skeleton.layers[0].named_modules()
            if isinstance(part, nn.Linear)
        }
        for projection in plan.lora:
            if products.get(projection.name) != (projection.d_in, projection.d_out):
                raise EdgePartsError(
                    f"plan {plan.name!r} puts a LoRA beside {projection.name} of {projection.d_in} x "
                    f"{projection.d_out}, which this model's layers do not have"
                )
        for place, layer in enumerate(plan.resident_layers):
            state = skeleton.layers[place].state_dict()
            tensors[layer] = read_layer(folder, layer, {name: tuple(t.shape) for name, t in state.items()})
        return cls(config, plan, tensors, device, dtype)

    def with_factors(self, factors: Factors) -> "Resident":
        """Return the same layers, sharing their weights, with these LoRAs in them.

        Raises
        ------
        AdapterError
            If a factor holds numbers that are infinite in what these layers compute in.
        """
        bound = copy.copy(self)
        bound.layers = []
        for layer, module in zip(self.plan.resident_layers, self.layers, strict=True):
            shared: dict[int, Any] = {
                id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())
            }
            twin = copy.deepcopy(module, shared)
            for projection in self.plan.lora:
                path = f"layers.{layer}.{projection.name}"
                for factor in (f"{path}.down", f"{path}.up"):
                    check_factor(factor, factors[factor], self.dtype)
                parent, _, name = projection.name.rpartition(".")
                owner = twin.get_submodule(parent)
                lora = LoraLinear(
                    getattr(owner, name), factors[f"{path}.down"], factors[f"{path}.up"], self.plan.lora_scale
                )
                setattr(owner, name, lora)
            bound.layers.append(twin)
        return bound

    def run(self, places: range, hidden: Tensor, cache: RowCache) -> Tensor:
        """Run layers on new positions of one row, which ``cache`` then holds.

        Parameters
        ----------
        places
            Which of `layers`.
        hidden
            ``(positions, hidden_size)``; they follow what the cache holds.
        cache
            Keys and values of these layers for this row.

        Returns
        -------
        Tensor
            Like ``hidden``.
        """
        start, count = cache.length, len(hidden)
        x = hidden.to(device=self.device, dtype=self.dtype)[None]  # (1, positions, hidden_size)
        rotary = self._rotary(torch.arange(start, start + count, device=self.device), x)
        for place in places:
            mask = self._mask(count, start, self.windows[place])
            held = {hf_names.CACHE: cache}
            x = self.layers[place](
                x, position_embeddings=rotary[self.kinds[place]], attention_mask=mask, **held
            )
        cache.length = start + count
        out: Tensor = x[0].to(device=hidden.device, dtype=hidden.dtype)
        return out

    def run_whole(self, places: range, hidden: Tensor, lengths: Sequence[int]) -> Tensor:
        """Run layers on whole sequences, differentiable in ``hidden`` and the LoRAs.

        Parameters
        ----------
        places
            Which of `layers`.
        hidden
            The sequences laid end to end: ``(tokens, hidden_size)``.
        lengths
            Tokens of each.

        Returns
        -------
        Tensor
            Like ``hidden``.
        """
        rows = list(torch.split(hidden.to(device=self.device, dtype=self.dtype), list(lengths)))
        out = [self._run_padded(places, rows[lo:hi]) for lo, hi in _runs(lengths)]
        return torch.cat(out).to(device=hidden.device, dtype=hidden.dtype)

    def _run_padded(self, places: range, rows: list[Tensor]) -> Tensor:
        """Run layers on sequences side by side; return them end to end."""
        lengths = [len(row) for row in rows]
        longest = max(lengths)
        x = nn.utils.rnn.pad_sequence(rows, batch_first=True)  # (sequences, longest, hidden_size)
        rotary = self._rotary(torch.arange(longest, device=self.device), x)
        for place in places:
            # Attention is causal and padding comes last: no position that is read sees any of it.
            mask = self._mask(longest, 0, self.windows[place])
            x = self.layers[place](x, position_embeddings=rotary[self.kinds[place]], attention_mask=mask)
        return torch.cat([row[:length] for row, length in zip(x, lengths, strict=True)])

    def _rotary(self, positions: Tensor, like: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        if self.rotary_kinds == ("all",):
            return {"all": self.rotary_module(like, positions[None])}
        return {kind: self.rotary_module(like, positions[None], kind) for kind in self.rotary_kinds}

    def _mask(self, count: int, start: int, window: int | None) -> Tensor | None:
        """Return what is added to attention's logits ``(1, 1, count, start + count)``; None to see all."""
        if count == 1 and (window is None or start < window):
            return None
        queries = torch.arange(start, start + count, device=self.device)[:, None]
        keys = torch.arange(start + count, device=self.device)[None]
        hidden = keys > queries
        if window is not None:
            hidden |= keys <= queries - window
        mask = torch.zeros(hidden.shape, dtype=self.dtype, device=self.device)
        return mask.masked_fill_(hidden, -math.inf)[None, None]


def _runs(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Cut sequences into runs ``(first, end)`` of which padding takes no more than half."""
    runs: list[tuple[int, int]] = []
    lo, longest, tokens = 0, 0, 0
    for index, length in enumerate(lengths):
        longest, tokens = max(longest, length), tokens + length
        if (index + 1 - lo) * longest > 2 * tokens:
            runs.append((lo, index))
            lo, longest, tokens = index, length, length
    return [*runs, (lo, len(lengths))]


def _config_of(config: PreTrainedConfig, plan: Plan) -> PreTrainedConfig:
    """Return a config whose layers are the resident ones alone."""
    own = hollow(config, plan.resident_layers)
    # Bounded logits exist in Hugging Face's plain attention only.
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    own._attn_implementation = "eager" if capped else "sdpa"
    return own
