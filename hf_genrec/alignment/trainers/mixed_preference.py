"""Next-token loss on what users chose, with preferences between the model's own answers in a few batches (OneRec).

OneRec (arXiv 2502.18965) trains on L_NTP + lambda * L_DPO, where only a small share of the batches has the second term. A
row here is a request: prompt and target, and for some requests also a chosen and rejected answers:

    prompt_ids, target_ids, chosen_ids (may be empty), rejected_ids (list of answers, may be empty)

    loss = ntp_weight * sum -log pi(target) / target tokens of the step + dpo_weight * sum DPO / pairs of the step

The requests with a pair come together in steps of their own (`PairBatches`), so that the others need neither the
reference nor longer sequences. Steps are exact: sums over the whole step, whatever the micro-batches and processes.

*Relations*: rows whose chosen answer is the target, all with a pair, are `SoftmaxDPOTrainer(loss_type=["sigmoid", "sft"])`
and `Seq2SeqPreferenceTrainer(sft_weight=...)`; no pairs at all is plain supervised training. K rejected answers are S-DPO.
What S-DPO does with the model holds here too: `item_head`, the experts' loss of a mixture of experts, and one pass per prompt
where it has several answers (`shared_prompts.py`).

Shape legend: B requests, P of them with a pair, R rejected answers, A = B + P + R answers (targets, chosen, rejected),
T tokens, Q answer tokens, K rejected answers of the pair that has most.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Sampler

from hf_genrec.alignment.preference_rows import check_answers, check_length
from hf_genrec.errors import TrainingError

from .item_head import ANSWERS
from .language_model import check_context
from .preference_loss import padded_rejected, softmax_preference_loss
from .seq2seq_preference import (
    Seq2SeqPreferenceConfig,
    Seq2SeqPreferenceTrainer,
    answer_token_logps,
    without_dropout,
)
from .softmax_dpo import SoftmaxDPOConfig, SoftmaxDPOTrainer, SoftmaxPreferenceCollator

COLUMNS = ("prompt_ids", "target_ids", "chosen_ids", "rejected_ids")


@dataclass
class MixedPreferenceConfig(SoftmaxDPOConfig):
    """SoftmaxDPOConfig for the mixture. `loss_type` is not read.

    Raises:
        TrainingError: a negative weight, both 0, or precomputed references (there is a new one per iteration).
    """

    beta: float = field(default=0.1, metadata={"help": "Pull towards the reference."})
    ntp_weight: float = field(default=1.0, metadata={"help": "Weight of the next-token loss of the targets."})
    dpo_weight: float = field(default=1.0, metadata={"help": "Weight of the preference loss."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "The collator names what it needs."})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Trade time for memory."})

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_weights(self)


@dataclass
class Seq2SeqMixedPreferenceConfig(Seq2SeqPreferenceConfig):
    """Seq2SeqPreferenceConfig for the mixture; `sft_weight` is `ntp_weight` here and must stay 0.

    Raises:
        TrainingError: as MixedPreferenceConfig.
    """

    beta: float = field(default=0.1, metadata={"help": "Pull towards the reference."})
    ntp_weight: float = field(default=1.0, metadata={"help": "Weight of the next-token loss of the targets."})
    dpo_weight: float = field(default=1.0, metadata={"help": "Weight of the preference loss."})

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_weights(self)
        if self.sft_weight:
            raise TrainingError(f"sft_weight is {self.sft_weight}: the mixture's next-token loss has ntp_weight.")


def _check_weights(args: Any) -> None:
    if args.ntp_weight < 0 or args.dpo_weight < 0 or not args.ntp_weight + args.dpo_weight:
        raise TrainingError(f"ntp_weight={args.ntp_weight}, dpo_weight={args.dpo_weight}: give 0 or more, one above 0.")
    if args.precompute_ref_log_probs:
        raise TrainingError("precompute_ref_log_probs: the mixture scores few pairs; leave it off.")


class PairBatches(Sampler):
    """An order in which requests with a pair fill whole batches, and these come at random among the others.

    Args:
        has_pair: (M,) bool.
        batch_size: rows of a batch; of a whole step where several batches make one.
        seed: of the order, together with the epoch.
    """

    def __init__(self, has_pair: np.ndarray, batch_size: int, seed: int = 0) -> None:
        self.has_pair, self.batch_size, self.seed, self.epoch = np.asarray(has_pair, bool), int(batch_size), seed, 0

    def __len__(self) -> int:
        return len(self.has_pair)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, self.epoch])
        whole, rest = [], []
        for kind in (self.has_pair, ~self.has_pair):
            rows = rng.permutation(np.flatnonzero(kind))
            full = len(rows) // self.batch_size * self.batch_size
            whole += list(rows[:full].reshape(-1, self.batch_size))
            rest += list(rows[full:])
        for batch in rng.permutation(len(whole)):
            yield from whole[batch].tolist()
        yield from (int(row) for row in rest)


def _check_row(row: dict[str, Any], number: int | str, limit: int | None, context: int | None) -> None:
    prompt, target, chosen, rejected = (row[name] for name in COLUMNS)
    if bool(len(chosen)) != bool(len(rejected)):
        raise TrainingError(f"row {number}: a pair has a chosen and rejected answers, or the row has neither.")
    if not len(prompt) or not len(target):
        raise TrainingError(f"row {number}: prompt and target must not be empty; leave the row out.")
    if len(chosen):
        check_answers(number, prompt, chosen, rejected)
    answers = [len(target), len(chosen), *map(len, rejected)]
    check_context(number, len(prompt) + max(answers), context)
    check_length(number, len(prompt), answers, limit)


def _checked(dataset: Any, limit: int | None, name: str, context: int | None = None) -> Any:
    if not isinstance(dataset, Dataset) or not set(COLUMNS) <= set(dataset.column_names) or not len(dataset):
        raise TrainingError(
            f"the {name} dataset must be a non-empty datasets.Dataset with the columns {', '.join(COLUMNS)}."
        )
    for number, row in enumerate(dataset):
        _check_row(row, number, limit, context)
    return dataset


def _index_tensors(examples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """`target_tokens` (B,) first: Trainer reads the batch size off it."""
    pairs = [place for place, example in enumerate(examples) if len(example["rejected_ids"])]
    return {
        "target_tokens": torch.tensor([len(example["target_ids"]) for example in examples]),
        "pair_rows": torch.tensor(pairs, dtype=torch.long),
        "rejected_counts": torch.tensor([len(examples[place]["rejected_ids"]) for place in pairs], dtype=torch.long),
    }


def _answers(examples: Sequence[dict[str, Any]]) -> list[tuple[int, list[int]]]:
    """(place of the prompt, token ids) of all answers: targets, chosen, rejected."""
    targets = [(place, example["target_ids"]) for place, example in enumerate(examples)]
    chosen = [(place, example["chosen_ids"]) for place, example in enumerate(examples) if len(example["rejected_ids"])]
    return (
        targets + chosen + [(place, ids) for place, example in enumerate(examples) for ids in example["rejected_ids"]]
    )


@dataclass
class MixedCollator(SoftmaxPreferenceCollator):
    """Requests -> answers behind their prompts, for causal language models: A rows, targets, chosen, rejected.

    Arguments are those of SoftmaxPreferenceCollator. A batch without pairs has one answer per prompt and shares nothing.

    Returns:
        `target_tokens` (B,), `pair_rows`, `rejected_counts` (P,), and `input_ids`, `attention_mask`, `completion_mask` (A, T)
        or what `shared_prompt_batch` returns.
    """

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        for place, example in enumerate(examples):
            _check_row(example, f"{place} of a batch", self.max_length, self.context)
        pairs = [example for example in examples if len(example["rejected_ids"])]
        prompts = [example["prompt_ids"] for example in (*examples, *pairs)]
        first = [example["target_ids"] for example in examples] + [example["chosen_ids"] for example in pairs]
        rejected = [[] for _ in examples] + [example["rejected_ids"] for example in pairs]
        inputs = self._model_inputs(prompts, first, rejected, self.share_prompts and bool(pairs))
        return _index_tensors(examples) | inputs


@dataclass
class Seq2SeqMixedCollator:
    """Requests -> prompts (B, T) for the encoder and answers (A, Q) for the decoder, -100 behind the end."""

    pad_token_id: int
    padding_side: str = "right"

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        side: Any = self.padding_side
        prompts = [torch.tensor(example["prompt_ids"]) for example in examples]
        return _index_tensors(examples) | {
            "input_ids": pad_sequence(prompts, True, self.pad_token_id, side),
            "attention_mask": pad_sequence([torch.ones_like(ids) for ids in prompts], True, 0, side),
            "answers": pad_sequence([torch.tensor(ids) for _, ids in _answers(examples)], True, -100),
        }


class _Mixture:
    """What the two trainers share: order, counts of a step, and the loss from log-probabilities of the answers."""

    args: Any
    model: Any
    accelerator: Any
    train_dataset: Any
    _rewards: Any
    _train_batch_size: int

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
        dataset = train_dataset if train_dataset is not None else self.train_dataset
        has_pair = np.array([len(rejected) > 0 for rejected in dataset["rejected_ids"]])
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        # by the step, not by the batch: how a step is split into batches must not change which rows it has
        step_rows = self._train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return PairBatches(has_pair, step_rows, seed)

    def _step_counts(self, batches: Sequence[dict[str, Any]], device: torch.device) -> torch.Tensor:
        """(3,): target tokens, pairs and requests of the step on all processes."""
        tokens = sum(int(batch["target_tokens"].sum()) for batch in batches)
        pairs, requests = (sum(len(batch[name]) for batch in batches) for name in ("pair_rows", "target_tokens"))
        counts = torch.tensor([[tokens, pairs, requests]], device=device)
        return self.accelerator.gather(counts).sum(dim=0) if self.accelerator.num_processes > 1 else counts[0]

    def _mixed(
        self,
        inputs: dict[str, Any],
        logps_A: torch.Tensor,
        ref_P: torch.Tensor | None,
        ref_PK: torch.Tensor | None,
        step_counts: Any,
    ) -> torch.Tensor:
        """The loss; reference log-probabilities are None where no request has a pair."""
        requests, pairs = len(inputs["target_tokens"]), len(inputs["pair_rows"])
        counts = (inputs["target_tokens"].sum(), torch.tensor(pairs)) if step_counts is None else step_counts
        # DDP averages over processes
        share = 1 if step_counts is None else self.accelerator.num_processes
        loss = -self.args.ntp_weight * logps_A[:requests].sum() * share / counts[0]
        empty_PK = logps_A.new_zeros(pairs, 1)
        rewards_P, rewards_PK, there_PK = empty_PK[:, 0], empty_PK, empty_PK.bool()
        logps_P, logps_PK = logps_A[requests : requests + pairs], empty_PK
        if ref_P is not None and ref_PK is not None:
            logps_PK, there_PK = padded_rejected(logps_A[requests + pairs :], inputs["rejected_counts"])
            ratios_P, ratios_PK = logps_P - ref_P, (logps_PK - ref_PK[:, : logps_PK.shape[1]]) * there_PK
            losses_P = softmax_preference_loss(ratios_P, ratios_PK, there_PK, beta=self.args.beta)
            loss = loss + self.args.dpo_weight * losses_P.sum() * share / counts[1]
            rewards_P, rewards_PK = self.args.beta * ratios_P.detach(), self.args.beta * ratios_PK.detach()
        # on every process at every step, also without pairs: the meter gathers
        mode = "train" if self.model.training else "eval"
        parts = (rewards_P, rewards_PK, there_PK, logps_P.detach(), logps_PK.detach())
        self._rewards.add(mode, self.accelerator, *parts)
        return loss


class MixedPreferenceTrainer(_Mixture, SoftmaxDPOTrainer):
    """SoftmaxDPOTrainer for requests with targets, some with pairs. Arguments, reference and errors are its own."""

    args: Any
    _collator = MixedCollator
    _bookkeeping = (*SoftmaxDPOTrainer._bookkeeping, "target_tokens", "pair_rows")
    _name = "Next-token loss with preferences"

    def __init__(self, model: Any, ref_model: Any = None, args: MixedPreferenceConfig | None = None, data_collator: Any = None,
                 processing_class: Any = None, **kwargs: Any) -> None:  # fmt: skip
        args = args if args is not None else MixedPreferenceConfig("mixed_preference")
        if not isinstance(args, MixedPreferenceConfig):
            raise TrainingError(f"args is a {type(args).__name__}: pass a MixedPreferenceConfig.")
        super().__init__(model, ref_model, args, data_collator, processing_class, **kwargs)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        dataset = _checked(dataset, args.max_length, dataset_name, self._context)
        self._most_rejected = max(self._most_rejected, *map(len, dataset["rejected_ids"]), 1)
        return dataset

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        return self._step_counts(batch_samples, device) if batch_samples else None

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of the module docstring."""
        requests = len(inputs["target_tokens"])
        outputs, logps_A, _ = self._answer_logps(model, inputs)
        ref_P = ref_PK = None
        if len(inputs["pair_rows"]):
            by_answer = ANSWERS if ANSWERS[-1] in inputs else self._read_by_model(inputs)
            pairs = {name: value[requests:] if name in by_answer else value for name, value in inputs.items()}
            pairs["rejected_counts"] = inputs["rejected_counts"]
            ref_P, ref_PK = self.compute_ref_log_probs(self.ref_model or self.model, pairs)
        loss = self._mixed(inputs, logps_A, ref_P, ref_PK, num_items_in_batch)
        if self.aux_loss_enabled:
            share = (
                1 if num_items_in_batch is None else requests * self.accelerator.num_processes / num_items_in_batch[2]
            )
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss * share
        return (loss, {}) if return_outputs else loss


class Seq2SeqMixedPreferenceTrainer(_Mixture, Seq2SeqPreferenceTrainer):
    """Seq2SeqPreferenceTrainer for requests with targets, some with pairs. Arguments and errors are its own."""

    args: Seq2SeqMixedPreferenceConfig

    def __init__(self, model: Any, ref_model: Any = None, args: Seq2SeqMixedPreferenceConfig | None = None,
                 train_dataset: Any = None, eval_dataset: Any = None, processing_class: Any = None, *,
                 data_collator: Any = None, **kwargs: Any) -> None:  # fmt: skip
        args = args if args is not None else Seq2SeqMixedPreferenceConfig(output_dir="trainer_output")
        if not isinstance(args, Seq2SeqMixedPreferenceConfig):
            raise TrainingError(f"args is a {type(args).__name__}: pass a Seq2SeqMixedPreferenceConfig.")
        if data_collator is None and processing_class is not None:
            data_collator = Seq2SeqMixedCollator(processing_class.pad_token_id)
        super().__init__(
            model, ref_model, args, train_dataset, eval_dataset, processing_class, data_collator=data_collator, **kwargs
        )

    def _prepared(self, dataset: Any, name: str, max_length: int | None) -> Any:
        if dataset is None:
            return None
        dataset = _checked(dataset, max_length, name)
        for row, prompt in enumerate(dataset["prompt_ids"]):
            check_context(row, len(prompt), self._context)
        return dataset

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        if not batch_samples or "target_tokens" not in batch_samples[0]:
            return super()._get_num_items_in_batch(batch_samples, device)
        return self._step_counts(batch_samples, device)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of the module docstring; batches of an EvaluationSet have their next-token loss."""
        if "target_tokens" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        requests, rows_P, counts_P = len(inputs["target_tokens"]), inputs["pair_rows"], inputs["rejected_counts"]
        rows_A = torch.cat([torch.arange(requests, device=rows_P.device), rows_P, rows_P.repeat_interleave(counts_P)])
        with without_dropout(model) if self.args.disable_dropout else nullcontext():
            unwrapped = self.accelerator.unwrap_model(model)
            logps_A = answer_token_logps(model, unwrapped, inputs, inputs["answers"], rows_A).sum(dim=1)
        ref_P = ref_PK = None
        if len(rows_P):
            pairs = {"rejected_counts": counts_P, "answers": inputs["answers"][requests:]}
            pairs |= {name: inputs[name][rows_P] for name in ("input_ids", "attention_mask")}
            ref_P, ref_R = self._reference_logps(pairs)
            ref_PK = padded_rejected(ref_R, counts_P)[0]
        loss = self._mixed(inputs, logps_A, ref_P, ref_PK, num_items_in_batch)
        return (loss, {}) if return_outputs else loss
