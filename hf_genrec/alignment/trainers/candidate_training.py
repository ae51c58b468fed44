"""train_candidate_ranker: the stages of TALLRec, CoLLM, LLaRA, A-LLMRec and LlamaRec with one trainer.

Every stage says what it trains (adapters inside the language model, all of it, or the projectors); everything else is
frozen and stays as it is bit by bit. Checkpoints hold the trained tensors only, and so does the result that each finished
stage leaves; a resumed run takes the finished stages from there. Validation ranks all items (a target that the retriever
misses is a miss) and closed lists of the target and drawn items.

Relations: one stage on text prompts over a ranker without slots is plain instruction tuning of its language model.

Shapes: B users, m candidates, K list length.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers.trainer_utils import EvalPrediction

from hf_genrec.alignment.negatives import NegativeSampler, PopularityNegatives, RandomNegatives
from hf_genrec.artifacts import staged_folder
from hf_genrec.data.splits import EvaluationSet, Split
from hf_genrec.errors import ArtifactError, IncompatibleComponentsError, TrainingError
from hf_genrec.generation.requests import check_fingerprint
from hf_genrec.models.candidate_ranker.modeling_candidate_ranker import (
    retriever_item_vectors,
    retriever_user_width,
)

from .arguments import RecommenderTrainingArguments
from .candidate_alignment import AlignmentCollator, CollaborativeTextAligner
from .candidate_data import CandidateCollator, CandidateDataset, InstructionCollator, closed_lists
from .candidate_metrics import closed_set_answers, closed_set_metrics, list_metrics
from .candidate_stages import LoraOptions, RankerStage
from .checkpoints import checkpoints
from .ranking import ranking_metrics, ranks_from_items
from .recommender import RecommenderTrainer

logger = logging.getLogger(__name__)

TRAINED_NAME = "trained.safetensors"
STAGE_NAME = "stage.json"


class CandidateTrainer(RecommenderTrainer):
    """RecommenderTrainer for one stage of a candidate ranker.

    Args:
        stage: what is trained, on which prompts.
        kept: names of parameters and buffers that checkpoints hold beside those that require gradients.
        kwargs: as for RecommenderTrainer.
    """

    def __init__(self, *args: Any, stage: RankerStage, kept: Sequence[str] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stage, self.kept = stage, tuple(kept)
        if self.args.ema_decay is not None:
            raise TrainingError("ema_decay is not supported for candidate rankers: leave it out.")

    # ------------------------------------------------------------------------------------------------------ training

    def hybrid_now(self) -> bool:
        """Does this step show soft tokens? Of a curriculum a function of (seed, step): the probability grows linearly from 0
        at the first step to 1 at the end. All batches of a step are of one kind, however it is split into them.
        """
        if self.stage.prompts != "curriculum":
            return self.stage.prompts == "hybrid"
        step = self.state.global_step
        drawn = np.random.default_rng([self.args.seed, step, 0]).random()
        return bool(drawn < step / max(1, self.state.max_steps))

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        text = {name: value for name, value in inputs.items() if name.startswith("text_")}
        inputs = {name: value for name, value in inputs.items() if name not in text}
        if text and not self.hybrid_now():
            inputs = {name.removeprefix("text_"): value for name, value in text.items()}
        inputs["answer_loss"] = self.stage.answer_loss
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    # ---------------------------------------------------------------------------------------------------- validation

    @contextmanager
    def _ranking_collator(self) -> Iterator[None]:
        with super()._ranking_collator():
            # as `recommend` reads: the retriever cuts a history by itself, the prompt by the ranker's max_history
            collator: Any = self.data_collator
            ranker: Any = self.model
            collator.max_history = ranker.recommendation_config.max_history
            yield

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Closed-list loss; per user the rank among all items, then the scores of a closed list, target first."""
        inputs = self._prepare_inputs(inputs)
        ranker = self.accelerator.unwrap_model(model)
        histories = ranker.history_items(inputs["input_ids"], inputs["attention_mask"])
        targets = inputs["targets"].cpu().numpy()
        scores = closed_list_scores(ranker, histories, targets, seen=inputs["seen"], seed=self.args.seed)
        loss = -scores.log_softmax(-1)[:, 0].mean()
        if prediction_loss_only:
            return loss, None, None
        items_Bk, _ = ranker.recommend_indices(
            inputs["input_ids"],
            inputs["attention_mask"],
            trie=ranker._catalogue_trie(),
            k=self.args.eval_top_k,
            num_beams=max(self.args.eval_num_beams, self.args.eval_top_k),
            seen=inputs["seen"],
        )
        ranks = ranks_from_items(items_Bk, inputs["targets"])
        return loss, torch.cat([ranks[:, None].to(scores), scores], 1), inputs["targets"]

    def _ranking_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        table = np.asarray(prediction.predictions)
        closed = list_metrics(table[:, 1:])
        return ranking_metrics(table[:, 0], self.args.eval_ks) | {
            (name if name in ("auc", "uauc") else f"closed_{name}"): value for name, value in closed.items()
        }

    # --------------------------------------------------------------------------------------------------- checkpoints

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            save_file(trained_tensors(self.model, self.kept), folder / TRAINED_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_trained_tensors(model if model is not None else self.model, Path(resume_from_checkpoint) / TRAINED_NAME)

    def _load_best_model(self) -> None:
        logger.info("loading the best state, %s", self.state.best_model_checkpoint)
        load_trained_tensors(self.model, Path(str(self.state.best_model_checkpoint)) / TRAINED_NAME)


def trained_tensors(model: Any, kept: Sequence[str] = ()) -> dict[str, torch.Tensor]:
    """Parameters that require gradients, and those named, by name: what a checkpoint needs."""
    found = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad or name in kept}
    found |= {name: tensor for name, tensor in model.named_buffers() if name in kept}
    return {name: tensor.detach().contiguous().cpu() for name, tensor in found.items()}


def load_trained_tensors(model: Any, path: Path) -> None:
    """Copy a file of `trained_tensors` into the model.

    Raises:
        ArtifactError: no such file, or tensors that the model has not.
    """
    if not path.is_file():
        raise ArtifactError(f"{path} is missing: resume from another checkpoint, or start anew.")
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for name, tensor in load_file(path).items():
            if name not in own or own[name].shape != tensor.shape:
                raise ArtifactError(
                    f"{path} holds {name}, which this ranker has not in that shape; use the same stages."
                )
            own[name].copy_(tensor)


def closed_list_scores(
    model: Any,
    histories: Sequence[np.ndarray],
    targets_B: np.ndarray,
    *,
    seen: Sequence[np.ndarray] | None = None,
    seed: int = 0,
) -> torch.Tensor:
    """Scores (B, m) of closed lists: the target and m - 1 drawn items that are not in the history, shown in a drawn order.

    Column 0 of the result is the target's. The lists are functions of (seed, row).

    Args:
        seen: whole histories, where `histories` are cut to what the model reads.
    """
    size = model.config.num_candidates if model.config.verbalizer != "yes_no" else max(2, model.config.num_candidates)
    lists_Bm = closed_lists(histories if seen is None else seen, targets_B, size, model.config.num_items, seed)
    scores = model.rank_candidates(histories, lists_Bm)
    first = torch.from_numpy((lists_Bm == np.asarray(targets_B)[:, None]).argsort(1, kind="stable")[:, ::-1].copy())
    return scores.gather(1, first.to(scores.device))


def evaluate_written_answers(
    model: Any,
    text_tokenizer: Any,
    evaluation: EvaluationSet,
    *,
    max_users: int | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Free greedy answers over closed lists: `valid_ratio`, `hit_rate@1`, `hit_rate@1_valid` (LLaRA's protocol).

    An answer is valid when it holds exactly one of the titles that the list shows, as the prompt shows them (perhaps cut). Of
    a written list its first line counts.

    Args:
        model: a ranker with verbalizer "title" or "list".
        text_tokenizer: of its language model, to read answers and titles.
        evaluation: histories and targets.
        max_users: use only so many rows, drawn with `seed`.
    """
    if model.config.verbalizer not in ("title", "list"):
        raise IncompatibleComponentsError("written answers are titles: use a ranker with verbalizer 'title' or 'list'.")
    rows = np.arange(len(evaluation))
    if max_users is not None and max_users < len(rows):
        rows = np.sort(np.random.default_rng(seed).permutation(rows)[:max_users])
    histories = [evaluation.histories[int(row)] for row in rows]
    targets = evaluation.targets[rows]
    lists = closed_lists(histories, targets, model.config.num_candidates, model.config.num_items, seed)
    answers = text_tokenizer.batch_decode(model.generate_answers(histories, lists), skip_special_tokens=True)
    if model.config.verbalizer == "list":
        answers = [answer.strip().partition("\n")[0] for answer in answers]
    titles = {int(item): text_tokenizer.decode(model.writer.titles[int(item)]) for item in np.unique(lists[lists >= 0])}
    shown = [[titles.get(int(item), "") for item in row] for row in lists]
    return closed_set_metrics(closed_set_answers(answers, shown), (lists == targets[:, None]).argmax(1))


# ------------------------------------------------------------------------------------------------------- all the stages


@dataclass
class RankerTrainingResult:
    """The trained ranker, and of each stage what its `stage.json` holds (`steps`, `train_loss`, `validation`)."""

    model: Any
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)


def train_candidate_ranker(
    model: Any,
    tokenizer: Any,
    split: Split,
    args: RecommenderTrainingArguments,
    *,
    stages: Sequence[RankerStage],
    lora: LoraOptions | None = None,
    instructions: Any = None,
    ratings: np.ndarray | None = None,
    like_from: float | None = None,
    text_vectors: Any = None,
    samples: int | None = None,
    resume: bool = False,
    merge: bool = True,
    **trainer_options: Any,
) -> RankerTrainingResult:
    """Train a ranker in stages, in place.

    Each stage has a folder `<number>-<name>` in `args.output_dir` with its checkpoints, and one `<number>-<name>-result`
    with what has been trained until its end.

    Args:
        model: a `CandidateRankerForCausalLM`; its retriever stays as it is.
        tokenizer: the item tokenizer.
        split: `train` is learned, `validation` ranked.
        args: of all stages; a stage's `options` go before. `max_train_seconds` is shared equally. Histories are as long
            as the ranker's configuration says, not `args.max_history`.
        stages: in order, see `RANKER_METHODS`.
        lora: size of the adapters for stages that train "lora".
        instructions: rows {"input_ids", "labels"} for stages on instructions, in the language model's tokens.
        ratings: one per item of `split.train.items`, NaN = none: yes/no rows then ask whether an item was liked.
        like_from: least rating of a liked item; None = 0.8 of the highest.
        text_vectors: (N, E) for a stage "alignment".
        samples: few-shot: train on so many rows, drawn once.
        resume: take finished stages from their results and go on inside the unfinished one.
        merge: fold the adapters into the language model at the end, so that it is a plain model again.
        trainer_options: more arguments of the trainer (`callbacks` ...).

    Raises:
        IncompatibleComponentsError: parts that do not fit, or adapters without a place in the model.
        TrainingError: nothing to train on, results of another run in the folder, or a loss that is not finite.
    """
    check_fingerprint(model, tokenizer)
    stages = [stage for stage in stages if stage.rows != "instructions" or instructions is not None]
    if model.config.verbalizer == "list":
        raise TrainingError(
            "verbalizer 'list' is for models that are ranked with as they are: rows have one answer, not an order; train "
            "with 'letters' or 'title'."
        )
    if not stages:
        raise TrainingError(
            "no stage is left to train; name stages, and give instructions=... for one on instructions."
        )
    if model.config.rated_history and args.eval_strategy != "no":
        raise TrainingError(
            "validation has no ratings, which this ranker's prompt needs to show liked and disliked items apart: set "
            "eval_strategy='no', or use a wording without {disliked}."
        )
    flags = {name: tensor.requires_grad for name, tensor in model.named_parameters()}
    adapted = _add_adapters(model, stages, lora, args.seed)
    result, kept = RankerTrainingResult(model), _lora_names(model) if adapted is not None else []
    budget = None if args.max_train_seconds is None else args.max_train_seconds / len(stages)
    for number, stage in enumerate(stages):
        name = f"{number + 1}-{stage.name}"
        done = Path(str(args.output_dir)) / f"{name}-result"
        if done.is_dir() and not resume:
            raise TrainingError(
                f"{done} is the result of an earlier run: pass resume=True to go on from it, or choose another output_dir."
            )
        kept = sorted({*kept, *_touched(model, stage)})
        if done.is_dir():
            load_trained_tensors(model, done / TRAINED_NAME)
            result.stages[stage.name] = json.loads((done / STAGE_NAME).read_text(encoding="utf-8"))
            logger.info("stage %s was finished before", name)
            continue
        changes = {"output_dir": os.path.join(str(args.output_dir), name), "max_train_seconds": budget}
        stage_args = dataclasses.replace(args, **(changes | dict(stage.options)))
        with _frozen_but(model, stage):
            if stage.rows == "alignment":
                summary = _align(model, split, stage_args, stage, text_vectors, resume)
            else:
                rated = {"ratings": ratings, "like_from": like_from} if ratings is not None else {}
                dataset = _dataset(model, split, stage_args, stage, instructions, rated, samples)
                summary = _train_stage(
                    model, tokenizer, split, stage_args, stage, dataset, kept, resume, trainer_options
                )
        _store(done, trained_tensors(model, kept), summary, stage_args)
        result.stages[stage.name] = summary
    if adapted is not None and merge:
        model.language_model = adapted.merge_and_unload()
        for name, tensor in model.named_parameters():  # adapters froze the model around them
            tensor.requires_grad_(flags[name])
    model.eval()
    return result


def _store(
    done: Path, tensors: dict[str, torch.Tensor], summary: dict[str, Any], args: RecommenderTrainingArguments
) -> None:
    """Leave the result of a stage; of several processes the first one writes it, and the others go on behind it."""
    with args.main_process_first(local=False, desc="result of the stage"):
        if args.process_index == 0:
            with staged_folder(done) as folder:
                save_file(tensors, folder / TRAINED_NAME)
                (folder / STAGE_NAME).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


def _add_adapters(model: Any, stages: Sequence[RankerStage], lora: LoraOptions | None, seed: int) -> Any:
    """Adapters inside the language model, in place; returns PEFT's handle on them."""
    if not any("lora" in stage.trains for stage in stages):
        return None
    lora = lora or LoraOptions()
    modules = lora.target_modules
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=modules if isinstance(modules, str) else list(modules),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            return get_peft_model(model.language_model, config)
        except ValueError as error:
            raise IncompatibleComponentsError(
                f"adapters do not fit {type(model.language_model).__name__}: {error} Name its layers in "
                "LoraOptions(target_modules=...), or use 'all-linear'."
            ) from error


def _lora_names(model: Any) -> list[str]:
    return [name for name, _ in model.named_parameters() if ".lora_" in name]


def _touched(model: Any, stage: RankerStage) -> list[str]:
    """Names of the tensors a stage may change."""

    def touched(name: str) -> bool:
        if name.startswith(("item_injector.", "user_injector.")):
            return "projector" in stage.trains
        part = "lora" if ".lora_" in name else "language_model"
        return name.startswith("language_model.") and part in stage.trains

    names = [name for name, _ in model.named_parameters() if touched(name)]
    return [*names, *(["item_vectors"] if stage.rows == "alignment" else [])]


@contextmanager
def _frozen_but(model: Any, stage: RankerStage) -> Iterator[None]:
    """Only what the stage trains requires gradients; afterwards everything is as it was."""
    before = {name: tensor.requires_grad for name, tensor in model.named_parameters()}
    touched = set(_touched(model, stage))
    if stage.rows != "alignment" and not touched:
        raise TrainingError(f"stage {stage.name} trains {stage.trains}, of which this ranker has nothing.")
    for name, tensor in model.named_parameters():
        tensor.requires_grad_(name in touched)
    text_only, model.text_only = model.text_only, stage.prompts == "text"
    try:
        yield
    finally:
        model.text_only = text_only
        for name, tensor in model.named_parameters():
            tensor.requires_grad_(before[name])


def _sampler(model: Any, split: Split, stage: RankerStage, seed: int) -> NegativeSampler:
    size = model.config.num_items
    if stage.negatives == "random":
        return RandomNegatives(size, seed=seed)
    counts = np.bincount(split.train.items, minlength=size)
    return PopularityNegatives(counts, seed=seed, fallback=RandomNegatives(size, seed=seed))


def _dataset(
    model: Any,
    split: Split,
    args: RecommenderTrainingArguments,
    stage: RankerStage,
    instructions: Any,
    rated: dict[str, Any],
    samples: int | None,
) -> Any:
    if stage.rows == "instructions":
        return instructions
    pointwise = model.config.verbalizer == "yes_no"
    return CandidateDataset(
        split.train,
        _sampler(model, split, stage, args.seed),
        num_candidates=model.config.num_candidates,
        pointwise=pointwise,
        max_history=_history_limit(model),
        split_history=model.config.rated_history,
        **(rated if pointwise else {}),
        samples=samples,
        samples_per_epoch=args.samples_per_epoch,
        seed=args.seed,
    )


def _history_limit(model: Any) -> int:
    """Newest items of a training row: what the prompt shows (it cuts by itself), and what a user's vector is made of."""
    limit = int(model.config.max_history)
    if "user" in model.config.slots:
        limit = max(limit, int(getattr(model.retriever.config, "max_position_embeddings", limit)))
    return limit


def _train_stage(
    model: Any,
    tokenizer: Any,
    split: Split,
    args: RecommenderTrainingArguments,
    stage: RankerStage,
    dataset: Any,
    kept: Sequence[str],
    resume: bool,
    trainer_options: dict[str, Any],
) -> dict[str, Any]:
    if stage.rows == "instructions":
        collator: Any = InstructionCollator()
        args.train_sampling_strategy = "random" if not hasattr(dataset, "lengths") else args.train_sampling_strategy
    else:
        collator = CandidateCollator(model, {"curriculum": "both"}.get(stage.prompts, stage.prompts))
    trainer = CandidateTrainer(
        model=model,
        args=args,
        data_collator=collator,
        train_dataset=dataset,
        eval_dataset=None if args.eval_strategy == "no" else split.validation,
        processing_class=tokenizer,
        stage=stage,
        kept=kept,
        **trainer_options,
    )
    return _run(trainer, args, resume)


def _align(
    model: Any,
    split: Split,
    args: RecommenderTrainingArguments,
    stage: RankerStage,
    text_vectors: Any,
    resume: bool,
) -> dict[str, Any]:
    """Stage 1 of A-LLMRec: the ranker's item vectors become latents of both sides."""
    if text_vectors is None or not model.config.soft_items:
        raise IncompatibleComponentsError(
            f"stage {stage.name} makes item vectors from texts: pass text_vectors=... and a ranker with item slots."
        )
    cf_vectors = retriever_item_vectors(model.retriever, model.item_codes.cpu())
    if (width := retriever_user_width(model.retriever)) != cf_vectors.shape[1]:
        raise IncompatibleComponentsError(
            f"stage {stage.name} multiplies user and item vectors, but those of {type(model.retriever).__name__} have "
            f"{width} and {cf_vectors.shape[1]} numbers; use a retriever that scores items by their input vectors, such as "
            "SASRec."
        )
    with torch.random.fork_rng():
        torch.manual_seed(args.seed)
        aligner = CollaborativeTextAligner(cf_vectors, text_vectors, model.config.item_vector_size)
    dataset = CandidateDataset(
        split.train,
        _sampler(model, split, stage, args.seed),
        num_candidates=2,
        max_history=getattr(model.retriever.config, "max_position_embeddings", 50),
        samples_per_epoch=args.samples_per_epoch,
        seed=args.seed,
    )
    args.eval_strategy, args.load_best_model_at_end, args.metric_for_best_model = "no", False, None  # type: ignore
    trainer = RecommenderTrainer(
        model=aligner, args=args, data_collator=AlignmentCollator(model), train_dataset=dataset
    )
    summary = _run(trainer, args, resume)
    cold_N = np.bincount(split.train.items, minlength=model.config.num_items) == 0
    model.set_item_vectors(aligner.latents(cold_N).cpu())
    return summary | {"cold_items": int(cold_N.sum())}


def _run(trainer: Any, args: RecommenderTrainingArguments, resume: bool) -> dict[str, Any]:
    if not resume and (old := checkpoints(str(args.output_dir))):
        raise TrainingError(
            f"{args.output_dir} holds checkpoints of an earlier run ({old[-1].name}): pass resume=True to go on, or choose "
            "another output_dir."
        )
    output = trainer.train(resume_from_checkpoint=True if resume else None)
    evaluations = {entry["step"]: entry for entry in trainer.state.log_history if "eval_loss" in entry}
    best = evaluations.get(trainer.state.best_global_step) or (evaluations[max(evaluations)] if evaluations else {})
    return {
        "steps": trainer.state.global_step,
        "train_loss": output.training_loss,
        "best_step": best.get("step"),
        "validation": {
            name.removeprefix("eval_"): value
            for name, value in best.items()
            if name.startswith("eval_") and "runtime" not in name and "per_second" not in name
        },
    }
