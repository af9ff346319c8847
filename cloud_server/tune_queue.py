"""Tuning as low-priority work of the engine: which batch goes on, when, and for how long.

Decoding comes first. Tuning runs where nobody decodes, a share of the time while decodes wait for their
edges, and a smaller one, stated and always kept, while they do not. Knows nothing about streams or maths.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field

from torch import Tensor

from cloud_server.config.tuning import TuningConfig
from cloud_server.metrics import TUNED
from cloud_server.tune_piece import Stage
from cloud_server.tune_slice import TuneSlice
from cloud_server.tuning import TuneBatch
from cloud_server.turns import Turns

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Job:
    """A batch in the queue, and who wants to know about it. All are called on the event loop."""

    batch: TuneBatch
    on_rows: Callable[[str, int, int, Tensor], object]  # see `cloud_server.tuning.Send`
    on_done: Callable[[], object]
    on_failed: Callable[[Exception], object]
    on_freed: Callable[[], object]  # its memory is given back
    payer: str = ""  # the identity whose turn it counts as
    is_running: bool = False
    is_cancelled: bool = False
    outgoing: list[tuple[str, int, int, Tensor]] = field(default_factory=list)


class TuneQueue:
    """Tuning batches of all edges.

    Parameters
    ----------
    config
        The shares.
    slice_s
        How long units run in a row before the engine looks for decodes again (seconds). A unit is one
        stage of one piece; one alone may take longer.
    wake
        Tells the engine that there is something to do.
    """

    def __init__(self, config: TuningConfig, slice_s: float, wake: Callable[[], object]) -> None:
        self.config, self.slice_s, self.wake = config, slice_s, wake
        self._jobs: deque[Job] = deque()  # whose turn it is comes first
        self._cost: dict[Stage, float] = {}  # seconds a token, learned
        self._turns = Turns()  # by seconds
        self._pool = ThreadPoolExecutor(thread_name_prefix="tuning")  # made as they are needed
        self.tokens = 0  # of batches that ended in order
        self._ended = self._took = 0.0  # the last slice: when it ended (monotonic) and how long it took

    def add(self, job: Job) -> None:
        """Let a batch run from now on."""
        self._jobs.append(job)
        self.wake()

    def remove(self, job: Job, outcome: str = "left") -> None:
        """Take a batch out, at any time, and free what it holds: at once, or when its unit has ended.

        ``outcome`` is a word that metrics have for why.
        """
        if job.is_cancelled:
            return
        TUNED.labels(outcome).inc()
        job.is_cancelled = True
        if job in self._jobs:
            self._jobs.remove(job)
        if not job.is_running:
            self._free(job)

    def ready(self) -> bool:
        """Whether a unit could run."""
        return any(job.batch.next() is not None for job in self._jobs)

    def due_in(self, now: float, *, spare: bool) -> float:
        """Return in how many seconds a slice is due, which keeps tuning at its share of the time.

        Parameters
        ----------
        now
            `time.monotonic`.
        spare
            Whether nobody is kept waiting by it right now.
        """
        share = self.config.spare_share if spare else self.config.min_share
        return self._ended + self._took * (1 / share - 1) - now

    async def run_one(self, executor: Executor, wanted: Callable[[], bool] | None = None) -> None:
        """Run units of the next batch for one slice, at least one, beside the event loop.

        Parameters
        ----------
        executor
            Has the thread that computes.
        wanted
            Whether steps wait for it: if nobody decodes, the slice lasts until then. None: somebody does.
        """
        ready = [job for job in self._jobs if job.batch.next() is not None]
        if not ready:
            return
        job = self._turns.order(ready, lambda job: job.payer)[0]
        self._jobs.remove(job)
        self._jobs.append(job)  # the others come first next time
        loop = asyncio.get_running_loop()

        def send(name: str, layer: int, first: int, rows: Tensor) -> None:
            loop.call_soon_threadsafe(self._deliver, job, name, layer, first, rows)

        job.batch.send = send
        job.is_running, started = True, time.monotonic()
        try:
            await loop.run_in_executor(executor, self._run, job, wanted)
        except Exception as error:  # one batch that fails, for want of memory say, must not end the engine
            log.exception("a tuning batch failed")
            self.remove(job, "failed")
            job.on_failed(error)
        finally:
            job.is_running = False
            self._ended = time.monotonic()
            self._took = self._ended - started
            self._turns.charge(job.payer, self._took)
        if job.is_cancelled:
            self._free(job)
        elif job.batch.finished:
            self.tokens += job.batch.tokens
            self.remove(job, "done")
            job.on_done()

    def _deliver(self, job: Job, name: str, layer: int, first: int, rows: Tensor) -> None:
        if not job.is_cancelled:
            job.on_rows(name, layer, first, rows)

    def _run(self, job: Job, wanted: Callable[[], bool] | None) -> None:
        """Run units until the next one would probably not fit into the slice."""
        if len(self._jobs) > 1:
            wanted = None  # the others' turn comes
        TuneSlice(job.batch, self._cost, self.slice_s, lambda: job.is_cancelled, self._pool, wanted).run()

    def _free(self, job: Job) -> None:
        job.batch.free()
        job.on_freed()
