"""Beam versus exact: how many of the truly best items does a beam of a given width miss?

`score_all` gives the exact log-probability of every catalogue item; `recommend_indices` searches with W beams. An item
of the exact top k counts as missed when the beam's list holds fewer items that score at least as much: items of equal
score (a shared code) stand for one another. The dense head is switched off: the check is about the search.

Legend: M histories, N items, B batch, W beams.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from hf_genrec.errors import RequestError
from hf_genrec.evaluation.metrics import metrics_from_ranks, ranks_from_topk, topk_from_scores
from hf_genrec.evaluation.recommenders import encode_batch, mask_seen

if TYPE_CHECKING:
    from hf_genrec.data.sequences import Sequences


@dataclass(frozen=True)
class BeamCheck:
    """Result of `beam_versus_exact`.

    Args:
        k: Items compared per history.
        histories: Histories checked.
        exact_seconds: Wall time of exact scoring.
        widths: Beam width -> `{"missed_share", "histories_with_a_miss", "seconds", metrics @k with targets}`.
        exact: Metrics @k of the exact ranking, with targets.
    """

    k: int
    histories: int
    exact_seconds: float
    widths: dict[int, dict[str, float]]
    exact: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; widths become strings."""
        return {
            "k": self.k,
            "histories": self.histories,
            "exact_seconds": round(self.exact_seconds, 3),
            "exact": dict(self.exact),
            "widths": {str(width): dict(found) for width, found in self.widths.items()},
        }

    def __str__(self) -> str:
        lines = [
            f"beam versus exact, top {self.k} of {self.histories:,} histories "
            f"(exact scoring {self.exact_seconds:.1f} s)",
            *(
                f"  {width:>5} beams: {found['missed_share']:.2%} of the exact top {self.k} missed, "
                f"{found['histories_with_a_miss']:.1%} of histories affected, {found['seconds']:.1f} s"
                + (f", NDCG {found[f'ndcg@{self.k}']:.4f}" if f"ndcg@{self.k}" in found else "")
                for width, found in self.widths.items()
            ),
        ]
        if self.exact:
            lines.append(f"  exact      : NDCG {self.exact[f'ndcg@{self.k}']:.4f}")
        return "\n".join(lines)


def beam_versus_exact(
    model: Any,
    tokenizer: Any,
    histories: Sequences,
    *,
    widths: Iterable[int] = (10, 20, 50),
    k: int = 10,
    targets: np.ndarray | None = None,
    exclude_seen: bool = True,
    config: Any = None,
    batch_size: int = 32,
    progress: bool = True,
) -> BeamCheck:
    """Share of the exact top k that beam search misses, per beam width.

    Args:
        model: Has `RecommendationMixin` (`recommend_indices`, `score_all`).
        tokenizer: The `ItemTokenizer` of the same catalogue.
        histories: Rows to check; exact scoring costs one score per trie node and row, so a few hundred are enough.
        widths: Beam widths, each at least k.
        targets: `(M,)` items that came next, for metrics of both rankings.
        exclude_seen: Seen items removed (inside the trie for the beam, masked in the exact scores).
        config: `RecommendationConfig`; default the model's.

    Raises:
        RequestError: A width below k, or no history.
    """
    from hf_genrec.generation.requests import check_fingerprint
    from hf_genrec.generation.trie import ItemTrie

    check_fingerprint(model, tokenizer)
    widths = sorted({int(width) for width in widths})
    if not widths or widths[0] < k:
        raise RequestError(f"beam widths must be at least k = {k}, got {widths}: k items need k beams")
    num_rows = len(histories)
    if not num_rows:
        raise RequestError("beam_versus_exact needs at least one history")
    config = (config if config is not None else model.recommendation_config).merged(dense_weight=0.0)
    trie = ItemTrie.from_tokenizer(tokenizer, getattr(model, "device", "cpu"))
    found_MWk = np.full((num_rows, len(widths), k), -1, dtype=np.int64)
    exact_Mk = np.full((num_rows, k), -1, dtype=np.int64)
    missed_MW = np.zeros((num_rows, len(widths)), dtype=np.int64)
    seconds, exact_seconds = np.zeros(len(widths)), 0.0
    for start in tqdm(range(0, num_rows, batch_size), desc="beam versus exact", disable=not progress, leave=False):
        rows = np.arange(start, min(start + batch_size, num_rows))
        part = histories.take(rows)
        rows_B = [part[b] for b in range(len(part))]
        inputs = encode_batch(model, tokenizer, config, rows_B)
        begin = time.perf_counter()
        scores_BN = model.score_all(**inputs, trie=trie, renormalize=config.renormalize).double().cpu().numpy()
        exact_seconds += time.perf_counter() - begin
        if exclude_seen:
            mask_seen(scores_BN, part)
        exact_Mk[rows] = topk_from_scores(scores_BN, k)
        wanted_B = (exact_Mk[rows] >= 0).sum(axis=1)
        last_B = np.maximum(wanted_B - 1, 0)
        threshold_B = scores_BN[np.arange(len(rows)), exact_Mk[rows, last_B]]
        for w, width in enumerate(widths):
            begin = time.perf_counter()
            items_Bk, _ = model.recommend_indices(
                **inputs,
                trie=trie,
                k=k,
                num_beams=width,
                seen=[np.unique(row) for row in rows_B] if exclude_seen else None,
                config=config,
            )
            items = items_Bk.cpu().numpy()
            seconds[w] += time.perf_counter() - begin
            found_MWk[rows, w, : items.shape[1]] = items
            reached = np.where(items >= 0, np.take_along_axis(scores_BN, np.maximum(items, 0), axis=1), -np.inf)
            good_B = ((reached >= threshold_B[:, None]) & (items >= 0)).sum(axis=1)
            missed_MW[rows, w] = np.maximum(wanted_B - good_B, 0)
    total = max(1, int((exact_Mk >= 0).sum()))
    return BeamCheck(
        k=k,
        histories=num_rows,
        exact_seconds=exact_seconds,
        widths={
            width: {
                "missed_share": float(missed_MW[:, w].sum() / total),
                "histories_with_a_miss": float((missed_MW[:, w] > 0).mean()),
                "seconds": round(float(seconds[w]), 3),
                **_metrics(found_MWk[:, w], targets, k),
            }
            for w, width in enumerate(widths)
        },
        exact=_metrics(exact_Mk, targets, k),
    )


def _metrics(items_Mk: np.ndarray, targets: np.ndarray | None, k: int) -> dict[str, float]:
    return {} if targets is None else metrics_from_ranks(ranks_from_topk(items_Mk, np.asarray(targets)), [k])
