"""A cloud with hardly any memory: refusals with a hint, eviction, and an edge that does not read."""

import time

import grpc
import numpy as np

from tests.integration.raw_edge import RawEdge, RawStream
from tests.integration.served import WIDE_BLOCK_BYTES, WIDE_BLOCKS, Served

Code = grpc.StatusCode
HIDDEN, WIDTH = 48, 24  # of the tiny model and its plan r8
UINT32 = 2**32 - 1


# --- a cloud with hardly any memory -----------------------------------------------------------------------


def fill(edge: RawEdge, positions: int) -> RawStream:
    """Return a session that holds so many positions."""
    stream = edge.open()
    stream.step([(0, 0, positions, 1)], known=stream.zeros(positions))
    assert stream.receive().HasField("hidden")
    return stream


def test_a_full_cache_is_refused_with_a_hint(cramped: RawEdge) -> None:
    total = cramped.describe().kv_bytes_total
    assert total == WIDE_BLOCKS * WIDE_BLOCK_BYTES
    assert cramped.kv_used == 0
    holders = [fill(cramped, 512) for _ in range(8)]
    assert cramped.kv_used == total
    late = cramped.open()
    late.step([(0, 0, 1, 1)])
    end = late.refused()
    assert end.code is Code.RESOURCE_EXHAUSTED
    assert "KV cache is full" in end.message and "try again" in end.message
    assert int(end.trailers["retry-after-ms"]) > 0
    for holder in holders:  # who was there goes on
        assert holder.run([(0, 511, 1, 1)]).shape == (1, 1024)
    holders.pop().finish()
    fill(cramped, 512).finish()
    for holder in holders:
        holder.finish()
    assert cramped.settled()


def test_dropped_sessions_make_room_oldest_first(cramped: RawEdge) -> None:
    sessions = [fill(cramped, 512) for _ in range(8)]
    for stream in sessions[:2]:
        stream.drop()
    again = cramped.resumed(sessions[1])  # picked up: no longer dropped
    again.number = sessions[1].number
    newcomer = fill(cramped, 100)
    end = cramped.hello_refused(cramped.hello(session_id=sessions[0].opened.session_id))
    assert end.code is Code.NOT_FOUND, "the oldest dropped session should have been evicted"
    assert again.run([(0, 511, 1, 1)]).shape == (1, 1024)
    for stream in (again, newcomer, *sessions[2:]):
        stream.finish()
    assert cramped.settled()


def test_eviction_in_the_middle_of_a_rearranged_step(cramped: RawEdge) -> None:
    """Room is made after the rows were rearranged: they must not be rearranged twice."""
    h0 = np.random.default_rng(3).normal(size=(70, 1024))
    beams = cramped.open()
    alone = [beams.run([(0, 0, 33, 33)], h0[:33])[-1]]
    beams.run([(1, 0, 33, 1)], h0[33:66])
    expected = beams.run([(0, 33, 1, 1)], h0[69:70])  # row 0 goes on
    dropped = [fill(cramped, 512) for _ in range(7)]
    dropped.append(fill(cramped, 12 * 32))  # with 2 + 2 blocks above, all 128 are taken
    assert cramped.kv_used == cramped.describe().kv_bytes_total
    for stream in dropped:
        stream.drop()
    # new row 1 is old row 0; both forks copy their last block, so something has to go
    spans = [(0, 33, 1, 1), (1, 33, 1, 1), (2, 33, 1, 1)]
    found = beams.run(spans, np.repeat(h0[69:70], 3, axis=0), parents=[1, 0, 0])
    np.testing.assert_allclose(found[1:], np.repeat(expected, 2, axis=0), atol=1e-4)
    assert np.abs(found[0] - expected[0]).max() > 1e-2
    assert alone[0].shape == (1024,)
    beams.finish()


def test_a_client_that_stops_reading(cramped: RawEdge, cramped_cloud: Served) -> None:
    """Sixteen MB of hidden states that nobody reads: the stream is cut off, its memory can be taken."""
    deaf = cramped.open()
    for row in range(8):
        deaf.step([(row, 0, 512, 512)], known=deaf.zeros(512))
    deadline = time.monotonic() + 60
    while "read nothing for 2" not in cramped_cloud.process.logs() and time.monotonic() < deadline:
        time.sleep(0.05)  # not reading
    end = deaf.refused()
    assert end.code is Code.DEADLINE_EXCEEDED, end
    assert "read nothing for 2" in end.message
    taken = [fill(cramped, 512) for _ in range(8)]  # the whole cache: the cut-off session was evicted
    for stream in taken:
        stream.finish()
    assert cramped.settled()


# --- an edge that does not speak -------------------------------------------------------------------------


def test_a_stream_that_never_opens_is_not_kept(cramped: RawEdge) -> None:
    end = cramped.stream().refused()
    assert end.code is Code.DEADLINE_EXCEEDED
    assert "no first message" in end.message
