"""What a cloud keeps of a model for its edges: whole when it is served, whatever became of the disk."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_checkpoint as tiny

from shared import cache, edge_parts
from shared.checkpoint import open_folder

DAMAGES: dict[str, Callable[[Path, bytes], object]] = {
    "half": lambda path, raw: path.write_bytes(raw[: len(raw) // 2]),
    "empty": lambda path, raw: path.write_bytes(b""),
    "another byte": lambda path, raw: path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1])),
    "gone": lambda path, raw: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["edge.safetensors", "config.json"])
def test_what_is_damaged_is_made_again(
    name: str, damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Else its digest would be stated, and every edge would fetch it and fail over it."""
    checkpoint, store = open_folder(tiny.write(tmp_path / "m"), "tiny"), tmp_path / "cache"
    whole = edge_parts.build(checkpoint, store)
    (part,) = [part for part in whole if part.name == name]
    assert part.path is not None
    DAMAGES[damage](part.path, part.path.read_bytes())
    assert edge_parts.build(checkpoint, store) == whole and "is damaged" in caplog.text
    caplog.clear()
    assert edge_parts.build(checkpoint, store) == whole and not caplog.text


def test_a_folder_gets_its_name_when_its_files_are_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a power failure would leave the name with files that are empty."""
    synced, sync = set[int](), os.fsync

    def noted(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        sync(descriptor)

    def fill(draft: Path) -> None:
        (draft / "deep").mkdir()
        (draft / "deep" / "a").write_bytes(b"a")
        (draft / "b").write_bytes(b"b")

    monkeypatch.setattr(os, "fsync", noted)
    made = cache.make_folder(tmp_path / "made", fill)
    assert {(made / "deep" / "a").stat().st_ino, (made / "b").stat().st_ino} <= synced
