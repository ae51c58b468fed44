"""Small models, a word tokenizer and brute-force scores for the tests of the logits processors."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

PAD, EOS, BOS = 0, 1, 3


def tiny_model(kind, vocab, seed=0):
    """A random T5 or Llama with sharp, different preferences for each prompt."""
    torch.manual_seed(seed)
    special = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": BOS}
    if kind == "t5":
        config = T5Config(
            vocab_size=vocab, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=3, decoder_start_token_id=0,
            initializer_factor=4.0, **special,
        )  # fmt: skip
        return T5ForConditionalGeneration(config).eval()
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.4, **special,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def left_padded(prompts):
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(row)) + list(row) for row in prompts])
    return {
        "input_ids": ids,
        "attention_mask": (torch.arange(width) >= width - torch.tensor([[len(p)] for p in prompts])).long(),
    }


def prompt_length(model, inputs):
    return 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]


def generate(model, inputs, processor, **options):
    options = {"max_new_tokens": 8, "length_penalty": 0.0, "do_sample": False, "early_stopping": "never", **options}
    if options.get("num_beams", 1) == 1:
        options.pop("length_penalty"), options.pop("early_stopping")
    processors = LogitsProcessorList([] if processor is None else [processor])
    return model.generate(
        **inputs, logits_processor=processors, return_dict_in_generate=True, output_scores=True, **options
    )


def answers(model, inputs, output):
    """Generated tokens of every sequence, cut before the end token."""
    rows = output.sequences[:, prompt_length(model, inputs) :].tolist()
    return [tuple(row[: row.index(EOS)] if EOS in row else row) for row in rows]


@torch.no_grad()
def log_probs(model, prompt, answer):
    """Log-probability of each token of an answer after one prompt, over the full vocabulary."""
    if model.config.is_encoder_decoder:
        decoder = torch.tensor([[0, *answer]])
        logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=decoder).logits[0, :-1]
    else:
        logits = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(answer).unsqueeze(1))[:, 0]


def word_tokenizer(words):
    vocabulary = {token: index for index, token in enumerate(["<pad>", "</s>", "<unk>", "<s>", *words])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", bos_token="<s>"
    )


def next_tokens(strings, prefix):
    """What may follow a prefix, given all legal strings."""
    return sorted(
        {string[len(prefix)] for string in strings if string[: len(prefix)] == prefix and len(string) > len(prefix)}
    )


def legal_tokens(masked_row):
    return torch.isfinite(masked_row).nonzero().flatten().tolist()
