"""What a cloud refuses before it fetches or loads a model, in words that say what to do."""

import asyncio
import socket
import sys
from importlib.metadata import version
from typing import Any

import pytest
import tiny_checkpoint as tiny
from typer.testing import CliRunner

from cloud_server import cli
from cloud_server.config.cloud import CloudConfig
from cloud_server.config.plans import PlanConfig, plan_config
from cloud_server.server import plan_of, serve
from edge_client import cli as edge_cli
from shared.checkpoint import open_folder
from shared.plan import EDGE_SHARE, Plan

NOWHERE = "no such model"  # looked for only after all else was found in order


def start(**settings: Any) -> None:
    asyncio.run(serve(CloudConfig(model=NOWHERE, **settings), lambda address, service: None))


def test_a_taken_port_is_found_before_the_model_is_looked_for():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(OSError, match=f"cannot listen on {listen}: the port is taken"):
            start(listen=listen)


@pytest.mark.parametrize(
    ("setting", "what"), [("metrics", "cannot serve metrics on"), ("health", "cannot answer probes on")]
)
def test_other_taken_ports_are_found_as_early(setting, what):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(OSError, match=f"{what} {address}: the port is taken"):
            start(listen="127.0.0.1:0", **{setting: address})


def test_one_port_has_one_purpose():
    with pytest.raises(ValueError, match="--listen and --health are both 127.0.0.1:5: give each a port"):
        start(listen="127.0.0.1:5", health="127.0.0.1:5")
    with pytest.raises(ValueError, match=NOWHERE):
        start(listen="127.0.0.1:0", health="127.0.0.1:0", metrics="off")


@pytest.mark.parametrize("device", ["cuda:99", "abacus"])
def test_a_device_that_is_not_there_is_found_before_the_model_is_looked_for(device):
    with pytest.raises(ValueError, match=f"cannot compute on device '{device}': "):
        start(device=device)


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "localhost:0", "[::1]:0", "0.0.0.0:0"])
def test_a_free_address_is_not_in_the_way(listen):
    with pytest.raises(ValueError, match=NOWHERE):
        start(listen=listen, allow_plaintext=True, allow_anonymous=True)


@pytest.mark.parametrize("address", ["127.0.0.1:65536", "127.0.0.1:99999", "127.0.0.1", "127.0.0.1:http", ""])
@pytest.mark.parametrize("setting", ["listen", "health"])
def test_a_port_that_is_none_is_refused_and_not_taken_modulo_65536(setting, address):
    told = CliRunner().invoke(cli.app, ["serve", f"--{setting}", address, "--model", NOWHERE])
    assert told.exit_code == 2 and f"setting {setting}: " in told.stderr and "HOST:PORT" in told.stderr


@pytest.mark.parametrize(
    "address", ["b.example:0", "b.example:65536", "b.example", "https://b.example:1", ""]
)
def test_a_successor_that_no_edge_could_follow_is_refused_at_the_start(address):
    told = CliRunner().invoke(cli.app, ["serve", "--successor", address, "--model", NOWHERE])
    assert told.exit_code == 2 and "setting successor: must be HOST:PORT with a port of 1 to" in told.stderr
    assert CloudConfig(successor="b.example:50051").successor and CloudConfig(successor="[::1]:1").successor


def test_who_was_cut_off_is_told_by_the_status_alone(monkeypatch):
    def stopped_at_once(settings: CloudConfig) -> None:
        raise cli.typer.Exit(1)

    monkeypatch.setattr(cli, "_run", stopped_at_once)
    told = CliRunner().invoke(cli.app, ["serve"])
    assert told.exit_code == 1 and "error" not in told.output


def test_more_threads_than_any_machine_has_are_refused():
    told = CliRunner().invoke(cli.app, ["serve", "--threads", "1000000", "--model", NOWHERE])
    assert told.exit_code == 2 and "setting threads: " in told.stderr


def test_an_environment_with_the_edge_only_is_told_what_it_lacks(monkeypatch):
    monkeypatch.setitem(sys.modules, "cloud_server.server", None)  # as where an extra's package is missing
    result = CliRunner().invoke(cli.app, ["serve"])
    assert result.exit_code == 1 and ".[cloud]" in result.stderr and "Traceback" not in result.output


def test_a_plan_is_named_or_described():
    assert plan_config("per-layer") == PlanConfig() and plan_config("one-trip").one_trip
    assert plan_config(' {"name": "small", "r_c2d": 16}').r_c2d == 16
    with pytest.raises(ValueError, match="no plan is called 'pre-layer'; give per-layer or one-trip"):
        plan_config("pre-layer")
    told = CliRunner().invoke(cli.app, ["serve", "--plan", "pre-layer"])
    assert told.exit_code == 1 and "no plan is called 'pre-layer'" in told.output


def test_the_plan_of_one_trip_follows_the_models_depth(tmp_path):
    checkpoint = open_folder(tiny.write(tmp_path / "m", num_hidden_layers=tiny.LAYERS), "tiny")
    plan = plan_of(plan_config("one-trip").model_copy(update={"r_c2d": 4, "r_d2c": 4}), checkpoint)
    assert plan.resident_layers == (0,) and plan.exchange_layers == (1,) and plan.adapted_layers == (1, 2)
    assert plan.round_trips == 1 and {p.name for p in plan.lora} >= {"self_attn.q_proj", "mlp.down_proj"}
    deep = Plan.one_trip(plan.lora, name="deep", backbone="b", num_layers=30, hidden_size=16)
    assert deep.resident_layers == (0, 1, 28, 29) and deep.adapted_layers == tuple(range(2, 28))
    assert len(deep.resident_layers) <= EDGE_SHARE * 30


def test_the_lean_plan_of_one_trip_has_no_layer_behind_the_clouds(tmp_path):
    checkpoint = open_folder(tiny.write(tmp_path / "m", num_hidden_layers=tiny.LAYERS), "tiny")
    plan = plan_of(plan_config("one-trip-lean").model_copy(update={"r_c2d": 4, "r_d2c": 4}), checkpoint)
    assert (plan.head_layers, plan.tail_layers, plan.exchange_layers) == (1, 0, (1,)) and plan.groups == 1
    facts = {"name": "deep", "backbone": "b", "num_layers": 30, "hidden_size": 16}
    deep = Plan.one_trip(plan.lora, tail=False, **facts)
    assert deep.resident_layers == (0, 1, 2, 3) and deep.adapted_layers == tuple(range(4, 30))
    assert deep.round_trips == 1 and deep.returns_gradient


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"one_trip": true, "head_layers": 1, "layers": [1]}', "one_trip fills in layers, head_layers"),
        ('{"edge_tail": false}', "edge_tail is about one_trip"),
    ],
)
def test_a_plan_that_is_told_twice_is_refused(text, said):
    with pytest.raises(ValueError, match=said):
        plan_config(text)


@pytest.mark.parametrize("app", [cli.app, edge_cli.app])
def test_the_version_that_is_installed(app):
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.output.strip() == version("privatelora")


def test_a_plan_in_json_says_how_many_layers_share(tmp_path):
    checkpoint = open_folder(tiny.write(tmp_path / "m", num_hidden_layers=tiny.LAYERS), "tiny")
    text = '{"name": "s", "one_trip": true, "share_residual_codes": 2, "r_c2d": 4, "r_d2c": 3}'
    plan = plan_of(plan_config(text), checkpoint)
    assert plan.adapted_layers == (1, 2) and plan.owners == (1,) and plan.served_by(1) == (1, 2)
    shape = '"layers": [0, 1, 2], "exchange_layers": [0, 2], "r_c2d": 4, "r_d2c": 3'
    grouped = f'{{"name": "g", {shape}, "share_residual_codes": 3}}'
    assert plan_of(plan_config(grouped), checkpoint).owners == (0, 2)
    with pytest.raises(ValueError, match="share_residual_codes"):
        plan_config('{"name": "s", "share_residual_codes": 0}')
