"""Settings of the engine: which steps run together, for how long, and who waits for whom."""

from pydantic import BaseModel, ConfigDict, Field


class EngineConfig(BaseModel):
    """Batching and slicing bounds of the engine."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    short_step_tokens: int = Field(
        default=16, ge=1, description="Longest row of a step that counts as decoding (positions)"
    )
    max_batch_steps: int = Field(default=256, ge=1, description="Most steps that run together (count)")
    max_batch_tokens: int = Field(
        default=2048, ge=1, description="Most of long steps that runs at once, all together (positions)"
    )
    slice_s: float = Field(default=0.005, gt=0, description="Longest slice while decodes are ready (seconds)")
    inline_s: float = Field(
        default=0.005, ge=0, description="Work expected to be shorter runs on the event loop itself (seconds)"
    )
    gather_wait_s: float = Field(
        default=0.01, ge=0, description="Longest wait for steps due at the same layer (seconds)"
    )
    start_wait_share: float = Field(
        default=0.6,
        ge=0,
        le=1,
        description="Longest wait of a new step for others, as a share of what a step takes (no unit)",
    )
    fairness_s: float = Field(
        default=0.05, gt=0, description="Prefill that has waited longer goes before decoding (seconds)"
    )
