"""`genrec rank DIR --chat_model NAME | --endpoint URL`: a chat model that was never trained for it orders a retriever's items."""

from __future__ import annotations

import argparse
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from hf_genrec.artifacts import MANIFEST_NAME
from hf_genrec.errors import ArtifactError, ItemTableError, RequestError
from hf_genrec.generation.ranking.prompts import FAMILIES

ANSWERS, RESULT = "answers.jsonl", "ranking.json"
KEY_VARIABLE = "OPENAI_API_KEY"
METRICS = ("recall@10", "ndcg@10")


def add_rank_parser(commands: Any) -> argparse.ArgumentParser:
    """The command's arguments, but those of the data."""
    rank = commands.add_parser(
        "rank",
        help="let a chat model (local, or at an OpenAI-compatible endpoint) reorder an artefact's recommendations, zero-shot",
        description="An artefact retrieves candidates for test users, a chat model orders them by their titles, each user asked "
        "several times with the candidates in another order. Full ranking as in genrec evaluate: what the artefact does not "
        "retrieve is missed. Answers are kept in OUTPUT_DIR, and the same command goes on from there.",
    )
    rank.add_argument("folder", help="artefact folder or Hub id: the retriever")
    rank.add_argument("--chat_model", help="folder or Hub id of an instruction-tuned causal language model")
    rank.add_argument(
        "--endpoint", help="or: address of a server that speaks OpenAI's chat protocol, http://host:port/v1"
    )
    rank.add_argument("--endpoint_model", help="with --endpoint: name of the model there")
    rank.add_argument(
        "--api_key_env",
        help=f"with --endpoint: environment variable that holds the key (default {KEY_VARIABLE}, which goes out over https or "
        "to this machine only)",
    )
    rank.add_argument(
        "--parameters",
        help="with --endpoint: more fields of the request as JSON; null leaves one out (default: temperature 0, max_tokens)",
    )
    rank.add_argument("--timeout", type=float, default=60.0, help="with --endpoint: seconds to wait (default 60)")
    rank.add_argument("--num_candidates", type=int, default=20, help="items that are ranked anew (default 20)")
    rank.add_argument("--bootstraps", type=int, default=3, help="questions per user, orders drawn anew (default 3)")
    rank.add_argument(
        "--constrained",
        action="store_true",
        help="with --chat_model: it can write nothing but the candidates, each once",
    )
    rank.add_argument(
        "--prompt",
        choices=FAMILIES,
        default="sequential",
        help="the history in order (default), with its last item named once more, or with its last item as an example",
    )
    rank.add_argument(
        "--noun", default="items", help="what the items are, in the prompt: movies, songs, ... (default items)"
    )
    rank.add_argument("--verb", default="chosen", help="what was done with them: watched, bought, ... (default chosen)")
    rank.add_argument("--max_history", type=int, default=50, help="newest items in the prompt (default 50)")
    rank.add_argument("--max_new_tokens", type=int, default=512, help="longest answer (default 512)")
    rank.add_argument("--batch_size", type=int, default=8, help="questions at a time (default 8)")
    rank.add_argument("--test_users", type=int, default=50, help="rank only so many test users (default 50)")
    rank.add_argument(
        "--seen_items",
        choices=["removed", "kept", "both"],
        help="default: as the data set declares; both asks twice as many questions",
    )
    rank.add_argument("--num_beams", type=int, help="width of the artefact's search (default: the artefact's)")
    rank.add_argument("--seed", type=int, default=0, help="of the orders of the candidates")
    rank.add_argument("--output_dir", help=f"folder for {ANSWERS} and {RESULT}")
    rank.add_argument("--quiet", action="store_true", help="no progress bars")
    return rank


def run_rank(options: argparse.Namespace) -> tuple[Any, str]:
    """JSON value and text to print."""
    folder = _checked(options)
    endpoint = None if options.endpoint is None else _endpoint(options)
    from hf_genrec.evaluation.baselines import Popularity
    from hf_genrec.evaluation.evaluator import evaluate, training_counts
    from hf_genrec.evaluation.recommenders import ModelRecommender
    from hf_genrec.generation.ranking.chat_model import ChatModel
    from hf_genrec.generation.ranking.prompts import RankingPrompt
    from hf_genrec.recipes.pipeline import KS
    from hf_genrec.recipes.stages.preference import part_of_rows

    prompt = RankingPrompt(options.prompt, noun=options.noun, verb=options.verb, max_history=options.max_history)
    artifact, data, split = _artifact_and_data(options)
    titles, untitled = _titles(data, options.folder)
    chat: Any = endpoint or ChatModel.from_pretrained(
        options.chat_model, batch_size=options.batch_size, max_new_tokens=options.max_new_tokens
    )
    split = replace(split, test=part_of_rows(split.test, options.test_users, 0))
    kept = data.repeats if options.seen_items is None else options.seen_items == "kept"
    how: dict[str, Any] = {
        "num_items": data.num_items,
        "ks": KS,
        "train_counts": training_counts(split.train, data.num_items),
        "exclude_seen": "both" if options.seen_items == "both" else not kept,
        "repeats": data.repeats,
    }
    users = data.user_ids if artifact.tokenizer.num_user_tokens else None
    retriever = ModelRecommender(artifact.model, artifact.tokenizer, user_ids=users)
    progress = not (options.quiet or options.json)
    name = (artifact.recipe or {}).get("name", "retriever")
    before = evaluate(retriever, split.test, name=name, progress=progress, **how)
    popular = Popularity().fit(split.train, data.num_items)
    popularity = evaluate(popular, split.test, name="popularity", progress=progress, **how)
    after, answers = _ask(options, chat, folder, retriever, titles, prompt, split.test, name, how, progress)
    result = {
        "dataset": data.name,
        "protocol": split.protocol,
        "seed": options.seed,
        "retriever": options.folder,
        "chat": {"endpoint": endpoint.base_url, "model": endpoint.model, "parameters": endpoint.parameters}
        if endpoint
        else {"model": options.chat_model, "max_new_tokens": options.max_new_tokens},
        "prompt": {
            "family": prompt.family,
            "noun": prompt.noun,
            "verb": prompt.verb,
            "max_history": prompt.max_history,
        },
        "num_candidates": options.num_candidates,
        "bootstraps": options.bootstraps,
        "constrained": options.constrained,
        "untitled_items": untitled,
        "answers": answers,
    }
    result, text = _compared(result, after, before, popularity)
    if folder is not None:
        (folder / RESULT).write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        text += f"\n\nwritten: {folder / ANSWERS}, {folder / RESULT}"
    return result, text


def _ask(
    options: argparse.Namespace,
    chat: Any,
    folder: Path | None,
    retriever: Any,
    titles: list[str],
    prompt: Any,
    rows: Any,
    name: str,
    how: dict[str, Any],
    progress: bool,
) -> tuple[Any, dict[str, Any]]:
    """The report of the reordered lists, and what the answers were like."""
    from tqdm.auto import tqdm

    from hf_genrec.evaluation.evaluator import evaluate
    from hf_genrec.generation.ranking.answer_cache import AnswerCache
    from hf_genrec.generation.ranking.chat_client import ChatEndpointError
    from hf_genrec.generation.ranking.zero_shot import ZeroShotRanker, ZeroShotRecommender

    total = len(rows) * options.bootstraps * (2 if how["exclude_seen"] == "both" else 1)
    with tqdm(total=total, desc="answers", unit="answer", disable=not progress, leave=False) as bar:
        cache = AnswerCache(chat, None if folder is None else folder / ANSWERS, progress=bar.update)
        ranker = ZeroShotRanker(
            cache, titles, prompt=prompt, rounds=options.bootstraps, seed=options.seed, constrained=options.constrained
        )
        recommender = ZeroShotRecommender(ranker, retriever, options.num_candidates)
        model = options.endpoint_model or os.path.basename(os.path.normpath(options.chat_model))
        try:
            report = evaluate(recommender, rows, name=f"{name} + {model}", progress=False, **how)
        except ChatEndpointError as error:
            kept = "are lost: give --output_dir" if folder is None else f"are kept in {folder / ANSWERS}"
            go_on = "" if folder is None else ", and the same command goes on from there"
            raise ChatEndpointError(f"{error} {cache.asked} new answers {kept}{go_on}.") from error
    sent = getattr(chat, "requests", cache.asked)
    return report, ranker.counts.to_dict() | {"new": cache.asked, "reused": cache.reused, "requests": sent}


def _compared(result: dict[str, Any], after: Any, before: Any, popularity: Any) -> tuple[dict[str, Any], str]:
    """The result with its numbers, and the text to print."""
    from hf_genrec.evaluation.bucket_comparison import compare_buckets
    from hf_genrec.evaluation.report import comparison_table, results_table

    buckets = {metric: compare_buckets(before, after, metric) for metric in METRICS}
    reachable = int((before.setting().ranks_M <= result["num_candidates"]).sum())
    numbers = {
        "test": after.to_dict(),
        "baselines": {"retriever": before.to_dict(), "popularity": popularity.to_dict()},
        "buckets": {metric: found.to_dict() for metric, found in buckets.items()},
        "targets_among_candidates": reachable,
    }
    answers = result["answers"]
    parts = [
        results_table([after, before, popularity], buckets=True),
        comparison_table(after, [before, popularity], METRICS),
        *map(str, buckets.values()),
        f"The target is among the {result['num_candidates']} candidates in {reachable} of {before.num_rows} rows; no order of "
        "them changes the others.\n"
        f"Answers: {answers['answers']}, of which {answers['unreadable_share']:.0%} name no candidate (the retriever's order "
        f"stays) and {answers['repaired_share']:.0%} were repaired (candidates left out, lines that name none, or repeats); "
        f"{answers['named_share']:.0%} of all candidates were named.\n"
        f"Requests made: {answers['requests']}; answers used again: {answers['reused']}.",
    ]
    if result["untitled_items"]:
        parts.append(f"{result['untitled_items']} items have no title and stand in the prompts by their id.")
    return result | numbers, "\n\n".join(parts)


def _checked(options: argparse.Namespace) -> Path | None:
    """What can be refused before anything is loaded; the folder to write."""
    if (options.chat_model is None) == (options.endpoint is None):
        raise RequestError(
            "name one chat model: --chat_model FOLDER_OR_HUB_ID, or --endpoint URL --endpoint_model NAME."
        )
    if options.endpoint is not None:
        if not options.endpoint_model:
            raise RequestError("--endpoint needs --endpoint_model, the name of the model at the server.")
        if options.constrained:
            raise RequestError("--constrained needs --chat_model: a server cannot be held to the candidates.")
    for option in ("endpoint_model", "api_key_env", "parameters"):
        if options.endpoint is None and getattr(options, option) is not None:
            raise RequestError(f"--{option} is for --endpoint; leave it out, or name a server instead of --chat_model.")
    for option in ("test_users", "num_candidates", "bootstraps", "max_history", "max_new_tokens", "batch_size"):
        if getattr(options, option) < 1:
            raise RequestError(f"--{option} must be at least 1, got {getattr(options, option)}.")
    if options.seed < 0:
        raise RequestError(f"--seed must be at least 0, got {options.seed}.")
    if options.output_dir is None:
        return None
    folder = Path(options.output_dir)
    if folder.exists() and (not folder.is_dir() or (folder / MANIFEST_NAME).exists()):
        raise RequestError(f"--output_dir {folder} is a file or an artefact; name a folder of its own.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"--output_dir {folder} cannot be made ({error}); name another one.") from error
    return folder


def _endpoint(options: argparse.Namespace) -> Any:
    from hf_genrec.generation.ranking.chat_client import ChatEndpoint

    parameters: dict[str, Any] = {"temperature": 0, "max_tokens": options.max_new_tokens}
    if options.parameters is not None:
        try:
            parameters |= json.loads(options.parameters)
        except (ValueError, TypeError, RecursionError) as error:
            raise RequestError(
                f"--parameters is no JSON object ({error}); write e.g. '{{\"temperature\": 0.2}}'."
            ) from error
    parameters = {name: value for name, value in parameters.items() if value is not None}
    own = sorted(
        {"timeout", "retries", "backoff", "max_backoff", "concurrency", "api_key", "base_url"} & parameters.keys()
    )
    if own:
        raise RequestError(f"--parameters: {own[0]} is no field of the request.")
    return ChatEndpoint(
        options.endpoint,
        options.endpoint_model,
        _api_key(options),
        timeout=options.timeout,
        concurrency=options.batch_size,
        **parameters,
    )


def _api_key(options: argparse.Namespace) -> str | None:
    """The key, from the environment only. The variable is not named in messages: it may be a key by mistake."""
    if options.api_key_env is not None:
        if not os.environ.get(options.api_key_env):
            raise RequestError("--api_key_env must be the name of an environment variable that is set (not the key).")
        return os.environ[options.api_key_env]
    host = re.match(r"(https://)|http://(localhost|127\.[\d.]+|\[::1\])(?=[:/]|$)", options.endpoint, re.I)
    return os.environ.get(KEY_VARIABLE) or None if host else None  # never unencrypted over a network by default


def _artifact_and_data(options: argparse.Namespace) -> tuple[Any, Any, Any]:
    from hf_genrec.cli.script_options import DataArguments
    from hf_genrec.cli.script_start import data_of
    from hf_genrec.generation.recommend import recommendation_config_of
    from hf_genrec.hub import load_artifact

    artifact = load_artifact(options.folder)
    if artifact.model is None or not hasattr(artifact.tokenizer, "item_ids"):
        raise ArtifactError(f"{options.folder} cannot recommend: it has no model, or no tokenizer with a catalogue.")
    config = recommendation_config_of(artifact.model)
    if options.num_beams is not None:
        config = config.merged(num_beams=options.num_beams)
        artifact.model.recommendation_config = config
    if options.num_candidates > config.num_beams:
        raise RequestError(
            f"--num_candidates {options.num_candidates}: the artefact's search keeps {config.num_beams} items; give at most "
            f"that many, or --num_beams {options.num_candidates}."
        )
    data, split, _ = data_of(artifact, DataArguments(options.dataset, options.items, options.data_dir))
    return artifact, data, split


def _titles(data: Any, folder: str) -> tuple[list[str], int]:
    """N titles, the id for an item that has none, and how many have none."""
    titles = [] if data.items is None else data.items.titles()
    if not any(title.strip() for title in titles):
        raise ItemTableError(
            f"neither {folder} nor the data hold titles of the items, which a chat model knows them by; give --items FILE."
        )
    untitled = sum(not title.strip() for title in titles)
    return [title if title.strip() else item for title, item in zip(titles, data.item_ids, strict=True)], untitled
