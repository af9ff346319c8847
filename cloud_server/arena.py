"""One block of memory for what a tuning batch keeps, so that it takes what its formula says.

What is kept for the way back lives long, what is computed in between does not. Left to the allocator, the
two lie mixed and leave holes: a third more memory, measured, and not given back afterwards. Copying what is
kept into a block of its own costs two percent of the time. On a GPU torch's own allocator does as well.
Taking fresh memory costs as much as the layers' own way forward on some machines, so a block serves one
batch after another.
"""

import mmap
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

ALIGNMENT = 64  # bytes; what kernels like
SPARE_ROOM = 1.25  # of a new arena for later batches, as a multiple of the first: addresses, no memory


class Arena:
    """A block that is filled from the front and freed as a whole.

    Parameters
    ----------
    size
        Bytes. What does not fit is copied elsewhere; memory that is never filled is never taken.
    room
        Bytes that a later batch may make of it at most, ``size`` if not given.
    """

    def __init__(self, size: int, room: int = 0) -> None:
        self.size, self.used, self.room = size, 0, max(size, room)
        self._pages, self._can_shrink = _pages(self.room)
        self._storage = torch.frombuffer(self._pages, dtype=torch.uint8).untyped_storage()
        self._written = 0  # bytes at the front that are taken by now
        self._taking = threading.Lock()

    def fits(self, size: int) -> bool:
        """Whether it can become an arena of so many bytes, and hold no more than that."""
        return size <= self.room and (self._can_shrink or max(self._written, self.used) <= size)

    def begin(self, size: int) -> None:
        """Be an empty arena of so many bytes, which fit; nothing may be left of what was in it."""
        written = max(self._written, self.used)
        keep = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        if written > keep:
            self._pages.madvise(mmap.MADV_DONTNEED, keep, written - keep)
            written = keep
        self.size, self.used, self._written = size, 0, written

    def copy(self, tensor: Tensor) -> Tensor:
        """Return a contiguous copy of ``tensor`` that stays until the arena goes."""
        room = self._take(tensor.numel(), tensor.dtype)
        return tensor.clone() if room is None else room.view(tensor.shape).copy_(tensor)

    @contextmanager
    def keeping(self, lives_elsewhere: Callable[[Tensor], bool]) -> Iterator[None]:
        """Let graphs that are made meanwhile save copies in here.

        Parameters
        ----------
        lives_elsewhere
            Whether a saved tensor is one that outlives the batch or that batches share, like a weight.
        """
        # By address: what is saved as two views is copied once. The original stays until the end, or what is
        # computed next could come to lie at its address and be taken for it.
        copies: dict[int, tuple[Tensor, torch.UntypedStorage]] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            address = storage.data_ptr()
            if address == self._storage.data_ptr() or lives_elsewhere(tensor):
                return tensor
            if address not in copies:
                whole = torch.empty(0, dtype=tensor.dtype).set_(storage)
                copies[address] = self.copy(whole), storage
            strides, offset = tensor.stride(), tensor.storage_offset()
            base, _ = copies[address]
            return torch.empty(0, dtype=tensor.dtype).set_(
                base.untyped_storage(), base.storage_offset() + offset, tensor.shape, strides
            )

        try:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                yield
        finally:
            copies.clear()  # the graph holds on to ``pack``

    def _take(self, count: int, dtype: torch.dtype) -> Tensor | None:
        """Return room for ``count`` elements, None if there is none."""
        with self._taking:
            start = -(-self.used // ALIGNMENT) * ALIGNMENT
            if start + count * dtype.itemsize > self.size:
                return None
            self.used = start + count * dtype.itemsize
        # Not a view: views of one tensor share a version, and writing to one would look like writing to all.
        return torch.empty(0, dtype=dtype).set_(self._storage, start // dtype.itemsize, (count,), (1,))


class Arenas:
    """Arenas that no batch has, for the next ones."""

    def __init__(self) -> None:
        self._idle: list[Arena] = []  # who came last is last

    @property
    def bytes(self) -> int:
        """What they hold at most."""
        return sum(arena.size for arena in self._idle)

    def get(self, size: int) -> Arena:
        """Return an empty arena, one that was used before if it can be of this size."""
        for place in reversed(range(len(self._idle))):
            if self._idle[place].fits(size):
                arena = self._idle.pop(place)
                arena.begin(size)
                return arena
        return Arena(size, int(size * SPARE_ROOM))

    def put(self, arena: Arena) -> None:
        """Take an arena of which nothing is in use any more."""
        self._idle.append(arena)

    def shrink(self, most: int) -> None:
        """Free those that were not used for longest until they hold at most so many bytes."""
        while self._idle and self.bytes > most:
            del self._idle[0]


def _pages(size: int) -> tuple[mmap.mmap, bool]:
    """Return memory that is not taken before it is written to, and whether parts can be given back.

    Where possible it is taken 2 MiB at a time: by pages of 4 KiB that costs a fifth of the layers' own way
    forward on a machine that has the memory at hand, and more on one that does not.
    """
    try:
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # memory that is shared is not given in large pages
        found = mmap.mmap(-1, max(1, size), flags=private)
        found.madvise(mmap.MADV_HUGEPAGE)
        return found, sys.platform == "linux"  # elsewhere MADV_DONTNEED is a hint
    except (AttributeError, OSError):  # no such thing on this system
        return mmap.mmap(-1, max(1, size)), False
