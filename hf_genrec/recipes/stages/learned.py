"""Codes of quantizers that are trained with Trainer: RQ-VAE, multi-head VQ."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from hf_genrec.recipes.stages.context import Quantized, StageContext


def rq_vae_codes(context: StageContext, vectors: np.ndarray, **options: Any) -> Quantized:
    """RQ-VAE on the item vectors, trained with Trainer."""
    from hf_genrec.identifiers.quantizers.configuration_rq_vae import RQVAEConfig
    from hf_genrec.identifiers.quantizers.training import train_rq_vae

    training = {key: options.pop(key) for key in ("max_steps", "learning_rate") if key in options}
    config = RQVAEConfig(input_size=vectors.shape[1], standardise="global", **options)  # keeps the blocks' weights
    model = train_rq_vae(vectors, config, seed=context.seed, progress=context.progress, **training)
    codes = np.asarray(model.encode(torch.as_tensor(vectors)))
    features = model.transform(torch.as_tensor(vectors))
    return Quantized(codes, tuple(config.codebook_sizes), model.codebooks, features, model)


def multi_head_vq_codes(context: StageContext, vectors: np.ndarray, **options: Any) -> Quantized:
    """Multi-head VQ-VAE on the item vectors, trained with Trainer: parallel codes."""
    from hf_genrec.identifiers.quantizers.configuration_multi_head_vq import MultiHeadVQConfig
    from hf_genrec.identifiers.quantizers.training import train_multi_head_vq

    training = {key: options.pop(key) for key in ("max_steps", "learning_rate") if key in options}
    config = MultiHeadVQConfig(input_size=vectors.shape[1], standardise="global", **options)
    model = train_multi_head_vq(vectors, config, seed=context.seed, progress=context.progress, **training)
    codes = np.asarray(model.encode(torch.as_tensor(vectors)))
    features = model.transform(torch.as_tensor(vectors))
    return Quantized(codes, tuple(config.codebook_sizes), model.padded_codebooks(), features, model)
