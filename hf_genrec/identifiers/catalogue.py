"""The item methods of every tokenizer that carries a catalogue: ids <-> codes <-> token ids, histories by array gather.

One mixin, used by `ItemTokenizer` (item tokens only) and by `ItemTextTokenizer` (item tokens inside a text tokenizer).
User tokens follow TIGER (arXiv 2305.05065): a user id is hashed into a small set of tokens put before the history.

Shape legend: N items, L levels (codes per item), B rows, W width of the padded batch, n items.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
from transformers import BatchEncoding

from ..errors import ArtifactError, IncompatibleComponentsError, UnknownItemError
from .catalogue_file import FILE_NAME, Catalogue
from .histories import newest_items, newest_tokens, padded_tokens

logger = logging.getLogger(__name__)

UNKNOWN_ITEM_POLICIES = ("error", "skip")


def level_name(level: int) -> str:
    """Name of a level inside its tokens: a, b, ..., z, aa, ab, ..."""
    name = ""
    level += 1
    while level:
        level, letter = divmod(level - 1, 26)
        name = chr(ord("a") + letter) + name
    return name


def level_number(name: str) -> int:
    """Inverse of `level_name`."""
    number = 0
    for char in name:
        number = number * 26 + ord(char) - ord("a") + 1
    return number - 1


def item_token(level: int, code: int) -> str:
    """Text of one item token, `<a_12>` for code 12 of the first level."""
    return f"<{level_name(level)}_{code}>"


def item_tokens(codebook_sizes: Sequence[int]) -> list[str]:
    """All item tokens, level by level."""
    names = [level_name(level) for level in range(len(codebook_sizes))]
    return [f"<{name}_{code}>" for name, size in zip(names, codebook_sizes) for code in range(size)]


def user_tokens(num_user_tokens: int) -> list[str]:
    """All user tokens, `<user_0>` first."""
    return [f"<user_{number}>" for number in range(num_user_tokens)]


def user_token_index(user_id: str, num_user_tokens: int) -> int:
    """Which user token a user id maps to: a hash that is the same in every process and on every machine."""
    digest = hashlib.blake2b(str(user_id).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") % num_user_tokens


class CatalogueMixin:
    """Item methods. The class that mixes it in sets the attributes below before it calls `super().__init__`.

    - `_catalogue` (Catalogue), `_first_code_id` (int: token id of code 0 of level 0; the codes of all levels follow
      without a gap), `_first_user_id` (int: token id of `<user_0>`)
    - `unknown_items` ("error" | "skip"), `num_user_tokens`, `history_eos`, `max_history`: the persisted options
    """

    _catalogue: Catalogue
    _first_code_id: int
    _first_user_id: int
    unknown_items: str
    num_user_tokens: int
    history_eos: bool
    max_history: int | None
    # most tokens of an encoded history with all that stands around it; only `ItemTextTokenizer` sets it
    max_history_tokens: int | None = None
    # what the tokenizer class beside the mixin gives
    init_kwargs: dict
    pad_token_id: int
    eos_token_id: int
    padding_side: str

    def _set_catalogue(self, item_codes_file: str | None, kwargs: dict) -> None:
        """Take the catalogue from the file or, for `from_codes` and the like, out of `kwargs`."""
        self._catalogue = kwargs.pop("catalogue", None)
        if self._catalogue is None and item_codes_file is not None:
            self._catalogue = Catalogue.read(item_codes_file)
        if self._catalogue is None and kwargs.get("name_or_path"):
            raise ArtifactError(f"{kwargs['name_or_path']}: {FILE_NAME} is missing: save the tokenizer there again")
        if self._catalogue is None:
            raise IncompatibleComponentsError(
                f"{type(self).__name__} needs a catalogue: use ItemTokenizer.from_codes(item_ids, codes) or "
                f"extend_tokenizer(base_tokenizer, item_tokenizer), or load a folder that holds {FILE_NAME}"
            )

    def _set_catalogue_options(self, unknown_items, num_user_tokens, history_eos, max_history) -> None:
        if unknown_items not in UNKNOWN_ITEM_POLICIES:
            raise IncompatibleComponentsError(
                f"unknown_items is {unknown_items!r}: choose one of {', '.join(UNKNOWN_ITEM_POLICIES)}"
            )
        if type(num_user_tokens) is not int or num_user_tokens < 0:
            raise IncompatibleComponentsError(f"num_user_tokens is {num_user_tokens!r}: give an integer of 0 or more")
        if max_history is not None and (type(max_history) is not int or max_history < 1):
            raise IncompatibleComponentsError(f"max_history is {max_history!r}: give a positive integer or None")
        self.unknown_items = unknown_items
        self.num_user_tokens = num_user_tokens
        self.history_eos = bool(history_eos)
        self.max_history = max_history

    # --- the catalogue -------------------------------------------------------------------------------------------

    @property
    def item_ids(self) -> list[str]:
        """The N item ids in catalogue order (do not change the list)."""
        return self._catalogue.item_ids

    @property
    def codes(self) -> np.ndarray:
        """Codes of all items, int32 (N, L), read-only; -1 behind the end of a code of fewer levels."""
        return self._catalogue.codes

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Number of codes of every level."""
        return self._catalogue.codebook_sizes

    @property
    def num_levels(self) -> int:
        return self._catalogue.num_levels

    @property
    def num_items(self) -> int:
        return self._catalogue.num_items

    @property
    def catalogue_fingerprint(self) -> str:
        """sha256 (hex) over ids, codes and codebook sizes."""
        return self._catalogue.fingerprint

    @property
    def level_offsets(self) -> np.ndarray:
        """Token id of code 0 of every level, int64 (L,)."""
        return self._first_code_id + np.cumsum((0, *self.codebook_sizes[:-1]), dtype=np.int64)

    @property
    def item_token_table(self) -> np.ndarray:
        """Token ids of all items, int64 (N, L) = codes + level_offsets, read-only; -1 where a code has ended."""
        table_NL = self.__dict__.get("_item_token_table")
        if table_NL is None:
            table_NL = np.where(self.codes < 0, -1, self.codes + self.level_offsets)
            table_NL.setflags(write=False)
            self.__dict__["_item_token_table"] = table_NL
        return table_NL

    def __getstate__(self) -> dict:
        state = dict(self.__dict__)
        state.pop("_item_token_table", None)  # derived: halves a pickle
        return state

    def _forget_load_arguments(self) -> None:
        """Drop what `from_pretrained` adds about its own call, so that loading and saving gives the same bytes."""
        for name in ("is_local", "local_files_only"):
            self.init_kwargs.pop(name, None)

    # --- one item ------------------------------------------------------------------------------------------------

    def item_index(self, ids: Sequence[str]) -> np.ndarray:
        """Catalogue row of every id, int64 (n,); -1 where the id is unknown."""
        return self._catalogue.item_index(ids)

    def item_to_codes(self, item_id: str) -> np.ndarray:
        """Codes of one item, int32 (L,). Raises UnknownItemError."""
        return self.codes[self._catalogue.index_of_one(item_id)]

    def codes_to_items(self, codes) -> list[list[str]]:
        """All items of the given code tuples, (L,) or (n, L) -> n lists of ids; an empty list where there is none."""
        return self._catalogue.codes_to_items(codes)

    def item_token_ids(self, item_id: str) -> list[int]:
        """The token ids of one item, one per level of its code. Raises UnknownItemError."""
        tokens_L = self.item_token_table[self._catalogue.index_of_one(item_id)]
        return tokens_L[tokens_L >= 0].tolist()

    def token_ids_to_items(self, token_ids) -> list[list[str]]:
        """Items named by a flat sequence of token ids, oldest first: one list of ids per complete run of L item tokens.

        Anything that is not a complete item (padding, text, the rest of a cut item) is passed over. A run that names no
        catalogue item gives an empty list, a run shared by several items gives all of them.
        """
        ids_n = np.asarray(token_ids.detach().cpu() if hasattr(token_ids, "detach") else token_ids, dtype=np.int64)
        starts_n, codes_nL = self._item_runs(ids_n.reshape(-1))
        return self._catalogue.codes_to_items(codes_nL) if len(starts_n) else []

    def _item_runs(self, ids_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where complete items start in a flat id sequence (ascending), and their codes (runs, L)."""
        num_levels = self.num_levels
        if self._catalogue.code_lengths is not None:
            return self._uneven_runs(ids_n)
        if len(ids_n) < num_levels:
            return np.zeros(0, np.int64), np.zeros((0, num_levels), np.int64)
        offsets_L, sizes_L = self.level_offsets, np.asarray(self.codebook_sizes)
        windows_nL = np.lib.stride_tricks.sliding_window_view(ids_n, num_levels) - offsets_L
        # levels have disjoint id ranges, so two complete runs never overlap
        starts_n = np.flatnonzero(((windows_nL >= 0) & (windows_nL < sizes_L)).all(axis=1))
        return starts_n, windows_nL[starts_n]

    def _uneven_runs(self, ids_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`_item_runs` for codes of several lengths: a token of the first level starts an item, the levels must follow
        each other, and the item ends before the first token that breaks the row.
        """
        level_n = np.searchsorted(self.level_offsets, ids_n, side="right") - 1
        inside_n = (level_n >= 0) & (ids_n < self.level_offsets[-1] + self.codebook_sizes[-1])
        starts_n = np.flatnonzero(inside_n & (level_n == 0))
        codes_nL = np.full((len(starts_n), self.num_levels), -1, np.int64)
        going_n = np.ones(len(starts_n), bool)
        for level in range(self.num_levels):
            place_n = np.minimum(starts_n + level, len(ids_n) - 1)
            going_n &= (starts_n + level < len(ids_n)) & inside_n[place_n] & (level_n[place_n] == level)
            codes_nL[going_n, level] = ids_n[place_n[going_n]] - self.level_offsets[level]
        return starts_n, codes_nL

    # --- histories -----------------------------------------------------------------------------------------------

    def encode_histories(
        self,
        histories: Sequence[Sequence[str]],
        user_ids: Sequence[str | None] | None = None,
        max_items: int | None = None,
        padding: bool | str = True,
        return_tensors: str | None = None,
    ) -> BatchEncoding:
        """Token ids of item histories (oldest item first), by array gather.

        Args:
            histories: B lists of item ids; an empty list is a legal row.
            user_ids: B user ids; each puts its hashed user token before the row (None: no token). Without effect
                when the tokenizer has no user tokens.
            max_items: keep the newest `max_items` items of each row (default: `max_history`; None keeps all).
            padding: True pads to the longest row at `padding_side`; False returns lists of different lengths.
            return_tensors: "pt", "np" or None (lists).

        Returns:
            `input_ids` and `attention_mask`, both (B, W). Attribute `skipped_items`: how many unknown items were left
            out (always 0 under `unknown_items="error"`).

        Raises:
            UnknownItemError: an id is not in the catalogue and the policy is "error".
        """
        lengths_B, index_n = self._look_up(histories)
        lengths_B, index_n, skipped = self._drop_unknown(histories, lengths_B, index_n)
        return self._encode(lengths_B, index_n, user_ids, max_items, padding, return_tensors, skipped)

    def encode_item_indices(
        self,
        rows,
        user_ids: Sequence[str | None] | None = None,
        max_items: int | None = None,
        padding: bool | str = True,
        return_tensors: str | None = "pt",
    ) -> BatchEncoding:
        """`encode_histories` for catalogue rows instead of ids: B integer arrays, or a `Sequences`. No id look-up."""
        if hasattr(rows, "offsets"):
            offsets = np.asarray(rows.offsets)
            lengths_B = np.diff(offsets)
            index_n = np.asarray(rows.items[offsets[0] : offsets[-1]], dtype=np.int64)
        else:
            lengths_B = np.fromiter(map(len, rows), np.int64, len(rows))
            index_n = np.concatenate([np.asarray(row, dtype=np.int64) for row in rows] or [np.zeros(0, np.int64)])
        if len(index_n) and (index_n.min() < 0 or index_n.max() >= self.num_items):
            place = int(np.flatnonzero((index_n < 0) | (index_n >= self.num_items))[0])
            row = int(np.searchsorted(np.cumsum(lengths_B), place, side="right"))
            raise UnknownItemError(
                f"row {row}: item index {int(index_n[place])} is outside 0..{self.num_items - 1}: "
                "item indices are rows of this tokenizer's catalogue"
            )
        return self._encode(lengths_B, index_n, user_ids, max_items, padding, return_tensors)

    def decode_histories(self, input_ids) -> list[list[str]]:
        """Item ids of each row of token ids (B, W): the inverse of `encode_histories`.

        Padding, user tokens and text are passed over, and so are code tuples that name no item. Where several items
        share a code tuple the first in catalogue order is given (`token_ids_to_items` gives all).
        """
        rows = input_ids.detach().cpu().numpy() if hasattr(input_ids, "detach") else input_ids
        histories = []
        for row in rows:
            _, codes_nL = self._item_runs(np.asarray(row, dtype=np.int64).reshape(-1))
            groups = self._catalogue.item_groups(codes_nL) if len(codes_nL) else []
            histories.append([self.item_ids[group[0]] for group in groups if len(group)])
        return histories

    def _look_up(self, histories: Sequence[Sequence[str]]) -> tuple[np.ndarray, np.ndarray]:
        """Row lengths (B,) and catalogue rows of all items, flat (n,); -1 marks an unknown item."""
        if isinstance(histories, str) or any(isinstance(row, str) for row in histories):
            raise UnknownItemError("a history is one string: give a list of histories, each a list of item ids")
        lengths_B = np.fromiter(map(len, histories), np.int64, len(histories))
        get = self._catalogue.index_of.get
        try:
            found = [get(item_id, -1) for item_id in chain.from_iterable(histories)]
        except TypeError as error:
            raise UnknownItemError(f"an item id is not a string ({error}): histories are lists of item ids") from None
        return lengths_B, np.array(found, dtype=np.int64)

    def known_item_index(self, ids: Sequence[str], where: str = "items") -> np.ndarray:
        """Catalogue row of every id, int64, under the policy for unknown items. `where` names the place in messages.

        Raises:
            UnknownItemError: an id is not in the catalogue and the policy is "error".
        """
        lengths_B, index_n = self._look_up([ids])
        return self._drop_unknown([ids], lengths_B, index_n, where)[1]

    def _drop_unknown(
        self, histories, lengths_B, index_n, where: str = "history row {row}"
    ) -> tuple[np.ndarray, np.ndarray, int]:
        """Apply the unknown-item policy: (lengths, indices, how many were left out). Raises UnknownItemError."""
        known_n = index_n >= 0
        unknown = len(index_n) - int(np.count_nonzero(known_n))
        if not unknown:
            return lengths_B, index_n, 0
        row_n = np.repeat(np.arange(len(lengths_B)), lengths_B)
        place = int(np.flatnonzero(~known_n)[0])
        row = int(row_n[place])
        item_id = histories[row][place - int(lengths_B[:row].sum())]
        label = where.format(row=row)
        hint = "" if isinstance(item_id, str) else f" (ids are strings, this is a {type(item_id).__name__})"
        if self.unknown_items != "skip":
            raise UnknownItemError(
                f"{label}: item {item_id!r}{hint} is not in this catalogue of {self.num_items} items "
                f"({unknown} unknown in this batch): remove it, rebuild the identifiers with it, "
                "or set tokenizer.unknown_items = 'skip' to leave unknown items out"
            )
        logger.warning("left out %d unknown items (the first is %r in %s)", unknown, item_id, label)
        return np.bincount(row_n[known_n], minlength=len(lengths_B)), index_n[known_n], unknown

    def _encode(self, lengths_B, index_n, user_ids, max_items, padding, return_tensors, skipped=0) -> BatchEncoding:
        limit = self.max_history if max_items is None else max_items
        if limit is not None:
            if limit < 0:
                raise IncompatibleComponentsError(f"max_items is {limit}: give 0 or more, or None for all items")
            lengths_B, index_n = newest_items(lengths_B, index_n, limit)
        if self.max_history_tokens is not None:
            lengths_B, index_n = self._within_tokens(lengths_B, index_n, user_ids)
        if padding not in (True, False, "longest", "do_not_pad"):
            raise IncompatibleComponentsError(f"padding is {padding!r}: choose True (longest row) or False")
        if return_tensors not in (None, "np", "pt"):
            raise IncompatibleComponentsError(f"return_tensors is {return_tensors!r}: choose 'pt', 'np' or None")
        ragged = padding in (False, "do_not_pad")
        if ragged and return_tensors is not None:
            raise IncompatibleComponentsError("rows of different lengths make no tensor: use padding=True")

        return self._packed(lengths_B, self.item_token_table[index_n], user_ids, ragged, return_tensors, skipped)

    def _history_template(self) -> tuple[list[int], list[int]]:
        """Token ids put before and after every history; `ItemTextTokenizer` has some."""
        return [], []

    def _within_tokens(self, lengths_B, index_n, user_ids) -> tuple[np.ndarray, np.ndarray]:
        """Histories cut from the oldest item to `max_history_tokens`, template and end token counted."""
        before, after = self._history_template()
        around_B = np.full(len(lengths_B), len(before) + len(after) + int(self.history_eos))
        users_B = self._user_token_ids(user_ids, len(lengths_B))
        if users_B is not None:
            around_B += users_B >= 0
        sizes_n = (self.item_token_table[index_n] >= 0).sum(axis=1)
        return newest_tokens(lengths_B, index_n, sizes_n, around_B, int(self.max_history_tokens or 0))

    def _packed(
        self, lengths_B: np.ndarray, tokens_nL: np.ndarray, user_ids, ragged: bool, return_tensors, skipped: int
    ) -> BatchEncoding:
        """Rows of `lengths_B` entries of `tokens_nL` as the encoding that was asked for, user and end tokens put on."""
        before, after = self._history_template()
        input_ids_BW, attention_BW = padded_tokens(
            lengths_B,
            tokens_nL,
            pad_id=self.pad_token_id,
            head_B=self._user_token_ids(user_ids, len(lengths_B)),
            eos_id=self.eos_token_id if self.history_eos else None,
            left=self.padding_side == "left",
            before=before,
            after=after,
        )
        data: dict[str, Any] = {"input_ids": input_ids_BW, "attention_mask": attention_BW}
        if ragged:
            rows = [row[mask == 1].tolist() for row, mask in zip(input_ids_BW, attention_BW)]
            data = {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}
        elif return_tensors is None:
            data = {name: array.tolist() for name, array in data.items()}
        elif return_tensors == "pt":
            import torch  # here, so that lists and numpy arrays do not need it

            data = {name: torch.from_numpy(array) for name, array in data.items()}
        encoding = BatchEncoding(data)
        # an attribute, not a key: model(**encoding) keeps working
        encoding.skipped_items = skipped  # type: ignore[attr-defined]
        return encoding

    def _user_token_ids(self, user_ids, num_rows: int) -> np.ndarray | None:
        """Token id of each row's user, (B,); -1 where the row gets none."""
        if user_ids is None or not self.num_user_tokens:
            return None
        if isinstance(user_ids, str) or len(user_ids) != num_rows:
            raise IncompatibleComponentsError(
                f"user_ids: {num_rows} histories need as many user ids (None for no user)"
            )
        hashed = (-1 if user is None else user_token_index(user, self.num_user_tokens) for user in user_ids)
        index_B = np.fromiter(hashed, np.int64, num_rows)
        return np.where(index_B < 0, -1, index_B + self._first_user_id)
