"""Parts of the model that this side needs, fetched from a cloud that is not trusted.

Names come from a fixed list, sizes are capped before a byte is asked for, and a file gets its name
only after its SHA-256 has been checked. A broken transfer leaves a ``.partial`` file that the next
one continues. Everything lies in ``<cache>/edge/<digest of the manifest>``; nothing else is written.
"""

import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from shared.cache import CACHE_ADVICE, cache_folder, locked, progress_bar
from shared.disk import DiskFullError, room_for
from shared.edge_parts import EdgePart, EdgePartsError, parts_of
from shared.fingerprint import edge_digest
from shared.plan import Plan


class Source(Protocol):
    """What is needed of `edge_client.connection.Connection`."""

    def fetch_part(self, index: int, offset: int = 0) -> Iterator[bytes]:
        """Yield a part's bytes from ``offset`` on."""


def fetch(
    source: Source,
    manifest: Sequence[EdgePart],
    cache_dir: Path | None = None,
    *,
    plan: Plan | None = None,
    progress: bool = True,
) -> Path:
    """Return a folder that holds exactly the parts that are needed, fetching what is missing.

    Parameters
    ----------
    source
        The connection.
    manifest
        Parts that `shared.edge_parts.check_manifest` has accepted, in the cloud's order.
    cache_dir
        The cache folder.
    plan
        Says which decoder layers run here; None is all that there are parts of.
    progress
        Whether to show a bar on stderr.

    Raises
    ------
    EdgePartsError
        If the cloud sends too much, too little or other bytes than the manifest says; or the disk is full.
    """
    needed = list(manifest) if plan is None else parts_of(plan, manifest)
    return _fetch_these(source, manifest, needed, cache_dir, progress)


def fetch_config(source: Source, manifest: Sequence[EdgePart], cache_dir: Path | None = None) -> Path:
    """Return a folder that holds config.json alone: all that is needed to know a model's sizes.

    Raises
    ------
    EdgePartsError
        As `fetch`.
    """
    needed = [part for part in manifest if part.name == "config.json"]
    return _fetch_these(source, manifest, needed, cache_dir, progress=False)


def _fetch_these(
    source: Source,
    manifest: Sequence[EdgePart],
    needed: Sequence[EdgePart],
    cache_dir: Path | None,
    progress: bool,
) -> Path:
    folder = cache_folder(cache_dir) / "edge" / edge_digest(needed).hex()
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / "parts"):
        numbered = [(i, part) for i, part in enumerate(manifest) if part in needed]
        missing = [(i, part) for i, part in numbered if not _is_verified(folder / part.name, part)]
        total = sum(part.size for _, part in missing)
        if total > shutil.disk_usage(folder).free:
            raise EdgePartsError(f"{folder} has no room for {total} bytes; free some, or set --cache-dir")
        if missing:
            with progress_bar("Fetching this side's parts of the model", total, progress) as advance:
                for index, part in missing:
                    _fetch_one(source, index, part, folder, advance)
    return folder


def _is_verified(path: Path, part: EdgePart) -> bool:
    """Whether ``path`` is the part; read in full each time, so that a damaged cache is noticed."""
    if path.is_symlink() or not path.is_file() or path.stat().st_size != part.size:
        return False
    return _sha256(path) == part.sha256


def _sha256(path: Path) -> bytes:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.digest()


def _fetch_one(
    source: Source, index: int, part: EdgePart, folder: Path, advance: Callable[[int], object]
) -> None:
    partial = folder / f"{part.name}.partial"
    if partial.is_symlink():
        partial.unlink()
    try:
        with room_for(folder / part.name, CACHE_ADVICE):
            _fetch_to(source, index, part, partial, advance)
    except DiskFullError:
        partial.unlink(missing_ok=True)  # it would go on taking the room that is lacking
        raise
    partial.replace(folder / part.name)


def _fetch_to(
    source: Source, index: int, part: EdgePart, partial: Path, advance: Callable[[int], object]
) -> None:
    resumed = partial.is_file() and partial.stat().st_size <= part.size
    _append(source, index, part, partial, advance, afresh=not resumed)
    if resumed and _sha256(partial) != part.sha256:
        advance(-part.size)  # what was left over may have been damaged: once more, from the start
        _append(source, index, part, partial, advance, afresh=True)
    if _sha256(partial) != part.sha256:
        partial.unlink()
        raise EdgePartsError(f"{part.name}: the cloud sent other bytes than it announced (SHA-256)")


def _append(
    source: Source,
    index: int,
    part: EdgePart,
    partial: Path,
    advance: Callable[[int], object],
    *,
    afresh: bool,
) -> None:
    with partial.open("wb" if afresh else "ab") as file:
        left = part.size - file.tell()
        advance(part.size - left)
        if left == 0:
            return
        for piece in source.fetch_part(index, part.size - left):
            if not piece:
                raise EdgePartsError(f"{part.name}: the cloud sends empty pieces")  # it might do so forever
            left -= len(piece)
            if left < 0:
                raise EdgePartsError(
                    f"{part.name}: the cloud sends more than the announced {part.size} bytes"
                )
            file.write(piece)
            advance(len(piece))
            if left == 0:
                return
    raise EdgePartsError(f"{part.name}: the cloud stopped {left} bytes early; start again to continue there")
