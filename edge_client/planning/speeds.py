"""How fast two devices are: what `edge_client.planning.measure_edge` and ``measure_cloud`` measure.

Times of a step grow with its positions; here by a straight line through one position and a few dozen.
"""

from pydantic import BaseModel, ConfigDict, Field

FROZEN = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Line(BaseModel):
    """A time that grows with the positions of a step."""

    model_config = FROZEN

    one_s: float = Field(ge=0, description="For one position (seconds)")
    each_s: float = Field(ge=0, description="For each further position (seconds)")

    def at(self, positions: int) -> float:
        """Return the time for so many positions (seconds)."""
        return self.one_s + self.each_s * (positions - 1)

    @classmethod
    def through(cls, one_s: float, many_s: float, positions: int) -> "Line":
        """Return the line through the times of one and of ``positions`` positions; it never falls."""
        return cls(one_s=max(0.0, one_s), each_s=max(0.0, many_s - max(0.0, one_s)) / max(1, positions - 1))


class EdgeSpeed(BaseModel):
    """What this side takes."""

    model_config = FROZEN

    head: Line = Field(description="The head's product (seconds)")
    layer: Line | None = Field(
        description="One decoder layer with a LoRA (seconds); None if it was not measured"
    )
    codes: Line = Field(description="Residual codes of one layer (seconds)")
    loop_s: float = Field(ge=0, description="Everything else about a token: the decoding loop (seconds)")


class CloudSpeed(BaseModel):
    """What the cloud takes, and what talking to it takes beyond the link's round-trip time."""

    model_config = FROZEN

    layer: Line = Field(description="One decoder layer (seconds)")
    exchange: Line = Field(
        description="One exchange, beyond round trip, transfer and layer: messages on both sides, codes, z "
        "(seconds)"
    )
    message_s: float = Field(ge=0, description="One call, beyond the round-trip time (seconds)")
    max_context_tokens: int = Field(ge=1, description="Most positions that a session holds (count)")
    max_step_tokens: int = Field(ge=1, description="Longest step that the cloud takes (positions)")
    max_steps_in_flight: int = Field(ge=1, description="Unfinished steps that a session may have (count)")


class Drafting(BaseModel):
    """How many positions a step of decoding has, and how many tokens it yields."""

    model_config = FROZEN

    positions: int = Field(default=1, ge=1, description="Of one step: one and those guessed ahead (count)")
    tokens_per_step: float = Field(default=1.0, ge=1, description="Tokens that a step yields, on average")


class Power(BaseModel):
    """What the edge draws; the cloud's share and the radio's are not counted."""

    model_config = FROZEN

    busy_w: float = Field(default=10.0, ge=0, description="While the edge computes (watts); assumed")
    idle_w: float = Field(default=2.0, ge=0, description="While it waits (watts); assumed")
