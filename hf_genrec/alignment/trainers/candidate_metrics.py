"""Closed-set metrics of candidate rankers: HR@1, valid answers, AUC and its mean over users.

A written answer is valid when exactly one candidate's title stands in it; naming two is as invalid as naming none (LLaRA, arXiv
2312.02445). Yes/no rankers are compared by AUC, pooled and per user (CoLLM, 2310.19488).

Shapes: M rows, C candidates.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def closed_set_answers(answers: Sequence[str], candidate_titles: Sequence[Sequence[str]]) -> np.ndarray:
    """Which candidate each answer names: (M,) place in the list, -1 = none, -2 = several.

    Upper and lower case are the same, and so are runs of white space. A title inside another one counts as named with it.

    Example:
        >>> closed_set_answers(["It is Heat.", "Heat or Alien", "?"], [["Heat", "Alien"]] * 3).tolist()
        [0, -2, -1]
    """
    found = np.full(len(answers), -1, np.int64)
    for row, (answer, titles) in enumerate(zip(answers, candidate_titles, strict=True)):
        text = _plain(answer)
        named = [place for place, title in enumerate(titles) if _plain(title) and _plain(title) in text]
        if named:
            found[row] = named[0] if len(named) == 1 else -2
    return found


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def closed_set_metrics(found_M: np.ndarray, targets_M: np.ndarray) -> dict[str, float]:
    """`valid_ratio`, `hit_rate@1` over all rows, and over the valid ones (`hit_rate@1_valid`).

    The product of the first and the last is the second, the number LLaRA selects checkpoints by.

    Args:
        found_M: of `closed_set_answers`.
        targets_M: the target's place in each list.

    Example:
        >>> closed_set_metrics(np.array([0, -2, 1, -1]), np.array([0, 0, 0, 0]))
        {'valid_ratio': 0.5, 'hit_rate@1': 0.25, 'hit_rate@1_valid': 0.5}
    """
    found_M, targets_M = np.asarray(found_M), np.asarray(targets_M)
    valid_M = found_M >= 0
    hit_M = found_M == targets_M
    return {
        "valid_ratio": float(valid_M.mean()) if len(valid_M) else 0.0,
        "hit_rate@1": float(hit_M.mean()) if len(hit_M) else 0.0,
        "hit_rate@1_valid": float(hit_M[valid_M].mean()) if valid_M.any() else 0.0,
    }


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Chance that a positive scores above a negative, ties count half; nan without both kinds.

    Example:
        >>> auc(np.array([0.9, 0.3, 0.3, 0.1]), np.array([1, 1, 0, 0]))
        0.875
    """
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels).astype(bool)
    positive, negative = int(labels.sum()), int((~labels).sum())
    if not positive or not negative:
        return float("nan")
    _, group, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (counts.cumsum() - (counts - 1) / 2.0)[group]  # mean rank of each tie
    return float((ranks[labels].sum() - positive * (positive + 1) / 2) / (positive * negative))


def user_auc(scores: np.ndarray, labels: np.ndarray, users: np.ndarray) -> float:
    """Mean of the AUCs of all users that have both kinds; nan without any.

    Example:
        >>> user_auc(np.array([0.9, 0.1, 0.2, 0.3]), np.array([1, 0, 1, 0]), np.array([0, 0, 1, 1]))
        0.5
    """
    scores, labels, users = np.asarray(scores), np.asarray(labels), np.asarray(users)
    order = np.argsort(users, kind="stable")
    cuts = np.flatnonzero(np.diff(users[order])) + 1
    values = [auc(scores[rows], labels[rows]) for rows in np.split(order, cuts)] if len(order) else []
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")


def list_metrics(scores_MC: np.ndarray) -> dict[str, float]:
    """Metrics of lists whose target is column 0: `hit_rate@1`, `mrr`, `auc` and `uauc`; -inf = no candidate.

    Ties count against the target.

    Example:
        >>> list_metrics(np.array([[2.0, 1.0], [0.0, 0.0]]))
        {'hit_rate@1': 0.5, 'mrr': 0.75, 'auc': 0.625, 'uauc': 0.75}
    """
    scores_MC = np.asarray(scores_MC, np.float64)
    rank_M = 1 + (scores_MC[:, 1:] >= scores_MC[:, :1]).sum(1)
    real = np.isfinite(scores_MC)
    labels = np.zeros(scores_MC.shape, np.int64)
    labels[:, 0] = 1
    users = np.broadcast_to(np.arange(len(scores_MC))[:, None], scores_MC.shape)
    return {
        "hit_rate@1": float((rank_M == 1).mean()) if len(rank_M) else 0.0,
        "mrr": float((1.0 / rank_M).mean()) if len(rank_M) else 0.0,
        "auc": auc(scores_MC[real], labels[real]),
        "uauc": user_auc(scores_MC[real], labels[real], users[real]),
    }
