r"""Teach a recommender what users chose and what they did not: DPO and S-DPO (arXiv 2406.09215), several negatives a pair.

    python scripts/dpo.py --config examples/configs/dpo_smollm2.yaml --model runs/sft --dataset movielens-100k
    python scripts/dpo.py --config examples/configs/dpo_t5.yaml --model runs/tiger --dataset movielens-100k
    python scripts/dpo.py --model runs/sft --output_dir runs/dpo --negatives beam --num_negatives 7 --beta 1.0

Starts from an artefact folder that scripts/sft.py or `genrec train` wrote: a causal language model (options of
SoftmaxDPOConfig and LoRA) or an encoder-decoder such as TIGER (options of Seq2SeqPreferenceConfig; `--model FOLDER --help`
shows them). Data, filters and split are those of the artefact where nothing else is said. The result is an artefact of the
same kind; metrics.json compares head, tail and cold items before and after, and a warning says which got worse.

Checkpoints go to <output_dir>-checkpoints and are removed after the save; --resume_from_checkpoint true goes on after an
interruption. --push_to_hub true --hub_model_id owner/name uploads the artefact.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_genrec.alignment.negatives import NEGATIVES, named_sampler
from hf_genrec.alignment.pair_datasets import item_dataset, load_pairs, save_pairs
from hf_genrec.alignment.pairs import make_pairs, next_items
from hf_genrec.alignment.trainers.seq2seq_preference import Seq2SeqPreferenceConfig, Seq2SeqPreferenceTrainer
from hf_genrec.alignment.trainers.softmax_dpo import SoftmaxDPOConfig, SoftmaxDPOTrainer
from hf_genrec.cli.script_options import DataArguments, LoraArguments, parse, run_script
from hf_genrec.cli.script_run import ScriptRun
from hf_genrec.cli.script_start import data_of, kept_quantizer, open_start, recorded, start_facts, with_stage
from hf_genrec.errors import RequestError
from hf_genrec.evaluation.evaluator import training_counts
from hf_genrec.generation.recommend import recommendation_config_of
from hf_genrec.recipes.stages.preference import part_of_rows


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
        default=None, metadata={"help": "prefix, beam: least and most leading codes in common with the chosen item."}
    )
    targets: str = field(
        default="all",
        metadata={"help": "Pairs for all training items, or each user's last.", "choices": ["all", "last"]},
    )
    num_pairs: int | None = field(default=None, metadata={"help": "A random part of so many pairs; default all."})


@dataclass
class HistoryArguments:
    """What prompts of a causal language model hold."""

    max_history: int | None = field(
        default=None, metadata={"help": "Newest items of a prompt; default: the artefact's."}
    )
    answer_eos: bool = field(
        default=False, metadata={"help": "Answers end with the end token, for artefacts trained with end_items."}
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
        data, split, section = data_of(start, data_args)
        run.say(data.report)

    with run.stage("pairs"):  # once, by one process: all processes and a resumed run read the same files
        folder = Path(args.output_dir)
        rows, window = next_items(split.train, targets=script.targets), None if seq2seq else history.window
        parts = {"pairs": part_of_rows(rows, script.num_pairs, args.seed, window=window)}
        if not seq2seq and args.eval_strategy != "no":
            parts["eval_pairs"] = split.validation
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
                )
                for name, rows in parts.items():
                    made = item_dataset(
                        make_pairs(rows, sampler, script.num_negatives, allow_fewer=True),
                        tokenizer,
                        before=getattr(tokenizer, "history_before", ""),
                        after=getattr(tokenizer, "history_after", ""),
                        max_history=config.max_history,
                        answer_eos=not seq2seq and history.answer_eos,
                        window=window if name == "pairs" else None,
                    )
                    save_pairs(made, folder / f"{name}.parquet")
        datasets = {name: load_pairs(folder / f"{name}.parquet") for name in parts}
        pairs = datasets["pairs"]
        run.say(f"{len(pairs):,} pairs with up to {script.num_negatives} {script.negatives} negatives")

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

    options = {name: getattr(script, name) for name in ("negatives", "num_negatives", "shared", "targets", "num_pairs")}
    options |= {"lora": None} if seq2seq else {"lora": groups[1].record(), "window": window}
    stage = {"method": "softmax_dpo", "options": options, "training": recorded(args)}
    return run.save(
        trained,
        tokenizer,
        data,
        split,
        reports,
        before,
        summary=summary | {"method": "softmax_dpo", "pairs": len(pairs), **options},
        recipe=with_stage(start.recipe, stage, section=section, papers=["2406.09215"]),
        **kept_quantizer(start),
    )


def parse_line(words: list[str] | None = None) -> tuple[Any, ...]:
    """The groups of options that fit the artefact named by --model."""
    seq2seq, defaults = start_facts(words)
    if seq2seq:
        return parse((ScriptArguments, DataArguments, Seq2SeqPreferenceConfig), __doc__, words, defaults)
    kinds = (ScriptArguments, DataArguments, HistoryArguments, LoraArguments, SoftmaxDPOConfig)
    return parse(kinds, __doc__, words)


if __name__ == "__main__":
    run_script(parse_line, main)
