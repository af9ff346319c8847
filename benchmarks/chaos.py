"""Chaos: eight edges decode and one tunes while the cloud is killed, restarted, paused, drained, and cut off.

What happens is drawn from a seed (`benchmarks.chaos_events`); the edges reach the cloud by a link that can
be cut (`benchmarks.chaos_link`). Every answer must have the reference's tokens and every adapter the bits
of an undisturbed run; nothing may stay in the KV cache, no process may grow by more than 5 %. What was
found comes as a table, and as one JSON line last; exit status 1 if anything does not hold.

    python -m benchmarks.chaos
    python -m benchmarks.chaos --short
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.chaos_events import KINDS
from benchmarks.chaos_record import Record, table
from benchmarks.chaos_run import Run, say
from benchmarks.chaos_settings import SHORT, Settings
from benchmarks.link import end_on_sigterm


def run(settings: Settings, folder: Path) -> Record:
    """Return the record of one run, with logs in ``folder``."""
    return Run(settings, folder).run()


def main(words: Sequence[str] | None = None) -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="four minutes and three events of each kind")
    for name, kind in (("model", str), ("seconds", float), ("mid-step", int), ("seed", int)):
        parser.add_argument(f"--{name}", type=kind)
    parser.add_argument("--each", type=int, help="events of each kind")
    parser.add_argument("--folder", type=Path, help="keep logs and files here; else in a temporary folder")
    parser.add_argument("--record", type=Path, help="append the JSON line to this file, too")
    options = vars(parser.parse_args(words))
    end_on_sigterm()
    short, folder, file, each = (options.pop(name) for name in ("short", "folder", "record", "each"))
    given = {name: value for name, value in options.items() if value is not None}
    if each is not None:
        given["counts"] = dict.fromkeys(KINDS, each)
    settings = replace(SHORT if short else Settings(), **given)
    if folder is None:
        folder = Path(tempfile.mkdtemp(prefix="privatelora-chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    say(f"logs are in {folder}")
    record = run(settings, folder)
    print(table(record))
    line = json.dumps(record)
    print(line)
    if file is not None:
        with file.open("a") as out:
            out.write(line + os.linesep)
    return 1 if record["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
