"""Sessions of one model: who uses which, and what each already holds in the cloud.

A session is used by one cache at a time. The edge remembers the token ids whose keys and values each
row of a session holds, so that a prompt that starts like an earlier one continues from there. The
memory is pessimistic: before a step it is cut to what the step leaves alone, after the step it grows,
so an interrupted step can at worst make the edge send positions again.
"""

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import grpc
import torch
from torch import Tensor

from edge_client.spans import Span
from edge_client.streams import SessionError, Traffic

if TYPE_CHECKING:
    from edge_client.recovery import Recovery
    from edge_client.session import Resumed

Tokens = Sequence[int]
Embed = Callable[[list[int]], Tensor]  # token ids -> h0 (tokens, hidden_size) fp32


class SessionLike(Protocol):
    """What the pool needs of `edge_client.session.Session`."""

    def step(self, hidden: Tensor, spans: list[Span], parents: list[int] | None = None) -> Tensor:
        """Run new positions; return hL of the kept ones."""

    def cancel(self) -> None:
        """Give up the step in flight; the session stays usable."""

    def close(self) -> None:
        """End the session and free its KV cache in the cloud."""


@dataclass(frozen=True)
class Wanted:
    """A row as it should be after a step.

    ``tokens`` is the whole row. Its first ``start`` tokens equal those of the session's present row
    ``parent``; the rest is computed. hL is wanted for the last ``keep``.
    """

    tokens: list[int]
    keep: int
    parent: int = 0
    start: int = 0


def common_prefix(left: Tokens, right: Tokens) -> int:
    """Return how many leading tokens two rows share."""
    limit = min(len(left), len(right))
    if left[:limit] == right[:limit]:
        return limit
    return next(i for i in range(limit) if left[i] != right[i])


class HeldSession:
    """One cloud session and the token ids that its rows hold.

    Parameters
    ----------
    session
        An open session.
    epoch
        The adapter it was opened with; keys and values depend on M.
    """

    def __init__(self, session: SessionLike, epoch: int) -> None:
        self.session = session
        self.epoch = epoch
        self.positions = 0  # run so far
        self.rows: list[list[int]] = []
        self.broken = False
        self.unsettled = False  # a step was given up; until the next one, rows cannot be moved
        self.resumed = False  # its rows may have moved since its user last looked
        self._lost: _LostStep | None = None

    def match(self, tokens: Tokens) -> tuple[int, int]:
        """Return the row that shares the longest prefix with ``tokens``, and its length."""
        shared = [common_prefix(row, tokens) for row in self.rows]
        best = max(range(len(shared)), key=shared.__getitem__, default=0)
        return best, shared[best] if shared else 0

    def place(self, tokens: list[int], keep: int) -> Wanted:
        """Return ``tokens`` as a wanted row that reuses what the session holds."""
        parent, shared = self.match(tokens)
        return Wanted(tokens, keep, parent, min(shared, len(tokens) - keep))

    def run(self, wanted: Sequence[Wanted], embed: Embed) -> list[Tensor]:
        """Make the session hold exactly the ``wanted`` rows, in one step.

        Returns
        -------
        list of Tensor
            For each row, hL ``(keep, hidden_size)``.
        """
        spans, tokens = [], []
        for row, want in enumerate(wanted):
            new = want.tokens[want.start :]
            if new:
                spans.append(Span(row=row, start=want.start, count=len(new), keep=want.keep))
                tokens += new
        if not spans:
            return [torch.empty(0) for _ in wanted]
        parents: list[int] | None = [want.parent for want in wanted]
        if not self.rows or parents == list(range(len(self.rows))):
            parents = None
        # If a step that moves rows is interrupted, nobody here knows whether they moved.
        before, self.rows, self.broken, self._lost = self.rows, [], True, None
        try:
            hidden = self.session.step(embed(tokens), spans, parents)  # (sum of keep, hidden_size)
        except ConnectionError:
            self._lost = _LostStep(before, wanted, parents)
            raise
        except KeyboardInterrupt:
            self.session.cancel()
            if parents is None and len(wanted) == 1:
                self.rows = [wanted[0].tokens[: wanted[0].start]] if wanted[0].start else []
                self.broken, self.unsettled = False, True
            raise
        self.positions += len(tokens)
        self.rows, self.broken, self.unsettled = [want.tokens for want in wanted], False, False
        self.resumed = False
        counts = [want.keep if len(want.tokens) > want.start else 0 for want in wanted]
        return list(torch.split(hidden, counts))

    def resume(self, pick_up: "Callable[[SessionLike], Resumed]") -> None:
        """Pick the session up again whose stream was lost in its last step, and learn what it still holds.

        Parameters
        ----------
        pick_up
            Does that at the cloud, see `edge_client.connection.Connection.resume`.

        Raises
        ------
        SessionError
            If the session is gone (NOT_FOUND) or cannot be had at the moment.
        """
        lost = self._lost
        if lost is None:
            raise SessionError("there is no step to go on from", grpc.StatusCode.NOT_FOUND)
        self.rows = lost.kept(pick_up(self.session))
        self.broken, self.unsettled, self.resumed = False, False, True


@dataclass(frozen=True)
class _LostStep:
    """A step whose answer never came: the rows before it, and what it asked for."""

    rows: list[list[int]]
    wanted: Sequence[Wanted]
    parents: list[int] | None

    def kept(self, found: "Resumed") -> list[list[int]]:
        """Return the tokens that each row holds for certain, after what the cloud states of the rows."""
        rows = self.rows
        if self.parents is not None and found.began:
            rows = [rows[parent] for parent in self.parents]
        if self.parents is None or found.began:  # what the step overwrites may be either
            starts = [want.start for want in self.wanted]
            rows = [row[:start] for row, start in zip(rows, starts, strict=False)] + rows[len(starts) :]
        kept = [row[:length] for row, length in zip(rows, found.row_lengths, strict=False)]
        if found.began and len(self.wanted) == len(found.row_lengths) == 1:
            kept = [self.wanted[0].tokens[: found.row_lengths[0]]]  # chunks of it that were finished count
        return kept + [[] for _ in range(len(found.row_lengths[: len(self.wanted)]) - len(kept))]


class SessionPool:
    """Idle sessions, handed out by how much of a prompt they already hold.

    Safe to use from several threads; each `take` gives a session to one user.

    Parameters
    ----------
    open_session
        Opens a session with the present adapter.
    max_idle
        Idle sessions that stay open (count); each holds KV cache in the cloud.
    recovery
        What to do when the cloud is lost; None is to pass the error on.
    """

    def __init__(
        self,
        open_session: Callable[[], SessionLike],
        max_idle: int = 4,
        recovery: "Recovery | None" = None,
    ) -> None:
        self._open = open_session
        self.recovery = recovery
        self._max_idle = max_idle
        self._lock = threading.Lock()
        self._idle: list[HeldSession] = []  # least recently used first
        # Filled by finalisers, which may run in any thread at any point: only appends, never locks.
        self._returned: deque[HeldSession] = deque()
        self._all: list[HeldSession] = []
        self._past = (Traffic(), 0)  # of closed sessions
        self.epoch = 0

    def totals(self) -> tuple[Traffic, int]:
        """Return the traffic of all sessions so far, and the positions that they have run."""
        with self._lock:
            traffic, positions = self._past
            for held in self._all:
                traffic, positions = _plus(traffic, held), positions + held.positions
            return traffic, positions

    def take(self, prompts: Sequence[Tokens]) -> HeldSession:
        """Return a session of the present adapter, the one that holds most of ``prompts``."""
        with self._lock:
            leftover = self._sort_returned()
            if len(prompts) > 1:
                leftover += [held for held in self._idle if held.unsettled]
                self._idle = [held for held in self._idle if not held.unsettled]
            best = max(self._idle, key=lambda held: sum(held.match(p)[1] for p in prompts), default=None)
            if best is not None:
                self._idle.remove(best)
            epoch, open_session = self.epoch, self._open
        self._close(leftover)
        if best is None:
            best = HeldSession(open_session(), epoch)
            with self._lock:
                self._all.append(best)
        return best

    def give_back(self, held: HeldSession) -> None:
        """Return a session after use; its rows stay in the cloud for the next prompt."""
        self._returned.append(held)

    def renew(self, open_session: Callable[[], SessionLike]) -> None:
        """Use ``open_session`` from now on, because the adapter changed; idle sessions are closed."""
        with self._lock:
            self.epoch += 1
            self._open = open_session
            leftover = self._sort_returned()
        self._close(leftover)

    def close(self) -> None:
        """Close every idle session."""
        self.renew(self._open)

    def _sort_returned(self) -> list[HeldSession]:
        """Move returned sessions to the idle ones; return those that must be closed."""
        while self._returned:
            self._idle.append(self._returned.popleft())
        usable = [held for held in self._idle if not held.broken and held.epoch == self.epoch]
        keep = usable[-self._max_idle :]
        leftover = [held for held in self._idle if held not in keep]
        self._idle = keep
        return leftover

    def _close(self, leftover: Sequence[HeldSession]) -> None:
        for held in leftover:
            with contextlib.suppress(Exception):  # it may have ended already, which is what is wanted
                held.session.close()
            with self._lock:
                self._all.remove(held)
                traffic, positions = self._past
                self._past = _plus(traffic, held), positions + held.positions


def _plus(traffic: Traffic, held: HeldSession) -> Traffic:
    return traffic - (Traffic() - getattr(held.session, "traffic", Traffic()))
