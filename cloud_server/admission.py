"""Who is let in, and when: sessions by the KV cache that they may come to need, identities in turn.

The rule. Each session has a *claim*, the blocks that it said it may come to need (or, if it said nothing,
those of one row of the longest context). The sum over all sessions of what each holds or claims, whichever is
more, never exceeds the pool by letting somebody in. So what a session claimed is there whenever it asks,
whoever came after it: no answer ends for want of room within its claim. Beyond its claim a session gets what
nobody else holds or claims. Between two answers a claim lapses to what is held, if each states its own.
What the sessions of one identity claim together counts up to the share of the pool that it may have: more it
never gets, so nobody else has to wait for more.

Who does not fit waits: a bounded number, each for a bounded time. Whose session is running and claims more
comes first; then identities take turns, so that one with many waiting opens shuts nobody out. Nobody is
overtaken by who needs less: large sessions would wait for ever. Dropped sessions make room, the oldest
first. Who is refused is told when to come again, by how fast room has become free lately.

Whose session grew in vain does not come first for as long again: with one session growing after the other, an
identity would keep everybody out for ever.

Runs on the event loop only. Touches no step that stays within its blocks.
"""

import asyncio
import time
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc

from cloud_server.config.waiting import QueueConfig
from cloud_server.kv_cache import BLOCK_TOKENS, KvCache
from cloud_server.metrics import WAITED
from cloud_server.refusal import Refusal
from cloud_server.releases import LEAST_S, Releases
from cloud_server.session import Session


@dataclass(eq=False)
class Waiter:
    """Somebody who waits for room, or has just got it and not used it yet."""

    identity: str
    blocks: int
    session: Session | None = None  # that grows; None is a new one
    granted: "asyncio.Future[None]" = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class Admission:
    """Lets sessions in.

    Parameters
    ----------
    cache
        The pool.
    config
        Bounds on waiting.
    max_sessions
        Most sessions (count).
    sessions
        All sessions, by whatever; only read.
    evict
        Frees the session that was dropped longest ago; False if there is none.
    share
        Most blocks that the sessions of one identity may hold together (count); None is all.
    """

    def __init__(
        self,
        cache: KvCache,
        config: QueueConfig,
        max_sessions: int,
        sessions: Callable[[], Collection[Session]],
        evict: Callable[[], bool],
        share: int | None = None,
    ) -> None:
        self.cache, self.config, self.max_sessions, self.share = cache, config, max_sessions, share
        self._sessions, self._evict = sessions, evict
        self._opens: OrderedDict[str, deque[Waiter]] = OrderedDict()  # whose turn it is comes first
        self._growing: deque[Waiter] = deque()
        self._grew_in_vain: dict[str, float] = {}  # identities, and until when others pass their sessions
        self._entering: set[Waiter] = set()  # granted, and no session yet
        self._busy = False  # looking who fits: what is freed meanwhile is for whoever is looked at
        self.blocks = Releases(config.max_wait_s)

    @property
    def waiting(self) -> int:
        """How many wait. Read by other threads too."""
        return len(self._growing) + sum(len(queue) for queue in list(self._opens.values()))

    @property
    def claimed_bytes(self) -> int:
        """Bytes that sessions hold or claim. Read by other threads too."""
        sessions = list(self._sessions())
        return (sum(map(held, sessions)) + self._promised(sessions)) * self.cache.block_bytes

    def blocks_of(self, rows: int, row_tokens: int) -> int:
        """Return the blocks of so many rows of so many positions, at most all that an identity may have."""
        most = self.cache.num_blocks if self.share is None else min(self.share, self.cache.num_blocks)
        return min(rows * -(-row_tokens // BLOCK_TOKENS), most)

    def opening(self, identity: str) -> int:
        """Return how many sessions of an identity wait to be opened, or were let in just now."""
        return len(self._opens.get(identity, ())) + sum(w.identity == identity for w in self._entering)

    def may_take(self, session: Session, blocks: int) -> bool:
        """Whether a session may take blocks: always within its claim, beyond if nobody has one.

        Dropped sessions make room for it, if that is enough.
        """
        return held(session) + blocks <= session.claim or self._make_room(blocks, but=session)

    @asynccontextmanager
    async def place(self, identity: str, blocks: int) -> AsyncIterator[None]:
        """Wait for room for a new session, and keep it until the block ends; then the session has it.

        Raises
        ------
        Refusal
            If too many wait already, or it takes too long.
        """
        waiter = Waiter(identity, blocks)
        if self._opens or self._growing or not self._fits(waiter):
            self._make_place(identity, waiter)
            self._opens.setdefault(identity, deque()).append(waiter)
            self.pump()
            await self._wait(waiter)
        else:
            self._entering.add(waiter)
        try:
            yield
        finally:
            self._entering.discard(waiter)
            self.pump()  # who left without a session leaves its room to others

    async def claim(self, session: Session, blocks: int) -> None:
        """Change a session's claim; wait if there is no room for more.

        Raises
        ------
        Refusal
            If that takes too long.
        """
        session.claim_lapses = True
        if blocks <= session.claim:
            session.claim = blocks
            self.pump()
            return
        waiter = Waiter(session.caller.name, blocks, session)
        if not self._growing and self._fits(waiter):
            session.claim = blocks
            self.pump()
            return
        self._growing.append(waiter)
        self.pump()  # it may pass those who wait
        await self._wait(waiter)

    def lapse(self, session: Session) -> None:
        """Leave a session that is between two answers no claim to more than it holds, for others to have.

        Unless its edge has said only once, or never, what it needs: it will not say so again.
        """
        if session.claim_lapses and session.claim > held(session):
            session.claim = held(session)
            self.pump()

    def released(self, blocks: int) -> None:
        """Say that somebody has gone who held or claimed so many blocks."""
        self.blocks.note(blocks)
        self.pump()

    def pump(self) -> None:
        """Let in whoever is next, as long as there is room. Harmless at any time."""
        if self._busy:
            return
        for waiter in list(self._growing):
            if self._fits(waiter):
                self._growing.remove(waiter)
                assert waiter.session is not None
                waiter.session.claim = waiter.blocks
                _grant(waiter)
            elif time.monotonic() >= self._grew_in_vain.get(waiter.identity, 0.0):
                return
        while self._opens:
            identity, queue = next(iter(self._opens.items()))
            if not self._fits(queue[0]):
                return
            waiter = queue.popleft()
            self._opens.move_to_end(identity)
            if not queue:
                del self._opens[identity]
            self._entering.add(waiter)
            _grant(waiter)

    def send_away(self, refusal: Refusal) -> None:
        """Refuse all who wait: there will be no room here."""
        waiting = [*self._growing, *(waiter for queue in self._opens.values() for waiter in queue)]
        self._growing.clear()
        self._opens.clear()
        for waiter in waiting:
            if not waiter.granted.done():
                waiter.granted.set_exception(refusal)

    def hint_s(self, blocks: int = 1) -> float:
        """Return when somebody who needs so many blocks should come again (seconds), those who wait first."""
        ahead = sum(waiter.blocks for queue in self._opens.values() for waiter in queue)
        return self.blocks.hint_s(max(1, ahead + blocks - max(0, self._free())))

    def _promised(
        self, sessions: Collection[Session], waiters: Collection[Waiter] = (), but: Session | None = None
    ) -> int:
        """Return blocks that these (``but`` one) claim and do not hold: an identity's up to its share."""
        claims, holds = Counter[str](), Counter[str]()
        for session in sessions:
            has, identity = held(session), session.caller.name
            holds[identity] += has
            if session is not but:
                claims[identity] += max(0, session.claim - has)
        for waiter in waiters:
            has = 0 if waiter.session is None else held(waiter.session)
            claims[waiter.identity] += max(0, waiter.blocks - has)
        if self.share is None:
            return sum(claims.values())
        return sum(min(more, max(0, self.share - holds[name])) for name, more in claims.items())

    def _free(
        self, waiter: Waiter | None = None, but: Session | None = None, gone: Collection[Session] = ()
    ) -> int:
        """Return the blocks that nobody holds or claims; below 0 is so many too few.

        Parameters
        ----------
        waiter
            Who would have a claim too.
        but
            Whose claim does not count.
        gone
            Who would hold and claim nothing any more.
        """
        stay = [session for session in self._sessions() if session not in gone] if gone else self._sessions()
        waiters = self._entering if waiter is None else {*self._entering, waiter}
        free = self.cache.free_blocks + sum(map(held, gone))
        return free - self._promised(stay, waiters, but)

    def _fits(self, waiter: Waiter) -> bool:
        """Whether there is room for somebody, once dropped sessions have made some if that is enough."""
        return self._make_room(0, waiter, but=waiter.session)

    def _make_room(self, blocks: int, waiter: Waiter | None = None, but: Session | None = None) -> bool:
        """Whether so many blocks are left, once dropped sessions have made room if that is enough."""
        is_new = waiter is not None and waiter.session is None
        self._busy = True
        try:
            while True:
                full = is_new and len(self._sessions()) + len(self._entering) >= self.max_sessions
                if self._free(waiter, but) >= blocks and not full:
                    return True
                dropped = {s for s in self._sessions() if s.dropped_at is not None and s is not but}
                if not dropped or self._free(waiter, but, gone=dropped) < blocks or not self._evict():
                    return False
        finally:
            self._busy = False

    def _make_place(self, identity: str, waiter: Waiter) -> None:
        """Refuse one more than may wait: of the identity that has most of them, the last one."""
        if self.waiting < self.config.max_waiting:
            return
        own = len(self._opens.get(identity, ()))
        most = max(self._opens, key=lambda name: len(self._opens[name]), default=None)
        if most is None or len(self._opens[most]) <= own + 1:
            raise self._refusal(waiter, "queue_full", f"{self.waiting} wait already")
        last = self._opens[most].pop()
        if not last.granted.done():  # it may have been cancelled, and not have left yet
            last.granted.set_exception(self._refusal(last, "queue_full", "others have fewer waiting"))

    async def _wait(self, waiter: Waiter) -> None:
        began = time.monotonic()
        timer = asyncio.get_running_loop().call_later(self.config.max_wait_s, self._give_up, waiter)
        try:
            await waiter.granted  # not `wait_for`, which before Python 3.12 may lose a cancellation
        except asyncio.CancelledError:
            self._entering.discard(waiter)  # it may have been granted at this very moment
            raise
        finally:
            timer.cancel()
            if waiter.granted.done() and not waiter.granted.cancelled():
                waiter.granted.exception()  # or one that nobody came for is complained about
            self._leave(waiter)
            WAITED.observe(time.monotonic() - began)

    def _give_up(self, waiter: Waiter) -> None:
        if not waiter.granted.done():
            now = time.monotonic()
            if waiter.session is not None and now >= self._grew_in_vain.get(waiter.identity, 0.0):
                self._grew_in_vain[waiter.identity] = now + self.config.max_wait_s
            self._leave(waiter)
            why = f"no room for {self.config.max_wait_s:g} seconds"
            waiter.granted.set_exception(self._refusal(waiter, "queue_deadline", why))

    def _leave(self, waiter: Waiter) -> None:
        """Wait no longer, whatever for."""
        if waiter in self._growing:
            self._growing.remove(waiter)
        queue = self._opens.get(waiter.identity)
        if queue is not None and waiter in queue:
            if queue[0] is waiter:  # that was its identity's turn, or it would shut out others for ever
                self._opens.move_to_end(waiter.identity)
            queue.remove(waiter)
            if not queue:
                del self._opens[waiter.identity]
        if waiter not in self._entering:
            self.pump()

    def _refusal(self, waiter: Waiter, reason: str, why: str) -> Refusal:
        hint_s = self.hint_s(waiter.blocks)
        if reason == "queue_deadline":
            # Those who came together are refused together. Were they to come back when there is room, that
            # would stand empty until then: back in time, they wait for it here.
            hint_s = max(LEAST_S, hint_s - self.config.max_wait_s / 2)
        used, total = self.claimed_bytes / 2**20, self.cache.bytes_total / 2**20
        asked = waiter.blocks * self.cache.block_bytes / 2**20
        return Refusal(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            f"the KV cache is full: {used:.0f} of {total:.0f} MiB are held or claimed, {asked:.1f} MiB were "
            f"asked for ({why}); try again later",
            retry_after_s=hint_s,
            reason=reason,
        )


def held(session: Session) -> int:
    """Return how many blocks a session's rows hold; what they share counts once."""
    rows = session.rows
    if len(rows) == 1:
        return len(rows[0].blocks)
    return len({block for row in rows for block in row.blocks})


def taken(session: Session) -> int:
    """Return how many blocks a session holds or claims, whichever is more."""
    return max(session.claim, held(session))


def _grant(waiter: Waiter) -> None:
    if not waiter.granted.done():
        waiter.granted.set_result(None)
