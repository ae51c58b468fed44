"""Items that join, leave or are coded anew, without training: the catalogue's life after the model.

A code is a function of the item's vector, so a new item is quantized with the fitted quantizer (as semantic IDs promise,
TIGER, arXiv 2305.05065, section on new items) and can be generated at once by a model that never saw it. Codes of the other
items are never touched: their tokens are what the model has learnt. Codebook sizes never change either, so a vocabulary, and
every table of the model that is made from it, stays valid.

Shape legend: N items, M items added, L levels of the quantizer, C codes of a level, P dimensions of the codebook space.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..errors import IncompatibleComponentsError, ItemTableError, UnknownItemError
from .catalogue_file import Catalogue
from .collision_groups import as_array, check_codes
from .health import IdentifierHealth, identifier_health

COLLISIONS = ("auto", "counter", "nearest", "keep")
WHEN_FULL = ("error", "nearest")


@dataclass(frozen=True)
class CatalogueChange:
    """A changed catalogue, and what changed.

    Attributes:
        tokenizer: of the new catalogue; the one it was made from is as it was.
        kept_rows: row in the old catalogue of every item that stays; these come first, in their order.
        added, removed, reassigned: item ids.
        moved: of the new codes, how many are not the nearest ones because those were taken.
        before, after: health of the codes.
    """

    tokenizer: Any
    kept_rows: np.ndarray
    added: tuple[str, ...]
    removed: tuple[str, ...]
    reassigned: tuple[str, ...]
    moved: int
    before: IdentifierHealth
    after: IdentifierHealth

    def to_dict(self) -> dict[str, Any]:
        """Plain values: counts, ids, and before and after of every figure of the health that changed."""
        before, after = asdict(self.before), asdict(self.after)
        changed = {name: [before[name], after[name]] for name in before if before[name] != after[name]}
        return {
            "added": list(self.added),
            "removed": list(self.removed),
            "reassigned": list(self.reassigned),
            "moved": self.moved,
            "num_items": [self.before.num_items, self.after.num_items],
            "health": changed,
        }

    def __str__(self) -> str:
        counts = [f"{len(getattr(self, name))} {name}" for name in ("added", "removed", "reassigned")]
        lines = [f"{', '.join(counts)}; {self.before.num_items} -> {self.after.num_items} items"]
        if self.moved:
            lines.append(f"{self.moved} new codes are not the nearest ones, which were taken")
        for name in ("collision_rate", "largest_group", "utilisation", "perplexity"):
            old, new = getattr(self.before, name), getattr(self.after, name)
            if old != new:
                lines.append(f"{name}: {_short(old)} -> {_short(new)}")
        return "\n".join(lines)


def _short(value: Any) -> str:
    return "[" + ", ".join(f"{v:.3g}" for v in value) + "]" if isinstance(value, list) else f"{value:.4g}"


def add_items(
    tokenizer: Any,
    quantizer: Any,
    item_ids: Sequence[str],
    vectors: Any = None,
    *,
    codes: Any = None,
    collisions: str = "auto",
    when_full: str = "error",
) -> CatalogueChange:
    """Codes for new items by a fitted quantizer; they come behind the items that are there, whose codes stay.

    Args:
        tokenizer: with a catalogue of codes (an `ItemTokenizer`, or one inside a text tokenizer).
        quantizer: the one that made the codes; None when `codes` are given.
        item_ids: M new ids.
        vectors: (M, E) as the quantizer was fitted on.
        codes: (M, L) instead of vectors: full codes, or feature sets for an `ActionPieceTokenizer`. Taken as they are.
        collisions: a new item whose code is taken gets the next free number of the digit behind the quantizer's codes
            ("counter"), the nearest free code ("nearest"), or shares the code ("keep"). "auto": what the catalogue does: a
            number where it has that digit, else "nearest" where no two items share a code, else "keep".
        when_full: no number is free ("counter"): "error", or "nearest".

    Raises:
        ItemTableError: ids that are in the catalogue already, repeat, or are no strings; vectors that do not match.
        IncompatibleComponentsError: identifiers for which there is no new code (one code per item, texts), a quantizer of
            other codebooks, a full digit, or no free code.

    Example:
        >>> from hf_genrec.identifiers.quantizers.residual_kmeans import ResidualKMeans
        >>> from hf_genrec.identifiers.tokenization_item import ItemTokenizer
        >>> x = np.array([[0.0, 0.0], [0.0, 1.0], [9.0, 0.0], [9.0, 1.0]])
        >>> quantizer = ResidualKMeans([2, 2]).fit(x)
        >>> tokenizer = ItemTokenizer.from_codes(["a", "b", "c"], quantizer.encode(x[:3]), [2, 2])
        >>> change = add_items(tokenizer, quantizer, ["d"], x[3:])
        >>> bool((change.tokenizer.item_to_codes("d") == quantizer.encode(x[3:])[0].numpy()).all())
        True
    """
    ids = _checked_new(tokenizer, item_ids)
    old_NL, sizes = _codes_of(tokenizer)
    if codes is not None:
        new_ML, moved = as_array(codes), 0
        if new_ML.ndim != 2 or new_ML.shape != (len(ids), old_NL.shape[1]):
            raise ItemTableError(
                f"codes have shape {new_ML.shape}, not ({len(ids)}, {old_NL.shape[1]}): give the full code of every new item"
            )
    else:
        new_ML, moved = _new_codes(
            tokenizer, old_NL, sizes, quantizer, vectors, len(ids), collisions=collisions, when_full=when_full
        )
    catalogue = Catalogue([*tokenizer.item_ids, *ids], np.concatenate([old_NL, new_ML]), sizes)
    return _change(tokenizer, catalogue, np.arange(len(old_NL)), added=tuple(ids), moved=moved)


def remove_items(tokenizer: Any, item_ids: Sequence[str]) -> CatalogueChange:
    """The catalogue without some items: they cannot be generated, and cannot be read in a history, any more.

    Raises:
        UnknownItemError: an id that is not in the catalogue.
        ItemTableError: nothing would be left.
    """
    rows = _known_rows(tokenizer, item_ids)
    kept_N = np.setdiff1d(np.arange(tokenizer.num_items), rows)
    if not len(kept_N):
        raise ItemTableError("removing all items leaves no catalogue: keep at least one")
    _refuse_atomic(tokenizer, "an item cannot leave the catalogue")
    old_NL, sizes = _codes_of(tokenizer)
    catalogue = Catalogue([tokenizer.item_ids[row] for row in kept_N], old_NL[kept_N], sizes)
    return _change(tokenizer, catalogue, kept_N, removed=tuple(item_ids))


def reassign(
    tokenizer: Any,
    quantizer: Any,
    item_ids: Sequence[str],
    vectors: Any,
    *,
    collisions: str = "auto",
    when_full: str = "error",
) -> CatalogueChange:
    """New codes for items of the catalogue whose vectors changed (a corrected text, a new picture); rows stay in place.

    What the model learnt of such an item under its old code is lost to it. Arguments and errors: see `add_items`.

    Raises:
        UnknownItemError: an id that is not in the catalogue.
    """
    rows = _known_rows(tokenizer, item_ids)
    old_NL, sizes = _codes_of(tokenizer)
    others = np.setdiff1d(np.arange(tokenizer.num_items), rows)
    new_ML, moved = _new_codes(
        tokenizer, old_NL[others], sizes, quantizer, vectors, len(rows), collisions=collisions, when_full=when_full
    )
    codes_NL = old_NL.copy()
    codes_NL[rows] = new_ML
    catalogue = Catalogue(tokenizer.item_ids, codes_NL, sizes)
    everything = np.arange(tokenizer.num_items)
    return _change(tokenizer, catalogue, everything, reassigned=tuple(item_ids), moved=moved)


# ------------------------------------------------------------------------------------------------------------ checking


def _codes_of(tokenizer: Any) -> tuple[np.ndarray, tuple[int, ...]]:
    """Codes (N, L) int64 and sizes; feature sets where these are what a tokenizer stores."""
    if hasattr(tokenizer, "feature_sizes"):
        return np.asarray(tokenizer.features, np.int64), tuple(tokenizer.feature_sizes)
    return np.asarray(tokenizer.codes, np.int64), tuple(tokenizer.codebook_sizes)


def _refuse_atomic(tokenizer: Any, what: str) -> None:
    if hasattr(tokenizer, "item_end_token"):
        raise IncompatibleComponentsError(
            f"{type(tokenizer).__name__} names items by texts, and {what} without new tables: build the tokenizer anew with "
            "from_texts and train again"
        )
    if (
        tokenizer.num_levels == 1
        and tokenizer.codebook_sizes[0] >= tokenizer.num_items > 1
        and _all_different(tokenizer)
    ):
        raise IncompatibleComponentsError(
            f"this catalogue has one code per item (atomic identifiers), and {what} without training: the model has a vector "
            "for every code and none for another item; use identifiers made of several codes"
        )


def _all_different(tokenizer: Any) -> bool:
    return len(np.unique(tokenizer.codes[:, 0])) == tokenizer.num_items


def _checked_new(tokenizer: Any, item_ids: Sequence[str]) -> list[str]:
    _refuse_atomic(tokenizer, "a new item has no code")
    ids = [item_ids] if isinstance(item_ids, str) else list(item_ids)
    if not ids:
        raise ItemTableError("no item to add: give at least one id")
    known = tokenizer._catalogue.index_of
    seen: set[str] = set()
    for place, item in enumerate(ids):
        if not isinstance(item, str):
            raise ItemTableError(f"new item {place}: {item!r} is no string: convert ids with str()")
        if item in known:
            raise ItemTableError(
                f"new item {place}: {item!r} is in the catalogue already (row {known[item]}); reassign gives it a new code"
            )
        if item in seen:
            raise ItemTableError(f"new item {place}: {item!r} is named twice: give each id once")
        seen.add(item)
    return ids


def _known_rows(tokenizer: Any, item_ids: Sequence[str]) -> np.ndarray:
    if isinstance(item_ids, str) or not len(item_ids):
        raise ItemTableError("give a list of at least one item id")
    rows = np.array([tokenizer._catalogue.index_of_one(item) for item in item_ids])
    distinct, first = np.unique(rows, return_index=True)
    if len(distinct) < len(rows):
        place = int(np.setdiff1d(np.arange(len(rows)), first)[0])
        raise UnknownItemError(f"position {place}: item {item_ids[place]!r} is named twice: give each id once")
    return rows


def _change(
    tokenizer: Any,
    catalogue: Catalogue,
    kept_rows: np.ndarray,
    *,
    added: tuple[str, ...] = (),
    removed: tuple[str, ...] = (),
    reassigned: tuple[str, ...] = (),
    moved: int = 0,
) -> CatalogueChange:
    old_NL, sizes = _codes_of(tokenizer)
    new = _with_catalogue(tokenizer, catalogue)
    before, after = identifier_health(old_NL, sizes), identifier_health(catalogue.codes, sizes)
    return CatalogueChange(new, kept_rows, added, removed, reassigned, moved, before, after)


def _with_catalogue(tokenizer: Any, catalogue: Catalogue) -> Any:
    """The same tokenizer over another catalogue of equal codebooks: the vocabulary does not change."""
    if hasattr(tokenizer, "feature_sizes"):
        options = {name: getattr(tokenizer, name) for name in ("unknown_items", "num_user_tokens", "history_eos")}
        return type(tokenizer)(
            catalogue=catalogue,
            set_vocabulary=tokenizer.set_vocabulary,
            segmentations=tokenizer.segmentations,
            max_history=tokenizer.max_history,
            **options,
        )
    new = copy.deepcopy(tokenizer)
    new._catalogue = catalogue
    new.__dict__.pop("_item_token_table", None)
    return new


# --------------------------------------------------------------------------------------------------------------- codes


def _new_codes(
    tokenizer: Any,
    others_NL: np.ndarray,
    sizes: tuple[int, ...],
    quantizer: Any,
    vectors: Any,
    count: int,
    *,
    collisions: str,
    when_full: str,
) -> tuple[np.ndarray, int]:
    """Full codes (M, L) beside those of the other items, and how many had to move."""
    for name, value, choices in (("collisions", collisions, COLLISIONS), ("when_full", when_full, WHEN_FULL)):
        if value not in choices:
            raise IncompatibleComponentsError(f"{name} is {value!r}: choose one of {', '.join(choices)}")
    if hasattr(tokenizer, "feature_sizes"):
        raise IncompatibleComponentsError(
            "feature sets are made of codes, attributes and a bucket, which no quantizer makes alone: give codes= (one feature "
            "per level) for every new item"
        )
    if quantizer is None or vectors is None:
        raise IncompatibleComponentsError(
            "new codes need the fitted quantizer and the vectors of the items (or codes=): neither can be guessed"
        )
    vectors_ME = as_array(vectors)
    if vectors_ME.ndim != 2 or len(vectors_ME) != count:
        raise ItemTableError(f"vectors have shape {vectors_ME.shape}: give one row for each of the {count} items")
    if "taken_NL" in inspect.signature(quantizer.encode).parameters:  # trees find free leaves themselves
        found_ML = as_array(quantizer.encode(vectors_ME, taken_NL=others_NL))
        codes_ML, _ = check_codes(_padded(found_ML, len(sizes)), sizes)
        return codes_ML, 0
    base_ML = as_array(quantizer.encode(vectors_ME)).astype(np.int64)
    levels = base_ML.shape[1]
    own = tuple(int(size) for size in _sizes_of(quantizer))
    if levels not in (len(sizes), len(sizes) - 1) or own != sizes[:levels]:
        raise IncompatibleComponentsError(
            f"the quantizer makes codes of {own}, the catalogue has codebooks {sizes}: give the quantizer that made its codes"
        )
    if collisions == "auto":
        unique = len(np.unique(others_NL, axis=0)) == len(others_NL)
        collisions = "counter" if levels < len(sizes) else ("nearest" if unique else "keep")
    if (collisions == "counter") != (levels < len(sizes)):
        raise IncompatibleComponentsError(
            f"collisions={collisions!r} does not fit: the catalogue has {len(sizes)} levels, the quantizer {levels}; "
            f"use {'counter' if levels < len(sizes) else 'nearest or keep'!r}"
        )
    if collisions == "keep":
        return base_ML, 0
    return _free_codes(base_ML, others_NL, sizes, quantizer, vectors_ME, when_full)


def _padded(codes_ML: np.ndarray, levels: int) -> np.ndarray:
    if codes_ML.shape[1] > levels:
        raise IncompatibleComponentsError(
            f"the quantizer gives {codes_ML.shape[1]} codes, the catalogue has {levels} levels: it did not make its codes"
        )
    return np.pad(codes_ML, ((0, 0), (0, levels - codes_ML.shape[1])), constant_values=-1)


def _sizes_of(quantizer: Any) -> Sequence[int]:
    sizes = getattr(quantizer, "codebook_sizes", None)
    return sizes if sizes is not None else quantizer.config.codebook_sizes


def _free_codes(
    base_ML: np.ndarray,
    others_NL: np.ndarray,
    sizes: tuple[int, ...],
    quantizer: Any,
    vectors_ME: np.ndarray,
    when_full: str,
) -> tuple[np.ndarray, int]:
    """Each new item on its base code where that has room, else moved; earlier items first."""
    levels = base_ML.shape[1]
    numbered = levels < len(sizes)
    taken: dict[tuple[int, ...], set[int]] = {}
    for row in others_NL.tolist():
        taken.setdefault(tuple(row[:levels]), set()).add(row[levels] if numbered else 0)

    def free(base: tuple[int, ...]) -> int | None:
        """A number for the base code, -1 where numbers are only given to items that share a code, None if it is full."""
        used = taken.get(base, set())
        if -1 in used:  # the item there has no number, and would become the beginning of this one's code
            return None
        return next((number for number in range(sizes[levels] if numbered else 1) if number not in used), None)

    rows, moved = [], 0
    books: list[np.ndarray] | None = None
    for place, base in enumerate(map(tuple, base_ML.tolist())):
        number = free(base)
        if number is None:
            if numbered and when_full == "error":
                raise IncompatibleComponentsError(
                    f"new item {place}: all numbers of code {list(base)} are taken (the digit has {sizes[levels]}); pass "
                    "when_full='nearest' to give it the nearest free code, or train with a larger digit"
                )
            if books is None:
                books, features_MP = _codebooks(quantizer, vectors_ME)
            for base in _by_distance(features_MP[place], books):
                number = free(base)
                if number is not None:
                    break
            else:
                raise IncompatibleComponentsError(f"new item {place}: no free code is left: use more codes per level")
            moved += 1
        taken.setdefault(base, set()).add(number)
        rows.append([*base, number] if numbered else list(base))
    return np.array(rows, np.int64).reshape(len(rows), len(sizes)), moved


def _codebooks(quantizer: Any, vectors_ME: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """Codebooks (C, P) of all levels and the vectors in their space; a code stands for the sum of its levels' rows."""
    padded = getattr(quantizer, "padded_codebooks", None)
    books = padded() if padded is not None else getattr(quantizer, "codebooks", None)
    if books is None or not hasattr(quantizer, "transform"):
        raise IncompatibleComponentsError(
            f"{type(quantizer).__name__} has no codebooks to look for the nearest free code in: choose collisions='keep'"
        )
    import torch

    with torch.no_grad():
        features_MP = as_array(quantizer.transform(torch.as_tensor(np.asarray(vectors_ME, np.float32))))
    return [as_array(book).astype(np.float64) for book in books], features_MP.astype(np.float64)


def _by_distance(x_P: np.ndarray, books: list[np.ndarray]) -> Any:
    """Full codes near a point: other last codes first, then other codes one level up, and so on; nearest first there."""
    greedy: list[int] = []
    residuals = [x_P]
    for book in books:
        greedy.append(int(((residuals[-1] - book) ** 2).sum(1).argmin()))
        residuals.append(residuals[-1] - book[greedy[-1]])
    for level in range(len(books) - 1, -1, -1):
        order_C = np.argsort(((residuals[level] - books[level]) ** 2).sum(1), kind="stable")
        for code in order_C.tolist():
            start, rest = (*greedy[:level], code), residuals[level] - books[level][code]
            yield from _below(start, rest, books)


def _below(start: tuple[int, ...], rest_P: np.ndarray, books: list[np.ndarray]) -> Any:
    """All codes that begin with `start`, depth first, nearest first at every level."""
    if len(start) == len(books):
        yield start
        return
    book = books[len(start)]
    for code in np.argsort(((rest_P - book) ** 2).sum(1), kind="stable").tolist():
        yield from _below((*start, code), rest_P - book[code], books)
