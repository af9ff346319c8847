"""A tuning edge in a few lines, the cloud's maths without a stream, and what both must equal.

The edge here is written out from the protocol's words and shares nothing with the edge client, so that a
mistake which both sides make would be seen.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from cloud_server.arena import Arena
from cloud_server.backbone import Backbone
from cloud_server.tune_slice import TuneSlice
from cloud_server.tuning import TuneBatch
from shared.plan import Plan
from shared.reference import Reference

Matrices = Mapping[int, Tensor]


class InDouble(TorchFunctionMode):
    """Lets Hugging Face's code compute in float64 where it would round to float32 in between."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.to and args[0].dtype is torch.float64 and args[1:2] == (torch.float32,):
            return args[0]
        if func is Tensor.float and args[0].dtype is torch.float64:
            return args[0]
        if func is F.softmax and args[0].dtype is torch.float64:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def loss_of(logits: Tensor, ids: Sequence[int]) -> Tensor:
    """Return the summed loss of one sequence, ``logits (tokens, vocabulary)``; any scalar would do."""
    return F.cross_entropy(logits[:-1], torch.tensor(ids[1:], dtype=torch.int64), reduction="sum")


class Head:
    """Embeddings, final norm and head of a plain model, its layers left out: what the edge has."""

    def __init__(self, model: Any) -> None:
        self.model, self.dtype = model, next(model.parameters()).dtype

    def embed(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """Return h0 of the sequences laid end to end: ``(tokens, hidden_size)``."""
        return torch.cat([self._run(torch.tensor([list(ids)]), at=0)[0] for ids in sequences])

    @torch.no_grad()
    def _run(self, ids: Tensor, at: int) -> Tensor:
        """Return what the first layer is given: families scale their embeddings inside the model."""
        seen: list[Tensor] = []

        class Stop(Exception):
            pass

        def hook(_: Any, args: Any, kwargs: Any) -> None:
            seen.append(args[0] if args else kwargs["hidden_states"])
            raise Stop

        handle = self.model.model.layers[at].register_forward_pre_hook(hook, with_kwargs=True)
        try:
            self.model(ids)
        except Stop:
            pass
        finally:
            handle.remove()
        return seen[0]

    def gradient(self, hidden: Tensor, sequences: Sequence[Sequence[int]]) -> tuple[float, Tensor]:
        """Return the loss and dL/dhL ``(tokens, hidden_size)`` for hL ``(tokens, hidden_size)``."""
        leaf = hidden.detach().requires_grad_()
        logits = self.model.lm_head(self.model.model.norm(leaf))
        cap = getattr(self.model.config, "final_logit_softcapping", None)
        if cap is not None:
            logits = torch.tanh(logits / cap) * cap
        parts = torch.split(logits, [len(ids) for ids in sequences])
        loss = sum(loss_of(part, ids) for part, ids in zip(parts, sequences, strict=True))
        (gradient,) = torch.autograd.grad(loss, leaf)  # type: ignore[arg-type]
        return float(loss.detach()), gradient  # type: ignore[union-attr]


class Learner:
    """What an edge makes of codes and gradients: z = cM, and dL/dM from what it has seen."""

    def __init__(self, plan: Plan, matrices: Matrices, dtype: torch.dtype = torch.float64) -> None:
        self.plan = plan
        self.matrices = {layer: m.to(dtype) for layer, m in matrices.items()}
        self.gradients = {layer: torch.zeros_like(m) for layer, m in self.matrices.items()}
        self.codes: dict[int, Tensor] = {}
        self.codes_gradients: dict[int, Tensor] = {}

    def residual_codes(self, layer: int) -> Tensor:
        """Return z of an adapted layer, ``(tokens, groups * r_d2c)``."""
        groups = self.codes[self.plan.source_of(layer)].chunk(self.plan.groups, dim=1)
        return torch.cat([c @ m for c, m in zip(groups, self.matrices[layer], strict=True)], dim=1)

    def learn(self, layer: int, dz: Tensor) -> None:
        """Add to dL/dM of a layer, and to dL/dc of the layer whose codes fed it."""
        source = self.plan.source_of(layer)
        groups, parts = self.codes[source].chunk(self.plan.groups, dim=1), dz.chunk(self.plan.groups, dim=1)
        for index, (c, g) in enumerate(zip(groups, parts, strict=True)):
            self.gradients[layer][index] += c.T @ g
        dc = torch.cat([g @ m.T for g, m in zip(parts, self.matrices[layer], strict=True)], dim=1)
        before = self.codes_gradients.get(source)
        self.codes_gradients[source] = dc if before is None else before + dc


def tune_directly(
    backbone: Backbone,
    plan: Plan,
    matrices: Matrices,
    head: Head,
    sequences: Sequence[Sequence[int]],
    make: Callable[..., TuneBatch] = TuneBatch,
    pool: Executor | None = None,
    **options: Any,
) -> tuple[float, dict[int, Tensor], Tensor]:
    """Run one batch through the cloud's maths; return the loss, dL/dM by layer and hL.

    With a pool its pieces run side by side.
    """
    lengths = [len(ids) for ids in sequences]
    tokens = sum(lengths)
    learner = Learner(plan, matrices, head.dtype)
    sent: deque[tuple[str, int, int, Tensor]] = deque()
    size = options.pop("arena_bytes", 4 << 20)
    arena = Arena(size) if size else None
    batch = make(backbone, plan, lengths, lambda *message: sent.append(message), arena=arena, **options)
    batch.put("hidden", 0, 0, head.embed(sequences))
    parts: dict[tuple[str, int], list[Tensor]] = {}
    loss, hidden = 0.0, torch.empty(0)
    while (piece := batch.next()) is not None:
        if pool is None:
            batch.run(piece)
        else:
            TuneSlice(batch, {}, 1.0, lambda: False, pool, lambda: False).run()
        while sent:
            name, layer, first, rows = sent.popleft()
            seen = parts.setdefault((name, layer), [])
            assert sum(map(len, seen)) == first, "rows leave in order"
            seen.append(rows.detach())
            if first + len(rows) < tokens:
                continue
            whole = torch.cat(parts.pop((name, layer)))
            if name == "codes":
                learner.codes[layer] = whole
                for fed in plan.fed_by(layer):
                    batch.put("residual_codes", fed, 0, learner.residual_codes(fed))
            elif name == "hidden":
                hidden = whole
                loss, gradient = head.gradient(whole, sequences)
                if not batch.forward_only:
                    batch.put("hidden_gradient", 0, 0, gradient)
            else:
                learner.learn(layer, whole)
                source = plan.source_of(layer)
                if layer == plan.fed_by(source)[0] and source != plan.exchange_layers[0]:
                    batch.put("codes_gradient", source, 0, learner.codes_gradients.pop(source))
    assert batch.finished and not parts and not batch._gathered
    assert not any(piece.kept for piece in batch.pieces)
    batch.free()
    return loss, learner.gradients, hidden


def reference_gradients(
    reference: Reference, sequences: Sequence[Sequence[int]]
) -> tuple[float, dict[int, Tensor]]:
    """Return the loss and dL/dM by layer from autograd on the single-process reference."""
    reference.model.requires_grad_(False)
    reference.zero_grad()
    total = 0.0
    for ids in sequences:
        loss = loss_of(reference(torch.tensor([list(ids)]), use_cache=False).logits[0], ids)
        loss.backward()
        total += float(loss.detach())
    gradients = {int(layer): m.grad for layer, m in reference.matrices.items()}
    return total, {layer: g for layer, g in gradients.items() if g is not None}
