"""Tuning speed: the split run against PEFT LoRA in one process, same rows and cores, in turn.

One process is the driver: it holds the edge and, for comparison, the whole model with PEFT's LoRA (r = 16,
alpha = 32, q/k/v of all layers). The other is the cloud. Both tune on the same rows with the loss on the
same positions, a step at a time, alternating; a step is loss, gradients, clipping and AdamW. Figures are
tokens/s of steps' medians, and their ratio.

The reference is spared what it does not need: its head runs on positions with loss only, and rows of
one length are a batch without padding and without a mask. Where rows differ in length, it takes them in
groups of like length, padded by a twentieth at most.

    python -m benchmarks.tune_speed --rounds 5
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.processes import CloudProcess
from benchmarks.tune_edge import CLIP, RATE, Load, TuningEdge
from benchmarks.tuning_learner import base_model, lora
from edge_client.model import PrivateLoraForCausalLM
from edge_client.tuning.examples import IGNORED, Example
from shared.models import DEFAULT_MODEL, resolve

RANK, ALPHA = 16, 32
PADDING = 0.05  # most of a group of the reference's


def ragged(count: int, low: int, high: int) -> tuple[int, ...]:
    """Return lengths between ``low`` and ``high``, the same on every machine."""
    drawn = torch.randint(low, high, (count,), generator=torch.Generator().manual_seed(3))
    return tuple(int(length) for length in drawn)


# Texts of up to 60 words with a short answer, as in `benchmarks.tuning`; chats; the former as they come.
LOADS = {
    "short": Load((96,) * 16, 8),
    "long": Load((256,) * 8, 64),
    "ragged": Load(ragged(16, 40, 140), 8),
}


class Local:
    """PEFT's LoRA on the whole model in this process."""

    def __init__(self, checkpoint: Any) -> None:
        self.model = base_model(checkpoint, "cpu")
        self.parameters = lora(self.model, RANK, ALPHA, seed=0).parameters
        self.begin()

    def begin(self) -> None:
        """Forget what was learned."""
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if "lora_B" in name:
                    parameter.zero_()
        self.optimiser = torch.optim.AdamW(self.parameters, lr=RATE, weight_decay=0.0)

    def step(self, groups: Sequence[Sequence[Example]]) -> float:
        """Tune one step and return the loss (nats)."""
        total = sum(example.targets for group in groups for example in group)
        self.optimiser.zero_grad(set_to_none=True)
        summed = 0.0
        for group in groups:
            ids, labels = side_by_side(group)
            decoder: Any = self.model.get_submodule("model")
            hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state
            learned = labels != IGNORED
            logits: Tensor = self.model.get_submodule("lm_head")(hidden[learned])  # (targets, vocabulary)
            loss = F.cross_entropy(logits, labels[learned], reduction="sum") / total
            loss.backward()  # type: ignore[no-untyped-call]
            summed += float(loss.detach())
        nn.utils.clip_grad_norm_(self.parameters, CLIP)
        self.optimiser.step()
        return summed


def side_by_side(group: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Return ids and labels ``(rows, longest - 1)``, padded on the right, where causality hides it."""
    longest = max(len(example.ids) for example in group) - 1
    ids = torch.zeros(len(group), longest, dtype=torch.int64)
    labels = torch.full_like(ids, IGNORED)
    for row, example in enumerate(group):
        ids[row, : len(example.ids) - 1] = example.ids[:-1]
        labels[row, : len(example.ids) - 1] = example.labels[1:]
    return ids, labels


def grouped(examples: Sequence[Example]) -> list[list[Example]]:
    """Return the rows in groups of like length, so that little of a group is padding."""
    groups: list[list[Example]] = []
    for example in sorted(examples, key=lambda example: len(example.ids)):
        trial = [*(groups[-1] if groups else []), example]
        room = (len(example.ids) - 1) * len(trial)
        if groups and 1 - sum(len(e.ids) - 1 for e in trial) / room <= PADDING:
            groups[-1] = trial
        else:
            groups.append([example])
    return groups


class Watch:
    """Wall time and both processes' CPU time of what runs inside ``with`` (seconds)."""

    def __init__(self, cloud: int) -> None:
        self._cloud, self._edge = psutil.Process(cloud), psutil.Process()
        self.wall: list[float] = []
        self.cloud: list[float] = []
        self.edge: list[float] = []

    def __enter__(self) -> None:
        self._begun = (time.perf_counter(), *map(_cpu_s, (self._cloud, self._edge)))

    def __exit__(self, *_: object) -> None:
        ended = (time.perf_counter(), *map(_cpu_s, (self._cloud, self._edge)))
        for kept, begin, end in zip((self.wall, self.cloud, self.edge), self._begun, ended, strict=True):
            kept.append(end - begin)


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def measured(load: Load, rounds: int, split: TuningEdge, local: Local, cloud: int) -> dict[str, Any]:
    """Return one load's figures."""
    examples = load.examples(split.vocab)
    groups = grouped(examples)
    ours, theirs = Watch(cloud), Watch(cloud)
    split.begin()
    local.begin()
    first = split.step(examples)[0], local.step(groups)  # the base model's loss, by both
    if abs(first[0] - first[1]) > 1e-4 * first[1]:
        raise RuntimeError(f"the two do not tune on the same: their first losses are {first}")
    for _ in range(rounds):
        with ours:
            split.step(examples)
        with theirs:
            local.step(groups)
        print(f"  split {ours.wall[-1]:.2f} s, lora {theirs.wall[-1]:.2f} s", flush=True)
    ratios = sorted(b / a for a, b in zip(ours.wall, theirs.wall, strict=True))
    fast, plain = (load.tokens / statistics.median(watch.wall) for watch in (ours, theirs))
    return {
        "tokens": load.tokens,
        "targets": load.answer * len(load.lengths),
        "reference_groups": len(groups),
        "first_losses": [round(loss, 5) for loss in first],
        "split": round(fast, 1),
        "lora": round(plain, 1),
        "ratio": round(fast / plain, 3),
        "pairs": [round(ratio, 3) for ratio in (ratios[0], ratios[-1])],
        "cores_busy": {
            "split_cloud": round(sum(ours.cloud) / sum(ours.wall), 2),
            "split_edge": round(sum(ours.edge) / sum(ours.wall), 2),
            "lora": round(sum(theirs.edge) / sum(theirs.wall), 2),
        },
    }


def main() -> None:
    """Run the benchmark and print its figures as one JSON line last."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--loads", nargs="+", choices=LOADS, default=list(LOADS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--layout", default="per_projection", choices=("per_projection", "fused"))
    parser.add_argument("--wire-dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--set", nargs="*", default=[], help="settings of the cloud's tuning, NAME=VALUE")
    arguments = parser.parse_args()
    environment = dict(setting.split("=", 1) for setting in arguments.set)
    environment = {f"PRIVATELORA_CLOUD_TUNING__{name.upper()}": value for name, value in environment.items()}
    figures: dict[str, Any] = {
        name: getattr(arguments, name) for name in ("rank", "layout", "wire_dtype", "rounds", "set")
    }
    serve = ["--rank", str(arguments.rank), "--layout", arguments.layout]
    with (
        CloudProcess(arguments.model, "float32", serve, env=environment) as cloud,
        PrivateLoraForCausalLM.from_cloud(cloud.address) as model,
    ):
        split, local = TuningEdge(model, arguments.wire_dtype), Local(resolve(arguments.model))
        for name in arguments.loads:
            figures[name] = measured(LOADS[name], arguments.rounds, split, local, cloud.pid)
            print(name, json.dumps(figures[name]), flush=True)
        split.close()
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
