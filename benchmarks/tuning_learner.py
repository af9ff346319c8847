"""Who is tuned, and one run of tuning: batches, the step behind `Learner`, the loop.

`train` knows no method: it asks a `Learner` for loss and gradients, clips, and steps AdamW. PEFT's
LoRA and the single-process reference of PrivateLoRA are both `Local`; the split run over the wire is
another `Learner`, and everything else stays as it is.

Two savings, the same for every method: only the positions that predict an answer go through the head
(49152 rows in the default model, as costly as several layers), and texts of like length share a batch.
"""

import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.datasets import Row
from shared.cache import replacing
from shared.checkpoint import Checkpoint
from shared.lagged import Lagged
from shared.lowrank import LowRank
from shared.plan import TARGET_ORDER, Plan
from shared.reference import Reference

CLIP = 1.0  # gradient norm, as in the paper's code
WARM_UP = 0.1  # share of the steps
SAVE_SECONDS = 120  # an interrupted run loses no more than this
POOL = 8  # batches that are drawn together, then cut by length

# --- batches --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """A row as token ids: the prompt's, then the answer's."""

    ids: tuple[int, ...]
    answer: int  # tokens at the end that the loss is on


@dataclass(frozen=True)
class Batch:
    """Examples side by side, padded on the right, and where their answers are.

    There is no attention mask: attention is causal and padding comes last, so no position that is
    read ever sees any of it.
    """

    ids: Tensor  # (examples, longest), without each example's last token, which predicts nothing
    rows: Tensor  # (answer tokens,): the example of each
    positions: Tensor  # (answer tokens,): the position that predicts it
    targets: Tensor  # (answer tokens,): its id
    tokens: int  # that are not padding


def encode(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> list[Example]:
    """Tokenise prompt and answer apart, so that the border between them is sure."""
    prompts: list[list[int]] = tokenizer([row.prompt for row in rows])["input_ids"]
    completions = [row.completion for row in rows]
    answers: list[list[int]] = tokenizer(completions, add_special_tokens=False)["input_ids"]
    if not all(prompts) or not all(answers):
        raise ValueError("an empty prompt or answer cannot be learnt: every row needs a token of each")
    return [Example((*p, *a), len(a)) for p, a in zip(prompts, answers, strict=True)]


def collate(examples: Sequence[Example], pad: int = 0) -> Batch:
    """Lay examples side by side."""
    longest = max(len(e.ids) for e in examples) - 1
    ids = torch.full((len(examples), longest), pad, dtype=torch.int64)
    rows: list[int] = []
    positions: list[int] = []
    targets: list[int] = []
    for row, e in enumerate(examples):
        ids[row, : len(e.ids) - 1] = torch.tensor(e.ids[:-1])
        first = len(e.ids) - e.answer
        rows += [row] * e.answer
        positions += range(first - 1, len(e.ids) - 1)  # a token is predicted one position before it
        targets += e.ids[first:]
    total = sum(len(e.ids) - 1 for e in examples)
    return Batch(ids, torch.tensor(rows), torch.tensor(positions), torch.tensor(targets), total)


def by_length(examples: Sequence[Example], padded_tokens: int) -> Iterator[list[Example]]:
    """Cut examples into groups of like length with at most ``padded_tokens`` each (at least one row)."""
    group: list[Example] = []
    for example in sorted(examples, key=lambda e: len(e.ids)):
        if group and len(example.ids) * (len(group) + 1) > padded_tokens:
            yield group
            group = []
        group.append(example)
    if group:
        yield group


def schedule(examples: Sequence[Example], size: int, seed: int) -> Iterator[list[Example]]:
    """Yield groups of ``size`` without end: new order each epoch, texts of like length together."""
    if len(examples) < size:
        raise ValueError(f"{len(examples)} rows do not fill one batch of {size}")
    shuffled = random.Random(seed)
    while True:
        order = shuffled.sample(range(len(examples)), len(examples) - len(examples) % size)
        groups: list[list[int]] = []
        for start in range(0, len(order), size * POOL):
            pool = sorted(order[start : start + size * POOL], key=lambda i: len(examples[i].ids))
            groups += [pool[at : at + size] for at in range(0, len(pool), size)]
        shuffled.shuffle(groups)  # else lengths would rise over the steps
        for group in groups:
            yield [examples[i] for i in group]


# --- learners -------------------------------------------------------------------------------------


class Learner(Protocol):
    """A model with something to train in it."""

    parameters: list[nn.Parameter]

    def loss_and_grads(self, batch: Batch) -> float:
        """Return the mean loss over answer tokens, and add its gradients to the parameters' ``grad``."""

    def answer_logits(self, batch: Batch) -> Tensor:
        """Return (answer tokens, vocabulary), float32, without gradients."""


class Local:
    """A Hugging Face model in this process, whatever is hooked into it or wrapped around its layers.

    Parameters
    ----------
    model
        The causal language model; modules inside it may have been replaced.
    parameters
        What is trained; everything else is frozen here.
    """

    def __init__(self, model: PreTrainedModel, parameters: Sequence[nn.Parameter]) -> None:
        self.model, self.parameters = model, list(parameters)
        model.requires_grad_(False)
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        self._cap: float | None = getattr(model.config, "final_logit_softcapping", None)

    def _logits(self, batch: Batch) -> Tensor:
        device = self.model.device
        decoder: Any = self.model.get_submodule("model")
        hidden = decoder(input_ids=batch.ids.to(device), use_cache=False).last_hidden_state
        chosen = hidden[batch.rows.to(device), batch.positions.to(device)]  # (answer tokens, hidden_size)
        head: Any = self.model.get_submodule("lm_head")
        logits: Tensor = head(chosen.to(head.weight.dtype)).float()
        return logits if self._cap is None else torch.tanh(logits / self._cap) * self._cap

    def loss_and_grads(self, batch: Batch) -> float:
        """Return the mean loss over answer tokens, and add its gradients to the parameters' ``grad``."""
        logits = self._logits(batch)
        loss = F.cross_entropy(logits, batch.targets.to(logits.device))
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item()

    def answer_logits(self, batch: Batch) -> Tensor:
        """Return (answer tokens, vocabulary), float32, without gradients."""
        with torch.no_grad():
            return self._logits(batch)


def base_model(checkpoint: Checkpoint, device: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return the plain model; loaded anew each time, for methods change it in place.

    Norm and head, which the edge has, compute in float32 whatever ``dtype`` the layers have: a logit
    of 20 in bfloat16 is off by up to 0.06, as much as methods differ by.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=dtype)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.float())  # of its own, if it was tied before
    model.model.norm.float()
    loaded: PreTrainedModel = model.to(device).eval()
    return loaded


def lora(model: PreTrainedModel, rank: int, alpha: int, seed: int) -> Local:
    """Return PEFT's LoRA on q, k and v of every layer, without dropout."""
    from peft import LoraConfig, get_peft_model  # an extra: the rest works without it

    torch.manual_seed(seed)  # PEFT draws A from torch's own generator
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        target_modules=[f"{target}_proj" for target in TARGET_ORDER],
        task_type="CAUSAL_LM",
    )
    wrapped: Any = get_peft_model(model, config)
    return Local(model, [p for p in wrapped.parameters() if p.requires_grad])


def private_lora(model: PreTrainedModel, plan: Plan, lowrank: LowRank) -> Local:
    """Return the single-process reference; its personal weights, which change nothing yet, are trained."""
    reference = Reference(model, plan, lowrank)
    return Local(model, [*reference.matrices.parameters(), *reference.factors.parameters()])


def lagged(model: PreTrainedModel, plan: Plan, lowrank: LowRank, lag: int) -> Local:
    """Return the experiment of `shared.lagged`; its weights, which change nothing yet, are trained."""
    reference = Lagged(model, plan, lowrank, lag)
    return Local(model, [*reference.matrices.parameters(), *reference.current.parameters()])


# --- the loop -------------------------------------------------------------------------------------


@dataclass
class Progress:
    """How far a run has come."""

    step: int = 0
    losses: list[float] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Return the rate of step 0 .. steps - 1: a linear rise over a tenth, then a linear fall towards 0."""
    rise = max(1, round(steps * WARM_UP))
    if step < rise:
        return peak * (step + 1) / rise
    return peak * (steps - step) / (steps - rise + 1)


def train(
    learner: Learner, examples: Sequence[Example], *, steps: int, size: int, peak: float, seed: int,
    deadline: float = math.inf, saved: Path | None = None, show: bool = False,
) -> Progress:  # fmt: skip
    """Train, or go on with training, until ``steps`` are done, time is up or the loss is not finite.

    Parameters
    ----------
    learner
        What is trained.
    examples, size, seed
        The training set, examples in a batch, and the seed of their order.
    steps, peak
        Number of steps and highest learning rate of AdamW.
    deadline
        When to stop, by ``time.monotonic``.
    saved
        Where an interrupted run left its state, and where this one leaves its own, finished or not.
    show
        Whether to print the loss now and then.
    """
    optimizer = torch.optim.AdamW(learner.parameters, lr=peak, weight_decay=0.0)
    progress = _restore(saved, learner, optimizer) if saved else Progress()
    batches = schedule(examples, size, seed)
    for _ in range(progress.step):  # the same batches as an uninterrupted run would see
        next(batches)
    kept = time.monotonic()
    while progress.step < steps and time.monotonic() < deadline:
        started = time.perf_counter()
        batch = collate(next(batches))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress.step, steps, peak)
        optimizer.zero_grad(set_to_none=True)
        loss = learner.loss_and_grads(batch)
        progress.losses.append(loss)
        if not math.isfinite(loss):
            break
        nn.utils.clip_grad_norm_(learner.parameters, CLIP)
        optimizer.step()
        progress.step += 1
        progress.tokens += batch.tokens
        progress.seconds += time.perf_counter() - started
        if show and (progress.step % 10 == 0 or progress.step == steps):
            recent, speed = progress.losses[-10:], progress.tokens / progress.seconds
            print(f"  step {progress.step:>4}: loss {sum(recent) / len(recent):.4f}, {speed:.0f} tok/s")
        if saved and time.monotonic() - kept > SAVE_SECONDS:
            _save(saved, learner, optimizer, progress)
            kept = time.monotonic()
    if saved and (progress.step == steps or time.monotonic() >= deadline):
        _save(saved, learner, optimizer, progress)
    return progress


def _save(saved: Path, learner: Learner, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
    state = {
        "parameters": [parameter.detach() for parameter in learner.parameters],
        "optimizer": optimizer.state_dict(),
        "progress": vars(progress),
    }
    saved.parent.mkdir(parents=True, exist_ok=True)
    with replacing(saved) as file:
        torch.save(state, file)


def _restore(saved: Path, learner: Learner, optimizer: torch.optim.Optimizer) -> Progress:
    if not saved.is_file():
        return Progress()
    state = torch.load(saved, weights_only=True)  # data only: no code is run from the file
    with torch.no_grad():
        for parameter, stored in zip(learner.parameters, state["parameters"], strict=True):
            parameter.copy_(stored)
    optimizer.load_state_dict(state["optimizer"])
    return Progress(**state["progress"])
