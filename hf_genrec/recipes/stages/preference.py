"""Training methods that align a trained recommender with preferences: S-DPO, GRPO, OneRec's iterations.

For language models with item tokens and for encoder-decoders alike; both come here trained (see the method "stages").
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hf_genrec.alignment.negatives import NEGATIVES, named_sampler
from hf_genrec.alignment.pair_datasets import cut_at_windows, item_dataset
from hf_genrec.alignment.pairs import make_pairs, next_items
from hf_genrec.errors import RecipeError
from hf_genrec.evaluation.evaluator import training_counts
from hf_genrec.recipes.stages.causal_lm import options_of, trainer_config
from hf_genrec.recipes.stages.context import MethodResult, TrainingJob

REWARDS = ("rule", "rank", "rule_and_rank", "semantic", "collaborative")


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
) -> MethodResult:
    """S-DPO (arXiv 2406.09215): what users chose next against items that they did not; one negative is DPO.

    Args:
        num_negatives: K.
        negatives: "random", "popularity", "beam" (the model's own best answers) or "prefix" (`shared` leading codes).
        shared: least and most leading codes in common with the chosen item, for "beam" and "prefix".
        beta: pull towards the reference, the model as it comes.
        sft_weight: weight of the next-token loss of the chosen answer.
        pairs: a random part of about so many pairs; default all.
        targets: "all", or "last": the newest item of each user alone.
        batches_of_beams: users searched together for "beam".
    """
    if negatives not in NEGATIVES:
        raise RecipeError(f"training.method_options.negatives: {negatives!r}: choose one of {', '.join(NEGATIVES)}.")
    split, tokenizer = job.context.split, job.tokenizer
    rows = next_items(split.train, targets=targets)  # type: ignore[arg-type]
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
    )
    made = make_pairs(rows, sampler, num_negatives, allow_fewer=True)
    dataset = item_dataset(
        made,
        tokenizer,
        before=getattr(tokenizer, "history_before", ""),
        after=getattr(tokenizer, "history_after", ""),
        max_history=job.args.max_history,
        window=window,
    )
    summary = {"method": "softmax_dpo", "pairs": len(dataset), "negatives": negatives, "beta": beta}
    if job.model.config.is_encoder_decoder:
        from hf_genrec.alignment.trainers.seq2seq_preference import Seq2SeqPreferenceConfig, Seq2SeqPreferenceTrainer

        args = trainer_config(Seq2SeqPreferenceConfig, job, beta=beta, sft_weight=sft_weight, eval_strategy="no")
        trainer: Any = Seq2SeqPreferenceTrainer(job.model, None, args, dataset, processing_class=tokenizer)
        return _finished(job, trainer, summary)
    from hf_genrec.alignment.trainers.softmax_dpo import SoftmaxDPOConfig, SoftmaxDPOTrainer

    losses: dict[str, Any] = {"loss_type": ["sigmoid"]}
    if sft_weight:
        losses = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, sft_weight]}
    args = trainer_config(SoftmaxDPOConfig, job, beta=beta, eval_strategy="no", max_length=None, **losses)
    trainer = SoftmaxDPOTrainer(_adapted(job), None, args, train_dataset=dataset, processing_class=tokenizer)
    return _finished(job, trainer, summary)


def grpo(
    job: TrainingJob,
    *,
    reward: str = "rule_and_rank",
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
            "semantic" (cosine of the vectors of `reward_features`) or "collaborative" (scores of a SASRec).
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

    split, tokenizer = job.context.split, job.tokenizer
    rows = part_of_rows(next_items(split.train, targets=targets), prompts, job.args.seed)  # type: ignore[arg-type]
    dataset = item_prompts(rows, tokenizer, max_history=job.args.max_history)
    function = _reward(job, reward, reward_features)
    shared = {"num_generations": num_generations, "beta": beta, "rollouts": rollouts, "add_target": add_target}
    summary = {"method": "grpo", "prompts": len(dataset), "reward": reward, "num_generations": num_generations}
    if job.model.config.is_encoder_decoder:
        from hf_genrec.alignment.trainers.seq2seq_grpo import Seq2SeqGRPOConfig, Seq2SeqGRPOTrainer

        args = trainer_config(Seq2SeqGRPOConfig, job, sft_weight=sft_weight, eval_strategy="no", **shared)
        trainer: Any = Seq2SeqGRPOTrainer(job.model, function, args, dataset, processing_class=tokenizer)
        return _finished(job, trainer, summary)
    from hf_genrec.alignment.trainers.item_grpo import ItemGRPOConfig, ItemGRPOTrainer

    rows_per_step = job.args.per_device_train_batch_size * job.args.gradient_accumulation_steps
    if rows_per_step % num_generations:
        raise RecipeError(
            f"grpo: per_device_train_batch_size x gradient_accumulation_steps is {rows_per_step} rollouts, which is no multiple "
            f"of num_generations {num_generations}: change one of them."
        )
    eos = bool(getattr(options_of(job.recipe), "end_items", False))
    args = trainer_config(ItemGRPOConfig, job, logprobs=logprobs, answer_eos=eos, eval_strategy="no", **shared)
    trainer = ItemGRPOTrainer(_adapted(job), function, args, dataset, processing_class=tokenizer)
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
) -> MethodResult:
    """OneRec's iterative preference alignment (arXiv 2502.18965) with the scores of a SASRec as reward.

    Args:
        iterations: rounds, each against the model of the round before; a time budget is shared out among them.
        share: part of the requests that gets a pair of the model's own best and worst answers.
        num_candidates: beams of a request.
        beta, ntp_weight, dpo_weight: of the loss, see `IterativePreferenceTrainer`.
        requests: drawn for the next-token loss in each round.
        max_drop: largest loss of validation NDCG@10, as a part of it; more stops the run.
        targets: "all", or "last".
    """
    from hf_genrec.alignment.rewards import CollaborativeReward
    from hf_genrec.alignment.self_preference import RewardPairs
    from hf_genrec.alignment.trainers.iterative_preference import IterativePreferenceTrainer
    from hf_genrec.alignment.trainers.mixed_preference import MixedPreferenceConfig, Seq2SeqMixedPreferenceConfig

    split, tokenizer, model = job.context.split, job.tokenizer, job.model
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
        RewardPairs(
            CollaborativeReward(_sasrec_scores(job)),
            num_candidates=num_candidates,
            share=share,
            max_history=job.args.max_history,
            seed=job.args.seed,
        ),
        args,
        iterations=iterations,
        validation=split.validation,
        max_drop=max_drop,
        requests_per_iteration=requests,
        max_history=job.args.max_history,
        train_counts=training_counts(split.train, job.context.num_items),
    )
    result = driver.train(resume=job.resume)
    summary = {"method": "iterative_preference", "iterations": result.history, "stopped": result.stopped or None}
    return MethodResult(_plain(trained), tokenizer, summary)


# ------------------------------------------------------------------------------------------------------------- shared


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


def _reward(job: TrainingJob, name: str, features: str | None) -> Any:
    from hf_genrec.alignment import rewards

    tokenizer = job.tokenizer
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
    if name not in made:
        raise RecipeError(f"training.method_options.reward: {name!r}: choose one of {', '.join(REWARDS)}.")
    return made[name](tokenizer=tokenizer)


def _sasrec_scores(job: TrainingJob) -> Any:
    """Scores (B, N) of a SASRec trained on the training rows."""
    from hf_genrec.alignment.rewards import model_scores
    from hf_genrec.recipes.stages.features import trained_sasrec

    model, tokenizer = trained_sasrec(job.context)
    return model_scores(model, tokenizer)
