"""From a recipe name or file to a checked, complete recipe: one level of `extends`, overrides, nearest-name errors.

A recipe is data: a YAML file of at most 40 lines whose values carry their provenance in comments. Nothing in it is
importable by a dotted path. `resolve_recipe` checks every key and the fit of the components before any data is read.
"""

from __future__ import annotations

import copy
import difflib
import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from hf_genrec.errors import IncompatibleComponentsError, RecipeError, TrainingError
from hf_genrec.generation.strategies import DECODING_STRATEGIES
from hf_genrec.identifiers.collisions import COLLISION_POLICIES, check_collision_options
from hf_genrec.recipes.components import FEATURES, LOSSES, METHODS, MODELS, QUANTIZERS, Component

FOLDER = Path(__file__).parent
STATUSES = ("composes", "smoke", "works", "parity", "reproduced")
STAGES = ("creation", "alignment", "generation")
HEADER = {"name": str, "title": str, "status": str, "stage": str, "paper": list, "extends": str}
DATA = {
    "protocol": str,
    "min_user": int,
    "min_item": int,
    "min_rating": float,
    "shuffle_ties": int,
    "user_column": str,
    "item_column": str,
    "timestamp_column": str,
    "rating_column": str,
    "extra_columns": list,
    "time_unit": str,
    "encoding": str,
    "validation_fraction": float,
    "test_fraction": float,
}
IDENTIFIERS = {
    "quantizer": str,
    "features": list,
    "losses": dict,
    "collisions": str,
    "collision_options": dict,
    "num_user_tokens": int,
    "history_eos": bool,
}
AT_VALIDATION = "validation"  # value of a weight that is chosen on the validation part
GENERATION = {
    "k": int,
    "num_beams": int,
    "exclude_seen": bool,
    "renormalize": bool,
    "dense_weight": (float, int, str),
    "repeat_weight": (float, int, str),
    "batch_size": int,
    "decoding": str,
    "decoding_options": dict,
}
COLLISIONS = tuple(COLLISION_POLICIES)


@dataclass
class Recipe:
    """A resolved recipe. Sections are plain dicts; `provenance` maps "section.key" to the comment behind the value."""

    name: str
    title: str
    status: str
    stage: str
    paper: list[str]
    data: dict[str, Any] = field(default_factory=dict)
    features: dict[str, dict[str, Any]] = field(default_factory=dict)
    identifiers: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    generation: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as stored in an artefact's recipe.yaml (without the comments)."""
        return {f.name: copy.deepcopy(getattr(self, f.name)) for f in fields(self) if f.name != "provenance"}

    def needs_text(self) -> bool:
        """True when items without text cannot be used."""
        quantizer = QUANTIZERS[self.identifiers["quantizer"]]
        block = "text" in self.features and self.features["text"].get("when_missing", "error") == "error"
        return block or "item_text" in quantizer.needs or "item_content" in MODELS[self.model["type"]].gives


def recipe_names() -> list[str]:
    """Names of the shipped recipes, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def nearest(name: str, choices: Any) -> str:
    """A hint that names the closest choice, or lists them all."""
    choices = sorted(map(str, choices))
    if not choices:
        return "there is nothing to choose from here"
    close = difflib.get_close_matches(str(name), choices, n=1)
    return f"did you mean {close[0]!r}?" if close else f"choose one of: {', '.join(choices)}"


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read ({error}); give a recipe name or a YAML file in UTF-8.") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: a recipe is a mapping with name, model, ..., got {type(content).__name__}.")
    return content


def _find(name_or_path: str) -> Path:
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml"):
        return path
    shipped = FOLDER / f"{name_or_path}.yaml"
    if not shipped.is_file():
        raise RecipeError(f"unknown recipe {name_or_path!r}: {nearest(name_or_path, recipe_names())}")
    return shipped


def _merge(base: dict[str, Any], delta: dict[str, Any]) -> dict[str, Any]:
    merged = copy.deepcopy(base)
    for key, value in delta.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _merge(merged[key], value)
        elif value is None:
            merged.pop(key, None)  # "text: null" removes an inherited block or value
        else:
            merged[key] = copy.deepcopy(value)
    return merged


def _provenance(path: Path) -> dict[str, str]:
    """Comments behind values, by "section.key": provenance is part of the file, so it is read from the file."""
    found, section = {}, ""
    for line in path.read_text(encoding="utf-8").splitlines():
        body, _, comment = line.partition(" #")
        key = body.strip().partition(":")[0]
        if not key or key.startswith("#"):
            continue
        section = key if not line.startswith(" ") else section
        if comment.strip():
            found[key if not line.startswith(" ") else f"{section}.{key}"] = comment.strip()
    return found


def _check(where: str, values: Any, allowed: dict[str, Any]) -> None:
    if not isinstance(values, dict):
        raise RecipeError(f"{where} must be a mapping, got {type(values).__name__}.")
    for key, value in values.items():
        if key not in allowed:
            raise RecipeError(f"unknown key {where}.{key}: {nearest(key, allowed)}")
        kind = allowed[key]
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if float in kinds and isinstance(value, int) and not isinstance(value, bool):
            continue
        if value is None or (isinstance(value, kinds) and not (isinstance(value, bool) and bool not in kinds)):
            continue
        names = " or ".join(k.__name__ for k in kinds)
        raise RecipeError(f"{where}.{key} must be {names}, got {value!r}; YAML reads 1e-3 as text, write 1.0e-3.")


def model_options(model_type: str) -> dict[str, Any]:
    """Configuration fields a recipe may set for a model, with their types."""
    config_class = MODELS[model_type].load().config_class
    kinds = (int, float, bool, str, list, dict)
    own = {name for klass in config_class.__mro__ for name in getattr(klass, "__annotations__", {})}
    derived = {
        "vocab_size",
        "codebook_sizes",
        "level_offsets",
        "num_items",
        "item_feature_dim",
        "item_feature_dims",
        "content_vocab_size",
        "catalogue_fingerprint",
    }
    gives = MODELS[model_type].gives
    features: dict[str, Any] = {"features": list} if "item_features" in gives else {}
    features |= {"base": str, "instruction": str, "response": str} if "language_base" in gives else {}
    return dict.fromkeys(own - derived, kinds) | {"type": str} | features


def training_options() -> dict[str, Any]:
    """Training arguments a recipe may set."""
    from hf_genrec.alignment.trainers.recommender import RecommenderTrainingArguments

    kinds = (int, float, bool, str, list, dict)
    extra = {"window": int, "max_history": int, "samples_per_epoch": int, "method": str, "method_options": dict}
    return {f.name: kinds for f in fields(RecommenderTrainingArguments) if f.name != "output_dir"} | extra


def _choice(where: str, value: Any, choices: Any) -> None:
    if value not in choices:
        raise RecipeError(f"{where}: unknown choice {value!r}: {nearest(value, choices)}")


def _component(where: str, value: Any, table: dict[str, Component]) -> Component:
    _choice(where, value, table)
    return table[value]


def _flatten_overrides(recipe: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Turn {"training.learning_rate": 1} and unique short forms {"learning_rate": 1} into nested sections."""
    model_type = (recipe.get("model") or {}).get("type")
    quantizer = QUANTIZERS.get(str((recipe.get("identifiers") or {}).get("quantizer")), QUANTIZERS["atomic"])
    sections: dict[str, dict[str, Any]] = {
        "data": DATA,
        "identifiers": IDENTIFIERS | quantizer.options,
        "model": model_options(model_type) if model_type in MODELS else {},
        "training": training_options(),
        "generation": GENERATION,
        "features": dict.fromkeys(FEATURES, dict),
        **{f"features.{name}": component.options for name, component in FEATURES.items()},
    }
    nested: dict[str, Any] = {}
    for key, value in overrides.items():
        section, _, leaf = key.rpartition(".")
        if not section:
            owners = [name for name, keys in sections.items() if leaf in keys]
            if not owners:
                every = sorted({k for keys in sections.values() for k in keys})
                raise RecipeError(f"unknown option --{key}: {nearest(key, every)}")
            preferred = [name for name in ("training", "generation") if name in owners]
            if len(owners) > 1 and not preferred:
                options = ", ".join(f"--{name}.{leaf}" for name in owners)
                raise RecipeError(f"--{key} is ambiguous: write {options}")
            section = owners[0] if len(owners) == 1 else preferred[0]
        elif section not in sections:
            raise RecipeError(f"unknown section in --{key}: {nearest(section, sections)}")
        target = nested
        for part in section.split("."):
            target = target.setdefault(part, {})
        target[leaf] = value
    return nested


def resolve_recipe(name_or_path: str, overrides: dict[str, Any] | None = None) -> Recipe:
    """Read, extend, override and check a recipe.

    Args:
        name_or_path: a shipped name (see `recipe_names`) or a `.yaml` file.
        overrides: "section.key" or unique short keys to values.

    Raises:
        RecipeError: unknown key or choice (naming the nearest one), wrong type, two levels of `extends`.
        IncompatibleComponentsError: components that do not fit together.

    Example:
        >>> resolve_recipe("sasrec").model["type"]
        'sasrec'
    """
    path = _find(name_or_path)
    content, provenance = _read(path), _provenance(path)
    if "extends" in content:
        base_path = _find(str(content["extends"]))
        base = _read(base_path)
        if "extends" in base:
            raise RecipeError(
                f"{path}: extends {content['extends']!r}, which itself extends: only one level is allowed."
            )
        content = _merge(base, {key: value for key, value in content.items() if key != "extends"})
        provenance = _provenance(base_path) | provenance
    content = _merge(content, _flatten_overrides(content, overrides or {}))
    _check_recipe(path.name, content)
    return Recipe(**content, provenance=provenance)


def checked(content: dict[str, Any], provenance: dict[str, str] | None = None) -> Recipe:
    """A recipe from plain data, checked as a file would be.

    Raises:
        RecipeError, IncompatibleComponentsError: as `resolve_recipe`.
    """
    _check_recipe(str(content.get("name", "recipe")), content)
    return Recipe(**content, provenance=dict(provenance or {}))


def _check_recipe(where: str, content: dict[str, Any]) -> None:
    sections = ("data", "features", "identifiers", "model", "training", "generation")
    header = {key: value for key, value in content.items() if key not in sections}
    _check(where, header, HEADER | dict.fromkeys(sections, dict))
    missing = [
        key for key in ("name", "title", "status", "stage", "paper", "identifiers", "model") if key not in content
    ]
    if missing:
        raise RecipeError(f"{where}: missing {', '.join(missing)}.")
    _choice(f"{where}: status", content["status"], STATUSES)
    _choice(f"{where}: stage", content["stage"], STAGES)
    _check("data", content.get("data") or {}, DATA)
    for name, options in (content.get("features") or {}).items():
        component = _component("features", name, FEATURES)
        _check(f"features.{name}", options or {}, component.options)
        content["features"][name] = options or {}
    identifiers = content["identifiers"]
    quantizer = _component("identifiers.quantizer", identifiers.get("quantizer"), QUANTIZERS)
    _check("identifiers", identifiers, IDENTIFIERS | quantizer.options)
    _choice("identifiers.collisions", identifiers.get("collisions", "keep"), COLLISIONS)
    check_collision_options(identifiers.get("collisions", "keep"), identifiers.get("collision_options") or {})
    if "parts" in quantizer.options:
        from hf_genrec.recipes.stages.joined import check_parts  # it reads the tables that this module checks

        check_parts(identifiers.get("parts"), list(content.get("features") or {}))
    for name in identifiers.get("features", []):
        _choice("identifiers.features", name, content.get("features") or {})
    model = _component("model.type", content["model"].get("type"), MODELS)
    _check("model", content["model"], model_options(content["model"]["type"]))
    for name in content["model"].get("features", []):
        _choice("model.features", name, content.get("features") or {})
    training = content.get("training") or {}
    for name in ("eval_strategy", "save_strategy", "logging_strategy"):
        if training.get(name) is False:  # an unquoted no is false to YAML
            training[name] = "no"
    _check("training", training, training_options())
    _check_method(where, content["model"]["type"], model, training)
    _check_losses(where, identifiers, quantizer, content.get("features") or {})
    _check_generation(where, content.get("generation") or {}, model)
    if "item_vectors" in quantizer.needs and not identifiers.get("features"):
        raise IncompatibleComponentsError(
            f"{where}: quantizer {identifiers['quantizer']!r} needs item vectors; name blocks in identifiers.features."
        )
    lacking = model.needs - _given(identifiers)
    if lacking:
        fitting = [
            name for name, other in QUANTIZERS.items() if model.needs <= other.gives.union(*other.gives_if.values())
        ]
        raise IncompatibleComponentsError(
            f"{where}: model {content['model']['type']!r} needs {', '.join(sorted(lacking))}, which quantizer "
            f"{identifiers['quantizer']!r} does not give; quantizers that fit: {', '.join(fitting)}."
        )


def _check_method(where: str, model_type: str, model: Component, training: dict[str, Any]) -> None:
    """The training method exists, takes these options, and the model gives what it needs; so do all methods of stages."""

    def check(place: str, name: str, options: dict[str, Any], more: dict[str, Any]) -> None:
        method = _component(f"{place}.method" if place != "training" else "training.method", name, METHODS)
        _check(f"{place}.{'method_options' if place == 'training' else 'options'}", options, method.options)
        _check(f"{place}.training" if place != "training" else place, more, training_options())
        if not method.needs <= model.gives:
            wanted = ", ".join(sorted(method.needs - model.gives))
            raise IncompatibleComponentsError(
                f"{where}: {place}.method {name!r} needs a model that gives {wanted}, and {model_type!r} does not."
            )
        if options.get("families"):
            _check_families(f"{where}: {place}", name, options["families"])

    check("training", training.get("method", "next_item"), training.get("method_options") or {}, {})
    if training.get("method") == "stages":
        from hf_genrec.recipes.stages.staged import check_stages

        check_stages((training.get("method_options") or {}).get("stages"), check)


def _check_families(where: str, method: str, families: dict[str, Any]) -> None:
    """The task families exist: said before identifiers are made, which takes long."""
    from hf_genrec.alignment.tasks.requested import check_family
    from hf_genrec.alignment.tasks.templates import FAMILIES

    known = (FAMILIES,) if method == "tasks" else ()  # the method "sft" takes them all
    for family in families:
        try:
            check_family(str(family), *known)
        except TrainingError as error:
            raise RecipeError(f"{where}: {error}") from error


def _given(identifiers: dict[str, Any]) -> frozenset[str]:
    """What the identifiers give: the quantizer's, less a fixed length that a part or the collision policy takes away."""
    quantizer = QUANTIZERS[identifiers["quantizer"]]
    given = quantizer.given(identifiers)
    parts = [QUANTIZERS[part["quantizer"]].given(part) for part in identifiers.get("parts") or []]
    some_shorter = (identifiers.get("collision_options") or {}).get("only_where_needed", False)
    if some_shorter or any("fixed_length" not in part for part in parts):
        given = given - {"fixed_length"}
    return given


def _check_losses(where: str, identifiers: dict[str, Any], quantizer: Component, features: dict[str, Any]) -> None:
    """Further loss terms exist, take these options, name blocks of the recipe, and the quantizer is one that learns."""
    losses = identifiers.get("losses") or {}
    for name, options in losses.items():
        component = _component("identifiers.losses", name, LOSSES)
        _check(f"identifiers.losses.{name}", options or {}, component.options)
        if (options or {}).get("features") is not None:
            _choice(f"identifiers.losses.{name}.features", options["features"], features)
    if losses and "learned" not in quantizer.gives:
        raise IncompatibleComponentsError(
            f"{where}: identifiers.losses are for quantizers that are trained, and {identifiers['quantizer']!r} is not; "
            f"those are: {', '.join(name for name, other in QUANTIZERS.items() if 'learned' in other.gives)}."
        )


def _check_generation(where: str, generation: dict[str, Any], model: Component) -> None:
    """The search exists, takes these options, and the model has the methods it needs."""
    _check("generation", generation, GENERATION)
    for weight in ("dense_weight", "repeat_weight"):
        if isinstance(generation.get(weight), str):
            _choice(f"generation.{weight}", generation[weight], (AT_VALIDATION,))
    name = generation.get("decoding", "beam")
    _choice("generation.decoding", name, DECODING_STRATEGIES)
    strategy = DECODING_STRATEGIES[name]
    for option in generation.get("decoding_options") or {}:
        if option not in strategy.options:
            raise RecipeError(f"unknown key generation.decoding_options.{option}: {nearest(option, strategy.options)}")
    model_class = model.load()
    model_class = getattr(model_class, "decoder_class", model_class)  # a stock model is searched through an adapter
    for methods in strategy.needs:
        if not any(hasattr(model_class, method) for method in methods.split("|")):
            raise IncompatibleComponentsError(
                f"{where}: decoding {name!r} needs a model with {methods.replace('|', ' or ')}, which "
                f"{model_class.__name__} has not."
            )


def list_recipes() -> list[dict[str, Any]]:
    """Header of every shipped recipe, with its recorded result file when there is one."""
    listed = []
    for name in recipe_names():
        recipe = resolve_recipe(name)
        result = FOLDER / f"{name}.result.json"
        listed.append(
            {
                "name": recipe.name,
                "status": recipe.status,
                "paper": recipe.paper,
                "stage": recipe.stage,
                "title": recipe.title,
                "result": json.loads(result.read_text(encoding="utf-8")) if result.is_file() else None,
            }
        )
    return listed
