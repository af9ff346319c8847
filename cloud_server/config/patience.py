"""Settings of how long edges are waited for, and of what they are told when this server does so no more."""

import re

from pydantic import BaseModel, Field, field_validator

from cloud_server.config.bounds import MOST_S

ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_.-]{1,253}):([0-9]{1,5})")  # what an edge may follow
MOST_PORT = 65535


class PatienceSettings(BaseModel):
    """Bounds on waiting for an edge, and on the end of the server."""

    claim_idle_s: float = Field(
        default=30.0,
        gt=0,
        le=MOST_S,
        description="A session without a step for this long claims no more than it holds: its answer is "
        "over, and the next one says anew what it needs (seconds)",
    )
    grace_period_s: float = Field(
        default=60.0,
        ge=0,
        le=MOST_S,
        description="How long a dropped session's KV is held for it to come back (seconds)",
    )
    write_timeout_s: float = Field(
        default=30.0,
        gt=0,
        le=MOST_S,
        description="An edge that reads nothing for this long is cut off (seconds)",
    )
    idle_timeout_s: float = Field(
        default=3600.0,
        gt=0,
        le=MOST_S,
        description="A session that sends nothing for this long is closed (seconds)",
    )
    answer_timeout_s: float = Field(
        default=120.0,
        gt=0,
        le=MOST_S,
        description="An edge that owes residual codes and says nothing for this long is cut off (seconds)",
    )
    drain_timeout_s: float = Field(
        default=5.0,
        ge=0,
        le=MOST_S,
        description="After SIGTERM, how long steps under way may take to finish (seconds)",
    )
    successor: str | None = Field(
        default=None,
        description="Where edges are told to go when this server stops (HOST:PORT); they decide themselves "
        "if absent",
    )

    @field_validator("successor")
    @classmethod
    def _is_an_address(cls, address: str | None) -> str | None:
        """Refuse now what every edge would refuse when this server stops."""
        match = None if address is None else ADDRESS.fullmatch(address)
        if address is not None and (match is None or not 0 < int(match[2]) <= MOST_PORT):
            raise ValueError(f"must be HOST:PORT with a port of 1 to {MOST_PORT}, not {address!r}")
        return address
