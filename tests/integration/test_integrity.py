"""A cloud with another B, as real processes: refused when it says so, and harmful when it lies."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks import integrity_clouds
from benchmarks.adapters import random_adapter
from benchmarks.integrity_bench import Subject
from benchmarks.integrity_clouds import CLOUDS, asked, cache_with, over_wire, serve
from benchmarks.perturbation import Change
from benchmarks.quality import Scores
from benchmarks.tuning_learner import Example
from edge_client.model import PrivateLoraForCausalLM
from shared import lowrank
from shared.models import resolve
from shared.plan import Plan
from tests.families import build, prompts
from tests.integration.served import Served

EXAMPLES = [Example(tuple(ids), 3) for ids in prompts(3)]
CHANGE = Change("B", 1.0)


@pytest.fixture(scope="module")
def met(tiny_cloud: Served, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what an edge with an adapter for the tiny cloud's plan meets at each kind of cloud."""
    folder = tmp_path_factory.mktemp("integrity")
    adapter = random_adapter(tiny_cloud.address, folder / "me.safetensors", seed=1, std=0.5)
    model = str(tiny_cloud.folder)
    checkpoint = resolve(model, progress=False)
    right = lowrank.ensure(adapter.plan, checkpoint, tiny_cloud.cache_dir)
    subject = Subject(build("llama"), checkpoint.geometry, adapter.plan, right[0], adapter.matrices)
    out: dict[str, Any] = {"plan": adapter.plan, "reference": subject}
    for kind in CLOUDS:
        target, pins = folder / kind, folder / f"{kind}-pins"
        target.mkdir()
        cache = cache_with(
            kind, target, adapter.plan, checkpoint.geometry, right, CHANGE, tiny_cloud.cache_dir
        )
        with serve(model, adapter.plan, cache, "--threads", "1", "--kv-bytes", str(16 << 20)) as cloud:
            out[kind] = asked(cloud.address, folder / "me.safetensors", pins, folder / "edge")
            if out[kind]["status"] == 0:
                with PrivateLoraForCausalLM.from_cloud(
                    cloud.address, adapter, wire_dtype="float32", cache_dir=folder / "edge", config_dir=pins
                ) as edge:
                    out[f"{kind} scores"] = over_wire(edge, EXAMPLES, ())
    return out


def test_another_b_is_refused_before_anything_is_sent_and_the_message_says_what_differs(met):
    refused = met["changed"]
    assert refused["status"] == 1 and refused["messages_sent"] == 0
    assert "does not fit HOST:PORT: A/B differ from what it was made for" in refused["refusal"]
    assert "use a cloud that serves that model" in refused["refusal"]


def test_the_right_b_is_used_and_is_what_the_reference_computes(met):
    assert met["honest"]["status"] == 0 and met["honest"]["messages_sent"] > 0
    subject: Subject = met["reference"]
    expected = subject.scores(EXAMPLES, (), None)
    assert met["honest scores"].nats == pytest.approx(expected.nats, rel=1e-4)


def test_a_cloud_that_lies_is_not_found_out_and_does_what_the_reference_says(met):
    assert met["lying"]["status"] == 0 and met["lying"]["messages_sent"] > 0
    subject: Subject = met["reference"]
    honest, lying = met["honest scores"], met["lying scores"]
    assert isinstance(honest, Scores) and isinstance(lying, Scores)
    assert lying.nats == pytest.approx(subject.scores(EXAMPLES, (), CHANGE).nats, rel=1e-4)
    assert abs(lying.nats - honest.nats) > 0.01 * honest.nats


def test_the_plan_survives_the_command_line(met, tiny_cloud: Served):
    plan: Plan = met["plan"]
    with tiny_cloud.raw() as raw:
        assert Plan.parse(raw.offers[plan.name].plan_json) == plan
    assert '"name": "r8"' in integrity_clouds.plan_argument(plan)


def test_only_the_changed_clouds_have_another_file(met, tiny_cloud: Served, tmp_path: Path):
    plan: Plan = met["plan"]
    checkpoint = resolve(str(tiny_cloud.folder), progress=False)
    right = lowrank.ensure(plan, checkpoint, tiny_cloud.cache_dir)
    before = right[1].read_bytes()
    for kind in CLOUDS:
        target = tmp_path / kind
        target.mkdir()
        cache_with(kind, target, plan, checkpoint.geometry, right, CHANGE, tiny_cloud.cache_dir)
        same = (target / "lowrank" / right[1].name).read_bytes() == before
        assert same == (kind == "honest")
    assert right[1].read_bytes() == before
