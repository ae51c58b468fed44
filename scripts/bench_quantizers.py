"""Time and judge the quantizers: speed against a bare GEMM, memory, health of real codes after each collision policy.

    python scripts/bench_quantizers.py [--json] [--items 1000000] [--toys FOLDER] [--rq_vae_steps 1000] [--skip_health]

`--items` vectors of 256 dimensions are quantized into 3 x 256 codes (0 leaves this out); with faiss installed its residual
quantizer is fitted to the same vectors.

Health needs MovieLens-100K (the recbole wheel) and the MiniLM wheel; Amazon Toys is added when `--toys` names its
folder (`items.jsonl`; it is encoded anew, a minute or two on one core). What is missing is left out and said so.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
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
from hf_genrec.identifiers.quantizers.kmeans import kmeans, nearest
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


def spectrum_vectors(num_items: int, dim: int) -> np.ndarray:
    """Normal vectors whose variances fall like 1 / rank, the spectrum of text vectors, in float32."""
    vectors = np.random.default_rng(0).standard_normal((num_items, dim), dtype=np.float32)
    vectors *= np.arange(1, dim + 1, dtype=np.float32) ** -0.5
    return vectors


def many_vectors(num_items: int, dim: int = 256, codes: int = 256, levels: int = 3) -> dict[str, Any]:
    """Residual k-means of many vectors: shares of a bare GEMM's FLOP rate, peak memory as a multiple of the input.

    The products are those of the distances alone: codes x dim multiply-adds per item, level and round. Times are those of
    the processor, and GEMM and quantizer take turns, so that other load on the machine meets both.
    """
    vectors = spectrum_vectors(num_items, dim)
    x_ND = torch.from_numpy(vectors)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    quantizer = ResidualKMeans([codes] * levels, iterations=3).fit(vectors)
    fit_s = time.perf_counter() - start
    fit_peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    out_BC, weight_DC = torch.empty(4096, codes), torch.randn(dim, codes)
    sums_CD = torch.zeros(codes, dim)

    def gemm() -> None:
        for rows in x_ND.split(4096):
            torch.mm(rows, weight_DC, out=out_BC[: len(rows)])

    def kmeans_round() -> None:
        nearest(x_ND, quantizer.codebooks[0], None, 4096, sums_CD.zero_())

    times: dict[str, list[float]] = {"gemm": [], "round": [], "encode": []}
    for _ in range(3):
        for name, function in (("gemm", gemm), ("round", kmeans_round), ("encode", lambda: quantizer.encode(vectors))):
            start = time.process_time()
            function()
            times[name].append(time.process_time() - start)
    bare, round_s, encode_s = (statistics.median(times[name]) for name in ("gemm", "round", "encode"))
    codes_NL = quantizer.encode(vectors)
    sample = slice(0, min(num_items, 20000))
    error = float((x_ND[sample] - quantizer.decode(codes_NL[sample])).pow(2).sum(1).mean())
    row: dict[str, Any] = {
        "items": num_items,
        "gemm_gflops": 2e-9 * num_items * dim * codes / bare,
        "encode_s": encode_s,
        "encode_rate_of_gemm": levels * bare / encode_s,
        "round_rate_of_gemm": bare / round_s,
        "fit_3_rounds_s": fit_s,
        "fit_peak_beyond_input": 1024 * fit_peak / vectors.nbytes,
        "error": error,
    }
    if importlib.util.find_spec("faiss") is not None:
        row["faiss_error"] = faiss_error(vectors, levels, codes, sample)
    return row


def faiss_error(vectors: np.ndarray, levels: int, codes: int, sample: slice) -> float:
    """Mean squared error of faiss's residual quantizer without beam, on the sampled rows."""
    import faiss

    quantizer = faiss.ResidualQuantizer(vectors.shape[1], levels, codes.bit_length() - 1)
    quantizer.max_beam_size = 1
    quantizer.train(vectors)
    decoded = quantizer.decode(quantizer.compute_codes(vectors[sample]))
    return float(((vectors[sample] - decoded) ** 2).sum(1).mean())


def error_by_rounds(num_items: int = 20000, dim: int = 256, codes: int = 256) -> dict[str, float]:
    """Share of the variance one level leaves after so many rounds of k-means: where more rounds stop to matter."""
    x_ND = torch.from_numpy(spectrum_vectors(num_items, dim))
    x_ND = x_ND - x_ND.mean(0)
    whole = float(x_ND.pow(2).sum(1).mean())
    errors = {}
    for rounds in (3, 10, 25, 100):
        result = kmeans(x_ND, codes, generator=torch.Generator().manual_seed(0), iterations=rounds)
        errors[str(rounds)] = float(result.error_N.mean()) / whole
    return errors


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


def health_rows(
    name: str, features_NE: np.ndarray, sizes: tuple[int, ...], rq_vae_steps: int, left_out: list[str]
) -> list[dict[str, Any]]:
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
    # a check is no policy to compare, and a full prefix shall not end the run
    policies: list[tuple[str, dict[str, Any]]] = [
        (policy, {"when_full": "keep"} if policy == "next_tail" else {})
        for policy in COLLISION_POLICIES
        if policy != "require_unique"
    ]
    policies += [("counter", {"only_where_needed": True}), ("random_tail", {"redraw": True})]
    policies.append(("sinkhorn", {"fallback": "next_nearest"}))
    rows = []
    for label, fit in settings.items():
        start = time.perf_counter()
        quantizer = fit()
        fit_s = time.perf_counter() - start
        codes_NL, latents_NP = quantizer.encode(features_NE), quantizer.transform(features_NE)
        for policy, options in policies:
            shown = " ".join([policy, *options])
            start = time.perf_counter()
            try:
                resolved_NL, resolved_sizes = resolve_collisions(
                    codes_NL, sizes, policy, codebooks=quantizer.codebooks, features=latents_NP, **options
                )
            except GenRecError as error:  # crowded codes can leave no room below a prefix
                left_out.append(f"{name} {sizes}, {label}, {shown}: {error}")
                continue
            policy_s = time.perf_counter() - start
            health = identifier_health(resolved_NL, resolved_sizes, features_NE).to_dict()
            rows.append(
                {"data": name, "quantizer": label, "policy": shown, "fit_s": fit_s, "policy_s": policy_s, **health}
            )
    return rows


def main() -> None:
    """Run the parts that the machine has the data for and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--toys", help="folder with the items.jsonl of Amazon Toys")
    parser.add_argument("--rq_vae_steps", type=int, default=1000, help="0 leaves RQ-VAE out")
    parser.add_argument("--items", type=int, default=10**6, help="vectors to quantize into 3 x 256 codes; 0 = none")
    parser.add_argument("--skip_health", action="store_true", help="only the timings")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    codes_NL = np.random.default_rng(0).integers(0, 256, (10**6, 3))
    report: dict[str, Any] = {
        "many_vectors": many_vectors(options.items) if options.items else None,
        "error_by_rounds": error_by_rounds(),
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
        report["health"] += health_rows(name, vectors[name], sizes, options.rq_vae_steps, report["left_out"])
    if options.json:
        json.dump(report, sys.stdout, indent=2)
        print()
        return
    if report["many_vectors"]:
        row = report["many_vectors"]
        print(
            f"{row['items']:,} x 256 into 3 x 256 codes: encode {row['encode_s']:.1f} s, "
            f"{row['encode_rate_of_gemm']:.0%} of the GEMM rate ({row['gemm_gflops']:.0f} GFLOP/s); a round of k-means "
            f"{row['round_rate_of_gemm']:.0%}; fit of 3 rounds {row['fit_3_rounds_s']:.0f} s, peak memory "
            f"{row['fit_peak_beyond_input']:.2f} x the input beyond it"
        )
        if "faiss_error" in row:
            print(f"error {row['error']:.4f}, faiss {row['faiss_error']:.4f}")
        else:
            report["left_out"].append("faiss: not installed, so no error to compare with")
    print("variance left by rounds:", ", ".join(f"{k}: {v:.4f}" for k, v in report["error_by_rounds"].items()))
    for row in report["assignment"]:
        print(
            f"assign {row['dimensions']:>4} dims x {row['codes']:>4} codes: {row['items_per_s']:>12,.0f} items/s, "
            f"{row['ratio']:.2f} x its GEMM"
        )
    print(f"counter policy, 1e6 items: {report['counter_policy_1e6_items_s']:.2f} s")
    for row in report["health"]:
        used = " ".join(f"{value:.0%}" for value in row["utilisation"])
        print(
            f"{row['data']:<15} {row['codebook_sizes']!s:<20} {row['quantizer']:<37} {row['policy']:<25} "
            f"fit {row['fit_s']:6.1f} s  sharing {row['items_sharing']:>5} largest {row['largest_group']:>4} "
            f"used {used} neighbours {row['neighbour_hit_rate']:.3f}"
        )
    for line in report["left_out"]:
        print("left out:", line)


if __name__ == "__main__":
    main()
