"""Fuzzing of both sides: mutated messages to the cloud, mutated answers to the edge, mutated files.

What must hold of every case: it is answered as valid or refused with a status other than UNKNOWN and INTERNAL
(bytes that do not parse included), on the edge and for files with a documented error of ours; it ends in
time; nothing dies; nothing is left of it; memory does not grow. Inputs are made from the structure of right
ones, so that most of them parse; see `benchmarks.fuzz_mutation`.

``python -m benchmarks.fuzz`` runs a million mutated messages against the cloud and as many cases of the rest
as the options say; the last line is one JSON object. It fails if anything was found, if it did less than was
asked for, and if most of its mutated messages do not parse. A case that fails is kept in a file with its seed
and its inputs: ``--replay FILE`` runs it again. What is found of a part as a whole (something left over,
memory, a cloud that died) is kept in words only. Needs Linux (memory is read from /proc) and no model.
"""

import argparse
import asyncio
import concurrent.futures
import json
import logging
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from benchmarks import fuzz_files, fuzz_local, fuzz_offers
from benchmarks.fuzz_cases import Failure, Finding, Memory, Share, Tally, finding, words
from benchmarks.fuzz_cloud import Cloud
from benchmarks.fuzz_model import save_model
from benchmarks.fuzz_wire import run_wire

WARM_UP = 0.2  # share of a part after which memory is taken as warm
PARTS = ("cloud", "wire", "edge", "files")  # targets of findings that belong to no single case
MOST_GROWTH = 0.05
LEAST_PARSED = 0.5  # share of the mutated messages
SLACK_BYTES = 16 << 20  # what the allocator may hold in holes besides: a process has some 500 MB
PIECE = 10_000  # mutated messages between two lines of progress


def run_cloud(folder: Path, seed: str, mutated: int, seconds: float, tally: Tally) -> dict[str, Any]:
    """Fuzz a cloud in this process; return its memory."""
    memory = Memory()

    async def run() -> None:
        async with Cloud.running(folder) as cloud:
            began, target = time.monotonic(), max(1, int(WARM_UP * mutated))
            piece = 0
            while tally.mutated < mutated and not tally.findings:
                left = seconds - (time.monotonic() - began)
                if left <= 0:
                    break
                span = min(left, max(1.0, WARM_UP * seconds)) if not memory.warm else left
                await cloud.run(f"{seed}/{piece}", target, span, tally)
                piece += 1
                if not memory.warm:
                    memory.is_warm()
                else:
                    _say(f"cloud {seed}: {tally.mutated} mutated messages, {time.monotonic() - began:.0f} s")
                target = min(mutated, tally.mutated + PIECE)
            memory.has_ended()

    _on_fast_loop(run())
    return memory.facts()


def run_edge(seed: str, mutated: int, seconds: float, tally: Tally) -> dict[str, Any]:
    """Fuzz an edge in this process with a hostile cloud's answers; return its memory."""
    memory, plans = Memory(), fuzz_offers.plans()
    fuzz_local.run_edge(plans, f"{seed}/warm", max(1, int(WARM_UP * mutated)), WARM_UP * seconds, tally)
    memory.is_warm()
    fuzz_local.run_edge(plans, seed, mutated, (1 - WARM_UP) * seconds, tally)
    memory.has_ended()
    return memory.facts()


def run_files(
    folder: Path, seed: str, cases: int, seconds: float, tally: Tally, tallies: dict[str, Tally]
) -> dict[str, Any]:
    """Fuzz whatever reads a file or an offer in this process; return its memory.

    Counts and findings of each kind are added to ``tallies``, the counts of all of them to ``tally``.
    """
    memory, kinds, work = Memory(), _kinds(folder), folder / "work"
    warm = int(WARM_UP * cases)
    fuzz_local.run_files(kinds, f"{seed}/warm", WARM_UP * seconds, max(1, warm), work, tallies)
    memory.is_warm()
    fuzz_local.run_files(kinds, seed, (1 - WARM_UP) * seconds, cases - warm, work, tallies)
    memory.has_ended()
    for one in (tallies.setdefault(f"file-{kind}", Tally()) for kind in kinds):
        tally.cases += one.cases
        tally.outcomes += one.outcomes
    return memory.facts()


def _kinds(folder: Path) -> dict[str, fuzz_files.Kind]:
    model = save_model(folder / "model")
    return fuzz_files.kinds(folder / "files", model) | fuzz_offers.kinds(folder / "offers", model)


def run_worker(seed: str, options: argparse.Namespace) -> Share:
    """Run one worker's share of everything in this process; return what has come of it."""
    logging.disable(logging.CRITICAL)  # refusals are logged, by the million
    share, seconds = Share(), options.seconds
    scratch = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None

    def part(name: str, count: int, run: Callable[[int, Tally], dict[str, Any]]) -> None:
        if not count:
            return
        tally = share.tallies[name] = Tally()
        try:
            memory = share.memory[name] = run(-(-count // options.workers), tally)
        except Exception as error:  # an honest stream failed, a process died: keep what was found before
            tally.findings.append(finding(name, f"{seed}/end", f"broke off: {words(error)}", []))
            return
        warm, end = memory["rss_warm"], memory["rss_end"]
        if warm and end > warm * (1 + MOST_GROWTH) + SLACK_BYTES:
            tally.findings.append(finding(name, seed, f"memory grew from {warm} to {end} bytes", []))

    with tempfile.TemporaryDirectory(prefix="privatelora-fuzz-", dir=scratch) as place:
        folder = Path(place)
        os.environ["PRIVATELORA_CONFIG_DIR"] = str(folder / "settings")
        part("cloud", options.messages, lambda n, tally: run_cloud(folder / "cloud", seed, n, seconds, tally))
        part("wire", options.wire, lambda n, tally: run_wire(folder / "wire", seed, n, seconds, tally))
        part("edge", options.edge, lambda n, tally: run_edge(seed, n, seconds, tally))
        part(
            "files",
            options.files,
            lambda n, tally: run_files(folder / "files", seed, n, seconds, tally, share.tallies),
        )
    return share


def replay(found: Finding) -> str:
    """Run one case again, of the wire without gRPC; return how it ended.

    Raises
    ------
    benchmarks.fuzz_cases.Failure
        If it fails once more.
    """
    inputs = [bytes.fromhex(text) for text in found.inputs]
    with tempfile.TemporaryDirectory(prefix="privatelora-fuzz-") as name:
        folder = Path(name)
        if found.target.startswith(("cloud-", "wire-")):

            async def again() -> str:
                async with Cloud.running(folder) as cloud:
                    outcome = await cloud.replay(found.target.partition("-")[2], inputs)
                    await cloud.check("replay")
                    return outcome

            return str(_on_fast_loop(again()))
        kinds = _kinds(folder) if found.target.startswith("file-") else {}
        place = folder / "work"
        place.mkdir()
        return fuzz_local.replay(found.target, found.case, inputs, kinds, fuzz_offers.plans(), place)


def _on_fast_loop(work: Any) -> Any:
    """Run a coroutine on the loop that the cloud runs on.

    What it leaves is not waited for: a handler that nothing ends may be what was found.
    """
    try:
        import uvloop
    except ImportError:
        loop = asyncio.new_event_loop()
    else:
        loop = uvloop.new_event_loop()
    return loop.run_until_complete(work)


def _together(shares: list[Share]) -> dict[str, Tally]:
    """Add the counts of several workers up."""
    found: dict[str, Tally] = {}
    for share in shares:
        for name, tally in share.tallies.items():
            found.setdefault(name, Tally()).add(tally)
    return found


def _memory(shares: list[Share], part: str) -> dict[str, Any]:
    """Return the memory of a part's process, of several the largest growth."""
    found = [share.memory[part] for share in shares if part in share.memory]
    if len(found) > 1:
        return {"growth": max(one["growth"] or 0.0 for one in found)}
    return found[0] if found else {}


def shortfalls(tallies: dict[str, Tally], options: argparse.Namespace) -> list[str]:
    """Return in words where a run has done less than it was asked for, or what mostly does not parse."""
    found = []
    for part, asked in (("cloud", options.messages), ("wire", options.wire), ("edge", options.edge)):
        tally = tallies.get(part, Tally())
        if tally.mutated < asked:
            found.append(f"{part}: {tally.mutated} mutated messages instead of {asked}")
        if asked and tally.parsed_share < LEAST_PARSED:
            found.append(f"{part}: only {tally.parsed_share:.0%} of the mutated messages parse")
    if options.files and "files" not in tallies:
        found.append("files: none was read")
    for name, tally in tallies.items():
        if name.startswith("file-") and tally.cases < options.files:
            found.append(f"{name}: {tally.cases} mutants instead of {options.files}")
    return found


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    """Run what the command line asks for; return 1 if something was found or is missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--messages", type=int, default=1_000_000, help="mutated messages to the cloud (count)"
    )
    parser.add_argument(
        "--wire", type=int, default=20_000, help="of them more, over gRPC to a process (count)"
    )
    parser.add_argument("--edge", type=int, default=100_000, help="mutated answers to the edge (count)")
    parser.add_argument("--files", type=int, default=5_000, help="mutants of each kind of file (count)")
    parser.add_argument(
        "--seconds", type=float, default=1e6, help="most time for each of the four; what it cuts short fails"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes that share the work (count)")
    parser.add_argument("--seed", default="1", help="what the cases follow from (any text)")
    parser.add_argument("--out", type=Path, default=Path("fuzz-findings"), help="folder for cases that fail")
    parser.add_argument("--replay", type=Path, help="run a kept case again, and nothing else")
    options = parser.parse_args()
    if options.replay is not None:
        kept = Finding.load(options.replay)
        if kept.target in PARTS:
            parser.error(
                f"{options.replay} is about the part '{kept.target}' as a whole, not about one case: run "
                "that part again with the --seed, the --workers and the counts of the run that found it"
            )
        try:
            outcome, status = replay(kept), 0
        except Failure as failure:
            outcome, status = f"fails again: {failure}", 1
        print(json.dumps({"replay": str(options.replay), "outcome": outcome}))
        return status
    began = time.monotonic()
    seeds = [f"{options.seed}.{number}" for number in range(options.workers)]
    if options.workers == 1:
        done = [run_worker(seeds[0], options)]
    else:
        spawn = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(options.workers, mp_context=spawn) as pool:
            done = list(pool.map(run_worker, seeds, [options] * options.workers))
    tallies = _together(done)
    findings = [found for tally in tallies.values() for found in tally.findings]
    for found in findings:
        _say(f"FOUND {found.save(options.out)}: {found.what[-1500:]}")
    short = shortfalls(tallies, options)
    for what in short:
        _say(f"SHORT {what}")
    facts = {name: tally.facts() | _memory(done, name) for name, tally in tallies.items()}
    summary = {"seed": options.seed, "workers": options.workers, "seconds": round(time.monotonic() - began)}
    print(json.dumps(summary | facts | {"findings": len(findings), "shortfalls": short}))
    return 1 if findings or short else 0


if __name__ == "__main__":
    sys.exit(main())
