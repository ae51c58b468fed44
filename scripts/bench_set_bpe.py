"""Learning set merges (ActionPiece, arXiv 2502.13581): incremental pair counts against recounting everything for each merge.

    python scripts/bench_set_bpe.py --json

The corpus is generated with the size of MovieLens-100K (943 histories, 100,000 interactions, 1,682 items of five features).
The naive way counts all pairs of all histories anew before every merge and rewrites the histories; it is run for the first
`--naive_merges` merges, whose results must equal the incremental ones, and its seconds per merge are compared with those of
the incremental way over all merges, start included. Processor time of one thread.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from collections import defaultdict

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from hf_genrec.identifiers.set_bpe import build_set_vocabulary

Slots = list[list[int]]  # set, node between, set, node between, ..., set


def make_corpus(rows: int, interactions: int, items: int, sizes: list[int], seed: int) -> list[list[list[int]]]:
    """Histories of feature sets; items are drawn by a power law, as in real logs."""
    random = np.random.default_rng(seed)
    starts = np.cumsum([0, *sizes[:-1]])
    features = np.column_stack([random.integers(0, size, items) for size in sizes]) + starts
    chance = 1.0 / np.arange(1, items + 1)
    drawn = random.choice(items, interactions, p=chance / chance.sum())
    cuts = np.sort(random.choice(np.arange(1, interactions), rows - 1, replace=False))
    return [[features[item].tolist() for item in row] for row in np.split(drawn, cuts)]


def count_pairs(corpus: list[Slots]) -> dict[tuple[int, int], float]:
    """Weights of all pairs of all histories: 2 / n inside a set of n, 1 / (n m) between neighbours."""
    counts: dict[tuple[int, int], float] = defaultdict(float)
    for slots in corpus:
        present = [slot for slot in slots if slot]
        for slot in present:
            for x, y in itertools.combinations(slot, 2):
                counts[(x, y) if x <= y else (y, x)] += 2 / len(slot)
        for left, right in itertools.pairwise(present):
            weight = 1 / (len(left) * len(right))
            for x in left:
                for y in right:
                    counts[(x, y) if x <= y else (y, x)] += weight
    return counts


def merge(slots: Slots, a: int, b: int, new: int) -> None:
    """Replace the pair in one history, from left to right."""
    for place in range(0, len(slots), 2):
        here = slots[place]
        if a != b and a in here and b in here:
            slots[place] = [token for token in here if token not in (a, b)] + [new]
        elif place + 2 < len(slots):
            there = slots[place + 2]
            for x, y in ((a, b), (b, a)):
                if x in here and y in there:
                    slots[place] = [token for token in here if token != x]
                    slots[place + 2] = [token for token in there if token != y]
                    slots[place + 1] = [new]
                    break


def naive_merges(corpus: list[list[list[int]]], first_new: int, number: int) -> list[list[int]]:
    """The first merges, everything counted anew for each of them."""
    everything: list[Slots] = []
    for history in corpus:
        slots: Slots = [list(history[0])]
        for features in history[1:]:
            slots += [[], list(features)]
        everything.append(slots)
    merges = []
    for new in range(first_new, first_new + number):
        counts = count_pairs(everything)
        pair = min(counts, key=lambda key: (-round(counts[key], 6), key))
        for slots in everything:
            merge(slots, *pair, new)
        # a history is sets with nodes between them; a merged node is a set of its own from now on
        everything = [_normal(slots) for slots in everything]
        merges.append(list(pair))
    return merges


def _normal(slots: Slots) -> Slots:
    present = [slot for slot in slots if slot]
    spaced: Slots = [present[0]]
    for slot in present[1:]:
        spaced += [[], slot]
    return spaced


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=943)
    parser.add_argument("--interactions", type=int, default=100_000)
    parser.add_argument("--items", type=int, default=1_682)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 64, 64, 64, 128], help="features per level")
    parser.add_argument("--merges", type=int, default=2_600)
    parser.add_argument("--naive_merges", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    corpus = make_corpus(args.rows, args.interactions, args.items, args.sizes, args.seed)
    start = time.process_time()
    vocabulary = build_set_vocabulary(corpus, args.sizes, args.merges)
    incremental = (time.process_time() - start) / len(vocabulary.merges)
    start = time.process_time()
    naive = naive_merges(corpus, sum(args.sizes), args.naive_merges)
    recount = (time.process_time() - start) / args.naive_merges
    equal = naive == vocabulary.merges[: args.naive_merges].tolist()
    result = {
        "merges": len(vocabulary.merges),
        "milliseconds_per_merge": {"incremental": round(1e3 * incremental, 3), "naive": round(1e3 * recount, 1)},
        "times_faster": round(recount / incremental, 1),
        "equal_merges": equal,
    }
    if args.json:
        print(json.dumps(result, indent=2))
        return
    for name, value in result.items():
        print(f"{name:<24} {value}")


if __name__ == "__main__":
    main()
