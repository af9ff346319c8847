"""The `Cache` that transformers sees: rows of token ids whose keys and values live in the cloud.

It holds what the rows *should* contain, and a session that contains most of it. Cropping, beam
reordering and forking only edit the rows here; the next `extend` asks the cloud for the difference.
A cache can therefore let its session go and continue later, on any session, from its tokens.
"""

import copy
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache

from edge_client.pool import Embed, HeldSession, SessionPool, Wanted, common_prefix

# A prefix shared by several new rows is run once, in a step of its own, when that saves this many
# positions: a step costs a round trip per exchange, however short it is.
MIN_SHARED_TOKENS = 128


class ContextLengthError(ValueError):
    """A row would hold more positions than the cloud offers."""

    def __init__(self, asked: int, limit: int) -> None:
        self.asked, self.limit = asked, limit
        super().__init__(
            f"the context is full: {asked} tokens asked for, this cloud holds at most {limit} in one "
            "conversation; shorten the prompt or drop its oldest part"
        )


def expect_cloud_cache(given: object) -> "CloudCache":
    """Return a caller's cache, or raise TypeError if it is another kind."""
    if not isinstance(given, CloudCache):
        raise TypeError(f"past_key_values must be a CloudCache (or None), got {type(given).__name__}")
    return given


@dataclass(frozen=True)
class Row:
    """One row as transformers sees it.

    ``tokens`` are the unpadded ids, ``columns`` says for each column of the padded batch whether it
    is a token. The first ``shared`` tokens are those of the session's row ``origin``.
    """

    tokens: list[int]
    columns: bytes
    origin: int = 0
    shared: int = 0


class CloudCache(Cache):
    """Past keys and values of a batch, in the cloud.

    Parameters
    ----------
    pool
        Where sessions come from and go back to.
    embed
        Token ids to h0.
    max_tokens, max_rows
        The cloud's limits on positions in a row and rows in a session (counts).
    """

    def __init__(self, pool: SessionPool, embed: Embed, max_tokens: int, max_rows: int) -> None:
        super().__init__(layers=[])
        self.pool = pool
        self.embed = embed
        self.max_tokens = max_tokens
        self.max_rows = max_rows
        self.rows: list[Row] = []
        self._held: HeldSession | None = None
        self._release: weakref.finalize[..., CloudCache] | None = None

    # --- what transformers asks for -------------------------------------------------------------

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the columns of the padded batch so far."""
        return len(self.rows[0].columns) if self.rows else 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Return the most positions a row may have."""
        return self.max_tokens

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return the length that a mask would have to cover; no mask is ever sent."""
        return self.get_seq_length() + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last columns: ``crop(-n)`` removes n, ``crop(n)`` with n > 0 leaves n."""
        columns = self.get_seq_length()
        length = columns + tokens_to_remove if tokens_to_remove <= 0 else min(columns, tokens_to_remove)
        if length < 0:
            raise ValueError(f"cannot remove {-tokens_to_remove} of {columns} columns")
        if length < columns:
            self.rows = [self._cropped(row, length) for row in self.rows]

    @staticmethod
    def _cropped(row: Row, length: int) -> Row:
        tokens = row.tokens[: row.columns[:length].count(1)]
        return Row(tokens, row.columns[:length], row.origin, min(row.shared, len(tokens)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows, in the given order; a row may be repeated."""
        self.rows = [self.rows[index] for index in indices.tolist()]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row i continue what was row ``beam_idx[i]``."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row ``repeats`` times."""
        self.rows = [row for row in self.rows for _ in range(repeats)]

    def reset(self) -> None:
        """Forget every row."""
        self.rows = []

    @property
    def is_croppable(self) -> bool:
        """Whether columns can be taken back: always."""
        return True

    @property
    def is_linear(self) -> list[bool]:
        """Whether each layer is recurrent: none is; without layers, `generate` would take all to be."""
        return [False]

    @property
    def is_initialized(self) -> bool:
        """Whether anything has been run."""
        return bool(self.rows)

    @property
    def batch_size(self) -> int:
        """Return the number of rows, -1 before the first step."""
        return len(self.rows) or -1

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: keys and values exist in the cloud only."""
        raise NotImplementedError("keys and values live in the cloud; this cache holds none to update")

    def __len__(self) -> int:
        return 0

    def __repr__(self) -> str:
        return f"CloudCache(rows={len(self.rows)}, columns={self.get_seq_length()})"

    def __deepcopy__(self, memo: dict[int, Any]) -> "CloudCache":
        """Return a cache of the same rows that will get a session of its own."""
        twin = CloudCache(self.pool, self.embed, self.max_tokens, self.max_rows)
        twin.rows = [replace(row, origin=0, shared=0) for row in self.rows]
        return twin

    __copy__ = copy.deepcopy

    # --- the session ------------------------------------------------------------------------------

    @property
    def is_stale(self) -> bool:
        """Whether the session's keys and values belong to an adapter that is no longer in use."""
        return self._held is not None and self._held.epoch != self.pool.epoch

    def detach(self) -> None:
        """Give the session back; the rows stay, and the next `extend` takes a session for them."""
        if self._release is not None:
            self._release()
        self._held = self._release = None
        self.rows = [replace(row, origin=0, shared=0) for row in self.rows]

    def extend(
        self, new: Sequence[list[int]], columns: Sequence[bytes], keep: Sequence[int]
    ) -> list[Tensor | None]:
        """Append tokens to every row and return hL where it is wanted.

        Parameters
        ----------
        new
            For each row, its new token ids without padding.
        columns
            For each row, 1 for a new column that holds a token, 0 for padding; equal lengths.
        keep
            For each row, how many of its last new tokens hL is wanted for.

        Returns
        -------
        list of Tensor or None
            ``(keep, hidden_size)`` fp32 for each row, None where ``keep`` is 0.

        Raises
        ------
        ContextLengthError
            If a row would become longer than the cloud holds. Nothing has been sent or changed.
        """
        past = self.rows or [Row([], b"") for _ in new]
        rows = [
            Row(row.tokens + ids, row.columns + cols, row.origin, row.shared)
            for row, ids, cols in zip(past, new, columns, strict=True)
        ]
        longest = max(len(row.tokens) for row in rows)
        if longest > self.max_tokens:
            raise ContextLengthError(longest, self.max_tokens)
        try:
            places, kept = self._run(rows, keep)
        except ConnectionError as error:
            if self.pool.recovery is None:
                raise
            places, kept = self.pool.recovery.again(error, lambda: self._held, lambda: self._run(rows, keep))
        self.rows = [
            replace(row, origin=places[i], shared=len(row.tokens)) if i in places else row
            for i, row in enumerate(rows)
        ]
        found: list[Tensor | None] = []
        for index, count in enumerate(keep):
            found.append(kept[places[index]][-count:] if count else None)
        return found

    def _run(self, rows: Sequence[Row], keep: Sequence[int]) -> tuple[dict[int, int], list[Tensor]]:
        """Make the session hold the rows; return where each of them is, and hL of what is kept of each."""
        if self._held is None or self._held.broken or self._held.resumed:
            wanted, places = self._place(rows, keep)
        else:
            wanted, places = [], {}
            for index, row in enumerate(rows):
                if row.tokens:  # a row of padding only does not exist in the cloud
                    places[index] = len(wanted)
                    start = min(row.shared, len(row.tokens) - keep[index])
                    wanted.append(Wanted(row.tokens, keep[index], row.origin, start))
        if len(wanted) > self.max_rows:
            raise ValueError(
                f"{len(wanted)} rows (batch entries times beams) in one call; this cloud holds at most "
                f"{self.max_rows} in a session. Use smaller batches or fewer beams"
            )
        return places, self._held.run(wanted, self.embed) if self._held is not None else []

    def _place(self, rows: Sequence[Row], keep: Sequence[int]) -> tuple[list[Wanted], dict[int, int]]:
        """Lay the rows out on a session, equal rows (beams of one prompt) only once.

        The session is a new one, unless the present one was picked up again and may hold most of them.
        """
        if self._held is not None and not (self._held.resumed and not self._held.broken):
            self.detach()
        keeps: dict[tuple[int, ...], int] = {}  # insertion order is the order of rows in the session
        for row, count in zip(rows, keep, strict=True):
            if row.tokens:
                ids = tuple(row.tokens)
                keeps[ids] = max(keeps.get(ids, 0), count)
        order = {ids: index for index, ids in enumerate(keeps)}
        places = {i: order[tuple(row.tokens)] for i, row in enumerate(rows) if row.tokens}
        if not keeps or len(keeps) > self.max_rows:
            return [Wanted(list(ids), count) for ids, count in keeps.items()], places
        prompts = [(list(ids), count) for ids, count in keeps.items()]
        held = self._held
        if held is None:
            held = self._held = self.pool.take([tokens for tokens, _ in prompts])
            self._release = weakref.finalize(self, self.pool.give_back, held)
            self._release.atexit = False
        shared = min(min(common_prefix(prompts[0][0], t), len(t) - count) for t, count in prompts)
        if (len(prompts) - 1) * (shared - held.match(prompts[0][0][:shared])[1]) >= MIN_SHARED_TOKENS:
            held.run([held.place(prompts[0][0][:shared], keep=1)], self.embed)
        return [held.place(tokens, count) for tokens, count in prompts], places
