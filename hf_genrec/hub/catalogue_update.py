"""A changed catalogue carried through a whole artefact: tokenizer, trie, model tables, item table, quantizer, card.

`hf_genrec.identifiers.life_cycle` changes the codes; here the model follows. What the model has per *code* is untouched, since
codebooks never change. What it has per *item* (catalogue buffers, free item vectors) gets rows for new items and loses those
of removed ones, so that a new item can be recommended at once. Tries are built per catalogue fingerprint, so they follow by
themselves.

Shape legend: N items, M items added, E and F widths of vectors.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_genrec.errors import ArtifactError, IncompatibleComponentsError, ItemTableError
from hf_genrec.identifiers.feature_transforms import FEATURES_FILE, ItemFeatures
from hf_genrec.identifiers.life_cycle import CatalogueChange, add_items, reassign, remove_items
from hf_genrec.identifiers.quantizers.auto_quantizer import load_quantizer
from hf_genrec.identifiers.tag_path import TAG_PATHS_FILE

from .artifact import Artifact, load_artifact
from .artifact_files import PLOTS_FOLDER, QUANTIZER_FOLDER
from .identifier_plots import identifier_pictures
from .saving import save_artifact

logger = logging.getLogger(__name__)


def update_catalogue(
    model: Any, change: CatalogueChange, item_features: np.ndarray | None = None, *, old_tokenizer: Any = None
) -> Any:
    """The model for the changed catalogue; the given one is left as it was.

    Args:
        model: of the catalogue before the change.
        change: from `add_items`, `remove_items` or `reassign`.
        item_features: input features (M, F) of the new (or reassigned) items, for models that read them.
        old_tokenizer: of the catalogue before; checked where given.

    Per-item parameters of a new item (a free vector, say) are the mean of those of the others: nothing is known of it.

    Raises:
        IncompatibleComponentsError: a model of another catalogue, one with codes of other sizes, one that reads item texts
            or facets (whose tables this does not make), or features that are missing.
    """
    config, tokenizer = model.config, change.tokenizer
    before = getattr(old_tokenizer, "catalogue_fingerprint", None)
    if before and getattr(config, "catalogue_fingerprint", before) not in (before, None):
        raise IncompatibleComponentsError(
            "the model was made for another catalogue than the one that changed: load both"
        )
    for method, what in (("set_content", "item texts"), ("set_facets", "facets of items")):
        if hasattr(model, method):
            raise IncompatibleComponentsError(
                f"{type(model).__name__} reads {what}, which a change of the catalogue does not make: train the recipe again"
            )
    if list(getattr(config, "codebook_sizes", tokenizer.codebook_sizes)) != list(tokenizer.codebook_sizes):
        raise IncompatibleComponentsError(
            f"the model has codebooks {list(config.codebook_sizes)}, the changed catalogue {list(tokenizer.codebook_sizes)}: "
            "codebooks must stay; add items with add_items"
        )
    new_config = copy.deepcopy(config)
    new_config.catalogue_fingerprint = tokenizer.catalogue_fingerprint
    if not getattr(config, "num_items", 0):
        updated = copy.deepcopy(model)
        updated.config.catalogue_fingerprint = tokenizer.catalogue_fingerprint
        return _with_codes(updated, change, None)
    new_config.num_items = tokenizer.num_items
    features = _all_features(model, change, item_features)
    with torch.random.fork_rng(devices=[]):
        updated = type(model)(new_config)
    updated.load_state_dict(_rows_changed(model.state_dict(), updated.state_dict(), change))
    updated = _with_codes(updated.to(device=model.device, dtype=model.dtype), change, features)
    for name in ("generation_config", "recommendation_config"):
        if hasattr(model, name):
            setattr(updated, name, copy.deepcopy(getattr(model, name)))
    return updated.train(model.training)


def _rows_changed(old: dict[str, Any], new: dict[str, Any], change: CatalogueChange) -> dict[str, Any]:
    """The old state with the rows of the new catalogue wherever a tensor has one row per item."""
    kept = torch.as_tensor(change.kept_rows)
    result = {}
    for name, tensor in old.items():
        target = new[name]
        if tensor.shape == target.shape:
            result[name] = tensor
            continue
        if tensor.shape[1:] != target.shape[1:] or len(target) != change.tokenizer.num_items:
            raise IncompatibleComponentsError(
                f"tensor {name!r} of shape {tuple(tensor.shape)} should become {tuple(target.shape)}, which is no row per "
                "item: train the recipe again"
            )
        rows = tensor[kept.to(tensor.device)]
        missing = len(target) - len(rows)
        if missing:
            more = rows.float().mean(0, keepdim=True).to(rows.dtype) if rows.is_floating_point() else rows[:1] * 0
            rows = torch.cat([rows, more.expand(missing, *rows.shape[1:])])
        result[name] = rows
    return result


def _all_features(model: Any, change: CatalogueChange, item_features: np.ndarray | None) -> np.ndarray | None:
    """Input features (N, F) of the whole new catalogue; None for models that read none."""
    width = int(getattr(model.config, "item_feature_dim", 0) or 0)
    if not width:
        return None
    held = next((b for name, b in model.named_buffers() if name.endswith("item_features")), None)
    if held is None:
        raise IncompatibleComponentsError(f"{type(model).__name__} holds no item features to go on from: train again")
    rows = held.detach().float().cpu().numpy()[change.kept_rows]
    changed = change.added or change.reassigned
    if not changed:
        return rows
    given = None if item_features is None else np.asarray(item_features, np.float32)
    if given is None or given.shape != (len(changed), width):
        shape = "none" if given is None else str(given.shape)
        raise IncompatibleComponentsError(
            f"the model reads {width} features per item: give item_features of shape ({len(changed)}, {width}), got {shape}"
        )
    if change.added:
        return np.concatenate([rows, given])
    rows = rows.copy()
    rows[change.tokenizer.item_index(list(changed))] = given
    return rows


def _with_codes(model: Any, change: CatalogueChange, features: np.ndarray | None) -> Any:
    if not hasattr(model, "set_catalogue"):
        return model
    cold = next((b for name, b in model.named_buffers() if name.split(".")[-1] == "cold_items"), None)
    old_cold = None if cold is None else cold.clone()
    codes = change.tokenizer.codes
    model.set_catalogue(codes) if features is None else model.set_catalogue(codes, features)
    if cold is not None and old_cold is not None and len(cold):
        cold.copy_(old_cold)
        if change.added:
            cold[len(change.kept_rows) :] = True  # training never saw them
    return model


# ---------------------------------------------------------------------------------------------------- a whole artefact


def add_items_to_artifact(
    folder: str | os.PathLike,
    items: Any,
    vectors: np.ndarray | None = None,
    *,
    item_features: np.ndarray | None = None,
    collisions: str = "auto",
    when_full: str = "error",
) -> CatalogueChange:
    """Give new items codes and save the artefact with them, in one step.

    Args:
        folder: an artefact that was saved with its quantizer.
        items: `ItemTable` (or any source of one) with a row for every new item.
        vectors: (M, E) as the quantizer was fitted on; default: made from the item table as the recipe's content features
            were; features of behaviour are filled in from the nearest items by content.
        item_features: (M, F) for models that read features; default: likewise.
        collisions, when_full: see `add_items`.

    Raises:
        ArtifactError: no artefact, or one without its quantizer.
        GenRecError: as `add_items` and `update_catalogue`.
    """
    from hf_genrec.data.items import ItemTable

    artifact = _whole(folder)
    items = ItemTable.from_source(items)
    quantizer, known = _saved_quantizer(artifact), _saved_features(artifact)
    new_blocks = None
    if vectors is None:
        if known is None:
            raise ArtifactError(
                f"{artifact.folder}: no {QUANTIZER_FOLDER}/{FEATURES_FILE} to make the vectors of new items with; give vectors"
            )
        new_blocks = known.of_new_items(items)
        vectors = known.identifier_vectors(new_blocks)
        item_features = known.model_vectors(new_blocks) if item_features is None else item_features
    change = add_items(
        artifact.tokenizer, quantizer, items.item_ids, vectors, collisions=collisions, when_full=when_full
    )
    model = update_catalogue(artifact.model, change, item_features, old_tokenizer=artifact.tokenizer)
    features = None
    if known is not None and new_blocks is not None:
        features = known.changed(change.kept_rows, new_blocks)
    _save(artifact, model, change, _more_rows(artifact.items, items), quantizer, features)
    return change


def remove_items_from_artifact(folder: str | os.PathLike, item_ids: Sequence[str]) -> CatalogueChange:
    """Take items out of an artefact's catalogue and save it, in one step.

    Raises:
        ArtifactError: no artefact with model and tokenizer.
        GenRecError: as `remove_items` and `update_catalogue`.
    """
    artifact = _whole(folder)
    change = remove_items(artifact.tokenizer, item_ids)
    model = update_catalogue(artifact.model, change, old_tokenizer=artifact.tokenizer)
    has_quantizer = (artifact.folder / QUANTIZER_FOLDER).is_dir()
    known = _saved_features(artifact)
    _save(
        artifact,
        model,
        change,
        None if artifact.items is None else artifact.items.align(change.tokenizer.item_ids),
        _saved_quantizer(artifact) if has_quantizer else None,
        None if known is None else known.changed(change.kept_rows),
    )
    return change


def reassign_in_artifact(
    folder: str | os.PathLike,
    item_ids: Sequence[str],
    vectors: np.ndarray,
    *,
    item_features: np.ndarray | None = None,
    collisions: str = "auto",
    when_full: str = "error",
) -> CatalogueChange:
    """New codes for items of an artefact whose vectors changed, saved in one step. Arguments: `reassign`.

    The saved feature blocks keep the old vectors of these items, so they are left out of the new artefact: later additions
    need vectors of their own.

    Raises:
        ArtifactError: no artefact, or one without its quantizer.
        GenRecError: as `reassign` and `update_catalogue`.
    """
    artifact = _whole(folder)
    quantizer = _saved_quantizer(artifact)
    change = reassign(artifact.tokenizer, quantizer, item_ids, vectors, collisions=collisions, when_full=when_full)
    model = update_catalogue(artifact.model, change, item_features, old_tokenizer=artifact.tokenizer)
    _save(artifact, model, change, artifact.items, quantizer, None)
    return change


def _whole(folder: str | os.PathLike) -> Artifact:
    artifact = load_artifact(folder)
    if not Path(folder).is_dir():
        raise ArtifactError(f"{folder}: pull the artefact into a folder first; a catalogue is changed where it lies.")
    if artifact.model is None or not hasattr(artifact.tokenizer, "item_ids"):
        raise ArtifactError(
            f"{folder}: a catalogue is changed together with its model; this artefact lacks one of them."
        )
    return artifact


def _saved_quantizer(artifact: Artifact) -> Any:
    if not (artifact.folder / QUANTIZER_FOLDER).is_dir():
        raise ArtifactError(
            f"{artifact.folder}: no {QUANTIZER_FOLDER}/ folder, so a new item has no code: identifiers of this kind have no "
            "quantizer, or the artefact was saved without it; train the recipe again."
        )
    return load_quantizer(artifact.folder / QUANTIZER_FOLDER)


def _saved_features(artifact: Artifact) -> ItemFeatures | None:
    path = artifact.folder / QUANTIZER_FOLDER / FEATURES_FILE
    return ItemFeatures.load(path) if path.is_file() else None


def _more_rows(old: Any, new: Any) -> Any:
    """The artefact's item table with the new rows behind it; columns that only the new ones have are left out."""
    import pyarrow as pa

    from hf_genrec.data.items import ItemTable

    if old is None:
        return None
    columns = [
        new.table[name].cast(field.type) if name in new.columns else pa.nulls(len(new), field.type)
        for name, field in zip(old.table.column_names, old.table.schema, strict=True)
    ]
    try:
        added = pa.Table.from_arrays([_chunked(column) for column in columns], schema=old.table.schema)
        return ItemTable(pa.concat_tables([old.table, added]), text_fields=old.text_fields)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ItemTableError(f"the new items' table does not fit that of the artefact: {error}") from error


def _chunked(column: Any) -> Any:
    return column.combine_chunks() if hasattr(column, "combine_chunks") else column


def _save(
    artifact: Artifact, model: Any, change: CatalogueChange, items: Any, quantizer: Any, features: ItemFeatures | None
) -> None:
    note = (
        f"The catalogue changed after the measurement: {len(change.added)} items added, {len(change.removed)} removed, "
        f"{len(change.reassigned)} given new codes."
    )
    metrics = artifact.metrics
    if metrics is not None:
        notes = metrics.get("notes") or []
        metrics = {**metrics, "notes": [*([notes] if isinstance(notes, str) else notes), note]}
    pictures: dict[str, Any] = {}
    for path in sorted((artifact.folder / PLOTS_FOLDER).glob("*.png")):
        pictures[path.stem.replace("-", " ")] = path.read_bytes()
    beside = {TAG_PATHS_FILE: artifact.folder / QUANTIZER_FOLDER / TAG_PATHS_FILE}
    pictures |= identifier_pictures(change.tokenizer, None if features is None else features.identifier_vectors())
    save_artifact(
        artifact.folder,
        model=model,
        tokenizer=change.tokenizer,
        items=items,
        recipe=artifact.recipe,
        metrics=metrics,
        plots=pictures or None,
        quantizer=quantizer,
        item_features=features,
        quantizer_files={name: path.read_bytes() for name, path in beside.items() if path.is_file()},
    )
