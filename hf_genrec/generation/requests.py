"""What a request asks for, checked once and turned into item indices: histories, seen items, allow-lists, fingerprints.

Everything that can be wrong with a request fails here with one typed error, before the model runs.

Shape legend: B requests, N items, L levels, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import IncompatibleComponentsError, RequestError, UnknownItemError
from .trie import ItemTrie


def check_fingerprint(model: Any, tokenizer: Any) -> None:
    """The model must have been built for this tokenizer's catalogue (models without a fingerprint pass).

    Raises:
        IncompatibleComponentsError: the fingerprints differ.
    """
    expected = getattr(getattr(model, "config", None), "catalogue_fingerprint", None)
    actual = getattr(tokenizer, "catalogue_fingerprint", None)
    if expected and actual and expected != actual:
        raise IncompatibleComponentsError(
            f"the model was made for catalogue {expected[:12]}, the tokenizer carries {actual[:12]}; "
            "load both from the same folder, or build the model's config with from_tokenizer."
        )


def check_k(k: int | None, tokenizer: Any) -> None:
    """A k that was asked for must exist in the catalogue (a configured default is simply cut to it).

    Raises:
        RequestError: k above the number of items.
    """
    items = getattr(tokenizer, "num_items", None)
    if k is not None and items is not None and k > items:
        raise RequestError(f"k={k} items were asked for, the catalogue holds {items}; ask for at most {items}.")


def check_histories(histories: Any) -> list[list[str]]:
    """A list of histories, each a list of item ids.

    Raises:
        RequestError: not a list of lists of strings (row named).
    """
    if isinstance(histories, str | bytes) or not isinstance(histories, Sequence):
        raise RequestError("histories must be a list of histories, each a list of item ids: [['B0001', 'B0007'], ...].")
    rows = []
    for row, history in enumerate(histories):
        if isinstance(history, str | bytes) or not isinstance(history, Sequence | np.ndarray):
            raise RequestError(f"histories row {row} is {history!r}, not a list of item ids; wrap one user as [[...]].")
        ids = list(history)
        for item in ids:
            if not isinstance(item, str):
                raise RequestError(f"histories row {row} holds {item!r}; item ids are strings: use str(id).")
        rows.append(ids)
    return rows


def seen_from_histories(tokenizer: Any, histories: Sequence[Sequence[str]]) -> list[np.ndarray]:
    """Item indices of each history; ids outside the catalogue have nothing to exclude (the tokenizer judges them)."""
    lengths = [len(history) for history in histories]
    flat = tokenizer.item_index([item for history in histories for item in history])
    rows = np.split(np.asarray(flat, dtype=np.int64), np.cumsum(lengths)[:-1]) if histories else []
    return [row[row >= 0] for row in rows]


def seen_from_token_ids(input_ids: Any, trie: ItemTrie, level_offsets: Sequence[int]) -> list[np.ndarray]:
    """Item indices named anywhere in token rows (B, T): runs of L tokens that spell a full code of the catalogue.

    Tokens do not tell apart items that share a code: all items of such a code count as seen.
    """
    import torch

    levels = trie.num_levels
    ids = torch.as_tensor(input_ids, device=trie.device)
    if ids.shape[1] < levels:
        return [np.zeros(0, dtype=np.int64) for _ in range(ids.shape[0])]
    offsets = torch.as_tensor(np.asarray(level_offsets), device=trie.device)
    sizes = torch.tensor(trie.codebook_sizes, device=trie.device)
    codes = ids.unfold(1, levels, 1) - offsets
    spelled = ((codes >= 0) & (codes < sizes)).all(-1)
    leaves = torch.where(spelled, trie.lookup(codes.clamp(min=0)), -1).cpu()
    return [
        np.concatenate(
            [trie.items_of_leaf(leaf).cpu().numpy() for leaf in row[row >= 0].unique().tolist()] or [np.zeros(0, int)]
        )
        for row in leaves
    ]


def seen_from_prompts(tokenizer: Any, input_ids: Any, trie: ItemTrie) -> list[np.ndarray]:
    """`seen_from_token_ids`, or the tokenizer's own reading where its levels share their tokens.

    Merged feature sets (ActionPiece) and item texts cannot be cut into runs of L tokens: only their tokenizer can read them.
    """
    offsets = np.asarray(tokenizer.level_offsets)
    if len(offsets) == len(np.unique(offsets)) or not hasattr(tokenizer, "token_ids_to_items"):
        return seen_from_token_ids(input_ids, trie, tokenizer.level_offsets)
    rows = []
    for row in input_ids:
        named = [item for items in tokenizer.token_ids_to_items(row[row >= 0]) for item in items]
        rows.append(np.unique(np.asarray(tokenizer.item_index(named), dtype=np.int64)))
    return rows


def resolve_allowed(tokenizer: Any, allowed_items: Any, batch: int) -> list[np.ndarray] | None:
    """Allow-lists as item indices, one per request. One list of ids serves all requests; a list of lists gives each
    its own.

    Raises:
        RequestError: an empty list, the wrong number of lists, or something that is no id (row named).
        UnknownItemError: an id that is not in the catalogue (row and id named).
    """
    if allowed_items is None:
        return None
    if isinstance(allowed_items, str | bytes):
        raise RequestError("allowed_items must be a list of item ids, or one such list per request, not one string.")
    lists = list(allowed_items)
    if not lists:
        raise RequestError("allowed_items is empty, which leaves nothing to recommend; pass None to allow every item.")
    if all(isinstance(entry, str) for entry in lists):
        return [_indices(tokenizer, lists, "allowed_items")] * batch
    if any(isinstance(entry, str) for entry in lists):
        raise RequestError("allowed_items mixes item ids and lists; pass one list of ids, or one list per request.")
    if len(lists) != batch:
        raise RequestError(f"allowed_items holds {len(lists)} lists for {batch} requests; pass one list per request.")
    rows = []
    for row, entry in enumerate(lists):
        ids = list(entry)
        if not ids:
            raise RequestError(f"allowed_items row {row} is empty, which leaves nothing to recommend for that request.")
        rows.append(_indices(tokenizer, ids, f"allowed_items row {row}"))
    return rows


def _indices(tokenizer: Any, ids: list[Any], where: str) -> np.ndarray:
    for item in ids:
        if not isinstance(item, str):
            raise RequestError(f"{where} holds {item!r}; item ids are strings: use str(id).")
    index = np.asarray(tokenizer.item_index(ids), dtype=np.int64)
    unknown = [ids[i] for i in np.flatnonzero(index < 0)]
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise UnknownItemError(
            f"{where}: {', '.join(map(repr, unknown[:3]))}{more} not in the catalogue of {tokenizer.num_items} items; "
            "remove them, or use the tokenizer whose catalogue holds them."
        )
    return index


def item_rows(tokenizer: Any, rows: Any, where: str, trie: ItemTrie) -> list[np.ndarray]:
    """Item lists as rows of indices: one list (-> one row) or a list of lists; ids need a tokenizer, indices are
    checked.

    Raises:
        RequestError: ids without a tokenizer, or an index outside the catalogue.
        UnknownItemError: an id that is not in the catalogue.
    """
    lists = list(rows)
    if not lists or isinstance(lists[0], str | int | np.integer):
        lists = [lists]
    result = []
    for number, row in enumerate(lists):
        entries = list(row)
        if entries and isinstance(entries[0], str):
            if tokenizer is None:
                raise RequestError(f"{where} holds item ids, which need a tokenizer; pass it instead of a trie.")
            result.append(_indices(tokenizer, entries, f"{where} row {number}"))
            continue
        indices = np.asarray(entries, dtype=np.int64)
        if len(indices) and (indices.min() < 0 or indices.max() >= trie.num_items):
            raise RequestError(f"{where} row {number} holds an item index outside 0..{trie.num_items - 1}.")
        result.append(indices)
    return result


def check_something_left(allowed: Sequence[np.ndarray] | None, seen: Sequence[np.ndarray] | None) -> None:
    """An allow-list must leave at least one item once the seen ones are out.

    Raises:
        RequestError: nothing is left for a request (row named).
    """
    if allowed is None or seen is None:
        return
    for row, (keep, out) in enumerate(zip(allowed, seen, strict=True)):
        if np.isin(keep, out).all():
            raise RequestError(
                f"row {row}: all {len(keep)} allowed items are in the user's history, which leaves nothing to "
                "recommend; "
                "widen allowed_items or pass exclude_seen=False."
            )
