"""``privatelora-edge plan`` against a real cloud: what it leaves there, fetches and says."""

import time
from pathlib import Path

import pytest

from benchmarks.plan_accuracy import plan_of
from benchmarks.processes import edge_json, run_edge
from edge_client.planning.predict import Setting
from edge_client.wire_cost import wire_cost
from shared.plan import Plan
from shared.wire_dtypes import WireDtypes
from tests.integration.served import Served

TRIPS = {"r8": 4, "fused": 3}  # of a step: the edge makes the codes of layer 0, where r8 exchanges first


def test_every_offered_plan_is_predicted(tiny_cloud: Served, tmp_path: Path) -> None:
    began = time.perf_counter()
    found = edge_json(
        *("plan", "--cloud", tiny_cloud.address, "--cache-dir", str(tmp_path)),
        *("--rtt-ms", "80", "--up-mbit", "60", "--down-mbit", "100"),
    )
    took_s = time.perf_counter() - began
    with tiny_cloud.raw() as edge:
        offers = {name: Plan.parse(offer.plan_json) for name, offer in edge.offers.items()}
        assert edge.settled(), "the sessions that were timed still hold KV"
    predicted = {plan["plan"]: plan for plan in found["plans"] if plan["offered"]}
    assert predicted.keys() == offers.keys() and found["recommended"] in offers
    setting = Setting.model_validate(found["setting"])
    assert setting.link.rtt_s == 0.08, "what was given is what counts"
    measured_s = found["measured_link"]["rtt_s"]  # and what was measured is told beside it
    assert 0 < measured_s < took_s and measured_s != 0.08
    assert setting.cloud.layer.one_s > 0 and setting.edge.head.one_s > 0
    for name, plan in offers.items():
        cost = wire_cost(plan, WireDtypes.named("float32"))
        assert (predicted[name]["bytes_up_per_token"], predicted[name]["bytes_down_per_token"]) == (
            cost.up,
            cost.down,
        )
        # A step's time is the sum of parts that were measured, or follow from the plan and the link.
        step = predicted[name]["step"]
        assert step["round_trips"] == TRIPS[name] and step["latency_s"] == pytest.approx(TRIPS[name] * 0.08)
        assert step["transfer_s"] == pytest.approx(8 * cost.up / 60e6 + 8 * cost.down / 100e6)
        assert step["cloud_s"] == pytest.approx(4 * setting.cloud.layer.one_s)
        parts = [value for part, value in step.items() if part.endswith("_s")]
        assert len(parts) == 5 and min(parts) > 0
        assert predicted[name]["decode_tok_s"] == pytest.approx(1 / sum(parts))
        assert predicted[name]["quality"] == "not measured"
    assert any(not plan["offered"] for plan in found["plans"])
    fetched = {path.name for path in (tmp_path / "edge").rglob("*.json")}
    assert fetched == {"config.json"} and not list(tmp_path.rglob("*.safetensors"))


def test_what_info_prints_of_a_plan_is_that_plan(tiny_cloud: Served) -> None:
    """As the benchmark that checks predictions reads it."""
    found = [plan_of(facts) for facts in edge_json("info", "--cloud", tiny_cloud.address)["plans"]]
    with tiny_cloud.raw() as edge:
        assert found == [Plan.parse(offer.plan_json) for offer in edge.offers.values()]


def test_people_are_told_what_was_measured(tiny_cloud: Served, tmp_path: Path) -> None:
    done = run_edge("plan", "--cloud", tiny_cloud.address, "--cache-dir", str(tmp_path), "--link", "5g")
    assert done.returncode == 0, done.stderr
    for said in ("over 5g: 20 ms round trip, 60 Mbit/s up, 100 Mbit/s down", "recommended: ", "not measured"):
        assert said in done.stdout
    assert "r8" in done.stdout and "Traceback" not in done.stderr


@pytest.mark.parametrize("words", [("--prompt-tokens", "1000000"), ("--context", "1000000")])
def test_what_the_cloud_would_refuse_is_not_predicted(
    tiny_cloud: Served, tmp_path: Path, words: tuple[str, str]
) -> None:
    done = run_edge("plan", "--cloud", tiny_cloud.address, "--cache-dir", str(tmp_path), *words)
    assert done.returncode != 0 and not done.stdout
    assert f"{words[0]} 1000000: this cloud takes at most" in done.stderr and "Traceback" not in done.stderr
