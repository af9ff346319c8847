"""Two processes whose tensors travel as int8: the same tokens each time, the formula's bytes, refusals."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from edge_client import cli
from edge_client.model import PrivateLoraForCausalLM
from edge_client.wire_cost import wire_cost
from shared.adapter import Adapter
from shared.pb.privatelora.v1 import private_lora_pb2 as pb
from shared.plan import Plan
from shared.wire_dtypes import WireDtypes
from tests.families import prompts
from tests.integration.raw_edge import RawEdge
from tests.integration.served import Served

NEW_TOKENS = 24
PROMPT = torch.tensor(prompts(1))


@pytest.fixture(scope="module")
def open_edge(tiny_cloud: Served, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("edge")

    def edge(**dtypes: str) -> PrivateLoraForCausalLM:
        folders: dict[str, Path] = {"config_dir": folder / "pins", "cache_dir": folder / "cache"}
        edge = PrivateLoraForCausalLM.from_cloud(tiny_cloud.address, plan="r8", **folders, **dtypes)
        empty = edge.adapter
        edge.set_adapter(Adapter.random(empty.plan, empty.fingerprint, seed=0, std=0.5))
        return edge

    return edge


def answers(edge: PrivateLoraForCausalLM, tokens: int = NEW_TOKENS) -> list[int]:
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    return edge.generate(PROMPT, **options)[0].tolist()


@pytest.mark.parametrize(
    "dtypes",
    [
        {"wire_dtype": "int8"},
        {"residual_codes_wire_dtype": "int8", "hidden_wire_dtype": "bfloat16"},
        {"wire_dtype": "int4", "hidden_wire_dtype": "int8"},
    ],
    ids=["all", "some", "int4"],
)
def test_a_session_of_rounded_tensors(open_edge: Any, dtypes: dict[str, str]) -> None:
    found, spent = [], []
    for _ in range(2):  # two sessions, and what the second says costs what the first did
        with open_edge(**dtypes) as edge:
            before = edge.traffic()
            found.append(answers(edge))
            spent.append(edge.traffic() - before)
            longer = edge.traffic()
            answers(edge, 2 * NEW_TOKENS)
            more, again = edge.traffic() - longer, answers(edge)
            assert again == found[0]
            cost = wire_cost(edge.adapter.plan, edge.wire_dtypes)
    assert found[0] == found[1] and spent[0] == spent[1]
    # The cloud holds the first answer's positions but its last: what is longer was sent one by one.
    steps = more.round_trips // cost.round_trips
    assert more.bytes_up == pytest.approx(steps * cost.up, rel=0.08)  # sizes below 128 take a byte less
    assert more.bytes_down == pytest.approx(steps * cost.down, rel=0.08)


def test_int8_is_near_and_not_the_same(open_edge: Any) -> None:
    logits = []
    for dtype in ("float32", "int8"):
        with open_edge(wire_dtype=dtype) as edge, torch.no_grad():
            logits.append(edge(PROMPT).logits[0])
    spread, apart = logits[0].std(), (logits[1] - logits[0]).square().mean().sqrt()
    assert 0 < apart < 0.2 * spread


def test_the_command_line_asks_for_what_the_settings_say(
    tiny_cloud: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRIVATELORA_CONFIG_DIR", str(tmp_path / "config"))
    settings = tmp_path / "mine.toml"
    settings.write_text('hidden_wire_dtype = "int8"\nresidual_codes_wire_dtype = "int8"\n')
    flags = ["--cloud", tiny_cloud.address, "--cache-dir", str(tmp_path / "cache"), "--plan", "r8"]
    flags += ["--config", str(settings), "--wire-dtype", "float16", "--json", "--raw", "--temperature", "0"]
    flags += ["--draft-tokens", "0", "--max-new-tokens", "20", "--prompt", "What travels?"]
    result = CliRunner().invoke(cli.app, ["generate", *flags])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    with tiny_cloud.raw() as raw:
        plan = Plan.parse(raw.offers["r8"].plan_json)
    cost = wire_cost(plan, WireDtypes.named("float16", hidden="int8", residual_codes="int8"))
    assert found["bytes_up_per_token"] == pytest.approx(cost.up, rel=0.08)
    assert found["bytes_down_per_token"] == pytest.approx(cost.down, rel=0.08)
    assert found["full_bytes_per_token"] == 2 * (48 + 4) * 4  # four layers, both ways


# --- by hand ------------------------------------------------------------------------------------------------


@pytest.fixture
def eights(edge: RawEdge) -> Iterator[Any]:
    """Return a stream on which everything is int8."""
    with edge.open(wire_dtype=pb.DTYPE_INT8) as stream:
        yield stream


def ones(rows: int, width: int, *scales: float, value: int = 1) -> pb.Tensor:
    raw = np.array(scales, "<f4").tobytes()
    data = bytes([value]) * (rows * width)
    return pb.Tensor(dtype=pb.DTYPE_INT8, shape=[rows, width], data=data, scales=raw)


def test_scales_are_one_a_row_and_for_codes_one_a_group(eights: Any) -> None:
    eights.step(((0, 0, 2, 2),), ones(2, 48, 0.5, 0.25))
    for layer in eights.plan.exchange_layers:
        codes = eights.receive().codes
        assert (codes.layer, codes.codes.dtype, list(codes.codes.shape)) == (layer, pb.DTYPE_INT8, [2, 24])
        scales = np.frombuffer(codes.codes.scales, "<f4")
        groups = np.abs(np.frombuffer(codes.codes.data, np.int8).reshape(6, 8))
        assert scales.shape == (6,) and (scales > 0).all() and (groups.max(axis=1) == 127).all()
        eights.answer(layer, ones(2, 24, *[1e-3] * 6))
    hidden = eights.receive().hidden.hidden
    assert len(hidden.data) == 96 and np.frombuffer(hidden.scales, "<f4").shape == (2,)


@pytest.mark.parametrize("scales", [[], [1], [1, -1], [1, float("nan")], [1, 3e36], [1] * 500], ids=str)
def test_scales_that_cannot_be(eights: Any, scales: list[float]) -> None:
    eights.step(((0, 0, 2, 1),), ones(2, 48, *scales))
    end = eights.refused()
    assert end.code is grpc.StatusCode.INVALID_ARGUMENT and end.message.startswith("hidden: ")


def test_int8_that_was_not_agreed(edge: RawEdge) -> None:
    with edge.open(codes_dtype=pb.DTYPE_INT8) as stream:
        stream.step(((0, 0, 1, 1),))
        assert stream.receive().codes.codes.dtype == pb.DTYPE_INT8
        stream.answer(0, ones(1, 24, 1, 1, 1))
        end = stream.refused()
    assert end.code is grpc.StatusCode.INVALID_ARGUMENT
    assert "residual codes of layer 0: dtype is int8, this session agreed on float32" in end.message


@pytest.mark.parametrize("kind", ["hidden_dtype", "codes_dtype", "residual_codes_dtype"])
def test_a_kind_in_an_unknown_dtype(edge: RawEdge, kind: str) -> None:
    end = edge.hello_refused(edge.hello(**{kind: 17}))
    assert end.code is grpc.StatusCode.INVALID_ARGUMENT
    assert end.message.startswith(f"{kind.replace('_', ' ')} must be one of") and "int8" in end.message


def test_an_overflow_reaches_only_its_own_edge(eights: Any) -> None:
    """The bystander's tokens stay right; what is not finite comes as a scale that no edge takes."""
    eights.step(((0, 0, 1, 1),), ones(1, 48, 2.6e36, value=127))
    for layer in eights.plan.exchange_layers:
        eights.receive()
        eights.answer(layer, ones(1, 24, *[2.6e36] * 3, value=127))
    hidden = eights.receive().hidden.hidden
    assert hidden.dtype == pb.DTYPE_INT8 and not np.isfinite(np.frombuffer(hidden.scales, "<f4")).any()
