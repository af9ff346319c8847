"""What one identity may use: exact counts, by a clock that the test moves."""

import asyncio
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from cloud_server.allowance import Allowance, Allowances
from cloud_server.config.identity import IdentityLimits
from cloud_server.refusal import Refusal


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def allowed(**limits: Any) -> tuple[Allowance, Clock]:
    clock = Clock()
    return Allowance(IdentityLimits(**limits), clock), clock


class Stand:  # for a session
    def __init__(self, *rows: list[int]) -> None:
        self.rows = [SimpleNamespace(blocks=blocks) for blocks in rows]


def session(*rows: list[int]) -> Any:
    return Stand(*rows)


def test_without_limits_nothing_is_refused() -> None:
    mine, _ = allowed()
    for _ in range(100):
        mine.admit_session(lambda: False)
        mine.admit_tuning()
        mine.spend(10**9)
        assert not mine.lacks_kv(10**9, 10**9) and mine.debt_s() == 0
        mine.tuning_streams += 1


def test_tokens_are_saved_up_spent_and_owed() -> None:
    mine, clock = allowed(max_tokens_per_s=10, burst_s=3)
    for _ in range(3):
        mine.spend(10)
    assert mine.debt_s() == 0  # all of the 30 saved up, and no more
    mine.spend(15)  # a step is not cut: it may go over
    assert mine.debt_s() == pytest.approx(1.5)
    with pytest.raises(Refusal, match="10 tokens/s") as refused:
        mine.spend(1)
    assert refused.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert refused.value.retry_after_s == pytest.approx(1.5)
    clock.now += 1.5
    mine.spend(1)  # after the hint it is admitted, and what was refused was not counted
    assert mine.debt_s() == pytest.approx(0.1)
    clock.now += 1000
    mine.spend(30)
    assert mine.debt_s() == 0
    mine.spend(1)
    assert mine.debt_s() == pytest.approx(0.1), "more than burst_s was saved up"


async def test_a_pause_is_as_long_as_the_debt_but_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    mine, clock = allowed(max_tokens_per_s=10, burst_s=0, max_wait_s=2)

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        clock.now += seconds

    monkeypatch.setattr(asyncio, "sleep", sleep)
    await mine.pause()
    mine.spend(5)
    await mine.pause()
    assert slept == [pytest.approx(0.5)]
    other, clock = allowed(max_tokens_per_s=10, burst_s=0, max_wait_s=2)
    other.spend(1000)
    await other.pause()
    assert slept[1:] == [2]


async def test_streams_of_one_identity_that_wait_together_are_slowed_and_not_refused() -> None:
    mine = Allowance(IdentityLimits(max_tokens_per_s=200, burst_s=0, max_wait_s=30))
    mine.spend(2)

    async def stream() -> None:
        for _ in range(3):
            await mine.pause()
            mine.spend(1)

    await asyncio.gather(*(stream() for _ in range(4)))


def test_blocks_that_rows_share_count_once() -> None:
    mine, _ = allowed(max_kv_bytes=500)
    mine.sessions = {session([1, 2], [1, 3]), session([4])}
    assert not mine.lacks_kv(1, 100) and mine.lacks_kv(2, 100)
    assert not mine.lacks_kv(0, 10**9), "who asks for nothing lacks nothing"


def test_sessions_make_room_for_their_own() -> None:
    mine, _ = allowed(max_sessions=2)
    mine.sessions = {session(), session()}
    asked = []

    def make_room() -> bool:
        asked.append(1)
        mine.sessions.pop()
        return True

    mine.admit_session(make_room)
    assert len(asked) == 1
    with pytest.raises(Refusal, match="2 sessions at a time"):
        mine.admit_session(lambda: False, opening=1)
    mine.sessions.add(session())
    with pytest.raises(Refusal, match="2 sessions at a time") as refused:
        mine.admit_session(lambda: False)
    assert refused.value.retry_after_s is not None and refused.value.retry_after_s > 0


def test_tuning_can_be_forbidden() -> None:
    mine, _ = allowed(max_tuning_streams=0)
    with pytest.raises(Refusal, match="0 tuning streams"):
        mine.admit_tuning()


def test_tuning_memory_and_fetches_are_counted() -> None:
    mine, _ = allowed(max_tuning_bytes=100, max_fetches=2)
    mine.take_tuning(60)
    with pytest.raises(Refusal, match="100 bytes for tuning batches") as refused:
        mine.take_tuning(41)
    assert (
        refused.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED and refused.value.retry_after_s is not None
    )
    mine.take_tuning(40)
    mine.tuning_bytes -= 60
    mine.take_tuning(60)
    mine.admit_fetch()
    mine.fetches = 2
    with pytest.raises(Refusal, match="2 fetches of parts at a time"):
        mine.admit_fetch()


def test_each_identity_has_its_own() -> None:
    everybody = Allowances(IdentityLimits(max_tokens_per_s=1, burst_s=0))
    everybody.of("alice").spend(100)
    assert everybody.of("alice").debt_s() > 0 and everybody.of("bob").debt_s() == 0
    assert everybody.of("alice") is everybody.of("alice")
