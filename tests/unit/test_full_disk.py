"""A disk that is full, by the system's own limit on file sizes: what is named, and that nothing is left."""

import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import tiny_checkpoint as tiny
import torch

from edge_client import parts
from edge_client.tuning.checkpoint import State, load_checkpoint, save_checkpoint
from shared import cache, edge_parts, gguf_model, lowrank, models
from shared.adapter import Adapter
from shared.checkpoint import open_folder
from shared.disk import DiskFullError, is_disk_full
from shared.fingerprint import Fingerprint, plan_digest
from tests.unit.test_tuning_trainer import Cloud, equal, examples, identity, saved_run

ADVICE = "Free some"


@contextmanager
def room(most: int) -> Iterator[None]:
    """Let no file grow beyond so many bytes meanwhile; who writes more hears what a full disk says."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def files(folder: Path) -> list[str]:
    """Return what lies in a folder and below, locks aside."""
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".lock"
    )


def refused(most: int, work: Callable[[], object]) -> str:
    with room(most), pytest.raises(DiskFullError) as error:
        work()
    assert ADVICE in str(error.value) and "MiB are free in" in str(error.value)
    return str(error.value)


def test_what_says_that_a_disk_is_full() -> None:
    assert is_disk_full(OSError(28, "No space left on device"))
    assert is_disk_full(RuntimeError("Error: I/O error: No space left on device (os error 28)"))
    assert not is_disk_full(OSError(13, "Permission denied")) and not is_disk_full(ValueError("full"))


def test_a_file_that_is_replaced_stays_as_it_was(tmp_path: Path) -> None:
    target = tmp_path / "settings"
    target.write_bytes(b"before")

    def write() -> None:
        with cache.replacing(target) as file:
            file.write(bytes(1 << 20))

    assert str(target) in refused(4096, write)
    assert target.read_bytes() == b"before" and files(tmp_path) == ["settings"]


def test_any_other_error_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(PermissionError, match="no entry"), cache.replacing(tmp_path / "x"):
        raise PermissionError("no entry")


def test_a_library_that_cannot_write_is_understood(tmp_path: Path) -> None:
    """Safetensors writes by itself, and has only words for it."""
    from safetensors.torch import save_file

    def fill(draft: Path) -> None:
        save_file({"x": torch.zeros(1 << 18)}, draft / "model.safetensors")

    told = refused(4096, lambda: cache.make_folder(tmp_path / "models" / "big", fill))
    assert str(tmp_path / "models" / "big") in told and "--cache-dir" in told
    assert files(tmp_path) == []


def test_the_clouds_files_low_rank_edge_parts_and_digests(tmp_path: Path) -> None:
    checkpoint = open_folder(tiny.write(tmp_path / "m"), "tiny")
    store = tmp_path / "cache"
    told = refused(64, lambda: lowrank.ensure(tiny.plan(), checkpoint, store))
    assert "lowrank" in told and ".safetensors" in told
    assert not [name for name in files(store) if name.startswith("lowrank")]
    told = refused(64, lambda: edge_parts.build(checkpoint, store))
    assert str(store / "served") in told and "--cache-dir" in told
    assert not [name for name in files(store) if name.startswith("served")]
    made, _ = lowrank.ensure(tiny.plan(), checkpoint, store)  # once there is room, all is well
    assert edge_parts.build(checkpoint, store) and made.a


def test_digests_that_cannot_be_remembered_are_no_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"content")
    with room(8):
        found = cache.file_sha256(file, tmp_path / "cache")
    assert found == cache.file_sha256(file, tmp_path / "elsewhere") and "cannot remember" in caplog.text


def test_a_gguf_file_is_not_blamed_for_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    class Loads:
        """Stands for a model that was read and cannot be written."""

        @classmethod
        def from_pretrained(cls, *_: object, **__: object) -> "Loads":
            return cls()

        def save_pretrained(self, folder: Path, **_: object) -> None:
            (folder / "model.safetensors").write_bytes(bytes(1 << 20))

    monkeypatch.setattr(transformers, "AutoModelForCausalLM", Loads)
    target = tmp_path / "models" / "gguf"

    def fill(draft: Path) -> None:
        gguf_model.dequantise(tmp_path / "m.gguf", draft, False)

    assert str(target) in refused(4096, lambda: cache.make_folder(target, fill))
    assert files(tmp_path) == []


def test_pips_words_for_it_are_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "python"
    fake.write_text(
        "#!/bin/sh\necho 'ERROR: Could not install: [Errno 28] No space left on device' >&2\nexit 1\n"
    )
    fake.chmod(0o755)
    monkeypatch.setattr(models.sys, "executable", str(fake))
    monkeypatch.setattr(models, "_installed", lambda *_: None)
    with pytest.raises(DiskFullError, match="no room on the disk for .*downloads"):
        models.resolve(models.DEFAULT_MODEL, cache_dir=tmp_path / "cache", progress=False)


def test_parts_that_do_not_fit_leave_no_partial_file(tmp_path: Path) -> None:
    checkpoint = open_folder(tiny.write(tmp_path / "m"), "tiny")
    manifest = edge_parts.build(checkpoint, tmp_path / "cloud")

    class Source:
        def fetch_part(self, index: int, offset: int = 0) -> Iterator[bytes]:
            path = manifest[index].path
            assert path is not None
            yield path.read_bytes()[offset:]

    store = tmp_path / "edge"
    told = refused(16, lambda: parts.fetch(Source(), manifest, store, progress=False))
    assert manifest[0].name in told
    assert not [name for name in files(store) if not name.endswith("lock")]
    folder = parts.fetch(Source(), manifest, store, progress=False)
    assert {part.name for part in manifest} <= set(files(folder))


def test_a_checkpoint_that_does_not_fit_leaves_the_last_one(tmp_path: Path) -> None:
    path, who, state = saved_run(tmp_path)
    before = path.read_bytes()
    state.step += 1
    assert str(path) in refused(len(before) // 2, lambda: save_checkpoint(path, who, state))
    assert path.read_bytes() == before and [file.name for file in path.parent.iterdir()] == [path.name]
    assert load_checkpoint(path)[1].step == state.step - 1, "the run goes on from there"
    save_checkpoint(path, who, state)
    assert load_checkpoint(path)[1].step == state.step


def test_a_run_that_a_full_disk_ended_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    cloud, data = Cloud(), examples(12)
    options = {"lr": 0.01, "steps": 6, "checkpoint_every": 2}
    whole = cloud.trainer(data, [], **options)
    whole.run()
    path = tmp_path / "run" / "checkpoint.safetensors"
    who = identity(cloud, whole.config, data)

    def save(state: State) -> None:
        with room(1 << 30 if state.step < 4 else 64):
            save_checkpoint(path, who, state)

    with pytest.raises(DiskFullError, match="no room on the disk for"):
        cloud.trainer(data, [], save=save, **options).run()
    _, state = load_checkpoint(path)
    assert state.step == 2
    again = cloud.trainer(data, [], state, **options)
    again.run()
    assert equal(again.state.matrices, whole.state.matrices)


def test_an_adapter_that_does_not_fit_leaves_the_old_one(tmp_path: Path) -> None:
    plan, path = tiny.plan(), tmp_path / "me.safetensors"
    branches = {name: bytes(32) for name in ("lowrank", "layers", "edge")}
    adapter = Adapter.random(plan, Fingerprint(plan=plan_digest(plan), **branches), seed=0, std=0.1)
    adapter.save(path)
    before = path.read_bytes()
    assert str(path) in refused(100, lambda: adapter.save(path))
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]
