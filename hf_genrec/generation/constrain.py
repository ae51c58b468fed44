"""Constrains every `generate` of a model, also the calls you do not write yourself.

Trainers that generate (GRPO and other rollouts of TRL), pipelines and agents call `model.generate` without a
`logits_processor` argument. transformers asks the model for its processors (`_get_logits_processor`), and that is where
`attach_constraint` steps in, on this one object: the class, the configuration and what is saved stay as they are.

The hook is told the prompt length of each call, so left-padded batches of any width are right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from ..errors import IncompatibleComponentsError, RequestError
from .answer_processor import AnswerProcessor
from .requests import check_fingerprint

_HOOK = "_get_logits_processor"


class GenerationCall(NamedTuple):
    """One call of `generate`, as a factory sees it.

    Attributes:
        prompt_length: tokens in front of the answer: the padded prompt, or the start token of an encoder-decoder.
        inputs: the prompts (B, T) as given (the encoder's, for an encoder-decoder), or None; one row per request,
            before they are repeated for beams.
        generation_config: of this call.
    """

    prompt_length: int
    inputs: torch.Tensor | None
    generation_config: Any


ProcessorFactory = Callable[[GenerationCall], "LogitsProcessor | list[LogitsProcessor]"]


def attach_constraint(model: Any, constraint: AnswerProcessor | ProcessorFactory) -> Callable[[], None]:
    """Constrain all generation of a model until the returned function is called (or `release_constraint(model)`).

    Args:
        model: a transformers model that generates; wrappers (PEFT, DistributedDataParallel, torch.compile) are looked
            through, so that the constraint works from outside and from inside of them.
        constraint: one of the processors of this package, whose `prompt_length` is set anew for each call; or a function
            from a GenerationCall to a processor or a list of processors (item lists that depend on the prompts, say).

    The processors come after those that the generation config asks for and before the warpers of sampling (temperature,
    top-k, top-p). They are not saved, `copy.deepcopy` keeps them, pickled models are free of them.

    Raises:
        IncompatibleComponentsError: a model that cannot generate, one that is constrained already, or a processor of
            another catalogue than the model's. At a call: continuous batching (`generate_batch`), where prompts of
            different lengths share a row.
        RequestError: at a call, a factory that returns no processor.

    Example:
        processor = ItemTrieLogitsProcessor(tokenizer)
        trainer = GRPOTrainer(model=model, ...)
        with constrain_generation(model, processor):
            trainer.train()  # every rollout is a catalogue item
    """
    target = generating_model(model)
    if isinstance(vars(target).get(_HOOK), _ConstrainedProcessors):
        raise IncompatibleComponentsError(
            f"{type(target).__name__} is constrained already; call release_constraint(model) first."
        )
    if isinstance(constraint, LogitsProcessor) and not isinstance(constraint, AnswerProcessor):
        raise IncompatibleComponentsError(
            f"{type(constraint).__name__} does not know where the answer of each call begins; pass a function that makes "
            "it from the call (GenerationCall.prompt_length)."
        )
    if not callable(constraint):
        raise RequestError(f"{constraint!r} is neither a logits processor nor a function that makes one.")
    check_fingerprint(target, constraint)
    setattr(target, _HOOK, _ConstrainedProcessors(target, constraint))
    return lambda: release_constraint(target)


def release_constraint(model: Any) -> None:
    """Let a model generate freely again; nothing happens to one that is free."""
    vars(generating_model(model)).pop(_HOOK, None)


@contextmanager
def constrain_generation(model: Any, constraint: AnswerProcessor | ProcessorFactory) -> Iterator[Any]:
    """`attach_constraint` for the body of a `with` statement; gives the model."""
    release = attach_constraint(model, constraint)
    try:
        yield model
    finally:
        release()


def generating_model(model: Any) -> Any:
    """The transformers model inside wrappers.

    Raises:
        IncompatibleComponentsError: there is none.
    """
    inner = model
    for _ in range(8):  # wrappers around wrappers
        if hasattr(inner, "_orig_mod"):  # torch.compile
            inner = inner._orig_mod
        elif hasattr(inner, "get_base_model"):  # PEFT
            inner = inner.get_base_model()
        elif isinstance(getattr(inner, "module", None), torch.nn.Module) and not hasattr(type(inner), _HOOK):
            inner = inner.module  # data parallel
        else:
            break
    if not hasattr(type(inner), _HOOK):
        raise IncompatibleComponentsError(
            f"{type(inner).__name__} does not generate as transformers models do (no {_HOOK}); constrain a model with "
            "a language modelling head."
        )
    return inner


class _ConstrainedProcessors:
    """Stands in for the method `_get_logits_processor` of one model."""

    def __init__(self, model: Any, constraint: Any):
        self.model = model
        self.constraint = constraint

    def __call__(
        self,
        generation_config: Any,
        input_ids_seq_length: int | None = None,
        encoder_input_ids: torch.Tensor | None = None,
        logits_processor: LogitsProcessorList | None = None,
        **options: Any,
    ) -> LogitsProcessorList:
        if input_ids_seq_length is None:
            raise IncompatibleComponentsError(
                "continuous batching puts prompts of different lengths into one row, which a constrained model cannot "
                "serve; use generate (TRL: use_transformers_continuous_batching=False)."
            )
        if isinstance(self.constraint, AnswerProcessor):
            made: Any = self.constraint.with_prompt_length(input_ids_seq_length)
        else:
            made = self.constraint(GenerationCall(input_ids_seq_length, encoder_input_ids, generation_config))
        processors = [made] if isinstance(made, LogitsProcessor) else list(made or [])
        if not processors or not all(isinstance(processor, LogitsProcessor) for processor in processors):
            raise RequestError(f"the function that constrains this model returned {made!r}, not a logits processor.")
        return type(self.model)._get_logits_processor(
            self.model,
            generation_config=generation_config,
            input_ids_seq_length=input_ids_seq_length,
            encoder_input_ids=encoder_input_ids,
            logits_processor=LogitsProcessorList([*(logits_processor or []), *processors]),
            **options,
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> _ConstrainedProcessors:
        return _ConstrainedProcessors(memo.get(id(self.model), self.model), self.constraint)

    def __reduce__(self) -> Any:
        # a stored model is a free one: while it is read, and still empty, this gives the method of its class
        return getattr, (self.model, _HOOK)
