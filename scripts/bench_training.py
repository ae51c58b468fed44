"""Training speed on one thread: target items per second of each model, and TIGER against a naive loop.

    OMP_NUM_THREADS=1 python scripts/bench_training.py                 # both parts
    OMP_NUM_THREADS=1 python scripts/bench_training.py --part naive --samples 20000 --json results.json

Part `models`: whole RecommenderTrainer steps (batches, forward, backward, clipping, optimiser) at width 64 on random
sequences with the row lengths and catalogue size of MovieLens-100K. Part `naive`: the same T5-TIGER, optimiser and
number of samples twice, once with RecommenderTrainer (length-bucketed batches by array gather, pooled dropout), once
as the loop that first comes to mind (one Python list per prefix, padded to 20 items, T5's own dropout), on prefix
lengths like those of Amazon Toys, with the validation loss after it. The rows between show where the factor comes from.

CPU seconds of the process are given beside wall-clock seconds: on a shared machine only the former mean anything.
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from transformers import HfArgumentParser, TrainerCallback, set_seed

from hf_genrec.alignment.trainers.arguments import RecommenderTrainingArguments
from hf_genrec.alignment.trainers.recommender import RecommenderTrainer
from hf_genrec.data.collators import PrefixCollator, PrefixDataset, SequenceCollator, WindowDataset
from hf_genrec.data.sequences import Sequences, offsets_from_lengths
from hf_genrec.identifiers.tokenization_item import ItemTokenizer
from hf_genrec.models.rq_transformer.configuration_rq_transformer import RQTransformerConfig
from hf_genrec.models.rq_transformer.modeling_rq_transformer import RQTransformerForCausalLM
from hf_genrec.models.sasrec.configuration_sasrec import SASRecConfig
from hf_genrec.models.sasrec.modeling_sasrec import SASRecForCausalLM
from hf_genrec.models.tiger.configuration_tiger import TigerConfig
from hf_genrec.models.tiger.modeling_tiger import TigerForConditionalGeneration

FIXED_ITEMS = 20  # padding of the naive loop


@dataclass
class BenchArguments:
    """What to measure."""

    part: str = field(default="all", metadata={"help": "models, naive or all.", "choices": ["all", "models", "naive"]})
    seconds: float = field(default=15.0, metadata={"help": "Part models: CPU seconds per model (after a warm-up)."})
    samples: int = field(default=8000, metadata={"help": "Part naive: training samples of each variant."})
    width: int = field(default=64, metadata={"help": "d_model."})
    layers: int = field(default=2, metadata={"help": "Layers (TIGER: of encoder and of decoder)."})
    batch_size: int = field(default=128, metadata={"help": "Part naive: prefixes per step."})
    threads: int = field(default=1, metadata={"help": "torch threads."})
    seed: int = field(default=0, metadata={"help": "Of data, models and batches."})
    json: str | None = field(default=None, metadata={"help": "Write the results to this file; `-` prints JSON only."})


# ---------------------------------------------------------------------------------------------------------------- data


def markov_sequences(lengths: np.ndarray, num_items: int, seed: int) -> Sequences:
    """Rows in which item i is followed by one of i + 1 ... i + 4: something to learn, so that losses can differ."""
    rng = np.random.default_rng(seed)
    offsets = offsets_from_lengths(lengths)
    steps = rng.integers(1, 5, lengths.sum())
    walk = np.cumsum(steps)
    start = rng.integers(0, num_items, len(lengths)) - walk[offsets[:-1]]
    return Sequences(offsets, (walk + np.repeat(start, lengths)) % num_items)


def movielens_like(seed: int) -> Sequences:
    """943 rows of 18 to 700 items, 104 on average, over 1,682 items."""
    rng = np.random.default_rng(seed)
    return markov_sequences(np.clip(rng.lognormal(4.2, 0.95, 943), 18, 700).astype(np.int64), 1682, seed)


def toys_like(seed: int) -> Sequences:
    """19,412 rows of 3 and more items without the two held out: prefixes of 6.5 items on average, median 3 to 4."""
    rng = np.random.default_rng(seed)
    return markov_sequences(3 + np.exp(rng.normal(0.8, 1.2, 19412)).astype(np.int64), 11924, seed)


def tokenizer_of(num_items: int, sizes: list[int]) -> ItemTokenizer:
    """Codes that are the digits of the item's number, spread over codebooks of the given sizes."""
    if len(sizes) == 1:
        return ItemTokenizer.from_codes([str(i) for i in range(num_items)], np.arange(num_items)[:, None])
    base = int(np.ceil(num_items ** (1 / (len(sizes) - 1))))
    digits = np.stack(np.unravel_index(np.arange(num_items), [base] * (len(sizes) - 1)), axis=1)
    codes = np.column_stack([digits * (np.array(sizes[:-1]) // base), np.zeros(num_items, np.int64)])
    return ItemTokenizer.from_codes([str(i) for i in range(num_items)], codes, codebook_sizes=sizes)


# -------------------------------------------------------------------------------------------------------------- models


class Stopwatch(TrainerCallback):
    """Time from the end of the warm-up on; ends the run after `seconds` of CPU time."""

    def __init__(self, warmup: int, seconds: float | None = None) -> None:
        self.warmup, self.seconds = warmup, seconds
        self.steps = 0

    def on_step_end(self, args, state, control, **kwargs):
        now = (time.process_time(), time.perf_counter())
        if state.global_step <= self.warmup:
            self.start = now
            return
        self.steps = state.global_step - self.warmup
        self.cpu, self.wall = (end - begin for end, begin in zip(now, self.start))
        if self.seconds is not None and self.cpu >= self.seconds:
            control.should_training_stop = True


def build(kind: str, tokenizer: ItemTokenizer, args: BenchArguments, **options: Any) -> Any:
    set_seed(args.seed)
    if kind == "sasrec":
        config = SASRecConfig.from_tokenizer(
            tokenizer, hidden_size=args.width, num_hidden_layers=args.layers, max_position_embeddings=50
        )
        return SASRecForCausalLM(config)
    if kind.startswith("rq_transformer"):
        codes_only = kind.endswith("codes only")
        features = None if codes_only else np.random.default_rng(0).normal(size=(tokenizer.num_items, 128))
        switches = {"dense_head": False, "item_embedding": False, "learn_repeat_weight": False} if codes_only else {}
        config = RQTransformerConfig.from_tokenizer(
            tokenizer,
            hidden_size=args.width,
            num_hidden_layers=args.layers,
            item_feature_dim=0 if codes_only else 128,
            **switches,
        )
        model = RQTransformerForCausalLM(config)
        model.set_catalogue(tokenizer.codes, None if codes_only else features.astype(np.float32))
        return model
    sizes = {"d_model": args.width, "d_kv": args.width // 4, "d_ff": 4 * args.width, "num_heads": 4}
    config = TigerConfig.from_tokenizer(
        tokenizer, num_layers=args.layers, num_decoder_layers=args.layers, **sizes, **options
    )
    return TigerForConditionalGeneration(config)


def trainer_for(
    model: Any, tokenizer: Any, dataset: Dataset, collator: Any, args: BenchArguments, **options: Any
) -> Any:
    folder = tempfile.mkdtemp()
    values = {"eval_strategy": "no", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "seed": args.seed}
    training = RecommenderTrainingArguments(output_dir=folder, logging_strategy="no", **{**values, **options})
    return RecommenderTrainer(
        model=model, args=training, data_collator=collator, train_dataset=dataset, processing_class=tokenizer
    )


def bench_models(args: BenchArguments) -> list[dict[str, Any]]:
    """Target items per second of whole training steps."""
    sequences = movielens_like(args.seed)
    results = []
    for kind in ("sasrec", "rq_transformer", "rq_transformer, codes only", "tiger"):
        tokenizer = tokenizer_of(1682, [1682] if kind == "sasrec" else [64, 64, 64, 8])
        model = build(kind, tokenizer, args)
        if kind == "tiger":
            dataset, collator = PrefixDataset(sequences, FIXED_ITEMS), PrefixCollator(tokenizer)
            targets = len(dataset)
        else:
            dataset, collator = WindowDataset(sequences, 50), SequenceCollator(tokenizer)
            targets = dataset.num_targets
        watch = Stopwatch(warmup=5, seconds=args.seconds)
        batch = 128 if kind == "tiger" else 16
        options = {"per_device_train_batch_size": batch, "num_train_epochs": 100.0}
        trainer = trainer_for(model, tokenizer, dataset, collator, args, **options)
        trainer.add_callback(watch)
        trainer.train()
        done = watch.steps * batch * targets / len(dataset)
        results.append(
            {
                "model": kind,
                "parameters": model.num_parameters(),
                "targets_per_cpu_second": round(done / watch.cpu),
                "targets_per_wall_second": round(done / watch.wall),
                "steps": watch.steps,
                "ms_per_step": round(1000 * watch.cpu / watch.steps, 1),
            }
        )
    return results


# --------------------------------------------------------------------------------------------------- the naive loop


class NaivePrefixes(Dataset):
    """One padded list of tokens per prefix, built one by one."""

    def __init__(self, dataset: PrefixDataset, tokenizer: ItemTokenizer) -> None:
        self.dataset, self.tokenizer = dataset, tokenizer

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        sample = self.dataset[index]
        tokens = [t for item in sample["items"] for t in self.tokenizer.item_token_ids(self.tokenizer.item_ids[item])]
        padding = FIXED_ITEMS * self.tokenizer.num_levels - len(tokens)
        labels = self.tokenizer.item_token_ids(self.tokenizer.item_ids[sample["target"]])
        return {
            "input_ids": torch.tensor(tokens + [0] * padding),
            "attention_mask": torch.tensor([1] * len(tokens) + [0] * padding),
            "labels": torch.tensor(labels),
        }


def naive_loop(model: Any, dataset: Dataset, steps: int, args: BenchArguments) -> tuple[float, float]:
    """A plain PyTorch loop; returns CPU and wall seconds."""
    loader = DataLoader(dataset, batch_size=args.batch_size, shuffle=True, drop_last=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    start, done = (time.process_time(), time.perf_counter()), 0
    while done < steps:
        for batch in loader:
            optimizer.zero_grad()
            model(**batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            done += 1
            if done == steps:
                break
    return time.process_time() - start[0], time.perf_counter() - start[1]


class FixedLengthCollator(PrefixCollator):
    """The fast collator, padded to a fixed length."""

    def __call__(self, samples):
        batch = super().__call__(samples)
        missing = FIXED_ITEMS * self.tokenizer.num_levels - batch["input_ids"].shape[1]
        for name in ("input_ids", "attention_mask"):
            batch[name] = torch.nn.functional.pad(batch[name], (missing, 0))
        return batch


@torch.no_grad()
def validation_loss(model: Any, dataset: PrefixDataset, tokenizer: ItemTokenizer) -> float:
    """Mean loss per code of 2,000 held-out prefixes."""
    model.eval()
    losses = []
    collator = PrefixCollator(tokenizer)
    for start in range(0, 2000, 250):
        losses.append(model(**collator([dataset[i] for i in range(start, start + 250)])).loss.item())
    return float(np.mean(losses))


def bench_naive(args: BenchArguments) -> list[dict[str, Any]]:
    """Samples per second and validation loss after the same number of samples."""
    sequences = toys_like(args.seed)
    # the fourth level stands for the collision counter
    tokenizer = tokenizer_of(11924, [256, 256, 256, 8])
    rng = np.random.default_rng(args.seed)
    rows = rng.permutation(len(sequences))
    training = PrefixDataset(sequences.take(rows[1000:]), FIXED_ITEMS, seed=args.seed)
    held_out = PrefixDataset(sequences.take(rows[:1000]), FIXED_ITEMS, samples_per_epoch=2000, seed=args.seed)
    steps = max(1, args.samples // args.batch_size)
    results = []

    def add(name: str, model: Any, cpu: float, wall: float) -> None:
        samples = steps * args.batch_size
        results.append(
            {
                "variant": name,
                "samples_per_cpu_second": round(samples / cpu, 1),
                "samples_per_wall_second": round(samples / wall, 1),
                "samples": samples,
                "validation_loss": round(validation_loss(model, held_out, tokenizer), 4),
            }
        )

    model = build("tiger", tokenizer, args, pooled_dropout=False)
    add("naive loop", model, *naive_loop(model, NaivePrefixes(training, tokenizer), steps, args))
    variants = (
        ("+ batches by array gather", False, FixedLengthCollator, "random"),
        ("+ length-bucketed batches", False, PrefixCollator, "group_by_length"),
        ("+ pooled dropout = RecommenderTrainer", True, PrefixCollator, "group_by_length"),
    )
    for name, pooled, collator, strategy in variants:
        model = build("tiger", tokenizer, args, pooled_dropout=pooled)
        trainer = trainer_for(
            model,
            tokenizer,
            training,
            collator(tokenizer),
            args,
            per_device_train_batch_size=args.batch_size,
            max_steps=steps,
            warmup_steps=0,
            train_sampling_strategy=strategy,
        )
        start = time.process_time(), time.perf_counter()
        trainer.train()
        add(name, model, time.process_time() - start[0], time.perf_counter() - start[1])
    for row in results:
        row["speed_up"] = round(row["samples_per_cpu_second"] / results[0]["samples_per_cpu_second"], 2)
    return results


def table(rows: list[dict[str, Any]]) -> str:
    widths = {key: max(len(key), *(len(f"{row[key]}") for row in rows)) for key in rows[0]}
    lines = ["  ".join(f"{key:<{widths[key]}}" for key in rows[0])]
    lines += ["  ".join(f"{row[key]!s:<{widths[key]}}" for key in row) for row in rows]
    return "\n".join(lines)


def main(args: BenchArguments) -> dict[str, Any]:
    """Run the chosen parts; returns what --json writes."""
    torch.set_num_threads(args.threads)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    quiet = args.json == "-"
    result: dict[str, Any] = {
        "threads": args.threads,
        "width": args.width,
        "layers": args.layers,
        "torch": torch.__version__,
    }
    for part, run in (("models", bench_models), ("naive", bench_naive)):
        if args.part in ("all", part):
            result[part] = run(args)
            if not quiet:
                print(
                    f"\n{part} (d {args.width}, {args.layers} layers, {args.threads} thread(s))\n{table(result[part])}"
                )
    if args.json and not quiet:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    elif quiet:
        print(json.dumps(result))
    return result


if __name__ == "__main__":
    main(HfArgumentParser(BenchArguments).parse_args_into_dataclasses()[0])
