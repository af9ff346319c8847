"""The tuning loop: examples in, personal weights out.

Everything that a step does is decided by the settings, the examples and the step's number, so a run
that goes on from any of its checkpoints ends at the same bits as one that was never interrupted.
Knows nothing about clouds, files or progress bars.
"""

import math
import time
from collections.abc import Callable, Sequence

import torch

from edge_client.tuning.checkpoint import State
from edge_client.tuning.config import TuneConfig
from edge_client.tuning.examples import Example, batches
from edge_client.tuning.learner import Learner, TuningError
from edge_client.tuning.weights import SomeWeights, Weights


class Watcher:
    """Hears what happens; override what is of interest."""

    def stepped(self, state: State, loss: float, tokens: int, seconds: float) -> None:
        """Hear of one optimiser step: its loss (nats), its tokens, and the time it took."""

    def validated(self, state: State, loss: float) -> None:
        """Hear of a validation (nats); ``state.best_step`` says which one was the best."""


class Trainer:
    """One run.

    Parameters
    ----------
    config
        Settled: see `TuneConfig.settled`.
    learner
        Gives losses and gradients.
    train, validation
        Examples; without any for validation, the last M is the one that is kept.
    state
        Where to begin.
    save
        Keeps a state; called between steps.
    watcher
        Hears what happens.
    """

    def __init__(
        self,
        config: TuneConfig,
        learner: Learner,
        train: Sequence[Example],
        validation: Sequence[Example],
        state: State,
        save: Callable[[State], object] = lambda state: None,
        watcher: Watcher | None = None,
    ) -> None:
        if config.lr is None or config.max_tokens is None or config.micro_batch_tokens is None:
            raise ValueError("the settings are not settled")
        self.config, self.learner, self.state = config, learner, state
        self.lr, learner.micro_batch_tokens = config.lr, config.micro_batch_tokens
        self.train, self.validation = list(train), list(validation)
        self.batches_an_epoch = len(batches(self.train, config.batch_size, config.seed, 0))
        self.total_steps = config.total_steps(self.batches_an_epoch)
        self._save, self._watcher = save, watcher or Watcher()
        self._interval = config.validation_interval(self.total_steps)
        self._optimiser = optimiser(config, self.lr, state)
        self._is_whole = True  # false while a step is being written into the state
        self._epoch: tuple[int, list[list[Example]]] = (-1, [])

    def run(self) -> State:
        """Tune to the end and return the final state.

        On any interruption, Ctrl-C included, the last whole step is saved before the error goes on.

        Raises
        ------
        TuningError
            If the loss diverges.
        SessionError
            If the cloud refuses, or stays away for too long.
        """
        state = self.state
        saved = -1
        try:
            while True:
                if self._validation_is_due():
                    self._validate()
                if self._is_over():
                    break
                if state.step % self.config.checkpoint_every == 0 and state.step != saved:
                    self._save(state)
                    saved = state.step
                self._step()
        finally:
            if self._is_whole:
                self._save(state)
        return state

    @property
    def stopped_early(self) -> bool:
        """Whether validation has not improved for as long as patience lasts."""
        return 0 < self.config.patience <= self.state.stale

    @property
    def kept(self) -> tuple[int, Weights]:
        """The step that is kept, the best one or else the last, and its weights."""
        state = self.state
        return (state.best_step, state.best) if self.validation else (state.step, state.matrices)

    def _is_over(self) -> bool:
        return self.state.step >= self.total_steps or self.stopped_early

    def _validation_is_due(self) -> bool:
        state = self.state
        if not self.validation or (state.validation_losses and state.validation_losses[-1][0] == state.step):
            return False
        return state.step % self._interval == 0 or state.step >= self.total_steps

    def _step(self) -> None:
        state, config = self.state, self.config
        started = time.perf_counter()
        measured = self.learner.gradients(self._batch(state.step), state.matrices)
        rate = self.lr * lr_factor(config, state.step, self.total_steps)

        self._is_whole = False
        norm = clipped(measured.gradients, config.clip)
        if not (math.isfinite(measured.loss) and math.isfinite(norm)):
            self._is_whole = True  # nothing was changed yet
            raise TuningError(
                f"the loss is no longer finite in step {state.step + 1}: a learning rate of {self.lr:g} is "
                "too high here; begin anew with a smaller --lr"
            )
        for layer, matrix in state.matrices.items():
            matrix.grad = measured.gradients[layer]
        for group in self._optimiser.param_groups:
            group["lr"] = rate
        self._optimiser.step()
        for matrix in state.matrices.values():
            matrix.grad = None
        state.step += 1
        seconds = time.perf_counter() - started
        state.tokens, state.seconds = state.tokens + measured.tokens, state.seconds + seconds
        state.train_losses.append((state.step, measured.loss))
        self._is_whole = True
        self._watcher.stepped(state, measured.loss, measured.tokens, seconds)

    def _validate(self) -> None:
        state = self.state
        loss = self.learner.loss(self.validation, state.matrices)
        best = dict(state.validation_losses).get(state.best_step, math.inf)
        self._is_whole = False
        if loss < best:
            state.best = {layer: matrix.clone() for layer, matrix in state.matrices.items()}
            state.best_step, state.stale = state.step, 0
        else:
            state.stale += 1
        state.validation_losses.append((state.step, loss))
        self._is_whole = True
        self._watcher.validated(state, loss)

    def _batch(self, step: int) -> list[Example]:
        epoch, at = divmod(step, self.batches_an_epoch)
        if self._epoch[0] != epoch:
            self._epoch = epoch, batches(self.train, self.config.batch_size, self.config.seed, epoch)
        return self._epoch[1][at]


def lr_factor(config: TuneConfig, step: int, total: int) -> float:
    """Return the part of the learning rate that step ``step`` (0 is the first) of ``total`` is done with."""
    warm = min(round(config.warmup * total), total)
    if step < warm:
        return (step + 1) / warm
    done = (step - warm) / max(1, total - warm)
    if config.schedule == "constant":
        return 1.0
    return 1 - done if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))


def clipped(gradients: SomeWeights, longest: float) -> float:
    """Scale gradients down together, in place, if their L2 norm exceeds ``longest`` (0: never); return it."""
    norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients.values()))
    if 0 < longest < norm and math.isfinite(norm):
        for gradient in gradients.values():
            gradient.mul_(longest / (norm + 1e-6))  # as torch.nn.utils.clip_grad_norm_ does
    return norm


def optimiser(config: TuneConfig, lr: float, state: State) -> torch.optim.AdamW:
    """Return AdamW over a state's matrices, whose moments are the state's own tensors."""
    found = torch.optim.AdamW(
        list(state.matrices.values()),
        lr=lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        foreach=False,  # one matrix after another: the same bits everywhere
    )
    for layer, matrix in state.matrices.items():
        found.state[matrix] = {
            "step": torch.tensor(float(state.step)),
            "exp_avg": state.first_moments[layer],
            "exp_avg_sq": state.second_moments[layer],
        }
    return found
