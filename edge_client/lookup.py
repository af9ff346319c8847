"""Where a context has occurred before, and what followed: the raw material of drafts.

Contract: `longest_match` finds the longest suffix of a context that ends at one of the given places;
`vote` turns such places into the tokens that came after them. Token ids are never negative; -1 in a
text separates pieces, matches nothing and ends a continuation.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int32]
Places = NDArray[np.intp]

SEPARATOR = -1
LONGEST_MATCH = 32  # tokens; a longer agreement says nothing more about what follows
MAX_VOTES = 1024  # places that are asked what follows; evenly taken where there are more


@dataclass(frozen=True)
class Match:
    """What may come next: where it was found, on how many tokens of context, and the tokens."""

    source: str
    length: int
    tokens: Tokens


def longest_match(text: Tokens, ends: Places, context: Tokens, length: int = 1) -> tuple[int, Places]:
    """Return the longest suffix of a context that ends at one of some places, and those places.

    Parameters
    ----------
    text
        ``(tokens,)``.
    ends
        Places in ``text`` (ascending) where the last ``length`` tokens are known to be the context's.
    context
        ``(tokens,)``, at least ``length`` of them.
    length
        Tokens (count).

    Returns
    -------
    tuple
        The length of the suffix in tokens, at most `LONGEST_MATCH`, and the places where it ends.
    """
    while length < min(LONGEST_MATCH, len(context)) and context[-1 - length] != SEPARATOR:
        inside = ends[ends >= length]
        longer = inside[text[inside - length] == context[-1 - length]]
        if not longer.size:
            break
        ends, length = longer, length + 1
    return length, ends


def vote(text: Tokens, ends: Places, limit: int) -> Tokens:
    """Return up to ``limit`` tokens that follow most often after some places, at a tie the latest ones."""
    if len(ends) > MAX_VOTES:
        ends = ends[np.linspace(0, len(ends) - 1, MAX_VOTES).astype(np.intp)]
    found: list[int] = []
    at = ends + 1
    while len(found) < limit:
        at = at[at < len(text)]
        following = text[at]
        at, following = at[following != SEPARATOR], following[following != SEPARATOR]
        if not at.size:
            break
        # The last occurrence comes first, and argmax takes the first of the most frequent.
        _, first, inverse, counts = np.unique(
            following[::-1], return_index=True, return_inverse=True, return_counts=True
        )
        best = min(np.flatnonzero(counts == counts.max()), key=lambda kind: int(first[kind]))
        found.append(int(following[::-1][first[best]]))
        at = at[::-1][inverse == best][::-1] + 1
    return np.array(found, dtype=np.int32)


def in_session(tokens: Tokens, limit: int) -> Match | None:
    """Look up the end of a session's own tokens in what came before: ``limit`` tokens that may follow."""
    ends = np.flatnonzero(tokens[:-1] == tokens[-1])
    if not ends.size or limit < 1:
        return None
    length, ends = longest_match(tokens, ends, tokens)
    # A vote that ends early has read the session to its end: what follows then is what it found, as a loop.
    return Match("session", length, np.resize(vote(tokens, ends, limit), limit))
