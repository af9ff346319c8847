"""The frozen decoder layers, run in segments over a ragged batch.

An adapted layer runs in two calls: ``emit`` makes the codes xA (and ``stash`` the base q, k, v
products while the codes are in flight), ``run`` is the layer itself on stash + residual. What a layer is
and how it runs is `cloud_server.layer`'s matter, what A and B add `cloud_server.residuals`'s. Knows
nothing about tokens, personal weights or the network.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel

from cloud_server.attention import ATTENTION_NAME, CachedAttention, Part
from cloud_server.kv_cache import KvCache, Table
from cloud_server.layer import PROBE_TOKENS, Layer, Probe
from cloud_server.lean import Rotary
from cloud_server.residuals import Residuals
from cloud_server.step import Step
from shared.families import geometry, layer_types, rope_parameters
from shared.lowrank import LowRank
from shared.models import Checkpoint
from shared.plan import Plan


@dataclass
class Slice:
    """Tokens ``lo..hi-1`` of a step, the unit that is scheduled."""

    step: Step
    lo: int
    hi: int
    tables: tuple[Table, ...] = field(init=False)  # one a span
    whole: bool = field(init=False)  # all of the step

    def __post_init__(self) -> None:
        """Keep the block tables: a session may crop or close while this runs on another thread."""
        self.tables = tuple(span.row.table for span in self.step.spans)
        self.whole = self.lo == 0 and self.hi == self.step.tokens

    def of(self, tensor: Tensor | None) -> Tensor:
        """Return the slice's rows of one of its step's tensors."""
        assert tensor is not None
        return tensor if self.whole else tensor[self.lo : self.hi]


@dataclass(frozen=True)
class Layout:
    """Where a batch's tokens belong: the same in every layer, so made once.

    ``rotary`` is by layer type or under "all".
    """

    attention: CachedAttention
    rotary: dict[str, Rotary]


class Backbone:
    """Decoder layers of one model, with A and B of every plan it serves.

    Parameters
    ----------
    checkpoint
        Where the weights are; only tensors of the served decoder layers are read.
    plans
        Name to (plan, A and B).
    dtype, device
        What to compute in and on.
    progress
        Whether to show a progress bar while loading.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        plans: Mapping[str, tuple[Plan, LowRank]],
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        progress: bool = False,
    ) -> None:
        self.geometry = geometry(checkpoint.config)
        self.dtype, self.device = dtype, torch.device(device)
        self.plans = {name: plan for name, (plan, _) in plans.items()}
        served = sorted({layer for plan in self.plans.values() for layer in plan.cloud_layers})
        self.served = range(served[0], served[-1] + 1)
        config = checkpoint.config
        config._attn_implementation = ATTENTION_NAME
        with torch.device("meta"):  # the skeleton costs no memory; layers get their tensors one by one
            skeleton = AutoModel.from_config(  # type: ignore[no-untyped-call]
                config, attn_implementation=ATTENTION_NAME
            )
        kinds = layer_types(config)
        names = {
            name: (layer, local)
            for layer in self.served
            for local, name in checkpoint.layer_tensors(layer).items()
        }
        tensors = checkpoint.load(names, dtype=dtype, device=str(self.device), progress=progress)
        by_layer: dict[int, dict[str, Tensor]] = {layer: {} for layer in self.served}
        for name, tensor in tensors.items():
            layer, local = names[name]
            by_layer[layer][local] = tensor
        del tensors
        self.rotary_kinds = tuple(kind for kind in rope_parameters(config) if kind == "all" or kind in kinds)
        self._last_layout: tuple[Any, Layout] | None = None
        # Rotary frequencies are computed, not stored, so this module is made outside "meta".
        self.rotary_module = type(skeleton.rotary_emb)(config).to(self.device)
        probe = Probe(self.rotary(torch.arange(PROBE_TOKENS)))
        self.layers: dict[int, Layer] = {}
        for layer in self.served:
            module = skeleton.layers[layer]
            module.load_state_dict(by_layer.pop(layer), strict=True, assign=True)
            module.eval().requires_grad_(False)
            rotary_key = kinds[layer] if kinds[layer] in self.rotary_kinds else "all"
            self.layers[layer] = self._layer(module, rotary_key, lean=probe.agrees(module, rotary_key))
        self.residuals = self._residuals(plans)

    def _layer(self, module: nn.Module, rotary_key: str, *, lean: bool) -> Layer:
        return Layer(module, rotary_key, lean=lean)

    def _residuals(self, plans: Mapping[str, tuple[Plan, LowRank]]) -> Residuals:
        return Residuals(plans, self.geometry, dtype=self.dtype, device=self.device)

    def rotary(self, positions: Tensor) -> dict[str, Rotary]:
        """Return what rotates queries and keys at ``positions (tokens,)``, by layer type (or "all")."""
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        ids = positions.to(self.device)[None]
        if self.rotary_kinds == ("all",):
            return {"all": Rotary.of(*self.rotary_module(like, ids))}
        return {kind: Rotary.of(*self.rotary_module(like, ids, kind)) for kind in self.rotary_kinds}

    def emit(self, steps: Sequence[Step]) -> list[Tensor]:
        """Return the codes xA of steps that stand at the same layer, ``(tokens, codes_width)`` each.

        Leaves the normed input in ``step.normed`` for ``stash`` and ``run``.
        """
        layer = steps[0].layer
        if len(steps) == 1:  # everything around the products counts there
            step = steps[0]
            step.normed, step.emitted = self.layers[layer].norm(step.hidden), layer
            return [step.normed @ self.residuals.a(step.plan, layer)]
        x = self.layers[layer].norm(_cat([step.hidden for step in steps]))  # (tokens, hidden_size)
        codes: list[Tensor] = []
        for step, part in zip(steps, _split(x, steps), strict=True):
            step.normed, step.emitted = part, layer
        for _, same_plan in groupby(steps, key=lambda step: step.plan.name):
            alike = list(same_plan)
            a = self.residuals.a(alike[0].plan, layer)  # (hidden_size, codes_width)
            # One product for all of them where they share a plan, which is the common case.
            shared = x if len(alike) == len(steps) else _cat([_of(step.normed) for step in alike])
            codes += _split(shared @ a, alike)
        return codes

    def stash(self, steps: Sequence[Step]) -> None:
        """Compute the base q, k, v products of steps whose codes are in flight."""
        layer = self.layers[steps[0].layer]
        base = layer.base(_cat([_of(step.normed) for step in steps]))
        for step, part in zip(steps, _split(base, steps), strict=True):
            step.stash = part

    def run(self, slices: Sequence[Slice], cache: KvCache) -> None:
        """Run one layer on slices of steps that stand at it; whole steps then stand at the next layer."""
        number = slices[0].step.layer
        layer = self.layers[number]
        hidden = _cat([s.of(s.step.hidden) for s in slices])  # (tokens, hidden_size)
        qkv = self._products(layer, number, hidden, slices)
        layout = self._layout(slices, cache)
        out = layer(hidden, qkv, layout.rotary[layer.rotary_key], layout.attention)
        at = 0
        for s in slices:
            count = s.hi - s.lo
            if s.whole:
                s.step.hidden = out if len(slices) == 1 else out[at : at + count]
            else:
                s.step.hidden[s.lo : s.hi] = out[at : at + count]
            at += count
            s.step.offset = s.hi
            if s.hi == s.step.tokens:
                s.step.layer, s.step.offset = number + 1, 0
                s.step.stash = s.step.normed = None
                owner = s.step.plan.owner_of(number)
                if owner is not None and number == s.step.plan.served_by(owner)[-1]:
                    s.step.residual_codes.pop(owner)

    def _layout(self, slices: Sequence[Slice], cache: KvCache) -> Layout:
        """Return what these slices need in every layer; steps that stay together share it down the stack."""
        key = tuple((s.step.serial, s.lo, s.hi, s.tables) for s in slices)
        if self._last_layout is None or self._last_layout[0] != key:
            layout = Layout(CachedAttention(cache, _parts(slices)), self._rotary(slices))
            self._last_layout = key, layout
        return self._last_layout[1]

    def _rotary(self, slices: Sequence[Slice]) -> dict[str, Rotary]:
        """Return the slices' rotary embeddings, of which each step keeps its own down the stack."""
        for s in slices:
            if not s.step.rotary:
                s.step.rotary = self.rotary(s.step.positions)
        if len(slices) == 1 and slices[0].whole:
            return slices[0].step.rotary
        return {
            kind: Rotary(
                *(
                    torch.cat([s.step.rotary[kind][i][:, s.lo : s.hi] for s in slices], dim=1)
                    for i in range(len(Rotary._fields))
                )
            )
            for kind in self.rotary_kinds
        }

    def _products(self, layer: Layer, number: int, hidden: Tensor, slices: Sequence[Slice]) -> Tensor:
        """Return q|k|v with every residual added: ``(tokens, q_dim + 2 kv_dim)``."""
        if all(s.step.stash is not None for s in slices):
            qkv = _cat([s.of(s.step.stash) for s in slices])
        elif all(s.step.normed is not None for s in slices):
            qkv = layer.base(_cat([s.of(s.step.normed) for s in slices]))
        else:  # no codes were made here, or not by all: one norm and one product serve them together
            qkv = layer.base(layer.norm(hidden))
        at = 0
        for _, same_plan in groupby(slices, key=lambda s: s.step.plan.name):
            alike = list(same_plan)
            plan = alike[0].step.plan
            count = sum(s.hi - s.lo for s in alike)
            owner = plan.owner_of(number)
            if owner is not None:
                z = _cat([s.of(s.step.residual_codes[owner]) for s in alike])
                self.residuals.add(qkv if count == len(qkv) else qkv[at : at + count], z, plan, number)
            at += count
        return qkv


def _of(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def _cat(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tuple(tensors))


def _split(tensor: Tensor, steps: Sequence[Step]) -> Sequence[Tensor]:
    return (tensor,) if len(steps) == 1 else torch.split(tensor, [step.tokens for step in steps])


def _parts(slices: Sequence[Slice]) -> list[Part]:
    """Cut the slices' spans into parts of the batch that each belong to one row."""
    parts, at = [], 0
    for s in slices:
        first = 0  # token of the step where the span begins
        for span, table in zip(s.step.spans, s.tables, strict=True):
            lo, hi = max(s.lo, first), min(s.hi, first + span.count)
            if lo < hi:
                parts.append(Part(table, at + lo - s.lo, at + hi - s.lo, span.start + lo - first))
            first += span.count
        at += s.hi - s.lo
    return parts
