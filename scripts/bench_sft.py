r"""What a step costs: ItemSFTTrainer against TRL's SFTTrainer, the head over item tokens against the full head, S-DPO.

    OMP_NUM_THREADS=1 python scripts/bench_sft.py --part step          # whole training steps on the same rows
    OMP_NUM_THREADS=1 python scripts/bench_sft.py --part head --json head.json
    OMP_NUM_THREADS=1 python scripts/bench_sft.py --part preference    # S-DPO steps

Part `step`: the same Llama model, rows (a prompt of items and four labelled tokens) and optimiser in both trainers, `tiny`
(width 64, two layers, a vocabulary of 2,000 and the items) and `small` (30 million parameters, 49,152 and the items). The
batches take turns, so that both see the same machine. `item_head` "full" is TRL's loss; "level" is what item-only targets
allow. Part `head`: forward and backward of the head alone at a vocabulary of 150,000, all three kinds on the same hidden
states, with the head's weights frozen, with the rows of the item tokens trained (`item_lora`), and with all trained. Part
`preference`: the pairs of one window of 50 items, of one and of three tokens, three negatives each, item head "level": a
pass per answer, a pass per prompt, and one pass for the prompts of the window.

Figures are medians of processor time of one thread; ratios are inside one run. Part `preference` takes ten minutes, the others
less than one.
"""

from __future__ import annotations

import json
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from hf_genrec.alignment.adapters import item_lora
from hf_genrec.alignment.trainers.item_head import item_log_probs
from hf_genrec.alignment.trainers.item_sft import ItemSFTConfig, ItemSFTTrainer
from hf_genrec.alignment.trainers.softmax_dpo import SoftmaxDPOConfig, SoftmaxDPOTrainer
from hf_genrec.identifiers.tokenization_item import ItemTokenizer

LEVELS, CODES = 4, 256
MODELS = {  # vocabulary without items, and sizes
    "tiny": (2_000, {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}),
    "small": (
        49_152,
        {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6},
    ),
}


@dataclass
class BenchArguments:
    """What to measure."""

    part: str = field(
        default="all",
        metadata={"help": "step, head, preference or all.", "choices": ["all", "step", "head", "preference"]},
    )
    models: list[str] = field(
        default_factory=lambda: ["tiny", "small"], metadata={"help": "Of parts step and preference."}
    )
    rows: int = field(default=8, metadata={"help": "Rows of a training step."})
    items: int = field(default=15, metadata={"help": "Items of a prompt, four tokens each."})
    steps: int = field(default=5, metadata={"help": "Steps of each trainer that are timed, after one that is not."})
    width: int = field(default=576, metadata={"help": "Part head: width of the model (SmolLM2-135M)."})
    vocabulary: int = field(default=150_000, metadata={"help": "Part head: rows of the head."})
    labels: int = field(default=128, metadata={"help": "Part head: labelled places of a batch."})
    repeats: int = field(default=5, metadata={"help": "Part head: timed calls of each kind."})
    threads: int = field(default=1, metadata={"help": "torch threads."})
    json: str | None = field(default=None, metadata={"help": "Write the results to this file; `-` prints JSON only."})


def medians(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Processor seconds of each call, in turns, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            start = time.process_time()
            call()
            if turn:
                seconds[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


# ---------------------------------------------------------------------------------------------------------------- step


class ShiftedItems(ItemTokenizer):
    """Item tokens behind a vocabulary of words that the benchmark never writes."""

    words = 0

    @property
    def level_offsets(self) -> np.ndarray:
        return super().level_offsets + self.words


def item_rows(tokenizer: ShiftedItems, count: int, items: int, seed: int = 0) -> Dataset:
    rng = np.random.default_rng(seed)
    table = tokenizer.item_token_table
    prompts = [table[rng.integers(0, len(table), items)].reshape(-1).tolist() for _ in range(count)]
    answers = [table[int(item)].tolist() for item in rng.integers(0, len(table), count)]
    return Dataset.from_list(
        [{"input_ids": p + a, "labels": [-100] * len(p) + a} for p, a in zip(prompts, answers, strict=True)]
    )


def steps_of(trainer: Any) -> Callable[[], float]:
    """One whole step per call on the trainer's own batches: forward, backward, clipping, optimiser."""
    batches = list(trainer.get_train_dataloader())
    model, turn = trainer.model.train(), iter(range(10**9))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> float:
        batch = dict(batches[next(turn) % len(batches)])
        count = trainer._get_num_items_in_batch([batch], torch.device("cpu"))
        loss = trainer.training_step(model, batch, count)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return step


def bench_step(name: str, args: BenchArguments, folder: str) -> dict[str, Any]:
    words, sizes = MODELS[name]
    rng = np.random.default_rng(0)
    tokenizer = ShiftedItems.from_codes(
        [f"i{item}" for item in range(2000)], rng.integers(0, CODES, (2000, LEVELS)), (CODES,) * LEVELS
    )
    tokenizer.words = words
    data = item_rows(tokenizer, args.rows * 2, args.items)
    common: dict[str, Any] = {
        "output_dir": folder, "per_device_train_batch_size": args.rows, "use_cpu": True, "bf16": False,
        "gradient_checkpointing": False, "report_to": "none", "disable_tqdm": True, "max_steps": 1,
    }  # fmt: skip

    def model() -> LlamaForCausalLM:
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(vocab_size=words + tokenizer.vocab_size, tie_word_embeddings=True, **sizes))

    plain = SFTTrainer(model(), SFTConfig(**common), train_dataset=data, processing_class=tokenizer)
    trainers: dict[str, Any] = {"trl": plain}
    for head in ("full", "level"):
        config = ItemSFTConfig(item_head=head, **common)
        trainers[head] = ItemSFTTrainer(model(), config, train_dataset=data, processing_class=tokenizer)
    seconds = medians({key: steps_of(trainer) for key, trainer in trainers.items()}, args.steps)
    result: dict[str, Any] = {"parameters": sum(parameter.numel() for parameter in plain.model.parameters())}
    result["seconds"] = seconds
    result["ratio_to_trl"] = {head: seconds[head] / seconds["trl"] for head in ("full", "level")}
    return result


# ---------------------------------------------------------------------------------------------------------------- head


def bench_head(args: BenchArguments) -> dict[str, Any]:
    torch.manual_seed(0)
    hidden = torch.randn(args.labels, args.width)
    first = args.vocabulary - LEVELS * CODES
    levels = [(first + level * CODES, first + (level + 1) * CODES) for level in range(LEVELS)]
    targets = first + torch.arange(args.labels) % (LEVELS * CODES)
    blocks: dict[str, list[tuple[int, int]]] = {"full": [], "items": [(first, args.vocabulary)], "level": levels}
    result: dict[str, Any] = {"vocabulary": args.vocabulary, "width": args.width, "labels": args.labels}
    for mode in ("frozen", "rows", "trained"):
        if mode == "rows":
            head = _head_with_trained_rows(args)
        else:
            head = torch.nn.Linear(args.width, args.vocabulary, bias=False).requires_grad_(mode == "trained")

        def run(kind: str, head: Any = head) -> None:
            states = hidden.clone().requires_grad_()
            item_log_probs(states, targets, head, blocks[kind]).log_probs.sum().backward()
            for parameter in head.parameters():
                parameter.grad = None

        seconds = medians({kind: (lambda kind=kind, run=run: run(kind)) for kind in blocks}, args.repeats)
        ratios = {kind: seconds[kind] / seconds["full"] for kind in ("items", "level")}
        result[mode] = {"seconds": seconds, "ratio_to_full": ratios}
    return result


def _head_with_trained_rows(args: BenchArguments) -> Any:
    """The tied head of a model in which LoRA trains the rows of the item tokens alone."""
    tokenizer = ShiftedItems.from_codes([f"i{item}" for item in range(CODES)], np.tile(np.arange(CODES), (LEVELS, 1)).T)
    tokenizer.words = args.vocabulary - len(tokenizer)
    config = LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.width,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        tie_word_embeddings=True,
    )
    return item_lora(LlamaForCausalLM(config), tokenizer).base_model.model.get_output_embeddings()


# ---------------------------------------------------------------------------------------------------------- preference


def bench_preference(name: str, args: BenchArguments, folder: str, levels: int) -> dict[str, Any]:
    words, sizes = MODELS[name]
    items = np.arange(2000)
    codes = items[:, None] if levels == 1 else np.stack([items // 256, items // 16 % 16, items % 16], axis=1)
    tokenizer = ShiftedItems.from_codes([f"i{item}" for item in items], codes)
    tokenizer.words = words
    tokens = [row.tolist() for row in tokenizer.item_token_table]
    history = np.random.default_rng(0).permutation(2000)[:51].tolist()
    window: dict[str, list] = {"prompt_ids": [], "chosen_ids": [], "rejected_ids": []}
    alone: list[list[int]] = []  # prompts of the same lengths, none the beginning of another
    others = [item for item in items.tolist() if item not in history]
    for end in range(1, 51):
        prompt = [token for item in history[:end] for token in tokens[item]]
        window["prompt_ids"].append(prompt)
        window["chosen_ids"].append(tokens[history[end]])
        window["rejected_ids"].append([tokens[item] for item in others[3 * end : 3 * end + 3]])
        alone.append([*tokens[others[end]], *prompt[levels:]])
    common: dict[str, Any] = {
        "output_dir": folder, "per_device_train_batch_size": 50, "use_cpu": True, "bf16": False, "item_head": "level",
        "gradient_checkpointing": False, "report_to": "none", "disable_tqdm": True, "max_steps": 1, "max_length": None,
    }  # fmt: skip

    def trainer(rows: dict[str, list], shared: bool) -> SoftmaxDPOTrainer:
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=words + tokenizer.vocab_size, tie_word_embeddings=True, **sizes)
        return SoftmaxDPOTrainer(
            LlamaForCausalLM(config),
            None,
            SoftmaxDPOConfig(share_prompts=shared, **common),
            train_dataset=Dataset.from_dict(rows),
            processing_class=tokenizer,
        )

    trainers = {
        "answer": trainer(window, False),
        "prompt": trainer(window | {"prompt_ids": alone}, True),
        "window": trainer(window, True),
    }
    seconds = medians({key: steps_of(one) for key, one in trainers.items()}, args.steps)
    return {"seconds": seconds, "ratio_to_pass_per_answer": {key: seconds[key] / seconds["answer"] for key in seconds}}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    (args,) = HfArgumentParser(BenchArguments).parse_args_into_dataclasses(argv)
    logging.disable(logging.WARNING)
    torch.set_num_threads(args.threads)
    results: dict[str, Any] = {}
    if args.part in ("all", "step"):
        with tempfile.TemporaryDirectory() as folder:
            results["step"] = {name: bench_step(name, args, folder) for name in args.models}
    if args.part in ("all", "head"):
        results["head"] = bench_head(args)
    if args.part in ("all", "preference"):
        with tempfile.TemporaryDirectory() as folder:
            results["preference"] = {
                f"{name}, {levels} tokens": bench_preference(name, args, folder, levels)
                for name in args.models
                for levels in (1, 3)
            }
    text = json.dumps(results, indent=2)
    if args.json and args.json != "-":
        Path(args.json).write_text(text + "\n", encoding="utf-8")
    print(text)
    return results


if __name__ == "__main__":
    main()
