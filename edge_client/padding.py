"""Between transformers' padded batches and the cloud's ragged rows, which know no padding."""

from collections.abc import Sequence

import torch
from torch import Tensor


def check_ids(ids: Tensor, vocabulary: int) -> None:
    """Refuse what is no batch of token ids, before anything is sent.

    Raises
    ------
    ValueError
        If they are not ``(batch, columns)`` whole numbers below ``vocabulary``, at least one.
    """
    if ids.dim() != 2 or ids.is_floating_point() or ids.is_complex():
        raise ValueError(
            f"input_ids must be whole numbers, (batch, columns), got {ids.dtype} of shape {tuple(ids.shape)}"
        )
    if not ids.numel():
        raise ValueError(f"input_ids are empty, of shape {tuple(ids.shape)}: give at least one token a row")
    least, most = (int(end) for end in ids.aminmax())
    if least < 0 or most >= vocabulary:
        raise ValueError(
            f"input_ids must be from 0 to {vocabulary - 1}, the model's vocabulary, and one or more are not; "
            "was another model's tokenizer used?"
        )


def new_columns(mask: Tensor | None, batch: int, width: int, past: int) -> list[bytes]:
    """Return for each row which of its new columns hold a token."""
    if mask is None:
        return [b"\1" * width] * batch
    if mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] not in (past + width, width):
        raise ValueError(
            f"attention_mask must be (batch, past + new) = ({batch}, {past + width}), got {tuple(mask.shape)}"
        )
    return [bytes(row) for row in (mask[:, -width:] != 0).tolist()]


def pick(ids: list[int], columns: bytes) -> list[int]:
    """Return the ids at columns that hold a token."""
    return [token for token, column in zip(ids, columns, strict=True) if column]


def check_positions(positions: Tensor | None, columns: Sequence[bytes], width: int) -> None:
    """Refuse position ids that the cloud, which counts a row's tokens, would not reproduce."""
    if positions is None or width == 1:
        return
    if positions.shape[-1] != width:
        raise ValueError(
            f"position_ids must have {width} columns, as input_ids have, got {tuple(positions.shape)}; "
            "generate makes them from attention_mask: is that as wide as input_ids?"
        )
    rows = positions.expand(len(columns), -1).tolist()
    for row, cols in zip(rows, columns, strict=True):
        used = pick(row, cols)
        if used and used != list(range(used[0], used[0] + len(used))):
            raise ValueError("position_ids must rise by one from token to token; gaps are not supported")


def assemble(rows: Sequence[Tensor | None], columns: Sequence[bytes], first: int, like: Tensor) -> Tensor:
    """Lay hL of the rows out as a padded batch; padding is zeros.

    Parameters
    ----------
    rows
        For each row, hL of its tokens from column ``first`` on: ``(tokens, hidden_size)``, or None.
    columns
        For each row, which of its columns hold a token.
    like
        ``(any, hidden_size)``; its dtype and device are the result's.

    Returns
    -------
    Tensor
        ``(batch, columns - first, hidden_size)``
    """
    width = len(columns[0]) - first
    if len(rows) == 1 and rows[0] is not None and rows[0].shape[0] == width:
        return rows[0].to(device=like.device, dtype=like.dtype)[None]
    padded = torch.zeros(len(rows), width, like.shape[1])
    for index, row in enumerate(rows):
        if row is not None:
            where = [i for i, column in enumerate(columns[index][first:]) if column]
            padded[index, where] = row.float()
    return padded.to(device=like.device, dtype=like.dtype)
