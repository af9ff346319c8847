"""Settings of the load that a cloud takes on: memory, sizes and counts, of all edges or of one session."""

from pydantic import BaseModel, Field

from cloud_server.config.bounds import MOST


class LimitSettings(BaseModel):
    """Bounds on memory, sizes and counts."""

    kv_bytes: int = Field(
        default=1 << 30,
        ge=1,
        le=1 << 50,
        description="Budget of the KV cache, of all ranks together (bytes)",
    )
    max_context_tokens: int | None = Field(
        default=None, ge=1, le=MOST, description="Longest row (positions); the model's own limit if absent"
    )
    max_step_tokens: int = Field(
        default=512, ge=1, le=MOST, description="Most positions in one step (positions)"
    )
    max_rows: int = Field(
        default=64, ge=1, le=MOST, description="Most rows, beams or batch entries, a session (count)"
    )
    max_sessions: int = Field(default=1024, ge=1, description="Most sessions, dropped ones included (count)")
    unstated_claim_tokens: int | None = Field(
        default=None,
        ge=0,
        description="KV cache that a session is admitted for which does not say what it needs (positions); "
        "the longest row if absent",
    )
    max_fetches: int = Field(
        default=64, ge=1, description="Most edges that fetch parts at a time (count); each takes a few MB"
    )
    max_connections: int = Field(
        default=4096,
        ge=1,
        le=MOST,
        description="Most connections, from whomever (count); more are closed at once",
    )
    max_steps_in_flight: int = Field(
        default=8, ge=1, le=MOST, description="Most unfinished steps a session (count)"
    )
