"""Which positions of which rows a step is about, and how a long step is cut into chunks.

Knows nothing about tensors or streams.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Span:
    """``count`` new positions of a row, from ``start``; the last ``keep`` return hL."""

    row: int
    start: int
    count: int
    keep: int


def cut(spans: Sequence[Span], limit: int) -> list[list[Span]]:
    """Cut spans into runs of at most ``limit`` positions, each kept position in the run that has it."""
    runs: list[list[Span]] = []
    room = 0
    for span in spans:
        start, end = span.start, span.start + span.count
        while start < end:
            if room == 0:
                runs.append([])
                room = limit
            count = min(room, end - start)
            keep = max(0, min(count, start + count - (end - span.keep)))
            runs[-1].append(Span(span.row, start, count, keep))
            start, room = start + count, room - count
    return runs
