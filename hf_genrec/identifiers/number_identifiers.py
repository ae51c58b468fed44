"""Numbers as item names: "item_7391" (P5, arXiv 2203.13366), and the orders in which CID (2305.06569) counts them.

The number says nothing about the item; its order may: counted along the users' histories, neighbours in a history share
digits. A text tokenizer splits the number into pieces, so the digits are what a model sees. Unique by construction.

Shape suffixes: N items.
"""

from __future__ import annotations

import numpy as np

from ..errors import IncompatibleComponentsError

ORDERS = ("running", "random", "sequential")


def sequential_order(items: np.ndarray, num_items: int) -> np.ndarray:
    """Places (N,) from 0 by first appearance in `items`; items that never appear follow in catalogue order.

    Args:
        items: item indices of the training rows, one row after the other. Give the training part alone: a number that
            knows the test part tells the answer.

    Example:
        >>> sequential_order(np.array([3, 1, 3, 0]), 5).tolist()
        [2, 1, 3, 0, 4]
    """
    found, first = np.unique(np.asarray(items, np.int64), return_index=True)
    if len(found) and (found[0] < 0 or found[-1] >= num_items):
        raise IncompatibleComponentsError(
            f"item indices run from {found[0]} to {found[-1]}, but the catalogue has {num_items} items: use the "
            "sequences of this catalogue"
        )
    order = np.concatenate([found[np.argsort(first)], np.setdiff1d(np.arange(num_items), found)])
    places_N = np.empty(num_items, np.int64)
    places_N[order] = np.arange(num_items)
    return places_N


def item_numbers(
    num_items: int,
    order: str = "running",
    *,
    train_items: np.ndarray | None = None,
    first: int = 1,
    seed: int = 0,
) -> np.ndarray:
    """One number (N,) for every item, each used once.

    Args:
        order: "running" = catalogue order (P5), "random" = drawn (CID's RID), "sequential" = see `sequential_order`
            (CID's SID).
        train_items: for "sequential": the items of the training rows, one after the other.
        first: the smallest number.
        seed: of the random order.

    Raises:
        IncompatibleComponentsError: an unknown order, or "sequential" without training items.

    Example:
        >>> item_numbers(3, "sequential", train_items=np.array([2, 0, 2]), first=1001).tolist()
        [1002, 1003, 1001]
    """
    if order not in ORDERS:
        raise IncompatibleComponentsError(f"order is {order!r}: choose one of {', '.join(ORDERS)}")
    if order == "sequential":
        if train_items is None:
            raise IncompatibleComponentsError("order 'sequential' counts along histories: pass train_items")
        return first + sequential_order(train_items, num_items)
    if order == "random":
        return first + np.random.default_rng(seed).permutation(num_items)
    return first + np.arange(num_items)


def number_names(numbers_N: np.ndarray, prefix: str = "item_") -> list[str]:
    """Numbers written as names.

    Example:
        >>> number_names(np.array([7, 391]))
        ['item_7', 'item_391']
    """
    return [f"{prefix}{number}" for number in numbers_N.tolist()]
