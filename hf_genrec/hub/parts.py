"""The parts of an artefact folder, each read from its files with errors that name the file.

Nothing here runs code from the folder: classes are looked up among those that are installed, never imported by a name
that a file gives, and weights are safetensors.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

from hf_genrec.errors import ArtifactError, GenRecError, IncompatibleComponentsError

from .artifact_files import ITEMS_NAME, RECIPE_NAME


def check_catalogue(model: Any, tokenizer: Any, items: Any = None) -> None:
    """Raise IncompatibleComponentsError unless model, tokenizer and item table are about the same catalogue."""
    wanted = getattr(getattr(model, "config", None), "catalogue_fingerprint", None)
    present = getattr(tokenizer, "catalogue_fingerprint", None)
    if wanted and present and wanted != present:
        raise IncompatibleComponentsError(
            f"the model was made for catalogue {wanted[:12]}, the tokenizer carries {present[:12]}: save the tokenizer "
            "that the model was trained with."
        )
    if items is not None and hasattr(tokenizer, "item_ids"):
        missing = set(tokenizer.item_ids).difference(items.item_ids)
        if missing:
            raise IncompatibleComponentsError(
                f"the item table has no row for {len(missing):,} items of the tokenizer's catalogue, for example "
                f"{min(missing)!r}: pass the table that the identifiers were made from."
            )


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` as a dictionary. Raises ArtifactError."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read as JSON ({error}): save the artefact again.") from error
    if not isinstance(config, dict):
        raise ArtifactError(f"{path} must hold one JSON object: save the artefact again.")
    return config


def read_recipe(folder: Path) -> dict[str, Any] | None:
    """`recipe.yaml` as a dictionary, None where there is none. Raises ArtifactError."""
    path = folder / RECIPE_NAME
    if not path.exists():
        return None
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ArtifactError(f"{path} cannot be read as YAML ({error}): save the artefact again.") from error
    if not isinstance(recipe, dict):
        raise ArtifactError(f"{path} must hold one table of settings: save the artefact again.")
    return recipe


def load_items(folder: Path) -> Any:
    """`items.parquet` as an ItemTable, None where there is none. Raises ArtifactError."""
    path = folder / ITEMS_NAME
    if not path.exists():
        return None
    from hf_genrec.data.items import ItemTable

    try:
        return ItemTable.from_parquet(path)
    except (GenRecError, OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} cannot be read as an item table ({error}): save the artefact again.") from error


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a local folder, ours or one of transformers; code from the folder never runs."""
    from transformers import AutoTokenizer

    import hf_genrec.identifiers.tokenization_item  # noqa: F401 (registers with AutoTokenizer)

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except GenRecError:
        raise
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ArtifactError(f"{folder}: the tokenizer cannot be built from its files: {error}") from error


def load_model(folder: Path, options: dict[str, Any]) -> Any:
    from hf_genrec.generation.configuration_recommendation import RECOMMENDATION_CONFIG_NAME, RecommendationConfig

    model_class = model_class_of(folder)
    try:
        model = model_class.from_pretrained(str(folder), local_files_only=True, use_safetensors=True, **options)
        if hasattr(model, "recommendation_config") and (folder / RECOMMENDATION_CONFIG_NAME).exists():
            model.recommendation_config = RecommendationConfig.from_pretrained(folder, local_files_only=True)
        return model
    except GenRecError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ArtifactError(f"{folder}: {model_class.__name__} cannot be built from its files: {error}") from error


def model_class_of(folder: Path) -> Any:
    """The class named in `config.architectures`: ours, one of transformers, or one registered with its Auto classes.

    Raises:
        ArtifactError: this installation has no such class; nothing is imported by name to find it.
    """
    import transformers
    from transformers import AutoConfig

    from hf_genrec.models.auto import AutoModelForRecommendation, register_auto_classes

    register_auto_classes()
    name = (read_config(folder).get("architectures") or [None])[0]
    try:
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{folder / 'config.json'} is not a model configuration: {error}") from error
    autos = [AutoModelForRecommendation, transformers.AutoModelForSeq2SeqLM, transformers.AutoModelForCausalLM]
    model_class: Any
    for auto in [*autos, transformers.AutoModel]:
        mapping: Any = auto._model_mapping
        model_class = mapping.get(type(config), None)
        for candidate in model_class if isinstance(model_class, tuple) else (model_class,):
            if candidate is not None and (name is None or candidate.__name__ == name):
                return candidate
    model_class = getattr(transformers, str(name), None)
    if isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel):
        return model_class
    raise ArtifactError(
        f"{folder / 'config.json'}: architecture {name!r} is not known here: install or import the package that "
        "defines it."
    )
