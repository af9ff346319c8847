"""Sessions that have just been given a token, and when each is likely to ask for the next.

The engine keeps a step at the first layer for them: running apart costs a pass through all layers. An
edge that usually takes long, or now takes longer than it usually does, is nobody's company. Knows times,
no steps.
"""

LATE = 2.0  # times what an edge usually takes between two steps: then it is not expected any more
GONE_S = 1.0  # who rests for longer is a person that reads and types: it says nothing of the next rest


class Company:
    """Who rests between two short steps.

    Parameters
    ----------
    first_guess_s
        How long a session is expected to rest that has never rested before (seconds).
    """

    def __init__(self, first_guess_s: float) -> None:
        self._first_guess_s = first_guess_s
        self._since: dict[object, float] = {}  # resting sessions, and when their last step ended
        self._usual: dict[object, float] = {}  # seconds between two steps of a session, learned

    @property
    def is_empty(self) -> bool:
        """Whether nobody rests."""
        return not self._since

    def rest(self, owner: object, now: float) -> None:
        """Note that a session's short step has ended."""
        self._since[owner] = now

    def come_back(self, owner: object, now: float) -> None:
        """Note that a session has sent a step."""
        since = self._since.pop(owner, None)
        if since is not None and now - since <= GONE_S:
            usual = self._usual.get(owner, now - since)
            self._usual[owner] = usual + 0.2 * (now - since - usual)

    def leave(self, owner: object) -> bool:
        """Forget a session; return whether it was resting."""
        self._usual.pop(owner, None)
        return self._since.pop(owner, None) is not None

    def rested_since(self, moment: float) -> bool:
        """Return whether any session has begun to rest after ``moment``."""
        return any(since > moment for since in self._since.values())

    def expected_until(self, now: float, within_s: float) -> float | None:
        """Return until when a session that usually rests for at most ``within_s`` is due; None if none is."""
        self._since = {owner: since for owner, since in self._since.items() if now - since <= GONE_S}
        usual = {owner: self._usual.get(owner, self._first_guess_s) for owner in self._since}
        until = [s + LATE * usual[owner] for owner, s in self._since.items() if usual[owner] <= within_s]
        return max((moment for moment in until if moment >= now), default=None)
