"""Keys and values of all sessions, in blocks of one preallocated, byte-budgeted pool.

A row is one sequence: a table of blocks and a length. Rows can be cropped and forked (forks share
blocks until one of them writes). Blocks are cleared before they change hands. Knows nothing about
sessions, plans or the network.
"""

import math
import mmap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from shared.families import Geometry

BLOCK_TOKENS = 32


class KvFullError(RuntimeError):
    """No free block is left within the byte budget."""


class Table:
    """A row's blocks at one moment. Never changes: a running slice keeps it while the row is cropped."""

    def __init__(self, blocks: list[int]) -> None:
        self.blocks = tuple(blocks)
        self.base = blocks[0] * BLOCK_TOKENS if blocks else 0
        self.contiguous = blocks == list(range(blocks[0], blocks[0] + len(blocks))) if blocks else True
        self._slots: Tensor | None = None

    def slots(self, end: int) -> Tensor:
        """Return the pool slots of positions 0..end-1: ``(end,)`` int64."""
        if self._slots is None:
            first = torch.tensor(self.blocks, dtype=torch.int64)[:, None] * BLOCK_TOKENS
            self._slots = (first + torch.arange(BLOCK_TOKENS)).reshape(-1)  # (blocks * BLOCK_TOKENS,)
        return self._slots[:end]


@dataclass(eq=False)
class Row:
    """One sequence in the cache.

    ``length`` counts the positions that are taken, ``written`` those whose keys and values have been
    written in every layer; the two differ while a step is in flight.
    """

    blocks: list[int] = field(default_factory=list)
    length: int = 0
    written: int = 0
    _table: Table | None = None

    @property
    def table(self) -> Table:
        """The block table as it is now."""
        if self._table is None:
            self._table = Table(self.blocks)
        return self._table

    def table_changed(self) -> None:
        """Forget what was derived from the block table."""
        self._table = None


class KvCache:
    """A pool of blocks of keys and values.

    Parameters
    ----------
    geometry
        Sizes of the decoder.
    layers
        The decoder layers that are served here.
    budget_bytes
        The most memory the pool may take; rounded down to whole blocks.
    dtype, device
        Of the pool: the backbone's.
    """

    def __init__(
        self,
        geometry: Geometry,
        layers: range,
        budget_bytes: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        per_token = 2 * len(layers) * geometry.kv_dim * dtype.itemsize
        self.block_bytes = per_token * BLOCK_TOKENS
        self.num_blocks = budget_bytes // self.block_bytes
        if self.num_blocks < 1:
            raise ValueError(
                f"a KV budget of {budget_bytes} bytes holds not one block of {self.block_bytes} bytes "
                f"({BLOCK_TOKENS} tokens); raise --kv-bytes"
            )
        self.first_layer = layers.start
        self.pool = _zeros(
            (len(layers), 2, geometry.num_kv_heads, self.num_blocks * BLOCK_TOKENS, geometry.head_dim),
            dtype,
            device,
        )  # (layers, k|v, kv_heads, slots, head_dim)
        self._users = np.zeros(self.num_blocks, dtype=np.int32)  # rows that hold each block
        self._dirty = np.zeros(self.num_blocks, dtype=bool)
        self.free_blocks = self.num_blocks
        self._held: set[int] = set()  # blocks that another thread may be writing to
        self._quarantine: list[int] = []

    @property
    def bytes_total(self) -> int:
        """Size of the pool in bytes."""
        return self.num_blocks * self.block_bytes

    @property
    def num_tokens(self) -> int:
        """Positions that the pool holds in all."""
        return self.num_blocks * BLOCK_TOKENS

    @property
    def bytes_used(self) -> int:
        """Bytes of blocks that rows hold."""
        return (self.num_blocks - self.free_blocks) * self.block_bytes

    def keys_values(self, layer: int) -> Tensor:
        """Return one layer's part of the pool: ``(2, kv_heads, slots, head_dim)``."""
        return self.pool[layer - self.first_layer]

    def blocks_needed(self, row: Row, start: int, end: int) -> int:
        """Return how many free blocks ``reserve`` would take: growth and copies of shared blocks."""
        grown = max(0, -(-end // BLOCK_TOKENS) - len(row.blocks))
        written = row.blocks[start // BLOCK_TOKENS : -(-end // BLOCK_TOKENS)]
        return grown + sum(1 for block in written if self._users[block] > 1)

    def reserve(self, row: Row, start: int, end: int) -> None:
        """Make positions ``start..end-1`` of ``row`` writable, growing it or copying shared blocks.

        Raises
        ------
        KvFullError
            If too few blocks are free; the row is then unchanged.
        """
        needed = self.blocks_needed(row, start, end)
        if needed > self.free_blocks:
            raise KvFullError(f"{needed} blocks needed, {self.free_blocks} of {self.num_blocks} free")
        if needed == 0:
            return
        for index in range(start // BLOCK_TOKENS, min(len(row.blocks), -(-end // BLOCK_TOKENS))):
            shared = row.blocks[index]
            if self._users[shared] > 1:
                own = self._take(row.blocks[index - 1] if index else None)
                self.copy_block(shared, own)
                self._users[shared] -= 1
                row.blocks[index] = own
        while len(row.blocks) * BLOCK_TOKENS < end:
            row.blocks.append(self._take(row.blocks[-1] if row.blocks else None))
        row.table_changed()

    def crop(self, row: Row, length: int, until: int = 0) -> None:
        """Forget positions from ``length`` on; blocks that hold nothing any more are freed.

        Those up to position ``until`` stay the row's, for whoever is about to write them again: given back,
        they may be lacking while a slice still runs on them.
        """
        row.length, row.written = length, min(row.written, length)
        keep = -(-max(length, until) // BLOCK_TOKENS)
        if keep < len(row.blocks):
            self._release(row.blocks[keep:])
            del row.blocks[keep:]
            row.table_changed()

    def fork(self, row: Row) -> Row:
        """Return a new row with the same content; blocks are shared until either writes."""
        for block in row.blocks:
            self._users[block] += 1
        return Row(list(row.blocks), row.length, row.written)

    def free(self, row: Row) -> None:
        """Give all blocks of ``row`` back."""
        self.crop(row, 0)

    def _block(self, block: int) -> Tensor:
        start = block * BLOCK_TOKENS
        return self.pool[:, :, :, start : start + BLOCK_TOKENS]

    def copy_block(self, block: int, to: int) -> None:
        """Copy the keys and values of a block onto another."""
        self._block(to).copy_(self._block(block))

    def clear_block(self, block: int) -> None:
        """Forget the keys and values of a block."""
        self._block(block).zero_()

    def _take(self, after: int | None) -> int:
        """Take a free block: the next one if possible, so that a row stays one plain slice."""
        if after is not None and after + 1 < self.num_blocks and self._users[after + 1] == 0:
            block = after + 1
        else:
            block = self._start_of_run()
        self._users[block] = 1
        self.free_blocks -= 1
        if self._dirty[block]:
            self.clear_block(block)
        self._dirty[block] = True
        return block

    def _start_of_run(self) -> int:
        """Return where a new row should start: the middle of the widest gap leaves both neighbours room."""
        edges = np.flatnonzero(np.diff(np.concatenate(([1], self._users > 0, [1]))))
        starts, ends = edges[::2], edges[1::2]
        widest = int(np.argmax(ends - starts))
        start, end = int(starts[widest]), int(ends[widest])
        return start if start == 0 else start + (end - start) // 2

    @contextmanager
    def in_use(self, tables: Iterable[Table]) -> Iterator[None]:
        """While another thread may write to these tables' blocks, none that is freed changes hands."""
        self._held = {block for table in tables for block in table.blocks}
        try:
            yield
        finally:
            blocks, self._held, self._quarantine = self._quarantine, set(), []
            self._release(blocks)

    def _release(self, blocks: list[int]) -> None:
        for block in blocks:
            if block in self._held:
                self._quarantine.append(block)
                continue
            self._users[block] -= 1
            if self._users[block] == 0:
                self.free_blocks += 1


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return zeros that cost memory on the CPU only where they are written; torch.zeros writes them all."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)  # zeroed by the system when first touched
    return torch.frombuffer(pages, dtype=dtype).view(shape)
