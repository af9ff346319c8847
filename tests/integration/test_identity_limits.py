"""What one identity may use of a cloud: beyond its share it is refused with a hint, and only it."""

import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from cloud_server import tokens
from shared.pb.privatelora.v1 import private_lora_pb2 as pb
from tests.integration.raw_tune import RawTune
from tests.integration.secured import Secured, certificates, started
from tests.waiting import until

Code = grpc.StatusCode


@pytest.fixture(scope="module")
def limited(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    """Let each identity have two sessions, four KV blocks, 20 tokens/s saved up for five seconds, one run."""
    certs = certificates(tmp_path_factory.mktemp("limited"))
    file = certs / "tokens.json"
    known = {name: tokens.add(file, name) for name in ("alice", "bob", "carol")}
    block = 2 * 4 * 16 * 4 * 32  # k and v, four layers, two heads of 8, float32, 32 positions
    bounds = {"MAX_SESSIONS": 2, "MAX_KV_BYTES": 4 * block, "MAX_TUNING_STREAMS": 1}
    bounds |= {"MAX_TOKENS_PER_S": 20, "BURST_S": 5, "MAX_WAIT_S": 0.2}
    env = {f"PRIVATELORA_CLOUD_PER_IDENTITY__{name}": str(value) for name, value in bounds.items()}
    secured = started(small_model, certs, "--tokens", str(file), **env)
    secured.tokens, secured.known = file, known
    with secured.process:
        yield secured


def hint_s(end: object) -> float:
    assert end.code is Code.RESOURCE_EXHAUSTED and "your share" in end.message, end
    return int(end.trailers["retry-after-ms"]) / 1000


def held(limited: Secured) -> int:
    """Return how many sessions were held so far because their stream was lost."""
    return limited.process.logs().count("held to be resumed")


def test_sessions_of_an_identity(limited: Secured) -> None:
    with limited.raw("alice") as alice, limited.raw("bob") as bob:
        one, two = alice.open(), alice.open()
        assert hint_s(alice.hello_refused(alice.hello())) > 0
        bob.open().finish()  # whoever else comes is not concerned
        before = held(limited)
        one.drop()
        until(lambda: held(limited) > before)
        three = alice.open()  # a dropped session of one's own makes room
        for stream in (two, three):
            stream.finish()


def test_kv_bytes_of_an_identity(limited: Secured) -> None:
    with limited.raw("alice") as alice, limited.raw("bob") as bob:
        one, two = alice.open(), alice.open()
        one.run([(0, 0, 33, 1)])
        two.run([(0, 0, 33, 1)])
        before = held(limited)
        two.step([(0, 33, 32, 1)])
        assert hint_s(two.refused()) > 0
        until(lambda: held(limited) > before)
        with bob.open() as other:
            other.run([(0, 0, 33, 1)])
            other.finish()
        one.run([(0, 33, 32, 1)])  # two was dropped: it makes room
        one.finish()
        assert alice.settled()


def test_tuning_runs_of_an_identity(limited: Secured) -> None:
    with limited.raw("alice") as alice, limited.raw("bob") as bob:
        with RawTune(alice, "r8", pb.DTYPE_FLOAT32).open() as one:
            two = RawTune(alice, "r8", pb.DTYPE_FLOAT32)
            two.send(two.hello())
            assert hint_s(two.refused()) > 0
            RawTune(bob, "r8", pb.DTYPE_FLOAT32).open().finish()
            one.finish()
        RawTune(alice, "r8", pb.DTYPE_FLOAT32).open().finish()


def test_tokens_a_second_of_an_identity(limited: Secured) -> None:
    with limited.raw("carol") as carol, limited.raw("bob") as bob:  # carol has spent nothing yet
        stream = carol.open()
        stream.run([(0, 0, 103, 1)])
        stream.run([(0, 103, 5, 1)])  # a little too fast is slowed at most
        # However long those took, 120 are more than can be saved up, and what comes next is far too fast.
        for _ in range(4):
            stream.step([(0, 0, 120, 1)])
        hint = hint_s(stream.refused())
        assert 0 < hint <= 6.5  # (103 + 5 + 120 - 100) / 20
        other = bob.open()
        other.run([(0, 0, 60, 1)])  # whoever else comes is not concerned
        other.finish()
        time.sleep(hint)
        again = carol.resumed(stream)
        again.number = stream.number
        again.run([(0, 0, 1, 1)])
        again.finish()
        assert carol.settled()
