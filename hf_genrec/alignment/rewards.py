"""Rewards of generated items: exact hit, beam rank, semantic and collaborative likeness; one object for both GRPO trainers.

A reward scores *groups*: the G items that a model generated for one prompt, best first. The rules are MiniOneRec's (code
AkaliKong/MiniOneRec): the rule reward pays an exact hit, the rank reward makes a miss cost more the higher the model
placed it, the semantic and the collaborative one pay items that resemble the target or that another recommender likes.

Every reward is a function of tensors (`reward.score(groups)`), and at the same time a reward function of TRL's
GRPOTrainer (`reward(prompts, completions, completion_ids, **columns) -> list[float]`). Groups are found by the rows'
places in the batch, never by the text of the prompt: two users with the same prompt are two groups.

*Relations*: `WeightedReward([(1, RuleReward()), (1, RankReward())])` is MiniOneRec's "ranking" reward
(`rule_and_rank`). A group whose rewards are all equal has advantages of 0, so a rank reward without a hit teaches nothing.

Shape legend: B prompts, G items of a group, N items, D width of an item vector.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hf_genrec.data.sequences import Sequences
from hf_genrec.errors import TrainingError

_EPSILON = 1e-4  # added to a group's standard deviation, as in TRL
NO_ITEM = -1


@dataclass(frozen=True)
class ItemGroups:
    """What was generated for B prompts.

    Args:
        items_BG: item indices, best first; -1: text that names no item.
        targets_B: what the user chose.
        histories: B arrays of item indices, oldest first; None where nobody needs them.
        ranks_BG: place of each item in the model's own order, from 0; None: the order of the columns.
    """

    items_BG: torch.Tensor
    targets_B: torch.Tensor
    histories: Sequence[np.ndarray] | None = None
    ranks_BG: torch.Tensor | None = None

    @property
    def hits_BG(self) -> torch.Tensor:
        """Which items are the target."""
        return self.items_BG == self.targets_B.unsqueeze(1)


def group_advantages(rewards_BG: torch.Tensor, *, scale: bool = True) -> torch.Tensor:
    """(r - mean) / (std + 1e-4) within each group, as TRL's GRPO; without `scale` r - mean (Dr. GRPO).

    Example:
        >>> group_advantages(torch.tensor([[2.0, 1.0, 0.0], [0.5, 0.5, 0.5]])).round(decimals=2)
        tensor([[ 1.,  0., -1.],
                [ 0.,  0.,  0.]])
    """
    centred_BG = rewards_BG - rewards_BG.mean(dim=1, keepdim=True)
    return centred_BG / (rewards_BG.std(dim=1, keepdim=True) + _EPSILON) if scale else centred_BG


def rank_penalties(num_items: int) -> torch.Tensor:
    """What a miss at each place costs, negative and summing to -1: -(1 / log2(i + 2)) / sum_j(1 / log2(j + 2)). (G,)

    Example:
        >>> rank_penalties(2).round(decimals=4)
        tensor([-0.6131, -0.3869])
    """
    weights_G = 1.0 / torch.log2(torch.arange(num_items, dtype=torch.float32) + 2.0)
    return -weights_G / weights_G.sum()


class ItemReward:
    """Base of the rewards: a subclass gives `score(groups) -> (B, G) float32`.

    Args:
        tokenizer: reads items off `completion_ids` where the trainer does not name them (a plain GRPOTrainer).
        num_generations: G, for the same case; ItemGRPOTrainer says it.
    """

    def __init__(self, *, tokenizer: Any = None, num_generations: int | None = None) -> None:
        self.tokenizer, self.num_generations = tokenizer, num_generations
        self.__name__ = type(self).__name__

    def score(self, groups: ItemGroups) -> torch.Tensor:
        """Rewards (B, G), higher is better."""
        raise NotImplementedError

    def __call__(
        self,
        prompts: Sequence[Any] | None = None,
        completions: Sequence[Any] | None = None,
        completion_ids: Sequence[Sequence[int]] | None = None,
        *,
        target: Sequence[int],
        item: Sequence[int] | None = None,
        beam_rank: Sequence[int] | None = None,
        history: Sequence[Sequence[int]] | None = None,
        group_size: int | Sequence[int] | None = None,
        **columns: Any,
    ) -> list[float]:
        """TRL's form: one row per completion, the completions of a prompt one after the other.

        Args:
            completion_ids: token ids of the answers; read where `item` is missing.
            target: index of the item that the user chose, per row.
            item, beam_rank, group_size: what ItemGRPOTrainer knows of each row.
            history: item indices of the user's history, per row.

        Raises:
            TrainingError: rows that are no whole groups, or answers that nobody can read.
        """
        del prompts, completions, columns
        if item is None:
            item = self._read(completion_ids, target)
        size = group_size if isinstance(group_size, int) or group_size is None else int(group_size[0])
        size = size or self.num_generations
        if not size or len(item) % size:
            raise TrainingError(
                f"{len(item)} completions are no whole groups of {size}: give the reward num_generations= as in the "
                "trainer's arguments."
            )
        targets = torch.as_tensor(list(target)).view(-1, size)
        if bool((targets != targets[:, :1]).any()):
            raise TrainingError(
                "completions of one group have several targets: the rows of a prompt must follow each other; keep TRL's "
                "own sampler, and give num_generations as in the trainer's arguments."
            )
        histories = None if history is None else [np.asarray(row, np.int64) for row in history[::size]]
        ranks = None if beam_rank is None else torch.as_tensor(list(beam_rank)).view(-1, size)
        groups = ItemGroups(torch.as_tensor(list(item)).view(-1, size), targets[:, 0], histories, ranks)
        return self.score(groups).reshape(-1).tolist()

    def _read(self, completion_ids: Sequence[Sequence[int]] | None, target: Sequence[int]) -> list[int]:
        """Item of each answer: the target where it is among the items of a shared code, -1 for anything but one item."""
        if completion_ids is None or self.tokenizer is None:
            raise TrainingError(
                "the trainer does not name the generated items: use ItemGRPOTrainer, or give the reward the tokenizer."
            )
        special = {self.tokenizer.eos_token_id, self.tokenizer.pad_token_id}
        items = []
        for ids, wanted in zip(completion_ids, target):
            spoken = np.array([token for token in ids if token not in special], np.int64)
            named = self.tokenizer.token_ids_to_items(spoken) if len(spoken) else []
            indices = self.tokenizer.item_index(named[0]) if len(named) == 1 and named[0] else []
            index = next((int(i) for i in indices if i == wanted), int(indices[0]) if len(indices) else NO_ITEM)
            row = self.tokenizer.item_token_table[index] if index >= 0 else np.zeros(0, np.int64)
            items.append(index if np.array_equal(row[row >= 0], spoken) else NO_ITEM)  # nothing may stand beside it
        return items


class RuleReward(ItemReward):
    """1 for the item that the user chose, else 0.

    Example:
        >>> RuleReward().score(ItemGroups(torch.tensor([[3, 5, 1]]), torch.tensor([5]))).tolist()
        [[0.0, 1.0, 0.0]]
    """

    def score(self, groups: ItemGroups) -> torch.Tensor:
        return groups.hits_BG.float()


class RankReward(ItemReward):
    """In a group with a hit, misses cost `rank_penalties`, the more the higher the model placed them; else all 0.

    Example:
        >>> groups = ItemGroups(torch.tensor([[3, 5], [3, 1]]), torch.tensor([5, 5]))
        >>> RankReward().score(groups)
        tensor([[-0.6131,  0.0000],
                [ 0.0000,  0.0000]])
    """

    def score(self, groups: ItemGroups) -> torch.Tensor:
        hits_BG, ranks_BG = groups.hits_BG, groups.ranks_BG
        costs_G = rank_penalties(hits_BG.shape[1]).to(hits_BG.device)
        costs_BG = costs_G.expand(hits_BG.shape) if ranks_BG is None else costs_G[ranks_BG]
        return torch.where(hits_BG.any(dim=1, keepdim=True) & ~hits_BG, costs_BG, 0.0)


class SemanticReward(ItemReward):
    """Cosine of the item's and the target's vectors; -1 for what is no item.

    Args:
        item_vectors: (N, D) text embeddings, say.
        options: as for ItemReward.

    Raises:
        TrainingError: vectors that are no (N, D), or not finite.
    """

    def __init__(self, item_vectors: Any, **options: Any) -> None:
        super().__init__(**options)
        vectors_ND = torch.as_tensor(np.asarray(item_vectors), dtype=torch.float32)
        if vectors_ND.dim() != 2 or not bool(torch.isfinite(vectors_ND).all()):
            raise TrainingError(
                f"item_vectors of shape {tuple(vectors_ND.shape)} must be finite numbers (items, width)."
            )
        self.vectors_ND = torch.nn.functional.normalize(vectors_ND, dim=1)

    def score(self, groups: ItemGroups) -> torch.Tensor:
        vectors_ND = self.vectors_ND.to(groups.items_BG.device)
        targets_BD = vectors_ND[groups.targets_B]
        cosine_BG = torch.einsum("bgd,bd->bg", vectors_ND[groups.items_BG.clamp(min=0)], targets_BD)
        return cosine_BG.masked_fill(groups.items_BG < 0, -1.0)


class CollaborativeReward(ItemReward):
    """What another recommender thinks of the item after the same history (SASRec, say).

    Args:
        recommender: has `score(histories: Sequences) -> (M, N)` (`ScoreRecommender`, `ItemGraph`, ...), or is such a
            function; for a model of this library see `model_scores`.
        scale: "unit" puts the scores of each history between 0 (worst item of the catalogue) and 1 (best); "raw" leaves
            them as they are. Within one group GRPO's advantages do not see the difference; a weighted sum does.
        options: as for ItemReward.
    """

    def __init__(self, recommender: Any, *, scale: str = "unit", **options: Any) -> None:
        super().__init__(**options)
        if scale not in ("unit", "raw"):
            raise TrainingError(f"scale={scale!r}: choose 'unit' or 'raw'.")
        self._score: Callable[[Sequences], Any] = getattr(recommender, "score", recommender)
        self.scale = scale

    def score_items(self, histories: Sequence[np.ndarray], items_BG: np.ndarray) -> np.ndarray:
        """Scores (B, G) of items after histories; what is no item (-1) has the worst score of the catalogue."""
        rows: Any = [np.asarray(row, np.int64) for row in histories]
        scores_BN = self._score(Sequences.from_rows(rows))
        if hasattr(scores_BN, "detach"):
            scores_BN = scores_BN.detach().float().cpu().numpy()
        scores_BN = np.asarray(scores_BN, np.float32)
        worst_B1 = np.min(scores_BN, axis=1, keepdims=True)
        found_BG = np.take_along_axis(scores_BN, np.maximum(items_BG, 0), axis=1)
        found_BG = np.where(items_BG < 0, worst_B1, found_BG)
        if self.scale == "unit":
            span_B1 = np.max(scores_BN, axis=1, keepdims=True) - worst_B1
            found_BG = (found_BG - worst_B1) / np.maximum(span_B1, 1e-12)
        if not np.isfinite(found_BG).all():
            raise TrainingError("the recommender behind a CollaborativeReward gave scores that are not finite.")
        return found_BG

    def score(self, groups: ItemGroups) -> torch.Tensor:
        if groups.histories is None:
            raise TrainingError("a CollaborativeReward reads histories: give the prompts a `history` column.")
        found_BG = self.score_items(groups.histories, groups.items_BG.cpu().numpy())
        return torch.from_numpy(found_BG).to(groups.items_BG.device)


class WeightedReward(ItemReward):
    """Sum of rewards with weights.

    Args:
        parts: (weight, reward) pairs.

    Example:
        >>> reward = WeightedReward([(2.0, RuleReward()), (1.0, RankReward())])
        >>> reward.score(ItemGroups(torch.tensor([[5, 3]]), torch.tensor([5])))
        tensor([[ 2.0000, -0.3869]])
    """

    def __init__(self, parts: Sequence[tuple[float, ItemReward]], **options: Any) -> None:
        super().__init__(**options)
        if not parts:
            raise TrainingError("a WeightedReward needs at least one (weight, reward).")
        self.parts = list(parts)

    def score(self, groups: ItemGroups) -> torch.Tensor:
        return torch.stack([weight * reward.score(groups) for weight, reward in self.parts]).sum(dim=0)


def rule_and_rank(**options: Any) -> WeightedReward:
    """MiniOneRec's "ranking" reward: a hit earns 1, and where there is one, misses cost by their place."""
    return WeightedReward([(1.0, RuleReward()), (1.0, RankReward())], **options)


def model_scores(model: Any, tokenizer: Any, *, batch_size: int = 128) -> Callable[[Sequences], np.ndarray]:
    """A model of this library as a recommender for CollaborativeReward.

    Args:
        model: has RecommendationMixin: its dense scores where it has any (SASRec), else the log-probabilities of all
            items.
        tokenizer: of the model; its items must be in the order of the catalogue under training.

    Returns:
        Function from M histories to scores (M, N).
    """
    from hf_genrec.evaluation.recommenders import encode_batch
    from hf_genrec.generation.requests import check_fingerprint
    from hf_genrec.generation.search import evaluating

    check_fingerprint(model, tokenizer)

    def score(histories: Sequences) -> np.ndarray:
        parts = []
        for start in range(0, len(histories), batch_size):
            rows = [histories[row] for row in range(start, min(start + batch_size, len(histories)))]
            inputs = encode_batch(model, tokenizer, model.recommendation_config, rows)
            with evaluating(model):
                scores_BN = model.score_dense(model.start_decoding(inputs["input_ids"], inputs["attention_mask"]))
            if scores_BN is None:
                scores_BN = model.score_all(**inputs, tokenizer=tokenizer)
            parts.append(scores_BN.float().cpu().numpy())
        return np.concatenate(parts)

    return score
