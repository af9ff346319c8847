"""The gRPC face of tuning: its stream, handshake and end. Checks are `cloud_server.tune_session`'s matter."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import cast

import grpc

from cloud_server.allowance import Allowance, Allowances
from cloud_server.caller import caller
from cloud_server.config.cloud import CloudConfig
from cloud_server.drain import Drain
from cloud_server.engine import Engine
from cloud_server.handshake import Offer, agreed
from cloud_server.logs import event
from cloud_server.memory import is_out_of_memory
from cloud_server.refusal import Refusal, invalid
from cloud_server.releases import Releases
from cloud_server.streams import BROKEN_NOTICE_S, Context, Traffic, abort, begin, first, log_refusal, read
from cloud_server.tune_outbox import Budget
from cloud_server.tune_queue import TuneQueue
from cloud_server.tune_session import (
    PARTS,
    TuneLimits,
    TuneSession,
    gradients_underflow,
    most_tokens,
)
from cloud_server.tune_slice import most_workers
from cloud_server.tuning import TuneBatch
from cloud_server.tuning_memory import tuning_bytes
from shared import wire
from shared.pb.privatelora.v1 import private_lora_pb2 as pb
from shared.plan import Plan

log = logging.getLogger(__name__)

MOST_BATCH_TOKENS = 1 << 20  # whatever memory there is


class TuneService:
    """Everything behind ``Tune``."""

    def __init__(
        self,
        config: CloudConfig,
        engine: Engine,
        offers: Mapping[bytes, Offer],
        allowances: Allowances,
        drain: Drain,
    ) -> None:
        self.config, self.engine, self.offers, self.allowances = config, engine, offers, allowances
        self.drain, self.traffic, self.released = drain, Traffic(), Releases()
        self.queue = TuneQueue(config.tuning, config.engine.slice_s, engine.wake)
        self.budget = Budget(config.tuning.max_bytes)
        self.sessions: dict[TuneSession, Allowance] = {}  # and whose
        self.make_batch: Callable[..., TuneBatch] = TuneBatch  # another kind where several ranks tune
        self._known_limits: dict[str, TuneLimits] = {}  # by the plan's name
        engine.background = self.queue

    async def tune(self, _: AsyncIterator[bytes], context: Context) -> None:
        """Serve one edge's tuning run until its stream ends."""
        handler = cast("asyncio.Task[None]", asyncio.current_task())
        session: TuneSession | None = None
        helpers: list[asyncio.Task[None]] = []
        farewell: Refusal | None = None

        def cut_off(refusal: Refusal) -> None:
            nonlocal farewell
            farewell = refusal
            handler.cancel()

        try:
            session = self._open(
                await first(pb.TuneRequest, context, self.traffic, self.config.write_timeout_s)
            )
            await begin(context)
            session.cut_off = cut_off
            session.on_failed = lambda error: cut_off(_failure(error))
            for work in (self._write(session, context, cut_off), self._watch(session, cut_off)):
                helper = asyncio.create_task(work)
                helper.add_done_callback(lambda done: done.cancelled() or handler.cancel())
                helpers.append(helper)
            await self._listen(session, context)
        except Refusal as refusal:
            log_refusal("tuning", refusal)
            await abort(context, refusal)
        except (MemoryError, OSError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            lacking = _failure(error)
            log_refusal("tuning", lacking)
            await abort(context, lacking)
        except asyncio.CancelledError:
            if farewell is None or session is None:
                raise
            self._leave(session)  # before the farewell, which may wait for the edge too
            log_refusal("tuning", farewell)
            with contextlib.suppress(asyncio.TimeoutError):  # not the built-in one before Python 3.11
                await asyncio.wait_for(abort(context, farewell), self.config.write_timeout_s)
            raise
        finally:
            for helper in helpers:
                helper.cancel()
            if session is not None:
                self._leave(session)

    async def _listen(self, session: TuneSession, context: Context) -> None:
        allowance = self.sessions[session]
        while True:
            await session.outbox.has_room()  # or an edge that does not read fills our memory
            message = await read(pb.TuneRequest, context, self.traffic)
            session.touched_at = time.monotonic()
            if message is None:
                await asyncio.sleep(BROKEN_NOTICE_S)
                return
            kind = message.WhichOneof("message")
            if kind == "batch":
                await allowance.pause()
                self.drain.check()
                session.touched_at = time.monotonic()
                await session.begin(message.batch, allowance)
            elif kind in PARTS:
                session.rows(kind, getattr(message, kind))
            elif kind == "open":
                raise invalid("open is the first message, and only the first; this stream is open already")
            else:
                raise invalid("an empty message: expected a batch or rows of one")

    def _open(self, message: pb.TuneRequest | None) -> TuneSession:
        """Compare what both sides stand on, before any activation is sent."""
        if message is None or not message.HasField("open"):
            raise invalid("the first message must be open: protocol version, fingerprint and wire dtype")
        self.drain.check()
        config, request = self.config.tuning, message.open
        plan, wire_dtype = agreed(self.offers, request).plan, _agreed_dtype(request)
        if gradients_underflow(self.engine.backbone.dtype):
            raise Refusal(
                grpc.StatusCode.FAILED_PRECONDITION,
                "this cloud computes in float16, in which gradients underflow; tune at one that computes in "
                "bfloat16 or float32",
                reason="dtype",
            )
        if len(self.sessions) >= config.max_streams:
            raise Refusal(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"all {config.max_streams} tuning streams are taken; try again later",
                retry_after_s=self.released.hint_s(),
                reason="tuning_streams",
            )
        allowance = self.allowances.of(caller().name)
        allowance.admit_tuning()
        session = TuneSession(
            plan=plan,
            wire_dtype=wire_dtype,
            limits=self._limits_of(plan),
            backbone=self.engine.backbone,
            queue=self.queue,
            budget=self.budget,
            config=config,
            patience_s=self.config.write_timeout_s,
            payer=caller().name,
            make_batch=self.make_batch,
        )
        self.sessions[session] = allowance
        allowance.tuning_streams += 1
        who, streams = caller().name, len(self.sessions)
        words = f"tuning of {who or 'somebody'} opened (plan {plan.name})"
        event(log, "tuning_opened", words, identity=who, plan=plan.name, streams=streams)
        opened = pb.TuneOpened(
            max_batch_tokens=session.limits.max_batch_tokens,
            max_sequence_tokens=session.limits.max_sequence_tokens,
            checkpointing=config.checkpointing,
        )
        session.outbox.put(pb.TuneResponse(opened=opened))
        return session

    def _limits_of(self, plan: Plan) -> TuneLimits:
        """Return `_limits`, found once: they take some milliseconds, for which everybody would wait."""
        if plan.name not in self._known_limits:
            self._known_limits[plan.name] = self._limits(plan)
        return self._known_limits[plan.name]

    def _limits(self, plan: Plan) -> TuneLimits:
        """Return bounds that fit the model and the memory.

        Raises
        ------
        Refusal
            If the memory does not hold a batch of one token.
        """
        backbone, config = self.engine.backbone, self.config.tuning
        context = min(
            self.config.max_context_tokens or backbone.geometry.max_positions, backbone.geometry.max_positions
        )

        own = self.config.per_identity.max_tuning_bytes
        most_bytes = config.max_bytes if own is None else min(own, config.max_bytes)

        def fits(tokens: int) -> bool:
            size = tuning_bytes(
                backbone.geometry,
                plan,
                tokens,
                backbone.dtype,
                config.checkpointing,
                longest=min(tokens, context),
                piece_tokens=config.piece_tokens,
                side_by_side=most_workers(backbone),
            )
            return size <= most_bytes

        batch = most_tokens(fits, MOST_BATCH_TOKENS)
        if batch == 0:
            raise Refusal(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "this cloud has no memory for tuning; its operator may raise tuning.max_bytes",
                reason="tuning_memory",
            )
        return TuneLimits(max_batch_tokens=batch, max_sequence_tokens=min(context, batch))

    def _leave(self, session: TuneSession) -> None:
        if (allowance := self.sessions.pop(session, None)) is not None:
            allowance.tuning_streams -= 1
            for freed in (allowance.released, self.released):
                freed.note()
            who, plan, streams = session.payer, session.plan.name, len(self.sessions)
            words = f"tuning of {who or 'somebody'} closed (plan {plan})"
            event(log, "tuning_closed", words, identity=who, plan=plan, streams=streams)
        session.close()
        if not self.sessions:
            self.budget.arenas.shrink(0)

    async def _write(
        self, session: TuneSession, context: Context, cut_off: Callable[[Refusal], None]
    ) -> None:
        """Send what the session has to say; an edge that does not read is cut off."""
        loop, patience = asyncio.get_running_loop(), self.config.write_timeout_s
        late = Refusal(
            grpc.StatusCode.DEADLINE_EXCEEDED,
            f"the edge read nothing for {patience:g} seconds and was cut off; send the batch again",
            reason="cut_off",
        )
        while True:
            raw = (await session.outbox.get()).SerializeToString()
            timer = loop.call_later(patience, cut_off, late)
            await context.write(raw)
            timer.cancel()
            session.touched_at = time.monotonic()
            self.traffic.sent(raw)

    async def _watch(self, session: TuneSession, cut_off: Callable[[Refusal], None]) -> None:
        """Cut off an edge that is waited for and says nothing: its batch holds memory."""
        patience = self.config.tuning.idle_timeout_s
        while True:
            await asyncio.sleep(min(1.0, patience / 4))
            if not session.is_waiting_for_the_edge():
                session.touched_at = time.monotonic()
            elif time.monotonic() - session.touched_at > patience:
                cut_off(
                    Refusal(
                        grpc.StatusCode.DEADLINE_EXCEEDED,
                        f"the edge said nothing for {patience:g} seconds and was cut off; "
                        "send the batch again",
                        reason="cut_off",
                    )
                )
                return


def _failure(error: Exception) -> Refusal:
    """Return what an edge is told of a batch that failed here."""
    if is_out_of_memory(error):
        message = "the cloud ran out of memory over this batch; send a smaller one"
        return Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, message, reason="memory")
    message = "the cloud failed over this batch; its log says why"
    return Refusal(grpc.StatusCode.INTERNAL, message, reason="fault")


def _agreed_dtype(request: pb.TuneOpen) -> "pb.Dtype.ValueType":
    """Return what a run's tensors travel in; refuse what cannot carry gradients."""
    if request.wire_dtype in wire.ROUNDINGS:
        name = wire.dtype_name(request.wire_dtype)
        raise invalid(f"{name} is too coarse for gradients; tune with wire dtype bfloat16 or float32")
    if request.wire_dtype not in wire.TORCH_DTYPES:
        raise invalid(f"wire dtype must be one of {', '.join(map(wire.dtype_name, wire.TORCH_DTYPES))}")
    if gradients_underflow(wire.TORCH_DTYPES[request.wire_dtype]):
        raise invalid("gradients underflow in float16; tune with wire dtype bfloat16 or float32")
    return request.wire_dtype
