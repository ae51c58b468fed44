"""Time the search: this library's engines against transformers' `generate`, on one thread, ratios inside one run.

    OMP_NUM_THREADS=1 python scripts/bench_decoding.py                       # all parts that are there
    OMP_NUM_THREADS=1 python scripts/bench_decoding.py --parts t5 --json     # one JSON object

Part `t5`: T5 of TIGER's size (4 + 4 layers, d 128, 6 heads of 64, ff 1024), 10,000 items of 4 x 256 codes, 80 encoder
tokens. `generate` gets a Python-dict trie as `prefix_allowed_tokens_fn`; the engine is what `recommend` runs. Both must
name the same items in the same order, or the run stops. `bare` are the matrix products of the same work alone (torch.mm
and torch.bmm into ready buffers, weights and inputs random): linear layers, attention and head of encoder and decoder,
the encoder, the first step and the cross-attention projections once per user. `unconstrained` is the same engine with
the best codes of the level's whole block, without a trie.

Parts `causal` and `trie` are scripts/bench_causal.py and scripts/bench_trie.py.

Repetitions of all contestants alternate; medians are reported, ratios of wall-clock time and of processor time (on a
shared machine the latter are the steadier ones; absolute times mean little there).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import T5Config, T5ForConditionalGeneration

from hf_genrec.generation.configuration_recommendation import RecommendationConfig
from hf_genrec.generation.decoding.encoder_decoder import EncoderDecoderScorer
from hf_genrec.generation.decoding.kernel import beam_step
from hf_genrec.generation.decoding.t5_layers import encode
from hf_genrec.generation.search import search_items
from hf_genrec.generation.trie import ItemTrie
from hf_genrec.models.tiger.configuration_tiger import TigerConfig
from hf_genrec.models.tiger.modeling_tiger import TigerForConditionalGeneration

LEVELS, CODES, ITEMS, LENGTH = 4, 256, 10_000, 80
OFFSETS = [4 + CODES * level for level in range(LEVELS)]
VOCABULARY = 4 + CODES * LEVELS
SIZES = {"d_model": 128, "d_kv": 64, "d_ff": 1024, "num_layers": 4, "num_decoder_layers": 4, "num_heads": 6}
SETTINGS = ((1, 20, 5.0), (8, 20, 7.0), (32, 50, 13.0))  # users, beams, wanted factor over `generate`


def interleaved(functions: dict[str, Callable[[], Any]], repeats: int) -> tuple[dict[str, float], dict[str, float]]:
    """Median milliseconds of each function, on the clock and of the processor.

    One call to warm up, then `repeats` rounds in which each function runs once.
    """
    for function in functions.values():
        function()
    wall: dict[str, list[float]] = {name: [] for name in functions}
    processor: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start, start_processor = time.perf_counter(), time.process_time()
            function()
            processor[name].append(1e3 * (time.process_time() - start_processor))
            wall[name].append(1e3 * (time.perf_counter() - start))
    medians = [{name: statistics.median(values) for name, values in times.items()} for times in (wall, processor)]
    return medians[0], medians[1]


# ---------------------------------------------------------------- contestants


def build(kind: str) -> Any:
    """A random model of TIGER's size: stock T5, or TIGER with one distribution per level."""
    torch.manual_seed(0)
    if kind == "tiger":
        return TigerForConditionalGeneration(TigerConfig(codebook_sizes=[CODES] * LEVELS, **SIZES)).eval()  # type: ignore[arg-type]
    return T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, decoder_start_token_id=0, **SIZES)).eval()  # type: ignore[arg-type,call-arg]


def catalogue() -> np.ndarray:
    """ITEMS distinct random codes (N, L)."""
    rng = np.random.default_rng(0)
    return np.unique(rng.integers(0, CODES, (ITEMS + 1000, LEVELS)), axis=0)[rng.permutation(ITEMS)]


def dict_trie(codes_NL: np.ndarray) -> dict[int, Any]:
    root: dict[int, Any] = {}
    for row in (codes_NL + OFFSETS).tolist():
        node = root
        for token in row:
            node = node.setdefault(token, {})
    return root


def generate_search(model: Any, ids: torch.Tensor, root: dict[int, Any], beams: int) -> torch.Tensor:
    """Tokens of the items that `generate` finds, (B * K, L), best first."""

    def allowed(batch_id: int, prefix: torch.Tensor) -> list[int]:
        node = root
        for token in prefix.tolist()[1:]:
            node = node[token]
        return list(node)

    return model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        num_beams=beams,
        num_return_sequences=beams,
        max_new_tokens=LEVELS,
        do_sample=False,
        length_penalty=0.0,
        prefix_allowed_tokens_fn=allowed,
    )[:, 1:]


def free_search(decoder: Any, ids: torch.Tensor, beams: int) -> torch.Tensor:
    """The same engine and loop over whole code blocks: codes (B, K, L) of the best strings, existing or not."""
    state = decoder.start_decoding(ids, torch.ones_like(ids))
    cache = decoder.start_beams(state)
    scores = torch.zeros(len(ids), 1)
    chosen = torch.zeros(len(ids), 1, 0, dtype=torch.long)
    for level in range(LEVELS):
        total = (scores.unsqueeze(-1) + cache.score(level).log_probs()).flatten(1)
        scores, best = total.topk(beams, dim=-1)
        parents, codes = best // CODES, best % CODES
        chosen = torch.cat([chosen.gather(1, parents.unsqueeze(-1).expand(-1, -1, level)), codes.unsqueeze(-1)], -1)
        if level + 1 < LEVELS:
            cache.reorder(parents, codes, level)
    return chosen


def bare_products(batch: int, beams: int) -> dict[str, Callable[[], None]]:
    """The matrix products of a search alone, by part."""
    width, inner, heads = SIZES["d_model"], SIZES["d_kv"] * SIZES["num_heads"], SIZES["num_heads"]
    layers, wide, head_width = SIZES["num_layers"], SIZES["d_ff"], SIZES["d_kv"]

    tensors: dict[tuple[Any, ...], torch.Tensor] = {}

    def tensor(name: str, *shape: int) -> torch.Tensor:
        """One tensor per name and shape: weights and keys are read again, buffers are written again, as in a model."""
        if (name, *shape) not in tensors:
            tensors[(name, *shape)] = torch.randn(*shape)
        return tensors[(name, *shape)]

    def product(name: str, rows: int, inputs: int, outputs: int) -> tuple[torch.Tensor, ...]:
        return tensor("in", rows, inputs), tensor(name, inputs, outputs), tensor("out", rows, outputs)

    def attention(name: str, queries: int) -> tuple[torch.Tensor, ...]:
        rows = batch * heads
        keys, values = (
            tensor(f"{name} keys", rows, head_width, LENGTH),
            tensor(f"{name} values", rows, LENGTH, head_width),
        )
        weights = tensor("weights", rows, queries, LENGTH)
        return tensor("in", rows, queries, head_width), keys, values, weights, tensor("out", rows, queries, head_width)

    def part(
        products: list[tuple[torch.Tensor, ...]], attentions: list[tuple[torch.Tensor, ...]]
    ) -> Callable[[], None]:
        def function() -> None:
            for left, right, out in products:
                torch.mm(left, right, out=out)
            for query, keys, values, weights, mixed in attentions:
                torch.bmm(query, keys, out=weights)
                torch.bmm(weights, values, out=mixed)

        return function

    tokens = batch * LENGTH
    encoder, decoder, projections, cross = [], [], [], []
    for layer in range(layers):
        encoder += [product(f"encoder {layer} {name}", tokens, width, inner) for name in "qkv"]
        encoder.append(product(f"encoder {layer} o", tokens, inner, width))
        encoder.append(product(f"encoder {layer} wi", tokens, width, wide))
        encoder.append(product(f"encoder {layer} wo", tokens, wide, width))
        projections += [product(f"cross {layer} {name}", tokens, width, inner) for name in "kv"]
    for level in range(LEVELS):
        rows = batch * (beams if level else 1)
        for layer in range(layers):
            decoder += [product(f"{layer} {name}", rows, width, inner) for name in ("q", "k", "v", "cross q")]
            decoder += [product(f"{layer} {name}", rows, inner, width) for name in ("o", "cross o")]
            decoder += [product(f"{layer} wi", rows, width, wide), product(f"{layer} wo", rows, wide, width)]
            cross.append(attention(f"cross {layer}", beams if level else 1))
        decoder.append(product(f"head {level}", rows, width, CODES))
    return {
        "encoder": part(encoder, [attention(f"encoder {layer}", LENGTH) for layer in range(layers)]),
        "cross_projections": part(projections, []),
        "decoder": part(decoder, cross),
    }


# ---------------------------------------------------------------- part t5


def parts_of(decoder: Any, model: Any, ids: torch.Tensor, trie: ItemTrie, beams: int, repeats: int) -> dict[str, float]:
    """Median milliseconds of encoder, cross projections, decoder steps and everything about the trie."""
    times: dict[str, list[float]] = {"encoder": [], "cross_projections": [], "decoder": [], "kernel": []}
    for _ in range(repeats + 1):
        start = time.perf_counter()
        states = encode(model.encoder, ids, None)
        encoded = time.perf_counter()
        state = decoder.start_from_encoder(states, None)
        ready = time.perf_counter()
        cache, in_kernel = decoder.start_beams(state), 0.0
        nodes, scores = torch.zeros(len(ids), 1, dtype=torch.long), torch.zeros(len(ids), 1)
        for level in range(LEVELS):
            code_scores = cache.score(level)
            before = time.perf_counter()
            step = beam_step(trie, level, nodes, scores, code_scores, beams)
            in_kernel += time.perf_counter() - before
            nodes, scores = step.nodes_BK, step.scores_BK
            if level + 1 < LEVELS:
                cache.reorder(step.parents_BK, step.codes_BK, level)
        done = time.perf_counter()
        times["encoder"].append(encoded - start)
        times["cross_projections"].append(ready - encoded)
        times["decoder"].append(done - ready - in_kernel)
        times["kernel"].append(in_kernel)
    return {name: 1e3 * statistics.median(values[1:]) for name, values in times.items()}


def run_t5(repeats: int = 5, kind: str = "t5", settings: Sequence[tuple[int, int, float]] = SETTINGS) -> list[dict]:
    """One row per setting.

    Raises:
        SystemExit: `generate` and the engine name different items.
    """
    model, codes_NL = build(kind), catalogue()
    trie, root = ItemTrie.from_codes(codes_NL, [CODES] * LEVELS), dict_trie(codes_NL)
    decoder = model if kind == "tiger" else EncoderDecoderScorer(model, OFFSETS, [CODES] * LEVELS)
    generator, rows = torch.Generator().manual_seed(0), []
    for batch, beams, wanted in settings:
        ids = torch.randint(4, VOCABULARY, (batch, LENGTH), generator=generator)
        config = RecommendationConfig(k=beams, num_beams=beams)
        found: dict[str, torch.Tensor] = {}

        def engine(ids=ids, config=config, found=found) -> None:
            state = decoder.start_decoding(ids, torch.ones_like(ids))
            found["engine"], _ = search_items(decoder, state, trie, config, batch_size=len(ids))

        def generate(ids=ids, beams=beams, found=found) -> None:
            found["generate"] = generate_search(model, ids, root, beams)

        bare = bare_products(batch, beams)
        with torch.no_grad():
            times, processor = interleaved(
                {
                    "generate": generate,
                    "engine": engine,
                    "unconstrained": lambda ids=ids, beams=beams: free_search(decoder, ids, beams),
                    **{f"bare_{name}": function for name, function in bare.items()},
                },
                repeats,
            )
            parts = parts_of(decoder, model, ids, trie, beams, repeats)
        leaves = trie.lookup(found["generate"].view(batch, beams, LEVELS) - torch.tensor(OFFSETS))
        by_leaf = torch.stack([trie.items_of_leaf(int(leaf))[0] for leaf in leaves.flatten()]).view(batch, beams)
        if not torch.equal(by_leaf, found["engine"]):
            raise SystemExit(f"{batch} users, {beams} beams: generate and the engine name different items.")
        bare_ms, bare_processor = (sum(t[f"bare_{name}"] for name in bare) for t in (times, processor))
        rows.append(
            {
                "model": kind,
                "users": batch,
                "beams": beams,
                "generate_ms": times["generate"],
                "engine_ms": times["engine"],
                "bare_ms": bare_ms,
                "unconstrained_ms": times["unconstrained"],
                "speedup": times["generate"] / times["engine"],
                "wanted_speedup": wanted,
                "over_bare": times["engine"] / bare_ms,
                "constrained_over_unconstrained": times["engine"] / times["unconstrained"],
                "processor_time": {
                    "speedup": processor["generate"] / processor["engine"],
                    "over_bare": processor["engine"] / bare_processor,
                    "constrained_over_unconstrained": processor["engine"] / processor["unconstrained"],
                },
                "parts_ms": parts,
                "bare_parts_ms": {name: times[f"bare_{name}"] for name in bare},
                "identical_items": True,
            }
        )
    return rows


# ---------------------------------------------------------------- command line


def sibling(name: str) -> Any:
    """The module scripts/<name>.py, or None where it is not there."""
    path = Path(__file__).with_name(f"{name}.py")
    if not path.exists():
        return None
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="t5,causal,trie", help="comma-separated: t5, causal, trie")
    parser.add_argument("--model", choices=["t5", "tiger"], default="t5", help="part t5: stock T5, or TIGER")
    parser.add_argument("--users", type=int, nargs="*", help="part t5: only the settings with these numbers of users")
    parser.add_argument("--repeats", type=int, default=5, help="part t5: rounds; medians are reported")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    names = options.parts.split(",")
    if unknown := set(names) - {"t5", "causal", "trie"}:
        parser.error(f"unknown parts {sorted(unknown)}; choose among t5, causal, trie")
    torch.set_num_threads(1)
    report: dict[str, Any] = {"torch": torch.__version__, "threads": 1, "left_out": []}
    if "t5" in names:
        settings = [row for row in SETTINGS if not options.users or row[0] in options.users]
        report["t5"] = run_t5(max(5, options.repeats), options.model, settings)
    for name in ("causal", "trie"):
        if name in names:
            module = sibling(f"bench_{name}")
            if module is None:
                report["left_out"].append(f"{name}: scripts/bench_{name}.py is not there")
            else:
                report[name] = module.run()
    if options.json:
        json.dump(report, sys.stdout, indent=2)
        print()
        return
    for row in report.get("t5", ()):
        print(
            f"{row['model']} {row['users']:>2} users x {row['beams']} beams: generate {row['generate_ms']:9.1f} ms, "
            f"engine {row['engine_ms']:7.1f} ms = {row['speedup']:.1f}x (wanted {row['wanted_speedup']:.0f}x), "
            f"{row['over_bare']:.2f}x its bare products, {row['constrained_over_unconstrained']:.2f}x unconstrained"
        )
        used = row["processor_time"]
        print(
            f"    processor time: {used['speedup']:.1f}x generate, {used['over_bare']:.2f}x bare, "
            f"{used['constrained_over_unconstrained']:.2f}x unconstrained"
        )
        for name, value in row["parts_ms"].items():
            bare = row["bare_parts_ms"].get(name)
            print(f"    {name:<18} {value:8.2f} ms" + (f" (bare {bare:.2f})" if bare else ""))
    for name in ("causal", "trie"):
        if name in report:
            print(name, json.dumps(report[name], indent=2))
    for line in report["left_out"]:
        print("left out:", line)


if __name__ == "__main__":
    main()
