"""Trains the stages of a candidate ranker and writes losses and results; started by `torchrun` with any number of processes.

Usage: candidate_driver.py OUTPUT_DIR PER_DEVICE_BATCH
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from candidate_training_cases import LORA, arguments, cases, split

from hf_genrec.alignment.trainers import candidate_training
from hf_genrec.alignment.trainers.candidate_stages import RANKER_METHODS
from hf_genrec.alignment.trainers.candidate_training import train_candidate_ranker


def main(folder: str, size: int) -> None:
    written, staged_folder = [], candidate_training.staged_folder

    def noted(target):
        written.append(Path(target).name)
        return staged_folder(target)

    candidate_training.staged_folder = noted
    method = RANKER_METHODS["collm"]
    model, items, _ = cases.ranker(**{**method.fields, "num_candidates": 4})
    options = {"per_device_train_batch_size": size, "ddp_backend": "gloo", "dataloader_pin_memory": False}
    args = arguments(
        Path(folder) / "run", train_sampling_strategy="sequential", save_strategy="steps", save_steps=2, **options
    )
    result = train_candidate_ranker(model, items, split(), args, stages=method.stages, lora=LORA)
    if args.process_index == 0:
        Path(folder, "losses.json").write_text(json.dumps([stage["train_loss"] for stage in result.stages.values()]))
    scores = result.model.rank_candidates([[1, 2]], [[3, 4, 5]]).tolist()
    Path(folder, f"process-{args.process_index}.json").write_text(json.dumps({"scores": scores, "written": written}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
