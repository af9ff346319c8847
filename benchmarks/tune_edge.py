"""What the tuning benchmarks share: rows of given lengths, and an edge that tunes on them a step at a time.

The edge is the real one, its learner and its optimiser, driven by hand: no data file, no checkpoints.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from edge_client.model import PrivateLoraForCausalLM
from edge_client.offer import fingerprint_message
from edge_client.tuning.checkpoint import State
from edge_client.tuning.config import MICRO_BATCH_TOKENS, TuneConfig
from edge_client.tuning.examples import IGNORED, Example
from edge_client.tuning.learner import Learner, embedding
from edge_client.tuning.loss import Head
from edge_client.tuning.stream import TuneStream
from edge_client.tuning.trainer import clipped, optimiser
from edge_client.tuning.weights import Weights
from shared import wire
from shared.adapter import m_shape

CLIP, RATE = 1.0, 1e-3


@dataclass(frozen=True)
class Load:
    """A batch: tokens that each row runs through the layers, and how many at its end are learned."""

    lengths: tuple[int, ...]
    answer: int

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return sum(self.lengths)

    def examples(self, vocab: int, seed: int = 11) -> list[Example]:
        """Return rows of seeded random ids: what they say does not change how long they take.

        The last token of a row is only learned, not run, so a row has one more.
        """
        generator = torch.Generator().manual_seed(seed)
        found = []
        for line, length in enumerate(self.lengths, start=1):
            ids = torch.randint(10, vocab, (length + 1,), generator=generator)
            labels = ids.clone()
            labels[: length + 1 - self.answer] = IGNORED
            found.append(Example(ids, labels, line))
        return found


class TuningEdge:
    """The edge of a tuning run.

    Parameters
    ----------
    model
        From `from_cloud`; its connection is used, its adapter says which plan is tuned.
    wire_dtype
        ``float32`` or ``bfloat16``.
    """

    def __init__(self, model: PrivateLoraForCausalLM, wire_dtype: str = "float32") -> None:
        offer, connection = model.offer, model.connection
        assert offer is not None and connection is not None
        self.plan = plan = model.adapter.plan
        fingerprint = fingerprint_message(offer.plans[plan.name][1])
        self.stream: TuneStream | None = None

        def open_stream() -> TuneStream:
            self.stream = connection.open_tuning(plan, fingerprint, wire.DTYPE_NAMES[wire_dtype])
            return self.stream

        head = Head(model.norm, model.lm_head, model.softcap)
        self.learner = Learner(head, embedding(model.embed_tokens, model.device), open_stream)
        room = self.learner.limits().max_batch_tokens
        self.learner.micro_batch_tokens = min(MICRO_BATCH_TOKENS, room)
        self.vocab = model.lm_head.out_features
        self.begin()

    def begin(self) -> None:
        """Forget what was learned."""
        zeros = torch.zeros(m_shape(self.plan))
        self.state = State.begin(dict.fromkeys(self.plan.owners, zeros))
        self.optimiser = optimiser(TuneConfig(), RATE, self.state)

    def step(self, examples: Sequence[Example]) -> tuple[float, Weights]:
        """Tune one step; return the loss (nats), and the gradients as they were before clipping."""
        measured = self.learner.gradients(examples, self.state.matrices)
        kept = {layer: gradient.clone() for layer, gradient in measured.gradients.items()}
        clipped(measured.gradients, CLIP)
        for layer, matrix in self.state.matrices.items():
            matrix.grad = measured.gradients[layer]
        self.optimiser.step()
        return measured.loss, kept

    def close(self) -> None:
        """End the stream."""
        self.learner.close()
