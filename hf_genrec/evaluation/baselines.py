"""Untrained baselines that every result stands beside: popularity, forward co-occurrence (item graph), Markov chains.

All are deterministic, fitted in one pass over the training sequences, and score the whole catalogue with one sparse
product. Ties in the score go to the smaller item index (`metrics.topk_from_scores`).

Legend: M histories, N items, n newest items of a history.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
from scipy import sparse

from hf_genrec.errors import RequestError
from hf_genrec.evaluation.recommenders import FullRanking

if TYPE_CHECKING:
    from hf_genrec.data.sequences import Sequences


class Popularity(FullRanking):
    """The most consumed items of the training part, the same list for everybody.

    Example:
        >>> from hf_genrec.data.sequences import Sequences
        >>> train = Sequences.from_rows([[0, 2], [2, 1], [2]])
        >>> Popularity().fit(train, num_items=4).recommend_topk(Sequences.from_rows([[2]]), k=2, exclude_seen=True)
        array([[0, 1]])
    """

    def fit(self, train: Sequences, num_items: int) -> Popularity:
        """Count every training interaction."""
        self.num_items = int(num_items)
        self.counts_N = np.bincount(train.items, minlength=self.num_items).astype(np.float64)
        return self

    def score(self, histories: Sequences) -> np.ndarray:
        """Training counts, the same row `(N,)` for each of the M histories (a read-only broadcast)."""
        _check_fitted(self)
        return np.broadcast_to(self.counts_N, (len(histories), self.num_items))

    def recommend_topk(self, histories: Sequences, k: int, exclude_seen: bool) -> np.ndarray:
        """The same lists as from `score`, read off one ranking of the catalogue."""
        _check_fitted(self)
        order_N = np.argsort(-self.counts_N, kind="stable")
        lengths_M = np.diff(histories.offsets)
        longest = int(lengths_M.max(initial=0)) if exclude_seen else 0
        # k items are left of the first k + longest, however many of those were seen
        order_w = order_N[: k + longest]
        open_Mw = np.ones((len(histories), len(order_w)), dtype=bool)
        if exclude_seen:
            place_N = np.empty(self.num_items, dtype=np.int64)
            place_N[order_N] = np.arange(self.num_items)
            rows, places = np.repeat(np.arange(len(histories)), lengths_M), place_N[histories.items]
            inside = places < len(order_w)
            open_Mw[rows[inside], places[inside]] = False
        place_Mw = np.cumsum(open_Mw, axis=1) - 1  # place in the list
        rows, columns = np.nonzero(open_Mw & (place_Mw < k))
        items_Mk = np.full((len(histories), k), -1, dtype=np.int64)
        items_Mk[rows, place_Mw[rows, columns]] = order_w[columns]
        return items_Mk


class ItemGraph(FullRanking):
    """Forward co-occurrence graph walked one step from the newest items: the strongest untrained peer on dense data.

    The weight of an edge i -> j is the sum, over all places where i comes before j within `window` steps, of 1 / gap,
    divided by how often i occurs in training (so it reads "j expected soon after one i"). A history scores every item
    as the sum of the edges that reach it from its newest `last` items, the a-th newest with weight `decay ** a`.

    Args:
        window: Longest gap counted.
        last: Newest items of the history that vote; an item that occurs twice among them votes twice.
        decay: Weight of one step of age; 1.0 = equal votes.
        normalize: Divide edges by the training count of their source; off, popular sources outvote the others
            (MovieLens-100K, seen items removed: Recall@10 .20 with, .19 to .20 without; NDCG@10 .111 and .102).
        weight: `"inverse_gap"` or `"uniform"`.
        backoff: Order equal scores by popularity, so that items without an edge from the history come last, most
            popular first (an empty history gets the popularity list). Off, they go by item index.

    Relations: `ItemGraph(window=1, last=n, normalize=False)` is `Markov(last=n)`.

    Example:
        >>> from hf_genrec.data.sequences import Sequences
        >>> graph = ItemGraph(window=2).fit(Sequences.from_rows([[0, 1, 2], [0, 2]]), num_items=4)
        >>> graph.score(Sequences.from_rows([[0]])).round(3)[0].tolist()  # (1/2, (1/2 + 1)/2) after two 0s
        [0.0, 0.5, 0.75, 0.0]
    """

    def __init__(
        self,
        window: int = 10,
        last: int = 5,
        *,
        decay: float = 0.8,
        normalize: bool = True,
        weight: Literal["inverse_gap", "uniform"] = "inverse_gap",
        backoff: bool = True,
    ):
        if window < 1 or last < 1 or not 0 < decay <= 1:
            raise RequestError(
                f"ItemGraph needs window >= 1, last >= 1 and 0 < decay <= 1; got {window}, {last}, {decay}"
            )
        self.window, self.last, self.decay = window, last, decay
        self.normalize, self.weight, self.backoff = normalize, weight, backoff

    def fit(self, train: Sequences, num_items: int) -> ItemGraph:
        """Build the graph `(N, N)` from the training sequences."""
        from hf_genrec.data.cooccurrence import cooccurrence

        self.num_items = int(num_items)
        graph_NN = cooccurrence(train, self.num_items, window=self.window, weight=self.weight, directed=True)
        counts_N = np.bincount(train.items, minlength=self.num_items).astype(np.float64)
        if self.normalize:
            graph_NN = sparse.diags(1.0 / np.maximum(counts_N, 1.0)) @ graph_NN
        self.graph_NN = sparse.csr_matrix(graph_NN)
        # A millionth of the smallest possible edge vote: the backoff breaks ties, it never outvotes an edge.
        smallest = self.graph_NN.data.min() if self.graph_NN.nnz else 1.0
        scale = 1e-6 * smallest * self.decay ** (self.last - 1) / (1.0 + counts_N.max(initial=0.0))
        self.backoff_N = counts_N * scale
        return self

    def votes(self, histories: Sequences) -> sparse.csr_matrix:
        """Weights `(M, N)` that the newest items of each history carry."""
        recent = histories.last(self.last)
        rows = np.repeat(np.arange(len(recent)), np.diff(recent.offsets))
        age = recent.offsets[1:][rows] - 1 - np.arange(len(recent.items))  # 0 = newest
        return sparse.csr_matrix((self.decay**age, (rows, recent.items)), shape=(len(recent), self.num_items))

    def score(self, histories: Sequences) -> np.ndarray:
        """Scores `(M, N)`: summed edges from the newest items, equal sums ordered by popularity."""
        _check_fitted(self)
        scores_MN = (self.votes(histories) @ self.graph_NN).toarray()
        return scores_MN + self.backoff_N if self.backoff else scores_MN


class Markov(ItemGraph):
    """First-order transition counts, summed over the newest `last` items of the history.

    Relations: `ItemGraph(window=1, last=last, decay=1, normalize=False)`; at window 1 both edge weights are counts.
    """

    def __init__(self, last: int = 2, *, decay: float = 1.0, backoff: bool = True):
        super().__init__(window=1, last=last, decay=decay, normalize=False, backoff=backoff)


def _check_fitted(baseline: FullRanking) -> None:
    if not hasattr(baseline, "num_items"):
        raise RequestError(f"{type(baseline).__name__} is not fitted: call .fit(train, num_items) first")


BASELINES: dict[str, type[FullRanking]] = {"popularity": Popularity, "item_graph": ItemGraph, "markov": Markov}
