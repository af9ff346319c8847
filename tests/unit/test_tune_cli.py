"""``privatelora-edge tune`` from data file to adapter file, with the reference in place of a cloud."""

import json
import stat
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock
from typer.testing import CliRunner

from edge_client import cli
from edge_client.adapters import AdapterStore
from edge_client.config import load_config
from edge_client.tuning import run as run_module
from edge_client.tuning.checkpoint import load_checkpoint
from edge_client.tuning.run import unfinished
from edge_client.tuning.stream import TuneLimits
from shared.adapter import Adapter
from shared.fingerprint import plan_digest
from shared.reference import Reference
from tests import families
from tests.unit.edge_fake import FINGERPRINT, split
from tests.unit.test_edge_cli import chat_tokenizer
from tests.unit.tuning_fake import FakeStream

LIMITS = TuneLimits(max_batch_tokens=128, max_sequence_tokens=100)
SECRET = "Xylophon"


class Fake:
    """A model that tunes through the reference; what each test may change."""

    def __init__(self):
        self.model = families.build("llama", num_hidden_layers=2).requires_grad_(False)
        self.edge, _ = split(self.model)
        plan = self.edge.adapter.plan
        self.fingerprint = replace(FINGERPRINT, plan=plan_digest(plan))
        self.edge.set_adapter(Adapter.zeros(plan, self.fingerprint))
        self.reference = Reference(self.model, plan, families.lowrank_for(plan, self.model))
        self.edge.tokenizer = chat_tokenizer()
        self.edge.offer = SimpleNamespace(
            target="127.0.0.1:50051", plans={plan.name: (plan, self.fingerprint)}, compute_dtype=torch.float32
        )
        self.edge.connection = SimpleNamespace(
            target=self.edge.offer.target, open_tuning=self.open, close=lambda: None
        )
        self.limits = LIMITS
        self.interrupt_at = 0  # micro-batch of the first stream
        self.streams = []
        self.settings = None

    def open(self, plan, fingerprint, wire_dtype, address):
        assert address == self.edge.offer.target
        stream = FakeStream(self.reference, self.limits)
        self.streams.append(stream)
        if len(self.streams) == 1 and self.interrupt_at:

            def interrupt(way):
                if len(stream.batches) == self.interrupt_at:
                    raise KeyboardInterrupt

            stream._maybe_fail = interrupt
        return stream


@pytest.fixture
def fake(tmp_path, monkeypatch):
    monkeypatch.setenv("PRIVATELORA_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("PRIVATELORA_DATA_DIR", str(tmp_path / "data"))
    threads = torch.get_num_threads()
    found = Fake()

    @contextmanager
    def opened(settings):
        found.settings = settings
        torch.set_num_threads(settings.threads or 1)
        yield found.edge

    monkeypatch.setattr("edge_client.opened.opened", lambda settings, adapter: opened(settings))
    yield found
    torch.set_num_threads(threads)


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "letters.jsonl"
    rows = [{"prompt": f"{SECRET} {n} ", "completion": f"is {n * n}."} for n in range(12)]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def run(*args):
    result = CliRunner().invoke(cli.app, ["tune", *map(str, args)])
    assert SECRET not in result.output and (result.exception is None or result.exit_code != 0)
    return result


QUICK = ("--steps", 6, "--batch-size", 4, "--validate-every", 2, "--lr", 0.02, "--checkpoint-every", 2)


def test_a_run_makes_an_adapter_with_a_summary_and_a_curve(fake, data, tmp_path):
    result = run("--data", data, *QUICK)
    assert result.exit_code == 0, result.output
    path = tmp_path / "data" / "adapters" / "letters.safetensors"
    assert f"adapter: {path}" in result.stdout and "validation loss" in result.stdout
    assert "chat --adapter letters`" in result.stdout
    made = Adapter.load(path)
    assert (made.name, made.plan, made.fingerprint) == ("letters", fake.edge.adapter.plan, fake.fingerprint)
    assert any(matrix.any() for matrix in made.matrices.values())
    numbers = made.training
    assert all(isinstance(value, int | float) for value in numbers.values())
    assert (numbers["examples"], numbers["validation_examples"], numbers["steps"]) == (11, 1, 6)
    assert numbers["validation_loss_after"] <= numbers["validation_loss_before"]
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not unfinished() and not fake.streams[-1]._hidden
    assert [entry.name for entry in AdapterStore().entries()] == ["letters"]
    AdapterStore().remove("letters")
    assert not list(path.parent.iterdir())


def test_what_is_suggested_works_as_printed_in_the_same_folder(fake, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "my edge.toml"
    config.write_text('cloud = "other.example:1"\n')
    given = ("--config", config.name, "--cloud", "a.example:1,b.example:2", "--tls")
    fake.interrupt_at = 4
    stopped = run("--data", data, "--name", "me", *QUICK, *given)
    done = run("--resume", *given)
    assert (stopped.exit_code, done.exit_code) == (130, 0), done.output
    again = "--config 'my edge.toml' --cloud a.example:1,b.example:2 --tls"
    assert f"`privatelora-edge tune --resume --name me {again}`" in stopped.stderr
    assert f"`privatelora-edge chat --adapter me {again}`" in done.stdout
    assert "`privatelora-edge adapter use me`" in done.stdout

    out = tmp_path / "to keep" / "me.safetensors"
    elsewhere = run("--data", data, "--out", out, *QUICK)
    assert f"`privatelora-edge chat --adapter '{out}'`" in elsewhere.stdout


def test_json_and_a_file_of_ones_own(fake, data, tmp_path):
    out = tmp_path / "new" / "mine.safetensors"
    result = run("--data", data, "--out", out, *QUICK, "--validation", 0, "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout.splitlines()[-1])
    assert said["adapter"] == str(out) and said["kept_step"] == 6 and "validation_loss_after" not in said
    assert Adapter.load(out).name == "mine" and not AdapterStore().names()
    again = run("--data", data, "--out", out, *QUICK)
    assert again.exit_code == 1 and "exists: --overwrite replaces it" in again.stderr


def test_ctrl_c_keeps_what_was_learned_and_resume_ends_at_the_same_bits(fake, data):
    assert run("--data", data, "--name", "whole", *QUICK).exit_code == 0
    whole = Adapter.load(AdapterStore().path("whole"))

    fake.streams.clear()
    fake.interrupt_at = 6
    stopped = run("--data", data, "--name", "mine", *QUICK)
    assert stopped.exit_code == 130, stopped.output
    assert "tune --resume --name mine` goes on from there" in stopped.stderr
    assert unfinished() == ["mine"] and AdapterStore().names() == ["whole"]
    refused = run("--data", data, "--name", "mine", *QUICK)
    assert refused.exit_code == 1 and "interrupted run 'mine': --resume" in refused.stderr

    done = run("--resume")
    assert done.exit_code == 0, done.output
    mine = Adapter.load(AdapterStore().path("mine"))
    for layer, matrix in whole.matrices.items():
        assert torch.equal(mine.matrices[layer], matrix)
    same = ("validation_loss_after", "train_loss_last_epoch", "tokens", "kept_step")
    assert all(mine.training[key] == whole.training[key] for key in same)
    assert not unfinished()


def interrupted(fake, data):
    fake.interrupt_at = 6
    assert run("--data", data, "--name", "mine", *QUICK).exit_code == 130


def test_resume_refuses_what_has_changed(fake, data, tmp_path):
    interrupted(fake, data)
    text = data.read_text()
    data.write_text(text.replace("is 25.", "is 26."))
    changed = run("--resume", "--name", "mine")
    assert changed.exit_code == 1 and "the data" in changed.stderr and "--restart" in changed.stderr
    data.write_text(text)
    other = run("--resume", "--lr", 0.5)
    assert other.exit_code == 1 and "lr 0.02 then, 0.5 now" in other.stderr
    fake.limits = TuneLimits(64, 60)
    less = run("--resume")
    assert less.exit_code == 1 and "micro_batch_tokens 128 then, 64 now" in less.stderr
    fake.limits = LIMITS
    assert unfinished() == ["mine"], "a refusal loses nothing"

    moved = data.rename(tmp_path / "elsewhere.jsonl")
    assert "no data file" in run("--resume").stderr
    assert run("--resume", "--name", "mine", "--data", moved, "--lr", 0.02).exit_code == 0


def test_restart_begins_anew(fake, data):
    interrupted(fake, data)
    assert run("--data", data, "--name", "mine", *QUICK, "--restart", "--steps", 2).exit_code == 0
    assert Adapter.load(AdapterStore().path("mine")).training["steps"] == 2 and not unfinished()


def test_a_resumed_run_uses_the_settings_it_began_with(fake, data):
    interrupted(fake, data)
    identity, state = load_checkpoint(run_module.runs_folder() / "mine" / "checkpoint.safetensors")
    assert identity.threads == 1 and state.step > 0
    run("--resume")
    assert fake.settings.cloud == "127.0.0.1:50051" and fake.settings.threads == 1
    assert (fake.settings.wire_dtype, fake.settings.plan) == ("float32", "test")


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        ((), 2, "no data: give --data FILE"),
        (("--resume", "--restart"), 2, "either --resume or --restart"),
        (("--resume",), 1, "there is no run to resume"),
        (("--resume", "--name", "mine"), 1, "there is no run 'mine' to resume"),
        (("--data", "/nowhere.jsonl"), 1, "no data file at /nowhere.jsonl"),
        (("--data", "/x.jsonl", "--lr", "-1"), 2, "tune.lr"),
        (("--data", "/x.jsonl", "--schedule", "steps"), 2, "tune.schedule"),
        (("--data", "/x.jsonl", "--name", "../mine"), 1, "cannot be an adapter's name"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(fake, args, code, words):
    result = run(*args)
    assert result.exit_code == code and words in result.stderr and result.stderr.count("\n") == 1


def test_bad_rows_are_listed_before_anything_is_sent(fake, data):
    data.write_text(data.read_text() + '\n{"prompt": "x"}\n[]\n')
    result = run("--data", data, *QUICK)
    assert result.exit_code == 1 and "line 13: completion is missing" in result.stderr
    assert "line 14: must be a JSON object" in result.stderr and "nothing was trained" in result.stderr
    assert not fake.streams and not unfinished()

    rows = [{"prompt": "y" * 200, "completion": "z"}, {"prompt": "", "completion": "ok"}]
    data.write_text("\n".join(map(json.dumps, rows)))
    result = run("--data", data, *QUICK)
    assert result.exit_code == 1 and "line 1: has 202 tokens, at most 100" in result.stderr
    assert not any(stream.batches for stream in fake.streams) and not unfinished()


def test_an_adapter_is_not_replaced_unasked(fake, data):
    Adapter.zeros(fake.edge.adapter.plan, fake.fingerprint).save(AdapterStore().path_to_save("letters"))
    result = run("--data", data, *QUICK)
    assert result.exit_code == 1 and "there is an adapter 'letters' already" in result.stderr
    assert not fake.streams
    assert run("--data", data, *QUICK, "--overwrite").exit_code == 0
    assert Adapter.load(AdapterStore().path("letters")).training


def test_a_run_belongs_to_one_process(fake, data):
    folder = run_module.runs_folder()
    folder.mkdir(parents=True)
    with FileLock(folder / ".letters.lock"):
        result = run("--data", data, *QUICK)
    assert result.exit_code == 1 and "under way in another process" in result.stderr
    assert run("--data", data, *QUICK).exit_code == 0


def test_what_cannot_carry_gradients_is_refused(fake, data):
    result = run("--data", data, *QUICK, "--wire-dtype", "float16")
    assert result.exit_code == 1 and "float16 cannot carry gradients, which underflow" in result.stderr
    result = run("--data", data, *QUICK, "--wire-dtype", "int8")
    assert result.exit_code == 1 and "int8 cannot carry gradients, for which" in result.stderr
    assert not fake.streams
    half, single = run_module.wire_for(None, torch.float16), run_module.wire_for(None, torch.float32)
    assert half == single != run_module.wire_for(None, torch.bfloat16)


def test_settings_come_from_the_file_too_and_flags_win(fake, tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("seed = 3\n[tune]\nlr = 0.5\nsteps = 7\n")
    settings = load_config(file, tune={"lr": 0.25})
    assert (settings.tune.lr, settings.tune.steps, settings.seed) == (0.25, 7, 3)
    file.write_text("[tune]\nlearning_rate = 1\n")
    result = run("--data", "/x.jsonl", "--config", file)
    assert result.exit_code == 2 and "tune.learning_rate" in result.stderr
