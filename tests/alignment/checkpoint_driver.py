"""Trains a small SASRec with checkpoints; started by `torchrun` with any number of processes.

Usage: checkpoint_driver.py OUTPUT_DIR {whole|killed|broken}, going on from a whole checkpoint where there is one. "killed":
the main process dies when the second checkpoint is complete and has no name yet. "broken": the second process cannot write.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent))

from trainer_cases import small_trainer, weights

STEPS = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2, "num_train_epochs": 2}
SECOND = "checkpoint-4"


def main(folder: str, how: str) -> None:
    options = {"ddp_backend": "gloo", "dataloader_pin_memory": False, "per_device_train_batch_size": 8}
    trainer = small_trainer("sasrec", folder, logging_steps=1, **STEPS, **options)
    rank = trainer.args.process_index

    def hook(event: str, arguments: tuple) -> None:
        if event == "hf_genrec.artifacts" and arguments[0] == "rename" and arguments[1].endswith(SECOND):
            os._exit(9)

    def unwritable(place: str) -> None:
        if f".{SECOND}." in place:
            raise OSError("the disk is full")
        type(trainer)._save_rng_state(trainer, place)

    if how == "killed" and rank == 0:
        sys.addaudithook(hook)
    if how == "broken" and rank == 1:
        trainer._save_rng_state = unwritable
    torch.manual_seed(rank)  # every process draws its own dropout
    trainer.train(resume_from_checkpoint=True)
    if rank == 0:
        save_file(weights(trainer.model), Path(folder) / "final.safetensors")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
