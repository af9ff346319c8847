"""An edge that is stuck is cut off: its memory is freed, and nobody else notices."""

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import torch

from tests.families import save
from tests.integration.answers import answer
from tests.integration.raw_edge import RawEdge, RawStream
from tests.replicas import Fleet, Replica, edge

PATIENCE_S = 600.0  # longer than an honest edge may take on a slow machine; the stuck one's is made to pass


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    threads = torch.get_num_threads()
    made = Fleet(save("llama", tmp_path / "model"), tmp_path, grace_period_s=0.2, answer_timeout_s=PATIENCE_S)
    yield made
    made.close()
    torch.set_num_threads(threads)


def let_pass(cloud: Replica, stream: RawStream, seconds: float) -> None:
    """Let so much time have passed since the edge of a stream was asked and was last heard."""
    session = cloud.service.sessions[stream.opened.session_id]
    session.heard_at -= seconds
    for step in session.steps.values():
        step.emitted_at -= seconds


def test_an_edge_that_owes_residual_codes_is_cut_off_and_its_kv_freed(fleet: Fleet, tmp_path: Path) -> None:
    cloud = fleet.replica()
    said: list[str] = []
    honest = edge(cloud.address, tmp_path, say=said.append)
    expected = answer(honest)
    used = cloud.kv_used
    with RawEdge(cloud.address) as raw:
        stuck = raw.open()
        stuck.run([(0, 0, 40, 1)])
        stuck.step([(0, 40, 3, 1)])
        assert stuck.receive().codes.layer == 0
        assert cloud.kv_used > used
        assert answer(honest) == expected, "while the other one owes an answer"
        let_pass(cloud, stuck, 2 * PATIENCE_S)
        end = stuck.refused()
        assert end.code is grpc.StatusCode.DEADLINE_EXCEEDED, end
        assert "answered nothing for 600 seconds and was cut off; open a new session" in end.message
        assert raw.settled(used), "its keys and values outlive the grace period"
    assert answer(honest) == expected and said == []
    honest.close()
