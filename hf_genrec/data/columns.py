"""Checked columns: ids as text codes, timestamps as integers, with errors that name the row, the field and the fix.

Rows are counted from 1 without the header, as a reader of the file would. Shapes: n rows.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hf_genrec.data.filtering import natural_order
from hf_genrec.errors import GenRecError, InteractionTableError

TIME_UNITS = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}  # ticks per second
_UNIT_LIMITS = (("s", 1e11), ("ms", 1e14), ("us", 1e17), ("ns", 9.3e18))  # |value| below: that unit (year 5138)
_BLANK = ("", "nan", "NaN", "NAN")  # what a missing id becomes on its way through a text file


def nearest_names(name: str, found: Sequence[str], synonyms: Sequence[str] = ()) -> list[str]:
    """Names in `found` that may have been meant by `name` or one of its synonyms, best first."""
    folded = {_folded(column): column for column in found}
    near: list[str] = []
    for candidate in (name, *synonyms):
        near += [folded[key] for key in difflib.get_close_matches(_folded(candidate), list(folded), n=2, cutoff=0.72)]
    return list(dict.fromkeys(near))


def _folded(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def no_column(where: str, name: str, found: Sequence[str], synonyms: Sequence[str], argument: str) -> str:
    """The message for a column that is not there: what is, and which argument names it."""
    near = nearest_names(name, found, synonyms)
    if all(column.replace(".", "", 1).replace("-", "").isdigit() for column in found):
        fix = "The file seems to have no header line: add one, such as user_id,item_id,timestamp."
    elif near:
        fix = f"Did you mean {near[0]!r}? Pass {argument}={near[0]!r}."
    else:
        fix = f"Pass {argument}= with the right one."
    return f"{where}: no column {name!r}; found {', '.join(map(repr, found))}. {fix}"


def row_of_first(mask: pa.ChunkedArray) -> int:
    """1-based row of the first true value."""
    return pc.index(mask, True).as_py() + 1


def plain(column: pa.ChunkedArray | pa.Array) -> pa.ChunkedArray:
    """A column without dictionary encoding, in chunks."""
    if isinstance(column, pa.Array):
        column = pa.chunked_array([column])
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def is_text(kind: pa.DataType) -> bool:
    """Is it one of Arrow's string types?"""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _refuse_missing(missing: pa.ChunkedArray, name: str, where: str, error: type[GenRecError]) -> None:
    count = pc.sum(missing).as_py() or 0
    if count:
        raise error(
            f"{where}: column {name!r} has no value (empty or NaN) in {count:,} of {len(missing):,} rows, first in row "
            f"{row_of_first(missing):,}. Remove these rows or fill them in."
        )


def refuse_nulls(column: pa.ChunkedArray, name: str, where: str, error: type[GenRecError]) -> None:
    """Raise when a value is null or NaN."""
    if column.null_count or pa.types.is_floating(column.type):
        _refuse_missing(pc.is_null(column, nan_is_null=pa.types.is_floating(column.type)), name, where, error)


def id_codes(
    column: pa.ChunkedArray, name: str, where: str, error: type[GenRecError] = InteractionTableError
) -> tuple[np.ndarray, pa.Array]:
    """An id column as dense codes, which do not depend on the order of the rows.

    Text stays as it is, integers and whole floats become their digits ("1").

    Returns:
        codes: (n,) int32; ids: the distinct ids as Arrow strings, code c names `ids[c]`, in `natural_order`.

    Raises:
        error: a missing value, a fraction, a type that names nothing (boolean, list, ...).
    """
    column = plain(column)
    refuse_nulls(column, name, where, error)
    encoded = column.dictionary_encode().combine_chunks()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.chunk(0)
    distinct, codes = _id_texts(encoded.dictionary, column, name, where, error), encoded.indices.to_numpy()
    if pc.any(pc.is_in(distinct, value_set=pa.array(_BLANK))).as_py():
        texts = column.cast(pa.string())
        _refuse_missing(pc.is_in(texts, value_set=pa.array(_BLANK)), name, where, error)
    merged = distinct.dictionary_encode()  # 0.0 and -0.0 are one id
    order = natural_order(merged.dictionary)
    rank = np.empty(len(order), np.int32)
    rank[order] = np.arange(len(order), dtype=np.int32)
    return rank[merged.indices.to_numpy()][codes], merged.dictionary.take(pa.array(order))


def _id_texts(values: pa.Array, column: pa.ChunkedArray, name: str, where: str, error: type[GenRecError]) -> pa.Array:
    kind = values.type
    if is_text(kind) or pa.types.is_integer(kind):
        return values.cast(pa.string())
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        # pandas turns integers into floats as soon as one value was missing: 1.0 means "1", but 1.5 means nothing
        numbers = values.cast(pa.float64())
        broken = pc.or_(pc.not_equal(pc.floor(numbers), numbers), pc.greater_equal(pc.abs(numbers), 2.0**53))
        if pc.any(broken).as_py():
            value = values.filter(broken)[0]
            row = pc.index(column, value).as_py() + 1
            raise error(
                f"{where}: column {name!r} holds {value.as_py()!r} in row {row:,}, which is no id. Bring ids as "
                "text or as integers."
            )
        return numbers.cast(pa.int64()).cast(pa.string())
    raise error(f"{where}: column {name!r} has type {kind}, which is no id. Bring ids as text or as integers.")


def extra_values(column: pa.ChunkedArray) -> np.ndarray:
    """Any further column as an array (n,): numbers as float64 (NaN = no value), everything else as text ("" = none)."""
    column = plain(column)
    if pa.types.is_integer(column.type) or pa.types.is_floating(column.type) or pa.types.is_decimal(column.type):
        return column.cast(pa.float64()).to_numpy()
    return np.array(["" if value is None else str(value) for value in column.to_pylist()], dtype=object)


def time_ticks(
    column: pa.ChunkedArray, name: str, where: str, unit: str | None = None
) -> tuple[np.ndarray, np.ndarray, str]:
    """A time column as integers: numbers (seconds, ms, us, ns), dates, datetimes or ISO 8601 text.

    The unit of numbers is read off their size: below 1e11 seconds (or any step counter), below 1e14 ms, below 1e17 us.
    Text without a time zone counts as UTC.

    Args:
        unit: "s", "ms", "us" or "ns" when the caller knows better.

    Returns:
        ticks: (n,) int64 in the resolution of the column, good for order and equality only;
        seconds: (n,) int64 unix seconds, rounded down; the unit's name ("datetime" for dates).

    Raises:
        InteractionTableError: missing, infinite or unreadable values, two units in one column.
    """
    column = plain(column)
    if unit is not None and unit not in TIME_UNITS:
        raise InteractionTableError(f"time_unit={unit!r} is unknown. Use one of {', '.join(TIME_UNITS)}.")
    refuse_nulls(column, name, where, InteractionTableError)
    if is_text(column.type):
        column = _parse_time_text(column, name, where)
    if pa.types.is_date(column.type):
        column = column.cast(pa.timestamp("s"))
    kind = column.type
    if pa.types.is_timestamp(kind):
        ticks = column.cast(pa.int64()).to_numpy()
        return ticks, np.floor_divide(ticks, TIME_UNITS[kind.unit]), "datetime"
    if pa.types.is_integer(kind):
        try:
            values = column.cast(pa.int64()).to_numpy()
        except pa.ArrowInvalid as problem:
            raise InteractionTableError(
                f"{where}: column {name!r} holds numbers beyond 64 bits, which are no times. Bring unix seconds."
            ) from problem
    elif pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        values = column.cast(pa.float64()).to_numpy()
        finite = np.isfinite(values)
        if not finite.all():
            raise InteractionTableError(
                f"{where}: column {name!r} is infinite in row {int(np.argmin(finite)) + 1:,}. Correct or remove it."
            )
    else:
        raise InteractionTableError(
            f"{where}: column {name!r} has type {kind}, which is no time. Bring unix seconds or ISO 8601 dates."
        )
    if unit is None:
        unit = _unit_of(values, name, where)
    per_second = TIME_UNITS[unit]
    if values.dtype == np.int64:
        return values, values if per_second == 1 else np.floor_divide(values, per_second), unit
    if per_second == 1 and not np.array_equal(values, np.floor(values)):  # fractions of a second still order the rows
        return np.rint(values * 1e6).astype(np.int64), np.floor(values).astype(np.int64), unit
    ticks = np.rint(values).astype(np.int64)
    return ticks, ticks if per_second == 1 else np.floor_divide(ticks, per_second), unit


def _unit_of(values: np.ndarray, name: str, where: str) -> str:
    """The unit that the sizes of all values agree on."""
    sizes = np.abs(values.astype(np.float64))
    low, high = int(sizes.argmin()), int(sizes.argmax())
    units = [next((unit for unit, limit in _UNIT_LIMITS if sizes[row] < limit), None) for row in (low, high)]
    if units[1] is None:
        raise InteractionTableError(
            f"{where}: column {name!r} holds {values[high]} in row {high + 1:,}, which is no time in s, ms, us or ns. "
            "Correct the row."
        )
    if units[0] != units[1]:
        raise InteractionTableError(
            f"{where}: column {name!r} mixes time units: row {low + 1:,} holds {values[low]} (looks like {units[0]}), "
            f"row {high + 1:,} holds {values[high]} (looks like {units[1]}). Convert the column to one unit, or pass "
            "time_unit= if it is in one."
        )
    return units[1]


_NUMBER = r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$"


def _parse_time_text(column: pa.ChunkedArray, name: str, where: str) -> pa.ChunkedArray:
    """Time text as numbers or timestamps."""
    column = column.cast(pa.string())
    targets = (pa.int64(), pa.timestamp("us"), pa.timestamp("us", "UTC"))
    for target in targets:
        try:
            return column.cast(target)
        except pa.ArrowInvalid:
            continue
    trimmed = pc.utf8_trim_whitespace(column)
    _refuse_missing(pc.is_in(trimmed, value_set=pa.array(_BLANK)), name, where, InteractionTableError)
    numeric = pc.match_substring_regex(trimmed, _NUMBER)
    numbers = pc.sum(numeric).as_py()
    if numbers == len(column):
        return trimmed.cast(pa.float64())
    if numbers:
        rows = row_of_first(numeric), row_of_first(pc.invert(numeric))
        raise InteractionTableError(
            f"{where}: column {name!r} mixes numbers and other text: row {rows[0]:,} holds "
            f"{column[rows[0] - 1].as_py()!r}, row {rows[1]:,} holds {column[rows[1] - 1].as_py()!r}. Convert the "
            "column to unix seconds, or to ISO 8601 throughout."
        )
    zoned = pc.match_substring_regex(trimmed, r":\d\d(\.\d+)?(Z|[-+]\d\d(:?\d\d)?)$")
    if pc.any(zoned).as_py() and not pc.all(zoned).as_py():
        rows = row_of_first(zoned), row_of_first(pc.invert(zoned))
        raise InteractionTableError(
            f"{where}: column {name!r} has a time zone in row {rows[0]:,} ({column[rows[0] - 1].as_py()!r}) and none "
            f"in row {rows[1]:,} ({column[rows[1] - 1].as_py()!r}). Bring ISO 8601 with a zone everywhere, or nowhere."
        )
    target = targets[2] if pc.all(zoned).as_py() else targets[1]
    row = _first_unreadable(trimmed, target)
    raise InteractionTableError(
        f"{where}: column {name!r} holds {column[row].as_py()!r} in row {row + 1:,}, which is no time. Bring unix "
        "seconds or ISO 8601 (2024-12-31T23:59:59Z)."
    )


def _first_unreadable(column: pa.ChunkedArray, target: pa.DataType) -> int:
    """0-based row of the first value that cannot be cast, by halving."""
    low, high = 0, len(column)  # column[:low] is readable, column[:high] is not
    while high - low > 1:
        middle = (low + high) // 2
        try:
            column.slice(low, middle - low).cast(target)
            low = middle
        except pa.ArrowInvalid:
            high = middle
    return low
