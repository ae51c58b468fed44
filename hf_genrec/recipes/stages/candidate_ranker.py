"""Language models that rank a retriever's candidates in a recipe: model type "candidate_ranker", method "rank_candidates".

The retriever is a SASRec trained on the same rows. `system` names the published ranker (TALLRec, CoLLM, LLaRA, A-LLMRec,
LlamaRec, LLMRank) whose verbaliser, soft tokens and stages are taken, see `RANKER_METHODS`. Rankers that write titles also
report how many of their free answers name a candidate.

Shapes: N items, D width of a soft token's vector.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from hf_genrec.alignment.tasks.families import TaskData
from hf_genrec.alignment.trainers.candidate_stages import RANKER_METHODS
from hf_genrec.errors import ItemTableError, RecipeError
from hf_genrec.models.candidate_ranker.modeling_candidate_ranker import CandidateRankerForCausalLM
from hf_genrec.recipes.stages.causal_lm import CausalLMOptions, language_model_and_tokenizer, options_of
from hf_genrec.recipes.stages.context import FeatureBlock, MethodResult, StageContext, TrainingJob

COLLABORATIVE = "collaborative"
WRITTEN_ROWS = 200  # validation rows that free answers are asked for: our choice, they cost a generation each
_TOKENIZER = "_ranker_text_tokenizer"  # of the language model, kept with the context of the run


class CandidateRankerOptions:
    """What a recipe says under `model` for type "candidate_ranker".

    Args:
        system: "tallrec", "collm", "llara", "a_llmrec", "llamarec" or "llmrank" (which is not trained).
        base, language_model, text_vocab_size, dtype: the language model, as for type "causal_lm".
        num_candidates: m, the retriever's items that are ranked.
        max_title_tokens: tokens of a title that are shown.
        max_history: newest items in a prompt.
        candidate_permutations: orders of the list that scores are means over; None = the system's (LLMRank 3, others none).
        like_from: least rating of a liked item, for "tallrec" and "collm" on a log with ratings; None = 0.8 of the highest.
        soft_tokens: what the items' soft tokens are made of: "collaborative" (the retriever's item table), or a block of
            `features`, such as "text" or "array" (a file of image vectors). For "a_llmrec" the block that is aligned with
            the collaborative vectors, by default "text" or else the first.
        aligned_size: width of A-LLMRec's joint vectors.
        lora: options that differ from the system's (r, alpha, dropout, target_modules).
    """

    system: str = "llamarec"
    base: str | None = None
    language_model: dict | None = None
    text_vocab_size: int = 2000
    dtype: str = "float32"
    num_candidates: int | None = None
    max_title_tokens: int = 16
    max_history: int = 20
    candidate_permutations: int | None = None
    like_from: float | None = None
    soft_tokens: str = COLLABORATIVE
    aligned_size: int = 128
    lora: dict | None = None


class CandidateRanker:
    """What the table of models points to: where the recipe's options are, and which methods searches find."""

    config_class = CandidateRankerOptions
    decoder_class = CandidateRankerForCausalLM


def _options(recipe: Any) -> CandidateRankerOptions:
    options: CandidateRankerOptions = options_of(recipe, CandidateRankerOptions)
    if options.system not in RANKER_METHODS:
        raise RecipeError(f"model.system: {options.system!r}: choose one of {', '.join(RANKER_METHODS)}.")
    return options


def _soft_block(options: CandidateRankerOptions, context: StageContext) -> FeatureBlock | None:
    """The feature block that soft tokens are made of; None = collaborative vectors.

    Raises:
        RecipeError: a system without soft tokens of items, or a block that is not there.
    """
    name, blocks, joint = options.soft_tokens, context.blocks, options.system == "a_llmrec"
    if name == COLLABORATIVE:
        return (blocks.get("text") or next(iter(blocks.values()), None)) if joint else None
    slots = RANKER_METHODS[options.system].fields.get("slots", ())
    if not {"history", "candidates"} & set(slots):
        raise RecipeError(
            f"model.soft_tokens: {options.system} has no soft tokens of items; leave soft_tokens out, or use collm, llara "
            "or a_llmrec."
        )
    if name not in blocks:
        raise RecipeError(
            f"model.soft_tokens: {name!r} is no block of this run's features ({', '.join(blocks) or 'there are none'}); add "
            f"features.{name}, or use {COLLABORATIVE!r}."
        )
    return blocks[name]


def build_candidate_ranker(recipe: Any, identifiers: Any, *, seed: int) -> CandidateRankerForCausalLM:
    """A ranker around a language model and a SASRec, which is trained here.

    Raises:
        ItemTableError: no titles.
        RecipeError, IncompatibleComponentsError: as `build_causal_lm`, and `soft_tokens` that cannot be made.
    """
    from hf_genrec.recipes.stages.features import trained_sasrec

    options, context = _options(recipe), identifiers.context
    if context.data.items is None:
        raise ItemTableError(f"{context.data.name}: the model reads titles; give an item table with --items FILE.")
    block = _soft_block(options, context)
    shared = CausalLMOptions()
    for name in ("base", "language_model", "text_vocab_size", "dtype"):
        setattr(shared, name, getattr(options, name))
    model, text_tokenizer = language_model_and_tokenizer(context, shared, seed)
    context.__dict__[_TOKENIZER] = text_tokenizer
    retriever, _ = trained_sasrec(context)
    fields = dict(RANKER_METHODS[options.system].fields) | {"max_history": options.max_history}
    for name in ("num_candidates", "candidate_permutations"):
        if getattr(options, name) is not None:
            fields[name] = getattr(options, name)
    if options.system == "collm":
        fields["projector_size"] = 10 * int(retriever.config.hidden_size)
    if options.system == "a_llmrec":  # its stage "alignment" makes the vectors
        fields["item_vectors"] = np.zeros((context.num_items, options.aligned_size), np.float32)
    elif block is not None:
        fields["item_vectors"] = block.inputs
    titles = context.data.items.titles()
    return CandidateRankerForCausalLM.from_language_model(
        model,
        text_tokenizer,
        item_tokenizer=identifiers.tokenizer,
        item_texts=[title.strip() or "unknown" for title in titles],
        retriever=retriever,
        max_title_tokens=options.max_title_tokens,
        **fields,
    )


def rank_candidates(
    job: TrainingJob, *, samples: int | None = None, stage_options: dict[str, Any] | None = None
) -> MethodResult:
    """Train a candidate ranker in the stages of its system.

    Args:
        samples: few-shot: train on so many rows, drawn once.
        stage_options: stage name -> training arguments that differ in it.

    Raises:
        RecipeError: a stage that the system does not have.
    """
    from hf_genrec.alignment.trainers.candidate_training import train_candidate_ranker

    options = _options(job.recipe)
    method, given = RANKER_METHODS[options.system], stage_options or {}
    names = [stage.name for stage in method.stages]
    unknown = sorted(set(given) - set(names))
    if unknown:
        raise RecipeError(
            f"training.method_options.stage_options: {options.system} has no stage {unknown[0]!r}; its stages are "
            f"{', '.join(names)}."
        )
    # the recipe's own training values are for all stages, a system's learning rates for many more steps
    own = {name: value for name, value in job.recipe.training.items() if name == "learning_rate"}
    stages = [
        dataclasses.replace(stage, options=dict(stage.options) | own | dict(given.get(stage.name) or {}))
        for stage in method.stages
    ]
    if not stages:  # zero-shot
        summary: dict[str, Any] = {"method": "rank_candidates", "stages": {}}
        return MethodResult(job.model, job.tokenizer, summary | _written_answers(job, job.model))
    lora = method.lora
    if lora is not None and options.lora:
        lora = dataclasses.replace(lora, **options.lora)
    ratings = TaskData.from_split(job.context.data, job.context.split).columns.get("rating")
    if ratings is not None and ratings.dtype.kind == "f" and np.isnan(ratings).all():
        ratings = None
    content = _soft_block(options, job.context)
    result = train_candidate_ranker(
        job.model,
        job.tokenizer,
        job.context.split,
        job.args,
        stages=stages,
        lora=lora,
        ratings=ratings,
        like_from=options.like_from,
        text_vectors=None if content is None else content.inputs,
        samples=samples,
        resume=job.resume,
    )
    summary = {"method": "rank_candidates", "stages": result.stages}
    return MethodResult(result.model, job.tokenizer, summary | _written_answers(job, result.model))


def _written_answers(job: TrainingJob, model: Any) -> dict[str, Any]:
    """Free answers over closed lists of the validation part, for rankers that write titles."""
    from hf_genrec.alignment.trainers.candidate_training import evaluate_written_answers

    validation = job.context.split.validation
    if model.config.verbalizer not in ("title", "list") or not len(validation):
        return {}
    tokenizer = job.context.__dict__[_TOKENIZER]
    found = evaluate_written_answers(model, tokenizer, validation, max_users=WRITTEN_ROWS, seed=job.context.seed)
    rows = min(WRITTEN_ROWS, len(validation))
    return {"written_answers": found | {"rows": rows, "candidates": model.config.num_candidates}}
