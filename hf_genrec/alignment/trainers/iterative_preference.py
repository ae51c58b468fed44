"""IterativePreferenceTrainer: preference tuning in rounds, each against the model of the round before (OneRec, Align3GR).

Iteration t takes the model M_t, makes preferences with it (`self_preference.py`), and trains M_{t+1} on

    ntp_weight * L_NTP + dpo_weight * L_DPO(beta, reference = M_t)

for encoder-decoders and for causal language models, with LoRA or without (`mixed_preference.py`). OneRec
(arXiv 2502.18965): best and worst of the model's own beam by a reward. Align3GR (arXiv 2511.11255): rejected items of
growing difficulty, the reference renewed after each stage.

Optimising a reward can ruin a recommender without any loss showing it (a public re-creation of OneRec fell to an NDCG of
0), so every iteration ends with a validation by full ranking. Where the metric falls below `1 - max_drop` of what it was
before all iterations, or the negative log-likelihood of the targets rises by more than `max_nll_rise`, the model goes back
to M_t and the run stops with a message that says why.

Every finished iteration leaves `<output_dir>/iteration-T` (model or adapter, tokenizer, history), written whole or not at
all; a resumed run goes on behind the newest of them. Of several processes the main one writes, and the others wait.

*Relations*: one iteration of SampledPairs with `ntp_weight=0` is S-DPO. With `dpo_weight=0` it is supervised training.
"""

from __future__ import annotations

import copy
import json
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import is_peft_model
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoTokenizer, set_seed

from hf_genrec.alignment.rollouts import answer_tokens, item_prompts
from hf_genrec.alignment.self_preference import IterationPairs
from hf_genrec.artifacts import staged_folder, verify_manifest
from hf_genrec.data.splits import EvaluationSet
from hf_genrec.errors import ArtifactError, IncompatibleComponentsError, TrainingError
from hf_genrec.evaluation.bucket_comparison import BucketComparison, compare_buckets
from hf_genrec.evaluation.evaluation_report import EvaluationReport
from hf_genrec.evaluation.evaluator import evaluate
from hf_genrec.evaluation.recommenders import ModelRecommender
from hf_genrec.generation.configuration_recommendation import RecommendationConfig
from hf_genrec.generation.recommend import recommendation_config_of
from hf_genrec.generation.scorers import scorer_for
from hf_genrec.generation.search import evaluating

from .adapter_reference import drop_reference_adapter
from .checkpoints import _no_file_bars
from .mixed_preference import (
    MixedPreferenceConfig,
    MixedPreferenceTrainer,
    Seq2SeqMixedPreferenceConfig,
    Seq2SeqMixedPreferenceTrainer,
)

logger = logging.getLogger(__name__)

_STATE = "iteration.json"


@dataclass(frozen=True)
class IterativeResult:
    """What a run gives; the model itself was trained in place.

    Args:
        history: one entry per iteration: pairs and their rewards, train loss, validation, seconds.
        before, after: validation reports of the first and of the final model (None without a validation set).
        stopped: why the run ended early; "" when it did not.
    """

    history: list[dict[str, Any]]
    before: EvaluationReport | None = None
    after: EvaluationReport | None = None
    stopped: str = ""

    def buckets(self, metric: str = "ndcg@10") -> BucketComparison:
        """Head, tail and cold items before and after.

        Raises:
            TrainingError: there was no validation.
        """
        if self.before is None or self.after is None:
            raise TrainingError("no validation set was given, so there is nothing to compare.")
        return compare_buckets(self.before, self.after, metric)


@dataclass
class IterativePreferenceTrainer:
    """Drives the iterations.

    Args:
        model: causal language model with item tokens, or encoder-decoder; plain or PeftModel. Trained in place.
        tokenizer: carries the catalogue.
        rows: M requests: histories and what was chosen after them (`pairs.next_items`).
        pairs: makes the preferences of an iteration: `RewardPairs`, `SampledPairs`, or any such function.
        args: MixedPreferenceConfig (causal) or Seq2SeqMixedPreferenceConfig; each iteration trains with it in
            `<output_dir>/running`, seed + iteration.
        iterations: how many.
        validation: rows that are ranked before, between and after; None switches the guard off.
        metric: of the guard.
        max_drop: largest loss of the metric, as a part of its value before all iterations.
        max_nll_rise: largest rise of the targets' negative log-likelihood (nats per item) over the same value.
        requests_per_iteration: requests drawn for the next-token loss in each iteration, beside those with a pair; None:
            all of them, 0: those with a pair alone.
        max_history: newest items of a prompt.
        answer_eos: answers end with the end token.
        recommendation_config: beams, seen items ... of the validation; default the model's own.
        train_counts: (N,) training interactions of each item, for head / tail / cold buckets.

    Raises:
        TrainingError: arguments of the other kind of model, or numbers out of range.
    """

    model: Any
    tokenizer: Any
    rows: EvaluationSet
    pairs: Callable[[Any, Any, EvaluationSet, int], IterationPairs]
    args: MixedPreferenceConfig | Seq2SeqMixedPreferenceConfig
    iterations: int = 3
    validation: EvaluationSet | None = None
    metric: str = "ndcg@10"
    max_drop: float = 0.5
    max_nll_rise: float = 2.0
    requests_per_iteration: int | None = None
    max_history: int | None = None
    answer_eos: bool = False
    recommendation_config: RecommendationConfig | None = None
    train_counts: np.ndarray | None = None
    history: list[dict[str, Any]] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self._seq2seq = bool(getattr(self.model.config, "is_encoder_decoder", False))
        kind: Any = Seq2SeqMixedPreferenceConfig if self._seq2seq else MixedPreferenceConfig
        if not isinstance(self.args, kind):
            raise TrainingError(
                f"{type(self.model).__name__} needs args of {kind.__name__}, not {type(self.args).__name__}."
            )
        if self.iterations < 1 or not 0 <= self.max_drop < 1 or self.max_nll_rise < 0:
            raise TrainingError(
                f"iterations={self.iterations}, max_drop={self.max_drop}, max_nll_rise={self.max_nll_rise}: give at least 1, a "
                "part of 1, and a number of 0 or more."
            )
        if self.requests_per_iteration is not None and self.requests_per_iteration < 0:
            raise TrainingError(
                f"requests_per_iteration={self.requests_per_iteration}: give 0 or more, or None for all."
            )
        self.folder = Path(str(self.args.output_dir))

    # ------------------------------------------------------------------------------------------------------- the run

    def train(self, *, resume: bool = False) -> IterativeResult:
        """Run the iterations.

        Args:
            resume: go on behind the newest finished iteration in `output_dir`; the model given must be the one that the
                run began with.

        Raises:
            TrainingError: `output_dir` holds another run's iterations, or what the pairs and trainers raise.
        """
        first_report, limits = self._validate()
        done, stopped = self._restore() if resume else (self._check_empty(), "")
        report = first_report if not done else self._validate()[0]
        for iteration in range(done, self.iterations):
            if stopped:
                break
            former = self._weights()
            entry = self._iterate(iteration)
            report, found = self._validate()
            entry["validation"] = found
            stopped = self._collapse(iteration, limits, found)
            self.history.append(entry | ({"stopped": stopped} if stopped else {}))
            if stopped:
                logger.warning(stopped)
                self._load(former)
                report = self._validate()[0]
            self._store(iteration if stopped else iteration + 1, stopped)
        self._remove(self.folder / "running")
        self.model.eval()
        return IterativeResult(self.history, first_report, report, stopped)

    def _iterate(self, iteration: int) -> dict[str, Any]:
        started = time.perf_counter()
        pairs = self.pairs(self.model, self.tokenizer, self.rows, iteration)
        dataset = self._requests(pairs, iteration)
        args = copy.copy(self.args)
        args.output_dir, args.seed = str(self.folder / "running"), self.args.seed + iteration
        set_seed(args.seed)  # an iteration is repeatable by itself: resuming behind another gives the same bits
        self._remove(Path(args.output_dir))
        kind: Any = Seq2SeqMixedPreferenceTrainer if self._seq2seq else MixedPreferenceTrainer
        trainer = kind(self.model, args=args, train_dataset=dataset, processing_class=self.tokenizer)
        try:
            output = trainer.train()
        finally:
            self._release()
        logs = [log for log in trainer.state.log_history if "rewards/margins" in log]
        return {
            "iteration": iteration,
            **pairs.summary,
            "rows": len(dataset),
            "train_loss": output.training_loss,
            "steps": output.global_step,
            **({"margin": logs[-1]["rewards/margins"]} if logs else {}),
            "seconds": round(time.perf_counter() - started, 2),
        }

    def _release(self) -> None:
        """Undo what a trainer leaves on the model: its forward, and with PEFT the frozen copy of the adapter."""
        drop_reference_adapter(self.model)
        base = self.model.get_base_model() if is_peft_model(self.model) else self.model
        for module in (self.model, base):
            module.__dict__.pop("forward", None)

    def _requests(self, pairs: IterationPairs, iteration: int) -> Dataset:
        """Rows of mixed_preference: the requests with a pair, and those drawn for the next-token loss."""
        plain = np.setdiff1d(np.arange(len(self.rows)), pairs.rows)
        if self.requests_per_iteration is not None and self.requests_per_iteration < len(plain):
            rng = np.random.default_rng([self.args.seed, iteration])
            plain = np.sort(rng.permutation(plain)[: self.requests_per_iteration])
        part = self.rows.take(np.concatenate([pairs.rows, plain]))
        prompts = item_prompts(part, self.tokenizer, max_history=self.max_history)
        empty: list[Any] = [[] for _ in plain]
        rejected = [
            answer_tokens(self.tokenizer, row[row >= 0], eos=self.answer_eos)
            for row in np.asarray(pairs.rejected, np.int64)
        ]
        return Dataset.from_dict(
            {
                "prompt_ids": prompts["prompt_ids"][:],
                "target_ids": answer_tokens(self.tokenizer, part.targets, eos=self.answer_eos),
                "chosen_ids": answer_tokens(self.tokenizer, pairs.chosen, eos=self.answer_eos) + empty,
                "rejected_ids": rejected + empty,
            }
        )

    # ----------------------------------------------------------------------------------------------------- the guard

    def _validate(self) -> tuple[EvaluationReport | None, dict[str, float]]:
        if self.validation is None:
            return None, {}
        config = self.recommendation_config or recommendation_config_of(self.model)
        if self.max_history is not None:
            config = config.merged(max_history=self.max_history)
        recommender = ModelRecommender(self.model, self.tokenizer, config)
        k = int(self.metric.rpartition("@")[2])
        report = evaluate(
            recommender,
            self.validation,
            num_items=self.tokenizer.num_items,
            ks=sorted({k, 10}),
            exclude_seen=config.exclude_seen,
            train_counts=self.train_counts,
            bootstrap=0,
            progress=False,
        )
        nll = target_nll(self.model, self.tokenizer, self.validation, config)
        return report, {self.metric: report[self.metric], "nll": nll}

    def _collapse(self, iteration: int, limits: dict[str, float], found: dict[str, float]) -> str:
        """Why the run must stop; "" when it need not."""
        if not limits:
            return ""
        before, now = limits[self.metric], found[self.metric]
        reason = ""
        if now < before * (1 - self.max_drop):
            reason = (
                f"validation {self.metric} fell from {before:.4f} to {now:.4f}, below {1 - self.max_drop:.0%} of it"
            )
        elif not found["nll"] <= limits["nll"] + self.max_nll_rise:
            reason = (
                f"the targets' negative log-likelihood rose from {limits['nll']:.2f} to {found['nll']:.2f} nats per item, by "
                f"more than {self.max_nll_rise:g}"
            )
        if not reason:
            return ""
        return (
            f"iteration {iteration + 1} of {self.iterations} stops the run: {reason}. The model is back to before it. "
            f"Likely fixes: a higher beta (now {self.args.beta:g}) or ntp_weight (now {self.args.ntp_weight:g}), a lower "
            f"dpo_weight (now {self.args.dpo_weight:g}) or learning_rate (now {self.args.learning_rate:g}), another reward."
        )

    # ----------------------------------------------------------------------------------------------------- checkpoints

    def _weights(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().cpu().clone() for name, p in self.model.named_parameters() if p.requires_grad}

    def _load(self, weights: dict[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if name in weights:
                    parameter.copy_(weights[name])

    def _check_empty(self) -> int:
        if old := finished_iterations(self.folder):
            raise TrainingError(
                f"{self.folder} holds iterations of an earlier run ({old[-1].name}), which this one would mix up with its own: "
                "resume, remove them, or choose another output_dir."
            )
        return 0

    def _store(self, done: int, stopped: str) -> None:
        processes = PartialState()
        if processes.is_main_process:
            state = {"history": self.history, "stopped": stopped}
            with _no_file_bars(), staged_folder(self.folder / f"iteration-{done}") as folder:
                self.model.save_pretrained(folder)
                self.tokenizer.save_pretrained(folder)
                (folder / _STATE).write_text(json.dumps(state), encoding="utf-8")
        processes.wait_for_everyone()
        if done:  # the newest is all that a resumed run needs
            self._remove(self.folder / f"iteration-{done - 1}")

    @staticmethod
    def _remove(folder: Path) -> None:
        """Remove a folder that no process uses any more, and go on when it is gone."""
        processes = PartialState()
        processes.wait_for_everyone()
        if processes.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)
        processes.wait_for_everyone()

    def _restore(self) -> tuple[int, str]:
        """Load the newest whole iteration: how many are done, and why that run stopped."""
        for folder in reversed(finished_iterations(self.folder)):
            number = int(folder.name.removeprefix("iteration-"))
            try:
                verify_manifest(folder)
            except ArtifactError as error:
                logger.warning("iteration skipped: %s", error)
                continue
            state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
            saved = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
            if saved.catalogue_fingerprint != self.tokenizer.catalogue_fingerprint:
                raise IncompatibleComponentsError(
                    f"{folder} was made for another catalogue than the tokenizer's: use the tokenizer the run began with."
                )
            if is_peft_model(self.model):
                from peft import set_peft_model_state_dict

                set_peft_model_state_dict(self.model, load_file(folder / "adapter_model.safetensors"))
            else:
                loaded = type(self.model).from_pretrained(str(folder), local_files_only=True)
                self.model.load_state_dict(loaded.state_dict())
            self.history = state["history"]
            return number, state["stopped"]
        logger.warning("no finished iteration in %s: training starts from the beginning.", self.folder)
        return 0, ""


def target_nll(
    model: Any,
    tokenizer: Any,
    rows: EvaluationSet,
    config: RecommendationConfig | None = None,
    *,
    batch_size: int = 128,
) -> float:
    """Mean negative log-likelihood of the targets after their histories, in nats per item, as the search scores them.

    Args:
        model: any model that `scorer_for` knows.
        config: `max_history` and `restrict_to_level`; default the model's own.
    """
    config = config or recommendation_config_of(model)
    decoder = scorer_for(model, tokenizer, restrict_to_level=config.restrict_to_level)
    codes_NL = np.array(tokenizer.codes, np.int64)
    total = 0.0
    with evaluating(decoder), evaluating(model):
        for start in range(0, len(rows), batch_size):
            part = rows.take(np.arange(start, min(start + batch_size, len(rows))))
            encoded = tokenizer.encode_item_indices(
                list(part.histories), max_items=config.max_history, return_tensors="pt"
            )
            inputs = (encoded[name].to(model.device) for name in ("input_ids", "attention_mask"))
            state = decoder.start_decoding(*inputs)
            codes_BL = torch.from_numpy(codes_NL[part.targets]).to(model.device)
            for level in range(codes_BL.shape[1]):
                there_B = codes_BL[:, level] >= 0
                prefix_B1l = codes_BL[:, None, :level].clamp(min=0)
                logp_BC = decoder.score_codes(state, prefix_B1l, level)[:, 0]
                logp_B = logp_BC.gather(1, codes_BL[:, level : level + 1].clamp(min=0)).squeeze(1)
                total -= float(torch.where(there_B, logp_B, 0.0).sum())
    return total / max(1, len(rows))


def finished_iterations(folder: str | Path) -> list[Path]:
    """Folders of the finished iterations of a run in `folder`, oldest first."""
    found = [path for path in Path(folder).glob("iteration-*") if path.name.removeprefix("iteration-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("iteration-")))
