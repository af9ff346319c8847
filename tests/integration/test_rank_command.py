"""``privatelora-edge rank`` between two real processes: its figures, its advice, what it leaves behind."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.processes import edge_json, run_edge
from cloud_server.config.plans import plan_config
from cloud_server.server import plan_of
from edge_client.wire_cost import wire_cost
from shared.adapter import Adapter
from shared.models import resolve
from shared.plan import Plan
from shared.wire_dtypes import WireDtypes
from tests.integration.served import Served

SECRET = "Xylophon"
SHORT = ("--steps", "4", "--batch-size", "4", "--lr", "0.02", "--validation", "0.3")


class Home:
    """The folders of an edge, and its data."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.data = folder, folder / "letters.jsonl"
        rows = [{"prompt": f"{SECRET} {n}: ", "completion": f"{n * n % 7} it is"} for n in range(20)]
        self.data.write_text("\n".join(map(json.dumps, rows)))
        self.env = {f"PRIVATELORA_{kind}_DIR": str(folder / kind) for kind in ("CONFIG", "DATA", "CACHE")}
        self.env["PRIVATELORA_EDGE_THREADS"] = "1"

    def arguments(self, served: Served, *more: str) -> tuple[str, ...]:
        return ("rank", "--cloud", served.address, "--data", str(self.data), *SHORT, *more)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


def offers(served: Served) -> dict[str, Plan]:
    with served.raw() as edge:
        return {name: Plan.parse(offer.plan_json) for name, offer in edge.offers.items()}


def test_layers_and_plans_are_ranked_and_nothing_stays(tiny_cloud: Served, home: Home) -> None:
    found = edge_json(*home.arguments(tiny_cloud, "--round-trips", "2"), env=home.env)
    plans = offers(tiny_cloud)
    assert found["layers_of"] == "r8", "the plan that adapts most"
    assert {row["plan"] for row in found["plans"]} == plans.keys() and not found["left_out"]
    for row in found["plans"]:
        cost = wire_cost(plans[row["plan"]], WireDtypes.named("float32"))
        assert (row["bytes_up_per_token"], row["bytes_down_per_token"]) == (cost.up, cost.down)
        gained = found["untuned_nats_per_token"] - row["loss_nats_per_token"]
        assert row["gain_nats_per_token"] == pytest.approx(gained, abs=1e-9) and row["gain_error"] > 0
    after = [row["loss_nats_per_token"] for row in found["plans"]]
    assert after == sorted(after) and max(after) < found["untuned_nats_per_token"]
    worths = [row["worth_nats_per_token"] for row in found["layers"]]
    assert sorted(row["layer"] for row in found["layers"]) == [0, 1, 2, 3]
    assert worths == sorted(worths, reverse=True) and all(row["gradient_norm"] > 0 for row in found["layers"])
    assert found["held_out_rows"] == 6

    best = found["recommended"]
    made = plan_of(
        plan_config(json.dumps(best["serve_plan"])), resolve(str(tiny_cloud.folder), progress=False)
    )
    assert made.round_trips == best["round_trips_per_token"] <= 2
    assert list(made.adapted_layers) == best["layers"] and made.name not in plans

    left = {path.name for path in home.folder.rglob("*") if path.is_file()}
    assert not {name for name in left if name.endswith((".safetensors", ".png"))} - edge_parts(home)
    assert not (home.folder / "DATA").exists()
    assert SECRET not in tiny_cloud.process.logs() and SECRET not in json.dumps(found)


def edge_parts(home: Home) -> set[str]:
    return {path.name for path in (home.folder / "CACHE").rglob("*")}


def test_the_layers_of_an_adapter(tiny_cloud: Served, home: Home) -> None:
    """The layer that was emptied is worth nothing, in a run that tunes nothing."""
    tuned = ("tune", "--cloud", tiny_cloud.address, "--data", str(home.data), "--name", "me", *SHORT)
    edge_json(*tuned, "--plan", "r8", "--steps", "12", env=home.env)
    path = home.folder / "DATA" / "adapters" / "me.safetensors"
    adapter = Adapter.load(path)
    adapter.matrices[2].zero_()
    adapter.save(path)
    found: dict[str, Any] = edge_json(
        *home.arguments(tiny_cloud, "--adapter", "me", "--layers-only"), env=home.env
    )
    assert found["weights"] == "adapter me" and found["plans"] == []
    (empty,) = (row for row in found["layers"] if row["layer"] == 2)
    assert empty["worth_nats_per_token"] == 0 and not empty["worth_beyond_chance"]
    assert empty["gradient_norm"] > 0, "it could have learned"
    assert found["layers_nats_per_token"] < found["untuned_nats_per_token"]
    assert 2 not in found["recommended"]["layers"]


def test_people_are_told_what_to_do(tiny_cloud: Served, home: Home) -> None:
    done = run_edge(*home.arguments(tiny_cloud), "--plan", "fused", "--round-trips", "2", env=home.env)
    assert done.returncode == 0, done.stderr
    for said in (
        "layers of plan fused",
        "judged on 6 rows held out",
        "trips",
        "± is one standard error",
    ):
        assert said in done.stdout
    assert "privatelora-cloud serve --plan '{" in done.stdout, done.stdout
    assert SECRET not in done.stdout + done.stderr and "Traceback" not in done.stderr
    refused = run_edge(*home.arguments(tiny_cloud), "--plan", "other", env=home.env)
    assert refused.returncode == 1 and "offers no plan 'other'" in refused.stderr
