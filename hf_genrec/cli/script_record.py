"""What scripts/sft.py, dpo.py and grpo.py write as recipe.yaml: a recipe that `genrec train recipe.yaml` can run again.

Only options that recipes know are in it; settings beyond them go to metrics.json (`training.other_settings`).
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from hf_genrec.errors import GenRecError
from hf_genrec.generation.configuration_recommendation import RecommendationConfig
from hf_genrec.recipes.components import METHODS, MODELS
from hf_genrec.recipes.resolver import GENERATION, checked, model_options, training_options

logger = logging.getLogger(__name__)
# of the recorded settings: what says where, not how
_UNRECORDED = (
    "hub_", "push_", "logging_", "output_dir", "resume_", "run_name", "report_to", "project", "trackio", "disable_tqdm",
    "use_cpu", "dataloader_", "debug", "local_rank", "ddp_",
)  # fmt: skip
_ALWAYS = ("eval_strategy", "save_strategy", "load_best_model_at_end")  # whose defaults differ from trainer to trainer


def recorded(args: Any) -> dict[str, Any]:
    """The settings of a configuration that differ from its defaults, plain values only, without places and secrets."""
    values = {}
    for one in dataclasses.fields(args):
        value, default = getattr(args, one.name, None), one.default
        if default is dataclasses.MISSING and one.default_factory is not dataclasses.MISSING:
            default = one.default_factory()
        value = getattr(value, "value", value)  # enumerations of transformers
        same = value == getattr(default, "value", default) and one.name not in _ALWAYS
        if same or one.name.startswith(_UNRECORDED):
            continue
        if isinstance(value, bool | int | float | str) or (
            isinstance(value, list) and all(isinstance(entry, bool | int | float | str) for entry in value)
        ):
            values[one.name] = value
    return values


def as_recipe(method: str, options: Mapping[str, Any], args: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """One training stage of a recipe, and the settings that recipes have no option for.

    Args:
        method: a name of the table.
        options: of the method, None where nothing was said; others are settings beyond the recipe.
        args: the trainer's configuration.
    """
    known, settings = METHODS[method].options, recorded(args)
    training = {name: value for name, value in settings.items() if name in training_options()}
    said = {name: value for name, value in options.items() if value is not None}
    stage = {
        "method": method,
        "options": {name: value for name, value in said.items() if name in known},
        "training": training,
    }
    other = {name: value for name, value in (settings | said).items() if name not in known and name not in training}
    return stage, other


def described_identifiers(tokenizer: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Sections `features` and `identifiers` for codes that came from somewhere else: as many levels of the same sizes."""
    sizes = [int(size) for size in tokenizer.codebook_sizes]
    features = {"text": {"when_missing": "skip"}, "cooccurrence": {"dim": min(64, tokenizer.num_items - 1)}}
    if len(sizes) == 1:
        return features, {"quantizer": "atomic", "features": list(features)}
    identifiers = {"quantizer": "residual_kmeans", "features": list(features), "codebook_sizes": sizes}
    return features, identifiers | {"collisions": "next_nearest"}


def described_model(model: Any, name: str) -> dict[str, Any]:
    """Section `model` for an artefact that has no recipe; {} for a kind that no recipe builds.

    Args:
        name: of the artefact, the base of a stock language model.
    """
    config = model.config
    kind = config.model_type
    if kind not in MODELS or not isinstance(config, MODELS[kind].load().config_class):
        return {} if config.is_encoder_decoder else {"type": "causal_lm", "base": name}
    plain = type(config)()
    ours = [klass for klass in type(config).__mro__ if klass.__module__.startswith("hf_genrec")]
    own = {field for klass in ours for field in vars(klass).get("__annotations__", {})} & set(model_options(kind))
    values = {field: getattr(config, field, None) for field in sorted(own)}
    differing = {field: value for field, value in values.items() if value != getattr(plain, field, None)}
    return {"type": kind} | {
        field: value for field, value in differing.items() if isinstance(value, bool | int | float | str)
    }


def start_recipe(artifact: Any) -> dict[str, Any]:
    """The recipe that an artefact came from; where it has none, one that describes its model and codes."""
    if artifact.recipe:
        return dict(artifact.recipe)
    name = artifact.folder.name
    features, identifiers = described_identifiers(artifact.tokenizer)
    return {
        "name": name,
        "title": f"{type(artifact.model).__name__} of an artefact without a recipe, whose training and codes are not repeated",
        "features": features,
        "identifiers": identifiers,
        "model": described_model(artifact.model, name),
    }


def with_stage(
    recipe: Mapping[str, Any],
    stage: Mapping[str, Any],
    *,
    section: Mapping[str, Any],
    papers: Sequence[str],
    config: RecommendationConfig,
) -> dict[str, Any]:
    """A recipe with one more training stage behind those that it went through.

    Args:
        recipe: of `start_recipe`.
        stage: of `as_recipe`.
        section: the `data` section.
        config: what the model reads and how it is searched.
    """
    old = copy.deepcopy(dict(recipe))
    training = dict(old.get("training") or {})
    if training.get("method") == "stages":
        stages = list((training.get("method_options") or {}).get("stages") or [])
        rest = {name: value for name, value in training.items() if name not in ("method", "method_options")}
    else:
        rest, stages = {}, []
        if training:
            method, options = training.pop("method", "next_item"), training.pop("method_options", None)
            stages = [{"method": method, "options": options or {}, "training": training}]
    now = copy.deepcopy(dict(stage))
    if config.max_history is not None:
        now["training"]["max_history"] = config.max_history
    name, title = str(old.get("name", "model")), str(old.get("title", old.get("name", "a model")))
    return {
        **old,
        "name": f"{name}-{stage['method']}",
        "title": f"{title}, then {stage['method']}",
        "status": "smoke",
        "stage": "alignment",
        "paper": list(dict.fromkeys([*(old.get("paper") or []), *papers])),
        "data": dict(section),
        "training": {"method": "stages", "method_options": {"stages": [*stages, now]}, **rest},
        "generation": dict(old.get("generation") or {}) | searched(config),
    }


def searched(config: RecommendationConfig) -> dict[str, Any]:
    """Section `generation`: the width of the search, and what else differs from the defaults."""
    plain = RecommendationConfig()
    names = [name for name in GENERATION if name == "num_beams" or getattr(config, name) != getattr(plain, name)]
    return {name: getattr(config, name) for name in names}


def checked_record(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe as it is written; a warning says why `genrec train` could not run it again."""
    content = copy.deepcopy(dict(recipe))
    try:
        checked(copy.deepcopy(content))
    except GenRecError as error:
        logger.warning("recipe.yaml records this run, but genrec train cannot repeat it: %s", error)
    return content
