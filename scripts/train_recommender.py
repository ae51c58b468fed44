r"""Train TIGER, SASRec or the RQ-Transformer on an interaction log, evaluate it, and save a folder that loads anywhere.

    # the baseline, straight from a log
    python scripts/train_recommender.py --model_type sasrec --dataset movielens-100k --output_dir runs/sasrec

    # generative models need a code tuple per item: scripts/train_quantizer.py, or any (items, levels) integer array
    python scripts/train_recommender.py --model_type rq_transformer --dataset movielens-100k --codes runs/codes \
        --item_features features.npy --output_dir runs/rq --num_train_epochs 25 --max_train_seconds 300
    python scripts/train_recommender.py --model_type tiger --dataset amazon-toys --data_dir DATA --codes codes.npy \
        --output_dir runs/tiger --max_history 20 --ema_decay 0.999 --early_stopping_patience 5

Every argument of transformers.TrainingArguments works too. Checkpoints go to <output_dir>-checkpoints and are
removed after the final save (--keep_checkpoints true keeps them); --resume_from_checkpoint true goes on after an
interruption.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file
from transformers import HfArgumentParser, set_seed

from hf_genrec.alignment.trainers.arguments import RecommenderTrainingArguments
from hf_genrec.alignment.trainers.recommender import train_recommender
from hf_genrec.artifacts import check_target
from hf_genrec.data.interactions import RecommendationData, load_data
from hf_genrec.data.splits import make_split
from hf_genrec.errors import GenRecError, IncompatibleComponentsError
from hf_genrec.evaluation.evaluator import evaluate, training_counts
from hf_genrec.evaluation.recommenders import ModelRecommender
from hf_genrec.hub import build_metrics, save_artifact
from hf_genrec.identifiers.health import identifier_health
from hf_genrec.identifiers.tokenization_item import ItemTokenizer
from hf_genrec.models.rq_transformer.configuration_rq_transformer import RQTransformerConfig
from hf_genrec.models.rq_transformer.modeling_rq_transformer import RQTransformerForCausalLM
from hf_genrec.models.sasrec.configuration_sasrec import SASRecConfig
from hf_genrec.models.sasrec.modeling_sasrec import SASRecForCausalLM
from hf_genrec.models.tiger.configuration_tiger import TigerConfig
from hf_genrec.models.tiger.modeling_tiger import TigerForConditionalGeneration

MODELS = {
    "tiger": (TigerConfig, TigerForConditionalGeneration),
    "sasrec": (SASRecConfig, SASRecForCausalLM),
    "rq_transformer": (RQTransformerConfig, RQTransformerForCausalLM),
}
# Used where the command line says nothing. TIGER: the paper's history length, a batch of prefixes instead of windows.
DEFAULTS = {
    "tiger": {"max_history": 20, "per_device_train_batch_size": 128, "learning_rate": 1e-3, "warmup_steps": 500},
    "sasrec": {"num_train_epochs": 40.0},
    "rq_transformer": {"num_train_epochs": 25.0},
}

# Options of transformers.TrainingArguments that --help shows beside ours; all others are understood too.
COMMON_OPTIONS = {
    "help", "output_dir", "max_steps", "gradient_accumulation_steps", "weight_decay", "max_grad_norm", "seed", "bf16",
    "eval_steps", "save_steps", "resume_from_checkpoint", "use_cpu", "disable_tqdm", "dataloader_num_workers",
}  # fmt: skip


@dataclass
class ModelArguments:
    """Which model."""

    model_type: str = field(metadata={"help": "Which model to train.", "choices": list(MODELS)})
    config: str = field(
        default="{}",
        metadata={
            "help": """Fields of the model's configuration as JSON, such as '{"hidden_size": 64, "dropout":
        0.2}'."""
        },
    )
    codes: str | None = field(
        default=None,
        metadata={
            "help": "Code tuples (items, levels) in catalogue order: .npy, .safetensors with `codes` (and "
            "`codebook_sizes`), or a folder that holds codes.safetensors. Not for sasrec."
        },
    )
    item_features: str | None = field(
        default=None, metadata={"help": "rq_transformer: (items, dimensions) input vectors, .npy or .safetensors."}
    )
    num_user_tokens: int = field(default=0, metadata={"help": "tiger: hash users into so many tokens (paper: 2000)."})
    num_beams: int = field(default=50, metadata={"help": "Beam width of the final test, saved as the model's default."})
    dense_weight: float = field(default=0.0, metadata={"help": "rq_transformer: weight of the dense head's scores."})


@dataclass
class DataArguments:
    """Which data, and where the result goes."""

    dataset: str = field(metadata={"help": "Named data set (movielens-100k, amazon-toys, ...) or path of a log."})
    items: str | None = field(default=None, metadata={"help": "Item table (item_id, title, ...) beside the log."})
    data_dir: str | None = field(default=None, metadata={"help": "Folder of the named data sets (or HF_GENREC_DATA)."})
    protocol: str = field(default="leave_one_out", metadata={"help": "leave_one_out or global_time."})
    min_user: int | None = field(default=None, metadata={"help": "Drop users with fewer interactions."})
    min_item: int | None = field(default=None, metadata={"help": "Drop items with fewer interactions."})
    shuffle_ties: int | None = field(default=None, metadata={"help": "Seed: shuffle interactions of the same time."})
    keep_checkpoints: bool = field(default=False, metadata={"help": "Keep <output_dir>-checkpoints after the save."})


def read_array(path: str, name: str) -> dict[str, np.ndarray]:
    """Tensors of a .npy or .safetensors file; the wanted one is called `name`."""
    file = Path(path) / f"{name}.safetensors" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise IncompatibleComponentsError(f"{file} does not exist: give --{name} a .npy or .safetensors file.")
    if file.suffix == ".npy":
        return {name: np.load(file, allow_pickle=False)}
    tensors = load_file(file)
    if name not in tensors and len(tensors) == 1:
        tensors = {name: next(iter(tensors.values()))}
    if name not in tensors:
        raise IncompatibleComponentsError(f"{file} has no tensor {name!r}, only {', '.join(sorted(tensors))}.")
    return tensors


def build_tokenizer(args: ModelArguments, data: RecommendationData) -> ItemTokenizer:
    """SASRec: one code per item. The others: the codes of --codes."""
    if args.model_type == "sasrec":
        return ItemTokenizer.from_codes(data.item_ids, np.arange(data.num_items)[:, None])
    if args.codes is None:
        raise IncompatibleComponentsError(
            f"{args.model_type} generates code tuples: pass --codes (make some with scripts/train_quantizer.py)."
        )
    tensors = read_array(args.codes, "codes")
    if len(tensors["codes"]) != data.num_items:
        raise IncompatibleComponentsError(
            f"{args.codes} has codes for {len(tensors['codes'])} items, the data has {data.num_items}: make them "
            "from the same item table (same filters, same order)."
        )
    sizes = tensors["codebook_sizes"].tolist() if "codebook_sizes" in tensors else None
    return ItemTokenizer.from_codes(
        data.item_ids, tensors["codes"], codebook_sizes=sizes, num_user_tokens=args.num_user_tokens
    )


def build_model(args: ModelArguments, tokenizer: ItemTokenizer, max_history: int) -> Any:
    """A fresh model of the catalogue's sizes."""
    config_class, model_class = MODELS[args.model_type]
    try:
        options = json.loads(args.config)
    except ValueError as error:
        raise IncompatibleComponentsError(f"--config is no JSON object ({error}): {args.config}") from error
    features = None
    if args.item_features is not None and args.model_type == "rq_transformer":
        features = read_array(args.item_features, "features")["features"]
        options["item_feature_dim"] = features.shape[1]
    if args.model_type != "tiger":
        options.setdefault("max_position_embeddings", max_history)
    model = model_class(config_class.from_tokenizer(tokenizer, **options))
    if args.model_type == "rq_transformer":
        model.set_catalogue(tokenizer.codes, features)
    return model


def main(model_args: ModelArguments, data_args: DataArguments, args: RecommenderTrainingArguments) -> dict[str, Any]:
    """Data, tokenizer, model, training, test, save. Returns the content of metrics.json."""
    folder = Path(args.output_dir)
    check_target(folder)
    args.output_dir = str(folder.with_name(f"{folder.name}-checkpoints"))
    set_seed(args.seed)
    seconds = {}

    start = time.perf_counter()
    data = load_data(
        data_args.dataset,
        items=data_args.items,
        data_dir=data_args.data_dir,
        min_user=data_args.min_user,
        min_item=data_args.min_item,
        shuffle_ties=data_args.shuffle_ties,
    )
    split = make_split(data, data_args.protocol)
    print(data.report)
    seconds["data"] = time.perf_counter() - start

    tokenizer = build_tokenizer(model_args, data)
    model = build_model(model_args, tokenizer, args.max_history)
    print(f"{model_args.model_type}: {model.num_parameters():,} parameters, {tokenizer.num_levels} code(s) per item")
    model.recommendation_config = model.recommendation_config.merged(
        num_beams=model_args.num_beams, dense_weight=model_args.dense_weight
    )

    start = time.perf_counter()
    user_ids = data.user_ids if model_args.num_user_tokens else None
    result = train_recommender(model, tokenizer, split, args, user_ids=user_ids)
    seconds["training"] = time.perf_counter() - start
    print(f"best validation: {result.summary['validation']} at step {result.summary['best_step']}")

    start = time.perf_counter()
    report = evaluate(
        ModelRecommender(model, tokenizer, user_ids=user_ids),
        split.test,
        num_items=data.num_items,
        train_counts=training_counts(split.train, data.num_items),
        repeats=data.repeats,
        name=model_args.model_type,
        progress=not args.disable_tqdm,
    )
    seconds["evaluation"] = time.perf_counter() - start
    print(report)

    metrics = build_metrics(
        dataset=data.name,
        protocol=split.protocol,
        seed=args.seed,
        test=report,
        identifiers=identifier_health(tokenizer.codes, tokenizer.codebook_sizes).to_dict(),
        wall_seconds={name: round(value, 2) for name, value in seconds.items()},
        training={name: value for name, value in result.summary.items() if value is not None},
    )
    save_artifact(folder, model=model, tokenizer=tokenizer, items=data.items, metrics=metrics)
    if not data_args.keep_checkpoints:
        shutil.rmtree(args.output_dir, ignore_errors=True)
    print(f"saved to {folder}; reload it with hf_genrec.hub.load_artifact({str(folder)!r})")
    return metrics


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the examples above as they are, and shows defaults."""


def parse(line: list[str] | None = None) -> tuple[ModelArguments, DataArguments, RecommenderTrainingArguments]:
    """The command line; the model's own defaults apply where it says nothing."""
    parser = HfArgumentParser(
        (ModelArguments, DataArguments, RecommenderTrainingArguments),
        description=__doc__,
        formatter_class=HelpFormatter,
        usage="%(prog)s --model_type TYPE --dataset NAME|PATH --output_dir DIR [options]",
    )
    shown = COMMON_OPTIONS | set(vars(ModelArguments)["__annotations__"]) | set(vars(DataArguments)["__annotations__"])
    shown |= set(vars(RecommenderTrainingArguments)["__annotations__"])
    for action in parser._actions:
        if action.dest not in shown:
            action.help = argparse.SUPPRESS
    words = sys.argv[1:] if line is None else line
    first_look = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first_look.add_argument("--model_type", "--model-type")
    chosen = first_look.parse_known_args(words)[0].model_type
    parser.set_defaults(**DEFAULTS.get(chosen, {}))
    return parser.parse_args_into_dataclasses(args=words)


if __name__ == "__main__":
    try:
        main(*parse())
    except GenRecError as error:
        sys.exit(f"error: {error}")
