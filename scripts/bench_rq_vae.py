"""Does the RQ-VAE use its codebooks on real item texts? Utilisation, collisions and error over several seeds.

    python scripts/bench_rq_vae.py --datasets movielens-100k amazon-toys --data_dir DATA --seeds 5

Trains the quantizer as a recipe does (blocks centred with one common scale) and prints one line per seed and a summary per
data set: the lowest utilisation of any level and seed, and whether it reaches `--target`. Text vectors are kept in
`--cache`, because encoding takes longer than training.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from transformers import HfArgumentParser

from hf_genrec.data.interactions import load_data
from hf_genrec.errors import GenRecError, ItemTableError
from hf_genrec.identifiers.features import text_features
from hf_genrec.identifiers.health import identifier_health
from hf_genrec.identifiers.quantizers.configuration_rq_vae import RQVAEConfig
from hf_genrec.identifiers.quantizers.training import train_rq_vae


@dataclass
class BenchArguments:
    """What is trained and on what; codebooks and latent as in TIGER, the encoder shorter."""

    datasets: list[str] = field(default_factory=lambda: ["movielens-100k"], metadata={"help": "named data sets"})
    data_dir: str | None = field(default=None, metadata={"help": "folder of the data sets"})
    cache: str | None = field(default=None, metadata={"help": "folder of text vectors, one NAME.npy per data set"})
    seeds: int = field(default=5, metadata={"help": "runs per data set"})
    codebook_sizes: list[int] = field(default_factory=lambda: [256, 256, 256], metadata={"help": "codes per level"})
    hidden_sizes: list[int] = field(default_factory=lambda: [256, 128], metadata={"help": "encoder layers"})
    latent_size: int = field(default=32, metadata={"help": "quantized dimensions"})
    codebook_update: str = field(default="ema", metadata={"help": "ema, gradient or simvq"})
    assignment: str = field(default="nearest", metadata={"help": "nearest, soft, gumbel or sinkhorn"})
    kmeans_init: bool = field(default=True, metadata={"help": "codebooks from k-means"})
    dead_code_interval: int = field(default=20, metadata={"help": "steps between restarts of dead codes; 0 = never"})
    max_steps: int = field(default=1000, metadata={"help": "optimiser steps"})
    batch_size: int = field(default=512, metadata={"help": "items per step"})
    learning_rate: float = field(default=3e-3, metadata={"help": "peak learning rate"})
    target: float = field(default=0.9, metadata={"help": "utilisation that every level has to reach"})
    output: str | None = field(default=None, metadata={"help": "also write the figures to this JSON file"})


def text_vectors(name: str, args: BenchArguments) -> np.ndarray:
    """Text vectors of a data set, centred with one common scale, from the cache where they are."""
    cached = Path(args.cache) / f"{name}.npy" if args.cache else None
    if cached is not None and cached.is_file():
        vectors = np.load(cached, allow_pickle=False)
    else:
        data = load_data(name, data_dir=args.data_dir)
        if data.items is None:
            raise ItemTableError(f"{name}: has no item texts")
        vectors = text_features(data.items.texts())
        if cached is not None:
            cached.parent.mkdir(parents=True, exist_ok=True)
            np.save(cached, vectors)
    centred = vectors - vectors.mean(0)
    return (centred / centred.std()).astype(np.float32)


def run(vectors: np.ndarray, args: BenchArguments, seed: int) -> dict[str, object]:
    """One trained RQ-VAE: its figures."""
    config = RQVAEConfig(
        input_size=vectors.shape[1],
        hidden_sizes=args.hidden_sizes,
        latent_size=args.latent_size,
        codebook_sizes=args.codebook_sizes,
        codebook_update=args.codebook_update,
        assignment=args.assignment,
        dead_code_interval=args.dead_code_interval,
        standardise="global",
    )
    start = time.perf_counter()
    model = train_rq_vae(
        vectors,
        config,
        seed=seed,
        max_steps=args.max_steps,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        kmeans_init=args.kmeans_init,
        progress=False,
    )
    seconds = time.perf_counter() - start
    codes = model.encode(vectors)
    error = float((model.decode(codes) - torch.as_tensor(vectors)).pow(2).mean())
    health = identifier_health(codes, config.codebook_sizes, vectors)
    return {
        "utilisation": health.utilisation,
        "perplexity": health.perplexity,
        "collision_rate": health.collision_rate,
        "neighbour_hit_rate": health.neighbour_hit_rate,
        "error": error / float(vectors.var()),
        "seconds": seconds,
    }


def main(argv: list[str] | None = None) -> bool:
    """Print the table; True when every level of every seed reaches the target."""
    (args,) = HfArgumentParser(BenchArguments).parse_args_into_dataclasses(argv)  # type: ignore[arg-type]
    found: dict[str, list[dict[str, object]]] = {}
    passed = True
    for name in args.datasets:
        vectors = text_vectors(name, args)
        print(f"\n{name}: {vectors.shape[0]} items, codebooks {args.codebook_sizes}, {args.codebook_update}")
        print("seed  utilisation per level   perplexity per level    collide  error  10-NN hit  seconds")
        found[name] = []
        for seed in range(args.seeds):
            row = run(vectors, args, seed)
            found[name].append(row)
            used = " ".join(f"{share:6.1%}" for share in row["utilisation"])  # type: ignore[attr-defined]
            spread = " ".join(f"{value:6.1f}" for value in row["perplexity"])  # type: ignore[attr-defined]
            print(
                f"{seed:>4}  {used}    {spread}    {row['collision_rate']:6.1%} {row['error']:6.3f}     "
                f"{row['neighbour_hit_rate']:6.3f}   {row['seconds']:6.1f}",
                flush=True,
            )
        lowest = min(min(row["utilisation"]) for row in found[name])  # type: ignore[call-overload]
        passed &= lowest >= args.target
        print(f"lowest utilisation {lowest:.1%}: {'reaches' if lowest >= args.target else 'BELOW'} {args.target:.0%}")
    if args.output:
        Path(args.output).write_text(json.dumps({"settings": asdict(args), "runs": found}, indent=2) + "\n", "utf-8")
    return passed


if __name__ == "__main__":
    try:
        raise SystemExit(0 if main() else 1)
    except GenRecError as error:
        raise SystemExit(f"error: {error}") from error
