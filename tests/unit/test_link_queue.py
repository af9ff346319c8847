"""The due-time queue of the emulated link, on a clock that only the test moves."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.link_queue import MTU, DueTimeQueue, Lateness, LinkShape

SIZE = 1024  # bytes
TICK = 2.0**-10  # seconds that a packet of this size takes: all sums of these figures are exact in binary
SHAPE = LinkShape(delay_s=40 * TICK, bytes_per_s=SIZE / TICK)


def arrivals(queue: DueTimeQueue[int]) -> list[tuple[float, int]]:
    """Take everything, each packet at the moment it is due and not a moment before."""
    taken = []
    while (due := queue.next_due()) is not None:
        assert queue.pop(math.nextafter(due, -math.inf)) is None, "it came out before its time"
        packet = queue.pop(due)
        assert packet is not None
        taken.append(packet)
    return taken


def test_one_packet_takes_its_serialisation_and_the_delay() -> None:
    queue: DueTimeQueue[int] = DueTimeQueue(SHAPE)
    assert queue.push(7, SIZE, now=5.0)
    assert arrivals(queue) == [(5.0 + 41 * TICK, 7)]


def test_packets_sent_together_arrive_spaced_by_serialisation_only() -> None:
    queue: DueTimeQueue[int] = DueTimeQueue(SHAPE)
    for number in range(30):
        assert queue.push(number, SIZE, now=0.0)
    assert len(queue) == 30
    assert arrivals(queue) == [((41 + number) * TICK, number) for number in range(30)]


def test_many_are_in_flight_at_once() -> None:
    """At the link's own pace nothing waits, however long the way: 41 packets are under way at a time."""
    queue: DueTimeQueue[int] = DueTimeQueue(SHAPE)
    most = 0
    for number in range(200):
        now = number * TICK
        while queue.pop(now) is not None:
            pass
        assert queue.backlog_bytes(now) == 0
        assert queue.push(number, SIZE, now)
        most = max(most, len(queue))
    assert most == 41  # 40 travel, one is being sent
    assert queue.dropped == 0


def test_a_pause_is_not_credit_for_a_burst() -> None:
    queue: DueTimeQueue[int] = DueTimeQueue(SHAPE)
    queue.push(0, SIZE, now=0.0)
    queue.push(1, SIZE, now=10.0)
    queue.push(2, SIZE, now=10.0)
    assert [due for due, _ in arrivals(queue)] == [41 * TICK, 10 + 41 * TICK, 10 + 42 * TICK]


def test_a_full_buffer_refuses_the_newest_and_takes_again_once_there_is_room() -> None:
    queue: DueTimeQueue[int] = DueTimeQueue(SHAPE)
    room = 80  # packets in a round trip
    assert [queue.push(number, SIZE, now=0.0) for number in range(room + 5)] == [True] * room + [False] * 5
    assert (queue.packets, queue.bytes, queue.dropped) == (room, room * SIZE, 5)
    at = queue.room_at(SIZE)
    assert at == TICK
    assert not queue.push(-1, SIZE, now=at - TICK / 2)
    assert queue.push(room, SIZE, now=at)
    assert [number for _, number in arrivals(queue)] == list(range(room + 1)), "the oldest are kept, in order"


def test_what_travels_takes_no_room() -> None:
    queue: DueTimeQueue[int] = DueTimeQueue(SHAPE)
    for number in range(80):
        assert queue.push(number, SIZE, now=0.0)
    assert queue.backlog_bytes(80 * TICK) == 0
    assert queue.next_due() == 41 * TICK  # none was taken out
    assert all(queue.push(number, SIZE, now=80 * TICK) for number in range(80))


def test_no_limit_and_no_delay_pass_everything_at_once() -> None:
    queue: DueTimeQueue[int] = DueTimeQueue(LinkShape(delay_s=0.0, bytes_per_s=None))
    assert all(queue.push(number, 1 << 20, now=3.0) for number in range(1000))
    assert arrivals(queue) == [(3.0, number) for number in range(1000)]
    assert queue.room_at(1 << 30) < 0


def test_a_delay_without_a_limit_keeps_the_order() -> None:
    queue: DueTimeQueue[int] = DueTimeQueue(LinkShape(delay_s=0.5, bytes_per_s=None))
    for number in range(3):
        queue.push(number, MTU, now=float(number))
    assert arrivals(queue) == [(0.5, 0), (1.5, 1), (2.5, 2)]


def test_the_buffer_is_never_shorter_than_fifty_milliseconds_or_two_packets() -> None:
    assert LinkShape(0.002, 25e6).buffer_bytes == pytest.approx(1.25e6)
    assert LinkShape(0.0, 1000.0).buffer_bytes == 2 * MTU


def test_lateness_is_that_since_the_last_question() -> None:
    lateness = Lateness(most=100)
    for number in range(1, 201):
        lateness.note(number / 1e3)
    assert lateness.figures() == {"median": 151.0, "p99": 200.0, "max": 200.0}, "the last hundred count"
    assert lateness.figures() == {}
    lateness.note(0.5)
    assert lateness.figures() == {"median": 500.0, "p99": 500.0, "max": 500.0}


@given(
    sends=st.lists(st.tuples(st.floats(0, 0.01), st.integers(1, MTU)), min_size=1, max_size=300),
    delay=st.floats(0, 0.1),
    rate=st.floats(1e5, 1e8),
)
def test_any_traffic_keeps_order_rate_and_delay(
    sends: list[tuple[float, int]], delay: float, rate: float
) -> None:
    """No window of arrivals carries more than the rate allows; nobody comes before the delay."""
    queue: DueTimeQueue[int] = DueTimeQueue(LinkShape(delay, rate))
    now, sent = 0.0, []
    for number, (pause, size) in enumerate(sends):
        now += pause
        if queue.push(number, size, now):
            sent.append((now, size, number))
    taken = arrivals(queue)
    assert [number for _, number in taken] == [number for _, _, number in sent]
    for (due, _), (at, size, _) in zip(taken, sent, strict=True):
        assert due >= at + delay + size / rate - 1e-9
        assert due <= at + delay + queue.shape.buffer_bytes / rate + 1e-9
    for (earlier, _), (later, _), (_, size, _) in zip(taken, taken[1:], sent[1:], strict=False):
        assert later - earlier >= size / rate - 1e-9
