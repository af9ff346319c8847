"""The roster: all sessions of a server, and how each of them ends.

A session is on the roster from the moment it is opened until it is forgotten. One that ends in order is
forgotten at once. One whose stream broke is held for the grace period to be resumed, unless its room is
needed first: it is evicted then, whoever was dropped longest ago before others. Whoever is forgotten leaves
its blocks and its share to those who wait.

Runs on the event loop only.
"""

import logging
import time
from collections.abc import Callable, Iterable

from cloud_server.admission import Admission, taken
from cloud_server.caller import Caller
from cloud_server.config.cloud import CloudConfig
from cloud_server.kv_cache import KvCache
from cloud_server.logs import event, shown
from cloud_server.metrics import CLOSED, DROPPED
from cloud_server.session import Session

log = logging.getLogger(__name__)


class Roster:
    """All sessions, by their ids, and the admission that gives them room.

    Parameters
    ----------
    config
        The grace period, and the bounds on sessions.
    cache
        Where sessions have their blocks.
    may_still
        Whether somebody who was let in would be let in now; who would not be cannot resume.
    """

    def __init__(self, config: CloudConfig, cache: KvCache, may_still: Callable[[Caller], bool]) -> None:
        self._may_still = may_still
        self.sessions: dict[bytes, Session] = {}
        self.grace_period_s = config.grace_period_s
        share = config.per_identity.max_kv_bytes
        self.admission = Admission(
            cache,
            config.queue,
            config.max_sessions,
            self.sessions.values,
            self.evict,
            None if share is None else share // cache.block_bytes,
        )

    def evict(self, among: Iterable[Session] | None = None) -> bool:
        """Free the session, of all or these, that was dropped longest ago; return whether there was one."""
        sessions = self.sessions.values() if among is None else among
        dropped = [s for s in sessions if s.dropped_at is not None]
        if not dropped:
            return False
        self.forget(min(dropped, key=lambda s: s.dropped_at or 0.0), "evicted")
        return True

    def leave(self, session: Session, finished: bool) -> None:
        """Free at an orderly end; a broken stream may come back within the grace period."""
        if finished or self.grace_period_s == 0:
            self.forget(session, "ended" if finished else "lost")
        elif not self._may_still(session.caller):
            self.forget(session, "identity")
        else:
            session.drop()
            self.admission.pump()  # it makes room for those who wait
            DROPPED.inc()
            words = f"session {shown(session.id)} lost its stream; it is held to be resumed"
            event(log, "session_dropped", words, session=shown(session.id), identity=session.caller.name)

    def forget(self, session: Session, reason: str) -> None:
        """Free a session; ``reason`` is a word that metrics and logs have for why."""
        if self.sessions.pop(session.id, None) is not None:
            CLOSED.labels(reason).inc()
            event(
                log,
                "session_closed",
                f"session {shown(session.id)} closed: {reason}",
                session=shown(session.id),
                identity=session.caller.name,
                reason=reason,
                seconds=round(time.monotonic() - session.opened_at, 3),
            )
        blocks = taken(session)
        if session.allowance is not None:
            session.allowance.sessions.discard(session)
            session.allowance.released.note()
        session.close()
        self.admission.released(blocks)
