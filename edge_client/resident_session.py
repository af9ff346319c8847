"""A session some of whose layers run here: head layers before the cloud's, tail layers after them.

To its user it is a session like any other: h0 goes in, hL comes out. Between the two it keeps this side's
keys and values, row by row, in step with the rows that the cloud holds. Knows no tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import grpc
import torch
from torch import Tensor

from edge_client.in_flight import Job
from edge_client.resident import Resident
from edge_client.resident_cache import RowCache
from edge_client.session import Resumed, Session
from edge_client.spans import Span, cut
from edge_client.streams import SessionError, Traffic

PIECE_TOKENS = 512  # positions that run at once here, as many as a step has at most by default


@dataclass
class ResidentRow:
    """Keys and values of one row on this side, before the cloud's layers and after them."""

    head: RowCache = field(default_factory=RowCache)
    tail: RowCache = field(default_factory=RowCache)

    def fork(self) -> "ResidentRow":
        """Return a copy that grows on its own."""
        return ResidentRow(self.head.fork(), self.tail.fork())


class ResidentSession:
    """Wraps a session to the cloud's layers. Used by one thread at a time.

    Parameters
    ----------
    session
        To the cloud.
    resident
        This side's layers, with the personal weights in them.
    """

    def __init__(self, session: Session, resident: Resident) -> None:
        self.session, self.resident = session, resident
        self.rows: list[ResidentRow] = []
        self._moved = False  # whether the last step moved rows
        count, head = len(resident.layers), resident.plan.head_layers
        self._head, self._tail = range(head), range(head, count)

    @property
    def traffic(self) -> Traffic:
        """What was sent and received so far."""
        return self.session.traffic

    @property
    def address(self) -> str:
        """Where the cloud is."""
        return self.session.address

    @property
    def route(self) -> object | None:
        """The channel there."""
        return self.session.route

    def abandon(self) -> None:
        """Break the stream off without waiting for anybody."""
        self.session.abandon()

    def resumed(self, found: Resumed) -> Resumed:
        """Return what both sides together still hold of a session that was picked up again.

        Raises
        ------
        SessionError
            If the rows of the two sides may be in another order; the session is then of no more use.
        """
        if self._moved and not found.began:
            raise SessionError("rows have moved on this side only", grpc.StatusCode.NOT_FOUND)
        lengths = []
        for length, row in zip(found.row_lengths, self.rows, strict=False):
            own = [*([row.head.length] if self._head else []), *([row.tail.length] if self._tail else [])]
            lengths.append(min(length, *own))
        lengths += [0] * (len(found.row_lengths) - len(lengths))
        return Resumed(tuple(lengths), found.began)

    def step(self, hidden: Tensor, spans: Sequence[Span], parents: Sequence[int] | None = None) -> Tensor:
        """Run new positions through all layers, here and in the cloud.

        Parameters
        ----------
        hidden
            h0 of the spans laid end to end: ``(tokens, hidden_size)``.
        spans, parents
            As `edge_client.session.Session.step` takes them.

        Returns
        -------
        Tensor
            hL of the kept positions: ``(sum of keep, hidden_size)``.

        Raises
        ------
        SessionError
            As `edge_client.session.Session.step`.
        """
        self._moved = parents is not None
        if parents is not None:
            self._rearrange(parents)
        while len(self.rows) <= max(span.row for span in spans):
            self.rows.append(ResidentRow())
        for span in spans:  # what the step overwrites is gone, also if its answer never comes
            self.rows[span.row].tail.crop(span.start)
        # Chunk by chunk: what is sent travels, and the cloud runs, while the next is made here.
        under_way: list[tuple[list[Span], Job]] = []
        at = 0
        for piece in cut(spans, self.session.chunk_tokens):
            x = self._through(self._head, piece, hidden[at : (at := at + sum(s.count for s in piece))])
            # Layers here need every position's input: their keys and values come of it.
            asked = [replace(span, keep=span.count) for span in piece] if self._tail else piece
            under_way.append((piece, self.session.submit(x, asked, parents, goes_on=bool(under_way))))
            parents = None
        kept = []
        for piece, job in under_way:
            out = self.session.wait(job)
            if self._tail:
                out = self._through(self._tail, piece, out.float())  # (tokens, hidden_size)
                ends = torch.tensor([s.count for s in piece]).cumsum(0).tolist()
                out = torch.cat([out[end - s.keep : end] for s, end in zip(piece, ends, strict=True)])
            kept.append(out)
        return kept[0] if len(kept) == 1 else torch.cat(kept)

    def cancel(self) -> None:
        """Give up what is in flight. The next step must start where the given-up one did, or before."""
        self.session.cancel()

    def close(self) -> None:
        """End the session in order."""
        self.rows.clear()
        self.session.close()

    def _through(self, places: range, spans: Sequence[Span], hidden: Tensor) -> Tensor:
        """Run ``hidden (tokens, hidden_size)`` of spans laid end to end through layers here."""
        if not places:
            return hidden
        found = []
        for span, x in zip(spans, torch.split(hidden, [span.count for span in spans]), strict=True):
            row = self.rows[span.row]
            found.append(self._run(places, span, row.tail if places is self._tail else row.head, x))
        return found[0] if len(found) == 1 else torch.cat(found)

    def _run(self, places: range, span: Span, cache: RowCache, hidden: Tensor) -> Tensor:
        cache.crop(span.start)
        assert cache.length == span.start, "the pool never leaves a gap"
        # In pieces: what attention needs at once grows with the square of a piece.
        with torch.no_grad():
            pieces = [self.resident.run(places, piece, cache) for piece in torch.split(hidden, PIECE_TOKENS)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _rearrange(self, parents: Sequence[int]) -> None:
        """Make row i continue old row parents[i]."""
        used: set[int] = set()
        rows = []
        for parent in parents:
            rows.append(self.rows[parent].fork() if parent in used else self.rows[parent])
            used.add(parent)
        self.rows = rows
