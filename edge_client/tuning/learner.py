"""Batches of examples to loss and gradient in M, through a cloud that may come and go.

A batch goes up in micro-batches that the cloud takes, always cut and added up in the same order, so
that the sum has the same bits every time. When the stream is lost, the micro-batch that was under way
is sent again on a new one, and nothing of it was counted before. Knows nothing about optimisers.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from edge_client.recovery import Attempts
from edge_client.resident import Resident
from edge_client.streams import SessionError
from edge_client.tuning.batch import Matrices
from edge_client.tuning.ends import Ends
from edge_client.tuning.examples import Example
from edge_client.tuning.loss import Head, Packed, loss_and_gradient, pack, sequence_losses
from edge_client.tuning.stream import TuneLimits
from edge_client.tuning.weights import SomeWeights, Weights, factors_of, joined, matrices_of

MAX_SEQUENCES = 1024  # of one micro-batch: a cloud spends time on each, however short

T = TypeVar("T")
Waiting = Callable[[Exception, float], object]


class TuningStream(Protocol):
    """What is needed of `edge_client.tuning.stream.TuneStream`."""

    @property
    def limits(self) -> TuneLimits:
        """The bounds on a batch."""

    def forward(
        self, hidden: Tensor, lengths: Sequence[int], matrices: Matrices, *, forward_only: bool = False
    ) -> Tensor:
        """Run a batch; return hL."""

    def backward(self, gradient: Tensor) -> dict[int, Tensor]:
        """Run the last batch back; return dL/dM by owner."""

    @property
    def input_gradient(self) -> Tensor | None:
        """The gradient at the cloud's first layer that the last `backward` brought, if any."""

    def close(self) -> None:
        """End the stream."""


class TuningError(RuntimeError):
    """Tuning cannot go on; the message says why and what to do."""


@dataclass(frozen=True, eq=False)
class Measured:
    """Mean loss over a batch's targets (nats), its gradient by weight, and the tokens that were run."""

    loss: float
    gradients: Weights
    tokens: int


class Learner:
    """Asks a cloud for losses and gradients.

    Parameters
    ----------
    head
        What turns hL into logits.
    embed
        Token ids ``(tokens,)`` to h0 ``(tokens, hidden_size)``.
    open_stream
        Opens a stream to the cloud.
    waiting
        Called with the reason and the seconds, before a lost cloud is tried again.
    sleep
        Waits for some seconds.
    resident
        Layers that run here, None if there are none.
    attempts
        Decides where and when a lost cloud is tried again, and when it is given up; one for each loss.
    """

    def __init__(
        self,
        head: Head,
        embed: Callable[[Tensor], Tensor],
        open_stream: Callable[[], TuningStream],
        waiting: Waiting = lambda error, seconds: None,
        sleep: Callable[[float], object] = time.sleep,
        resident: Resident | None = None,
        attempts: Callable[[], Attempts] = Attempts.nowhere_else,
    ) -> None:
        self.head, self.embed, self.resident = head, embed, resident
        self.micro_batch_tokens = 0  # set by whoever has settled it; 0 is what the cloud takes
        self.waiting = waiting
        self._open_stream, self._sleep, self._attempts = open_stream, sleep, attempts
        self._stream: TuningStream | None = None

    def limits(self) -> TuneLimits:
        """Return what the cloud takes.

        Raises
        ------
        SessionError
            If it refuses, or cannot be reached for a while.
        """
        return self._with_stream(lambda stream: stream.limits)

    def gradients(self, batch: Sequence[Example], weights: SomeWeights) -> Measured:
        """Return a batch's mean loss and its gradient in the personal weights.

        Parameters
        ----------
        batch
            At least one example.
        weights
            M by owner and factors by name; left as they are.

        Raises
        ------
        SessionError
            If the cloud refuses, or cannot be reached for a while.
        """
        total = sum(example.targets for example in batch)
        loss, tokens = 0.0, 0
        # With nothing to learn in the cloud or below it, no gradient ever leaves this process.
        only_here = self.resident is not None and self.resident.plan.learns_at_the_end_only
        gradients: Weights = {}
        matrices, factors = matrices_of(weights), factors_of(weights)
        for piece in self._micro_batches(batch):
            packed = pack(piece)
            hidden = self.embed(packed.ids)  # (tokens, hidden_size)

            def there_and_back(stream: TuningStream) -> tuple[float, Weights]:
                ends = Ends(self.resident, factors, packed.lengths, want_gradient=True)  # noqa: B023, used at once
                entered = ends.enter(hidden)  # noqa: B023
                last = stream.forward(entered, packed.lengths, matrices, forward_only=only_here)  # noqa: B023
                share, upstream = loss_and_gradient(self.head, ends.leave(last), packed, total)  # noqa: B023
                assert upstream is not None
                upstream, found = ends.back_from_end(upstream)
                if only_here:
                    return share, joined(found)
                matrices_back = stream.backward(upstream)
                return share, joined(matrices_back, ends.back_to_start(stream.input_gradient), found)

            share, found = self._with_stream(there_and_back)
            loss, tokens = loss + share, tokens + len(packed.ids)
            for layer, gradient in found.items():
                gradients[layer] = gradients[layer] + gradient if layer in gradients else gradient
        return Measured(loss, gradients, tokens)

    def loss(self, examples: Sequence[Example], weights: SomeWeights) -> float:
        """Return the mean loss (nats) over all targets of ``examples``; nothing is run back."""
        total = sum(example.targets for example in examples)
        loss = 0.0
        for packed, last in self._forward_only(examples, weights):
            loss += loss_and_gradient(self.head, last, packed, total, want_gradient=False)[0]
        return loss

    def losses(self, examples: Sequence[Example], weights: SomeWeights) -> list[float]:
        """Return each example's loss, summed over its targets (nats), in order; nothing is run back."""
        found: list[float] = []
        for packed, last in self._forward_only(examples, weights):
            found += sequence_losses(self.head, last, packed)
        return found

    def _forward_only(
        self, examples: Sequence[Example], weights: SomeWeights
    ) -> Iterator[tuple[Packed, Tensor]]:
        """Yield micro-batches and their hL ``(tokens, hidden_size)``."""
        matrices, factors = matrices_of(weights), factors_of(weights)
        for piece in self._micro_batches(examples):
            packed = pack(piece)
            hidden = self.embed(packed.ids)

            def there(stream: TuningStream) -> Tensor:
                ends = Ends(self.resident, factors, packed.lengths, want_gradient=False)  # noqa: B023, used at once
                entered = ends.enter(hidden)  # noqa: B023
                return ends.leave(stream.forward(entered, packed.lengths, matrices, forward_only=True))  # noqa: B023

            yield packed, self._with_stream(there)

    def close(self) -> None:
        """End the stream, if there is one."""
        stream, self._stream = self._stream, None
        if stream is not None:
            with contextlib.suppress(Exception):  # it was broken, or the connection is gone: it has ended
                stream.close()

    def _micro_batches(self, examples: Sequence[Example]) -> Iterator[list[Example]]:
        """Yield runs of examples that the cloud takes at once."""
        room = self.micro_batch_tokens or self.limits().max_batch_tokens
        piece: list[Example] = []
        used = 0
        for example in examples:
            tokens = len(example.ids) - 1
            if piece and (used + tokens > room or len(piece) == MAX_SEQUENCES):
                yield piece
                piece, used = [], 0
            piece.append(example)
            used += tokens
        yield piece

    def _with_stream(self, work: Callable[[TuningStream], T]) -> T:
        """Return what ``work`` returns; on a lost stream, begin it again on a new one."""
        attempts: Attempts | None = None
        while True:
            try:
                if self._stream is None:
                    self._stream = self._checked(self._open_stream())
                return work(self._stream)
            except ConnectionError as error:
                if self._stream is not None and isinstance(error, SessionError):
                    error.note(self._stream)
                self.close()
                attempts = attempts or self._attempts()
                seconds = attempts.next_wait_s(error)
                self.waiting(error, seconds)
            except BaseException:  # what the stream was at is unknown
                self.close()
                raise
            self._sleep(seconds)

    def _checked(self, stream: TuningStream) -> TuningStream:
        if stream.limits.max_batch_tokens < self.micro_batch_tokens:
            raise TuningError(
                f"the cloud now takes {stream.limits.max_batch_tokens:,} tokens at a time, this run sends up "
                f"to {self.micro_batch_tokens:,}: restore the cloud's setting, or begin anew with --restart"
            )
        return stream


def embedding(embed_tokens: torch.nn.Module, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Return what makes h0 on the CPU of token ids, scaled as the family does, in the weights' dtype."""

    def embed(ids: Tensor) -> Tensor:
        with torch.no_grad():
            found: Tensor = embed_tokens(ids.to(device))
        return found.cpu()

    return embed
