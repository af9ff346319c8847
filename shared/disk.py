"""A full disk: how to know it, and saying which file had no room and what to do."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # the disk, a user's share of it, a file
# What libraries write that pass on no error number.
WORDS = (
    *("No space left on device", "Disk quota exceeded", "File too large"),
    *(f"os error {number}" for number in sorted(FULL)),
)


class DiskFullError(OSError):
    """There is no room for a file; the message names it and says what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.errno = errno.ENOSPC


def is_disk_full(error: BaseException) -> bool:
    """Whether an error says that a disk is full."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in FULL
    return any(word in str(error) for word in WORDS)


@contextmanager
def room_for(target: Path, advice: str) -> Iterator[None]:
    """Say what to do if there is no room for what is written here.

    Parameters
    ----------
    target
        The file or folder that is written, as a person knows it.
    advice
        What to do besides freeing space.

    Raises
    ------
    DiskFullError
        In place of any error that says so.
    """
    try:
        yield
    except DiskFullError:
        raise
    except Exception as error:
        if not is_disk_full(error):
            raise
        raise DiskFullError(
            f"no room on the disk for {target}: {_free(target)}. Free some{advice}. Nothing half-written "
            "is left"
        ) from error


def _free(target: Path) -> str:
    folder = next((p for p in target.parents if p.is_dir()), Path("/"))
    try:
        return f"{shutil.disk_usage(folder).free / 2**20:.0f} MiB are free in {folder}"
    except OSError:
        return f"{folder} is full"
