"""A short run of the fuzzing, and that it would notice: the whole is `make fuzz`."""

import argparse
import asyncio
import json
import logging
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import fuzz, fuzz_cloud, fuzz_context, fuzz_files, fuzz_hostile, fuzz_local, fuzz_offers
from benchmarks.fuzz_cases import Failure, Finding, Share, Sort, Tally, finding, sorts
from benchmarks.fuzz_cloud import KINDS, Cloud
from benchmarks.fuzz_edges import DecodeEdge
from benchmarks.fuzz_files import Kind
from benchmarks.fuzz_hostile import Liar
from benchmarks.fuzz_model import save_model
from benchmarks.fuzz_mutation import Mutator, corpus_of
from cloud_server import reception
from edge_client import session as session_module
from edge_client.connection import Timeouts
from shared.pb.privatelora.v1 import private_lora_pb2 as pb

SECONDS = 1e6  # what is never reached: the counts end a run
PATIENCE_S = 500.0  # of a case; only what hangs takes as long, however slow the machine
MUTATED = 400  # messages
FILES = 15  # of each kind


@pytest.fixture(autouse=True)
def quiet_and_patient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PRIVATELORA_CONFIG_DIR", str(tmp_path / "settings"))
    for module in (fuzz_context, fuzz_cloud, fuzz_local):
        monkeypatch.setattr(module, "DEADLINE_S", PATIENCE_S)
    monkeypatch.setattr(fuzz_local, "HUNG_S", 2 * PATIENCE_S)
    monkeypatch.setattr(fuzz_hostile, "TIMEOUTS", Timeouts(connect_s=PATIENCE_S, step_s=PATIENCE_S))
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def fuzzed(folder: Path, seed: str, mutated: int) -> Tally:
    tally = Tally()
    fuzz.run_cloud(folder, seed, mutated, SECONDS, tally)
    return tally


def test_a_cloud_answers_mutated_messages(tmp_path: Path) -> None:
    tally = fuzzed(tmp_path, "test", MUTATED)
    assert not tally.findings, tally.findings[0].what
    assert tally.mutated >= MUTATED and tally.parsed_share >= 0.5
    assert tally.mutants.keys() == {kind.__name__ for kind in KINDS.values()}
    assert len(tally.outcomes) >= 4, "all that is said is answered alike"


def test_an_edge_hears_mutated_answers() -> None:
    tally = Tally()
    fuzz_local.run_edge(fuzz_offers.plans(), "test", MUTATED, SECONDS, tally)
    assert not tally.findings, tally.findings[0].what
    assert tally.mutated >= MUTATED and tally.parsed_share >= 0.5
    assert {"OK", "SessionError"} <= tally.outcomes.keys()


def test_files_are_taken_or_refused_in_words(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    kinds = fuzz_files.kinds(tmp_path / "files", model) | fuzz_offers.kinds(tmp_path / "offers", model)
    tallies: dict[str, Tally] = {}
    fuzz_local.run_files(kinds, "test", SECONDS, FILES, tmp_path / "work", tallies)
    found = [one for tally in tallies.values() for one in tally.findings]
    assert not found, f"{found[0].target}: {found[0].what}"
    assert {name: tally.cases for name, tally in tallies.items()} == {f"file-{kind}": FILES for kind in kinds}


def test_a_handler_that_fails_is_found_and_kept_and_fails_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = reception.agreed

    def agreed(offers: Any, request: Any) -> Any:
        if request.protocol_version != 1:
            raise KeyError("a version that nobody thought of")
        return honest(offers, request)

    monkeypatch.setattr(reception, "agreed", agreed)
    tally = fuzzed(tmp_path / "cloud", "planted", 20_000)
    assert tally.findings and "would be answered with UNKNOWN" in tally.findings[0].what
    path = tally.findings[0].save(tmp_path / "kept")
    with pytest.raises(Failure, match="nobody thought of"):
        fuzz.replay(Finding.load(path))
    monkeypatch.undo()
    assert fuzz.replay(Finding.load(path)) not in ("OK", "cancelled")


def test_what_is_left_of_a_stream_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        async with Cloud.running(tmp_path) as cloud:
            await cloud.check("right")
            monkeypatch.setattr(fuzz_cloud, "DEADLINE_S", 0.5)  # what is left never goes
            cloud.service.tuning.budget.used += 1
            with pytest.raises(Failure, match="1 tuning bytes"):
                await cloud.check("wrong")

    asyncio.run(run())


def test_an_edge_that_fails_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = session_module.Session._handle

    def handle(session: Any, message: Any) -> None:
        if message.HasField("codes") and message.codes.layer > 100:
            raise IndexError("so many layers")
        honest(session, message)

    monkeypatch.setattr(session_module.Session, "_handle", handle)
    tally = Tally()
    fuzz_local.run_edge(fuzz_offers.plans(), "planted", 50_000, SECONDS, tally)
    assert tally.findings and "so many layers" in tally.findings[0].what


def test_errors_that_are_not_ours_are_found(tmp_path: Path) -> None:
    def read(path: Path) -> None:
        raise {b"0": KeyError, b"1": FileNotFoundError}[path.read_bytes()]("x")

    kind = Kind(lambda rng: b"", read, (OSError,))
    for raw, words in ((b"0", "not an error of ours"), (b"1", "not documented")):
        with pytest.raises(Failure, match=words):
            fuzz_local.read(kind, raw, tmp_path)


def test_what_takes_too_long_is_broken_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz_local, "DEADLINE_S", 0.2)

    def read(path: Path) -> None:
        while True:
            pass

    with pytest.raises(Failure, match="hangs"):
        fuzz_local.read(Kind(lambda rng: b"", read, ()), b"", tmp_path)


async def test_a_machine_that_gives_no_time_is_no_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz_context, "DEADLINE_S", 0.2)
    task = asyncio.ensure_future(asyncio.sleep(0.3))
    asyncio.get_running_loop().call_soon(time.sleep, 1.0)
    await fuzz_context.ended(task)
    forever = asyncio.ensure_future(asyncio.Event().wait())
    with pytest.raises(Failure, match="hangs"):
        await fuzz_context.ended(forever)


def test_an_alarm_that_somebody_else_has_set_goes_on_behind_a_case() -> None:
    rung: list[int] = []
    handler = signal.signal(signal.SIGALRM, lambda number, _: rung.append(number))
    before = signal.setitimer(signal.ITIMER_REAL, 1000.0)
    try:
        with fuzz_local.deadline():
            assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= fuzz_local.DEADLINE_S
        assert fuzz_local.DEADLINE_S < signal.getitimer(signal.ITIMER_REAL)[0] <= 1000.0
        assert not rung
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *before)


def test_an_edge_goes_on_in_a_session_whose_count_has_ended() -> None:
    plan = fuzz_offers.plans()[0]
    edge = DecodeEdge(random.Random(1), plan, pb.Fingerprint())
    edge.says()
    last = (1 << 64) - 1  # a mutated step had it
    opened = pb.Opened(session_id=b"s", row_lengths=[3], last_step=last)
    edge.hears(pb.DecodeResponse(opened=opened).SerializeToString())
    assert edge.says().step.step == last


def test_only_what_differs_is_a_mutant() -> None:
    right, other = b"right", b"other"
    assert sorts([right], right, mutated=True) == [Sort.RIGHT]
    assert sorts([other], right, mutated=True) == [Sort.MUTANT]
    assert sorts([other, right, right], right, mutated=False) == [Sort.MOVED, Sort.RIGHT, Sort.MOVED]


async def test_messages_out_of_order_are_no_mutants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Mutator, "__call__", lambda _, message: message.SerializeToString())
    tally, heard = Tally(), Tally()
    async with Cloud.running(tmp_path) as cloud:
        await asyncio.gather(*(cloud._case(f"same/{number}", tally) for number in range(40)))
    message = pb.DecodeResponse(opened=pb.Opened(session_id=b"a"))
    others = [message, pb.DecodeResponse(opened=pb.Opened(session_id=b"b"))]
    liar = Liar(random.Random(1), None, corpus_of(others), heard)
    said = [raw for _ in range(200) for raw in liar.lies(message)]
    assert not tally.findings and len(said) == heard.delivered
    for one in (tally, heard):
        assert one.mutated == 0 < one.moved < one.delivered


def worked(monkeypatch: pytest.MonkeyPatch, *arguments: str, **facts: Any) -> tuple[int, argparse.Namespace]:
    """Return the exit status of a run of a worker that has done all it was asked for but ``facts``."""
    asked: list[argparse.Namespace] = []

    def worker(seed: str, options: argparse.Namespace) -> Share:
        asked.append(options)
        counts = {"cloud": options.messages, "wire": options.wire, "edge": options.edge} | facts
        share = Share({"files": Tally(), "file-plan": Tally(cases=facts.get("files", options.files))})
        for part in ("cloud", "wire", "edge"):
            parsed = int(counts[part] * facts.get("parsed", 1))
            share.tallies[part] = Tally(mutants=Counter(a=counts[part]), parsed=Counter(a=parsed))
        return share

    monkeypatch.setattr(fuzz, "run_worker", worker)
    monkeypatch.setattr("sys.argv", ["fuzz", *arguments])
    return fuzz.main(), asked[0]


def test_a_million_messages_are_what_is_run_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    status, asked = worked(monkeypatch)
    assert status == 0 and asked.messages >= 1_000_000


@pytest.mark.parametrize(
    ("less", "words"),
    [
        ({"cloud": 999_999}, "cloud: 999999 mutated messages instead of 1000000"),
        ({"edge": 0}, "edge: 0 mutated messages"),
        ({"files": 7}, "file-plan: 7 mutants"),
        ({"parsed": 0.49}, "wire: only 49%"),
    ],
)
def test_a_run_that_falls_short_fails(
    less: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert worked(monkeypatch, **less)[0] == 1
    assert words in capsys.readouterr().err


def test_what_was_found_is_kept_when_a_part_breaks_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_edge(seed: str, mutated: int, seconds: float, tally: Tally) -> dict[str, Any]:
        tally.findings.append(finding("edge-tune", f"{seed}/1", "a finding", [b"x"]))
        raise Failure("an honest cloud was not understood")

    monkeypatch.setattr(fuzz, "run_edge", run_edge)
    counts = ["--messages", "0", "--wire", "0", "--files", "0", "--edge", "5"]
    monkeypatch.setattr("sys.argv", ["fuzz", *counts, "--out", str(tmp_path / "kept")])
    assert fuzz.main() == 1
    kept = {one.target: one for one in map(Finding.load, (tmp_path / "kept").iterdir())}
    assert kept["edge-tune"].what == "a finding" and "was not understood" in kept["edge"].what
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["findings"] == 2


def test_what_is_found_of_a_whole_run_is_not_replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = finding("cloud", "1.0/0/4000", "1 tuning bytes", []).save(tmp_path)
    monkeypatch.setattr("sys.argv", ["fuzz", "--replay", str(path)])
    with pytest.raises(SystemExit):
        fuzz.main()
    assert "as a whole, not about one case" in capsys.readouterr().err
