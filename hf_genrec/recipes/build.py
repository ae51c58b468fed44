"""From a resolved recipe to identifiers and a fresh model: feature blocks -> quantizer -> collisions -> tokenizer -> model.

Shape suffixes: N items, L levels, F width of the model's input features.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from hf_genrec.data.interactions import RecommendationData
from hf_genrec.data.splits import Split
from hf_genrec.evaluation.evaluator import training_counts
from hf_genrec.identifiers.collisions import resolve_collisions
from hf_genrec.identifiers.health import identifier_health
from hf_genrec.identifiers.tokenization_item import ItemTokenizer
from hf_genrec.recipes.components import FEATURES, MODELS, QUANTIZERS
from hf_genrec.recipes.resolver import Recipe
from hf_genrec.recipes.stages.context import FeatureBlock, Quantized, StageContext
from hf_genrec.recipes.stages.words import facet_tables, item_content


@dataclass
class Identifiers:
    """What the identifier stages made: the tokenizer, how it came about, and the context with its feature blocks."""

    tokenizer: Any
    context: StageContext
    record: dict[str, Any] = field(default_factory=dict)
    quantized: Quantized | None = None


def feature_blocks(context: StageContext, features: dict[str, dict[str, Any]]) -> None:
    """Make the blocks of a recipe in their order; those that cannot be made and may be skipped are left out."""
    for name, options in features.items():
        if name in context.blocks:
            continue
        block = FEATURES[name].load()(context, **options)
        if block is not None:
            context.blocks[name] = block


def model_vectors(context: StageContext, names: list[str] | None = None) -> tuple[np.ndarray | None, list[int]]:
    """Input features of the model: the named blocks (default all) side by side (N, F), and the width of each."""
    wanted = list(context.blocks) if names is None else names
    chosen = [context.blocks[name].inputs for name in wanted if name in context.blocks]
    widths = [int(block.shape[1]) for block in chosen]
    return (np.concatenate(chosen, axis=1) if chosen else None), widths


def build_identifiers(
    recipe: Recipe,
    data: RecommendationData,
    split: Split,
    *,
    seed: int,
    progress: bool = True,
    blocks: dict[str, FeatureBlock] | None = None,
    retrievers: MutableMapping[Any, tuple[Any, Any]] | None = None,
) -> Identifiers:
    """Identifiers for every item, and the health of the codes.

    Args:
        blocks: feature blocks that are there already, by name; they are not made again.
        retrievers: where recommenders that stages train for themselves are looked for and put, see `StageContext`.

    Raises:
        GenRecError: data that lacks what the recipe needs, codes that a collision policy cannot make unique.
    """
    context = StageContext(data, split, seed, progress, dict(blocks or {}), {} if retrievers is None else retrievers)
    feature_blocks(context, recipe.features)
    component = QUANTIZERS[recipe.identifiers["quantizer"]]
    options = {key: recipe.identifiers[key] for key in component.options if key in recipe.identifiers}
    if recipe.identifiers.get("losses"):
        options["losses"] = recipe.identifiers["losses"]
    names = recipe.identifiers.get("features", [])
    vectors = context.vectors(names) if names else None
    made = component.load()(context, vectors, **options)
    if "tokenizer" in component.gives:  # identifiers that are no codes of a codebook: texts, merged sets
        return Identifiers(made, context, _tokens_record(made, data, progress))

    policy = recipe.identifiers.get("collisions", "keep")
    before = identifier_health(made.codes_NL, made.codebook_sizes, vectors)
    codes, sizes = resolve_collisions(
        made.codes_NL,
        made.codebook_sizes,
        policy,
        codebooks=made.codebooks,
        features=made.features,
        priority=training_counts(split.train, data.num_items),
        seed=seed,
        **(recipe.identifiers.get("collision_options") or {}),
    )
    health = identifier_health(codes, sizes, vectors)
    if progress and len(sizes) > 1:
        print(health, flush=True)
    tokenizer = ItemTokenizer.from_codes(
        data.item_ids,
        codes,
        codebook_sizes=sizes,
        num_user_tokens=recipe.identifiers.get("num_user_tokens", 0),
        history_eos=recipe.identifiers.get("history_eos", False),
    )
    record = health.to_dict() | {"policy": policy, "before_policy": before.to_dict()} | made.record
    return Identifiers(tokenizer, context, record, made)


def trained_record(identifiers: Identifiers, tokenizer: Any) -> dict[str, Any]:
    """The record of the identifiers that training ended with: the first ones are kept under "at_start" if they changed."""
    if tokenizer is identifiers.tokenizer or np.array_equal(tokenizer.codes, identifiers.tokenizer.codes):
        return identifiers.record
    if identifiers.quantized is None:
        now = _tokens_record(tokenizer, identifiers.context.data, progress=False)
    else:
        sizes = tuple(int(size) for size in tokenizer.codebook_sizes)
        now = identifier_health(np.asarray(tokenizer.codes), sizes).to_dict()
        levels = len(identifiers.quantized.codebook_sizes)
        now["before_policy"] = identifier_health(np.asarray(tokenizer.codes)[:, :levels], sizes[:levels]).to_dict()
    return now | {"at_start": identifiers.record}


def _tokens_record(tokenizer: Any, data: RecommendationData, progress: bool) -> dict[str, Any]:
    shared = data.num_items - len(np.unique(tokenizer.codes, axis=0))
    lengths = (tokenizer.codes >= 0).sum(axis=1)
    if progress:
        print(f"{len(tokenizer)} tokens; {lengths.mean():.1f} per item, {shared} items share their name", flush=True)
    return {"collision_rate": shared / data.num_items, "tokens_per_item": float(lengths.mean())}


def build_model(recipe: Recipe, identifiers: Identifiers, *, seed: int) -> Any:
    """A freshly initialised model of the recipe's type and sizes, its catalogue set."""
    component = MODELS[recipe.model["type"]]
    if "ranks_candidates" in component.gives:
        from hf_genrec.recipes.stages.candidate_ranker import build_candidate_ranker

        return build_candidate_ranker(recipe, identifiers, seed=seed)
    if "language_model" in component.gives:  # its tokenizer is the text tokenizer with the catalogue
        from hf_genrec.recipes.stages.causal_lm import build_causal_lm

        return build_causal_lm(recipe, identifiers, seed=seed)
    tokenizer, context = identifiers.tokenizer, identifiers.context
    model_class = component.load()
    config_class = model_class.config_class
    options = {key: value for key, value in recipe.model.items() if key not in ("type", "features")}
    if "sequence_training" in component.gives and hasattr(config_class, "max_position_embeddings"):
        options.setdefault("max_position_embeddings", recipe.training.get("max_history", 50))
    takes_features = "item_features" in component.gives
    features_NF, widths = model_vectors(context, recipe.model.get("features"))
    if takes_features:
        options["item_feature_dim"] = sum(widths)
        if hasattr(config_class, "item_feature_dims"):
            options["item_feature_dims"] = widths
    content_NS = None
    if "item_content" in component.gives:
        content_NS, options["content_vocab_size"] = item_content(context)
    facets = None
    if options.get("facets"):
        facets = facet_tables(context.data, tokenizer, options["facets"])
        options |= {"facet_levels": facets[0].shape[2], "marker_levels": facets[1].shape[1]}
    torch.manual_seed(seed)
    if options.get("base") and "language_base" in component.gives:
        from hf_genrec.recipes.stages.language_parts import build_around_base

        return build_around_base(model_class, tokenizer, features_NF, options)
    options = {key: value for key, value in options.items() if key not in ("base", "instruction", "response")}
    model = model_class(config_class.from_tokenizer(tokenizer, **options))
    if takes_features:
        model.set_catalogue(tokenizer.codes, features_NF)
    elif hasattr(model, "set_words"):
        model.set_words(tokenizer)
    elif hasattr(model, "set_catalogue"):
        model.set_catalogue(tokenizer.codes)
    if content_NS is not None:
        model.set_content(content_NS)
    if facets is not None:
        model.set_facets(*facets)
    return model
