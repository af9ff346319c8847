"""A stream that begins wrongly: what is no message, no first message, or made for something else."""

import grpc
import pytest

from shared.pb.privatelora.v1 import private_lora_pb2 as pb
from tests.integration.raw_edge import TIMEOUT_S, RawEdge

Code = grpc.StatusCode
HIDDEN, WIDTH = 48, 24  # of the tiny model and its plan r8
UINT32 = 2**32 - 1


# --- the handshake --------------------------------------------------------------------------------------


def test_bytes_that_are_no_message(edge: RawEdge) -> None:
    end = edge.hello_refused(b"\xff" * 100)
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
            list(call(b"\xff\xff\xff", timeout=TIMEOUT_S))
        assert error.value.code() is Code.INVALID_ARGUMENT


@pytest.mark.parametrize(
    "first",
    [b"", pb.DecodeRequest(step=pb.Step(step=1)), pb.DecodeRequest(residual_codes=pb.ResidualCodes(step=1))],
    ids=["empty", "step", "residual codes"],
)
def test_a_first_message_that_is_not_open(edge: RawEdge, first: pb.DecodeRequest | bytes) -> None:
    end = edge.hello_refused(first)
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
    end = edge.hello_refused(edge.hello(protocol_version=version))
    assert end.code is Code.FAILED_PRECONDITION
    assert f"protocol version {version}" in end.message and "update" in end.message


@pytest.mark.parametrize("digest", [b"", b"\1" * 32, b"\1" * 3_000])
def test_an_unknown_plan(edge: RawEdge, digest: bytes) -> None:
    unknown = pb.Fingerprint()
    unknown.CopyFrom(edge.offers["r8"].fingerprint)
    unknown.plan = digest
    end = edge.hello_refused(edge.hello(fingerprint=unknown))
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
    end = edge.hello_refused(edge.hello(fingerprint=other))
    assert end.code is Code.FAILED_PRECONDITION
    assert "fingerprint mismatch" in end.message and named in end.message
    for part, name in {"lowrank": "A/B", "layers": "backbone", "edge": "edge parts"}.items():
        assert (name in end.message.split(":")[0]) == (part in changed)


def test_a_root_of_other_branches_is_refused(edge: RawEdge) -> None:
    other = pb.Fingerprint()
    other.CopyFrom(edge.offers["r8"].fingerprint)
    other.root = b"\2" * 32
    end = edge.hello_refused(edge.hello(fingerprint=other))
    assert end.code is Code.INVALID_ARGUMENT and "root" in end.message


@pytest.mark.parametrize("dtype", [pb.DTYPE_UNSPECIFIED, 17])
def test_an_unknown_wire_dtype(edge: RawEdge, dtype: int) -> None:
    end = edge.hello_refused(edge.hello(wire_dtype=dtype))
    assert end.code is Code.INVALID_ARGUMENT and "float32" in end.message
