"""Folders as their publishers ship them (three generations of MovieLens, RecBole, plain), and readable film titles."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hf_genrec.data.items import MAX_TEXT_LENGTH, ItemTable
from hf_genrec.data.readers import format_of, read_delimited, read_table
from hf_genrec.errors import InteractionTableError, ItemTableError

_ML_100K_GENRES = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip
_ARTICLES = "The|A|An|Le|La|Les|L'|Un|Une|Il|Lo|Los|Las|El|Der|Die|Das|Den|Det|De|Gli"
_TRAILING_ARTICLE = re.compile(rf"^(?P<rest>.+?), (?P<article>{_ARTICLES})(?P<tail>(?: \(.*)?)$")
_PLAIN_KINDS = (".parquet", ".csv", ".tsv", ".jsonl")


def display_title(title: str) -> str:
    """A catalogue title as one says it: the trailing article in front.

    Example:
        >>> display_title("Lion King, The (1994)"), display_title("Toy Story (1995)"), display_title("Avventura, L'")
        ('The Lion King (1994)', 'Toy Story (1995)', "L'Avventura")
    """
    found = _TRAILING_ARTICLE.match(title)
    if not found:
        return title
    blank = "" if found["article"].endswith("'") else " "
    return f"{found['article']}{blank}{found['rest']}{found['tail']}"


@dataclass(frozen=True)
class Layout:
    """Where a folder keeps its interactions and its items (None: it has no item table)."""

    interactions: Path
    items: Path | None


def find_layout(folder: Path) -> Layout:
    """Recognise a data folder by its files.

    Raises:
        InteractionTableError: nothing known in it, or several RecBole data sets.
    """

    def existing(*names: str) -> Path | None:
        return next((folder / name for name in names if (folder / name).is_file()), None)

    for log, items in (("ratings.csv", "movies.csv"), ("ratings.dat", "movies.dat"), ("u.data", "u.item")):
        if (folder / log).is_file():
            return Layout(folder / log, existing(items))
    atomic = sorted(folder.glob("*.inter"))
    if len(atomic) > 1:
        names = ", ".join(path.name for path in atomic)
        raise InteractionTableError(f"{folder}: holds {len(atomic)} .inter files ({names}). Pass one of them.")
    if atomic:
        return Layout(atomic[0], existing(atomic[0].with_suffix(".item").name))
    plain = existing(*(f"interactions{kind}" for kind in _PLAIN_KINDS))
    if plain:
        return Layout(plain, existing(*(f"items{kind}" for kind in _PLAIN_KINDS)))
    raise InteractionTableError(
        f"{folder}: no known data in this folder. It should hold ratings.csv, ratings.dat, u.data, one .inter file, or "
        "interactions.csv/.tsv/.parquet/.jsonl. Or pass the file itself."
    )


def is_film_list(path: Path) -> bool:
    """Is it a film list of MovieLens, or of MovieLens in RecBole's form?"""
    return path.name in ("movies.csv", "movies.dat", "u.item") or (
        path.suffix == ".item" and path.stem.startswith("ml-")
    )


def film_items(path: Path, *, encoding: str | None = None, max_text_length: int = MAX_TEXT_LENGTH) -> ItemTable:
    """A film list: the title as one says it with its year, the title as published (`raw_title`), genres, year.

    `texts()` gives "title (year) genres".

    Raises:
        ItemTableError: a column is missing, or the file cannot be read.
    """
    kind = format_of(path)
    if path.name == "u.item":
        films = _old_film_list(path, encoding)
    elif kind == ".item":
        films, _ = read_table(path, encoding=encoding, error=ItemTableError)
        films = films.rename_columns(
            [{"movie_title": "title", "class": "genres"}.get(n, n) for n in films.column_names]
        )
    else:
        names = ["movieId", "title", "genres"]
        films, _ = read_table(
            path,
            text_columns=names,
            column_names=names if kind == ".dat" else None,
            encoding=encoding,
            error=ItemTableError,
        )
        films = films.rename_columns(["item_id" if name == "movieId" else name for name in films.column_names])
    missing = [name for name in ("item_id", "title", "genres") if name not in films.column_names]
    if missing:
        raise ItemTableError(f"{path}: no column {missing[0]!r}; found {', '.join(films.column_names)}.")
    raw = [title or "" for title in films["title"].to_pylist()]
    titles = [display_title(title) for title in raw]
    if "release_year" in films.column_names:
        years = films["release_year"].to_pylist()
        titles = [f"{title} ({year})" if title and year else title for title, year in zip(titles, years)]
    genres = pc.replace_substring(pc.fill_null(films["genres"], ""), "(no genres listed)", "")
    films = pa.table(
        {
            "item_id": films["item_id"],
            "title": pa.array(titles, pa.string()),
            "raw_title": pa.array(raw, pa.string()),
            "genres": pc.replace_substring(genres, "|", " "),
        }
    )
    return ItemTable.from_table(films, str(path), text_fields=("title", "genres"), max_text_length=max_text_length)


def _old_film_list(path: Path, encoding: str | None) -> pa.Table:
    """The pipe-separated u.item of the original MovieLens-100K, in Latin-1, one 0/1 column for each genre."""
    names = ["item_id", "title", "release", "video_release", "url", *_ML_100K_GENRES]
    text = {name: pa.string() for name in names}
    try:
        table = read_delimited(
            path, "|", text, column_names=names, encoding=encoding or "latin-1", quoting=False, error=ItemTableError
        )
    except (pa.ArrowException, UnicodeError, OSError) as problem:
        raise ItemTableError(f"{path}: is not the u.item of MovieLens-100K ({problem}).") from problem
    flags = np.stack([table[name].to_numpy() == "1" for name in _ML_100K_GENRES[1:]], axis=1)
    genres = [" ".join(np.asarray(_ML_100K_GENRES[1:])[row]) for row in flags]
    return pa.table({"item_id": table["item_id"], "title": table["title"], "genres": pa.array(genres, pa.string())})
