"""Array kernels of the interaction log: stable ordering, k-core filtering, natural order of ids.

Shapes: n interactions, U users, N items.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hf_genrec.data.sequences import offsets_from_lengths, ragged_positions

FULL_SCANS = 12  # rounds of the k-core filter that scan everything before it follows only what changed


def stable_order(keys: np.ndarray) -> np.ndarray:
    """The permutation of `np.argsort(keys, kind="stable")`, faster: the row number rides in the low bits of the key.

    Args:
        keys: (n,) integers.
    """
    n = len(keys)
    if n < 2:
        return np.arange(n)
    low, high = int(keys.min()), int(keys.max())
    row_bits = (n - 1).bit_length()
    if (high - low).bit_length() + row_bits > 63:
        return np.argsort(keys, kind="stable")
    packed = (keys.astype(np.int64) - low) << row_bits
    packed |= np.arange(n, dtype=np.int64)
    packed.sort()
    packed &= (1 << row_bits) - 1
    return packed


def sort_by_user_and_time(users: np.ndarray, times: np.ndarray | None) -> np.ndarray:
    """Order of the rows by (user, time, input order), as two stable passes.

    Args:
        users: (n,) user codes.
        times: (n,) integers, or None for the input order within a user.
    """
    if times is None:
        return stable_order(users)
    by_time = stable_order(times)
    return by_time[stable_order(users[by_time])]


def core_filter(
    users: np.ndarray, items: np.ndarray, num_users: int, num_items: int, *, min_user: int, min_item: int
) -> np.ndarray:
    """The k-core: rows whose user keeps >= `min_user` rows and whose item keeps >= `min_item`, at the fixed point.

    Args:
        users: (n,) codes below `num_users`; items: (n,) codes below `num_items`.
        min_user: least interactions of a user; min_item: of an item. 0 and 1 keep everything.

    Returns:
        (n,) bool, the unique largest set of rows that satisfies both bounds.

    Example:
        >>> core_filter(np.array([0, 0, 1]), np.array([0, 1, 1]), 2, 2, min_user=2, min_item=1).tolist()
        [True, True, False]
    """
    alive = np.ones(len(users), bool)
    if min_user <= 1 and min_item <= 1:
        return alive
    rows = np.arange(len(users))
    for _ in range(FULL_SCANS):
        keep = (np.bincount(users[rows], minlength=num_users) >= min_user)[users[rows]]
        keep &= (np.bincount(items[rows], minlength=num_items) >= min_item)[items[rows]]
        if keep.all():
            alive[:] = False
            alive[rows] = True
            return alive
        rows = rows[keep]
    alive[:] = False
    alive[rows] = True
    _follow_changes(alive, rows, users, items, num_users, num_items, min_user, min_item)
    return alive


def _follow_changes(alive, rows, users, items, num_users, num_items, min_user, min_item) -> None:
    """Finish a k-core that collapses slowly (long chains): each round touches only the rows of what fell below."""
    sides = []
    for codes, count, bound in ((users, num_users, min_user), (items, num_items, min_item)):
        counts = np.bincount(codes[rows], minlength=count)
        sides.append(
            (codes, counts, bound, rows[stable_order(codes[rows])], offsets_from_lengths(counts), counts.copy())
        )
    falling = [np.flatnonzero((counts > 0) & (counts < bound)) for _, counts, bound, *_ in sides]
    while len(falling[0]) or len(falling[1]):
        touched = []
        for dead, (_, _, _, order, offsets, sizes) in zip(falling, sides):
            touched.append(order[ragged_positions(offsets[:-1][dead], sizes[dead])])
        gone = np.unique(np.concatenate(touched))
        gone = gone[alive[gone]]
        alive[gone] = False
        falling = []
        for codes, counts, bound, *_ in sides:
            changed, by = np.unique(codes[gone], return_counts=True)
            counts[changed] -= by
            falling.append(changed[(counts[changed] > 0) & (counts[changed] < bound)])


def natural_order(ids: pa.Array) -> np.ndarray:
    """Order of distinct ids whatever the order of the file: by number if all are integers, else by text."""
    text = ids.cast(pa.string())
    if len(text) and pc.all(pc.match_substring_regex(text, r"^(0|[1-9][0-9]{0,17})$")).as_py():
        return np.argsort(text.cast(pa.int64()).to_numpy(zero_copy_only=False), kind="stable")
    return pc.array_sort_indices(text).to_numpy(zero_copy_only=False).astype(np.int64)
