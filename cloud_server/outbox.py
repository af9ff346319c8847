"""What waits to be sent to one edge, in order. Knows nothing about what it means."""

import asyncio
from collections import deque

from shared.pb.privatelora.v1 import private_lora_pb2 as pb

OUTBOX_MESSAGES = 16  # more than an edge that reads ever leaves waiting


class Outbox:
    """Messages on their way to one edge, in order."""

    def __init__(self) -> None:
        self._messages: deque[pb.DecodeResponse] = deque()
        self._filled = asyncio.Event()
        self._taken = asyncio.Event()

    @property
    def is_empty(self) -> bool:
        """Whether everything was taken to be sent."""
        return not self._messages

    @property
    def is_full(self) -> bool:
        """Whether so much waits for the edge that no more should be asked of us."""
        return len(self._messages) >= OUTBOX_MESSAGES

    async def has_room(self) -> None:
        """Wait until the edge has read enough."""
        while self.is_full:
            self._taken.clear()
            await self._taken.wait()

    def put(self, message: pb.DecodeResponse) -> None:
        """Add a message; never waits."""
        self._messages.append(message)
        self._filled.set()

    async def get(self) -> pb.DecodeResponse:
        """Return the next message."""
        while not self._messages:
            self._filled.clear()
            await self._filled.wait()
        self._taken.set()
        return self._messages.popleft()

    def clear(self) -> None:
        """Forget what was not sent: the stream is gone."""
        self._messages.clear()
