"""LoRA with item tokens: small updates of the language model, and the rows of the item tokens trained in full.

LoRA (arXiv 2106.09685) keeps the base model frozen; item tokens are new and know nothing, so their rows in the input
embedding and in the output head must train, and no other row may. PEFT's `trainable_token_indices` does that: it holds
copies of these rows and puts them in place in every pass. A tied head stays tied; an untied one gets rows of its own.

Reading a head that is wrapped so fails in TRL's trainers, which ask it for a bias that the wrapper does not name: it is
answered here, for every trainer of TRL, as soon as this module is imported.

*Relations*: `train_item_tokens=False` is PEFT's plain LoRA. `merge_item_lora` gives back a stock model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.utils.other import TrainableTokensWrapper

from ..errors import IncompatibleComponentsError
from ..identifiers.catalogue import CatalogueMixin

if not hasattr(TrainableTokensWrapper, "bias"):  # heads with a bias are refused by item_lora
    TrainableTokensWrapper.bias = property(lambda self: None)  # type: ignore[attr-defined]


def item_lora(
    model: Any,
    tokenizer: Any,
    *,
    r: int = 16,
    alpha: float = 32,
    dropout: float = 0.05,
    target_modules: str | Sequence[str] = "all-linear",
    train_item_tokens: bool = True,
) -> PeftModel:
    """A model with LoRA in which the adapters and the rows of the item tokens train, and nothing else.

    Rows that train: all behind the base vocabulary where `add_item_tokens` noted its size (user and item tokens, and a
    padding token that came with them), else those of user and item tokens.

    Args:
        model: the language model with item tokens (`add_item_tokens`).
        tokenizer: the extended tokenizer.
        r, alpha, dropout: rank, scale (`alpha / r` multiplies the update) and dropout of LoRA.
        target_modules: names of linear layers, or "all-linear" (all but the head).
        train_item_tokens: False leaves all rows frozen.

    Returns:
        a PeftModel around `model`. Its random matrices come from torch's global generator.

    Raises:
        IncompatibleComponentsError: no item tokens in tokenizer or model, a model with adapters already, LoRA on the head
            or the embedding, or a head with a bias (PEFT would drop it).
    """
    if isinstance(model, PeftModel):
        raise IncompatibleComponentsError("the model has adapters already: merge them first with merge_item_lora")
    carries_items = isinstance(tokenizer, CatalogueMixin)
    if not carries_items:
        raise IncompatibleComponentsError(
            f"{type(tokenizer).__name__} carries no catalogue: make the tokenizer with extend_tokenizer"
        )
    names = {module: name for name, module in model.named_modules()}
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embeddings.weight.shape[0] < len(tokenizer):
        raise IncompatibleComponentsError(
            f"the model has {embeddings.weight.shape[0]} token embeddings for {len(tokenizer)} tokens: call "
            "add_item_tokens(model, tokenizer) first"
        )
    tables = [names[embeddings]] if head is None else [names[embeddings], names[head]]
    if not isinstance(target_modules, str):
        target_modules = list(target_modules)
        wrong = [name for name in target_modules if any(table.endswith(name) for table in tables)]
        if wrong:
            raise IncompatibleComponentsError(
                f"target_modules holds {wrong[0]!r}: the rows of item tokens train there in full, leave it out"
            )
    indices: dict[str, list[int]] | None = None
    if train_item_tokens:
        if head is not None and getattr(head, "bias", None) is not None:
            raise IncompatibleComponentsError(
                f"the head of {type(model).__name__} has a bias, which PEFT leaves out beside trained rows: use "
                "train_item_tokens=False, or train without LoRA"
            )
        rows = trained_rows(model, tokenizer)
        tied = head is None or head.weight is embeddings.weight
        indices = {name: list(rows) for name in (tables[:1] if tied else tables)}
    encoder_decoder = bool(getattr(model.config, "is_encoder_decoder", False))
    config = LoraConfig(
        task_type=TaskType.SEQ_2_SEQ_LM if encoder_decoder else TaskType.CAUSAL_LM,
        r=r,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        target_modules=target_modules,
        trainable_token_indices=indices,
    )
    return get_peft_model(model, config)


def trained_rows(model: Any, tokenizer: Any) -> range:
    """Token ids whose rows `item_lora` trains: one unbroken range, up to the last item token."""
    first = int(tokenizer._first_user_id if tokenizer.num_user_tokens else tokenizer.level_offsets[0])
    end = int(tokenizer.level_offsets[-1]) + tokenizer.codebook_sizes[-1]
    noted = getattr(model.config, "base_vocab_size", None)
    return range(min(first, noted) if noted is not None else first, end)


def merge_item_lora(model: Any) -> Any:
    """The plain model with adapters and trained rows written into its weights: the base architecture, no PEFT names.

    The PeftModel is used up: its base model is the one that is returned. What trainers of TRL bound to the model is
    taken off, so that copies of it run their own weights. A model without adapters is returned as it is.

    Raises:
        IncompatibleComponentsError: adapters that cannot be merged into weights (prompt tuning).
    """
    if isinstance(model, PeftModel):
        if model.active_peft_config.is_prompt_learning:
            raise IncompatibleComponentsError(
                f"{model.active_peft_config.peft_type} adapters are prompts, not weights: they cannot be merged"
            )
        base = model.get_base_model()
        own = getattr(base, "recommendation_config", None)
        merged = model.merge_and_unload()
        merged._hf_peft_config_loaded = False
        merged.__dict__.pop("peft_config", None)
        if own is not None:
            merged.recommendation_config = own
        for parameter in merged.parameters():
            parameter.requires_grad_(True)
        model = merged
    unbind_forward(model)
    return model


def unbind_forward(model: Any) -> None:
    """Take off a `forward` that a trainer bound to this one object, in place; the class's own is back."""
    if isinstance(model, torch.nn.Module):
        model.__dict__.pop("forward", None)
