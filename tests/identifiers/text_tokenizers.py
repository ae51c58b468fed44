"""Small text tokenizers of every backend family, trained here, for the tests of `extend_tokenizer` and segments."""

from __future__ import annotations

from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import TokenizersBackend

CHAT = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
_CORPUS = [
    "Because you watched The Matrix (1999) we recommend these films.",
    "The quick brown fox jumps over the lazy dog, he is very happy!",
    "user assistant system: what would this person like to watch next? 0123456789",
    "Amélie, Léon, 七人の侍, Der Himmel über Berlin, <b>bold</b> & friends a_1 b_2 a_12",
] * 10


def byte_level_bpe(pad: str | None = None) -> TokenizersBackend:
    """GPT-2 / Llama-3 / SmolLM style: byte-level BPE, chat markers special, `<think>` a plain added token."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        _CORPUS,
        trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, special_tokens=CHAT, show_progress=False),
    )
    backend.add_tokens([AddedToken("<think>", normalized=True), AddedToken("</think>", normalized=True)])
    specials = {"pad_token": pad} if pad else {}
    return TokenizersBackend(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        **specials,
        chat_template="{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}",
    )


def merged_marker_bpe() -> TokenizersBackend:
    """Byte-level BPE whose ordinary merges spell the chat markers: declared special, but reachable from plain text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    corpus = [*CHAT * 50, *_CORPUS]
    backend.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    )
    assert all(backend.token_to_id(marker) is not None for marker in CHAT)
    return TokenizersBackend(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )


def llama2_bpe() -> TokenizersBackend:
    """Llama-2 style: BPE over characters with byte fallback, `▁` for spaces, automatic `<s>`, no padding token."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False)
    backend.train_from_iterator(_CORPUS, trainer)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    # byte pieces are ordinary vocabulary in Llama, not added tokens
    parts = backend.to_str()
    backend = _without_added(parts, bytes_)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return TokenizersBackend(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def unigram() -> TokenizersBackend:
    """SentencePiece style Unigram with NFKC: `</s>` and `<mask>` are pieces of the vocabulary itself."""
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "</s>", "<unk>", "<mask>"],
        unk_token="<unk>",
        initial_alphabet=list("<>/|_[]{}"),
        show_progress=False,
    )
    backend.train_from_iterator(_CORPUS, trainer)
    return TokenizersBackend(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", mask_token="<mask>"
    )


def word_level() -> TokenizersBackend:
    """Whole words split at spaces, special tokens inside the vocabulary, lower-casing normaliser."""
    words = ["[pad]", "[UNK]", "[SEP]", "[cls]", "the", "matrix", "next", "item"]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return TokenizersBackend(
        tokenizer_object=backend, pad_token="[pad]", unk_token="[UNK]", sep_token="[SEP]", cls_token="[cls]"
    )


def _without_added(parts: str, contents: list[str]) -> Tokenizer:
    import json

    tree = json.loads(parts)
    tree["added_tokens"] = [token for token in tree["added_tokens"] if token["content"] not in set(contents)]
    return Tokenizer.from_str(json.dumps(tree))


FAMILIES = {
    "byte_level_bpe": byte_level_bpe,
    "merged_marker_bpe": merged_marker_bpe,
    "llama2_bpe": llama2_bpe,
    "unigram": unigram,
    "word_level": word_level,
}


@cache
def family(name: str) -> TokenizersBackend:
    return FAMILIES[name]()
