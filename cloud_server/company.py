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
        if since is not None:
            usual = self._usual.get(owner, now - since)
            self._usual[owner] = usual + 0.2 * (now - since - usual)

    def leave(self, owner: object) -> bool:
        """Forget a session; return whether it was resting."""
        self._usual.pop(owner, None)
        return self._since.pop(owner, None) is not None

    def rested_since(self, moment: float) -> bool:
        """Return whether any session has begun to rest after ``moment``."""
        return any(since > moment for since in self._since.values())

    def is_expected(self, now: float, within_s: float) -> bool:
        """Return whether a session that usually rests for no longer than ``within_s`` is due to come."""
        self._since = {owner: since for owner, since in self._since.items() if now - since <= GONE_S}
        for owner, since in self._since.items():
            usual = self._usual.get(owner, self._first_guess_s)
            if usual <= within_s and now - since <= LATE * usual:
                return True
        return False
