"""The item table: ids, titles, and the texts an encoder reads. Shapes: N items."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hf_genrec.data.columns import id_codes, is_text, nearest_names, no_column, plain
from hf_genrec.data.readers import read_table
from hf_genrec.errors import ItemTableError

MAX_TEXT_LENGTH = 2_000  # characters
_TITLES = ("title", "movie_title", "name", "item_name", "product_title", "product_name", "book_title", "track_name")
_SYNONYMS = ("item", "id", "movie_id", "product_id", "asin", "parent_asin", "track_id")
_NO_TEXT = re.compile(r"^raw_|(^|_)ids?$|Id$|ur[li]$|link$|image|img|asin$|isbn|date$|timestamp$")
_METADATA = b"hf_genrec.items"


class ItemTable:
    """Items in catalogue order: `item_id`, `title` and any other columns.

    Text is kept as it came, HTML entities too; only its length is capped. Use `from_source` to build one.

    Args:
        table: Arrow table with `item_id` (string, distinct) and `title` (string); other columns are free.
        text_fields: columns that `texts()` joins, in this order.
        texts_capped: how many texts were shortened on reading.
        unlisted: how many items have no row in the table they were read from (see `align`).

    Example:
        >>> items = ItemTable.from_source({"item_id": ["a", "b"], "title": ["Tea", "Cup"], "kind": ["food", None]})
        >>> items.texts()
        ['Tea food', 'Cup']
    """

    def __init__(
        self,
        table: pa.Table,
        *,
        text_fields: Sequence[str] | None = None,
        texts_capped: int = 0,
        unlisted: int = 0,
    ) -> None:
        self.table = table
        self.text_fields = _default_fields(table) if text_fields is None else tuple(text_fields)
        self.texts_capped, self.unlisted = texts_capped, unlisted
        self._ids: list[str] | None = None
        for name in self.text_fields:
            self._known(name)

    @classmethod
    def from_source(
        cls,
        source: Any,
        *,
        item_column: str = "item_id",
        title_column: str | None = None,
        text_fields: Sequence[str] | None = None,
        encoding: str | None = None,
        max_text_length: int = MAX_TEXT_LENGTH,
    ) -> ItemTable:
        """Read an item table from any source that `load_data` reads.

        Args:
            item_column: column of the ids; when absent, `item_id` and MovieLens' `movieId` are tried.
            title_column: column of the titles; by default `title`, `movie_title`, `name` and the like.
            text_fields: columns of `texts()`; by default the title and all columns of text or lists of text that do not
                look like ids, links or dates.
            encoding: of text files, UTF-8 by default.
            max_text_length: characters kept of each text; longer ones are capped with a warning.

        Raises:
            ItemTableError: no id column, missing or duplicate ids, unreadable source.
        """
        if isinstance(source, cls):
            return source
        text = [
            item_column,
            "item_id",
            "movieId",
            *_TITLES,
            *(text_fields or ()),
            *([title_column] if title_column else ()),
        ]
        table, where = read_table(
            source, text_columns=list(dict.fromkeys(text)), encoding=encoding, error=ItemTableError
        )
        return cls.from_table(
            table,
            where,
            item_column=item_column,
            title_column=title_column,
            text_fields=text_fields,
            max_text_length=max_text_length,
        )

    @classmethod
    def from_table(
        cls,
        table: pa.Table,
        where: str = "item table",
        *,
        item_column: str = "item_id",
        title_column: str | None = None,
        text_fields: Sequence[str] | None = None,
        max_text_length: int = MAX_TEXT_LENGTH,
    ) -> ItemTable:
        """As `from_source`, for an Arrow table that is read already."""
        names = table.column_names
        id_column = next((name for name in (item_column, "item_id", "movieId") if name in names), None)
        if id_column is None:
            raise ItemTableError(
                no_column(where, item_column, names, _SYNONYMS, "item_column") + " (argument of ItemTable.from_source)"
            )
        if title_column is not None and title_column not in names:
            raise ItemTableError(no_column(where, title_column, names, _TITLES, "title_column"))
        title = title_column or next((name for name in _TITLES if name in names), None)
        columns = {"item_id": _distinct_ids(table[id_column], id_column, where)}
        if title is None:
            columns["title"] = pa.chunked_array([pa.array([""] * table.num_rows)])
        else:
            columns["title"] = _as_text(table[title])
        for name in names:
            if name not in (id_column, title, *columns):
                columns[name] = _simplified(table[name])
        capped = 0
        for name in columns.keys() - {"item_id"}:
            columns[name], count = _capped(columns[name], max_text_length)
            capped += count
        if capped:
            warnings.warn(
                f"{where}: {capped:,} texts are longer than {max_text_length:,} characters and were capped to that; "
                "max_text_length= sets the length",
                stacklevel=2,
            )
        if text_fields is not None:
            text_fields = ["title" if name == title else name for name in text_fields]
        return cls(pa.table(columns), text_fields=text_fields, texts_capped=capped)

    def __len__(self) -> int:
        return self.table.num_rows

    def __repr__(self) -> str:
        return f"ItemTable(items={len(self)}, columns={self.columns}, text_fields={list(self.text_fields)})"

    @property
    def item_ids(self) -> list[str]:
        """N ids in catalogue order."""
        if self._ids is None:
            self._ids = self.table["item_id"].to_pylist()
        return self._ids

    @property
    def columns(self) -> list[str]:
        """Column names, `item_id` and `title` first."""
        return self.table.column_names

    def titles(self) -> list[str]:
        """N titles, "" where unknown."""
        return self.table["title"].to_pylist()

    def texts(self, fields: Sequence[str] | None = None) -> list[str]:
        """N texts for an encoder: the values of the fields joined by a blank (lists by ", "), absent ones left out."""
        return self._texts(fields).to_pylist()

    def has_text(self, fields: Sequence[str] | None = None) -> np.ndarray:
        """(N,) bool: is there any text for the item?"""
        return pc.not_equal(self._texts(fields), "").to_numpy()

    def _texts(self, fields: Sequence[str] | None) -> pa.ChunkedArray:
        joined = pa.chunked_array([pa.array([""] * len(self), pa.string())])
        for name in self.text_fields if fields is None else fields:
            self._known(name)
            part = pc.utf8_trim_whitespace(_as_text(self.table[name]))
            glue = pc.if_else(pc.or_(pc.equal(joined, ""), pc.equal(part, "")), "", " ")
            joined = pc.binary_join_element_wise(joined, glue, part, "")
        return joined

    def _known(self, name: str) -> None:
        if name not in self.columns:
            near = nearest_names(name, self.columns)
            hint = f" Did you mean {near[0]!r}?" if near else " Use one of these."
            raise ItemTableError(f"item table: no field {name!r}; found {', '.join(map(repr, self.columns))}.{hint}")

    def require_text(self, fields: Sequence[str] | None = None) -> None:
        """Check that every item has text.

        Raises:
            ItemTableError: names how many items have none, and the first of them.
        """
        missing = np.flatnonzero(~self.has_text(fields))
        if len(missing):
            shown = ", ".join(repr(self.item_ids[row]) for row in missing[:5]) + (", ..." if len(missing) > 5 else "")
            searched = ", ".join(self.text_fields if fields is None else fields) or "any field"
            raise ItemTableError(
                f"item table: {len(missing):,} of {len(self):,} items have no text in {searched}: {shown}. Add it, "
                "remove these items, or use a recipe that needs no text."
            )

    def align(self, item_ids: Sequence[str]) -> ItemTable:
        """The rows of `item_ids`, in that order; ids without a row get an empty title and nulls (`unlisted` counts)."""
        wanted = pa.array(list(item_ids), pa.string())
        rows = pc.index_in(wanted, value_set=self.table["item_id"].combine_chunks())
        table = self.table.take(rows)
        table = table.set_column(0, "item_id", wanted)
        table = table.set_column(1, "title", pc.fill_null(table["title"], ""))
        unlisted = self.unlisted + rows.null_count
        return ItemTable(table, text_fields=self.text_fields, texts_capped=self.texts_capped, unlisted=unlisted)

    def to_parquet(self, path: str | Path) -> None:
        """Write one Parquet file that `from_parquet` reads back with the same text fields."""
        about = {"text_fields": self.text_fields, "texts_capped": self.texts_capped, "unlisted": self.unlisted}
        pq.write_table(self.table.replace_schema_metadata({_METADATA: json.dumps(about).encode()}), path)

    @classmethod
    def from_parquet(cls, path: str | Path) -> ItemTable:
        """Read what `to_parquet` wrote, or any other Parquet file with an id column."""
        table, where = read_table(Path(path), error=ItemTableError)
        metadata = (table.schema.metadata or {}).get(_METADATA)
        if metadata is None:
            return cls.from_table(table, where)
        try:
            about = json.loads(metadata)
            known = {name: about[name] for name in ("text_fields", "texts_capped", "unlisted")}
        except (ValueError, KeyError, TypeError) as problem:
            raise ItemTableError(
                f"{where}: its description is damaged ({problem}). Save the item table again."
            ) from problem
        if table.column_names[:2] != ["item_id", "title"]:
            raise ItemTableError(f"{where}: does not begin with item_id and title. Save the item table again.")
        ids = _distinct_ids(table["item_id"], "item_id", where)
        return cls(table.replace_schema_metadata(None).set_column(0, "item_id", ids), **known)


def _default_fields(table: pa.Table) -> tuple[str, ...]:
    """The title, then every column of text or lists of text that does not look like an id, a link or a date."""
    fields = ["title"]
    for field in table.schema:
        kind = field.type.value_type if pa.types.is_list(field.type) else field.type
        if pa.types.is_string(kind) and field.name not in ("item_id", "title") and not _NO_TEXT.search(field.name):
            fields.append(field.name)
    return tuple(fields)


def _distinct_ids(column: pa.ChunkedArray, name: str, where: str) -> pa.ChunkedArray:
    codes, ids = id_codes(column, name, where, ItemTableError)
    if len(ids) < len(codes):
        counts = np.bincount(codes)
        doubled = np.flatnonzero(counts > 1)
        first = codes[np.argmax(counts[codes] > 1)]
        rows = ", ".join(f"{row + 1:,}" for row in np.flatnonzero(codes == first)[:3])
        raise ItemTableError(
            f"{where}: {len(doubled):,} ids occur more than once in column {name!r}, first "
            f"{ids[int(first)].as_py()!r} in rows {rows}. Keep one row for each item."
        )
    return pa.chunked_array([ids.take(pa.array(codes))])


def _simplified(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Plain strings and lists instead of Arrow's large, view and dictionary types; lists of lists become lists."""
    column = plain(column)
    kind = column.type
    if is_text(kind):
        return column.cast(pa.string())
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return column
    rows = pa.concat_arrays([chunk.cast(pa.list_(kind.value_type)) for chunk in column.chunks])
    values = _simplified(pa.chunked_array([rows.flatten()])).combine_chunks()  # flatten() honours nulls and slices
    bounds = np.append(0, np.cumsum(pc.fill_null(pc.list_value_length(rows), 0).to_numpy(zero_copy_only=False)))
    if isinstance(values, pa.ChunkedArray):
        values = pa.concat_arrays(values.chunks)
    if pa.types.is_list(values.type):
        bounds = values.offsets.to_numpy()[bounds]
        values = values.values
    return pa.chunked_array([pa.ListArray.from_arrays(pa.array(bounds, pa.int32()), values)])


def _as_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Any column as text, "" for null; lists joined by ", "."""
    column = _simplified(column)
    kind = column.type
    if pa.types.is_list(kind):
        rows = pa.concat_arrays(column.chunks)
        words = rows.flatten().cast(pa.string())
        bounds = np.append(0, np.cumsum(pc.fill_null(pc.list_value_length(rows), 0).to_numpy(zero_copy_only=False)))
        valid = np.append(0, np.cumsum(words.is_valid().to_numpy(zero_copy_only=False)))  # nulls give no word
        filled = pa.ListArray.from_arrays(pa.array(valid[bounds], pa.int32()), words.drop_null())
        column = pa.chunked_array([pc.binary_join(filled, ", ")])
    elif not pa.types.is_string(kind):
        try:
            column = column.cast(pa.string())
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as problem:
            raise ItemTableError(
                f"item table: a column of type {kind} is no text. Leave it out of the fields."
            ) from problem
    return pc.fill_null(column, "")


def _capped(column: pa.ChunkedArray, limit: int) -> tuple[pa.ChunkedArray, int]:
    """Text cut to `limit` characters, alone or in lists; how many texts were longer."""
    if pa.types.is_list(column.type):
        rows = pa.concat_arrays(column.chunks)
        words, count = _capped(pa.chunked_array([rows.values]), limit)
        if not count:
            return column, 0
        return pa.chunked_array([pa.ListArray.from_arrays(rows.offsets, words.combine_chunks())]), count
    if not pa.types.is_string(column.type):
        return column, 0
    count = pc.sum(pc.greater(pc.utf8_length(column), limit)).as_py() or 0
    return (pc.utf8_slice_codeunits(column, 0, limit), count) if count else (column, 0)
