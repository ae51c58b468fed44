"""Models that score items at once: their catalogue of codes, and from item scores to log-probabilities of codes.

Shapes: B users, N items, L levels, K beams, l codes of a prefix, C codes of a level,
P items that occur.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_genrec.errors import IncompatibleComponentsError
from hf_genrec.generation.trie import ItemTrie


def code_log_probs(logp_BN: Tensor, codes_NL: Tensor, prefix_BKl: Tensor, level: int, num_codes: int) -> Tensor:
    """Log-probabilities (B, K, C) of the codes of `level` behind a prefix: the mass of the items below each.

    Walking down the levels adds up to the log-probability of all items of a code, which is what searches over codes and
    `score_all` need. A code without items has -inf.

    Example:
        >>> logp = torch.tensor([[0.5, 0.25, 0.25]]).log()
        >>> code_log_probs(logp, torch.tensor([[0, 0], [0, 1], [1, 0]]), torch.zeros(1, 1, 1).long(), 1, 2).exp()
        tensor([[[0.6667, 0.3333]]])
    """
    mass_BN = (logp_BN - logp_BN.amax(-1, keepdim=True)).double().exp()
    below_BKN = (prefix_BKl.unsqueeze(2) == codes_NL[:, :level]).all(-1)
    mass_BKN = mass_BN.unsqueeze(1) * below_BKN
    index = codes_NL[:, level].expand_as(mass_BKN)
    mass_BKC = mass_BKN.new_zeros(*mass_BKN.shape[:2], num_codes).scatter_add_(2, index, mass_BKN)
    whole_BK1 = mass_BKC.sum(-1, keepdim=True)
    return (mass_BKC / whole_BK1.clamp(min=torch.finfo(torch.double).tiny)).log().float()


class ItemCodesMixin:
    """The catalogue of a model whose decoding state holds `logp_BN`, the log-probabilities of all items.

    The model registers the buffer `item_codes` (N, L) and sets `_trie = None`. Put it before `RecommendationMixin`, whose
    `score_codes` is abstract.
    """

    config: Any
    item_codes: Tensor
    _trie: ItemTrie | None

    def set_catalogue(self, item_codes: Any) -> None:
        """Store the codes (N, L) of the catalogue.

        Raises:
            IncompatibleComponentsError: a shape differs from the configuration.
        """
        codes = torch.tensor(np.asarray(item_codes)).to(self.item_codes)
        if codes.shape != self.item_codes.shape:
            raise IncompatibleComponentsError(
                f"set_catalogue: item_codes has shape {tuple(codes.shape)}, the configuration says "
                f"{tuple(self.item_codes.shape)}; build the configuration with from_tokenizer of the same catalogue."
            )
        self.item_codes.copy_(codes)
        self._trie = None

    def _item_tokens(self) -> Tensor:
        return self.item_codes.long() + torch.tensor(self.config.level_offsets, device=self.item_codes.device)

    def _rows(self, codes_PL: Tensor) -> Tensor:
        """Catalogue row of items by their codes: the first of those that share them. (P,)"""
        if self._trie is None or self._trie.device != codes_PL.device:
            codes = self.item_codes.cpu()
            self._trie = ItemTrie.from_codes(codes, list(self.config.codebook_sizes)).to(codes_PL.device)
        leaf_P = self._trie.lookup(codes_PL)
        if leaf_P.device.type == "cpu" and bool((leaf_P < 0).any()):
            raise IncompatibleComponentsError(
                f"labels hold codes {codes_PL[leaf_P < 0][0].tolist()}, which no item of the catalogue has; call "
                "set_catalogue(tokenizer.codes), and set labels of other tokens to -100."
            )
        return self._trie.first_items(leaf_P)

    def score_codes(self, state: Any, prefix_BKl: Tensor, level: int) -> Tensor:
        """Log-probabilities (B, K, C) of the codes of `level` after a prefix: see `code_log_probs`.

        Decoding "dense" ranks by `score_dense` at once.
        """
        codes_NL = self.item_codes.long().to(state.logp_BN.device)
        return code_log_probs(state.logp_BN, codes_NL, prefix_BKl, level, int(self.config.codebook_sizes[level]))
