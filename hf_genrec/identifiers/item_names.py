"""Item names of any kind over any Rust-backed text tokenizer: words, new tokens, or both (CID, arXiv 2305.06569).

`ItemWordsTokenizer.from_texts` names items by texts alone; here a name may also hold tokens that are new to the
vocabulary, and no two items end up with the same name.

Relations: names of words alone that differ are `ItemWordsTokenizer.from_texts`.

Shape suffixes: N items, L tokens of the longest name (its end token included).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import numpy as np
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase, TokenizersBackend

from ..errors import IncompatibleComponentsError, ItemTableError
from .catalogue import CatalogueMixin
from .catalogue_file import Catalogue
from .extend import carried_options
from .segments import encode_segments
from .tokenization_item_words import ITEM_END, ItemWordsTokenizer


def distinct_rows(
    rows: Sequence[Sequence[int]], suffixes: Sequence[Sequence[int]] | None, max_length: int
) -> list[list[int]]:
    """The rows, cut to `max_length`, none twice: repeated ones end in a suffix, shortened to make room for it.

    Args:
        rows: token ids, one row per item.
        suffixes: what the second, third, ... item of the same row gets; None = nothing can be put behind a row.

    Raises:
        ItemTableError: more equal rows than suffixes.

    Example:
        >>> distinct_rows([[5, 6, 7], [5, 6, 8], [9]], [[1], [2]], max_length=2)
        [[5, 6], [5, 1], [9]]
    """
    cut = [list(row[:max_length]) for row in rows]
    taken: set[tuple[int, ...]] = set()
    clashes = []
    for place, row in enumerate(cut):  # the first of equal rows keeps its name
        if tuple(row) in taken:
            clashes.append(place)
        taken.add(tuple(row))
    next_suffix: dict[tuple[int, ...], int] = {}
    for place in clashes:
        whole = tuple(cut[place])
        for number in range(next_suffix.get(whole, 0), len(suffixes or ())):
            suffix = list((suffixes or ())[number])
            row = [*whole[: max(0, max_length - len(suffix))], *suffix]
            if tuple(row) not in taken:
                break
        else:
            raise ItemTableError(f"row {place}: {len(clashes)} items share their name and cannot be told apart")
        next_suffix[whole] = number + 1
        taken.add(tuple(row))
        cut[place] = row
    return cut


def tokenizer_from_names(
    base_tokenizer: PreTrainedTokenizerBase,
    item_ids: Iterable[str],
    names: Sequence[str | Sequence[str]],
    *,
    max_tokens: int = 32,
    item_end_token: str = ITEM_END,
) -> ItemWordsTokenizer:
    """A text tokenizer whose catalogue names items by texts or by new tokens, each name once.

    Args:
        base_tokenizer: any tokenizer with a Rust backend; it is not changed. Resize the model afterwards.
        names: per item a text (untrusted: it never yields a control token), or a list of tokens of its own, which join
            the vocabulary as special tokens.
        max_tokens: longest name in tokens, the end token included. Texts are cut; items that then have the same tokens
            are numbered, " 2" behind the second one and so on.

    Raises:
        ItemTableError: a text that gives no token, another number of names than of ids, lists of tokens that are not
            unique.
        IncompatibleComponentsError: no Rust backend, a tokenizer that carries a catalogue, a new token that the vocabulary
            holds already.

    Example:
        tokenizer = tokenizer_from_names(base, ["m1", "m2"], [["<CI1>", "<A1>"], ["<CI1>", "<A2>"]])
        tokenizer.convert_ids_to_tokens(tokenizer.item_token_ids("m2"))      # ['<CI1>', '<A2>', '<item_end>']
    """
    if not isinstance(base_tokenizer, TokenizersBackend) or isinstance(base_tokenizer, CatalogueMixin):
        raise IncompatibleComponentsError(
            f"base tokenizer {type(base_tokenizer).__name__} must be a text tokenizer with a Rust backend and without a "
            "catalogue: load the model's own one with AutoTokenizer"
        )
    ids, names = list(item_ids), list(names)
    if len(ids) != len(names):
        raise ItemTableError(f"{len(names)} names for {len(ids)} items: give one per item")
    pad = str(base_tokenizer._special_tokens_map.get("pad_token") or "<pad>")
    backend = copy.deepcopy(base_tokenizer.backend_tokenizer)
    tokens = dict.fromkeys(token for name in names if not isinstance(name, str) for token in name)
    present = next((token for token in tokens if backend.token_to_id(token) is not None), None)
    if present is not None:
        raise IncompatibleComponentsError(f"token {present!r} is in the vocabulary already: choose another prefix")
    missing = [token for token in (pad, item_end_token) if backend.token_to_id(token) is None]
    new = [AddedToken(token, normalized=False, special=True) for token in (*missing, *tokens)]
    backend.add_special_tokens(new)
    end = backend.token_to_id(item_end_token)
    assert end is not None  # it was added where it was missing
    known = {token: backend.token_to_id(token) for token in tokens}

    rows: list[list[int]] = []
    for item, name in zip(ids, names, strict=True):
        if isinstance(name, str):
            row = encode_segments(base_tokenizer, [("text", name)])
        else:
            row = [known[token] for token in name]
        if not row:
            raise ItemTableError(f"item {item!r}: {name!r} gives no token to name it by; give it a text")
        rows.append(row)
    if all(isinstance(name, str) for name in names):
        suffixes = [encode_segments(base_tokenizer, [("text", f" {number}")]) for number in range(2, len(ids) + 2)]
        rows = distinct_rows(rows, suffixes, max_tokens - 1)
    elif max(map(len, rows), default=0) >= max_tokens or len({tuple(row) for row in rows}) < len(rows):
        raise ItemTableError(
            f"names of new tokens must be unique and shorter than max_tokens={max_tokens}; the longest has "
            f"{max(map(len, rows))} tokens, {len(rows) - len({tuple(row) for row in rows})} are used twice"
        )
    codes_NL = np.full((len(rows), max(map(len, rows), default=0) + 1), -1, np.int32)
    for place, row in enumerate(rows):
        codes_NL[place, : len(row) + 1] = [*row, end]
    size = backend.get_vocab_size(with_added_tokens=True)
    return ItemWordsTokenizer(
        **carried_options(base_tokenizer),
        pad_token=pad,
        tokenizer_object=backend,
        catalogue=Catalogue(ids, codes_NL, [size] * codes_NL.shape[1]),
        item_end_token=item_end_token,
    )
