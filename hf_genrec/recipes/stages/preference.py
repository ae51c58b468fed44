"""Training methods that align a trained recommender with preferences: S-DPO, GRPO, OneRec's iterations.

For language models with item tokens and for encoder-decoders alike; both come here trained (see the method "stages").
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from transformers import TrainingArguments

from hf_genrec.alignment.negatives import named_sampler
from hf_genrec.alignment.pair_datasets import cut_at_windows, item_dataset, save_pairs
from hf_genrec.alignment.pairs import make_pairs, next_items, training_values
from hf_genrec.alignment.trainers.language_model import prompt_room
from hf_genrec.errors import RecipeError
from hf_genrec.evaluation.evaluator import training_counts
from hf_genrec.recipes.stages.causal_lm import options_of, trainer_config
from hf_genrec.recipes.stages.context import MethodResult, TrainingJob
from hf_genrec.recipes.stages.preference_checks import (
    FEEDBACK,
    check_grpo,
    check_iterative_preference,
    check_softmax_dpo,
    chosen_rows,
    pairs_path,
)

_REWARD_EPOCHS, _REWARD_LEARNING_RATE, _REWARD_BATCH = 3, 5e-3, 256


def softmax_dpo(
    job: TrainingJob,
    *,
    num_negatives: int = 3,
    negatives: str = "random",
    shared: list[int] | None = None,
    beta: float = 1.0,
    sft_weight: float = 0.0,
    pairs: int | None = None,
    targets: str = "all",
    batches_of_beams: int = 64,
    feedback_column: str | None = None,
    liked: float | None = None,
    disliked: float | None = None,
) -> MethodResult:
    """S-DPO (arXiv 2406.09215): what users chose next against items that they did not; one negative is DPO.

    The pairs are kept as Parquet beside the artefact: `<output_dir>-pairs.parquet`, of a stage
    `<output_dir>-stage-N-pairs.parquet`.

    Args:
        num_negatives: K.
        negatives: "random", "popularity", "beam" (the model's own best answers), "prefix" (`shared` leading codes), "self_play"
            (the model's own best answers of `shared` leading codes) or "feedback" (what the user rated low).
        shared: least and most leading codes in common with the chosen item, for "beam", "prefix" and "self_play".
        beta: pull towards the reference, the model as it comes.
        sft_weight: weight of the next-token loss of the chosen answer.
        pairs: a random part of about so many pairs; default all.
        targets: "all", or "last": the newest item of each user alone.
        batches_of_beams: users searched together for "beam" and "self_play".
        feedback_column: "feedback": column of the data (`data.extra_columns`) that says what users liked; default "rating".
        liked: "feedback": chosen items have a value of at least so much; default 4.
        disliked: "feedback": rejected items have a value below; default `liked`.
    """
    given: dict[str, Any] = {"feedback_column": feedback_column, "liked": liked, "disliked": disliked}
    check_softmax_dpo(job, {"negatives": negatives, "shared": shared, **given})
    split, tokenizer = job.context.split, job.tokenizer
    rows, held_out, rejected = chosen_rows(job.context.data, split, negatives, targets, **given)
    window = _window(job)
    rows = part_of_rows(rows, pairs, job.args.seed, window=window)
    sampler = named_sampler(
        negatives,
        tokenizer,
        training_counts(split.train, job.context.num_items),
        seed=job.args.seed,
        shared=shared,
        num_negatives=num_negatives,
        model=job.model,
        batch_size=batches_of_beams,
        max_history=job.args.max_history,
        rejected_by_user=rejected,
    )

    def dataset_of(rows: Any, window: int | None) -> Any:
        return item_dataset(
            make_pairs(rows, sampler, num_negatives, allow_fewer=True),
            tokenizer,
            before=getattr(tokenizer, "history_before", ""),
            after=getattr(tokenizer, "history_after", ""),
            max_history=job.args.max_history,
            max_prompt_tokens=prompt_room(job.model, tokenizer),
            answer_eos=_answer_eos(job),
            window=window,
        )

    dataset, evaluated = dataset_of(rows, window), _eval_strategy(job)
    path = pairs_path(job.args.output_dir)
    if PartialState().is_main_process:
        save_pairs(dataset, path)
    if job.context.progress:
        print(f"{len(dataset):,} preference pairs of {len(rows):,} rows, kept in {path}", flush=True)
    summary = {"method": "softmax_dpo", "pairs": len(dataset), "negatives": negatives, "beta": beta}
    summary |= {"left_out": len(rows) - len(dataset), "pairs_file": path.name}
    if job.model.config.is_encoder_decoder:
        from hf_genrec.alignment.trainers.seq2seq_preference import Seq2SeqPreferenceConfig, Seq2SeqPreferenceTrainer

        args = trainer_config(Seq2SeqPreferenceConfig, job, beta=beta, sft_weight=sft_weight, eval_strategy=evaluated)
        ranked = None if evaluated == "no" else split.validation
        trainer: Any = Seq2SeqPreferenceTrainer(job.model, None, args, dataset, ranked, processing_class=tokenizer)
        return _finished(job, trainer, summary)
    from hf_genrec.alignment.trainers.softmax_dpo import SoftmaxDPOConfig, SoftmaxDPOTrainer

    losses: dict[str, Any] = {"loss_type": ["sigmoid"]}
    if sft_weight:
        losses = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, sft_weight]}
    args = trainer_config(SoftmaxDPOConfig, job, beta=beta, eval_strategy=evaluated, max_length=None, **losses)
    asked = (
        None if evaluated == "no" else dataset_of(part_of_rows(with_history(held_out), job.args.eval_users, 0), None)
    )
    trainer = SoftmaxDPOTrainer(
        _adapted(job), None, args, train_dataset=dataset, eval_dataset=asked, processing_class=tokenizer
    )
    return _finished(job, trainer, summary)


def grpo(
    job: TrainingJob,
    *,
    reward: str | dict[str, float] = "rule_and_rank",
    reward_features: str | None = None,
    num_generations: int = 16,
    beta: float = 1e-3,
    rollouts: str = "beam",
    add_target: bool = False,
    logprobs: str | None = None,
    sft_weight: float = 0.0,
    prompts: int | None = None,
    targets: str = "all",
) -> MethodResult:
    """GRPO whose rollouts are catalogue items, always (MiniOneRec's rewards).

    Args:
        reward: "rule" (the target 1, else 0), "rank" (misses cost more the higher they stand), "rule_and_rank",
            "semantic" (cosine of the vectors of `reward_features`), "collaborative" (scores of a SASRec), or a mapping of
            these to weights.
        reward_features: block of the recipe's features.
        num_generations: rollouts of a prompt.
        beta: weight of the KL term.
        rollouts: "beam", or "sample" (without replacement).
        add_target: put the target into groups that miss it.
        logprobs: "full", "level" or "legal": the softmax of the loss (language models); default the one of the search.
        sft_weight: weight of the next-token loss of the targets (encoder-decoders).
        prompts: a random part of so many prompts; default all.
        targets: "all", or "last".
    """
    from hf_genrec.alignment.rollouts import item_prompts

    check_grpo(job, {"reward": reward, "sft_weight": sft_weight, "logprobs": logprobs})
    split, tokenizer, evaluated = job.context.split, job.tokenizer, _eval_strategy(job)
    rows = part_of_rows(next_items(split.train, targets=targets), prompts, job.args.seed)  # type: ignore[arg-type]
    limits = {"max_history": job.args.max_history, "max_prompt_tokens": prompt_room(job.model, tokenizer)}
    dataset = item_prompts(rows, tokenizer, **limits)
    function = _reward(job, reward, reward_features)
    shared: dict[str, Any] = {"num_generations": num_generations, "beta": beta, "rollouts": rollouts}
    shared["add_target"] = add_target
    summary = {"method": "grpo", "prompts": len(dataset), "reward": reward, "num_generations": num_generations}
    if job.model.config.is_encoder_decoder:
        from hf_genrec.alignment.trainers.seq2seq_grpo import Seq2SeqGRPOConfig, Seq2SeqGRPOTrainer

        args = trainer_config(Seq2SeqGRPOConfig, job, sft_weight=sft_weight, eval_strategy=evaluated, **shared)
        ranked = None if evaluated == "no" else split.validation
        trainer: Any = Seq2SeqGRPOTrainer(job.model, function, args, dataset, ranked, processing_class=tokenizer)
        return _finished(job, trainer, summary)
    from hf_genrec.alignment.trainers.item_grpo import ItemGRPOConfig, ItemGRPOTrainer

    rows_per_step = job.args.per_device_train_batch_size * job.args.gradient_accumulation_steps
    if rows_per_step % num_generations:
        raise RecipeError(
            f"grpo: per_device_train_batch_size x gradient_accumulation_steps is {rows_per_step} rollouts, which is no multiple "
            f"of num_generations {num_generations}: change one of them."
        )
    asked = None
    if evaluated != "no":
        held_out = part_of_rows(with_history(split.validation), job.args.eval_users, 0)
        asked = item_prompts(held_out, tokenizer, **limits)
        if "per_device_eval_batch_size" not in job.recipe.training:  # rollouts, as in training
            shared["per_device_eval_batch_size"] = num_generations
    eos = _answer_eos(job)
    args = trainer_config(ItemGRPOConfig, job, logprobs=logprobs, answer_eos=eos, eval_strategy=evaluated, **shared)
    trainer = ItemGRPOTrainer(_adapted(job), function, args, dataset, asked, processing_class=tokenizer)
    return _finished(job, trainer, summary)


def iterative_preference(
    job: TrainingJob,
    *,
    iterations: int = 2,
    share: float = 0.1,
    num_candidates: int = 32,
    beta: float = 0.1,
    ntp_weight: float = 1.0,
    dpo_weight: float = 1.0,
    requests: int | None = 2000,
    max_drop: float = 0.2,
    targets: str = "all",
    pairs: str = "reward",
    reward: str | None = None,
    feedback: dict[str, float] | None = None,
    num_negatives: int | None = None,
) -> MethodResult:
    """Preferences in rounds: OneRec's by a reward (arXiv 2502.18965), or Align3GR's prefix self-play (arXiv 2511.11255).

    Args:
        iterations: rounds, each against the model of the round before; a time budget is shared out among them.
        share: part of the requests that gets a pair.
        num_candidates: beams of a request.
        beta, ntp_weight, dpo_weight: of the loss, see `IterativePreferenceTrainer`.
        requests: drawn for the next-token loss in each round.
        max_drop: largest loss of validation NDCG@10, as a part of it; more stops the run.
        targets: "all", or "last".
        pairs: "reward", the model's own best answer against its worst; or "self_play", the target against the model's own
            answers that share no code with it, then some, then all but one, from round to round.
        reward: of "reward": "collaborative" (scores of a SASRec, the default) or "feedback" (towers trained on `feedback`).
        feedback: columns of the data (`data.extra_columns`) and the least value that counts as a yes; default {rating: 4}.
        num_negatives: rejected items of a pair of "self_play"; default 20, as in the paper.
    """
    from hf_genrec.alignment.self_preference import RewardPairs, SampledPairs, self_play_stages
    from hf_genrec.alignment.trainers.iterative_preference import IterativePreferenceTrainer
    from hf_genrec.alignment.trainers.mixed_preference import MixedPreferenceConfig, Seq2SeqMixedPreferenceConfig

    given = {"pairs": pairs, "reward": reward, "feedback": feedback, "num_negatives": num_negatives}
    check_iterative_preference(job, given)
    split, tokenizer, model = job.context.split, job.tokenizer, job.model
    maker: Any
    if pairs == "self_play":
        stages = self_play_stages(
            tokenizer, num_beams=num_candidates, max_history=job.args.max_history, seed=job.args.seed
        )
        maker = SampledPairs(stages, num_negatives=num_negatives or 20, share=share, seed=job.args.seed)
    else:
        maker = RewardPairs(
            _item_reward(job, reward or "collaborative", feedback),
            num_candidates=num_candidates,
            share=share,
            max_history=job.args.max_history,
            seed=job.args.seed,
        )
    weights: dict[str, Any] = {"beta": beta, "ntp_weight": ntp_weight, "dpo_weight": dpo_weight, "eval_strategy": "no"}
    if job.args.max_train_seconds is not None:  # of the stage; every round is a training of its own
        weights["max_train_seconds"] = job.args.max_train_seconds / iterations
    seq2seq = model.config.is_encoder_decoder
    args = trainer_config(Seq2SeqMixedPreferenceConfig if seq2seq else MixedPreferenceConfig, job, **weights)
    trained = model if seq2seq else _adapted(job)
    driver = IterativePreferenceTrainer(
        trained,
        tokenizer,
        next_items(split.train, targets=targets),  # type: ignore[arg-type]
        maker,
        args,
        iterations=iterations,
        validation=split.validation,
        max_drop=max_drop,
        requests_per_iteration=requests,
        max_history=job.args.max_history,
        answer_eos=_answer_eos(job),
        train_counts=training_counts(split.train, job.context.num_items),
    )
    result = driver.train(resume=job.resume)
    summary = {"method": "iterative_preference", "iterations": result.history, "stopped": result.stopped or None}
    return MethodResult(_plain(trained), tokenizer, summary)


# ------------------------------------------------------------------------------------------------------------- shared


def with_history(rows: Any) -> Any:
    """The rows of new users left out: a prompt needs a history."""
    return rows.take(rows.histories.lengths > 0)


def _eval_strategy(job: TrainingJob) -> str:
    """When a stage evaluates: as the recipe says, and without a word not at all (a run in stages ranks after each)."""
    return str(job.recipe.training.get("eval_strategy") or "no")


def _answer_eos(job: TrainingJob) -> bool:
    """Do answers end with the end token, as they were trained to?"""
    return not job.model.config.is_encoder_decoder and bool(options_of(job.recipe).end_items)


def part_of_rows(rows: Any, count: int | None, seed: int, *, window: int | None = None) -> Any:
    """A random part of an `EvaluationSet`, in its order; all of it for None; with `window` whole windows of users."""
    if count is None or count >= len(rows):
        return rows
    rng = np.random.default_rng(seed)
    if window is None:
        return rows.take(np.sort(rng.permutation(len(rows))[:count]))
    _, numbers = cut_at_windows(rows.histories, rows.users, window)
    drawn = rng.permutation(int(numbers[-1]) + 1)
    taken = drawn[np.cumsum(np.bincount(numbers)[drawn]) <= count]
    return rows.take(np.isin(numbers, taken if len(taken) else drawn[:1]))


def _window(job: TrainingJob) -> int | None:
    """Items of a window whose pairs share a pass: for language models trained on windows."""
    if job.model.config.is_encoder_decoder or getattr(job.tokenizer, "history_after", ""):
        return None
    return job.args.max_history if options_of(job.recipe).windows else None


def _adapted(job: TrainingJob) -> Any:
    """The language model, with fresh adapters where the recipe asks for them."""
    from hf_genrec.alignment.adapters import item_lora

    lora = options_of(job.recipe).lora
    return job.model if lora is None else item_lora(job.model, job.tokenizer, **lora)


def _plain(model: Any) -> Any:
    from hf_genrec.alignment.adapters import merge_item_lora

    return merge_item_lora(model).eval()


def _finished(job: TrainingJob, trainer: Any, summary: dict[str, Any]) -> MethodResult:
    output = trainer.train(resume_from_checkpoint=job.resume or None)
    model = _plain(trainer.accelerator.unwrap_model(trainer.model))
    numbers = {"steps": int(output.global_step), "train_loss": float(output.training_loss)}
    return MethodResult(model, job.tokenizer, summary | numbers)


def _item_reward(job: TrainingJob, name: str, feedback: dict[str, float] | None) -> Any:
    """The reward of an iteration: a SASRec's scores, or OneRec's towers trained on the feedback of the training part."""
    from hf_genrec.alignment.reward_model import FeedbackRows, ItemRewardModel, train_reward_model
    from hf_genrec.alignment.rewards import CollaborativeReward

    if name == "collaborative":
        return CollaborativeReward(_sasrec_scores(job))
    train, count = job.context.split.train, job.context.num_items
    labels = {}
    for column, bound in (feedback or FEEDBACK).items():
        values = training_values(job.context.data, column, train)
        labels[column] = np.where(np.isnan(values), np.nan, values >= bound)
    torch.manual_seed(job.args.seed)
    model = ItemRewardModel(count, list(labels), max_history=job.args.max_history)
    args = TrainingArguments(
        output_dir=str(Path(str(job.args.output_dir)) / "reward"),
        num_train_epochs=_REWARD_EPOCHS,
        learning_rate=_REWARD_LEARNING_RATE,
        per_device_train_batch_size=_REWARD_BATCH,
        save_strategy="no",
        report_to="none",
        seed=job.args.seed,
        use_cpu=job.args.use_cpu,
        disable_tqdm=job.args.disable_tqdm,
    )
    train_reward_model(model, FeedbackRows(train, labels, count, num_negatives=4, seed=job.args.seed), args)
    return model


def _reward(job: TrainingJob, name: str | dict[str, float], features: str | None) -> Any:
    from hf_genrec.alignment import rewards

    tokenizer = job.tokenizer
    if isinstance(name, dict):
        parts = [(float(weight), _reward(job, one, features)) for one, weight in name.items()]
        return rewards.WeightedReward(parts, tokenizer=tokenizer)
    if name == "semantic":
        block = job.context.blocks.get(features or next(iter(job.context.blocks), ""))
        if block is None:
            raise RecipeError(
                f"training.method_options.reward_features: {features!r} is no block of this recipe's features."
            )
        return rewards.SemanticReward(block.symmetric, tokenizer=tokenizer)
    if name == "collaborative":
        return rewards.CollaborativeReward(_sasrec_scores(job), tokenizer=tokenizer)
    made: dict[str, Any] = {
        "rule": rewards.RuleReward,
        "rank": rewards.RankReward,
        "rule_and_rank": rewards.rule_and_rank,
    }
    return made[name](tokenizer=tokenizer)


def _sasrec_scores(job: TrainingJob) -> Any:
    """Scores (B, N) of a SASRec trained on the training rows."""
    from hf_genrec.alignment.rewards import model_scores
    from hf_genrec.recipes.stages.features import trained_sasrec

    model, tokenizer = trained_sasrec(job.context)
    return model_scores(model, tokenizer)
