"""Settings of tuning: how many may, with how much memory, and their share of the time."""

from pydantic import BaseModel, ConfigDict, Field

from cloud_server.config.bounds import MOST_S


class TuningConfig(BaseModel):
    """Bounds on tuning, which shares the engine with decoding and comes after it."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    max_streams: int = Field(
        default=8, ge=0, description="Most edges that tune at a time (count); 0 switches tuning off"
    )
    max_bytes: int = Field(
        default=4 << 30,
        ge=1,
        le=1 << 50,
        description="Memory of all tuning batches under way together, on each rank (bytes)",
    )
    checkpointing: bool = Field(
        default=False,
        description="Run layers again on the way back instead of keeping what they computed: a tenth of the "
        "memory, a third less speed",
    )
    piece_tokens: int = Field(
        default=384,
        ge=1,
        description="Most that runs at once, whole sequences: more is faster, less delays decoding less "
        "(tokens). Gradients depend on it in their last bits",
    )
    min_share: float = Field(
        default=0.1, gt=0, le=1, description="Share of the time that tuning gets, whoever decodes (no unit)"
    )
    spare_share: float = Field(
        default=0.2,
        gt=0,
        le=1,
        description="Share of the time that it may get while all decodes wait for their edges (no unit)",
    )
    idle_timeout_s: float = Field(
        default=600.0,
        gt=0,
        le=MOST_S,
        description="An edge that is waited for this long is cut off (seconds)",
    )
