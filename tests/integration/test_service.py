"""What a cloud says about itself and hands out, asked of real processes."""

import hashlib
import json

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from benchmarks.processes import CloudProcess
from shared import PROTOCOL_VERSION, __version__
from shared.fingerprint import Fingerprint, plan_digest
from shared.pb.privatelora.v1 import private_lora_pb2 as pb
from shared.plan import Plan
from tests.families import tokenizer
from tests.integration.raw_edge import RawEdge
from tests.integration.served import Served

Code = grpc.StatusCode
SERVICE = "privatelora.v1.PrivateLoraService"


@pytest.fixture(scope="module")
def edge(tiny_cloud: Served):
    with tiny_cloud.raw() as raw:
        assert raw.settled()
        yield raw
        raw.end_all()


def test_describe(edge: RawEdge, tiny_cloud: Served) -> None:
    said = edge.describe(pb.DescribeRequest(protocol_version=PROTOCOL_VERSION).SerializeToString())
    assert said.protocol_version == PROTOCOL_VERSION and said.server_version == __version__
    assert said.compute_dtype == pb.DTYPE_FLOAT32
    assert said.kv_bytes_used == 0 and 15 << 20 < said.kv_bytes_total <= 16 << 20
    limits = said.limits
    assert (limits.max_context_tokens, limits.max_step_tokens, limits.max_rows) == (512, 512, 64)
    assert limits.max_steps_in_flight == 8 and limits.grace_period_ms == 30_000
    plans = [Plan.parse(offer.plan_json) for offer in said.plans]
    assert [plan.name for plan in plans] == ["r8", "fused"]
    assert plans[1].exchange_layers == (1, 3) and plans[1].layout == "fused" and plans[1].r_d2c == 9
    for plan, offer in zip(plans, said.plans, strict=True):
        assert offer.plan_json == plan.canonical_json()
        f = offer.fingerprint
        assert f.plan == plan_digest(plan)
        assert all(len(part) == 32 for part in (f.root, f.plan, f.lowrank, f.layers, f.edge))
        assert Fingerprint(plan=f.plan, lowrank=f.lowrank, layers=f.layers, edge=f.edge).root == f.root
    one, two = (offer.fingerprint for offer in said.plans)
    assert (one.layers, one.edge) == (two.layers, two.edge) and one.lowrank != two.lowrank


def test_describe_tells_the_bytes_in_use(edge: RawEdge) -> None:
    block = 2 * 4 * 16 * 4 * 32  # k and v, four layers, two heads of 8, float32, 32 positions
    with edge.open() as stream:
        stream.run([(0, 0, 33, 1)])
        assert edge.kv_used == 2 * block
        stream.run([(0, 10, 1, 1)])
        assert edge.kv_used == block
        stream.finish()
    assert edge.settled()


def test_edge_parts_are_what_their_digests_say(edge: RawEdge) -> None:
    parts = edge.describe().edge_parts
    names = {part.name for part in parts}
    assert {"config.json", "tokenizer.json"} <= names
    for index, part in enumerate(parts):
        assert "/" not in part.name and "\\" not in part.name
        data = b"".join(edge.fetch(index))
        assert len(data) == part.size_bytes and hashlib.sha256(data).digest() == part.sha256
        if part.name == "tokenizer.json":
            assert json.loads(data)["model"]["vocab"] == tokenizer().get_vocab()
        assert b"layers.0" not in data[:10_000], "decoder layers are none of an edge's business"


def test_a_transfer_can_be_resumed_anywhere(edge: RawEdge) -> None:
    parts = edge.describe().edge_parts
    index = max(range(len(parts)), key=lambda i: parts[i].size_bytes)
    whole = b"".join(edge.fetch(index))
    for offset in (0, 1, len(whole) // 2, len(whole) - 1, len(whole)):
        assert b"".join(edge.fetch(index, offset)) == whole[offset:]


@pytest.mark.parametrize(
    ("index", "offset", "words"),
    [(99, 0, "part 99 does not exist"), (2**32 - 1, 0, "does not exist"), (0, 2**64 - 1, "beyond the")],
)
def test_a_part_that_is_not_there(edge: RawEdge, index: int, offset: int, words: str) -> None:
    with pytest.raises(grpc.RpcError, match=words) as error:
        list(edge.fetch(index, offset))
    assert error.value.code() is Code.INVALID_ARGUMENT


def test_a_transfer_that_is_broken_off_harms_nobody(edge: RawEdge) -> None:
    pieces = edge.fetch(0)
    next(pieces)
    pieces.close()
    assert list(edge.fetch(0))


def test_an_unknown_method_is_unimplemented(edge: RawEdge) -> None:
    with pytest.raises(grpc.RpcError) as error:
        edge.channel.unary_unary(f"/{SERVICE}/Tokens")(b"", timeout=10)
    assert error.value.code() is Code.UNIMPLEMENTED


@pytest.mark.parametrize("name", ["", SERVICE])
def test_health(edge: RawEdge, name: str) -> None:
    reply = health_pb2_grpc.HealthStub(edge.channel).Check(
        health_pb2.HealthCheckRequest(service=name), timeout=10
    )
    assert reply.status == health_pb2.HealthCheckResponse.SERVING


def test_health_of_something_else_is_not_found(edge: RawEdge) -> None:
    with pytest.raises(grpc.RpcError) as error:
        health_pb2_grpc.HealthStub(edge.channel).Check(
            health_pb2.HealthCheckRequest(service="another.Service"), timeout=10
        )
    assert error.value.code() is Code.NOT_FOUND


def test_reflection_lists_and_describes_the_service(edge: RawEdge) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(edge.channel)
    requests = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE),
    ]
    listed, described = stub.ServerReflectionInfo(iter(requests), timeout=10)
    assert {SERVICE, "grpc.health.v1.Health"} <= {s.name for s in listed.list_services_response.service}
    assert any(b"DecodeRequest" in file for file in described.file_descriptor_response.file_descriptor_proto)


def test_the_log_tells_nothing_that_was_sent(edge: RawEdge, tiny_cloud: Served) -> None:
    stream = edge.open()
    stream.run([(0, 0, 4, 1)], [[1.2345] * 48] * 4)
    stream.send(b"a secret that is no message")
    stream.refused()
    log = tiny_cloud.process.logs()
    assert "1.2345" not in log and "secret" not in log


@pytest.mark.model
def test_the_packaged_model_is_described(packaged_cloud: CloudProcess) -> None:
    with RawEdge(packaged_cloud.address) as edge:
        said = edge.describe()
        plan = Plan.parse(said.plans[0].plan_json)
        assert (plan.num_layers, plan.hidden_size) == (30, 576)
        assert said.limits.max_context_tokens > 1000
        step_bytes = said.limits.max_step_tokens * 4 * max(plan.hidden_size, plan.codes_width)
        assert step_bytes < 4 << 20, "a full step must fit a gRPC message"
        stream = edge.open(plan.name)
        hidden = stream.run([(0, 0, 3, 2)])
        assert hidden.shape == (2, 576)
        stream.finish()
        assert edge.settled()
