"""Housekeeping by a clock of the test's: what a standstill of the whole process costs a session."""

import asyncio
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from cloud_server import housekeeping as module

GRACE_S = 8.0


class Clock:
    """Time that passes in sleep only; ``gaps`` are what each sleep takes longer than asked (seconds).

    ``on_wake`` is called after each sleep with its number. With no gaps left, who sleeps is cancelled.
    """

    def __init__(self, gaps: Iterator[float] | list[float], on_wake: Any = None) -> None:
        self.now, self.slept = 1000.0, 0
        self.gaps, self.on_wake = iter(gaps), on_wake or (lambda number: None)

    def monotonic(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        gap = next(self.gaps, None)
        if gap is None:
            raise asyncio.CancelledError
        self.now += seconds + gap
        self.slept += 1
        self.on_wake(self.slept)


def session_of(clock: Clock, dropped_at: float | None) -> Any:
    return SimpleNamespace(
        dropped_at=dropped_at,
        heard_at=clock.now,
        caller=None,
        steps={},
        cut_off=lambda reason: None,
        silent_since=lambda: None,
    )


def keep_house(clock: Clock, monkeypatch: pytest.MonkeyPatch, *sessions: Any) -> list[tuple[Any, str, float]]:
    """Run until the clock's gaps are used up; return who was forgotten, why and when."""
    forgotten = []
    held = {number: session for number, session in enumerate(sessions)}

    def forget(session: Any, reason: str) -> None:
        forgotten.append((session, reason, clock.now))
        held.pop(next(number for number, one in held.items() if one is session))

    service: Any = SimpleNamespace(
        config=SimpleNamespace(
            grace_period_s=GRACE_S, idle_timeout_s=600.0, answer_timeout_s=60.0, claim_idle_s=1e9
        ),
        roster=SimpleNamespace(
            sessions=held,
            forget=forget,
            admission=SimpleNamespace(pump=lambda: None, lapse=lambda session: None),
        ),
        guard=SimpleNamespace(may_still=lambda caller: True),
    )
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=clock.monotonic))
    monkeypatch.setattr(module, "asyncio", SimpleNamespace(sleep=clock.sleep))
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(module.housekeeping(service))
    return forgotten


def test_a_dropped_session_is_freed_after_its_grace_period(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock([0.0] * 20)
    session = session_of(clock, clock.now)
    [(gone, reason, when)] = keep_house(clock, monkeypatch, session)
    assert gone is session and reason == "grace_over" and when == 1000.0 + GRACE_S + 1.0


@pytest.mark.parametrize("gap", [0.9, 7.5, 3600.0])
def test_a_standstill_is_no_part_of_a_grace_period(gap: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that was stopped for longer freed its dropped sessions as soon as it ran again."""
    clock = Clock([0.0, 0.0, gap] + [0.0] * 20)
    session = session_of(clock, clock.now)
    [(_, _, when)] = keep_house(clock, monkeypatch, session)
    assert when == pytest.approx(1000.0 + gap + GRACE_S + 1.0, abs=0.5)


def test_who_is_dropped_or_heard_after_a_standstill_is_granted_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The streams that broke meanwhile are noticed first, as the process wakes up: their time begins then."""

    def wake(number: int) -> None:
        if number == 1:
            session.dropped_at = session.heard_at = clock.now

    clock = Clock([3600.0] + [0.0] * 20, wake)
    session = session_of(clock, None)
    [(_, _, when)] = keep_house(clock, monkeypatch, session)
    assert when == 1000.0 + 3600.0 + 1.0 + GRACE_S + 1.0 and session.heard_at == 4601.0
