"""One block of memory for what a tuning batch keeps, so that it takes what its formula says.

What is kept for the way back lives long, what is computed in between does not. Left to the allocator, the
two lie mixed and leave holes: a third more memory, measured, and not given back afterwards. Copying what is
kept into a block of its own costs two percent of the time. On a GPU torch's own allocator does as well.
"""

import mmap
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

ALIGNMENT = 64  # bytes; what kernels like


class Arena:
    """A block that is filled from the front and freed as a whole.

    Parameters
    ----------
    size
        Bytes. What does not fit is copied elsewhere; memory that is never filled is never taken.
    """

    def __init__(self, size: int) -> None:
        self._storage = torch.frombuffer(_pages(size), dtype=torch.uint8).untyped_storage()
        self.size, self.used = size, 0

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
        start = -(-self.used // ALIGNMENT) * ALIGNMENT
        if start + count * dtype.itemsize > self.size:
            return None
        self.used = start + count * dtype.itemsize
        # Not a view: views of one tensor share a version, and writing to one would look like writing to all.
        return torch.empty(0, dtype=dtype).set_(self._storage, start // dtype.itemsize, (count,), (1,))


def _pages(size: int) -> mmap.mmap:
    """Return memory that is not taken before it is written to: where possible, 2 MiB at a time.

    By pages of 4 KiB, taking it costs as much as a fifth of the layers' own way forward.
    """
    try:
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # memory that is shared is not given in large pages
        found = mmap.mmap(-1, max(1, size), flags=private)
        found.madvise(mmap.MADV_HUGEPAGE)
    except (AttributeError, OSError):  # no such thing on this system
        found = mmap.mmap(-1, max(1, size))
    return found
