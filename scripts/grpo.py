r"""Teach a recommender by rewards: GRPO whose rollouts are catalogue items, always (MiniOneRec's recipe, arXiv 2510.24431).

    python scripts/grpo.py --config examples/configs/grpo_smollm2.yaml --model runs/sft --dataset movielens-100k
    python scripts/grpo.py --model runs/tiger --output_dir runs/tiger-grpo --reward rule_and_rank --num_generations 16
    python scripts/grpo.py --model runs/sft --output_dir runs/grpo --reward '{"rule": 1.0, "semantic": 0.2}'

Starts from an artefact folder that scripts/sft.py or `genrec train` wrote: a causal language model (options of
ItemGRPOConfig and LoRA) or an encoder-decoder such as TIGER (options of Seq2SeqGRPOConfig; `--model FOLDER --help` shows
them). Rewards: rule (the target earns 1), rank (misses cost more the higher they stand), rule_and_rank, semantic (cosine of
item vectors), collaborative (scores of a SASRec, or of --reward_model), or a mapping of these to weights. Data, filters and
split are those of the artefact where nothing else is said. metrics.json compares head, tail and cold items before and after.

Checkpoints go to <output_dir>-checkpoints and are removed after the save; --resume_from_checkpoint true goes on after an
interruption. --push_to_hub true --hub_model_id owner/name uploads the artefact.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hf_genrec.alignment import rewards
from hf_genrec.alignment.pairs import next_items
from hf_genrec.alignment.rollouts import item_prompts
from hf_genrec.alignment.trainers.item_grpo import ItemGRPOConfig, ItemGRPOTrainer
from hf_genrec.alignment.trainers.language_model import prompt_room
from hf_genrec.alignment.trainers.seq2seq_grpo import Seq2SeqGRPOConfig, Seq2SeqGRPOTrainer
from hf_genrec.cli.script_options import DataArguments, LoraArguments, parse, run_script
from hf_genrec.cli.script_record import as_recipe, checked_record, start_recipe, with_stage
from hf_genrec.cli.script_run import ScriptRun
from hf_genrec.cli.script_start import data_of, ends_items, kept_quantizer, open_start, start_facts
from hf_genrec.errors import IncompatibleComponentsError, RequestError
from hf_genrec.generation.recommend import recommendation_config_of
from hf_genrec.hub import load_artifact
from hf_genrec.identifiers.features_array import vectors_of_items
from hf_genrec.recipes.stages.context import StageContext
from hf_genrec.recipes.stages.features import cooccurrence_block, text_block, trained_sasrec
from hf_genrec.recipes.stages.preference import part_of_rows, with_history
from hf_genrec.recipes.stages.preference_checks import REWARDS


@dataclass
class ScriptArguments:
    """The artefact to start from, the prompts and the reward."""

    model: str | None = field(default=None, metadata={"help": "Artefact folder to start from, or its Hub id."})
    reward: dict[str, float] | str | None = field(
        default="rule_and_rank", metadata={"help": f"One of {', '.join(REWARDS)}, or a mapping of these to weights."}
    )
    item_vectors: str | None = field(
        default=None, metadata={"help": "semantic: .npy, .npz or .parquet; default item texts, else co-occurrence."}
    )
    text_encoder: str | None = field(default=None, metadata={"help": "semantic: encoder of texts; default MiniLM."})
    reward_model: str | None = field(
        default=None, metadata={"help": "collaborative: artefact of a recommender; default a SASRec trained here."}
    )
    targets: str = field(
        default="all",
        metadata={"help": "Prompts for all training items, or each user's last.", "choices": ["all", "last"]},
    )
    num_prompts: int | None = field(default=None, metadata={"help": "A random part of so many prompts; default all."})

    def __post_init__(self) -> None:
        if isinstance(self.reward, str) and self.reward.lstrip().startswith("{"):
            try:
                self.reward = json.loads(self.reward)
            except ValueError as error:
                raise RequestError(f"--reward is no JSON mapping ({error}): {self.reward}") from error
        self.weights: dict[str, float] = self.reward if isinstance(self.reward, dict) else {str(self.reward): 1.0}
        for name, weight in self.weights.items():
            if name not in REWARDS or isinstance(weight, bool) or not isinstance(weight, int | float):
                raise RequestError(f"reward {name!r}: {weight!r}: give weights of {', '.join(REWARDS)}.")


@dataclass
class HistoryArguments:
    """What prompts of a causal language model hold."""

    max_history: int | None = field(
        default=None, metadata={"help": "Newest items of a prompt; default: the artefact's."}
    )


def reward_of(script: ScriptArguments, tokenizer: Any, data: Any, split: Any, seed: int, progress: bool) -> Any:
    """The reward object that both trainers read."""
    context = StageContext(data, split, seed=seed, progress=progress)

    def one(name: str) -> Any:
        if name == "semantic":
            return rewards.SemanticReward(vectors_of(script, context), tokenizer=tokenizer)
        if name == "collaborative":
            return rewards.CollaborativeReward(scores_of(script, context), tokenizer=tokenizer)
        plain = {"rule": rewards.RuleReward, "rank": rewards.RankReward, "rule_and_rank": rewards.rule_and_rank}
        return plain[name](tokenizer=tokenizer)

    if script.weights == {next(iter(script.weights)): 1.0}:
        return one(next(iter(script.weights)))
    parts = [(float(weight), one(name)) for name, weight in script.weights.items()]
    return rewards.WeightedReward(parts, tokenizer=tokenizer)


def vectors_of(script: ScriptArguments, context: StageContext) -> np.ndarray:
    """Vectors (items, width) of a file, of the item texts, or of the co-occurrence."""
    if script.item_vectors is not None:
        return vectors_of_items(script.item_vectors, context.data.item_ids)
    block = text_block(context, encoder=script.text_encoder, when_missing="skip")
    block = block or cooccurrence_block(context, dim=min(64, context.num_items - 1))
    return block.symmetric


def scores_of(script: ScriptArguments, context: StageContext) -> Any:
    """Scores (B, items) of another recommender."""
    if script.reward_model is None:
        return rewards.model_scores(*trained_sasrec(context))
    other = load_artifact(script.reward_model)
    if other.tokenizer is None or list(getattr(other.tokenizer, "item_ids", ())) != list(context.data.item_ids):
        raise IncompatibleComponentsError(
            f"--reward_model {script.reward_model}: it has other items, or another order."
        )
    return rewards.model_scores(other.model, other.tokenizer)


def main(script: ScriptArguments, data_args: DataArguments, *groups: Any) -> dict[str, Any] | None:
    """Artefact, prompts, training, ranking before and after, artefact. Returns metrics.json's content (main process only).

    Args:
        groups: HistoryArguments, LoraArguments and ItemGRPOConfig for a causal language model, Seq2SeqGRPOConfig alone for
            an encoder-decoder.
    """
    args = groups[-1]
    run = ScriptRun.begin(args, data_args)
    progress = not args.disable_tqdm and run.is_main
    start = open_start(script.model)
    model, tokenizer = start.model, start.tokenizer
    seq2seq = bool(model.config.is_encoder_decoder)
    if seq2seq != isinstance(args, Seq2SeqGRPOConfig):
        raise RequestError(f"{script.model} needs the other kind of options: parse the line with parse_line.")
    history = args if seq2seq else groups[0]
    if not seq2seq:  # as the artefact was trained
        args.answer_eos = args.answer_eos or ends_items(start)
    config = recommendation_config_of(model).merged(num_beams=data_args.test_num_beams, max_history=history.max_history)

    with run.stage("data"):
        data, split, section = data_of(start, data_args)
        run.say(data.report)

    with run.stage("reward"):
        reward = reward_of(script, tokenizer, data, split, args.seed, progress)

    rows = part_of_rows(next_items(split.train, targets=script.targets), script.num_prompts, args.seed)
    limits = {"max_history": config.max_history, "max_prompt_tokens": prompt_room(model, tokenizer)}
    prompts = item_prompts(rows, tokenizer, **limits)
    run.say(f"{len(prompts):,} prompts, {args.num_generations} rollouts of each, reward {script.weights}")

    def build(model: Any) -> Any:
        model.recommendation_config = config
        return model if seq2seq else groups[1].apply(model, tokenizer)

    validated = args.eval_strategy != "no"
    trainer: Any
    if seq2seq:
        ranked = split.validation if validated else None
        trainer = Seq2SeqGRPOTrainer(build(model), reward, args, prompts, ranked, processing_class=tokenizer)
    else:
        asked = item_prompts(with_history(split.validation), tokenizer, **limits) if validated else None
        trainer = ItemGRPOTrainer(build(model), reward, args, prompts, asked, processing_class=tokenizer)
    trained, summary = run.train(trainer, rebuild=lambda: build(open_start(script.model).model))
    if trained is None:
        return None
    trained.recommendation_config = config

    with run.stage("evaluation"):
        untouched = open_start(script.model).model
        untouched.recommendation_config = config
        before = run.rank(untouched, tokenizer, data, split, "before")
        reports = run.rank(trained, tokenizer, data, split, "grpo")
        run.say(reports["test"])

    single = script.weights == {next(iter(script.weights)): 1.0}
    names = ("num_generations", "beta", "rollouts", "add_target", *(["sft_weight"] if seq2seq else ["logprobs"]))
    options = {name: getattr(args, name) for name in names}
    options |= {"reward": next(iter(script.weights)) if single else script.weights}
    options |= {"targets": script.targets, "prompts": script.num_prompts}
    options |= {} if seq2seq else {"lora": groups[1].record()}
    stage, other = as_recipe("grpo", options, args)
    for name in ("generation_batch_size", "max_completion_length"):  # follow from the others
        other.pop(name, None)
    if other.get("steps_per_generation") == args.gradient_accumulation_steps:
        del other["steps_per_generation"]
    recipe = with_stage(start_recipe(start), stage, section=section, papers=["2402.03300"], config=config)
    return run.save(
        trained,
        tokenizer,
        data,
        split,
        reports,
        before,
        summary=summary | {"method": "grpo", **stage["options"], "prompts": len(prompts), "other_settings": other},
        recipe=checked_record(recipe),
        **kept_quantizer(start),
    )


def parse_line(words: list[str] | None = None) -> tuple[Any, ...]:
    """The groups of options that fit the artefact named by --model."""
    seq2seq, defaults = start_facts(words)
    if seq2seq:
        return parse((ScriptArguments, DataArguments, Seq2SeqGRPOConfig), __doc__, words, defaults)
    return parse((ScriptArguments, DataArguments, HistoryArguments, LoraArguments, ItemGRPOConfig), __doc__, words)


if __name__ == "__main__":
    run_script(parse_line, main)
