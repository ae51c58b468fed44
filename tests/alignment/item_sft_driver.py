"""Trains on item rows and writes losses and validation; started by `torchrun` with any number of processes.

Usage: item_sft_driver.py OUTPUT_DIR PER_DEVICE_BATCH
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from sft_cases import arguments, evaluation_set, item_lm, row_dataset, text_tokenizer

from hf_genrec.alignment.adapters import item_lora
from hf_genrec.alignment.trainers.item_sft import ItemSFTTrainer


def main(folder: str, size: int) -> None:
    torch.manual_seed(3)
    model = item_lora(item_lm(), text_tokenizer(), r=2, alpha=8, dropout=0.0)
    options = {"per_device_train_batch_size": size, "ddp_backend": "gloo", "dataloader_pin_memory": False}
    trainer = ItemSFTTrainer(
        model,
        arguments(folder, item_head="level", num_train_epochs=2, eval_strategy="epoch", **options),
        train_dataset=row_dataset(16, texts=True),
        processing_class=text_tokenizer(),
        ranking_dataset=evaluation_set(12),
    )
    trainer.train()
    if trainer.accelerator.is_main_process:
        names = ("loss", "grad_norm", "mean_token_accuracy", "num_tokens", "eval_ndcg@10")
        logs = [[entry[name] for name in names if name in entry] for entry in trainer.state.log_history]
        Path(folder, "logs.json").write_text(json.dumps(logs))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
