"""The other ranks of a replica: they hold a share of everything and do what rank 0 says.

A follower has no engine, no sessions and no port. It keeps what steps and tuning batches have come to, the
same as rank 0 but for its own heads and columns, and ends when it is told to or when rank 0 is gone.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cloud_server.arena import Arena
from cloud_server.backbone import Slice
from cloud_server.kv_cache import KvCache, Row, Table
from cloud_server.parallel_backbone import ParallelBackbone
from cloud_server.parallel_commands import NO_ARENA, UNCHANGED, Numbers, Op, records
from cloud_server.step import RowSpan, Step
from cloud_server.tune_piece import Piece, Stage
from cloud_server.tuning import TuneBatch


class Follower:
    """One rank that follows.

    Parameters
    ----------
    backbone, cache
        This rank's share.
    """

    def __init__(self, backbone: ParallelBackbone, cache: KvCache) -> None:
        self.backbone, self.cache, self.ranks = backbone, cache, backbone.ranks
        self.steps: dict[int, Step] = {}  # by the serial that rank 0 knows them by
        self.tables: dict[int, list[Table]] = {}
        self.batches: dict[int, FollowingTuneBatch] = {}

    def follow(self) -> None:
        """Do what rank 0 says until it says stop.

        Raises
        ------
        RuntimeError
            If rank 0 or another rank is gone, or says nothing for too long.
        """
        while True:
            message, elements = self.ranks.receive()
            b = self.backbone
            shared = torch.empty(elements, dtype=b.dtype, device=b.device)
            if elements:
                self.ranks.share(shared)
            for op, numbers in records(message):
                if op is Op.STOP:
                    return
                self._do(op, Numbers(numbers), numbers, Rest(shared))

    def _do(self, op: Op, read: Numbers, numbers: Sequence[int], tensors: "Rest") -> None:
        match op:
            case Op.RUN:
                self._run(read, tensors)
            case Op.STASH:
                self._stash(read, tensors)
            case Op.BEAT:
                self.ranks.count()
            case Op.COPY:
                self.cache.copy_block(*numbers)
            case Op.CLEAR:
                self.cache.clear_block(*numbers)
            case Op.FORGET:
                self.steps.pop(numbers[0], None)
                self.tables.pop(numbers[0], None)
            case Op.TUNE_OPEN:
                self._open(read, len(numbers))
            case Op.TUNE_RUN:
                batch = self.batches[read.one()]
                batch.run(batch.pieces[read.one()])
            case Op.TUNE_FREE:
                self.batches.pop(numbers[0]).free()

    @torch.inference_mode()
    def _run(self, read: Numbers, tensors: "Rest") -> None:
        slices = []
        for _ in range(read.one()):
            serial, lo, hi = read.some(3)
            step = self._step(serial, read, tensors)
            tables = self.tables[serial]
            for index in range(len(step.spans)):
                if (count := read.one()) != UNCHANGED:
                    tables[index] = Table(read.some(count))
            if read.one():
                owner = step.plan.owner_of(step.layer)
                assert owner is not None
                step.residual_codes[owner] = tensors.take(step.tokens, step.plan.residual_width)
            part = Slice(step, lo, hi)
            part.tables = tuple(tables)
            slices.append(part)
        self.backbone.run(slices, self.cache)

    @torch.inference_mode()
    def _stash(self, read: Numbers, tensors: "Rest") -> None:
        steps = [self._step(read.one(), read, tensors) for _ in range(read.one())]
        for step in steps:
            step.normed = self.backbone.layers[step.layer].norm(step.hidden)
        self.backbone.stash(steps)

    def _step(self, serial: int, read: Numbers, tensors: "Rest") -> Step:
        """Return the step of this serial, which may be introduced here."""
        if read.one():
            plan, spans = self.backbone.plan_list[read.one()], []
            for _ in range(read.one()):
                start, count = read.some(2)
                spans.append(RowSpan(Row(), start, count, 0))
            hidden = tensors.take(sum(span.count for span in spans), plan.hidden_size)
            self.steps[serial] = Step(0, plan, tuple(spans), hidden, _nobody, _nobody)
            self.tables[serial] = [Table([])] * len(spans)
        return self.steps[serial]

    def _open(self, read: Numbers, total: int) -> None:
        number, plan, forward_only, checkpointing, piece_tokens, size = read.some(6)
        self.batches[number] = FollowingTuneBatch(
            self.backbone,
            self.backbone.plan_list[plan],
            read.some(total - 6),
            _nobody,
            forward_only=bool(forward_only),
            checkpointing=bool(checkpointing),
            piece_tokens=piece_tokens,
            arena=None if size == NO_ARENA else Arena(size),
        )


class FollowingTuneBatch(TuneBatch):
    """A tuning batch that does as rank 0's does; see `TuneBatch`. Nothing is sent from here."""

    def _emit(self, piece: Piece) -> None:
        """Norm the input; the codes are rank 0's matter."""
        piece.normed = self.backbone.layers[piece.layer].norm(self._input(piece))
        piece.stage = Stage.STASH

    def _take(self, name: str, layer: int, piece: Piece) -> Tensor:
        plan = self.plan
        widths = {"residual_codes": plan.residual_width, "codes_gradient": plan.codes_width}
        shape = (piece.tokens, widths.get(name, plan.hidden_size))
        assert isinstance(self.backbone, ParallelBackbone)
        b = self.backbone
        return b.ranks.share(torch.empty(shape, dtype=b.dtype, device=b.device))

    def _send(self, name: str, layer: int, piece: Piece, rows: Tensor) -> None:
        """Say nothing."""


class Rest:
    """What is left of the numbers that followed a command."""

    def __init__(self, shared: Tensor) -> None:
        self._shared, self._at = shared, 0

    def take(self, rows: int, width: int) -> Tensor:
        """Return the next ``(rows, width)``."""
        start, self._at = self._at, self._at + rows * width
        return self._shared[start : self._at].view(rows, width)


def _nobody(*_: object) -> None:
    """Tell nobody."""
