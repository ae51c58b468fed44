"""train_text_to_text: an encoder-decoder learns to turn rows of token ids into others, with transformers' Trainer.

The initialisation of IDGenRec's name generator (arXiv 2403.19021), which there is a model pretrained to write tags.

Shapes: N rows, S and L tokens.
"""

from __future__ import annotations

import tempfile
from typing import Any

import numpy as np
import torch
from torch.utils.data import TensorDataset
from transformers import PrinterCallback, Trainer, TrainingArguments

from hf_genrec.errors import TrainingError


def train_text_to_text(
    model: Any,
    inputs_NS: np.ndarray,
    targets_NL: np.ndarray,
    *,
    max_steps: int = 300,
    batch_size: int = 64,
    learning_rate: float = 3e-3,
    seed: int = 0,
    progress: bool = True,
) -> float:
    """Teach `model` to write `targets` when it reads `inputs`; returns the mean loss of the last tenth of the steps.

    Args:
        model: T5 or alike; trained in place, left in evaluation mode.
        inputs_NS, targets_NL: token ids, -1 behind the end. Rows without any input are left out.

    Raises:
        TrainingError: nothing to learn from, or a loss that is not finite.
    """
    inputs, targets = (torch.from_numpy(np.array(rows, np.int64)) for rows in (inputs_NS, targets_NL))
    known = (inputs >= 0).any(1) & (targets >= 0).any(1)
    if not bool(known.any()) or max_steps < 1:
        raise TrainingError("train_text_to_text: no row has both input and target tokens, or max_steps is below 1.")

    def collate(rows: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
        text_BS, target_BL = (torch.stack(part) for part in zip(*rows))
        labels_BL = target_BL.masked_fill(target_BL < 0, -100)
        return {"input_ids": text_BS.clamp(min=0), "attention_mask": (text_BS >= 0).long(), "labels": labels_BL}

    losses: list[float] = []

    class _Trainer(Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss = super().training_step(*args, **kwargs)
            losses.append(float(loss))
            if not np.isfinite(losses[-1]):
                raise TrainingError(f"the generator's loss is {losses[-1]} at step {len(losses)}: lower learning_rate.")
            return loss

    with torch.random.fork_rng(), tempfile.TemporaryDirectory() as scratch:
        args = TrainingArguments(
            output_dir=scratch,
            max_steps=max_steps,
            per_device_train_batch_size=min(batch_size, int(known.sum())),
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=min(20, max_steps // 10),
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=not progress,
            remove_unused_columns=False,
            dataloader_pin_memory=torch.cuda.is_available(),
            seed=seed,
        )
        trainer = _Trainer(
            model=model, args=args, train_dataset=TensorDataset(inputs[known], targets[known]), data_collator=collate
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    model.eval()
    tail = losses[-max(1, max_steps // 10) :]
    return float(np.mean(tail))
