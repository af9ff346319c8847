"""Running out of memory: how to know it, what to say at the start, how much there is, and taking less."""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from shared.complaint import is_want_of_memory

WORDS = ("out of memory",)  # what devices' allocators say besides
ARENA_MAX = -8  # M_ARENA_MAX of glibc's mallopt


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be had."""
    if is_want_of_memory(error) or isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in WORDS)


@contextmanager
def needing_memory(advice: str) -> Iterator[None]:
    """Say what to do if there is no memory for what is made here.

    Raises
    ------
    ValueError
        With ``advice``, in place of the error.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OverflowError) or is_out_of_memory(error):
            raise ValueError(advice) from error
        raise


def available_bytes(root: Path = Path("/")) -> int | None:
    """Return the memory that this process may still take (bytes), None where that cannot be known.

    Parameters
    ----------
    root
        Where ``proc`` and ``sys`` are.
    """
    found = []
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
        group = root / "sys/fs/cgroup"  # in a container, its own limit
        most = (group / "memory.max").read_text().strip()
        if most != "max":
            found.append(max(0, int(most) - int((group / "memory.current").read_text())))
    except (OSError, ValueError, IndexError):
        pass
    return min(found, default=None)


def share_one_heap() -> None:
    """Let all threads that start from now on take memory from one heap; nothing where there is no glibc.

    By default it gives each thread a heap, and what one thread has freed no other can have. Tuning runs
    pieces on as many threads as there are: with eight, a batch took 1.6 times what its formula says. Who sets
    MALLOC_ARENA_MAX has it as they say.
    """
    if not sys.platform.startswith("linux") or "MALLOC_ARENA_MAX" in os.environ:
        return
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(ARENA_MAX, 1)
