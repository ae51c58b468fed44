"""Time and judge the quantizers: assignment against a bare GEMM, counter policy, health of real codes per policy.

    python scripts/bench_quantizers.py [--json] [--toys FOLDER] [--rq_vae_steps 1000] [--skip_health]

Health needs MovieLens-100K (the recbole wheel) and the MiniLM wheel; Amazon Toys is added when `--toys` names its
folder (`items.jsonl`; it is encoded anew, a minute or two on one core). What is missing is left out and said so.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_genrec.errors import GenRecError
from hf_genrec.identifiers.collisions import COLLISION_POLICIES, resolve_collisions
from hf_genrec.identifiers.features import text_features
from hf_genrec.identifiers.health import identifier_health
from hf_genrec.identifiers.quantizers.configuration_rq_vae import RQVAEConfig
from hf_genrec.identifiers.quantizers.kmeans import nearest
from hf_genrec.identifiers.quantizers.residual_kmeans import ResidualKMeans
from hf_genrec.identifiers.quantizers.training import train_rq_vae


def median_seconds(function: Callable[[], Any], repeats: int = 7) -> float:
    """Median wall time of a call, after one call to warm up."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def assignment_against_gemm(num_items: int = 65536, chunk: int = 4096) -> list[dict[str, Any]]:
    """Seconds of one level's assignment and of the matrix products in it alone."""
    rows = []
    for dim, codes in ((32, 256), (64, 256), (384, 256), (384, 1024)):
        x_ND, centroids_CD = torch.randn(num_items, dim), torch.randn(codes, dim)
        out_BC, centroids_DC = torch.empty(chunk, codes), centroids_CD.t()

        def gemm(x=x_ND, c=centroids_DC, out=out_BC) -> None:
            for start in range(0, num_items, chunk):
                torch.mm(x[start : start + chunk], c, out=out)

        bare = median_seconds(gemm)
        full = median_seconds(lambda x=x_ND, c=centroids_CD: nearest(x, c, chunk_size=chunk))
        rows.append(
            {
                "dimensions": dim,
                "codes": codes,
                "gemm_s": bare,
                "assign_s": full,
                "ratio": full / bare,
                "items_per_s": num_items / full,
            }
        )
    return rows


def ml100k_texts() -> list[str] | None:
    """`title (year) genres` of the 1,682 films, or None without the wheel."""
    spec = importlib.util.find_spec("recbole")
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(next(iter(spec.submodule_search_locations))) / "dataset_example" / "ml-100k" / "ml-100k.item"
    rows = [line.split("\t") for line in path.read_text("utf-8").splitlines()[1:]]
    return [f"{title} ({year}) {genres}" for _, title, year, genres in rows]


def toys_texts(folder: str) -> list[str]:
    """`title categories` of the Amazon Toys items."""
    lines = (Path(folder) / "items.jsonl").read_text("utf-8").splitlines()
    items = [json.loads(line) for line in lines]
    return [f"{item['title']} {' '.join(item['categories'][0]) if item['categories'] else ''}" for item in items]


def health_rows(name: str, features_NE: np.ndarray, sizes: tuple[int, ...], rq_vae_steps: int) -> list[dict[str, Any]]:
    """Fit time and health after each policy, for plain, projected, balanced k-means and RQ-VAE."""
    settings: dict[str, Callable[[], Any]] = {
        "residual k-means": lambda: ResidualKMeans(sizes).fit(features_NE),
        "residual k-means, pca 32": lambda: ResidualKMeans(sizes, pca_dim=32).fit(features_NE),
        "residual k-means, pca 32, max load 2": lambda: ResidualKMeans(sizes, pca_dim=32, max_load=2.0).fit(
            features_NE
        ),
    }
    if rq_vae_steps:
        config = RQVAEConfig(input_size=features_NE.shape[1], codebook_sizes=list(sizes))
        settings[f"RQ-VAE, {rq_vae_steps} steps"] = lambda: train_rq_vae(
            features_NE, config, max_steps=rq_vae_steps, progress=False
        )
    rows = []
    for label, fit in settings.items():
        start = time.perf_counter()
        quantizer = fit()
        fit_s = time.perf_counter() - start
        codes_NL, latents_NP = quantizer.encode(features_NE), quantizer.transform(features_NE)
        for policy in COLLISION_POLICIES:
            start = time.perf_counter()
            resolved_NL, resolved_sizes = resolve_collisions(
                codes_NL, sizes, policy, codebooks=quantizer.codebooks, features=latents_NP
            )
            policy_s = time.perf_counter() - start
            health = identifier_health(resolved_NL, resolved_sizes, features_NE).to_dict()
            rows.append(
                {"data": name, "quantizer": label, "policy": policy, "fit_s": fit_s, "policy_s": policy_s, **health}
            )
    return rows


def main() -> None:
    """Run the parts that the machine has the data for and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--toys", help="folder with the items.jsonl of Amazon Toys")
    parser.add_argument("--rq_vae_steps", type=int, default=1000, help="0 leaves RQ-VAE out")
    parser.add_argument("--skip_health", action="store_true", help="only the timings")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    codes_NL = np.random.default_rng(0).integers(0, 256, (10**6, 3))
    report: dict[str, Any] = {
        "assignment": assignment_against_gemm(),
        "counter_policy_1e6_items_s": median_seconds(lambda: resolve_collisions(codes_NL, (256, 256, 256)), 3),
        "health": [],
        "left_out": [],
    }
    sets: list[tuple[str, list[str], tuple[int, ...]]] = []
    if not options.skip_health:
        films = ml100k_texts()
        if films is None:
            report["left_out"].append("movielens-100k: pip install --no-deps recbole==1.2.1")
        else:
            sets += [("movielens-100k", films, (64, 64, 64)), ("movielens-100k", films, (256, 256, 256))]
        if options.toys:
            sets.append(("amazon-toys", toys_texts(options.toys), (256, 256, 256)))
        else:
            report["left_out"].append("amazon-toys: pass --toys FOLDER")
    vectors: dict[str, np.ndarray] = {}
    for name, texts, sizes in sets:
        try:
            if name not in vectors:
                vectors[name] = text_features(texts, progress=not options.json)
        except GenRecError as error:
            report["left_out"].append(f"{name}: {error}")
            continue
        report["health"] += health_rows(name, vectors[name], sizes, options.rq_vae_steps)
    if options.json:
        json.dump(report, sys.stdout, indent=2)
        print()
        return
    for row in report["assignment"]:
        print(
            f"assign {row['dimensions']:>4} dims x {row['codes']:>4} codes: {row['items_per_s']:>12,.0f} items/s, "
            f"{row['ratio']:.2f} x its GEMM"
        )
    print(f"counter policy, 1e6 items: {report['counter_policy_1e6_items_s']:.2f} s")
    for row in report["health"]:
        used = " ".join(f"{value:.0%}" for value in row["utilisation"])
        print(
            f"{row['data']:<15} {row['codebook_sizes']!s:<20} {row['quantizer']:<37} {row['policy']:<13} "
            f"fit {row['fit_s']:6.1f} s  sharing {row['items_sharing']:>5} largest {row['largest_group']:>4} "
            f"used {used} neighbours {row['neighbour_hit_rate']:.3f}"
        )
    for line in report["left_out"]:
        print("left out:", line)


if __name__ == "__main__":
    main()
