"""The steps of one answer: what each took, and the same steps taken again elsewhere.

A `StepWatch` notes for every step of a ``generate`` how many positions it ran, how many tokens came of it
and how long it took. `Replay` and `Forced` take the same steps again, over another way to the same cloud:
as many positions in each, of which as many are accepted, and the same text, whatever the model would say.
Imports torch; knows nothing about links.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor
from transformers.generation.streamers import BaseStreamer

from edge_client.drafting import Draft, Drafter


@dataclass(frozen=True)
class Step:
    """One step: positions that it ran, tokens that came of it (counts), and its time (seconds)."""

    positions: int
    tokens: int
    seconds: float


class StepWatch(BaseStreamer):
    """Notes the steps of one answer; the first is the prompt's.

    Parameters
    ----------
    positions
        Says how many positions were run so far; None where every step after the first runs one.
    at_first
        Called once, when the first token is there.
    """

    def __init__(
        self, positions: Callable[[], int] | None = None, at_first: Callable[[], object] | None = None
    ) -> None:
        self._positions, self._at_first = positions, at_first
        self._is_prompt = True
        self._ran = positions() if positions else 0
        self._began = time.perf_counter()
        self.tokens: list[int] = []
        self.steps: list[Step] = []

    def put(self, value: Tensor) -> None:
        """Take the tokens of a step; the first call has the prompt."""
        if self._is_prompt:
            self._is_prompt = False
            return
        now, ran = time.perf_counter(), self._positions() if self._positions else self._ran + 1
        tokens = value.flatten().tolist()
        self.tokens += tokens
        self.steps.append(Step(ran - self._ran, len(tokens), now - self._began))
        if len(self.steps) == 1 and self._at_first is not None:
            self._at_first()
        self._began, self._ran = now, ran

    def end(self) -> None:
        """Do nothing: every step has been noted."""


class Forced(LogitsProcessor):
    """Makes a given text the likeliest, so that steps are the same even where two logits are nearly equal.

    Parameters
    ----------
    text
        Prompt and answer (token ids).
    """

    def __init__(self, text: Sequence[int]) -> None:
        self._text = text

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores ``(rows, vocabulary)`` that leave one token."""
        at = input_ids.shape[1]
        if at >= len(self._text):
            return scores  # of guesses that reach beyond the answer; nothing depends on them
        only = torch.full_like(scores, -torch.inf)
        only[:, self._text[at]] = 0.0
        return only


class Replay(Drafter):
    """Makes guesses of given lengths, of which a given number is right.

    Parameters
    ----------
    text
        Prompt and answer (token ids).
    steps
        Positions and tokens of each step after the prompt's.
    """

    def __init__(self, text: Sequence[int], steps: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.text, self.taken = list(text), list(steps)

    def begin(self, longest_text: int, max_positions: int, ends: Sequence[int] = ()) -> Draft:
        """Return the drafts of the one answer."""
        return ReplayedDraft(self, longest_text, max_positions, ends)


class ReplayedDraft(Draft):
    """The drafts of a `Replay`, as transformers' loop for assisted decoding asks for them."""

    def __init__(self, replay: Replay, longest_text: int, max_positions: int, ends: Sequence[int]) -> None:
        super().__init__(replay, longest_text, max_positions, ends)
        self._replay, self._step = replay, 0

    def get_candidates(self, input_ids: Tensor, **kwargs: Any) -> tuple[Any, Any]:
        """Return the tokens so far ``(1, tokens)`` with this step's guesses after them, and no logits."""
        if self._step == 0:
            return input_ids, None
        positions, tokens = self._replay.taken[self._step - 1]
        guesses = guessed(self._replay.text, input_ids.shape[1], positions - 1, tokens - 1)
        return torch.cat([input_ids, torch.tensor([guesses], dtype=input_ids.dtype)], dim=1), None

    def update_candidate_strategy(self, input_ids: Tensor, scores: Tensor, num_matches: int) -> None:
        """Go on to the next step."""
        self._step += 1


def guessed(text: Sequence[int], at: int, drafted: int, accepted: int) -> list[int]:
    """Return ``drafted`` guesses for what follows the first ``at`` tokens, of which ``accepted`` are right.

    The first wrong one differs from the text; what comes after it does not matter.
    """
    right = list(text[at : at + accepted])
    following = text[at + accepted] if at + accepted < len(text) else 0
    return right + [1 if following == 0 else 0] * (drafted - len(right))
