"""`genrec recipes | train | evaluate | recommend | rank | items | plots | export | doctor`: parse, call the library, print.

Errors of the library print as one paragraph on stderr with exit code 2; `--traceback` shows more.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

from hf_genrec import __version__
from hf_genrec.errors import GenRecError, RequestError

_STOPPED = {
    "train": "stopped; `genrec train ... --resume` goes on from the newest checkpoint",
    "rank": "stopped; the same command goes on from the answers in --output_dir, where it was given",
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="genrec", description="Generative recommendation: from an interaction log to a recommender on the Hub."
    )
    parser.add_argument("--version", action="version", version=f"genrec {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    recipes = commands.add_parser("recipes", help="list the recipes, or show one resolved with its provenance")
    recipes.add_argument("name", nargs="?", help="a recipe name or a YAML file")
    recipes.add_argument("--table", help="compare recipes on one data set and budget: identifiers, alignment, language")
    recipes.add_argument("--run", action="store_true", help="make the table anew instead of showing the recorded one")
    _add_data_arguments(recipes, required=False)
    recipes.add_argument("--output_dir", help="with --run: where finished runs, table.json and table.md go")
    recipes.add_argument("--recipes", help="with --run: only these, separated by commas")
    recipes.add_argument("--seeds", default="0,1,2", help="with --run: training seeds (default 0,1,2)")
    recipes.add_argument(
        "--train_seconds", type=float, default=120.0, help="with --run: processor seconds of training (default 120)"
    )
    recipes.add_argument("--processes", type=int, default=1, help="with --run: runs at the same time (default 1)")
    recipes.add_argument("--base", help="with --run: folder or Hub id of the language model, for recipes that have one")

    train = commands.add_parser(
        "train",
        help="train a recipe on your interactions and write an artefact folder",
        description="Train a recipe. Any value of the recipe can be set: --learning_rate 1e-3, --model.dropout 0.1, "
        "--features.text.encoder FOLDER; `genrec recipes NAME` shows them.",
    )
    train.add_argument("recipe", help="a recipe name (see `genrec recipes`) or a YAML file")
    _add_data_arguments(train, required=True)
    train.add_argument("--output_dir", required=True, help="artefact folder to write")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument(
        "--baselines",
        default="popularity,item_graph,sasrec_ce",
        help="comma-separated rows beside the result: popularity,item_graph,sasrec_ce, or none (default: all)",
    )
    train.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of an interrupted run")
    train.add_argument("--keep_checkpoints", action="store_true", help="leave OUTPUT_DIR-checkpoints behind")
    train.add_argument(
        "--test_users", type=int, help="rank only so many test users (a shortened run, recorded as such)"
    )
    train.add_argument(
        "--dry_run",
        action="store_true",
        help="check the recipe and run it, cut down, on a generated catalogue: a second or two, your data is not read",
    )
    train.add_argument("--quiet", action="store_true", help="no progress bars")

    evaluate = commands.add_parser(
        "evaluate", help="rank the whole catalogue for every test user, beside the baselines"
    )
    evaluate.add_argument("folder", help="artefact folder or Hub id")
    _add_data_arguments(evaluate, required=False)
    evaluate.add_argument("--baselines", default="popularity,item_graph", help="popularity,item_graph or none")
    evaluate.add_argument("--num_beams", type=int, help="width of the search (default: the artefact's)")
    evaluate.add_argument("--quiet", action="store_true", help="no progress bars")

    recommend = commands.add_parser("recommend", help="recommend items for a history")
    recommend.add_argument("folder", help="artefact folder or Hub id")
    recommend.add_argument(
        "--history", default="", help="item ids, oldest first, separated by commas; empty: a new user"
    )
    recommend.add_argument("-k", type=int, default=10, help="number of items (default 10)")
    recommend.add_argument("--num_beams", type=int, help="width of the search (default: the artefact's)")
    recommend.add_argument("--include_seen", action="store_true", help="items of the history may come back")
    recommend.add_argument("--allowed_items", help="item ids separated by commas: nothing else is recommended")

    from hf_genrec.cli.export import add_export_parser
    from hf_genrec.cli.items import add_items_parser
    from hf_genrec.cli.plots import add_plots_parser
    from hf_genrec.cli.rank import add_rank_parser

    _add_data_arguments(add_rank_parser(commands), required=False)
    add_items_parser(commands)
    add_plots_parser(commands)
    add_export_parser(commands)
    commands.add_parser("doctor", help="what is installed and what works offline")
    for command in commands.choices.values():
        command.add_argument("--json", action="store_true", help="print the result as JSON")
        command.add_argument("--traceback", action="store_true", help="show the whole traceback of an error")
    return parser


def _add_data_arguments(parser: argparse.ArgumentParser, *, required: bool) -> None:
    parser.add_argument(
        "--dataset",
        required=required,
        help="a named data set (movielens-100k, movielens-latest-small, amazon-toys, amazon-games, amazon-phone), a file "
        "(CSV, TSV, Parquet, JSONL, .inter) or a MovieLens / RecBole folder",
    )
    parser.add_argument("--items", help="item table (item_id, title, ...) as a file")
    parser.add_argument("--data_dir", help="folder of the named data sets (default: $HF_GENREC_DATA)")


def parse_overrides(rest: Sequence[str]) -> dict[str, Any]:
    """`--key value` and `--key=value` pairs to a dictionary; values are read as YAML, `1e-3` as a number.

    Raises:
        RequestError: something that is no such pair.
    """
    import yaml

    overrides: dict[str, Any] = {}
    position = 0
    while position < len(rest):
        word = rest[position]
        if not word.startswith("--") or len(word) < 3:
            raise RequestError(f"cannot read {word!r}: options of the recipe are written --key value.")
        key, equals, value = word[2:].partition("=")
        if not equals:
            if position + 1 >= len(rest):
                raise RequestError(f"--{key} has no value; write --{key} VALUE.")
            position += 1
            value = rest[position]
        try:
            overrides[key] = float(value) if "e" in value.lower() and _is_number(value) else yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise RequestError(f"--{key}: cannot read {value!r} ({error}); quote it.") from error
        position += 1
    return overrides


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and options.command != "train":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    if options.command in ("recommend", "evaluate", "rank", "items", "plots"):
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # "Loading weights" says nothing to somebody who asked for recommendations
    try:
        return _run(options, rest)
    except GenRecError as error:
        if options.traceback:
            raise
        print(textwrap.fill(f"error: {error}", 120, break_long_words=False), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(_STOPPED.get(options.command, "stopped"), file=sys.stderr)
        return 130


def _run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    if options.command == "recipes":
        from hf_genrec.cli.recipes import run_recipes

        result, text = run_recipes(options)
    elif options.command == "train":
        from hf_genrec.cli.train import run_train

        result, text = run_train(options, parse_overrides(rest))
    elif options.command == "evaluate":
        from hf_genrec.cli.evaluate import run_evaluate

        result, text = run_evaluate(options)
    elif options.command == "recommend":
        from hf_genrec.cli.recommend import run_recommend

        result, text = run_recommend(options)
    elif options.command == "rank":
        from hf_genrec.cli.rank import run_rank

        result, text = run_rank(options)
    elif options.command == "items":
        from hf_genrec.cli.items import run_items

        result, text = run_items(options)
    elif options.command == "plots":
        from hf_genrec.cli.plots import run_plots

        result, text = run_plots(options)
    elif options.command == "export":
        from hf_genrec.cli.export import run_export

        result, text = run_export(options)
    else:
        from hf_genrec.cli.doctor import run_doctor

        result, text = run_doctor()
    print(json.dumps(result, indent=2, ensure_ascii=False) if options.json else text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
