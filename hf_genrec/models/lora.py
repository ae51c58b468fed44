"""LoRA inside a language model that is a part of one of our models: put in from a configuration, merged out again.

The adapters (peft's layers, arXiv 2106.09685) replace linear layers in place: no wrapper, so that the whole model is saved
and loaded like any other, adapters included. Everything else in the language model is frozen.

Relations: a language model that is the whole model is wrapped from outside instead (alignment/adapters.py).
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from hf_genrec.errors import IncompatibleComponentsError

_DEFAULTS: dict[str, Any] = {
    "r": 16,
    "alpha": 16,
    "dropout": 0.05,
    "target_modules": ["gate_proj", "up_proj", "down_proj"],
}


def checked_lora(options: dict[str, Any]) -> dict[str, Any]:
    """The options of a configuration with every default filled in: `r`, `alpha`, `dropout`, `target_modules`.

    Raises:
        IncompatibleComponentsError: an unknown option, or a value out of range.

    Example:
        >>> checked_lora({"r": 8, "target_modules": ["q_proj"]})
        {'r': 8, 'alpha': 16, 'dropout': 0.05, 'target_modules': ['q_proj']}
    """
    unknown = sorted(options.keys() - _DEFAULTS.keys())
    if unknown:
        raise IncompatibleComponentsError(f"lora has no option {unknown[0]!r}; it takes {', '.join(_DEFAULTS)}.")
    found = _DEFAULTS | options
    found["target_modules"] = list(found["target_modules"])
    if not found["r"] >= 1 or not found["alpha"] > 0 or not 0 <= found["dropout"] < 1:
        raise IncompatibleComponentsError(
            f"lora needs r >= 1, alpha > 0 and 0 <= dropout < 1; got {found['r']}, {found['alpha']}, {found['dropout']}."
        )
    return found


def inject_lora(model: nn.Module, options: dict[str, Any]) -> None:
    """Put adapters into a language model, in place; afterwards they alone are trainable in it. They change nothing yet.

    Raises:
        IncompatibleComponentsError: no layer of the names given.
    """
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=options["r"],
        lora_alpha=options["alpha"],
        lora_dropout=options["dropout"],
        target_modules=options["target_modules"],
        fan_in_fan_out=any(type(part).__name__ == "Conv1D" for part in model.modules()),  # GPT-2's transposed layers
    )
    try:
        inject_adapter_in_model(config, model)
    except ValueError as error:
        kinds = sorted({name.rsplit(".", 1)[-1] for name, part in model.named_modules() if _is_linear(part)})
        raise IncompatibleComponentsError(
            f"lora.target_modules {options['target_modules']} name no layer of {type(model).__name__}; its linear layers "
            f"are {', '.join(kinds)}."
        ) from error
    for layer in lora_layers(model).values():
        for part in layer.modules():
            # transformers initialises what it does not know to be ready, which would turn the zeros of B into noise
            if all(not weight.is_meta for weight in part.parameters()):
                part._is_hf_initialized = True


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """The layers with adapters, by name."""
    from peft.tuners.lora import LoraLayer

    return {name: part for name, part in model.named_modules() if isinstance(part, LoraLayer)}


def freeze_language_model(model: nn.Module) -> None:
    """Adapters trainable, the rest of the language model not. Loading a folder makes every weight trainable again."""
    for name, weight in model.named_parameters():
        weight.requires_grad_("lora_" in name)


def merge_lora(model: nn.Module) -> None:
    """Add the adapters to the weights they belong to and take them out: a stock architecture is left, in place."""
    for name, layer in lora_layers(model).items():
        layer.merge()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent) if parent else model, child, layer.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config


class AdaptedLanguageModel:
    """What a model gains that has a `language_model` as a part, and `lora` and `freeze_language_model` in its configuration.

    Put it before `RecommendationMixin`, and call `build_adapters` in `__init__` once the language model is there.
    """

    default_lora: ClassVar[dict[str, Any]] = {}  # of the paper, where it differs from the defaults above
    config: Any
    language_model: Any

    def build_adapters(self) -> None:
        """Adapters and frozen weights as the configuration says."""
        if self.config.lora is not None:
            inject_lora(self.language_model, self.config.lora)
        self._freeze()

    def _freeze(self) -> None:
        if self.config.freeze_language_model or self.config.lora is not None:
            freeze_language_model(self.language_model)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; what the configuration says is frozen comes back frozen."""
        loaded = super().from_pretrained(*args, **kwargs)  # type: ignore[misc]
        (loaded[0] if isinstance(loaded, tuple) else loaded)._freeze()
        return loaded

    def add_lora(self, options: dict[str, Any] | None = None) -> None:
        """Put adapters into the language model and freeze the rest of it.

        Args:
            options: as `lora` of the configuration; default those of the paper.

        Raises:
            IncompatibleComponentsError: adapters are there already, or wrong options.
        """
        if self.config.lora is not None:
            raise IncompatibleComponentsError("the language model has adapters already; call merge_lora first.")
        checked = checked_lora(self.default_lora | (options or {}))
        inject_lora(self.language_model, checked)
        self.config.lora = checked

    def merge_lora(self) -> None:
        """Add the adapters to the language model's weights; it is a stock architecture then, still frozen."""
        if self.config.lora is not None:
            merge_lora(self.language_model)
            self.config.lora, self.config.freeze_language_model = None, True


def language_model_values(model: Any) -> dict[str, Any]:
    """The configuration of a model of transformers as the `language_model` of one of ours."""
    drop = ("architectures", "transformers_version", "_name_or_path", "torch_dtype", "dtype", "auto_map")
    values = {name: value for name, value in model.config.to_dict().items() if name not in drop}
    return values | {"model_type": model.config.model_type}


def _is_linear(part: nn.Module) -> bool:
    return isinstance(part, nn.Linear) or type(part).__name__ == "Conv1D"
