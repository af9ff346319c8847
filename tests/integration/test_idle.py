"""A cloud with little patience: sessions and tuning runs whose edge says nothing are cut off."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import grpc
import pytest

from benchmarks.processes import CloudProcess
from shared.pb.privatelora.v1 import private_lora_pb2 as pb
from tests.families import build, tokenizer
from tests.integration.raw_edge import RawEdge, RawStream
from tests.integration.raw_tune import RawTune
from tests.integration.served import TINY_PLANS

Code = grpc.StatusCode
T = TypeVar("T")


@pytest.fixture
def impatient(tmp_path: Path) -> Iterator[CloudProcess]:
    """Serve with five seconds of patience, and hold dropped sessions for one."""
    build("llama").save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    arguments = ["--grace-period-s", "1", "--cache-dir", str(tmp_path / "cache"), "--plan", TINY_PLANS[0]]
    environment = {"PRIVATELORA_CLOUD_IDLE_TIMEOUT_S": "5", "PRIVATELORA_CLOUD_TUNING__IDLE_TIMEOUT_S": "5"}
    with CloudProcess(
        str(tmp_path / "model"), arguments=[*arguments, "--threads", "1"], env=environment,
        log=tmp_path / "log",
    ) as process:  # fmt: skip
        yield process
    assert "Traceback" not in process.logs()


def in_time(act: Callable[[], T]) -> T:
    """Return what comes of talking to a cloud, which may find that too slow: then it is done again."""
    while True:
        try:
            return act()
        except grpc.RpcError as error:
            assert error.code() is Code.DEADLINE_EXCEEDED, error


def test_an_edge_that_says_nothing_is_cut_off_and_its_memory_freed(impatient: CloudProcess) -> None:
    with RawEdge(impatient.address) as edge:

        def ran() -> RawStream:
            stream = edge.open()
            stream.run([(0, 0, 40, 1)])  # and says nothing any more
            return stream

        def asked() -> RawStream:
            stream = edge.open()
            stream.step([(0, 0, 8, 1)])
            assert stream.receive().HasField("codes")  # and never answers them
            return stream

        silent, waiting = in_time(ran), in_time(asked)
        end = silent.refused()
        assert end.code is Code.DEADLINE_EXCEEDED and "said nothing for 5 s" in end.message, end
        end = waiting.refused()
        assert end.code is Code.DEADLINE_EXCEEDED and "said nothing for 5 s" in end.message, end
        assert edge.settled(), "the KV cache of a session that was cut off is held for ever"
        in_time(lambda: ran().finish())  # the cloud serves on

        with RawTune(edge, "r8", pb.DTYPE_FLOAT32).open() as silent_run:
            silent_run.begin([3])
            end = silent_run.refused()
            assert end.code is Code.DEADLINE_EXCEEDED and "said nothing for 5 seconds" in end.message, end
