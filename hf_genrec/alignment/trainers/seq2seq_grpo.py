"""Seq2SeqGRPOTrainer: GRPO (arXiv 2402.03300) for encoder-decoder recommenders such as TIGER, which TRL does not train.

Prompts, rewards and rollouts are those of ItemGRPOTrainer (the recipe of MiniOneRec, code AkaliKong/MiniOneRec); validation
by full ranking, atomic checkpoints, exact resuming and the stop at a loss that is not finite are RecommenderTrainer's.

    loss = - 1/R sum_r 1/Q_r sum_q [ pi(q) / sg(pi(q)) * A_r - beta * k3(q) ],  k3 = exp(d) - d - 1,  d = log ref - log pi

* Every prompt is encoded once, its G answers are scored against that encoding.
* Log-probabilities are the model's own: TIGER's per-level softmax, not one over the whole vocabulary.
* All rollouts of an optimiser step are made before its first gradient, and sums are divided by the rows (or tokens) of the
  whole step, so steps do not depend on how they are cut into micro-batches and processes.

*Relations*: the policy moves only after its rollouts were used, so ratios are 1 and clipping would never act: there is none.
`loss_type="dapo"` divides by the tokens of the step instead of taking means per row (arXiv 2503.14476); with codes of one
length that is the same. `sft_weight` adds the next-token loss of the targets, as OneRec does against forgetting.

Shape legend: B prompts, G rollouts of each, R = B * G rows, A rows with the targets behind them, T tokens, Q answer tokens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from trl.trainer.callbacks import SyncRefModelCallback

from hf_genrec.alignment.rewards import ItemGroups, ItemReward, group_advantages
from hf_genrec.alignment.rollouts import STRATEGIES, ItemRollouts, answer_tokens, check_prompts
from hf_genrec.errors import TrainingError
from hf_genrec.generation.search import evaluating

from .arguments import RecommenderTrainingArguments
from .recommender import RecommenderTrainer
from .seq2seq_preference import answer_token_logps, policy_and_reference, without_dropout

LOSS_TYPES = ("grpo", "dapo")


@dataclass
class Seq2SeqGRPOConfig(RecommenderTrainingArguments):
    """RecommenderTrainingArguments for GRPO: gentle steps, validation only when asked for.

    Raises:
        TrainingError: an unknown choice, a number out of range, or what RecommenderTrainingArguments refuses.
    """

    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate of AdamW."})
    num_train_epochs: float = field(default=2.0, metadata={"help": "Passes over the prompts."})
    max_grad_norm: float = field(default=0.3, metadata={"help": "Gradients are cut to this norm."})
    eval_strategy: str = field(default="no", metadata={"help": "When to validate (needs an eval_dataset)."})
    train_sampling_strategy: str = field(default="random", metadata={"help": "Order of the prompts."})
    num_generations: int = field(default=16, metadata={"help": "Rollouts of a prompt."})
    beta: float = field(default=1e-3, metadata={"help": "Weight of the KL term; 0 keeps no reference."})
    loss_type: str = field(default="grpo", metadata={"help": "grpo or dapo.", "choices": list(LOSS_TYPES)})
    scale_rewards: bool = field(default=True, metadata={"help": "Divide advantages by the group's deviation."})
    sft_weight: float = field(default=0.0, metadata={"help": "Weight of the next-token loss of the targets."})
    disable_dropout: bool = field(default=True, metadata={"help": "No dropout in the loss: rollouts have none."})
    sync_ref_model: bool = field(default=False, metadata={"help": "Move the reference after the policy."})
    ref_model_mixup_alpha: float = field(default=0.6, metadata={"help": "Share of the policy at each move."})
    ref_model_sync_steps: int = field(default=512, metadata={"help": "Steps between two moves."})
    rollouts: str = field(default="beam", metadata={"help": "beam or sample.", "choices": list(STRATEGIES)})
    num_beams: int | None = field(default=None, metadata={"help": "Beams of the search; default num_generations."})
    temperature: float = field(default=1.0, metadata={"help": "Of the rollouts when sampling."})
    exclude_seen: bool = field(default=False, metadata={"help": "No rollouts from the user's history."})
    add_target: bool = field(default=False, metadata={"help": "Put the target into groups that miss it."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss_type not in LOSS_TYPES:
            raise TrainingError(f"loss_type={self.loss_type!r}: choose one of {', '.join(LOSS_TYPES)}.")
        if self.num_generations < 2:
            raise TrainingError(f"num_generations={self.num_generations}: an advantage needs a group of at least 2.")
        if self.beta < 0 or self.sft_weight < 0:
            raise TrainingError(f"beta={self.beta}, sft_weight={self.sft_weight}: give 0 or more.")
        if self.sync_ref_model and not self.beta:
            raise TrainingError("sync_ref_model moves a reference, and beta=0 keeps none: leave one of them out.")


@dataclass
class PromptCollator:
    """Rows of `item_prompts` -> `targets` (B,), `input_ids`, `attention_mask` (B, T), `histories` (B arrays).

    Args:
        pad_token_id: for the empty places.
        padding_side: "right" or "left" (the same for models with relative positions, such as T5).
    """

    pad_token_id: int
    padding_side: str = "right"

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        side: Any = self.padding_side
        prompts = [torch.tensor(example["prompt_ids"]) for example in examples]
        return {
            "targets": torch.tensor([int(example["target"]) for example in examples]),
            "input_ids": pad_sequence(prompts, True, self.pad_token_id, side),
            "attention_mask": pad_sequence([torch.ones_like(ids) for ids in prompts], True, 0, side),
            "histories": [np.asarray(example.get("history", ()), np.int64) for example in examples],
        }


class Seq2SeqGRPOTrainer(RecommenderTrainer):
    """RecommenderTrainer that learns from rewards of its own rollouts.

    Args:
        model: encoder-decoder of transformers or of this library, or a PeftModel of one.
        reward_funcs: one reward of `alignment.rewards`, or several (summed; `WeightedReward` gives weights).
        args: Seq2SeqGRPOConfig.
        train_dataset: a `datasets.Dataset` of prompts: see `rollouts.item_prompts`.
        eval_dataset: EvaluationSet (its targets are ranked, its next-token loss watched).
        processing_class: tokenizer.
        ref_model: reference of the KL term; None: a frozen copy of the model as it is (with `peft_config`: the disabled
            adapter).
        peft_config: adapter to train instead of the model.
        kwargs: as for RecommenderTrainer.

    Raises:
        TrainingError: no encoder-decoder, no reward, or a dataset without prompts.
        IncompatibleComponentsError: a target outside the catalogue, or a reference of another vocabulary.
    """

    args: Seq2SeqGRPOConfig
    loss_is_scaled_for_ga = True  # see _get_num_items_in_batch

    def __init__(
        self,
        model: Any,
        reward_funcs: ItemReward | Sequence[ItemReward],
        args: Seq2SeqGRPOConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        ref_model: Any = None,
        peft_config: Any = None,
        data_collator: Any = None,
        **kwargs: Any,
    ) -> None:
        args = args if args is not None else Seq2SeqGRPOConfig(output_dir="trainer_output")
        if not isinstance(args, Seq2SeqGRPOConfig):
            raise TrainingError(f"args is a {type(args).__name__}: pass a Seq2SeqGRPOConfig.")
        self.rewards = [reward_funcs] if isinstance(reward_funcs, ItemReward) else list(reward_funcs)
        if not self.rewards or not all(isinstance(reward, ItemReward) for reward in self.rewards):
            raise TrainingError(
                "reward_funcs must be rewards of hf_genrec.alignment.rewards (subclasses of ItemReward)."
            )
        ref_model = ref_model if args.beta else None
        model, ref_model = policy_and_reference(
            model, ref_model, processing_class, peft_config, copied=args.beta > 0, otherwise="ItemGRPOTrainer"
        )
        self._search = ItemRollouts(
            processing_class,
            args.num_generations,
            strategy=args.rollouts,
            num_beams=args.num_beams,
            exclude_seen=args.exclude_seen,
            add_target=args.add_target,
            temperature=args.temperature,
            seed=args.seed,
        )
        if train_dataset is not None:
            check_prompts(train_dataset, processing_class, "train")
            train_dataset = self._search.usable_prompts(train_dataset, "train")
        self._meter: dict[str, list[torch.Tensor]] = defaultdict(list)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator or PromptCollator(processing_class.pad_token_id),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        if self.args.n_gpu > 1:
            raise TrainingError("several GPUs in one process are not supported: use `accelerate launch`.")
        self.ref_model = ref_model
        if ref_model is not None:
            ref_model.requires_grad_(False).eval().to(self.args.device)
            if args.sync_ref_model:
                self.add_callback(SyncRefModelCallback(ref_model, self.accelerator))
        elif args.sync_ref_model:
            raise TrainingError(
                "sync_ref_model needs a reference of its own, and the adapter's is the disabled adapter."
            )

    # ------------------------------------------------------------------------------------------------------ rollouts

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        """Rows, answer tokens and target tokens of the whole step on all processes: (3,). The rollouts are made here."""
        if not batch_samples or "targets" not in batch_samples[0] or "loss_inputs" in batch_samples[0]:
            return super()._get_num_items_in_batch(batch_samples, device)
        first = 0
        for batch in batch_samples:
            self._roll_out(batch, first)
            first += len(batch["targets"])
        counts = torch.stack([_counts(batch) for batch in batch_samples]).sum(dim=0).to(device)
        if self.accelerator.num_processes > 1:
            counts = self.accelerator.gather(counts.unsqueeze(0)).sum(dim=0)
        return counts

    def _roll_out(self, batch: dict[str, Any], first: int) -> None:
        """Add `answers` (A, Q), the targets behind the rollouts, and `advantages` (R,) to a batch."""
        device = self.args.device
        targets, histories = batch["targets"].tolist(), batch["histories"]
        draw = self.state.global_step * self.accelerator.num_processes + self.accelerator.process_index
        items_BG, _ = self._search(
            self.accelerator.unwrap_model(self.model),
            batch["input_ids"].to(device),
            batch["attention_mask"].to(device),
            targets=targets,
            histories=histories,
            seed=draw * 2**20 + first,  # row by row, whatever the micro-batches
        )
        groups = ItemGroups(items_BG, torch.tensor(targets, device=items_BG.device), histories)
        rewards_BG = torch.stack([reward.score(groups).float() for reward in self.rewards]).sum(dim=0)
        if not bool(torch.isfinite(rewards_BG).all()):
            raise TrainingError("a reward is not finite: check the item vectors or the recommender behind it.")
        advantages_BG = group_advantages(rewards_BG, scale=self.args.scale_rewards)
        answers = [
            torch.tensor(ids) for ids in answer_tokens(self.processing_class, [*items_BG.flatten().tolist(), *targets])
        ]
        batch["answers"] = pad_sequence(answers, True, -100).to(device)
        batch["advantages"] = advantages_BG.flatten()
        hits_B = groups.hits_BG.any(dim=1).float()
        flat_B = (rewards_BG.amax(dim=1) == rewards_BG.amin(dim=1)).float()
        deviation_B = rewards_BG.std(dim=1)
        self._note({"reward": rewards_BG.mean(dim=1), "reward_std": deviation_B, "frac_reward_zero_std": flat_B,
                    "rollouts/hit": hits_B})  # fmt: skip

    # ---------------------------------------------------------------------------------------------------------- loss

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of the module docstring; batches of an EvaluationSet have their next-token loss."""
        if "advantages" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        answers_AQ, advantages_R = inputs["answers"], inputs["advantages"]
        prompts = len(inputs["targets"])
        if not self.args.sft_weight:
            answers_AQ = answers_AQ[: len(advantages_R)]
        rows_B = torch.arange(prompts, device=answers_AQ.device)
        rows_A = torch.cat([rows_B.repeat_interleave(self.args.num_generations), rows_B])[: len(answers_AQ)]
        unwrapped = self.accelerator.unwrap_model(model)
        with without_dropout(model) if self.args.disable_dropout else nullcontext():
            logps_AQ = answer_token_logps(model, unwrapped, inputs, answers_AQ, rows_A)
        rollouts = slice(0, len(advantages_R))
        there_RQ, logps_RQ = answers_AQ[rollouts] >= 0, logps_AQ[rollouts]
        ref_RQ = self._reference_logps(inputs, answers_AQ[rollouts], rows_A[rollouts]) if self.args.beta else None
        losses_RQ = policy_losses(logps_RQ, advantages_R, ref_RQ, beta=self.args.beta) * there_RQ
        counts = _counts(inputs) if num_items_in_batch is None else num_items_in_batch
        rows, tokens, target_tokens = counts.to(losses_RQ) / (
            1 if num_items_in_batch is None else self.accelerator.num_processes  # DDP averages over processes
        )
        if self.args.loss_type == "dapo":
            loss = losses_RQ.sum() / tokens
        else:
            loss = (losses_RQ.sum(dim=1) / there_RQ.sum(dim=1)).sum() / rows
        if self.args.sft_weight:
            loss = loss - self.args.sft_weight * logps_AQ[len(advantages_R) :].sum() / target_tokens
        if ref_RQ is not None:
            kl_RQ = _k3(logps_RQ.detach(), ref_RQ) * there_RQ
            self._note({"kl": kl_RQ.sum(dim=1) / there_RQ.sum(dim=1)})
        return (loss, {}) if return_outputs else loss

    def _reference_logps(self, inputs: dict[str, Any], answers_RQ: torch.Tensor, rows_R: torch.Tensor) -> torch.Tensor:
        model: Any = self.ref_model if self.ref_model is not None else self.model
        unwrapped = self.accelerator.unwrap_model(model)
        off = nullcontext() if self.ref_model is not None else unwrapped.disable_adapter()
        with evaluating(model), off:
            return answer_token_logps(model, unwrapped, inputs, answers_RQ, rows_R)

    # ------------------------------------------------------------------------------------------------------- logging

    def _note(self, values: dict[str, torch.Tensor]) -> None:
        for name, value in values.items():
            self._meter[name].append(value.detach().float())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As Trainer, with the rewards and the KL divergence since the last call."""
        policy: Any = self.model
        if policy.training:
            for name, values in self._meter.items():
                pair = torch.stack(
                    [torch.cat(values).sum(), torch.tensor(float(sum(map(len, values))), device=values[0].device)]
                )
                total, count = self.accelerator.gather(pair.unsqueeze(0)).sum(dim=0).tolist()
                logs[name] = total / count
            self._meter.clear()
        super().log(logs, start_time)


def policy_losses(
    logps_RQ: torch.Tensor, advantages_R: torch.Tensor, ref_RQ: torch.Tensor | None = None, *, beta: float = 0.0
) -> torch.Tensor:
    """Loss of every token (R, Q): -(exp(lp - sg(lp)) * A - beta * k3), not reduced.

    Example:
        >>> logps = torch.tensor([[-1.0, -2.0]], requires_grad=True)
        >>> policy_losses(logps, torch.tensor([2.0])).sum().backward()
        >>> logps.grad
        tensor([[-2., -2.]])
    """
    ratio_RQ = (logps_RQ - logps_RQ.detach()).exp()
    losses_RQ = -ratio_RQ * advantages_R.unsqueeze(1)
    return losses_RQ if ref_RQ is None else losses_RQ + beta * _k3(logps_RQ, ref_RQ)


def _k3(logps_RQ: torch.Tensor, ref_RQ: torch.Tensor) -> torch.Tensor:
    """Estimate of KL(policy || reference) from samples of the policy, never negative."""
    gap_RQ = ref_RQ - logps_RQ
    return gap_RQ.exp() - gap_RQ - 1.0


def _counts(batch: dict[str, Any]) -> torch.Tensor:
    rows = len(batch["advantages"])
    there_A = (batch["answers"] >= 0).sum(dim=1)
    return torch.stack([torch.tensor(rows, device=there_A.device), there_A[:rows].sum(), there_A[rows:].sum()])
