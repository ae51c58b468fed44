"""What a `source` is: a data set by name, a folder, a file or a table; read, with what is known about its columns."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hf_genrec.data.columns import no_column, refuse_nulls
from hf_genrec.data.items import ItemTable
from hf_genrec.data.layouts import film_items, find_layout, is_film_list
from hf_genrec.data.readers import format_of, read_table
from hf_genrec.errors import InteractionTableError

_MOVIELENS = {"user_id": "userId", "item_id": "movieId"}
_SYNONYMS = {
    "user_column": ("user", "uid", "reviewer_id", "customer_id", "visitor_id", "session_id"),
    "item_column": ("item", "iid", "movie_id", "product_id", "asin", "parent_asin", "track_id"),
    "timestamp_column": ("time", "date", "datetime", "ts", "unix_review_time", "created_at", "event_time"),
    "rating_column": ("stars", "score", "overall"),
}


@dataclass(frozen=True)
class LogSource:
    """An interaction log as read, before any check or filter.

    Args:
        interactions: the rows.
        where: what to call it in messages.
        items: item table that came with it.
        user_column, item_column, timestamp_column: names in `interactions`; no time column: rows are in time order.
        order_column: integers that order the rows but are no times (then there is no `timestamp_column`).
        name: of the data; min_user, min_item: filters of its usual protocol; notes: for the report.
    """

    interactions: pa.Table
    where: str
    items: ItemTable | None = None
    user_column: str = "user_id"
    item_column: str = "item_id"
    timestamp_column: str | None = "timestamp"
    order_column: str | None = None
    name: str = "data"
    min_user: int = 5
    min_item: int = 5
    notes: tuple[str, ...] = ()

    def checked(self) -> LogSource:
        """With columns that exist. A missing time column is tolerated only when nothing looks like one."""
        found = self.interactions.column_names
        names = {"user_column": self.user_column, "item_column": self.item_column}
        for argument, name in names.items():
            if name not in found:
                raise InteractionTableError(no_column(self.where, name, found, _SYNONYMS[argument], argument))
        time = self.timestamp_column
        if time is None or time in found:
            return self
        message = no_column(self.where, time, found, _SYNONYMS["timestamp_column"], "timestamp_column")
        if time != "timestamp" or "Did you mean" in message:
            raise InteractionTableError(
                message + " Or pass timestamp_column=None if the rows are in time order already."
            )
        note = "no timestamp column: the rows were taken to be in time order"
        warnings.warn(f"{self.where}: {note}", stacklevel=4)
        return replace(self, timestamp_column=None, notes=(*self.notes, note))

    def rated(self, rating_column: str, min_rating: float | None) -> np.ndarray | None:
        """(n,) bool rows rated at least `min_rating`, or None when there is no such bound."""
        if min_rating is None:
            return None
        found = self.interactions.column_names
        if rating_column not in found:
            message = no_column(self.where, rating_column, found, _SYNONYMS["rating_column"], "rating_column")
            raise InteractionTableError(message + " Or leave min_rating out.")
        try:
            ratings = self.interactions[rating_column].cast(pa.float64())
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as problem:
            raise InteractionTableError(
                f"{self.where}: column {rating_column!r} is not numeric ({problem}). Leave min_rating out, or "
                "bring numbers."
            ) from problem
        refuse_nulls(ratings, rating_column, self.where, InteractionTableError)
        keep = pc.greater_equal(ratings, float(min_rating)).to_numpy()
        if not keep.any():
            raise InteractionTableError(f"{self.where}: no row is rated {min_rating:g} or better. Lower min_rating.")
        return keep


def open_log(
    source: Any,
    *,
    user_column: str,
    item_column: str,
    timestamp_column: str | None,
    rating_column: str | None,
    encoding: str | None,
    max_text_length: int,
    all_columns: bool = False,
) -> LogSource:
    """Read a folder, file or table. Column names kept at their defaults also match MovieLens' userId and movieId.

    Args:
        rating_column: to read, None when no rating is needed.
        all_columns: keep the other columns too.

    Raises:
        InteractionTableError: see `read_table` and `find_layout`.
    """
    items, path = None, None
    name = "data"
    if isinstance(source, (str, Path)):
        path = Path(source).expanduser()
        name = path.resolve().name if path.is_dir() else path.name.split(".")[0]
        if path.is_dir():
            layout = find_layout(path)
            path = layout.interactions
            if layout.items is not None:
                items = open_items(layout.items, item_column, encoding, max_text_length)
        text = _id_names(path, user_column, item_column) + ([timestamp_column] if timestamp_column else [])
        number = [rating_column] if rating_column else []
        table, where = read_table(
            path, text_columns=text, number_columns=number, only=not all_columns, encoding=encoding
        )
    else:
        table, where = read_table(source)
    columns = [user_column, item_column]
    for place, column in enumerate(columns):
        if column in _MOVIELENS and column not in table.column_names and _MOVIELENS[column] in table.column_names:
            columns[place] = _MOVIELENS[column]
    if path is not None and format_of(path) == ".txt" and table.column_names == ["user_id", "item_id"]:
        timestamp_column = None  # lines of sequences: their order is the time
    return LogSource(table, where, items, columns[0], columns[1], timestamp_column, name=name)


def _id_names(path: Path, user_column: str, item_column: str) -> list[str]:
    """The id columns to look for in a file; those of MovieLens' ratings.csv go by their own names."""
    if path.name.startswith("ratings.csv"):
        return [_MOVIELENS.get(user_column, user_column), _MOVIELENS.get(item_column, item_column)]
    return [user_column, item_column]


def open_items(source: Any, item_column: str, encoding: str | None, max_text_length: int) -> ItemTable:
    """Read an item table; film lists of MovieLens get readable titles."""
    if isinstance(source, ItemTable):
        return source
    if isinstance(source, (str, Path)) and is_film_list(Path(source)):
        return film_items(Path(source).expanduser(), encoding=encoding, max_text_length=max_text_length)
    return ItemTable.from_source(source, item_column=item_column, encoding=encoding, max_text_length=max_text_length)
