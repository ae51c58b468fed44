"""Codes of quantizers that are trained with Trainer: RQ-VAE, multi-head VQ, FSQ, each with any further loss terms.

Shape suffixes: N items, L levels, E feature dimensions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError

from hf_genrec.errors import IncompatibleComponentsError, ItemTableError, RecipeError
from hf_genrec.identifiers.tag_path import TAG_PATHS_FILE, TagPathReader
from hf_genrec.identifiers.tags import TagTable
from hf_genrec.recipes.stages.context import Quantized, StageContext
from hf_genrec.recipes.stages.losses import TermSources, make_terms

_TRAINING = ("max_steps", "learning_rate", "batch_size", "kmeans_init")
_TAGS = ("columns", "levels", "order", "min_items", "separators", "fill_missing")
_EXAMPLES = 10


def rq_vae_codes(context: StageContext, vectors: np.ndarray, **options: Any) -> Quantized:
    """RQ-VAE on the item vectors (TIGER, LETTER, CoST, HiD-VAE, ... by its losses)."""
    from hf_genrec.identifiers.quantizers.configuration_rq_vae import RQVAEConfig
    from hf_genrec.identifiers.quantizers.training import train_rq_vae

    made = _train(context, vectors, RQVAEConfig, train_rq_vae, options)
    made.codebooks = made.quantizer.codebooks
    return made


def multi_head_vq_codes(
    context: StageContext, vectors: np.ndarray, *, heads: list[str] | None = None, **options: Any
) -> Quantized:
    """Multi-head VQ-VAE on the item vectors: parallel codes. `heads` names for each the block it sees, or "all"."""
    from hf_genrec.identifiers.quantizers.configuration_multi_head_vq import MultiHeadVQConfig
    from hf_genrec.identifiers.quantizers.training import train_multi_head_vq

    if heads is not None:
        options |= _head_blocks(context, vectors, heads)
    made = _train(context, vectors, MultiHeadVQConfig, train_multi_head_vq, options)
    made.codebooks = made.quantizer.padded_codebooks()
    return made


def fsq_codes(context: StageContext, vectors: np.ndarray, **options: Any) -> Quantized:
    """Finite scalar quantization of the item vectors: parallel codes without a codebook."""
    from hf_genrec.identifiers.quantizers.configuration_fsq import FSQConfig
    from hf_genrec.identifiers.quantizers.training import train_fsq

    made = _train(context, vectors, FSQConfig, train_fsq, options)
    made.features = None  # unbounded, the grids are not: no policy may compare them
    return made


def _train(
    context: StageContext, vectors: np.ndarray, config_class: Any, train: Any, options: dict[str, Any]
) -> Quantized:
    """Train on the vectors with the terms that `losses` names; the codebooks are left to the caller."""
    losses, tags = options.pop("losses", None) or {}, options.pop("tags", None)
    training = {key: options.pop(key) for key in _TRAINING if key in options}
    encoding = {key: options.pop(key) for key in ("last_level",) if key in options}
    options.setdefault("standardise", "global")  # keeps the blocks' weights
    try:
        config = config_class(input_size=vectors.shape[1], **options)
    except (ValueError, StrictDataclassError) as error:  # the strict checks wrap what they found
        raise RecipeError(f"identifiers: {error.__cause__ or error}") from error
    sources = TermSources(context, vectors, _tag_table(context, vectors, config.num_levels, tags))
    terms = make_terms(sources, losses)
    model = train(vectors, config, seed=context.seed, progress=context.progress, terms=terms, **training)
    codes = np.asarray(model.encode(vectors, **encoding))
    made = Quantized(codes, tuple(config.codebook_sizes), None, model.transform(torch.as_tensor(vectors)), model)
    if terms:
        made.record["losses"] = {name: term.last_value for name, term in terms.items()}
    if sources.tags is not None and "tag_classification" in terms:
        reader = TagPathReader.from_term(model, terms["tag_classification"])
        made.record["tags"] = _tag_record(context, sources.tags, reader, codes)
        made.files[TAG_PATHS_FILE] = reader
    return made


def _tag_table(
    context: StageContext, vectors: np.ndarray, num_levels: int, options: dict[str, Any] | None
) -> TagTable | None:
    """Tags of the items as `identifiers.tags` asks for them: {columns: [...], ...}, see `TagTable`.

    Raises:
        ItemTableError: no item table, a column that it lacks, tags that tell nothing.
        RecipeError: an unknown key, or no columns.
    """
    if options is None:
        return None
    unknown = sorted(set(options) - set(_TAGS))
    if unknown or not options.get("columns"):
        wrong = f"unknown key {unknown[0]!r}" if unknown else "no columns"
        raise RecipeError(f"identifiers.tags: {wrong}; it is a mapping of {', '.join(_TAGS)}.")
    items = context.data.items
    if items is None:
        raise ItemTableError(
            f"{context.data.name}: the recipe needs tags of the items; give an item table with --items."
        )
    given = {key: options[key] for key in ("order", "min_items", "separators") if key in options}
    table = TagTable.from_items(items, options["columns"], levels=options.get("levels") or num_levels, **given)
    return table.filled(vectors) if options.get("fill_missing") else table


def _tag_record(context: StageContext, table: TagTable, reader: TagPathReader, codes: np.ndarray) -> dict[str, Any]:
    """How well tags can be read off the codes, and what that looks like for the first items."""
    first = reader.path(codes[:_EXAMPLES])
    return {
        "tags": [len(level) for level in table.names],
        "coverage": table.coverage,
        "accuracy": reader.accuracy(codes, table.tags_NT),
        "chance": table.chance,
        "paths": dict(zip(context.data.item_ids, first)),
    }


def _head_blocks(context: StageContext, vectors: np.ndarray, heads: list[str]) -> dict[str, Any]:
    """`block_sizes` and `head_blocks` of the configuration.

    Raises:
        IncompatibleComponentsError: heads that name other blocks than the vectors are made of.
    """
    names = [name for name in context.blocks if name in heads]
    missing = sorted(set(heads) - set(names) - {"all"})
    if missing or (names and not np.array_equal(context.vectors(names), vectors)):
        raise IncompatibleComponentsError(
            f"identifiers.heads must name 'all' or each of the blocks in identifiers.features, which are to stand in the "
            f"order of the recipe's features; got {heads} with blocks {list(context.blocks)}."
        )
    sizes = [context.blocks[name].symmetric.shape[1] for name in names] or [vectors.shape[1]]
    every = list(range(len(sizes)))
    return {"block_sizes": sizes, "head_blocks": [every if head == "all" else [names.index(head)] for head in heads]}
