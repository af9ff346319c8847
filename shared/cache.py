"""The cache folder: where it is, how a thing comes to be in it exactly once.

Whatever is in the cache under its final name is whole: it is written beside its place under a
temporary name and renamed. A lock per name keeps two processes from making the same thing twice.
Everything in the cache can be deleted at any time when no process runs; it is made again.
"""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import platformdirs
from filelock import FileLock
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from shared.disk import DiskFullError, room_for

log = logging.getLogger(__name__)

ENVIRONMENT_VARIABLE = "PRIVATELORA_CACHE_DIR"
CACHE_ADVICE = (
    f" (all in the cache but lowrank/ is made again when it is needed), or set --cache-dir or "
    f"{ENVIRONMENT_VARIABLE} to a folder on a disk with more"
)


def cache_folder(given: Path | None = None) -> Path:
    """Return the cache folder: ``given``, else the environment's, else the platform's own.

    Raises
    ------
    NotADirectoryError
        If a file is there.
    """
    chosen = given or os.environ.get(ENVIRONMENT_VARIABLE) or platformdirs.user_cache_dir("privatelora")
    return no_file(Path(chosen).expanduser())


def no_file(folder: Path) -> Path:
    """Return a folder's path; that it is a file's is found here, or it would look like an empty folder.

    Raises
    ------
    NotADirectoryError
        If a file is there.
    """
    if folder.is_file():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    return folder


def slug(text: str) -> str:
    """Return ``text`` as a part of a file name: letters, digits, dot, dash and underscore, at most 48."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip(".-")[:48] or "unnamed"


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Hold the lock that belongs to ``target`` (a file beside it), waiting for whoever has it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f".{target.name}.lock")):
        yield


def make_folder(target: Path, fill: Callable[[Path], None]) -> Path:
    """Return folder ``target``, filled by ``fill`` if it does not exist yet: whole, and once.

    ``fill`` gets an empty temporary folder; if it raises, nothing is left under ``target``.
    """
    if target.is_dir():
        return target
    with locked(target):
        if not target.is_dir():
            with room_for(target, CACHE_ADVICE):
                draft = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
                try:
                    fill(draft)
                    _sync(draft)
                    draft.rename(target)
                finally:
                    shutil.rmtree(draft, ignore_errors=True)
    return target


def _sync(folder: Path) -> None:
    """Have the system write a folder's files: a power failure must not leave its name with empty ones."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


@contextmanager
def replacing(target: Path) -> Iterator[BinaryIO]:
    """Open a temporary file (mode 0600) that becomes ``target`` on success and vanishes on error.

    Raises
    ------
    DiskFullError
        If there is no room for it; what ``target`` was before is unchanged.
    """
    with room_for(target, ""):
        descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        try:
            with open(descriptor, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, target)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


@contextmanager
def progress_bar(text: str, total_bytes: int | None, show: bool) -> Iterator[Callable[[int], object]]:
    """Show a bar on stderr (a spinner where the total is unknown) and yield its ``advance(bytes)``."""
    amount = [BarColumn(), DownloadColumn()] if total_bytes else []
    columns = [SpinnerColumn(), TextColumn("{task.description}"), *amount, TimeElapsedColumn()]
    console = Console(file=sys.stderr)  # the stream of now, also where stderr is redirected meanwhile
    if show and not console.is_terminal:  # a log gets one line, not a bar
        console.print(text, highlight=False)
    with Progress(
        *columns,
        console=console,
        disable=not show or not console.is_terminal,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    ) as bar:
        task = bar.add_task(text, total=total_bytes)
        yield lambda done: bar.advance(task, done)


def remembered_digests(
    path: Path, digesters: Mapping[str, Callable[[], bytes]], cache_dir: Path | None
) -> dict[str, bytes]:
    """Return 32-byte digests of parts of the file ``path``, made once per state of that file.

    The state is its size, times of modification and change, and inode. This spares a server from
    hashing its own checkpoint at every start; it is no defence against who can write to its disk.

    Parameters
    ----------
    path
        The file that the digests are of.
    digesters
        For each label, how to compute its digest; they may run in several threads.
    cache_dir
        The cache folder.
    """
    path = path.resolve()
    status = path.stat()
    state = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
    name = hashlib.sha256(str(path).encode()).hexdigest()[:32]
    memory = cache_folder(cache_dir) / "digests" / f"{name}.json"
    known: dict[str, bytes] = {}
    try:
        stored = json.loads(memory.read_text())
        if stored["state"] == state:
            known = {label: bytes.fromhex(text) for label, text in stored["digests"].items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        pass  # absent, or not written by this version: compute again
    missing = [label for label in digesters if len(known.get(label, b"")) != 32]
    if missing:
        # hashlib releases the interpreter lock, so threads hash in parallel.
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            found = pool.map(lambda label: digesters[label](), missing)
            known.update(zip(missing, found, strict=True))
        memory.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"state": state, "digests": {label: known[label].hex() for label in known}})
        try:
            with replacing(memory) as file:
                file.write(text.encode())
        except DiskFullError as error:  # they are computed again next time
            log.warning("cannot remember digests: %s", error)
    return {label: known[label] for label in digesters}


def file_sha256(path: Path, cache_dir: Path | None = None, *, show: bool = False) -> bytes:
    """Return the SHA-256 of a whole file, remembered as `remembered_digests` does."""

    def digest() -> bytes:
        total = hashlib.sha256()
        with path.open("rb") as file, progress_bar(f"Checking {path.name}", path.stat().st_size, show) as bar:
            while piece := file.read(1 << 20):
                total.update(piece)
                bar(len(piece))
        return total.digest()

    return remembered_digests(path, {"file": digest}, cache_dir)["file"]
