"""The orderly end of a server: who is new is refused with a hint, who is here is told to move, then it stops.

A stream between two steps is told at once, or when it asks for the next; one whose step is under way gets
some time to finish it. Nothing is lost in either case: an edge that is told in the middle of a step repeats
it elsewhere. What it is told is a status with trailers, so no message has a field for it. One that does not
hear it comes back to ask, and is told then.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import grpc

from cloud_server.logs import event, warning
from cloud_server.refusal import Refusal

if TYPE_CHECKING:
    from cloud_server.service import Service

log = logging.getLogger(__name__)

LOOK_EVERY_S = 0.02  # at who has finished a step
FAREWELL_S = 1.0  # for the last statuses to go out
RETURN_S = 1.0  # for edges that missed where to go (gRPC loses a status to who is sending) to come back


class Drain:
    """Whether a server is at its end, and what it tells its edges then.

    Parameters
    ----------
    successor
        Where to go instead (HOST:PORT); None leaves that to the edges.
    retry_after_s
        When to try again here, or elsewhere without a successor (seconds).
    """

    def __init__(self, successor: str | None = None, retry_after_s: float = 1.0) -> None:
        self.successor, self.retry_after_s = successor, retry_after_s
        self.begun = False

    def refusal(self) -> Refusal:
        """Return what an edge is told."""
        where = f"; go to {self.successor}" if self.successor else ""
        return Refusal(
            grpc.StatusCode.UNAVAILABLE,
            f"this cloud is shutting down{where}; sessions go on by replay",
            retry_after_s=self.retry_after_s,
            reason="drain",
            successor=self.successor,
        )

    def check(self) -> None:
        """Refuse what is new.

        Raises
        ------
        Refusal
            Once the end has begun.
        """
        if self.begun:
            raise self.refusal()

    async def run(self, service: "Service", timeout_s: float) -> None:
        """Tell everybody to move, and return when they have gone.

        Parameters
        ----------
        service
            Whose streams.
        timeout_s
            How long a step may take to finish (seconds).
        """
        self.begun = True
        service.admission.send_away(self.refusal())
        loop = asyncio.get_running_loop()
        until, told = loop.time() + timeout_s, set[object]()
        sessions = sum(session.dropped_at is None for session in service.sessions.values())
        runs = len(service.tuning.sessions)
        words = f"draining: {sessions} sessions and {runs} tuning runs are told to move"
        event(log, "draining", words, sessions=sessions, tuning=runs)
        while streams := self.streams(service):
            late = loop.time() > until
            if loop.time() > until + FAREWELL_S:
                late_ones = len(streams)
                warning(log, "drain_late", f"{late_ones} streams did not go in time", streams=late_ones)
                return
            for key, is_idle, send_away in streams:
                if key not in told and (late or is_idle):
                    told.add(key)
                    send_away(self.refusal())
            await asyncio.sleep(LOOK_EVERY_S)
        if sessions + runs and self.successor is not None:
            await asyncio.sleep(RETURN_S)

    @staticmethod
    def streams(service: "Service") -> list[tuple[object, bool, Callable[[Refusal], object]]]:
        """Return the open streams: what each is known by, whether it is between steps, how to end it."""
        found: list[tuple[object, bool, Callable[[Refusal], object]]] = [
            (session, not session.steps and session.outbox.is_empty, session.cut_off)
            for session in service.sessions.values()
            if session.dropped_at is None
        ]
        found += [
            (session, session.current is None and session.outbox.is_empty, session.cut_off)
            for session in service.tuning.sessions
        ]
        return found
