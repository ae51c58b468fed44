"""Small catalogues, splits and models for the trainer tests."""

from __future__ import annotations

import numpy as np
import torch

from hf_genrec.alignment.trainers.arguments import RecommenderTrainingArguments
from hf_genrec.alignment.trainers.recommender import RecommenderTrainer
from hf_genrec.data.collators import PrefixCollator, PrefixDataset, SequenceCollator, WindowDataset
from hf_genrec.data.sequences import Sequences
from hf_genrec.data.splits import EvaluationSet, Split
from hf_genrec.identifiers.tokenization_item import ItemTokenizer

NUM_ITEMS = 30
KINDS = ("sasrec", "tiger", "rq_transformer")


def successor_split(num_items: int = NUM_ITEMS, users: int = 60, seed: int = 0) -> Split:
    """Item i is always followed by item i + 1; rows of 4 to 14 items."""
    rng = np.random.default_rng(seed)
    rows = [
        [(start + i) % num_items for i in range(length)]
        for start, length in zip(rng.integers(0, num_items, users), rng.integers(4, 15, users))
    ]
    everything = Sequences.from_rows(rows)

    def held_out(back: int) -> EvaluationSet:
        targets = np.array([row[-back] for row in rows], np.int32)
        return EvaluationSet(np.arange(users), everything.truncate_tail(back), targets)

    return Split("leave_one_out", everything.truncate_tail(2), held_out(2), held_out(1), {})


def small_tokenizer(kind: str, num_items: int = NUM_ITEMS) -> ItemTokenizer:
    items = np.arange(num_items)
    codes = items[:, None] if kind == "sasrec" else np.stack([items // 6, items % 6], axis=1)
    return ItemTokenizer.from_codes([f"i{i}" for i in range(num_items)], codes)


def small_model(kind: str, tokenizer: ItemTokenizer, seed: int = 0, dropout: float = 0.1):
    torch.manual_seed(seed)
    if kind == "sasrec":
        from hf_genrec.models.sasrec.configuration_sasrec import SASRecConfig
        from hf_genrec.models.sasrec.modeling_sasrec import SASRecForCausalLM

        config = SASRecConfig.from_tokenizer(tokenizer, hidden_size=16, intermediate_size=32, dropout=dropout)
        return SASRecForCausalLM(config)
    if kind == "tiger":
        from hf_genrec.models.tiger.configuration_tiger import TigerConfig
        from hf_genrec.models.tiger.modeling_tiger import TigerForConditionalGeneration

        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2, "num_layers": 1, "num_decoder_layers": 1}
        return TigerForConditionalGeneration(TigerConfig.from_tokenizer(tokenizer, dropout_rate=dropout, **sizes))
    from hf_genrec.models.rq_transformer.configuration_rq_transformer import RQTransformerConfig
    from hf_genrec.models.rq_transformer.modeling_rq_transformer import RQTransformerForCausalLM

    model = RQTransformerForCausalLM(RQTransformerConfig.from_tokenizer(tokenizer, hidden_size=16, dropout=dropout))
    model.set_catalogue(tokenizer.codes)
    return model


def small_arguments(folder, **options) -> RecommenderTrainingArguments:
    values = {
        "num_train_epochs": 2.0,
        "max_history": 10,
        "per_device_train_batch_size": 8,
        "eval_ks": [1, 5, 10],
        "eval_num_beams": 10,
        "eval_exclude_seen": False,
        "warmup_steps": 3,
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return RecommenderTrainingArguments(output_dir=str(folder), **{**values, **options})


def small_trainer(kind: str, folder, *, model=None, callbacks=None, **options) -> RecommenderTrainer:
    """A trainer on the successor catalogue, put together as `train_recommender` does."""
    tokenizer, split = small_tokenizer(kind), successor_split()
    args = small_arguments(folder, **options)
    if kind == "tiger":
        dataset, collator = (
            PrefixDataset(split.train, args.max_history, samples_per_epoch=100),
            PrefixCollator(tokenizer),
        )
    else:
        dataset, collator = WindowDataset(split.train, args.max_history), SequenceCollator(tokenizer)
    return RecommenderTrainer(
        model=model if model is not None else small_model(kind, tokenizer),
        args=args,
        data_collator=collator,
        train_dataset=dataset,
        eval_dataset=None if args.eval_strategy == "no" else split.validation,
        processing_class=tokenizer,
        callbacks=callbacks,
    )


def weights(model) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
