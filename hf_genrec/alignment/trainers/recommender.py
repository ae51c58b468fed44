"""RecommenderTrainer: transformers' Trainer for next-item models, with full-ranking validation and atomic checkpoints.

What it adds to Trainer:

* `prediction_step` ranks the validation target among all items with the model's own constrained search, so
  `eval_recall@K` and `eval_ndcg@K` are real, the best checkpoint is the best recommender, and early stopping works;
* batches of similar length whose order is a function of (seed, epoch), and `set_epoch` for the training set: a run
  that was killed and resumed on CPU ends with the same bits as one that was not;
* checkpoints are written whole or not at all (`artifacts.staged_folder`), half ones are skipped on resume;
* a loss that is NaN or infinite stops the run (TrainingError) before it reaches the weights or a checkpoint;
* `num_items_in_batch` counts every label that is not -100: our models shift by whole items, so transformers' rule of
  leaving out the first column does not apply;
* optional moving average of the weights, and a time budget with an annealed schedule.

Relations: with `ema_decay=None, max_train_seconds=None, eval_strategy="no"` the weights after n steps are Trainer's.
With several processes checkpoints are written the ordinary way (not atomic), and still skipped when half.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, SequentialSampler
from transformers import TrainerCallback
from transformers.trainer_utils import EvalPrediction

from hf_genrec.data.collators import (
    PackedPrefixCollator,
    PrefixCollator,
    PrefixDataset,
    SequenceCollator,
    WindowDataset,
)
from hf_genrec.data.splits import EvaluationSet, Split
from hf_genrec.errors import IncompatibleComponentsError, TrainingError
from hf_genrec.generation.requests import check_fingerprint
from hf_genrec.generation.trie import ItemTrie

from .arguments import RecommenderTrainingArguments
from .averaging import WeightAverage
from .checkpoints import checkpoints
from .guarded import GuardedTrainer, guard_callbacks
from .ranking import RankingCollator, RankingDataset, ranking_metrics, ranks_from_items
from .sampling import LengthBucketSampler

logger = logging.getLogger(__name__)


class RecommenderTrainer(GuardedTrainer):
    """Trainer for models with `RecommendationMixin` (TIGER, SASRec, RQ-Transformer).

    Args:
        model: The model; needs `recommend_indices` when there is an evaluation set.
        args: RecommenderTrainingArguments.
        data_collator: Collator of the training set.
        train_dataset: Samples; `lengths` (one per sample) lets batches be bucketed, `set_epoch(n)` is called when it
        exists.
        eval_dataset: EvaluationSet of the split, or a RankingDataset.
        processing_class: The ItemTokenizer; saved with every checkpoint.
        user_ids: User strings by row, for tokenizers with user tokens.
        compute_metrics: Function of `EvalPrediction(predictions=ranks_M, label_ids=targets_M)`; default
        `ranking_metrics`.
        callbacks: More callbacks.
        kwargs: As for Trainer.

    Raises:
        IncompatibleComponentsError: No tokenizer, or a model that cannot rank, with an evaluation set.
    """

    _further_fix = ", and item features without NaN"

    def __init__(
        self,
        model: Any = None,
        args: RecommenderTrainingArguments | None = None,
        data_collator: Callable | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: EvaluationSet | Dataset | None = None,
        processing_class: Any = None,
        *,
        user_ids: Sequence[str] | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        **kwargs: Any,
    ) -> None:
        args = args if args is not None else RecommenderTrainingArguments(output_dir="trainer_output")
        if eval_dataset is not None:
            if processing_class is None:
                raise IncompatibleComponentsError("validation ranks items: pass the tokenizer as processing_class.")
            if model is not None and not hasattr(model, "recommend_indices"):
                raise IncompatibleComponentsError(
                    f"{type(model).__name__} has no recommend_indices: mix RecommendationMixin into it, or pass no "
                    "eval_dataset."
                )
        self._average: WeightAverage | None = None
        self._user_ids = user_ids
        self._trie: ItemTrie | None = None
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=_as_dataset(eval_dataset, args),
            processing_class=processing_class,
            compute_metrics=compute_metrics or self._ranking_metrics,
            callbacks=[*guard_callbacks(args), *(callbacks or [])],
            **kwargs,
        )
        # every label of ours is a target: see the module docstring
        self._loss_shifts_labels = False
        self._finish_guards()

    # ---------------------------------------------------------------------------------------------------------- data

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        dataset = train_dataset if train_dataset is not None else self.train_dataset
        if self.args.train_sampling_strategy == "group_by_length" and hasattr(dataset, "lengths"):
            seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
            return LengthBucketSampler(dataset, self._train_batch_size, seed)
        return super()._get_train_sampler(train_dataset)

    def _get_eval_sampler(self, eval_dataset: Dataset) -> Sampler | None:
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None  # type: ignore[arg-type]

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Loader of ranking batches; an EvaluationSet is welcome."""
        with self._ranking_collator():
            return super().get_eval_dataloader(_as_dataset(eval_dataset, self.args))

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """Loader of ranking batches; an EvaluationSet is welcome."""
        with self._ranking_collator():
            return super().get_test_dataloader(_as_dataset(test_dataset, self.args))

    @contextmanager
    def _ranking_collator(self) -> Iterator[None]:
        training_collator = self.data_collator
        self.data_collator = RankingCollator(
            self.processing_class,
            sequence_model=not _trains_on_prefixes(self.model),
            max_history=self.args.max_history,
            user_ids=self._user_ids,
            exclude_seen=self.args.eval_exclude_seen,
        )
        try:
            yield
        finally:
            self.data_collator = training_collator

    # ---------------------------------------------------------------------------------------------------- validation

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Mean loss of the batch, ranks (B,) of its targets (`inf` beyond the longest list), and the targets (B,)."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs: Any = self.compute_loss(model, inputs["loss_inputs"])
            loss = outputs.detach()
        if prediction_loss_only:
            return loss, None, None
        if self._trie is None:
            self._trie = ItemTrie.from_tokenizer(self.processing_class).to(self.args.device)
        items_Bk, _ = self.accelerator.unwrap_model(model).recommend_indices(
            inputs["input_ids"],
            inputs["attention_mask"],
            trie=self._trie,
            k=self.args.eval_top_k,
            num_beams=max(self.args.eval_num_beams, self.args.eval_top_k),
            seen=inputs["seen"],
        )
        return loss, ranks_from_items(items_Bk, inputs["targets"]), inputs["targets"]

    def _ranking_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        return ranking_metrics(np.asarray(prediction.predictions), self.args.eval_ks)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        with self._average.applied() if self.is_in_train and self._average is not None else nullcontext():
            return super().evaluation_loop(*args, **kwargs)

    # ------------------------------------------------------------------------------------------------------ training

    def train(  # type: ignore[override]
        self, resume_from_checkpoint: str | Path | bool | None = None, **kwargs: Any
    ) -> Any:
        """As Trainer.train; `True` means the newest whole checkpoint, or a fresh start (and says so) without one.

        Raises:
            ArtifactError: The named checkpoint is missing or only half of one.
            TrainingError: Nothing to train on, or the loss is not finite.
        """
        if self.train_dataset is not None and hasattr(self.train_dataset, "__len__") and not len(self.train_dataset):
            raise TrainingError("the training set is empty: lower min_user / min_item of load_data, or give more data.")
        if self.args.ema_decay is not None:
            self._average = WeightAverage(self.model, self.args.ema_decay)
        result = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        if self._average is not None:
            best_was_loaded = self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None
            if not best_was_loaded:  # a loaded checkpoint holds averaged weights already
                self._average.swap()
            self._average = None
        return result

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        optimizer = super().create_optimizer(*args, **kwargs)
        if self._average is not None and not any(
            isinstance(c, _AverageCallback) for c in self.callback_handler.callbacks
        ):
            self.add_callback(_AverageCallback(self))
        return optimizer


def _trains_on_prefixes(model: Any) -> bool:
    """One (history, target) pair per sample, or windows of which every item is a target?"""
    config = model.config
    return bool(getattr(config, "is_encoder_decoder", False) or getattr(config, "prefix_training", False))


def training_layout(model: Any) -> str:
    """How a model reads training data: windows, prefixes (one sample each), or packed (all prefixes of a window)."""
    if getattr(model.config, "is_encoder_decoder", False) and getattr(model.config, "causal_encoder", False):
        return "packed"
    return "prefixes" if _trains_on_prefixes(model) else "windows"


def _as_dataset(evaluation: Any, args: RecommenderTrainingArguments) -> Any:
    if isinstance(evaluation, EvaluationSet):
        return RankingDataset(evaluation, max_users=args.eval_users, seed=args.seed)
    return evaluation


class _AverageCallback(TrainerCallback):
    """Takes the weights into the average after each optimiser step."""

    def __init__(self, trainer: RecommenderTrainer) -> None:
        self.trainer = trainer

    def on_optimizer_step(self, args, state, control, **kwargs):
        if self.trainer._average is not None:
            self.trainer._average.update(state.global_step + 1)


@dataclass(frozen=True)
class TrainingResult:
    """What `train_recommender` gives: the trainer (its model is the best one) and a summary for `metrics.json`.

    `summary` holds `validation` (metrics of the best checkpoint), `best_step`, `steps`, `epochs`, `train_loss`,
    `train_seconds`, `eval_seconds` and `targets_per_second` (target items trained, evaluation time taken off).
    """

    trainer: RecommenderTrainer
    summary: dict[str, Any]

    @property
    def model(self) -> Any:
        return self.trainer.model


def train_recommender(
    model: Any,
    tokenizer: Any,
    split: Split,
    args: RecommenderTrainingArguments,
    *,
    train_dataset: Dataset | None = None,
    data_collator: Callable | None = None,
    user_ids: Sequence[str] | None = None,
    resume_from_checkpoint: str | Path | bool | None = None,
    **trainer_options: Any,
) -> TrainingResult:
    """Train any of the library's models on a split and leave the best state in `model`.

    Encoder-decoder models and those whose configuration says `prefix_training` get one sample per prefix
    (`PrefixDataset`), the others windows of which every position is trained (`WindowDataset`), both of
    `args.max_history` items. An encoder-decoder with `causal_encoder` gets windows too, every prefix of which is trained
    (`PackedPrefixCollator`). A model with `prepare_training(train_counts_N)` is told
    how often each item occurs in training, and may return callbacks.

    Args:
        model, tokenizer: Of the same catalogue.
        split: Its `train` rows are learned and its `validation` targets ranked.
        args: RecommenderTrainingArguments; checkpoints go to `args.output_dir`.
        train_dataset, data_collator: Instead of the ones above.
        user_ids: User strings by row of the data, for tokenizers with user tokens (prefixes and packed prefixes).
        resume_from_checkpoint: A checkpoint folder, or True for the newest whole one (if there is any).
        trainer_options: More arguments of RecommenderTrainer (`callbacks`, `optimizers`, `eval_dataset`, ...).

    Raises:
        IncompatibleComponentsError: Model and tokenizer of different catalogues, or windows longer than the model
        reads.
        TrainingError: Nothing to train on, checkpoints of another run in the output folder, or a loss that is not
        finite.
    """
    check_fingerprint(model, tokenizer)
    resume = resume_from_checkpoint if resume_from_checkpoint is not None else args.resume_from_checkpoint
    resume = {"true": True, "false": None}.get(str(resume).lower(), resume)
    if not resume and (old := checkpoints(str(args.output_dir))):
        raise TrainingError(
            f"{args.output_dir} holds checkpoints of an earlier run ({old[-1].name}), which a resume would mix up with "
            "this one: set resume_from_checkpoint to true to go on, or remove them, or choose another output_dir."
        )
    prefixes = _trains_on_prefixes(model)
    longest = getattr(model.config, "max_position_embeddings", None)
    if not prefixes and longest is not None and longest < args.max_history:
        raise IncompatibleComponentsError(
            f"max_history is {args.max_history}, but the model reads {longest} items: lower max_history or raise "
            "max_position_embeddings of its configuration."
        )
    if args.eval_strategy != "no" and "eval_dataset" not in trainer_options and not len(split.validation.targets):
        raise TrainingError(
            "the validation part is empty: no user has enough interactions to hold one out. Bring longer histories, or "
            "set eval_strategy to no."
        )
    config = getattr(model, "recommendation_config", None)
    if config is not None and config.max_history is None:  # serve what was trained
        model.recommendation_config = config.merged(max_history=args.max_history)
    layout = training_layout(model)
    user_ids = user_ids if layout != "windows" and getattr(tokenizer, "num_user_tokens", None) else None
    if train_dataset is None:
        train_dataset = _training_set(layout, split, args, user_ids)
    if data_collator is None:
        data_collator = COLLATORS[layout](tokenizer)
    prepare = getattr(model, "prepare_training", None)
    if prepare is not None:  # the model hears what it will be trained on, and may bring callbacks of its own
        counts_N = np.bincount(split.train.items, minlength=tokenizer.num_items)
        trainer_options["callbacks"] = [*(trainer_options.get("callbacks") or []), *prepare(counts_N)]
    trainer_options.setdefault("eval_dataset", None if args.eval_strategy == "no" else split.validation)
    trainer = RecommenderTrainer(
        model=model,
        args=args,
        data_collator=data_collator,
        train_dataset=train_dataset,
        processing_class=tokenizer,
        user_ids=user_ids,
        **trainer_options,
    )
    started = time.perf_counter()
    output = trainer.train(resume_from_checkpoint=resume)
    model.eval()
    return TrainingResult(trainer, _summary(trainer, output, time.perf_counter() - started))


COLLATORS: dict[str, Callable[[Any], Callable]] = {
    "windows": SequenceCollator,
    "prefixes": PrefixCollator,
    "packed": PackedPrefixCollator,
}


def _training_set(
    layout: str, split: Split, args: RecommenderTrainingArguments, user_ids: Sequence[str] | None
) -> Dataset:
    if layout == "prefixes":
        return PrefixDataset(
            split.train,
            args.max_history,
            samples_per_epoch=args.samples_per_epoch,
            seed=args.seed,
            user_ids=user_ids,
        )
    if layout == "packed" and args.samples_per_epoch is not None:
        raise TrainingError(
            f"samples_per_epoch is {args.samples_per_epoch}, but packed windows train every prefix: leave it out, or set "
            "causal_encoder to false."
        )
    return WindowDataset(split.train, args.max_history, seed=args.seed, user_ids=user_ids)


def _summary(trainer: RecommenderTrainer, output: Any, seconds: float) -> dict[str, Any]:
    state: Any = trainer.state
    dataset: Any = trainer.train_dataset
    evaluations = {entry["step"]: entry for entry in state.log_history if "eval_loss" in entry}
    best = evaluations.get(state.best_global_step) or (evaluations[max(evaluations)] if evaluations else {})
    steps = state.global_step - trainer._initial_global_step  # of this call: a resumed run has done others before
    first = trainer._initial_global_step
    eval_seconds = sum(entry["eval_runtime"] for step, entry in evaluations.items() if step > first)
    targets = getattr(dataset, "num_targets", len(dataset)) * (state.epoch or 0.0) * steps / max(1, state.global_step)
    wanted = ("eval_recall@", "eval_ndcg@", "eval_loss")
    return {
        "validation": {name.removeprefix("eval_"): v for name, v in best.items() if name.startswith(wanted)},
        "best_step": best.get("step"),
        "steps": state.global_step,
        "epochs": state.epoch,
        "train_loss": output.training_loss,
        "train_seconds": seconds,
        "eval_seconds": eval_seconds,
        "targets_per_second": targets / max(seconds - eval_seconds, 1e-9),
    }
