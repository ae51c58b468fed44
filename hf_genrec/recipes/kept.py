"""Finished identifiers of a run, kept beside its checkpoints: `--resume` takes them up instead of fitting everything anew.

`<checkpoints>/identifiers` holds the feature blocks, the codes before the collision policy with the quantizer that made
them, and the tokenizer; `<checkpoints>/retrievers` every SASRec that was trained on the way (a feature block, a ranker's
retriever, a reward). Both are written in one step and belong to one recipe section, data set and seed: anything else is a
reason to fit again. Plain files, no pickle.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from transformers import AutoTokenizer

import hf_genrec
from hf_genrec.artifacts import staged_folder, verify_manifest
from hf_genrec.data.interactions import RecommendationData
from hf_genrec.data.splits import Split
from hf_genrec.errors import ArtifactError, TrainingError
from hf_genrec.hub.metrics_file import plain_json
from hf_genrec.identifiers.collision_groups import as_array
from hf_genrec.identifiers.feature_transforms import FittedBlock, ItemFeatures
from hf_genrec.identifiers.quantizers.auto_quantizer import can_save, load_quantizer, save_quantizer
from hf_genrec.identifiers.tag_path import TAG_PATHS_FILE, TagPathReader
from hf_genrec.recipes.build import Identifiers, build_identifiers
from hf_genrec.recipes.resolver import Recipe
from hf_genrec.recipes.stages.context import FeatureBlock, Quantized, StageContext

logger = logging.getLogger(__name__)
IDENTIFIERS, RETRIEVERS = "identifiers", "retrievers"
_ABOUT, _FEATURES, _ARRAYS = "about.json", "features.safetensors", "arrays.safetensors"
_READERS: dict[str, Any] = {TAG_PATHS_FILE: TagPathReader}  # of `Quantized.files`


def kept_identifiers(
    recipe: Recipe,
    data: RecommendationData,
    split: Split,
    checkpoints: Path,
    *,
    seed: int,
    resume: bool,
    progress: bool = True,
) -> Identifiers:
    """`build_identifiers`, kept in the checkpoints folder; with `resume` those of the interrupted run where they fit.

    Without `resume` everything that an earlier run left there is removed once the new identifiers are made.

    Raises:
        TrainingError: the kept ones are of another recipe section, data set or seed, and training has begun on them.
        GenRecError: as `build_identifiers`.
    """
    folder, key = checkpoints / IDENTIFIERS, _key(recipe, data, split, seed)
    trained = KeptRetrievers(
        checkpoints / RETRIEVERS, {name: key[name] for name in ("data", "seed", "version")}, resume
    )
    if resume and folder.exists():
        try:
            found = _load(folder, key, StageContext(data, split, seed, progress, retrievers=trained))
        except ArtifactError as error:
            _check_nothing_was_trained(checkpoints, error)
            logger.warning("the identifiers are made anew: %s", error)
        else:
            if progress:
                print("identifiers of the interrupted run are used again", flush=True)
            return found
    made = build_identifiers(recipe, data, split, seed=seed, progress=progress, retrievers=trained)
    if not resume and checkpoints.is_dir():
        for path in checkpoints.iterdir():
            if path.is_dir() and path.name != RETRIEVERS:  # those are this run's, or checked before they are used
                shutil.rmtree(path)
    reason = _not_kept(made)
    if reason:
        logger.info("a resumed run makes the identifiers anew: %s", reason)
    else:
        _save(folder, key, made)
    return made


class _OtherRunError(ArtifactError):
    """Kept identifiers of another recipe section, data set or seed."""


def _check_nothing_was_trained(checkpoints: Path, error: ArtifactError) -> None:
    """A checkpoint of other codes loads without a word and means nothing: what was trained on them cannot go on."""
    begun = [path.name for path in checkpoints.iterdir() if path.name not in (IDENTIFIERS, RETRIEVERS)]
    if isinstance(error, _OtherRunError) and any(not name.startswith(".") for name in begun):
        raise TrainingError(
            f"{error} Its training ({sorted(begun)[-1]}) cannot go on with other identifiers: resume with the settings it was "
            "begun with, or start anew without --resume."
        ) from error


# ---------------------------------------------------------------------------------------------------------------- the key


def _key(recipe: Recipe, data: RecommendationData, split: Split, seed: int) -> dict[str, Any]:
    """What identifiers follow from, as plain values."""
    sections = {"features": recipe.features, "identifiers": recipe.identifiers}
    key = sections | {"files": sorted(_files(sections)), "data": _digest(data, split), "seed": seed}
    return json.loads(json.dumps(key | {"version": hf_genrec.__version__}))


def _files(value: Any) -> Iterator[list[Any]]:
    """Path, size and time of every file that a section names (item vectors of one's own, say)."""
    if isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _files(one)
    elif isinstance(value, str) and Path(value).is_file():
        facts = Path(value).stat()
        yield [value, facts.st_size, facts.st_mtime_ns]


def _digest(data: RecommendationData, split: Split) -> str:
    """Identity of the training part, the catalogue and its item table."""
    digest = hashlib.sha256(json.dumps([split.protocol, data.item_ids]).encode())
    for part in (split.train.offsets, split.train.items, split.train.timestamps):
        digest.update(b"-" if part is None else np.ascontiguousarray(part).tobytes())
    if data.items is not None:
        digest.update(json.dumps([data.items.text_fields, data.items.table.to_pydict()], default=str).encode())
    return digest.hexdigest()


def _check_key(folder: Path, key: dict[str, Any]) -> dict[str, Any]:
    """Content of the folder's `about.json`.

    Raises:
        ArtifactError: a folder that is not whole, or of another key (what differs is named).
    """
    verify_manifest(folder)
    try:
        about = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
        kept = dict(about["key"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{folder / _ABOUT} cannot be read ({error}).") from error
    other = [name for name in key if kept.get(name) != key[name]]
    if other:
        kind = ArtifactError if set(other) <= {"version", "files"} else _OtherRunError
        raise kind(f"{folder} was made with other values of: {', '.join(other)}.")
    return about


# -------------------------------------------------------------------------------------------------------------- the files


def _not_kept(made: Identifiers) -> str:
    """Why identifiers cannot be written and read back as they are; empty where they can."""
    for name, block in made.context.blocks.items():
        if {block.symmetric.dtype, block.inputs.dtype} != {np.dtype(np.float32)}:
            return f"the vectors of block {name!r} are no float32."
    quantizers = _quantizers(made.quantized)
    unknown = [type(one).__name__ for one in quantizers if one is not None and not can_save(one)]
    unknown += [name for name in (made.quantized.files if made.quantized else ()) if name not in _READERS]
    return f"{unknown[0]} cannot be read back." if unknown else ""


def _quantizers(made: Quantized | None) -> list[Any]:
    if made is None:
        return []
    return list(made.quantizer) if isinstance(made.quantizer, list) else [made.quantizer]


def _save(folder: Path, key: dict[str, Any], made: Identifiers) -> None:
    quantized, blocks = made.quantized, made.context.blocks
    about: dict[str, Any] = {"key": key, "record": plain_json(made.record, "identifiers"), "quantized": None}
    arrays = {"torch_random": torch.get_rng_state().numpy()}  # where what comes behind the fit goes on
    with staged_folder(folder) as staged:
        made.tokenizer.save_pretrained(staged / "tokenizer")
        fitted = {name: FittedBlock(b.symmetric, b.inputs, b.transform) for name, b in blocks.items()}
        ItemFeatures(fitted, [], []).save(staged / _FEATURES)
        if quantized is not None:
            quantizers, books = _quantizers(quantized), quantized.codebooks
            about["quantized"] = {
                "codebook_sizes": [int(size) for size in quantized.codebook_sizes],
                "codebooks": None if books is None else len(books),
                "quantizers": [one is not None for one in quantizers],
                "joined": isinstance(quantized.quantizer, list),
                "record": plain_json(quantized.record, "identifiers"),
                "files": sorted(quantized.files),
            }
            arrays["codes"] = as_array(quantized.codes_NL)
            arrays |= {f"codebook_{level}": as_array(book) for level, book in enumerate(() if books is None else books)}
            if quantized.features is not None:
                arrays["features"] = as_array(quantized.features)
            for number, quantizer in enumerate(quantizers):
                if quantizer is not None:
                    save_quantizer(quantizer, staged / f"quantizer-{number}")
            for name, part in quantized.files.items():
                part.save(staged / name)
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, str(staged / _ARRAYS))
        (staged / _ABOUT).write_text(json.dumps(about), encoding="utf-8")


def _load(folder: Path, key: dict[str, Any], context: StageContext) -> Identifiers:
    """What `_save` wrote, with the random numbers of torch where they stood.

    Raises:
        ArtifactError: see `_check_key`, or files that cannot be read.
    """
    about = _check_key(folder, key)
    try:
        for name, block in ItemFeatures.load(folder / _FEATURES).blocks.items():
            context.blocks[name] = FeatureBlock(block.symmetric, block.inputs, block.transform)
        arrays, kept, quantized = load_file(folder / _ARRAYS), about["quantized"], None
        if kept is not None:
            quantizers = [
                load_quantizer(folder / f"quantizer-{number}") if there else None
                for number, there in enumerate(kept["quantizers"])
            ]
            books = kept["codebooks"]
            quantized = Quantized(
                arrays["codes"],
                tuple(kept["codebook_sizes"]),
                None if books is None else [arrays[f"codebook_{level}"] for level in range(books)],
                arrays.get("features"),
                quantizers if kept["joined"] else quantizers[0],
                kept["record"],
                {name: _READERS[name].load(folder / name) for name in kept["files"]},
            )
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
        torch.set_rng_state(torch.from_numpy(arrays["torch_random"]))
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ArtifactError(f"{folder} cannot be read ({error}).") from error
    return Identifiers(tokenizer, context, about["record"], quantized)


class KeptRetrievers(MutableMapping):
    """Trained recommenders and their tokenizers by options, as `StageContext.retrievers` holds them, each kept in a folder.

    Args:
        folder: of all of them.
        key: data, seed and version; a kept one of others is trained again.
        read: use what an earlier process kept.
    """

    def __init__(self, folder: Path, key: dict[str, Any], read: bool) -> None:
        self.folder, self.key, self.read = folder, key, read
        self.loaded: dict[Any, tuple[Any, Any]] = {}

    def _place(self, options: Any) -> Path:
        return self.folder / "-".join(f"{value:g}" for value in options)

    def __getitem__(self, options: Any) -> tuple[Any, Any]:
        if options not in self.loaded:
            place = self._place(options)
            if not self.read or not place.is_dir():
                raise KeyError(options)
            try:
                _check_key(place, self.key)
                from hf_genrec.models.sasrec.modeling_sasrec import SASRecForCausalLM

                model = SASRecForCausalLM.from_pretrained(place, local_files_only=True).eval()
                self.loaded[options] = model, AutoTokenizer.from_pretrained(place)
            except (OSError, ValueError) as error:  # ArtifactError too
                logger.warning("a retriever is trained again: %s", error)
                raise KeyError(options) from error
        return self.loaded[options]

    def __setitem__(self, options: Any, trained: tuple[Any, Any]) -> None:
        self.loaded[options] = trained
        with staged_folder(self._place(options)) as staged:
            for part in trained:
                part.save_pretrained(staged)
            (staged / _ABOUT).write_text(json.dumps({"key": self.key}), encoding="utf-8")

    def __delitem__(self, options: Any) -> None:
        del self.loaded[options]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loaded)

    def __len__(self) -> int:
        return len(self.loaded)
