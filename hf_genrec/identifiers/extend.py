"""Item tokens inside a text tokenizer (LC-Rec, arXiv 2311.09049, adds them to a language model's vocabulary).

`extend_tokenizer` makes the tokenizer, `encode_segments` (see `segments.py`) writes prompts with it safely.
"""

from __future__ import annotations

import copy

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase, TokenizersBackend

from ..errors import IncompatibleComponentsError
from .catalogue import CatalogueMixin, item_tokens, user_tokens
from .segments import encode_segments
from .tokenization_item_text import ItemTextTokenizer

__all__ = ["encode_segments", "extend_tokenizer"]

_DEFAULT_PAD = "<pad>"
_LIVE_OPTIONS = (
    "model_max_length", "padding_side", "truncation_side", "model_input_names", "clean_up_tokenization_spaces",
    "split_special_tokens", "chat_template", "response_template", "chat_control_tokens",
)  # fmt: skip
# init kwargs of a base tokenizer that name its files, its load or its added tokens: all of that is in the backend
_NOT_CARRIED = {
    "added_tokens_decoder", "backend", "files_loaded", "is_local", "local_files_only", "merges", "merges_file",
    "model_specific_special_tokens", "name_or_path", "post_processor", "special_tokens_map_file", "tokenizer_class",
    "tokenizer_file", "tokenizer_object", "tokenizer_padding", "tokenizer_truncation", "vocab", "vocab_file",
    "add_bos_token", "add_eos_token", "auto_map",
}  # fmt: skip
_PROBES = ("Because you watched: The Matrix (1999), 'Amélie' & 3 more!", "tail  spaces \n\n\t日本 🙂", "")


def extend_tokenizer(
    base_tokenizer: PreTrainedTokenizerBase,
    item_tokenizer: CatalogueMixin,
    *,
    pad_token: str | None = None,
    history_before: str = "",
    history_after: str = "",
    max_history_tokens: int | None = None,
) -> ItemTextTokenizer:
    """A text tokenizer that also carries the catalogue of `item_tokenizer`.

    Text is encoded as by `base_tokenizer` (same backend, same ids); user and item tokens follow behind its vocabulary
    as added tokens with `special=True, normalized=False`. The options of `item_tokenizer` (unknown items, user tokens,
    history end, history length) go along. Neither argument is changed. Bring the tokens into the model afterwards:
    `alignment.item_embeddings.add_item_tokens(model, tokenizer)`.

    Args:
        base_tokenizer: any tokenizer with a Rust backend.
        item_tokenizer: an `ItemTokenizer`; not one whose levels share their tokens (`ActionPieceTokenizer`, item texts).
        pad_token: the padding token of a base tokenizer that has none (GPT-2, Llama). Default `<pad>`, which becomes
            one more special token; the end token is not reused for it, because padding is masked out of the loss.
        history_before, history_after: template texts around every encoded history (an instruction, chat markers). They
            are yours, so control tokens in them count; write a start token there if the model expects one. Both empty:
            a history is its item tokens and nothing else.
        max_history_tokens: most tokens of an encoded history with its template; older items are left out, whole.

    Raises:
        IncompatibleComponentsError: no Rust backend, item tokens already in the vocabulary, levels that share their
            tokens, or a base class whose Python code changes texts in a way that the backend alone does not repeat.

    Example: `extend_tokenizer(base, items, history_before="Bought: ", history_after="\\nNext: ")`
    """
    if not isinstance(base_tokenizer, TokenizersBackend):
        raise IncompatibleComponentsError(
            f"base tokenizer {type(base_tokenizer).__name__} has no Rust backend (tokenizer.json): "
            "load the model's fast tokenizer with AutoTokenizer"
        )
    if not isinstance(item_tokenizer, CatalogueMixin):
        raise IncompatibleComponentsError(
            f"item tokenizer {type(item_tokenizer).__name__} carries no catalogue: "
            "make one with ItemTokenizer.from_codes"
        )
    if item_tokenizer.num_levels > 1 and not item_tokenizer.level_offsets.any():
        raise IncompatibleComponentsError(
            f"{type(item_tokenizer).__name__} has no item tokens of its own level by level (all of its levels start at token "
            "0), so they cannot be put into a text vocabulary: extend an ItemTokenizer.from_codes of the same items"
        )
    if isinstance(base_tokenizer, CatalogueMixin):
        raise IncompatibleComponentsError(
            f"base tokenizer already carries a catalogue of {base_tokenizer.num_items} items: extend the original one"
        )
    new_tokens = [*user_tokens(item_tokenizer.num_user_tokens), *item_tokens(item_tokenizer.codebook_sizes)]
    vocabulary = base_tokenizer.get_vocab()
    present = next((token for token in new_tokens if token in vocabulary), None)
    if present is not None:
        raise IncompatibleComponentsError(
            f"token {present!r} is already in the base tokenizer (id {vocabulary[present]}): "
            "extend a tokenizer without item tokens"
        )
    if item_tokenizer.history_eos and base_tokenizer.eos_token is None:
        raise IncompatibleComponentsError(
            "history_eos=True needs an end token and the base tokenizer has none: set base_tokenizer.eos_token, "
            "or build the item tokenizer with history_eos=False"
        )
    pad = base_tokenizer._special_tokens_map.get("pad_token") or pad_token or _DEFAULT_PAD
    backend = copy.deepcopy(base_tokenizer.backend_tokenizer)
    if backend.token_to_id(str(pad)) is None:
        backend.add_special_tokens([AddedToken(str(pad), normalized=False, special=True)])
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in new_tokens])
    tokenizer = ItemTextTokenizer(
        **carried_options(base_tokenizer),
        pad_token=pad,
        tokenizer_object=backend,
        catalogue=item_tokenizer._catalogue,
        unknown_items=item_tokenizer.unknown_items,
        num_user_tokens=item_tokenizer.num_user_tokens,
        history_eos=item_tokenizer.history_eos,
        max_history=item_tokenizer.max_history,
        history_before=history_before,
        history_after=history_after,
        max_history_tokens=max_history_tokens,
    )
    for text in _PROBES:
        ours, theirs = tokenizer(text), base_tokenizer(text)
        if dict(ours) != dict(theirs) or tokenizer.decode(ours["input_ids"]) != base_tokenizer.decode(
            theirs["input_ids"]
        ):
            raise IncompatibleComponentsError(
                f"{type(base_tokenizer).__name__} changes texts in Python code of its own ({text!r} differs): "
                "extend a tokenizer whose tokenizer.json does all the work"
            )
    return tokenizer


def carried_options(base: PreTrainedTokenizerBase) -> dict:
    """Keyword arguments that give a new tokenizer the settings of `base`, also those changed after it was made."""
    options = {name: value for name, value in base.init_kwargs.items() if name not in _NOT_CARRIED}
    for name in base.vocab_files_names:
        options.pop(name, None)
    named = {name: token for name, token in base._special_tokens_map.items() if token is not None}
    standard = set(PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES)
    for name in named.keys() | standard:
        options.pop(name, None)
    named.pop("pad_token", None)
    options.update({name: token for name, token in named.items() if name in standard})
    options["model_specific_special_tokens"] = {name: named[name] for name in named.keys() - standard} or None
    options["extra_special_tokens"] = list(base._extra_special_tokens)
    for name in _LIVE_OPTIONS:
        if getattr(base, name, None) is not None:
            options[name] = copy.deepcopy(getattr(base, name))
    return {name: value for name, value in options.items() if value is not None}
