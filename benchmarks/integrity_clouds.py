"""Real clouds with another B: one that says so, which the edge refuses, and one that lies, which it cannot.

Three cloud processes, each behind a recording relay, so that what was sent is counted and not claimed:

honest   the A and B that the adapter was tuned with.
changed  another B in its file, and so another fingerprint in what it states.
lying    that same B, under the fingerprint of the right one. Nothing in the code had to be changed for it:
         a cloud remembers digests of its files, and who runs it can edit that memory.
"""

import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F

from benchmarks import quality
from benchmarks.capture import Relay
from benchmarks.integrity_bench import Experiment
from benchmarks.perturbation import Change, changed
from benchmarks.processes import CloudProcess, run_edge
from benchmarks.quality import Scores
from benchmarks.tuning_learner import Example
from edge_client.model import PrivateLoraForCausalLM
from shared import fingerprint
from shared.cache import cache_folder
from shared.families import Geometry
from shared.lowrank import LowRank
from shared.plan import Plan

Cloud = Literal["honest", "changed", "lying"]
CLOUDS: tuple[Cloud, ...] = ("honest", "changed", "lying")
OWN_FOLDERS = ("lowrank", "digests")  # of the cache: what a cloud with another B has of its own
PROMPT, NEW_TOKENS = "What is the capital of France?", "4"


def plan_argument(plan: Plan) -> str:
    """Return ``plan`` as ``privatelora-cloud serve --plan`` takes it; for plans that adapt every layer."""
    fields = plan.model_dump(include={"name", "r_c2d", "r_d2c", "layout", "initialiser", "scale"})
    return json.dumps(fields)


def cache_with(
    kind: Cloud, target: Path, plan: Plan, geometry: Geometry, right: tuple[LowRank, Path], change: Change,
    cache_dir: Path | None = None,
) -> Path:  # fmt: skip
    """Fill ``target`` with a cache folder for a cloud of this kind, and return it.

    Parameters
    ----------
    kind, target
        The cloud, and an empty folder.
    plan, geometry, right
        The split, the sizes of its model, its A and B and their file.
    change
        What a cloud that is not honest has in their place.
    cache_dir
        The cache that has the model; everything else in it is linked, not copied.
    """
    for entry in cache_folder(cache_dir).iterdir():
        if entry.is_dir() and entry.name not in OWN_FOLDERS:
            (target / entry.name).symlink_to(entry.resolve(), target_is_directory=True)
    (target / "lowrank").mkdir()
    path = target / "lowrank" / right[1].name
    shutil.copyfile(right[1], path)
    if kind == "honest":
        return target
    if kind == "lying":
        fingerprint.lowrank_digest(path, target)  # of the right file; remembered
    changed(right[0], plan, geometry, change).save(path)
    if kind == "lying":
        (memory,) = (target / "digests").iterdir()
        stored, now = json.loads(memory.read_text()), path.stat()
        stored["state"] = [now.st_size, now.st_mtime_ns, now.st_ctime_ns, now.st_ino]
        memory.write_text(json.dumps(stored))
    return target


def over_wire(edge: PrivateLoraForCausalLM, examples: Sequence[Example], labels: Sequence[int]) -> Scores:
    """Score an edge's model as `benchmarks.quality.evaluate` does, one row at a time."""
    nats: list[float] = []
    choices, correct, tokens = torch.tensor(labels, dtype=torch.int64), 0, 0
    for example in examples:
        ids = torch.tensor([example.ids[:-1]])
        targets = torch.tensor(example.ids[-example.answer :])
        logits = edge(ids, logits_to_keep=example.answer, use_cache=False).logits[0].float()
        nats.append(float(F.cross_entropy(logits, targets, reduction="sum")))
        tokens += example.answer
        if labels:
            correct += int((choices[logits[:, choices].argmax(dim=1)] == targets).sum())
    return quality.summary(nats, tokens, correct if labels else None)


def asked(address: str, adapter: Path, pins: Path, cache_dir: Path | None = None) -> dict[str, Any]:
    """Let the edge's command line ask a cloud one question, and return what came of it and what was sent.

    Parameters
    ----------
    address, adapter
        The cloud and the personal weights.
    pins, cache_dir
        Where this edge keeps its pins, and its parts of the model.
    """
    with Relay(address) as relay:
        done = run_edge(
            *("generate", "--cloud", relay.address, "--adapter", str(adapter), "--prompt", PROMPT),
            *("--max-new-tokens", NEW_TOKENS),
            env={"PRIVATELORA_CONFIG_DIR": str(pins), "PRIVATELORA_CACHE_DIR": str(cache_folder(cache_dir))},
        )
        said = done.stderr.strip() if done.returncode else ""
        return {
            "status": done.returncode,
            "messages_sent": len(relay.recording.up),
            "refusal": " ".join(said.replace(relay.address, "HOST:PORT").split()),
        }


def serve(model: str, plan: Plan, cache: Path, *arguments: str) -> CloudProcess:
    """Return a cloud, not started, that offers ``plan`` alone and has the cache folder ``cache``."""
    own = ["--plan", plan_argument(plan), "--cache-dir", str(cache), *arguments]
    return CloudProcess(model, "float32", own)


def show(experiment: Experiment) -> dict[str, Any]:
    """Start the three clouds one after the other; return what an edge with the adapter meets at each."""
    o, geometry = experiment.options, experiment.checkpoint.geometry
    adapter = experiment.adapter()
    change = Change("B", o.amount)
    test = experiment.test(o.rows)
    out: dict[str, Any] = {"rows": len(test), "change": asdict(change), "clouds": {}}
    for kind in CLOUDS:
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            pins, target = Path(folder) / "pins", Path(folder) / "cache"
            target.mkdir()
            cache = cache_with(kind, target, experiment.plan, geometry, experiment.factors, change)
            with serve(o.model, experiment.plan, cache) as cloud:
                result = asked(cloud.address, experiment.path, pins)
                if result["status"] == 0:
                    with PrivateLoraForCausalLM.from_cloud(
                        cloud.address, adapter, wire_dtype="float32", config_dir=pins
                    ) as edge:
                        scored = over_wire(edge, test, experiment.labels)
                    result |= {"nats": scored.nats, "correct": scored.correct}
        out["clouds"][kind] = result
        print(f"{kind:<8} {result} ({time.monotonic() - started:.0f} s)", flush=True)
    # The same rows on the reference: what `integrity run` simulates is what the two processes do.
    subject = experiment.subject(adapter)
    for name, made in (("as tuned", None), (str(change), change)):
        out[f"reference, {name}"] = subject.scores(test, experiment.labels, made).nats
        print(f"reference, {name}: {out[f'reference, {name}']:.6f} nats per answer", flush=True)
    return out
