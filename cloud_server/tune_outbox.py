"""What bounds tuning's memory besides a batch itself: all batches' budget, and what waits to be sent."""

import asyncio
import time
from collections import deque
from dataclasses import dataclass

import grpc
from torch import Tensor

from cloud_server.arena import Arenas
from cloud_server.refusal import Refusal
from cloud_server.releases import Releases
from shared import wire
from shared.pb.privatelora.v1 import private_lora_pb2 as pb


class Budget:
    """Bytes that all tuning batches share, those of idle arenas included."""

    def __init__(self, total: int) -> None:
        self.total, self.used, self.arenas = total, 0, Arenas()
        self.released = Releases()
        self._freed = asyncio.Event()

    async def take(self, count: int, patience_s: float) -> None:
        """Take bytes, if need be once others have given some back.

        Raises
        ------
        Refusal
            If that takes longer than ``patience_s``.
        """
        until = time.monotonic() + patience_s
        while self.used + count > self.total:
            self._freed.clear()
            try:
                await asyncio.wait_for(self._freed.wait(), until - time.monotonic())
            except asyncio.TimeoutError:  # not the built-in one before Python 3.11
                raise Refusal(
                    grpc.StatusCode.RESOURCE_EXHAUSTED,
                    f"other tuning batches hold {self.used / 2**20:.0f} of {self.total / 2**20:.0f} MiB; "
                    "try again later",
                    retry_after_s=self.released.hint_s(count),
                    reason="tuning_memory",
                ) from None
        self.used += count

    def trim(self) -> None:
        """Free idle arenas for which there is no room beside the batches."""
        self.arenas.shrink(self.total - self.used)

    def give_back(self, count: int) -> None:
        """Give bytes back."""
        self.used -= count
        self.released.note(count)
        self._freed.set()


@dataclass(frozen=True)
class Rows:
    """Rows of a tensor on their way to an edge. Cut into messages when they are read: nothing lies twice."""

    batch: int
    name: str
    layer: int
    first: int
    rows: Tensor  # (rows, width)


class TuneOutbox:
    """What waits for one edge, in order."""

    def __init__(self, wire_dtype: "pb.Dtype.ValueType") -> None:
        self.wire_dtype, self.most = wire_dtype, 0
        self._waiting: deque[Rows | pb.TuneResponse] = deque()
        self._elements = 0
        self._filled, self._taken = asyncio.Event(), asyncio.Event()

    @property
    def is_empty(self) -> bool:
        """Whether everything was taken to be sent."""
        return not self._waiting

    async def has_room(self) -> None:
        """Wait while more than ``most`` elements lie here: more than an edge that reads ever leaves."""
        while self._elements > self.most:
            self._taken.clear()
            await self._taken.wait()

    def put(self, message: Rows | pb.TuneResponse) -> None:
        """Add something; never waits."""
        self._waiting.append(message)
        self._elements += message.rows.numel() if isinstance(message, Rows) else 0
        self._filled.set()

    async def get(self) -> pb.TuneResponse:
        """Return the next message."""
        while not self._waiting:
            self._filled.clear()
            await self._filled.wait()
        first = self._waiting.popleft()
        if isinstance(first, pb.TuneResponse):
            return first
        count = max(1, wire.ROWS_BYTES // (first.rows.shape[1] * wire.TORCH_DTYPES[self.wire_dtype].itemsize))
        if count < len(first.rows):
            rest = Rows(first.batch, first.name, first.layer, first.first + count, first.rows[count:])
            self._waiting.appendleft(rest)
        rows, response = first.rows[:count], pb.TuneResponse()
        part: pb.Rows = getattr(response, first.name)
        part.batch, part.layer, part.first = first.batch, first.layer, first.first
        wire.fill(part.rows, rows, self.wire_dtype)
        self._elements -= rows.numel()
        self._taken.set()
        return response
