"""ItemGRPOTrainer: GRPO (arXiv 2402.03300) for causal language models whose rollouts are catalogue items, on TRL.

The recipe of MiniOneRec (code AkaliKong/MiniOneRec): one constrained search per prompt gives G distinct items in the
model's order, `alignment.rewards` scores them, TRL does the rest. What changes against GRPOTrainer:

* **Rollouts.** All of them are items (`rollouts.ItemRollouts`), where free sampling gives next to none. TRL's experimental
  `rollout_func` gets prompts as text only, but item tokens, targets and histories come as columns; so the trainer stands
  in at the two methods around generation, and stops with an error if TRL no longer calls them.
* **Prompts.** `prompt_ids` are used as they are: text of strangers, encoded as text, could forge special tokens.
* **Reference.** TRL reloads the policy's folder; here it is a copy of the policy in memory. With PEFT it is the disabled
  adapter (a new one) or a frozen copy of an adapter that is trained on, as in TRL.
* **Log-probabilities** of the loss are over the whole vocabulary ("full"), over the codes of the level ("level"), or over
  the codes that the catalogue allows next ("legal", what constrained decoding chooses from).
  "level" and "legal" read every prompt once, its rollouts side by side behind it (`shared_prompts.py`): the same numbers.
* **Guards**: checkpoints whole or absent, a stop at a loss that is not finite, a time budget (`guarded.py`).

*Relations*: with equal rewards in a group its advantages are 0 and only the KL term is left. `loss_type`, clipping,
`scale_rewards`, `sync_ref_model` and the rest of GRPOConfig are TRL's.

Shape legend: B prompts, G rollouts, R = B * G rows, T tokens, Q answer tokens, V vocabulary, C codes of a level.
"""

from __future__ import annotations

import copy
import inspect
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from trl import GRPOConfig, GRPOTrainer
from trl.models.utils import prepare_deepspeed, prepare_fsdp, unwrap_model_for_generation
from trl.trainer.callbacks import SyncRefModelCallback
from trl.trainer.utils import RepeatSampler, add_fused_lm_head, disable_dropout_in_model, pad

from hf_genrec.alignment.rollouts import STRATEGIES, ItemRollouts, answer_tokens, check_prompts
from hf_genrec.errors import IncompatibleComponentsError, TrainingError
from hf_genrec.generation.decoding.beam_cache import CodeScores
from hf_genrec.generation.decoding.causal_lm import additive_mask, longest_packed
from hf_genrec.generation.decoding.kernel import child_log_probs
from hf_genrec.generation.recommend import recommendation_config_of
from hf_genrec.generation.trie import ItemTrie

from .adapter_reference import whole_reference_adapter
from .guarded import GuardedTrainer, GuardOptions, guard_callbacks
from .language_model import check_context, context_of
from .preference_loss import check_same_vocabulary
from .shared_prompts import packed_answers

_SEEDS_OF_A_DRAW = 1 << 20  # more than one process has prompts in a generation
LOGPROBS = ("full", "level", "legal")
_NEUTRAL = {
    "use_vllm": False, "use_transformers_continuous_batching": False, "top_p": 1.0, "top_k": 0, "min_p": None,
    "repetition_penalty": 1.0, "generation_kwargs": None, "cache_implementation": None,
}  # fmt: skip


@dataclass
class ItemGRPOConfig(GuardOptions, GRPOConfig):
    """GRPOConfig with MiniOneRec's values and the options of constrained rollouts.

    Raises:
        TrainingError: an unknown choice, or an option of free generation, which has no effect here.
    """

    learning_rate: float = field(default=1e-5, metadata={"help": "Peak learning rate of AdamW."})
    num_train_epochs: float = field(default=2.0, metadata={"help": "Passes over the prompts."})
    max_grad_norm: float = field(default=0.3, metadata={"help": "Gradients are cut to this norm."})
    beta: float = field(default=1e-3, metadata={"help": "Weight of the KL term; 0 keeps no reference."})
    loss_type: str = field(default="grpo", metadata={"help": "As in GRPOConfig; grpo: mean over tokens, then rows."})
    num_generations: int | None = field(default=16, metadata={"help": "Rollouts of a prompt."})
    max_completion_length: int | None = field(default=None, metadata={"help": "Follows from the item codes."})
    use_bias_correction_kl: bool = field(default=False, metadata={"help": "Weigh the KL term by the ratio."})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Trade time for memory."})

    rollouts: str = field(default="beam", metadata={"help": "beam or sample.", "choices": list(STRATEGIES)})
    num_beams: int | None = field(default=None, metadata={"help": "Beams of the search; default num_generations."})
    exclude_seen: bool = field(default=False, metadata={"help": "No rollouts from the user's history."})
    add_target: bool = field(default=False, metadata={"help": "Put the target into groups that miss it."})
    answer_eos: bool = field(default=False, metadata={"help": "Answers end with the end token (as in training)."})
    share_prompts: bool = field(
        default=True, metadata={"help": "logprobs level, legal: score all rollouts of a prompt from one pass over it."}
    )
    logprobs: str | None = field(
        default=None,
        metadata={
            "help": "Softmax of the loss: full, level or legal; default the one that the model is served with.",
            "choices": list(LOGPROBS),
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rollouts not in STRATEGIES or self.logprobs not in (None, *LOGPROBS):
            raise TrainingError(
                f"rollouts={self.rollouts!r}, logprobs={self.logprobs!r}: choose of {STRATEGIES} and of {LOGPROBS}."
            )
        for name, neutral in _NEUTRAL.items():
            if getattr(self, name, neutral) != neutral:
                raise TrainingError(
                    f"{name}={getattr(self, name)!r} belongs to free generation, rollouts here are a search over items: "
                    f"leave it at {neutral!r}."
                )
        if self.mask_truncated_completions and not self.answer_eos:
            raise TrainingError("mask_truncated_completions would mask every item: set answer_eos, or leave it out.")


class DrawCounter(TrainerCallback, ExportableState):
    """How often rollouts were drawn in training and in evaluation; a checkpoint keeps it, so that a resumed run goes on."""

    def __init__(self) -> None:
        self.train = self.eval = 0

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"train": self.train, "eval": self.eval}}

    def next(self, mode: str) -> int:
        """Number of this draw: even in training, odd in evaluation, which so leaves training as it is."""
        count = getattr(self, mode)
        setattr(self, mode, count + 1)
        return 2 * count + int(mode == "eval")


class ItemGRPOTrainer(GuardedTrainer, GRPOTrainer):
    """GRPOTrainer whose rollouts are items.

    Args:
        model: causal language model or PeftModel.
        reward_funcs: rewards of `alignment.rewards`, or any reward function of TRL: it also gets the columns `item`,
            `beam_rank` and `group_size`, beside those of the dataset.
        args: ItemGRPOConfig.
        train_dataset, eval_dataset: `datasets.Dataset` with `prompt_ids` (or `prompt`, text or messages, which TRL
            encodes), `target` (item index) and, where a reward or `exclude_seen` reads it, `history` (item indices): see
            `rollouts.item_prompts`.
        processing_class: the extended text tokenizer (or ItemTokenizer) of the model.
        ref_model: reference of the KL term; None: see the module docstring.
        kwargs: as for GRPOTrainer (`peft_config`, `callbacks`, `optimizers`, ...).

    Raises:
        TrainingError: an encoder-decoder (use Seq2SeqGRPOTrainer), missing columns, or groups that would be split.
        IncompatibleComponentsError: a target outside the catalogue, or a reference of another vocabulary.
    """

    args: Any
    _tag_names = ["trl", "grpo", "item-grpo"]
    _name = "Item GRPO"

    def __init__(
        self,
        model: Any,
        reward_funcs: Any,
        args: ItemGRPOConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        ref_model: Any = None,
        callbacks: list | None = None,
        **kwargs: Any,
    ) -> None:
        args = args if args is not None else ItemGRPOConfig("item_grpo")
        if not isinstance(args, ItemGRPOConfig):
            raise TrainingError(f"args is a {type(args).__name__}: pass an ItemGRPOConfig.")
        if isinstance(model, str) or processing_class is None:
            raise TrainingError("pass the model itself and the tokenizer of its item tokens as processing_class.")
        if getattr(model.config, "is_encoder_decoder", False):
            raise TrainingError(f"{type(model).__name__} is an encoder-decoder: use Seq2SeqGRPOTrainer.")
        size = int(args.num_generations or 0)
        local = args.per_device_train_batch_size * int(args.steps_per_generation or 1)
        if local % size:
            raise TrainingError(
                f"{local} rollouts per process and generation (per_device_train_batch_size * steps_per_generation) are no "
                f"multiple of num_generations={size}: the rank of an item needs its whole group on one process."
            )
        base = model.get_base_model() if is_peft_model(model) else model
        if args.logprobs is None:
            served = recommendation_config_of(base)
            args.logprobs = "level" if served.restrict_to_level else "legal" if served.renormalize else "full"
        self._rollouts = self._search(args, processing_class, size)
        evaluated = self._search(args, processing_class, int(args.num_generations_eval or size))
        self._trie = ItemTrie.from_tokenizer(processing_class)
        self._pending: list[dict[str, Any]] | None = None
        self._drawn: torch.Tensor | None = None
        self._keeps_few = "logits_to_keep" in inspect.signature(base.forward).parameters
        reads = context_of(model, kwargs.get("peft_config"))
        args.max_completion_length = len(processing_class.codebook_sizes) + int(args.answer_eos)
        # TRL would load the reference from the policy's folder: it is made here, after everything else
        own_reference = bool(args.beta) and not (is_peft_model(model) or kwargs.get("peft_config"))
        if ref_model is not None:
            if not own_reference:
                raise TrainingError("ref_model has no effect with PEFT (the adapter is the difference) or beta=0.")
            check_same_vocabulary(model, ref_model, processing_class)
        reference = (ref_model if ref_model is not None else copy.deepcopy(model)) if own_reference else None
        beta, sync = args.beta, args.sync_ref_model
        if own_reference:
            args.beta, args.sync_ref_model = 0.0, False
        try:
            with whole_reference_adapter(model):
                super().__init__(
                    model=model,
                    reward_funcs=list(reward_funcs) if isinstance(reward_funcs, (list, tuple)) else [reward_funcs],
                    args=args,
                    train_dataset=self._prepared(train_dataset, processing_class, "train", self._rollouts, reads),
                    eval_dataset=self._prepared(eval_dataset, processing_class, "eval", evaluated, reads),
                    processing_class=processing_class,
                    callbacks=[*guard_callbacks(args), DrawCounter(), *(callbacks or [])],
                    **kwargs,
                )
        finally:
            args.beta, args.sync_ref_model = beta, sync
        self.beta = beta
        if reference is not None:
            self._adopt(reference)
        self._finish_guards()

    @staticmethod
    def _search(args: ItemGRPOConfig, tokenizer: Any, size: int) -> ItemRollouts:
        return ItemRollouts(
            tokenizer,
            size,
            strategy=args.rollouts,
            num_beams=args.num_beams,
            exclude_seen=args.exclude_seen,
            add_target=args.add_target,
            temperature=args.temperature,
            restrict_to_level=args.logprobs == "level",
            renormalize=args.logprobs == "legal",
            seed=args.seed,
        )

    @staticmethod
    def _prepared(dataset: Any, tokenizer: Any, name: str, search: ItemRollouts, context: int | None) -> Any:
        if dataset is None:
            return None
        if context is not None and "prompt_ids" in (dataset.column_names or ()):
            for row, ids in enumerate(dataset["prompt_ids"]):
                check_context(row, len(ids) + int(tokenizer.num_levels), context)
        prompts = ("prompt",) if "prompt" in (dataset.column_names or ()) else ("prompt_ids",)
        check_prompts(dataset, tokenizer, name, (*prompts, "target"))
        dataset = search.usable_prompts(dataset, name)
        if prompts == ("prompt_ids",):  # TRL wants a text to show
            dataset = dataset.map(lambda row: {"prompt": tokenizer.decode(row["prompt_ids"])})
        return dataset

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        """TRL's, with an order that follows from (seed, epoch): a run resumed in a later epoch has that epoch's."""
        sampler: Any = super()._get_train_sampler(dataset)
        shuffled = isinstance(sampler, RepeatSampler) and sampler.shuffle
        if shuffled:
            sampler.set_epoch = lambda epoch: sampler.generator.manual_seed(self.args.seed + epoch)
        return sampler

    def _adopt(self, reference: Any) -> None:
        """Make the reference what TRL's would be: frozen, without dropout, with the fused head, on the device."""
        reference.__dict__.pop("forward", None)  # what an earlier trainer bound to the policy
        reference.requires_grad_(False).eval()
        if self.args.disable_dropout:
            disable_dropout_in_model(reference)
        cast = self.args.cast_lm_head_to_fp32
        add_fused_lm_head(reference, temperature=self.temperature, cast_lm_head_to_fp32=cast)
        if self.is_deepspeed_enabled:
            reference = prepare_deepspeed(reference, self.accelerator)
        elif self.is_fsdp_enabled:
            reference = prepare_fsdp(reference, self.accelerator)
        else:
            reference = self.accelerator.prepare_model(reference, evaluation_mode=True)
        self.ref_model = reference
        if self.args.sync_ref_model:
            self.add_callback(SyncRefModelCallback(reference, self.accelerator))

    def _write_checkpoint(self, folder: str) -> None:
        super()._write_checkpoint(folder)
        if self.use_adaptive_entropy:  # what GRPOTrainer would put beside a finished checkpoint
            state = {"entropy_coef": self.entropy_coef, "last_world_entropy": self._last_world_entropy}
            (Path(folder) / "entropy_ctrl_state.json").write_text(json.dumps(state), encoding="utf-8")

    # ------------------------------------------------------------------------------------------------------ rollouts

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._pending, self._drawn = [dict(row) for row in inputs], None
        result = super()._generate_and_score_completions(inputs)
        if self._drawn is None:
            raise IncompatibleComponentsError(
                "this version of TRL generates completions on a way that ItemGRPOTrainer does not know, so they would be no "
                "items: install a tested version (constraints.txt)."
            )
        self._pending = None
        return result

    def _tokenize_prompts(self, prompts: list) -> Any:
        assert self._pending is not None
        if "prompt_ids" in self._pending[0]:
            return [list(row["prompt_ids"]) for row in self._pending], None, {}
        return super()._tokenize_prompts(prompts)

    def _generate_single_turn(
        self,
        prompt_ids: list[list[int]],
        images: Any,
        multimodal_fields: Any,
        num_generations: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[list[list[int]], None]:
        """One search per prompt; the rows of a prompt follow each other."""
        assert self._pending is not None
        rows, policy = self._pending, self.model
        first = range(0, len(rows), num_generations)
        if len(rows) % num_generations or any(
            prompt_ids[start + place] != prompt_ids[start] or rows[start + place]["target"] != rows[start]["target"]
            for start in first
            for place in range(1, num_generations)
        ):
            raise TrainingError(
                f"a batch of {len(rows)} rows does not hold {num_generations} rows per prompt one after the other; keep "
                "TRL's own sampler (for evaluation: per_device_eval_batch_size a multiple of num_generations)."
            )
        search = self._rollouts
        if num_generations != search.size:
            search = self._search(self.args, self.processing_class, num_generations)
        padding = {"padding_side": "left", "padding_value": self._tokenizer.pad_token_id}
        ids = [torch.tensor(prompt_ids[start]) for start in first]
        device = self.accelerator.device
        mode = "train" if policy.training else "eval"
        with unwrap_model_for_generation(
            self.model_wrapped,
            self.accelerator,
            gather_deepspeed3_params=self.args.ds3_gather_for_generation,
            gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
        ) as unwrapped:
            items_BG, _ = search(
                unwrapped,
                pad(ids, **padding).to(device),
                pad([torch.ones_like(row) for row in ids], padding_side="left", padding_value=0).to(device),
                targets=[int(rows[start]["target"]) for start in first],
                histories=[np.asarray(rows[start]["history"]) for start in first] if "history" in rows[0] else None,
                seed=self._draw_seed(mode),
            )
        self._drawn = items_BG
        targets_B = torch.tensor([int(rows[start]["target"]) for start in first], device=device)
        hits_B = (items_BG == targets_B.unsqueeze(1)).any(dim=1).float()
        self._metrics[mode]["rollouts/hit"].append(self.accelerator.gather(hits_B).mean().item())
        return answer_tokens(self.processing_class, items_BG.flatten().tolist(), eos=self.args.answer_eos), None

    def _draw_seed(self, mode: str) -> int:
        """The first of this draw's own seeds, of which prompt b takes the b-th; the same after resuming."""
        counter = next(one for one in self.callback_handler.callbacks if isinstance(one, DrawCounter))
        draw = counter.next(mode) * self.accelerator.num_processes + self.accelerator.process_index
        return draw * _SEEDS_OF_A_DRAW

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> torch.Tensor:
        assert self._drawn is not None
        size = self._drawn.shape[1]
        for place, (row, item) in enumerate(zip(inputs, self._drawn.flatten().tolist())):
            row.update(item=item, beam_rank=place % size, group_size=size)
        return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)

    # ---------------------------------------------------------------------------------------------- log-probabilities

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Any, attention_mask: Any, logits_to_keep: int, batch_size: int | None = None,
        compute_entropy: bool = False, compute_aux_loss: bool = False, **kwargs: Any,
    ) -> Any:  # fmt: skip
        if self.args.logprobs == "full":
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, batch_size=batch_size,
                compute_entropy=compute_entropy, compute_aux_loss=compute_aux_loss, **kwargs,
            )  # fmt: skip
        logps, entropies = [], []
        aux: list[Any] = []
        for part in torch.arange(len(input_ids)).split(batch_size or len(input_ids)):
            ids_RT = input_ids[part]
            options: dict[str, Any] = {"output_router_logits": True} if compute_aux_loss else {}
            if self._shares(model, ids_RT.shape[1], compute_aux_loss):
                output, logits_RQV = self._packed_logits(model, ids_RT, attention_mask[part], logits_to_keep)
            else:
                if self._keeps_few:
                    options["logits_to_keep"] = logits_to_keep + 1
                with self.accelerator.autocast():
                    output = model(input_ids=ids_RT, attention_mask=attention_mask[part], use_cache=False, **options)
                logits_RQV = output.logits[:, -logits_to_keep - 1 : -1]
            logits_RQV = logits_RQV.float() / self.temperature
            logps_RQ, entropy_RQ = restricted_log_probs(
                logits_RQV, ids_RT[:, -logits_to_keep:], self._trie.to(ids_RT.device),
                self._rollouts.tokenizer.level_offsets, legal=self.args.logprobs == "legal",
            )  # fmt: skip
            logps.append(logps_RQ)
            entropies.append(entropy_RQ)
            aux.append(getattr(output, "aux_loss", None))
        aux_loss = torch.stack(aux).mean() if compute_aux_loss else None
        return torch.cat(logps), torch.cat(entropies) if compute_entropy else None, aux_loss

    def _shares(self, model: Any, width: int, compute_aux_loss: bool) -> bool:
        if not self.args.share_prompts or compute_aux_loss:  # experts would be counted over other tokens
            return False
        longest = longest_packed(self.accelerator.unwrap_model(model))
        return longest is None or width <= longest

    def _packed_logits(self, model: Any, ids_RT: Any, mask_RT: Any, answer_width: int) -> tuple[Any, torch.Tensor]:
        """The model's output, and its logits at every answer token (R, Q, V)."""
        inputs, host_R, index_RQ = packed_answers(ids_RT, mask_RT, answer_width)
        dtype = self.accelerator.unwrap_model(model).get_input_embeddings().weight.dtype
        inputs["attention_mask"] = additive_mask(inputs["attention_mask"], dtype)
        kept = inputs["input_ids"].shape[1] - (ids_RT.shape[1] - answer_width) + 1
        options = {"logits_to_keep": kept} if self._keeps_few else {}
        with self.accelerator.autocast():
            output = model(**inputs, use_cache=False, **options)
        return output, output.logits[:, -kept:][host_R.unsqueeze(1), index_RQ]


def restricted_log_probs(
    logits_RQV: torch.Tensor, answers_RQ: torch.Tensor, trie: ItemTrie, level_offsets: Any, *, legal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of item tokens under a softmax over their level's codes, or over the legal ones among them.

    Args:
        logits_RQV: logits at each answer position.
        answers_RQ: token ids of catalogue items; what stands behind an item (end token, padding) costs nothing.
        level_offsets: (L,) token id of code 0 of each level.
        legal: only codes that continue the item's own prefix to some catalogue item.

    Returns:
        logps_RQ, and the entropy of each distribution, both 0 behind the item.

    Raises:
        IncompatibleComponentsError: an answer that is no catalogue item.
    """
    rows, width = answers_RQ.shape
    nodes_R = torch.zeros(rows, dtype=torch.long, device=answers_RQ.device)
    alive_R = torch.ones_like(nodes_R, dtype=torch.bool)
    logps, entropies = [], []
    for level in range(width):
        if level >= trie.num_levels:
            logps.append(logits_RQV.new_zeros(rows))
            entropies.append(logits_RQV.new_zeros(rows))
            continue
        offset, size = int(level_offsets[level]), trie.codebook_sizes[level]
        codes_R = answers_RQ[:, level] - offset
        alive_R = alive_R & (codes_R >= 0) & (codes_R < size)
        block_RC = logits_RQV[:, level, offset : offset + size]
        if legal:
            codes_RW, _, legal_RW = trie.expand(level, nodes_R)
            spoken_RW = legal_RW & (codes_RW < size)
            scores = CodeScores(block_RC.unsqueeze(1))
            step_RW = child_log_probs(scores, codes_RW.unsqueeze(1), legal_RW.unsqueeze(1), True, size).squeeze(1)
            here_RW = codes_RW == codes_R.unsqueeze(1)
            logp_R = torch.where(here_RW & spoken_RW, step_RW, 0.0).sum(dim=1)
        else:
            step_RW = block_RC.log_softmax(dim=1)
            spoken_RW = torch.ones_like(step_RW, dtype=torch.bool)
            logp_R = step_RW.gather(1, codes_R.clamp(0, size - 1).unsqueeze(1)).squeeze(1)
        known_RW = torch.where(spoken_RW, step_RW, 0.0)
        entropy_R = -(known_RW.exp() * known_RW * spoken_RW).sum(dim=1)
        logps.append(torch.where(alive_R, logp_R, 0.0))
        entropies.append(torch.where(alive_R, entropy_R, 0.0))
        # an ended item is spelled with end codes, numbered as the codebook's size
        nodes_R = trie.step(level, nodes_R, torch.where(alive_R, codes_R, size))
        if nodes_R.device.type == "cpu" and bool((nodes_R < 0).any()):
            raise IncompatibleComponentsError(
                f"row {int((nodes_R < 0).int().argmax())}: the answer {answers_RQ[int((nodes_R < 0).int().argmax())].tolist()} "
                "is no item of the catalogue; use the tokenizer that the rollouts were made with."
            )
    return torch.stack(logps, dim=1), torch.stack(entropies, dim=1)
