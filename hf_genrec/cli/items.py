"""`genrec items add DIR --items FILE` and `genrec items remove DIR --ids ID,ID`: the catalogue of a trained artefact."""

from __future__ import annotations

import argparse
from typing import Any

from hf_genrec.cli.recommend import _ids
from hf_genrec.errors import RequestError


def add_items_parser(commands: Any) -> None:
    """The command's arguments."""
    items = commands.add_parser(
        "items",
        help="add items to the catalogue of an artefact, or remove them, without training",
        description="Add items (they get codes from the quantizer that is saved with the artefact and can be recommended at "
        "once; the codes of all other items stay), or remove items. The artefact is replaced in one step.",
    )
    items.add_argument("action", choices=["add", "remove"])
    items.add_argument("folder", help="artefact folder")
    items.add_argument("--items", help="add: item table of the new items (item_id, title, ...) as a file")
    items.add_argument(
        "--vectors",
        help="add: their vectors as .npy or .safetensors (rows as in --items), .npz or .parquet, as the quantizer was fitted on; "
        "default: made from the item table as in training",
    )
    items.add_argument("--model_features", help="add, with --vectors: input features of the model, a file likewise")
    items.add_argument("--ids", help="remove: item ids separated by commas")
    items.add_argument(
        "--when_full",
        choices=["error", "nearest"],
        default="error",
        help="add: a new item whose code has no free number fails (default), or gets the nearest free code",
    )


def run_items(options: argparse.Namespace) -> tuple[Any, str]:
    """JSON value (what changed) and text to print."""
    from hf_genrec.hub.catalogue_update import add_items_to_artifact, remove_items_from_artifact

    if options.action == "remove":
        if not options.ids or options.items or options.vectors:
            raise RequestError("genrec items remove needs --ids ID,ID and nothing else.")
        change = remove_items_from_artifact(options.folder, _ids(options.ids))
    else:
        if options.ids or not (options.items or options.vectors):
            raise RequestError("genrec items add needs --items FILE or --vectors FILE (with ids), and no --ids.")
        items, vectors = _items_and_vectors(options.items, options.vectors)
        features = None if options.model_features is None else _rows_of(options.model_features, items.item_ids)
        change = add_items_to_artifact(
            options.folder, items, vectors, item_features=features, when_full=options.when_full
        )
    return change.to_dict() | {"folder": options.folder}, f"{change}\n\nwritten: {options.folder}"


def _items_and_vectors(items_file: str | None, vectors_file: str | None) -> tuple[Any, Any]:
    from hf_genrec.data.items import ItemTable
    from hf_genrec.identifiers.features_array import read_vectors

    if items_file is not None:
        items = ItemTable.from_source(items_file)
        return items, None if vectors_file is None else _rows_of(vectors_file, items.item_ids)
    ids, vectors = read_vectors(str(vectors_file))
    if ids is None:
        raise RequestError(f"{vectors_file} holds no ids: give --items with them, or a .npz or .parquet file with ids.")
    return ItemTable.from_source({"item_id": ids}), vectors


def _rows_of(path: str, item_ids: list[str]) -> Any:
    from hf_genrec.identifiers.features_array import vectors_of_items

    return vectors_of_items(path, item_ids)
