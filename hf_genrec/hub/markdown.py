"""Untrusted text in Markdown: item ids, titles and data set names come from strangers' files.

A value may hold HTML, links, table bars, code fences, front matter marks, text-direction tricks, lone surrogates or a
million characters. Nothing of it may become structure of the card: `inline` writes everything that Markdown could read
as markup as character references, `code` makes a code span, `fenced` a code block whose fence the content cannot close.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

MAX_INLINE = 200

# What may stand in running text as it is; every other ASCII character becomes a numeric character reference.
_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 ,;?/%()'\".-_")
# Full stops, hyphens and brackets are harmless, except where they would begin a list or a web address; underscores are
# inside a word.
_HARMFUL = re.compile(r"^[0-9]+[.)]|^[-.]|www\.|(?<![a-z0-9])_|_(?![a-z0-9])", re.IGNORECASE)


def clean(value: Any, limit: int = MAX_INLINE) -> str:
    """`value` as one line of printable characters: control, direction and surrogate characters go, long text is cut.

    Example:
        >>> clean("a\\n---\\nb\\u202e")
        'a --- b'
    """
    text = str(value)[: 4 * limit]  # categories of a million characters are not worth looking up
    kept = "".join(" " if c.isspace() else c if unicodedata.category(c)[0] != "C" else "" for c in text)
    kept = " ".join(kept.split())
    return kept if len(kept) <= limit else kept[: limit - 1].rstrip() + "…"


def inline(value: Any, limit: int = MAX_INLINE) -> str:
    """`value` as running text without any markup, safe in a paragraph, heading, list or table cell.

    Example:
        >>> inline("<b>*x*</b>")
        '&#60;b&#62;&#42;x&#42;&#60;/b&#62;'
        >>> inline("1. Tea - green")
        '1&#46; Tea - green'
    """
    text = clean(value, limit)
    harmful = {match.end() - 1 for match in _HARMFUL.finditer(text)}
    pieces = [
        char if ord(char) > 127 or (char in _PLAIN and position not in harmful) else f"&#{ord(char)};"
        for position, char in enumerate(text)
    ]
    return "".join(pieces)


def code(value: Any, limit: int = MAX_INLINE, *, in_table: bool = False) -> str:
    """`value` as a code span; `in_table` also escapes the bar, which ends a table cell even inside a code span.

    Example:
        >>> code("B0001")
        '`B0001`'
    """
    text = clean(value, limit) or " "
    if in_table:
        text = text.replace("\\", "\\\\") if "|" in text else text
        text = text.replace("|", "\\|")
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    pad = " " if text[0] in "` " or text[-1] in "` " else ""
    return f"{ticks}{pad}{text}{pad}{ticks}"


def fenced(text: str, language: str = "") -> str:
    """`text` (several lines) as a code block; the fence is longer than any run of backticks in it."""
    lines = [
        "".join(c for c in line.replace("\t", "    ") if unicodedata.category(c)[0] != "C")
        for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    ]
    body = "\n".join(lines)
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", body)), default=0))
    return f"{fence}{language}\n{body.rstrip()}\n{fence}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, align_right_from: int = 1) -> str:
    """A table of cells that are already safe; columns from `align_right_from` on are right-aligned."""
    rule = ["---" if i < align_right_from else "---:" for i in range(len(header))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [list(header), rule, *map(list, rows)])


def slug(value: Any, default: str = "unnamed") -> str:
    """Lower-case letters, digits, hyphens and full stops, for tags and file names.

    Example:
        >>> slug("ML 100K: <script>")
        'ml-100k-script'
    """
    text = unicodedata.normalize("NFKD", clean(value, 80)).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9.]+", "-", text).strip("-.") or default
