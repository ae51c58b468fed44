"""What happened to an interaction log on its way to sequences: every row dropped has a reason and a count."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class DataReport:
    """Counts of one `load_data` call. Figures of ties and repeats describe the data after filtering.

    Args:
        name: data set name.
        source: file, folder or kind of object that was read.
        rows_read: interactions in the source.
        dropped: reason -> interactions dropped for it.
        users, items, interactions: what is left.
        users_dropped, items_dropped: ids that lost all their interactions to the filters.
        min_user, min_item: bounds of the k-core filter, 0 for none.
        time_unit: "s", "ms", "us", "ns", "datetime", or None without timestamps.
        first_time, last_time: unix seconds.
        ties_rows: interactions whose timestamp ties another one of the same user; ties_beyond_first: of these,
            all but the first of each group; ties_users: users with ties;
            ties_largest: most interactions of one user at one time; ties_last_two: users whose last two tie, so that
            the held-out item depends on the tie policy.
        tie_policy: "input order", or "shuffled (seed s)".
        exact_duplicates: rows equal to another in user, item and timestamp.
        repeated_interactions: interactions with an item that the user already had.
        items_without_interactions: catalogue items nobody consumed (kept when min_item is 0).
        items_without_text, items_not_in_table, texts_capped: of the item table.
        notes: remarks for the reader.
    """

    name: str
    source: str
    rows_read: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    users: int = 0
    items: int = 0
    interactions: int = 0
    users_dropped: int = 0
    items_dropped: int = 0
    min_user: int = 0
    min_item: int = 0
    time_unit: str | None = None
    first_time: int | None = None
    last_time: int | None = None
    ties_rows: int | None = None
    ties_beyond_first: int | None = None
    ties_users: int | None = None
    ties_largest: int | None = None
    ties_last_two: int | None = None
    tie_policy: str = "input order"
    exact_duplicates: int = 0
    repeated_interactions: int = 0
    items_without_interactions: int = 0
    items_without_text: int | None = None
    items_not_in_table: int | None = None
    texts_capped: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def density(self) -> float:
        """Interactions per cell of the user-item matrix, 0 to 1."""
        return self.interactions / (self.users * self.items) if self.users and self.items else 0.0

    def to_dict(self) -> dict[str, Any]:
        """All fields and the density, ready for JSON."""
        return asdict(self) | {"density": self.density}

    def __str__(self) -> str:
        lines = [
            f"{self.name}: {self.users:,} users, {self.items:,} items, {self.interactions:,} interactions "
            f"({self.density:.3%} of all pairs), read from {self.source}",
            f"  rows read {self.rows_read:,}; bounds: at least {self.min_user} per user, {self.min_item} per item",
        ]
        lines += [f"  dropped {count:,}: {reason}" for reason, count in self.dropped.items()]
        if self.users_dropped or self.items_dropped:
            lines.append(f"  ids gone: {self.users_dropped:,} users, {self.items_dropped:,} items")
        if self.ties_rows is None:
            lines.append("  no timestamps: input order is the time order")
        else:
            lines.append(
                f"  ties: {self.ties_rows:,} interactions of {self.ties_users:,} users share a timestamp (up to "
                f"{self.ties_largest} at once); {self.ties_last_two:,} users tie on their last two; "
                f"policy: {self.tie_policy}"
            )
        if self.exact_duplicates:
            lines.append(f"  exact duplicates (user, item, timestamp): {self.exact_duplicates:,}")
        lines.append(f"  repeat consumption: {self.repeated_interactions:,} interactions")
        if self.items_without_interactions:
            lines.append(f"  items without interactions, kept: {self.items_without_interactions:,}")
        if self.items_without_text:
            lines.append(f"  items without text: {self.items_without_text:,}")
        if self.items_not_in_table:
            lines.append(f"  items missing from the item table: {self.items_not_in_table:,}")
        if self.texts_capped:
            lines.append(f"  texts capped: {self.texts_capped:,}")
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])
