"""The record of the integrity experiment, and how people read it: a table and a plot.

One JSON line for each model that was scored, never changed. A line names the adapter by the digest of
its M, for tuning ends in other bits on another machine; the table and the plot are of the adapter that the
last line names.
"""

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from benchmarks.perturbation import Change, Part
from benchmarks.quality import Z_95, wilson
from benchmarks.tuning_runs import Found
from shared.cache import replacing
from shared.plan import Initialiser, Layout

BYTES_OF_DIGEST = 6  # enough to tell two adapters apart
NATS_TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20)
COLOURS: dict[Part, str] = {"A": "tab:blue", "B": "tab:orange"}


@dataclass(frozen=True)
class Tuned:
    """How the adapter was made: everything that its bits depend on but the machine."""

    model: str
    task: str
    words: int  # the longest text
    rank: int
    initialiser: Initialiser
    layout: Layout
    lr: float
    steps: int
    batch: int
    seed: int


class Finding(BaseModel):
    """One line: a model, and how it did."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tuned: Tuned
    adapter: str = Field(description="First bytes of the digest of M (hex)")
    uses_m: bool = Field(description="False for the untuned model, M = 0")
    change: Change | None = Field(description="What was done to A or B; None is nothing")
    found: Found = Field(description="Scores on the first test rows in the order of their digests")
    seconds: float = Field(description="Time that scoring took (s)")
    torch: str
    device: str
    threads: int
    date: str

    @property
    def key(self) -> tuple[object, ...]:
        """What must differ between two lines."""
        return self.adapter, self.found.rows, self.uses_m, self.change


class Record:
    """The findings in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        text = path.read_text("utf-8") if path.is_file() else ""
        lines = [Finding.model_validate_json(line) for line in text.splitlines() if line.strip()]
        self.findings = {finding.key: finding for finding in lines}

    def add(self, finding: Finding) -> None:
        """Append a line."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(finding.model_dump_json() + "\n")
        self.findings[finding.key] = finding

    def latest(self) -> list[Finding]:
        """Return the findings with the adapter and the number of rows of the last line.

        Raises
        ------
        ValueError
            If there are none.
        """
        if not self.findings:
            raise ValueError(f"{self.path} holds nothing yet: run `make integrity`")
        last = list(self.findings.values())[-1]
        return [f for f in self.findings.values() if f.key[:2] == last.key[:2]]


# --- reading --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One line of the table: the draws of one change taken together."""

    name: str
    change: Change | None  # of the first draw
    draws: int
    nats: float
    nats_range: tuple[float, float]  # over draws
    nats_half: float  # half the 95 % interval over rows: draws share their rows, so more do not narrow it
    share: float  # of right answers
    share_interval: tuple[float, float]


def rows(findings: list[Finding]) -> list[Row]:
    """Return the table's lines: untuned, as tuned, then A and B by growing amount, re-drawn ones last."""
    groups: dict[tuple[Any, ...], list[Finding]] = {}
    for f in findings:
        amount = -1.0 if f.change is None else float("inf") if f.change.amount is None else f.change.amount
        place = (f.uses_m, "" if f.change is None else f.change.part, amount)
        groups.setdefault(place, []).append(f)
    return [_row(groups[place]) for place in sorted(groups)]


def _row(group: list[Finding]) -> Row:
    first = group[0]
    name = ("as tuned" if first.uses_m else "untuned, M = 0") if first.change is None else str(first.change)
    nats = [f.found.nats for f in group if f.found.nats is not None]
    shares = [f.found.correct / f.found.rows for f in group if f.found.correct is not None]
    errors = [f.found.nats_error for f in group if f.found.nats_error is not None]
    if not nats or not shares or not errors or not len(nats) == len(shares) == len(errors) == len(group):
        raise ValueError(f"{name}: a score is not finite or has no labels")
    share = statistics.mean(shares)
    return Row(
        name, first.change, len(group), statistics.mean(nats), (min(nats), max(nats)),
        Z_95 * statistics.mean(errors), share, wilson(share, first.found.rows),
    )  # fmt: skip


def markdown(findings: list[Finding]) -> str:
    """Return the table."""
    lines = [
        "| A and B of the cloud | nats per answer [95 %] | range over draws | accuracy, % [95 %] |",
        "|---|---|---|---|",
    ]
    for row in rows(findings):
        low, high = row.share_interval
        spread = f"{row.nats_range[0]:.3f} to {row.nats_range[1]:.3f} ({row.draws})" if row.draws > 1 else "-"
        lines.append(
            f"| {row.name} | {row.nats:.3f} ± {row.nats_half:.3f} | {spread} "
            f"| {100 * row.share:.1f} [{100 * low:.1f}, {100 * high:.1f}] |"
        )
    return "\n".join(lines)


def title(findings: list[Finding]) -> str:
    """Return in a line what was tuned and scored."""
    tuned, scored = findings[0].tuned, findings[0].found.rows
    return (
        f"{tuned.model}, {tuned.task}: {tuned.steps} steps of {tuned.batch}, "
        f"{tuned.layout.replace('_', ' ')} {tuned.initialiser} r = {tuned.rank}; {scored} test rows"
    )


def plot(findings: list[Finding], path: Path) -> None:
    """Write a PNG file: likelihood and accuracy by amount of noise, with 95 % intervals."""
    # An extra: only this function needs it. Without pyplot, which may look for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    table = rows(findings)
    figure = Figure(figsize=(9.5, 4.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2)
    amounts = sorted({r.change.amount for r in table if r.change and r.change.amount is not None})
    if not amounts:
        raise ValueError("there is no amount of noise to draw yet")
    last = amounts[-1] * 4  # where the re-drawn ones stand
    for axis, value, half in ((axes[0], _nats, _nats_half), (axes[1], _percent, _percent_half)):
        for row in (r for r in table if r.change is None):
            style = "-" if row.name == "as tuned" else "--"
            axis.axhline(value(row), color="black", linestyle=style, linewidth=1, label=row.name)
        for part, colour in COLOURS.items():
            own = [r for r in table if r.change is not None and r.change.part == part]
            drawn = [r for r in own if r.change is not None and r.change.amount is not None]
            at = [r.change.amount for r in drawn if r.change is not None and r.change.amount is not None]
            bars: dict[str, Any] = {"color": colour, "capsize": 3}
            axis.errorbar(
                at, [value(r) for r in drawn], _errors([half(r) for r in drawn]), fmt="o-", label=part, **bars
            )
            again = [r for r in own if r.change is not None and r.change.amount is None]
            shifted = last * (1.08 if part == "B" else 1 / 1.08)  # side by side, not on top of each other
            axis.errorbar(
                [shifted] * len(again), [value(r) for r in again], _errors([half(r) for r in again]),
                fmt="s", **bars,
            )  # fmt: skip
        axis.set_xscale("log")
        axis.set_xticks([*amounts, last], [*(f"{amount:g}" for amount in amounts), "re-\ndrawn"])
        axis.minorticks_off()
        axis.set_xlabel("noise on A or B, relative to its root mean square")
        axis.grid(alpha=0.3)
    ticks = [t for t in NATS_TICKS if t <= 2 * max(row.nats for row in table)]
    axes[0].set_yscale("log")  # a tuned model and a broken one lie far apart
    axes[0].set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes[0].minorticks_off()
    axes[0].set_ylabel("held-out nats per answer")
    axes[1].set_ylabel("accuracy (%)")
    axes[1].legend(loc="center left")
    figure.suptitle(title(findings), fontsize="medium")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        figure.savefig(file, format="png", metadata={"Software": None})


def _nats(row: Row) -> float:
    return row.nats


def _nats_half(row: Row) -> tuple[float, float]:
    return row.nats_half, row.nats_half


def _percent(row: Row) -> float:
    return 100 * row.share


def _percent_half(row: Row) -> tuple[float, float]:
    low, high = row.share_interval
    return 100 * (row.share - low), 100 * (high - row.share)


def _errors(pairs: list[tuple[float, float]]) -> list[list[float]]:
    """Return lower and upper lengths as matplotlib wants them, (2, points)."""
    return [[low for low, _ in pairs], [high for _, high in pairs]]
