"""CatalogueIndex: identifiers that change in training, with a version, so that tokenizer, model and trie move together.

A model learns the codes of one catalogue. When a joint method (ETEGRec, arXiv 2409.05546; IDGenRec, 2403.19021) gives the
items other codes, everything that holds the old ones is stale at once: the tokenizer's table, the model's copy of it and
its `catalogue_fingerprint`, the trie of the search, and batches on their way. `CatalogueIndex.reassign` is the only door;
collators made for a version refuse to serve another one.

The layout never changes: the same number of levels, codebook sizes and vocabulary, so weights keep their meaning.

Shape suffixes: N items, L levels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hf_genrec.errors import IncompatibleComponentsError
from hf_genrec.generation.requests import check_fingerprint
from hf_genrec.identifiers.catalogue_file import Catalogue


def with_codes(tokenizer: Any, codes_NL: Any) -> Any:
    """A copy of an item tokenizer in which the same items have other codes of the same layout.

    Args:
        tokenizer: any tokenizer with a catalogue; it is not changed.
        codes_NL: integers, -1 behind the end of a shorter code.

    Raises:
        IncompatibleComponentsError: another number of items or levels.
        ItemTableError: a code outside its codebook.

    Example:
        >>> from hf_genrec.identifiers.tokenization_item import ItemTokenizer
        >>> first = ItemTokenizer.from_codes(["a", "b"], [[0, 1], [1, 0]])
        >>> second = with_codes(first, [[1, 1], [0, 0]])
        >>> first.item_to_codes("a").tolist(), second.item_to_codes("a").tolist()
        ([0, 1], [1, 1])
    """
    codes = np.asarray(codes_NL)
    if codes.shape != tokenizer.codes.shape:
        raise IncompatibleComponentsError(
            f"new codes have shape {codes.shape}, the catalogue {tokenizer.codes.shape}: a re-assignment keeps items and "
            "levels; build a new tokenizer and model for another layout."
        )
    changed = copy.deepcopy(tokenizer)
    changed._catalogue = Catalogue(tokenizer.item_ids, codes, tokenizer.codebook_sizes)
    changed.__dict__.pop("_item_token_table", None)
    return changed


class CatalogueIndex:
    """The identifiers in force: one tokenizer, the model that speaks it, and a version number.

    Args:
        model: has `config.catalogue_fingerprint`, and `set_catalogue(codes_NL)` where it keeps codes of its own.
        tokenizer: of the model's catalogue.
        version: number of the codes; 0 = those the model was built with.

    Raises:
        IncompatibleComponentsError: model and tokenizer of different catalogues.
    """

    def __init__(self, model: Any, tokenizer: Any, version: int = 0) -> None:
        check_fingerprint(model, tokenizer)
        self.model, self.tokenizer, self.version = model, tokenizer, int(version)

    def reassign(self, codes_NL: Any) -> int:
        """Give the items these codes: tokenizer, model and version move together. Returns how many items changed."""
        before = self.tokenizer.codes
        changed = int((np.asarray(codes_NL) != before).any(axis=1).sum())
        self.adopt(with_codes(self.tokenizer, codes_NL), self.version + 1)
        return changed

    def adopt(self, tokenizer: Any, version: int) -> None:
        """Continue with a tokenizer of the same layout (of a checkpoint, say) as this version.

        Raises:
            IncompatibleComponentsError: other items, codebook sizes or vocabulary.
        """
        mine = self.tokenizer
        layout = (tuple(tokenizer.codebook_sizes), len(tokenizer), list(tokenizer.item_ids))
        if layout != (tuple(mine.codebook_sizes), len(mine), list(mine.item_ids)):
            raise IncompatibleComponentsError(
                f"version {version} has {tokenizer.num_items} items with codebooks {tuple(tokenizer.codebook_sizes)}, the "
                f"model was built for {mine.num_items} with {tuple(mine.codebook_sizes)}: versions share one layout."
            )
        self.tokenizer, self.version = tokenizer, int(version)
        if hasattr(self.model, "set_catalogue"):
            self.model.set_catalogue(tokenizer.codes)
        self.model.config.catalogue_fingerprint = tokenizer.catalogue_fingerprint

    def check(self, version: int) -> None:
        """The codes of `version` must be the ones in force, in the tokenizer as in the model.

        Raises:
            IncompatibleComponentsError: they are not.
        """
        if version != self.version:
            raise IncompatibleComponentsError(
                f"this batch was made with the codes of index version {version}, the model speaks version {self.version}: "
                "make data sets and collators anew after each re-assignment."
            )
        check_fingerprint(self.model, self.tokenizer)

    def collator(self, make: Callable[[Any], Callable]) -> VersionedCollator:
        """`make(tokenizer)`, bound to the present version."""
        return VersionedCollator(self, make(self.tokenizer))


class VersionedCollator:
    """A collator of one index version: it refuses to make batches once the codes have moved on.

    Args:
        index: the identifiers in force.
        inner: collator of the present tokenizer.
    """

    def __init__(self, index: CatalogueIndex, inner: Callable) -> None:
        self.index, self.inner, self.version = index, inner, index.version

    def __call__(self, samples: Sequence[Any]) -> Any:
        self.index.check(self.version)
        return self.inner(samples)
