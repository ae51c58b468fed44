"""Unique identifiers from lists of candidates: the choice behind regenerated text ids (IDGenRec, arXiv 2403.19021).

A generator proposes several texts per item, best first; every item gets one that no other item has. Items for which
nothing is left are named by -1, and the caller generates more for them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Hashable, Sequence

import numpy as np


def pick_unique(candidates: Sequence[Sequence[Hashable]], taken: Collection[Hashable] = ()) -> np.ndarray:
    """Which of its candidates each item gets, int64 (N,): a position in its list, -1 where none can be free.

    Guarantee: no two items get equal candidates, nobody gets one of `taken`, and as many items as possible get one. Items
    choose in their order, each the first candidate nobody has; only where all of an item's candidates are in use do
    earlier items change over to other candidates of their own lists, as few as possible.

    Args:
        candidates: per item its candidates in order of preference, e.g. texts or tuples of codes; equal ones compare
            equal.
        taken: candidates that are used elsewhere.

    Relations: while nobody has to change over, this is the plain rule "take your first unused candidate".

    Example:
        >>> pick_unique([["red shoe", "shoe"], ["red shoe", "boot"], ["boot"]]).tolist()
        [1, 0, 0]
        >>> pick_unique([["shoe"], ["shoe"]]).tolist()
        [0, -1]
    """
    blocked = set(taken)
    owner: dict[Hashable, int] = {}
    choice_N = np.full(len(candidates), -1, dtype=np.int64)
    for item in range(len(candidates)):
        # breadth first over "who could make room by changing over": the first free candidate ends the search
        came_from: dict[int, tuple[int, int]] = {}  # item -> (the item that wants its candidate, position in its list)
        queue, seen = deque([item]), set(blocked)
        found: tuple[int, int] | None = None
        while queue and found is None:
            one = queue.popleft()
            for position, candidate in enumerate(candidates[one]):
                if candidate in seen:
                    continue
                seen.add(candidate)
                if candidate not in owner:
                    found = (one, position)
                    break
                came_from[owner[candidate]] = (one, position)
                queue.append(owner[candidate])
        while found is not None:
            one, position = found
            choice_N[one] = position
            owner[candidates[one][position]] = one
            found = came_from.get(one) if one != item else None
    return choice_N
