"""Every file format in, one `pyarrow.Table` out. Ids are read as text, so "007" stays "007".

Formats: .csv .tsv .parquet .jsonl/.ndjson, RecBole atomic files (.inter .item .user .kg .link), MovieLens u.data and
.dat, .txt with one user's sequence a line; text formats also compressed (.gz, .bz2, .zst, .lz4).
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.json as pa_json
import pyarrow.parquet as pq

from hf_genrec.data.tables import has_broken_text, table_from_object
from hf_genrec.data.unreadable import explain, stream
from hf_genrec.errors import GenRecError, InteractionTableError

FORMATS = ".csv, .tsv, .parquet, .jsonl, .ndjson, .inter, .item, .data, .dat or .txt"
_COMPRESSED = (".gz", ".bz2", ".zst", ".lz4")
_JSON_LINES = (".jsonl", ".ndjson", ".json")
_RECBOLE = (".inter", ".item", ".user", ".kg", ".link")
_RECBOLE_TYPES = {"token": pa.string(), "token_seq": pa.string(), "float": pa.float64(), "float_seq": pa.string()}
_LOG_COLUMNS = ("user_id", "item_id", "rating", "timestamp")  # MovieLens files without a header
_BLOCK = 16 << 20  # bytes; one row has to fit into a block, also one with a title of a million characters


def format_of(path: Path) -> str:
    """The suffix that decides the format, in lower case and without the one of a compression.

    Example:
        >>> format_of(Path("log.2024.CSV.gz"))
        '.csv'
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    while suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def read_table(
    source: Any,
    *,
    text_columns: Sequence[str] = (),
    number_columns: Sequence[str] = (),
    only: bool = False,
    column_names: Sequence[str] | None = None,
    encoding: str | None = None,
    error: type[GenRecError] = InteractionTableError,
) -> tuple[pa.Table, str]:
    """Read a path or a table-like object.

    Args:
        source: path, or anything that `tables.table_from_object` takes.
        text_columns: columns to keep as text in formats without types (CSV, TSV), where present.
        number_columns: columns to read as float64 in these formats, where present.
        only: skip all other columns of a delimited file, provided that every text column is there.
        column_names: names for a delimited file without a header line.
        encoding: of text files, UTF-8 by default.
        error: class of the errors raised.

    Returns:
        the table, and what to call the source in messages.

    Raises:
        error: missing or empty file, unknown format, unreadable content; the message names line, byte or column.
    """
    if not isinstance(source, (str, Path)):
        return table_from_object(source, error)
    path = Path(source).expanduser()
    if not path.exists():
        raise error(f"{path}: no such file. Check the path.")
    if path.is_dir():
        raise error(f"{path}: is a folder where a file was expected. Pass one of its files.")
    if path.stat().st_size == 0:
        raise error(f"{path}: the file is empty. Bring at least a header and one row.")
    types = {name: pa.string() for name in text_columns} | {name: pa.float64() for name in number_columns}
    required = tuple(text_columns) if only else None
    try:
        table = _read_file(path, types, required, column_names, encoding, error)
    except (pa.ArrowException, UnicodeError, LookupError, OSError, csv.Error) as problem:
        raise error(explain(path, format_of(path), encoding, problem)) from problem
    if table.num_rows == 0:
        raise error(f"{path}: the file has no rows. Bring at least one.")
    if has_broken_text(table):
        raise error(explain(path, format_of(path), encoding, None))
    return table, str(path)


def _read_file(path: Path, types, required, column_names, encoding, error) -> pa.Table:
    kind = format_of(path)
    if kind == ".parquet":
        return pq.ParquetFile(path).read()
    if kind in _JSON_LINES:
        return _read_json_lines(path, encoding)
    if kind in _RECBOLE:
        return _read_recbole(path, encoding, error)
    if kind == ".data":
        names = column_names or _LOG_COLUMNS
        types = types | {"user_id": pa.string(), "item_id": pa.string()}
        return read_delimited(path, "\t", types, column_names=names, encoding=encoding, quoting=False)
    if kind == ".dat":
        return _read_dat(path, types, column_names or _LOG_COLUMNS, encoding)
    if kind not in (".csv", ".tsv", ".txt"):
        raise error(f"{path}: unknown format {kind or '(no suffix)'!r}. Use {FORMATS}.")
    delimiter = _delimiter(path, kind, column_names is None)
    if delimiter is None:
        return read_sequence_lines(path, encoding=encoding)
    return read_delimited(
        path, delimiter, types, required=required, column_names=column_names, encoding=encoding, error=error
    )


def _delimiter(path: Path, kind: str, has_header: bool) -> str | None:
    """Tab or comma, or what the header of a .csv uses instead; None for a .txt of sequences."""
    if kind == ".tsv":
        return "\t"
    with stream(path) as raw:
        first = raw.read(1 << 16).split(b"\n", 1)[0].decode("latin-1")
    if kind == ".txt":
        return next((mark for mark in ("\t", ",") if mark in first), None)
    others = [mark for mark in (";", "\t", "|") if mark in first]
    return others[0] if has_header and "," not in first and others else ","


def _header(path: Path, delimiter: str, encoding: str | None, quoting: bool) -> list[str]:
    with stream(path) as raw:
        text = io.TextIOWrapper(raw, encoding=_with_mark(encoding), newline="")
        rows = csv.reader(text, delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if quoting else csv.QUOTE_NONE)
        return [name.strip() for name in next(rows, [])]


def _with_mark(encoding: str | None) -> str:
    """Text editors put a byte-order mark in front of UTF-8."""
    return "utf-8-sig" if encoding is None or encoding.lower() in ("utf-8", "utf8") else encoding


def read_delimited(
    path: Path,
    delimiter: str,
    types: dict[str, pa.DataType],
    *,
    required: Sequence[str] | None = None,
    column_names: Sequence[str] | None = None,
    encoding: str | None = None,
    quoting: bool = True,
    source: Any = None,
    error: type[GenRecError] = InteractionTableError,
) -> pa.Table:
    """A delimited file; columns in `types` get that type, others what their values look like.

    Args:
        required: read only the columns of `types`, if all of these are there.
        quoting: fields in double quotes may hold the delimiter and line ends.
        source: the content, when it is not that of `path` itself.
    """
    names = list(column_names or _header(path, delimiter, encoding, quoting))
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or not any(names):
        fault = f"names {', '.join(map(repr, twice))} twice" if twice else "is blank"
        raise error(f"{path}: the header line {fault}. Give every column a name of its own.")
    types = {name: kind for name, kind in types.items() if name in names}
    selected = list(types) if required is not None and all(name in names for name in required) else None

    def parse(column_types: dict[str, pa.DataType]) -> pa.Table:
        with stream(path) if source is None else pa.BufferReader(source) as raw:
            return pa_csv.read_csv(
                raw,
                pa_csv.ReadOptions(
                    block_size=_BLOCK,
                    column_names=names,
                    skip_rows=0 if column_names else 1,
                    encoding=encoding or "utf8",
                ),
                pa_csv.ParseOptions(
                    delimiter=delimiter, quote_char='"' if quoting else False, newlines_in_values=quoting
                ),
                pa_csv.ConvertOptions(
                    column_types=column_types,
                    include_columns=selected,
                    strings_can_be_null=False,
                    timestamp_parsers=[],
                    quoted_strings_can_be_null=False,
                ),
            )

    try:
        return parse(types)
    except pa.ArrowInvalid as problem:
        if "conversion error" not in str(problem) or selected is not None:
            raise
    # the look of the first block did not hold: keep the columns without a declared type as text
    return parse({name: pa.string() for name in names} | types)


def _read_recbole(path: Path, encoding: str | None, error: type[GenRecError]) -> pa.Table:
    """Tab-separated, the header `name:type` with type token, token_seq, float or float_seq."""
    types = {}
    for field in _header(path, "\t", encoding, quoting=False):
        name, colon, kind = field.partition(":")
        if not colon or kind not in _RECBOLE_TYPES:
            raise error(
                f"{path}: header field {field!r} is not name:type with type {', '.join(_RECBOLE_TYPES)}. Correct it, "
                "or rename the file to .tsv if it is an ordinary table."
            )
        types[name] = _RECBOLE_TYPES[kind]
    with stream(path) as raw:
        return pa_csv.read_csv(
            raw,
            pa_csv.ReadOptions(block_size=_BLOCK, column_names=list(types), skip_rows=1, encoding=encoding or "utf8"),
            pa_csv.ParseOptions(delimiter="\t", quote_char=False),
            pa_csv.ConvertOptions(column_types=types, strings_can_be_null=False),
        )


def _read_dat(path: Path, types: dict[str, pa.DataType], names: Sequence[str], encoding: str | None) -> pa.Table:
    """MovieLens `a::b::c` lines. Their film titles are Latin-1 in the older sets, UTF-8 in the newer ones."""
    with stream(path) as raw:
        content = raw.read()
    if encoding is None:
        try:
            content.decode("utf-8")
        except UnicodeDecodeError:
            encoding = "latin-1"
    types = types | {"user_id": pa.string(), "item_id": pa.string()}
    content = content.replace(b"::", b"\x1f")  # Arrow knows delimiters of one byte; this one occurs in no text
    return read_delimited(path, "\x1f", types, column_names=names, encoding=encoding, quoting=False, source=content)


def read_sequence_lines(path: Path, *, encoding: str | None = None) -> pa.Table:
    """Lines `user item item ...`, oldest first, separated by blanks; a line with a user alone gives no row.

    Returns:
        columns user_id, item_id (text), in the order of the file.
    """
    with stream(path) as raw:
        content = raw.read().decode(_with_mark(encoding))
    lines = pc.list_flatten(pc.split_pattern_regex(pa.array([content]), r"\r?\n"))
    lines = pc.utf8_trim_whitespace(lines)
    lines = lines.filter(pc.not_equal(lines, ""))
    fields = pc.split_pattern_regex(lines, r"\s+")
    words, offsets = fields.values, fields.offsets.to_numpy()
    is_user = np.zeros(len(words), bool)
    is_user[offsets[:-1]] = True
    users = words.take(pa.array(np.repeat(offsets[:-1], np.diff(offsets) - 1)))
    return pa.table({"user_id": users, "item_id": words.filter(pa.array(~is_user))})


def _read_json_lines(path: Path, encoding: str | None) -> pa.Table:
    with stream(path) as raw:
        if _with_mark(encoding) != "utf-8-sig":
            raw = pa.BufferReader(raw.read().decode(encoding).encode("utf-8"))
        return pa_json.read_json(raw, pa_json.ReadOptions(block_size=_BLOCK))
