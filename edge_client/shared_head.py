"""One head for several threads: calls that come while it runs wait, and are then run as one.

Reading the head's weights is most of what a token costs on the edge, and one reading serves many rows.
A thread that finds the head idle waits only for those who came together with others last time, and no longer
than a run of its own would have made them wait. Knows nothing about sessions or tokens.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from shared.few_rows import product

MOST_ROWS = 16  # of one call that joins others: a whole prompt's logits are computed by themselves


@dataclass(eq=False)
class Call:
    """Rows that wait for the head, and what came of them."""

    rows: Tensor  # (rows, hidden_size)
    woken: threading.Event = field(default_factory=threading.Event)
    result: Tensor | None = None
    error: Exception | None = None

    @property
    def done(self) -> bool:
        """Whether some thread has run it."""
        return self.result is not None or self.error is not None


class SharedHead:
    """A function of rows that threads share.

    Parameters
    ----------
    head
        Maps ``(rows, hidden_size)`` to ``(rows, vocab_size)``, each row by itself.
    """

    def __init__(self, head: Callable[[Tensor], Tensor]) -> None:
        self._head = partial(_logits, head) if type(head) is nn.Linear else head
        self._lock = threading.Lock()
        self._waiting: list[Call] = []
        self._running = False
        self._threads = set[int]()  # that have come since it was idle
        self._expected = 1  # threads that came the last time before it was idle again
        self._all_here = threading.Event()
        self._run_s = 0.0  # the shortest run so far (seconds)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Map ``hidden (..., hidden_size)`` to ``(..., vocab_size)``, without autograd."""
        rows = hidden.reshape(-1, hidden.shape[-1])
        if not 0 < len(rows) <= MOST_ROWS:
            return self._run(hidden)
        call = Call(rows)
        try:
            with self._lock:
                self._waiting.append(call)
                self._threads.add(threading.get_ident())
                waits, self._running = self._running, True
                if len(self._waiting) >= self._expected:
                    self._all_here.set()
            if waits:
                call.woken.wait()
            else:
                self._all_here.wait(self._run_s)
            if not call.done:  # woken, or never waited: it is this thread's turn
                self._run_waiting()
        except BaseException:  # Ctrl-C: those behind must not wait for a thread that is gone
            self._leave(call)
            raise
        if call.error is not None:
            raise call.error
        assert call.result is not None
        return call.result.view(*hidden.shape[:-1], -1)

    def _run_waiting(self) -> None:
        """Run all that waits as one, this thread's own call among it, and pass the turn on."""
        with self._lock:
            calls = list(self._waiting)
        rows, started = [call.rows for call in calls], time.perf_counter()
        try:
            together = self._run(rows[0] if len(rows) == 1 else torch.cat(rows))  # (all rows, vocab_size)
            for call, result in zip(calls, torch.split(together, [len(r) for r in rows]), strict=True):
                call.result = result
        except Exception as error:
            for call in calls:
                call.error = error
        with self._lock:
            took = time.perf_counter() - started
            self._run_s = min(took, self._run_s or took)
            for call in calls:
                call.woken.set()
            self._pass_on()

    def _leave(self, call: Call) -> None:
        with self._lock:
            if self._waiting and self._waiting[0] is call:  # the turn is the first one's
                call.error = RuntimeError("interrupted")
                self._pass_on()
            self._waiting = [other for other in self._waiting if other is not call]

    def _pass_on(self) -> None:
        """Give the turn to whoever has waited longest."""
        for call in self._waiting:
            if call.done:
                call.woken.set()
        self._waiting = [call for call in self._waiting if not call.done]
        self._running = bool(self._waiting)
        if self._waiting:
            self._waiting[0].woken.set()
        else:
            self._expected, self._threads = len(self._threads), set()
            self._all_here.clear()

    def _run(self, rows: Tensor) -> Tensor:
        # Ordinary tensors for everybody: one caller may be in inference mode and the next one not.
        with torch.inference_mode(False), torch.no_grad():
            return self._head(rows)


def _logits(head: nn.Linear, rows: Tensor) -> Tensor:
    """Return ``head(rows)``; MKL takes up to three times as long for 5 to 15 rows the usual way round."""
    if rows.ndim != 2 or rows.dtype != torch.float32:  # of bfloat16 the usual way is the faster one
        found: Tensor = head(rows)
        return found
    logits = product(rows, head.weight).contiguous()  # (rows, vocab_size): each row is read by a thread
    return logits if head.bias is None else logits.add_(head.bias)
