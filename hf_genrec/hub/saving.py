"""`save_artifact`: a recommender with everything that belongs to it, written whole or not at all.

Everything is written into a staged folder (see `hf_genrec.artifacts`) and put in place in one step. Nothing here needs
the network, and the model, its configuration and the tokenizer are left as they were.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from hf_genrec.artifacts import check_safe, check_target, recover, staged_folder, verify_manifest
from hf_genrec.errors import ArtifactError, IncompatibleComponentsError
from hf_genrec.identifiers.feature_transforms import FEATURES_FILE
from hf_genrec.identifiers.quantizers.auto_quantizer import can_save, save_quantizer

from . import artifact_files as files
from .card import README_NAME, ModelFacts, model_card
from .card_metadata import check_card_data, eval_result_files
from .existing import carry_over, old_files, old_yaml, unlist
from .markdown import slug
from .metrics_file import METRICS_NAME, check_metrics, plain_json, read_metrics
from .parts import check_catalogue, load_items, load_tokenizer, read_config, read_recipe

logger = logging.getLogger(__name__)

_PNG = b"\x89PNG\r\n\x1a\n"
_EXTRA_NAME = re.compile(r"[\w][\w. -]*(/[\w][\w. -]*)*")


def save_artifact(
    folder: str | os.PathLike,
    *,
    model: Any = None,
    tokenizer: Any = None,
    items: Any = None,
    recipe: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    plots: Mapping[str, bytes | str | os.PathLike] | None = None,
    recommendation_config: Any = None,
    card: str | None = None,
    card_data: Mapping[str, Any] | None = None,
    extra_files: Mapping[str, bytes | str | os.PathLike] | None = None,
    quantizer: Any = None,
    item_features: Any = None,
    quantizer_files: Mapping[str, bytes | str | os.PathLike] | None = None,
    max_shard_size: int | str = "50GB",
) -> Path:
    """Write an artefact folder in one step, over an existing one if there is one: a kill leaves the old or the new.

    Args:
        folder: the artefact folder.
        model: `PreTrainedModel`; also gives `generation_config.json` and `recommendation_config.json`.
        tokenizer: the `ItemTokenizer` (or extended text tokenizer) of the model's catalogue.
        items: `ItemTable`; brought into the order of the tokenizer's catalogue.
        recipe: resolved settings, plain values -> `recipe.yaml`.
        metrics: as `build_metrics` makes them -> `metrics.json`.
        plots: caption -> PNG bytes or path -> `plots/*.png`, shown in the card.
        recommendation_config: written instead of the model's own.
        card: text of a README.md to use instead of the generated one.
        card_data: what only a person knows (license, data terms, ...); keys in `hub.card_metadata.CARD_DATA_KEYS`. Kept
            in `card_data.yaml`, so that a later save need not say it again.
        extra_files: path in the folder -> bytes or path of further data files.
        quantizer: that made the codes -> `quantizer/`, for items that join later (left out where it cannot be read back).
        item_features: `ItemFeatures` of the catalogue, kept beside it.
        quantizer_files: name -> bytes or path of what else belongs to the quantizer (a tag reader, say).
        max_shard_size: as in `save_pretrained`.

    Over an existing artefact, parts that are not given are kept: `save_artifact(folder, metrics=...)` adds numbers to a
    saved model. Only when a model or a tokenizer is given, the old recipe, metrics and plots go: they describe another
    model. Files that are not ours (notes, say) are carried over; a README.md edited by hand is kept as
    `README.previous-<n>.md`.

    Returns:
        The folder.

    Raises:
        ArtifactError: nothing to save, a value that does not fit its file, or a folder that cannot be replaced.
        UnsafeArtifactError: a file that could run code is among what should be saved.
        IncompatibleComponentsError: model, tokenizer and items are not about the same catalogue.
    """
    target = Path(os.path.realpath(folder))
    recover(target)
    check_target(target)
    old = old_files(target)
    given = {files.MODEL: model, files.TOKENIZER: tokenizer, files.ITEMS: items}
    given |= {files.RECIPE: recipe, files.METRICS: metrics, files.PLOTS: plots}
    kept = _kept_parts(target, old, given)
    metrics = check_metrics(metrics) if metrics is not None else None
    recipe = plain_json(recipe, files.RECIPE_NAME) if recipe is not None else None
    card_data = check_card_data({**old_yaml(target, files.CARD_DATA_NAME, old), **(card_data or {})})
    check_catalogue(model, tokenizer, items)
    written = {**_pictures(plots or {}), **{_extra_name(name): value for name, value in (extra_files or {}).items()}}
    if not kept and model is None and tokenizer is None and items is None:
        raise ArtifactError(f"{target}: no artefact there yet and nothing to begin one; give model= and tokenizer=.")

    with staged_folder(target) as staged:
        if model is not None:
            _save_model(model, staged, recommendation_config, max_shard_size)
        elif recommendation_config is not None:
            recommendation_config.save_pretrained(staged)
        if tokenizer is not None:
            tokenizer.save_pretrained(staged)
        if quantizer is not None and can_save(quantizer):
            save_quantizer(quantizer, staged / files.QUANTIZER_FOLDER)
            if item_features is not None:
                item_features.save(staged / files.QUANTIZER_FOLDER / FEATURES_FILE)
            for name, value in (quantizer_files or {}).items():
                _write(staged / files.QUANTIZER_FOLDER / _extra_name(name), value)
        if model is not None:
            _name_catalogue(staged, load_tokenizer(target) if files.TOKENIZER in kept else tokenizer)
        if items is not None:
            _aligned(items, tokenizer).to_parquet(staged / files.ITEMS_NAME)
        if recipe is not None:
            _write_yaml(staged / files.RECIPE_NAME, recipe)
        if metrics is not None:
            _write_json(staged / METRICS_NAME, metrics)
        if card_data:
            _write_yaml(staged / files.CARD_DATA_NAME, plain_json(card_data, files.CARD_DATA_NAME))
        for path, value in written.items():
            _write(staged / path, value)
        foreign = carry_over(target, staged, old, kept)
        _write_card(staged, model, tokenizer, items, card, card_data)
        check_safe(staged)
    unlist(target, foreign)
    return target


# ------------------------------------------------------------------------------------------------------------ checking


def _aligned(items: Any, tokenizer: Any) -> Any:
    ids = list(tokenizer.item_ids) if hasattr(tokenizer, "item_ids") else items.item_ids
    return items if items.item_ids == ids else items.align(ids)


def _pictures(plots: Mapping[str, bytes | str | os.PathLike]) -> dict[str, bytes]:
    pictures: dict[str, bytes] = {}
    for name, value in plots.items():
        content = value if isinstance(value, bytes) else Path(value).read_bytes()
        if not content.startswith(_PNG):
            raise ArtifactError(f"plots[{name!r}] is not a PNG picture: save the figure with format='png'.")
        path = f"{files.PLOTS_FOLDER}/{slug(name.removesuffix('.png'), 'plot')}.png"
        if path in pictures:
            raise ArtifactError(f"plots: {name!r} and another caption both give {path}; use distinct captions.")
        pictures[path] = content
    return pictures


def _extra_name(name: str) -> str:
    if not _EXTRA_NAME.fullmatch(name) or any(part.strip(". ") == "" for part in name.split("/")):
        raise ArtifactError(f"extra_files: {name!r} is no path inside the folder; write it like 'reports/notes.txt'.")
    if files.part_of(name) is not None:
        raise ArtifactError(f"extra_files: {name!r} is a file of the artefact itself; give it another name.")
    return name


# ------------------------------------------------------------------------------------------------- the existing folder


def _kept_parts(target: Path, old: list[str], given: Mapping[str, Any]) -> set[str]:
    """Parts of the existing artefact that stay: those not given again, unless they describe another model or catalogue.

    What stays is checked first: a damaged file must not get a new hash.
    """
    present = {files.part_of(path) for path in old}
    kept = {part for part, value in given.items() if value is None and part in present}
    model, tokenizer = given[files.MODEL], given[files.TOKENIZER]
    if model is not None or tokenizer is not None:
        kept -= {files.RECIPE, files.METRICS, files.PLOTS}
    if not kept:
        return kept
    try:
        verify_manifest(target, deep=True)
        wanted = read_config(target).get("catalogue_fingerprint") if files.MODEL in present else None
    except ArtifactError as error:
        if kept & {files.MODEL, files.TOKENIZER}:
            raise
        logger.warning("nothing is kept of the artefact that is replaced: %s", error)
        return set()
    if tokenizer is not None and wanted != getattr(tokenizer, "catalogue_fingerprint", None):
        if files.MODEL in kept and wanted:
            raise IncompatibleComponentsError(
                f"{target} holds a model of catalogue {wanted[:12]}, not that of the tokenizer: give the model too."
            )
        kept.discard(files.ITEMS)
    if model is not None and files.TOKENIZER in kept:
        check_catalogue(model, load_tokenizer(target))
    return kept


# ------------------------------------------------------------------------------------------------------------- writing


def _save_model(model: Any, staged: Path, recommendation_config: Any, max_shard_size: int | str) -> None:
    from hf_genrec.generation.configuration_recommendation import RECOMMENDATION_CONFIG_NAME, RecommendationConfig

    with _unchanged(model):
        model.save_pretrained(staged, max_shard_size=max_shard_size)
        if not (staged / "generation_config.json").exists():
            _generation_config(model).save_pretrained(staged)
    if recommendation_config is not None or not (staged / RECOMMENDATION_CONFIG_NAME).exists():
        config = recommendation_config or getattr(model, "recommendation_config", None) or RecommendationConfig()
        config.save_pretrained(staged)


def _generation_config(model: Any) -> Any:
    """For models without `generate`: the special token ids and nothing else, so that every artefact has the file."""
    from transformers import GenerationConfig

    names = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    return GenerationConfig(**{name: getattr(model.config, name, None) for name in names})


def _name_catalogue(staged: Path, tokenizer: Any) -> None:
    """Models of transformers do not know their catalogue: note it in config.json, where loading finds a mix-up."""
    path, fingerprint = staged / "config.json", getattr(tokenizer, "catalogue_fingerprint", None)
    if fingerprint is None or not path.exists():
        return
    config = json.loads(path.read_text(encoding="utf-8"))
    if not config.get("catalogue_fingerprint"):
        _write_json(path, dict(sorted({**config, "catalogue_fingerprint": fingerprint}.items())))


@contextmanager
def _unchanged(model: Any) -> Iterator[None]:
    """`save_pretrained` writes dtype and architectures into the live configuration; put back what was there."""
    configs = [
        config for config in (getattr(model, "config", None), getattr(model, "generation_config", None)) if config
    ]
    before = [dict(vars(config)) for config in configs]
    try:
        yield
    finally:
        for config, values in zip(configs, before):
            vars(config).clear()
            vars(config).update(values)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=True, allow_nan=False) + "\n", encoding="utf-8")


def _write_yaml(path: Path, value: Any) -> None:
    path.write_text(yaml.safe_dump(value, sort_keys=False, allow_unicode=False, width=110), encoding="utf-8")


def _write(path: Path, value: bytes | str | os.PathLike) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(value, bytes):
        path.write_bytes(value)
    else:
        shutil.copyfile(value, path)


def _write_card(
    staged: Path, model: Any, tokenizer: Any, items: Any, card: str | None, card_data: dict[str, Any]
) -> None:
    """README.md and `.eval_results`, from what the staged folder now holds."""
    metrics = read_metrics(staged / METRICS_NAME) if (staged / METRICS_NAME).exists() else None
    for path, content in eval_result_files(metrics, card_data).items():
        _write(staged / path, content.encode())
    if card is None:
        facts = ModelFacts.of(model) if model is not None else ModelFacts.from_folder(staged)
        if tokenizer is None and (staged / "tokenizer_config.json").exists():
            tokenizer = load_tokenizer(staged)
        folder = staged / files.PLOTS_FOLDER
        plots = {p.stem.replace("-", " "): f"{folder.name}/{p.name}" for p in sorted(folder.glob("*.png"))}
        items = load_items(staged) if items is None else _aligned(items, tokenizer)
        recipe = read_recipe(staged)
        card = model_card(
            model=facts,
            tokenizer=tokenizer,
            items=items,
            recipe=recipe,
            metrics=metrics,
            plots=plots,
            card_data=card_data,
        )
    (staged / README_NAME).write_text(card, encoding="utf-8")
