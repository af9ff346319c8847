"""What a person is told of an error: what is wrong, where, and what to do. No error numbers.

What this project raises is in words already. What the operating system says of a file is not: it has a
number, and does not say whether a file or a folder was looked for.
"""

import errno
import os
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path

FOR_ANOTHER = {errno.EACCES, errno.EPERM, errno.EROFS}
NOT_A_FOLDER = {errno.ENOTDIR, errno.EEXIST}
TOO_MANY_OPEN = {errno.EMFILE, errno.ENFILE}
# What torch and the system say; torch's allocator for the CPU has no error type of its own.
NO_MEMORY = ("can't allocate memory", "Cannot allocate memory", "failed to map segment")


def setting_in_words(kind: str, place: Sequence[int | str], message: str, known: Iterable[str]) -> str:
    """Return what is wrong with a setting.

    Parameters
    ----------
    kind, place, message
        What pydantic says: ``type``, ``loc`` and ``msg`` of one of its errors.
    known
        Names of settings, to guess what was meant by one that is not among them.
    """
    if kind != "extra_forbidden":
        return message.removeprefix("Value error, ")
    meant = get_close_matches(str(place[-1]), list(known), n=1)
    return "unknown setting" + (f"; was {meant[0]} meant?" if meant else "; --help lists those there are")


def is_want_of_memory(error: BaseException) -> bool:
    """Whether an error says that this process found no memory, be it for a library that it was to load."""
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError | ImportError) and any(word in str(error) for word in NO_MEMORY)


def in_words(error: BaseException) -> str:
    """Return an error's message for a person."""
    if is_want_of_memory(error):
        return (
            "there is not enough memory for this: end other programs, raise the limit that this one runs "
            "under (`ulimit -v`, a container's), or take a machine with more"
        )
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    if error.errno in TOO_MANY_OPEN:
        return (
            "too many files and connections are open: raise the limit that this program runs under "
            "(`ulimit -n`; LimitNOFILE of a systemd unit)"
        )
    if error.filename is None:
        return str(error.strerror)
    # Where a file takes another's place, the second is the one that a person knows; the first is our draft.
    path = Path(os.fsdecode(error.filename if error.filename2 is None else error.filename2))
    if error.errno in NOT_A_FOLDER and (file := _file_on_the_way(path)) is not None:
        return f"{file} is a file, and a folder is needed there: move it away, or name another folder"
    if error.errno in FOR_ANOTHER:
        return f"this user may not use {path}: change its owner or its permissions, or name another place"
    if error.errno == errno.ENOENT:
        return f"there is no {path}"
    if error.errno == errno.EISDIR:
        return f"{path} is a folder, and a file is needed there: name another"
    return f"cannot use {path}: {error.strerror[:1].lower()}{error.strerror[1:]}"


def _file_on_the_way(path: Path) -> Path | None:
    """Return the first part of a path that is a file, None if there is none."""
    return next((part for part in (*reversed(path.parents), path) if part.is_file()), None)
