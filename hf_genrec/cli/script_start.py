"""The artefact that a preference or reward run starts from, and its data."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_genrec.cli.script_options import DataArguments, config_file, value_of
from hf_genrec.data.interactions import RecommendationData
from hf_genrec.data.splits import Split
from hf_genrec.errors import ArtifactError, IncompatibleComponentsError, RequestError
from hf_genrec.evaluation.catalogue import align_to_catalogue
from hf_genrec.generation.configuration_recommendation import RecommendationConfig
from hf_genrec.generation.recommend import recommendation_config_of
from hf_genrec.hub import Artifact, load_artifact, pull_artifact
from hf_genrec.hub.artifact_files import QUANTIZER_FOLDER
from hf_genrec.hub.parts import read_config
from hf_genrec.identifiers.feature_transforms import FEATURES_FILE, ItemFeatures
from hf_genrec.identifiers.quantizers.auto_quantizer import load_quantizer
from hf_genrec.recipes.pipeline import load_data_section


def start_facts(words: Sequence[str] | None) -> tuple[bool, dict[str, Any]]:
    """Is the artefact that `--model` names an encoder-decoder, and which defaults does it bring? (Before all is parsed.)

    Raises:
        RequestError: a `--config` that cannot be read.
        ArtifactError: a folder without a model.
    """
    line, config = config_file(sys.argv[1:] if words is None else words)
    model = value_of("model", line, config)
    if not model or ("--help" in line and not Path(model).is_dir()):
        return False, {}
    folder = Path(model) if Path(model).is_dir() else _pulled(str(model))
    served = RecommendationConfig.from_pretrained(folder, local_files_only=True)
    return bool(read_config(folder).get("is_encoder_decoder")), {"max_history": served.max_history}


def _pulled(name: str) -> Path:
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise ArtifactError(f"--model {name} is not a folder: give an artefact folder or a Hub id like owner/name.")
    return pull_artifact(name)


def open_start(folder: str | None) -> Artifact:
    """The artefact to align, its model with the configuration that lies beside it.

    Raises:
        RequestError: no folder given.
        IncompatibleComponentsError: an artefact that cannot recommend.
    """
    if not folder:
        raise RequestError("--model is missing: give the artefact folder that scripts/sft.py or genrec train wrote.")
    artifact = load_artifact(folder)
    if artifact.model is None or not hasattr(artifact.tokenizer, "item_token_table"):
        raise IncompatibleComponentsError(f"{folder} has no model, or no tokenizer with a catalogue: train one first.")
    artifact.model.recommendation_config = recommendation_config_of(artifact.model)
    return artifact


def data_of(
    artifact: Artifact, arguments: DataArguments, columns: Sequence[str] = ()
) -> tuple[RecommendationData, Split, dict[str, Any]]:
    """Data, split and the section that describes them: as the artefact was trained, where nothing else is said.

    Args:
        columns: of the log, kept beside the interactions.

    Raises:
        RequestError: no data set is named anywhere.
        IncompatibleComponentsError: data with items that the artefact does not know.
    """
    section = dict((artifact.recipe or {}).get("data") or {}) | data_section(arguments)
    if columns:
        section["extra_columns"] = list(dict.fromkeys([*(section.get("extra_columns") or []), *columns]))
    dataset = arguments.dataset or (artifact.metrics or {}).get("dataset")
    if dataset is None:
        raise RequestError("name the data: --dataset movielens-100k, or the path of a log.")
    item_ids = artifact.tokenizer.item_ids
    data, split = load_data_section(
        section,
        dataset,
        items=arguments.items,
        data_dir=arguments.data_dir,
        align=lambda data: align_to_catalogue(data, item_ids),
    )
    if data.items is None and artifact.items is not None:
        data = dataclasses.replace(data, items=artifact.items)
    return data, split, section


def data_section(arguments: DataArguments) -> dict[str, Any]:
    """The `data` section of a recipe, of what is said on the command line."""
    names = ("protocol", "min_user", "min_item", "extra_columns")
    return {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}


def ends_items(artifact: Artifact) -> bool:
    """Was the model trained to end items with the end token?"""
    return bool(((artifact.recipe or {}).get("model") or {}).get("end_items"))


def kept_quantizer(artifact: Artifact) -> dict[str, Any]:
    """The quantizer of an artefact as arguments of `save_artifact`: training did not change the codes."""
    folder = artifact.folder / QUANTIZER_FOLDER
    if not folder.is_dir():
        return {}
    features = folder / FEATURES_FILE
    own = {"config.json", "model.safetensors", "quantizer.safetensors", FEATURES_FILE}
    beside = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name not in own}
    return {
        "quantizer": load_quantizer(folder),
        "item_features": ItemFeatures.load(features) if features.is_file() else None,
        "quantizer_files": beside,
    }
