"""A cloud with another B, as real processes: refused when it says so, and harmful when it lies."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from benchmarks.adapters import random_adapter
from benchmarks.integrity_bench import Subject
from benchmarks.integrity_clouds import CLOUDS, Cloud, asked, cache_with, over_wire, serve
from benchmarks.perturbation import Change
from benchmarks.processes import CloudProcess
from benchmarks.quality import Scores
from benchmarks.tuning_learner import Example
from edge_client.model import PrivateLoraForCausalLM
from shared import lowrank
from shared.adapter import Adapter
from shared.lowrank import LowRank
from shared.models import resolve
from tests.families import build, prompts
from tests.integration.served import Served

EXAMPLES = [Example(tuple(ids), 3) for ids in prompts(3)]
CHANGE = Change("B", 1.0)


@dataclass(frozen=True)
class Met:
    """An edge with an adapter, and what it meets at a cloud with another B."""

    adapter: Adapter
    right: tuple[LowRank, Path]
    subject: Subject
    refused: dict[str, Any]
    honest: Scores
    lying: Scores


@pytest.fixture(scope="module")
def met(tiny_cloud: Served, tmp_path_factory: pytest.TempPathFactory) -> Met:
    folder = tmp_path_factory.mktemp("integrity")
    path, edge_cache = folder / "me.safetensors", folder / "edge"
    adapter = random_adapter(tiny_cloud.address, path, seed=1, std=0.5)
    model, cache_dir = str(tiny_cloud.folder), tiny_cloud.cache_dir
    checkpoint = resolve(model, progress=False)
    right = lowrank.ensure(adapter.plan, checkpoint, cache_dir)

    def cloud(kind: Cloud) -> CloudProcess:
        (folder / kind).mkdir()
        geometry = checkpoint.geometry
        cache = cache_with(kind, folder / kind, adapter.plan, geometry, right, CHANGE, cache_dir)
        return serve(model, adapter.plan, cache, "--threads", "1", "--kv-bytes", str(16 << 20))

    def scores(address: str) -> Scores:
        options = {"cache_dir": edge_cache, "config_dir": folder / "pins"}
        with PrivateLoraForCausalLM.from_cloud(address, adapter, wire_dtype="float32", **options) as edge:
            return over_wire(edge, EXAMPLES, ())

    honest = scores(tiny_cloud.address)
    with cloud("changed") as process:
        refused = asked(process.address, path, folder / "pins", edge_cache)
    with cloud("lying") as process:
        lying = scores(process.address)
    subject = Subject(build("llama"), checkpoint.geometry, adapter.plan, right[0], adapter.matrices)
    return Met(adapter, right, subject, refused, honest, lying)


def test_another_b_is_refused_before_anything_is_sent_and_the_message_says_what_differs(met: Met):
    assert met.refused["status"] == 1 and met.refused["messages_sent"] == 0
    assert "does not fit HOST:PORT: A/B differ from what it was made for" in met.refused["refusal"]
    assert "use a cloud that serves that model" in met.refused["refusal"]


def test_the_right_b_does_what_the_reference_says(met: Met):
    assert met.honest.nats == pytest.approx(met.subject.scores(EXAMPLES, (), None).nats, rel=1e-4)


def test_a_cloud_that_lies_is_not_found_out_and_does_what_the_reference_says(met: Met):
    assert met.lying.nats == pytest.approx(met.subject.scores(EXAMPLES, (), CHANGE).nats, rel=1e-4)
    assert abs(met.lying.nats - met.honest.nats) > 0.01 * met.honest.nats


def test_only_clouds_that_are_not_honest_have_another_file(met: Met, tiny_cloud: Served, tmp_path: Path):
    plan, path = met.adapter.plan, met.right[1]
    before = path.read_bytes()
    for kind in CLOUDS:
        (tmp_path / kind).mkdir()
        cache_with(kind, tmp_path / kind, plan, met.subject.geometry, met.right, CHANGE, tiny_cloud.cache_dir)
        same = (tmp_path / kind / "lowrank" / path.name).read_bytes() == before
        assert same == (kind == "honest")
    assert path.read_bytes() == before
