"""Position-free generation and grounding: pieces of text in several facets, then the items they occur in (TransRec).

For each facet (name, id, attributes; arXiv 2310.06491) a beam search writes substrings of the catalogue's texts: after
any piece only tokens that continue it *somewhere* in some text are legal, wherever in the text that is. All kept beams of
all steps are pieces; `NgramGrounder` adds up, per item, the weights of the pieces it contains.

Lossy: items that contain no generated piece are not listed.

Shape legend: B users, K beams, V vocabulary, M tokens of a piece, X legal continuations of all beams.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch

from ...errors import RequestError
from ..configuration_recommendation import RecommendationConfig
from ..fm_index import FMIndex
from ..item_filter import ItemFilter
from ..ngram_grounding import Ngram, NgramGrounder
from ..trie import ItemTrie
from .beam_cache import start_beams
from .kernel import IMPOSSIBLE, best_children, check_scores

_cached: WeakKeyDictionary[FMIndex, _CachedIndex] = WeakKeyDictionary()


class _CachedIndex:
    """An FMIndex that remembers its answers: users ask for the same pieces again and again."""

    def __init__(self, index: FMIndex):
        self.num_tokens = index.num_tokens
        self._found: dict[tuple[int, ...], tuple[int, torch.Tensor]] = {}

    def look_up(self, index: FMIndex, pieces: set[tuple[int, ...]]) -> None:
        """Answer for all new pieces at once."""
        new = [piece for piece in pieces if piece not in self._found]
        if not new:
            return
        lengths = torch.tensor([len(piece) for piece in new])
        table = torch.zeros(len(new), int(lengths.max()), dtype=torch.long)
        for row, piece in enumerate(new):
            table[row, : len(piece)] = torch.tensor(piece)
        device = index.device
        start, end = (bound.cpu() for bound in index.find(table.to(device), lengths.to(device)))
        suffixes, starts = index.suffixes_n.cpu(), index.document_starts.cpu()
        for piece, low, high in zip(new, start.tolist(), end.tolist(), strict=True):
            places = suffixes[low:high].long()
            documents = (torch.searchsorted(starts, places, right=True) - 1).unique()
            self._found[piece] = (high - low, documents)

    def count(self, pattern: Any) -> int:
        return self._found[tuple(pattern)][0]

    def documents_containing(self, pattern: Any) -> torch.Tensor:
        return self._found[tuple(pattern)][1]


def ngram_grounding(
    decoder: Any,
    state: Any,
    trie: ItemTrie,
    config: RecommendationConfig,
    item_filter: ItemFilter | None = None,
    *,
    batch_size: int,
    max_tokens: int = 8,
    facet_weights: dict[str, float] | None = None,
    biases: dict[str, float] | None = None,
    alpha: float = 2.0,
    beta: float = 0.8,
    gamma: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The strategy "ngram_grounding".

    Args:
        max_tokens: tokens of the longest piece.
        facet_weights, biases, alpha, beta, gamma: as in `NgramGrounder`; a facet of weight 0 is not generated.

    Returns:
        items_BX and scores_BX: sums of weights of the pieces an item contains, not log-probabilities.

    Raises:
        RequestError: options out of range.
    """
    if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 1:
        raise RequestError(f"max_tokens must be a whole number >= 1, got {max_tokens!r}.")
    if unknown := sorted(set(facet_weights or {}) - set(decoder.text_facets())):
        raise RequestError(f"facet_weights names {unknown[0]!r}; facets are {', '.join(decoder.text_facets())}.")
    facets = [name for name in decoder.text_facets() if (facet_weights or {}).get(name, 1.0) > 0]
    pieces: list[list[Ngram]] = [[] for _ in range(batch_size)]
    indexes: dict[str, Any] = {}
    for facet in facets:
        index = decoder.facet_index(facet)
        scorer, prompt = decoder.start_facet(state, facet, max_tokens)
        found = generate_pieces(scorer, prompt, index, config.num_beams, max_tokens, batch_size=batch_size)
        cached = _cached.setdefault(index, _CachedIndex(index))
        cached.look_up(index, {tokens for row in found for tokens, _ in row})
        indexes[facet] = cached
        for row, entries in enumerate(found):
            pieces[row] += [Ngram(facet, tokens, score) for tokens, score in entries]
    given = {name: value for name, value in (facet_weights or {}).items() if name in indexes}
    if not indexes:
        raise RequestError("facet_weights switches every facet off; leave one above 0.")
    grounder = NgramGrounder(
        indexes,
        trie.num_items,
        alpha=alpha,
        beta=beta,
        gamma=gamma,
        biases={name: value for name, value in (biases or {}).items() if name in indexes},
        facet_weights=given,
    )
    excluded = None
    if item_filter is not None:
        legal = item_filter.alive_slots(trie.item_slots.expand(batch_size, -1)).cpu()
        excluded = [(~row).nonzero().flatten().numpy() for row in legal]
    items, scores = grounder.ground(pieces, config.search_width, excluded=excluded)
    return items.to(trie.device), scores.to(trie.device)


def generate_pieces(
    scorer: Any, prompt: Any, index: FMIndex, num_beams: int, max_tokens: int, *, batch_size: int
) -> list[list[tuple[tuple[int, ...], float]]]:
    """Per user, every piece that was in the beam at some step, with its log-probability.

    At each step the `num_beams` likeliest extensions are kept; an extension must occur in the index. A piece that ends
    every text it occurs in has none and leaves the beam.
    """
    device = index.device
    beams = start_beams(scorer, prompt, batch_size, device)
    tokens = torch.zeros(batch_size, 1, 0, dtype=torch.long, device=device)
    scores = torch.zeros(batch_size, 1, device=device)
    pieces: list[list[tuple[tuple[int, ...], float]]] = [[] for _ in range(batch_size)]
    for step in range(max_tokens):
        step_scores = beams.score(step)
        log_probs = step_scores.log_probs()  # (B, K, V)
        width = tokens.shape[1]
        flat = tokens.view(batch_size * width, step)
        start, end = index.find(flat)
        dead = scores.flatten() == -torch.inf
        rows, words, _ = index.continuations(start, torch.where(dead, start, end), torch.full_like(start, step))
        total = torch.full_like(log_probs, -torch.inf).view(batch_size * width, -1)
        legal = log_probs.reshape(batch_size * width, -1)[rows, words].clamp(min=IMPOSSIBLE)
        total[rows, words] = scores.flatten()[rows] + legal
        total = total.view(batch_size, -1)
        check_scores(total)
        chosen = best_children(total, num_beams)
        scores = total.gather(1, chosen)
        parents, words_BK = chosen // log_probs.shape[-1], chosen % log_probs.shape[-1]
        tokens = torch.cat(
            [tokens.gather(1, parents.unsqueeze(-1).expand(-1, -1, step)), words_BK.unsqueeze(-1)], dim=-1
        )
        for row, (texts, values) in enumerate(zip(tokens.tolist(), scores.tolist(), strict=True)):
            pieces[row] += [(tuple(text), value) for text, value in zip(texts, values, strict=True) if value > -1e29]
        if bool((scores == -torch.inf).all()):
            break
        if step + 1 < max_tokens:
            beams.reorder(parents, words_BK, step)
    return pieces
