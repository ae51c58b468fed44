"""Exact scores of the whole catalogue: the trie walked level by level, every shared prefix scored once.

The yardstick of every approximate search: a beam can be checked against it, and `score_all` is built on it.

Shape legend: B users, n_l nodes of level l, C codes of the level, S nodes of one chunk.
"""

from __future__ import annotations

from typing import Any

import torch

from ...errors import IncompatibleComponentsError
from ..trie import ItemTrie
from .beam_cache import CodeScorer, CodeScores
from .kernel import child_log_probs

_CHUNK_ELEMENTS = 2**22  # B * S * C log-probabilities held at a time (16 MiB in float32)


def score_all_leaves(
    decoder: CodeScorer,
    state: Any,
    trie: ItemTrie,
    *,
    batch_size: int,
    renormalize: bool = False,
    chunk_elements: int = _CHUNK_ELEMENTS,
) -> torch.Tensor:
    """Log-probability of every leaf: (B, n_L) float32.

    Args:
        decoder: has `score_codes(state, prefix_BKl, level) -> logp_BKC`.
        renormalize: as in `trie_beam_search`.
        chunk_elements: log-probabilities held at a time; bounds memory, changes nothing else.
    """
    device = trie.device
    scores = torch.zeros(batch_size, 1, dtype=torch.float32, device=device)
    for level in range(trie.num_levels):
        prefixes = trie.node_prefixes(level)
        nodes = torch.arange(trie.num_nodes(level), device=device)
        chunk = max(1, chunk_elements // max(1, batch_size * trie.codebook_sizes[level]))
        parts = []
        for start in range(0, nodes.shape[0], chunk):
            prefix_BSl = prefixes[start : start + chunk].expand(batch_size, -1, -1)
            logp_BSC = decoder.score_codes(state, prefix_BSl, level)
            if logp_BSC.shape[-1] < trie.codebook_sizes[level]:
                raise IncompatibleComponentsError(
                    f"level {level}: the model scores {logp_BSC.shape[-1]} codes, the catalogue has "
                    f"{trie.codebook_sizes[level]}; use the tokenizer the model was trained with."
                )
            codes, _, legal = trie.expand(level, nodes[start : start + chunk])
            step = child_log_probs(
                CodeScores(logp_BSC), codes.expand(batch_size, -1, -1), legal.expand(batch_size, -1, -1), renormalize
            )
            total = scores[:, start : start + chunk].unsqueeze(-1) + step
            parts.append(total[:, legal])  # children of consecutive nodes are consecutive nodes of the next level
        scores = torch.cat(parts, dim=1)
    return scores.masked_fill_(scores <= -5e29, -torch.inf)
