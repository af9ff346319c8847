"""Sampling in which each position has its own random number, however many are sampled in one step."""

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor


class Positioned(LogitsProcessor):
    """Samples by inverting the distribution at one uniform number for each position.

    transformers draws anew in every step, so the tokens of a seed would depend on how long drafts were,
    and that on the network. Here the number belongs to the position: what was guessed and rejected
    before changes nothing. Goes last, and leaves the sampled token as the only possible one.

    Parameters
    ----------
    seed
        Of this answer; any int64 from 0.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed

    @classmethod
    def seeded(cls) -> "Positioned":
        """Draw the seed from torch's generator, so that ``torch.manual_seed`` makes answers repeatable."""
        return cls(int(torch.randint(1 << 62, ()).item()))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores ``(1, vocabulary)`` that allow the sampled token only."""
        bits = np.random.Philox(key=self._seed, counter=[0, 0, 0, input_ids.shape[1]])
        uniform = np.random.Generator(bits).random()
        sums = torch.softmax(scores[0].cpu().double(), dim=-1).cumsum(dim=-1)  # (vocabulary,)
        last = torch.searchsorted(sums, sums[-1:])  # that can be sampled at all, should rounding pass it
        token = torch.searchsorted(sums, uniform * sums[-1:], right=True).minimum(last)
        only = torch.full_like(scores, -torch.inf)
        only[0, token] = 0
        return only
