"""Claim: a cloud recovers the personal weights M by least squares from the pairs (xA, xAM).

Runs a real session with random M between the two processes, with a recording relay between them, then
solves ``codes @ M = residual_codes`` for each adapted layer and group from the recording and public weights
alone: codes that the edge made itself are those of the hidden states that it sent. The true M enters only
when the result is scored. The error is reported by number of tokens seen: with fewer than the rank it is
underdetermined; from as many independent rows as the rank on, it is M up to the wire's precision. In layer 0
a repeated token repeats its row, so that layer takes some more tokens.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from benchmarks.adapters import random_adapter
from benchmarks.capture import Recording, Relay, Rows, rows
from benchmarks.processes import CloudProcess, edge_json
from shared import lowrank
from shared.models import DEFAULT_MODEL, resolve
from shared.plan import Plan

PROMPT = (
    "Write a short letter to the council about the broken street light outside my house, the noise at "
    "night, the missing bins, and the bus that no longer stops. Mention that I have lived here since 1987."
)


def first_codes(recording: Recording, plan: Plan, model: str) -> dict[tuple[int, int, int], Rows]:
    """Return the codes of the cloud's first layer by (stream, step, layer), as the cloud can make them."""
    checkpoint, layer = resolve(model), plan.cloud_layers.start
    public: Any = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32)
    norm, a = public.model.layers[layer].input_layernorm, lowrank.ensure(plan, checkpoint)[0].a[layer]
    with torch.no_grad():
        return {
            (stream, m.step.step, layer): (norm(torch.from_numpy(rows(m.step.hidden))) @ a).numpy()
            for stream, m in recording.requests()
            if m.HasField("step")
        }


def captured_pairs(recording: Recording, plan: Plan, model: str) -> dict[int, tuple[Rows, Rows]]:
    """Return by owner the rows (codes, residual codes), each (tokens, groups * rank)."""
    codes, residual = recording.codes(), recording.residual_codes()
    if plan.first_codes_on_edge:
        codes = first_codes(recording, plan, model) | codes
    pairs = {}
    for layer in plan.owners:
        keys = sorted(key[:2] for key in residual if key[2] == layer)
        source = plan.source_of(layer)
        pairs[layer] = (
            np.concatenate([codes[stream, step, source] for stream, step in keys]),
            np.concatenate([residual[stream, step, layer] for stream, step in keys]),
        )
    return pairs


def recovered(codes: Rows, residual: Rows, plan: Plan) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Return the least-squares M, (groups, r_c2d, r_d2c), from rows of both."""
    tokens = len(codes)
    c = codes.reshape(tokens, plan.groups, plan.r_c2d).astype(np.float64)
    z = residual.reshape(tokens, plan.groups, plan.r_d2c).astype(np.float64)
    return np.stack([np.linalg.lstsq(c[:, g], z[:, g], rcond=None)[0] for g in range(plan.groups)])


def main() -> None:
    """Capture, solve, score, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--dtype", default="float32", help="the cloud's compute dtype, and so the wire's")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--std", type=float, default=0.02, help="standard deviation of the random M")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    with CloudProcess(options.model, options.dtype) as cloud, tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "secret.safetensors"
        secret = random_adapter(cloud.address, path, seed=options.seed, std=options.std)
        with Relay(cloud.address) as relay:
            edge_json(
                *("generate", "--cloud", relay.address, "--adapter", str(path), "--prompt", PROMPT),
                *("--max-new-tokens", str(options.max_new_tokens), "--draft-tokens", "0"),
            )

    plan = secret.plan
    pairs = captured_pairs(relay.recording, plan, options.model)
    available = min(len(codes) for codes, _ in pairs.values())
    rank = plan.r_c2d
    counts = sorted({min(available, n) for n in (rank // 2, rank, rank * 5 // 4, rank * 3 // 2, rank * 2)})
    truth = {layer: matrix.double().numpy() for layer, matrix in secret.matrices.items()}
    print(f"{available} tokens captured, {len(pairs)} layers, rank {rank}")
    print("  tokens   relative error of M: median   worst layer")
    by_tokens = []
    for tokens in counts:
        errors = [
            float(np.linalg.norm(recovered(c[:tokens], z[:tokens], plan) - truth[layer]))
            / float(np.linalg.norm(truth[layer]))
            for layer, (c, z) in pairs.items()
        ]
        by_tokens.append({"tokens": tokens, "median": float(np.median(errors)), "worst": max(errors)})
        print(f"  {tokens:6d}   {np.median(errors):28.2e}   {max(errors):11.2e}")
    figures = {
        "benchmark": "recover_m",
        "model": options.model,
        "dtype": options.dtype,
        "plan": plan.name,
        "r_c2d": plan.r_c2d,
        "r_d2c": plan.r_d2c,
        "relative_error": by_tokens,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
