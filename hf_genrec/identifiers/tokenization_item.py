"""ItemTokenizer: the catalogue as a Hugging Face tokenizer, the only door between item ids and tokens.

Items are named by L codes (semantic IDs, TIGER, arXiv 2305.05065) or, with L = 1, by one token each (SASRec).
The catalogue is one of the tokenizer's own files (`item_codes.safetensors`), so `save_pretrained`, `from_pretrained`,
`AutoTokenizer` and `push_to_hub` carry it.

Vocabulary: `<pad>` 0, `</s>` 1, `<unk>` 2, `<s>` 3, then `<user_0>`.., then the code tokens level by level:
`<a_0>..<a_{C-1}><b_0>..`. As text an item is `<a_12><b_3>`.

Shape legend: N items, L levels (codes per item).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence

import numpy as np
from transformers import AddedToken, PreTrainedTokenizer

from ..errors import IncompatibleComponentsError
from .catalogue import CatalogueMixin, item_token, item_tokens, level_number, user_tokens
from .catalogue_file import FILE_NAME, Catalogue

_TOKEN = re.compile(r"<(user|[a-z]{1,2})_(0|[1-9][0-9]{0,9})>", re.ASCII)
_UNK_ID = 2
_PIECES = re.compile(r"<[a-z]+_[0-9]+>|\s+|(?:(?!<[a-z]+_[0-9]+>)\S)+", re.ASCII)


class ItemTokenizer(CatalogueMixin, PreTrainedTokenizer):
    """Tokenizer of a catalogue whose items are tuples of codes.

    Build it with `from_codes`; load it with `from_pretrained` or `AutoTokenizer`.

    Args:
        item_codes_file: the catalogue file (`from_pretrained` gives it).
        unknown_items: what `encode_histories` does with an id outside the catalogue: "error", or "skip" with a count.
        num_user_tokens: how many hashed user tokens the vocabulary has.
        history_eos: append `</s>` to every encoded history. Text is never given an automatic `</s>`.
        max_history: newest items kept of a history unless a call says otherwise; None keeps all.

    Raises:
        ArtifactError: no catalogue file, or a damaged one.

    Example:

        >>> tokenizer = ItemTokenizer.from_codes(["shoe", "sock"], [[0, 1], [0, 2]])
        >>> tokenizer.encode_histories([["shoe", "sock"], ["sock"]])["input_ids"]
        [[4, 6, 4, 7], [0, 0, 4, 7]]
        >>> tokenizer.decode([4, 6])
        '<a_0><b_1>'
    """

    vocab_files_names = {"item_codes_file": FILE_NAME}
    model_input_names = ["input_ids", "attention_mask"]
    padding_side = "left"
    truncation_side = "left"

    def __init__(
        self,
        item_codes_file: str | None = None,
        unknown_items: str = "error",
        num_user_tokens: int = 0,
        history_eos: bool = False,
        max_history: int | None = None,
        pad_token: str = "<pad>",
        eos_token: str = "</s>",
        unk_token: str = "<unk>",
        bos_token: str = "<s>",
        **kwargs,
    ):
        self._set_catalogue(item_codes_file, kwargs)
        self._set_catalogue_options(unknown_items, num_user_tokens, history_eos, max_history)
        self._base_tokens = [str(token) for token in (pad_token, eos_token, unk_token, bos_token)]
        if len(set(self._base_tokens)) < 4:
            raise IncompatibleComponentsError(
                f"special tokens {self._base_tokens} are not distinct: give pad, eos, unk and bos tokens of their own"
            )
        self._first_user_id = len(self._base_tokens)
        self._first_code_id = self._first_user_id + num_user_tokens
        kwargs.setdefault("special_tokens_pattern", "none")
        super().__init__(
            item_codes_file=item_codes_file,
            unknown_items=unknown_items,
            num_user_tokens=num_user_tokens,
            history_eos=history_eos,
            max_history=max_history,
            pad_token=pad_token,
            eos_token=eos_token,
            unk_token=unk_token,
            bos_token=bos_token,
            **kwargs,
        )
        self._forget_load_arguments()

    @classmethod
    def from_codes(
        cls,
        item_ids: Iterable[str],
        codes,
        codebook_sizes: Sequence[int] | None = None,
        *,
        unknown_items: str = "error",
        num_user_tokens: int = 0,
        history_eos: bool = False,
        max_history: int | None = None,
        **kwargs,
    ) -> ItemTokenizer:
        """Build the tokenizer from N item ids and their codes, integers (N, L).

        Items may share a code tuple. `codebook_sizes` (L positive integers) defaults to each level's largest code + 1.

        Raises:
            ItemTableError: ids that are not distinct strings, codes of a wrong shape, type or range.
        """
        return cls(
            catalogue=Catalogue(item_ids, codes, codebook_sizes),
            unknown_items=unknown_items,
            num_user_tokens=num_user_tokens,
            history_eos=history_eos,
            max_history=max_history,
            **kwargs,
        )

    # --- vocabulary by formula -----------------------------------------------------------------------------------

    @property
    def vocab_size(self) -> int:
        """Number of tokens without tokens added later: 4 special, the user tokens, the code tokens of all levels."""
        return self._first_code_id + sum(self.codebook_sizes)

    def get_vocab(self) -> dict[str, int]:
        """Token -> id of the whole vocabulary (built anew at every call; nothing in encoding needs it)."""
        tokens = [*self._base_tokens, *user_tokens(self.num_user_tokens), *item_tokens(self.codebook_sizes)]
        vocab = {token: index for index, token in enumerate(tokens)}
        vocab.update(self._added_tokens_encoder)
        return vocab

    def _add_tokens(self, new_tokens, special_tokens: bool = False) -> int:
        # upstream copies the whole vocabulary into a dict first; construction adds nothing new, so it need not
        if all(str(token) in self._base_tokens for token in new_tokens or ()):
            for token in new_tokens or ():
                if isinstance(token, str):
                    token = AddedToken(token, normalized=False, special=True)
                self._added_tokens_decoder[self._base_tokens.index(str(token))] = token
                self._added_tokens_encoder[str(token)] = self._base_tokens.index(str(token))
            self._update_trie()
            self._update_total_vocab_size()
            return 0
        return super()._add_tokens(new_tokens, special_tokens=special_tokens)

    def _update_total_vocab_size(self) -> None:
        beyond = sum(index >= self.vocab_size for index in self._added_tokens_decoder)
        self.total_vocab_size = self.vocab_size + beyond

    def _convert_token_to_id(self, token: str) -> int:
        if token in self._base_tokens:
            return self._base_tokens.index(token)
        match = _TOKEN.fullmatch(token)
        if match:
            number = int(match[2])
            if match[1] == "user":
                if number < self.num_user_tokens:
                    return self._first_user_id + number
            else:
                level = level_number(match[1])
                if level < self.num_levels and number < self.codebook_sizes[level]:
                    return int(self.level_offsets[level]) + number
        return _UNK_ID

    def _convert_id_to_token(self, index: int) -> str:
        if 0 <= index < self._first_user_id:
            return self._base_tokens[index]
        if self._first_user_id <= index < self._first_code_id:
            return f"<user_{index - self._first_user_id}>"
        if self._first_code_id <= index < self.vocab_size:
            offsets_L = self.level_offsets
            level = int(np.searchsorted(offsets_L, index, side="right")) - 1
            return item_token(level, int(index - offsets_L[level]))
        return self._base_tokens[_UNK_ID]

    # --- text form -----------------------------------------------------------------------------------------------

    def _tokenize(self, text: str, **kwargs) -> list[str]:
        return [piece for piece in _PIECES.findall(text) if not piece.isspace()]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Tokens joined without spaces: `<a_12><b_3>`."""
        return "".join(tokens)

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Write the catalogue file; returns its path."""
        name = f"{filename_prefix}-{FILE_NAME}" if filename_prefix else FILE_NAME
        path = os.path.join(save_directory, name)
        self._catalogue.write(path)
        return (path,)


def register() -> None:
    """Make `AutoTokenizer` load what `ItemTokenizer` and `ItemTextTokenizer` save. Calling it again changes nothing."""
    from .auto_tokenizer import register as register_classes  # it imports this module

    register_classes()
