"""What a search asks of a model at each level, and the plain way to answer it.

A `BeamCache` is one search's place in the model: it knows the partial codes of the current beams and scores the next
level. Models with keys and values to remember bring their own (`start_beams`), which runs one new code per beam and
level; `StatelessBeams` serves every model that has `score_codes` and runs all partial codes anew.

Shape legend: B users, K beams of the current level, C codes of the level, l codes so far.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch


class CodeScores(NamedTuple):
    """Scores of a level's code block: log-probability = `logits_BKC` - `log_total_BK`.

    Attributes:
        logits_BKC: scores of the codes of the level.
        log_total_BK: logarithm of the summed exponentials over everything the model could have said at this place (its
            whole vocabulary, or the level's block); None where the logits are log-probabilities already, or where the
            caller asked for no total.
    """

    logits_BKC: torch.Tensor
    log_total_BK: torch.Tensor | None = None

    def log_probs(self) -> torch.Tensor:
        """Log-probabilities (B, K, C), float32."""
        logits = self.logits_BKC.float()
        return logits if self.log_total_BK is None else logits - self.log_total_BK.float().unsqueeze(-1)


class CodeScorer(Protocol):
    """The least a search needs of a model: log-probabilities of the next code after partial codes."""

    def score_codes(self, state: Any, prefix_BKl: torch.Tensor, level: int) -> torch.Tensor: ...


class BeamCache(Protocol):
    """Scores of the current beams, level after level. At level 0 there is one beam per user: the empty code."""

    def score(self, level: int, total: bool = True) -> CodeScores:
        """Scores of the codes of `level` after each current beam.

        Args:
            total: False = the caller renormalises over legal codes, so `log_total_BK` may be left out, and with it all
                work over codes of other levels.
        """
        ...

    def reorder(self, parents_BK: torch.Tensor, codes_BK: torch.Tensor, level: int) -> None:
        """Keep these beams: each continues the beam numbered `parents_BK` with the code `codes_BK` of `level`.

        A code at or past the end of the codebook marks an ended (shorter) item: its scores are never read again.
        """
        ...


class StatelessBeams:
    """A BeamCache for any model with `score_codes`: remembers the codes, runs them anew at every level."""

    def __init__(self, decoder: CodeScorer, state: Any, batch_size: int, device: torch.device | str):
        self.decoder = decoder
        self.state = state
        self.prefix_BKl = torch.zeros(batch_size, 1, 0, dtype=torch.long, device=device)

    def score(self, level: int, total: bool = True) -> CodeScores:
        return CodeScores(self.decoder.score_codes(self.state, self.prefix_BKl, level))

    def reorder(self, parents_BK: torch.Tensor, codes_BK: torch.Tensor, level: int) -> None:
        kept = self.prefix_BKl.gather(1, parents_BK.unsqueeze(-1).expand(-1, -1, self.prefix_BKl.shape[-1]))
        self.prefix_BKl = torch.cat([kept, codes_BK.unsqueeze(-1)], dim=-1)


def start_beams(decoder: Any, state: Any, batch_size: int, device: torch.device | str) -> BeamCache:
    """The decoder's own cache where it has one, else `StatelessBeams`."""
    own = getattr(decoder, "start_beams", None)
    return StatelessBeams(decoder, state, batch_size, device) if own is None else own(state)
