"""The record of tuning runs: one JSON line each, never changed, and what is decided from it.

A `Spec` says everything that a run's outcome depends on; a run whose spec is in the record is not run
again, so work goes on where it stopped, on whatever machine.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from shared.plan import Initialiser, Layout

Method = Literal["base", "majority", "lora", "privatelora"]
Stage = Literal["compare", "sweep"]
Precision = Literal["float32", "bfloat16"]
Transport = Literal["reference", "wire"]
Schedule = Literal[
    "subset", "grouped", "one_trip", "one_trip_shared", "one_trip_lean", "resident", "lagged"
]  # fmt: skip
Key = TypeVar("Key")


@dataclass(frozen=True)
class Spec:
    """One run. Fields that a method has no use for stay at their defaults."""

    stage: Stage
    model: str
    task: str
    method: Method
    words: int  # the longest text in train and validation
    test_words: int
    test_rows: int  # at most; 0: the test set is not looked at
    validation_rows: int  # at most
    lr: float = 0.0
    seed: int = 0
    steps: int = 0
    batch: int = 0
    rank: int = 0
    alpha: int = 0
    initialiser: Initialiser | Literal[""] = ""
    # A schedule stands for a whole plan, see `edge_client.planning.candidates`; lagged is an experiment.
    layout: Layout | Schedule | Literal[""] = ""
    # Fields from here on came later: lines without them mean the default.
    precision: Precision = "float32"  # of the frozen layers, and on the wire; what is trained is float32
    transport: Transport = "reference"  # wire: through a cloud process
    lag: int = 0  # of layout lagged (positions)

    @property
    def choosing(self) -> "Spec":
        """The run that trains the same and is judged on validation rows alone."""
        return replace(self, test_rows=0)

    def __str__(self) -> str:
        """Say what matters in a line."""
        layout = f"lagged({self.lag})" if self.lag else self.layout
        own = {"lora": f" r={self.rank}", "privatelora": f" {layout} {self.initialiser} r={self.rank}"}
        tuned = f" lr={self.lr:g} seed={self.seed} {self.steps}x{self.batch}" if self.steps else ""
        wire = " over the wire" if self.transport == "wire" else ""
        return f"{self.task} {self.method}{own.get(self.method, '')}{tuned}{wire}"


class Found(BaseModel):
    """What scores say, as it is recorded. Values that are not finite are None."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rows: int = Field(description="Rows that were scored (count)")
    nats: float | None = Field(description="Mean negative log likelihood of the answer (nats)")
    nats_error: float | None = Field(description="Standard error of that mean (nats)")
    perplexity: float | None = Field(description="Perplexity of an answer's token")
    correct: int | None = Field(description="Rows whose right label is the likeliest (count)")


class Run(BaseModel):
    """One line of the record."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    spec: Spec
    validation: Found | None
    test: Found | None
    first_loss: float | None = Field(description="Mean training loss of the first tenth (nats/token)")
    last_loss: float | None = Field(description="Mean training loss of the last tenth (nats/token)")
    diverged: bool
    trained: int = Field(description="Trained parameters (count)")
    wire: int | None = Field(description="Values that a token's forward sends, both ways (count)")
    tokens: int = Field(description="Tokens trained on, without padding (count)")
    seconds: float = Field(description="Time in training steps (s)")
    eval_seconds: float = Field(description="Time in evaluation (s)")
    torch: str
    device: str
    threads: int
    date: str

    @property
    def score(self) -> float:
        """What is judged: held-out nats per answer; infinite for a run that diverged."""
        return math.inf if self.validation is None or self.validation.nats is None else self.validation.nats


class Record:
    """The runs in a file, by spec."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.runs: dict[Spec, Run] = {}
        text = path.read_text("utf-8") if path.is_file() else ""
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                try:
                    run = Run.model_validate_json(line)
                except ValueError as error:
                    raise ValueError(f"{path}:{number} is not a run: {str(error)[:300]}") from None
                self.runs[run.spec] = run

    def add(self, run: Run) -> Run:
        """Append a line."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(run.model_dump_json() + "\n")
        self.runs[run.spec] = run
        return run

    def __iter__(self) -> Iterator[Run]:
        return iter(self.runs.values())


def mean_of(values: Sequence[float]) -> float | None:
    """Return the mean, or None if there is none or it is not finite."""
    mean = sum(values) / len(values) if values else math.nan
    return mean if math.isfinite(mean) else None


def best(scores: Mapping[float, float]) -> float:
    """Return the learning rate with the lowest score; of equals, the lowest."""
    return min(sorted(scores), key=lambda lr: scores[lr])


def wider(scores: Mapping[float, float], factor: float, most: int) -> float | None:
    """Return one more learning rate to try where the best lies at an edge of those tried, else None.

    Without it, a method whose grid was chosen badly would look worse than it is.
    """
    chosen, rates = best(scores), sorted(scores)
    if len(rates) >= most or not math.isfinite(scores[chosen]):
        return None
    if chosen == rates[-1]:
        return significant(chosen * factor)
    return significant(chosen / factor) if chosen == rates[0] else None


def survivors(scores: Mapping[Key, float], keep: int) -> list[Key]:
    """Return the ``keep`` keys with the lowest scores, best first; ties in the order given."""
    return sorted((key for key in scores if math.isfinite(scores[key])), key=lambda key: scores[key])[:keep]


def rungs(arms: int, steps: int, last: int) -> list[tuple[int, int]]:
    """Return (arms, steps) of each round: half the arms, twice the steps, until ``last`` are left."""
    out = [(arms, steps)]
    while arms > last:
        arms, steps = max(last, -(-arms // 2)), steps * 2
        out.append((arms, steps))
    return out


def significant(value: float) -> float:
    """Return ``value`` rounded to two digits, so that it is the same number on every machine."""
    return float(f"{value:.1e}")
