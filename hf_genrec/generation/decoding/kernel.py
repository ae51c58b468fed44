"""The one step that every search over a trie shares: score the legal children of the live beams, keep the best.

Only legal children are ever looked at: the level's code block is sliced by the model, the codes of the children are
gathered from it, and one flat selection over beams x children picks the next beams. Beam search (arXiv 2305.05065),
diverse beams, sampling without replacement, speculation and exact search differ in what they do around it.

Normalisation. `renormalize=False` adds the model's log-probabilities as they are: the result is the joint
log-probability of an item, as in transformers' beam search, which masks after log_softmax. `renormalize=True` divides by
the probability of all legal children first, so that the scores of all legal items sum to one; transformers' sampling,
which masks before softmax, does that, and so do some papers.

Shape legend: B users, K live beams, W children of the widest live node, C codes of the level, X = K * W.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

from ...errors import GenRecError, IncompatibleComponentsError
from ..item_filter import ItemFilter
from ..trie import ItemTrie
from .beam_cache import CodeScores

# Floor of the log-probability of one legal code. Far below any real one, and L of them still sum to a finite float32.
IMPOSSIBLE = -1e30


class BeamStep(NamedTuple):
    """The beams after a step, in ascending order of their nodes (not of their scores).

    Attributes:
        parents_BK: index of the beam each one continues.
        codes_BK: the code it adds; the codebook's size marks an ended item.
        nodes_BK: its node, one level further down.
        scores_BK: its score, float32; -inf marks a dead beam.
    """

    parents_BK: torch.Tensor
    codes_BK: torch.Tensor
    nodes_BK: torch.Tensor
    scores_BK: torch.Tensor


class Children(NamedTuple):
    """The scored children of the live beams.

    Attributes:
        codes_BKW, nodes_BKW: code and node number of each child, ascending inside a beam; 0 where padded.
        legal_BKW: False where padded, filtered or below a dead beam.
        step_BKW: log-probability of each child's code, -inf where not legal.
    """

    codes_BKW: torch.Tensor
    nodes_BKW: torch.Tensor
    legal_BKW: torch.Tensor
    step_BKW: torch.Tensor


class Adjust(Protocol):
    """Changes the scores of legal children: prefix marginals (arXiv 2406.14900), diversity penalties (1610.02424)."""

    def __call__(
        self,
        level: int,
        nodes_BK: torch.Tensor,
        children_BKW: torch.Tensor,
        codes_BKW: torch.Tensor,
        legal_BKW: torch.Tensor,
        step_BKW: torch.Tensor,
    ) -> torch.Tensor: ...


def score_children(
    trie: ItemTrie,
    level: int,
    nodes_BK: torch.Tensor,
    scores_BK: torch.Tensor,
    code_scores: CodeScores,
    *,
    item_filter: ItemFilter | None = None,
    renormalize: bool = False,
    adjust: Adjust | None = None,
) -> Children:
    """Log-probabilities of all legal children of the beams at `nodes_BK` (level `level`).

    Raises:
        IncompatibleComponentsError: the model's code block is smaller than the trie's codebook.
    """
    size = trie.codebook_sizes[level]
    if code_scores.logits_BKC.shape[-1] < size:
        raise IncompatibleComponentsError(
            f"level {level}: the model scores {code_scores.logits_BKC.shape[-1]} codes, the catalogue has {size}; "
            "use the tokenizer the model was trained with."
        )
    codes, children, legal = trie.expand(level, nodes_BK)
    legal &= (scores_BK > -torch.inf).unsqueeze(-1)
    if item_filter is not None:
        legal = item_filter.alive_children(level, nodes_BK, legal)
    step = child_log_probs(code_scores, codes, legal, renormalize, size if trie.has_ends else None)
    if adjust is not None:
        step = adjust(level, nodes_BK, children, codes, legal, step).masked_fill(~legal, -torch.inf)
    return Children(codes, children, legal, step)


def child_log_probs(
    code_scores: CodeScores,
    codes_BKW: torch.Tensor,
    legal_BKW: torch.Tensor,
    renormalize: bool,
    end_code: int | None = None,
) -> torch.Tensor:
    """Log-probability of each child (B, K, W) float32: -inf where not legal, finite where legal.

    Args:
        end_code: the code that ends a shorter item; it costs nothing and takes no part in the renormalisation. For a
            distribution over items of different length, make the end token the last code of each item instead.
    """
    codes = codes_BKW if end_code is None else codes_BKW.clamp(max=end_code - 1)
    step = code_scores.logits_BKC.gather(-1, codes).float()
    spoken = legal_BKW if end_code is None else legal_BKW & (codes_BKW != end_code)
    if renormalize:
        total = step.masked_fill(~spoken, -torch.inf).logsumexp(-1, keepdim=True)
        step = step - total.masked_fill(total == -torch.inf, 0.0)
    elif code_scores.log_total_BK is not None:
        step = step - code_scores.log_total_BK.float().unsqueeze(-1)
    step = step.clamp(min=IMPOSSIBLE)
    if end_code is not None:
        step = step.masked_fill(codes_BKW == end_code, 0.0)
    return step.masked_fill(~legal_BKW, -torch.inf)


def beam_step(
    trie: ItemTrie,
    level: int,
    nodes_BK: torch.Tensor,
    scores_BK: torch.Tensor,
    code_scores: CodeScores,
    num_beams: int,
    *,
    item_filter: ItemFilter | None = None,
    renormalize: bool = False,
    adjust: Adjust | None = None,
) -> BeamStep:
    """One level of a beam search.

    Args:
        trie: the catalogue, on the device of the scores.
        level: 0 to L - 1, the level of `nodes_BK`.
        nodes_BK, scores_BK: the live beams in ascending node order; score -inf = dead.
        code_scores: of these beams, from a BeamCache.
        num_beams: beams kept per user; fewer where fewer legal children exist in every row of the batch.
        item_filter: items that may be returned; children that lead to none are not legal, so no beam meets a dead end.
        renormalize: see the module's text.
        adjust: changes the scores of legal children before the selection.

    Returns:
        The kept beams. Equal scores are broken by the lower node, whatever the batch or device.
    """
    children = score_children(
        trie,
        level,
        nodes_BK,
        scores_BK,
        code_scores,
        item_filter=item_filter,
        renormalize=renormalize,
        adjust=adjust,
    )
    total = (scores_BK.unsqueeze(-1) + children.step_BKW).flatten(1)
    chosen = best_children(total, num_beams)
    return BeamStep(
        chosen // children.codes_BKW.shape[-1],
        children.codes_BKW.flatten(1).gather(1, chosen),
        children.nodes_BKW.flatten(1).gather(1, chosen),
        total.gather(1, chosen),
    )


def best_children(total_BX: torch.Tensor, num_beams: int) -> torch.Tensor:
    """Positions of the `num_beams` largest entries per row, in ascending position; lower positions win ties.

    Beams are kept in node order and children ascend inside a beam, so ascending position is ascending node number: this
    keeps the order for the next level without sorting.
    """
    width = total_BX.shape[1]
    live = int((total_BX != -torch.inf).sum(-1).max())  # no beam of any row would be alive beyond that
    keep = max(1, min(num_beams, live))
    if keep == width:
        return torch.arange(width, device=total_BX.device).expand(total_BX.shape[0], -1)
    values, positions = total_BX.topk(keep + 1, dim=-1)
    if bool((values[:, keep] == values[:, keep - 1]).any()):  # only then is the choice topk's, not ours
        return _lowest_of_the_best(total_BX, values[:, keep - 1 : keep], keep)
    return positions[:, :keep].sort(dim=-1).values


def _lowest_of_the_best(total_BX: torch.Tensor, threshold_B1: torch.Tensor, num_beams: int) -> torch.Tensor:
    above = total_BX > threshold_B1
    equal = total_BX == threshold_B1
    room = num_beams - above.sum(-1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(-1) <= room))
    return chosen.nonzero()[:, 1].view(total_BX.shape[0], num_beams)


def check_scores(scores_BK: torch.Tensor) -> None:
    """A NaN anywhere in a row's beams ends up among its best scores.

    Raises:
        GenRecError: the model returned NaN (row named).
    """
    broken = scores_BK.isnan().any(-1)
    if bool(broken.any()):
        raise GenRecError(
            f"row {int(broken.nonzero()[0])}: the model returned NaN scores; check its weights for NaN and that the "
            "row's history is not empty."
        )
