"""Runs cases that need no event loop of their own: the edge against a hostile cloud, and files.

Each case has a deadline: an alarm breaks off what runs in Python, a watchdog ends the process over what hangs
in compiled code, with a traceback.
"""

import contextlib
import faulthandler
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks.fuzz_cases import MOST_FINDINGS, Failure, Tally, finding, generator, words
from benchmarks.fuzz_files import Kind
from benchmarks.fuzz_hostile import HostileCloud

DEADLINE_S = 20.0  # of one case, by the clock: the machine may be busy
CPU_S = 3.0  # of one case, in processor time
HUNG_S = 60.0  # after which the watchdog ends the process
RENEWED = 400  # cases on one connection


@contextlib.contextmanager
def deadline() -> Iterator[None]:
    """Break off what takes too long.

    Raises
    ------
    Failure
        If it does.
    """

    def ring(number: int, frame: FrameType | None) -> None:
        raise Failure(f"hangs: still busy after {DEADLINE_S:.0f} s")

    left, every = signal.getitimer(signal.ITIMER_REAL)
    before = signal.signal(signal.SIGALRM, ring)
    faulthandler.dump_traceback_later(HUNG_S, exit=True)
    began, began_real = time.process_time(), time.monotonic()
    try:
        signal.setitimer(signal.ITIMER_REAL, DEADLINE_S)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if left:  # somebody else's alarm, pytest-timeout's for one: it goes on, and rings now if it is due
            signal.setitimer(signal.ITIMER_REAL, max(1e-6, left - (time.monotonic() - began_real)), every)
        faulthandler.cancel_dump_traceback_later()
    if (took := time.process_time() - began) > CPU_S:
        raise Failure(f"took {took:.1f} s of processor time")


def read(kind: Kind, raw: bytes, folder: Path) -> str:
    """Let a file be read; return how it was taken.

    Raises
    ------
    Failure
        If with another error than documented.
    """
    path = folder / "mutant.gguf"
    path.unlink(missing_ok=True)
    path.write_bytes(raw)
    try:
        with deadline():
            kind.read(path)
    except Failure:
        raise
    except kind.errors as error:
        if type(error) not in kind.errors:
            raise Failure(f"refused with {type(error).__name__}, which is not documented") from None
        return type(error).__name__
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        raise Failure(f"not an error of ours: {words(error)}") from None
    return "OK"


def run_files(
    kinds: dict[str, Kind], seed: str, seconds: float, cases: int, folder: Path, tallies: dict[str, Tally]
) -> None:
    """Read mutants of every kind in turn, until so many of each were read or the time is over.

    What comes of them is added to ``tallies``, under ``file-`` and the kind.
    """
    folder.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + seconds
    for number in range(cases):
        for name, kind in kinds.items():
            if time.monotonic() > until:
                return
            tally, case = tallies.setdefault(f"file-{name}", Tally()), f"{seed}/{name}/{number}"
            if len(tally.findings) >= 3:
                continue
            raw = kind.make(generator(case))
            tally.cases += 1
            try:
                tally.outcomes[read(kind, raw, folder)] += 1
            except Failure as failure:
                tally.findings.append(finding(f"file-{name}", case, str(failure), [raw]))


def run_edge(cloud_plans: Any, seed: str, mutated: int, seconds: float, tally: Tally) -> None:
    """Let an edge talk to a hostile cloud until it has heard so many mutants or the time is over."""
    number, cloud = 0, HostileCloud(cloud_plans)
    until = time.monotonic() + seconds  # from here: what is honest takes its time on a busy machine
    try:
        while tally.mutated < mutated and time.monotonic() < until and len(tally.findings) < MOST_FINDINGS:
            number += 1
            if number % RENEWED == 0:
                cloud.close()
                cloud = HostileCloud(cloud_plans)
            for target in cloud.targets:
                case = f"{seed}/{target}/{number}"
                tally.cases += 1
                act, said = cloud.case(target, generator(case), tally)
                try:
                    with deadline():
                        outcome = act()
                    tally.outcomes[outcome] += 1
                except Failure as failure:
                    tally.findings.append(finding(target, case, str(failure), said))
                except Exception as error:
                    what = f"not an error of ours: {words(error)}"
                    tally.findings.append(finding(target, case, what, said))
    finally:
        cloud.close()


def replay(
    name: str, case: str, inputs: list[bytes], kinds: dict[str, Kind], plans: Any, folder: Path
) -> str:
    """Run one case of either again; return how it ended."""
    if name.startswith("file-"):
        return read(kinds[name.removeprefix("file-")], inputs[0], folder)
    cloud = HostileCloud(plans)
    try:
        with deadline():
            return cloud.replay(name, case, inputs)
    finally:
        cloud.close()
