"""Stock language models with item tokens in a recipe: model type "causal_lm" and the training method "sft".

The model is any causal LM of transformers and stays one: adapters are merged when training ends, so the artefact loads
wherever its architecture does. Item tokens and prompts live in the tokenizer (`extend_tokenizer`).
"""

from __future__ import annotations

import dataclasses
import logging
import string
from pathlib import Path
from typing import Any

import numpy as np

from hf_genrec.errors import IncompatibleComponentsError, RecipeError
from hf_genrec.generation.decoding.causal_lm import CausalLMScorer
from hf_genrec.recipes.stages.context import MethodResult, TrainingJob

logger = logging.getLogger(__name__)
DATA = (
    "max_history",
    "eval_users",
    "eval_epochs",
    "eval_ks",
    "eval_num_beams",
)  # of data and validation: not all need them
SHARED = ("output_dir", "seed", "disable_tqdm", "save_strategy", "eval_strategy", "load_best_model_at_end")


class CausalLMOptions:
    """What a recipe says under `model` for type "causal_lm".

    Args:
        base: folder or Hub id of the language model; None = `language_model` from scratch.
        language_model: configuration of a model from scratch, with its `model_type`; its text vocabulary is learned from
            the item texts and the task wordings.
        text_vocab_size: of that vocabulary.
        dtype: of the base model's weights: "float32", "bfloat16".
        item_init: start of the item tokens' rows: "mean", "codebook", "text" (see `add_item_tokens`).
        lora: options of `item_lora` (r, alpha, dropout, target_modules); None = all weights train.
        style: "plain", or "chat" for models with a chat template.
        windows: next-item rows hold a whole window of a history, every item but the first a target.
        max_length: most tokens of a row.
        system: system text of chat prompts.
        end_items: end every item answer with the end token, as LC-Rec does.
    """

    base: str | None = None
    language_model: dict | None = None
    text_vocab_size: int = 2000
    dtype: str = "float32"
    item_init: str = "text"
    lora: dict | None = None
    style: str = "plain"
    windows: bool = True
    max_length: int = 512
    system: str | None = None
    end_items: bool = False


class CausalLM:
    """What the table of models points to: where the recipe's options are, and which methods searches find."""

    config_class = CausalLMOptions
    decoder_class = CausalLMScorer


def options_of(recipe: Any, kind: Any = CausalLMOptions) -> Any:
    """The recipe's model options, with the defaults of `kind` filled in."""
    options = kind()
    for name, value in recipe.model.items():
        if name != "type":
            setattr(options, name, value)
    return options


def build_causal_lm(recipe: Any, identifiers: Any, *, seed: int) -> Any:
    """A language model with the catalogue's tokens; `identifiers.tokenizer` becomes the extended text tokenizer.

    Raises:
        RecipeError: neither a base model nor a configuration of one.
        IncompatibleComponentsError: a base model that cannot be loaded, or that does not fit its tokenizer.
    """
    from hf_genrec.alignment.item_embeddings import add_item_tokens
    from hf_genrec.alignment.tasks.language_mixture import serving_texts
    from hf_genrec.identifiers.extend import extend_tokenizer

    options, items = options_of(recipe), identifiers.tokenizer
    model, text_tokenizer = language_model_and_tokenizer(identifiers.context, options, seed)
    tokenizer = extend_tokenizer(text_tokenizer, items)
    before, after = serving_texts(language_encoder(tokenizer, options), windows=options.windows)
    tokenizer = extend_tokenizer(text_tokenizer, items, history_before=before, history_after=after)
    add_item_tokens(model, tokenizer, seed=seed, **_start(options.item_init, identifiers, tokenizer))
    identifiers.tokenizer = tokenizer
    return model


def language_model_and_tokenizer(context: Any, options: CausalLMOptions, seed: int) -> tuple[Any, Any]:
    """The pretrained language model that the options name with its tokenizer, or one from scratch.

    Raises:
        RecipeError, IncompatibleComponentsError: as `build_causal_lm`.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if options.base is None and options.language_model is None:
        raise RecipeError(
            "model.base is missing: name a language model's folder or Hub id, or give model.language_model."
        )
    if options.base is not None:
        try:
            text_tokenizer = AutoTokenizer.from_pretrained(options.base)
            model = AutoModelForCausalLM.from_pretrained(options.base, dtype=getattr(torch, options.dtype))
        except OSError as error:
            raise IncompatibleComponentsError(
                f"model.base {options.base!r} cannot be loaded ({str(error).splitlines()[0]}); give a folder with "
                "--model.base FOLDER, or a model from scratch with --model.base null and model.language_model."
            ) from error
    else:
        text_tokenizer = _learned_vocabulary(context, options)
        torch.manual_seed(seed)
        values = dict(options.language_model or {})
        config = AutoConfig.for_model(
            values.pop("model_type", "llama"),
            vocab_size=len(text_tokenizer),
            bos_token_id=text_tokenizer.bos_token_id,
            eos_token_id=text_tokenizer.eos_token_id,
            pad_token_id=text_tokenizer.pad_token_id,
            **values,
        )
        model = AutoModelForCausalLM.from_config(config)
    return model, text_tokenizer


def language_encoder(tokenizer: Any, options: CausalLMOptions, context: int | None = None) -> Any:
    """The encoder of task rows that these options describe, none longer than the model's `context`."""
    from hf_genrec.alignment.tasks.language_rows import LanguageEncoder

    return LanguageEncoder(
        tokenizer,
        style=options.style,
        max_length=min(options.max_length, context or options.max_length),
        system=options.system,
        end_items=options.end_items,
    )


def _learned_vocabulary(context: Any, options: CausalLMOptions) -> Any:
    from hf_genrec.alignment.tasks.templates import template_texts
    from hf_genrec.alignment.tasks.templates_language import WORDINGS
    from hf_genrec.identifiers.text_vocabulary import train_text_tokenizer

    texts = [] if context.data.items is None else list(context.data.items.texts(None))
    answers = [" Yes No"] * 50 + [" ".join(f"({letter})" for letter in string.ascii_uppercase[:20])] * 50
    sentences = [
        part
        for wording in WORDINGS
        for turn in wording.turns
        for side in ("source", "target")
        for part in turn.parts(side)
        if isinstance(part, str)
    ]
    return train_text_tokenizer([*texts, *template_texts(), *sentences, *answers], options.text_vocab_size)


def _start(init: str, identifiers: Any, tokenizer: Any) -> dict[str, Any]:
    """Arguments of `add_item_tokens`; without texts or codebooks the start is "mean"."""
    data, made = identifiers.context.data, identifiers.quantized
    if init == "text" and data.items is not None:
        return {"init": "text", "item_texts": data.items.titles()}
    if init == "codebook" and made is not None and made.codebooks is not None:
        books = [np.asarray(book) for book in made.codebooks]
        sizes = tokenizer.codebook_sizes
        fitting = [book if len(book) == size else None for book, size in zip(books, sizes)]
        return {"init": "codebook", "codebooks": [*fitting, *[None] * (len(sizes) - len(fitting))]}
    if init != "mean":
        logger.warning("item tokens start from the mean of the old ones: this data has nothing for item_init %r", init)
    return {"init": "mean"}


def trainer_config(config_class: Any, job: TrainingJob, **more: Any) -> Any:
    """Arguments of a trainer of TRL's family from the `training` section of a recipe.

    Raises:
        RecipeError: a training option that this trainer does not have.
    """
    known = {field.name for field in dataclasses.fields(config_class)}
    values = {name: getattr(job.args, name) for name in SHARED}
    for name, value in job.recipe.training.items():
        if name in ("method", "method_options") or (name not in known and name in DATA):
            continue
        if name not in known:
            raise RecipeError(f"training.{name} is no option of {config_class.__name__}: leave it out of this recipe.")
        values[name] = value
    values |= {name: value for name, value in more.items() if value is not None}
    values.setdefault("report_to", "none")
    if str(getattr(values["eval_strategy"], "value", values["eval_strategy"])) == "no":
        values |= {"load_best_model_at_end": False, "save_strategy": job.args.save_strategy}
    return config_class(**values)


def sft(
    job: TrainingJob,
    *,
    families: dict[str, Any] | None = None,
    item_head: str = "full",
    num_candidates: int = 20,
) -> MethodResult:
    """Supervised fine-tuning on a mixture of task families, completions only (LC-Rec, arXiv 2311.09049).

    Args:
        families: "family" or "family:kind" -> share of one pass over its own rows per epoch, which families differ much in
            (printed); see `LanguageMixtureDataset`. Default: next items alone.
        item_head: "full", "items" or "level": what the tokens of an item compete with.
        num_candidates: titles in candidate lists.
    """
    from hf_genrec.alignment.adapters import item_lora, merge_item_lora
    from hf_genrec.alignment.tasks.families import TaskData
    from hf_genrec.alignment.tasks.language_mixture import language_mixture
    from hf_genrec.alignment.trainers.item_sft import ItemSFTConfig, ItemSFTTrainer
    from hf_genrec.alignment.trainers.language_model import context_of

    options = options_of(job.recipe)
    split, tokenizer = job.context.split, job.tokenizer
    args = trainer_config(ItemSFTConfig, job, item_head=item_head, max_length=options.max_length)
    mixture = language_mixture(
        TaskData.from_split(job.context.data, split),
        language_encoder(tokenizer, options, context_of(job.model)),
        families or {"next_item": 1.0},
        max_history=args.max_history or 20,
        windows=options.windows,
        num_candidates=num_candidates,
        seed=args.seed,
    )
    if job.context.progress:
        print("rows per epoch: " + ", ".join(f"{name} {count:,}" for name, count in mixture.counts.items()), flush=True)
    model = job.model if options.lora is None else item_lora(job.model, tokenizer, **options.lora)
    trainer = ItemSFTTrainer(
        model,
        args,
        train_dataset=mixture,
        processing_class=tokenizer,
        ranking_dataset=None if args.eval_strategy == "no" else split.validation,
    )
    output = trainer.train(resume_from_checkpoint=_resume(job))
    trained = merge_item_lora(trainer.accelerator.unwrap_model(trainer.model)).eval()
    summary = {
        "method": "sft",
        "steps": int(output.global_step),
        "train_loss": float(output.training_loss),
        "rows_per_family": mixture.counts,
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "best_validation": trainer.state.best_metric,
    }
    return MethodResult(trained, tokenizer, summary)


def _resume(job: TrainingJob) -> str | None:
    """The newest whole checkpoint of an interrupted run, where one is asked for and there is one."""
    from hf_genrec.alignment.trainers.checkpoints import last_checkpoint

    if not job.resume:
        return None
    found: Path | None = last_checkpoint(str(job.args.output_dir))[0]
    return None if found is None else str(found)
