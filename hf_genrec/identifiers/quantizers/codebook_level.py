"""One codebook of a vector-quantized autoencoder: its update rule and how points are assigned to it.

Shape suffixes: B items of a batch, N items, P dimensions of a codebook, C codes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import initialization

from .assignment import code_distances, harden, sinkhorn_codes, soft_weights
from .configuration_vq import VQConfig
from .kmeans import nearest

SOFT = ("soft", "gumbel")


class QuantizerLevel(nn.Module):
    """One codebook with its update rule ("ema" or "gradient").

    `share` (C,) and `sum` (C, P) are moving averages of each code's share of the points and of the sum of its points
    divided by the number of points; their quotient is the code. `usage` (C,) counts the points of each code since dead
    codes were last looked for. All are persistent buffers, so that a resumed run continues with the same bits.
    """

    codebook: Tensor
    share: Tensor
    sum: Tensor
    usage: Tensor
    steps: Tensor

    def __init__(self, config: VQConfig, level: int) -> None:
        super().__init__()
        size, self.update_rule = config.codebook_sizes[level], config.codebook_update
        self.assignment = config.level_assignments[level]
        self.epsilon, self.iterations = config.sinkhorn_epsilon, config.sinkhorn_iterations
        self.temperatures, self.cooling = config.assignment_temperatures, config.assignment_temperature_steps
        self.decay, self.interval, self.dead_share = config.ema_decay, config.dead_code_interval, config.dead_code_share
        self.beta, self.initializer_range = config.commitment_weight, config.initializer_range
        self._make_codebook(torch.zeros(size, config.latent_size))
        self.register_buffer("usage", torch.zeros(size, dtype=torch.int64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def _make_codebook(self, codebook_CP: Tensor) -> None:
        if self.update_rule == "ema":
            self.register_buffer("codebook", codebook_CP)
            self.register_buffer("share", codebook_CP.new_zeros(len(codebook_CP)))
            self.register_buffer("sum", torch.zeros_like(codebook_CP))
        else:
            self.codebook = nn.Parameter(codebook_CP)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Random codes, empty statistics."""
        initialization.normal_(self.codebook, std=self.initializer_range)
        initialization.zeros_(self.usage)
        initialization.zeros_(self.steps)
        if self.update_rule == "ema":
            initialization.zeros_(self.share)
            initialization.zeros_(self.sum)

    @torch.no_grad()
    def load_codebook(self, codebook_CP: Tensor, share_C: Tensor) -> None:
        """Set the codes, as if they had held `share_C` of the points so far."""
        self.codebook.copy_(codebook_CP)
        self.usage.zero_()
        self.steps.zero_()
        if self.update_rule == "ema":
            self.share.copy_(share_C)
            self.sum.copy_(self.codebook * self.share[:, None])

    @torch.no_grad()
    def update(self, residual_BP: Tensor, codes_B: Tensor) -> None:
        """Moving averages (EMA only), usage counts, and the reset of dead codes."""
        one_hot_BC = nn.functional.one_hot(codes_B, len(self.codebook)).to(residual_BP.dtype)
        if self.update_rule == "ema":
            self.share.lerp_(one_hot_BC.mean(0), 1 - self.decay)
            self.sum.lerp_(one_hot_BC.t() @ residual_BP / len(residual_BP), 1 - self.decay)
            known_C1 = self.share[:, None] > 1e-8  # a code that never had points keeps its place
            self.codebook.copy_(torch.where(known_C1, self.sum / self.share[:, None].clamp_min(1e-8), self.codebook))
        self.usage.add_(torch.bincount(codes_B, minlength=len(self.codebook)))
        self.steps.add_(1)
        if self.interval and int(self.steps) % self.interval == 0:
            self.reset_dead_codes(residual_BP)

    @torch.no_grad()
    def reset_dead_codes(self, residual_BP: Tensor) -> int:
        """Put codes that (nearly) nothing uses onto random residuals of this batch; returns how many."""
        floor = self.dead_share * float(self.usage.sum()) / len(self.codebook)
        dead = (self.usage.double() <= floor).nonzero().flatten()[: len(residual_BP)]
        picked = torch.randperm(len(residual_BP), device=residual_BP.device)[: len(dead)]
        self.codebook[dead] = residual_BP[picked].to(self.codebook.dtype)
        if self.update_rule == "ema":
            self.share[dead] = 1.0 / len(self.codebook)
            self.sum[dead] = self.codebook[dead] / len(self.codebook)
        self.usage.zero_()
        return len(dead)

    @property
    def temperature(self) -> float:
        """Temperature of soft assignments now: a straight line over the training steps, then constant."""
        start, end = self.temperatures
        done = min(1.0, int(self.steps) / self.cooling) if self.cooling else 1.0
        return start + (end - start) * done

    def assign(self, x_NP: Tensor, chunk_size: int = 8192) -> Tensor:
        """Code (N,) of every point outside training: the nearest."""
        return nearest(x_NP, self.codebook.detach(), chunk_size=chunk_size)

    def forward(self, residual_BP: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`(codes_B, code vectors_BP, loss)`. Soft assignments let the vectors carry gradient into weights and codes.

        Only training mode draws, balances or softens; evaluation takes the nearest code. Nothing is updated here: call
        `update` with the codes afterwards.
        """
        codebook_CP = self.codebook
        kind, temperature = self.assignment if self.training else "nearest", 0.0
        if kind in SOFT:
            temperature = self.temperature
        if temperature > 0:
            codebook_CP = codebook_CP.clone()  # the update changes the codebook before the backward pass
            distance_BC = code_distances(residual_BP, codebook_CP)
            codes_B, weight_BC = harden(soft_weights(distance_BC, temperature, gumbel=kind == "gumbel"))
            vectors_BP = weight_BC @ codebook_CP
        elif kind == "sinkhorn":
            codes_B = sinkhorn_codes(residual_BP, codebook_CP, self.epsilon, self.iterations)
            vectors_BP = codebook_CP[codes_B]
        else:
            codes_B = nearest(residual_BP.detach(), codebook_CP.detach())
            vectors_BP = codebook_CP[codes_B]
        chosen_BP = codebook_CP[codes_B] if temperature > 0 else vectors_BP
        loss = self.beta * (residual_BP - chosen_BP.detach()).pow(2).sum(1).mean()
        if self.update_rule != "ema":
            loss = loss + (residual_BP.detach() - chosen_BP).pow(2).sum(1).mean()
        return codes_B, vectors_BP, loss

    @property
    def is_soft(self) -> bool:
        """Do the code vectors of this training step carry the reconstruction's gradient themselves?"""
        return self.training and self.assignment in SOFT and self.temperature > 0


class SimVQLevel(QuantizerLevel):
    """Codebook = frozen basis (C, P) times a learned map (P, P) (SimVQ, arXiv 2411.02038).

    One step moves every code, used or not, which is this rule's own remedy for dead codes: the basis never changes in
    training, so `dead_code_interval` does nothing. The map starts as the identity and `load_codebook` fills the basis;
    until the map is trained this is the rule "gradient".
    """

    basis: Tensor

    def _make_codebook(self, codebook_CP: Tensor) -> None:
        self.register_buffer("basis", codebook_CP)
        self.map = nn.Parameter(torch.eye(codebook_CP.shape[1]))

    @property
    def codebook(self) -> Tensor:  # type: ignore[override]
        """The codes (C, P), with gradient into the map."""
        return self.basis @ self.map

    @torch.no_grad()
    def init_weights(self) -> None:
        """Random basis of unit expected length, as the paper's (a small one the map could not follow); identity map."""
        initialization.normal_(self.basis, std=self.basis.shape[1] ** -0.5)
        initialization.eye_(self.map)
        initialization.zeros_(self.usage)
        initialization.zeros_(self.steps)

    @torch.no_grad()
    def load_codebook(self, codebook_CP: Tensor, share_C: Tensor) -> None:
        """Set the codes: they become the basis, and the map the identity."""
        self.basis.copy_(codebook_CP)
        nn.init.eye_(self.map)
        self.usage.zero_()
        self.steps.zero_()

    @torch.no_grad()
    def reset_dead_codes(self, residual_BP: Tensor) -> int:
        """Starts a new count of the usage; no code is moved."""
        self.usage.zero_()
        return 0


LEVELS: dict[str, type[QuantizerLevel]] = {"ema": QuantizerLevel, "gradient": QuantizerLevel, "simvq": SimVQLevel}
