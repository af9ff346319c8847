"""A cloud with hardly any memory: refusals with a hint, eviction, and an edge that does not read."""

from collections.abc import Callable, Iterator

import grpc
import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from benchmarks.processes import CloudProcess
from shared.pb.privatelora.v1 import private_lora_pb2 as pb
from tests.families import COMMON, tokenizer
from tests.integration.raw_edge import RawEdge, RawStream
from tests.integration.served import TINY_PLANS, WIDE, WIDE_BLOCK_BYTES, WIDE_BLOCKS, Served
from tests.waiting import until

Code = grpc.StatusCode
HIDDEN, WIDTH = 48, 24  # of the tiny model and its plan r8
UINT32 = 2**32 - 1


# --- a cloud with hardly any memory -----------------------------------------------------------------------

Serve = Callable[[str, float], CloudProcess]


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Serve:
    """Return what makes clouds that have little room, and patience with everything but that."""
    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    config = CONFIG_MAPPING["llama"](**COMMON | WIDE | {"num_key_value_heads": 1})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    arguments = ["--grace-period-s", "3600", "--kv-bytes", str(WIDE_BLOCKS * WIDE_BLOCK_BYTES)]
    arguments += ["--cache-dir", str(folder / "cache"), "--plan", TINY_PLANS[0], "--threads", "1"]

    def made(name: str, max_wait_s: float) -> CloudProcess:
        environment = {"PRIVATELORA_CLOUD_CLAIM_IDLE_S": "3600"}
        environment["PRIVATELORA_CLOUD_QUEUE__MAX_WAIT_S"] = str(max_wait_s)
        return CloudProcess(str(folder), arguments=arguments, env=environment, log=folder / f"log-{name}")

    return made


@pytest.fixture
def hasty(serve: Serve) -> Iterator[RawEdge]:
    """Serve who does not fit with a refusal soon."""
    with serve("hasty", 1) as process:
        with RawEdge(process.address) as raw:
            yield raw
        assert "Traceback" not in process.logs()


@pytest.fixture(scope="module")
def roomless(serve: Serve) -> Iterator[CloudProcess]:
    """Serve, and let who does not fit wait for longer than a test may take to make room."""
    with serve("roomless", 600) as process:
        yield process


@pytest.fixture
def patient(roomless: CloudProcess) -> Iterator[RawEdge]:
    with RawEdge(roomless.address) as raw:
        yield raw
    assert "Traceback" not in roomless.logs()


def fill(edge: RawEdge, positions: int) -> RawStream:
    """Return a session that holds so many positions, and claims no more."""
    stream = edge.open(claim=pb.KvClaim(rows=1, row_tokens=positions))
    stream.step([(0, 0, positions, 1)], known=stream.zeros(positions))
    assert stream.receive().HasField("hidden")
    return stream


def until_one_waits(edge: RawEdge) -> None:
    until(lambda: edge.describe().load.waiting == 1)


def test_a_full_cache_is_refused_with_a_hint(hasty: RawEdge) -> None:
    total = hasty.describe().kv_bytes_total
    assert total == WIDE_BLOCKS * WIDE_BLOCK_BYTES
    assert hasty.kv_used == 0
    holders = [fill(hasty, 512) for _ in range(8)]
    assert hasty.kv_used == total
    newcomer = hasty.stream()
    newcomer.send(hasty.hello(claim=pb.KvClaim(rows=1, row_tokens=1)))
    end = newcomer.refused()
    assert end.code is Code.RESOURCE_EXHAUSTED
    assert "KV cache is full" in end.message and "try again" in end.message
    assert "no room for 1 seconds" in end.message  # it waited, as somebody may go
    assert int(end.trailers["retry-after-ms"]) > 0
    unsaid = hasty.open(claim=pb.KvClaim())  # who claims nothing is let in, and gets what is left
    unsaid.step([(0, 0, 1, 1)])
    end = unsaid.refused()
    assert end.code is Code.RESOURCE_EXHAUSTED and int(end.trailers["retry-after-ms"]) > 0
    for holder in holders:  # who was there goes on
        assert holder.run([(0, 511, 1, 1)]).shape == (1, 1024)
    holders.pop().finish()
    fill(hasty, 512).finish()
    for holder in holders:
        holder.finish()
    assert hasty.settled()


def test_who_waits_is_let_in_when_there_is_room(patient: RawEdge) -> None:
    """And what was claimed and is not used yet is nobody else's; `Describe` tells of it in totals."""
    total, before = patient.describe().kv_bytes_total, patient.describe().load.sessions
    holders = [fill(patient, 512) for _ in range(7)]
    idle = patient.open()  # claims what it may come to need, a whole row, and uses nothing
    load = patient.describe().load
    assert (load.kv_bytes_claimed, load.sessions - before, load.waiting) == (total, 8, 0)
    late = patient.stream()
    late.plan = idle.plan
    late.send(patient.hello(claim=pb.KvClaim(rows=1, row_tokens=64)))
    until_one_waits(patient)
    holders.pop().finish()
    late.opened = late.receive().opened
    assert late.run([(0, 0, 64, 1)], known=late.zeros(64)).shape == (1, 1024)
    growing = patient.open(claim=pb.KvClaim(rows=1, row_tokens=32))
    grown = pb.KvClaim(rows=1, row_tokens=512)
    growing.step([(0, 0, 1, 1)], known=growing.zeros(1), claim=grown)  # 512 are not there: 96 are taken
    until_one_waits(patient)
    late.finish()
    assert growing.receive().HasField("hidden")
    for start in range(0, 512, 128):
        idle.run([(0, start, 128, 1)], known=idle.zeros(128))
    for stream in (*holders, idle, growing):
        stream.finish()
    assert patient.settled() and patient.describe().load.kv_bytes_claimed == 0


def test_dropped_sessions_make_room_oldest_first(patient: RawEdge) -> None:
    sessions = [fill(patient, 512) for _ in range(8)]
    for stream in sessions[:2]:
        stream.drop()
    again = patient.resumed(sessions[1])  # picked up: no longer dropped
    again.number = sessions[1].number
    newcomer = fill(patient, 100)
    end = patient.hello_refused(patient.hello(session_id=sessions[0].opened.session_id))
    assert end.code is Code.NOT_FOUND, "the oldest dropped session should have been evicted"
    assert again.run([(0, 511, 1, 1)]).shape == (1, 1024)
    for stream in (again, newcomer, *sessions[2:]):
        stream.finish()
    assert patient.settled()


def test_eviction_in_the_middle_of_a_rearranged_step(patient: RawEdge, roomless: CloudProcess) -> None:
    """Room is made after the rows were rearranged: they must not be rearranged twice."""
    h0 = np.random.default_rng(3).normal(size=(70, 1024))
    beams = patient.open(claim=pb.KvClaim(rows=2, row_tokens=34))
    alone = [beams.run([(0, 0, 33, 33)], h0[:33])[-1]]
    beams.run([(1, 0, 33, 1)], h0[33:66])
    expected = beams.run([(0, 33, 1, 1)], h0[69:70])  # row 0 goes on
    dropped = [fill(patient, 512) for _ in range(7)]
    dropped.append(fill(patient, 12 * 32))  # with 2 + 2 blocks above, all 128 are taken
    assert patient.kv_used == patient.describe().kv_bytes_total

    def lost() -> int:
        return roomless.logs().count("lost its stream")

    before = lost()
    for stream in dropped:
        stream.drop()
    until(lambda: lost() >= before + len(dropped))
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
    until(lambda: "read nothing for 2" in cramped_cloud.process.logs())  # not reading
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
