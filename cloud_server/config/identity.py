"""Settings of what one identity may use, so that nobody uses a cloud up alone."""

from pydantic import BaseModel, ConfigDict, Field


class IdentityLimits(BaseModel):
    """Bounds on what one identity (a token, a certificate) uses; None is none but the cloud's own."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    max_sessions: int | None = Field(
        default=None, ge=1, description="Most sessions, dropped ones included (count)"
    )
    max_kv_bytes: int | None = Field(default=None, ge=1, description="Most of the KV cache (bytes)")
    max_tokens_per_s: float | None = Field(
        default=None, gt=0, description="Positions of steps and tuning batches (tokens per second)"
    )
    burst_s: float = Field(
        default=10.0, ge=0, description="Unused token rate is saved up for this long (seconds)"
    )
    max_wait_s: float = Field(
        default=5.0,
        ge=0,
        description="A step waits this long for the token rate before it is refused (seconds)",
    )
    max_tuning_streams: int | None = Field(
        default=None, ge=0, description="Most tuning runs at a time (count); 0 lets nobody tune"
    )
    max_tuning_bytes: int | None = Field(
        default=None, ge=1, description="Most memory of its tuning batches under way together (bytes)"
    )
    max_fetches: int | None = Field(
        default=None, ge=1, description="Most fetches of the edge's parts at a time (count)"
    )

    @property
    def burst_tokens(self) -> float:
        """Tokens that may be spent at once."""
        return self.burst_s * (self.max_tokens_per_s or 0.0)
