"""Named data sets: where their files lie and which filters their protocols use. Nothing is downloaded or bundled."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from hf_genrec.data.columns import nearest_names
from hf_genrec.data.items import ItemTable
from hf_genrec.data.readers import read_sequence_lines, read_table
from hf_genrec.data.sources import LogSource, open_log
from hf_genrec.errors import InteractionTableError, ItemTableError

DATA_VARIABLE = "HF_GENREC_DATA"


@dataclass(frozen=True)
class NamedDataset:
    """A data set known by name.

    Args:
        title: what it is.
        folder: its folder under the data folder; files: what must be in it.
        read: (folder, max_text_length) -> the raw log.
        min_user, min_item: the filters of its usual protocol (0: as published).
        package: wheel that carries it, looked up without importing it; package_folder: where inside; install: how to
            get it.
    """

    title: str
    folder: str
    files: tuple[str, ...]
    read: Callable[[Path, int], LogSource]
    min_user: int = 0
    min_item: int = 0
    package: str | None = None
    package_folder: str = ""
    install: str = ""


def _movielens(folder: Path, max_text_length: int) -> LogSource:
    return open_log(
        folder,
        user_column="user_id",
        item_column="item_id",
        timestamp_column="timestamp",
        rating_column="rating",
        encoding=None,
        max_text_length=max_text_length,
    )


def _titled_items(folder: Path, max_text_length: int) -> ItemTable:
    path = folder / "items.jsonl"
    return ItemTable.from_source(path, text_fields=("title", "categories"), max_text_length=max_text_length)


def _toys(folder: Path, max_text_length: int) -> LogSource:
    path = folder / "sequences.txt"
    note = (
        "no times; reviews carry a day, and the published order within a day is no behaviour (often it is by item id)"
    )
    items = _titled_items(folder, max_text_length)
    return LogSource(read_sequence_lines(path), str(path), items, timestamp_column=None, notes=(note,))


def _games(folder: Path, max_text_length: int) -> LogSource:
    paths = [folder / name for name in ("train.txt", "valid.txt", "test.txt")]
    table = pa.concat_tables([read_sequence_lines(path) for path in paths])
    note = "no times; the published train, validation and test rows of a user are joined in this order and split anew"
    items = _titled_items(folder, max_text_length)
    return LogSource(table, str(paths[0]), items, timestamp_column=None, notes=(note,))


def _phone(folder: Path, max_text_length: int) -> LogSource:
    """Training rows carry a day, validation and test rows nothing but that they follow, in this order."""
    paths = [folder / name for name in ("train_time_inter.csv", "valid_inter.csv", "test_inter.csv")]
    parts = []
    for stage, path in enumerate(paths):
        table, _ = read_table(path, text_columns=("user_id", "item_id"))
        day = table["time"].to_numpy() if "time" in table.column_names else np.zeros(table.num_rows, np.int64)
        parts.append(table.select(["user_id", "item_id"]).append_column("order", pa.array(day + (stage << 40))))
    note = "days order the training rows and validation and test rows follow: an order with ties, but no times"
    return LogSource(
        pa.concat_tables(parts),
        str(paths[0]),
        _phone_items(folder / "corpus_512.json", max_text_length),
        timestamp_column=None,
        order_column="order",
        notes=(note,),
    )


def _phone_items(path: Path, max_text_length: int) -> ItemTable:
    """One JSON object {item: {cid, content}}; the content strings "title ... brand ... categories ..." together."""
    try:
        corpus = json.loads(path.read_text(encoding="utf-8"))
        contents = [entry["content"] for entry in corpus.values()]
        codes = [entry["cid"] for entry in corpus.values()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        raise ItemTableError(f"{path}: is not the item file of the ColaRec data ({problem}).") from problem
    table = pa.table(
        {"item_id": list(corpus), "title": list(map(_phone_title, contents)), "content": contents, "cid": codes}
    )
    return ItemTable.from_table(table, str(path), text_fields=("content",), max_text_length=max_text_length)


def _phone_title(content: str) -> str:
    if not content.startswith("title "):
        return ""
    title = content.removeprefix("title ").split(" categories ", 1)[0]
    return title.rsplit(" brand ", 1)[0].strip()


NAMED_DATASETS: dict[str, NamedDataset] = {
    "movielens-100k": NamedDataset(
        "MovieLens-100K: all films, all ratings as positives", "ml-100k", (), _movielens,
        package="recbole", package_folder="dataset_example/ml-100k", install="pip install --no-deps recbole==1.2.1",
    ),
    "movielens-latest-small": NamedDataset(
        "MovieLens latest-small of 2018, 5-core", "ml-latest-small", ("ratings.csv", "movies.csv"), _movielens, 5, 5,
    ),
    "amazon-toys": NamedDataset(
        "Amazon Toys and Games, 5-core as published", "amazon_toys", ("sequences.txt", "items.jsonl"), _toys,
    ),
    "amazon-games": NamedDataset(
        "Amazon Video Games as published, with cold items", "amazon_games",
        ("train.txt", "valid.txt", "test.txt", "items.jsonl"), _games,
    ),
    "amazon-phone": NamedDataset(
        "Amazon Cell Phones and Accessories, 5-core as published", "amazon_phone",
        ("train_time_inter.csv", "valid_inter.csv", "test_inter.csv", "corpus_512.json"), _phone,
    ),
}  # fmt: skip
ALIASES = {"ml-100k": "movielens-100k", "ml-latest-small": "movielens-latest-small"}


def canonical_name(name: str) -> str | None:
    """The table's name for `name`, or None when it names no data set."""
    key = name.lower().replace("_", "-")
    key = ALIASES.get(key, key)
    return key if key in NAMED_DATASETS else None


def dataset_folder(name: str, data_dir: str | Path | None = None) -> Path:
    """The folder with the files of a named data set.

    Looks for the set's own folder in `data_dir`, else in `$HF_GENREC_DATA` (either may also be that folder itself).
    MovieLens-100K is found inside the installed recbole wheel too, which is not imported.

    Raises:
        InteractionTableError: not found; the message says what to install or set.
    """
    dataset = NAMED_DATASETS[name]
    base = data_dir if data_dir is not None else os.environ.get(DATA_VARIABLE)
    missing = ""
    if base:
        own = Path(base).expanduser()
        folder = own if own.name == dataset.folder else own / dataset.folder
        absent = [file for file in dataset.files if not (folder / file).is_file()]
        if folder.is_dir() and not absent:
            return folder
        missing = f"{folder / absent[0]} does not exist" if absent else f"{folder} does not exist"
    if dataset.package:
        spec = importlib.util.find_spec(dataset.package)
        for root in (spec.submodule_search_locations or []) if spec else []:
            if (Path(root) / dataset.package_folder).is_dir():
                return Path(root) / dataset.package_folder
        raise InteractionTableError(
            f"{name} is not on this machine. Run {dataset.install} (its licence forbids bundling it), or put the "
            f"folder {dataset.folder} into data_dir= or ${DATA_VARIABLE}."
        )
    raise InteractionTableError(
        f"{name} is not on this machine: {missing or f'neither data_dir= nor ${DATA_VARIABLE} is set'}. Pass data_dir= "
        f"(command line: --data_dir) or set {DATA_VARIABLE} to the folder that holds {dataset.folder}/"
        f"{dataset.files[0]}."
    )


def read_named(name: str, data_dir: str | Path | None, max_text_length: int) -> LogSource:
    """The raw tables of a named data set, with the filters of its protocol."""
    dataset = NAMED_DATASETS[name]
    raw = dataset.read(dataset_folder(name, data_dir), max_text_length)
    return replace(raw, name=name, min_user=dataset.min_user, min_item=dataset.min_item)


def unknown_name(name: str) -> InteractionTableError:
    """The error for a source that is neither a data set nor an existing path."""
    near = nearest_names(name, [*NAMED_DATASETS, *ALIASES])
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return InteractionTableError(
        f"{name!r} is no file or folder and no named data set ({', '.join(NAMED_DATASETS)}).{hint}"
    )
