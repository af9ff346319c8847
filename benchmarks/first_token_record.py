"""The record of times to a first token, and what is computed from it.

    ideal = RTT + the embeddings' bits / the link's rate up + the same prompt's prefill in one process

with the prefill of plain Hugging Face code on the same cores, measured right before. A plan whose edge holds
layers is held to 1.3 times that; others to 1.5 times, where their round trips alone take less than that.
TCP may ask for more than that ideal knows of, for it opens its window anew after each pause: beside it
stands that prefill plus what plain sockets took for the same bytes, up and then down, right after.
Pure: runs nothing.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field

from benchmarks.quiet import MOST_STEAL

RESIDENT_AIM, EXCHANGING_AIM = 1.3, 1.5


class FirstToken(BaseModel):
    """One prompt, in a session that is open and holds nothing of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    label: str = Field(description="What the run is called")
    preset: str = Field(description="The link")
    rtt_ms: float = Field(description="Its round-trip time as it was measured (milliseconds)")
    up_mbit_s: float | None = Field(description="Its nominal rate from edge to cloud (10^6 bits/s)")
    plan: str
    resident: bool = Field(description="Whether the edge holds layers")
    round_trips: int = Field(description="Of one step under this plan (count)")
    dtype: str
    wire: str = Field(description="What tensors travelled as")
    threads: int | None
    tokens: int = Field(description="Of the prompt (count)")
    chunk: int = Field(description="Most positions that travel in one step (count)")
    in_flight: int = Field(description="Most steps under way at a time (count); 1: nothing is pipelined")
    embeddings_bytes: int = Field(description="Of the prompt's h0 on the wire (bytes)")
    bytes_up: int
    bytes_down: int
    seconds: float = Field(description="To the first token (seconds)")
    local_s: float = Field(description="The whole model's prefill in one process, right before (seconds)")
    steal: float = Field(description="Share of the cores' time that the host took meanwhile")
    local_steal: float
    tcp_s: float | None = Field(default=None, description="The same bytes over plain sockets (seconds)")
    date: str

    @property
    def ideal_s(self) -> float:
        """What it would take if only the embeddings travelled and nothing waited (seconds)."""
        rate = self.up_mbit_s
        return self.rtt_ms / 1e3 + (8 * self.embeddings_bytes / (rate * 1e6) if rate else 0.0) + self.local_s

    @property
    def ratio(self) -> float:
        """The time to the first token, in ideal ones."""
        return self.seconds / self.ideal_s

    @property
    def tcp_ratio(self) -> float | None:
        """The time to the first token, in local prefills with TCP's own time for the same bytes before."""
        return None if self.tcp_s is None else self.seconds / (self.tcp_s + self.local_s)

    @property
    def is_quiet(self) -> bool:
        """Whether the host let both measurements be."""
        return max(self.steal, self.local_steal) <= MOST_STEAL


@dataclass(frozen=True)
class FirstTokens:
    """Several measurements together: medians, and the lowest and highest ratio. Times in seconds.

    ``aim`` is None where the plan's round trips alone rule it out; what is of TCP where nobody asked for it.
    """

    counted: int
    tried: int
    seconds: float
    ideal_s: float
    local_s: float
    ratio: float
    lowest: float
    highest: float
    aim: float | None
    tcp_s: float | None
    tcp_ratio: float | None
    bytes_up: int
    bytes_down: int


def summary(rows: Sequence[FirstToken]) -> FirstTokens:
    """Return the figures of what the host let be, or of all if there is none such (``counted`` 0)."""
    quiet = [row for row in rows if row.is_quiet] or list(rows)
    ratios = sorted(row.ratio for row in quiet)
    ideal = statistics.median(row.ideal_s for row in quiet)
    first = quiet[0]
    aim: float | None = RESIDENT_AIM if first.resident else EXCHANGING_AIM
    if not first.resident and first.round_trips * first.rtt_ms / 1e3 > EXCHANGING_AIM * ideal:
        aim = None
    tcp = [(row.tcp_s, row.tcp_ratio) for row in quiet if row.tcp_s is not None and row.tcp_ratio is not None]
    return FirstTokens(
        counted=sum(row.is_quiet for row in rows),
        tried=len(rows),
        seconds=round(statistics.median(row.seconds for row in quiet), 3),
        ideal_s=round(ideal, 3),
        local_s=round(statistics.median(row.local_s for row in quiet), 3),
        ratio=round(statistics.median(ratios), 3),
        lowest=round(ratios[0], 3),
        highest=round(ratios[-1], 3),
        aim=aim,
        tcp_s=round(statistics.median(seconds for seconds, _ in tcp), 3) if tcp else None,
        tcp_ratio=round(statistics.median(ratio for _, ratio in tcp), 3) if tcp else None,
        bytes_up=first.bytes_up,
        bytes_down=first.bytes_down,
    )
