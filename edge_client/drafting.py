"""Guess the next tokens on this side and have them checked in one step: fewer round trips a token.

A `Drafter` knows where guesses come from (the session's own tokens, earlier conversations, the user's
documents) and has learned what steps cost and how often guesses are right. ``generate(drafter=...)`` asks
it before each step; transformers' own loop checks the guesses and keeps those that the model would have
chosen. Greedy tokens are those without drafting. Sampled ones have the same distribution, and with a
seed they are the same whatever was guessed (`Positioned`).
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation.candidate_generator import CandidateGenerator
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria

from edge_client.datastore import Datastore, History
from edge_client.draft_length import (
    DEFAULT_DRAFT_TOKENS,
    Acceptance,
    Allowance,
    StepTimes,
    best_length,
    expected_tokens,
)
from edge_client.lookup import Match, Tokens, in_session
from edge_client.offer import Limits
from edge_client.positioned import Positioned

RATE_FADE = 0.95  # what the rate of an answer keeps of its past with each step

# Criteria that hold for a sequence only if its last token is what ends it, or whatever the tokens are.
# Any other might have ended the answer within the tokens of one step.
CHECKED_ONCE_A_STEP = (EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria)


@dataclass(frozen=True)
class DraftCounts:
    """Tokens that were drafted and that were accepted, so far."""

    drafted: int = 0
    accepted: int = 0

    def __sub__(self, other: "DraftCounts") -> "DraftCounts":
        """Return what came after ``other``."""
        return DraftCounts(*(a - b for a, b in zip(astuple(self), astuple(other), strict=True)))


class Drafter:
    """Where drafts come from and how long they are; kept over the answers of one model.

    May be used by several threads at once.

    Parameters
    ----------
    max_tokens
        Longest draft (tokens), at least 1; its length adapts below that.
    documents
        The user's own texts.
    clock
        Seconds; tests and simulations give their own.
    """

    def __init__(
        self,
        max_tokens: int = DEFAULT_DRAFT_TOKENS,
        documents: Datastore | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if max_tokens < 1:
            raise ValueError(f"the longest draft must have at least 1 token, got {max_tokens}")
        self.max_tokens = max_tokens
        self.clock = clock
        self.times, self.acceptance, self.counts = StepTimes(), Acceptance(), DraftCounts()
        self._documents, self._history = documents, History()
        self._latest: Draft | None = None
        self._lock = Lock()

    def begin(self, longest_text: int, max_positions: int, ends: Sequence[int] = ()) -> "Draft":
        """Return the drafts of one answer.

        Parameters
        ----------
        longest_text
            Tokens of prompt and answer together that may ever be run (count).
        max_positions
            New positions of one step (count).
        ends
            Tokens that end an answer; never drafted, since the model's own comes in the same step.
        """
        draft = Draft(self, longest_text, max_positions, ends)
        with self._lock:
            self._latest, latest = draft, self._latest
            if latest is not None:
                draft.before = latest.tokens
        return draft

    def options(self, defaults: Any, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments that make ``generate`` check drafts.

        Raises
        ------
        ValueError
            Where transformers cannot check any: several beams, no cache, or another kind of drafting.
        """
        beams = given.get("num_beams", defaults.num_beams) or 1
        if beams > 1:
            raise ValueError(
                f"drafting follows one sequence, not {beams} beams; set num_beams=1 or no drafter"
            )
        if given.get("assistant_model") is not None or given.get("prompt_lookup_num_tokens") is not None:
            raise ValueError("give a drafter, or transformers' own way of drafting, not both")
        if given.get("use_cache", defaults.use_cache) is False:
            raise ValueError(
                "drafting takes rejected tokens back from the cache: use_cache=False leaves none"
            )
        return {"prompt_lookup_num_tokens": self.max_tokens}  # selects the loop; nothing else reads it

    def decode(
        self,
        assisted: Callable[..., Any],
        limits: Limits,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: Any,
        generation_config: Any,
        **kwargs: Any,
    ) -> Any:
        """Run transformers' loop for assisted decoding with these drafts."""
        longest = min(
            limits.max_context_tokens,
            # the last token of an answer is never run
            *(rule.max_length - 1 for rule in stopping_criteria if isinstance(rule, MaxLengthCriteria)),
        )
        steps = limits.max_step_tokens
        if not all(isinstance(rule, CHECKED_ONCE_A_STEP) for rule in stopping_criteria):
            steps = 1
        ends = generation_config._eos_token_tensor
        kwargs["assistant_model"] = self.begin(
            longest, steps, () if ends is None else ends.flatten().tolist()
        )
        if generation_config.do_sample:
            logits_processor = LogitsProcessorList([*logits_processor, Positioned.seeded()])
        # What transformers then draws decides nothing, and how often it does depends on the drafts.
        with torch.random.fork_rng(devices=[]):
            return assisted(
                input_ids,
                logits_processor=logits_processor,
                stopping_criteria=stopping_criteria,
                generation_config=generation_config,
                **kwargs,
            )

    # --- what a `Draft` asks and reports --------------------------------------------------------------

    def remember(self, earlier: Tokens, prompt: Tokens) -> None:
        """Keep an earlier conversation to draft from, unless ``prompt`` continues it."""
        shared = min(len(earlier), len(prompt))
        differing = np.flatnonzero(earlier[:shared] != prompt[:shared])
        if (int(differing[0]) if differing.size else shared) < len(earlier) / 2:
            with self._lock:
                self._history.add(earlier)

    def candidates(self, tokens: Tokens, limit: int) -> list[Match]:
        """Return what each source proposes, at most ``limit`` tokens each."""
        found = [in_session(tokens, limit), self._history.find(tokens, limit)]
        if self._documents is not None:
            found.append(self._documents.find(tokens, limit))
        return [match for match in found if match is not None]

    def choose(
        self, matches: Sequence[Match], limit: int, rate: float | None, allowance: Allowance
    ) -> tuple[Match | None, int]:
        """Return the match that promises most and how many of its tokens to draft."""
        with self._lock:
            times = self.times.estimate(limit)
            if times is None:
                return None, 0
            price = max(rate or 0.0, 1 / times[0])
            times = times[: allowance.affordable(times) + 1]
            best: tuple[float, int, Match | None] = (0.0, 0, None)
            for match in matches:
                longest = min(len(match.tokens), len(times) - 1)
                tokens = expected_tokens(*self.acceptance.rates(match.source, match.length), longest)
                count, gain = best_length(tokens, times[: longest + 1], price)
                if gain > best[0]:
                    best = (gain, count, match)
            for match in matches:
                if match is not best[2]:
                    self.acceptance.idle(match.source, match.length)
            return best[2], best[1]

    def learn(self, match: Match | None, drafted: int, accepted: int, seconds: float) -> list[float]:
        """Take the outcome of a step; return T(0) to T(drafted) as now estimated (seconds)."""
        with self._lock:
            self.times.note(1 + drafted, seconds)
            if match is not None:
                self.acceptance.note(match.source, match.length, drafted, accepted)
                self.counts = DraftCounts(self.counts.drafted + drafted, self.counts.accepted + accepted)
            return self.times.estimate(drafted) or [seconds]


class Draft(CandidateGenerator):
    """The drafts of one answer, as transformers' loop for assisted decoding asks for them."""

    def __init__(self, drafter: Drafter, longest_text: int, max_positions: int, ends: Sequence[int]) -> None:
        self._drafter, self._longest_text, self._ends = drafter, longest_text, list(ends)
        self._most = min(drafter.max_tokens, max_positions - 1)
        self._allowance = Allowance()
        self._match: Match | None = None
        self._drafted = self._steps = 0
        self._began = 0.0
        self._yield: tuple[float, float] | None = None  # decayed tokens and seconds
        self.before: Tokens | None = None  # what the answer before this one ended with
        self.tokens: Tokens = np.zeros(0, dtype=np.int32)

    def get_candidates(self, input_ids: Tensor, **kwargs: Any) -> tuple[Any, Any]:
        """Return the tokens so far ``(1, tokens)`` with those drafted after them, and no logits."""
        self.tokens = input_ids[0].cpu().numpy().astype(np.int32)
        self._match, self._drafted = None, 0
        if self._steps == 0:
            # The prompt's step: its time says nothing about those that follow, nor is there an answer yet.
            if self.before is not None:
                self._drafter.remember(self.before, self.tokens)
        elif (limit := min(self._most, self._longest_text - len(self.tokens))) > 0:
            input_ids = self._extended(input_ids, limit)
        self._began = self._drafter.clock()
        return input_ids, None

    def _extended(self, input_ids: Tensor, limit: int) -> Tensor:
        rate = self._yield[0] / self._yield[1] if self._yield else None
        matches = [self._cut(match) for match in self._drafter.candidates(self.tokens, limit)]
        matches = [match for match in matches if match.tokens.size]
        match, count = self._drafter.choose(matches, limit, rate, self._allowance)
        if match is None:
            return input_ids
        self._match, self._drafted = match, count
        drafted = torch.from_numpy(match.tokens[:count].astype(np.int64)).to(input_ids)
        return torch.cat([input_ids, drafted[None]], dim=1)

    def _cut(self, match: Match) -> Match:
        """Return a match without what follows the end of an answer."""
        ends = np.flatnonzero(np.isin(match.tokens, self._ends))
        return Match(match.source, match.length, match.tokens[: ends[0]]) if ends.size else match

    def update_candidate_strategy(self, input_ids: Tensor, scores: Tensor, num_matches: int) -> None:
        """Take how many drafted tokens were right."""
        seconds, accepted = self._drafter.clock() - self._began, int(num_matches)
        self.tokens = input_ids[0].cpu().numpy().astype(np.int32)
        self._steps += 1
        if self._steps == 1:
            return
        times = self._drafter.learn(self._match, self._drafted, accepted, seconds)
        base, taken = times[0], times[-1]
        tokens, spent = self._yield or (1.0, base)
        self._yield = RATE_FADE * tokens + accepted + 1, RATE_FADE * spent + taken
        self._allowance.note(accepted + 1, taken, base)
