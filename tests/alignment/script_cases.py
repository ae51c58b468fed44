"""A tiny log, item table, codes, base language model and TIGER in a folder, for the tests of scripts/sft, dpo, grpo."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import torch
from sft_cases import base_lm, base_tokenizer

ROOT = Path(__file__).resolve().parents[2]
NUM_ITEMS = 16
COMMON = ["--use_cpu", "true", "--disable_tqdm", "true", "--min_user", "3", "--min_item", "1"]
_STEPS = (
    "--learning_rate 1e-3 --logging_steps 1 --test_num_beams 16 --num_train_epochs 1 --per_device_train_batch_size 8"
)
SMALL = {
    "sft": "--lora_r 0 --item_init text --max_history 8 --max_length 128 --learning_rate 1e-2 --logging_steps 1 "
    "--num_train_epochs 4 --item_head level --per_device_train_batch_size 8 --test_num_beams 16 --end_items false",
    "dpo": f"--num_negatives 2 --num_pairs 48 --beta 0.5 {_STEPS}",
    "grpo": f"--num_generations 4 --num_prompts 16 --reward rule_and_rank {_STEPS}",
}
LORA = ["--lora_r", "4", "--lora_dropout", "0"]


def load_script(name: str):
    """scripts/<name>.py as a module."""
    spec = importlib.util.spec_from_file_location(f"{name}_script", ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their annotations up there
    spec.loader.exec_module(module)
    return module


def write_world(folder: Path) -> Path:
    """log.csv (item i is followed by item i + 1), items.csv, codes.npy and base/."""
    rng = np.random.default_rng(0)
    lines = ["user_id,item_id,timestamp"]
    for user in range(40):
        start, length = int(rng.integers(0, NUM_ITEMS)), int(rng.integers(5, 10))
        lines += [f"u{user:02d},i{(start + t) % NUM_ITEMS:02d},{1_500_000_000 + 60 * t}" for t in range(length)]
    (folder / "log.csv").write_text("\n".join(lines) + "\n")
    titles = [f"i{item:02d},The {'red' if item % 2 else 'blue'} shoe {item}" for item in range(NUM_ITEMS)]
    (folder / "items.csv").write_text("\n".join(["item_id,title", *titles]) + "\n")
    np.save(folder / "codes.npy", np.array([[item // 4, item % 4] for item in range(NUM_ITEMS)], np.int32))
    base_lm(hidden_size=32, intermediate_size=64).save_pretrained(folder / "base")
    base_tokenizer().save_pretrained(folder / "base")
    return folder


def write_tiger(folder: Path) -> Path:
    """An artefact with an untrained TIGER of the same catalogue."""
    from hf_genrec.hub import save_artifact
    from hf_genrec.identifiers.tokenization_item import ItemTokenizer
    from hf_genrec.models.tiger.configuration_tiger import TigerConfig
    from hf_genrec.models.tiger.modeling_tiger import TigerForConditionalGeneration

    items = [f"i{item:02d}" for item in range(NUM_ITEMS)]
    tokenizer = ItemTokenizer.from_codes(items, [[item // 4, item % 4] for item in range(NUM_ITEMS)], (4, 4))
    torch.manual_seed(0)
    config = TigerConfig.from_tokenizer(
        tokenizer, d_model=16, d_kv=8, d_ff=32, num_heads=2, num_layers=1, num_decoder_layers=1, dropout_rate=0.0
    )
    model = TigerForConditionalGeneration(config)
    model.recommendation_config = model.recommendation_config.merged(max_history=6, num_beams=16)
    return save_artifact(folder, model=model, tokenizer=tokenizer)


def line_for(
    name: str, world: Path, output: Path, *more: str, model: Path | None = None, lora: bool = True
) -> list[str]:
    """The words of a run of `name`; `lora`: with the adapters of dpo and grpo on a language model."""
    line = ["--dataset", str(world / "log.csv"), "--items", str(world / "items.csv"), "--output_dir", str(output)]
    line += ["--model", str(model or world / "base"), *COMMON, *SMALL[name].split()]
    if name == "sft":
        line += ["--codes", str(world / "codes.npy"), "--tasks", '{"next_item": 1.0, "item_to_index": 0.5}']
    return [*line, *(LORA if lora and name != "sft" else []), *more]


def run(script, words: list[str]):
    return script.main(*script.parse_line(words))
