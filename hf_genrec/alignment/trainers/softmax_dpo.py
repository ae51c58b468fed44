"""SoftmaxDPOTrainer: S-DPO, preference tuning with several rejected answers per prompt (arXiv 2406.09215), on TRL's
DPOTrainer (whose own "SDPO" is another method).

What changes against DPOTrainer: rows with a list of rejected answers, the collator (1 + K blocks), and the loss. Models,
PEFT, precomputed references, checkpoints, cards and launching are TRL's.

* **Reference.** Without `ref_model` DPOTrainer would load the policy's *folder* again; here the reference is a copy of
  the policy as it is in memory. With PEFT it is the disabled adapter (a new one) or TRL's frozen copy of an adapter that
  is trained on; with `precompute_ref_log_probs=True` nothing is kept in memory.
* **Steps are exact.** Losses are summed and divided by the prompts of the whole step, so gradient accumulation, batch
  size and number of processes leave the trajectory as it is, also when micro-batches differ in size (DPOTrainer averages
  averages).
* **Guards**: checkpoints whole or absent, a stop at a loss that is not finite, a time budget (`guarded.py`).
* **Item answers** of a model that is searched with `restrict_to_level` are scored by the same softmax over their level
  (`item_head`), not by one over a vocabulary whose other tokens were never trained against them.
* **One pass per prompt**: its answers stand behind it side by side, and rows whose prompts are beginnings of one another
  share the pass (`shared_prompts.py`): the same losses for a fraction of the work. Models that read no 4-D attention mask
  (flash attention, recurrent layers, prompts longer than a sliding window) have a pass per answer of several tokens.
* **No cut answers.** A row longer than `max_length`, or than the model's context, is an error that names the row, where
  DPOTrainer drops or cuts it.

*Relations*: K = 1 is DPOTrainer with `loss_type="sigmoid"`. `loss_type=["sigmoid", "sft"]` adds the next-token loss of
the chosen answer, which keeps preference tuning from forgetting it (OneRec, arXiv 2502.18965).

Shape legend: B prompts, K rejected answers of the prompt that has most, R rejected answers of all prompts, A = B + R
answers (first all chosen, then the rejected ones prompt after prompt), T tokens.
"""

from __future__ import annotations

import copy
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.data.data_collator import DataCollatorMixin
from trl import DPOConfig, DPOTrainer
from trl.data_utils import _tokenize, common_prefix_length, extract_prompt, is_conversational
from trl.trainer.utils import get_config_model_id, global_then_local_main_first, pad

from hf_genrec.alignment.preference_rows import ID_COLUMNS, WINDOW, as_answers, check_answers, check_length
from hf_genrec.errors import TrainingError
from hf_genrec.generation.decoding.causal_lm import longest_packed, needs_its_wrapper
from hf_genrec.generation.recommend import recommendation_config_of

from .adapter_reference import whole_reference_adapter
from .guarded import GuardedTrainer, GuardOptions, guard_callbacks
from .item_head import ANSWERS, ITEM_HEADS, has_plain_head, use_item_head_as_fused
from .language_model import check_context, context_of, load_model, pad_token_id, save_defaults
from .preference_loss import (
    RewardMeter,
    check_beta,
    check_same_vocabulary,
    padded_rejected,
    softmax_preference_loss,
    step_counts,
)
from .shared_prompts import WindowSampler, shared_prompt_batch

logger = logging.getLogger(__name__)

_LOSSES = ("sigmoid", "sft")
_PAIR_OPTIONS = {"ld_alpha": None, "f_divergence_type": "reverse_kl", "label_smoothing": 0.0, "use_weighting": False}


@dataclass
class SoftmaxDPOConfig(GuardOptions, DPOConfig):
    """DPOConfig with the values of S-DPO. Options of DPOConfig that are defined for pairs only are refused.

    Raises:
        TrainingError: `loss_type` other than "sigmoid" and "sft", a pair-only option, or a beta that is not positive.
    """

    beta: float = field(default=1.0, metadata={"help": "Pull towards the reference; the paper's script uses 1."})
    learning_rate: float = field(default=1e-5, metadata={"help": "Peak learning rate of AdamW."})
    item_head: str | None = field(
        default=None,
        metadata={
            "help": "What item tokens compete with; default level for a model that is served so, else full.",
            "choices": list(ITEM_HEADS),
        },
    )

    share_prompts: bool = field(
        default=True, metadata={"help": "Score all answers from one pass over the prompts they share."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.item_head is not None and self.item_head not in ITEM_HEADS:
            raise TrainingError(f"item_head is {self.item_head!r}: choose one of {', '.join(ITEM_HEADS)}.")
        check_beta(self.beta)
        if "sigmoid" not in self.loss_type or not set(self.loss_type) <= set(_LOSSES):
            raise TrainingError(
                f"loss_type is {self.loss_type}: S-DPO is 'sigmoid', alone or with 'sft'; use TRL's DPOTrainer for "
                "losses of pairs."
            )
        for name, neutral in _PAIR_OPTIONS.items():
            if getattr(self, name) != neutral:
                raise TrainingError(
                    f"{name}={getattr(self, name)!r} is defined for pairs, not for several rejected answers: leave it "
                    f"at {neutral!r}."
                )
        if self.truncation_mode != "keep_start":
            raise TrainingError("truncation_mode has no effect here: rows that are too long are errors. Leave it out.")


@dataclass
class SoftmaxPreferenceCollator(DataCollatorMixin):
    """Rows of ids -> one batch of answers behind their prompts: A rows, first the B chosen, then the R rejected.

    Args:
        pad_token_id: for the empty places.
        max_length: most tokens of a row; a longer one is an error, never cut.
        padding_side: "right", as TRL pads, or "left", with `position_ids`, so that models with absolute positions see the
            same row.
        pad_to_multiple_of: width of the batch.
        share_prompts: batches come as `shared_prompt_batch` makes them, where it can.
        longest_shared: most tokens of a prompt and an answer of several tokens there; None: no bound; 0: none.
        context: most tokens that the model reads of a row; a longer row is an error.

    Returns:
        `rejected_counts` and `chosen_tokens` (B,); `input_ids`, `attention_mask`, `completion_mask` (A, T), or what
        `shared_prompt_batch` returns; where the rows have them `ref_chosen_logps` (B,) and `ref_rejected_logps` (B, K).

    Example:
        >>> rows = [{"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [[4], [5, 6]]}]
        >>> batch = SoftmaxPreferenceCollator(pad_token_id=0)(rows)
        >>> batch["input_ids"].tolist(), batch["rejected_counts"].tolist()
        ([[1, 2, 3, 0], [1, 2, 4, 0], [1, 2, 5, 6]], [2])
    """

    pad_token_id: int
    max_length: int | None = None
    padding_side: str = "right"
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"
    share_prompts: bool = False
    longest_shared: int | None = 0
    context: int | None = None

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        rejected = [as_answers(example["rejected_ids"]) for example in examples]
        chosen = [example["chosen_ids"] for example in examples]
        for place, (example, answers) in enumerate(zip(examples, rejected)):
            sizes = [len(chosen[place]), *map(len, answers)]
            _check_size(f"{place} of a batch", len(example["prompt_ids"]), sizes, self.max_length, self.context)
        prompts = [example["prompt_ids"] for example in examples]
        # first, because Trainer reads the batch size off the first tensor: B prompts, not A answers
        batch = {
            "rejected_counts": torch.tensor([len(answers) for answers in rejected]),
            "chosen_tokens": torch.tensor([len(answer) for answer in chosen]),
        }
        batch |= self._model_inputs(prompts, chosen, rejected, self.share_prompts)
        for name in ("ref_chosen_logps", "ref_rejected_logps"):
            if name in examples[0]:
                batch[name] = torch.tensor([example[name] for example in examples], dtype=torch.float32)
        return batch

    def _model_inputs(self, prompts: list, chosen: list, rejected: list[list], share: bool) -> dict[str, torch.Tensor]:
        shared = None
        if share:
            shared = shared_prompt_batch(
                prompts,
                chosen,
                rejected,
                pad_token_id=self.pad_token_id,
                left=self.padding_side == "left",
                multiple_of=self.pad_to_multiple_of,
                longest=self.longest_shared,
            )
        return shared if shared is not None else self._answers_behind_prompts(prompts, chosen, rejected)

    def _answers_behind_prompts(self, prompts: list, chosen: list, rejected: list[list]) -> dict[str, torch.Tensor]:
        pairs = list(zip(prompts, chosen))
        pairs += [(prompt, answer) for prompt, answers in zip(prompts, rejected) for answer in answers]
        ids = [torch.tensor([*prompt, *answer]) for prompt, answer in pairs]
        masks = [torch.tensor([0] * len(prompt) + [1] * len(answer)) for prompt, answer in pairs]
        options: dict[str, Any] = {"padding_side": self.padding_side, "pad_to_multiple_of": self.pad_to_multiple_of}
        batch = {
            "input_ids": pad(ids, padding_value=self.pad_token_id, **options),
            "attention_mask": pad([torch.ones_like(mask) for mask in masks], padding_value=0, **options),
            "completion_mask": pad(masks, padding_value=0, **options),
        }
        if self.padding_side == "left":
            batch["position_ids"] = (batch["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
        return batch


class SoftmaxDPOTrainer(GuardedTrainer, DPOTrainer):
    """DPOTrainer for rows whose `rejected` is a list of answers.

    Datasets have the columns `prompt`, `chosen`, `rejected` (text or messages; `rejected` one answer or a list), or
    the same as token ids: `prompt_ids`, `chosen_ids`, `rejected_ids`, as `alignment.pairs` builds them. Rows may have
    different numbers of rejected answers.

    Args:
        model: causal language model or PeftModel, or the folder of one.
        ref_model: reference, or the folder of one; None: see the module docstring.
        args: SoftmaxDPOConfig.
        data_collator: default SoftmaxPreferenceCollator.
        processing_class: tokenizer; default: the one beside the model.
        kwargs: as for DPOTrainer (`train_dataset`, `eval_dataset`, `peft_config`, `callbacks`, ...).

    Raises:
        TrainingError: rows that cannot be trained on (row named), a tokenizer without padding token, or an encoder-decoder
            (use Seq2SeqPreferenceTrainer).
        IncompatibleComponentsError: the reference has another vocabulary than the policy, or a folder holds no model.
    """

    _item_head: str | None
    _collator: type[SoftmaxPreferenceCollator] = SoftmaxPreferenceCollator
    _bookkeeping: tuple[str, ...] = ("rejected_counts", "chosen_tokens", "ref_chosen_logps", "ref_rejected_logps")
    loss_is_scaled_for_ga = True  # see _get_num_items_in_batch
    _tag_names = ["trl", "dpo", "s-dpo"]
    _name = "S-DPO"
    _paper = {"title": "On Softmax Direct Preference Optimization for Recommendation", "id": "2406.09215"}

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: SoftmaxDPOConfig | None = None,
        data_collator: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        callbacks: list | None = None,
        **kwargs: Any,
    ) -> None:
        name = str(model) if isinstance(model, str | Path) else get_config_model_id(model.config)
        args = args if args is not None else SoftmaxDPOConfig(f"{(name or 'model').split('/')[-1]}-S-DPO")
        if not isinstance(args, SoftmaxDPOConfig):
            raise TrainingError(f"args is a {type(args).__name__}: pass a SoftmaxDPOConfig.")
        if processing_class is None and not name:
            raise TrainingError("pass the tokenizer as processing_class.")
        model, ref_model = _loaded(model, ref_model, args)
        processing_class = processing_class if processing_class is not None else AutoTokenizer.from_pretrained(name)
        padding = pad_token_id(processing_class)  # also with a collator of one's own: TRL would set the tokenizer's
        _check_models(model, ref_model, processing_class)
        self._context = _context(model, ref_model, kwargs.get("peft_config"))
        keeps_reference = not (is_peft_model(model) or kwargs.get("peft_config") or args.precompute_ref_log_probs)
        if ref_model is None and keeps_reference:
            ref_model = copy.deepcopy(model)
            ref_model.__dict__.pop("forward", None)  # what an earlier trainer bound to the policy
        if data_collator is None:
            multiple: Any = args.pad_to_multiple_of
            data_collator = self._collator(
                padding,
                args.max_length,
                pad_to_multiple_of=multiple,
                share_prompts=args.share_prompts,
                context=self._context,
            )
        self._most_rejected, self._item_head = 1, None
        self._rewards = RewardMeter()
        with whole_reference_adapter(model):
            super().__init__(
                model=model,
                ref_model=ref_model,
                args=args,
                data_collator=data_collator,
                processing_class=processing_class,
                callbacks=[*guard_callbacks(args), *(callbacks or [])],
                **kwargs,
            )
        self._use_item_head()
        self._finish_guards()

    def _use_item_head(self) -> None:
        if self._item_head is not None:
            return
        inner: Any = self.model
        inner = inner.get_base_model() if is_peft_model(inner) else inner
        args: Any = self.args
        inner.recommendation_config = served = recommendation_config_of(inner)  # saved with what is trained
        self._item_head = args.item_head or ("level" if served.restrict_to_level else "full")
        if self.aux_loss_enabled and self._item_head != "full":
            raise TrainingError(
                f"item_head={self._item_head!r} leaves out the experts' loss of {type(inner).__name__}: use 'full', or "
                "set router_aux_loss_coef=0."
            )
        reference = None if self.ref_model is None else self.accelerator.unwrap_model(self.ref_model)
        parts = [part for part in (inner, reference) if part is not None]
        collator: Any = self.data_collator
        shared = getattr(collator, "share_prompts", False)
        if shared:  # not where places move, or the head gives more than a score
            moved = needs_its_wrapper(self.model) or self.aux_loss_enabled
            collator.share_prompts = shared = not moved and all(has_plain_head(part) for part in parts)
            bounds = [bound for part in parts if (bound := longest_packed(part)) is not None]
            collator.longest_shared = min(bounds, default=None)
        if shared or self._item_head != "full":
            for part in parts:
                use_item_head_as_fused(part, self._item_head, self.processing_class)

    # ---------------------------------------------------------------------------------------------------------- data

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        first = next(iter(dataset))
        if "image" in first or "images" in first:
            raise TrainingError(f"the {dataset_name} dataset has images, which S-DPO does not read; remove the column.")
        options: dict[str, Any] = {"with_indices": True}
        if isinstance(dataset, Dataset):
            options |= {"num_proc": args.dataset_num_proc, "desc": f"Tokenizing {dataset_name} dataset"}
        limits = {"max_length": args.max_length, "context": self._context}
        with global_then_local_main_first():
            if set(ID_COLUMNS) <= set(first):
                if isinstance(dataset, Dataset):  # as they are: a copy of many rows takes minutes
                    self._most_rejected = max(self._most_rejected, _check_rows(dataset, **limits))
                    return dataset
                dataset = dataset.map(_checked_row, fn_kwargs=limits, **options)
            else:
                if "prompt" not in first:
                    dataset = dataset.map(extract_prompt)
                dataset = dataset.map(_text_row, fn_kwargs={"tokenizer": processing_class, **limits}, **options)
        if isinstance(dataset, Dataset):
            self._most_rejected = max(self._most_rejected, *map(len, dataset["rejected_ids"]))
        return dataset

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Rows of one window come together, so that their prompts share a pass."""
        dataset: Any = self.train_dataset  # the one handed in has lost the columns that the collator does not read
        if not self.args.share_prompts or WINDOW not in (getattr(dataset, "column_names", None) or ()):
            return super()._get_train_sampler(train_dataset)
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        return WindowSampler(dataset[WINDOW], seed)

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        if {"ref_chosen_logps", "ref_rejected_logps"} <= set(dataset.column_names or ()):
            return dataset  # came with the data
        if self.accelerator.num_processes > 1 and isinstance(dataset, Dataset) and not dataset.cache_files:
            raise TrainingError(  # the processes hand the numbers on through the dataset's cache folder
                f"the {name} dataset lives in memory, and several processes cannot share precomputed log-probabilities "
                "then: write it with save_pairs and train on load_pairs(path)."
            )
        self._use_item_head()
        if self._item_head != "full":  # a cached file of the other softmax must not be taken
            self._precompute_model_hash = f"{self._precompute_model_hash}-{self._item_head}"
        return super()._precompute_ref_logps(dataset, name, batch_size)

    # ---------------------------------------------------------------------------------------------------------- loss

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        if not batch_samples or "rejected_counts" not in batch_samples[0]:
            return None
        return step_counts(batch_samples, self.accelerator, device)

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Reference log-probabilities of a batch: of the chosen answers (B,) and the rejected (B, most of the data)."""
        # the base class cuts its answers into halves, which put together are all A of them
        logps_A = torch.cat(super().compute_ref_log_probs(model, self._read_by_model(inputs)))
        counts_B = inputs["rejected_counts"]
        rejected_BK, _ = padded_rejected(logps_A[len(counts_B) :], counts_B)
        missing = max(0, self._most_rejected - rejected_BK.shape[1])
        return logps_A[: len(counts_B)], torch.nn.functional.pad(rejected_BK, (0, missing))

    def _read_by_model(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in inputs.items() if name not in self._bookkeeping}

    def _answer_logps(self, model: Any, inputs: dict[str, Any]) -> tuple[Any, torch.Tensor, dict[str, Any]]:
        """What the policy gives for a batch, the log-probability of each answer (A,), and the inputs it was called with."""
        model_inputs = self._read_by_model(inputs)
        completion_mask_AT = model_inputs.pop("completion_mask")
        labels_AT = model_inputs["input_ids"].masked_fill(completion_mask_AT == 0, -100)
        model_inputs["use_cache"] = False
        if self.aux_loss_enabled:
            model_inputs["output_router_logits"] = True
        outputs = model(**model_inputs, labels=labels_AT, fused_lm_head=True)
        width = labels_AT.shape[1] - 1  # prompt-learning adapters put virtual tokens in front
        return outputs, outputs.log_probs[:, -width:].sum(dim=1), model_inputs

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Sum of the prompts' losses over the prompts of the whole step (of this batch, in evaluation)."""
        counts_B = inputs["rejected_counts"]
        policy: Any = self.model
        prompts, mode = len(counts_B), "train" if policy.training else "eval"
        outputs, logps_A, model_inputs = self._answer_logps(model, inputs)
        logps_B, logps_R = logps_A[:prompts], logps_A[prompts:]
        logps_BK, there_BK = padded_rejected(logps_R, counts_B)

        if self.precompute_ref_logps:
            ref_B, ref_BK = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        else:
            ref_B, ref_BK = self.compute_ref_log_probs(self.ref_model or self.model, inputs)
        ratios_B, ratios_BK = logps_B - ref_B, (logps_BK - ref_BK[:, : logps_BK.shape[1]]) * there_BK
        losses_B = softmax_preference_loss(ratios_B, ratios_BK, there_BK, beta=self.beta)

        step_prompts, step_tokens = prompts, inputs["chosen_tokens"].sum()
        if num_items_in_batch is not None:  # DDP averages over processes
            step_prompts, step_tokens = num_items_in_batch / self.accelerator.num_processes
        terms = {"sigmoid": losses_B.sum() / step_prompts, "sft": -logps_B.sum() / step_tokens}
        loss = sum(weight * terms[name] for name, weight in zip(self.loss_types, self.loss_weights))
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss * prompts / step_prompts

        if ANSWERS[-1] in model_inputs:
            hits_B = outputs.is_top1[:prompts].sum(dim=1)
        else:
            answers_BT = inputs["completion_mask"][:prompts, 1:].bool()
            hits_B = (outputs.is_top1[:prompts, -answers_BT.shape[1] :] & answers_BT).sum(dim=1)
        accuracy = (hits_B / inputs["chosen_tokens"]).sum()
        rewards = (self.beta * ratios_B.detach(), self.beta * ratios_BK.detach(), there_BK)
        extra = {"mean_token_accuracy": accuracy}
        self._rewards.add(mode, self.accelerator, *rewards, logps_B.detach(), logps_BK.detach(), extra)
        if not return_outputs:
            return loss
        with torch.no_grad():
            return loss, model(**{name: value for name, value in model_inputs.items() if name not in ANSWERS})

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As Trainer, with the rewards since the last call."""
        policy: Any = self.model
        mode = "train" if policy.training else "eval"
        prefix = "eval_" if mode == "eval" else ""
        logs.update({f"{prefix}{name}": value for name, value in self._rewards.take(mode).items()})
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        save_defaults(
            self.accelerator.unwrap_model(self.model),
            output_dir if output_dir is not None else str(self.args.output_dir),
        )


def _check_rows(dataset: Dataset, max_length: int | None, context: int | None) -> int:
    """Check every row of ids; the most rejected answers of one."""
    most, row = 1, 0
    for part in dataset.select_columns(list(ID_COLUMNS)).iter(1000):
        for values in zip(*(part[name] for name in ID_COLUMNS)):
            checked = _checked_row(dict(zip(ID_COLUMNS, values)), row, max_length, context)
            most = max(most, len(checked["rejected_ids"]))
            row += 1
    return most


def _check_size(row: object, prompt: int, answers: list[int], max_length: int | None, context: int | None) -> None:
    check_context(row, prompt + max(answers), context)
    check_length(str(row), prompt, answers, max_length)


def _checked_row(example: dict[str, Any], row: int, max_length: int | None, context: int | None) -> dict[str, Any]:
    prompt, chosen, rejected = (example[name] for name in ID_COLUMNS)
    rejected = as_answers(rejected)
    check_answers(row, prompt, chosen, rejected)
    _check_size(row, len(prompt), [len(chosen), *map(len, rejected)], max_length, context)
    return {"rejected_ids": rejected}


def _text_row(
    example: dict[str, Any], row: int, tokenizer: Any, max_length: int | None, context: int | None
) -> dict[str, Any]:
    """Token ids of a row of text or messages, as DPOTrainer makes them; the prompt ends where all answers agree."""
    prompt, chosen, rejected = example["prompt"], example["chosen"], as_answers(example["rejected"])
    check_answers(row, prompt, chosen, rejected)
    answers: list[Any] = [chosen, *rejected]
    template: dict[str, Any] = {}
    if is_conversational({"prompt": prompt, "chosen": chosen}):
        tools = example.get("tools")
        template = {"tools": json.loads(tools) if isinstance(tools, str) else tools}
        template |= example.get("chat_template_kwargs") or {}
        prompt_ids = _tokenize(tokenizer, prompt, add_generation_prompt=True, **template)["input_ids"]
    else:
        eos = tokenizer.eos_token or ""
        answers = [answer if answer.endswith(eos) else answer + eos for answer in answers]
        prompt_ids = _tokenize(tokenizer, prompt)["input_ids"]
    whole = [_tokenize(tokenizer, prompt + answer, **template)["input_ids"] for answer in answers]
    shared = min(common_prefix_length(prompt_ids, ids) for ids in whole)
    if shared < len(prompt_ids):
        logger.warning(
            "row %d: %r at the end of the prompt is encoded differently before an answer and is left out; end prompts "
            "on a token boundary.", row, tokenizer.decode(prompt_ids[shared:]),
        )  # fmt: skip
    ids = [answer[shared:] for answer in whole]
    check_answers(row, prompt_ids[:shared], ids[0], ids[1:])
    _check_size(row, shared, [len(answer) for answer in ids], max_length, context)
    return {"prompt_ids": prompt_ids[:shared], "chosen_ids": ids[0], "rejected_ids": ids[1:]}


def _loaded(model: Any, ref_model: Any, args: SoftmaxDPOConfig) -> tuple[Any, Any]:
    """Policy and reference, those that came as folders loaded."""
    load_options: Any = args.model_init_kwargs
    policy_comes_as_folder = isinstance(model, str | Path)
    if policy_comes_as_folder:
        model = load_model(model, load_options, otherwise="Seq2SeqPreferenceTrainer")
    if isinstance(ref_model, str | Path):
        ref_model = load_model(ref_model, load_options, otherwise="Seq2SeqPreferenceTrainer")
    if policy_comes_as_folder:  # TRL would say that they have no effect
        args.model_init_kwargs = None
    return model, ref_model


def _check_models(model: Any, ref_model: Any, tokenizer: Any) -> None:
    if getattr(model.config, "is_encoder_decoder", False):
        raise TrainingError(f"{type(model).__name__} is an encoder-decoder: use Seq2SeqPreferenceTrainer.")
    if ref_model is not None:
        check_same_vocabulary(model, ref_model, tokenizer)


def _context(model: Any, ref_model: Any, peft_config: Any) -> int | None:
    found = [context_of(model, peft_config), None if ref_model is None else context_of(ref_model)]
    return min((context for context in found if context is not None), default=None)
