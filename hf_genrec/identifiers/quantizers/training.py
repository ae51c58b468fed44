"""Training the vector-quantized autoencoders with `transformers.Trainer`: data set, NaN stop, one function per model.

Shape suffixes: N items, B items of a batch, E feature dimensions.
"""

from __future__ import annotations

import copy
import tempfile
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainingArguments

from ...errors import TrainingError
from .configuration_multi_head_vq import MultiHeadVQConfig
from .configuration_rq_vae import RQVAEConfig
from .multi_head_vq import MultiHeadVQModel
from .rq_vae import RQVAEModel
from .vq_layer import VQAutoencoder

Model = TypeVar("Model", bound=VQAutoencoder)


class FeatureDataset(Dataset):
    """Rows of a feature matrix (N, E); a batch is one gather instead of B small copies."""

    def __init__(self, features: Tensor | np.ndarray) -> None:
        self.features_NE = torch.as_tensor(features).float()

    def __len__(self) -> int:
        return len(self.features_NE)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"features": self.features_NE[index]}

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        return {"features": self.features_NE[torch.as_tensor(indices)]}


def _collate(batch: dict[str, Tensor] | list[dict[str, Tensor]]) -> dict[str, Tensor]:
    if isinstance(batch, dict):
        return batch
    return {"features": torch.stack([row["features"] for row in batch])}


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
) -> Model:
    features_NE = torch.as_tensor(features).float()
    if features_NE.dim() != 2 or len(features_NE) == 0:
        raise TrainingError(f"features must be a non-empty (items, dimensions) matrix, got {tuple(features_NE.shape)}")
    config_class: Any = model_class.config_class
    config = config or config_class(input_size=features_NE.shape[1])
    with torch.random.fork_rng(), tempfile.TemporaryDirectory() as scratch:
        torch.manual_seed(seed)
        model = model_class(config)
        model.initialise_codebooks(features_NE, seed=seed)
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
        trainer = VQTrainer(model=model, args=args, train_dataset=FeatureDataset(features_NE), data_collator=_collate)
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
    )
