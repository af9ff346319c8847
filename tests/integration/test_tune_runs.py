"""Tuning runs between two real processes: the reference's gradients, and that no kill changes a bit."""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch

from benchmarks.processes import ROOT, CloudProcess, child_environment, edge_command, edge_json, run_edge
from edge_client.model import PrivateLoraForCausalLM
from edge_client.offer import fingerprint_message
from edge_client.tuning.checkpoint import load_checkpoint
from edge_client.tuning.learner import Learner, embedding
from edge_client.tuning.loss import Head
from shared import lowrank
from shared.adapter import Adapter
from shared.models import resolve
from shared.pb.privatelora.v1 import private_lora_pb2 as pb
from shared.reference import Reference
from tests.families import build, tokenizer
from tests.integration.served import TINY_PLANS, Served
from tests.plans import matrices_for
from tests.tuning import InDouble
from tests.unit.tuning_fake import direct_loss, examples
from tests.waiting import until

STEPS = 20
PATIENCE_S = 600.0  # with what must come about; it takes seconds
SETTINGS = (
    *("--plan", "r8", "--steps", str(STEPS), "--batch-size", "4", "--lr", "0.02", "--validate-every", "4"),
    *("--patience", "0", "--checkpoint-every", "2", "--validation", "0.2"),
)
Matrices = dict[int, torch.Tensor]


@dataclass(frozen=True)
class Tuning:
    """A cloud that a test may kill, and the folders of its edges."""

    process: CloudProcess
    home: Path

    @property
    def env(self) -> dict[str, str]:
        folders = {kind: str(self.home / kind.lower()) for kind in ("CONFIG", "DATA", "CACHE")}
        # one thread, so that the machine's other work does not slow this down
        return {f"PRIVATELORA_{k}_DIR": v for k, v in folders.items()} | {"PRIVATELORA_EDGE_THREADS": "1"}

    @property
    def data(self) -> Path:
        file = self.home / "data.jsonl"
        if not file.exists():
            rows = [{"prompt": f"say {n}: ", "completion": f"{n * n % 7} it is"} for n in range(24)]
            file.write_text("\n".join(map(json.dumps, rows)))
        return file

    def arguments(self, name: str, cloud: str | None = None) -> list[str]:
        cloud = cloud or self.process.address
        return ["tune", "--cloud", cloud, "--data", str(self.data), "--name", name, *SETTINGS]

    def halted(self, name: str, step: int, cloud: str | None = None) -> subprocess.Popen[str]:
        """Start a run and return it halted in the middle of the step after ``step``, until SIGCONT."""
        command = edge_command(*self.arguments(name, cloud))
        at = command.index("edge_client.cli")
        command[at : at + 1] = ["tests.integration.halting_edge", str(step)]
        edge = subprocess.Popen(
            command, cwd=ROOT, env=child_environment(self.env), text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

        def still() -> bool:
            assert edge.poll() is None, edge.communicate()[0]
            return True

        until(lambda: psutil.Process(edge.pid).status() == psutil.STATUS_STOPPED, still)
        path = self.home / "data" / "runs" / name / "checkpoint.safetensors"
        assert load_checkpoint(path)[1].step == step
        return edge

    def path(self, name: str) -> Path:
        return self.home / "data" / "adapters" / f"{name}.safetensors"

    def matrices(self, name: str) -> Matrices:
        return Adapter.load(self.path(name)).matrices


def serve(folder: Path, dtype: str = "float32", **model: int) -> CloudProcess:
    arguments = ["--cache-dir", str(folder / "cache"), "--threads", "1"]
    for plan in TINY_PLANS:
        arguments += ["--plan", plan]
    build("llama", **model).save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    return CloudProcess(str(folder / "model"), dtype, arguments=arguments, log=folder / "log")


@pytest.fixture(scope="module")
def tuning(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tuning]:
    with serve(tmp_path_factory.mktemp("served")) as process:
        yield Tuning(process, tmp_path_factory.mktemp("home"))
    log = process.logs()
    assert "Traceback" not in log and "it is" not in log, log[-3000:]


@pytest.fixture(scope="module")
def whole(tuning: Tuning) -> Matrices:
    """M of a run that nothing interrupts."""
    said = edge_json(*tuning.arguments("whole"), env=tuning.env)
    assert said["steps"] == STEPS
    return tuning.matrices("whole")


def equal(one: Matrices, other: Matrices) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[layer], other[layer]) for layer in one)


# --- gradients ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def double(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Serve in float64."""
    folder = tmp_path_factory.mktemp("double")
    process = serve(folder, "float64")
    process.command[process.command.index("cloud_server.cli")] = "tests.integration.double_cloud"
    with process:
        yield Served(process, folder / "model", folder / "cache")


@pytest.mark.parametrize("name", ["r8", "fused"])
def test_gradients_over_the_wire_are_the_references(double: Served, name: str, tmp_path: Path) -> None:
    batch = examples(6, longest=40)
    options = {"plan": name, "config_dir": tmp_path, "cache_dir": tmp_path}
    with PrivateLoraForCausalLM.from_cloud(double.address, **options) as edge, InDouble():
        plan, fingerprint = edge.offer.plans[name]
        learner = Learner(
            Head(edge.norm, edge.lm_head, edge.softcap),
            embedding(edge.embed_tokens, edge.device),
            lambda: edge.connection.open_tuning(plan, fingerprint_message(fingerprint), pb.DTYPE_FLOAT64),
        )
        matrices = {layer: m.double() for layer, m in matrices_for(plan).items()}
        found, again = (learner.gradients(batch, matrices) for _ in range(2))
        held_out = learner.loss(batch, matrices)
        learner.micro_batch_tokens = 60
        pieces = learner.gradients(batch, matrices)
        learner.close()

    model = build("llama").double().requires_grad_(False)
    a_and_b, _ = lowrank.ensure(plan, resolve(str(double.folder), progress=False), double.cache_dir)
    reference = Reference(model, plan, a_and_b, matrices)
    with InDouble():
        loss = direct_loss(reference, batch)
        loss.backward()
    assert found.loss == pytest.approx(float(loss.detach()), rel=1e-12)
    assert held_out == pytest.approx(found.loss, rel=1e-12)
    assert equal(again.gradients, found.gradients), "the same batch has to give the same bits"
    for layer in plan.adapted_layers:
        wanted = reference.matrices[str(layer)].grad
        assert wanted is not None and wanted.norm() > 1e-4
        for gradient in (found.gradients[layer], pieces.gradients[layer]):
            assert (gradient - wanted).norm() / wanted.norm() <= 1e-9


# --- runs -----------------------------------------------------------------------------------------------


def test_a_tuned_adapter_changes_what_is_said(tuning: Tuning, whole: Matrices) -> None:
    training = Adapter.load(tuning.path("whole")).training
    assert training["validation_loss_after"] < 0.9 * training["validation_loss_before"]
    asked = (
        "generate",
        "--cloud",
        tuning.process.address,
        "--prompt",
        "say 3: ",
        "--raw",
        "--temperature",
        "0",
    )
    said = {
        name: edge_json(*asked, "--max-new-tokens", "8", "--adapter", name, env=tuning.env)["tokens"]
        for name in ("none", "whole")
    }
    assert said["none"] != said["whole"]
    shown = edge_json("adapter", "show", "whole", env=tuning.env)
    assert shown["training"]["steps"] == STEPS and tuning.path("whole").with_suffix(".png").exists()


@pytest.mark.parametrize("step", [0, 6])
def test_an_edge_killed_and_resumed_ends_at_the_same_bits(tuning: Tuning, whole: Matrices, step: int) -> None:
    name = f"killed-{step}"
    edge = tuning.halted(name, step)
    edge.send_signal(signal.SIGKILL)
    edge.communicate()
    assert not tuning.path(name).exists()
    said = edge_json("tune", "--resume", "--name", name, env=tuning.env)
    assert said["steps"] == STEPS and equal(tuning.matrices(name), whole)


def test_ctrl_c_says_how_to_go_on_but_not_with_another_model(
    tuning: Tuning, whole: Matrices, tmp_path: Path
) -> None:
    edge = tuning.halted("stopped", 2)
    edge.send_signal(signal.SIGINT)
    edge.send_signal(signal.SIGCONT)
    said, _ = edge.communicate(timeout=PATIENCE_S)
    assert edge.returncode == 130 and "tune --resume --name stopped" in said, said
    with serve(tmp_path, seed=99) as other:
        refused = run_edge("tune", "--resume", "--cloud", other.address, env=tuning.env)
    assert refused.returncode == 1 and "the model that the cloud serves" in refused.stderr, refused.stderr
    done = run_edge("tune", "--resume", env=tuning.env)
    assert done.returncode == 0, done.stderr
    assert equal(tuning.matrices("stopped"), whole)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_cloud_killed_and_restarted_changes_nothing(
    tuning: Tuning, whole: Matrices, how: signal.Signals
) -> None:
    name = f"restarted-{how.name.lower()}"
    edge = tuning.halted(name, 4)
    os.kill(tuning.process.pid, how)
    edge.send_signal(signal.SIGCONT)
    tuning.process.stop()
    tuning.process.start()
    said, _ = edge.communicate(timeout=PATIENCE_S)
    assert edge.returncode == 0, said
    # asked to end, a cloud lets what is under way go on for a while
    assert how is signal.SIGTERM or "trying again in" in said, said
    assert equal(tuning.matrices(name), whole)


def test_of_two_clouds_one_killed_in_a_step_changes_nothing(tuning: Tuning, whole: Matrices) -> None:
    """The first to be asked is the one that is killed; what it had begun is done by the other."""
    model, cache = (
        tuning.process.command[tuning.process.command.index("--model") + 1],
        tuning.process.log.parent,
    )
    arguments = ["--cache-dir", str(cache / "cache"), "--threads", "1", "--plan", TINY_PLANS[0]]
    log = cache / "log-first"
    with CloudProcess(model, arguments=arguments, log=log) as first:
        edge = tuning.halted("replicas", 4, f"{first.address},{tuning.process.address}")
        first.kill()
        edge.send_signal(signal.SIGCONT)
        said, _ = edge.communicate(timeout=PATIENCE_S)
    assert edge.returncode == 0, said
    assert "trying again in" in said, "the run was over before the cloud was killed"
    assert equal(tuning.matrices("replicas"), whole)
