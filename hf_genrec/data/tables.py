"""Table-like objects as `pyarrow.Table`: `datasets.Dataset`, pandas, polars, Arrow, dict of columns, list of rows."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from hf_genrec.errors import GenRecError


def table_from_object(source: Any, error: type[GenRecError]) -> tuple[pa.Table, str]:
    """Convert without knowing the library of the object: by what it offers, not by its class.

    Returns:
        the table, and what to call the source in messages.

    Raises:
        error: not a table, no rows, a column of several types, text that is not Unicode.
    """
    what = f"{type(source).__module__.split('.')[0]} {type(source).__name__}".removeprefix("builtins ")
    if isinstance(source, dict) and source and all(hasattr(part, "num_rows") for part in source.values()):
        splits = ", ".join(map(str, source))
        raise error(f"{what}: holds the splits {splits}. Pass one of them, for example data[{next(iter(source))!r}].")
    try:
        table = _convert(source)
    except UnicodeEncodeError as problem:
        raise error(
            f"{what}: the text {problem.object[:40]!r} holds a lone surrogate ({problem.object[problem.start]!r}), "
            "which is no valid Unicode. Clean it: text.encode('utf-8', 'replace').decode()."
        ) from problem
    except (pa.ArrowException, TypeError, ValueError) as problem:
        detail = "; ".join(str(part) for part in problem.args)[:300]
        raise error(f"{what}: {detail}. Give each column one type (ids as text).") from problem
    if table is None:
        raise error(
            f"{what}: is no table. Pass a path, a datasets.Dataset, a pandas or polars frame or a pyarrow.Table."
        )
    if table.num_rows == 0:
        raise error(f"{what}: the table has no rows. Bring at least one.")
    if has_broken_text(table):
        raise error(f"{what}: holds text that is not UTF-8. Decode it before it becomes a table.")
    return table, what


def _convert(source: Any) -> pa.Table | None:
    if isinstance(source, pa.Table):
        return source
    if isinstance(source, pa.RecordBatch):
        return pa.Table.from_batches([source])
    if hasattr(source, "with_format") and hasattr(source, "num_rows"):  # datasets.Dataset, with its selected rows
        return source.with_format("arrow")[:]
    if type(source).__module__.split(".")[0] == "pandas" and hasattr(source, "columns"):
        return pa.Table.from_pandas(source, preserve_index=False)
    if hasattr(source, "collect") and hasattr(source, "lazy"):  # polars.LazyFrame
        source = source.collect()
    if hasattr(source, "to_arrow") and hasattr(source, "columns"):  # polars.DataFrame
        return source.to_arrow()
    if isinstance(source, dict):
        return pa.table(source)
    if isinstance(source, list) and source and all(isinstance(row, dict) for row in source):
        return pa.Table.from_pylist(source)
    if hasattr(source, "__arrow_c_stream__"):
        return pa.table(source)
    return None


def has_broken_text(table: pa.Table) -> bool:
    """Does a text column hold bytes that are not UTF-8? Arrow checks CSV itself, but neither Parquet nor JSON."""
    for column in table.columns:
        if pa.types.is_binary(column.type):  # what the CSV reader makes of a text column that is not UTF-8
            return True
        if not (pa.types.is_primitive(column.type) or pa.types.is_null(column.type)):
            try:
                column.validate(full=True)
            except pa.ArrowInvalid:
                return True
    return False
