"""What a tuned model is worth: likelihood of the right answer, accuracy, and how sure we may be.

Likelihood is in nats per answer, over the whole vocabulary, summed over the answer's tokens: a better
measure than accuracy for small sets, and defined where there are no labels. Accuracy compares the
likelihoods of a task's labels, which are one token each, so that one forward gives both.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from benchmarks.datasets import Row
from benchmarks.tuning_learner import Example, Learner, by_length, collate

EVAL_TOKENS = 1024  # padded, in one batch: enough for efficient products, and it stays in the cache
Z_95 = 1.959963984540054


@dataclass(frozen=True)
class Scores:
    """What an evaluation found."""

    rows: int
    nats: float  # mean over rows
    nats_error: float  # standard error of that mean
    answer_tokens: int
    correct: int | None  # rows; None without labels

    @property
    def accuracy(self) -> float | None:
        """Share of rows whose right label is the likeliest."""
        return None if self.correct is None else self.correct / self.rows

    @property
    def perplexity(self) -> float:
        """Perplexity of an answer's token."""
        return math.exp(self.nats * self.rows / self.answer_tokens)


def wilson(share: float, count: int, z: float = Z_95) -> tuple[float, float]:
    """Return the Wilson score interval of a share that was seen in ``count`` trials."""
    if count <= 0 or not 0 <= share <= 1:
        raise ValueError(f"no interval for a share of {share} in {count} trials")
    centre = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    low, high = (centre - half) / (1 + z * z / count), (centre + half) / (1 + z * z / count)
    return max(low, 0.0), min(high, 1.0)


def summary(nats: Sequence[float], answer_tokens: int, correct: int | None) -> Scores:
    """Return the scores of rows with these negative log likelihoods."""
    values = torch.tensor(nats, dtype=torch.float64)
    error = float(values.std() / math.sqrt(len(nats))) if len(nats) > 1 else math.nan
    return Scores(len(nats), float(values.mean()), error, answer_tokens, correct)


def evaluate(learner: Learner, examples: Sequence[Example], labels: Sequence[int]) -> Scores:
    """Score a model on examples.

    Parameters
    ----------
    learner
        The model.
    examples
        The rows; where there are labels, the answer of each is one of them.
    labels
        The labels' token ids; empty for free text.
    """
    nats: list[float] = []
    correct, tokens = 0, 0
    choices = torch.tensor(labels, dtype=torch.int64)
    for group in by_length(examples, EVAL_TOKENS):
        batch = collate(group)
        logits = learner.answer_logits(batch).cpu()  # (answer tokens, vocabulary)
        lost = F.cross_entropy(logits, batch.targets, reduction="none").double()
        nats += torch.zeros(len(group), dtype=torch.float64).index_add(0, batch.rows, lost).tolist()
        tokens += len(batch.targets)
        if labels:
            correct += int((choices[logits[:, choices].argmax(dim=1)] == batch.targets).sum())
    return summary(nats, tokens, correct if labels else None)


def majority(train: Sequence[Row], test: Sequence[Row]) -> Scores:
    """Score the rule that knows how often each label occurs in ``train``, and nothing of the text."""
    counts = Counter(row.completion for row in train)
    # One more of each, so that a label which train lacks has a likelihood.
    counts.update({row.completion for row in test} | set(counts))
    total, guess = counts.total(), counts.most_common(1)[0][0]
    nats = [-math.log(counts[row.completion] / total) for row in test]
    return summary(nats, len(test), sum(row.completion == guess for row in test))
