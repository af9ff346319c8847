"""The chaos run's own parts: what is drawn, the link that is cut, what is mid-step, what is a failure."""

import math
import socket
import socketserver
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from benchmarks.chaos_clouds import Stroke, leaks
from benchmarks.chaos_events import CUTS, KINDS, Event, schedule
from benchmarks.chaos_link import LEAST_BYTES, Aim, Gate
from benchmarks.chaos_record import Steps, event_row, event_rows, failures, kinds, table
from benchmarks.memory_watch import Life
from benchmarks.step_log import StepLogs

WAIT_S = 300.0  # only what hangs takes as long, however slow the machine

# --- events ---------------------------------------------------------------------------------------------


def test_a_seed_draws_as_many_of_each_and_the_same_again() -> None:
    counts = dict.fromkeys(KINDS, 20)
    events = schedule(3, counts, 0.5, 20.0)
    assert events == schedule(3, counts, 0.5, 20.0) != schedule(4, counts, 0.5, 20.0)
    for kind in KINDS:
        own = [event for event in events if event.kind == kind]
        assert len(own) == 20 and sum(event.aimed for event in own) == 10
        assert all(0.5 <= event.hold_s <= 20.0 for event in own)
    assert {event.how for event in events if event.kind == "cut"} == set(CUTS)
    assert [event.kind for event in events] != sorted(event.kind for event in events)


# --- the link -------------------------------------------------------------------------------------------


class Echo(socketserver.ThreadingTCPServer):
    """Sends back whatever comes, and keeps it."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self) -> None:
        self.got = b""
        echo = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                try:
                    while data := self.request.recv(1 << 16):
                        echo.got += data
                        self.request.sendall(data)
                except OSError:
                    pass

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()


@pytest.fixture
def echo() -> Iterator[Echo]:
    with Echo() as server:
        yield server
        server.shutdown()


@pytest.fixture
def gate(echo: Echo) -> Iterator[Gate]:
    opened = Gate(echo.server_address[1])
    yield opened
    opened.close()


def connected(gate: Gate, address: str = "") -> socket.socket:
    host, _, port = (address or gate.address).partition(":")
    return socket.create_connection((host, int(port)), timeout=WAIT_S)


def ask(line: socket.socket, data: bytes) -> bytes:
    line.sendall(data)
    return answer(line, len(data))


def answer(line: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size:
        piece = line.recv(size - len(found))
        assert piece, "the connection has ended"
        found += piece
    return found


def test_bytes_pass_both_ways_until_the_link_is_reset(gate: Gate) -> None:
    with connected(gate) as line:
        assert ask(line, b"x" * 300_000) == b"x" * 300_000
        before, after = gate.cut("reset")
        assert before <= after <= time.monotonic()
        with pytest.raises((ConnectionError, AssertionError)):
            answer(line, 1)
    with pytest.raises((ConnectionError, AssertionError)), connected(gate) as refused:
        ask(refused, b"hello")
    gate.restore()
    with connected(gate) as again:
        assert ask(again, b"hello") == b"hello"


def test_what_was_sent_into_the_silence_arrives_when_it_ends(gate: Gate) -> None:
    with connected(gate) as line:
        ask(line, b"here")
        gate.cut("silence")
        line.sendall(b"lost?")
        line.settimeout(0.2)
        with pytest.raises(TimeoutError):
            line.recv(5)
        with connected(gate) as second:
            second.sendall(b"later")
            gate.restore()
            line.settimeout(WAIT_S)
            assert answer(line, 5) == b"lost?" and answer(second, 5) == b"later"


def test_old_connections_are_gone_when_the_link_has_forgotten_them(gate: Gate) -> None:
    with connected(gate) as line:
        ask(line, b"here")
        gate.cut("forgotten")
        gate.restore()
        with pytest.raises((ConnectionError, AssertionError)):
            answer(line, 1)
    with connected(gate) as again:
        assert ask(again, b"hello") == b"hello"


@pytest.mark.parametrize("how", CUTS)
def test_an_aimed_cut_lets_half_of_what_passes_through(gate: Gate, echo: Echo, how: str) -> None:
    with connected(gate) as line:
        ask(line, b"ping")  # too small to be a piece of a step
        waiting = threading.Thread(target=gate.cut, args=(how, WAIT_S))
        waiting.start()
        while gate.aim is None:
            time.sleep(0.001)
        line.sendall(b"s" * 2 * LEAST_BYTES)
        waiting.join()
        while len(echo.got) < 4 + LEAST_BYTES:
            time.sleep(0.01)
        assert len(echo.got) == 4 + LEAST_BYTES
        gate.restore()
        if how == "silence":
            assert answer(line, 2 * LEAST_BYTES) == b"s" * 2 * LEAST_BYTES


def test_nobody_aims_at_what_passes_at_the_other_address(gate: Gate) -> None:
    struck, piece = threading.Event(), b"s" * LEAST_BYTES
    gate.aim = Aim(struck.set, cuts=False)
    with connected(gate, gate.other_address) as line:
        assert ask(line, piece) == piece
        assert not struck.is_set()
    with connected(gate) as line:
        line.sendall(piece)
        assert struck.wait(WAIT_S)


def test_what_strikes_at_a_step_strikes_while_half_of_a_piece_is_through(gate: Gate, echo: Echo) -> None:
    seen: list[int] = []

    def look() -> None:
        half = 4 + LEAST_BYTES // 2
        while len(echo.got) < half:  # by another thread
            time.sleep(0.001)
        seen.append(len(echo.got))

    with connected(gate) as line:
        ask(line, b"ping")
        with ThreadPoolExecutor(1) as pool:
            found = pool.submit(gate.at_a_step, look, WAIT_S)
            while gate.aim is None:
                time.sleep(0.001)
            assert not found.done(), "nothing has passed"
            assert ask(line, b"s" * LEAST_BYTES) == b"s" * LEAST_BYTES, "the rest follows"
            before, after = found.result()
    assert seen == [4 + LEAST_BYTES // 2]
    assert before <= after <= time.monotonic()


def test_what_finds_no_step_to_strike_at_strikes_all_the_same(gate: Gate) -> None:
    struck = threading.Event()
    gate.at_a_step(struck.set, 0.05)
    assert struck.is_set() and gate.aim is None


def test_new_connections_follow_the_route_and_old_ones_stay(gate: Gate, echo: Echo) -> None:
    with connected(gate) as line, Echo() as other:
        ask(line, b"one")
        gate.route(other.server_address[1])
        with connected(gate) as second:
            ask(second, b"two")
        ask(line, b"one")
        assert (echo.got, other.got) == (b"oneone", b"two")
        other.shutdown()


# --- what an event met ----------------------------------------------------------------------------------

STROKE = Stroke(10.0, 10.1, 13.0, 14.0)


@pytest.mark.parametrize(
    ("kind", "attempts", "wholes", "mid_step", "recovered_s"),
    [
        ("kill", [(9.0, 10.5)], [(9.0, 15.5)], True, 1.5),
        ("kill", [(9.0, 10.5)], [(9.0, 10.5)], False, 0.0),  # the answer was on its way
        ("kill", [(9.0, 10.5)], [(9.0, 13.5)], True, 0.0),  # the edge was back before it was noted
        ("kill", [], [(9.0, 15.5)], False, 0.0),  # nothing was on a stream: it waited already
        ("kill", [(10.2, 10.5)], [(10.2, 15.5)], False, 0.0),  # begun after it
        ("kill", [(7.9, 10.5)], [(7.9, 15.5)], False, 0.0),  # begun before the event before was over
        ("drain", [(9.0, 10.5)], [(9.0, 10.5)], True, 0.0),  # may end in peace
        ("drain", [(9.0, 10.05)], [(9.0, 10.05)], False, 0.0),
        ("drain", [(7.9, 10.5)], [(7.9, 10.5)], False, 0.0),
    ],
)
def test_what_is_mid_step(
    kind: str, attempts: list, wholes: list, mid_step: bool, recovered_s: float
) -> None:
    event = Event(kind, "", 1.0, 1.0, aimed=False)
    edges = [Steps(attempts, wholes, [(10.6, 10.9)]), Steps([], [], [])]
    row = event_row(event, STROKE, 5.0, edges, [(9.9, 11.0)], since=8.0, until=20.0)
    assert (row["mid_step"], row["recovered_s"], row["at_s"]) == (mid_step, recovered_s, 5.0)
    assert row["tuning_under_way"]


@pytest.mark.parametrize(("recovery", "moved"), [((10.6, 10.9), 1), ((9.5, 10.9), 0), ((20.1, 20.2), 0)])
def test_a_polite_end_is_mid_step_if_the_edge_has_moved(recovery: tuple[float, float], moved: int) -> None:
    event = Event("restart", "", 1.0, 1.0, aimed=False)
    edges = [Steps([(9.0, 10.5)], [(9.0, 10.5)], [recovery])]
    row = event_row(event, STROKE, 5.0, edges, [], since=8.0, until=20.0)
    assert (row["steps_under_way"], row["edges_moved"], row["mid_step"]) == (1, moved, bool(moved))


def test_a_step_that_is_stuck_since_one_event_is_not_met_by_the_next() -> None:
    cut, kill = (Event(kind, "", 1.0, 1.0, aimed=False) for kind in ("cut", "kill"))
    strokes = [(cut, STROKE), (kill, Stroke(15.0, 15.1, 17.0, 18.0))]
    edges = [Steps([(9.0, 16.0)], [(9.0, 19.0)], [(16.0, 19.0)])]
    rows = event_rows(strokes, 5.0, edges, [])
    assert [row["mid_step"] for row in rows] == [True, False]
    assert event_row(*strokes[1], 5.0, edges, [], since=-math.inf)["mid_step"], "it would count"


# --- memory ---------------------------------------------------------------------------------------------


def test_growth_is_seen_after_the_warm_up_only() -> None:
    life = Life("cloud 1", 1, [(t, 500 + 50 * min(t, 10)) for t in range(61)])
    assert life.growth(10.0, 5.0) is not None and life.growth(10.0, 5.0)["growth"] == 0
    assert life.growth(0.0, 5.0)["growth"] > 0.5
    assert life.growth(50.0, 10.0) is None  # too short to say
    leak = Life("cloud 2", 1, [(t, 1000 + t) for t in range(101)])
    assert leak.growth(0.0, 10.0)["growth"] == pytest.approx(90 / 1005, abs=1e-3)


# --- clouds that have ended -----------------------------------------------------------------------------

LOG = "x INFO stopped: {} bytes of KV cache are in use\n"


def test_a_cloud_that_leaves_something_in_its_cache_is_told_from_its_log() -> None:
    clean = LOG.format(0)
    assert leaks(clean * 2, 2) == []
    assert leaks(clean + LOG.format(8192), 2) == ["a cloud had 8192 bytes of KV cache in use at its end"]
    (missing,) = leaks(clean, 2)
    assert missing.startswith("2 clouds ended in order; 1 said")


# --- the verdict ----------------------------------------------------------------------------------------


def good() -> dict:
    events = [
        {"kind": kind, "mid_step": True, "steps_interrupted": 1, "recovered_s": 1.0, "tuning_under_way": True}
        for kind in KINDS
    ]
    edge = {
        "edge": 0,
        "generations": 3,
        "tokens": 96,
        "ties": 0,
        "mismatches": 0,
        "differences": [],
        "unfinished": 0,
        "errors": [],
    }
    return {
        "wanted": {"events": dict.fromkeys(KINDS, 1), "mid_step": 1, "tuning_under_way": 1},
        "kinds": kinds(events),
        "edges": [edge, dict(edge, edge=1)],
        "tuning": {"runs": 2, "steps": 8, "differ": 0, "waits": 3, "unfinished": 0, "errors": []},
        "memory": [
            {"name": name, "growth": 0.01, "first_bytes": 100, "last_bytes": 101, "seconds": 60.0}
            for name in ("cloud 1", "edges 0", "tuning")
        ],
        "unjudged": ["cloud 2"],
        "kv": {"before": 0, "after": 0},
        "cloud_faults": [],
        "unfinished": [],
    }


def test_a_good_record_holds() -> None:
    record = good()
    record["failures"] = failures(record)
    assert record["failures"] == []
    assert "1 of 2 clouds lived long enough" in table(record) and "all of it holds" in table(record)


def test_without_tuning_nothing_is_asked_of_it() -> None:
    record = good() | {"tuning": None}
    for counts in record["kinds"].values():
        counts["tuning_under_way"] = 0
    assert failures(record) == []


def test_some_event_has_to_meet_the_tuner() -> None:
    record = good()
    record["wanted"]["tuning_under_way"] = 0
    for counts in record["kinds"].values():
        counts["tuning_under_way"] = 0
    assert failures(record) == ["no event struck while an optimiser step was under way"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r["kinds"]["cut"].update(mid_step=0), "cut: 0 mid-step, 1 wanted"),
        (lambda r: r["kinds"]["kill"].update(events=0), "kill: 0 events, 1 wanted"),
        (lambda r: r["edges"][1].update(generations=0), "edge 1 has generated nothing"),
        (lambda r: r["edges"][0].update(mismatches=1, differences=["here"]), "1 tokens differ: here"),
        (lambda r: r["edges"][0].update(ties=2), "2 ties in 192 tokens"),
        (lambda r: r["edges"][0].update(unfinished=2, errors=["lost"]), "2 generations did not finish: lost"),
        (lambda r: r["tuning"].update(runs=0), "no tuning run was finished"),
        (lambda r: r["tuning"].update(differ=1), "1 of 2 adapters differ"),
        (lambda r: r["tuning"].update(unfinished=1, errors=["lost"]), "1 runs did not finish: lost"),
        (lambda r: r["memory"][0].update(growth=0.06), "cloud 1 grew by 6.0 %"),
        (lambda r: r["memory"].pop(0), "no cloud lived long enough"),
        (lambda r: r["unjudged"].append("edges 0"), "edges 0 was not seen for long enough"),
        (lambda r: r["unjudged"].append("tuning"), "tuning was not seen for long enough"),
        (lambda r: r["kinds"]["pause"].update(tuning_under_way=0), "pause: 0 tuning-under-way, 1 wanted"),
        (lambda r: r["tuning"].update(waits=0), "tuning never had to wait"),
        (lambda r: r["kv"].update(after=4096), "4096 bytes of KV cache are in use at the end"),
        (lambda r: r["cloud_faults"].append("it fell"), "it fell"),
        (lambda r: r["unfinished"].append("edge 3"), "edge 3 has not finished"),
    ],
)
def test_whatever_does_not_hold_is_said(change, words: str) -> None:
    record = good()
    change(record)
    found = failures(record)
    assert len(found) == 1 and words in found[0]


def test_notes_since_a_moment_are_those_that_ended_then_or_later() -> None:
    logs = StepLogs()
    for began, ended in ((1.0, 2.0), (2.5, 3.0), (2.0, 4.0), (5.0, 6.0)):
        logs.attempts.note(began, ended)
    assert logs.since(3.0) == {
        "attempts": [(2.5, 3.0), (2.0, 4.0), (5.0, 6.0)],
        "wholes": [],
        "recoveries": [],
    }
    assert logs.since(7.0)["attempts"] == []
    assert logs.since(0.0)["attempts"] == logs.attempts.intervals()
