"""Small rankers for tests: a tiny language model and a tiny SASRec over a catalogue of made-up titles."""

from __future__ import annotations

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hf_genrec.identifiers.text_vocabulary import train_text_tokenizer
from hf_genrec.identifiers.tokenization_item import ItemTokenizer
from hf_genrec.models.candidate_ranker.modeling_candidate_ranker import CandidateRankerForCausalLM
from hf_genrec.models.sasrec.configuration_sasrec import SASRecConfig
from hf_genrec.models.sasrec.modeling_sasrec import SASRecForCausalLM

WORDS = ("red", "blue", "old", "tiny", "happy", "river", "stone", "cloud", "tower", "song")
NUM_ITEMS = 24


def titles(num_items: int = NUM_ITEMS) -> list[str]:
    return [f"{WORDS[n % 10]} {WORDS[(n // 10 + 5) % 10]} {n}" for n in range(num_items)]


def text_tokenizer(texts: list[str] | None = None):
    tokenizer = train_text_tokenizer([*(texts or titles()), *["is: Yes", "is: No"] * 20], 330)
    return tokenizer


def item_tokenizer(num_items: int = NUM_ITEMS) -> ItemTokenizer:
    # items are not in the order of their codes
    codes = (np.arange(num_items) * 5 + 3) % num_items if np.gcd(5, num_items) == 1 else np.arange(num_items)[::-1]
    return ItemTokenizer.from_codes([f"i{n}" for n in range(num_items)], np.asarray(codes)[:, None])


def language_model(tokenizer, kind: str = "llama", seed: int = 0, **options):
    torch.manual_seed(seed)
    size = len(tokenizer)
    if kind == "gpt2":
        config = GPT2Config(vocab_size=size, n_embd=16, n_layer=1, n_head=2, n_positions=512, initializer_range=0.3)
        return GPT2LMHeadModel(config).eval()
    sizes = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "initializer_range": 0.3, "max_position_embeddings": 512,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(vocab_size=size, **{**sizes, **options})).eval()


def retriever(items: ItemTokenizer, seed: int = 1, **options) -> SASRecForCausalLM:
    torch.manual_seed(seed)
    sizes = {
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "dropout": 0.0,
        "initializer_range": 0.4,
    }
    return SASRecForCausalLM(SASRecConfig.from_tokenizer(items, **{**sizes, **options})).eval()


def ranker(verbalizer: str = "letters", kind: str = "llama", num_candidates: int = 5, language=None, **options):
    """(model, item tokenizer, text tokenizer)."""
    text, items = text_tokenizer(), item_tokenizer()
    model = CandidateRankerForCausalLM.from_language_model(
        language_model(text, kind) if language is None else language,
        text,
        item_tokenizer=items,
        item_texts=titles(),
        retriever=retriever(items),
        verbalizer=verbalizer,
        num_candidates=num_candidates,
        **{"max_history": 4, **options},
    )
    return model.eval(), items, text
