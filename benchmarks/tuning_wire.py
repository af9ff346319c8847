"""PrivateLoRA as it is meant to run: M is tuned here, through a cloud in a process of its own.

A `benchmarks.tuning_learner.Learner` made of the edge's own parts, so that the benchmark's data, loop
and optimiser are the same for the split run as for the single-process reference.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.processes import CloudProcess
from benchmarks.tuning_learner import Batch
from edge_client.model import PrivateLoraForCausalLM
from edge_client.offer import fingerprint_message
from edge_client.tuning.examples import IGNORED, Example
from edge_client.tuning.learner import Learner, embedding
from edge_client.tuning.loss import Head, pack
from edge_client.tuning.stream import TuneStream
from shared import wire
from shared.adapter import m_shape
from shared.cache import cache_folder
from shared.plan import Plan


class Wire:
    """M of one plan, with losses and gradients from the cloud that an edge is connected to.

    Parameters
    ----------
    edge
        The edge's side of the model; stays the caller's to close.
    plan
        One that the cloud offers.
    wire_dtype
        Element type on the wire: ``float32``, ``bfloat16`` or ``float64``.
    """

    def __init__(self, edge: PrivateLoraForCausalLM, plan: Plan, wire_dtype: str) -> None:
        connection, offer = edge.connection, edge.offer
        assert connection is not None and offer is not None, "an edge from `from_cloud` has both"
        offered, fingerprint = offer.plan(plan.name)
        if offered != plan:
            raise ValueError(f"the cloud's plan {plan.name!r} is another one than is asked for")
        self.plan = plan
        self.parameters = [nn.Parameter(torch.zeros(m_shape(plan))) for _ in plan.owners]

        def open_stream() -> TuneStream:
            message = fingerprint_message(fingerprint)
            return connection.open_tuning(plan, message, wire.DTYPE_NAMES[wire_dtype])

        self._open = open_stream
        self._head = Head(edge.norm, edge.lm_head, edge.softcap)
        self._embed = embedding(edge.embed_tokens, edge.device)
        self._learner = Learner(self._head, self._embed, open_stream)
        self._scorer: TuneStream | None = None

    def _matrices(self) -> dict[int, Tensor]:
        return {n: p.detach() for n, p in zip(self.plan.owners, self.parameters, strict=True)}

    def loss_and_grads(self, batch: Batch) -> float:
        """Return the mean loss over answer tokens, and add its gradients to the parameters' ``grad``."""
        measured = self._learner.gradients(examples_of(batch), self._matrices())
        for layer, parameter in zip(self.plan.owners, self.parameters, strict=True):
            found = measured.gradients[layer]
            parameter.grad = found if parameter.grad is None else parameter.grad + found
        return measured.loss

    def answer_logits(self, batch: Batch) -> Tensor:
        """Return (answer tokens, vocabulary), float32, without gradients."""
        if self._scorer is None:
            self._scorer = self._open()
        logits: list[Tensor] = []
        for group in cut(examples_of(batch), self._scorer.limits.max_batch_tokens):
            packed = pack(group)
            hidden = self._embed(packed.ids)  # (tokens, hidden_size)
            last = self._scorer.forward(hidden, packed.lengths, self._matrices(), forward_only=True)
            with torch.no_grad():
                chosen = last[packed.positions].to(self._head.lm_head.weight)
                logits.append(self._head.logits(chosen).float().cpu())
        return torch.cat(logits)

    def close(self) -> None:
        """End the streams."""
        self._learner.close()
        if self._scorer is not None:
            self._scorer.close()


def examples_of(batch: Batch) -> list[Example]:
    """Return a batch's examples as the edge has them: each with its last token, and without padding."""
    out = []
    for row, ids in enumerate(batch.ids):
        mine = batch.rows == row
        positions, targets = batch.positions[mine], batch.targets[mine]
        whole = torch.cat([ids[: int(positions[-1]) + 1], targets[-1:]])
        labels = torch.full_like(whole, IGNORED)
        labels[positions + 1] = targets
        out.append(Example(whole, labels, row))
    return out


def cut(examples: Sequence[Example], tokens: int) -> Iterator[list[Example]]:
    """Cut examples into runs of at most ``tokens`` (at least one example each), in order."""
    group: list[Example] = []
    used = 0
    for example in examples:
        if group and used + len(example.ids) > tokens:
            yield group
            group, used = [], 0
        group.append(example)
        used += len(example.ids)
    if group:
        yield group


@contextmanager
def through_cloud(model: str, plan: Plan, dtype: str) -> Iterator[Wire]:
    """Start a cloud that offers ``plan``, connect to it, and end it when the block ends.

    Parameters
    ----------
    model
        What the cloud serves: packaged name, folder, GGUF file or hub id.
    plan
        The split; adapts every layer.
    dtype
        What the cloud computes in, and what goes over the wire.
    """
    offered = {"name", "r_c2d", "r_d2c", "layout", "initialiser", "scale"}
    arguments = ["--plan", plan.model_dump_json(include=offered), "--threads", str(torch.get_num_threads())]
    with (
        tempfile.TemporaryDirectory() as pins,  # this cloud's address means nothing later
        CloudProcess(model, dtype, [*arguments, "--cache-dir", str(cache_folder())]) as cloud,
        PrivateLoraForCausalLM.from_cloud(
            cloud.address, plan=plan.name, wire_dtype=dtype, dtype="float32", config_dir=Path(pins)
        ) as edge,
    ):
        learner = Wire(edge, plan, dtype)
        try:
            yield learner
        finally:
            learner.close()
