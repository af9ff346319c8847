"""What one identity may use of a cloud that others use too: sessions, KV bytes, tokens a second, tuning.

Who exceeds it is told so with RESOURCE_EXHAUSTED and when to come again; nobody else notices. Short waits
for the token rate are waited out here instead, so that an edge which is a little too fast is only slowed.
"""

import asyncio
import time
from collections.abc import Callable

import grpc

from cloud_server.config.identity import IdentityLimits
from cloud_server.refusal import Refusal
from cloud_server.releases import Releases
from cloud_server.session import Session


class Allowance:
    """What one identity may use, and what it uses now.

    Parameters
    ----------
    limits
        The bounds; None in a field is none.
    clock
        Seconds that only grow.
    """

    def __init__(self, limits: IdentityLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self.limits = limits
        self.sessions: set[Session] = set()
        self.tuning_streams = self.tuning_bytes = self.fetches = 0
        self.released = Releases()  # sessions and tuning streams of its own
        self._clock = clock
        self._tokens = limits.burst_tokens  # that may be spent at once; below 0 is a debt
        self._counted_at = clock()

    def admit_session(self, make_room: Callable[[], bool], opening: int = 0) -> None:
        """Refuse one session more than allowed.

        Parameters
        ----------
        make_room
            Frees one of this identity's dropped sessions; False if there is none.
        opening
            Its sessions that wait to be opened: they count too.

        Raises
        ------
        Refusal
            If there is no room.
        """
        most = self.limits.max_sessions
        while most is not None and len(self.sessions) + opening >= most:
            if not make_room():
                raise _too_much(f"{most} sessions at a time; close one", self.released.hint_s())

    def admit_tuning(self) -> None:
        """Refuse one tuning stream more than allowed.

        Raises
        ------
        Refusal
            If there is no room.
        """
        most = self.limits.max_tuning_streams
        if most is not None and self.tuning_streams >= most:
            raise _too_much(f"{most} tuning streams at a time", self.released.hint_s())

    def take_tuning(self, size: int) -> None:
        """Count the memory of a tuning batch (bytes) as used; whoever frees it subtracts it again.

        Raises
        ------
        Refusal
            With nothing counted, if there is no room.
        """
        most = self.limits.max_tuning_bytes
        if most is not None and self.tuning_bytes + size > most:
            raise _too_much(f"{most} bytes for tuning batches; send smaller ones", self.released.hint_s())
        self.tuning_bytes += size

    def admit_fetch(self) -> None:
        """Refuse one fetch of parts more than allowed.

        Raises
        ------
        Refusal
            If there is no room.
        """
        most = self.limits.max_fetches
        if most is not None and self.fetches >= most:
            raise _too_much(f"{most} fetches of parts at a time", self.released.hint_s())

    def lacks_kv(self, more_blocks: int, block_bytes: int) -> bool:
        """Whether so many more KV blocks are more than allowed. Blocks that rows share count once."""
        most = self.limits.max_kv_bytes
        if most is None or more_blocks == 0:
            return False
        held = {block for session in self.sessions for row in session.rows for block in row.blocks}
        return (len(held) + more_blocks) * block_bytes > most

    def kv_refusal(self) -> Refusal:
        """Return the refusal of KV blocks beyond the allowance."""
        what = f"{self.limits.max_kv_bytes} bytes of KV cache; end or crop a session"
        return _too_much(what, self.released.hint_s())

    def debt_s(self) -> float:
        """Return for how long nothing may be spent (seconds), 0 if something may."""
        rate = self.limits.max_tokens_per_s
        if rate is None:
            return 0.0
        now = self._clock()
        self._tokens = min(self.limits.burst_tokens, self._tokens + rate * (now - self._counted_at))
        self._counted_at = now
        return max(0.0, -self._tokens / rate)

    async def pause(self) -> None:
        """Wait until tokens may be spent, but not for long.

        Others of the same identity may spend while this one sleeps, so it looks again when it wakes.
        """
        until = self._clock() + self.limits.max_wait_s
        while (debt := self.debt_s()) > 0 and (left := until - self._clock()) > 0:
            await asyncio.sleep(min(debt, left))

    def spend(self, tokens: int) -> None:
        """Count tokens; the last step may go over the rate, and what comes next waits for it.

        Raises
        ------
        Refusal
            With nothing counted, if the rate is exceeded already.
        """
        if (debt := self.debt_s()) > 0.001:  # less is a clock that woke a sleeper a little early
            raise _too_much(f"{self.limits.max_tokens_per_s:g} tokens/s", max(debt, 0.001))
        self._tokens -= tokens


class Allowances:
    """The allowances of everybody who came so far, by identity."""

    def __init__(self, limits: IdentityLimits) -> None:
        self._limits = limits
        self._known: dict[str, Allowance] = {}

    def of(self, identity: str) -> Allowance:
        """Return what is known of an identity. There are as many as names were handed out."""
        if identity not in self._known:
            self._known[identity] = Allowance(self._limits)
        return self._known[identity]


def _too_much(what: str, retry_after_s: float) -> Refusal:
    message = f"your share of this cloud is {what}, or try again later"
    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    return Refusal(code, message, retry_after_s=retry_after_s, reason="share")
