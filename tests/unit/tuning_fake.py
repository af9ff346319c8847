"""A tuning stream in this process, computed by the single-process reference: autograd instead of a wire."""

from collections.abc import Sequence
from typing import Any

import grpc
import torch
from torch import Tensor

from edge_client.recovery import Attempts
from edge_client.streams import SessionError
from edge_client.tuning.batch import Matrices
from edge_client.tuning.checkpoint import State
from edge_client.tuning.config import TuneConfig
from edge_client.tuning.examples import IGNORED, Example
from edge_client.tuning.learner import Learner, embedding
from edge_client.tuning.loss import Head
from edge_client.tuning.stream import TuneLimits
from edge_client.tuning.trainer import Trainer
from shared.plan import Plan
from shared.reference import Reference
from tests.families import build
from tests.plans import lowrank_for, plan_for

LIMITS = TuneLimits(max_batch_tokens=64, max_sequence_tokens=48)


class FakeStream:
    """Runs each sequence through the reference; checks what the real cloud checks."""

    input_gradient = None  # this plan has no layers below the cloud's

    def __init__(self, reference: Reference, limits: TuneLimits = LIMITS) -> None:
        self.reference, self.limits = reference, limits
        self.batches: list[tuple[tuple[int, ...], bool]] = []
        self.fail: set[tuple[int, str]] = set()  # (batch, way) at which the cloud is lost
        self.closed = False
        self._hidden: Tensor | None = None

    def forward(
        self, hidden: Tensor, lengths: Sequence[int], matrices: Matrices, *, forward_only: bool = False
    ) -> Tensor:
        assert not self.closed and self._hidden is None
        assert sum(lengths) == len(hidden) <= self.limits.max_batch_tokens
        assert max(lengths) <= self.limits.max_sequence_tokens
        self.batches.append((tuple(lengths), forward_only))
        self._maybe_fail("forward")
        with torch.no_grad():
            for layer, matrix in matrices.items():
                self.reference.matrices[str(layer)].copy_(matrix)
        found: list[Tensor] = []
        base: Any = self.reference.model.model
        hook = base.norm.register_forward_pre_hook(lambda _, args: found.append(args[0][0]))
        with torch.set_grad_enabled(not forward_only):
            for h0 in hidden.split(list(lengths)):
                base(inputs_embeds=h0[None], use_cache=False)
        hook.remove()
        result = torch.cat(found)
        self._hidden = None if forward_only else result
        return result.detach()

    def backward(self, gradient: Tensor) -> dict[int, Tensor]:
        self._maybe_fail("backward")
        assert self._hidden is not None
        parameters = dict(self.reference.matrices.items())
        found = torch.autograd.grad(self._hidden, list(parameters.values()), gradient)
        self._hidden = None
        return {int(layer): g for layer, g in zip(parameters, found, strict=True)}

    def close(self) -> None:
        self.closed = True

    def _maybe_fail(self, way: str) -> None:
        if (len(self.batches), way) in self.fail:
            self.fail.clear()
            raise SessionError("the connection to the cloud was lost (test)", grpc.StatusCode.UNAVAILABLE)


class Cloud:
    """Hands out streams, as a connection would."""

    def __init__(self, model_type: str = "llama", **options: Any) -> None:
        self.model = build(model_type, num_hidden_layers=2).double().requires_grad_(False)
        self.plan: Plan = plan_for(self.model, **{"rank": 4, **options})
        self.lowrank = lowrank_for(self.plan, self.model)
        self.reference = Reference(self.model, self.plan, self.lowrank, self.zeros())
        self.limits = LIMITS
        self.streams: list[FakeStream] = []
        self.fail: list[set[tuple[int, str]]] = []  # of the streams to come
        self.waits: list[float] = []
        self.attempts = Attempts.nowhere_else

    def open(self) -> FakeStream:
        self.streams.append(FakeStream(self.reference, self.limits))
        if self.fail:
            self.streams[-1].fail = self.fail.pop(0)
        return self.streams[-1]

    @property
    def head(self) -> Head:
        softcap = getattr(self.model.config, "final_logit_softcapping", None)
        return Head(self.model.model.norm, self.model.lm_head, softcap)

    def learner(self) -> Learner:
        embed = embedding(self.model.model.embed_tokens, torch.device("cpu"))
        return Learner(self.head, embed, lambda: self.open(), sleep=self.waits.append, attempts=self.attempts)

    def zeros(self) -> dict[int, Tensor]:
        plan = self.plan
        shape = (plan.groups, plan.r_c2d, plan.r_d2c)
        return {layer: torch.zeros(shape, dtype=torch.float64) for layer in plan.adapted_layers}

    def trainer(
        self, train: list[Example], validation: Sequence[Example] = (), state: State | None = None,
        save: Any = lambda state: None, **options: Any,
    ) -> Trainer:  # fmt: skip
        limits = (self.limits.max_batch_tokens, self.limits.max_sequence_tokens)
        config = TuneConfig(**{"batch_size": 4, **options}).settled(self.plan, *limits)
        start = State.begin(self.zeros()) if state is None else state
        return Trainer(config, self.learner(), train, validation, start, save)


def examples(count: int, *, seed: int = 0, longest: int = 20) -> list[Example]:
    """Return random sequences with a little structure to learn, of which only the end is learned."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for line in range(1, count + 1):
        length = int(torch.randint(6, longest, (1,), generator=generator))
        ids = torch.randint(4, 40, (length,), generator=generator)
        ids[length // 2 :] = ids[: length - length // 2] + 1
        labels = ids.clone()
        labels[: 1 + int(torch.randint(length - 2, (1,), generator=generator))] = IGNORED
        made.append(Example(ids, labels, line))
    return made


def direct_loss(reference: Reference, batch: Sequence[Example]) -> Tensor:
    """Return a batch's mean loss over its targets by the plain model, differentiable in M."""
    total = sum(example.targets for example in batch)
    parts = []
    for example in batch:
        logits = reference(example.ids[None]).logits[0, :-1]  # (tokens - 1, vocabulary)
        parts.append(torch.nn.functional.cross_entropy(logits, example.labels[1:], reduction="sum"))
    return sum(parts, torch.zeros((), dtype=torch.float64)) / total
