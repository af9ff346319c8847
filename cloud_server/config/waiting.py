"""Settings of the queue: how many wait for room, and for how long."""

from pydantic import BaseModel, ConfigDict, Field

from cloud_server.config.bounds import MOST_S


class QueueConfig(BaseModel):
    """Bounds on those who wait for KV cache or a session."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    max_waiting: int = Field(
        default=256, ge=0, description="Most sessions that wait to be opened (count); 0 refuses at once"
    )
    max_wait_s: float = Field(
        default=30.0,
        gt=0,
        le=MOST_S,
        description="Who has waited this long is refused with a hint (seconds)",
    )
