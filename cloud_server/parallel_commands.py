"""What rank 0 tells the others: which operation on what, as whole numbers.

A message is a list of records, each ``[operation, numbers that follow, numbers...]``. All but the last only
keep the others in step (a block of the cache was cleared, a session's step is gone) and wait until there is
something to run; the last one runs on all ranks at the same time, for there are sums inside.

    COPY      block, onto block                      a forked row got a block of its own
    CLEAR     block                                  a block changes hands
    FORGET    step                                   nothing of the step runs any more
    TUNE_OPEN batch, plan, forward only, checkpointing, piece tokens, bytes of its arena (or -1), lengths...
    TUNE_FREE batch
    STASH     steps, then for each: step, INTRODUCTION
    RUN       slices, then for each: step, lo, hi, INTRODUCTION, TABLES, 1 if its residual codes follow
    TUNE_RUN  batch, piece                           rows from the edge are shared where they are taken
    BEAT                                             all say that they are there
    STOP

INTRODUCTION is 0 for a step that is known, else 1, plan, spans, (start, count) of each. TABLES is, for each
span, the number of its blocks and these, or -1 where they are what they were. Hidden states of steps that are
introduced and residual codes follow in one tensor, in this order. Nothing here is read from an edge.
"""

from collections.abc import Iterator, Sequence
from enum import IntEnum


class Op(IntEnum):
    """What a record says."""

    STOP = 0
    BEAT = 1
    COPY = 2
    CLEAR = 3
    FORGET = 4
    TUNE_OPEN = 5
    TUNE_FREE = 6
    STASH = 7
    RUN = 8
    TUNE_RUN = 9


UNCHANGED = -1
NO_ARENA = -1


def record(op: Op, numbers: Sequence[int] = ()) -> list[int]:
    """Return one record."""
    return [op, len(numbers), *numbers]


def records(message: Sequence[int]) -> Iterator[tuple[Op, list[int]]]:
    """Yield the records of a message."""
    at = 0
    while at < len(message):
        count = message[at + 1]
        yield Op(message[at]), list(message[at + 2 : at + 2 + count])
        at += 2 + count


class Numbers:
    """A record's numbers, read from the front."""

    def __init__(self, numbers: Sequence[int]) -> None:
        self._numbers, self._at = numbers, 0

    def one(self) -> int:
        """Return the next one."""
        self._at += 1
        return self._numbers[self._at - 1]

    def some(self, count: int) -> list[int]:
        """Return the next ones."""
        self._at += count
        return list(self._numbers[self._at - count : self._at])
