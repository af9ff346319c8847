"""The record of answers that were decoded over links: one JSON line each, and what is computed from it.

The bound that a plan's speed is held against, over the answers of one group:

    tokens / (round trips x RTT + the same steps' time on loopback)

with the tokens after each answer's first. With one round trip a step that is (tokens per step) / (RTT + mean
step). The steps' time on loopback is that of the same steps (as many positions in each, of which as many
were accepted, the same text) taken again through the same cloud with no link in between, right after each
answer. Answers count for it in which the host let both be (`benchmarks.quiet`): a disturbed replay flatters.
Pure: reads lines, runs nothing.
"""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field

from benchmarks.quiet import MOST_STEAL

AIM = 0.9  # of the bound
SLOWDOWN_AIM = 0.05  # that drafting may cost any prompt
# What the paper sends for a token: codes and residual codes of three projections at r = 128, fp16, a layer.
PAPER_BYTES_PER_LAYER = 2 * 3 * 128 * 2
PLAIN = "plain"  # the plan that is none: the whole model in one process
Row = TypeVar("Row", bound=BaseModel)


class Length(BaseModel):
    """Steps of one length in an answer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    positions: int = Field(description="That each of them ran (count)")
    steps: int = Field(description="How many there were (count)")
    median_s: float = Field(description="Their median time over the link (seconds)")


class Answered(BaseModel):
    """One answer. What is counted or timed leaves out its first token."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    label: str = Field(description="What the run is called")
    preset: str = Field(description="The link")
    rtt_ms: float = Field(description="Its round-trip time as it was measured (milliseconds)")
    plan: str
    layers: int = Field(description="Of the whole model (count)")
    drafted: bool = Field(description="Whether tokens were guessed ahead")
    prompt: int
    kind: str = Field(description="Of text")
    dtype: str
    wire: str = Field(description="What tensors travelled as")
    threads: int | None = Field(description="Of each process (count); None: as many as there are cores")
    limit: int = Field(description="Longest answer (tokens)")
    tokens: int = Field(description="After the first (count)")
    steps: int = Field(description="After the first (count)")
    positions: int = Field(description="That these ran, rejected guesses included (count)")
    seconds: float = Field(description="They took over the link")
    loopback_s: float | None = Field(description="The same steps took with no link in between (seconds)")
    round_trips: int
    bytes_up: int
    bytes_down: int
    lengths: tuple[Length, ...]
    first_s: float = Field(description="Time to the first token, in a new session (seconds)")
    steal: float = Field(description="Share of the cores' time that the host took meanwhile")
    loopback_steal: float | None = Field(description="The same while the steps were taken again")
    round: int = Field(default=0, description="How many times it had been answered so before (count)")
    date: str

    @property
    def key(self) -> tuple[object, ...]:
        """What must be equal for an answer to be there already."""
        return (
            self.label,
            self.preset,
            self.plan,
            self.drafted,
            self.prompt,
            self.limit,
            self.dtype,
            self.wire,
            self.round,
        )


def read(path: Path, row: type[Row]) -> list[Row]:
    """Return the lines of a record.

    Raises
    ------
    ValueError
        If a line is none of them; says which.
    """
    rows = []
    for number, line in enumerate(path.read_text("utf-8").splitlines() if path.is_file() else [], 1):
        try:
            rows.append(row.model_validate_json(line))
        except ValueError as error:
            raise ValueError(f"{path}:{number} is no line of this record: {str(error)[:300]}") from None
    return rows


def append(path: Path, row: BaseModel) -> None:
    """Add a line to a record."""
    with path.open("a", encoding="utf-8") as file:
        file.write(row.model_dump_json() + "\n")


def lengths(steps: Iterable[tuple[int, float]]) -> tuple[Length, ...]:
    """Return steps, each (positions, seconds), by their number of positions."""
    times: dict[int, list[float]] = defaultdict(list)
    for positions, seconds in steps:
        times[positions].append(seconds)
    return tuple(
        Length(positions=n, steps=len(found), median_s=round(statistics.median(found), 5))
        for n, found in sorted(times.items())
    )


@dataclass(frozen=True)
class Summary:
    """The figures of several answers together, each token weighing the same.

    Rates in tokens/s, times in milliseconds, bytes both ways per token. ``bound_tok_s`` and the step's time
    on loopback are None where no steps were taken again undisturbed; ``against_bound`` is the speed's share
    of it. These three are of those answers alone; ``quiet`` counts all in which the host let be.
    """

    answers: int
    quiet: int
    tokens: int
    tok_s: float
    tokens_per_step: float
    tokens_per_round_trip: float | None
    positions_per_step: float
    step_ms: float
    loopback_step_ms: float | None
    rtt_ms: float
    bound_tok_s: float | None
    against_bound: float | None
    bytes_up_per_token: float
    bytes_down_per_token: float
    of_papers_bytes: float
    most_steal: float


def ideal_s(row: Answered) -> float | None:
    """Return what the steps of an answer take at least: their round trips, and their time on loopback."""
    return None if row.loopback_s is None else row.round_trips * row.rtt_ms / 1e3 + row.loopback_s


def summary(rows: Sequence[Answered]) -> Summary | None:
    """Return the figures of answers that belong together; None if none was longer than one token."""
    rows = [row for row in rows if row.tokens]
    if not rows:
        return None
    tokens, steps = sum(row.tokens for row in rows), sum(row.steps for row in rows)
    seconds, trips = sum(row.seconds for row in rows), sum(row.round_trips for row in rows)
    quiet = [row for row in rows if max(row.steal, row.loopback_steal or 0.0) <= MOST_STEAL]
    held = [(row, ideal) for row in quiet if (ideal := ideal_s(row)) is not None]
    bound = against = loopback_ms = None
    if held:
        ideal = sum(ideal for _, ideal in held)
        bound = sum(row.tokens for row, _ in held) / ideal
        against = ideal / sum(row.seconds for row, _ in held)
        loopback_ms = 1e3 * sum(row.loopback_s or 0.0 for row, _ in held) / sum(row.steps for row, _ in held)
    up, down = (sum(getattr(row, way) for row in rows) / tokens for way in ("bytes_up", "bytes_down"))
    return Summary(
        answers=len(rows),
        quiet=len(quiet),
        tokens=tokens,
        tok_s=round(tokens / seconds, 3),
        tokens_per_step=round(tokens / steps, 3),
        tokens_per_round_trip=round(tokens / trips, 3) if trips else None,
        positions_per_step=round(sum(row.positions for row in rows) / steps, 3),
        step_ms=round(1e3 * seconds / steps, 2),
        loopback_step_ms=None if loopback_ms is None else round(loopback_ms, 2),
        rtt_ms=round(statistics.mean(row.rtt_ms for row in rows), 2),
        bound_tok_s=None if bound is None else round(bound, 3),
        against_bound=None if against is None else round(against, 4),
        bytes_up_per_token=round(up, 1),
        bytes_down_per_token=round(down, 1),
        of_papers_bytes=round((up + down) / (PAPER_BYTES_PER_LAYER * rows[0].layers), 4),
        most_steal=max(max(row.steal, row.loopback_steal or 0.0) for row in rows),
    )


@dataclass(frozen=True)
class Slowdown:
    """How much longer a prompt's token took with guesses than without; below 0 it was faster.

    ``measured`` is from both answers' own times. ``at_medians`` gives each step the median time of all steps
    of its length under that plan and link, so that what the host took from one answer does not count. Both
    are medians of ``rounds``.
    """

    prompt: int
    measured: float
    at_medians: float
    rounds: int = 1


def slowdowns(rows: Sequence[Answered]) -> list[Slowdown]:
    """Return the slowdown of every prompt that was answered both ways, of one plan over one link."""
    rows = [row for row in rows if row.tokens]
    typical = median_times(rows)
    pairs: dict[int, dict[int, dict[bool, Answered]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        pairs[row.prompt][row.round][row.drafted] = row
    found = []
    for prompt, rounds in sorted(pairs.items()):
        both = [(pair[True], pair[False]) for pair in rounds.values() if len(pair) == 2]
        if not both:
            continue
        measured = [(w.seconds / w.tokens) / (o.seconds / o.tokens) - 1 for w, o in both]
        expected = [sum(one.steps * typical[one.positions] for one in w.lengths) for w, _ in both]
        at_medians = [s / (w.tokens * typical[1]) - 1 for s, (w, _) in zip(expected, both, strict=True)]
        middle = [round(statistics.median(values), 4) for values in (measured, at_medians)]
        found.append(Slowdown(prompt, middle[0], middle[1], len(both)))
    return found


def median_times(rows: Iterable[Answered]) -> dict[int, float]:
    """Return the median time of a step by its positions, over answers that weigh by their steps."""
    times: dict[int, list[tuple[float, int]]] = defaultdict(list)
    for row in rows:
        for one in row.lengths:
            times[one.positions].append((one.median_s, one.steps))
    return {positions: _weighted_median(found) for positions, found in times.items()}


def _weighted_median(values: list[tuple[float, int]]) -> float:
    half, passed = sum(weight for _, weight in values) / 2, 0
    for value, weight in sorted(values):
        passed += weight
        if passed >= half:
            return value
    raise ValueError("no values")
