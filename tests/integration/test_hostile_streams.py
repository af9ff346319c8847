"""Streams that are too large, that break, that overwrite themselves, or that hold extremes."""

import time

import grpc
import numpy as np
import pytest

from tests.integration.bystander import Bystander
from tests.integration.raw_edge import RawEdge, RawStream, array
from tests.integration.served import Served

Code = grpc.StatusCode
HIDDEN, WIDTH = 48, 24  # of the tiny model and its plan r8
UINT32 = 2**32 - 1


# --- size ---------------------------------------------------------------------------------------------------


def test_a_message_above_grpcs_limit(edge: RawEdge) -> None:
    stream = edge.open()
    stream.run([(0, 0, 4, 1)])
    stream.send(bytes(5 << 20))
    end = stream.refused()
    assert end.code is Code.RESOURCE_EXHAUSTED
    assert "larger than max" in end.message.lower()


def test_a_small_message_that_unpacks_to_a_large_one(tiny_cloud: Served, edge: RawEdge) -> None:
    """The limit of gRPC counts compressed bytes: 64 MiB of zeros pass it as 64 KiB, so none is unpacked."""
    with RawEdge(tiny_cloud.address) as plain:
        hello = plain.hello()
    channel = grpc.insecure_channel(
        tiny_cloud.address,
        compression=grpc.Compression.Gzip,
        options=[("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1)],
    )
    with channel:
        stream = RawStream(channel)
        stream.send(hello)
        stream.send(bytes(64 << 20))
        end = stream.refused()
    assert end.code in (Code.UNIMPLEMENTED, Code.RESOURCE_EXHAUSTED, Code.INTERNAL), end
    assert "bytes that are not" not in end.message


# --- streams that break -----------------------------------------------------------------------------------


def test_a_stream_dropped_mid_step(edge: RawEdge) -> None:
    stream = edge.open()
    stream.run([(0, 0, 40, 1)])
    stream.step([(0, 40, 30, 1)])
    assert stream.receive().codes.layer == 0
    stream.drop()  # `edge` waits for its blocks to be free


def test_a_dropped_session_resumes_within_its_grace(edge: RawEdge) -> None:
    h0 = np.random.default_rng(5).normal(size=(50, HIDDEN))
    whole = edge.open()
    expected = whole.run([(0, 0, 50, 50)], h0)
    whole.finish()

    stream = edge.open()
    start = stream.run([(0, 0, 40, 40)], h0[:40])
    stream.step([(0, 40, 10, 10)], h0[40:])
    assert stream.receive().codes.layer == 0  # 40 positions are written, ten are not
    stream.drop()
    again = edge.resumed(stream)
    assert list(again.opened.row_lengths) == [40]
    assert again.opened.session_id == stream.opened.session_id
    again.number = stream.number
    rest = again.run([(0, 40, 10, 10)], h0[40:])
    np.testing.assert_allclose(np.concatenate([start, rest]), expected, atol=1e-3)
    again.finish()


def test_a_session_id_that_is_not_there(edge: RawEdge) -> None:
    live = edge.open()
    live.run([(0, 0, 4, 1)])
    for session_id in (b"\0" * 16, b"x" * 1000, live.opened.session_id[:-1]):
        end = edge.hello_refused(edge.hello(session_id=session_id))
        assert end.code is Code.NOT_FOUND
        assert "open a new one and replay" in end.message
    assert np.isfinite(live.run([(0, 4, 1, 1)])).all()
    live.finish()


def test_an_edge_whose_link_was_cut_takes_its_session_over(edge: RawEdge) -> None:
    """It knows of the cut long before the cloud does; the old stream ends, what was written stays."""
    h0 = np.random.default_rng(6).normal(size=(12, HIDDEN))
    whole = edge.open()
    expected = whole.run([(0, 0, 12, 12)], h0)
    whole.finish()

    old = edge.open()
    start = old.run([(0, 0, 8, 8)], h0[:8])
    old.step([(0, 8, 4, 4)], h0[8:])
    assert old.receive().codes.layer == 0
    new = edge.open(session_id=old.opened.session_id)
    assert list(new.opened.row_lengths) == [8] and new.opened.last_step == old.number
    end = old.refused()
    assert end.code is Code.DEADLINE_EXCEEDED and "picked up by another stream" in end.message
    new.number = old.number
    rest = new.run([(0, 8, 4, 4)], h0[8:])
    np.testing.assert_allclose(np.concatenate([start, rest]), expected, atol=1e-3)
    new.finish()


def test_a_dropped_session_of_another_plan(edge: RawEdge) -> None:
    stream = edge.open()
    stream.run([(0, 0, 4, 1)])
    stream.send(b"")
    stream.refused()
    end = edge.hello_refused(edge.hello("fused", session_id=stream.opened.session_id))
    assert end.code is Code.NOT_FOUND


def test_many_streams_that_close_mid_slice(edge: RawEdge) -> None:
    """Half-closing frees the rows at once, even while the torch thread works on them."""
    for pause in (0.0, 0.005, 0.01, 0.02, 0.03):
        streams = [edge.open() for _ in range(3)]
        for stream in streams:
            stream.step([(0, 0, 512, 1)], known=stream.zeros(512))
        time.sleep(pause)
        for stream in streams:
            stream._outbox.put(None)
        for stream in streams:
            assert stream.refused().code is Code.OK


def test_steps_that_overwrite_a_running_one(edge: RawEdge) -> None:
    """Crops to nothing again and again while slices of the cropped rows run."""
    h0 = np.random.default_rng(6).normal(size=(512, HIDDEN))
    calm, wild = edge.open(), edge.open()
    expected = calm.run([(0, 0, 8, 8)], h0[:8])
    calm.finish()
    for pause in (0.0, 0.003, 0.006, 0.01, 0.015, 0.02):
        wild.step([(0, 0, 512, 1)], h0, known=wild.zeros(512))
        time.sleep(pause)
    wild.step([(0, 0, 8, 8)], h0[:8], known=wild.zeros(8))
    while (message := wild.receive()).hidden.step != wild.number:
        pass
    np.testing.assert_allclose(array(message.hidden.hidden), expected, atol=1e-3)
    wild.finish()


# --- finite extremes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [1e30, -1e30, 3.4e38])
def test_finite_extremes_stay_where_they_are(edge: RawEdge, bystander: Bystander, value: float) -> None:
    """Keys and values become infinite or NaN; the same blocks then go to an honest session."""
    h0 = np.random.default_rng(8).normal(size=(100, HIDDEN))
    extreme = np.full((100, HIDDEN), value)
    extreme[::2, ::3] *= -1
    for hidden, codes in ((extreme, 0.0), (h0, value), (extreme, value)):
        streams = [edge.open() for _ in range(3)]
        for stream in streams:
            for row in range(5):
                stream.step([(row, 0, 100, 1)], hidden, known=stream.zeros(100, codes))
        for stream in streams:
            done = 0
            while done < 5:
                done += stream.receive().HasField("hidden")
        for stream in streams:
            stream.finish()
        bystander.once()


def test_extremes_do_not_leave_their_row(edge: RawEdge) -> None:
    """Two rows of one step run in one batch: what one holds cannot reach the other."""
    h0 = np.random.default_rng(9).normal(size=(6, HIDDEN))
    stream = edge.open()
    expected = stream.run([(0, 0, 6, 6)], h0)
    both = np.concatenate([np.full((6, HIDDEN), 1e30), h0])
    stream.step([(1, 0, 6, 6), (2, 0, 6, 6)], both, known=stream.zeros(12))
    found = array(stream.receive().hidden.hidden)
    np.testing.assert_allclose(found[6:], expected, atol=1e-4)
    for step in range(3):  # and decoding beside it
        ones = np.concatenate([np.full((1, HIDDEN), 1e30), h0[step : step + 1]])
        alone = stream.run([(0, 6 + step, 1, 1)], h0[step : step + 1])
        stream.step([(1, 6 + step, 1, 1), (2, 6 + step, 1, 1)], ones, known=stream.zeros(2))
        np.testing.assert_allclose(array(stream.receive().hidden.hidden)[1:], alone, atol=1e-4)
    stream.finish()
