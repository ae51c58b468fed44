"""ActionPieceTokenizer: items as unordered feature sets, histories merged across items (ActionPiece, arXiv 2502.13581).

The same item has other tokens beside other neighbours: tokens are merged inside a feature set and across adjacent ones
(set_bpe.py learns the merges). Two files carry it: `item_codes.safetensors` (the features) and
`set_merges.safetensors`.

Vocabulary: `<pad>` 0, `</s>` 1, `<unk>` 2, `<s>` 3, user tokens, features level by level (`<a_0>`..), then merged tokens
(`<set_0>`..).

**Histories** (`encode_histories`) are segmented without chance, or, after `resegment(seed)`, by set permutation
regularisation: every set in an order drawn from (seed, row of items), then byte-pair encoding over the row. The same
seed and row give the same tokens in any batch; a new seed per epoch gives the new segmentations of the paper.
`encode_ensemble` gives q of them per history; with `segmentations = q` every encoding holds q, (B, q, W), which the model
of `models/action_piece` reads and the search "segmentation_ensemble" adds up.

**Targets.** What a model learns to generate is the item alone, segmented without chance (as the published code does,
which encodes labels with shuffling off): one short row of tokens per item. These rows are the item's `codes` here, in
the sense of `ItemWordsTokenizer`: every level has the whole vocabulary as its codebook and offset 0, and shorter items
are filled up with -1. A row ends when its tokens cover all levels, so no row is the start of another item's, no end
token is needed, and tries, searches and `recommend` work unchanged: the trie of these rows is exact for a model trained
on them. The model needs one softmax over all tokens at every step (any transformers encoder-decoder or decoder; not the
level-wise T5, whose levels have disjoint tokens).

The paper itself searches freely (beam 50), keeps an output if it spells one full set, whatever the segmentation,
and adds 1 / log2(rank + 1) over q = 5 permuted inputs. For that: `token_ids_to_items` reads any segmentation (one list =
one full set), and `legal_continuations` says which tokens, features or merged ones, may follow a prefix so that it can
still become an item of the catalogue.

Shape legend: N items, L levels (features of an item), B rows, n items of all rows, F features, R merges, q segmentations.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from itertools import chain

import numpy as np
from transformers import BatchEncoding

from ..data.sequences import ragged_positions
from ..errors import ArtifactError, IncompatibleComponentsError, ItemTableError, UnknownItemError
from .catalogue import item_token, item_tokens, level_number, user_tokens
from .catalogue_file import FILE_NAME, Catalogue
from .histories import newest_items
from .set_bpe import build_set_vocabulary
from .set_continuations import SetContinuations
from .set_merges_file import MERGES_FILE_NAME, read_merges, write_merges
from .set_permutations import Seed, set_orders
from .set_vocabulary import SetVocabulary
from .tokenization_item import ItemTokenizer

_TOKEN = re.compile(r"<(user|set|[a-z]{1,2})_(0|[1-9][0-9]{0,9})>", re.ASCII)
_UNK_ID = 2
_DERIVED = ("_feature_sets", "_continuations")  # made when first needed, left out of copies


def _checked_count(segmentations: int) -> int:
    if type(segmentations) is not int or segmentations < 1:
        raise IncompatibleComponentsError(f"segmentations is {segmentations!r}: give a positive integer")
    return segmentations


class ActionPieceTokenizer(ItemTokenizer):
    """Tokenizer of a catalogue of feature sets. Build it with `train` or `from_features`.

    Args:
        item_codes_file, set_merges_file: its two files (`from_pretrained` gives them).
        segmentations: q permuted segmentations of every encoded history, (B, q, W), drawn with the seed of `resegment` (0
            without one). 1: one, (B, W), without chance unless `resegment` asks for it.
        unknown_items, num_user_tokens, history_eos, max_history: as in `ItemTokenizer`.

    Raises:
        ArtifactError: a file is missing, damaged, or belongs to another catalogue.
        IncompatibleComponentsError: `segmentations` below 1.

    Relations: without merges, `encode_histories` equals that of `ItemTokenizer.from_codes` on the features.

    Example:

        >>> tokenizer = ActionPieceTokenizer.train(
        ...     ["shoe", "sock"], [[0, 0], [0, 1]], [["shoe", "sock"], ["shoe"]], vocabulary_size=4
        ... )
        >>> tokenizer.encode_histories([["shoe", "sock"]])["input_ids"], tokenizer.decode([7, 4, 6])
        ([[7, 4, 6]], '<set_0><a_0><b_1>')
    """

    vocab_files_names = {"item_codes_file": FILE_NAME, "set_merges_file": MERGES_FILE_NAME}

    def __init__(
        self,
        item_codes_file: str | None = None,
        set_merges_file: str | None = None,
        num_user_tokens: int = 0,
        segmentations: int = 1,
        **kwargs,
    ):
        self.segmentations = _checked_count(segmentations)
        vocabulary = kwargs.pop("set_vocabulary", None)
        from_file = "catalogue" not in kwargs
        self._set_catalogue(item_codes_file, kwargs)
        self._feature_catalogue = features = self._catalogue
        if features.code_lengths is not None:
            row = int(np.flatnonzero(features.code_lengths < features.num_levels)[0])
            raise ItemTableError(
                f"features row {row} (item {features.item_ids[row]!r}): a level has no feature (-1), and a set is read "
                "back by its levels: give a missing attribute a feature of its own"
            )
        if vocabulary is None and from_file:
            if set_merges_file is None:
                folder = kwargs.get("name_or_path")
                raise ArtifactError(f"{folder}: {MERGES_FILE_NAME} is missing: save the tokenizer there again")
            vocabulary = read_merges(set_merges_file)
        elif vocabulary is None:
            vocabulary = SetVocabulary(features.codebook_sizes, [], [])
        if vocabulary.level_sizes != features.codebook_sizes:
            raise ArtifactError(
                f"{set_merges_file or 'set_vocabulary'}: merges over levels of {list(vocabulary.level_sizes)} features "
                f"do not belong to a catalogue of {list(features.codebook_sizes)} ({FILE_NAME}): save both again"
            )
        self.set_vocabulary: SetVocabulary = vocabulary
        self._level_starts = np.cumsum((0, *features.codebook_sizes[:-1]), dtype=np.int64)
        self._segmentation_seed: Seed | None = None
        first = 4 + (
            num_user_tokens if type(num_user_tokens) is int and num_user_tokens > 0 else 0
        )  # the parent refuses others
        targets_NL = vocabulary.encode_items(features.codes + self._level_starts)
        targets_NL = np.where(targets_NL < 0, -1, targets_NL + first)
        sizes = [first + vocabulary.size] * features.num_levels
        kwargs["catalogue"] = Catalogue(features.item_ids, targets_NL, sizes)
        if set_merges_file is not None:
            kwargs["set_merges_file"] = set_merges_file
        super().__init__(
            item_codes_file=item_codes_file, num_user_tokens=num_user_tokens, segmentations=segmentations, **kwargs
        )

    # --- building ------------------------------------------------------------------------------------------------

    @classmethod
    def from_features(
        cls,
        item_ids: Iterable[str],
        features,
        feature_sizes: Sequence[int] | None = None,
        *,
        set_vocabulary: SetVocabulary | None = None,
        **options,
    ) -> ActionPieceTokenizer:
        """Build from N item ids, their features, integers (N, L), and a learnt vocabulary (None: no merges).

        New items join an old vocabulary this way: nothing is learnt again.

        Raises:
            ItemTableError: ids that are not distinct strings, features of a wrong shape or range, or missing ones.
            ArtifactError: a vocabulary of other level sizes.
        """
        sizes = set_vocabulary.level_sizes if feature_sizes is None and set_vocabulary is not None else feature_sizes
        return cls(catalogue=Catalogue(item_ids, features, sizes), set_vocabulary=set_vocabulary, **options)

    @classmethod
    def train(
        cls,
        item_ids: Iterable[str],
        features,
        histories,
        *,
        feature_sizes: Sequence[int] | None = None,
        vocabulary_size: int = 40_000,
        **options,
    ) -> ActionPieceTokenizer:
        """Learn the merges from histories and build the tokenizer.

        Args:
            features: integers (N, L), one feature per level: product-quantization codes, attributes. A last level of
                random buckets keeps items of equal features apart (the paper: 4 x 256 codes and 128 buckets).
            histories: lists of item ids, or a `Sequences` of catalogue rows. Training histories only.
            vocabulary_size: features and merged tokens together (the paper: 40,000).
            options: those of the class.

        Raises:
            UnknownItemError: a history names an item outside the catalogue (place named).
            IncompatibleComponentsError: a vocabulary smaller than the features.
        """
        catalogue = Catalogue(item_ids, features, feature_sizes)
        plain = cls(catalogue=catalogue, **options)
        number = plain.set_vocabulary.num_features
        if type(vocabulary_size) is not int or vocabulary_size < number:
            raise IncompatibleComponentsError(
                f"vocabulary_size is {vocabulary_size!r}: it counts the {number} features too, give {number} or more"
            )
        if hasattr(histories, "offsets"):
            rows = [np.asarray(histories[row], np.int64) for row in range(len(histories))]
            outside = [row for row, items in enumerate(rows) if ((items < 0) | (items >= plain.num_items)).any()]
            if outside:
                raise UnknownItemError(f"histories row {outside[0]}: an item index outside 0..{plain.num_items - 1}")
        else:
            lengths_B, index_n = plain._look_up(histories)
            lengths_B, index_n, _ = plain._drop_unknown(histories, lengths_B, index_n)
            rows = np.split(index_n, np.cumsum(lengths_B)[:-1]) if len(lengths_B) else []
        sets = (catalogue.codes + plain._level_starts).tolist()
        vocabulary = build_set_vocabulary(
            ([sets[item] for item in row.tolist()] for row in rows),
            catalogue.codebook_sizes,
            vocabulary_size - number,
        )
        return cls(catalogue=catalogue, set_vocabulary=vocabulary, **options)

    # --- the catalogue -------------------------------------------------------------------------------------------

    @property
    def features(self) -> np.ndarray:
        """Features of all items, int32 (N, L), read-only. (`codes` are the tokens of the items as targets.)"""
        return self._feature_catalogue.codes

    @property
    def feature_sizes(self) -> tuple[int, ...]:
        """Number of features of every level."""
        return self._feature_catalogue.codebook_sizes

    @property
    def level_offsets(self) -> np.ndarray:
        """Zeros (L,): the codes of a target are token ids."""
        return np.zeros(self.num_levels, np.int64)

    @property
    def catalogue_fingerprint(self) -> str:
        """sha256 (hex) over ids, features and merges."""
        digest = hashlib.sha256(self._feature_catalogue.fingerprint.encode())
        digest.update(self.set_vocabulary.merges.tobytes() + self.set_vocabulary.weights.tobytes())
        return digest.hexdigest()

    def __getstate__(self) -> dict:
        return {name: value for name, value in super().__getstate__().items() if name not in _DERIVED}

    # --- vocabulary by formula -----------------------------------------------------------------------------------

    @property
    def vocab_size(self) -> int:
        """4 special tokens, the user tokens, the features, the merged tokens."""
        return self._first_code_id + self.set_vocabulary.size

    def get_vocab(self) -> dict[str, int]:
        """Token -> id of the whole vocabulary (built anew at every call)."""
        merged = [f"<set_{number}>" for number in range(len(self.set_vocabulary.merges))]
        tokens = [*self._base_tokens, *user_tokens(self.num_user_tokens), *item_tokens(self.feature_sizes), *merged]
        vocab = {token: index for index, token in enumerate(tokens)}
        vocab.update(self._added_tokens_encoder)
        return vocab

    def _convert_token_to_id(self, token: str) -> int:
        if token in self._base_tokens:
            return self._base_tokens.index(token)
        match = _TOKEN.fullmatch(token)
        if match:
            number = int(match[2])
            if match[1] == "user":
                start, size = self._first_user_id, self.num_user_tokens
            elif match[1] == "set":
                start = self._first_code_id + self.set_vocabulary.num_features
                size = len(self.set_vocabulary.merges)
            elif (level := level_number(match[1])) < self.num_levels:
                start, size = self._first_code_id + int(self._level_starts[level]), self.feature_sizes[level]
            else:
                size = 0
            if number < size:
                return start + number
        return _UNK_ID

    def _convert_id_to_token(self, index: int) -> str:
        if 0 <= index < self._first_user_id:
            return self._base_tokens[index]
        if self._first_user_id <= index < self._first_code_id:
            return f"<user_{index - self._first_user_id}>"
        piece = index - self._first_code_id
        if 0 <= piece < self.set_vocabulary.num_features:
            level = int(np.searchsorted(self._level_starts, piece, side="right")) - 1
            return item_token(level, int(piece - self._level_starts[level]))
        if 0 <= piece < self.set_vocabulary.size:
            return f"<set_{piece - self.set_vocabulary.num_features}>"
        return self._base_tokens[_UNK_ID]

    # --- histories -----------------------------------------------------------------------------------------------

    def resegment(self, seed: Seed | None) -> None:
        """From now on segment histories by set permutation regularisation with this seed; None: without chance.

        Call it with (seed, epoch) at the start of every training epoch. It is a state of this object only, not saved;
        workers that were started before keep theirs.
        """
        if seed is not None:
            np.random.SeedSequence(seed)  # refuses what is no seed
        self._segmentation_seed = seed

    def encode_ensemble(
        self,
        histories: Sequence[Sequence[str]],
        segmentations: int = 5,
        seed: Seed = 0,
        user_ids: Sequence[str | None] | None = None,
        max_items: int | None = None,
        padding: bool | str = True,
        return_tensors: str | None = None,
    ) -> BatchEncoding:
        """q segmentations of every history by set permutation regularisation: B * q rows, the q of a history together.

        With q = 1 this is `encode_histories` after `resegment(seed)`. Other arguments and errors: `encode_histories`.
        """
        _checked_count(segmentations)
        if isinstance(histories, Sequence) and not isinstance(histories, str):
            histories = [row for row in histories for _ in range(segmentations)]
        users = user_ids if user_ids is None else [user for user in user_ids for _ in range(segmentations)]
        lengths_B, index_n = self._look_up(histories)
        lengths_B, index_n, skipped = self._drop_unknown(histories, lengths_B, index_n)
        draw_B = np.arange(len(lengths_B)) % segmentations
        return self._encode(
            lengths_B, index_n, users, max_items, padding, return_tensors, skipped, seed=seed, draw_B=draw_B
        )

    def _encode(
        self,
        lengths_B,
        index_n,
        user_ids,
        max_items,
        padding,
        return_tensors,
        skipped=0,
        *,
        seed: Seed | None = None,
        draw_B: np.ndarray | None = None,
    ) -> BatchEncoding:
        limit = self.max_history if max_items is None else max_items
        if limit is not None and limit < 0:
            raise IncompatibleComponentsError(f"max_items is {limit}: give 0 or more, or None for all items")
        if padding not in (True, False, "longest", "do_not_pad") or return_tensors not in (None, "np", "pt"):
            raise IncompatibleComponentsError(
                f"padding is {padding!r}, return_tensors is {return_tensors!r}: choose True (longest row) or False, and "
                "'pt', 'np' or None"
            )
        ragged = padding in (False, "do_not_pad")
        if ragged and return_tensors is not None:
            raise IncompatibleComponentsError("rows of different lengths make no tensor: use padding=True")
        if limit is not None:
            lengths_B, index_n = newest_items(lengths_B, index_n, limit)
        count = self.segmentations if draw_B is None else 1
        if count > 1:
            seed = 0 if self._segmentation_seed is None else self._segmentation_seed
            draw_B = np.tile(np.arange(count), len(lengths_B))
            ends = np.cumsum(lengths_B)
            index_n = index_n[ragged_positions(np.repeat(ends - lengths_B, count), np.repeat(lengths_B, count))]
            lengths_B = np.repeat(lengths_B, count)
            user_ids = None if user_ids is None else [user for user in user_ids for _ in range(count)]
        rows = self._segmented(lengths_B, index_n, self._segmentation_seed if seed is None else seed, draw_B)
        lengths_B = np.fromiter(map(len, rows), np.int64, len(rows))
        pieces_n = np.fromiter(chain.from_iterable(rows), np.int64, int(lengths_B.sum()))
        tokens_n1 = pieces_n[:, None] + self._first_code_id
        encoding = self._packed(lengths_B, tokens_n1, user_ids, ragged, return_tensors, skipped)
        if count > 1:
            for name, values in encoding.items():
                encoding[name] = (
                    [values[start : start + count] for start in range(0, len(values), count)]
                    if return_tensors is None
                    else values.reshape(-1, count, values.shape[-1])
                )
        return encoding

    def _segmented(
        self, lengths_B: np.ndarray, index_n: np.ndarray, seed: Seed | None, draw_B: np.ndarray | None
    ) -> list[list[int]]:
        """Pieces (token ids less the first) of every row."""
        features_nL = self.features[index_n] + self._level_starts
        if seed is not None:
            features_nL = np.take_along_axis(
                features_nL, set_orders(lengths_B, index_n, self.num_levels, seed, draw_B), axis=1
            )
        vocabulary, ends_B = self.set_vocabulary, np.cumsum(lengths_B)
        rows = [features_nL[end - length : end] for end, length in zip(ends_B.tolist(), lengths_B.tolist())]
        if seed is None:
            return [vocabulary.encode_fixed(row.tolist()) for row in rows]
        return [vocabulary.merge_tokens(row.reshape(-1).tolist()) for row in rows]

    # --- reading -------------------------------------------------------------------------------------------------

    def token_ids_to_items(self, token_ids) -> list[list[str]]:
        """Items named by a flat sequence of token ids, oldest first: one list of ids per feature set.

        Any segmentation is read. Padding, user tokens and text part the sequence; a part that is no row of full sets
        (a cut history, a failed generation) gives nothing. A set that names no item gives an empty list. So a generated
        sequence is valid exactly when this gives one list that is not empty.

        Where a token spans two sets and holds two features of one level, the method itself does not record which came
        first (see `SetVocabulary.read`); readings whose sets are all items of the catalogue are preferred.
        """
        ids = token_ids.detach().cpu() if hasattr(token_ids, "detach") else token_ids
        sets = self._sets(np.asarray(ids, dtype=np.int64).reshape(-1))
        if not sets:
            return []
        codes_nL = np.asarray(sets, np.int64) - self._level_starts
        return self._feature_catalogue.codes_to_items(codes_nL)

    def decode_histories(self, input_ids) -> list[list[str]]:
        """Item ids of each row of token ids (B, W), read as `token_ids_to_items` does; the first of items that share
        all features, and nothing for sets that name no item. Of several segmentations, (B, q, W), the first is read.
        """
        if self.segmentations > 1 and len(input_ids) and np.ndim(input_ids[0][0]):
            input_ids = [row[0] for row in input_ids]
        return [[items[0] for items in self.token_ids_to_items(row) if items] for row in input_ids]

    def _sets(self, ids_n: np.ndarray) -> list[tuple[int, ...]]:
        pieces_n = ids_n - self._first_code_id
        inside_n = (pieces_n >= 0) & (pieces_n < self.set_vocabulary.size)
        parts = np.split(pieces_n, np.flatnonzero(~inside_n))
        sets: list[tuple[int, ...]] = []
        for number, part in enumerate(parts):
            run = part[1:].tolist() if number else part.tolist()  # later parts begin with what parts them
            reading = self.set_vocabulary.read(run, self._known_sets().__contains__) or self.set_vocabulary.read(run)
            if reading is not None:
                sets += reading.sets
        return sets

    def _known_sets(self) -> frozenset[tuple[int, ...]]:
        known = self.__dict__.get("_feature_sets")
        if known is None:
            known = frozenset(map(tuple, (self.features + self._level_starts).tolist()))
            self.__dict__["_feature_sets"] = known
        return known

    def legal_continuations(self, prefix_ids: Sequence[int]) -> np.ndarray:
        """Token ids that may follow generated tokens so that some item of the catalogue can still be completed.

        These are the features that such an item still lacks and every merged token made of them alone: the segmentation
        is free, the item is not. To stay inside the segmentation that models are trained on use the trie of `codes`.

        Returns:
            int64 ascending; empty behind a complete item, and behind a prefix that fits no item.
        """
        made = self.__dict__.get("_continuations")
        if made is None:
            made = SetContinuations(self.features + self._level_starts, self.set_vocabulary)
            self.__dict__["_continuations"] = made
        pieces = [int(token) - self._first_code_id for token in prefix_ids]
        return made.after(pieces) + self._first_code_id

    # --- files ---------------------------------------------------------------------------------------------------

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:  # type: ignore[override]
        """Write the features and the merges; returns both paths. Equal tokenizers give equal bytes."""
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        paths = tuple(os.path.join(save_directory, prefix + name) for name in (FILE_NAME, MERGES_FILE_NAME))
        self._feature_catalogue.write(paths[0])
        write_merges(self.set_vocabulary, paths[1])
        return paths
