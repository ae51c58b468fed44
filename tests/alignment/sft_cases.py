"""Small language models with item tokens, rows and arguments for the tests of item tokens, LoRA and SFT."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, TokenizersBackend

from hf_genrec.alignment.item_embeddings import add_item_tokens
from hf_genrec.alignment.trainers.item_sft import ItemSFTConfig
from hf_genrec.data.sequences import Sequences
from hf_genrec.data.splits import EvaluationSet
from hf_genrec.identifiers.extend import extend_tokenizer
from hf_genrec.identifiers.tokenization_item import ItemTokenizer

BEFORE, AFTER = "<|im_start|>Bought ", " Next:"
NUM_ITEMS = 16
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@cache
def base_tokenizer() -> TokenizersBackend:
    """Byte-level BPE with chat markers and no padding token."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    markers = ["<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=290, initial_alphabet=alphabet, special_tokens=markers, show_progress=False
    )
    backend.train_from_iterator(["Bought The Matrix (1999) Next: the other shoe"] * 9, trainer)
    return TokenizersBackend(tokenizer_object=backend, bos_token=markers[0], eos_token=markers[1])


def item_tokenizer(num_items: int = NUM_ITEMS, **options) -> ItemTokenizer:
    codes = [[item // 4, item % 4] for item in range(num_items)]
    return ItemTokenizer.from_codes([f"i{item}" for item in range(num_items)], codes, (4, 4), **options)


@cache
def text_tokenizer():
    """The extended tokenizer; 8 item tokens behind a padding token behind the base vocabulary."""
    return extend_tokenizer(base_tokenizer(), item_tokenizer(), history_before=BEFORE, history_after=AFTER)


def base_lm(tied: bool = True, seed: int = 0, vocab_size: int | None = None, **options) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    vocab_size = vocab_size or len(base_tokenizer())
    config = LlamaConfig(vocab_size=vocab_size, tie_word_embeddings=tied, initializer_range=0.3, **{**SIZES, **options})
    return LlamaForCausalLM(config)


def item_lm(tied: bool = True, seed: int = 0, **options) -> LlamaForCausalLM:
    return add_item_tokens(base_lm(tied, seed, **options), text_tokenizer())


def row(history: list[int], target: int, extra: list[int] | None = None) -> dict[str, list[int]]:
    """Prompt, target item and where asked some more labelled tokens behind it."""
    tokenizer = text_tokenizer()
    prompt = tokenizer.encode_item_indices([history], return_tensors=None, padding=False)["input_ids"][0]
    answer = tokenizer.item_token_table[target].tolist() + (extra or [])
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


def rows(count: int, seed: int = 0, texts: bool = False) -> list[dict[str, list[int]]]:
    """Rows of 1 to 5 items; the target follows the last one. With `texts` every third row goes on in words."""
    rng = np.random.default_rng(seed)
    made = []
    for place in range(count):
        start, length = int(rng.integers(0, NUM_ITEMS)), int(rng.integers(1, 6))
        history = [(start + step) % NUM_ITEMS for step in range(length)]
        words = text_tokenizer().encode(" the shoe", add_special_tokens=False) if texts and place % 3 == 0 else None
        made.append(row(history, (start + length) % NUM_ITEMS, words))
    return made


def row_dataset(count: int, seed: int = 0, texts: bool = False) -> Dataset:
    return Dataset.from_list(rows(count, seed, texts))


def evaluation_set(users: int = 12, seed: int = 1) -> EvaluationSet:
    rng = np.random.default_rng(seed)
    starts, lengths = rng.integers(0, NUM_ITEMS, users), rng.integers(1, 6, users)
    histories = [[(start + step) % NUM_ITEMS for step in range(length)] for start, length in zip(starts, lengths)]
    targets = np.array([(history[-1] + 1) % NUM_ITEMS for history in histories], np.int32)
    return EvaluationSet(np.arange(users), Sequences.from_rows(histories), targets)


def arguments(folder, **options) -> ItemSFTConfig:
    values = {
        "per_device_train_batch_size": 8, "num_train_epochs": 1, "learning_rate": 1e-2, "logging_steps": 1,
        "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "lr_scheduler_type": "constant",
    }  # fmt: skip
    return ItemSFTConfig(output_dir=str(folder), **{**values, **options})


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def state(model) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}
