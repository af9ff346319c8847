"""One engine for all sessions: ``gather -> advance -> reply``, forever.

A step waits for its edge most of the time and costs nothing then. Whoever is ready at the same layer
runs together: A and B are the same for every user, so sessions with different M share a batch. Short
steps (decoding) go before long ones (prefill), and a long one yields between slices of bounded time.
Knows nothing about gRPC, tokens or personal weights.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor

from cloud_server.backbone import Backbone, Slice
from cloud_server.batch_statistics import BatchStatistics
from cloud_server.company import Company
from cloud_server.config.engine import EngineConfig
from cloud_server.kv_cache import KvCache
from cloud_server.memory import is_out_of_memory
from cloud_server.step import Step
from cloud_server.turns import Turns

log = logging.getLogger(__name__)


class Background(Protocol):
    """Work that comes after all steps; see `cloud_server.tune_queue.TuneQueue`."""

    def ready(self) -> bool:
        """Whether there is any."""

    def due_in(self, now: float, *, spare: bool) -> float:
        """Return in how many seconds it is due; ``spare``: whether nobody would be kept waiting."""

    async def run_one(self, executor: Executor, wanted: Callable[[], bool] | None = None) -> None:
        """Run a slice of it; ``wanted``: whether steps wait, None if they will any moment."""


class Engine:
    """Runs the steps of all sessions.

    Parameters
    ----------
    backbone, cache
        What runs, and where keys and values live.
    config
        Batching and slicing bounds.
    """

    def __init__(self, backbone: Backbone, cache: KvCache, config: EngineConfig) -> None:
        self.backbone, self.cache, self.config = backbone, cache, config
        self.steps: set[Step] = set()  # in flight
        self.ready: deque[Step] = deque()
        self.batches = BatchStatistics(config.short_step_tokens)
        self.background: Background | None = None
        self._cost = 50e-6  # seconds per token and layer, learned; decides slices and threads
        self._short_batch_s = 0.0  # how long a batch of short steps takes, learned; decides waiting
        self._pass_s = 0.0  # how long a short step takes from its arrival to its end, learned
        self._turns = Turns()  # of those who prefill, by positions
        self._company = Company(config.fairness_s / 2)
        self._wake = asyncio.Event()
        self._torch_thread = ThreadPoolExecutor(1, thread_name_prefix="torch")

    def submit(self, step: Step) -> None:
        """Admit a step. Its rows must be reserved in the cache."""
        self.steps.add(step)
        step.submitted_at = time.monotonic()
        self._company.come_back(step.owner, step.submitted_at)
        self._enqueue(step)

    def answer(self, step: Step, residual_codes: dict[int, Tensor]) -> None:
        """Give a step residual codes by layer, ``(tokens, residual_width)`` in the backbone's dtype."""
        step.residual_codes.update(residual_codes)
        self._enqueue(step)

    def cancel(self, step: Step) -> None:
        """Drop a step; a slice of it that is running finishes and is forgotten."""
        step.cancelled = True
        self.steps.discard(step)
        if step in self.ready:
            self.ready.remove(step)

    def leave(self, owner: object) -> None:
        """Expect no further step of a session."""
        if self._company.leave(owner):
            self._wake.set()  # somebody may be waiting for its company

    def wake(self) -> None:
        """Say that there is something to do."""
        self._wake.set()

    async def serve(self) -> None:
        """Run until cancelled."""
        while True:
            slices, patience = self.gather()
            if self.background is not None and self.background.ready():
                busy = bool(slices) or patience is not None
                due = self.background.due_in(time.monotonic(), spare=not busy)
                is_alone = not (busy or self._is_decoding())
                if due <= 0 or is_alone:
                    wanted = self._is_wanted if is_alone else None
                    await self.background.run_one(self._torch_thread, wanted)
                    continue
                patience = min(due, patience or due)
            if not slices:
                self._wake.clear()
                await _wait(self._wake, patience)
                continue
            emitted = await self._run(slices)
            self.reply(slices, emitted)
            await asyncio.sleep(0)  # codes go on the wire before the base products are computed
            self._stash([step for step, _ in emitted])

    def gather(self) -> tuple[list[Slice], float | None]:
        """Choose what runs next: short steps at one layer, else long ones.

        The group at the lowest layer goes first: so those behind catch up, and from then on everybody
        runs together. A group waits for company whose answers at this very layer are on their way, but
        no longer than running them apart would take. A prefill that has waited for ``fairness_s`` goes
        before all others, and so do short steps that have waited for as long as a whole step takes: those
        behind have caught up by then, and nobody starves.

        Returns
        -------
        tuple
            Slices to run; or none, and for how many seconds waiting for company is worth it (None: until
            something is ready).
        """
        if not self.ready:
            return [], None
        only = self.ready[0]
        if len(self.steps) == 1 and self._company.is_empty and only.longest <= self.config.short_step_tokens:
            return [Slice(only, 0, only.tokens)], None  # nobody to choose from or to wait for
        now, patience = time.monotonic(), None
        short, long = dict[tuple[int, bool], list[Step]](), dict[tuple[int, bool], list[Step]]()
        for step in self.ready:
            groups = short if step.longest <= self.config.short_step_tokens else long
            groups.setdefault((step.layer, step.must_emit()), []).append(step)
        oldest = next(iter(long.values()), [])
        if oldest:
            late = now - oldest[0].ready_since > self.config.fairness_s
            oldest = self._next_in_turn(long)
            if late:
                return self._slices(oldest), None
        longest = max(self.config.fairness_s, self._pass_s)
        starving = [g for g in short.values() if now - g[0].ready_since > longest]
        for group in (*starving, *(short[key] for key in sorted(short))):
            left = group[0].ready_since + self._patience(group[0], now) - now
            if left <= 0:
                return [Slice(step, 0, step.tokens) for step in group[: self.config.max_batch_steps]], None
            patience = min(left, patience or left)
        return self._slices(oldest), patience

    def _next_in_turn(self, groups: dict[tuple[int, bool], list[Step]]) -> list[Step]:
        """Return the group of the identity whose turn it is, its own steps first."""
        if len(groups) == 1 and len(only := next(iter(groups.values()))) == 1:
            return only
        turn = self._turns.order([step for group in groups.values() for step in group], _payer)
        first = turn[0].layer, turn[0].must_emit()
        return [step for step in turn if (step.layer, step.must_emit()) == first]

    def _patience(self, first: Step, now: float) -> float:
        """Return for how many seconds a group is kept for company; an edge that is late is not waited for.

        At the first layer the company is sessions that have just been given a token: running apart from
        them costs a pass through all layers. Further on it is steps whose answers at this very layer are
        on their way: running apart from them costs one batch.
        """
        if first.layer == first.plan.cloud_layers.start and first.emitted < first.layer:
            longest = self.config.start_wait_share * self._pass_s
            until = self._company.expected_until(now, longest)
            return 0.0 if until is None else min(longest, until - first.ready_since)
        recent = now - self.config.fairness_s
        awaited = any(
            step.layer == first.layer == step.emitted
            and step.is_blocked()
            and step.longest <= self.config.short_step_tokens
            and step.emitted_at > recent
            for step in self.steps
        )
        return min(self.config.gather_wait_s, self._short_batch_s) if awaited else 0.0

    def _is_wanted(self) -> bool:
        return bool(self.ready)

    def _is_decoding(self) -> bool:
        """Whether a short step is in flight or has just ended: then the next one comes any moment."""
        recent = time.monotonic() - self.config.fairness_s
        short = self.config.short_step_tokens
        return any(step.longest <= short for step in self.steps) or self._company.rested_since(recent)

    def _slices(self, group: list[Step]) -> list[Slice]:
        """Return as much of long steps at one layer as may run at once."""
        room = self.config.max_batch_tokens
        if any(other.longest <= self.config.short_step_tokens for other in self.steps):
            room = max(16, int(self.config.slice_s / self._cost))  # somebody's decode will be ready soon
        slices = []
        for step in group:
            count = min(step.tokens - step.offset, room)
            if count > 0:
                slices.append(Slice(step, step.offset, step.offset + count))
            room -= count
        return slices

    async def _run(self, slices: list[Slice]) -> list[tuple[Step, Tensor]]:
        """Advance the slices, inline if that is short, else on the torch thread."""
        for s in slices:
            self.ready.remove(s.step)
            s.step.is_running = True
        tokens = sum(s.hi - s.lo for s in slices)
        if slices[0].step.longest > self.config.short_step_tokens:
            for s in slices:
                self._turns.charge(s.step.payer, s.hi - s.lo)
        layer, oldest = slices[0].step.layer, min(s.step.ready_since for s in slices)
        queued, started = time.monotonic() - oldest, time.perf_counter()
        try:
            if tokens * self._cost < self.config.inline_s:
                emitted, layers = self._advance(slices)
            else:
                loop = asyncio.get_running_loop()
                with self.cache.in_use(table for s in slices for table in s.tables):
                    emitted, layers = await loop.run_in_executor(self._torch_thread, self._advance, slices)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            emitted, layers = [], 0
            self._give_up_largest(slices, error)
        for s in slices:
            s.step.is_running = False
        took = time.perf_counter() - started
        self.batches.add(layer, len(slices), tokens, queued, took)
        if layers and tokens >= 16:
            self._cost += 0.2 * (took / (tokens * layers) - self._cost)
        if layers and slices[0].step.longest <= self.config.short_step_tokens:
            self._short_batch_s += 0.2 * (took - self._short_batch_s)
        return emitted

    def _give_up_largest(self, slices: list[Slice], error: Exception) -> None:
        """Drop the step that takes most memory, so that the others of its batch can be run again.

        What a layer has computed is taken over at its end only: they stand where they stood.
        """
        log.exception("no memory for a batch of %d steps; its largest is given up", len(slices))
        step = max((s.step for s in slices), key=lambda step: step.tokens)
        if not step.cancelled:
            self.cancel(step)
            step.on_failed(step, error)

    @torch.inference_mode()
    def _advance(self, slices: list[Slice]) -> tuple[list[tuple[Step, Tensor]], int]:
        """Run layers until one of the steps has to stop; return codes to send, and layers run."""
        steps, layers = [s.step for s in slices], 0
        if not steps[0].must_emit():
            until = time.perf_counter() + self.config.slice_s
            while True:
                self.backbone.run(slices, self.cache)
                layers += 1
                if not all(s.whole for s in slices) or time.perf_counter() > until:
                    break
                if any(step.finished or step.must_emit() or step.is_blocked() for step in steps):
                    break
        emitting = [step for step in steps if step.offset == 0 and not step.finished and step.must_emit()]
        if not emitting:
            return [], layers
        before = [step.emitted for step in emitting]
        try:
            return list(zip(emitting, self.backbone.emit(emitting), strict=True)), layers
        except Exception:
            for step, emitted in zip(emitting, before, strict=True):  # nothing was
                step.emitted, step.normed = emitted, None
            raise

    def reply(self, slices: list[Slice], emitted: list[tuple[Step, Tensor]]) -> None:
        """Send codes and finished hidden states, and queue again what can go on."""
        for step, codes in emitted:
            step.emitted_at = time.monotonic()
            if not step.cancelled:
                step.on_codes(step, step.layer, codes)
        for s in slices:
            step = s.step
            if step.cancelled:
                continue
            if step.finished:
                self.steps.discard(step)
                now = time.monotonic()
                self.batches.ended(step.longest, step.tokens, now - step.submitted_at)
                if step.longest <= self.config.short_step_tokens:
                    self._company.rest(step.owner, now)
                    self._pass_s += 0.1 * (now - step.submitted_at - self._pass_s)
                step.before = None  # or a stream that always has two in flight keeps all it ever sent
                step.on_done(step, step.kept_hidden())
            else:
                self._enqueue(step)
        for step in self.steps:  # a session's next chunk may have waited for this one
            if step.before is not None and step not in self.ready:
                self._enqueue(step)

    def _stash(self, steps: list[Step]) -> None:
        """Use the time until the answers come for the base products of short steps."""
        short = [step for step in steps if step.longest <= self.config.short_step_tokens]
        if not short:
            return
        # On one thread: the edge's own work and gRPC's threads need a core at this very moment.
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with torch.inference_mode():
                self.backbone.stash(short)
        except Exception as error:
            if not is_out_of_memory(error):  # else they are computed with the layer itself, or that fails
                raise
        finally:
            torch.set_num_threads(threads)

    def _enqueue(self, step: Step) -> None:
        """Put a step that can go on into the ready queue, once."""
        if step.cancelled or step in self.ready or step.is_running:
            return
        if step.must_emit() or not step.is_blocked():
            step.ready_since = time.monotonic()
            self.ready.append(step)
            self._wake.set()


def _payer(step: Step) -> str:
    return step.payer


async def _wait(event: asyncio.Event, seconds: float | None) -> None:
    """Wait for the event, which is set when the time is over; `asyncio.wait_for` makes a task each time."""
    timer = None if seconds is None else asyncio.get_running_loop().call_later(seconds, event.set)
    try:
        await event.wait()
    finally:
        if timer is not None:
            timer.cancel()
