"""Preferences that a model makes itself, anew in every iteration: by reward (OneRec), or by growing difficulty (Align3GR).

* `RewardPairs` (OneRec, arXiv 2502.18965): the model of the iteration beam-searches N candidates for a small share of the
  requests, a reward scores them, the best is chosen and the worst rejected. Both are the model's own.
* `SampledPairs` (Align3GR, arXiv 2511.11255): the target is chosen, K items of a sampler are rejected, and each stage has a
  sampler of its own: `self_play_stages` goes from beams that share no code with the target to those that share most,
  `FeedbackNegatives` of disliked and then of ignored items is its real feedback.

Shape legend: M requests, P requests with a pair, N candidates, K rejected items.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hf_genrec.data.splits import EvaluationSet
from hf_genrec.errors import TrainingError
from hf_genrec.generation.recommend import recommendation_config_of

from .negatives import NegativeSampler, self_play_negatives
from .rollouts import ItemRollouts

_SMALLEST_GAP = 1e-9  # between the rewards of chosen and rejected


@dataclass(frozen=True)
class IterationPairs:
    """The pairs of one iteration.

    Args:
        rows: (P,) which requests.
        chosen: (P,) item index.
        rejected: (P, K) item indices, -1 behind the last of a row.
        summary: numbers for the record.
    """

    rows: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    summary: dict[str, float] = field(default_factory=dict)


def _draw(num_rows: int, share: float, seed: int, iteration: int) -> np.ndarray:
    """Rows of the requests that get pairs, another draw in every iteration, at least one."""
    drawn = np.random.default_rng([seed, iteration]).permutation(num_rows)[: max(1, round(share * num_rows))]
    return np.sort(drawn)


def _check_share(share: float) -> float:
    if not 0 < share <= 1:
        raise TrainingError(f"share={share}: give the part of the requests that gets pairs, above 0 and at most 1.")
    return share


class RewardPairs:
    """Best and worst of the model's own beam.

    Args:
        reward: function of (list of B histories, items (B, N)) that gives scores (B, N), or an object with such a
            `score_items` (`CollaborativeReward`, `ItemRewardModel`).
        num_candidates: N; the paper takes 128.
        share: part of the requests that gets pairs in each iteration; the paper takes 0.01.
        exclude_seen: no candidates from the user's history.
        max_history: newest items the model reads.
        restrict_to_level: a softmax over the codes of each level (stock models trained so); None: as the model is served.
        batch_size: requests searched together.
        seed: of the draw of requests.
    """

    def __init__(
        self,
        reward: Any,
        *,
        num_candidates: int = 128,
        share: float = 0.01,
        exclude_seen: bool = True,
        max_history: int | None = None,
        restrict_to_level: bool | None = None,
        batch_size: int = 64,
        seed: int = 0,
    ) -> None:
        if num_candidates < 2:
            raise TrainingError(f"num_candidates={num_candidates}: best and worst need at least 2.")
        self._reward: Callable[[list[np.ndarray], np.ndarray], Any] = getattr(reward, "score_items", reward)
        self.num_candidates, self.share, self.seed = num_candidates, _check_share(share), seed
        self.max_history, self.batch_size = max_history, batch_size
        self.exclude_seen, self.restrict_to_level = exclude_seen, restrict_to_level

    def __call__(self, model: Any, tokenizer: Any, rows: EvaluationSet, iteration: int = 0) -> IterationPairs:
        """Pairs of the model as it is now.

        Requests whose histories leave fewer than N candidates get no pair; a warning counts them.

        Raises:
            TrainingError: the reward has another shape or is not finite, tells no candidates apart for any request, or no
                request has N candidates.
        """
        served = recommendation_config_of(model).merged(restrict_to_level=self.restrict_to_level)
        search = ItemRollouts(
            tokenizer,
            self.num_candidates,
            exclude_seen=self.exclude_seen,
            restrict_to_level=served.restrict_to_level,
            renormalize=served.renormalize,
        )
        drawn_P = _draw(len(rows), self.share, self.seed, iteration)
        words = "requests", "num_candidates", "they get no pair"
        drawn_P = drawn_P[search.usable_rows([rows.histories[row] for row in drawn_P], None, *words)]
        items, scores = [], []
        for start in range(0, len(drawn_P), self.batch_size):
            batch = [np.asarray(rows.histories[row], np.int64) for row in drawn_P[start : start + self.batch_size]]
            encoded = tokenizer.encode_item_indices(batch, max_items=self.max_history, return_tensors="pt")
            inputs = (encoded[name].to(model.device) for name in ("input_ids", "attention_mask"))
            items_BN = search(model, *inputs, histories=batch)[0].cpu().numpy()
            scores_BN = np.asarray(self._reward(batch, items_BN), np.float64)
            if scores_BN.shape != items_BN.shape or not np.isfinite(scores_BN).all():
                raise TrainingError(
                    f"the reward gave scores of shape {scores_BN.shape} for items of {items_BN.shape}: it must give one finite "
                    "number per candidate."
                )
            items.append(items_BN)
            scores.append(scores_BN)
        items_PN, scores_PN = np.concatenate(items), np.concatenate(scores)
        span = np.arange(len(drawn_P))
        best_P, worst_P = scores_PN.argmax(axis=1), scores_PN.argmin(axis=1)
        told_P = scores_PN[span, best_P] - scores_PN[span, worst_P] > _SMALLEST_GAP
        if not told_P.any():
            raise TrainingError("the reward is the same for all candidates of every request: it prefers nothing.")
        keep = np.flatnonzero(told_P)
        return IterationPairs(
            drawn_P[keep],
            items_PN[keep, best_P[keep]],
            items_PN[keep, worst_P[keep]][:, None],
            {
                "requests": float(len(drawn_P)),
                "pairs": float(len(keep)),
                "reward_top": float(scores_PN[:, 0].mean()),  # of what would be recommended first
                "reward_mean": float(scores_PN.mean()),
                "reward_chosen": float(scores_PN[keep, best_P[keep]].mean()),
                "reward_rejected": float(scores_PN[keep, worst_P[keep]].mean()),
            },
        )


Stage = NegativeSampler | Callable[[Any, Any], NegativeSampler]


class SampledPairs:
    """The target against K items of the stage's sampler.

    Args:
        stages: one per iteration (the last one goes on): a sampler, or a function of (model, tokenizer) that makes one.
        num_negatives: K; Align3GR takes 20. Requests with fewer keep what they have, with none get no pair.
        share: part of the requests that gets pairs in each iteration.
        seed: of the draw of requests.
    """

    def __init__(self, stages: Sequence[Stage], *, num_negatives: int = 20, share: float = 1.0, seed: int = 0) -> None:
        if not stages or num_negatives < 1:
            raise TrainingError(f"{len(stages)} stages, num_negatives={num_negatives}: give at least one of each.")
        self.stages, self.num_negatives, self.share, self.seed = list(stages), num_negatives, _check_share(share), seed

    def __call__(self, model: Any, tokenizer: Any, rows: EvaluationSet, iteration: int = 0) -> IterationPairs:
        """Pairs of one stage.

        Raises:
            TrainingError: the stage's sampler finds nothing for any request.
        """
        drawn = _draw(len(rows), self.share, self.seed, iteration)
        stage = self.stages[min(iteration, len(self.stages) - 1)]
        sampler = stage if isinstance(stage, NegativeSampler) else stage(model, tokenizer)
        part = rows.take(drawn)
        rejected_MK = sampler(part.histories, part.targets, self.num_negatives, users=part.users, round=iteration)
        keep = np.flatnonzero((rejected_MK >= 0).any(axis=1))
        if not len(keep):
            raise TrainingError(
                f"stage {iteration} finds no rejected item for any request: give its sampler a fallback."
            )
        found = float((rejected_MK[keep] >= 0).sum(axis=1).mean())
        summary = {"requests": float(len(drawn)), "pairs": float(len(keep)), "rejected": found}
        return IterationPairs(drawn[keep], part.targets[keep].astype(np.int64), rejected_MK[keep], summary)


def prefix_ranges(num_levels: int) -> list[tuple[int, int]]:
    """Easy, medium, hard: least and most leading codes that a rejected item shares with the target.

    Example:
        >>> prefix_ranges(4), prefix_ranges(2)
        ([(0, 0), (1, 2), (3, 3)], [(0, 0), (1, 1)])
    """
    if num_levels < 3:
        return [(length, length) for length in range(num_levels)]
    return [(0, 0), (1, num_levels - 2), (num_levels - 1, num_levels - 1)]


def self_play_stages(
    tokenizer: Any, *, num_beams: int = 50, max_history: int | None = None, seed: int = 0
) -> list[Stage]:
    """Stages for SampledPairs: the model's own beam at each of `prefix_ranges`, filled up from the catalogue there."""

    def stage(shared: tuple[int, int]) -> Stage:
        def make(model: Any, tokenizer: Any) -> NegativeSampler:
            return self_play_negatives(
                model, tokenizer, shared, num_beams=num_beams, max_history=max_history, seed=seed
            )

        return make

    return [stage(shared) for shared in prefix_ranges(tokenizer.num_levels)]
