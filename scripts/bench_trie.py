"""What the catalogue trie costs: bytes, building, changing, and asking it in each step of a search. One thread.

    python scripts/bench_trie.py --json            # 10^4, 10^5 and 10^6 items
    python scripts/bench_trie.py --large --json    # and 10^7 (about 2 GiB)

Catalogues are distinct random codes of 4 x 256, the hardest shape: real ones share more prefixes. Times are medians of
`--repeats` runs, in processor time of this thread, so that other work on the machine does not count.

Per row and step, for 8 users x 20 beams (8 rows at the first level), averaged over the levels:
    expand      children of the beams
    gather      their scores out of the level's scores, padding masked
    seen        children that lead only to the 100 seen items of each user masked
    lookup      prefixes re-walked from the root, as a logits processor does
    search_step = expand + gather, search_step_seen = expand + gather + seen, processor_step = lookup + expand
`filter_ms` is paid once per request of 8 users, `bytes_per_item_filtering` once the first filter was made.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from hf_genrec.generation.item_filter import ItemFilter
from hf_genrec.generation.trie import ItemTrie

USERS, BEAMS, LEVELS, SIZE, SEEN, CHANGED = 8, 20, 4, 256, 100, 1000


def median_seconds(action: Callable[[], Any], repeats: int, calls: int = 1) -> float:
    """Median over `repeats` of the mean processor time of `calls` calls."""
    seconds = []
    for _ in range(repeats):
        start = time.thread_time()
        for _ in range(calls):
            action()
        seconds.append((time.thread_time() - start) / calls)
    return statistics.median(seconds)


def random_catalogue(num_items: int, random: np.random.Generator) -> np.ndarray:
    """(num_items, 4) distinct codes in random order."""
    numbers = np.unique(random.integers(0, SIZE**LEVELS, num_items + num_items // 50 + 100))
    random.shuffle(numbers)
    return np.stack(np.unravel_index(numbers[:num_items], (SIZE,) * LEVELS), axis=1)


def level_seconds(
    trie: ItemTrie, level: int, beams_BKL: torch.Tensor, item_filter: ItemFilter, repeats: int
) -> dict[str, float]:
    """Seconds per step at one level."""
    nodes = trie.lookup(beams_BKL[..., :level])
    nodes = nodes[:, :1].contiguous() if level == 0 else nodes.sort(dim=-1).values  # step 1 runs one row per user
    logits = torch.randn(*nodes.shape, SIZE)
    codes, _, legal = trie.expand(level, nodes)
    prefixes = beams_BKL.view(-1, LEVELS)[:, :level].contiguous()
    actions: dict[str, Callable[[], Any]] = {
        "expand": lambda: trie.expand(level, nodes),
        "gather": lambda: logits.gather(-1, codes).masked_fill_(~legal, -torch.inf),
        "seen": lambda: item_filter.alive_children(level, nodes, legal),
        "lookup": lambda: trie.lookup(prefixes),
    }
    return {name: median_seconds(action, repeats, calls=50) for name, action in actions.items()}


def constraint(trie: ItemTrie, codes_NL: np.ndarray, random: np.random.Generator, repeats: int) -> dict[str, float]:
    """Microseconds per row and step."""
    beams_BKL = torch.from_numpy(codes_NL[random.integers(0, trie.num_items, (USERS, BEAMS))])
    seen = [random.choice(trie.num_items, SEEN, replace=False) for _ in range(USERS)]
    item_filter = ItemFilter.from_rows(trie, seen)
    assert item_filter is not None
    levels = [level_seconds(trie, level, beams_BKL, item_filter, repeats) for level in range(LEVELS)]
    rows = USERS * BEAMS * LEVELS
    cost = {name: 1e6 * sum(seconds[name] for seconds in levels) / rows for name in levels[0]}
    cost["search_step"] = cost["expand"] + cost["gather"]
    cost["search_step_seen"] = cost["search_step"] + cost["seen"]
    cost["processor_step"] = cost["lookup"] + cost["expand"]
    root = torch.zeros(USERS, 1, dtype=torch.long)
    cost["filter_ms"] = 1e3 * median_seconds(lambda: ItemFilter.from_rows(trie, seen).alive(0, root), repeats)
    return {name: round(value, 3) for name, value in cost.items()}


def bench(num_items: int, seed: int, repeats: int) -> dict[str, Any]:
    """All figures of one catalogue size."""
    random = np.random.default_rng(seed)
    codes = random_catalogue(num_items + CHANGED, random)
    sizes = (SIZE,) * LEVELS
    trie = ItemTrie.from_codes(codes[:num_items], sizes)
    stored = trie.nbytes
    removed = random.choice(num_items, CHANGED, replace=False)
    added_trie, removed_trie = trie.add_items(codes[num_items:]), trie.remove_items(removed)
    assert added_trie.num_items == num_items + CHANGED and removed_trie.num_items == num_items - CHANGED
    builds = repeats if num_items <= 10**6 else 1
    build = median_seconds(lambda: ItemTrie.from_codes(codes[:num_items], sizes), builds)
    add = median_seconds(lambda: trie.add_items(codes[num_items:]), repeats)
    remove = median_seconds(lambda: trie.remove_items(removed), repeats)
    result = {
        "items": num_items,
        "nodes": [trie.num_nodes(level) for level in range(1, LEVELS + 1)],
        "max_children": trie.max_children,
        "bytes_per_item": round(stored / num_items, 3),
        "build_seconds": round(build, 4),
        "build_seconds_per_million": round(build * 1e6 / num_items, 4),
        f"add_{CHANGED}_over_build": round(add / build, 4),
        f"remove_{CHANGED}_over_build": round(remove / build, 4),
        "constraint_us_per_row_and_step": constraint(trie, codes, random, repeats),
    }
    result["bytes_per_item_filtering"] = round(trie.nbytes / num_items, 3)
    return result


def run(sizes: Sequence[int] = (10**4, 10**5, 10**6), seed: int = 0, repeats: int = 7) -> dict[str, Any]:
    """Figures of each catalogue size, and how the cost of a step grows from the smallest to the largest."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    np.ones(2**21)  # once freed, the allocator keeps blocks of this size, as it does beside a model
    try:
        results = [bench(size, seed, max(5, repeats)) for size in sizes]
    finally:
        torch.set_num_threads(threads)
    first, last = (results[i]["constraint_us_per_row_and_step"] for i in (0, -1))
    growth = {name: round(last[name] / first[name], 2) for name in first if name.endswith(("step", "seen"))}
    return {"threads": 1, "users": USERS, "beams": BEAMS, "repeats": max(5, repeats), "results": results} | {
        "constraint_growth": growth
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog=__doc__.split("\n\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--sizes", type=int, nargs="+", default=[10**4, 10**5, 10**6], help="catalogue sizes")
    parser.add_argument("--large", action="store_true", help="10^7 items as well")
    parser.add_argument("--repeats", type=int, default=7, help="runs per figure, at least 5")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    if min(args.sizes) < 2 * CHANGED:
        parser.error(f"--sizes must be at least {2 * CHANGED}: {CHANGED} items are removed for the comparison")
    report = run([*args.sizes, 10**7] if args.large else args.sizes, args.seed, args.repeats)
    if args.json:
        print(json.dumps(report, indent=2))
        return
    for result in report["results"]:
        print(f"{result.pop('items'):,} items")
        for name, value in result.items():
            print(f"    {name}: {value}")
    print(f"growth of a step from the smallest to the largest: {report['constraint_growth']}")


if __name__ == "__main__":
    main()
