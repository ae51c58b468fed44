"""Our models that contain a language model (E4SRec, BIGRec), built around a pretrained one, and BIGRec's training method."""

from __future__ import annotations

from typing import Any

from hf_genrec.errors import IncompatibleComponentsError
from hf_genrec.recipes.stages.context import MethodResult, TrainingJob
from hf_genrec.recipes.stages.training import next_item


def build_around_base(model_class: Any, tokenizer: Any, features_NF: Any, options: dict[str, Any]) -> Any:
    """A model of `model_class` around the language model `options["base"]`.

    Args:
        features_NF: item vectors, for models that read them.
        options: of the recipe: `base`, `instruction` (before the history) and `response` (behind it), both your texts, and
            fields of the configuration.

    Raises:
        IncompatibleComponentsError: a base model that cannot be loaded.
    """
    from transformers import AutoTokenizer

    options = dict(options)
    base = options.pop("base")
    before, after = options.pop("instruction", None) or "", options.pop("response", None) or ""
    lora = options.pop("lora", None)
    lora = False if lora is None else lora
    try:
        if features_NF is None:
            texts = {"prompt_before": before, "prompt_after": after}
            return model_class.from_language_model(base, tokenizer, lora=lora, **texts, **options)
        texts = {"instruction": before, "response": after}
        for derived in ("item_feature_dim", "item_feature_dims"):
            options.pop(derived, None)
        text_tokenizer = AutoTokenizer.from_pretrained(base)
        return model_class.from_language_model(
            base, tokenizer, features_NF, text_tokenizer=text_tokenizer, lora=lora, **texts, **options
        )
    except OSError as error:
        raise IncompatibleComponentsError(
            f"model.base {base!r} cannot be loaded ({str(error).splitlines()[0]}); give a folder with --model.base FOLDER."
        ) from error


def grounded_next_item(job: TrainingJob) -> MethodResult:
    """`next_item` on titles, then the strength of the prior with the best NDCG@10 on validation (BIGRec, arXiv 2308.08434)."""
    result = next_item(job)
    validation = job.context.split.validation
    choice = result.model.choose_gamma(
        result.tokenizer, validation.histories, validation.targets, exclude_seen=job.args.eval_exclude_seen
    )
    chosen = {"field": "gamma", "value": float(choice.gamma)}
    return MethodResult(result.model, result.tokenizer, result.summary | {"chosen": chosen})
