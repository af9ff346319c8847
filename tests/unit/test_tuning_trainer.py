"""The tuning loop against the reference trained directly, and that no interruption changes a bit."""

import dataclasses
import json
import stat
import threading

import pytest
import torch

from edge_client.backoff import Backoff
from edge_client.recovery import Attempts
from edge_client.streams import SessionError
from edge_client.tuning.checkpoint import (
    CheckpointError,
    Identity,
    State,
    load_checkpoint,
    save_checkpoint,
)
from edge_client.tuning.config import TuneConfig
from edge_client.tuning.examples import batches, digest
from edge_client.tuning.learner import TuningError
from edge_client.tuning.stream import TuneLimits
from edge_client.tuning.trainer import Watcher, lr_factor
from shared.reference import Reference
from tests.families import build
from tests.unit.tuning_fake import Cloud, direct_loss, examples

LR = 0.02


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Products here are too small to share out."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def equal(one: dict[int, torch.Tensor], other: dict[int, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[layer], other[layer]) for layer in one)


def identity(cloud: Cloud, config: TuneConfig, data: list, **changes) -> Identity:
    facts = {
        "name": "mine",
        "data": "/data.jsonl",
        "cloud": "here:1",
        "data_digest": digest(data),
        "config": config,
        "plan": cloud.plan,
        "fingerprint": "ab" * 32,
        "wire_dtype": "float64",
        "dtype": "float64",
        "device": "cpu",
        "threads": 1,
    }
    return Identity(**(facts | changes))


# --- what is computed -----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"layout": "fused", "r_c2d": 5, "r_d2c": 7}, {"layers": (1,)}])
def test_loss_over_fifty_steps_follows_the_reference_trained_directly(options):
    cloud, data = Cloud(**options), examples(20)
    trainer = cloud.trainer(data, lr=LR, steps=50, schedule="constant", warmup=0.1)
    found = [loss for _, loss in trainer.run().train_losses]

    model = build("llama", num_hidden_layers=2).double().requires_grad_(False)
    reference = Reference(model, cloud.plan, cloud.lowrank, cloud.zeros())
    optimiser = torch.optim.AdamW(reference.parameters(), lr=LR, weight_decay=0.0)
    warm_up = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min(1.0, (step + 1) / 5))
    wanted, step = [], 0
    while step < 50:
        for batch in batches(data, 4, 0, step // 5):
            loss = direct_loss(reference, batch)
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(reference.matrices.parameters(), 1.0)
            optimiser.step()
            warm_up.step()
            wanted.append(float(loss.detach()))
            step += 1
    assert wanted[-1] < 0.9 * wanted[0], "nothing was learned: the test would prove nothing"
    torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=0, atol=1e-6)
    for layer, matrix in trainer.state.matrices.items():
        torch.testing.assert_close(matrix, reference.matrices[str(layer)].data, rtol=1e-6, atol=1e-9)


def test_micro_batches_add_up_to_one_large_batch():
    cloud, batch = Cloud(), examples(9)
    matrices = {layer: m + 0.1 for layer, m in cloud.zeros().items()}
    cloud.limits = TuneLimits(10_000, 48)
    whole = cloud.learner().gradients(batch, matrices)
    assert len(cloud.streams[-1].batches) == 1
    cloud.limits = TuneLimits(40, 48)
    pieces = cloud.learner()
    found = pieces.gradients(batch, matrices)
    assert len(cloud.streams[-1].batches) > 2
    assert found.loss == pytest.approx(whole.loss, rel=1e-12) and found.tokens == whole.tokens
    for layer, gradient in whole.gradients.items():
        torch.testing.assert_close(found.gradients[layer], gradient, rtol=1e-10, atol=1e-14)
    assert pieces.loss(batch, matrices) == pytest.approx(whole.loss, rel=1e-12)
    assert cloud.streams[-1].batches[-1][1], "validation runs nothing back"


def test_tuning_starts_at_the_base_model():
    cloud, data = Cloud(), examples(6)
    base = build("llama", num_hidden_layers=2).double()
    total = sum(e.targets for e in data)
    logits = [base(e.ids[None]).logits[0, :-1] for e in data]
    parts = [
        torch.nn.functional.cross_entropy(found, e.labels[1:], reduction="sum")
        for found, e in zip(logits, data, strict=True)
    ]
    wanted = float(sum(parts).detach()) / total
    trainer = cloud.trainer(data[:4], data, lr=LR, steps=1)
    state = trainer.run()
    assert state.validation_losses[0] == (0, pytest.approx(wanted, rel=1e-9))
    assert state.validation_losses[-1][0] == 1 and state.tokens == sum(len(e.ids) - 1 for e in data[:4])


def test_the_rate_rises_and_falls_as_it_should():
    config = TuneConfig(warmup=0.2, schedule="linear")
    assert [round(lr_factor(config, step, 10), 3) for step in range(10)] == [
        *(0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125)
    ]
    cosine = [lr_factor(TuneConfig(warmup=0), step, 100) for step in range(100)]
    assert cosine[0] == 1 and cosine == sorted(cosine, reverse=True) and 0 < cosine[-1] < 1e-3
    assert lr_factor(TuneConfig(schedule="constant"), 99, 100) == 1
    assert lr_factor(TuneConfig(warmup=1), 0, 1) == 1


# --- what is kept ---------------------------------------------------------------------------------------


def test_it_stops_early_and_keeps_the_best():
    cloud = Cloud()
    train, validation = examples(4), examples(6, seed=9)  # four examples are soon known by heart
    trainer = cloud.trainer(train, validation, lr=0.1, steps=400, validate_every=5, patience=2)
    state = trainer.run()
    assert trainer.stopped_early and state.step < 400
    losses = dict(state.validation_losses)
    assert state.best_step == min(losses, key=losses.__getitem__) == state.step - 10
    step, kept = trainer.kept
    assert step == state.best_step and not equal(kept, state.matrices)
    assert cloud.learner().loss(validation, kept) == pytest.approx(losses[step], rel=1e-12)


def test_without_validation_the_last_is_kept():
    trainer = Cloud().trainer(examples(4), lr=LR, steps=3)
    state = trainer.run()
    assert trainer.kept == (3, state.matrices) and not state.validation_losses


# --- interruptions --------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 3])
def test_a_run_killed_at_any_step_ends_at_the_same_bits(every, tmp_path):
    cloud, data, held = Cloud(), examples(12), examples(4, seed=5)
    options = {"lr": LR, "steps": 8, "validate_every": 2, "patience": 0, "checkpoint_every": every}
    whole = cloud.trainer(data, held, **options)
    whole.run()
    path = tmp_path / "run" / "checkpoint.safetensors"
    path.parent.mkdir()
    who = identity(cloud, whole.config, data)

    class Killed(BaseException):
        pass

    for last in range(8):

        class Kill(Watcher):
            def stepped(self, state, loss, tokens, seconds, last=last):
                if state.step == last + 1:
                    raise Killed

        kept = []

        def save(state, kept=kept):
            save_checkpoint(path, who, state)
            kept.append(path.read_bytes())

        first = cloud.trainer(data, held, save=save, **options)
        first._watcher = Kill()
        with pytest.raises(Killed):
            first.run()
        # SIGKILL leaves what was there before the last save, which an orderly end makes
        path.write_bytes(kept[-2])
        _, state = load_checkpoint(path)
        assert state.step == last // every * every
        second = cloud.trainer(data, held, state, **options)
        second.run()
        assert equal(second.kept[1], whole.kept[1]) and second.kept[0] == whole.kept[0]
        assert equal(second.state.matrices, whole.state.matrices)
        assert second.state.train_losses == whole.state.train_losses
        assert second.state.validation_losses == whole.state.validation_losses


@pytest.mark.parametrize("at", [(1, "forward"), (3, "forward"), (3, "backward"), (4, "backward")])
def test_ctrl_c_keeps_the_last_whole_step(at, monkeypatch):
    cloud, data = Cloud(), examples(8)
    whole = cloud.trainer(data, lr=LR, steps=6).run()
    saved = []

    def interrupt(self, way):
        if (len(self.batches), way) == at:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("tests.unit.tuning_fake.FakeStream._maybe_fail", interrupt)
        first = cloud.trainer(data, lr=LR, steps=6, save=lambda state: saved.append(state.step))
        with pytest.raises(KeyboardInterrupt):
            first.run()
    assert saved[-1] == first.state.step == len(first.state.train_losses)
    assert cloud.streams[-1].closed
    assert equal(cloud.trainer(data, state=first.state, lr=LR, steps=6).run().matrices, whole.matrices)


@pytest.mark.parametrize("at", [(1, "forward"), (4, "forward"), (4, "backward")])
def test_a_lost_cloud_costs_a_micro_batch_and_changes_nothing(at):
    data = examples(12)
    whole = Cloud().trainer(data, lr=LR, steps=5).run()
    cloud = Cloud()
    cloud.fail = [{at}, {(1, "forward")}]
    state = cloud.trainer(data, lr=LR, steps=5).run()
    assert equal(state.matrices, whole.matrices) and state.train_losses == whole.train_losses
    assert len(cloud.streams) == 3 and all(stream.closed for stream in cloud.streams[:2])
    assert len(cloud.waits) == 2 and 0 <= cloud.waits[0] <= 0.2 and 0 <= cloud.waits[1] <= 0.4


def test_a_cloud_that_stays_away_is_given_up_after_a_while():
    cloud, data, saved = Cloud(), examples(8), []
    cloud.attempts = lambda: Attempts(None, Backoff(1.0, uniform=lambda low, high: high))
    cloud.fail = [{(2, "backward")}] + [{(1, "forward")} for _ in range(3)]
    trainer = cloud.trainer(data, lr=LR, steps=5, save=lambda state: saved.append(state.step))
    with pytest.raises(SessionError, match="lost .*gave up after 4 attempts"):
        trainer.run()
    assert cloud.waits == [0.2, 0.4, 0.8] and saved[-1] == trainer.state.step


def test_a_hint_of_the_cloud_is_honoured_while_tuning():
    import grpc

    cloud, data = Cloud(), examples(8)
    full, asked = SessionError("full", grpc.StatusCode.RESOURCE_EXHAUSTED, 7.0), []
    open_stream = cloud.open

    def refuse_once():
        asked.append(1)
        if len(asked) == 2:
            raise full
        return open_stream()

    cloud.open = refuse_once
    cloud.fail = [{(1, "forward")}]
    cloud.trainer(data, lr=LR, steps=1).run()
    assert len(cloud.waits) == 2 and cloud.waits[1] == 7.0


def test_a_cloud_that_takes_less_than_before_is_refused():
    cloud, data = Cloud(), examples(8)
    trainer = cloud.trainer(data, lr=LR, steps=5)
    cloud.limits = TuneLimits(40, 40)
    with pytest.raises(TuningError, match="now takes 40 tokens at a time, this run sends up to 64"):
        trainer.run()


def test_a_loss_that_diverges_says_so(monkeypatch):
    cloud, saved = Cloud(), []
    trainer = cloud.trainer(examples(8), lr=LR, steps=5, save=lambda state: saved.append(state.step))
    monkeypatch.setattr(
        "tests.unit.tuning_fake.FakeStream.backward",
        lambda self, gradient: {layer: m * float("nan") for layer, m in cloud.zeros().items()},
    )
    with pytest.raises(TuningError, match=r"no longer finite in step 1.*0\.02 is too high"):
        trainer.run()
    assert saved[-1] == 0 and not any(m.any() for m in trainer.state.matrices.values())


# --- the file -------------------------------------------------------------------------------------------


def saved_run(tmp_path) -> tuple:
    cloud, data = Cloud(), examples(8)
    trainer = cloud.trainer(data, data[:2], lr=LR, steps=4)
    state = trainer.run()
    path = tmp_path / "runs" / "mine" / "checkpoint.safetensors"
    who = identity(cloud, trainer.config, data)
    save_checkpoint(path, who, state)
    return path, who, state


def test_a_checkpoint_is_private_and_complete(tmp_path):
    path, who, state = saved_run(tmp_path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    again, loaded = load_checkpoint(path)
    assert again == who and vars(loaded).keys() == vars(state).keys()
    for name, value in vars(state).items():
        found = getattr(loaded, name)
        assert equal(found, value) if isinstance(value, dict) else found == value, name
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_checkpoint_that_is_replaced_meanwhile_is_read_whole(tmp_path):
    """Either the old one or the new one, never a mixture of both."""
    path, who, state = saved_run(tmp_path)
    done = threading.Event()

    def replace() -> None:
        step = 0
        while not done.is_set():
            step += 1
            # more losses, so that offsets in the file move
            losses = [(n, float(step)) for n in range(step % 50)]
            save_checkpoint(path, who, dataclasses.replace(state, step=step, train_losses=losses))

    writer = threading.Thread(target=replace)
    writer.start()
    try:
        seen, reads = set(), 0
        while reads < 300 or len(seen) <= 10:  # on a busy machine it takes more reads to see replacements
            _, found = load_checkpoint(path)
            seen.add(found.step)
            reads += 1
            if found.step != state.step:
                assert found.train_losses == [(n, float(found.step)) for n in range(found.step % 50)]
    finally:
        done.set()
        writer.join()


@pytest.mark.parametrize("spoil", ["cut", "bit", "empty", "other"])
def test_a_damaged_checkpoint_is_refused(tmp_path, spoil):
    path, _, _ = saved_run(tmp_path)
    raw = bytearray(path.read_bytes())
    if spoil == "cut":
        path.write_bytes(raw[:-8])
    elif spoil == "bit":
        raw[-9] ^= 1
        path.write_bytes(raw)
    elif spoil == "empty":
        path.write_bytes(b"")
    else:
        path.write_bytes(raw.replace(b"best_step", b"worst_one"))
    with pytest.raises(CheckpointError, match="damaged, or written by another version"):
        load_checkpoint(path)
    with pytest.raises(CheckpointError, match="no run to resume"):
        load_checkpoint(path.with_name("nothing"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data_digest": "cd" * 32}, "the data"),
        ({"fingerprint": "cd" * 32}, "fingerprint"),
        ({"config": {"lr": 0.5, "seed": 3}}, r"lr 0.02 then, 0.5 now; seed 0 then, 3 now"),
        ({"wire_dtype": "bfloat16"}, r"wire_dtype \(float64 then, bfloat16 now\)"),
        ({"threads": 8}, r"threads \(1 then, 8 now\)"),
        ({"plan": {"name": "other"}}, "the plan"),
    ],
)
def test_a_run_goes_on_only_as_what_it_was(tmp_path, changes, words):
    _, who, _ = saved_run(tmp_path)
    who.check(who.model_copy(update={"data": "/moved.jsonl", "cloud": "elsewhere:2"}))
    changed = {
        key: getattr(who, key).model_copy(update=value) if isinstance(value, dict) else value
        for key, value in changes.items()
    }
    with pytest.raises(CheckpointError, match=words) as refusal:
        who.check(who.model_copy(update=changed))
    assert "--restart" in str(refusal.value)


def test_nothing_private_is_in_reprs_and_headers(tmp_path):
    path, _, state = saved_run(tmp_path)
    assert "tensor" not in repr(state)
    length = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + length])["__metadata__"]["privatelora_tuning"]
    assert set(json.loads(header)) == {
        *("format_version", "identity", "step", "best_step", "stale", "tokens", "seconds", "tensors")
    }


# --- settings -------------------------------------------------------------------------------------------


def test_settings_are_settled_by_plan_and_cloud():
    plan = Cloud().plan
    settled = TuneConfig().settled(plan, 4096, 512)
    assert (settled.lr, settled.max_tokens, settled.micro_batch_tokens) == (3e-3, 512, 4096)
    assert settled.settled(plan, 9999, 9999) == settled, "a resumed run decides nothing anew"
    asked = TuneConfig(lr=0.1, max_tokens=100, micro_batch_tokens=20).settled(plan, 4096, 512)
    assert (asked.lr, asked.max_tokens, asked.micro_batch_tokens) == (0.1, 100, 100)
    assert TuneConfig().settled(plan, 1 << 20, 512).micro_batch_tokens == 4096
    assert TuneConfig().settled(plan, 1 << 20, 9000).micro_batch_tokens == 9000
    svd = plan.model_copy(update={"initialiser": "svd"})
    assert TuneConfig().settled(svd, 9, 9).lr == 1e-3
    assert TuneConfig(epochs=2).total_steps(7) == 14 and TuneConfig(steps=3).total_steps(7) == 3


def test_settings_are_strict_and_say_their_units():
    from pydantic import ValidationError

    with pytest.raises(ValidationError, match="learning_rate"):
        TuneConfig(learning_rate=1)
    for wrong in ({"lr": 0}, {"validation": 1.0}, {"lr": float("nan")}, {"schedule": "step"}):
        with pytest.raises(ValidationError):
            TuneConfig(**wrong)
    for name, field in TuneConfig.model_fields.items():
        assert field.description, name


def test_state_begins_with_copies():
    start = {0: torch.ones(1, 2, 2)}
    state = State.begin(start)
    state.matrices[0].zero_()
    assert start[0].all() and state.best[0].all() and not state.first_moments[0].any()
