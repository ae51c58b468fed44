"""Why a file cannot be read, said so that one can repair it: line, byte, value. Runs only after a failure."""

from __future__ import annotations

import codecs
import json
from pathlib import Path

import pyarrow as pa

_ENCODING_FIX = "Save the file as UTF-8, or pass encoding= (often 'latin-1' or 'cp1252')."


def stream(path: Path) -> pa.NativeFile:
    """The bytes of a file, decompressed if its suffix says so."""
    return pa.input_stream(str(path), compression="detect")


def explain(path: Path, kind: str, encoding: str | None, problem: Exception | None) -> str:
    """One sentence on what is wrong with `path` and one on the fix.

    Args:
        kind: format suffix.
        encoding: that it was read with, None for UTF-8.
        problem: the reader's exception, None when the reader let broken text pass.
    """
    if isinstance(problem, LookupError) and encoding is not None:
        return f"{path}: encoding={encoding!r} is unknown to Python. Use a name such as 'latin-1'."
    if isinstance(problem, OSError) and not isinstance(problem, pa.ArrowException):
        return f"{path}: cannot be read ({problem}). Check the file and its permissions."
    if kind == ".parquet":
        reason = f" ({_one_line(problem)})" if problem else ": it holds text that is not UTF-8"
        return f"{path}: cannot be read as Parquet{reason}. Write the file again."
    undecodable = _undecodable(path, encoding or "utf-8")
    if undecodable:
        return f"{path}: {undecodable}. {_ENCODING_FIX}"
    if problem is None:
        return f"{path}: holds text that is not UTF-8. {_ENCODING_FIX}"
    if any(sign in str(problem) for sign in ("Empty CSV file", "Empty JSON file", "Could not skip initial")):
        return f"{path}: the file has a header but no rows. Bring at least one row."
    if kind in (".jsonl", ".ndjson", ".json"):
        found = _broken_json_line(path, encoding or "utf-8")
        if found:
            return f"{path}: {found}"
        return f"{path}: cannot be read as lines of JSON ({_one_line(problem)}). Give each field one type in all lines."
    return (
        f"{path}: cannot be read as {kind} ({_one_line(problem)}). Correct that row, or rename the file to its format."
    )


def _one_line(problem: Exception | None) -> str:
    return " ".join(str(problem).split())[:300]


def _undecodable(path: Path, encoding: str) -> str | None:
    """Where the decoder stumbles: line and byte offset (in the decompressed file)."""
    decoder = codecs.getincrementaldecoder(encoding)()
    lines, position = 0, 0
    with stream(path) as raw:
        while True:
            chunk = raw.read(1 << 20)
            held = len(decoder.getstate()[0])  # bytes of a character that the last chunk cut in two
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as found:
                line = lines + found.object[: found.start].count(b"\n") + 1
                return (
                    f"line {line:,} is not {encoding.upper()}: byte 0x{found.object[found.start]:02x} at byte offset "
                    f"{position - held + found.start:,}"
                )
            if not chunk:
                return None
            lines += chunk.count(b"\n")
            position += len(chunk)


def _broken_json_line(path: Path, encoding: str) -> str | None:
    with stream(path) as raw:
        content = raw.read().decode(encoding)
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as problem:
            return f"line {number:,} is no JSON ({problem}). Write one JSON object a line."
        if not isinstance(value, dict):
            return f"line {number:,} holds no JSON object. Write one object a line, not a list or a bare value."
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as problem:
            return (
                f"line {number:,} holds a lone surrogate ({problem.object[problem.start]!r}), which is no valid "
                "Unicode. Clean the text before writing it: text.encode('utf-8', 'replace').decode()."
            )
    return None
