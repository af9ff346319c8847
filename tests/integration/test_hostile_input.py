"""What an edge can get wrong, by mistake or on purpose, against a real cloud process.

Each time: a status and a message that say what is wrong, an honest session beside it whose tokens do
not change (`bystander`), a cloud that goes on serving, and KV bytes in use that return to what they were.
"""

import time
from collections.abc import Callable, Iterator

import grpc
import numpy as np
import pytest

from shared.pb.privatelora.v1 import private_lora_pb2 as pb
from tests.integration.bystander import Bystander
from tests.integration.raw_edge import RawEdge, RawStream, Refused, array, tensor
from tests.integration.served import WIDE_BLOCK_BYTES, WIDE_BLOCKS, Served

Code = grpc.StatusCode
HIDDEN, WIDTH = 48, 24  # of the tiny model and its plan r8
UINT32 = 2**32 - 1


@pytest.fixture
def edge(tiny_cloud: Served, bystander: Bystander) -> Iterator[RawEdge]:
    """Return a channel to the tiny cloud, while an honest session generates."""
    with tiny_cloud.raw() as raw:
        assert raw.settled()
        with bystander:
            yield raw
        assert raw.settled(), "the KV bytes in use did not return to what they were"
    log = tiny_cloud.process.logs()
    assert "Traceback" not in log and "never retrieved" not in log, log[-3000:]


@pytest.fixture
def cramped(cramped_cloud: Served) -> Iterator[RawEdge]:
    with cramped_cloud.raw() as raw:
        yield raw
    assert "Traceback" not in cramped_cloud.process.logs()


# --- the handshake --------------------------------------------------------------------------------------


def hello_refused(edge: RawEdge, message: pb.DecodeRequest | bytes) -> Refused:
    stream = edge.stream()
    stream.send(message)
    return stream.refused()


def test_bytes_that_are_no_message(edge: RawEdge) -> None:
    end = hello_refused(edge, b"\xff" * 100)
    assert end.code is Code.INVALID_ARGUMENT
    assert "not a DecodeRequest" in end.message
    stream = edge.open()
    stream.run([(0, 0, 4, 1)])
    stream.send(b"\x0a\xff\xff\xff\xff\x0f")  # announces 4 GiB that do not come
    end = stream.refused()
    assert end.code is Code.INVALID_ARGUMENT and "not a DecodeRequest" in end.message
    for method in ("Describe", "FetchEdgeParts"):
        call = edge.channel.unary_stream(f"/privatelora.v1.PrivateLoraService/{method}")
        with pytest.raises(grpc.RpcError) as error:
            list(call(b"\xff\xff\xff", timeout=10))
        assert error.value.code() is Code.INVALID_ARGUMENT


@pytest.mark.parametrize(
    "first",
    [b"", pb.DecodeRequest(step=pb.Step(step=1)), pb.DecodeRequest(residual_codes=pb.ResidualCodes(step=1))],
    ids=["empty", "step", "residual codes"],
)
def test_a_first_message_that_is_not_open(edge: RawEdge, first: pb.DecodeRequest | bytes) -> None:
    end = hello_refused(edge, first)
    assert end.code is Code.INVALID_ARGUMENT
    assert "first message must be open" in end.message


def test_a_stream_that_ends_before_it_begins(edge: RawEdge) -> None:
    stream = edge.stream()
    stream._outbox.put(None)
    end = stream.refused()
    assert end.code is Code.INVALID_ARGUMENT and "first message must be open" in end.message


def test_two_first_messages(edge: RawEdge) -> None:
    stream = edge.open()
    stream.run([(0, 0, 4, 1)])
    stream.send(edge.hello())
    end = stream.refused()
    assert end.code is Code.INVALID_ARGUMENT
    assert "open is the first message, and only the first" in end.message


def test_an_empty_message(edge: RawEdge) -> None:
    stream = edge.open()
    stream.send(b"")
    end = stream.refused()
    assert end.code is Code.INVALID_ARGUMENT and "empty message" in end.message


@pytest.mark.parametrize("version", [0, 2, UINT32])
def test_another_protocol_version(edge: RawEdge, version: int) -> None:
    end = hello_refused(edge, edge.hello(protocol_version=version))
    assert end.code is Code.FAILED_PRECONDITION
    assert f"protocol version {version}" in end.message and "update" in end.message


@pytest.mark.parametrize("digest", [b"", b"\1" * 32, b"\1" * 3_000])
def test_an_unknown_plan(edge: RawEdge, digest: bytes) -> None:
    unknown = pb.Fingerprint()
    unknown.CopyFrom(edge.offers["r8"].fingerprint)
    unknown.plan = digest
    end = hello_refused(edge, edge.hello(fingerprint=unknown))
    assert end.code is Code.NOT_FOUND
    assert "no such plan" in end.message and "r8" in end.message and "fused" in end.message


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (["lowrank"], "A/B"),
        (["layers"], "backbone"),
        (["edge"], "edge parts"),
        (["lowrank", "layers"], "A/B"),
    ],
    ids=["A/B", "layers", "edge parts", "two"],
)
def test_a_fingerprint_mismatch_says_which_part(edge: RawEdge, changed: list[str], named: str) -> None:
    other = pb.Fingerprint()
    other.CopyFrom(edge.offers["r8"].fingerprint)
    for part in changed:
        setattr(other, part, b"\2" * 32)
    end = hello_refused(edge, edge.hello(fingerprint=other))
    assert end.code is Code.FAILED_PRECONDITION
    assert "fingerprint mismatch" in end.message and named in end.message
    for part, name in {"lowrank": "A/B", "layers": "backbone", "edge": "edge parts"}.items():
        assert (name in end.message.split(":")[0]) == (part in changed)


@pytest.mark.parametrize("dtype", [pb.DTYPE_UNSPECIFIED, 17])
def test_an_unknown_wire_dtype(edge: RawEdge, dtype: int) -> None:
    end = hello_refused(edge, edge.hello(wire_dtype=dtype))
    assert end.code is Code.INVALID_ARGUMENT and "float32" in end.message


# --- steps that are refused -------------------------------------------------------------------------------


def _step(**fields: object) -> Callable[[RawStream], object]:
    return lambda stream: stream.step(**fields)  # type: ignore[arg-type]


def _shape(*shape: int) -> pb.Tensor:
    return tensor(np.zeros(shape))


def _with(value: float) -> np.ndarray:
    values = np.zeros((3, HIDDEN))
    values[1, 7] = value
    return values


def _claims(shape: list[int], size: int) -> pb.Tensor:
    return pb.Tensor(dtype=pb.DTYPE_FLOAT32, shape=shape, data=bytes(size))


NEXT = [(0, 4, 3, 1)]  # the session below holds four positions of row 0
BAD_STEPS: dict[str, tuple[Callable[[RawStream], object], Code, str]] = {
    "too few positions": (
        _step(spans=NEXT, hidden=_shape(2, HIDDEN)),
        Code.INVALID_ARGUMENT,
        "shape is (2, 48)",
    ),
    "too wide": (_step(spans=NEXT, hidden=_shape(3, HIDDEN + 1)), Code.INVALID_ARGUMENT, "expected (3, 48)"),
    "flat": (_step(spans=NEXT, hidden=_shape(3 * HIDDEN)), Code.INVALID_ARGUMENT, "shape"),
    "rank three": (_step(spans=NEXT, hidden=_shape(1, 3, HIDDEN)), Code.INVALID_ARGUMENT, "shape"),
    "a thousand dimensions": (
        _step(spans=NEXT, hidden=_claims([1] * 1000, 4)),
        Code.INVALID_ARGUMENT,
        "shape",
    ),
    "no tensor": (_step(spans=NEXT, hidden=pb.Tensor()), Code.INVALID_ARGUMENT, "dtype"),
    "too few bytes": (_step(spans=NEXT, hidden=_claims([3, HIDDEN], 8)), Code.INVALID_ARGUMENT, "8 bytes"),
    "too many bytes": (
        _step(spans=NEXT, hidden=_claims([3, HIDDEN], 577)),
        Code.INVALID_ARGUMENT,
        "577 bytes",
    ),
    "a giant shape": (_step(spans=NEXT, hidden=_claims([UINT32] * 4, 16)), Code.INVALID_ARGUMENT, "shape"),
    "float16": (
        _step(spans=NEXT, hidden=tensor(_with(0), pb.DTYPE_FLOAT16)),
        Code.INVALID_ARGUMENT,
        "dtype is float16, this session agreed on float32",
    ),
    "an unknown dtype": (
        _step(spans=NEXT, hidden=pb.Tensor(dtype=99, shape=[3, HIDDEN], data=bytes(576))),  # type: ignore[arg-type]
        Code.INVALID_ARGUMENT,
        "unknown dtype 99",
    ),
    "NaN": (_step(spans=NEXT, hidden=_with(np.nan)), Code.INVALID_ARGUMENT, "NaN or infinity"),
    "infinity": (_step(spans=NEXT, hidden=_with(np.inf)), Code.INVALID_ARGUMENT, "NaN or infinity"),
    "minus infinity": (_step(spans=NEXT, hidden=_with(-np.inf)), Code.INVALID_ARGUMENT, "NaN or infinity"),
    "a gap": (_step(spans=[(0, 5, 1, 1)]), Code.FAILED_PRECONDITION, "position gap: row 0 holds 4"),
    "a gap in a new row": (_step(spans=[(1, 1, 1, 1)]), Code.FAILED_PRECONDITION, "row 1 holds 0"),
    "a start of 2^32": (_step(spans=[(0, UINT32, 1, 1)]), Code.FAILED_PRECONDITION, "position gap"),
    "a count of 2^32": (
        _step(spans=[(0, 4, UINT32, 1)], hidden=_shape(1, HIDDEN)),
        Code.INVALID_ARGUMENT,
        "at most 512 positions, got 4294967295",
    ),
    "counts that overflow": (
        _step(spans=[(0, 4, UINT32, 1), (1, 0, 2, 1)], hidden=_shape(1, HIDDEN)),
        Code.INVALID_ARGUMENT,
        "at most 512 positions",
    ),
    "an oversized chunk": (_step(spans=[(0, 0, 513, 1)]), Code.INVALID_ARGUMENT, "send it in chunks"),
    "past the context": (_step(spans=[(0, 4, 509, 1)]), Code.OUT_OF_RANGE, "context ends at 512"),
    "no spans": (_step(spans=[], hidden=_shape(0, HIDDEN)), Code.INVALID_ARGUMENT, "1 to 64 spans"),
    "an empty span": (
        _step(spans=[(0, 4, 0, 0)], hidden=_shape(0, HIDDEN)),
        Code.INVALID_ARGUMENT,
        "count >= 1",
    ),
    "keeps more than it has": (_step(spans=[(0, 4, 1, 2)]), Code.INVALID_ARGUMENT, "keep <= count"),
    "a keep of 2^32": (_step(spans=[(0, 4, 1, UINT32)]), Code.INVALID_ARGUMENT, "keep <= count"),
    "a row twice": (_step(spans=[(0, 4, 1, 1), (0, 5, 1, 1)]), Code.INVALID_ARGUMENT, "named twice"),
    "row 64": (_step(spans=[(64, 0, 1, 1)]), Code.INVALID_ARGUMENT, "beyond the 64"),
    "row 2^32": (_step(spans=[(UINT32, 0, 1, 1)]), Code.INVALID_ARGUMENT, "beyond the 64"),
    "a row left out": (_step(spans=[(2, 0, 1, 1)]), Code.INVALID_ARGUMENT, "without gaps"),
    "65 rows": (_step(spans=[(row, 0, 1, 1) for row in range(65)]), Code.INVALID_ARGUMENT, "1 to 64 spans"),
    "65 parents": (_step(spans=NEXT, parents=[0] * 65), Code.INVALID_ARGUMENT, "at most 64 rows"),
    "a parent out of range": (
        _step(spans=NEXT, parents=[0, 1]),
        Code.INVALID_ARGUMENT,
        "beyond the session's 1",
    ),
    "a parent of 2^32": (
        _step(spans=NEXT, parents=[UINT32]),
        Code.INVALID_ARGUMENT,
        "beyond the session's 1",
    ),
    "an old number": (_step(spans=NEXT, step=1), Code.INVALID_ARGUMENT, "step number 1 is not above"),
    "number 0": (_step(spans=NEXT, step=0), Code.INVALID_ARGUMENT, "not above"),
    "codes of an unknown layer": (
        _step(spans=NEXT, known={77: _shape(3, WIDTH)}),
        Code.INVALID_ARGUMENT,
        "layer 77 is not adapted",
    ),
    "codes too narrow": (
        _step(spans=NEXT, known={0: _shape(3, WIDTH - 1)}),
        Code.INVALID_ARGUMENT,
        "(3, 24)",
    ),
    "codes with NaN": (
        _step(spans=NEXT, known={0: np.full((3, WIDTH), np.nan)}),
        Code.INVALID_ARGUMENT,
        "residual codes of layer 0: holds NaN",
    ),
}


@pytest.mark.parametrize(("act", "code", "words"), BAD_STEPS.values(), ids=BAD_STEPS)
def test_a_step_that_cannot_be(edge: RawEdge, act: Callable, code: Code, words: str) -> None:
    stream = edge.open()
    stream.run([(0, 0, 4, 1)])
    act(stream)
    end = stream.refused()
    assert end.code is code, end
    assert words in end.message
    # the session itself is unharmed: it can be picked up again with what it held, and goes on
    again = edge.open(session_id=stream.opened.session_id)
    assert list(again.opened.row_lengths) == [4]
    again.number = 10
    assert np.isfinite(again.run([(0, 4, 2, 2)])).all()
    again.finish()


def _answer(layer: int, codes: pb.Tensor, step: int | None = None) -> Callable[[RawStream], object]:
    return lambda stream: stream.answer(layer, codes, step)


BAD_ANSWERS: dict[str, tuple[Callable[[RawStream], object], str]] = {
    "a later layer": (_answer(1, _shape(3, WIDTH)), "layer 1 out of order: step 2 stands at layer 0"),
    "the last layer": (_answer(3, _shape(3, WIDTH)), "out of order"),
    "a layer of 2^32": (_answer(UINT32, _shape(3, WIDTH)), "out of order"),
    "a step never sent": (_answer(0, _shape(3, WIDTH), 9), "step 9, which was never sent"),
    "a step of 2^64": (_answer(0, _shape(3, WIDTH), 2**64 - 1), "never sent"),
    "too few positions": (_answer(0, _shape(2, WIDTH)), "expected (3, 24)"),
    "too wide": (_answer(0, _shape(3, HIDDEN)), "expected (3, 24)"),
    "another rank": (_answer(0, _shape(3, 3, 8)), "expected (3, 24)"),
    "another dtype": (_answer(0, tensor(np.zeros((3, WIDTH)), pb.DTYPE_FLOAT16)), "dtype is float16"),
    "NaN": (_answer(0, tensor(np.full((3, WIDTH), np.nan))), "NaN or infinity"),
    "infinity": (_answer(0, tensor(np.full((3, WIDTH), -np.inf))), "NaN or infinity"),
    "no layer": (
        lambda stream: stream.send(pb.DecodeRequest(residual_codes=pb.ResidualCodes(step=2))),
        "without any layer",
    ),
    "one layer twice": (
        lambda stream: stream.send(
            pb.DecodeRequest(
                residual_codes=pb.ResidualCodes(
                    step=2, residual_codes=[pb.LayerCodes(layer=0, codes=_shape(3, WIDTH))] * 2
                )
            )
        ),
        "out of order",
    ),
}


@pytest.mark.parametrize(("act", "words"), BAD_ANSWERS.values(), ids=BAD_ANSWERS)
def test_residual_codes_that_cannot_be(edge: RawEdge, act: Callable, words: str) -> None:
    stream = edge.open()
    stream.run([(0, 0, 4, 1)])
    stream.step(NEXT)
    assert stream.receive().codes.layer == 0
    act(stream)
    end = stream.refused()
    assert end.code is Code.INVALID_ARGUMENT, end
    assert words in end.message


def test_an_answer_given_twice(edge: RawEdge) -> None:
    stream = edge.open()
    stream.step()
    assert stream.receive().codes.layer == 0
    stream.answer(0, _shape(3, WIDTH))
    assert stream.receive().codes.layer == 1
    stream.answer(0, _shape(3, WIDTH))
    end = stream.refused()
    assert end.code is Code.INVALID_ARGUMENT and "out of order" in end.message


def test_the_other_plan_keeps_its_own_layers(edge: RawEdge) -> None:
    """Plan `fused` adapts layers 1 and 3 with other widths; codes for layer 0 are none of its business."""
    stream = edge.open("fused")
    stream.run([(0, 0, 4, 1)])
    stream.step(NEXT, known={0: _shape(3, 9)})
    end = stream.refused()
    assert end.code is Code.INVALID_ARGUMENT and "layer 0 is not adapted in plan 'fused'" in end.message


def test_more_steps_in_flight_than_allowed(edge: RawEdge) -> None:
    stream = edge.open()
    for row in range(edge.limits.max_steps_in_flight + 1):
        stream.step([(row, 0, 1, 1)])
    end = stream.refused()
    assert end.code is Code.INVALID_ARGUMENT
    assert f"more than {edge.limits.max_steps_in_flight} steps in flight" in end.message


def test_rows_rearranged_under_a_step_in_flight(edge: RawEdge) -> None:
    stream = edge.open()
    stream.run([(0, 0, 4, 1), (1, 0, 4, 1)])
    stream.step([(0, 4, 1, 1)])
    stream.step([(0, 4, 1, 1)], parents=[1, 0])
    end = stream.refused()
    assert end.code is Code.INVALID_ARGUMENT and "rearranged while steps are in flight" in end.message


def test_a_gap_where_a_step_was_overwritten(edge: RawEdge) -> None:
    """Positions of a step that a newer one cancels were never written: nothing may build on them."""
    stream = edge.open()
    stream.run([(0, 0, 4, 1)])
    stream.step([(0, 4, 10, 1)])
    stream.step([(0, 9, 1, 1)])
    end = stream.refused()
    assert end.code is Code.FAILED_PRECONDITION
    assert "row 0 holds 4 positions, the step starts at 9" in end.message


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
    again = resumed(edge, stream)
    assert list(again.opened.row_lengths) == [40]
    assert again.opened.session_id == stream.opened.session_id
    again.number = stream.number
    rest = again.run([(0, 40, 10, 10)], h0[40:])
    np.testing.assert_allclose(np.concatenate([start, rest]), expected, atol=1e-3)
    again.finish()


def resumed(edge: RawEdge, stream: RawStream) -> RawStream:
    """Open a dropped session again, as soon as the cloud has noticed that it was dropped."""
    for _ in range(100):
        again = edge.stream()
        again.plan = stream.plan
        again.send(edge.hello(session_id=stream.opened.session_id))
        try:
            again.opened = again.receive().opened
            return again
        except grpc.RpcError as error:
            assert error.code() is Code.NOT_FOUND
            time.sleep(0.01)
    raise AssertionError("the cloud does not notice that the stream is gone")


def test_a_session_id_that_is_not_there(edge: RawEdge) -> None:
    live = edge.open()
    live.run([(0, 0, 4, 1)])
    for session_id in (b"\0" * 16, b"x" * 1000, live.opened.session_id):  # the last one is connected
        end = hello_refused(edge, edge.hello(session_id=session_id))
        assert end.code is Code.NOT_FOUND
        assert "open a new one and replay" in end.message
    assert np.isfinite(live.run([(0, 4, 1, 1)])).all()
    live.finish()


def test_a_dropped_session_of_another_plan(edge: RawEdge) -> None:
    stream = edge.open()
    stream.run([(0, 0, 4, 1)])
    stream.send(b"")
    stream.refused()
    end = hello_refused(edge, edge.hello("fused", session_id=stream.opened.session_id))
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
    again = resumed(cramped, sessions[1])  # picked up: no longer dropped
    again.number = sessions[1].number
    newcomer = fill(cramped, 100)
    end = hello_refused(cramped, cramped.hello(session_id=sessions[0].opened.session_id))
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
