"""The machine-readable half of a model card: YAML front matter, model-index, and `.eval_results/*.yaml`.

`model-index` in the README is read by every version of the Hub. The newer `.eval_results` files attach a result to the
page of a *Hub data set*, so they are written only when `card_data["dataset_id"]` names one. Most recommendation data
(MovieLens, Amazon reviews) has no official Hub data set, and a made-up id would put our number on a stranger's page.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData, eval_result_entries_to_yaml

from hf_genrec.errors import ArtifactError

from .card_results import metric_label
from .data_terms import DATA_TERMS
from .markdown import clean, slug
from .metrics_file import metric_names, seeds_of

CARD_DATA_KEYS: dict[str, str] = {
    "title": "title of the card",
    "description": "one or two sentences under the title",
    "license": "Hub licence identifier of the weights, for example apache-2.0",
    "license_name": "name of a licence that the Hub has no identifier for",
    "license_link": "link to that licence",
    "language": "language codes of the item texts",
    "base_model": "Hub id of the model this one was made from (default: the recipe's model.base)",
    "datasets": "Hub ids of the training data",
    "dataset_id": "Hub id of the data set the results belong to; writes .eval_results",
    "task_id": "task of that data set (default: the protocol)",
    "tags": "further tags",
    "pipeline_tag": "Hub task of the model, if it has one",
    "repo_id": "Hub id the artefact will be pushed to",
    "data_terms": "what the owner of the data allows, one sentence",
    "limitations": "list of further sentences",
    "papers": "arXiv ids to cite beside those of the recipe",
}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
_IDENTIFIER = re.compile(r"[a-z0-9][a-z0-9.-]{0,63}")
_EVALUATED = ("recall@10", "ndcg@10", "mrr@10")


def check_card_data(card_data: Mapping[str, Any] | None) -> dict[str, Any]:
    """A checked copy of the caller's card data, without the keys that are None.

    Raises:
        ArtifactError: an unknown key (the nearest one is named), or an identifier that the Hub would refuse.
    """
    checked = {key: value for key, value in (card_data or {}).items() if value is not None}
    for key in checked:
        if key not in CARD_DATA_KEYS:
            near = difflib.get_close_matches(str(key), CARD_DATA_KEYS, n=1, cutoff=0.0)[0]
            raise ArtifactError(
                f"card_data has no key {key!r}; did you mean {near!r}? Keys: {', '.join(CARD_DATA_KEYS)}."
            )
    for key in ("datasets", "base_model", "dataset_id", "repo_id"):
        for value in _as_list(checked.get(key)):
            if not isinstance(value, str) or not _HUB_ID.fullmatch(value):
                raise ArtifactError(f"card_data[{key!r}]: {value!r} is no Hub id; write it like 'owner/name'.")
    for key in ("license", "pipeline_tag"):
        value = checked.get(key)
        if value is not None and (not isinstance(value, str) or not _IDENTIFIER.fullmatch(value)):
            raise ArtifactError(f"card_data[{key!r}]: {value!r} is no Hub identifier; write it like 'apache-2.0'.")
    return checked


def base_of(recipe: Mapping[str, Any]) -> dict[str, str]:
    """`{"base_model": id}` where the recipe starts from a model of the Hub; a folder of this machine is nobody else's."""
    base = str((recipe.get("model") or {}).get("base") or "")
    return {"base_model": base} if "/" in base and _HUB_ID.fullmatch(base) and not Path(base).exists() else {}


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple | set) else [value]


def card_metadata(
    *,
    title: str,
    model_type: str | None,
    library_name: str,
    metrics: Mapping[str, Any] | None,
    card_data: Mapping[str, Any],
) -> ModelCardData:
    """The front matter. Strings from data are cleaned to one line; YAML quoting is `huggingface_hub`'s."""
    tags = ["generative-recommendation", "recommendation", "hf_genrec", "semantic-ids"]
    tags += [slug(tag) for tag in [model_type, *_as_list(card_data.get("tags"))] if tag]
    known = {
        key: card_data[key]
        for key in ("license_name", "license_link", "language", "base_model", "pipeline_tag")
        if card_data.get(key)
    }
    known = {key: [clean(v) for v in _as_list(value)] for key, value in known.items()}
    results = _eval_results(metrics, card_data) if metrics else []
    return ModelCardData(
        library_name=library_name,
        # "unknown" is the Hub's identifier for a licence that nobody stated.
        license=card_data.get("license") or ("other" if card_data.get("license_name") else "unknown"),
        tags=list(dict.fromkeys(tags)),
        datasets=_as_list(card_data.get("datasets") or card_data.get("dataset_id")) or None,
        model_name=clean(title, 80) if results else None,
        eval_results=results or None,
        **{key: value[0] if len(value) == 1 else value for key, value in known.items()},
    )


def _eval_results(metrics: Mapping[str, Any], card_data: Mapping[str, Any]) -> list[EvalResult]:
    test = metrics["test"]
    seen = test.get("seen_items")
    known = DATA_TERMS.get(metrics["dataset"])
    setting = f"{metrics['protocol']}, full ranking" + (f", seen items {seen}" if seen else "")
    return [
        EvalResult(
            task_type="recommendation",
            task_name=clean(f"Next-item recommendation ({setting})"),
            dataset_type=card_data.get("dataset_id") or slug(metrics["dataset"], "dataset"),
            dataset_name=known.title if known else clean(metrics["dataset"]) or "unnamed",
            dataset_split="test",
            metric_type=name.replace("@", "_at_"),
            metric_name=metric_label(name),
            metric_value=round(float(test[name]), 6),
        )
        for name in _evaluated(test)
    ]


def _evaluated(test: Mapping[str, Any]) -> list[str]:
    return [name for name in _EVALUATED if name in test] or metric_names(test)[:3]


def eval_result_files(metrics: Mapping[str, Any] | None, card_data: Mapping[str, Any]) -> dict[str, str]:
    """Relative path -> content of the `.eval_results` files; empty without metrics or without a Hub data set id."""
    dataset_id = card_data.get("dataset_id")
    if not metrics or not dataset_id:
        return {}
    test, task = metrics["test"], slug(card_data.get("task_id") or metrics["protocol"]).replace("-", "_")
    seen = test.get("seen_items")
    notes = f"hf_genrec, full ranking, seeds {', '.join(map(str, seeds_of(metrics)))}" + (
        f", seen items {seen}" if seen else ""
    )
    entries = [
        EvalResultEntry(
            dataset_id=dataset_id,
            task_id=f"{task}_{name.replace('@', '_at_')}",
            value=round(float(test[name]), 6),
            notes=notes,
        )
        for name in _evaluated(test)
    ]
    content = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True)
    return {f".eval_results/{slug(dataset_id)}.yaml": content}
