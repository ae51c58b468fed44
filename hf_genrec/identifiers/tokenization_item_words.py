"""ItemWordsTokenizer: items named by words: titles, numbers, generated text IDs, attribute strings.

The identifier of an item is a text, written with the vocabulary of any Rust-backed tokenizer and closed by one end
token, so that a sequence of items is a text too and a language model can learn it as it is. Used by title-based systems
(BIGRec, arXiv 2308.08434; D3, 2406.14900; TransRec, 2310.06491); running numbers as in P5 (2203.13366) are texts as well.

In terms of codes: every level has the whole vocabulary as its codebook and offset 0, the codes of an item are its token
ids, and shorter items are filled up with -1. Tries, searches and `recommend` work on them unchanged.

Item texts come from strangers: they are encoded by a backend in which control tokens do not exist (see segments.py), so
no title can forge an end token or a chat marker.

Shape legend: N items, L tokens of the longest identifier (its end token included).
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase, TokenizersBackend

from ..errors import ArtifactError, IncompatibleComponentsError, ItemTableError
from .catalogue import CatalogueMixin
from .catalogue_file import FILE_NAME, Catalogue
from .extend import carried_options
from .segments import text_encoder

ITEM_END = "<item_end>"


class ItemWordsTokenizer(CatalogueMixin, TokenizersBackend):
    """A text tokenizer whose catalogue names items by texts. Build it with `from_texts`.

    Args:
        item_codes_file: the catalogue file (`from_pretrained` gives it).
        item_end_token: the token that closes every identifier.
        unknown_items, history_eos, max_history: as in `ItemTokenizer`.

    Raises:
        ArtifactError: no catalogue file, or one that does not belong to the vocabulary.

    Example:
        tokenizer = ItemWordsTokenizer.from_texts(base_tokenizer, ["m1", "m2"], ["Star Wars", "Star Trek"])
        tokenizer.item_token_ids("m1")       # the tokens of "Star Wars", then the end token
    """

    vocab_files_names = {"tokenizer_file": "tokenizer.json", "item_codes_file": FILE_NAME}
    model_input_names = ["input_ids", "attention_mask"]
    padding_side = "left"
    truncation_side = "left"

    def __init__(
        self,
        item_codes_file: str | None = None,
        item_end_token: str = ITEM_END,
        unknown_items: str = "error",
        history_eos: bool = False,
        max_history: int | None = None,
        **kwargs,
    ):
        self._set_catalogue(item_codes_file, kwargs)
        self._set_catalogue_options(unknown_items, 0, history_eos, max_history)
        self.item_end_token = str(item_end_token)
        super().__init__(
            item_codes_file=item_codes_file,
            item_end_token=self.item_end_token,
            unknown_items=unknown_items,
            history_eos=history_eos,
            max_history=max_history,
            **kwargs,
        )
        self._forget_load_arguments()
        self.item_end_token_id = self.backend_tokenizer.token_to_id(self.item_end_token)
        ends = self.codes[np.arange(self.num_items), (self.codes >= 0).sum(axis=1) - 1]
        outside = int(self.codes.max()) >= len(self)
        if self.item_end_token_id is None or outside or (ends != self.item_end_token_id).any():
            raise ArtifactError(
                f"{self.name_or_path or 'tokenizer'}: the vocabulary (tokenizer.json) does not belong to this catalogue "
                f"({FILE_NAME}): save both again with save_pretrained"
            )

    @classmethod
    def from_texts(
        cls,
        base_tokenizer: PreTrainedTokenizerBase,
        item_ids: Iterable[str],
        texts: Sequence[str],
        *,
        max_tokens: int = 32,
        item_end_token: str = ITEM_END,
        unknown_items: str = "error",
        history_eos: bool = False,
        max_history: int | None = None,
    ) -> ItemWordsTokenizer:
        """Name items by texts. Items of the same text share an identifier.

        Args:
            base_tokenizer: any tokenizer with a Rust backend; it is not changed. The end token is added to it where it
                is missing, and `<pad>` where there is no padding token: resize the model afterwards.
            texts: one per item id; cut to `max_tokens` tokens, the end token included.

        Raises:
            ItemTableError: an empty text (item named), or another number of texts than of ids.
            IncompatibleComponentsError: no Rust backend, or a base tokenizer that carries a catalogue already.
        """
        if not isinstance(base_tokenizer, TokenizersBackend):
            raise IncompatibleComponentsError(
                f"base tokenizer {type(base_tokenizer).__name__} has no Rust backend (tokenizer.json): load the model's "
                "fast tokenizer with AutoTokenizer"
            )
        if isinstance(base_tokenizer, CatalogueMixin):
            raise IncompatibleComponentsError(
                f"base tokenizer already carries a catalogue of {base_tokenizer.num_items} items: use the original one"
            )
        if max_tokens < 2:
            raise IncompatibleComponentsError(f"max_tokens is {max_tokens}: an identifier needs a token and its end")
        ids, texts = list(item_ids), list(texts)
        if len(ids) != len(texts):
            raise ItemTableError(f"{len(texts)} texts for {len(ids)} items: give one text per item")
        pad = base_tokenizer._special_tokens_map.get("pad_token") or "<pad>"
        backend = copy.deepcopy(base_tokenizer.backend_tokenizer)
        new = [token for token in (str(pad), item_end_token) if backend.token_to_id(token) is None]
        backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in new])
        end = backend.token_to_id(item_end_token)
        encoder = text_encoder(base_tokenizer)
        rows: list[list[Any]] = []
        for item, text in zip(ids, texts, strict=True):
            try:
                text.encode("utf-8")
            except UnicodeEncodeError:
                raise ItemTableError(
                    f"item {item!r}: {text[:80]!r} holds a lone surrogate, which is not valid Unicode: read the source "
                    "again as UTF-8"
                ) from None
            tokens = encoder.encode(text)[: max_tokens - 1]
            if not tokens:
                raise ItemTableError(f"item {item!r}: {text!r} gives no token to name it by; give it a text")
            rows.append([*tokens, end])
        codes_NL = np.full((len(rows), max(map(len, rows), default=1)), -1, np.int32)
        for place, row in enumerate(rows):
            codes_NL[place, : len(row)] = row
        size = backend.get_vocab_size(with_added_tokens=True)
        return cls(
            **carried_options(base_tokenizer),
            pad_token=pad,
            tokenizer_object=backend,
            catalogue=Catalogue(ids, codes_NL, [size] * codes_NL.shape[1]),
            item_end_token=item_end_token,
            unknown_items=unknown_items,
            history_eos=history_eos,
            max_history=max_history,
        )

    @classmethod
    def convert_to_native_format(cls, trust_remote_code: bool = False, **kwargs) -> dict:
        # upstream takes tokenizer.json apart for classes with their own __init__; the backend reads it whole
        return kwargs

    @property
    def level_offsets(self) -> np.ndarray:
        """Zeros (L,): the codes of a text identifier are token ids."""
        return np.zeros(self.num_levels, np.int64)

    def _item_runs(self, ids_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where complete items start, and their codes (runs, L): the tokens up to each end token."""
        stops = np.flatnonzero(ids_n == self.item_end_token_id)
        control = np.isin(ids_n, [self.pad_token_id, self.bos_token_id, self.eos_token_id])
        starts, codes = [], []
        begin = 0
        for stop in stops.tolist():
            inside = np.flatnonzero(control[begin:stop])
            first = begin + int(inside[-1]) + 1 if len(inside) else begin
            row = ids_n[first : stop + 1][: self.num_levels]
            starts.append(first)
            codes.append(np.pad(row, (0, self.num_levels - len(row)), constant_values=-1))
            begin = stop + 1
        shape = (len(codes), self.num_levels)
        return np.asarray(starts, np.int64), np.asarray(codes, np.int64).reshape(shape)

    def _save_pretrained(self, save_directory, file_names, legacy_format=None, filename_prefix=None):
        files = super()._save_pretrained(save_directory, file_names, legacy_format, filename_prefix)
        name = f"{filename_prefix}-{FILE_NAME}" if filename_prefix else FILE_NAME
        path = os.path.join(str(save_directory), name)
        self._catalogue.write(path)
        return (*files, path)
