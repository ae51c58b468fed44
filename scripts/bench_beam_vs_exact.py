"""Beam search against exact scoring: how much it misses, how often a list can be proven, and what exact scoring costs.

    OMP_NUM_THREADS=1 python scripts/bench_beam_vs_exact.py                                  # all parts, synthetic data
    OMP_NUM_THREADS=1 python scripts/bench_beam_vs_exact.py --parts misses --artifact runs/demo --dataset movielens-100k
    OMP_NUM_THREADS=1 python scripts/bench_beam_vs_exact.py --parts speed --json

Part `speed`: score_all over the trie against item by item, for one user. T5 of TIGER's size (4 + 4 layers, d 128, 6 heads
of 64, ff 1024) with 80 encoder tokens and a small Llama (4 layers, d 256, GQA 4/2) with a prompt of 80; 10,000 items of
4 x 256 codes, random weights. Item by item is the transformers model's own teacher-forced forward over rows of 4 tokens,
as many rows per call as are fastest; encoder output and prompt are shared in the best way that forward allows:
`shared` reads them once and hands every row a view of the same cross-attention or prompt keys, `repeated` repeats the
encoder output per row, which is what passing `encoder_outputs` and `labels` does, or runs prompt and item as one sequence
(Llama; timed on 256 items and scaled); `without_last` does not run
the last token of an item, whose output nobody reads (Llama only; the decoder of T5 runs 4 tokens with the start token).
Log-probabilities of all ways must agree to 1e-4, or the run stops. The trie saves rows of the model, so the factor is near
the quotient of the rows where the layers are wide; the head restricted to a level's codes and shared attention add to it.

Part `misses`: on an artefact folder, or on a small model trained here on synthetic walks (about a minute), how often
beam search of width 10, 20 and 50 misses an item of the exact top 10, how often `certified_top_k` certifies with at most
so many beams, how many rows it scores, and how many certified lists are wrong (none may be).

Rounds of all contestants alternate; medians of processor time are reported.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, EncoderDecoderCache, LlamaConfig, LlamaForCausalLM, T5Config
from transformers import T5ForConditionalGeneration as T5
from transformers.modeling_outputs import BaseModelOutput

from hf_genrec.alignment.trainers.arguments import RecommenderTrainingArguments
from hf_genrec.alignment.trainers.recommender import train_recommender
from hf_genrec.data.sequences import Sequences
from hf_genrec.data.splits import EvaluationSet, Split
from hf_genrec.errors import GenRecError
from hf_genrec.evaluation.beam_check import beam_versus_exact, certified_versus_exact
from hf_genrec.evaluation.catalogue import align_to_catalogue
from hf_genrec.generation.decoding.causal_lm import CausalLMScorer
from hf_genrec.generation.decoding.encoder_decoder import EncoderDecoderScorer
from hf_genrec.generation.decoding.exhaustive import score_all_leaves
from hf_genrec.generation.trie import ItemTrie
from hf_genrec.hub import load_artifact
from hf_genrec.identifiers.tokenization_item import ItemTokenizer
from hf_genrec.models.rq_transformer.configuration_rq_transformer import RQTransformerConfig
from hf_genrec.models.rq_transformer.modeling_rq_transformer import RQTransformerForCausalLM
from hf_genrec.recipes.pipeline import load_data_section

LEVELS, CODES, ITEMS, LENGTH = 4, 256, 10_000, 80
SAMPLE = 256  # items of the contestant that is too slow to run on all
OFFSETS = [4 + CODES * level for level in range(LEVELS)]
VOCABULARY = 4 + CODES * LEVELS


# ---------------------------------------------------------------------------------------------------- part speed


def catalogue() -> np.ndarray:
    """ITEMS distinct random codes (N, L)."""
    rng = np.random.default_rng(0)
    return np.unique(rng.integers(0, CODES, (ITEMS + 1000, LEVELS)), axis=0)[rng.permutation(ITEMS)]


def item_log_probs(logits_RLV: torch.Tensor, tokens_RL: torch.Tensor) -> torch.Tensor:
    return logits_RLV.float().log_softmax(-1).gather(-1, tokens_RL.unsqueeze(-1)).sum((1, 2))


def t5_contestants(tokens_NL: torch.Tensor, trie: ItemTrie, rows: int) -> dict[str, Callable[[], torch.Tensor]]:
    config = T5Config(
        vocab_size=VOCABULARY,
        decoder_start_token_id=0,
        d_model=128,
        d_kv=64,
        d_ff=1024,
        num_layers=4,
        num_heads=6,
    )
    model = T5(config).eval()
    ids = torch.randint(4, VOCABULARY, (1, LENGTH))
    decoder = EncoderDecoderScorer(model, OFFSETS, [CODES] * LEVELS)

    def trie_walk() -> torch.Tensor:
        return score_all_leaves(decoder, decoder.start_decoding(ids, None), trie, batch_size=1)[0, trie.item_leaf_N]

    def repeated() -> torch.Tensor:
        states = model.encoder(input_ids=ids).last_hidden_state
        found = []
        for part in tokens_NL.split(min(rows, 256)):  # the keys of 80 positions per row are large
            output = model(
                encoder_outputs=BaseModelOutput(last_hidden_state=states.expand(len(part), -1, -1)),  # type: ignore[arg-type]
                decoder_input_ids=model._shift_right(part),
                use_cache=False,
            )
            found.append(item_log_probs(output.logits, part))
        return torch.cat(found)

    def shared() -> torch.Tensor:
        states = model.encoder(input_ids=ids).last_hidden_state
        start = torch.zeros(1, 1, dtype=torch.long)
        first = EncoderDecoderCache(DynamicCache(), DynamicCache())
        model(
            encoder_outputs=BaseModelOutput(last_hidden_state=states),  # type: ignore[arg-type]
            decoder_input_ids=start,
            past_key_values=first,
            use_cache=True,
        )
        found = []
        for part in tokens_NL.split(rows):
            cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
            for layer, held in enumerate(first.cross_attention_cache.layers):
                views = (tensor.expand(len(part), -1, -1, -1) for tensor in (held.keys, held.values))
                cache.cross_attention_cache.update(*views, layer)  # type: ignore[arg-type]
                cache.is_updated[layer] = True
            output = model(
                encoder_outputs=BaseModelOutput(last_hidden_state=states.expand(len(part), -1, -1)),  # type: ignore[arg-type]
                decoder_input_ids=model._shift_right(part),
                past_key_values=cache,
                use_cache=True,
            )
            found.append(item_log_probs(output.logits, part))
        return torch.cat(found)

    return {"trie": trie_walk, "shared": shared, "repeated": repeated}


def llama_contestants(tokens_NL: torch.Tensor, trie: ItemTrie, rows: int) -> dict[str, Callable[[], torch.Tensor]]:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(4, VOCABULARY, (1, LENGTH))
    decoder = CausalLMScorer(model, OFFSETS, [CODES] * LEVELS)

    def trie_walk() -> torch.Tensor:
        return score_all_leaves(decoder, decoder.start_decoding(ids, None), trie, batch_size=1)[0, trie.item_leaf_N]

    def shared(last: bool = True) -> torch.Tensor:
        prompt = DynamicCache()
        first = model(input_ids=ids, past_key_values=prompt, use_cache=True, logits_to_keep=1).logits
        found = []
        for part in tokens_NL.split(rows):
            cache = DynamicCache()
            for layer, held in enumerate(prompt.layers):
                views = (tensor.expand(len(part), -1, -1, -1) for tensor in (held.keys, held.values))
                cache.update(*views, layer)  # type: ignore[arg-type]
            output = model(input_ids=part if last else part[:, :-1], past_key_values=cache, use_cache=True)
            logits = torch.cat([first.expand(len(part), -1, -1), output.logits[:, : LEVELS - 1]], dim=1)
            found.append(item_log_probs(logits, part))
        return torch.cat(found)

    def repeated() -> torch.Tensor:
        found = []
        for part in tokens_NL[:SAMPLE].split(64):
            whole = torch.cat([ids.expand(len(part), -1), part], dim=1)
            logits = model(input_ids=whole, use_cache=False, logits_to_keep=LEVELS + 1).logits
            found.append(item_log_probs(logits[:, :-1], part))
        return torch.cat(found)

    return {"trie": trie_walk, "shared": shared, "without_last": lambda: shared(last=False), "repeated": repeated}


def run_speed(repeats: int) -> list[dict[str, Any]]:
    """One row per model.

    Raises:
        SystemExit: the ways to score disagree.
    """
    codes = catalogue()
    trie, tokens = ItemTrie.from_codes(codes, [CODES] * LEVELS), torch.from_numpy(codes) + torch.tensor(OFFSETS)
    report = []
    for name, build in (("t5_tiger", t5_contestants), ("llama", llama_contestants)):
        times: dict[str, list[float]] = {}
        torch.manual_seed(0)
        with torch.no_grad():
            # rows per call of the item-by-item way: whichever is fastest on this machine
            best_rows, best_time = 0, float("inf")
            for rows in (128, 512, 2048):
                torch.manual_seed(0)
                trial = build(tokens[:2048], trie, rows)["shared"]
                trial()
                start = time.process_time()
                trial()
                if time.process_time() - start < best_time:
                    best_rows, best_time = rows, time.process_time() - start
            torch.manual_seed(0)
            contestants = build(tokens, trie, best_rows)
            scores = {way: function() for way, function in contestants.items()}
            for way, found in scores.items():
                gap = float((found - scores["trie"][: len(found)]).abs().max())
                if gap > 1e-4:
                    raise SystemExit(f"{name}: {way} and trie differ by {gap:.2g}.")
            for turn in range(repeats):
                for way, function in contestants.items():
                    if way == "repeated" and turn >= 1:  # several times slower; one round is enough to say so
                        continue
                    start = time.process_time()
                    function()
                    spent = time.process_time() - start
                    times.setdefault(way, []).append(spent * ITEMS / len(scores[way]))
        medians = {way: statistics.median(values) for way, values in times.items()}
        report.append(
            {
                "model": name,
                "items": ITEMS,
                "rows_per_call": best_rows,
                "trie_rows": sum(trie.num_nodes(level) for level in range(LEVELS)),
                "item_rows": ITEMS * LEVELS,
                "seconds": medians,
                "speedup": {way: medians[way] / medians["trie"] for way in medians if way != "trie"},
                "largest_difference": max(
                    float((found - scores["trie"][: len(found)]).abs().max()) for found in scores.values()
                ),
            }
        )
    return report


# --------------------------------------------------------------------------------------------------- part misses


def synthetic(num_items: int = 600, users: int = 400, seed: int = 0) -> tuple[ItemTokenizer, Split]:
    """Walks in which the successor of an item follows with probability 0.4, one of its cluster with 0.4, and any item,
    popular ones first, otherwise; codes 12 x 12 x 12 whose first one is the cluster.
    """
    rng = np.random.default_rng(seed)
    cluster = rng.integers(0, 12, num_items)
    codes = np.stack([cluster, *rng.integers(0, 12, (2, num_items))], axis=1)
    members = [np.flatnonzero(cluster == c) for c in range(12)]
    successor = rng.permutation(num_items)
    popularity = 1.0 / np.arange(1, num_items + 1) ** 0.8
    popularity /= popularity.sum()
    rows = []
    for _ in range(users):
        row = [int(rng.choice(num_items, p=popularity))]
        for kind in rng.random(int(rng.integers(8, 30))):
            if kind < 0.4:
                row.append(int(successor[row[-1]]))
            elif kind < 0.8:
                row.append(int(rng.choice(members[cluster[row[-1]]])))
            else:
                row.append(int(rng.choice(num_items, p=popularity)))
        rows.append(row)
    everything = Sequences.from_rows(rows)

    def held_out(back: int) -> EvaluationSet:
        targets = np.array([row[-back] for row in rows], np.int32)
        return EvaluationSet(np.arange(users), everything.truncate_tail(back), targets)

    tokenizer = ItemTokenizer.from_codes([f"item-{i}" for i in range(num_items)], codes, codebook_sizes=(12, 12, 12))
    return tokenizer, Split("leave_one_out", everything.truncate_tail(2), held_out(2), held_out(1), {})


def train_here(epochs: float, seed: int = 0) -> tuple[Any, ItemTokenizer, EvaluationSet]:
    """A small RQ-Transformer on the synthetic walks."""
    tokenizer, split = synthetic(seed=seed)
    torch.manual_seed(seed)
    config = RQTransformerConfig.from_tokenizer(tokenizer, hidden_size=48, dropout=0.1)
    model = RQTransformerForCausalLM(config)
    model.set_catalogue(tokenizer.codes)
    with tempfile.TemporaryDirectory() as folder:
        arguments = RecommenderTrainingArguments(
            output_dir=folder,
            num_train_epochs=epochs,
            learning_rate=3e-3,
            per_device_train_batch_size=16,
            max_history=30,
            eval_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            seed=seed,
        )
        train_recommender(model, tokenizer, split, arguments)
    return model.eval(), tokenizer, split.test


def from_artifact(options: argparse.Namespace) -> tuple[Any, ItemTokenizer, EvaluationSet]:
    artifact = load_artifact(options.artifact)
    dataset = options.dataset or (artifact.metrics or {}).get("dataset")
    if dataset is None:
        raise GenRecError("name the data: --dataset movielens-100k (the artefact does not say which it used)")
    _, split = load_data_section(
        dict((artifact.recipe or {}).get("data") or {}),
        dataset,
        data_dir=options.data_dir,
        align=lambda data: align_to_catalogue(data, artifact.tokenizer.item_ids),
    )
    return artifact.model, artifact.tokenizer, split.test


def run_misses(options: argparse.Namespace) -> dict[str, Any]:
    model, tokenizer, rows = from_artifact(options) if options.artifact else train_here(options.epochs, options.seed)
    if options.histories < len(rows):
        chosen = np.random.default_rng(options.seed).choice(len(rows), options.histories, replace=False)
        rows = rows.take(np.sort(chosen))
    report: dict[str, Any] = {"model": options.artifact or "trained here", "renormalize": {}}
    for renormalize in (False, True):
        config = model.recommendation_config.merged(renormalize=renormalize)
        shared: dict[str, Any] = {"k": options.k, "config": config, "progress": False}
        beam = beam_versus_exact(
            model, tokenizer, rows.histories, targets=rows.targets, widths=options.widths, **shared
        )
        proven = certified_versus_exact(model, tokenizer, rows.histories, max_beams=[*options.widths, None], **shared)
        if any(found["wrong_share"] for found in proven.limits.values()):
            raise SystemExit(f"a certified list is wrong: {proven}")
        report["renormalize"][str(renormalize).lower()] = {"beam": beam.to_dict(), "certified": proven.to_dict()}
        if not options.json:
            print(f"renormalize={renormalize}\n{beam}\n{proven}\n")
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="speed,misses", help="comma-separated: speed, misses")
    parser.add_argument("--artifact", help="part misses: artefact folder; default: a small model is trained here")
    parser.add_argument("--dataset", help="part misses: name or path; default: the artefact's own")
    parser.add_argument("--data_dir", help="part misses: folder of the named data sets")
    parser.add_argument("--histories", type=int, default=200, help="part misses: histories checked, drawn at random")
    parser.add_argument("--k", type=int, default=10, help="part misses: items compared")
    parser.add_argument("--widths", type=int, nargs="+", default=[10, 20, 50], help="part misses: beam widths")
    parser.add_argument("--epochs", type=float, default=30.0, help="part misses: of the model trained here")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=5, help="part speed: rounds; medians are reported")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    names = options.parts.split(",")
    if unknown := set(names) - {"speed", "misses"}:
        parser.error(f"unknown parts {sorted(unknown)}; choose among speed, misses")
    torch.set_num_threads(1)
    report: dict[str, Any] = {"torch": torch.__version__, "threads": 1}
    if "speed" in names:
        report["speed"] = run_speed(max(1, options.repeats))
        for row in [] if options.json else report["speed"]:
            ways = ", ".join(
                f"item by item ({way}) {row['seconds'][way]:.2f} s = {factor:.1f}x"
                for way, factor in row["speedup"].items()
            )
            print(
                f"{row['model']}, {row['items']:,} items: trie {row['seconds']['trie']:.2f} s, {ways}; rows "
                f"{row['trie_rows']:,} of {row['item_rows']:,}, scores agree to {row['largest_difference']:.1e}"
            )
    if "misses" in names:
        try:
            report["misses"] = run_misses(options)
        except GenRecError as error:
            sys.exit(f"error: {error}")
    if options.json:
        json.dump(report, sys.stdout, indent=2)
        print()


if __name__ == "__main__":
    main()
