"""Item vectors supplied as a file: image embeddings, another model's output, any array; checked row by row.

Formats: `.npy` and `.safetensors` (one row per item in catalogue order, or a file of ids beside it), `.npz` with arrays `ids`
and `vectors`, Parquet with a column of ids and a column of lists. Arrays only: no pickle is opened.

Shape legend: N items, R rows of the file, E dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from ..errors import ItemTableError

FORMATS = ".npy, .safetensors, .npz or .parquet"


def read_vectors(
    path: str | Path, *, ids: str | Path | None = None, id_column: str = "item_id", vector_column: str | None = None
) -> tuple[list[str] | None, np.ndarray]:
    """Ids (None for rows in catalogue order) and vectors float32 (R, E) of a file.

    Args:
        ids: for `.npy` and `.safetensors`: a text file with one id per row.
        id_column, vector_column: of a Parquet file; by default `item_id` and the only column of lists. `vector_column` is
            also the name of the tensor in a `.safetensors` file; by default the only one.

    Raises:
        ItemTableError: no such file, another format, no matrix of numbers, a row that is not finite, or ids that do not
            match the rows or repeat (file and row named).
    """
    path = Path(path)
    if not path.is_file():
        raise ItemTableError(f"{path}: no such file; give a file of item vectors: {FORMATS}")
    readers = {".npy": _read_npy, ".safetensors": _read_safetensors, ".npz": _read_npz, ".parquet": _read_parquet}
    if path.suffix.lower() not in readers:
        raise ItemTableError(f"{path}: item vectors are read from {FORMATS} files, not {path.suffix!r}")
    try:
        found, values = readers[path.suffix.lower()](path, ids, id_column, vector_column)
    except ItemTableError:
        raise
    except (OSError, ValueError, KeyError, SafetensorError) as error:  # what the readers raise for a damaged file
        raise ItemTableError(f"{path}: cannot be read as item vectors ({error}); save it again") from error
    if values.ndim != 2 or values.dtype.kind not in "fiu" or not values.size:
        raise ItemTableError(f"{path}: vectors are {values.dtype} {values.shape}, not a matrix with one row per item")
    vectors_RE = values.astype(np.float32)
    bad_R = ~np.isfinite(vectors_RE).all(axis=1)
    if bad_R.any():
        row = int(bad_R.argmax())
        name = f" (item {found[row]!r})" if found is not None else ""
        raise ItemTableError(f"{path}: row {row}{name} holds NaN or infinity; fix or leave out the row")
    if found is not None:
        if len(found) != len(vectors_RE):
            raise ItemTableError(f"{path}: {len(found)} ids for {len(vectors_RE)} vectors; give one id per row")
        first: dict[str, int] = {}
        for row, item in enumerate(found):
            if first.setdefault(item, row) != row:
                raise ItemTableError(f"{path}: row {row}: item {item!r} is already row {first[item]}; keep one of them")
    return found, vectors_RE


def vectors_of_items(
    path: str | Path, item_ids: Sequence[str], *, when_missing: str = "error", **options: Any
) -> np.ndarray:
    """Vectors (N, E) float32 of the catalogue's items from a file; rows of other items are left out.

    Args:
        when_missing: items without a row: "error", or "mean" (the mean of the items that have one).
        options: those of `read_vectors`.

    Raises:
        ItemTableError: as `read_vectors`; a file in catalogue order with another number of rows; items without a row.
    """
    if when_missing not in ("error", "mean"):
        raise ItemTableError(f"when_missing is {when_missing!r}: choose 'error' or 'mean'")
    ids, vectors_RE = read_vectors(path, **options)
    if ids is None:
        if len(vectors_RE) != len(item_ids):
            raise ItemTableError(
                f"{path}: {len(vectors_RE)} rows for {len(item_ids)} items; rows without ids must be in catalogue order: "
                "give the ids too"
            )
        return vectors_RE
    row_of = {item: row for row, item in enumerate(ids)}
    rows_N = np.array([row_of.get(item, -1) for item in item_ids])
    missing = np.flatnonzero(rows_N < 0)
    if len(missing) == len(rows_N) or (len(missing) and when_missing == "error"):
        raise ItemTableError(
            f"{path}: {len(missing)} of {len(item_ids)} items have no row (first: {item_ids[missing[0]]!r} of catalogue "
            f"row {int(missing[0])}); add them, or set when_missing to mean"
        )
    vectors_NE = vectors_RE[np.maximum(rows_N, 0)]
    if len(missing):
        vectors_NE[missing] = vectors_NE[rows_N >= 0].mean(axis=0)
    return vectors_NE


def _read_npy(path: Path, ids: Any, id_column: str, vector_column: str | None) -> tuple[list[str] | None, np.ndarray]:
    return _listed(ids), np.load(path, allow_pickle=False)


def _read_safetensors(
    path: Path, ids: Any, id_column: str, vector_column: str | None
) -> tuple[list[str] | None, np.ndarray]:
    with safe_open(str(path), framework="pt") as tensors:
        names = sorted(tensors.keys())
        name = names[0] if vector_column is None and len(names) == 1 else vector_column
        if name not in names:
            wrong = f"{len(names)} tensors" if vector_column is None else f"no tensor {vector_column!r}"
            raise ItemTableError(f"{path}: {wrong}; found {names}. Set vector_column to one of them")
        tensor = tensors.get_tensor(name)
    # numpy has no bfloat16
    return _listed(ids), (tensor.float() if tensor.is_floating_point() else tensor).numpy()


def _listed(ids: Any) -> list[str] | None:
    """The ids of a text file, one per line."""
    if ids is None:
        return None
    if not Path(ids).is_file():
        raise ItemTableError(f"{ids}: no such file; give one item id per line")
    return [line.rstrip("\r") for line in Path(ids).read_text("utf-8").removesuffix("\n").split("\n")]


def _read_npz(path: Path, ids: Any, id_column: str, vector_column: str | None) -> tuple[list[str] | None, np.ndarray]:
    with np.load(path, allow_pickle=False) as arrays:
        missing = {"ids", "vectors"} - set(arrays.files)
        if missing:
            raise ItemTableError(f"{path}: array {sorted(missing)[0]!r} is missing; found {sorted(arrays.files)}")
        return [str(item) for item in arrays["ids"].tolist()], arrays["vectors"]


def _read_parquet(
    path: Path, ids: Any, id_column: str, vector_column: str | None
) -> tuple[list[str] | None, np.ndarray]:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    lists = [
        field.name
        for field in table.schema
        if pa.types.is_list(field.type) or pa.types.is_large_list(field.type) or pa.types.is_fixed_size_list(field.type)
    ]
    if vector_column is None and len(lists) == 1:
        vector_column = lists[0]
    for name, what in ((id_column, "id_column"), (vector_column, "vector_column")):
        if name not in table.column_names:
            raise ItemTableError(f"{path}: no column {name!r}; found {table.column_names}. Set {what} to one of them")
    found = [str(item) for item in table[id_column].to_pylist()]
    lengths_R = pc.fill_null(pc.list_value_length(table[vector_column]), -1).to_numpy()
    uneven = np.flatnonzero(lengths_R != (lengths_R[0] if len(lengths_R) else 0))
    if len(uneven) or (len(lengths_R) and lengths_R[0] < 1):
        row = int(uneven[0]) if len(uneven) else 0
        raise ItemTableError(
            f"{path}: row {row} (item {found[row]!r}) has {int(lengths_R[row])} numbers, the first row "
            f"{int(lengths_R[0])}; every vector needs the same length"
        )
    values = pc.list_flatten(table[vector_column]).to_numpy().astype(np.float32)
    return found, values.reshape(len(found), -1)
