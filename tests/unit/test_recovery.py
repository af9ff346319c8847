"""A cloud that is lost in the middle of an answer: resumed or replayed, the answer is the undisturbed one."""

import asyncio
import gc
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from hashlib import sha256
from types import TracebackType
from typing import Any

import grpc
import pytest
import torch

import edge_client.session
from edge_client.connection import Connection
from edge_client.drafting import Drafter
from edge_client.model import PrivateLoraForCausalLM
from edge_client.personal import PersonalWeights
from edge_client.routes import Route
from edge_client.session import Session
from edge_client.spans import Span
from edge_client.streams import SessionError, failure
from shared.adapter import Adapter
from shared.fingerprint import Fingerprint
from shared.pb.privatelora.v1 import private_lora_pb2 as pb
from shared.plan import Plan
from shared.wire_dtypes import WireDtypes
from tests.families import prompts, save
from tests.replicas import PATIENCE, Fleet, Replica, edge

PROMPT = torch.tensor([prompts(1)[0]])
NEW = 16
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 0.9, "top_k": 0},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
}


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    threads = torch.get_num_threads()
    made = Fleet(save("llama", tmp_path_factory.mktemp("model")), tmp_path_factory.mktemp("cache"))
    yield made
    made.close()
    torch.set_num_threads(threads)


@pytest.fixture
def at_hand(fleet: Fleet, tmp_path: Any) -> Iterator[Callable[..., PrivateLoraForCausalLM]]:
    """Make edges that are closed at the end, like the replicas; afterwards no KV byte may be held."""
    edges: list[PrivateLoraForCausalLM] = []

    def make(*replicas: Replica, **options: Any) -> PrivateLoraForCausalLM:
        edges.append(edge(",".join(r.address for r in replicas), tmp_path, **options))
        return edges[-1]

    yield make
    for model in edges:
        model.close()
    for replica in fleet.replicas:
        dropped = [s for s in replica.service.sessions.values() if s.dropped_at is not None]
        assert len(replica.service.sessions) == len(dropped), "a session outlives its edge"
        for session in dropped:
            replica.service.roster.forget(session, "test")
        assert replica.kv_used == 0
    fleet.stop_all()


def run(model: PrivateLoraForCausalLM, **options: Any) -> torch.Tensor:
    torch.manual_seed(5)
    found: torch.Tensor = model.generate(PROMPT, max_new_tokens=NEW, min_new_tokens=NEW, **options)
    return found


CASES = [
    *((how, "r8", way) for how in ("restart", "cut", "elsewhere") for way in WAYS),
    *((how, "ends", way) for how in ("cut", "elsewhere") for way in ("greedy", "beams")),
    ("cut", "trip", "greedy"),
]


@pytest.mark.parametrize(("how", "plan", "way"), CASES)
def test_an_answer_goes_on_where_it_was(fleet, at_hand, how, plan, way):
    one, two = fleet.replica(), fleet.replica()
    said: list[str] = []
    both = (one, two) if how == "elsewhere" else (one,)
    model = at_hand(*both, plan=plan, say=said.append)
    expected = run(model, **WAYS[way])
    begun, streams = one.steps, one.opened

    def disturb(number: int) -> None:
        if number == begun + 6:
            actions[how]()

    def cut() -> None:
        (session,) = one.service.sessions.values()
        session.cut_off("a test cut it off")

    def restart() -> None:
        async def again() -> None:
            await one.die()
            await one._start()

        fleet.loop.create_task(again())

    actions = {"restart": restart, "cut": cut, "elsewhere": one.kill_soon}
    one.before_step = disturb
    assert torch.equal(run(model, **WAYS[way]), expected)
    assert len(said) == 1 and said[0].endswith("; reconnecting")
    if how == "elsewhere":
        assert two.opened == 1 and two.steps > 0
    elif how == "cut":
        assert one.opened == streams + 1 and len(one.service.sessions) == 1, "resumed, not replayed"
    else:
        assert one.opened == streams + 1


@pytest.mark.parametrize("how", ["cut", "restart"])
def test_what_was_lost_is_let_go_of_at_once(fleet, at_hand, how):
    """Not when Python's collector happens to look, which knows nothing of the size of what a ring holds."""
    one = fleet.replica()
    model = at_hand(one, say=lambda line: None)
    run(model, **WAYS["greedy"])
    gc.collect()
    gc.disable()
    try:
        before = alive()
        for _ in range(4):
            one.break_streams() if how == "cut" else one.restart()
            run(model, **WAYS["greedy"])
        found = alive()
    finally:
        gc.enable()
    assert found == before


def alive() -> dict[str, int]:
    """Count what a recovery makes anew, and the frames of the edge that an error remembers."""
    kinds = Counter(type(one) for one in gc.get_objects() if not is_of_the_cloud(one))
    return {kind.__name__: kinds[kind] for kind in (Route, Session, SessionError, TracebackType)}


def is_of_the_cloud(one: object) -> bool:
    return isinstance(one, TracebackType) and "edge_client" not in one.tb_frame.f_code.co_filename


@pytest.mark.parametrize("way", ["greedy", "beams"])
def test_a_drained_cloud_sends_its_edges_on(fleet, at_hand, way):
    """One that is named as the successor is followed if its name is known; the step under way is finished."""
    two = fleet.replica()
    one = fleet.replica(successor=two.address)
    said: list[str] = []
    model = at_hand(one, say=said.append)
    expected = run(model, **WAYS[way])
    begun, leaving = one.steps, []

    def leave(number: int) -> None:
        if number == begun + 5:
            drain = one.service.drain.run(one.service, one.config.drain_timeout_s)
            leaving.append(fleet.loop.create_task(drain))

    one.before_step = leave
    assert torch.equal(run(model, **WAYS[way]), expected)
    assert one.steps == begun + 5 and two.opened == 1
    assert len(said) == 1 and "shutting down" in said[0] and two.address in said[0]
    with pytest.raises(SessionError, match="shutting down") as refusal:
        raise_of(one)
    assert refusal.value.code is grpc.StatusCode.UNAVAILABLE
    assert refusal.value.retry_after_s == 1.0 and refusal.value.successor == two.address
    fleet.call(asyncio.wait(leaving))


def test_an_edge_that_did_not_hear_where_to_go_is_told_when_it_comes_back(fleet, at_hand, monkeypatch):
    """What gRPC's client makes of a status that comes while it sends says nothing of a successor."""
    two = fleet.replica()
    one = fleet.replica(successor=two.address)
    said: list[str] = []
    model = at_hand(one, say=said.append, timeouts=replace(PATIENCE, recover_s=5.0))
    expected = run(model)
    begun, unheard, leaving = one.steps, [], []

    async def lose_the_first(call: Any) -> SessionError:
        error = await failure(call)
        if unheard:
            return error
        unheard.append(error)
        return SessionError("the stream ended while a message was being sent", grpc.StatusCode.INTERNAL)

    async def leave() -> None:
        await one.service.drain.run(one.service, one.config.drain_timeout_s)
        await one.die()

    def drain(number: int) -> None:
        if number == begun + 5:
            leaving.append(fleet.loop.create_task(leave()))

    one.before_step = drain
    monkeypatch.setattr(edge_client.session, "failure", lose_the_first)
    assert torch.equal(run(model), expected)
    assert unheard[0].successor == two.address and two.opened == 1
    assert len(said) == 1 and "being sent" in said[0], said
    fleet.call(asyncio.wait(leaving))


def test_a_redirect_to_a_foreign_address_is_not_followed(fleet, at_hand):
    foreign = fleet.replica()
    where = foreign.address.replace("127.0.0.1", "localhost")  # another name, however it resolves
    one = fleet.replica(successor=where)
    said: list[str] = []
    model = at_hand(one, say=said.append, timeouts=replace(PATIENCE, recover_s=1.5))
    run(model)
    one.drain()
    with pytest.raises(SessionError, match=f"gave up after .*{where}, which is neither in --cloud"):
        run(model)
    assert foreign.opened == 0
    assert sum("not followed" in line for line in said) == 1

    two = fleet.replica(successor=where)
    allowed = at_hand(two, allow_redirect=["LocalHost"])
    expected = run(allowed)
    two.drain()
    assert torch.equal(run(allowed), expected) and foreign.opened == 1
    allowed.close()


def test_a_cloud_that_does_not_answer_in_time_is_left(fleet, at_hand, monkeypatch):
    one, two = fleet.replica(), fleet.replica()
    model = at_hand(one, two)
    expected = run(model)
    submit, steps = Session.submit, []

    async def stall() -> None:
        one._tasks[0].cancel()  # the engine; the streams stay open

    def submitted(session: Session, *step: Any, **options: Any) -> Any:
        steps.append(session)
        session._step_timeout_s = PATIENCE.step_s
        if len(steps) == 4:  # only who is never answered has little patience: the machine may be slow
            fleet.call(stall())
            session._step_timeout_s = 0.5
        return submit(session, *step, **options)

    monkeypatch.setattr(Session, "submit", submitted)
    assert torch.equal(run(model), expected)
    assert one.opened == two.opened == 1


def test_drafts_survive(fleet, at_hand):
    one, two = fleet.replica(), fleet.replica()
    model = at_hand(one, two)
    drafter = Drafter(max_tokens=4, clock=iter(range(10_000)).__next__)
    expected = run(model, drafter=drafter)
    begun = one.steps
    one.before_step = lambda number: one.kill_soon() if number == begun + 4 else None
    assert torch.equal(run(model, drafter=drafter), expected) and two.opened == 1


def test_a_refusal_that_will_not_pass_is_told_at_once(fleet, at_hand):
    one = fleet.replica()
    model = at_hand(one)
    run(model)
    one.service.offers = one.service.reception.offers = {}
    one.break_streams()
    with pytest.raises(SessionError, match="offers 0 plans") as refusal:
        run(model)
    assert "gave up" not in str(refusal.value)


def test_without_patience_an_error_is_an_error(fleet, at_hand):
    one = fleet.replica()
    model = at_hand(one, timeouts=replace(PATIENCE, recover_s=0))
    run(model)
    one.restart()
    with pytest.raises(SessionError, match="lost"):
        run(model)


def test_sessions_that_are_lost_together_share_the_next_channel(fleet):
    one = fleet.replica()
    connection = Connection(one.address, PATIENCE)
    try:
        connection.describe()
        sessions = [opened_by(connection) for _ in range(2)]
        lost = connection._routes.known(one.address)
        assert [session.route for session in sessions] == [lost] * 2 and lost.streams == 2
        one.break_streams()
        errors = [error_of(session) for session in sessions]
        fresh = []
        for session, error in zip(sessions, errors, strict=True):
            error.note(session)
            connection.lost(error)
            connection.resume(session, connection.describe().plans[0].fingerprint)
            fresh.append(session.route)
        assert fresh[0] is fresh[1] is connection._routes.known(one.address) is not lost
        assert lost.streams == 0 and fresh[0].streams == 2
    finally:
        connection.close()
    fleet.stop_all()


def test_a_part_comes_whole_though_its_channel_is_set_aside(fleet):
    one = fleet.replica()
    connection = Connection(one.address, PATIENCE)
    try:
        stated = connection.describe().edge_parts
        largest = max(range(len(stated)), key=lambda index: stated[index].size_bytes)
        pieces = connection.fetch_part(largest)
        got = next(pieces)
        route = connection._routes.known(one.address)
        connection.lost(SessionError("another thread's", grpc.StatusCode.UNAVAILABLE, address=one.address))
        assert connection._routes.known(one.address) is not route
        assert sha256(got + b"".join(pieces)).digest() == stated[largest].sha256
        connection.describe()  # on the same thread: what ends the fetch has run
        assert route.streams == 0
    finally:
        connection.close()
    fleet.stop_all()


def test_a_session_is_opened_where_it_was_said_and_forgotten_on_the_connections_thread(fleet):
    one, two = fleet.replica(), fleet.replica()
    connection = Connection(f"{one.address},{two.address}", PATIENCE)
    forgotten, forget = [], connection._forget

    def noted(stream: object) -> None:
        forgotten.append(threading.current_thread().name)
        forget(stream)

    connection._forget = noted
    try:
        assert connection.described(two.address).plans and connection.target == one.address
        session = opened_by(connection, two.address)
        assert (session.address, one.opened, two.opened) == (two.address, 0, 1)
        route = session.route
        assert route.streams == 1
        session.close()
        assert forgotten == ["privatelora-connection"] and route.streams == 0
    finally:
        connection.close()
    fleet.stop_all()


def opened_by(connection: Connection, address: str | None = None) -> Session:
    """Return a session with M of zeros, at an address or the one in use."""
    described = connection.describe() if address is None else connection.described(address)
    offer = described.plans[0]
    plan = Plan.parse(offer.plan_json)
    personal = PersonalWeights(Adapter.zeros(plan, Fingerprint(*[bytes(32)] * 4)))
    dtypes = WireDtypes.all(pb.DTYPE_FLOAT32)
    return connection.open_session(personal, offer.fingerprint, dtypes, described.limits, address)


def error_of(session: Session) -> SessionError:
    """Return what a step of a session that was cut off ends with."""
    with pytest.raises(SessionError) as refusal:
        session.step(torch.zeros(1, session.plan.hidden_size), [Span(0, 0, 1, 1)])
    return refusal.value


def raise_of(replica: Replica) -> None:
    """Raise what the edge is told that opens a session there."""
    connection = Connection(replica.address, PATIENCE)
    try:
        opened_by(connection)
    finally:
        connection.close()
