"""Rows as examples to tune on: token ids, and labels where there is something to learn.

Everything here is decided by its arguments alone: the same rows, model and seed give the same examples,
the same split and the same batches on every machine, so an interrupted run can go on where it stopped.
Knows nothing about clouds, losses or steps.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from edge_client.tokenizer import EdgeTokenizer
from edge_client.tuning.encode import Encoded, Encoder
from edge_client.tuning.rows import BadRow, BadRowsError, DataError, Row, RowError, Text

IGNORED = -100  # the label of a position without loss, as everywhere in PyTorch
POOL_BATCHES = 16  # examples of about one length are looked for among those of so many batches

LossOn = Literal["completions", "all"]


@dataclass(frozen=True, eq=False)
class Example:
    """One sequence to learn from.

    Attributes
    ----------
    ids
        ``(tokens,)`` int64.
    labels
        ``(tokens,)`` int64: the id itself where it is to be learned, else -100. As in transformers, the
        logits of position ``t`` are judged by ``labels[t + 1]``; ``labels[0]`` is always -100.
    line
        Line of the data file that it comes from; several examples may share one.
    """

    ids: Tensor = field(repr=False)
    labels: Tensor = field(repr=False)
    line: int

    @property
    def targets(self) -> int:
        """Tokens that are learned (count)."""
        return int((self.labels != IGNORED).sum())


def make_examples(
    rows: Sequence[Row],
    tokenizer: EdgeTokenizer,
    *,
    max_tokens: int,
    loss_on: LossOn = "completions",
    truncate: bool = False,
    source: str = "the data",
    advance: Callable[[], object] = lambda: None,
) -> list[Example]:
    """Return the examples of all rows, in the rows' order.

    Parameters
    ----------
    rows
        From `read_rows`.
    tokenizer
        The model's.
    max_tokens
        Longest example (tokens). Plain text that is longer is cut into consecutive windows.
    loss_on
        ``completions``: learn each answer of a chat with the token that ends it, a completion with the end
        token, and all of a plain text. ``all``: learn prompts too.
    truncate
        Cut what is too long at the left of its prompt, instead of refusing it.
    source
        The file's name, for errors.
    advance
        Called after each row, for a progress bar.

    Raises
    ------
    BadRowsError
        If any row cannot be used: too long, nothing to learn, refused by the template. It lists all.
    DataError
        If none of a kind can: the model has no chat template, or no end token.
    """
    if max_tokens < 2:
        raise ValueError(f"max_tokens is {max_tokens}; an example has 2 tokens or more")
    encoder = Encoder(tokenizer)
    bos = encoder.bos
    examples: list[Example] = []
    bad: list[BadRow] = []
    for row in rows:
        reason = ""
        try:
            sequences = encoder.encode(row.body, None if truncate else max_tokens)
            if isinstance(row.body, Text):
                sequences = _windows(sequences[0].ids, max_tokens, bos)
            elif loss_on == "all":
                sequences = sequences[-1:]  # the last one holds the whole conversation
            made = [_example(row.line, s, max_tokens, loss_on, truncate, bos) for s in sequences]
        except RowError as error:
            reason = str(error)
        if reason:
            bad.append(BadRow(row.line, reason))
        else:
            examples += made
        advance()
    if bad:
        raise BadRowsError(source, bad, len(rows))
    return examples


def _windows(ids: list[int], max_tokens: int, bos: int | None) -> list[Encoded]:
    """Cut a text into windows; each begins as a text does (some models see badly without their first token).

    A last window without anything to predict is left out.
    """
    lead = [bos] if bos is not None and ids[0] == bos else []
    width = max_tokens - len(lead)
    body = ids[len(lead) :]
    windows = [lead + body[at : at + width] for at in range(0, len(body), width)]
    if len(windows) > 1 and len(windows[-1]) < 2:
        windows.pop()
    return [Encoded(window, [(0, len(window))]) for window in windows]


def _example(
    line: int, encoded: Encoded, max_tokens: int, loss_on: LossOn, truncate: bool, bos: int | None
) -> Example:
    ids, spans = encoded.ids, encoded.spans
    if loss_on == "completions":
        ids = ids[: spans[-1][1]]  # what comes after the last answer would cost time and teach nothing
    count = len(ids)
    if count > max_tokens:
        too_long = f"has {count:,} tokens, at most {max_tokens:,}"
        if not truncate:
            raise RowError(too_long)
        lead = [bos] if bos is not None and ids[0] == bos else []
        cut = count - (max_tokens - len(lead))
        answer = spans[-1][0]
        if answer <= cut:
            alone = f"its answer alone has {count - answer:,}, which leaves no room for a prompt"
            raise RowError(f"{too_long}; {alone}")
        ids = lead + ids[cut:]
        moved = cut - len(lead)
        spans = [(max(start, cut) - moved, end - moved) for start, end in spans if end > cut]
    known = torch.tensor(ids, dtype=torch.int64)
    labels = torch.full_like(known, IGNORED)
    for start, end in [(0, len(ids))] if loss_on == "all" else spans:
        labels[start:end] = known[start:end]
    labels[0] = IGNORED  # nothing comes before it
    if not (labels != IGNORED).any():
        raise RowError(f"has nothing to learn among its {len(ids):,} tokens")
    return Example(known, labels, line)


def split(examples: Sequence[Example], fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Return examples to tune on and examples to validate with, each in the given order.

    All examples of a row come to the same side: windows of one text know each other.

    Parameters
    ----------
    examples
        All of them.
    fraction
        Part of the rows to validate with (0 to 1), at least one; 0 is none.
    seed
        Chooses the rows.

    Raises
    ------
    DataError
        If there are too few rows to have some on each side.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"the fraction to validate with is {fraction}; it must be 0 or more and below 1")
    if fraction == 0:
        return list(examples), []
    lines = sorted({example.line for example in examples}, key=lambda line: _draw(seed, "split", line))
    if len(lines) < 2:
        raise DataError(
            "validation needs two rows or more, the data has one: turn validation off, or give more rows "
            "(in plain text, blank lines part them)"
        )
    held = set(lines[: min(max(1, round(fraction * len(lines))), len(lines) - 1)])
    return (
        [example for example in examples if example.line not in held],
        [example for example in examples if example.line in held],
    )


def batches(examples: Sequence[Example], batch_size: int, seed: int, epoch: int) -> list[list[Example]]:
    """Return one epoch's batches: every example once, shuffled anew each epoch.

    Examples of a batch have about the same length, so that steps take about the same time.

    Parameters
    ----------
    examples
        At least one.
    batch_size
        Examples in a batch (count); the last ones may be fewer.
    seed, epoch
        Choose the order.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be 1 or more")
    order = sorted(range(len(examples)), key=lambda at: _draw(seed, "example", epoch, at))
    made: list[list[int]] = []
    for start in range(0, len(order), batch_size * POOL_BATCHES):
        pool = sorted(order[start : start + batch_size * POOL_BATCHES], key=lambda at: len(examples[at].ids))
        cut = [pool[at : at + batch_size] for at in range(0, len(pool), batch_size)]
        made += sorted(cut, key=lambda batch: _draw(seed, "batch", epoch, batch[0]))
    return [[examples[at] for at in batch] for batch in made]


def digest(examples: Sequence[Example]) -> str:
    """Return SHA-256 (hex) over all ids and labels: whether a resumed run has the same data before it."""
    total = hashlib.sha256()
    for example in examples:
        total.update(len(example.ids).to_bytes(8, "little"))
        for tensor in (example.ids, example.labels):
            total.update(tensor.numpy().astype("<i8").tobytes())
    return total.hexdigest()


def _draw(*keys: int | str) -> bytes:
    """Return what to sort by for a random order. A hash, since generators change between releases."""
    return hashlib.sha256(repr(keys).encode()).digest()
