"""The paged KV cache against plain lists: content, sharing, clearing and the bytes that are accounted for."""

import resource
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from cloud_server.kv_cache import BLOCK_TOKENS, KvCache, KvFullError, Row
from shared.families import Geometry, geometry
from tests.families import build

LAYERS = range(2, 4)
NUM_BLOCKS = 12


def tiny_geometry() -> Geometry:
    return geometry(build("llama").config)


GEOMETRY = tiny_geometry()
BLOCK_BYTES = 2 * len(LAYERS) * GEOMETRY.kv_dim * 4 * BLOCK_TOKENS


def new_cache(blocks: int = NUM_BLOCKS) -> KvCache:
    return KvCache(GEOMETRY, LAYERS, blocks * BLOCK_BYTES, torch.float32, torch.device("cpu"))


def write(cache: KvCache, row: Row, start: int, values: list[float]) -> None:
    """Do what a step does: make room, then write keys and values in every layer."""
    if start < row.length:
        cache.crop(row, start)
    end = start + len(values)
    cache.reserve(row, start, end)
    slots = row.table.slots(end)[start:]
    for layer in LAYERS:
        cache.keys_values(layer)[:, :, slots] = torch.tensor(values).view(1, 1, -1, 1) + layer
    row.length = row.written = end


def content(cache: KvCache, row: Row) -> list[float]:
    """Return what was written, from every place of the pool that should hold it."""
    slots = row.table.slots(row.length)
    found = torch.stack([cache.keys_values(layer)[:, :, slots] - layer for layer in LAYERS])
    values = found[0, 0, 0, :, 0]  # (length,)
    assert (found == values.view(1, 1, 1, -1, 1)).all()
    return values.tolist()


# --- the budget ------------------------------------------------------------


def test_the_budget_is_rounded_down_to_blocks() -> None:
    cache = KvCache(GEOMETRY, LAYERS, 3 * BLOCK_BYTES + 17, torch.float32, torch.device("cpu"))
    assert cache.bytes_total == 3 * BLOCK_BYTES == cache.pool.nbytes
    assert cache.num_tokens == 3 * BLOCK_TOKENS and cache.bytes_used == 0


def test_a_budget_below_one_block_is_refused() -> None:
    with pytest.raises(ValueError, match="not one block.*raise --kv-bytes"):
        KvCache(GEOMETRY, LAYERS, BLOCK_BYTES - 1, torch.float32, torch.device("cpu"))


def test_bytes_follow_the_dtype() -> None:
    cache = KvCache(GEOMETRY, LAYERS, BLOCK_BYTES, torch.bfloat16, torch.device("cpu"))
    assert cache.num_blocks == 2 and cache.pool.nbytes == cache.bytes_total


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_memory_is_taken_where_it_is_used() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    before = resident()
    cache = KvCache(GEOMETRY, LAYERS, 256 << 20, torch.float32, torch.device("cpu"))
    assert cache.bytes_total > 255 << 20 and resident() - before < 64 << 20
    write(cache, Row(), 0, [1.0] * 40)
    assert resident() - before < 64 << 20


@pytest.mark.parametrize(("end", "blocks"), [(1, 1), (32, 1), (33, 2), (64, 2), (384, 12)])
def test_reserve_takes_whole_blocks(end: int, blocks: int) -> None:
    cache, row = new_cache(), Row()
    cache.reserve(row, 0, end)
    assert cache.bytes_used == blocks * BLOCK_BYTES and len(row.blocks) == blocks
    cache.reserve(row, 0, end)  # again: nothing more
    assert cache.bytes_used == blocks * BLOCK_BYTES
    cache.free(row)
    assert cache.bytes_used == 0 and row.blocks == []


def test_a_full_cache_refuses_and_changes_nothing() -> None:
    cache, row, other = new_cache(3), Row(), Row()
    write(cache, row, 0, [1.0] * 40)
    before = (list(row.blocks), row.length, cache.bytes_used)
    with pytest.raises(KvFullError, match="2 blocks needed, 1 of 3 free"):
        cache.reserve(row, 40, 128)
    with pytest.raises(KvFullError):
        cache.reserve(other, 0, 33)
    assert (list(row.blocks), row.length, cache.bytes_used) == before and other.blocks == []
    cache.reserve(other, 0, 32)
    assert cache.free_blocks == 0


def test_copies_of_shared_blocks_count_as_needed() -> None:
    cache, row = new_cache(3), Row()
    write(cache, row, 0, [1.0] * 64)
    twins = [cache.fork(row), cache.fork(row)]
    assert cache.blocks_needed(twins[0], 40, 41) == 1
    assert cache.blocks_needed(twins[0], 0, 64) == 2
    assert cache.blocks_needed(twins[0], 40, 65) == 2
    write(cache, twins[0], 40, [2.0])
    with pytest.raises(KvFullError):
        cache.reserve(twins[1], 40, 41)
    assert content(cache, twins[1]) == content(cache, row) == [1.0] * 64


# --- rows ------------------------------------------------------------


def test_crop_frees_blocks_that_hold_nothing() -> None:
    cache, row = new_cache(), Row()
    write(cache, row, 0, [float(i) for i in range(100)])
    for length, blocks in ((97, 4), (96, 3), (65, 3), (64, 2), (1, 1), (0, 0)):
        cache.crop(row, length)
        assert cache.bytes_used == blocks * BLOCK_BYTES
        assert content(cache, row) == [float(i) for i in range(length)]
        assert row.written == length


def test_crop_leaves_the_blocks_that_are_about_to_be_written_again() -> None:
    cache, row = new_cache(), Row()
    write(cache, row, 0, [float(i) for i in range(100)])
    before = list(row.blocks)
    cache.crop(row, 10, 64)
    assert row.blocks == before[:2] and row.length == row.written == 10
    assert cache.blocks_needed(row, 10, 64) == 0 and cache.blocks_needed(row, 10, 65) == 1
    twin = cache.fork(row)
    assert cache.blocks_needed(row, 10, 64) == 2, "what is shared is copied before it is written"
    cache.free(twin)
    cache.free(row)
    assert cache.bytes_used == 0


def test_forks_share_until_one_writes() -> None:
    cache, row = new_cache(), Row()
    write(cache, row, 0, [float(i) for i in range(40)])
    twin = cache.fork(row)
    assert cache.bytes_used == 2 * BLOCK_BYTES and twin.length == twin.written == 40
    write(cache, twin, 40, [-1.0])
    assert cache.bytes_used == 3 * BLOCK_BYTES, "the first block is still shared"
    write(cache, row, 40, [-2.0])
    assert cache.bytes_used == 3 * BLOCK_BYTES, "nobody else holds the last block any more"
    assert content(cache, row) == [*map(float, range(40)), -2.0]
    assert content(cache, twin) == [*map(float, range(40)), -1.0]
    cache.free(row)
    assert content(cache, twin) == [*map(float, range(40)), -1.0]
    cache.free(twin)
    assert cache.bytes_used == 0


def test_a_table_outlives_the_crop_of_its_row() -> None:
    """A slice that runs on another thread keeps the table it started with."""
    cache, row = new_cache(), Row()
    write(cache, row, 0, [1.0] * 70)
    table, slots = row.table, row.table.slots(70).clone()
    cache.free(row)
    assert torch.equal(table.slots(70), slots) and row.table.slots(0).tolist() == []


def test_rows_that_grow_side_by_side_stay_contiguous() -> None:
    cache, rows = new_cache(), [Row(), Row()]
    for start in range(0, 4 * BLOCK_TOKENS, 8):
        for row in rows:
            write(cache, row, start, [1.0] * 8)
    assert all(row.table.contiguous for row in rows)
    assert all(row.table.base == row.blocks[0] * BLOCK_TOKENS for row in rows)


def test_a_scattered_row_knows_that_it_is() -> None:
    cache, rows = new_cache(4), [Row() for _ in range(4)]
    for row in rows:
        cache.reserve(row, 0, 1)
    by_block = sorted(rows, key=lambda row: row.blocks)
    cache.free(by_block[0])
    cache.free(by_block[2])
    cache.reserve(by_block[3], 0, 3 * BLOCK_TOKENS)
    assert not by_block[3].table.contiguous


# --- blocks change hands ------------------------------------------------------------


def test_blocks_are_cleared_before_another_row_gets_them() -> None:
    cache, row = new_cache(), Row()
    write(cache, row, 0, [float("nan")] * NUM_BLOCKS * BLOCK_TOKENS)
    cache.free(row)
    other = Row()
    cache.reserve(other, 0, NUM_BLOCKS * BLOCK_TOKENS)
    assert (cache.pool == 0).all()


def test_a_block_that_crop_freed_is_cleared_for_the_next_row_too() -> None:
    cache, row, other = new_cache(2), Row(), Row()
    write(cache, row, 0, [7.0] * 64)
    cache.crop(row, 32)
    cache.reserve(other, 0, 32)
    slots = other.table.slots(32)
    assert (cache.pool[:, :, :, slots] == 0).all()
    assert content(cache, row) == [7.0] * 32


def test_blocks_that_a_thread_may_write_to_do_not_change_hands() -> None:
    cache, running, idle, other = new_cache(4), Row(), Row(), Row()
    write(cache, running, 0, [1.0] * 64)
    write(cache, idle, 0, [2.0] * 64)
    with cache.in_use([running.table]):
        cache.free(running)
        assert cache.bytes_used == cache.bytes_total, "the running row's blocks are still taken"
        with pytest.raises(KvFullError):
            cache.reserve(other, 0, 1)
        cache.free(idle)  # nobody runs on it: free at once
        cache.reserve(other, 0, 64)
        with pytest.raises(KvFullError):
            cache.reserve(other, 0, 65)
    assert cache.bytes_used == 2 * BLOCK_BYTES
    cache.reserve(other, 0, 128)


def test_a_shared_block_in_use_is_released_once_a_holder() -> None:
    cache, row = new_cache(), Row()
    write(cache, row, 0, [1.0] * 32)
    twins = [cache.fork(row), cache.fork(row)]
    with cache.in_use([row.table]):
        for holder in (row, *twins):
            cache.free(holder)
    assert cache.bytes_used == 0


def test_blocks_come_back_when_the_slice_fails() -> None:
    cache, row = new_cache(), Row()
    write(cache, row, 0, [1.0] * 32)
    with pytest.raises(RuntimeError), cache.in_use([row.table]):
        cache.free(row)
        raise RuntimeError
    assert cache.bytes_used == 0


# --- against plain lists ------------------------------------------------------------


class Pair:
    """A row and the list that it should be."""

    def __init__(self, row: Row, values: list[float]) -> None:
        self.row, self.values = row, values


class Machine(RuleBasedStateMachine):
    """Rows grow, are cropped, forked and freed in any order; some while a slice runs on them."""

    pairs = Bundle("pairs")

    def __init__(self) -> None:
        super().__init__()
        self.cache = new_cache()
        self.alive: list[Pair] = []
        self.stamp = 0.0

    @rule(target=pairs)
    def new(self) -> Pair:
        return self._add(Pair(Row(), []))

    @rule(pair=pairs, back=st.integers(0, 40), count=st.integers(1, 70))
    def write(self, pair: Pair, back: int, count: int) -> None:
        start = max(0, len(pair.values) - back)
        self.stamp += 1
        values = [self.stamp * 1000 + i for i in range(count)]
        before = (len(pair.row.blocks), self.cache.bytes_used)
        try:
            write(self.cache, pair.row, start, values)
        except KvFullError:
            del pair.values[start:]  # the crop that came first stays
            assert (len(pair.row.blocks), self.cache.bytes_used) <= before
        else:
            pair.values[start:] = values

    @rule(pair=pairs, keep=st.floats(0, 1))
    def crop(self, pair: Pair, keep: float) -> None:
        length = int(keep * len(pair.values))
        self.cache.crop(pair.row, length)
        del pair.values[length:]

    @rule(target=pairs, pair=pairs)
    def fork(self, pair: Pair) -> Pair:
        return self._add(Pair(self.cache.fork(pair.row), list(pair.values)))

    @rule(pair=consumes(pairs))
    def free(self, pair: Pair) -> None:
        self.cache.free(pair.row)
        self.alive.remove(pair)

    @rule(pair=consumes(pairs), other=pairs)
    def free_while_it_runs(self, pair: Pair, other: Pair) -> None:
        held = set(pair.row.blocks)
        with self.cache.in_use([pair.row.table]):
            self.cache.free(pair.row)
            self.alive.remove(pair)
            if other in self.alive:
                owned = set(other.row.blocks)
                self.write(other, 0, 33)
                assert not (set(other.row.blocks) - owned) & held

    def _add(self, pair: Pair) -> Pair:
        self.alive.append(pair)
        return pair

    @invariant()
    def rows_hold_what_the_lists_say(self) -> None:
        for pair in self.alive:
            assert pair.row.length == len(pair.values)
            assert content(self.cache, pair.row) == pair.values

    @invariant()
    def every_block_is_accounted_for(self) -> None:
        held = {block for pair in self.alive for block in pair.row.blocks}
        assert self.cache.bytes_used == len(held) * BLOCK_BYTES
        for pair in self.alive:
            assert len(set(pair.row.blocks)) == len(pair.row.blocks)

    def teardown(self) -> None:
        for pair in self.alive:
            self.cache.free(pair.row)
        assert self.cache.bytes_used == 0
        everything = Row()
        self.cache.reserve(everything, 0, self.cache.num_tokens)
        assert (self.cache.pool == 0).all()


TestAgainstLists = Machine.TestCase
TestAgainstLists.settings = settings(max_examples=40, stateful_step_count=25)
