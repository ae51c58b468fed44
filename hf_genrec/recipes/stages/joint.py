"""Identifiers that change while the recommender learns: the training methods of ETEGRec and IDGenRec, and keyword names."""

from __future__ import annotations

from typing import Any

import numpy as np

from hf_genrec.alignment.trainers.joint import alternating_schedule, finished_phases, train_jointly
from hf_genrec.alignment.trainers.text_to_text import train_text_to_text
from hf_genrec.alignment.trainers.versions import CatalogueIndex
from hf_genrec.errors import IncompatibleComponentsError, ItemTableError, RecipeError
from hf_genrec.evaluation.evaluator import training_counts
from hf_genrec.identifiers.collision_fixed import fixed_counter
from hf_genrec.identifiers.collisions import resolve_collisions
from hf_genrec.identifiers.keywords import (
    keyword_names,
    text_rows,
    train_word_tokenizer,
    unique_names,
    word_named_tokenizer,
)
from hf_genrec.recipes.stages.context import MethodResult, StageContext, TrainingJob

FIXED_LAYOUT = ("counter", "next_nearest", "next_tail", "keep")  # collision policies that a re-assignment can repeat


def joint_codes(
    job: TrainingJob,
    *,
    cycles: int = 3,
    tokenizer_epochs: float = 1,
    recommender_epochs: float = 3,
    warm_epochs: float = 3,
    final_epochs: float = 10,
    tokenizer_learning_rate: float = 1e-3,
    final_learning_rate: float | None = None,
    aligned_at_end: bool = True,
) -> MethodResult:
    """Quantizer and recommender in turn (ETEGRec, arXiv 2409.05546): see `alignment/trainers/joint.py`.

    Args:
        cycles, tokenizer_epochs, recommender_epochs, warm_epochs, final_epochs, aligned_at_end: of the schedule.
        tokenizer_learning_rate: in tokenizer phases.
        final_learning_rate: in the last phase, with the identifiers frozen; None = as before.

    Raises:
        IncompatibleComponentsError: the recipe's quantizer is no RQ-VAE.
        RecipeError: a collision policy that may change the layout of the codes.
    """
    policy = job.recipe.identifiers.get("collisions", "keep")
    if policy not in FIXED_LAYOUT:
        raise RecipeError(
            f"identifiers.collisions is {policy!r}: codes that change in training need a policy with a fixed layout: "
            f"{', '.join(FIXED_LAYOUT)}."
        )
    if job.quantized is None:
        raise IncompatibleComponentsError(
            "training.method needs the quantizer that made the codes: set identifiers.quantizer to rq_vae."
        )
    names = job.recipe.identifiers["features"]
    job.model.attach_quantizer(job.quantized.quantizer, job.context.vectors(names))
    counts_N = training_counts(job.context.split.train, job.context.num_items)

    def reassign(model: Any, tokenizer: Any) -> np.ndarray:
        codes_NL = model.encode_items().cpu().numpy()
        quantizer, sizes = model.quantizer, tuple(model.quantizer.codebook_sizes)
        space: dict[str, Any] = {
            "codebooks": [book.cpu().numpy() for book in quantizer.codebooks],
            "features": quantizer.transform(model.item_vectors).cpu().numpy(),
        }
        if policy == "counter":
            return fixed_counter(codes_NL, sizes, tokenizer.codebook_sizes[-1], priority=counts_N, **space)
        return resolve_collisions(codes_NL, sizes, policy, **space)[0]

    result = train_jointly(
        job.model,
        job.tokenizer,
        job.context.split,
        job.args,
        alternating_schedule(
            cycles,
            tokenizer_epochs=tokenizer_epochs,
            recommender_epochs=recommender_epochs,
            warm_epochs=warm_epochs,
            final_epochs=final_epochs,
            aligned_at_end=aligned_at_end,
        ),
        reassign,
        tokenizer_args={"learning_rate": tokenizer_learning_rate},
        final_args={} if final_learning_rate is None else {"learning_rate": final_learning_rate},
        user_ids=job.user_ids,
        progress=job.context.progress,
        resume=job.resume,
    )
    return MethodResult(result.model, result.tokenizer, result.summary)


def keyword_tokenizer(
    context: StageContext,
    vectors: np.ndarray | None = None,
    *,
    fields: list[str] | None = None,
    vocab_size: int = 1000,
    min_count: int = 2,
    max_tokens: int = 6,
) -> Any:
    """Items named by keywords of their texts in whole words, no two alike: what IDGenRec's generator starts from.

    Args:
        fields: columns of the item table that make the text; None = its text columns.
        vocab_size, min_count: see `keywords.train_word_tokenizer`.
        max_tokens: tokens of the longest name, its end token included; all names have room for so many.
    """
    texts = _texts(context, fields)
    base = train_word_tokenizer(texts, vocab_size, min_count)
    rows_NS = text_rows(base, texts)
    words = [row[row >= 0].tolist() for row in rows_NS]
    special = base.all_special_ids
    names = keyword_names(words, max_tokens - 1, special)
    vocabulary = [token for token in range(len(base)) if token not in special]
    return word_named_tokenizer(
        base, context.data.item_ids, unique_names(names, vocabulary, max_tokens - 1), max_tokens
    )


def _texts(context: StageContext, fields: list[str] | None) -> list[str]:
    if context.data.items is None:
        raise ItemTableError(
            f"{context.data.name}: the recipe names items by their texts; give an item table with --items FILE."
        )
    return context.data.items.texts(fields)


def joint_names(
    job: TrainingJob,
    *,
    cycles: int = 3,
    tokenizer_epochs: float = 1,
    recommender_epochs: float = 3,
    warm_epochs: float = 3,
    final_epochs: float = 5,
    tokenizer_learning_rate: float = 1e-4,
    final_learning_rate: float | None = None,
    generator_steps: int = 300,
    generator_learning_rate: float = 3e-3,
    num_names: int = 5,
    diversity_penalty: float = 0.5,
) -> MethodResult:
    """Name generator and recommender in turn (IDGenRec, arXiv 2403.19021): see `models/idgenrec`.

    The generator first learns to write the catalogue's present names (keywords) from the items' texts, and names all items
    anew: that is where the recommender begins.

    Args:
        cycles, tokenizer_epochs, recommender_epochs, warm_epochs, final_epochs: of the schedule.
        tokenizer_learning_rate: of the generator in tokenizer phases.
        final_learning_rate: in the last phase; None = as before.
        generator_steps, generator_learning_rate: of its initialisation.
        num_names, diversity_penalty: see `models/idgenrec/naming.py`.
    """
    model, context, tokenizer = job.model, job.context, job.tokenizer
    fields = job.recipe.identifiers.get("fields")
    model.set_texts(text_rows(tokenizer, _texts(context, fields), model.config.text_tokens))
    counts_N = training_counts(context.split.train, context.num_items)
    options: dict[str, Any] = {"priority": counts_N, "num_names": num_names, "diversity_penalty": diversity_penalty}
    start: dict[str, Any] = {}
    if not (job.resume and finished_phases(job.args.output_dir)):
        loss = train_text_to_text(
            model.generator,
            model.item_texts.cpu().numpy(),
            tokenizer.codes,
            max_steps=generator_steps,
            learning_rate=generator_learning_rate,
            seed=context.seed,
            progress=context.progress,
        )
        index = CatalogueIndex(model, tokenizer)
        start = {"generator_loss": loss, "named_by_generator": index.reassign(model.name_items(**options))}
        tokenizer = index.tokenizer
        if context.progress:
            print(f"generator initialised, loss {loss:.4f}; {_examples(tokenizer)}", flush=True)
    result = train_jointly(
        model,
        tokenizer,
        context.split,
        job.args,
        alternating_schedule(
            cycles,
            tokenizer_epochs=tokenizer_epochs,
            recommender_epochs=recommender_epochs,
            warm_epochs=warm_epochs,
            final_epochs=final_epochs,
        ),
        lambda model, tokenizer: model.name_items(**options),
        tokenizer_args={"learning_rate": tokenizer_learning_rate},
        final_args={} if final_learning_rate is None else {"learning_rate": final_learning_rate},
        progress=context.progress,
        resume=job.resume,
    )
    if context.progress:
        print(_examples(result.tokenizer), flush=True)
    return MethodResult(result.model, result.tokenizer, result.summary | start)


def _examples(tokenizer: Any, count: int = 3) -> str:
    shown = [tokenizer.decode(tokenizer.item_token_ids(item)[:-1]) for item in tokenizer.item_ids[:count]]
    return "names: " + "; ".join(shown)
