"""Ragged item histories to padded token arrays, without a Python loop over items.

Shape legend: B rows, n items of all rows together, L tokens per item, W width of the padded batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import IncompatibleComponentsError


def newest_items(lengths_B: np.ndarray, index_n: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Keep the last `limit` items of each row: (lengths (B,), items of all rows).

    >>> newest_items(np.array([3, 1]), np.array([5, 6, 7, 8]), 2)
    (array([2, 1]), array([6, 7, 8]))
    """
    if not len(lengths_B) or lengths_B.max() <= limit:
        return lengths_B, index_n
    # position counted from the end of its row: 1 is the newest item
    age_n = np.repeat(np.cumsum(lengths_B), lengths_B) - np.arange(len(index_n))
    return np.minimum(lengths_B, limit), index_n[age_n <= limit]


def newest_tokens(
    lengths_B: np.ndarray, index_n: np.ndarray, sizes_n: np.ndarray, around_B: np.ndarray, limit: int
) -> tuple[np.ndarray, np.ndarray]:
    """Keep as many of the newest items of each row as fit into `limit` tokens: (lengths (B,), items of all rows).

    Args:
        lengths_B: items of each row; they sum to n.
        index_n: items of all rows, row after row.
        sizes_n: tokens of each of them.
        around_B: tokens of each row that are no items (template, user token, end token).
        limit: most tokens of a row.

    Raises:
        IncompatibleComponentsError: a row for which not even its newest item fits (row named).

    >>> newest_tokens(np.array([3, 1]), np.array([5, 6, 7, 8]), np.full(4, 2), np.array([1, 1]), 5)
    (array([2, 1]), array([6, 7, 8]))
    """
    row_n = np.repeat(np.arange(len(lengths_B)), lengths_B)
    total_n = np.append(0, np.cumsum(sizes_n))
    end_B = total_n[np.cumsum(lengths_B)]  # tokens of all rows up to the end of each
    # tokens from an item to the end of its row, with what stands around the history
    keep_n = end_B[row_n] - total_n[:-1] + around_B[row_n] <= limit
    kept_B = np.bincount(row_n[keep_n], minlength=len(lengths_B))
    lost = np.flatnonzero((kept_B < np.minimum(lengths_B, 1)) | (around_B > limit))
    if len(lost):
        row = int(lost[0])
        newest = int(sizes_n[np.cumsum(lengths_B)[row] - 1]) if lengths_B[row] else 0
        raise IncompatibleComponentsError(
            f"row {row}: the template takes {int(around_B[row])} tokens and the newest item {newest}, more than "
            f"max_history_tokens={limit}: raise it, or shorten history_before and history_after"
        )
    return kept_B, index_n[keep_n]


def padded_tokens(
    lengths_B: np.ndarray,
    tokens_nL: np.ndarray,
    *,
    pad_id: int,
    head_B: np.ndarray | None = None,
    eos_id: int | None = None,
    left: bool = True,
    before: Sequence[int] = (),
    after: Sequence[int] = (),
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of item tokens as one padded array.

    Args:
        lengths_B: items of each row; they sum to n.
        tokens_nL: token ids of all items, row after row; -1 where an item has fewer.
        pad_id: padding token id.
        head_B: a token id put before each row, -1 for none (user tokens).
        eos_id: a token id put after each row, None for none.
        left: pad on the left, else on the right.
        before, after: token ids put first and last in every row (a template).

    Returns:
        `input_ids` and `attention_mask`, int64 (B, W). W is at least L, so that empty rows still make a batch.

    >>> padded_tokens(np.array([2, 0]), np.array([[4, 6], [5, 7]]), pad_id=0, eos_id=1)[0]
    array([[4, 6, 5, 7, 1],
           [0, 0, 0, 0, 1]])
    """
    tokens_n = tokens_nL.reshape(-1)
    items_B = lengths_B * tokens_nL.shape[1]
    if len(tokens_n) and tokens_n.min() < 0:  # items of several lengths
        ends_B = np.cumsum(lengths_B)
        tokens_before = np.append(0, np.cumsum((tokens_nL >= 0).sum(axis=1)))
        items_B = tokens_before[ends_B] - tokens_before[ends_B - lengths_B]
        tokens_n = tokens_n[tokens_n >= 0]
    if head_B is None:
        head_B = np.full_like(items_B, -1)
    has_head_B = (head_B >= 0).astype(np.int64)
    total_B = len(before) + has_head_B + items_B + (eos_id is not None) + len(after)
    width = int(total_B.max(initial=0)) or tokens_nL.shape[1]

    column_W = np.arange(width)
    start_B = width - total_B if left else np.zeros_like(total_B)
    first_B = start_B + len(before) + has_head_B
    input_ids_BW = np.full((len(lengths_B), width), pad_id, dtype=np.int64)
    is_item_BW = (column_W >= first_B[:, None]) & (column_W < (first_B + items_B)[:, None])
    input_ids_BW[is_item_BW] = tokens_n  # both in row order
    rows = np.flatnonzero(has_head_B)
    if len(rows):
        input_ids_BW[rows, start_B[rows] + len(before)] = head_B[rows]
    if eos_id is not None:
        input_ids_BW[np.arange(len(lengths_B)), first_B + items_B] = eos_id
    every_B1 = np.arange(len(lengths_B))[:, None]
    if len(before):
        input_ids_BW[every_B1, start_B[:, None] + np.arange(len(before))] = before
    if len(after):
        input_ids_BW[every_B1, (start_B + total_B)[:, None] - len(after) + np.arange(len(after))] = after
    attention_BW = (column_W >= start_B[:, None]) & (column_W < (start_B + total_B)[:, None])
    return input_ids_BW, attention_BW.astype(np.int64)
