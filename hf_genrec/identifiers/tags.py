"""Tags of items by level, from columns of the item table: the supervision of interpretable codes (HiD-VAE, 2508.04618).

Shape suffixes: N items, T tag levels, E feature dimensions, Q items that lack a tag, K items that have it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ItemTableError

if TYPE_CHECKING:
    from ..data.items import ItemTable

UNKNOWN = -100  # the label that `losses_codebook.tag_supervision` leaves out
ORDERS = ("given", "frequent")
SEPARATORS = "|>;,"
_CHUNK = 1024


@dataclass(frozen=True)
class TagTable:
    """Tag number of every item at every level, and the names behind the numbers.

    Attributes:
        names: T tuples of tag names.
        tags_NT: int64, `UNKNOWN` where an item has no tag at that level.

    Example:
        >>> table = TagTable.from_values([["toys", "dolls"], ["toys", "cars"], [], ["games"], ["games", "cars"]])
        >>> table.names, table.tags_NT.tolist()
        ((('games', 'toys'), ('cars',)), [[1, -100], [1, 0], [-100, -100], [0, -100], [0, 0]])
    """

    names: tuple[tuple[str, ...], ...]
    tags_NT: np.ndarray

    @classmethod
    def from_values(
        cls,
        values: Sequence[Sequence[str | None]],
        *,
        levels: int | None = None,
        order: str = "given",
        min_items: int = 2,
    ) -> TagTable:
        """From the tags of each item, coarse to fine.

        Args:
            values: for each item its tags; level l is its l-th tag. None or "" = not known at this level.
            levels: of the table at most; None = as many as any item has.
            order: `"frequent"` sorts an item's tags by how many items carry them, for tags that are a set (genres): the
                common ones come first, as the broad ones.
            min_items: tags of fewer items at their level count as unknown; so do tags that all known items share.

        Raises:
            ItemTableError: an unknown order, or no level with two tags left.
        """
        if order not in ORDERS:
            raise ItemTableError(f"tag order must be one of {ORDERS}, got {order!r}")
        rows = [[(tag or "").strip() for tag in row] for row in values]
        if order == "frequent":
            count = Counter(tag for row in rows for tag in set(row) if tag)
            rows = [sorted(dict.fromkeys(filter(None, row)), key=lambda tag: (-count[tag], tag)) for row in rows]
        deepest = max(map(len, rows), default=0)
        names: list[tuple[str, ...]] = []
        columns: list[np.ndarray] = []
        for level in range(deepest):
            column = [row[level] if level < len(row) else "" for row in rows]
            counts = Counter(filter(None, column))
            kept = sorted(tag for tag, items in counts.items() if min_items <= items < counts.total())
            if not kept:
                continue  # one tag for all, or none: it tells nothing
            number = {tag: index for index, tag in enumerate(kept)}
            names.append(tuple(kept))
            columns.append(np.array([number.get(tag, UNKNOWN) for tag in column], dtype=np.int64))
            if len(names) == levels:
                break
        if not names:
            raise ItemTableError(
                f"the tags of {len(rows)} items have no level on which two items share a tag and two differ: name other "
                "columns, or lower min_items"
            )
        return cls(tuple(names), np.stack(columns, 1))

    @classmethod
    def from_items(
        cls, items: ItemTable, columns: Sequence[str], *, separators: str = SEPARATORS, **options: Any
    ) -> TagTable:
        """From the item table: one column that holds several tags (a list, or text parted by any of `separators`), or
        one column per level, coarse to fine (of several entries the first counts). `options` as in `from_values`.

        Raises:
            ItemTableError: a column that the table lacks, or as `from_values`.
        """
        for name in columns:
            if name not in items.columns:
                raise ItemTableError(
                    f"item table: no tag column {name!r}; found {', '.join(map(repr, items.columns))}. Name one of these."
                )
        between = re.compile("[" + re.escape(separators) + "]")
        split = [[_parts(value, between) for value in items.table[name].to_pylist()] for name in columns]
        if len(split) == 1:
            return cls.from_values(split[0], **options)
        return cls.from_values([[part[0] if part else None for part in row] for row in zip(*split)], **options)

    @property
    def num_levels(self) -> int:
        """T, tag levels."""
        return len(self.names)

    @property
    def coverage(self) -> list[float]:
        """Share of the items whose tag is known, per level."""
        return [float(share) for share in (self.tags_NT != UNKNOWN).mean(0)]

    @property
    def chance(self) -> list[float]:
        """Accuracy of always saying a level's most common tag."""
        known = [column[column != UNKNOWN] for column in self.tags_NT.T]
        return [float(np.bincount(column).max() / len(column)) for column in known]

    def filled(self, features_NE: np.ndarray) -> TagTable:
        """Every missing tag taken from the nearest item (cosine) that has one: HiD-VAE retrieves likewise, and then asks a
        language model; ours stops at the nearest (our choice)."""
        x_NE = np.asarray(features_NE, dtype=np.float32)
        x_NE = x_NE / np.maximum(np.linalg.norm(x_NE, axis=1, keepdims=True), 1e-12)
        tags_NT = self.tags_NT.copy()
        for level in range(self.num_levels):
            known_N = self.tags_NT[:, level] != UNKNOWN
            has_K, lacks_Q = np.flatnonzero(known_N), np.flatnonzero(~known_N)
            for start in range(0, len(lacks_Q), _CHUNK):
                rows = lacks_Q[start : start + _CHUNK]
                nearest = (x_NE[rows] @ x_NE[has_K].T).argmax(1)
                tags_NT[rows, level] = self.tags_NT[has_K[nearest], level]
        return TagTable(self.names, tags_NT)

    def centroids(self, features_NE: np.ndarray) -> list[np.ndarray]:
        """Mean features (number of tags, E) of the items of each tag, per level."""
        means = []
        for level, names in enumerate(self.names):
            rows = [self.tags_NT[:, level] == tag for tag in range(len(names))]
            means.append(np.stack([np.asarray(features_NE)[row].mean(0) for row in rows]).astype(np.float32))
        return means


def _parts(value: Any, between: re.Pattern[str]) -> list[str]:
    if value is None:
        return []
    if isinstance(value, (list, tuple)):
        return [str(part) for part in value if part is not None]
    return [part for part in map(str.strip, between.split(str(value))) if part]
