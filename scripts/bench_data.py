"""Throughput of the data room on synthetic interactions, on one thread: 5-core filter and sequences.

    python scripts/bench_data.py --rows 5000000 --json

"core": integer codes -> 5-core -> sorted sequences. "table": an Arrow table with text ids -> all that `load_data` does
(checks, id coding, order, duplicates, 5-core, sequences, report). "csv": the same from a file. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv

from hf_genrec.data.cooccurrence import cooccurrence
from hf_genrec.data.filtering import core_filter, sort_by_user_and_time
from hf_genrec.data.interactions import load_data
from hf_genrec.data.sequences import Sequences, offsets_from_lengths
from hf_genrec.data.splits import leave_one_out


def synthetic(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Skewed users and items (a long tail falls to the 5-core), times in random order with ties."""
    random = np.random.default_rng(seed)
    users = (random.pareto(1.2, rows) * rows / 100).astype(np.int64) % (rows // 20)
    items = (random.pareto(1.0, rows) * rows / 500).astype(np.int64) % (rows // 50)
    return users, items, 1_600_000_000 + random.integers(0, 50_000_000, rows)


def core(users: np.ndarray, items: np.ndarray, times: np.ndarray) -> Sequences:
    """5-core and sorted sequences from integer codes."""
    keep = core_filter(users, items, int(users.max()) + 1, int(items.max()) + 1, min_user=5, min_item=5)
    users, items, times = users[keep], items[keep], times[keep]
    order = sort_by_user_and_time(users, times)
    counts = np.bincount(users)
    return Sequences(offsets_from_lengths(counts[counts > 0]), items[order], times[order])


def timed(action, repeats: int):
    """Best wall time of `repeats` runs, and the last result."""
    best, result = float("inf"), None
    for _ in range(repeats):
        result = None
        start = time.perf_counter()
        result = action()
        best = min(best, time.perf_counter() - start)
    return best, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    users, items, times = synthetic(options.rows, options.seed)
    table = pa.table(
        {
            "user_id": pa.array(users).cast(pa.string()),
            "item_id": pa.array(items).cast(pa.string()),
            "timestamp": pa.array(times),
        }
    )
    seconds = {}
    seconds["core"], sequences = timed(lambda: core(users, items, times), options.repeats)
    seconds["table"], data = timed(lambda: load_data(table, keep_duplicates=True), options.repeats)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "interactions.csv"
        pa_csv.write_csv(table, path)
        seconds["csv"], _ = timed(lambda: load_data(path), options.repeats)
    seconds["leave_one_out"], split = timed(lambda: leave_one_out(data), options.repeats)
    seconds["cooccurrence_window_10"], graph = timed(lambda: cooccurrence(split.train, data.num_items), 1)
    result = {
        "rows": options.rows,
        "rows_per_second": {name: round(options.rows / value) for name, value in seconds.items()},
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "after_5_core": {"users": data.num_users, "items": data.num_items, "interactions": data.sequences.num_items},
        "core_and_table_agree": bool(
            np.array_equal(sequences.offsets, data.sequences.offsets)
            and np.array_equal(sequences.items, np.array(data.item_ids, np.int32)[data.sequences.items])
        ),
        "graph_entries": int(graph.nnz),
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "threads": 1,
    }
    if options.json:
        print(json.dumps(result))
        return
    print(f"{options.rows:,} rows, one thread, peak memory {result['peak_rss_mb']:,} MB")
    for name, value in seconds.items():
        print(f"  {name:24} {value:8.2f} s  {options.rows / value:14,.0f} rows/s")


if __name__ == "__main__":
    main()
