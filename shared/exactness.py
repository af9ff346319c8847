"""The rule for *exact*: identical greedy tokens, where only a tie of the reference excuses a difference.

In fp32 two orders of the same sums differ in their last bits, so where the reference's own two best
logits are closer than `TIE_GAP` either token is right. After such a tie the candidate is asked to go
on from the reference's tokens (teacher forcing), so that everything behind it is compared as well.
Needs any model with Hugging Face's ``generate``; knows nothing about how it is split.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

TIE_GAP = 1e-3  # logits; a top-2 gap below this is a tie
TOKENS_PER_TIE = 5_000  # one excused tie per so many compared tokens

Continue = Callable[[list[int], int], list[int]]  # (token ids, new tokens) -> at most that many new ids


@dataclass(frozen=True)
class Greedy:
    """What the reference generated for one prompt.

    ``gaps[i]`` is the difference of its two best logits when it chose ``tokens[i]``, and
    ``seconds[i]`` the token that came second.
    """

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    seconds: tuple[int, ...]
    gaps: tuple[float, ...]


@dataclass(frozen=True)
class Difference:
    """Where a candidate chose another token; ``got`` is None where it stopped early."""

    prompt: int
    position: int
    expected: int
    got: int | None
    gap: float
    tie: bool

    def __str__(self) -> str:
        kind = "tie" if self.tie else "MISMATCH"
        return (
            f"{kind}: prompt {self.prompt}, new token {self.position}: expected id {self.expected}, got "
            f"{self.got}; the reference's top-2 gap is {self.gap:.2e} (a tie is below {TIE_GAP:.0e})"
        )


@dataclass
class Comparison:
    """The verdict over any number of prompts; printing it names every difference."""

    tokens: int = 0
    prompts: int = 0
    smallest_gap: float = float("inf")
    differences: list[Difference] = field(default_factory=list)

    @property
    def ties(self) -> int:
        """Differences that the reference's own tie excuses."""
        return sum(difference.tie for difference in self.differences)

    @property
    def mismatches(self) -> int:
        """Differences that nothing excuses."""
        return len(self.differences) - self.ties

    @property
    def ties_allowed(self) -> int:
        """One for every started `TOKENS_PER_TIE` tokens."""
        return -(-self.tokens // TOKENS_PER_TIE)

    @property
    def exact(self) -> bool:
        """Whether the candidate passes."""
        return self.tokens > 0 and not self.mismatches and self.ties <= self.ties_allowed

    def __str__(self) -> str:
        verdict = "exact" if self.exact else "NOT EXACT"
        lines = [
            f"{verdict}: {self.tokens} tokens of {self.prompts} prompts, {self.mismatches} mismatches, "
            f"{self.ties} ties ({self.ties_allowed} allowed), smallest top-2 gap {self.smallest_gap:.2e}"
        ]
        return "\n".join(lines + [f"  {difference}" for difference in self.differences])


def combined(verdicts: Sequence[Comparison]) -> Comparison:
    """Return the verdict over several comparisons; prompts keep the numbers of their own comparison."""
    return Comparison(
        tokens=sum(verdict.tokens for verdict in verdicts),
        prompts=sum(verdict.prompts for verdict in verdicts),
        smallest_gap=min((verdict.smallest_gap for verdict in verdicts), default=float("inf")),
        differences=[difference for verdict in verdicts for difference in verdict.differences],
    )


@torch.no_grad()
def greedy(model: Any, prompt: Sequence[int], new_tokens: int, **options: Any) -> Greedy:
    """Generate exactly ``new_tokens`` greedy tokens with plain Hugging Face ``generate``.

    Parameters
    ----------
    model
        A causal language model, or anything with its ``generate`` and ``device``.
    prompt
        Token ids of one prompt.
    new_tokens
        How many tokens to generate; the end-of-sequence token is suppressed until then.
    options
        More arguments for ``generate``.
    """
    output = model.generate(
        torch.tensor([list(prompt)], device=model.device),
        do_sample=False,
        num_beams=1,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        output_scores=True,
        return_dict_in_generate=True,
        **options,
    )
    scores = torch.cat(output.scores).float()  # (new_tokens, vocabulary), after logits processors
    best, ids = scores.topk(2, dim=-1)
    return Greedy(
        prompt=tuple(prompt),
        tokens=tuple(output.sequences[0, len(prompt) :].tolist()),
        seconds=tuple(ids[:, 1].tolist()),
        gaps=tuple((best[:, 0] - best[:, 1]).tolist()),
    )


def continuation(model: Any, **options: Any) -> Continue:
    """Return a candidate that generates greedily with ``model.generate``, end tokens suppressed."""

    def generate(ids: list[int], new_tokens: int) -> list[int]:
        output = model.generate(
            torch.tensor([ids], device=model.device),
            do_sample=False,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            **options,
        )
        new: list[int] = output[0, len(ids) :].tolist()
        return new

    return generate


def compare(expected: Sequence[Greedy], candidate: Continue) -> Comparison:
    """Ask the candidate for every prompt and compare token by token.

    A difference at a tie is recorded and the candidate goes on from the reference's tokens. The first
    mismatch ends its prompt: what follows is another text. ``tokens`` counts what was compared.
    """
    result = Comparison()
    for index, reference in enumerate(expected):
        result.prompts += 1
        done = 0  # new tokens that were compared
        while done < len(reference.tokens):
            ids = [*reference.prompt, *reference.tokens[:done]]
            got = candidate(ids, len(reference.tokens) - done)
            difference = _first_difference(index, reference, done, got)
            compared = len(reference.tokens) if difference is None else difference.position + 1
            result.smallest_gap = min(result.smallest_gap, *reference.gaps[done:compared])
            result.tokens += compared - done
            done = compared
            if difference is not None:
                result.differences.append(difference)
                if not difference.tie:
                    break
    return result


def _first_difference(index: int, reference: Greedy, start: int, got: Sequence[int]) -> Difference | None:
    for position in range(start, len(reference.tokens)):
        expected = reference.tokens[position]
        token = got[position - start] if position - start < len(got) else None
        if token != expected:
            gap = reference.gaps[position]
            # A tie excuses the other of the two best tokens, and no third one.
            tie = gap < TIE_GAP and token == reference.seconds[position]
            return Difference(index, position, expected, token, gap, tie)
    return None
