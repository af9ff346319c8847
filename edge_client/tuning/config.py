"""How to tune: typed settings with a unit each. Unknown keys are errors. Imports no torch."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from shared.plan import Plan

Schedule = Literal["constant", "linear", "cosine"]

# r x r matrices between frozen A and B want 5 to 20 times the rate of LoRA. How much depends on how long
# the columns of A and rows of B are, which the initialiser decides.
ADVISED_LR = {"orthonormal": 3e-3, "svd": 1e-3, "gaussian": 5e-3}
MICRO_BATCH_TOKENS = 4096  # more is no faster, and takes memory here and from others who tune
VALIDATIONS = 10  # a run, unless told otherwise


class TuneConfig(BaseModel):
    """Everything that decides what is learned from given examples."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    epochs: int = Field(default=3, ge=1, le=100_000, description="How often each example is seen (count)")
    steps: int | None = Field(
        default=None, ge=1, le=10_000_000, description="Optimiser steps (count); decided by epochs if absent"
    )
    batch_size: int = Field(default=16, ge=1, le=65_536, description="Examples of one optimiser step (count)")
    lr: float | None = Field(
        default=None,
        gt=0,
        le=10,
        description="Highest learning rate (no unit); what is advised for the plan's A and B if absent",
    )
    schedule: Schedule = Field(default="cosine", description="How the learning rate goes after warm-up")
    warmup: float = Field(
        default=0.1, ge=0, le=1, description="Part of the steps in which the learning rate rises (0 to 1)"
    )
    beta1: float = Field(default=0.9, ge=0, lt=1, description="AdamW's memory of gradients (0 to 1)")
    beta2: float = Field(default=0.999, ge=0, lt=1, description="AdamW's memory of their squares (0 to 1)")
    eps: float = Field(default=1e-8, gt=0, le=1, description="AdamW's smallest divisor (no unit)")
    weight_decay: float = Field(
        default=0.0, ge=0, le=10, description="Part of M taken off a step, per unit of learning rate"
    )
    clip: float = Field(
        default=1.0, ge=0, description="Longest gradient (L2 norm); 0 leaves gradients as they are"
    )
    validation: float = Field(
        default=0.1, ge=0, lt=1, description="Part of the rows to validate with (0 to 1); 0 is none"
    )
    validate_every: int | None = Field(
        default=None, ge=1, description="Steps between validations (count); about ten in all if absent"
    )
    patience: int = Field(
        default=3, ge=0, description="Validations without a better one before it ends (count); 0 is never"
    )
    loss_on: Literal["completions", "all"] = Field(
        default="completions", description="Whether answers are learned, or prompts too"
    )
    max_tokens: int | None = Field(
        default=None, ge=2, description="Longest example (tokens); what the cloud takes if absent"
    )
    truncate: bool = Field(
        default=False, description="Whether a longer example loses the start of its prompt, or is refused"
    )
    micro_batch_tokens: int | None = Field(
        default=None,
        ge=2,
        description="Tokens sent at a time (count); what the cloud takes, up to 4096, if absent",
    )
    seed: int = Field(
        default=0, ge=0, lt=1 << 63, description="Of the order of examples and the split (no unit)"
    )
    checkpoint_every: int = Field(
        default=10, ge=1, description="Steps between checkpoints on this machine's disk (count)"
    )

    def settled(self, plan: Plan, max_batch_tokens: int, max_sequence_tokens: int) -> "TuneConfig":
        """Return the same with what was left open decided, so that a resumed run decides nothing anew.

        Parameters
        ----------
        plan
            The split.
        max_batch_tokens, max_sequence_tokens
            What the cloud takes.
        """
        longest = min(max_sequence_tokens, max_batch_tokens)
        max_tokens = min(self.max_tokens or longest, longest)
        wanted = max(self.micro_batch_tokens or MICRO_BATCH_TOKENS, max_tokens)
        return self.model_copy(
            update={
                "lr": self.lr or ADVISED_LR[plan.initialiser],
                "max_tokens": max_tokens,
                "micro_batch_tokens": min(wanted, max_batch_tokens),
            }
        )

    def total_steps(self, batches_an_epoch: int) -> int:
        """Return how many optimiser steps the run has, if it is not ended early."""
        return self.steps or self.epochs * batches_an_epoch

    def validation_interval(self, total_steps: int) -> int:
        """Return the steps from one validation to the next."""
        return self.validate_every or max(1, total_steps // VALIDATIONS)

    def differences(self, other: "TuneConfig") -> list[str]:
        """Return, in words, the settings that differ."""
        mine, theirs = self.model_dump(), other.model_dump()
        return [
            f"{name} {mine[name]} then, {theirs[name]} now" for name in mine if mine[name] != theirs[name]
        ]
