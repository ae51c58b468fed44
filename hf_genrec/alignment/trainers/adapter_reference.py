"""The frozen copy of an adapter, whole: TRL's trainers leave out the rows of trained tokens.

A PeftModel that is trained on has its own state as the reference: TRL adds an adapter "ref" and copies every parameter
whose name has ".default." inside. PEFT keeps the rows of `trainable_token_indices` in a table by adapter name, so their
names *end* in ".default": they stay what they were before any training, and the reference is another model (measured on a
tiny Llama whose item tokens had been trained: a KL divergence of 9 nats before the first step, where 0 is right).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import is_peft_model

REFERENCE, TRAINED = "ref", "default"


@contextmanager
def whole_reference_adapter(model: Any) -> Iterator[None]:
    """While a TRL trainer is made: an adapter "ref" added to `model` starts with the token rows of "default"."""
    if not is_peft_model(model):
        yield
        return
    add_adapter = model.add_adapter

    def add_whole(name: str, *args: Any, **kwargs: Any) -> Any:
        result = add_adapter(name, *args, **kwargs)
        if name == REFERENCE:
            copy_token_rows(model)
        return result

    model.add_adapter = add_whole
    try:
        yield
    finally:
        model.__dict__.pop("add_adapter", None)


def copy_token_rows(model: Any) -> None:
    """Copy the trained token rows of adapter "default" to adapter "ref", in place."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            stem, _, adapter = name.rpartition(".")
            if adapter == TRAINED and f"{stem}.{REFERENCE}" in parameters:
                parameters[f"{stem}.{REFERENCE}"].copy_(parameter)


def drop_reference_adapter(model: Any) -> None:
    """Take off the adapter "ref" that a trainer added, so that the next one can add its own."""
    if is_peft_model(model) and REFERENCE in model.peft_config:
        model.delete_adapter(REFERENCE)
        model.set_adapter(TRAINED)
