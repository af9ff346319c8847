"""Looking after sessions between their messages: who is waited for in vain does not keep room for ever.

Dropped sessions are freed when their grace period is over, or their caller may no longer come back. Connected
ones that are silent for too long are cut off, and what one claims between two answers lapses. Time in which
the whole process stood still (a stopped process, a suspended machine) counts for nobody: no edge could have
been heard, or have come back.
"""

import asyncio
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cloud_server.service import Service

FROZEN_S = 1.0  # a pause of the whole process this long is none of the edges' silence


async def housekeeping(service: "Service") -> None:
    """Free dropped sessions after their grace period, cut off silent ones; run until cancelled."""
    config, roster = service.config, service.roster
    interval_s = min(1.0, max(0.05, config.grace_period_s / 4))
    while True:
        before = time.monotonic()
        await asyncio.sleep(interval_s)
        roster.admission.pump()  # for blocks that became free on their own, such as cropped ones
        now = time.monotonic()
        late_s = max(0.0, now - before - interval_s)
        for session in roster.sessions.values():
            # Never beyond now: who was heard or dropped since it woke up has lost nothing. A grace period
            # may be shorter than any pause worth a name, so that no delay is too small to be granted.
            if session.dropped_at is not None:
                session.dropped_at = min(now, session.dropped_at + late_s)
            if late_s > FROZEN_S:  # nobody could be heard meanwhile
                session.heard_at = min(now, session.heard_at + late_s)
        for session in list(roster.sessions.values()):
            if session.dropped_at is not None:
                may_still = service.guard.may_still(session.caller)
                if not may_still or now - session.dropped_at > config.grace_period_s:
                    roster.forget(session, "grace_over" if may_still else "identity")
            elif now - session.heard_at > config.idle_timeout_s:
                session.cut_off(f"the edge said nothing for {config.idle_timeout_s:g} seconds")
            elif (since := session.silent_since()) and now - since > config.answer_timeout_s:
                session.cut_off(f"the edge answered nothing for {config.answer_timeout_s:g} seconds")
            elif not session.steps and now - session.heard_at > config.claim_idle_s:
                roster.admission.lapse(session)
