"""What the tests of candidate rankers' training share: tiny rankers, splits, training arguments."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from trainer_cases import successor_split

from hf_genrec.alignment.negatives import RandomNegatives
from hf_genrec.alignment.trainers.arguments import RecommenderTrainingArguments
from hf_genrec.alignment.trainers.candidate_data import CandidateDataset
from hf_genrec.alignment.trainers.candidate_stages import LoraOptions
from hf_genrec.data.splits import Split
from hf_genrec.models.auto import register_auto_classes

register_auto_classes()
_spec = importlib.util.spec_from_file_location(
    "candidate_ranker_cases", Path(__file__).parents[1] / "models" / "candidate_ranker_cases.py"
)
cases = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cases)
N = cases.NUM_ITEMS
LORA = LoraOptions(r=2, alpha=8, dropout=0.0)


def arguments(folder, **options) -> RecommenderTrainingArguments:
    values = {
        "per_device_train_batch_size": 8, "max_steps": 4, "learning_rate": 1e-2, "eval_strategy": "no", "use_cpu": True,
        "save_strategy": "no", "disable_tqdm": True, "warmup_steps": 0, "logging_steps": 1, "max_history": 4,
        "lr_scheduler_type": "constant", "eval_num_beams": 5, "eval_ks": [5, 10],
    }  # fmt: skip
    return RecommenderTrainingArguments(output_dir=str(folder), **{**values, **options})


def split() -> Split:
    return successor_split(N, users=20)


def dataset(rows=None, **options) -> CandidateDataset:
    train = rows or split().train
    return CandidateDataset(train, RandomNegatives(N, seed=3), **{"num_candidates": 5, "seed": 3, **options})


def tensors(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(before, model) -> set[str]:
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
