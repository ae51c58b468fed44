"""Beam versus exact: how many of the truly best items does a beam of a given width miss?

`score_all_leaves` gives the exact log-probability of every item that may be returned; `recommend_indices` searches with W
beams. An item of the exact top k counts as missed when the beam's list holds fewer items that score at least as much:
items of equal score (a shared code) stand for one another. The dense head is switched off: the check is about the search.
`certified_versus_exact` asks the search that knows when its list is exact how often it does, at which width and cost.

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
from hf_genrec.evaluation.recommenders import encode_batch

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
        exclude_seen: Seen items removed, inside the trie.
        config: `RecommendationConfig`; default the model's.

    Raises:
        RequestError: A width below k, or no history.
    """
    from hf_genrec.generation.item_filter import ItemFilter
    from hf_genrec.generation.requests import check_fingerprint
    from hf_genrec.generation.trie import ItemTrie

    check_fingerprint(model, tokenizer)
    widths = sorted({int(width) for width in widths})
    if not widths or widths[0] < k:
        raise RequestError(f"beam widths must be at least k = {k}, got {widths}: k items need k beams")
    num_rows = len(histories)
    if not num_rows:
        raise RequestError("beam_versus_exact needs at least one history")
    config = (config if config is not None else model.recommendation_config).merged(dense_weight=0.0, decoding="beam")
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
        seen = [np.unique(row) for row in rows_B] if exclude_seen else None
        begin = time.perf_counter()
        # with renormalize, what a request may return changes its scores: exact ones need the same filter
        scores_BN = _exact_scores(model, inputs, trie, ItemFilter.from_rows(trie, seen), config.renormalize)
        exact_seconds += time.perf_counter() - begin
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
                seen=seen,
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


@dataclass(frozen=True)
class CertifiedCheck:
    """Result of `certified_versus_exact`.

    Args:
        k: Items certified per history.
        histories: Histories checked.
        exhaustive_rows: Rows of the model that exact scoring of one history costs (trie nodes above the leaves).
        limits: `max_beams` (None = no limit) -> `{"certified_share", "wrong_share", "missed_share", "beams_median",
            "beams_max", "rows_mean", "rows_of_exhaustive", "seconds"}`. `wrong_share` counts certified lists that hold an
            item worse than the exact top k: it must be 0. `missed_share` is that of `beam_versus_exact`.
    """

    k: int
    histories: int
    exhaustive_rows: int
    limits: dict[int | None, dict[str, float]]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; limits become strings, None becomes "none"."""
        limits = {"none" if limit is None else str(limit): dict(found) for limit, found in self.limits.items()}
        return {
            "k": self.k,
            "histories": self.histories,
            "exhaustive_rows": self.exhaustive_rows,
            "limits": limits,
        }

    def __str__(self) -> str:
        lines = [
            f"certified top {self.k} of {self.histories:,} histories "
            f"(exact scoring: {self.exhaustive_rows:,} rows each)"
        ]
        for limit, found in self.limits.items():
            name = "no limit" if limit is None else f"at most {limit} beams"
            lines.append(
                f"  {name:>18}: {found['certified_share']:.1%} certified, {found['wrong_share']:.2%} of them wrong, "
                f"{found['missed_share']:.2%} of items missed, {found['rows_mean']:.0f} rows "
                f"({found['rows_of_exhaustive']:.1%} of exhaustive), widest {found['beams_max']:.0f}"
            )
        return "\n".join(lines)


def certified_versus_exact(
    model: Any,
    tokenizer: Any,
    histories: Sequences,
    *,
    max_beams: Iterable[int | None] = (10, 20, 50, None),
    k: int = 10,
    exclude_seen: bool = True,
    config: Any = None,
    batch_size: int = 32,
    progress: bool = True,
) -> CertifiedCheck:
    """How often `certified_top_k` proves its list, at which width and cost, and whether any proven list is wrong.

    Args:
        model, tokenizer, histories, exclude_seen, config: As in `beam_versus_exact`.
        max_beams: Limits tried, each at least k; every search starts with k beams.

    Raises:
        RequestError: A limit below k, or no history.
    """
    from hf_genrec.generation.decoding.certified import certified_top_k
    from hf_genrec.generation.item_filter import ItemFilter
    from hf_genrec.generation.requests import check_fingerprint
    from hf_genrec.generation.search import evaluating
    from hf_genrec.generation.trie import ItemTrie

    check_fingerprint(model, tokenizer)
    limits = list(dict.fromkeys(max_beams))
    if not limits or any(limit is not None and limit < k for limit in limits):
        raise RequestError(f"max_beams must be at least k = {k} (or None), got {limits}: k items need k beams")
    num_rows = len(histories)
    if not num_rows:
        raise RequestError("certified_versus_exact needs at least one history")
    config = config if config is not None else model.recommendation_config
    trie = ItemTrie.from_tokenizer(tokenizer, getattr(model, "device", "cpu"))
    certified_WM = np.zeros((len(limits), num_rows), dtype=bool)
    missed_WM, beams_WM, rows_WM = (np.zeros((len(limits), num_rows), dtype=np.int64) for _ in range(3))
    seconds, wanted = np.zeros(len(limits)), 0
    for start in tqdm(range(0, num_rows, batch_size), desc="certified versus exact", disable=not progress, leave=False):
        rows = np.arange(start, min(start + batch_size, num_rows))
        part = histories.take(rows)
        rows_B = [part[b] for b in range(len(part))]
        inputs = encode_batch(model, tokenizer, config, rows_B)
        seen = [np.unique(row) for row in rows_B] if exclude_seen else None
        item_filter = ItemFilter.from_rows(trie, seen)
        scores_BN = _exact_scores(model, inputs, trie, item_filter, config.renormalize)
        exact_Bk = topk_from_scores(scores_BN, k)
        wanted_B = (exact_Bk >= 0).sum(axis=1)
        wanted += int(wanted_B.sum())
        threshold_B = scores_BN[np.arange(len(rows)), exact_Bk[np.arange(len(rows)), np.maximum(wanted_B - 1, 0)]]
        for w, limit in enumerate(limits):
            begin = time.perf_counter()
            with evaluating(model):
                state = model.start_decoding(**inputs)
                result = certified_top_k(
                    model,
                    state,
                    trie,
                    k,
                    item_filter,
                    batch_size=len(rows),
                    max_beams=limit,
                    renormalize=config.renormalize,
                )
            seconds[w] += time.perf_counter() - begin
            items = result.items_BX.cpu().numpy()
            reached = np.where(items >= 0, np.take_along_axis(scores_BN, np.maximum(items, 0), axis=1), -np.inf)
            # two computations of one score may differ in the last digits
            good_B = ((reached >= threshold_B[:, None] - 1e-4) & (items >= 0)).sum(axis=1)
            missed_WM[w, rows] = np.maximum(wanted_B - good_B, 0)
            certified_WM[w, rows] = result.certified_B.cpu().numpy()
            beams_WM[w, rows], rows_WM[w, rows] = result.beams_B.cpu().numpy(), result.rows_B.cpu().numpy()
    exhaustive_rows = sum(trie.num_nodes(level) for level in range(trie.num_levels))
    return CertifiedCheck(
        k=k,
        histories=num_rows,
        exhaustive_rows=exhaustive_rows,
        limits={
            limit: {
                "certified_share": float(certified_WM[w].mean()),
                "wrong_share": float((certified_WM[w] & (missed_WM[w] > 0)).sum() / max(1, certified_WM[w].sum())),
                "missed_share": float(missed_WM[w].sum() / max(1, wanted)),
                "beams_median": float(np.median(beams_WM[w])),
                "beams_max": float(beams_WM[w].max()),
                "rows_mean": float(rows_WM[w].mean()),
                "rows_of_exhaustive": float(rows_WM[w].mean() / exhaustive_rows),
                "seconds": round(float(seconds[w]), 3),
            }
            for w, limit in enumerate(limits)
        },
    )


def _exact_scores(model: Any, inputs: dict[str, Any], trie: Any, item_filter: Any, renormalize: bool) -> np.ndarray:
    """Scores (B, N) of all items, -inf where the filter drops one."""
    import torch

    from hf_genrec.generation.decoding.exhaustive import score_all_leaves
    from hf_genrec.generation.search import evaluating

    batch = inputs["input_ids"].shape[0]
    with evaluating(model):
        state = model.start_decoding(**inputs)
        leaves = score_all_leaves(model, state, trie, item_filter, batch_size=batch, renormalize=renormalize)
    scores = leaves[:, trie.item_leaf_N]
    if item_filter is not None:  # of a shared code, single items may be out
        slots = trie.item_slots.expand(batch, -1)
        scores = torch.where(item_filter.alive_slots(slots), scores, -torch.inf)
    return scores.double().cpu().numpy()
