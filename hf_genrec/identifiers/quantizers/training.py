"""Training the vector-quantized autoencoders with `transformers.Trainer`: data set, NaN stop, one function per model.

Shape suffixes: N items, B items of a batch, E feature dimensions.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainingArguments

from ...errors import TrainingError
from .configuration_fsq import FSQConfig
from .configuration_multi_head_vq import MultiHeadVQConfig
from .configuration_rq_vae import RQVAEConfig
from .fsq import FSQModel
from .multi_head_vq import MultiHeadVQModel
from .rq_vae import RQVAEModel
from .terms import LossTerm, QuantizerWithTerms
from .vq_layer import VQAutoencoder

Model = TypeVar("Model", bound=VQAutoencoder)


class FeatureDataset(Dataset):
    """Rows of a feature matrix (N, E); a batch is one gather instead of B small copies. `items` adds the row numbers."""

    def __init__(self, features: Tensor | np.ndarray, items: bool = False) -> None:
        self.features_NE = torch.as_tensor(features).float()
        self.items = items

    def __len__(self) -> int:
        return len(self.features_NE)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: rows[0] for name, rows in self.__getitems__([index]).items()}

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        items_B = torch.as_tensor(indices)
        rows = {"features": self.features_NE[items_B]}
        return rows | {"items": items_B} if self.items else rows


def _collate(batch: dict[str, Tensor] | list[dict[str, Tensor]]) -> dict[str, Tensor]:
    if isinstance(batch, dict):
        return batch
    return {name: torch.stack([row[name] for row in batch]) for name in batch[0]}


class _Bar(ProgressCallback):
    """The progress bar of Trainer without its log lines, which go to the standard output."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        return None


class VQTrainer(Trainer):
    """Trainer that stops at a loss that is not finite instead of averaging it away in the log."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """As in Trainer, but a loss that is NaN or infinite raises TrainingError."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if not bool(torch.isfinite(loss)):
            label = self.accelerator.unwrap_model(model).label
            raise TrainingError(
                f"{label} loss is {float(loss.detach())} at step {self.state.global_step}: lower the learning rate or "
                "check the features for outliers"
            )
        return (loss, outputs) if return_outputs else loss


def _train(
    model_class: type[Model],
    features: Tensor | np.ndarray,
    config: Any,
    args: TrainingArguments | None,
    *,
    seed: int,
    max_steps: int,
    batch_size: int,
    learning_rate: float,
    progress: bool,
    resume_from_checkpoint: str | bool | None,
    terms: Mapping[str, LossTerm] | None,
    kmeans_init: bool,
) -> Model:
    features_NE = torch.as_tensor(features).float()
    if features_NE.dim() != 2 or len(features_NE) == 0:
        raise TrainingError(f"features must be a non-empty (items, dimensions) matrix, got {tuple(features_NE.shape)}")
    config_class: Any = model_class.config_class
    config = config or config_class(input_size=features_NE.shape[1])
    with torch.random.fork_rng(), tempfile.TemporaryDirectory() as scratch:
        torch.manual_seed(seed)
        model = model_class(config)
        model.initialise_codebooks(features_NE, seed=seed, kmeans_init=kmeans_init)
        own_arguments = args is not None
        if args is None:
            args = TrainingArguments(
                output_dir=scratch,
                max_steps=max_steps,
                per_device_train_batch_size=min(batch_size, len(features_NE)),
                learning_rate=learning_rate,
                lr_scheduler_type="cosine",
                warmup_steps=min(20, max_steps // 10),
                weight_decay=0.0,
                save_strategy="no",
                report_to="none",
                logging_strategy="no",
                disable_tqdm=not progress,
                seed=seed,
                dataloader_drop_last=True,
                dataloader_pin_memory=torch.cuda.is_available(),
            )
        args = copy.copy(args)
        args.remove_unused_columns = False  # rows come as ready batches, there are no columns to drop
        active = {name: term for name, term in (terms or {}).items() if term.weight > 0}
        trained: Any = model
        if active:
            batches = max(1, len(features_NE) // args.train_batch_size)
            trained = QuantizerWithTerms(model, active, features_NE, batches)
        trainer = VQTrainer(
            model=trained,
            args=args,
            train_dataset=FeatureDataset(features_NE, items=bool(active)),
            data_collator=_collate,
        )
        if not own_arguments:
            trainer.remove_callback(PrinterCallback)
            trainer.remove_callback(ProgressCallback)
            if progress:
                trainer.add_callback(_Bar)
        trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    return model.cpu().eval()


def train_rq_vae(
    features: Tensor | np.ndarray,
    config: RQVAEConfig | None = None,
    args: TrainingArguments | None = None,
    *,
    seed: int = 0,
    max_steps: int = 1000,
    batch_size: int = 512,
    learning_rate: float = 3e-3,
    progress: bool = True,
    resume_from_checkpoint: str | bool | None = None,
    terms: Mapping[str, LossTerm] | None = None,
    kmeans_init: bool = True,
) -> RQVAEModel:
    """Train an RQ-VAE on item features and return it in evaluation mode, on the CPU.

    Args:
        features: (N, E), all items of the catalogue.
        config: sizes; None takes the defaults with `input_size=E`.
        args: own `TrainingArguments`; then `seed` still picks the initial weights and the k-means draws, and the other
            keyword settings are ignored.
        seed: initial weights, k-means, batches and dead-code draws. Equal seeds give equal models on one machine;
            torch's global random state is left as it was.
        max_steps: optimiser steps of `batch_size` items (cosine learning rate from `learning_rate`).
        terms: further loss terms by name; one of weight 0 is left out, and without any this is the plain autoencoder.
        kmeans_init: start the codebooks from k-means on the latents; False leaves them random.

    Raises:
        TrainingError: too few items for the codebooks, NaN in the features, a loss that is not finite.
    """
    return _train(
        RQVAEModel,
        features,
        config,
        args,
        seed=seed,
        max_steps=max_steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        progress=progress,
        resume_from_checkpoint=resume_from_checkpoint,
        terms=terms,
        kmeans_init=kmeans_init,
    )


def train_multi_head_vq(
    features: Tensor | np.ndarray,
    config: MultiHeadVQConfig | None = None,
    args: TrainingArguments | None = None,
    *,
    seed: int = 0,
    max_steps: int = 1000,
    batch_size: int = 512,
    learning_rate: float = 1e-3,
    progress: bool = True,
    resume_from_checkpoint: str | bool | None = None,
    terms: Mapping[str, LossTerm] | None = None,
    kmeans_init: bool = True,
) -> MultiHeadVQModel:
    """Train a multi-head VQ-VAE on item features; arguments and errors as in `train_rq_vae`."""
    return _train(
        MultiHeadVQModel,
        features,
        config,
        args,
        seed=seed,
        max_steps=max_steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        progress=progress,
        resume_from_checkpoint=resume_from_checkpoint,
        terms=terms,
        kmeans_init=kmeans_init,
    )


def train_fsq(
    features: Tensor | np.ndarray,
    config: FSQConfig | None = None,
    args: TrainingArguments | None = None,
    *,
    seed: int = 0,
    max_steps: int = 1000,
    batch_size: int = 512,
    learning_rate: float = 3e-3,
    progress: bool = True,
    resume_from_checkpoint: str | bool | None = None,
    terms: Mapping[str, LossTerm] | None = None,
) -> FSQModel:
    """Train a finite scalar quantizer on item features; arguments and errors as in `train_rq_vae`."""
    return _train(
        FSQModel,
        features,
        config,
        args,
        seed=seed,
        max_steps=max_steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        progress=progress,
        resume_from_checkpoint=resume_from_checkpoint,
        terms=terms,
        kmeans_init=True,
    )
