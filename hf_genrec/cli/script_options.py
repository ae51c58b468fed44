"""Options of scripts/sft.py, dpo.py and grpo.py: dataclasses, filled from `--config FILE.yaml` and the command line.

TRL's TrlParser reads them; here unknown options are named with the nearest one, and --help shows what matters.
"""

from __future__ import annotations

import argparse
import copy
import difflib
import logging
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from trl import TrlParser

from hf_genrec.errors import GenRecError, RequestError

# Options of transformers.TrainingArguments that --help shows beside ours; all others are understood too.
COMMON_OPTIONS = {
    "help", "output_dir", "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps",
    "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "seed", "bf16", "logging_steps",
    "eval_strategy", "eval_steps", "save_strategy", "save_steps", "save_total_limit", "load_best_model_at_end",
    "resume_from_checkpoint", "use_cpu", "disable_tqdm", "gradient_checkpointing", "push_to_hub", "hub_model_id",
    "hub_private_repo", "beta", "loss_type", "loss_weights", "num_generations", "max_length",
}  # fmt: skip


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the examples as they are written, shows defaults, and one spelling of each option."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        shown = copy.copy(action)
        shown.option_strings = [word for word in action.option_strings if "-" not in word.lstrip("-")]
        return super()._format_action_invocation(shown if shown.option_strings else action)


@dataclass
class DataArguments:
    """Which data, which part of it is ranked, and what is kept."""

    dataset: str | None = field(
        default=None, metadata={"help": "Named data set (movielens-100k ...) or path of a log."}
    )
    items: str | None = field(default=None, metadata={"help": "Item table (item_id, title, ...) beside the log."})
    data_dir: str | None = field(default=None, metadata={"help": "Folder of the named data sets (or HF_GENREC_DATA)."})
    protocol: str | None = field(
        default=None, metadata={"help": "leave_one_out or global_time; default: the artefact's, else leave_one_out."}
    )
    extra_columns: list[str] | None = field(
        default=None, metadata={"help": "Columns of the log that tasks read (rating, review, query ...)."}
    )
    min_user: int | None = field(default=None, metadata={"help": "Drop users with fewer interactions."})
    min_item: int | None = field(default=None, metadata={"help": "Drop items with fewer interactions."})
    test_num_beams: int | None = field(
        default=None, metadata={"help": "Width of the search, saved with the model; default: the artefact's, else 20."}
    )
    test_users: int | None = field(
        default=None, metadata={"help": "Rank only so many users of validation and test (noted in metrics.json)."}
    )
    keep_checkpoints: bool = field(default=False, metadata={"help": "Keep <output_dir>-checkpoints after the save."})


@dataclass
class LoraArguments:
    """Small updates of the language model; the rows of the item tokens always train."""

    lora_r: int = field(default=16, metadata={"help": "Rank of LoRA; 0: all weights train."})
    lora_alpha: float = field(default=32.0, metadata={"help": "lora_alpha / lora_r multiplies the update."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout before the adapters."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Names of linear layers; default: all but the head."}
    )

    def apply(self, model: Any, tokenizer: Any) -> Any:
        """The model with fresh adapters, or as it is for a rank of 0."""
        from hf_genrec.alignment.adapters import item_lora

        if self.lora_r == 0:
            return model
        modules = self.lora_target_modules or "all-linear"
        options: dict[str, Any] = {"r": self.lora_r, "alpha": self.lora_alpha, "dropout": self.lora_dropout}
        return item_lora(model, tokenizer, target_modules=modules, **options)

    def record(self) -> dict[str, Any] | None:
        """As a recipe writes it."""
        if self.lora_r == 0:
            return None
        values = {"r": self.lora_r, "alpha": self.lora_alpha, "dropout": self.lora_dropout}
        return values | ({"target_modules": self.lora_target_modules} if self.lora_target_modules else {})


# ---------------------------------------------------------------------------------------------------------- command line


def config_file(words: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """The words without `--config=FILE` glued together, and the content of that file ({} without one).

    Raises:
        RequestError: a file that is missing or holds no mapping.
    """
    glued = [word.partition("=")[::2] if word.startswith("--config=") else (word,) for word in words]
    line = [part for parts in glued for part in parts]
    if "--config" not in line:
        return line, {}
    place = line.index("--config") + 1
    if place == len(line):
        raise RequestError("--config has no value: name a YAML file.")
    try:
        values = yaml.safe_load(Path(line[place]).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RequestError(f"--config {line[place]} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise RequestError(f"--config {line[place]} must hold `option: value` lines.")
    return line, values


def value_of(name: str, line: Sequence[str], config: Mapping[str, Any]) -> Any:
    """A value before everything is parsed: of the command line, else of the file, else None."""
    look = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    look.add_argument(f"--{name}", f"--{name.replace('_', '-')}", dest=name)
    found = getattr(look.parse_known_args(list(line))[0], name)
    return found if found is not None else config.get(name)


def parse(
    types: Sequence[type],
    description: str,
    words: Sequence[str] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> tuple[Any, ...]:
    """The dataclasses filled from `--config FILE.yaml` and the command line, which wins.

    Args:
        types: dataclasses; the last is the trainer's configuration, of which --help shows its own and common options.
        description: shown above the options.
        words: default `sys.argv[1:]`.
        defaults: used where neither says anything.

    Raises:
        RequestError: an option that none of them has (nearest one named), or a value that a dataclass refuses.
    """
    line, config = config_file(sys.argv[1:] if words is None else words)
    usage = "%(prog)s [--config FILE.yaml] [--option VALUE ...]"
    kinds: Any = list(types)
    parser = TrlParser(kinds, description=description, formatter_class=HelpFormatter, usage=usage, allow_abbrev=False)
    shown = COMMON_OPTIONS | {name for kind in types for name in vars(kind).get("__annotations__", {})}
    for action in parser._actions:
        if action.dest not in shown:
            action.help = argparse.SUPPRESS
    for name, value in (defaults or {}).items():
        if value is not None:
            parser.set_defaults_with_config(**{name: value})
    known = {action.dest for action in parser._actions} | {"env"}
    spelled = {word.lstrip("-").replace("-", "_") for action in parser._actions for word in action.option_strings}
    given = [word[2:].partition("=")[0].replace("-", "_") for word in line if word.startswith("--") and len(word) > 2]
    places = [*((name, "of --config") for name in config), *((name, "") for name in given if name != "config")]
    for name, place in places:
        if name not in (known if place else spelled):
            near = difflib.get_close_matches(str(name), sorted(known), n=1)
            groups = ", ".join(kind.__name__ for kind in types)
            raise RequestError(
                f"unknown option {name!r}{place and ' ' + place}"
                + (f": did you mean {near[0]!r}?" if near else f": it is none of {groups}.")
            )
    try:
        return tuple(parser.parse_args_and_config(line))
    except GenRecError:
        raise
    except (ValueError, TypeError) as error:
        raise RequestError(f"the options do not fit together: {error}") from error


def run_script(parse_line: Callable[[], tuple[Any, ...]], main: Callable[..., Any]) -> None:
    """Body of `if __name__ == "__main__"`: errors of the library end as one paragraph."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    try:
        main(*parse_line())
    except GenRecError as error:
        sys.exit(textwrap.fill(f"error: {error}", 120, break_long_words=False, break_on_hyphens=False))
