"""Rank 0 of a replica: a backbone, a KV cache and tuning batches that take all other ranks along.

The engine, the sessions and every decision are here and know nothing of it. Whatever runs is told to the
others first (`cloud_server.parallel_commands`) and then runs on all ranks at once. An error while it does
leaves the ranks in different places, so it ends the replica: nobody waits for somebody who will not come.
"""

import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
from torch import Tensor

from cloud_server.arena import Arena
from cloud_server.backbone import Slice
from cloud_server.kv_cache import KvCache, Table
from cloud_server.parallel_backbone import ParallelBackbone
from cloud_server.parallel_commands import NO_ARENA, UNCHANGED, Op, record
from cloud_server.parallel_ranks import Ranks
from cloud_server.step import Step
from cloud_server.tune_piece import Piece
from cloud_server.tuning import Send, TuneBatch
from shared.families import Geometry
from shared.plan import Plan

log = logging.getLogger(__name__)


class ReplicaError(RuntimeError):
    """The ranks of a replica are no longer in step; the message says what happened first."""


class Leader:
    """Tells the other ranks what to do.

    Parameters
    ----------
    ranks
        The others.
    beat_s
        After so many seconds without a command they are asked whether they are there.
    on_broken
        Called once, with the reason, when the replica cannot go on.
    """

    def __init__(self, ranks: Ranks, beat_s: float, on_broken: Callable[[str], object]) -> None:
        self.ranks, self.beat_s, self._on_broken = ranks, beat_s, on_broken
        self._waiting: deque[list[int]] = deque()  # records that no one has been told yet
        self._turn = threading.Lock()
        self._last = time.monotonic()
        self._broken: str | None = None
        self._stopped = threading.Event()

    def start(self) -> None:
        """Ask the others from time to time whether they are there."""
        self._last = time.monotonic()
        threading.Thread(target=self._beat_on, name="beat", daemon=True).start()

    def defer(self, op: Op, *numbers: int) -> None:
        """Tell the others with the next command; from any thread."""
        self._waiting.append(record(op, numbers))

    @contextmanager
    def command(self, op: Op, numbers: Sequence[int] = (), tensors: Sequence[Tensor] = ()) -> Iterator[None]:
        """Tell the others, and run what is inside the ``with`` block while they do the same.

        Raises
        ------
        ReplicaError
            If a rank is gone, does not answer in time, or an earlier command failed.
        """
        with self._turn:
            if self._broken is not None:
                raise ReplicaError(self._broken)
            try:
                message: list[int] = []
                while self._waiting:
                    message += self._waiting.popleft()
                message += record(op, numbers)
                self.ranks.send(message, sum(tensor.numel() for tensor in tensors))
                if tensors:
                    self.ranks.share(torch.cat([tensor.reshape(-1) for tensor in tensors]))
                yield
                self._last = time.monotonic()
            except BaseException as error:
                raise self._break(f"{op.name.lower()}: {error}") from error

    def beat(self) -> None:
        """Ask all whether they are there.

        Raises
        ------
        ReplicaError
            If one is not.
        """
        with self.command(Op.BEAT):
            self.ranks.count()

    def stop(self) -> None:
        """Let the others end, in order; nothing can be told them afterwards."""
        self._stopped.set()
        if self._broken is None:
            with self.command(Op.STOP):
                self._broken = "the replica has been stopped"

    def _break(self, what: str) -> ReplicaError:
        if self._broken is None:
            self._broken = f"the ranks of this replica are out of step and it ends ({' '.join(what.split())})"
            self._on_broken(self._broken)
        return ReplicaError(self._broken)

    def _beat_on(self) -> None:
        while not self._stopped.wait(self.beat_s / 4):
            if self._broken is not None:
                return
            if time.monotonic() - self._last < self.beat_s:
                continue
            try:
                self.beat()
            except ReplicaError:
                return  # who has to know, knows


class _Told:
    """What the others know of a step."""

    def __init__(self, spans: int) -> None:
        self.tables: list[Table | None] = [None] * spans
        self.owners: set[int] = set()  # whose residual codes


class LeadingBackbone(ParallelBackbone):
    """The first share of the layers, and the way to the others; see `ParallelBackbone`.

    Codes are made here alone: hidden states are the same on all ranks, and A is not cut.
    """

    def __init__(self, *arguments: Any, leader: Leader, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.leader = leader
        self._plan_numbers = {plan.name: index for index, plan in enumerate(self.plan_list)}
        self._told: dict[int, _Told] = {}  # by the step's serial

    def stash(self, steps: Sequence[Step]) -> None:
        """Compute the base products, on all ranks."""
        numbers, tensors = [len(steps)], list[Tensor]()
        for step in steps:
            numbers.append(step.serial)
            self._introduce(step, numbers, tensors)
        with self.leader.command(Op.STASH, numbers, tensors):
            super().stash(steps)

    def run(self, slices: Sequence[Slice], cache: KvCache) -> None:
        """Run one layer, on all ranks."""
        numbers, tensors = [len(slices)], list[Tensor]()
        for s in slices:
            numbers += (s.step.serial, s.lo, s.hi)
            told = self._introduce(s.step, numbers, tensors)
            for index, table in enumerate(s.tables):
                if told.tables[index] is table:
                    numbers.append(UNCHANGED)
                else:
                    numbers += (len(table.blocks), *table.blocks)
                    told.tables[index] = table
            owner = s.step.plan.owner_of(s.step.layer)
            follows = owner is not None and owner not in told.owners
            numbers.append(follows)
            if owner is not None and follows:
                told.owners.add(owner)
                tensors.append(s.step.residual_codes[owner])
        with self.leader.command(Op.RUN, numbers, tensors):
            super().run(slices, cache)

    def plan_number(self, plan: Plan) -> int:
        """Return by which number the others know a plan."""
        return self._plan_numbers[plan.name]

    def _introduce(self, step: Step, numbers: list[int], tensors: list[Tensor]) -> _Told:
        """Tell of a step what the others do not know yet; return what they then know."""
        told = self._told.get(step.serial)
        numbers.append(told is None)
        if told is None:
            assert step.offset == 0, "a step is told of before any of it has run"
            numbers += (self.plan_number(step.plan), len(step.spans))
            for span in step.spans:
                numbers += (span.start, span.count)
            tensors.append(step.hidden)
            told = self._told[step.serial] = _Told(len(step.spans))
            weakref.finalize(step, self._forget, step.serial).atexit = False
        return told

    def _forget(self, serial: int) -> None:
        del self._told[serial]
        self.leader.defer(Op.FORGET, serial)


class LeadingKvCache(KvCache):
    """Rank 0's keys and values, and who decides on everybody's; see `KvCache`.

    Blocks are the same on all ranks, each with its own heads. ``budget_bytes`` and all bytes that are stated
    are those of all ranks together.
    """

    def __init__(
        self,
        leader: Leader,
        geometry: Geometry,
        layers: range,
        budget_bytes: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(geometry, layers, budget_bytes // leader.ranks.size, dtype, device)
        self.leader = leader
        self.block_bytes *= leader.ranks.size

    def copy_block(self, block: int, to: int) -> None:
        """Copy a block, on all ranks."""
        super().copy_block(block, to)
        self.leader.defer(Op.COPY, block, to)

    def clear_block(self, block: int) -> None:
        """Forget a block, on all ranks."""
        super().clear_block(block)
        self.leader.defer(Op.CLEAR, block)


class LeadingTuneBatch(TuneBatch):
    """A tuning batch that runs on all ranks; see `TuneBatch`."""

    _numbers = count()
    may_share = False  # all ranks do the same in the same order

    def __init__(
        self,
        backbone: LeadingBackbone,
        plan: Plan,
        lengths: Sequence[int],
        send: Send,
        *,
        forward_only: bool = False,
        checkpointing: bool = False,
        piece_tokens: int = 128,
        arena: Arena | None = None,
    ) -> None:
        super().__init__(
            backbone,
            plan,
            lengths,
            send,
            forward_only=forward_only,
            checkpointing=checkpointing,
            piece_tokens=piece_tokens,
            arena=arena,
        )
        self._ranks, self._leader, self._number = backbone.ranks, backbone.leader, next(self._numbers)
        self._leader.defer(
            Op.TUNE_OPEN,
            self._number,
            backbone.plan_number(plan),
            forward_only,
            checkpointing,
            piece_tokens,
            NO_ARENA if arena is None else arena.size,
            *lengths,
        )

    def run(self, piece: Piece) -> None:
        """Take a ready piece one stage on, on all ranks."""
        with self._leader.command(Op.TUNE_RUN, (self._number, piece.index)):
            super().run(piece)

    def free(self) -> None:
        """Forget everything, on all ranks."""
        super().free()
        self._leader.defer(Op.TUNE_FREE, self._number)

    def _take(self, name: str, layer: int, piece: Piece) -> Tensor:
        return self._ranks.share(super()._take(name, layer, piece).contiguous())
