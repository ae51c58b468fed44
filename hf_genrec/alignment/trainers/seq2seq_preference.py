"""Seq2SeqPreferenceTrainer: DPO and S-DPO for encoder-decoder recommenders such as TIGER, which TRL does not train.

The data format and the loss are those of `softmax_dpo.py` (S-DPO, arXiv 2406.09215; DPO, arXiv 2305.18290, with one
rejected answer per prompt); supervised training is RecommenderTrainer, from which this trainer takes validation by full
ranking, atomic checkpoints, exact resuming and the stop at a loss that is not finite.

* A prompt is encoded once, and its 1 + K answers are scored against that encoding.
* Log-probabilities are the model's own: TIGER's per-level softmax, not one over the whole vocabulary.
* Steps are exact: sums over the prompts of the whole step, whatever the micro-batches and processes.

*Relations*: `sft_weight=w` adds w times the next-token loss of the chosen answers, as OneRec (arXiv 2502.18965) does to
keep a model from unlearning what it recommends. Without dropout and with the reference equal to the policy the first
loss is log(K + 1) + w * that loss.

Shape legend: B prompts, K rejected answers of the prompt that has most, R rejected answers of all prompts, A = B + R
answers (first all chosen, then the rejected ones prompt after prompt), T prompt tokens, Q answer tokens, V vocabulary,
D width of the model.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.modeling_outputs import BaseModelOutput

from hf_genrec.alignment.preference_rows import (
    ID_COLUMNS,
    TEXT_COLUMNS,
    as_answers,
    check_answers,
)
from hf_genrec.errors import IncompatibleComponentsError, TrainingError
from hf_genrec.generation.search import evaluating

from .arguments import RecommenderTrainingArguments
from .language_model import check_context, context_of, load_model
from .preference_loss import (
    RewardMeter,
    check_beta,
    check_same_vocabulary,
    padded_rejected,
    softmax_preference_loss,
    step_counts,
)
from .recommender import RecommenderTrainer

_IMPOSSIBLE = -1e30  # below: a token that the model gives no probability at its place


@dataclass
class Seq2SeqPreferenceConfig(RecommenderTrainingArguments):
    """RecommenderTrainingArguments for preference tuning: gentler steps, and no validation unless it is asked for.

    Raises:
        TrainingError: a beta that is not positive, a negative weight, or what RecommenderTrainingArguments refuses.
    """

    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate of AdamW."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the pairs."})
    eval_strategy: str = field(default="no", metadata={"help": "When to validate (needs an eval_dataset)."})
    train_sampling_strategy: str = field(default="random", metadata={"help": "Order of the pairs."})
    beta: float = field(default=1.0, metadata={"help": "Pull towards the reference; the S-DPO script uses 1."})
    sft_weight: float = field(default=0.0, metadata={"help": "Weight of the next-token loss of the chosen answers."})
    disable_dropout: bool = field(default=True, metadata={"help": "No dropout, so that log-ratios have no noise."})
    max_length: int | None = field(default=None, metadata={"help": "Longest prompt in tokens; longer ones are errors."})
    precompute_ref_log_probs: bool = field(
        default=False, metadata={"help": "Score all pairs with the reference before training; keep no reference model."}
    )
    precompute_ref_batch_size: int | None = field(default=None, metadata={"help": "Prompts scored together there."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_beta(self.beta)
        if self.sft_weight < 0:
            raise TrainingError(f"sft_weight is {self.sft_weight}: give 0 or more.")


@dataclass
class Seq2SeqPreferenceCollator:
    """Rows of ids -> prompts for the encoder and answers for the decoder.

    Args:
        pad_token_id: for the empty places of prompts.
        padding_side: of prompts, "right" or "left" (the same for models with relative positions, such as T5).

    Returns:
        `rejected_counts`, `chosen_tokens` (B,); `input_ids`, `attention_mask` (B, T); `answers` (A, Q) with -100 behind
        the end; where the rows have them `ref_chosen_logps` (B,) and `ref_rejected_logps` (R,).

    Example:
        >>> rows = [{"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [[4], [5, 6]]}]
        >>> Seq2SeqPreferenceCollator(pad_token_id=0)(rows)["answers"].tolist()
        [[3, -100], [4, -100], [5, 6]]
    """

    pad_token_id: int
    padding_side: str = "right"

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        rejected = [as_answers(example["rejected_ids"]) for example in examples]
        answers = [example["chosen_ids"] for example in examples] + [ids for row in rejected for ids in row]
        prompts = [torch.tensor(example["prompt_ids"]) for example in examples]
        side: Any = self.padding_side
        batch = {
            "rejected_counts": torch.tensor([len(row) for row in rejected]),
            "chosen_tokens": torch.tensor([len(example["chosen_ids"]) for example in examples]),
            "input_ids": pad_sequence(prompts, True, self.pad_token_id, side),
            "attention_mask": pad_sequence([torch.ones_like(ids) for ids in prompts], True, 0, side),
            "answers": pad_sequence([torch.tensor(ids) for ids in answers], True, -100),
        }
        if "ref_chosen_logps" in examples[0]:
            batch["ref_chosen_logps"] = torch.tensor([example["ref_chosen_logps"] for example in examples])
            flat = [value for example in examples for value in example["ref_rejected_logps"]]
            batch["ref_rejected_logps"] = torch.tensor(flat)
        return batch


class Seq2SeqPreferenceTrainer(RecommenderTrainer):
    """RecommenderTrainer for preference rows: `prompt`, `chosen`, `rejected`, as text or as `*_ids`.

    Text is encoded by `processing_class`, each part by itself. Rows may have different numbers of rejected answers.

    Args:
        model: encoder-decoder of transformers or of this library, or a PeftModel of one.
        ref_model: reference, or its folder; None: a frozen copy of the model as it is (with `peft_config`: the disabled adapter).
        args: Seq2SeqPreferenceConfig.
        train_dataset: a `datasets.Dataset` of preference rows.
        eval_dataset: EvaluationSet (its targets are ranked, its next-token loss watched), or preference rows.
        processing_class: tokenizer.
        peft_config: adapter to train instead of the model.
        kwargs: as for RecommenderTrainer.

    Raises:
        TrainingError: rows that cannot be trained on (row named), or a model that is no encoder-decoder.
        IncompatibleComponentsError: the reference has another vocabulary or catalogue than the policy.
    """

    args: Seq2SeqPreferenceConfig
    loss_is_scaled_for_ga = True  # see _get_num_items_in_batch

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: Seq2SeqPreferenceConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        data_collator: Any = None,
        peft_config: Any = None,
        **kwargs: Any,
    ) -> None:
        args = args if args is not None else Seq2SeqPreferenceConfig(output_dir="trainer_output")
        if not isinstance(args, Seq2SeqPreferenceConfig):
            raise TrainingError(f"args is a {type(args).__name__}: pass a Seq2SeqPreferenceConfig.")
        model, ref_model = policy_and_reference(
            model,
            ref_model,
            processing_class,
            peft_config,
            copied=not args.precompute_ref_log_probs,
            otherwise="SoftmaxDPOTrainer",
        )
        self._new_adapter = peft_config is not None  # its reference is the model without it
        self._rewards = RewardMeter()
        self._processing_class, self._context = processing_class, context_of(model)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator or Seq2SeqPreferenceCollator(processing_class.pad_token_id),
            train_dataset=self._prepared(train_dataset, "train", args.max_length),
            eval_dataset=self._prepared(eval_dataset, "eval", args.max_length)
            if _is_preference(eval_dataset)
            else eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        if self.args.n_gpu > 1:
            raise TrainingError("several GPUs in one process are not supported: use `accelerate launch`.")
        self.ref_model = ref_model
        if ref_model is not None:
            ref_model.requires_grad_(False).eval().to(self.args.device)
        if args.precompute_ref_log_probs:
            self.train_dataset = self._with_reference(self.train_dataset)
            if _is_preference(self.eval_dataset):
                self.eval_dataset = self._with_reference(self.eval_dataset)
            self.ref_model = None

    # ---------------------------------------------------------------------------------------------------------- data

    def _prepared(self, dataset: Any, name: str, max_length: int | None) -> Any:
        if dataset is None:
            return None
        if not isinstance(dataset, Dataset) or not _is_preference(dataset):
            raise TrainingError(
                f"the {name} dataset must be a datasets.Dataset with the columns prompt, chosen, rejected (or the same "
                "as *_ids): build it with hf_genrec.alignment.pair_datasets."
            )
        options = {"tokenizer": self._processing_class, "max_length": max_length, "context": self._context}
        return dataset.map(_row_of_ids, with_indices=True, fn_kwargs=options, desc=f"Checking {name} pairs")

    def _with_reference(self, dataset: Any) -> Any:
        """The dataset with log-probabilities of the reference; every process scores its share."""
        if "ref_chosen_logps" in dataset.column_names:
            return dataset
        size = self.args.precompute_ref_batch_size or self.args.per_device_train_batch_size
        mine = range(self.accelerator.process_index, len(dataset), self.accelerator.num_processes)
        found: list[tuple[int, float, list[float]]] = []
        for start in range(0, len(mine), size):
            rows = list(mine[start : start + size])
            batch = self._prepare_inputs(self.data_collator([dataset[row] for row in rows]))
            logps_B, logps_R = self._reference_logps(batch)
            parts = logps_R.cpu().split(batch["rejected_counts"].tolist())
            found += [(row, float(one), part.tolist()) for row, one, part in zip(rows, logps_B.cpu(), parts)]
        ordered = sorted(gather_object(found))
        dataset = dataset.add_column("ref_chosen_logps", [chosen for _, chosen, _ in ordered])
        return dataset.add_column("ref_rejected_logps", [rejected for _, _, rejected in ordered])

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Loader of preference rows, or (an EvaluationSet) of ranking batches."""
        dataset: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if not _is_preference(dataset):
            return super().get_eval_dataloader(eval_dataset)
        return Trainer.get_eval_dataloader(self, dataset)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As Trainer.evaluate; preference rows are checked and encoded first."""
        if _is_preference(eval_dataset):
            eval_dataset = self._prepared(eval_dataset, "eval", self.args.max_length)
        return super().evaluate(eval_dataset, *args, **kwargs)

    # ---------------------------------------------------------------------------------------------------------- loss

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        if not batch_samples or "rejected_counts" not in batch_samples[0]:
            return super()._get_num_items_in_batch(batch_samples, device)
        return step_counts(batch_samples, self.accelerator, device)

    def _reference_logps(self, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities (B,) and (R,) of the reference, as of now or as precomputed."""
        prompts = len(inputs["rejected_counts"])
        if "ref_chosen_logps" in inputs:
            return inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        model: Any = self.ref_model
        off: Any = nullcontext()
        if model is None:
            policy = self.accelerator.unwrap_model(self.model)
            if self._new_adapter:
                model, off = self.model, policy.disable_adapter()
            elif self.state.global_step == 0:
                model = self.model  # precomputing: the policy has not moved
            else:
                raise TrainingError(
                    "precompute_ref_log_probs keeps no reference: pass evaluation pairs as eval_dataset when the trainer "
                    "is made."
                )
        with evaluating(model), off:
            logps_A = answer_logps(model, self.accelerator.unwrap_model(model), inputs)
        return logps_A[:prompts], logps_A[prompts:]

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Sum of the prompts' losses over the prompts of the whole step (of this batch, in evaluation)."""
        if "rejected_counts" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        counts_B, mode = inputs["rejected_counts"], "train" if model.training else "eval"
        prompts = len(counts_B)
        with without_dropout(model) if self.args.disable_dropout else nullcontext():
            logps_A = answer_logps(model, self.accelerator.unwrap_model(model), inputs)
        logps_B, logps_R = logps_A[:prompts], logps_A[prompts:]
        ref_B, ref_R = self._reference_logps(inputs)
        ratios_B, logps_BK = logps_B - ref_B, padded_rejected(logps_R.detach(), counts_B)[0]
        ratios_BK, there_BK = padded_rejected(logps_R - ref_R, counts_B)
        losses_B = softmax_preference_loss(ratios_B, ratios_BK, there_BK, beta=self.args.beta)

        step_prompts, step_tokens = prompts, inputs["chosen_tokens"].sum()
        if num_items_in_batch is not None:  # DDP averages over processes
            step_prompts, step_tokens = num_items_in_batch / self.accelerator.num_processes
        loss = losses_B.sum() / step_prompts
        if self.args.sft_weight:
            loss = loss - self.args.sft_weight * logps_B.sum() / step_tokens
        beta = self.args.beta
        rewards = (beta * ratios_B.detach(), beta * ratios_BK.detach(), there_BK)
        self._rewards.add(mode, self.accelerator, *rewards, logps_B.detach(), logps_BK)
        return (loss, {}) if return_outputs else loss

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """The loss of preference rows; ranks and targets of an EvaluationSet."""
        if "rejected_counts" not in inputs:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss: Any = self.compute_loss(model, inputs)
        return loss.detach(), None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As Trainer, with the rewards since the last call."""
        policy: Any = self.model
        mode, prefix = ("train", "") if policy.training else ("eval", "eval_")
        logs.update({f"{prefix}{name}": value for name, value in self._rewards.take(mode).items()})
        super().log(logs, start_time)


def policy_and_reference(
    model: Any, ref_model: Any, processing_class: Any, peft_config: Any, *, copied: bool, otherwise: str
) -> tuple[Any, Any]:
    """What the encoder-decoder trainers that compare with a reference check, and how they come by one.

    Args:
        model, ref_model, processing_class, peft_config: as given to the trainer.
        copied: without a reference and an adapter, a copy of the model is one.
        otherwise: trainer of decoder-only models, for the message.

    Returns:
        the model, with a new adapter where one is asked for; the reference, or None.

    Raises:
        TrainingError, IncompatibleComponentsError: as the trainers say.
    """
    if not getattr(model.config, "is_encoder_decoder", False):
        raise TrainingError(f"{type(model).__name__} is no encoder-decoder: use {otherwise}.")
    if processing_class is None:
        raise TrainingError("pass the tokenizer as processing_class.")
    if ref_model is model:
        raise TrainingError("ref_model is the model under training: leave it out for a frozen copy.")
    if isinstance(ref_model, str | Path):
        ref_model = load_model(ref_model, otherwise=otherwise, seq2seq=True)
    if ref_model is not None:
        check_same_vocabulary(model, ref_model, processing_class)
    elif peft_config is None and copied:
        ref_model = copy.deepcopy(model)
    if peft_config is not None:
        from peft import get_peft_model

        model = get_peft_model(model, peft_config)
    return model, ref_model


def answer_logps(model: Any, unwrapped: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """Log-probability of every answer given its prompt, summed over its tokens: (A,) float32.

    Args:
        model: encoder-decoder, possibly wrapped for training on several devices.
        unwrapped: the same without wrapper.
        inputs: batch of Seq2SeqPreferenceCollator.

    Raises:
        IncompatibleComponentsError: an answer token that the model never gives at its place (checked on CPU).
    """
    counts_B = inputs["rejected_counts"]
    rows_B = torch.arange(len(counts_B), device=counts_B.device)
    rows_A = torch.cat([rows_B, rows_B.repeat_interleave(counts_B)])
    return answer_token_logps(model, unwrapped, inputs, inputs["answers"], rows_A).sum(dim=1)


def answer_token_logps(
    model: Any, unwrapped: Any, inputs: dict[str, Any], answers_AQ: torch.Tensor, rows_A: torch.Tensor
) -> torch.Tensor:
    """Log-probability of every token of A answers, each prompt encoded once: (A, Q) float32, 0 where nothing stands.

    Args:
        model, unwrapped: as for `answer_logps`.
        inputs: `input_ids`, `attention_mask` (B, T) of the prompts.
        answers_AQ: token ids, -100 behind the end.
        rows_A: prompt of each answer.

    Raises:
        IncompatibleComponentsError: an answer token that the model never gives at its place (checked on CPU).
    """
    mask_BT = inputs["attention_mask"]
    states_BTD = unwrapped.get_encoder()(input_ids=inputs["input_ids"], attention_mask=mask_BT, return_dict=True)[0]
    logits_AQV = model(
        encoder_outputs=BaseModelOutput(last_hidden_state=states_BTD[rows_A]),
        attention_mask=mask_BT[rows_A],
        decoder_input_ids=unwrapped.prepare_decoder_input_ids_from_labels(labels=answers_AQ),
        use_cache=False,
    ).logits
    logps_AQV = torch.log_softmax(logits_AQV.float(), dim=-1)
    there_AQ = answers_AQ >= 0
    logps_AQ = logps_AQV.gather(2, answers_AQ.clamp(min=0).unsqueeze(2)).squeeze(2).masked_fill(~there_AQ, 0.0)
    if logps_AQ.device.type == "cpu" and bool((logps_AQ < _IMPOSSIBLE).any()):
        row, place = (logps_AQ < _IMPOSSIBLE).nonzero()[0].tolist()
        raise IncompatibleComponentsError(
            f"token {int(answers_AQ[row, place])} at position {place} of an answer is no code of that level: build the "
            "pairs with the tokenizer the model was configured from, answers without an end token."
        )
    return logps_AQ


@contextmanager
def without_dropout(model: Any) -> Iterator[None]:
    """Evaluation mode, with gradients; afterwards every submodule is back in the mode it had."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _is_preference(dataset: Any) -> bool:
    columns = set(getattr(dataset, "column_names", None) or ())
    return set(ID_COLUMNS) <= columns or set(TEXT_COLUMNS) <= columns


def _row_of_ids(
    example: dict[str, Any], row: int, tokenizer: Any, max_length: int | None, context: int | None
) -> dict[str, Any]:
    if set(ID_COLUMNS) <= set(example):
        prompt, chosen, rejected = (example[name] for name in ID_COLUMNS)
        rejected = as_answers(rejected)
    else:
        texts = [example["prompt"], example["chosen"], *as_answers(example["rejected"])]
        if not all(isinstance(text, str) for text in texts):
            raise TrainingError(f"row {row}: prompt, chosen and rejected must be text (or give *_ids columns).")
        prompt, chosen, *rejected = (tokenizer(text)["input_ids"] for text in texts)
    check_answers(row, prompt, chosen, rejected)
    check_context(row, len(prompt), context)
    if max_length is not None and len(prompt) > max_length:
        raise TrainingError(
            f"row {row}: a prompt of {len(prompt)} tokens exceeds max_length={max_length}; cut histories when building the "
            "pairs (max_history or max_prompt_tokens), or raise max_length."
        )
    return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
