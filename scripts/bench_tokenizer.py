"""Throughput of the item tokenizer on random catalogues, on one thread.

    python scripts/bench_tokenizer.py --json

Per catalogue size: histories of ids (lists of strings) to padded tensors, the same from item indices, back to ids, and
the text path (`tokenizer("<a_1><b_2>...")`) for comparison; then building, saving and loading the tokenizer.
Rates are the best of `--repeats` runs, in items per second of processor time. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from transformers import AutoTokenizer

from hf_genrec.identifiers.tokenization_item import ItemTokenizer, register


def best(action, repeats: int) -> float:
    """Least processor time of `repeats` runs, seconds."""
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        action()
        seconds.append(time.process_time() - start)
    return min(seconds)


def bench(num_items: int, levels: int, size: int, args: argparse.Namespace) -> dict:
    random = np.random.default_rng(args.seed)
    ids = [f"B{number:09d}" for number in range(num_items)]
    codes = np.arange(num_items)[:, None] if levels == 1 else random.integers(0, size, (num_items, levels))
    start = time.perf_counter()
    tokenizer = ItemTokenizer.from_codes(ids, codes, None if levels == 1 else [size] * levels)
    seconds = {"build": time.perf_counter() - start}
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        tokenizer.save_pretrained(folder)
        seconds["save"] = time.perf_counter() - start
        start = time.perf_counter()
        loaded = AutoTokenizer.from_pretrained(folder)
        seconds["load"] = time.perf_counter() - start
        assert loaded.catalogue_fingerprint == tokenizer.catalogue_fingerprint
        megabytes = (Path(folder) / "item_codes.safetensors").stat().st_size / 1e6

    rows = [random.integers(0, num_items, args.history) for _ in range(args.rows)]
    # fresh strings, as a reader makes them: not the objects that the catalogue holds
    histories = [[f"B{number:09d}" for number in row] for row in rows]
    batches = [slice(first, first + args.batch) for first in range(0, args.rows, args.batch)]
    total = args.rows * args.history
    encoded = tokenizer.encode_item_indices(rows).input_ids
    sample = histories[: max(1, args.rows // 100)]
    texts = tokenizer.batch_decode(tokenizer.encode_histories(sample)["input_ids"])

    def encode(return_tensors):
        for batch in batches:
            tokenizer.encode_histories(histories[batch], return_tensors=return_tensors)

    def indices():
        for batch in batches:
            tokenizer.encode_item_indices(rows[batch])

    rates = {
        "encode_histories_pt": total / best(lambda: encode("pt"), args.repeats),
        "encode_histories_lists": total / best(lambda: encode(None), args.repeats),
        "encode_item_indices_pt": total / best(indices, args.repeats),
        "decode_histories": len(sample)
        * args.history
        / best(lambda: tokenizer.decode_histories(encoded[: len(sample)]), args.repeats),
        "text_call": len(sample) * args.history / best(lambda: tokenizer(texts), args.repeats),
    }
    return {
        "items": num_items,
        "levels": levels,
        "vocabulary": len(tokenizer),
        "items_per_second": {name: round(rate) for name, rate in rates.items()},
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "file_megabytes": round(megabytes, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=20_000, help="histories")
    parser.add_argument("--history", type=int, default=20, help="items per history")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_700, 100_000, 1_000_000], help="catalogue sizes")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    register()
    results = [bench(size, 4, 256, args) for size in args.sizes] + [bench(max(args.sizes), 1, 0, args)]
    if args.json:
        print(json.dumps({"threads": 1, "batch": args.batch, "history": args.history, "results": results}, indent=2))
        return
    for result in results:
        print(f"{result['items']:>9,} items x {result['levels']} levels, file {result['file_megabytes']} MB")
        for name, rate in result["items_per_second"].items():
            print(f"    {name:<24} {rate:>12,} items/s")
        print("    " + ", ".join(f"{name} {value} s" for name, value in result["seconds"].items()))


if __name__ == "__main__":
    main()
