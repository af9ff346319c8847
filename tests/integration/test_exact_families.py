"""Every family over two real processes: what unit tests cannot see is edge parts that came from a cloud."""

from pathlib import Path

import pytest
import torch

from benchmarks.processes import CloudProcess
from edge_client.model import PrivateLoraForCausalLM
from shared import lowrank
from shared.adapter import Adapter
from shared.exactness import compare, continuation, greedy
from shared.models import resolve
from shared.reference import merged
from tests.families import FAMILIES, build, prompts, save


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_over_the_wire(name: str, tmp_path: Path) -> None:
    folder = save(name, tmp_path / "model")
    checkpoint, model = resolve(str(folder), progress=False), build(name)
    plan = '{"name": "uneven", "r_c2d": 7, "r_d2c": 5}'
    arguments = ["--plan", plan, "--threads", "1", "--cache-dir", str(tmp_path / "cloud")]
    folders = {"config_dir": tmp_path / "pins", "cache_dir": tmp_path / "edge"}
    with (
        CloudProcess(str(folder), arguments=[*arguments, "--kv-bytes", str(16 << 20)]) as cloud,
        PrivateLoraForCausalLM.from_cloud(cloud.address, **folders) as edge,
    ):
        empty = edge.adapter
        edge.set_adapter(Adapter.random(empty.plan, empty.fingerprint, seed=0, std=0.5))
        matrices, _ = lowrank.ensure(empty.plan, checkpoint, tmp_path / "cloud")
        mine = merged(model, empty.plan, matrices, edge.adapter.matrices)
        wanted = [greedy(mine, prompt, 12) for prompt in prompts(2)]
        assert not compare(wanted, continuation(model)).exact
        verdict = compare(wanted, continuation(edge))
        assert verdict.exact, str(verdict)
        ids = torch.tensor(prompts(1))
        with torch.no_grad():  # a soft cap on the final logits shows here, not in the order of tokens
            torch.testing.assert_close(edge(ids).logits, mine(ids).logits, rtol=0, atol=3e-4)
