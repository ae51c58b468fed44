"""ActionPiece in a recipe: feature sets merged across neighbours, trained by set permutation (arXiv 2502.13581)."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from hf_genrec.errors import RecipeError
from hf_genrec.recipes.stages.context import MethodResult, StageContext, TrainingJob
from hf_genrec.recipes.stages.features import columns_of_values

_VALIDATION = 2**31  # stands where epochs stand in the seeds of training


def hash_buckets(item_ids: list[str], features_NL: np.ndarray, num_buckets: int) -> np.ndarray:
    """A bucket (N,) per item from a hash of its id; of items with equal features each takes the next free bucket.

    Equal buckets remain only where more items than buckets have equal features.
    """
    taken: dict[bytes, set[int]] = {}
    buckets = np.empty(len(item_ids), np.int64)
    for row, item in enumerate(item_ids):
        digest = hashlib.blake2b(item.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        bucket = int.from_bytes(digest, "little") % num_buckets
        used = taken.setdefault(np.ascontiguousarray(features_NL[row]).tobytes(), set())
        if len(used) < num_buckets:
            while bucket in used:
                bucket = (bucket + 1) % num_buckets
        used.add(bucket)
        buckets[row] = bucket
    return buckets


def action_piece_tokenizer(
    context: StageContext,
    vectors_NE: np.ndarray,
    *,
    num_codebooks: int = 4,
    codebook_size: int = 256,
    iterations: int = 25,
    pca_dim: int | None = 128,
    attribute_columns: list[str] | None = None,
    separator: str = "|",
    slots: int = 1,
    min_count: int = 1,
    hash_buckets_size: int = 128,
    vocabulary_size: int = 40_000,
    segmentations: int = 5,
) -> Any:
    """An `ActionPieceTokenizer` whose merges are learnt from the training histories.

    Args:
        num_codebooks, codebook_size, iterations, pca_dim: of the optimised product quantization of the item vectors.
        attribute_columns: of the item table; each gives `slots` features (0 = none).
        separator: between the values of a column of text.
        min_count: rarer attribute values count as none.
        hash_buckets_size: features of the last level, which keeps items of equal features apart; 0 leaves it out.
        vocabulary_size: features and merges together; just the features = plain codes.
        segmentations: how many permuted segmentations of a history recommending reads; 1 = one, without chance.
    """
    from hf_genrec.identifiers.features_attributes import attribute_slots
    from hf_genrec.identifiers.quantizers.product import ProductQuantizer
    from hf_genrec.identifiers.tokenization_action_piece import ActionPieceTokenizer

    if slots < 1 or hash_buckets_size < 0:
        raise RecipeError(
            f"identifiers.slots is {slots}, identifiers.hash_buckets_size {hash_buckets_size}: give 1 or more slots, and "
            "0 or more buckets."
        )
    quantizer = ProductQuantizer(
        [codebook_size] * num_codebooks,
        seed=context.seed,
        iterations=iterations,
        pca_dim=None if pca_dim is None else min(pca_dim, vectors_NE.shape[1]),
        few_points="duplicate",
    ).fit(vectors_NE)
    parts, sizes = [quantizer.encode(vectors_NE).numpy()], [codebook_size] * num_codebooks
    for values in columns_of_values(context, attribute_columns or [], separator).values():
        codes_NS, slot_sizes = attribute_slots(values, slots, min_count)
        parts.append(codes_NS)
        sizes += slot_sizes
    if hash_buckets_size:
        parts.append(hash_buckets(context.data.item_ids, np.concatenate(parts, axis=1), hash_buckets_size)[:, None])
        sizes.append(hash_buckets_size)
    return ActionPieceTokenizer.train(
        context.data.item_ids,
        np.concatenate(parts, axis=1),
        context.split.train,
        feature_sizes=sizes,
        vocabulary_size=max(vocabulary_size, sum(sizes)),
        segmentations=segmentations,
    )


def set_permutation(job: TrainingJob, *, permute: bool = True, stretch: float = 3.0) -> MethodResult:
    """Next-item training that segments every history anew in every epoch; validation reads one permuted segmentation.

    A model trained on permuted sets has hardly seen the segmentation without chance: serve it with `segmentations` > 1.

    Args:
        permute: False = the segmentation without chance throughout.
        stretch: with `causal_encoder`: mean number of items from one target of a window to the next.
    """
    from hf_genrec.alignment.trainers.recommender import train_recommender
    from hf_genrec.alignment.trainers.set_permutation import SetPermutationCollator

    served, count = job.model.recommendation_config, job.tokenizer.segmentations
    job.tokenizer.segmentations = 1
    job.tokenizer.resegment((job.args.seed, _VALIDATION) if permute else None)
    job.model.recommendation_config = served.merged(decoding="beam")
    try:
        result = train_recommender(
            job.model,
            job.tokenizer,
            job.context.split,
            job.args,
            data_collator=SetPermutationCollator(job.tokenizer, seed=job.args.seed, permute=permute, stretch=stretch),
            user_ids=job.user_ids,
            resume_from_checkpoint=job.resume or None,
        )
    finally:
        job.tokenizer.segmentations = count
        job.tokenizer.resegment(None)
    newest = result.model.recommendation_config.max_history
    result.model.recommendation_config = served.merged(max_history=newest)
    return MethodResult(result.model, job.tokenizer, result.summary)
