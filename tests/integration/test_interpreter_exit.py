"""A program that ends without closing its model leaves nothing behind in the cloud."""

import subprocess
import sys

from benchmarks.processes import ROOT, child_environment
from tests.integration.served import Served
from tests.waiting import until

PROGRAM = """
import sys
import torch
from edge_client.model import PrivateLoraForCausalLM

model = PrivateLoraForCausalLM.from_cloud(sys.argv[1])
kept = model(torch.tensor([[5, 6, 7]]))  # and in it the cache
sys.exit(3)
"""


def test_a_model_that_nobody_closed_ends_its_session_in_order(tiny_cloud: Served) -> None:
    before = len(tiny_cloud.process.logs())
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, tiny_cloud.address],
        cwd=ROOT, env=child_environment(), capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (3, "")

    def log() -> str:
        return tiny_cloud.process.logs()[before:]

    until(lambda: "closed: ended" in log() or "lost its stream" in log())
    assert "lost its stream" not in log()
