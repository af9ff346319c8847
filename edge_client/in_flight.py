"""What a session has submitted and not got back: steps cut into chunks, and the chunks in the cloud.

Keeps to the number of chunks that the cloud takes at once, and wakes who waits for a step when all its
chunks are back. Knows nothing of streams. All but making a `Job` is done on the connection's thread.
"""

from collections import deque
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field

import torch
from torch import Tensor

from edge_client.streams import SessionError


@dataclass(frozen=True)
class Chunk:
    """Positions that travel in one message.

    Attributes
    ----------
    raw
        The message.
    number
        Of the chunk, counted over the session's life.
    tokens, keep
        How many positions it has, and of how many hL comes back (counts).
    """

    raw: bytes
    number: int
    tokens: int
    keep: int


@dataclass(eq=False)
class Job:
    """One call of `Session.step`: its chunks still to be sent, and hL of each as it comes back."""

    chunks: deque[Chunk]
    future: "Future[Tensor]" = field(default_factory=Future)
    hidden: list[Tensor] = field(default_factory=list)
    unfinished: int = field(init=False)

    def __post_init__(self) -> None:
        self.unfinished = len(self.chunks)


@dataclass(eq=False)
class Flight:
    """A chunk that the cloud is working on."""

    job: Job
    tokens: int
    keep: int
    layer: int  # the last one that has exchanged


class InFlight:
    """Jobs of one session.

    Parameters
    ----------
    most
        How many chunks the cloud takes at once (count).
    first_layer
        What counts as a chunk's last exchange when it is sent: -1, or the layer whose residual codes
        go with it.
    """

    def __init__(self, most: int, first_layer: int) -> None:
        self._most, self._first_layer = most, first_layer
        self._jobs: deque[Job] = deque()  # with chunks still to send
        self._flights: dict[int, Flight] = {}

    def __len__(self) -> int:
        return len(self._flights)

    def add(self, job: Job) -> None:
        """Put a job behind those that are there."""
        self._jobs.append(job)

    def launch(self) -> list[bytes]:
        """Return the messages that may be sent now."""
        raws = []
        while self._jobs and len(self._flights) < self._most:
            job = self._jobs[0]
            chunk = job.chunks.popleft()
            if not job.chunks:
                self._jobs.popleft()
            self._flights[chunk.number] = Flight(job, chunk.tokens, chunk.keep, self._first_layer)
            raws.append(chunk.raw)
        return raws

    def get(self, number: int) -> Flight | None:
        """Return a chunk that is in the cloud; None if it was given up, or never was there."""
        return self._flights.get(number)

    def land(self, number: int, hidden: Tensor) -> None:
        """Take hL of a chunk, ``(keep, hidden_size)``; the last of a job wakes who waits for it."""
        job = self._flights.pop(number).job
        job.hidden.append(hidden)
        job.unfinished -= 1
        if job.unfinished == 0:
            _resolve(job.future, job.hidden[0] if len(job.hidden) == 1 else torch.cat(job.hidden))

    def give_up(self) -> None:
        """Forget everything; who waits for it is told that it was cancelled."""
        for job in self._drop():
            job.future.cancel()

    def fail(self, error: SessionError) -> None:
        """Forget everything; who waits for it gets the error."""
        for job in self._drop():
            _resolve(job.future, error)

    def _drop(self) -> list[Job]:
        jobs = {id(job): job for job in (*(flight.job for flight in self._flights.values()), *self._jobs)}
        self._flights.clear()
        self._jobs.clear()
        return list(jobs.values())


def _resolve(future: "Future[Tensor]", result: Tensor | SessionError) -> None:
    """Set a result or an error, unless the caller has given up."""
    try:
        if isinstance(result, SessionError):
            future.set_exception(result)
        else:
            future.set_result(result)
    except InvalidStateError:
        pass
