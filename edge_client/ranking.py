"""What each layer's M and each plan is worth on one's own rows: measurements, and what to choose by them.

Everything is judged on rows that were held out, in nats per token, and what is compared is compared row
by row, so that a standard error says how much of it may be chance. A layer is worth what is lost when its M
alone is set to zero: one pass forward for each layer. A plan is worth what a short tuning run gains.
Asks a `Learner`; knows nothing about files, clouds or terminals.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from edge_client.tuning.checkpoint import State
from edge_client.tuning.config import TuneConfig
from edge_client.tuning.examples import Example, split
from edge_client.tuning.learner import Learner, TuningError
from edge_client.tuning.rows import DataError
from edge_client.tuning.trainer import Trainer, Watcher
from edge_client.tuning.weights import SomeWeights, Weights, matrices_of, start_weights
from shared.plan import Plan


@dataclass(frozen=True)
class Estimate:
    """A figure in nats per token, and its standard error over rows (None where there is one row only)."""

    nats: float
    error: float | None

    @property
    def is_beyond_chance(self) -> bool:
        """Whether it is more than two standard errors from zero."""
        return self.error is not None and abs(self.nats) > 2 * self.error


@dataclass(frozen=True, eq=False)
class RowLosses:
    """The loss of each held-out row: ``nats`` summed over its ``targets``, both ``(rows,)`` float64."""

    nats: Tensor
    targets: Tensor

    @classmethod
    def measure(cls, learner: Learner, examples: Sequence[Example], weights: SomeWeights) -> "RowLosses":
        """Run ``examples`` forward; those of one line of the data are one row.

        Raises
        ------
        TuningError
            If a loss is not finite.
        """
        lines = sorted({example.line for example in examples})
        place = {line: at for at, line in enumerate(lines)}
        nats, targets = torch.zeros(2, len(lines), dtype=torch.float64)
        for example, lost in zip(examples, learner.losses(examples, weights), strict=True):
            nats[place[example.line]] += lost
            targets[place[example.line]] += example.targets
        if not torch.isfinite(nats).all():
            raise TuningError(
                "the loss on the rows held out is not finite: with these weights the model says nothing. A "
                "smaller --lr may help"
            )
        return cls(nats, targets)

    def mean(self) -> Estimate:
        """Return the loss per token."""
        return _per_token(self.nats, self.targets)

    def above(self, other: "RowLosses") -> Estimate:
        """Return by how much this exceeds the loss of the same rows in another case."""
        return _per_token(self.nats - other.nats, self.targets)


def _per_token(nats: Tensor, targets: Tensor) -> Estimate:
    """Return the ratio of two sums over rows, and its error for rows drawn at random."""
    rows, total = len(nats), targets.sum()
    ratio = nats.sum() / total
    if rows < 2:
        return Estimate(float(ratio), None)
    # A ratio estimator: what counts is how far rows are from the ratio, not how long they are.
    spread = (nats - ratio * targets).square().sum() * rows / (rows - 1)
    return Estimate(float(ratio), float(spread.sqrt() / total))


def held_out(
    examples: Sequence[Example], fraction: float, most: int, seed: int
) -> tuple[list[Example], list[Example]]:
    """Return examples to tune on, and to judge by: of the rows that `tune` would hold out, at most ``most``.

    Raises
    ------
    DataError
        If there are too few rows to have some on each side.
    """
    train, kept = split(examples, fraction, seed)
    rows = len({example.line for example in kept})
    return train, (split(kept, most / rows, seed)[1] if rows > most else kept)


# --- layers -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerWorth:
    """One layer: what its M is worth, and how long the gradient of M is where M = 0 (L2 norm).

    ``without`` holds the rows' losses with its M set to zero.
    """

    layer: int
    worth: Estimate
    gradient: float
    without: RowLosses = field(repr=False)


@dataclass(frozen=True)
class Ranking:
    """The layers with an M, the one that is worth most first; ``whole`` is the loss with all of them."""

    whole: RowLosses
    layers: tuple[LayerWorth, ...]


def rank_layers(
    learner: Learner,
    plan: Plan,
    examples: Sequence[Example],
    weights: SomeWeights,
    advance: Callable[[], object] = lambda: None,
) -> Ranking:
    """Measure what each layer's M is worth among all others: with all of them, then without each in turn.

    Parameters
    ----------
    learner
        Of this plan.
    plan
        The split.
    examples
        Held out from the tuning of ``weights``.
    weights
        M by owner and factors by name; left as they are.
    advance
        Called after each pass, ``1 + len(plan.owners)`` times.

    Raises
    ------
    SessionError
        If the cloud refuses, or cannot be reached for a while.
    """
    whole = RowLosses.measure(learner, examples, weights)
    advance()
    slopes = gradient_norms(learner, plan, examples, weights)
    found = []
    for layer in plan.owners:
        without = RowLosses.measure(learner, examples, without_layer(weights, layer))
        found.append(LayerWorth(layer, without.above(whole), slopes[layer], without))
        advance()
    return Ranking(whole, tuple(sorted(found, key=lambda one: (-one.worth.nats, one.layer))))


def without_layer(weights: SomeWeights, layer: int) -> Weights:
    """Return ``weights`` with zeros for one layer's M."""
    return {key: torch.zeros_like(tensor) if key == layer else tensor for key, tensor in weights.items()}


def gradient_norms(
    learner: Learner, plan: Plan, examples: Sequence[Example], weights: SomeWeights
) -> dict[int, float]:
    """Return the L2 norm of the loss's gradient in each layer's M, where no weights change anything yet.

    The loss is the mean over all targets of ``examples``. Cheap (one pass there and back for all layers),
    and a hint only: it says how steep the way begins, not how far it leads. ``weights`` says in which
    precision.
    """
    dtype = next(iter(weights.values())).dtype
    measured = learner.gradients(examples, start_weights(plan, 0, dtype))
    return {layer: float(one.double().norm()) for layer, one in matrices_of(measured.gradients).items()}


def choose_layers(ranking: Ranking, round_trips: int) -> tuple[int, ...]:
    """Return the best layers for a subset plan with at most so many round trips a token, in ascending order.

    A layer costs one round trip, and the step itself one; the model's first layer costs none, because the
    edge makes its codes. Only layers that help are taken, so there may be fewer, or none.
    """
    helping = [one.layer for one in ranking.layers if one.worth.nats > 0]
    paid = [layer for layer in helping if layer != 0][: round_trips - 1]
    return tuple(sorted(paid + [layer for layer in helping if layer == 0]))


@dataclass(frozen=True)
class Border:
    """The last layer that was chosen, the best that was not, and by how much the first is worth more."""

    last_in: int
    first_out: int
    difference: Estimate


def border(ranking: Ranking, chosen: Sequence[int]) -> Border | None:
    """Return how sharp the line is between ``chosen`` and the others; None where there is nothing to compare.

    The first layer is left aside: it costs nothing, so it did not compete.
    """
    competing = [one for one in ranking.layers if one.layer != 0]
    inside = [one for one in competing if one.layer in chosen]
    outside = [one for one in competing if one.layer not in chosen]
    if not inside or not outside:
        return None
    last, first = inside[-1], outside[0]
    return Border(last.layer, first.layer, last.without.above(first.without))


# --- plans --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlanWorth:
    """One plan after a short tuning run: the loss on held-out rows, and what was gained over no tuning."""

    plan: Plan
    after: Estimate
    gain: Estimate
    lr: float


def tune_briefly(
    learner: Learner,
    plan: Plan,
    config: TuneConfig,
    train: Sequence[Example],
    dtype: torch.dtype,
    watcher: Watcher | None = None,
    begun: Callable[[Trainer], object] = lambda trainer: None,
    held: Sequence[Example] = (),
) -> tuple[Weights, float]:
    """Return the weights after ``config.steps`` steps from where nothing is changed, and the learning rate.

    The same rows in the same order under every plan; nothing is saved, and no validation ends it early.

    Parameters
    ----------
    learner
        Of this plan.
    plan
        The split.
    config
        Not settled: the learning rate is what suits the plan, unless it says one.
    train
        What is learned.
    dtype
        Of the weights.
    watcher
        Hears of the steps.
    begun
        Called before the first step.
    held
        What will be judged by: it has to fit as well, which is better known before than after.

    Raises
    ------
    DataError
        If an example is longer than the cloud takes under this plan.
    TuningError
        If the loss diverges.
    """
    limits = learner.limits()
    settled = config.settled(plan, limits.max_batch_tokens, limits.max_sequence_tokens)
    assert settled.max_tokens is not None
    longest = max(len(example.ids) for example in (*train, *held))
    if longest > settled.max_tokens:
        raise DataError(
            f"the cloud takes {settled.max_tokens:,} tokens at a time under plan {plan.name!r}, an example "
            f"has {longest:,}: give --max-tokens {settled.max_tokens}"
        )
    state = State.begin(start_weights(plan, settled.seed, dtype))
    trainer = Trainer(settled, learner, train, [], state, watcher=watcher)
    begun(trainer)
    trainer.run()
    return state.matrices, trainer.lr
