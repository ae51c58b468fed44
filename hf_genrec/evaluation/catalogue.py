"""Bring a data set into the item order of a model's catalogue, so that item indices mean the same on both sides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from hf_genrec.errors import IncompatibleComponentsError


def align_to_catalogue(data: Any, item_ids: Sequence[str]) -> Any:
    """The same `RecommendationData` with item indices of the catalogue `item_ids` (of a tokenizer).

    Items of the catalogue that the data lack stay in it (they can be recommended, and never are a target).

    Raises:
        IncompatibleComponentsError: The data hold items that the catalogue does not know; the first is named.
    """
    item_ids = list(item_ids)
    if list(data.item_ids) == item_ids:
        return data
    position = {item_id: index for index, item_id in enumerate(item_ids)}
    new_index_N = np.array([position.get(item_id, -1) for item_id in data.item_ids], dtype=np.int32)
    unknown = np.flatnonzero(new_index_N < 0)
    if len(unknown):
        raise IncompatibleComponentsError(
            f"{len(unknown)} of {len(new_index_N)} items of {data.name} are not in the model's catalogue of "
            f"{len(item_ids)} items (first: {data.item_ids[int(unknown[0])]!r}): evaluate on the data set, filters and "
            "file that the model was trained on"
        )
    sequences = replace(data.sequences, items=new_index_N[data.sequences.items])
    items = None
    if data.items is not None and set(item_ids) <= set(data.items.item_ids):
        items = data.items.align(item_ids)
    return replace(data, item_ids=item_ids, sequences=sequences, items=items)
