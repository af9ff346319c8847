"""Where an edge goes next, to whom it lets itself be sent, and how long it waits."""

import random

import grpc
import pytest

from edge_client.backoff import LONGEST_WAIT_S, Backoff, may_pass
from edge_client.connection import CloudConnectionError
from edge_client.pool import HeldSession, Wanted
from edge_client.recovery import Attempts
from edge_client.replicas import MAX_LEARNED, Replicas, addresses_of
from edge_client.session import Resumed
from edge_client.streams import SessionError

Code = grpc.StatusCode
LOST = SessionError("lost", Code.UNAVAILABLE)


def sent_to(successor: str, retry_after_s: float | None = None) -> SessionError:
    return SessionError("draining", Code.UNAVAILABLE, retry_after_s, successor)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


# --- addresses ------------------------------------------------------------------------------------------


def test_a_list_of_addresses() -> None:
    assert addresses_of("a:1") == ["a:1"]
    assert addresses_of("a:1, b:2,a:1,[::1]:3") == ["a:1", "b:2", "[::1]:3"]
    with pytest.raises(ValueError, match="HOST:PORT"):
        addresses_of(" , ")


def test_who_fails_is_followed_by_the_next_round_and_round() -> None:
    replicas = Replicas("a:1,b:2,c:3")
    seen = []
    for _ in range(4):
        seen.append(replicas.current)
        assert replicas.failed(replicas.current, LOST) is None
    assert seen == ["a:1", "b:2", "c:3", "a:1"]


def test_one_that_failed_before_does_not_move_those_who_have_moved_on() -> None:
    replicas = Replicas("a:1,b:2,c:3")
    replicas.failed("a:1", LOST)
    replicas.failed("a:1", LOST)  # another thread's session was there too
    assert replicas.current == "b:2"


def test_whoever_asks_to_be_left_alone_is_asked_last() -> None:
    clock = Clock()
    replicas = Replicas("a:1,b:2", clock=clock)
    full = SessionError("full", Code.RESOURCE_EXHAUSTED, 30.0)
    replicas.failed("a:1", full)
    assert (replicas.current, replicas.wait_s()) == ("b:2", 0.0)
    replicas.failed("b:2", LOST)
    assert (replicas.current, replicas.wait_s()) == ("b:2", 0.0), "a:1 wants 30 s"
    replicas.failed("b:2", SessionError("full", Code.RESOURCE_EXHAUSTED, 50.0))
    assert (replicas.current, replicas.wait_s()) == ("a:1", 30.0)
    clock.now += 31
    assert replicas.wait_s() == 0.0


@pytest.mark.parametrize(
    ("cloud", "allowed", "tls", "to", "followed"),
    [
        ("a.example:1,b.example:2", (), False, "b.example:2", True),  # in the list
        ("a.example:1", (), False, "a.example:9", True),  # a name in the list
        ("a.example:1", (), False, "A.Example.:9", True),
        ("a.example:1", (), False, "b.example:1", False),
        ("a.example:1", ("b.example",), False, "b.example:7", True),
        ("a.example:1", ("b.example:7",), False, "b.example:7", True),
        ("a.example:1", ("b.example:7",), False, "b.example:8", False),
        ("a.example:1", ("*.example",), False, "b.example:8", True),
        ("a.example:1", ("*.example",), False, "example:8", False),
        ("a.example:1", ("*.example",), False, "evilexample:8", False),
        ("a.example:1", ("*.example",), False, "b.example.evil:8", False),
        ("a.example:1", (), False, "a.example.evil:1", False),
        ("a.example:1", ("b.example",), False, "unix:/tmp/x:1", False),
        ("a.example:1", ("b.example",), False, "dns:///b.example:1", False),
        ("a.example:1", ("b.example",), False, "b.example", False),
        ("a.example:1", ("b.example",), False, "b.example:99999", False),
        ("a.example:1", ("b.example",), False, "b.example:0", False),
        ("a.example:1", (), True, "10.0.0.9:1", True),  # if its certificate is good for a.example
    ],
)
def test_whom_a_cloud_may_send_to(cloud: str, allowed: tuple, tls: bool, to: str, followed: bool) -> None:
    replicas = Replicas(cloud, allowed, tls=tls)
    assert replicas.failed("a.example:1", sent_to(to)) == (None if followed else to)
    assert (replicas.current == to) == followed
    if not followed:
        assert replicas.current == "a.example:1" and replicas.addresses == [cloud]


def test_over_tls_an_unknown_successor_has_to_show_the_certificate_of_the_name_that_was_called() -> None:
    replicas = Replicas("a.example:1", ("friend.example",), tls=True)
    replicas.failed("a.example:1", sent_to("10.0.0.9:1"))
    assert replicas.certificate_name("10.0.0.9:1") == "a.example"
    replicas.failed("10.0.0.9:1", sent_to("10.0.0.10:1"))  # and what it names, the same, not 10.0.0.9's
    assert replicas.certificate_name("10.0.0.10:1") == "a.example"
    replicas.failed("10.0.0.10:1", sent_to("friend.example:5"))  # whom the person named shows its own
    assert replicas.current == "friend.example:5" and replicas.certificate_name("friend.example:5") is None
    assert replicas.certificate_name("a.example:1") is None


def test_an_address_that_was_forgotten_is_asked_for_the_name_that_was_called_as_before() -> None:
    """A thread may still be about to go there, and must not be content with the address's own name."""
    replicas = Replicas("a.example:1", ("friend.example",), tls=True)
    replicas.failed("a.example:1", sent_to("10.0.0.9:1"))
    replicas.forget("10.0.0.9:1")
    assert replicas.addresses == ["a.example:1"]
    assert replicas.certificate_name("10.0.0.9:1") == "a.example"
    assert replicas.certificate_name("friend.example:1") is None
    replicas.forget("a.example:1")
    assert replicas.addresses == ["a.example:1"], "what the person gave stays"


def test_a_cloud_cannot_make_an_edge_remember_without_end() -> None:
    replicas = Replicas("a:1", ("b",))
    for port in range(1, 100):
        assert replicas.failed(replicas.current, sent_to(f"b:{port}")) is None
    assert len(replicas.addresses) == 1 + MAX_LEARNED


# --- waits ----------------------------------------------------------------------------------------------


def test_waits_are_anything_up_to_a_bound_that_doubles() -> None:
    bounds: list[float] = []

    def most(low: float, high: float) -> float:
        assert low == 0.0
        bounds.append(high)
        return 0.0

    backoff = Backoff(1e9, uniform=most)
    for _ in range(10):
        backoff.wait_s(LOST)
    assert bounds[:4] == [0.2, 0.4, 0.8, 1.6] and bounds[-1] == LONGEST_WAIT_S
    drawn = Backoff(1e9, uniform=random.Random(1).uniform)
    waits = [drawn.wait_s(LOST, doublings=9) for _ in range(200)]
    assert min(waits) < 1 and max(waits) > 9, "full jitter: all of it"


def test_a_hint_is_honoured_and_a_deadline_kept() -> None:
    clock = Clock()
    backoff = Backoff(60.0, clock, uniform=lambda low, high: high)
    assert backoff.wait_s(LOST, hint_s=7.0) == 7.0
    clock.now += 55
    with pytest.raises(SessionError, match=r"lost; gave up after 2 attempts in 55 s; .* back in 7 s") as end:
        backoff.wait_s(LOST, hint_s=7.0)
    assert end.value.code is Code.UNAVAILABLE
    with pytest.raises(CloudConnectionError, match="nobody; gave up after 1 attempts"):
        Backoff(1.0, clock).wait_s(CloudConnectionError("nobody"), hint_s=5.0)


def test_what_may_pass() -> None:
    assert may_pass(LOST) and may_pass(CloudConnectionError("nobody"))
    assert may_pass(SessionError("full", Code.RESOURCE_EXHAUSTED))
    assert not may_pass(SessionError("no", Code.FAILED_PRECONDITION))
    assert not may_pass(SessionError("it broke the protocol"))


class Place:
    def __init__(self, replicas: Replicas) -> None:
        self.replicas = replicas

    def lost(self, error: ConnectionError, without: frozenset[str]) -> str | None:
        return self.replicas.failed(getattr(error, "address", None) or self.replicas.current, error, without)


def refused(address: str) -> SessionError:
    error = SessionError(f"{address}: another model", Code.FAILED_PRECONDITION)
    error.address = address
    return error


def test_an_address_that_refuses_for_good_is_left_out_and_the_others_tried() -> None:
    place, said = Place(Replicas("a:1,b:2,c:3")), []
    attempts = Attempts(place, Backoff(60.0), said.append)
    attempts.next_wait_s(LOST)  # a is lost
    attempts.next_wait_s(refused("b:2"))
    assert place.replicas.current == "c:3" and "another model" in said[0]
    attempts.next_wait_s(LOST)
    attempts.next_wait_s(LOST)
    assert place.replicas.current == "c:3"
    attempts.next_wait_s(refused("c:3"))
    assert place.replicas.current == "a:1"
    with pytest.raises(SessionError, match="another model"):
        attempts.next_wait_s(refused("a:1"))


def test_who_gives_up_says_what_else_was_wrong() -> None:
    place, clock = Place(Replicas("a.example:1", tls=True)), Clock()
    attempts = Attempts(place, Backoff(60.0, clock))
    attempts.next_wait_s(sent_to("10.0.0.9:1"))
    wrong = SessionError("10.0.0.9:1: its certificate is not for a.example", Code.UNAUTHENTICATED)
    wrong.address = "10.0.0.9:1"
    attempts.next_wait_s(wrong)
    attempts.next_wait_s(sent_to("10.0.0.9:1"))  # said again
    assert place.replicas.current == "a.example:1", "once is enough"
    clock.now += 61
    with pytest.raises(SessionError, match="^lost; gave up after .*; 10.0.0.9:1: its certificate is not for"):
        attempts.next_wait_s(LOST)


def test_what_is_wrong_everywhere_is_raised_at_once() -> None:
    attempts = Attempts(Place(Replicas("a:1,b:2")), Backoff(60.0))
    for error in (SessionError("the cloud broke the protocol"), SessionError("bad", Code.INVALID_ARGUMENT)):
        with pytest.raises(SessionError, match=str(error)):
            attempts.next_wait_s(error)


# --- what a session still holds ---------------------------------------------------------------------------


class Stub:
    """A session whose steps are lost."""

    def step(self, *_: object) -> object:
        raise LOST


def lost_in(rows: list[list[int]], wanted: list[Wanted]) -> HeldSession:
    held = HeldSession(Stub(), 0)  # type: ignore[arg-type]
    held.rows = rows
    with pytest.raises(SessionError):
        held.run(wanted, lambda tokens: tokens)  # type: ignore[arg-type, return-value]
    assert held.broken
    return held


@pytest.mark.parametrize(
    ("lengths", "began", "kept"),
    [
        ((6,), False, [[1, 2, 3, 4]]),  # rejected drafts may be there instead of the new tokens
        ((4,), True, [[1, 2, 3, 4]]),  # begun, nothing finished
        ((6,), True, [[1, 2, 3, 4, 7, 8]]),  # finished, the answer was lost
        ((5,), True, [[1, 2, 3, 4, 7]]),
        ((2,), False, [[1, 2]]),  # less than ever was there: only what is
        ((), False, []),
        ((99,), True, [[1, 2, 3, 4, 7, 8]]),
    ],
)
def test_one_row_that_was_lost_in_a_step(lengths: tuple[int, ...], began: bool, kept: list) -> None:
    held = lost_in([[1, 2, 3, 4, 5, 6]], [Wanted([1, 2, 3, 4, 7, 8], 1, 0, 4)])
    held.resume(lambda session: Resumed(lengths, began))
    assert held.rows == kept and not held.broken and held.resumed


@pytest.mark.parametrize(
    ("began", "kept"), [(False, [[1, 2], [1, 3], [1, 4]]), (True, [[1, 3], [1, 3], [1, 2]])]
)
def test_rows_that_were_to_move(began: bool, kept: list) -> None:
    wanted = [Wanted([1, 3, 5], 1, 1, 2), Wanted([1, 3, 6], 1, 1, 2), Wanted([1, 2, 7], 1, 0, 2)]
    held = lost_in([[1, 2], [1, 3], [1, 4]], wanted)
    held.resume(lambda session: Resumed((2, 2, 2), began))
    assert held.rows == kept


def test_a_session_that_lost_no_step_is_not_picked_up() -> None:
    with pytest.raises(SessionError):
        HeldSession(Stub(), 0).resume(lambda session: Resumed((), False))  # type: ignore[arg-type]
