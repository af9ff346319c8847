"""The gRPC face of the cloud: streams, handshake, statuses, and what happens when a stream breaks.

No model code. Requests arrive as bytes and are parsed here, so that bytes which are no message get a
clear status too.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from typing import cast

import grpc

from cloud_server.allowance import Allowances
from cloud_server.caller import caller
from cloud_server.config import CloudConfig
from cloud_server.engine import Engine
from cloud_server.guard import Guard
from cloud_server.handshake import Offer, agreed, agreed_dtypes, fingerprint_message
from cloud_server.part_service import PartService
from cloud_server.session import Limits, Refusal, Session, invalid
from cloud_server.streams import BROKEN_NOTICE_S, Context, Traffic, abort, begin, first, parse, read
from cloud_server.tune_service import TuneService
from shared import PROTOCOL_VERSION, __version__, wire
from shared.edge_parts import EdgePart
from shared.pb.privatelora.v1 import private_lora_pb2 as pb

log = logging.getLogger(__name__)

SERVICE_NAME = "privatelora.v1.PrivateLoraService"


@dataclass(eq=False)
class Service:
    """Everything behind the RPCs of one server process."""

    config: CloudConfig
    engine: Engine
    offers: dict[bytes, Offer]  # by the fingerprint's plan digest
    edge_parts: list[EdgePart]
    limits: Limits
    sessions: dict[bytes, Session] = field(default_factory=dict)
    traffic: Traffic = field(default_factory=Traffic)
    guard: Guard = field(default_factory=Guard)

    def __post_init__(self) -> None:
        """Let edges fetch parts, and tune on the same engine."""
        self.part_service = PartService(self.edge_parts, self.config.max_fetches, self.config.write_timeout_s)
        self.allowances = Allowances(self.config.per_identity)
        self.tuning = TuneService(self.config, self.engine, self.offers, self.traffic, self.allowances)

    def handlers(self) -> grpc.GenericRpcHandler:
        """Return handlers that exchange raw bytes."""
        return grpc.method_handlers_generic_handler(
            SERVICE_NAME,
            {
                "Describe": grpc.unary_unary_rpc_method_handler(self.describe),
                "FetchEdgeParts": grpc.unary_stream_rpc_method_handler(self.part_service.fetch),
                "Decode": grpc.stream_stream_rpc_method_handler(self.decode),
                "Tune": grpc.stream_stream_rpc_method_handler(self.tuning.tune),
            },
        )

    async def describe(self, raw: bytes, context: Context) -> bytes:
        """State what this cloud serves."""
        try:
            parse(pb.DescribeRequest, raw)
        except Refusal as refusal:
            await abort(context, refusal)
        response = pb.DescribeResponse(
            protocol_version=PROTOCOL_VERSION,
            server_version=__version__,
            plans=[
                pb.PlanOffer(
                    plan_json=o.plan.canonical_json(), fingerprint=fingerprint_message(o.fingerprint)
                )
                for o in self.offers.values()
            ],
            edge_parts=[
                pb.EdgePart(name=part.name, size_bytes=part.size, sha256=part.sha256)
                for part in self.edge_parts
            ],
            limits=pb.Limits(
                max_context_tokens=self.limits.max_context_tokens,
                max_step_tokens=self.limits.max_step_tokens,
                max_rows=self.limits.max_rows,
                max_steps_in_flight=self.limits.max_steps_in_flight,
                grace_period_ms=int(self.config.grace_period_s * 1000),
            ),
            compute_dtype=wire.DTYPE_NAMES[self.config.dtype],
            kv_bytes_used=self.engine.cache.bytes_used,
            kv_bytes_total=self.engine.cache.bytes_total,
            batches=self.engine.batches.count,
            batched_steps=self.engine.batches.steps,
        )
        return response.SerializeToString()

    async def decode(self, _: AsyncIterator[bytes], context: Context) -> None:
        """Serve one session until its stream ends."""
        handler = cast("asyncio.Task[None]", asyncio.current_task())
        session: Session | None = None
        writer: asyncio.Task[None] | None = None
        finished, farewell = False, None

        def cut_off(reason: str) -> None:
            nonlocal farewell
            farewell = f"{reason} and was cut off; open a new session and replay"
            handler.cancel()

        try:
            session = self._open(
                await first(pb.DecodeRequest, context, self.traffic, self.config.write_timeout_s)
            )
            session.cut_off = cut_off
            allowance = self.allowances.of(session.caller.name)
            await begin(context)
            writer = asyncio.create_task(self._write(session, context))
            writer.add_done_callback(lambda done: done.cancelled() or handler.cancel())
            while not finished:
                if session.outbox.is_full:
                    await session.outbox.has_room()  # or an edge that does not read fills our memory
                message = await read(pb.DecodeRequest, context, self.traffic)
                session.heard_at = time.monotonic()
                if message is None:
                    await asyncio.sleep(BROKEN_NOTICE_S)
                    finished = True
                elif message.HasField("residual_codes"):
                    session.answer(message.residual_codes)
                    # The engine first, then its codes on their way: to start the next read takes a while.
                    await asyncio.sleep(0)
                    await asyncio.sleep(0)
                elif message.HasField("step"):
                    await allowance.pause()
                    session.step(message.step)
                elif message.HasField("open"):
                    raise invalid(
                        "open is the first message, and only the first; this session is open already"
                    )
                else:
                    raise invalid("an empty message: expected a step or residual codes")
        except Refusal as refusal:
            log.info("session refused: %s: %s", refusal.code.name, refusal.message)
            await abort(context, refusal)
        except asyncio.CancelledError:
            if farewell is None or session is None:
                raise
            self._leave(session, finished)  # before the farewell, which may wait for the edge too
            session = None
            await self._say_goodbye(context, farewell)
            raise
        finally:
            if writer is not None:
                writer.cancel()
            if session is not None:
                self._leave(session, finished)

    async def housekeeping(self) -> None:
        """Free dropped sessions after their grace period, cut off silent ones; run until cancelled."""
        while True:
            await asyncio.sleep(min(1.0, max(0.05, self.config.grace_period_s / 4)))
            now = time.monotonic()
            for session in list(self.sessions.values()):
                if session.dropped_at is not None and (
                    now - session.dropped_at > self.config.grace_period_s
                    or not self.guard.may_still(session.caller)
                ):
                    self._forget(session)
                elif session.dropped_at is None and now - session.heard_at > self.config.idle_timeout_s:
                    session.cut_off(f"the edge said nothing for {self.config.idle_timeout_s:g} seconds")

    def _open(self, message: pb.DecodeRequest | None) -> Session:
        """Compare what both sides stand on, before any activation is sent."""
        if message is None or not message.HasField("open"):
            raise invalid("the first message must be open: protocol version, fingerprint and wire dtype")
        request = message.open
        offer, dtypes = agreed(self.offers, request), agreed_dtypes(request)
        who = caller()
        if request.session_id:
            session = self.sessions.get(request.session_id)
            if (
                session is None
                or session.dropped_at is None
                or session.plan != offer.plan
                or session.caller.name
                != who.name  # said as if there were none: ids are nobody else's business
            ):
                raise Refusal(
                    grpc.StatusCode.NOT_FOUND,
                    "no such dropped session here (its grace period may be over); open a new one and replay",
                )
            session.dropped_at, session.wire_dtypes, session.caller = None, dtypes, who
            session.heard_at = time.monotonic()  # it was silent while it was dropped
        else:
            allowance = self.allowances.of(who.name)

            def own_room() -> bool:
                return self._evict(allowance.sessions)

            allowance.admit_session(own_room)
            if len(self.sessions) >= self.config.max_sessions and not self._evict():
                raise Refusal(
                    grpc.StatusCode.RESOURCE_EXHAUSTED,
                    f"all {self.config.max_sessions} sessions are taken; try again later",
                    retry_after_s=1.0,
                )
            session = Session(
                offer.plan,
                dtypes,
                self.limits,
                self.engine,
                self._evict,
                caller=who,
                allowance=allowance,
                make_own_room=own_room,
            )
            self.sessions[session.id] = session
            allowance.sessions.add(session)
        opened = pb.Opened(session_id=session.id, row_lengths=session.row_lengths())
        session.outbox.put(pb.DecodeResponse(opened=opened))
        return session

    def _evict(self, among: Iterable[Session] | None = None) -> bool:
        """Free the session, of all or these, that was dropped longest ago; return whether there was one."""
        sessions = self.sessions.values() if among is None else among
        dropped = [s for s in sessions if s.dropped_at is not None]
        if not dropped:
            return False
        self._forget(min(dropped, key=lambda s: s.dropped_at or 0.0))
        return True

    async def _say_goodbye(self, context: Context, farewell: str) -> None:
        """Tell an edge why it is cut off, in case that it reads after all."""
        log.info("session refused: %s", farewell)
        refusal = Refusal(grpc.StatusCode.DEADLINE_EXCEEDED, farewell)
        with contextlib.suppress(asyncio.TimeoutError):  # not the built-in one before Python 3.11
            await asyncio.wait_for(abort(context, refusal), self.config.write_timeout_s)

    def _leave(self, session: Session, finished: bool) -> None:
        """Free at an orderly end; a broken stream may come back within the grace period."""
        if finished or self.config.grace_period_s == 0:
            self._forget(session)
        else:
            session.drop()

    def _forget(self, session: Session) -> None:
        self.sessions.pop(session.id, None)
        if session.allowance is not None:
            session.allowance.sessions.discard(session)
        session.close()

    async def _write(self, session: Session, context: Context) -> None:
        """Send what the session has to say; an edge that does not read is cut off."""
        loop, patience = asyncio.get_running_loop(), self.config.write_timeout_s
        while True:
            raw = (await session.outbox.get()).SerializeToString()
            timer = loop.call_later(
                patience, session.cut_off, f"the edge read nothing for {patience:g} seconds"
            )
            await context.write(raw)
            timer.cancel()
            self.traffic.sent(raw)
