"""The reception: how a stream comes by its session, before any activation is sent.

The first message of a stream opens a new session, or picks up one of its own caller's that is held here.
Both sides compare what they stand on first, and who is to be refused is refused before it waits. A new
session waits for room, one that is picked up has kept its own. When a session is returned, the answer to its
edge lies in its outbox.

Runs on the event loop only.
"""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass

import grpc

from cloud_server.allowance import Allowances
from cloud_server.caller import Caller, caller
from cloud_server.config.cloud import CloudConfig
from cloud_server.drain import Drain
from cloud_server.engine import Engine
from cloud_server.handshake import Offer, agreed, agreed_dtypes
from cloud_server.logs import event, shown
from cloud_server.metrics import OPENED
from cloud_server.outbox import Outbox
from cloud_server.refusal import Refusal, invalid
from cloud_server.roster import Roster
from cloud_server.session import Limits, Session
from shared.pb.privatelora.v1 import private_lora_pb2 as pb
from shared.plan import Plan
from shared.wire_dtypes import WireDtypes

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Reception:
    """Opens sessions and picks them up again; those that there are stand on the roster."""

    config: CloudConfig
    engine: Engine
    offers: Mapping[bytes, Offer]  # by the fingerprint's plan digest
    limits: Limits
    allowances: Allowances
    drain: Drain
    roster: Roster

    async def let_in(self, message: pb.DecodeRequest | None) -> Session:
        """Open a session, once there is room for it; one that is picked up again has kept its room.

        Raises
        ------
        Refusal
            If the two sides do not agree, or there is no room in time.
        """
        if message is None or not message.HasField("open") or message.open.session_id:
            return self.open(message)
        self.drain.check()
        agreed(self.offers, message.open), agreed_dtypes(message.open)  # who is refused does not wait for it
        who = caller().name
        allowance, admission = self.allowances.of(who), self.roster.admission
        allowance.admit_session(lambda: self.roster.evict(allowance.sessions), admission.opening(who))
        async with admission.place(who, self._claim(message.open)):
            return self.open(message)

    def open(self, message: pb.DecodeRequest | None) -> Session:
        """Compare what both sides stand on, and return a session, new or picked up, without a wait.

        Raises
        ------
        Refusal
            If the two sides do not agree, or there is no such session, or none to be had.
        """
        if message is None or not message.HasField("open"):
            raise invalid("the first message must be open: protocol version, fingerprint and wire dtype")
        self.drain.check()
        request = message.open
        offer, dtypes = agreed(self.offers, request), agreed_dtypes(request)
        who = caller()
        if request.session_id:
            session = self._held(request.session_id, offer.plan, who)
            session.outbox = Outbox()  # the old stream may still be at the old one
            session.dropped_at, session.wire_dtypes, session.caller = None, dtypes, who
            session.heard_at = time.monotonic()  # it was silent while it was dropped
        else:
            session = self._new(request, offer.plan, dtypes, who)
        how = "resumed" if request.session_id else "new"
        OPENED.labels(how).inc()
        event(
            log,
            "session_opened",
            f"session {shown(session.id)} of {who.name or 'somebody'} opened ({how}, plan {offer.plan.name})",
            session=shown(session.id),
            identity=who.name,
            plan=offer.plan.name,
            how=how,
            sessions=len(self.roster.sessions),
        )
        opened = pb.Opened(
            session_id=session.id,
            row_lengths=session.row_lengths(),
            last_step=session.last_number,
        )
        session.outbox.put(pb.DecodeResponse(opened=opened))
        return session

    def blocks(self, claim: pb.KvClaim) -> int:
        """Return the blocks of a claim, which is never to more than a session may have."""
        rows = min(claim.rows, self.limits.max_rows)
        return self.roster.admission.blocks_of(rows, min(claim.row_tokens, self.limits.max_context_tokens))

    def _claim(self, request: pb.Open) -> int:
        """Return the blocks that a new session is admitted for."""
        if request.HasField("claim"):
            return self.blocks(request.claim)
        most, unstated = self.limits.max_context_tokens, self.config.unstated_claim_tokens
        return self.roster.admission.blocks_of(1, most if unstated is None else min(unstated, most))

    def _held(self, session_id: bytes, plan: Plan, who: Caller) -> Session:
        """Return a session that its own caller comes back for, taken from whatever stream still has it."""
        session = self.roster.sessions.get(session_id)
        if (
            session is None
            or session.plan != plan
            or session.caller.name != who.name  # said as if there were none: ids are nobody else's business
        ):
            raise Refusal(
                grpc.StatusCode.NOT_FOUND,
                "no such dropped session here (its grace period may be over); open a new one and replay",
                reason="no_session",
            )
        if session.dropped_at is None:  # an edge knows before us when its link is cut
            session.cut_off("the session was picked up by another stream of its edge")
            session.drop()
        return session

    def _new(self, request: pb.Open, plan: Plan, dtypes: WireDtypes, who: Caller) -> Session:
        """Return a session of one's own that is on the roster now; dropped ones make room for it."""
        allowance, roster = self.allowances.of(who.name), self.roster

        def own_room() -> bool:
            return roster.evict(allowance.sessions)

        allowance.admit_session(own_room)
        if len(roster.sessions) >= self.config.max_sessions and not roster.evict():
            raise Refusal(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"all {self.config.max_sessions} sessions are taken; try again later",
                retry_after_s=1.0,
                reason="sessions",
            )
        session = Session(
            plan,
            dtypes,
            self.limits,
            self.engine,
            roster.evict,
            caller=who,
            allowance=allowance,
            make_own_room=own_room,
            may_take=roster.admission.may_take,
            claim=self._claim(request),
        )
        roster.sessions[session.id] = session
        allowance.sessions.add(session)
        return session
