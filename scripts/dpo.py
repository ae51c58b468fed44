r"""Teach a recommender what users chose and what they did not: DPO and S-DPO (arXiv 2406.09215), several negatives a pair.

    python scripts/dpo.py --config examples/configs/dpo_smollm2.yaml --model runs/sft --dataset movielens-100k
    python scripts/dpo.py --config examples/configs/dpo_t5.yaml --model runs/tiger --dataset movielens-100k
    python scripts/dpo.py --model runs/sft --output_dir runs/dpo --negatives beam --num_negatives 7 --beta 1.0
    python scripts/dpo.py --model runs/sft --output_dir runs/dpo --negatives feedback --feedback_column rating --liked 4

Starts from an artefact folder that scripts/sft.py or `genrec train` wrote: a causal language model (options of
SoftmaxDPOConfig and LoRA) or an encoder-decoder such as TIGER (options of Seq2SeqPreferenceConfig; `--model FOLDER --help`
shows them). Data, filters and split are those of the artefact where nothing else is said. The result is an artefact of the
same kind; metrics.json compares head, tail and cold items before and after, and a warning says which got worse.

Negatives: random, popularity, beam (the model's own best answers), prefix (items of --shared leading codes), self_play (the
model's own best answers of --shared leading codes) or feedback (items that the user rated low; chosen are those rated high).
The pairs stay in <output_dir>-pairs.parquet (--pairs_file FILE for another place): TRL's columns prompt, chosen, rejected,
their token ids, and the item ids. --title_pairs FILE writes the same pairs as titles, for other language models.

Checkpoints go to <output_dir>-checkpoints and are removed after the save; --resume_from_checkpoint true goes on after an
interruption. --push_to_hub true --hub_model_id owner/name uploads the artefact.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_genrec.alignment.negatives import NEGATIVES, PREFIX_NEGATIVES, named_sampler
from hf_genrec.alignment.pair_datasets import item_dataset, load_pairs, save_pairs, text_dataset
from hf_genrec.alignment.pairs import make_pairs
from hf_genrec.alignment.trainers.language_model import prompt_room
from hf_genrec.alignment.trainers.seq2seq_preference import Seq2SeqPreferenceConfig, Seq2SeqPreferenceTrainer
from hf_genrec.alignment.trainers.softmax_dpo import SoftmaxDPOConfig, SoftmaxDPOTrainer
from hf_genrec.cli.script_options import DataArguments, LoraArguments, parse, run_script
from hf_genrec.cli.script_record import as_recipe, checked_record, start_recipe, with_stage
from hf_genrec.cli.script_run import ScriptRun
from hf_genrec.cli.script_start import data_of, ends_items, kept_quantizer, open_start, start_facts
from hf_genrec.errors import RequestError
from hf_genrec.evaluation.evaluator import training_counts
from hf_genrec.generation.recommend import recommendation_config_of
from hf_genrec.recipes.stages.preference import part_of_rows, with_history
from hf_genrec.recipes.stages.preference_checks import FEEDBACK_COLUMN, chosen_rows, pairs_path


@dataclass
class ScriptArguments:
    """The artefact to start from, and the pairs."""

    model: str | None = field(default=None, metadata={"help": "Artefact folder to start from, or its Hub id."})
    negatives: str = field(
        default="random",
        metadata={"help": "Rejected items: beam = the model's own answers.", "choices": list(NEGATIVES)},
    )
    num_negatives: int = field(default=3, metadata={"help": "Rejected items of a pair; 1 is DPO."})
    shared: list[int] | None = field(
        default=None,
        metadata={"help": "prefix, self_play, beam: least and most leading codes in common with the chosen item."},
    )
    targets: str = field(
        default="all",
        metadata={"help": "Pairs for all training items, or each user's last.", "choices": ["all", "last"]},
    )
    num_pairs: int | None = field(default=None, metadata={"help": "A random part of so many pairs; default all."})
    feedback_column: str | None = field(
        default=None, metadata={"help": "feedback: column of the log with ratings or the like; default rating."}
    )
    liked: float | None = field(
        default=None, metadata={"help": "feedback: chosen items have a value of at least so much; default 4."}
    )
    disliked: float | None = field(
        default=None, metadata={"help": "feedback: rejected items have a value below; default --liked."}
    )
    pairs_file: str | None = field(
        default=None, metadata={"help": "Parquet file of the pairs, kept; default <output_dir>-pairs.parquet."}
    )
    title_pairs: str | None = field(
        default=None,
        metadata={"help": "Also write the pairs as titles, for language models without item tokens: Parquet file."},
    )

    def __post_init__(self) -> None:
        for name, value in self.feedback.items():
            if value is not None and self.negatives != "feedback":
                raise RequestError(f"--{name} belongs to --negatives feedback, not {self.negatives}: leave it out.")
        if self.shared is not None and self.negatives not in PREFIX_NEGATIVES:
            raise RequestError(
                f"--shared has no effect on {self.negatives} negatives: leave it out, or choose one of "
                f"{', '.join(PREFIX_NEGATIVES)}."
            )

    @property
    def feedback(self) -> dict[str, Any]:
        """The options of feedback."""
        return {"feedback_column": self.feedback_column, "liked": self.liked, "disliked": self.disliked}


@dataclass
class HistoryArguments:
    """What prompts of a causal language model hold."""

    max_history: int | None = field(
        default=None, metadata={"help": "Newest items of a prompt; default: the artefact's."}
    )
    answer_eos: bool | None = field(
        default=None,
        metadata={"help": "Answers end with the end token; default: as the artefact was trained (end_items)."},
    )
    window: int | None = field(
        default=None,
        metadata={"help": "Cut histories at every so many items: the pairs of a window share a pass."},
    )


def main(script: ScriptArguments, data_args: DataArguments, *groups: Any) -> dict[str, Any] | None:
    """Artefact, pairs, training, ranking before and after, artefact. Returns metrics.json's content (main process only).

    Args:
        groups: HistoryArguments, LoraArguments and SoftmaxDPOConfig for a causal language model, Seq2SeqPreferenceConfig
            alone for an encoder-decoder.
    """
    args = groups[-1]
    run = ScriptRun.begin(args, data_args)
    start = open_start(script.model)
    model, tokenizer = start.model, start.tokenizer
    seq2seq = bool(model.config.is_encoder_decoder)
    if seq2seq != isinstance(args, Seq2SeqPreferenceConfig):
        raise RequestError(f"{script.model} needs the other kind of options: parse the line with parse_line.")
    history = args if seq2seq else groups[0]
    config = recommendation_config_of(model).merged(num_beams=data_args.test_num_beams, max_history=history.max_history)
    model.recommendation_config = config

    with run.stage("data"):
        columns = [script.feedback_column or FEEDBACK_COLUMN] if script.negatives == "feedback" else []
        data, split, section = data_of(start, data_args, columns)
        run.say(data.report)

    if script.title_pairs is not None and data.items is None:
        raise RequestError("--title_pairs needs titles, and this data has no item table: give --items.")
    with run.stage("pairs"):  # once, by one process: all processes and a resumed run read the same files
        folder = Path(args.output_dir)
        rows, held_out, rejected = chosen_rows(data, split, script.negatives, script.targets, **script.feedback)
        window = None if seq2seq else history.window
        ends = not seq2seq and (ends_items(start) if history.answer_eos is None else history.answer_eos)
        parts = {"pairs": part_of_rows(rows, script.num_pairs, args.seed, window=window)}
        if not seq2seq and args.eval_strategy != "no":
            parts["eval_pairs"] = with_history(held_out)
        with args.main_process_first(desc="pairs"):
            if run.is_main and not (run.resume and all((folder / f"{name}.parquet").is_file() for name in parts)):
                sampler = named_sampler(
                    script.negatives,
                    tokenizer,
                    training_counts(split.train, tokenizer.num_items),
                    seed=args.seed,
                    shared=script.shared,
                    num_negatives=script.num_negatives,
                    model=model.to(args.device).eval(),
                    max_history=config.max_history,
                    rejected_by_user=rejected,
                )
                for name, rows in parts.items():
                    preferred = make_pairs(rows, sampler, script.num_negatives, allow_fewer=True)
                    if name == "pairs" and script.title_pairs is not None:
                        titles, names = data.items.titles(), {"item_ids": tokenizer.item_ids}
                        texts = text_dataset(preferred, titles, max_history=config.max_history, **names)
                        save_pairs(texts, Path(script.title_pairs))
                    made = item_dataset(
                        preferred,
                        tokenizer,
                        before=getattr(tokenizer, "history_before", ""),
                        after=getattr(tokenizer, "history_after", ""),
                        max_history=config.max_history,
                        max_prompt_tokens=prompt_room(model, tokenizer),
                        answer_eos=ends,
                        window=window if name == "pairs" else None,
                    )
                    save_pairs(made, folder / f"{name}.parquet")
        datasets = {name: load_pairs(folder / f"{name}.parquet") for name in parts}
        pairs = datasets["pairs"]
        kept = Path(script.pairs_file or pairs_path(args.output_dir))
        if run.is_main:
            save_pairs(pairs, kept)
        made = f"{len(pairs):,} pairs of {len(parts['pairs']):,} rows"
        run.say(f"{made} with up to {script.num_negatives} {script.negatives} negatives, kept in {kept}")

    def build(model: Any) -> Any:
        model.recommendation_config = config
        return model if seq2seq else groups[1].apply(model, tokenizer)

    trainer: Any
    if seq2seq:
        ranked = None if args.eval_strategy == "no" else split.validation
        trainer = Seq2SeqPreferenceTrainer(build(model), None, args, pairs, ranked, processing_class=tokenizer)
    else:
        trainer = SoftmaxDPOTrainer(
            build(model),
            None,
            args,
            train_dataset=pairs,
            eval_dataset=datasets.get("eval_pairs"),
            processing_class=tokenizer,
        )
    trained, summary = run.train(trainer, rebuild=lambda: build(open_start(script.model).model))
    if trained is None:
        return None
    trained.recommendation_config = config

    with run.stage("evaluation"):
        untouched = open_start(script.model).model
        untouched.recommendation_config = config
        before = run.rank(untouched, tokenizer, data, split, "before")
        reports = run.rank(trained, tokenizer, data, split, "dpo")
        run.say(reports["test"])

    options = {name: getattr(script, name) for name in ("negatives", "num_negatives", "shared", "targets")}
    options |= script.feedback | {"pairs": script.num_pairs, "beta": args.beta, "sft_weight": sft_weight_of(args)}
    options |= {} if seq2seq else {"lora": groups[1].record(), "window": window}
    stage, other = as_recipe("softmax_dpo", options, args)
    recipe = with_stage(start_recipe(start), stage, section=section, papers=["2406.09215"], config=config)
    return run.save(
        trained,
        tokenizer,
        data,
        split,
        reports,
        before,
        summary=summary
        | {"method": "softmax_dpo", **stage["options"], "pairs": len(pairs), "pairs_file": kept.name}
        | {"other_settings": other},
        recipe=checked_record(recipe),
        **kept_quantizer(start),
    )


def sft_weight_of(args: Any) -> float | None:
    """Weight of the next-token loss as a recipe says it; None where the losses are others than a recipe has."""
    if isinstance(args, Seq2SeqPreferenceConfig):
        return args.sft_weight
    losses = list(args.loss_type)
    weights = list(args.loss_weights or [1.0] * len(losses))
    if losses == ["sigmoid"]:
        return 0.0
    return float(weights[1]) if losses == ["sigmoid", "sft"] and weights[0] == 1.0 else None


def parse_line(words: list[str] | None = None) -> tuple[Any, ...]:
    """The groups of options that fit the artefact named by --model."""
    seq2seq, defaults = start_facts(words)
    if seq2seq:
        return parse((ScriptArguments, DataArguments, Seq2SeqPreferenceConfig), __doc__, words, defaults)
    kinds = (ScriptArguments, DataArguments, HistoryArguments, LoraArguments, SoftmaxDPOConfig)
    return parse(kinds, __doc__, words)


if __name__ == "__main__":
    run_script(parse_line, main)
