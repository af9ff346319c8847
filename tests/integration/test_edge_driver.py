"""The benchmarks' edge as a process: it answers one request after another, and takes steps again."""

from typing import Any

import pytest

from benchmarks.edge_drivers import Driver
from benchmarks.link import Link, Preset
from benchmarks.processes import ProcessError
from tests.families import prompts
from tests.integration.served import Served

pytestmark = pytest.mark.alone

PROMPT = prompts(1)[0]
NEAR = Preset(name="near", rtt_ms=10, up_mbit_s=50, down_mbit_s=50)


def words(address: str) -> list[str]:
    return ["--cloud", address, "--plan", "r8", "--threads", "1"]


def counts(answer: dict[str, Any]) -> list[list[int]]:
    return [step[:2] for step in answer["steps"]]


def test_steps_over_a_link_are_taken_again_beside_the_cloud(tiny_cloud: Served) -> None:
    port = tiny_cloud.process.port
    with (
        Link(NEAR, "proxy", check=False) as link,
        Driver(words(link.address(port))) as over,
        Driver(words(tiny_cloud.address)) as beside,
    ):
        asked = {"ids": PROMPT, "tokens": 24, "draft_tokens": 6}
        answer = over.ask("answer", **asked)
        again = beside.ask("answer", **asked, again=answer)
        assert (again["tokens"], counts(again)) == (answer["tokens"], counts(answer))
        assert answer["round_trips"] == 4 * len(answer["steps"])  # layer 0 needs none, the step one
        assert sum(step[2] for step in answer["steps"]) >= 0.010 * answer["round_trips"]
        # A prompt that was just answered is sent whole again: nothing of it is reused.
        once_more = over.ask("answer", **asked)
        assert once_more["tokens"] == answer["tokens"] and once_more["steal"] >= 0


def test_a_prompt_travels_in_the_chunks_that_are_asked_for(tiny_cloud: Served) -> None:
    with Driver(words(tiny_cloud.address)) as edge:
        about = edge.ask("about")
        assert (about["layers"], about["round_trips"], about["resident"]) == (4, 4, False)
        assert about["hidden_bytes"] == 48 * 4
        prompt, found = (PROMPT * 9)[:64], {}
        for chunk, in_flight in ((64, 1), (64, 8), (16, 8), (16, 1)):
            edge.ask("limit", chunk=chunk, in_flight=in_flight)
            edge.ask("first", ids=prompt[1:5])
            found[chunk, in_flight] = edge.ask("first", ids=prompt)
        assert len({one["token"] for one in found.values()}) == 1
        assert found[16, 8]["bytes_up"] == found[16, 1]["bytes_up"] > found[64, 1]["bytes_up"]
        assert found[64, 8]["bytes_up"] == found[64, 1]["bytes_up"] > 64 * about["hidden_bytes"]


def test_an_edge_that_ends_is_an_error() -> None:
    with pytest.raises(ProcessError, match="status"), Driver(["--cloud", "127.0.0.1:1", "--plan", "r8"]):
        pytest.fail("it should not have been entered")
