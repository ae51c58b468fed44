"""What the evaluator can evaluate: anything with `recommend_topk`; wrappers for score functions and for models.

The contract is one method, `recommend_topk(histories, k, exclude_seen) -> items_Mk` (int item indices, best first, `-1`
padded). A recommender that sets `needs_users = True` is also given `users=` (rows of the user table), for user tokens.

Legend: M rows, N items, B batch, T items in a history.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_genrec.errors import IncompatibleComponentsError
from hf_genrec.evaluation.metrics import topk_from_scores

if TYPE_CHECKING:
    from hf_genrec.data.sequences import Sequences

_CHUNK_CELLS = 16_000_000  # scores of one chunk: 64 MB in float32


def mask_seen(scores_MN: np.ndarray, histories: Sequences) -> np.ndarray:
    """Set the score of every item of each row's history to `-inf`, in place; returns `scores_MN`."""
    rows = np.repeat(np.arange(len(histories)), np.diff(histories.offsets))
    items = histories.items[histories.offsets[0] : histories.offsets[-1]]
    scores_MN[rows, items] = -np.inf
    return scores_MN


class FullRanking:
    """Base of recommenders that score the whole catalogue: a subclass gives `num_items` and `score(histories)`."""

    num_items: int

    def score(self, histories: Sequences) -> np.ndarray:
        """Scores `(M, N)` of every item for every history, higher is better."""
        raise NotImplementedError

    def recommend_topk(self, histories: Sequences, k: int, exclude_seen: bool) -> np.ndarray:
        """Top-K item indices `(M, k)`, `-1` padded; ties by item index; rows are scored in chunks."""
        num_rows = len(histories)
        items_Mk = np.full((num_rows, k), -1, dtype=np.int64)
        chunk = max(1, _CHUNK_CELLS // max(1, self.num_items))
        for start in range(0, num_rows, chunk):
            rows = np.arange(start, min(start + chunk, num_rows))
            part = histories.take(rows) if len(rows) < num_rows else histories
            scores_MN = np.array(self.score(part), copy=True) if exclude_seen else np.asarray(self.score(part))
            if exclude_seen:
                mask_seen(scores_MN, part)
            items_Mk[rows] = topk_from_scores(scores_MN, k)
        return items_Mk


class ScoreRecommender(FullRanking):
    """Any function from histories to scores as a recommender.

    Args:
        score_fn: Takes a `Sequences` of M histories, returns `(M, N)` scores (numpy array or torch tensor).
        num_items: Catalogue size N.

    Example:
        >>> from hf_genrec.data.sequences import Sequences
        >>> always = ScoreRecommender(lambda histories: np.tile([.1, .3, .2], (len(histories), 1)), num_items=3)
        >>> always.recommend_topk(Sequences.from_rows([[1], []]), k=2, exclude_seen=True)
        array([[2, 0],
               [1, 2]])
    """

    def __init__(self, score_fn: Callable[[Any], Any], num_items: int):
        self.score_fn = score_fn
        self.num_items = int(num_items)

    def score(self, histories: Sequences) -> np.ndarray:
        """Scores `(M, N)`.

        Raises:
            IncompatibleComponentsError: The function returned another shape.
        """
        scores_MN = self.score_fn(histories)
        if hasattr(scores_MN, "detach"):
            scores_MN = scores_MN.detach().float().cpu().numpy()
        scores_MN = np.asarray(scores_MN)
        if scores_MN.shape != (len(histories), self.num_items):
            raise IncompatibleComponentsError(
                f"score_fn returned shape {scores_MN.shape} for {len(histories)} histories and {self.num_items} items: "
                f"it must return ({len(histories)}, {self.num_items})"
            )
        return scores_MN


class ModelRecommender:
    """A model and its tokenizer as a recommender: one of ours, or any language model that holds the item tokens.

    The beam width is the configuration's, whatever K the evaluator asks for: a wider search than the one users get
    would flatter the model, so a list ends (in `-1`) after `num_beams` items.

    Args:
        model: Any model with `recommend_indices` (RecommendationMixin), or a stock causal LM or encoder-decoder, PEFT
            wrappers included, whose prompt is what the tokenizer writes.
        tokenizer: The `ItemTokenizer` or extended text tokenizer of the same catalogue.
        recommendation_config: Beams, dense weight, longest history; default the model's own, see
            `recommendation_config_of`.
        batch_size: Histories per call; default the configuration's.
        user_ids: User strings by user row, when the tokenizer has user tokens; rows come from the evaluation set.
        num_beams: Override of the configuration's beam width.

    Raises:
        IncompatibleComponentsError: The model cannot recommend, or belongs to another catalogue.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        recommendation_config: Any = None,
        batch_size: int | None = None,
        *,
        user_ids: Sequence[str] | None = None,
        num_beams: int | None = None,
    ):
        from hf_genrec.generation.recommend import recommendation_config_of
        from hf_genrec.generation.requests import check_fingerprint
        from hf_genrec.generation.scorers import scorer_for
        from hf_genrec.generation.trie import ItemTrie

        stock = not hasattr(model, "recommend_indices")
        if stock and not (hasattr(model, "get_input_embeddings") and hasattr(model, "config")):
            raise IncompatibleComponentsError(
                f"{type(model).__name__} has no recommend_indices: models of this library mix in RecommendationMixin; "
                "wrap another model's scores in ScoreRecommender"
            )
        check_fingerprint(model, tokenizer)
        self.model, self.tokenizer = model, tokenizer
        self.config = recommendation_config if recommendation_config is not None else recommendation_config_of(model)
        restrict = self.config.restrict_to_level
        self._decoder = scorer_for(model, tokenizer, restrict_to_level=restrict) if stock else None
        self.batch_size = int(batch_size or self.config.batch_size)
        self.num_beams = int(num_beams or self.config.num_beams)
        self.user_ids = user_ids
        self.needs_users = user_ids is not None
        self.num_items = int(tokenizer.num_items)
        self.trie = ItemTrie.from_tokenizer(tokenizer, getattr(model, "device", "cpu"))
        self.on_rows: Callable[[int], Any] | None = None  # told how many rows each batch had, for a progress bar

    def recommend_topk(
        self, histories: Sequences, k: int, exclude_seen: bool, users: np.ndarray | None = None
    ) -> np.ndarray:
        """Top-K item indices `(M, k)`, `-1` padded, by beam search in batches of similar length."""
        return self._topk(histories, k, (exclude_seen,), users)[0]

    @property
    def reads_once(self) -> bool:
        """Does `recommend_topk_both` read every history once? (Stock models, whose reading costs more than the search.)"""
        return self._decoder is not None

    def recommend_topk_both(
        self, histories: Sequences, k: int, users: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """`recommend_topk` with seen items removed, and with seen items kept."""
        removed_Mk, kept_Mk = self._topk(histories, k, (True, False), users)
        return removed_Mk, kept_Mk

    def _topk(
        self, histories: Sequences, k: int, settings: Sequence[bool], users: np.ndarray | None
    ) -> list[np.ndarray]:
        found = [np.full((len(histories), k), -1, dtype=np.int64) for _ in settings]
        order = np.argsort(np.diff(histories.offsets), kind="stable")  # padding costs as much as items do
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            rows_B = [histories[int(r)] for r in rows]
            inputs = encode_batch(self.model, self.tokenizer, self.config, rows_B, self._users(rows, users))
            seen = [np.unique(row) for row in rows_B]
            known = [(seen, None) if remove else (None, seen) for remove in settings]
            for items_Mk, items_Bk in zip(found, self._search(inputs, min(k, self.num_beams), known)):
                items_Mk[rows, : items_Bk.shape[1]] = items_Bk.cpu().numpy()
            if self.on_rows is not None:
                self.on_rows(len(rows))
        return found

    def _search(self, inputs: dict, k: int, known: Sequence[tuple[list | None, list | None]]) -> list[Any]:
        """Items of each setting: (items left out, items that the user had already and that stay)."""
        from hf_genrec.generation.recommend import search_each

        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        if self._decoder is None:
            options: dict[str, Any] = {"k": k, "num_beams": self.num_beams, "trie": self.trie, "config": self.config}
            ask = self.model.recommend_indices
            again = [{"repeats": repeats} if repeats and self.config.repeat_weight else {} for _, repeats in known]
            return [ask(ids, mask, seen=seen, **options, **more)[0] for (seen, _), more in zip(known, again)]
        config = self.config.merged(k=k, num_beams=self.num_beams)
        return [items for items, _ in search_each(self._decoder, ids, mask, self.trie, config, known)]

    def _users(self, rows: np.ndarray, users: np.ndarray | None) -> list[str] | None:
        if self.user_ids is None or users is None:
            return None
        return [self.user_ids[int(u)] for u in users[rows]]


def encode_batch(model: Any, tokenizer: Any, config: Any, rows_B: list[np.ndarray], user_ids: Any = None) -> dict:
    """Token ids of a batch of histories of item indices, cut to `config.max_history`, on the model's device."""
    max_items = getattr(config, "max_history", None)
    inputs = tokenizer.encode_item_indices(rows_B, user_ids=user_ids, max_items=max_items, return_tensors="pt")
    device = getattr(model, "device", "cpu")
    return {name: inputs[name].to(device) for name in ("input_ids", "attention_mask")}
