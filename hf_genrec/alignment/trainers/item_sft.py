"""ItemSFTTrainer: supervised fine-tuning of a language model on rows about items, on TRL's SFTTrainer (LC-Rec, arXiv
2311.09049, trains its tasks so).

What changes against SFTTrainer; models, PEFT, text datasets, cards and launching are TRL's:

* **Rows drawn anew.** Beside `datasets.Dataset` (token ids, or prompt and completion as text) the training set may be an
  object of `alignment/tasks`. The order of an epoch is a function of (seed, epoch), so a resumed run repeats an
  uninterrupted one.
* **The head** multiplies only the places that have a label, and with `item_head` "items" or "level" only the rows of the
  tokens that compete (`item_head.py`). On a CPU TRL multiplies every place with the whole vocabulary.
* **Steps are exact.** Losses are summed and divided by the labels of the whole optimiser step: accumulation, batch split,
  padding side and number of processes leave the trajectory as it is.
* **No cut answers.** A row longer than `max_length`, or than the model's context, is an error that names it, where
  SFTTrainer cuts its end off. Prompts of the ranking validation lose their oldest items, whole, until they fit.
* **Ranking validation.** `ranking_dataset` is ranked by constrained beam search over the whole catalogue; `eval_recall@K`
  and `eval_ndcg@K` choose the best checkpoint.
* Whole checkpoints, the stop at a loss that is not finite, and the time budget of `guarded.py`.

*Relations*: `item_head="full"` has the loss of SFTTrainer. Preferences come after it: `softmax_dpo.py`.

Shape legend: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from torch.utils.data import DataLoader, Sampler, SequentialSampler
from transformers import AutoTokenizer, TrainerCallback
from transformers.trainer_utils import EvalPrediction
from trl import SFTConfig, SFTTrainer

from hf_genrec.alignment.adapters import unbind_forward
from hf_genrec.alignment.rollouts import items_within
from hf_genrec.data.splits import EvaluationSet
from hf_genrec.errors import IncompatibleComponentsError, TrainingError
from hf_genrec.generation.configuration_recommendation import RecommendationConfig
from hf_genrec.generation.recommend import recommendation_config_of, search_indices
from hf_genrec.generation.requests import check_fingerprint
from hf_genrec.generation.scorers import scorer_for
from hf_genrec.generation.trie import ItemTrie

from .guarded import GuardedTrainer, GuardOptions, guard_callbacks
from .item_head import ITEM_HEADS, add_item_head, has_plain_head
from .item_rows import PADDING_SIDES, EpochOrder, ItemRowCollator, check_length, is_row_source, row_lengths
from .language_model import check_context, context_of, load_model, pad_token_id, save_defaults
from .ranking import PromptRankingCollator, RankingDataset, ranking_metrics, ranks_from_items
from .sampling import LengthBucketSampler


@dataclass
class ItemSFTConfig(GuardOptions, SFTConfig):
    """SFTConfig with the options of ItemSFTTrainer. bf16 only where a GPU has it, no gradient checkpointing unless asked.

    Raises:
        TrainingError: options that contradict each other or that this trainer refuses (packing, label smoothing).
    """

    learning_rate: float = field(default=3e-4, metadata={"help": "Peak learning rate of AdamW."})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Less memory, a fifth slower."})
    report_to: None | str | list[str] = field(  # noqa: RUF036 (the order that HfArgumentParser understands)
        default="none", metadata={"help": "Experiment trackers."}
    )
    train_sampling_strategy: str = field(
        default="group_by_length", metadata={"help": "group_by_length: batches of similar length; or random."}
    )
    item_head: str = field(
        default="full",
        metadata={
            "help": "What an item token competes with: full vocabulary, all items' tokens, or those of its level.",
            "choices": list(ITEM_HEADS),
        },
    )
    padding_side: str = field(
        default="right", metadata={"help": "Side of the padding; the loss is the same.", "choices": list(PADDING_SIDES)}
    )
    max_history: int | None = field(
        default=None, metadata={"help": "Newest items of a history in ranking validation; None: the tokenizer's."}
    )
    eval_ks: list[int] = field(default_factory=lambda: [5, 10, 20], metadata={"help": "Cut-offs of the metrics."})
    eval_num_beams: int = field(default=20, metadata={"help": "Beams of the validation search (at least max eval_ks)."})
    eval_exclude_seen: bool = field(default=True, metadata={"help": "Rank without the items of the user's history."})
    eval_users: int | None = field(default=None, metadata={"help": "Rank a fixed random part of the users; None: all."})

    def __post_init__(self) -> None:
        self.logging_nan_inf_filter = False  # such a loss stops the run
        self.remove_unused_columns = False  # the collators name what they need
        self.metric_was_given = self.metric_for_best_model is not None
        super().__post_init__()
        if self.item_head not in ITEM_HEADS:
            raise TrainingError(f"item_head is {self.item_head!r}: choose one of {', '.join(ITEM_HEADS)}.")
        if self.padding_side not in PADDING_SIDES:
            raise TrainingError(f"padding_side is {self.padding_side!r}: choose right or left.")
        self.eval_ks = sorted({int(k) for k in self.eval_ks})
        if not self.eval_ks or self.eval_ks[0] < 1:
            raise TrainingError(f"eval_ks is {self.eval_ks}: give cut-offs of at least 1, such as 5 10 20.")
        for name in ("max_history", "eval_num_beams", "eval_users"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise TrainingError(f"{name} is {getattr(self, name)}: it must be at least 1.")
        if self.packing or self.padding_free:
            raise TrainingError("packing and padding_free are not for item rows, which are short: leave both off.")
        if self.label_smoothing_factor:
            raise TrainingError("label_smoothing_factor would smooth over words and items alike: leave it at 0.")

    @property
    def eval_top_k(self) -> int:
        """Length of the ranked lists: the largest cut-off."""
        return max(self.eval_ks)


class ItemSFTTrainer(GuardedTrainer, SFTTrainer):
    """SFTTrainer for rows about items; see the module's text.

    Args:
        model: causal language model with item tokens (`add_item_tokens`), PeftModel (`item_lora`), or a folder.
        args: ItemSFTConfig.
        data_collator: default ItemRowCollator.
        train_dataset: `datasets.Dataset` of `input_ids` and `labels`, or of text as TRL reads it, or a row source.
        eval_dataset: the same kinds, for `eval_loss`. None with a `ranking_dataset`: the loss of its targets.
        processing_class: the extended tokenizer; default: the one beside the model.
        ranking_dataset: EvaluationSet of the split, ranked whenever the trainer evaluates.
        user_ids: user strings by row, for tokenizers with user tokens.
        callbacks: more callbacks.
        kwargs: as for SFTTrainer (`peft_config`, `optimizers`, ...).

    Raises:
        TrainingError: rows that cannot be trained on (row named), or contradicting options.
        IncompatibleComponentsError: a tokenizer or model without the item tokens that ranking or the head needs.
    """

    loss_is_scaled_for_ga = True  # type: ignore[assignment] # see _get_num_items_in_batch
    _tag_names = ["trl", "sft", "hf_genrec"]
    _name = "Item SFT"

    def __init__(
        self,
        model: Any,
        args: ItemSFTConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        ranking_dataset: EvaluationSet | None = None,
        user_ids: Sequence[str] | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        **kwargs: Any,
    ) -> None:
        args = args if args is not None else ItemSFTConfig(output_dir="trainer_output")
        if not isinstance(args, ItemSFTConfig):
            raise TrainingError(f"args is a {type(args).__name__}: pass an ItemSFTConfig.")
        if train_dataset is None or (hasattr(train_dataset, "__len__") and not len(train_dataset)):
            raise TrainingError("the training set is empty: give rows to train on.")
        if isinstance(model, str | Path):  # TRL's way of loading asks a registered configuration for its auto_map
            load_options: Any = args.model_init_kwargs
            folder, model = str(model), load_model(model, load_options, otherwise="RecommenderTrainer")
            processing_class = processing_class or AutoTokenizer.from_pretrained(folder)
            args.model_init_kwargs = None
        if getattr(model.config, "is_encoder_decoder", False):
            raise TrainingError(f"{type(model).__name__} is an encoder-decoder: train it with RecommenderTrainer.")
        if processing_class is None:
            raise TrainingError("pass the tokenizer as processing_class.")
        unbind_forward(model.get_base_model() if is_peft_model(model) else model)  # what an earlier trainer bound to it
        self._user_ids = user_ids
        self._trie: ItemTrie | None = None
        self._ranking = _as_ranking(ranking_dataset, args)
        self._context = context_of(model, kwargs.get("peft_config"))
        if self._ranking is not None:
            check_fingerprint(model, processing_class)
            scorer_for(model, processing_class)
            if not args.metric_was_given:
                args.metric_for_best_model, args.greater_is_better = f"ndcg@{_main_k(args)}", True
        _check_metric(args, self._ranking is not None)
        if data_collator is None:
            data_collator = _RowCollator(
                pad_token_id(processing_class),
                args.max_length,
                args.padding_side,
                args.pad_to_multiple_of,  # type: ignore[arg-type]
                context=self._context,
            )
        source = train_dataset if is_row_source(train_dataset) else None
        if eval_dataset is None and self._ranking is not None:
            eval_dataset = self._ranking
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            # TRL looks at the first row only; a row source takes its place below
            train_dataset=train_dataset if source is None else Dataset.from_dict({"input_ids": [[0]], "labels": [[0]]}),
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics or (None if self._ranking is None else self._ranking_metrics),
            callbacks=[*guard_callbacks(args), *(callbacks or [])],
            **kwargs,
        )
        if source is not None:
            self.train_dataset = source
        self._order = EpochOrder(self.train_dataset) if hasattr(self.train_dataset, "__len__") else None
        inner = self._inner_model()
        # TRL's own way through the head knows models that bend their logits, and their losses of experts
        self._own_head = has_plain_head(inner) and not self.aux_loss_enabled
        if args.item_head != "full" and self.aux_loss_enabled:
            raise IncompatibleComponentsError(
                f"item_head={args.item_head!r} leaves out the experts' loss of {type(inner).__name__}: use 'full', or set "
                "router_aux_loss_coef to 0."
            )
        if self._own_head or args.item_head != "full":
            add_item_head(inner, args.item_head, processing_class)
        served = recommendation_config_of(inner)
        inner.recommendation_config = served.merged(  # serve what was trained
            restrict_to_level=args.item_head != "full", max_history=self._max_items(self._ranking)
        )
        self._finish_guards()

    def _inner_model(self) -> Any:
        model: Any = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if is_peft_model(model) else model

    def _send_telemetry(self) -> None:
        """Nothing is sent."""

    # ---------------------------------------------------------------------------------------------------------- data

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, dataset_name: str
    ) -> Any:
        if is_row_source(dataset):
            return dataset
        limit, args.max_length = args.max_length, None  # TRL would cut rows
        try:
            dataset = super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)
        finally:
            args.max_length = limit
        if isinstance(dataset, Dataset):
            lengths = row_lengths(dataset)
            for row in (int(lengths.argmax()), int(lengths.argmin())) if len(lengths) else ():
                check_context(f"{row} of the {dataset_name} dataset", int(lengths[row]), self._context)
                check_length(f"{row} of the {dataset_name} dataset", int(lengths[row]), limit)
        return dataset

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        if self._order is None or not (train_dataset is None or train_dataset is self.train_dataset):
            return super()._get_train_sampler(train_dataset)
        args = self.args
        # by the step, not by the batch: how a step is split into batches must not change which rows it has
        step_rows = self._train_batch_size * args.gradient_accumulation_steps * args.world_size
        seed = args.data_seed if args.data_seed is not None else args.seed
        bucket = 100 if args.train_sampling_strategy == "group_by_length" else 1
        return LengthBucketSampler(self._order, step_rows, seed, bucket)

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler | None:
        # in order: transformers' bucketing reads every row, and several processes are dealt batches by accelerate
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Loader of rows, or of ranking batches for a RankingDataset or an EvaluationSet."""
        eval_dataset = _as_ranking(eval_dataset, self.args)
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        with self._collator_of(dataset):
            return super().get_eval_dataloader(eval_dataset)

    def _max_items(self, ranking: Any) -> int | None:
        """Newest items that ranking reads: `max_history`, or fewer where a longer prompt with its answer would not fit."""
        asked = self.args.max_history
        tokenizer: Any = self.processing_class
        limit = min((size for size in (self.args.max_length, self._context) if size is not None), default=None)
        if limit is None or not isinstance(ranking, RankingDataset) or not len(ranking):
            return asked
        fitting, around = items_within(tokenizer, limit, self._user_ids is not None)
        fitting -= 1  # the answer stands behind them
        if fitting < 1:
            raise TrainingError(
                f"a prompt of one item has {around + tokenizer.num_levels} tokens and its answer {tokenizer.num_levels}, more "
                f"than the {limit} of max_length and the model's context: shorten history_before and history_after of the "
                "tokenizer, or take a model that reads more."
            )
        newest = asked if asked is not None else tokenizer.max_history
        longest = int(ranking.evaluation.histories.lengths[ranking.rows].max())
        return asked if min(longest, longest if newest is None else newest) <= fitting else fitting

    @contextmanager
    def _collator_of(self, dataset: Any) -> Iterator[None]:
        row_collator = self.data_collator
        if isinstance(dataset, RankingDataset):
            self.data_collator = PromptRankingCollator(
                self.processing_class,
                row_collator,
                max_history=self._max_items(dataset),
                user_ids=self._user_ids,
                exclude_seen=self.args.eval_exclude_seen,
            )
        try:
            yield
        finally:
            self.data_collator = row_collator

    # ---------------------------------------------------------------------------------------------------------- loss

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        """Labels of the whole optimiser step, of all processes."""
        if not batch_samples or "labels" not in batch_samples[0]:
            return None
        count = torch.stack([(batch["labels"][:, 1:] != -100).sum() for batch in batch_samples]).sum().to(device)
        return self.accelerator.gather(count).sum()

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Sum of the labels' losses over the labels of the whole step (of this batch, in evaluation)."""
        if return_outputs or not (self._own_head or self.args.item_head != "full"):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        policy: Any = self.model
        outputs = model(**inputs, item_head=True)
        losses_n = -outputs.log_probs
        if self.args.loss_type == "dft":  # arXiv 2508.05629, as TRL weighs it
            losses_n = losses_n * outputs.log_probs.exp().detach()
        count = torch.as_tensor(len(losses_n), device=losses_n.device)
        labels = count
        if num_items_in_batch is not None:  # DDP averages over processes
            labels = torch.as_tensor(num_items_in_batch) / self.accelerator.num_processes
        loss = losses_n.sum() / labels.clamp(min=1)
        mode = "train" if policy.training else "eval"
        sums = torch.stack([outputs.is_top1.sum(), count, inputs["attention_mask"].sum()])
        hits, count, tokens = self.accelerator.gather_for_metrics(sums.unsqueeze(0)).sum(dim=0).tolist()
        self._metrics[mode]["mean_token_accuracy"].append(hits / count if count else 0.0)
        self._total_train_tokens += tokens if mode == "train" else 0
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
        return loss

    # ---------------------------------------------------------------------------------------------------- validation

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        """As Trainer.evaluate; an EvaluationSet is welcome."""
        return super().evaluate(_as_ranking(eval_dataset, self.args), ignore_keys, metric_key_prefix)

    def evaluation_loop(self, dataloader: DataLoader, *args: Any, **kwargs: Any) -> Any:
        output = super().evaluation_loop(dataloader, *args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        if self._ranking is not None and prefix == "eval" and not isinstance(dataloader.dataset, RankingDataset):
            ranked = super().evaluation_loop(self.get_eval_dataloader(self._ranking), *args, **kwargs)
            output.metrics.update({name: value for name, value in ranked.metrics.items() if "@" in name})
        return output

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Loss of a batch of rows; of a ranking batch the loss, the ranks (B,) and the targets (B,)."""
        if "targets" not in inputs:
            return super().prediction_step(model, inputs, True, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs: Any = self.compute_loss(model, inputs["loss_inputs"])
            loss = outputs.detach()
        if prediction_loss_only:
            return loss, None, None
        return loss, ranks_from_items(self._search(model, inputs), inputs["targets"]), inputs["targets"]

    def _search(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        if self._trie is None:
            self._trie = ItemTrie.from_tokenizer(self.processing_class).to(self.args.device)
        config: RecommendationConfig = recommendation_config_of(self._inner_model()).merged(
            k=self.args.eval_top_k,
            num_beams=max(self.args.eval_num_beams, self.args.eval_top_k),
        )
        decoder = scorer_for(
            self.accelerator.unwrap_model(model), self.processing_class, restrict_to_level=config.restrict_to_level
        )
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        with self.compute_loss_context_manager():
            return search_indices(decoder, ids, mask, self._trie, config, seen=inputs["seen"])[0]

    def _ranking_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        return ranking_metrics(np.asarray(prediction.predictions), self.args.eval_ks)

    # -------------------------------------------------------------------------------------------------------- saving

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        save_defaults(self._inner_model(), output_dir if output_dir is not None else str(self.args.output_dir))


@dataclass
class _RowCollator(ItemRowCollator):
    """ItemRowCollator that also knows how much the model reads."""

    context: int | None = None

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        for place, example in enumerate(examples):
            check_context(f"{place} of a batch", len(example["input_ids"]), self.context)
        return super().torch_call(examples)


def _as_ranking(evaluation: Any, args: ItemSFTConfig) -> Any:
    if isinstance(evaluation, EvaluationSet):
        return RankingDataset(evaluation, max_users=args.eval_users, seed=args.seed)
    return evaluation


def _main_k(args: ItemSFTConfig) -> int:
    return 10 if 10 in args.eval_ks else args.eval_ks[-1]


def _check_metric(args: ItemSFTConfig, ranks: bool) -> None:
    name, _, k = (args.metric_for_best_model or "").removeprefix("eval_").partition("@")
    if name not in ("recall", "ndcg"):
        return
    if not ranks:
        raise TrainingError(
            f"metric_for_best_model is {args.metric_for_best_model}, which needs a ranking_dataset: pass one, or use loss."
        )
    if not k.isdigit() or int(k) not in args.eval_ks:
        raise TrainingError(
            f"metric_for_best_model is {args.metric_for_best_model}, but eval_ks is {args.eval_ks}: add its K."
        )
