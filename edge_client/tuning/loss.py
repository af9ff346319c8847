"""The loss and its gradient at the cloud's last hidden states: the end of the forward pass, on this side.

Norm, head and cross-entropy run only where there is something to learn, a few positions at a time:
logits are as wide as the vocabulary, and would else need more memory than everything else here.
Labels never leave this process; what leaves is dL/dhL, and `docs/threat-model.md` says what it tells.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edge_client.tuning.examples import IGNORED, Example

CHUNK_LOGITS = 1 << 23  # elements of logits at a time: 32 MiB in float32, and a few times that in all


@dataclass(frozen=True)
class Head:
    """What turns hL into logits. ``softcap`` bounds them, None leaves them."""

    norm: nn.Module
    lm_head: nn.Linear
    softcap: float | None

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits ``(positions, vocabulary)`` of hL ``(positions, hidden_size)``."""
        found: Tensor = self.lm_head(self.norm(hidden))
        if found.dtype in (torch.bfloat16, torch.float16):
            found = found.float()  # as transformers does before its loss
        return found if self.softcap is None else torch.tanh(found / self.softcap) * self.softcap


@dataclass(frozen=True, eq=False)
class Packed:
    """Sequences laid end to end as they are sent, and what is to be learned from them.

    The last token of a sequence is not sent: nothing follows it.

    Attributes
    ----------
    ids
        ``(tokens,)`` int64.
    lengths
        Tokens of each sequence.
    positions, targets
        ``(targets,)`` int64: where in ``ids`` something is learned, and which id comes next there.
    """

    ids: Tensor
    lengths: tuple[int, ...]
    positions: Tensor
    targets: Tensor


def pack(examples: Sequence[Example]) -> Packed:
    """Return examples as they go through the layers."""
    labels = torch.cat([example.labels[1:] for example in examples])  # what each sent position is judged by
    positions = (labels != IGNORED).nonzero().squeeze(1)
    return Packed(
        ids=torch.cat([example.ids[:-1] for example in examples]),
        lengths=tuple(len(example.ids) - 1 for example in examples),
        positions=positions,
        targets=labels[positions],
    )


def loss_and_gradient(
    head: Head, hidden: Tensor, packed: Packed, total_targets: int, *, want_gradient: bool = True
) -> tuple[float, Tensor | None]:
    """Return the cross-entropy of a batch's targets and its gradient.

    Parameters
    ----------
    head
        On any device; hidden states go there chunk by chunk.
    hidden
        hL ``(tokens, hidden_size)``.
    packed
        The batch.
    total_targets
        What the sum is divided by: the targets of the whole step, so that batches with different
        counts of targets add up to its mean.
    want_gradient
        Whether to compute the gradient.

    Returns
    -------
    float, Tensor
        The batch's share of the mean (nats), and dL/dhL like ``hidden``, zero where nothing is learned; None
        if not wanted.
    """
    weight: Any = head.lm_head.weight  # (vocabulary, hidden_size)
    gradient = torch.zeros_like(hidden) if want_gradient else None
    chunk = max(1, CHUNK_LOGITS // weight.shape[0])
    total = 0.0
    for start in range(0, len(packed.positions), chunk):
        at = packed.positions[start : start + chunk]
        wanted = packed.targets[start : start + chunk].to(weight.device)
        h = hidden[at].to(weight)  # (positions, hidden_size), a copy
        with torch.set_grad_enabled(want_gradient):
            h.requires_grad_(want_gradient)
            summed = nn.functional.cross_entropy(head.logits(h), wanted, reduction="sum")
            loss = summed / total_targets
        total += float(loss.detach())
        if gradient is not None:
            (found,) = torch.autograd.grad(loss, h)
            gradient[at] = found.to(gradient)
    return total, gradient


def sequence_losses(head: Head, hidden: Tensor, packed: Packed) -> list[float]:
    """Return the cross-entropy of each sequence, summed over its targets (nats), in their order.

    Parameters
    ----------
    head
        On any device; hidden states go there chunk by chunk.
    hidden
        hL ``(tokens, hidden_size)``.
    packed
        The batch.
    """
    weight: Any = head.lm_head.weight  # (vocabulary, hidden_size)
    ends = torch.tensor(packed.lengths).cumsum(0)  # (sequences,)
    summed = torch.zeros(len(packed.lengths), dtype=torch.float64)
    chunk = max(1, CHUNK_LOGITS // weight.shape[0])
    for start in range(0, len(packed.positions), chunk):
        at = packed.positions[start : start + chunk]
        wanted = packed.targets[start : start + chunk].to(weight.device)
        with torch.no_grad():
            lost = nn.functional.cross_entropy(head.logits(hidden[at].to(weight)), wanted, reduction="none")
        summed.index_add_(0, torch.bucketize(at, ends, right=True), lost.double().cpu())
    found: list[float] = summed.tolist()
    return found
