"""The link between an edge and a cloud, as three numbers."""

from pydantic import BaseModel, ConfigDict, Field

MAX_RTT_S = 3600.0  # beyond it no connection stands


class LinkFacts(BaseModel):
    """What a link is like; up is from the edge to the cloud."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str = Field(description="What to call it; 'measured' if it was")
    rtt_s: float = Field(ge=0, le=MAX_RTT_S, description="Round-trip time of a small packet (seconds)")
    up_bit_s: float | None = Field(
        default=None, gt=0, description="Rate from edge to cloud (bits/s); None: not a bound, or not measured"
    )
    down_bit_s: float | None = Field(
        default=None, gt=0, description="Rate from cloud to edge (bits/s); None: not a bound, or not measured"
    )

    def transfer_s(self, bytes_up: float, bytes_down: float) -> float:
        """Return how long these bytes take one after the other, without delay (seconds)."""
        up = 8 * bytes_up / self.up_bit_s if self.up_bit_s else 0.0
        return up + (8 * bytes_down / self.down_bit_s if self.down_bit_s else 0.0)


def called(name: str) -> str:
    """Return how people read the name of a link."""
    return {"measured": "the link as measured", "given": "a link as given"}.get(name, name)


LINKS = {
    one.name: one
    for one in (
        LinkFacts(name="loopback", rtt_s=0.0),
        LinkFacts(name="wifi", rtt_s=4e-3, up_bit_s=200e6, down_bit_s=200e6),
        LinkFacts(name="5g", rtt_s=20e-3, up_bit_s=60e6, down_bit_s=100e6),
        LinkFacts(name="wan", rtt_s=80e-3, up_bit_s=60e6, down_bit_s=100e6),
    )
}
