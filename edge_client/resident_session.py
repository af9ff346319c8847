"""A session some of whose layers run here: head layers before the cloud's, tail layers after them.

To its user it is a session like any other: h0 goes in, hL comes out. Between the two it keeps this side's
keys and values, row by row, in step with the rows that the cloud holds. Knows no tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from edge_client.resident import Resident
from edge_client.resident_cache import RowCache
from edge_client.session import Session
from edge_client.spans import Span
from edge_client.streams import Traffic

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
        count, head = len(resident.layers), resident.plan.head_layers
        self._head, self._tail = range(head), range(head, count)

    @property
    def traffic(self) -> Traffic:
        """What was sent and received so far."""
        return self.session.traffic

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
        if parents is not None:
            self._rearrange(parents)
        while len(self.rows) <= max(span.row for span in spans):
            self.rows.append(ResidentRow())
        counts = [span.count for span in spans]
        if self._head:
            pieces = torch.split(hidden, counts)
            hidden = torch.cat(
                [
                    self._run(self._head, s, self.rows[s.row].head, x)
                    for s, x in zip(spans, pieces, strict=True)
                ]
            )
        if not self._tail:
            return self.session.step(hidden, spans, parents)
        # Layers here need every position's input: their keys and values come of it.
        whole = [replace(span, keep=span.count) for span in spans]
        hidden = self.session.step(hidden, whole, parents).float()  # (tokens, hidden_size)
        kept = []
        for span, x in zip(spans, torch.split(hidden, counts), strict=True):
            out = self._run(self._tail, span, self.rows[span.row].tail, x)  # (count, hidden_size)
            kept.append(out[span.count - span.keep :])
        return kept[0] if len(kept) == 1 else torch.cat(kept)

    def cancel(self) -> None:
        """Give up what is in flight. The next step must start where the given-up one did, or before."""
        self.session.cancel()

    def close(self) -> None:
        """End the session in order."""
        self.rows.clear()
        self.session.close()

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
