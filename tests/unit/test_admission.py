"""Who is let in and when: what a session claimed is always there, and identities take turns."""

import asyncio
import random
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import copy_context
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
import torch

from cloud_server.caller import Caller, set_caller
from cloud_server.config.cloud import CloudConfig
from cloud_server.config.identity import IdentityLimits
from cloud_server.config.waiting import QueueConfig
from cloud_server.handshake import Offer
from cloud_server.kv_cache import BLOCK_TOKENS
from cloud_server.refusal import Refusal
from cloud_server.releases import JITTER, LEAST_S, MOST_S, WINDOW_S, Releases
from cloud_server.service import Service
from cloud_server.session import Limits, Session
from shared import wire
from shared.pb.privatelora.v1 import private_lora_pb2 as pb
from tests.unit.session_talk import BLOCK_BYTES, PLAN, WIDTH, StandIn
from tests.unit.test_service_resume import FINGERPRINT, hello

Code = grpc.StatusCode
PATIENCE_S = 600.0  # only what hangs takes as long, however slow the machine
LIMITS = Limits(max_context_tokens=4 * BLOCK_TOKENS, max_step_tokens=500, max_rows=4, max_steps_in_flight=3)


class Cloud:
    """A service with so many blocks, and callers that come to it."""

    def __init__(self, blocks: int, per_identity: IdentityLimits | None = None, **config: Any) -> None:
        engine: Any = StandIn(blocks)
        engine.config, engine.wake = SimpleNamespace(slice_s=0.005), lambda: None
        most = config.pop("max_sessions", 1000)
        queue = QueueConfig(**{"max_wait_s": PATIENCE_S} | config)
        limits = per_identity or IdentityLimits()
        settings = CloudConfig(queue=queue, per_identity=limits, max_sessions=most)
        offers = {FINGERPRINT.plan: Offer(PLAN, FINGERPRINT)}
        self.service = Service(settings, engine, offers, [], LIMITS)
        self.admission, self.cache = self.service.admission, engine.cache
        self.order: list[str] = []

    def opening(self, blocks: int | None, who: str = "") -> "asyncio.Task[Session]":
        """Start to open a session; None says nothing about what it needs."""
        message = hello()
        if blocks is not None:
            message.open.claim.CopyFrom(claim(blocks))
        name, _, _ = who.partition(" ")

        async def opened() -> Session:
            set_caller(Caller(name))
            session = await self.service.reception.let_in(message)
            self.order.append(who)
            return session

        return asyncio.get_running_loop().create_task(opened(), context=copy_context())

    async def open(self, blocks: int | None, who: str = "") -> Session:
        return await asyncio.wait_for(self.opening(blocks, who), PATIENCE_S)

    def close(self, session: Session) -> None:
        self.service.roster.leave(session, finished=True)

    def drop(self, session: Session) -> None:
        self.service.roster.leave(session, finished=False)

    def taken_blocks(self) -> int:
        return self.admission.claimed_bytes // BLOCK_BYTES


def claim(blocks: int) -> pb.KvClaim:
    """Return a claim to so many blocks: one row, or two if that is more than a row may have."""
    rows = 1 if blocks <= 4 else 2
    return pb.KvClaim(rows=rows, row_tokens=blocks // rows * BLOCK_TOKENS)


def grow(session: Session, blocks: int, row: int = 0) -> None:
    """Let a session hold so many blocks in a row, in one step that is then done."""
    held = session.rows[row].length if row < len(session.rows) else 0
    count = blocks * BLOCK_TOKENS - held
    hidden = wire.encode(torch.zeros(count, WIDTH), pb.DTYPE_FLOAT32)
    number = session.last_number + 1
    session.step(
        pb.Step(step=number, spans=[pb.Span(row=row, start=held, count=count, keep=1)], hidden=hidden)
    )
    step = session.steps[number]
    session.engine.steps.remove(step)  # type: ignore[attr-defined]
    step.on_done(step, step.kept_hidden())


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


class Clock:
    """The time of the event loop and of those who wait for room, which the test moves."""

    now = 1000.0

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(asyncio.get_running_loop(), "time", self)
        monkeypatch.setattr("cloud_server.admission.time", SimpleNamespace(monotonic=self))

    def __call__(self) -> float:
        return self.now

    async def goes_on(self, seconds: float) -> None:
        """Let time pass, a little at once."""
        until = self.now + seconds
        while self.now < until:
            self.now += 0.01
            await settle()


@asynccontextmanager
async def waiting(task: "asyncio.Task[Session]") -> AsyncIterator[None]:
    await settle()
    assert not task.done(), "it was let in at once"
    yield
    await asyncio.wait_for(task, PATIENCE_S)


# --- claims -----------------------------------------------------------------------------------------------


async def test_who_does_not_fit_waits_until_somebody_goes() -> None:
    cloud = Cloud(8)
    first = await cloud.open(6)
    assert cloud.cache.bytes_used == 0, "a claim takes no memory"
    async with waiting(cloud.opening(3)):
        assert cloud.admission.waiting == 1 and cloud.taken_blocks() == 6
        cloud.close(first)
    assert cloud.admission.waiting == 0 and cloud.taken_blocks() == 3


async def test_what_a_session_claimed_is_there_whoever_came_after_it() -> None:
    cloud = Cloud(8)
    first, second = await cloud.open(3), await cloud.open(2)
    grow(second, 2)
    grow(second, 3, row=1)  # beyond its claim: 3 of the 3 blocks that nobody has a claim to
    assert cloud.taken_blocks() == 8
    with pytest.raises(Refusal, match="claimed by others") as refused:
        grow(second, 1, row=2)
    assert refused.value.code is Code.RESOURCE_EXHAUSTED and refused.value.reason == "kv"
    for blocks in (1, 2, 3):
        grow(first, blocks)
    assert cloud.cache.free_blocks == 0


async def test_who_says_nothing_is_admitted_for_the_longest_row() -> None:
    cloud = Cloud(8)
    longest = -(-LIMITS.max_context_tokens // BLOCK_TOKENS)
    session = await cloud.open(None)
    assert session.claim == longest == 4
    blocks = cloud.service.reception.blocks
    assert blocks(pb.KvClaim(rows=1, row_tokens=10**6)) == 4, "no more than a row may have"
    assert blocks(pb.KvClaim(rows=10**6, row_tokens=1)) == 4, "no more than rows there may be"
    await cloud.open(4)
    async with waiting(cloud.opening(1)):
        cloud.close(session)


async def test_a_claim_beyond_the_whole_cache_is_one_to_all_of_it() -> None:
    cloud = Cloud(2)
    assert (await cloud.open(4)).claim == 2


async def test_a_claim_is_at_most_what_its_identity_may_have() -> None:
    cloud = Cloud(8, IdentityLimits(max_kv_bytes=2 * BLOCK_BYTES))
    assert (await cloud.open(None)).claim == (await cloud.open(4)).claim == 2
    assert cloud.service.reception.blocks(claim(4)) == 2, "with a step, no more than when it opens"


async def test_what_an_identity_claims_counts_up_to_what_it_may_have() -> None:
    cloud = Cloud(8, IdentityLimits(max_kv_bytes=3 * BLOCK_BYTES))
    alice = [await cloud.open(3, "alice") for _ in range(3)]
    assert cloud.taken_blocks() == 3, "more than these it never gets"
    bob = await cloud.open(3, "bob")
    carol = await cloud.open(2, "carol")
    assert cloud.taken_blocks() == 8
    async with waiting(cloud.opening(1, "dave")):
        grow(bob, 3)
        grow(carol, 2)
        grow(alice[0], 2)
        grow(alice[1], 1)
        with pytest.raises(Refusal, match="your share") as refused:
            grow(alice[2], 1)
        assert refused.value.reason == "share" and cloud.cache.free_blocks == 0
        for session in alice:
            cloud.close(session)
    assert cloud.taken_blocks() == 6


async def test_a_session_that_waits_is_one_of_those_that_its_identity_may_have() -> None:
    cloud = Cloud(1, IdentityLimits(max_sessions=2))
    first = await cloud.open(1, "alice")
    async with waiting(cloud.opening(1, "alice")) as _:
        with pytest.raises(Refusal, match="2 sessions at a time"):
            await cloud.open(1, "alice")
        assert cloud.admission.waiting == 1
        cloud.close(first)


async def test_a_claim_grows_before_anybody_new_is_let_in_and_shrinks_at_once() -> None:
    cloud = Cloud(8)
    first, second = await cloud.open(4), await cloud.open(4)
    newcomer = cloud.opening(1)
    await settle()
    growing = asyncio.ensure_future(cloud.admission.claim(first, 6))
    await settle()
    assert not growing.done() and cloud.admission.waiting == 2
    await cloud.admission.claim(second, 3)
    await settle()
    assert not growing.done() and not newcomer.done(), "the free block is kept for who claims more"
    await cloud.admission.claim(second, 2)
    await asyncio.wait_for(growing, PATIENCE_S)
    assert first.claim == 6 and not newcomer.done()
    await cloud.admission.claim(first, 5)
    await asyncio.wait_for(newcomer, PATIENCE_S)
    assert cloud.taken_blocks() == 8


async def test_sessions_that_grow_one_after_the_other_keep_nobody_out_for_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, cloud = Clock(monkeypatch), Cloud(8, max_wait_s=0.2)
    await cloud.open(4, "other")
    mine = [await cloud.open(1, "greedy") for _ in range(3)]

    async def grow_again_and_again(session: Session, after_s: float) -> None:
        await asyncio.sleep(after_s)
        while True:
            with pytest.raises(Refusal, match="KV cache is full"):
                await cloud.admission.claim(session, 8)

    growing = [asyncio.ensure_future(grow_again_and_again(s, 0.07 * n)) for n, s in enumerate(mine)]
    await clock.goes_on(0.15)
    let_in = 0
    for _ in range(5):  # there is a block that nobody holds or claims
        newcomer = cloud.opening(1, "newcomer")
        while not newcomer.done():
            await clock.goes_on(0.01)
        if newcomer.exception() is None:
            cloud.close(newcomer.result())
            let_in += 1
        else:
            assert refusal(newcomer).reason == "queue_deadline"
    for task in growing:
        task.cancel()
    assert let_in >= 2


async def test_a_claim_lapses_between_two_answers_if_each_answer_states_its_own() -> None:
    cloud = Cloud(8)
    once, always = await cloud.open(4), await cloud.open(4)
    await cloud.admission.claim(always, 4)
    grow(always, 1)
    async with waiting(cloud.opening(2)):
        cloud.admission.lapse(once)
        assert once.claim == 4, "it will not say so again"
        cloud.admission.lapse(always)
    assert always.claim == 1 and cloud.taken_blocks() == 7
    await cloud.admission.claim(always, 2)
    assert always.claim == 2


async def test_dropped_sessions_make_room_oldest_first_and_only_if_that_is_enough() -> None:
    cloud = Cloud(8)
    old, young, live = await cloud.open(2), await cloud.open(2), await cloud.open(4)
    cloud.drop(old)
    cloud.drop(young)
    big = cloud.opening(4)
    await asyncio.wait_for(big, PATIENCE_S)
    assert len(cloud.service.sessions) == 2
    cloud.drop(live)
    again = await cloud.service.reception.let_in(hello(live.id))
    assert again is live, "who is picked up again has kept its room"
    cloud.drop(big.result())
    huge = cloud.opening(4)
    await asyncio.wait_for(huge, PATIENCE_S)
    in_vain = cloud.opening(4)
    cloud.drop(live)
    await asyncio.wait_for(in_vain, PATIENCE_S)


async def test_no_dropped_session_is_evicted_in_vain() -> None:
    cloud = Cloud(8)
    dropped, _ = await cloud.open(2), await cloud.open(4)
    await cloud.open(2)
    cloud.drop(dropped)
    async with waiting(cloud.opening(4)) as _:
        assert dropped.id in cloud.service.sessions
        cloud.close(next(s for s in cloud.service.sessions.values() if s.claim == 4))


async def test_no_dropped_session_is_evicted_in_vain_for_who_needs_more_than_it_said() -> None:
    cloud = Cloud(9)
    dropped, _, greedy = await cloud.open(2), await cloud.open(6), await cloud.open(1)
    cloud.drop(dropped)
    with pytest.raises(Refusal, match="claimed by others"):
        grow(greedy, 4)  # its own and those of the dropped one are three
    assert dropped.id in cloud.service.sessions
    grow(greedy, 3)
    assert dropped.id not in cloud.service.sessions and cloud.taken_blocks() == 9


async def test_sessions_are_counted_too() -> None:
    cloud = Cloud(8, max_sessions=2)
    first, _ = await cloud.open(1), await cloud.open(1)
    async with waiting(cloud.opening(1)):
        cloud.close(first)


@pytest.mark.parametrize("share", [None, 4])
@pytest.mark.parametrize("seed", range(4))
async def test_no_session_is_ever_refused_what_it_claimed(seed: int, share: int | None) -> None:
    """Sessions of every size come, grow, shrink, are dropped and go, in any order."""
    most = IdentityLimits(max_kv_bytes=None if share is None else share * BLOCK_BYTES)
    dice, cloud = random.Random(seed), Cloud(12, most)
    opened = 0

    async def live() -> None:
        nonlocal opened
        session = await cloud.open(dice.randint(0, 4), f"id{dice.randint(0, 3)}")
        opened += 1
        for _ in range(dice.randint(1, 4)):
            await asyncio.sleep(0)
            if dice.random() < 0.3:
                await cloud.admission.claim(session, max(session.claim, dice.randint(1, 4)))
            if session.id not in cloud.service.sessions:
                return
            rows = len(session.rows[0].blocks) if session.rows else 0
            if rows < session.claim:
                try:
                    grow(session, dice.randint(rows + 1, session.claim))
                except Refusal as refusal:
                    assert share is not None and refusal.reason == "share"
                    break  # it is fit to be dropped only
            assert cloud.taken_blocks() <= 12
        if dice.random() < 0.3:
            cloud.drop(session)
        else:
            cloud.close(session)

    await asyncio.wait_for(asyncio.gather(*(live() for _ in range(60))), PATIENCE_S)
    while cloud.service.roster.evict():
        pass
    assert opened == 60 and cloud.admission.waiting == 0 and cloud.cache.bytes_used == 0
    assert cloud.taken_blocks() == 0 and not cloud.admission._entering


# --- the queue ----------------------------------------------------------------------------------------------


async def test_identities_take_turns() -> None:
    cloud = Cloud(1)
    session = await cloud.open(1)
    cloud.order.clear()
    tasks = [cloud.opening(1, f"alice {i}") for i in range(4)]
    await settle()
    tasks += [cloud.opening(1, "bob 0"), cloud.opening(1, "bob 1"), cloud.opening(1, "carol 0")]
    await settle()
    for _ in tasks:
        cloud.close(session)
        await settle()
        session = next(iter(cloud.service.sessions.values()))
    assert cloud.order == ["alice 0", "bob 0", "carol 0", "alice 1", "bob 1", "alice 2", "alice 3"]


@pytest.mark.parametrize("goes", ["is told to", "goes by itself"])
async def test_who_waits_in_vain_has_had_its_identitys_turn(goes: str) -> None:
    cloud = Cloud(4)
    session = await cloud.open(3, "carol")
    large = [cloud.opening(4, f"alice {i}") for i in range(3)]
    await settle()
    small = cloud.opening(1, "bob")
    await settle()
    assert not small.done()
    if goes == "is told to":
        cloud.admission._give_up(cloud.admission._opens["alice"][0])
    else:
        large[0].cancel()
    await asyncio.wait_for(small, PATIENCE_S)
    assert cloud.admission.waiting == 2 and not large[1].done() and not large[2].done()
    cloud.close(session)
    cloud.close(small.result())
    cloud.close(await asyncio.wait_for(large[1], PATIENCE_S))
    await asyncio.wait_for(large[2], PATIENCE_S)
    await asyncio.gather(large[0], return_exceptions=True)


async def test_nobody_is_overtaken_by_who_needs_less() -> None:
    cloud = Cloud(4)
    first, second = await cloud.open(2), await cloud.open(2)
    large = cloud.opening(4, "alice")
    await settle()
    small = cloud.opening(1, "bob")
    cloud.close(first)
    await settle()
    assert not large.done() and not small.done()
    cloud.close(second)
    await asyncio.wait_for(large, PATIENCE_S)
    assert not small.done()
    cloud.close(large.result())
    await asyncio.wait_for(small, PATIENCE_S)


async def test_the_queue_is_bounded_and_who_has_most_waiting_gives_way() -> None:
    cloud = Cloud(1, max_waiting=3)
    session = await cloud.open(1)
    alice = [cloud.opening(1, f"alice {i}") for i in range(4)]
    await settle()
    assert refusal(alice.pop()).reason == "queue_full", "the fourth of three that may wait"
    bob = cloud.opening(1, "bob")
    await settle()
    assert refusal(alice.pop()).reason == "queue_full" and cloud.admission.waiting == 3
    more = cloud.opening(1, "bob")  # who would have no fewer than others is refused
    await settle()
    assert refusal(more).reason == "queue_full"
    cloud.close(session)
    first = await asyncio.wait_for(alice[0], PATIENCE_S)
    cloud.close(first)
    cloud.close(await asyncio.wait_for(bob, PATIENCE_S))
    cloud.close(await asyncio.wait_for(alice[1], PATIENCE_S))


async def test_who_gives_way_may_just_have_gone_by_itself() -> None:
    cloud = Cloud(1, max_waiting=2)
    session = await cloud.open(1)
    stays, goes = cloud.opening(1, "alice"), cloud.opening(1, "alice")
    await settle()
    bob = cloud.opening(1, "bob")
    goes.cancel()  # heard of only after bob has come
    await settle()
    assert goes.cancelled() and not bob.done() and cloud.admission.waiting == 2
    for task in (stays, bob):
        cloud.close(session)
        session = await asyncio.wait_for(task, PATIENCE_S)


async def test_who_waits_can_be_counted_while_others_come() -> None:
    cloud = Cloud(1)
    opens: Any = cloud.admission._opens

    class Meanwhile(deque[None]):
        def __len__(self) -> int:
            opens["late"] = deque()  # as the event loop may do while another thread counts
            return 1

    opens["early"], opens["later"] = Meanwhile(), deque()
    assert cloud.admission.waiting == 1
    opens.clear()


async def test_without_a_queue_who_does_not_fit_is_refused_at_once() -> None:
    cloud = Cloud(1, max_waiting=0)
    await cloud.open(1)
    with pytest.raises(Refusal, match="KV cache is full"):
        await cloud.open(1)


async def test_who_waits_too_long_is_refused_with_a_hint() -> None:
    cloud = Cloud(1, max_wait_s=0.05)
    await cloud.open(1)
    with pytest.raises(Refusal, match="no room for 0.05 seconds; try again later|no room for") as refused:
        await cloud.open(1)
    assert refused.value.code is Code.RESOURCE_EXHAUSTED and refused.value.reason == "queue_deadline"
    assert refused.value.retry_after_s is not None and refused.value.retry_after_s >= LEAST_S * (1 - JITTER)
    session = next(iter(cloud.service.sessions.values()))
    with pytest.raises(Refusal, match="KV cache is full"):
        await cloud.admission.claim(session, 2)
    assert cloud.admission.waiting == 0 and session.claim == 1


async def test_who_has_waited_in_vain_is_told_to_be_back_before_there_is_room() -> None:
    cloud = Cloud(1, max_wait_s=1.0)
    await cloud.open(1)
    early = cloud.admission.config.max_wait_s / 2
    with pytest.raises(Refusal, match="no room for 1 seconds") as refused:
        await cloud.open(1)
    assert refused.value.retry_after_s is not None
    assert LEAST_S <= refused.value.retry_after_s <= 1.0 * (1 + JITTER) - early


async def test_who_goes_while_it_waits_leaves_nothing_behind() -> None:
    cloud = Cloud(1)
    session = await cloud.open(1)
    gone, stays = cloud.opening(1, "alice"), cloud.opening(1, "bob")
    await settle()
    gone.cancel()
    await settle()
    assert cloud.admission.waiting == 1
    cloud.close(session)
    granted = await asyncio.wait_for(stays, PATIENCE_S)
    late = cloud.opening(1, "alice")
    await settle()
    cloud.close(granted)  # `late` is granted its place, and is cancelled before it can use it
    late.cancel()
    await settle()
    await cloud.open(1)


async def test_who_can_never_be_let_in_does_not_wait() -> None:
    cloud = Cloud(1)
    await cloud.open(1)
    message = hello()
    message.open.protocol_version = 99
    with pytest.raises(Refusal, match="protocol version"):
        await cloud.service.reception.let_in(message)
    assert cloud.admission.waiting == 0


def refusal(task: "asyncio.Task[Session]") -> Refusal:
    error = task.exception()
    assert isinstance(error, Refusal) and error.code is Code.RESOURCE_EXHAUSTED
    return error


async def test_who_waits_is_sent_away_when_the_cloud_ends() -> None:
    cloud = Cloud(1)
    session = await cloud.open(1)
    waits = [cloud.opening(1, "alice"), cloud.opening(1, "bob")]
    grows = asyncio.ensure_future(cloud.admission.claim(session, 2))
    await settle()
    cloud.admission.send_away(Refusal(Code.UNAVAILABLE, "the end", reason="drain"))
    await settle()
    for task in (*waits, grows):
        with pytest.raises(Refusal, match="the end"):
            task.result()
    assert cloud.admission.waiting == 0


# --- hints ------------------------------------------------------------------------------------------------


def test_a_hint_follows_what_was_given_back_lately() -> None:
    now = [1000.0]
    blocks = Releases(unknown_s=7.0, clock=lambda: now[0])
    assert near(blocks.hint_s(5), 7.0), "nothing is known"
    for _ in range(30):  # two every second
        now[0] += 1.0
        blocks.note(2)
    assert blocks.rate() == pytest.approx(2.0)
    assert near(blocks.hint_s(10), 5.0)
    assert near(blocks.hint_s(10**6), MOST_S) and near(blocks.hint_s(0), LEAST_S)
    now[0] += WINDOW_S / 2
    assert blocks.rate() == pytest.approx(1.0, rel=0.05), "it has become slower"
    now[0] += WINDOW_S
    assert blocks.rate() == 0.0 and near(blocks.hint_s(1), 7.0), "what was long ago is forgotten"


def test_hints_vary_so_that_not_all_come_back_at_once() -> None:
    hints = {Releases(unknown_s=10.0).hint_s() for _ in range(50)}
    assert len(hints) == 50 and min(hints) >= 10 * (1 - JITTER) and max(hints) <= 10 * (1 + JITTER)
    assert max(hints) - min(hints) > 1.0


def near(hint: float, expected: float) -> bool:
    return expected * (1 - JITTER) <= hint <= expected * (1 + JITTER)
