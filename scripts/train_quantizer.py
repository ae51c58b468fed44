"""Train a quantizer on item features, resolve collisions, and save codes with a health report.

    python scripts/train_quantizer.py --features features.npy --output_dir runs/codes --codebook_sizes 256 256 256
    python scripts/train_quantizer.py --features features.safetensors --output_dir runs/codes --method rq_vae

Row i of the features is item i of the catalogue. The output folder holds `codes.safetensors` (`codes` (N, L) int32 and
`codebook_sizes` (L,)), `health.json`, and the quantizer: `quantizer.safetensors` (residual k-means) or `config.json`
and `model.safetensors` (the trained ones, opened by `AutoModel.from_pretrained` after `import hf_genrec`). Loss terms that
need histories or tags belong to a recipe (`identifiers.losses`), this script adds those that need the features alone.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file
from transformers import HfArgumentParser

from hf_genrec.artifacts import staged_folder
from hf_genrec.errors import GenRecError, IncompatibleComponentsError
from hf_genrec.identifiers.collisions import COLLISION_POLICIES, resolve_collisions
from hf_genrec.identifiers.health import identifier_health
from hf_genrec.identifiers.quantizers.configuration_fsq import FSQConfig
from hf_genrec.identifiers.quantizers.configuration_multi_head_vq import MultiHeadVQConfig
from hf_genrec.identifiers.quantizers.configuration_rq_vae import RQVAEConfig
from hf_genrec.identifiers.quantizers.configuration_vq import ASSIGNMENTS, CODEBOOK_UPDATES
from hf_genrec.identifiers.quantizers.multi_head_vq import MultiHeadVQModel
from hf_genrec.identifiers.quantizers.residual_kmeans import ResidualKMeans
from hf_genrec.identifiers.quantizers.terms_codes import Uniqueness, UsageBalance
from hf_genrec.identifiers.quantizers.terms_contrast import ReconstructionContrast
from hf_genrec.identifiers.quantizers.training import train_fsq, train_multi_head_vq, train_rq_vae
from hf_genrec.identifiers.quantizers.vq_layer import VQAutoencoder

METHODS = ("residual_kmeans", "rq_vae", "multi_head_vq", "fsq")


@dataclass
class QuantizerArguments:
    """Settings of one run; RQ-VAE and k-means read the ones that concern them."""

    features: str = field(
        metadata={"help": "(N, E) matrix: .npy, or .safetensors with one tensor or one named features"}
    )
    output_dir: str = field(metadata={"help": "folder to create or replace"})
    method: str = field(default="residual_kmeans", metadata={"help": f"one of {METHODS}", "choices": METHODS})
    codebook_sizes: list[int] = field(default_factory=lambda: [256, 256, 256], metadata={"help": "codes per level"})
    collisions: str = field(
        default="counter", metadata={"help": "what happens to shared codes", "choices": tuple(COLLISION_POLICIES)}
    )
    seed: int = field(default=0, metadata={"help": "all draws"})
    pca_dim: int | None = field(default=32, metadata={"help": "k-means: principal components; 0 = off"})
    whiten: bool = field(default=False, metadata={"help": "k-means: unit variance components"})
    max_load: float | None = field(default=2.0, metadata={"help": "k-means: largest code / mean code; 0 = no limit"})
    iterations: int = field(default=25, metadata={"help": "k-means: rounds per level"})
    hidden_sizes: list[int] = field(default_factory=lambda: [256, 128], metadata={"help": "trained: encoder layers"})
    latent_size: int = field(default=32, metadata={"help": "trained: dimensions of a codebook"})
    codebook_update: str = field(
        default="ema", metadata={"help": "trained: how codes move", "choices": CODEBOOK_UPDATES}
    )
    assignment: str = field(
        default="nearest", metadata={"help": "trained: how codes are taken", "choices": ASSIGNMENTS}
    )
    random_prefix: float = field(default=0.0, metadata={"help": "RQ-VAE: share of items seen through a random prefix"})
    gate: bool = field(default=False, metadata={"help": "multi-head VQ: gate over the heads"})
    max_steps: int = field(default=1000, metadata={"help": "trained: optimiser steps"})
    batch_size: int = field(default=512, metadata={"help": "trained: items per step"})
    learning_rate: float = field(default=3e-3, metadata={"help": "trained: peak learning rate"})
    contrast: float = field(default=0.0, metadata={"help": "trained: weight of CoST's reconstruction contrast"})
    uniqueness: float = field(default=0.0, metadata={"help": "trained: weight of HiD-VAE's hinge on shared codes"})
    usage_balance: float = field(default=0.0, metadata={"help": "trained: weight of even soft counts"})


def read_features(path: str) -> np.ndarray:
    """Matrix of a .npy or .safetensors file; pickled arrays are refused."""
    suffix = Path(path).suffix
    if not Path(path).is_file():
        raise IncompatibleComponentsError(f"{path}: no such feature file")
    if suffix == ".npy":
        features = np.load(path, allow_pickle=False)
    elif suffix == ".safetensors":
        tensors = load_file(path)
        if "features" not in tensors and len(tensors) != 1:
            raise IncompatibleComponentsError(f"{path}: name the matrix 'features', found {sorted(tensors)}")
        features = tensors.get("features", next(iter(tensors.values())))
    else:
        raise IncompatibleComponentsError(f"{path}: features must be a .npy or .safetensors file")
    if features.ndim != 2:
        raise IncompatibleComponentsError(f"{path}: features must be (items, dimensions), got shape {features.shape}")
    return np.asarray(features, dtype=np.float32)


def train(args: QuantizerArguments, features_NE: np.ndarray) -> ResidualKMeans | VQAutoencoder:
    """The quantizer that `args` asks for, fitted on all items. FSQ's codes have the grid of its defaults."""
    if args.method == "residual_kmeans":
        return ResidualKMeans(
            args.codebook_sizes,
            seed=args.seed,
            iterations=args.iterations,
            pca_dim=min(args.pca_dim, features_NE.shape[1]) if args.pca_dim else None,
            whiten=args.whiten,
            max_load=args.max_load or None,
        ).fit(features_NE)
    options: dict[str, Any] = {"input_size": features_NE.shape[1], "hidden_sizes": args.hidden_sizes}
    books = {name: getattr(args, name) for name in ("latent_size", "codebook_sizes", "codebook_update", "assignment")}
    training: dict[str, Any] = {
        name: getattr(args, name) for name in ("seed", "max_steps", "batch_size", "learning_rate")
    }
    training["terms"] = {
        "contrast": ReconstructionContrast(args.contrast),
        "uniqueness": Uniqueness(args.uniqueness),
        "usage_balance": UsageBalance(args.usage_balance),
    }
    if args.method == "fsq":
        return train_fsq(features_NE, FSQConfig(**options), **training)
    if args.method == "multi_head_vq":
        return train_multi_head_vq(features_NE, MultiHeadVQConfig(**options, **books, gate=args.gate), **training)
    return train_rq_vae(features_NE, RQVAEConfig(**options, **books, random_prefix=args.random_prefix), **training)


def main(argv: list[str] | None = None) -> None:
    """Parse, train, resolve, report, save."""
    (args,) = HfArgumentParser(QuantizerArguments).parse_args_into_dataclasses(argv)  # type: ignore[arg-type]
    features_NE = read_features(args.features)
    start = time.perf_counter()
    quantizer = train(args, features_NE)
    codebooks = quantizer.padded_codebooks() if isinstance(quantizer, MultiHeadVQModel) else quantizer.codebooks
    space: dict[str, Any] = (
        {} if args.method == "fsq" else {"codebooks": codebooks, "features": quantizer.transform(features_NE)}
    )
    codes_NL, sizes = resolve_collisions(
        quantizer.encode(features_NE), quantizer.codebook_sizes, args.collisions, **space
    )
    health = identifier_health(codes_NL, sizes, features_NE)
    print(health)
    with staged_folder(args.output_dir) as folder:
        save_file(
            {"codes": codes_NL.astype(np.int32), "codebook_sizes": np.array(sizes, dtype=np.int64)},
            str(folder / "codes.safetensors"),
        )
        (folder / "health.json").write_text(json.dumps(health.to_dict(), indent=2) + "\n", "utf-8")
        if isinstance(quantizer, ResidualKMeans):
            quantizer.save(folder / "quantizer.safetensors")
        else:
            quantizer.save_pretrained(folder)
    print(f"{args.output_dir}: codes of {len(codes_NL)} items in {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    try:
        main()
    except GenRecError as error:
        raise SystemExit(f"error: {error}") from error
