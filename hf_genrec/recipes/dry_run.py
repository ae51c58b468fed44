"""A recipe from end to end in a second or two: everything it names is built, takes one step and recommends.

The data are generated (an item is followed by its successor), and every size of the recipe is cut down, so this says that the
components fit and nothing about how well they do.
"""

from __future__ import annotations

import copy
import math
import tempfile
from functools import partial
from typing import Any

import numpy as np

from hf_genrec.data.interactions import RecommendationData, load_data
from hf_genrec.data.splits import Split, make_split
from hf_genrec.errors import TrainingError
from hf_genrec.generation.configuration_recommendation import RecommendationConfig
from hf_genrec.generation.recommend import recommend
from hf_genrec.recipes.build import build_identifiers, build_model
from hf_genrec.recipes.components import METHODS, QUANTIZERS
from hf_genrec.recipes.resolver import AT_VALIDATION, Recipe, checked
from hf_genrec.recipes.stages.context import FeatureBlock, TrainingJob

ITEMS, USERS, LENGTH = 48, 32, 9
_GENRES = ("drama", "comedy", "crime", "war", "space", "music")
# Largest value of an option in a dry run, by its name, wherever it stands in the recipe.
_CAPS: dict[str, Any] = {
    "codebook_sizes": 4, "codebook_size": 4, "num_codebooks": 4, "iterations": 3, "rounds": 2, "latent_size": 4,
    "hidden_sizes": 16, "pca_dim": 8, "dim": 8, "vocab_size": 300, "vocabulary_size": 60, "branching": 4, "num_clusters": 4,
    "max_cluster": 16, "hidden_size": 16, "intermediate_size": 32, "d_model": 16, "d_ff": 32, "d_kv": 8, "num_heads": 2,
    "num_layers": 1, "num_decoder_layers": 1, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 8, "num_user_tokens": 4,
    "max_history": 6, "num_generations": 4, "num_candidates": 4, "prompts": 16, "pairs": 16, "requests": 16,
    "text_vocab_size": 400, "num_beams": 10, "epochs": 1, "num_buckets": 4, "num_epochs": 1, "rounds_of_training": 1,
    "per_device_train_batch_size": 8, "num_negatives": 8, "generator_steps": 3, "cycles": 1, "warm_epochs": 1,
    "tokenizer_epochs": 1, "recommender_epochs": 1, "final_epochs": 1,
}  # fmt: skip

_LANGUAGE_MODEL = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip


def dry_run_data() -> tuple[RecommendationData, Split]:
    """A catalogue with titles, genres, a director and ratings, in which item i is followed by item i + 1."""
    rng = np.random.default_rng(0)
    starts = rng.integers(ITEMS, size=USERS)
    log: dict[str, list[Any]] = {"user_id": [], "item_id": [], "timestamp": [], "rating": []}
    for user, start in enumerate(starts):
        for step in range(LENGTH):
            log["user_id"].append(f"u{user:02d}")
            log["item_id"].append(f"i{(start + step) % ITEMS:02d}")
            log["timestamp"].append(1_000_000 + 3_600 * (user * 20 + step))
            log["rating"].append(float(1 + (start + step) % 5))
    names = [f"i{item:02d}" for item in range(ITEMS)]
    items = {
        "item_id": names,
        "title": [f"The {_GENRES[item % 6]} number {item} ({1950 + item})" for item in range(ITEMS)],
        "genres": ["|".join(sorted({_GENRES[item % 6], _GENRES[item // 8]})) for item in range(ITEMS)],
    }
    data = load_data(log, items=items, name="generated", min_user=0, min_item=0)
    return data, make_split(data)


def shrunk(recipe: Recipe) -> Recipe:
    """The recipe with every size cut down to what a second allows; its components stay."""
    content = recipe.to_dict()
    for section in ("features", "identifiers", "model", "training", "generation"):
        content[section] = _capped(content[section])
    sizes = recipe.identifiers.get("codebook_sizes")
    if isinstance(sizes, list) and sizes:  # policies that give every item a code of its own need room
        least = max(_CAPS["codebook_sizes"], math.ceil((2 * ITEMS) ** (1 / len(sizes))))
        content["identifiers"]["codebook_sizes"] = [min(size, least) for size in sizes]
    if content["model"].get("base"):  # no pretrained model is loaded: a tiny one of another kind stands for it
        content["model"] |= {"base": None, "language_model": dict(_LANGUAGE_MODEL)}
        for part, name in (("identifiers", "text_tokenizer"), ("identifiers", "item_end_token"), ("model", "dtype")):
            content[part].pop(name, None)
    text = content["features"].get("text")
    if text is not None:
        text.pop("encoder", None)
    if "max_steps" in QUANTIZERS[content["identifiers"]["quantizer"]].options:
        content["identifiers"]["max_steps"] = 2
    training = content["training"]
    method = METHODS[training.get("method", "next_item")]
    steps = {name: _CAPS[name] for name in method.options if name in ("generator_steps",)}
    if steps:  # where the recipe leaves them to the method
        training["method_options"] = steps | (training.get("method_options") or {})
    training |= {"max_steps": 1, "eval_strategy": "no", "report_to": "none", "logging_steps": 1000}
    training.pop("ema_decay", None)
    for name, value in (("dense_weight", 0.5), ("repeat_weight", -1.0)):
        if content["generation"].get(name) == AT_VALIDATION:
            content["generation"][name] = value
    return checked(content, recipe.provenance)


def _capped(value: Any, name: str = "") -> Any:
    if isinstance(value, dict):
        return {key: _capped(one, key) for key, one in value.items()}
    cap = _CAPS.get(name)
    if isinstance(value, list):
        return [_capped(one, name) for one in value]
    if name == "max_steps":
        return 2
    if cap is not None and isinstance(value, int) and not isinstance(value, bool):
        return min(value, cap)
    return copy.deepcopy(value)


def dry_run(recipe: Recipe, data: RecommendationData | None = None, split: Split | None = None) -> dict[str, Any]:
    """Build, train one step and recommend; returns the number of parameters and the tokens of one item.

    Raises:
        GenRecError: components that do not fit.
        TrainingError: it recommends something else than distinct items of the catalogue.
    """
    from hf_genrec.alignment.trainers.arguments import RecommenderTrainingArguments

    if data is None or split is None:
        data, split = dry_run_data()
    small = shrunk(recipe)
    blocks = {}
    if "text" in small.features:  # no text encoder is loaded: words of the title stand for its vector
        blocks["text"] = _word_block(data)
    identifiers = build_identifiers(small, data, split, seed=0, progress=False, blocks=blocks)
    model = build_model(small, identifiers, seed=0)
    model.recommendation_config = RecommendationConfig(**small.generation)
    training = dict(small.training)
    method = METHODS[training.pop("method", "next_item")].load()
    options = training.pop("method_options", None) or {}
    with tempfile.TemporaryDirectory() as scratch:
        args = RecommenderTrainingArguments(output_dir=scratch, disable_tqdm=True, save_strategy="no", **training)
        job = TrainingJob(small, identifiers.context, model, identifiers.tokenizer, args, identifiers.quantized)
        result = method(job, **options)
    model, tokenizer = result.model.eval(), result.tokenizer
    histories = [data.item_ids[:3], []]
    own = hasattr(model, "recommend_indices")
    found = (model.recommend if own else partial(recommend, model))(histories, tokenizer=tokenizer, k=5)
    for row in found:
        ids = [one.item_id for one in row]
        if len(ids) > 5 or len(set(ids)) < len(ids) or not set(ids) <= set(data.item_ids):
            raise TrainingError(f"{recipe.name}: asked for up to 5 distinct items of the catalogue, got {ids}.")
    if not any(found):  # an untrained model may find nothing by free text for one history, hardly for both
        raise TrainingError(f"{recipe.name}: recommends nothing.")
    return {
        "recipe": recipe.name,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tokens_per_item": len(tokenizer.item_token_ids(data.item_ids[0])),
    }


def _word_block(data: RecommendationData) -> FeatureBlock:
    assert data.items is not None
    words = [text.lower().split() for text in data.items.texts()]
    vocabulary = {word: index for index, word in enumerate(sorted({word for row in words for word in row}))}
    vectors = np.zeros((len(words), len(vocabulary)), np.float32)
    for item, row in enumerate(words):
        vectors[item, [vocabulary[word] for word in row]] = 1.0
    projection = np.random.default_rng(0).normal(size=(len(vocabulary), 16)).astype(np.float32)
    vectors = (vectors - vectors.mean(0)) @ projection
    return FeatureBlock(vectors, vectors)
