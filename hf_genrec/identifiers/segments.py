"""Prompts written in segments: only what the caller wrote can hold control tokens, item text stays text.

Item titles and descriptions come from strangers. A title such as `</s><|im_start|>system` or `<a_12>` must reach the
model as characters. Splitting special tokens (`split_special_tokens=True`) is not enough: a Unigram vocabulary holds
`</s>` as an ordinary piece, a look-alike may normalise to it, and added tokens that are not special still match. Here
"text" is encoded by a second backend in which control tokens do not exist.

A control token is any added token (except whitespace), any special token and any item or user token. The one exception
is the unknown token, the encoder's answer to characters outside its vocabulary, unless it also plays another part.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterable, Sequence
from weakref import WeakKeyDictionary

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, TokenizersBackend

from ..errors import IncompatibleComponentsError, ItemTableError
from .catalogue import CatalogueMixin

SEGMENT_KINDS = ("template", "text", "items")

_text_encoders: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[tuple, _TextEncoder]] = WeakKeyDictionary()


def encode_segments(
    tokenizer: PreTrainedTokenizerBase, segments: Iterable[tuple[str, str | Sequence[str]]]
) -> list[int]:
    """Token ids of a prompt given as segments, one after the other; no automatic special tokens.

    Args:
        tokenizer: a text tokenizer; "items" segments need one made by `extend_tokenizer`.
        segments: pairs of kind and content.
            `("template", str)`: written by you; special, chat and item tokens in it count.
            `("text", str)`: untrusted; never yields a special, item or chat token, whatever it contains.
            `("items", [item id, ...])`: the tokens of these items; unknown ids follow `tokenizer.unknown_items`.

    Returns:
        list of token ids.

    Raises:
        UnknownItemError: an item id is not in the catalogue.
        IncompatibleComponentsError: an unknown kind, or a tokenizer that cannot do what a segment asks for.
        ItemTableError: text that is not valid Unicode.

    Use the ids as they are: decoding them to a string and encoding that string again would revive forged tokens.
    """
    ids: list[int] = []
    for place, segment in enumerate(segments):
        if not isinstance(segment, (tuple, list)) or len(segment) != 2 or segment[0] not in SEGMENT_KINDS:
            raise IncompatibleComponentsError(
                f"segment {place}: {segment!r} is not a pair of kind ({', '.join(SEGMENT_KINDS)}) and content"
            )
        kind, content = segment
        if kind == "items":
            ids += _item_ids(tokenizer, content, place)
            continue
        if not isinstance(content, str):
            raise IncompatibleComponentsError(f"segment {place}: {kind} is a {type(content).__name__}, not a string")
        try:
            content.encode("utf-8")
        except UnicodeEncodeError:
            raise ItemTableError(
                f"segment {place}: {content[:80]!r} holds a lone surrogate, which is not valid Unicode: "
                "read the source again as UTF-8"
            ) from None
        if kind == "template":
            ids += tokenizer.encode(content, add_special_tokens=False, split_special_tokens=False)
        else:
            ids += text_encoder(tokenizer).encode(content)
    return ids


def _item_ids(tokenizer, item_ids, place: int) -> list[int]:
    if not isinstance(tokenizer, CatalogueMixin):
        raise IncompatibleComponentsError(
            f"segment {place}: {type(tokenizer).__name__} carries no catalogue: make one with extend_tokenizer"
        )
    if isinstance(item_ids, str):
        raise IncompatibleComponentsError(f"segment {place}: items is one string: give a list of item ids")
    index_n = tokenizer.known_item_index(item_ids, where=f"segment {place}")
    tokens = tokenizer.item_token_table[index_n].reshape(-1)
    return tokens[tokens >= 0].tolist()  # shorter items are filled up with -1


def control_token_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids that "text" never yields: added tokens (except whitespace), special tokens, item and user tokens."""
    added = tokenizer.added_tokens_decoder.items()
    ids = {index for index, token in added if token.special or not token.content.isspace()}
    ids.update(tokenizer.all_special_ids)
    if _unknown_is_only_unknown(tokenizer):
        ids.discard(tokenizer.unk_token_id)
    return frozenset(ids)


def _unknown_is_only_unknown(tokenizer: PreTrainedTokenizerBase) -> bool:
    named = tokenizer.special_tokens_map
    return "unk_token" in named and list(named.values()).count(named["unk_token"]) == 1


class _TextEncoder:
    """Text to token ids with a backend in which control tokens do not exist."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.control = control_token_ids(tokenizer)
        self.name = type(tokenizer).__name__
        # where one token means both "unknown" and, say, "end" (GPT-2), unknown characters are left out instead
        self.left_out = None if _unknown_is_only_unknown(tokenizer) else tokenizer.unk_token_id
        if isinstance(tokenizer, TokenizersBackend):
            # the unknown token too: typing its name is not the same as being unknown
            hidden = self.control | {index for index in [tokenizer.unk_token_id] if index is not None}
            self._encode = _encode_without(hidden, tokenizer.backend_tokenizer)
        else:
            self._encode = lambda text: tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def encode(self, text: str) -> list[int]:
        ids = [index for index in self._encode(text) if index != self.left_out]
        if not self.control.isdisjoint(ids):  # cannot happen with a Rust backend, may with a Python one
            token_id = next(index for index in ids if index in self.control)
            raise IncompatibleComponentsError(
                f"{self.name} turns the text {text[:80]!r} into control token {token_id}: use a tokenizer with a Rust "
                "backend (tokenizer.json)"
            )
        return ids


def text_encoder(tokenizer: PreTrainedTokenizerBase) -> _TextEncoder:
    """The text encoder of a tokenizer, kept until its tokens change."""
    if isinstance(tokenizer, CatalogueMixin) and not isinstance(tokenizer, TokenizersBackend):
        raise IncompatibleComponentsError(
            f"{type(tokenizer).__name__} has no text vocabulary: "
            "put the items into a text tokenizer with extend_tokenizer"
        )
    state = (len(tokenizer), tuple(tokenizer.all_special_tokens), id(getattr(tokenizer, "_tokenizer", None)))
    known = _text_encoders.get(tokenizer)
    if known is None or known[0] != state:
        known = (state, _TextEncoder(tokenizer))
        _text_encoders[tokenizer] = known
    return known[1]


def _encode_without(hidden: frozenset[int], backend: Tokenizer) -> Callable[[str], list[int]]:
    """Encoding by a copy of the backend with the same ids for text, in which no text matches a hidden token.

    Added tokens go; vocabulary entries of hidden tokens get names that nobody can know (their ids must stay in use).
    """
    parts = json.loads(backend.to_str())
    kept = [token for token in parts["added_tokens"] if token["id"] not in hidden]  # runs of whitespace
    parts["added_tokens"] = kept
    parts["post_processor"] = parts["truncation"] = parts["padding"] = None
    model = parts["model"]
    secret = secrets.token_hex(16)

    def renamed(piece: str, index: int) -> str:
        if len(piece) == 1:
            raise IncompatibleComponentsError(
                f"special token {piece!r} is a single character that texts need: give it a name such as '<pad>'"
            )
        return f"{secret}:{index}"

    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):  # Unigram: [piece, score] in the order of ids
        for index in hidden:
            if index < len(vocabulary):
                vocabulary[index][0] = renamed(vocabulary[index][0], index)
    else:
        names = {piece: renamed(piece, index) for piece, index in vocabulary.items() if index in hidden}
        model["vocab"] = {names.get(piece, piece): index for piece, index in vocabulary.items()}
        if model.get("unk_token") in names:
            model["unk_token"] = names[model["unk_token"]]
        if names and "merges" in model:
            prefix = model.get("continuing_subword_prefix") or ""
            model["merges"] = [merge for merge in model["merges"] if not _merge_pieces(merge, prefix) & names.keys()]
    text_backend = Tokenizer.from_str(json.dumps(parts))
    # with fewer added tokens the remaining ones are numbered anew: lead them back
    old_ids = {text_backend.token_to_id(token["content"]): token["id"] for token in kept}

    def encode(text: str) -> list[int]:
        ids = text_backend.encode(text, add_special_tokens=False).ids
        return [old_ids.get(index, index) for index in ids] if old_ids else ids

    return encode


def _merge_pieces(merge: str | list[str], prefix: str) -> set[str]:
    """The two parts of a BPE merge and what they become."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return {left, right, left + right.removeprefix(prefix)}
