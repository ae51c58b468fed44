"""Trains on preference rows and writes the logged losses; started by `torchrun` with any number of processes.

Usage: preference_driver.py OUTPUT_DIR {softmax|windows|seq2seq} PER_DEVICE_BATCH
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from datasets import Dataset

sys.path.insert(0, str(Path(__file__).parent))


def main(folder: str, kind: str, size: int) -> None:
    counts = [1, 4, 2, 3, 1, 2, 4, 3, 2, 1, 3, 2, 1, 4, 2, 3]
    options = {"per_device_train_batch_size": size, "ddp_backend": "gloo", "dataloader_pin_memory": False}
    if kind == "softmax":
        from test_softmax_dpo import causal_lm, rows, train

        more = {"loss_type": ["sigmoid", "sft"], "precompute_ref_log_probs": True, "precompute_ref_batch_size": 2}
        # processes share precomputed numbers through the cache folder of one file
        file = str(Path(folder, "rows.parquet"))
        if os.environ["RANK"] == "0":
            rows(counts).to_parquet(f"{file}.part")
            os.replace(f"{file}.part", file)
        while not os.path.exists(file):
            time.sleep(0.05)
        cached = Dataset.from_parquet(file, cache_dir=str(Path(folder, "cache")))
        _, logs, trainer = train(folder, cached, ref_model=causal_lm(seed=1), **options, **more)
    elif kind == "windows":
        from test_softmax_dpo import causal_lm, one_token_rows, train

        data = one_token_rows(rows_of_a_user=8, users=4)
        _, logs, trainer = train(folder, data, ref_model=causal_lm(seed=1), num_train_epochs=1, **options)
        assert len(next(iter(trainer.get_train_dataloader()))["input_ids"]) == 1
    else:
        from test_seq2seq_preference import TOKENIZER, data, tiger, train

        options |= {"sft_weight": 0.3, "precompute_ref_log_probs": True, "precompute_ref_batch_size": 2}
        _, logs, trainer = train(folder, data(counts), ref_model=tiger(TOKENIZER, seed=1), **options)
    if trainer.accelerator.is_main_process:
        names = ("loss", "grad_norm", "rewards/margins", "rewards/accuracies")
        Path(folder, "logs.json").write_text(json.dumps([[entry[name] for name in names] for entry in logs]))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
