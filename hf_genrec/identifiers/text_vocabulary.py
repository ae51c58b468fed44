"""A small text vocabulary learned from the catalogue's own texts, for models trained from scratch.

With a pretrained language model use its tokenizer instead. Byte-level BPE of the tokenizers library: every string can be
written, and encoding loses nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import TokenizersBackend

SPECIAL_TOKENS = ("<pad>", "</s>", "<unk>", "<s>")


def train_text_tokenizer(
    texts: Iterable[str], vocab_size: int = 2000, digit_groups: int | None = None
) -> TokenizersBackend:
    """Byte-level BPE tokenizer of at most `vocab_size` tokens (at least 256 bytes and 4 special tokens).

    Deterministic for the same texts in the same order.

    Args:
        digit_groups: cut runs of digits into groups of so many, from the left: all numbers of one length have their cuts in
            the same places then. None: as the merges fall.

    Example:
        >>> train_text_tokenizer(["1001 1234"], 300, digit_groups=2).tokenize("1001")
        ['10', '01']
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if digit_groups is not None:
        groups = pre_tokenizers.Split(Regex(rf"[0-9]{{1,{digit_groups}}}"), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([groups, backend.pre_tokenizer])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=max(vocab_size, 256 + len(SPECIAL_TOKENS)),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=list(SPECIAL_TOKENS),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    pad, eos, unk, bos = SPECIAL_TOKENS
    return TokenizersBackend(tokenizer_object=backend, pad_token=pad, eos_token=eos, unk_token=unk, bos_token=bos)
