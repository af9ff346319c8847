"""What every kind of fuzzing shares: counts, findings that can be replayed, and memory before and after."""

import enum
import gc
import json
import random
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from google.protobuf.message import Message

from benchmarks.fuzz_mutation import is_message
from benchmarks.processes import memory_bytes

WARM_UP = 0.3  # share of a run after which memory is taken as warm
MOST_FINDINGS = 20  # after so many, a run is broken off


class Failure(Exception):
    """Something that must not happen; the message says what."""


@dataclass
class Finding:
    """A case that failed: enough to do it again."""

    target: str
    case: str  # the seed of the case's random generator
    what: str
    inputs: list[str]  # in hex, in order

    def save(self, folder: Path) -> Path:
        """Write it to a file of its own."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.target}-{self.case.replace('/', '-')}.json"
        path.write_text(json.dumps(asdict(self), indent=1))
        return path

    @classmethod
    def load(cls, path: Path) -> "Finding":
        """Read one."""
        return cls(**json.loads(path.read_text()))


class Sort(enum.Enum):
    """What a message is that was said in the place of a right one."""

    RIGHT = enum.auto()  # the right one itself
    MUTANT = enum.auto()
    MOVED = enum.auto()  # as somebody might have said it, but repeated, late, or another stream's


def sorts(raws: Sequence[bytes], right: bytes, *, mutated: bool) -> list[Sort]:
    """Return what each of ``raws`` is; a mutant only if ``mutated`` and its bytes are not the right ones."""
    found = []
    for at, raw in enumerate(raws):
        if raw == right and raw not in raws[:at]:
            found.append(Sort.RIGHT)
        else:
            found.append(Sort.MUTANT if mutated and raw != right else Sort.MOVED)
    return found


@dataclass
class Tally:
    """Counts of one run, or of several together."""

    cases: int = 0
    delivered: int = 0  # messages that the other side was given
    moved: int = 0  # of these, `Sort.MOVED`
    mutants: Counter[str] = field(default_factory=Counter)  # of these, by the message's type
    parsed: Counter[str] = field(default_factory=Counter)  # of the mutants
    outcomes: Counter[str] = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)

    @property
    def mutated(self) -> int:
        """How many mutants were delivered."""
        return self.mutants.total()

    @property
    def parsed_share(self) -> float:
        """Share of the mutants that parse as what they stand for."""
        return self.parsed.total() / max(1, self.mutated)

    def count(self, kind: type[Message], raw: bytes, sort: Sort) -> None:
        """Count one message of a type."""
        self.delivered += 1
        self.moved += sort is Sort.MOVED
        if sort is Sort.MUTANT:
            self.mutants[kind.DESCRIPTOR.name] += 1
            self.parsed[kind.DESCRIPTOR.name] += is_message(kind, raw)

    def add(self, other: "Tally") -> None:
        """Add another's counts."""
        self.cases += other.cases
        self.delivered += other.delivered
        self.moved += other.moved
        self.mutants += other.mutants
        self.parsed += other.parsed
        self.outcomes += other.outcomes
        self.findings += other.findings

    def facts(self) -> dict[str, Any]:
        """Return what is printed; of messages only where some were said."""
        found: dict[str, Any] = {"cases": self.cases}
        if self.delivered:
            found |= {
                "messages": self.delivered,
                "mutated": self.mutated,
                "parsed_share": round(self.parsed_share, 3),
                "out_of_order": self.moved,
                "kinds": {
                    name: {"mutated": count, "parsed_share": round(self.parsed[name] / count, 3)}
                    for name, count in self.mutants.most_common()
                },
            }
        return found | {"outcomes": dict(self.outcomes.most_common()), "findings": len(self.findings)}


@dataclass
class Share:
    """What one worker has done: counts and memory of each part, counts of each kind of file besides."""

    tallies: dict[str, Tally] = field(default_factory=dict)
    memory: dict[str, dict[str, Any]] = field(default_factory=dict)


class Memory:
    """Resident memory, warm and at the end."""

    def __init__(self) -> None:
        self.warm = self.end = 0

    def is_warm(self) -> None:
        """Take what is used now as what a run may use."""
        self.warm = _resident()

    def has_ended(self) -> None:
        """Look at what is used in the end."""
        self.end = _resident()

    def facts(self) -> dict[str, Any]:
        """Return what is printed."""
        growth = self.end / self.warm - 1 if self.warm else 0.0
        return {"rss_warm": self.warm, "rss_end": self.end, "growth": round(growth, 4)}


def _resident() -> int:
    gc.collect()
    return memory_bytes()[0]


def generator(case: str) -> random.Random:
    """Return the random generator of a case."""
    return random.Random(case)


def words(error: BaseException) -> str:
    """Return an exception with where it was raised, short."""
    lines = traceback.format_exception(type(error), error, error.__traceback__)
    return "".join(lines)[-3000:]


def finding(target: str, case: str, what: str, inputs: Sequence[bytes]) -> Finding:
    """Return a finding of these inputs."""
    return Finding(target, case, what, [raw.hex() for raw in inputs])
