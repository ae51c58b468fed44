"""Trains GRPO, the preference mixture and two iterations of it; started by `torchrun` with any number of processes.

Usage: grpo_driver.py OUTPUT_DIR PER_DEVICE_ROWS PER_DEVICE_PROMPTS
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))


def main(folder: str, rows: int, prompts: int) -> None:
    import test_item_grpo
    import test_iterative_preference
    import test_mixed_preference
    import test_seq2seq_grpo

    common = {"ddp_backend": "gloo", "dataloader_pin_memory": False}
    found = {}
    for kind, module, size in (("causal", test_item_grpo, rows), ("seq2seq", test_seq2seq_grpo, prompts)):
        trainer = module.trainer_of(
            f"{folder}/{kind}", dataset=module.prompts(8), per_device_train_batch_size=size, beta=0.1, learning_rate=3e-3,
            **common,
        )  # fmt: skip
        trainer.train()
        found[f"grpo {kind}"] = (trainer, ("loss", "grad_norm", "reward", "kl", "rollouts/hit"))
    requests = test_mixed_preference.requests([2 if row % 4 == 0 else 0 for row in range(32)])
    for kind in ("causal", "seq2seq"):
        trainer = test_mixed_preference.mixed(
            kind, f"{folder}/m{kind}", requests, per_device_train_batch_size=2 * prompts, num_train_epochs=1, **common
        )
        found[f"mixed {kind}"] = (trainer, ("loss", "grad_norm"))
    rounds = test_iterative_preference.driver_of(
        "seq2seq",
        f"{folder}/rounds",
        iterations=2,
        num_train_epochs=1,
        per_device_train_batch_size=2 * prompts,
        **common,
    )
    history = rounds.train().history
    if trainer.accelerator.is_main_process:
        logs = {
            name: [[entry[key] for key in keys] for entry in one.state.log_history if "loss" in entry]
            for name, (one, keys) in found.items()
        }
        logs["rounds"] = [[entry["train_loss"], entry["reward_top"]] for entry in history]
        Path(folder, "logs.json").write_text(json.dumps(logs))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
