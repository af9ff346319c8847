"""Memory of tuning in the cloud: what a real server's peak rises by, against `tuning_bytes`.

A fresh server for every size. Its resident memory is read when the edge has shaken hands; the kernel's
peak is set back, batches are tuned, and the peak is read again. The rise is divided by what the formula
says. Linux only: it reads and resets the peak in /proc.

    python -m benchmarks.tune_memory
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.processes import CloudProcess, memory_bytes
from benchmarks.tune_edge import Load, TuningEdge
from cloud_server.config.tuning import TuningConfig
from cloud_server.tuning_memory import tuning_bytes
from edge_client.model import PrivateLoraForCausalLM
from shared.models import DEFAULT_MODEL, resolve

ROW = 128  # tokens
# (tokens, with checkpointing): by the formula from about 500 MB up
SIZES = ((640, False), (1024, False), (1536, False), (2048, False), (4608, True))


def reset_peak(pid: int) -> None:
    """Set the kernel's peak of a process back to what it holds now."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def measured(model: str, tokens: int, checkpointing: bool, batches: int) -> dict[str, Any]:
    """Return one size's figures (MB are 10^6 bytes)."""
    longest, load = ROW, Load((ROW,) * (tokens // ROW), 8)
    settings = {"MAX_BYTES": 8 << 30, "CHECKPOINTING": checkpointing}
    environment = {f"PRIVATELORA_CLOUD_TUNING__{name}": str(value) for name, value in settings.items()}
    with (
        CloudProcess(model, env=environment) as cloud,
        PrivateLoraForCausalLM.from_cloud(cloud.address) as split,
    ):
        edge = TuningEdge(split)
        edge.learner.micro_batch_tokens = load.tokens
        formula = tuning_bytes(
            resolve(model).geometry,
            edge.plan,
            load.tokens,
            torch.float32,
            checkpointing,
            longest=longest,
            piece_tokens=TuningConfig().piece_tokens,
            side_by_side=torch.get_num_threads(),  # the cloud's are the machine's too
        )
        before, _ = memory_bytes(cloud.pid)
        rises = []
        for _ in range(batches):
            reset_peak(cloud.pid)
            edge.step(load.examples(edge.vocab))
            rises.append(memory_bytes(cloud.pid)[1] - before)
        edge.close()
        after, _ = memory_bytes(cloud.pid)
    return {
        "tokens": load.tokens,
        "checkpointing": checkpointing,
        "before_mb": round(before / 1e6),
        "formula_mb": round(formula / 1e6),
        "rise_mb": [round(rise / 1e6) for rise in rises],
        "ratio": [round(rise / formula, 3) for rise in rises],
        "left_mb": round((after - before) / 1e6),
    }


def main() -> None:
    """Run the benchmark and print its figures as one JSON line last."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--batches", type=int, default=2, help="of each size, one after another")
    parser.add_argument("--only", type=int, nargs="*", help="sizes (tokens); all by default")
    arguments = parser.parse_args()
    figures = []
    for tokens, checkpointing in SIZES:
        if arguments.only and tokens not in arguments.only:
            continue
        figures.append(measured(arguments.model, tokens, checkpointing, arguments.batches))
        print(json.dumps(figures[-1]), flush=True)
    ratios = [ratio for found in figures for ratio in found["ratio"]]
    print(json.dumps({"sizes": figures, "lowest": min(ratios), "highest": max(ratios)}))


if __name__ == "__main__":
    main()
