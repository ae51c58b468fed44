"""What the configurations of all vector-quantized autoencoders have in common."""

# No `from __future__ import annotations` here: string annotations silently switch the strict type checks off.

from dataclasses import field
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

CODEBOOK_UPDATES = ("ema", "gradient", "simvq")
ASSIGNMENTS = ("nearest", "soft", "gumbel", "sinkhorn")
GRADIENT_PATHS = ("straight_through", "rotation")
STANDARDISATIONS = ("column", "global", "none")


@strict
class VQConfig(PreTrainedConfig):
    r"""
    Sizes and losses of a `VQAutoencoder`: the fields that `RQVAEConfig` and `MultiHeadVQConfig` share, described there,
    and the choices of the quantizer family, which all default to the plain form:

    Args:
        codebook_update: `"simvq"` besides `"ema"` and `"gradient"`: a frozen basis times a learned map (2411.02038).
        assignment: how a point gets its code in training, one word or one per level: `"nearest"`; `"soft"` (gradient of
            the softmax over distances, the nearest code going forward); `"gumbel"` (the same with a code drawn from it,
            1611.01144); `"sinkhorn"` (spread evenly over the codes of the level within the batch). Evaluation and
            `encode` take the nearest code.
        assignment_temperature: temperature of soft and Gumbel weights at the first step, as a share of the mean squared
            distance between points and codes; 0 = nearest.
        assignment_temperature_end: the same after `assignment_temperature_steps`, reached on a straight line.
        assignment_temperature_steps: training steps of the cooling; 0 = the end temperature throughout.
        sinkhorn_epsilon: entropy weight on distances scaled to a width of 2; LC-Rec's and LETTER's value.
        sinkhorn_iterations: rounds of scaling.
        gradient_path: how the reconstruction's gradient passes hard codes: `"straight_through"` or `"rotation"`
            (2410.06424).
        reconstruction_weight: weight of the reconstruction error; 0 leaves the reconstruction to a contrastive term, one
            of the two readings of CoST (2404.14774).
    """

    model_type = "vq_autoencoder"
    auto_map: ClassVar[dict] = {}

    input_size: int = 384
    hidden_sizes: list[int] | tuple[int, ...] = field(default_factory=lambda: [256, 128])
    latent_size: int = 32
    codebook_sizes: list[int] | tuple[int, ...] = field(default_factory=lambda: [256, 256, 256])
    codebook_update: str = "ema"
    commitment_weight: float | int = 0.25
    quantization_weight: float | int = 1.0
    ema_decay: float | int = 0.99
    dead_code_interval: int = 20
    dead_code_share: float | int = 0.05
    standardise: str = "column"
    dropout: float | int = 0.0
    initializer_range: float | int = 0.02
    assignment: str | list[str] | tuple[str, ...] = "nearest"
    assignment_temperature: float | int = 0.2
    assignment_temperature_end: float | int = 0.02
    assignment_temperature_steps: int = 500
    sinkhorn_epsilon: float | int = 0.003
    sinkhorn_iterations: int = 50
    gradient_path: str = "straight_through"
    reconstruction_weight: float | int = 1.0

    def __post_init__(self, **kwargs: Any) -> None:
        """Sizes become lists, as they are after a trip through JSON."""
        self.hidden_sizes, self.codebook_sizes = list(self.hidden_sizes), list(self.codebook_sizes)
        if not isinstance(self.assignment, str):
            self.assignment = list(self.assignment)
        super().__post_init__(**kwargs)

    @property
    def num_levels(self) -> int:
        """L, codes per item."""
        return len(self.codebook_sizes)

    @property
    def level_assignments(self) -> list[str]:
        """The assignment of each of the L levels."""
        return [self.assignment] * self.num_levels if isinstance(self.assignment, str) else list(self.assignment)

    @property
    def codebook_of_level(self) -> list[int]:
        """Which codebook each level reads: its own, unless a subclass shares some."""
        return list(range(self.num_levels))

    @property
    def assignment_temperatures(self) -> tuple[float, float]:
        """First and last temperature of soft assignments."""
        return float(self.assignment_temperature), float(self.assignment_temperature_end)

    def validate_architecture(self) -> None:
        """Part of the strict validation: sizes are positive, choices are known, weights are in range."""
        own = type(self).__name__
        for name in ("hidden_sizes", "codebook_sizes"):
            if any(size < 1 for size in getattr(self, name)):
                raise ValueError(f"{own}.{name} must hold positive sizes, got {getattr(self, name)}")
        if not self.codebook_sizes or self.input_size < 1 or self.latent_size < 1:
            raise ValueError(f"{own} needs input_size >= 1, latent_size >= 1 and one or more codebook_sizes")
        if self.codebook_update not in CODEBOOK_UPDATES:
            raise ValueError(f"{own}.codebook_update must be in {CODEBOOK_UPDATES}, got {self.codebook_update!r}")
        if self.standardise not in STANDARDISATIONS:
            raise ValueError(f"{own}.standardise must be in {STANDARDISATIONS}, got {self.standardise!r}")
        if len(self.level_assignments) != self.num_levels or not set(self.level_assignments) <= set(ASSIGNMENTS):
            raise ValueError(
                f"{own}.assignment must be in {ASSIGNMENTS}, one for all or one for each of {self.num_levels} levels, "
                f"got {self.assignment!r}"
            )
        if self.gradient_path not in GRADIENT_PATHS:
            raise ValueError(f"{own}.gradient_path must be in {GRADIENT_PATHS}, got {self.gradient_path!r}")
        if self.sinkhorn_epsilon <= 0 or self.sinkhorn_iterations < 1:
            raise ValueError(f"{own}.sinkhorn_epsilon must be positive and .sinkhorn_iterations at least 1")
        for name in ("assignment_temperature", "assignment_temperature_end", "assignment_temperature_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{own}.{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.ema_decay < 1 or not 0 <= self.dropout < 1:
            raise ValueError(f"{own}.ema_decay and .dropout must be in [0, 1)")
        for name in (
            "commitment_weight",
            "quantization_weight",
            "reconstruction_weight",
            "dead_code_share",
            "dead_code_interval",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"{own}.{name} must not be negative, got {getattr(self, name)}")
