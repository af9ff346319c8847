"""Whose turn it is: the identity that has had least, of those who are there.

Start-time fair queueing: each identity has a clock that runs by what it was given; the least one is next.
Who was away does not come back with a claim to what it missed. Knows no work, only who and how much.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


class Turns:
    """Shares of something that identities use one after the other."""

    def __init__(self) -> None:
        self._had: dict[str, float] = {}  # there are as many as names were handed out
        self._now = 0.0

    def order(self, items: Sequence[T], payer: Callable[[T], str]) -> list[T]:
        """Return the items by whose turn it is; those of one identity stay in their order."""
        return sorted(items, key=lambda item: max(self._now, self._had.get(payer(item), 0.0)))

    def charge(self, payer: str, amount: float) -> None:
        """Note that an identity was given so much (any unit)."""
        began = max(self._now, self._had.get(payer, 0.0))
        self._now, self._had[payer] = began, began + amount
