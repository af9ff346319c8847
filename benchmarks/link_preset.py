"""What a link is like (its preset), and what every kind of link offers to whoever measures over it."""

from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict, Field

from benchmarks.link_queue import LinkShape
from benchmarks.link_tun import LinkError


class Preset(BaseModel):
    """What a link is like; up is from the edge to the cloud."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(description="Name to ask for it by")
    rtt_ms: float = Field(ge=0, description="Round-trip time, half of it each way (milliseconds)")
    up_mbit_s: float | None = Field(gt=0, description="Rate from edge to cloud (10^6 bits/s); None: no limit")
    down_mbit_s: float | None = Field(
        gt=0, description="Rate from cloud to edge (10^6 bits/s); None: no limit"
    )
    keeps_window: bool = Field(
        default=False,
        description="Whether both hosts send as much at once after a pause as before it "
        "(net.ipv4.tcp_slow_start_after_idle=0; Linux's default is 1); not emulated by the proxy",
    )

    @property
    def is_loopback(self) -> bool:
        """Whether there is nothing to emulate."""
        return self.rtt_ms == 0 and self.up_mbit_s is None and self.down_mbit_s is None

    def shape(self, rate_mbit_s: float | None) -> LinkShape:
        """Return one direction, with this rate."""
        return LinkShape(self.rtt_ms / 2e3, None if rate_mbit_s is None else rate_mbit_s * 1e6 / 8)


PRESETS = {
    one.name: one
    for one in (
        Preset(name="loopback", rtt_ms=0, up_mbit_s=None, down_mbit_s=None),
        Preset(name="wifi", rtt_ms=4, up_mbit_s=200, down_mbit_s=200),
        Preset(name="5g", rtt_ms=20, up_mbit_s=60, down_mbit_s=100),
        Preset(name="wan", rtt_ms=80, up_mbit_s=60, down_mbit_s=100),
    )
}


def preset(name: str) -> Preset:
    """Return the preset of that name, or raise `LinkError` with those there are."""
    if name not in PRESETS:
        raise LinkError(f"no link is called {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]


class Joined(Protocol):
    """What joins the two sides."""

    @property
    def kind(self) -> str:
        """One word for it."""

    @property
    def cloud_prefix(self) -> tuple[str, ...]:
        """Words before a command that is to run on the cloud's side."""

    @property
    def edge_prefix(self) -> tuple[str, ...]:
        """Words before a command that is to run on the edge's side."""

    @property
    def cloud_host(self) -> str:
        """Address for a server on the cloud's side to listen on."""

    def address(self, port: int) -> str:
        """Return HOST:PORT for the edge of a server on the cloud's side that listens on ``port``."""

    def statistics(self) -> dict[str, Any]:
        """Return counts so far, lateness and CPU seconds of the emulation."""

    def close(self) -> None:
        """Leave nothing behind."""
