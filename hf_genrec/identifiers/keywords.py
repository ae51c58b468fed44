"""Items named by keywords of their own texts: a word vocabulary, TF-IDF keywords, and names that nobody else has.

Short names in whole words are what a text-ID generator starts from (IDGenRec, arXiv 2403.19021, starts from a model
pretrained to write tags; keywords stand in for tags where there is none).

Shape suffixes: N items, L tokens of a name with its end token, V words.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import TokenizersBackend

from ..errors import IncompatibleComponentsError
from .catalogue_file import Catalogue
from .extend import carried_options
from .segments import text_encoder
from .text_vocabulary import SPECIAL_TOKENS
from .tokenization_item_words import ITEM_END, ItemWordsTokenizer

Name = tuple[int, ...]


def train_word_tokenizer(texts: Iterable[str], vocab_size: int = 1000, min_count: int = 2) -> TokenizersBackend:
    """A tokenizer of whole words: lower case, punctuation dropped, rare words unknown.

    Args:
        vocab_size: most words, those in most texts first (equal ones in alphabetical order).
        min_count: texts that a word must occur in.

    Example:
        >>> tokenizer = train_word_tokenizer(["Toy Story, Toy 2", "Love Story"], min_count=1)
        >>> tokenizer.tokenize("A STORY of toys: toy"), tokenizer.get_vocab()["story"]
        (['<unk>', 'story', '<unk>', '<unk>', 'toy'], 4)
    """
    normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    splitter = pre_tokenizers.Split(Regex(r"\W+"), "removed")
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update({word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))})
    words = sorted((word for word, count in counts.items() if count >= min_count), key=lambda w: (-counts[w], w))
    pad, eos, unk, bos = SPECIAL_TOKENS
    vocabulary = {word: index for index, word in enumerate([*SPECIAL_TOKENS, *words[:vocab_size]])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=unk))
    backend.normalizer, backend.pre_tokenizer = normalizer, splitter
    return TokenizersBackend(tokenizer_object=backend, pad_token=pad, eos_token=eos, unk_token=unk, bos_token=bos)


def keyword_names(rows: Sequence[Sequence[int]], max_words: int, ignored: Iterable[int] = ()) -> list[Name]:
    """The `max_words` words of each text with the largest TF-IDF, from the most common to the rarest.

    Common words first make names of related items begin alike, so that the first steps of a search decide the coarse
    things. Ties go to the smaller word id. A text without known words gives an empty name.

    Args:
        rows: N texts as word ids.
        ignored: ids that are no words (special tokens).

    Example:
        >>> keyword_names([[7, 8, 9], [7, 8], [7, 5]], 2)
        [(8, 9), (7, 8), (7, 5)]
    """
    left_out = set(ignored)
    texts = [Counter(word for word in row if word not in left_out) for row in rows]
    documents = Counter(word for text in texts for word in text)
    names = []
    for text in texts:
        weight = {word: count * float(np.log(len(texts) / documents[word])) for word, count in text.items()}
        chosen = sorted(weight, key=lambda word: (-weight[word], word))[:max_words]
        names.append(tuple(sorted(chosen, key=lambda word: (-documents[word], word))))
    return names


def lengthen(name: Name, words: Iterable[int], taken: set[Name], max_words: int) -> Name:
    """The name itself if nobody has it, else with one more word: the first that makes it new.

    A name of `max_words` words gives its last one up for it; where all single words are in use, it gives up more.

    Raises:
        IncompatibleComponentsError: the words do not make enough different names.

    Example:
        >>> lengthen((5, 6), [6, 7, 8], {(5, 6), (5, 6, 7)}, 3)
        (5, 6, 8)
    """
    if name and name not in taken:
        return name
    words = list(words)
    for kept in range(min(len(name), max_words - 1), -1, -1):
        for word in words:
            other = (*name[:kept], word)
            if word not in name[:kept] and other not in taken:
                return other
    raise IncompatibleComponentsError(
        f"all names that begin like {name} are in use: allow more words per name, or a larger vocabulary."
    )


def unique_names(names: Sequence[Name], words: Sequence[int], max_words: int, taken: Iterable[Name] = ()) -> list[Name]:
    """Names of N items, no two equal and none of `taken`: the first item of a name keeps it, the others get `lengthen`.

    Example:
        >>> unique_names([(5,), (5,), ()], [5, 6], 2)
        [(5,), (5, 6), (6,)]
    """
    used, result = set(taken), []
    for name in names:
        result.append(lengthen(name, words, used, max_words))
        used.add(result[-1])
    return result


def name_table(names: Sequence[Name], end: int, levels: int) -> np.ndarray:
    """Codes (N, L) int32 of names: their words, the end token, then -1."""
    table_NL = np.full((len(names), levels), -1, np.int32)
    for row, name in enumerate(names):
        table_NL[row, : len(name)] = name
        table_NL[row, len(name)] = end
    return table_NL


def text_rows(tokenizer: Any, texts: Sequence[str], max_words: int | None = None) -> np.ndarray:
    """Texts as word ids (N, S) int32, cut to `max_words`, -1 behind the end. Texts are untrusted: no control tokens."""
    encoder = text_encoder(tokenizer)
    rows = [encoder.encode(text)[:max_words] for text in texts]
    width = max_words or max(1, max(map(len, rows), default=1))
    table_NS = np.full((len(rows), width), -1, np.int32)
    for place, row in enumerate(rows):
        table_NS[place, : len(row)] = row
    return table_NS


def word_named_tokenizer(
    base: TokenizersBackend, item_ids: Sequence[str], names: Sequence[Name], max_tokens: int
) -> ItemWordsTokenizer:
    """`ItemWordsTokenizer` of items whose names are given as word ids; every name has room for `max_tokens` tokens.

    Unlike `from_texts` the number of levels does not follow the longest name, so that names can change later.

    Example:
        >>> base = train_word_tokenizer(["toy story", "love story"], min_count=1)
        >>> tokenizer = word_named_tokenizer(base, ["m1", "m2"], [(4, 6), (4,)], max_tokens=4)
        >>> tokenizer.decode(tokenizer.item_token_ids("m1")), tokenizer.codes[1].tolist()
        ('story toy <item_end>', [4, 7, -1, -1])
    """
    backend = copy.deepcopy(base.backend_tokenizer)
    backend.add_special_tokens([AddedToken(ITEM_END, normalized=False, special=True)])
    size = backend.get_vocab_size(with_added_tokens=True)
    codes_NL = name_table(names, int(backend.token_to_id(ITEM_END) or 0), max_tokens)
    return ItemWordsTokenizer(
        **carried_options(base),
        pad_token=base.pad_token,
        tokenizer_object=backend,
        catalogue=Catalogue(item_ids, codes_NL, [size] * max_tokens),
    )
