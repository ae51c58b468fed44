"""ItemTextTokenizer: any Rust-backed text tokenizer plus item tokens and the catalogue they stand for.

Text keeps the base tokenizer's ids and behaviour; item tokens (semantic IDs, as LC-Rec, arXiv 2311.09049, adds them to
a language model) follow behind the base vocabulary. `extend.extend_tokenizer` builds one, `AutoTokenizer` loads it.

Shape legend: N items, L levels (codes per item).
"""

from __future__ import annotations

import os

from transformers import TokenizersBackend

from ..errors import ArtifactError, IncompatibleComponentsError
from .catalogue import CatalogueMixin, item_tokens, user_tokens
from .catalogue_file import FILE_NAME


class ItemTextTokenizer(CatalogueMixin, TokenizersBackend):
    """Text tokenizer that carries a catalogue: item methods of `ItemTokenizer`, text by the base tokenizer's backend.

    Item and user tokens are added tokens with `special=True, normalized=False`: they match exactly or not at all, and
    `decode(..., skip_special_tokens=True)` leaves them out. Text from strangers goes through `encode_segments`, which
    never yields them.

    Args:
        item_codes_file: the catalogue file (`from_pretrained` gives it).
        unknown_items, num_user_tokens, history_eos, max_history: as in `ItemTokenizer`.
        history_before, history_after: template texts around every history that `encode_histories` and
            `encode_item_indices` write (user and end token stand inside). Control and item tokens in them count, so they
            must be yours, never an item's. A shorter history never cuts them.
        max_history_tokens: most tokens of an encoded history, template included; the oldest items go first, whole.

    Raises:
        ArtifactError: no catalogue file, or a vocabulary that does not hold the catalogue's tokens.
        IncompatibleComponentsError: a template that is no string, a bound below 1 or too small for the template.
    """

    vocab_files_names = {"tokenizer_file": "tokenizer.json", "item_codes_file": FILE_NAME}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(
        self,
        item_codes_file: str | None = None,
        unknown_items: str = "error",
        num_user_tokens: int = 0,
        history_eos: bool = False,
        max_history: int | None = None,
        history_before: str = "",
        history_after: str = "",
        max_history_tokens: int | None = None,
        **kwargs,
    ):
        self._set_catalogue(item_codes_file, kwargs)
        self._set_catalogue_options(unknown_items, num_user_tokens, history_eos, max_history)
        self._set_template_options(history_before, history_after, max_history_tokens)
        super().__init__(
            item_codes_file=item_codes_file,
            unknown_items=unknown_items,
            num_user_tokens=num_user_tokens,
            history_eos=history_eos,
            max_history=max_history,
            history_before=history_before,
            history_after=history_after,
            max_history_tokens=max_history_tokens,
            **kwargs,
        )
        self._forget_load_arguments()
        self._find_tokens()
        # not persisted upstream, so read back from what the backend does: an empty text shows the automatic tokens
        around = self.backend_tokenizer.encode("", add_special_tokens=True).ids
        self.__dict__["_add_bos_token"] = self.bos_token_id is not None and around[:1] == [self.bos_token_id]
        self.__dict__["_add_eos_token"] = self.eos_token_id is not None and around[-1:] == [self.eos_token_id]

    def _set_template_options(self, history_before, history_after, max_history_tokens) -> None:
        for name, text in (("history_before", history_before), ("history_after", history_after)):
            if not isinstance(text, str):
                raise IncompatibleComponentsError(f"{name} is {text!r}: give a template text, or '' for none")
        if max_history_tokens is not None and (type(max_history_tokens) is not int or max_history_tokens < 1):
            raise IncompatibleComponentsError(
                f"max_history_tokens is {max_history_tokens!r}: give a positive integer or None"
            )
        self.history_before = history_before
        self.history_after = history_after
        self.max_history_tokens = max_history_tokens

    def _history_template(self) -> tuple[list[int], list[int]]:
        texts = (self.history_before, self.history_after)
        if texts == ("", ""):
            return [], []
        state = (*texts, len(self))
        known = self.__dict__.get("_template_ids")
        if known is None or known[0] != state:  # the texts may be set anew, and tokens may be added
            ids = [self.encode(text, add_special_tokens=False, split_special_tokens=False) for text in texts]
            known = self.__dict__["_template_ids"] = (state, ids)
        return known[1][0], known[1][1]

    @classmethod
    def convert_to_native_format(cls, trust_remote_code: bool = False, **kwargs) -> dict:
        # upstream takes tokenizer.json apart for classes with their own __init__; the backend reads it whole
        return kwargs

    def _find_tokens(self) -> None:
        """Set the first user and item token ids from the vocabulary. Raises ArtifactError where they do not fit."""
        misfit = (
            f"the vocabulary (tokenizer.json) does not belong to this catalogue ({FILE_NAME}): "
            "save both again with save_pretrained"
        )
        where = self.name_or_path or "tokenizer"
        number = self.num_user_tokens + sum(self.codebook_sizes)
        if number > len(self):  # before the names of a damaged file's billions of tokens are made
            raise ArtifactError(f"{where}: {number} item tokens in a vocabulary of {len(self)}: {misfit}")
        tokens = [*user_tokens(self.num_user_tokens), *item_tokens(self.codebook_sizes)]
        ids = [self.backend_tokenizer.token_to_id(token) for token in tokens]
        first = ids[0]
        if first is None or ids != list(range(first, first + number)):
            wrong = next(i for i, found in enumerate(ids) if first is None or found != first + i)
            raise ArtifactError(f"{where}: token {tokens[wrong]!r} has id {ids[wrong]}: {misfit}")
        self._first_user_id = first
        self._first_code_id = first + self.num_user_tokens

    def _save_pretrained(self, save_directory, file_names, legacy_format=None, filename_prefix=None):
        files = super()._save_pretrained(save_directory, file_names, legacy_format, filename_prefix)
        name = f"{filename_prefix}-{FILE_NAME}" if filename_prefix else FILE_NAME
        path = os.path.join(str(save_directory), name)
        self._catalogue.write(path)
        return (*files, path)
