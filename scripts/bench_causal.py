"""Decoder-only recommendation against transformers' beam search, on one thread and random weights.

    python scripts/bench_causal.py --json

A Llama-type model (4 layers, width 256, 4 heads with 2 key heads, intermediate size 1,024, vocabulary 8,768, float32) and
10,000 items of 4 x 256 codes. `recommend` (whole call, prompts to named items) against `generate` with the same beams in
two score modes:

    full           log-probabilities over the full vocabulary; `generate` with a dict trie in `prefix_allowed_tokens_fn`
    renormalized   over the legal tokens of each step; `generate` with ItemTrieLogitsProcessor(renormalize=True)

The two run in turns; every figure is a median of processor time (of one thread: wall-clock time of an idle machine),
every ratio is inside one run, and every item list is asserted to be the same. Cases in which `generate` takes many seconds
are repeated `--slow-repeats` times, the others `--repeats` times. Bytes are those of the prompt's keys and values: held
once per user here, once per beam by `generate`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessorList

from hf_genrec.generation.logits_process import ItemTrieLogitsProcessor
from hf_genrec.generation.recommend import recommend, scorer_for
from hf_genrec.identifiers.tokenization_item import ItemTokenizer

LEVELS, CODES, ITEMS, VOCABULARY = 4, 256, 10_000, 8_768
CASES = ((1, 50, 512), (2, 20, 256), (32, 50, 80))  # users, beams, prompt tokens
MODES = ("full", "renormalized")
_SLOW_TOKENS = 50_000  # users * beams * prompt tokens from which `generate` counts as slow


def make_model(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.05,  # scores far enough apart that no two beams are equal to rounding
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


def make_catalogue(rng: np.random.Generator) -> ItemTokenizer:
    flat = rng.choice(CODES**LEVELS, ITEMS, replace=False)
    codes = np.stack(np.unravel_index(flat, (CODES,) * LEVELS), axis=1)
    return ItemTokenizer.from_codes([f"item-{i}" for i in range(ITEMS)], codes, (CODES,) * LEVELS)


def dict_trie(tokenizer: ItemTokenizer) -> dict[tuple[int, ...], list[int]]:
    """Prefix of tokens -> legal next tokens, the usual way to constrain `generate`."""
    children: dict[tuple[int, ...], set[int]] = {}
    for row in (np.asarray(tokenizer.codes) + np.asarray(tokenizer.level_offsets)).tolist():
        for level in range(LEVELS):
            children.setdefault(tuple(row[:level]), set()).add(row[level])
    return {prefix: sorted(tokens) for prefix, tokens in children.items()}


def by_generate(
    model: LlamaForCausalLM,
    tokenizer: ItemTokenizer,
    prompts: torch.Tensor,
    beams: int,
    mode: str,
    children: dict[tuple[int, ...], list[int]],
) -> torch.Tensor:
    length = prompts.shape[1]
    if mode == "full":
        constraint: dict[str, Any] = {
            "prefix_allowed_tokens_fn": lambda row, tokens: children[tuple(tokens[length:].tolist())]
        }
    else:
        processor = ItemTrieLogitsProcessor(tokenizer, length, renormalize=True)
        constraint = {"logits_processor": LogitsProcessorList([processor])}
    return model.generate(
        input_ids=prompts,
        attention_mask=torch.ones_like(prompts),
        num_beams=beams,
        num_return_sequences=beams,
        min_new_tokens=LEVELS,
        max_new_tokens=LEVELS,
        length_penalty=0.0,
        do_sample=False,
        **constraint,
    )[:, length:]


def timed(action: Callable[..., Any], *args: Any) -> tuple[float, Any]:
    start = time.process_time()
    result = action(*args)
    return time.process_time() - start, result


def cache_bytes(model: LlamaForCausalLM, tokenizer: ItemTokenizer, prompts: torch.Tensor, beams: int) -> dict:
    """Bytes of keys and values: of the prompt and of the beams' own codes at the last level, and what `generate` holds."""
    scorer = scorer_for(model, tokenizer)
    users = len(prompts)
    with torch.no_grad():
        state = scorer.start_decoding(prompts, None)
        search = scorer.start_beams(state)
        codes = torch.arange(beams).expand(users, -1)
        for level in range(LEVELS - 1):
            search.reorder(codes if level else torch.zeros_like(codes), codes, level)
        search.score(LEVELS - 1)
        repeated = model(prompts.repeat_interleave(beams, 0)[:beams], use_cache=True).past_key_values
    one_user = sum(t.numel() * t.element_size() for layer in repeated.layers for t in (layer.keys, layer.values))
    return {"prompt": state.nbytes, "beams": search.nbytes, "generate_prompt": one_user * users}


def bench_case(
    model: LlamaForCausalLM,
    tokenizer: ItemTokenizer,
    case: tuple[int, int, int],
    children: dict[tuple[int, ...], list[int]],
    rng: np.random.Generator,
    repeats: int,
    slow_repeats: int,
    modes: tuple[str, ...],
) -> dict:
    users, beams, length = case
    repeats = slow_repeats if users * beams * length >= _SLOW_TOKENS else repeats
    histories = rng.integers(0, ITEMS, (users, length // LEVELS))
    tokens = np.asarray(tokenizer.codes)[histories] + np.asarray(tokenizer.level_offsets)
    prompts = torch.from_numpy(tokens.reshape(users, -1).astype(np.int64))
    result: dict[str, Any] = {"users": users, "beams": beams, "prompt_tokens": length, "repeats": repeats}

    def ours(mode: str) -> Any:
        renormalize = mode == "renormalized"
        options: dict[str, Any] = {"k": beams, "num_beams": beams, "exclude_seen": False, "renormalize": renormalize}
        return recommend(model, input_ids=prompts, tokenizer=tokenizer, **options)

    for mode in modes:
        ours(mode)  # warm
        seconds: dict[str, list[float]] = {"generate": [], "recommend": []}
        for _ in range(repeats):
            spent, answer = timed(by_generate, model, tokenizer, prompts, beams, mode, children)
            seconds["generate"].append(spent)
            spent, items = timed(ours, mode)
            seconds["recommend"].append(spent)
            expected = [item[0] for item in tokenizer.token_ids_to_items(answer.flatten().tolist())]
            assert [entry.item_id for row in items for entry in row] == expected, "the item lists differ"
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        result[mode] = {
            "generate_ms": round(1e3 * medians["generate"], 1),
            "recommend_ms": round(1e3 * medians["recommend"], 1),
            "ratio": round(medians["generate"] / medians["recommend"], 1),
        }
    result["bytes"] = cache_bytes(model, tokenizer, prompts, beams)
    return result


def run(
    repeats: int = 5,
    slow_repeats: int = 3,
    cases: tuple[tuple[int, int, int], ...] = CASES,
    modes: tuple[str, ...] = MODES,
    seed: int = 0,
) -> dict:
    """All cases: {"model": ..., "cases": [...]}."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(seed)
    model, tokenizer = make_model(seed), make_catalogue(rng)
    children = dict_trie(tokenizer)
    results = []
    with torch.no_grad():
        for case in cases:
            results.append(bench_case(model, tokenizer, case, children, rng, repeats, slow_repeats, modes))
    config = model.config
    return {
        "threads": 1,
        "items": ITEMS,
        "codes": [CODES] * LEVELS,
        "model": {
            "type": "llama",
            "layers": config.num_hidden_layers,
            "width": config.hidden_size,
            "heads": [config.num_attention_heads, config.num_key_value_heads],
            "intermediate": config.intermediate_size,
            "vocabulary": config.vocab_size,
            "dtype": "float32",
        },
        "cases": results,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--slow-repeats", type=int, default=3, help="for cases in which generate takes many seconds")
    parser.add_argument("--cases", type=int, nargs="+", default=list(range(len(CASES))), help="numbers of cases to run")
    parser.add_argument("--modes", choices=MODES, nargs="+", default=list(MODES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    result = run(
        args.repeats, args.slow_repeats, tuple(CASES[number] for number in args.cases), tuple(args.modes), args.seed
    )
    if args.json:
        print(json.dumps(result, indent=2))
        return
    for case in result["cases"]:
        print(f"{case['users']} users x {case['beams']} beams, prompt of {case['prompt_tokens']} tokens")
        for mode in args.modes:
            row = case[mode]
            print(
                f"    {mode:<13} generate {row['generate_ms']:>9,.1f} ms   recommend {row['recommend_ms']:>8,.1f} ms   "
                f"{row['ratio']:>5.1f}x"
            )
        held = case["bytes"]
        print(
            f"    prompt keys and values {held['prompt'] / 2**20:.2f} MiB (+ {held['beams'] / 2**20:.2f} of the beams); "
            f"generate {held['generate_prompt'] / 2**20:.2f} MiB"
        )


if __name__ == "__main__":
    main()
