"""One slice of tuning: units of a batch, run side by side on threads of their own, until the time is up.

A small kernel on two threads takes more than half of what it takes on one; two pieces on a thread each do
not have that loss. How many threads a unit has depends on the batch alone, so its bits do not depend on
what else goes on. Knows nothing about maths, streams or whose turn it is.
"""

import time
from collections.abc import Callable
from concurrent.futures import Executor, Future, wait

import torch

from cloud_server.backbone import Backbone
from cloud_server.tune_piece import Piece, Stage
from cloud_server.tuning import TuneBatch

LONGEST_S = 0.5  # of a slice that nobody waits for the end of


def most_workers(backbone: Backbone) -> int:
    """Return how many pieces run side by side at most (count)."""
    return torch.get_num_threads() if backbone.device.type == "cpu" else 1


class TuneSlice:
    """Made for one use, by the thread that computes.

    Parameters
    ----------
    batch
        What goes on.
    cost
        Seconds a token of each kind of unit, on the threads that it has; learned here.
    slice_s
        How long units run in a row; one alone may take longer (seconds).
    is_cancelled
        Whether no further unit is to begin.
    pool
        Threads besides the one that calls `run`.
    is_wanted
        Whether somebody else wants to compute: the slice goes on beyond its time until then. None: it does
        not.
    """

    def __init__(
        self,
        batch: TuneBatch,
        cost: dict[Stage, float],
        slice_s: float,
        is_cancelled: Callable[[], bool],
        pool: Executor,
        is_wanted: Callable[[], bool] | None = None,
    ) -> None:
        self._batch, self._cost, self._pool = batch, cost, pool
        self._is_cancelled, self._is_wanted = is_cancelled, is_wanted
        self._began = time.perf_counter()
        self._slice_s = slice_s
        self._running: list[Piece] = []
        self._units = 0
        self._failed = False
        threads = torch.get_num_threads()
        self.workers = min(most_workers(batch.backbone), len(batch.pieces)) if batch.may_share else 1
        self.threads, self._all_threads = threads // self.workers, threads

    def run(self) -> None:
        """Run units; raises what a unit raised, when all that were running have ended."""
        others: list[Future[None]] = []
        try:
            for _ in range(self.workers - 1):
                others.append(self._pool.submit(self._work))
            self._work()
        except BaseException:
            self._failed = True
            raise
        finally:
            wait(others)
            with self._batch.changed:  # a call for which no thread could be started is made by another one
                self._batch.changed.wait_for(lambda: not self._running)
            if self.threads != self._all_threads:
                torch.set_num_threads(self._all_threads)
        while others:  # not in a name: this frame, which what is raised leads to, must not lead back to it
            others.pop().result()

    def _work(self) -> None:
        if self.threads != self._all_threads:
            torch.set_num_threads(self.threads)
        changed = self._batch.changed
        while (piece := self._begin()) is not None:
            stage, tokens, started = piece.stage, piece.tokens, time.perf_counter()
            try:
                self._batch.run(piece)
            except BaseException:
                self._failed = True
                raise
            finally:
                with changed:
                    self._running.remove(piece)
                    changed.notify_all()
            took = time.perf_counter() - started
            known = self._cost.get(stage, took / tokens)
            self._cost[stage] = known + 0.2 * (took / tokens - known)

    def _begin(self) -> Piece | None:
        """Return a piece to run, which counts as running; None if this thread is to end."""
        with self._batch.changed:
            while not (self._failed or self._is_cancelled()):
                piece = self._batch.next(self._running)
                if piece is not None:
                    if self._units and not self._fits(piece):
                        return None
                    self._units += 1
                    self._running.append(piece)
                    return piece
                if not self._running:
                    return None  # all wait for the edge
                self._batch.changed.wait()
        return None

    def _fits(self, piece: Piece) -> bool:
        """Whether there is time for another unit."""
        spent = time.perf_counter() - self._began
        if self._is_wanted is not None and spent < LONGEST_S:
            return not self._is_wanted()
        return spent + self._cost.get(piece.stage, 0.0) * piece.tokens <= self._slice_s
