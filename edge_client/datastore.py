"""The user's own documents and earlier conversations, as token ids to draft from.

Both stay in this process's memory. What is drafted from them is sent to be checked, as hidden states
like every other token: a document belongs here only if its text may cross the wire.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edge_client.lookup import SEPARATOR, Match, Tokens, longest_match, vote

MAX_TEXT_BYTES = 8 * 2**20  # of all documents together; about 2 million tokens, a few seconds to read
MAX_HISTORY_TOKENS = 2**16


class DatastoreError(ValueError):
    """Documents that cannot be read or are too large."""


class Datastore:
    """An index over token ids: which places end with a given pair of tokens.

    20 bytes a token. A context that shares only its last token with a document matches nothing here.

    Parameters
    ----------
    texts
        Token ids of each document; never matched across a document's end.
    """

    def __init__(self, texts: Iterable[Sequence[int]]) -> None:
        pieces = [np.array([*text, SEPARATOR], dtype=np.int32) for text in texts]
        self.tokens: Tokens = np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int32)
        pairs = _pairs(self.tokens[:-1], self.tokens[1:])  # pair i ends at place i + 1
        usable = (self.tokens[:-1] != SEPARATOR) & (self.tokens[1:] != SEPARATOR)
        ends = np.flatnonzero(usable)
        order = ends[np.argsort(pairs[ends], kind="stable")]
        self._pairs, self._ends = pairs[order], (order + 1).astype(np.int64)

    @classmethod
    def read(cls, files: Sequence[Path], tokenizer: Any) -> "Datastore":
        """Read and tokenize text files.

        Raises
        ------
        DatastoreError
            If a file is missing, no UTF-8 text, or all are larger than `MAX_TEXT_BYTES`.
        """
        texts, size = [], 0
        for file in files:
            if not file.is_file():
                why = "it is no file; name the files in it" if file.is_dir() else "it is no file"
                raise DatastoreError(
                    f"nothing to draft from at {file}: {why if file.exists() else 'no such file'}"
                )
            size += file.stat().st_size
            if size > MAX_TEXT_BYTES:
                raise DatastoreError(
                    f"the files to draft from have more than {MAX_TEXT_BYTES >> 20} MiB together, {file} "
                    "included; give fewer or smaller ones"
                )
            try:
                texts.append(file.read_text(encoding="utf-8"))
            except UnicodeDecodeError:
                raise DatastoreError(f"cannot draft from {file}: it is no UTF-8 text") from None
        return cls(tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)

    def find(self, context: Tokens, limit: int) -> Match | None:
        """Return what follows most often where the documents agree longest with the context's end."""
        if len(context) < 2 or limit < 1:
            return None
        pair = _pairs(context[-2:-1], context[-1:])[0]
        low, high = np.searchsorted(self._pairs, pair, "left"), np.searchsorted(self._pairs, pair, "right")
        if low == high:
            return None
        length, ends = longest_match(self.tokens, self._ends[low:high], context, length=2)
        tokens = vote(self.tokens, ends, limit)
        return Match("documents", length, tokens) if tokens.size else None


class History:
    """What earlier conversations of this process said; the oldest is forgotten first."""

    def __init__(self, max_tokens: int = MAX_HISTORY_TOKENS) -> None:
        self._max_tokens = max_tokens
        self.tokens: Tokens = np.zeros(0, dtype=np.int32)

    def add(self, tokens: Tokens) -> None:
        """Remember a conversation."""
        joined = np.concatenate([self.tokens, tokens.astype(np.int32), np.array([SEPARATOR], np.int32)])
        self.tokens = joined[max(0, len(joined) - self._max_tokens) :]

    def find(self, context: Tokens, limit: int) -> Match | None:
        """Return what follows most often where the history agrees longest with the context's end."""
        ends = np.flatnonzero(self.tokens == context[-1])
        if not ends.size or limit < 1:
            return None
        length, ends = longest_match(self.tokens, ends, context)
        tokens = vote(self.tokens, ends, limit)
        return Match("history", length, tokens) if tokens.size else None


def _pairs(before: Tokens, last: Tokens) -> "np.ndarray[Any, np.dtype[np.int64]]":
    """Return one number for each pair of token ids."""
    return (before.astype(np.int64) << 32) | last.astype(np.int64)
