"""Runs sft, dpo and grpo one after the other; started by `accelerate launch` with any number of processes.

Usage: script_driver.py WORLD OUTPUT PER_DEVICE_BATCH
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))


def main(world: str, output: str, size: int) -> None:
    from script_cases import line_for, load_script, run

    out = Path(output)
    more = ["--per_device_train_batch_size", str(size), "--keep_checkpoints", "true"]
    more += ["--save_strategy", "steps", "--save_steps", "3", "--max_steps", "6"]
    for name in ("sft", "dpo", "grpo"):
        model = None if name == "sft" else Path(world) / "start"
        run(load_script(name), line_for(name, Path(world), out / name, *more, model=model))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
