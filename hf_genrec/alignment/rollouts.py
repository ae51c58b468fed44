"""Rollouts of item models: G distinct catalogue items per prompt by constrained search, and the prompts they start from.

MiniOneRec (code AkaliKong/MiniOneRec) takes the beams of one constrained search as the group of GRPO: every rollout is an
item, no two are the same, and their order is the model's own. Sampling without replacement (arXiv 1903.06059) explores
more. Both trainers of GRPO and OneRec's preference pairs (arXiv 2502.18965) get their candidates here.

Items that share a code are one answer to a model and count as one rollout, named by the target where it is among them.

Shape legend: B prompts, T tokens, G rollouts of a prompt, X candidates of the search, L levels.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from hf_genrec.data.splits import EvaluationSet
from hf_genrec.errors import IncompatibleComponentsError, TrainingError
from hf_genrec.generation.configuration_recommendation import RecommendationConfig
from hf_genrec.generation.item_filter import ItemFilter
from hf_genrec.generation.scorers import scorer_for
from hf_genrec.generation.search import evaluating, search_items
from hf_genrec.generation.trie import ItemTrie

logger = logging.getLogger(__name__)
STRATEGIES = ("beam", "sample")
_ROWS_ENCODED = 1024


class ItemRollouts:
    """Draws the items of a group.

    Args:
        tokenizer: carries the catalogue.
        num_generations: G.
        strategy: "beam", the best G codes; "sample", G drawn without replacement, then put into the model's order.
        num_beams: width of the search, at least G.
        exclude_seen: leave out items of the user's history (the target never).
        add_target: give the last place of a group without the target to the target.
        temperature: of "sample".
        restrict_to_level: for stock models trained with a softmax over each level.
        renormalize: rank beams by probabilities among legal codes ("sample" always does).
        seed: of "sample".

    Raises:
        TrainingError: an unknown strategy, numbers below 1, or more rollouts than the catalogue has codes.
    """

    def __init__(
        self,
        tokenizer: Any,
        num_generations: int,
        *,
        strategy: str = "beam",
        num_beams: int | None = None,
        exclude_seen: bool = False,
        add_target: bool = False,
        temperature: float = 1.0,
        restrict_to_level: bool = False,
        renormalize: bool = False,
        seed: int = 0,
    ) -> None:
        if strategy not in STRATEGIES:
            raise TrainingError(f"rollouts={strategy!r}: choose one of {', '.join(STRATEGIES)}.")
        if strategy == "beam" and temperature != 1.0:
            raise TrainingError(
                f"temperature={temperature} has no place in a beam search: use rollouts='sample', or 1.0."
            )
        if num_generations < 1 or (num_beams is not None and num_beams < 1):
            raise TrainingError(f"num_generations={num_generations}, num_beams={num_beams}: give at least 1.")
        self.tokenizer, self.size, self.strategy = tokenizer, int(num_generations), strategy
        self.exclude_seen, self.add_target, self.seed = exclude_seen, add_target, int(seed)
        self.restrict_to_level = restrict_to_level
        self._trie = ItemTrie.from_tokenizer(tokenizer)
        if self._trie.num_leaves < self.size:
            raise TrainingError(
                f"num_generations={self.size}, but the catalogue has {self._trie.num_leaves} codes: lower it."
            )
        # a shared code is one rollout, so that its other items need places of their own
        wanted = min(self._trie.num_items, self.size * self._trie.max_items_per_leaf)
        options: dict[str, Any] = {"temperature": temperature} if strategy == "sample" else {}
        self._config = RecommendationConfig(
            k=wanted,
            num_beams=max(num_beams or 0, wanted),
            exclude_seen=False,
            renormalize=renormalize,
            decoding=strategy,
            decoding_options=options,
        )

    def __call__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        *,
        targets: Sequence[int] | None = None,
        histories: Sequence[np.ndarray] | None = None,
        seed: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Items of B prompts, in the model's order.

        Args:
            model: any model that `scorer_for` knows, wrapped in PEFT or not.
            input_ids, attention_mask: (B, T), padding on either side.
            targets: item index of what each user chose, for `add_target` and for naming shared codes.
            histories: B arrays of item indices, for `exclude_seen`.
            seed: added to the seed of "sample" (a step number times B, say); row b draws with seed + b.

        Returns:
            items_BG (int64) and their scores_BG: log-probabilities (-inf where `add_target` put the target).

        Raises:
            TrainingError: a prompt with fewer than G items left (row named).
        """
        decoder = scorer_for(model, self.tokenizer, restrict_to_level=self.restrict_to_level)
        device = input_ids.device
        trie = self._trie.to(device)
        seen = None
        if self.exclude_seen:
            if histories is None:
                raise TrainingError(
                    "exclude_seen leaves out the items of histories: give the prompts a `history` column."
                )
            seen = self._seen(histories, targets)
        config = self._config
        if self.strategy == "sample":
            config = config.merged(decoding_options={**config.decoding_options, "seed": self.seed + seed})
        batch = input_ids.shape[0]
        with evaluating(decoder), evaluating(model):
            state = decoder.start_decoding(input_ids, attention_mask)
            item_filter = ItemFilter.from_rows(trie, seen)
            items_BX, scores_BX = search_items(decoder, state, trie, config, item_filter, batch_size=batch)
        items_BG, scores_BG = self._groups(items_BX, scores_BX, trie, targets)
        if self.strategy == "sample":
            scores_BG, order_BG = scores_BG.sort(dim=1, descending=True, stable=True)
            items_BG = items_BG.gather(1, order_BG)
        return items_BG, scores_BG

    @staticmethod
    def _seen(histories: Sequence[np.ndarray], targets: Sequence[int] | None) -> list[np.ndarray]:
        """What `exclude_seen` leaves out for each row: its history, the target never."""
        seen = [np.unique(np.asarray(row, np.int64)) for row in histories]
        return seen if targets is None else [row[row != target] for row, target in zip(seen, targets)]

    def enough_left(self, histories: Sequence[np.ndarray], targets: Sequence[int] | None = None) -> np.ndarray:
        """(M,) bool: rows whose histories leave G codes to draw; all of them where seen items stay."""
        if not self.exclude_seen:
            return np.ones(len(histories), bool)
        leaves_N = self._trie.item_leaf_N.cpu().numpy()
        sizes = np.bincount(leaves_N)
        left = []
        for row in self._seen(histories, targets):
            leaves, counts = np.unique(leaves_N[row], return_counts=True)
            left.append(len(sizes) - int((counts == sizes[leaves]).sum()))  # a shared code goes with its last item
        return np.array(left, np.int64) >= self.size

    def usable_rows(
        self, histories: Sequence[np.ndarray], targets: Sequence[int] | None, rows: str, option: str, outcome: str
    ) -> np.ndarray:
        """Numbers of the rows with `enough_left`; a warning counts the others.

        Args:
            rows, option, outcome: what the rows are, whose number G is, and what becomes of the others, for messages.

        Raises:
            TrainingError: no row is left.
        """
        enough = self.enough_left(histories, targets)
        if not enough.all():
            what = (
                f"{int((~enough).sum())} of {len(enough)} {rows} have histories that leave fewer than {option}={self.size} "
                "items of the catalogue"
            )
            if not enough.any():
                raise TrainingError(f"{what}: lower {option}, or keep seen items (exclude_seen=False).")
            logger.warning("%s: %s.", what, outcome)
        return np.flatnonzero(enough)

    def usable_prompts(self, dataset: Any, name: str) -> Any:
        """The prompts that leave G items to draw, before a training starts that would stop at the first other one.

        Args:
            dataset: `datasets.Dataset` with `target` and, where seen items are left out, `history`; any other kind, whose
                rows come one by one, stays as it is.
            name: of the dataset, for messages.

        Raises:
            TrainingError: no prompt is left, or there is no `history`.
        """
        if not self.exclude_seen or not isinstance(dataset, Dataset):
            return dataset
        if "history" not in dataset.column_names:
            raise TrainingError(
                f"exclude_seen leaves out the items of histories: give the {name} dataset a `history` column."
            )
        words = f"prompts of the {name} dataset", "num_generations", "they are left out"
        usable = self.usable_rows(dataset["history"][:], dataset["target"][:], *words)
        return dataset if len(usable) == len(dataset) else dataset.select(usable)

    def _groups(
        self, items_BX: torch.Tensor, scores_BX: torch.Tensor, trie: ItemTrie, targets: Sequence[int] | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The first G codes of each row, named by one item each."""
        leaves_N = trie.item_leaf_N
        leaves_BX = torch.where(items_BX >= 0, leaves_N[items_BX.clamp(min=0)], -1)
        earlier_XX = torch.ones(leaves_BX.shape[1], leaves_BX.shape[1], dtype=torch.bool, device=leaves_BX.device).tril(
            -1
        )
        repeated_BX = ((leaves_BX.unsqueeze(2) == leaves_BX.unsqueeze(1)) & earlier_XX).any(dim=2)
        order_BX = ((leaves_BX < 0) | repeated_BX).to(torch.uint8).sort(dim=1, stable=True).indices
        places_BG = order_BX[:, : self.size]
        items_BG, scores_BG = items_BX.gather(1, places_BG), scores_BX.gather(1, places_BG)
        found_B = ((leaves_BX >= 0) & ~repeated_BX).sum(dim=1)
        if bool((found_B < self.size).any()):
            row = int((found_B < self.size).int().argmax())
            raise TrainingError(
                f"row {row} of a batch: only {int(found_B[row])} items are left for {self.size} rollouts; lower "
                "num_generations, or keep seen items (exclude_seen=False)."
            )
        if targets is None:
            return items_BG, scores_BG
        targets_B = torch.as_tensor(list(targets), device=items_BG.device)
        same_BG = leaves_BX.gather(1, places_BG) == leaves_N[targets_B].unsqueeze(1)
        items_BG = torch.where(same_BG, targets_B.unsqueeze(1), items_BG)
        if self.add_target:
            missing_B = ~same_BG.any(dim=1)
            items_BG[missing_B, -1] = targets_B[missing_B]
            scores_BG[missing_B, -1] = -torch.inf
        return items_BG, scores_BG


def answer_tokens(tokenizer: Any, items: Any, *, eos: bool = False) -> list[list[int]]:
    """Token ids of items as answers, with the end token behind them when asked for."""
    end = [tokenizer.eos_token_id] if eos else []
    return [row[row >= 0].tolist() + end for row in np.asarray(tokenizer.item_token_table)[np.asarray(items, np.int64)]]


def items_within(tokenizer: Any, max_tokens: int, with_user: bool) -> tuple[int, int]:
    """Newest items of a history whose prompt has at most `max_tokens` tokens, and the tokens that stand around them.

    Args:
        with_user: prompts begin with a user token, where the tokenizer has such tokens.
    """
    around = len(tokenizer.encode_item_indices([[]], padding=False, return_tensors=None)["input_ids"][0])
    around += int(with_user and tokenizer.num_user_tokens > 0)
    return (max_tokens - around) // int(tokenizer.num_levels), around


def item_prompts(
    rows: EvaluationSet,
    tokenizer: Any,
    *,
    max_history: int | None = None,
    max_prompt_tokens: int | None = None,
    user_ids: Sequence[str] | None = None,
) -> Dataset:
    """Prompts for GRPO: histories as item tokens, exactly as `recommend` reads them.

    Args:
        rows: histories and what was chosen after them (`pairs.next_items`, or a part of a split).
        tokenizer: ItemTokenizer, or an extended text tokenizer (its history template is part of the prompt).
        max_history: newest items kept.
        max_prompt_tokens: longest prompt (`language_model.prompt_room`); the oldest items go, never a part of one.
        user_ids: user strings by `rows.users`, for tokenizers with user tokens.

    Returns:
        Columns `prompt` (text, for logs), `prompt_ids`, `target` (item index), `history` (item indices, uncut).

    Raises:
        TrainingError: no rows, a row without a history, or no room for one item.

    Example:
        >>> from hf_genrec.data.sequences import Sequences
        >>> from hf_genrec.identifiers.tokenization_item import ItemTokenizer
        >>> tokenizer = ItemTokenizer.from_codes(["a", "b", "c"], [[0, 0], [0, 1], [1, 0]])
        >>> rows = EvaluationSet(np.array([0]), Sequences.from_rows([[2, 0]]), np.array([1]))
        >>> item_prompts(rows, tokenizer)[0]["target"], len(item_prompts(rows, tokenizer)[0]["prompt_ids"])
        (1, 4)
    """
    if not len(rows):
        raise TrainingError("no prompts: there is no row with a history and a target.")
    if (rows.histories.lengths == 0).any():
        row = int((rows.histories.lengths == 0).argmax())
        raise TrainingError(f"row {row}: the history is empty; leave out rows without a history.")
    if max_prompt_tokens is not None:
        fitting, around = items_within(tokenizer, max_prompt_tokens, user_ids is not None)
        if fitting < 1:
            raise TrainingError(
                f"max_prompt_tokens is {max_prompt_tokens}, but the template has {around} tokens and an item up to "
                f"{tokenizer.num_levels}: shorten history_before and history_after of the tokenizer, or take a model that reads "
                "more."
            )
        max_history = fitting if max_history is None else min(max_history, fitting)
    ids: list[list[int]] = []
    for start in range(0, len(rows), _ROWS_ENCODED):
        span = range(start, min(start + _ROWS_ENCODED, len(rows)))
        users = None if user_ids is None else [user_ids[int(rows.users[row])] for row in span]
        encoded = tokenizer.encode_item_indices(
            [rows.histories[row] for row in span], user_ids=users, max_items=max_history, return_tensors="pt"
        )
        for tokens, mask in zip(encoded["input_ids"], encoded["attention_mask"].bool()):
            ids.append(tokens[mask].tolist())
    return Dataset.from_dict(
        {
            "prompt": tokenizer.batch_decode(ids),
            "prompt_ids": ids,
            "target": rows.targets.astype(np.int64),
            "history": [row.astype(np.int64) for row in rows.histories],
        }
    )


def check_prompts(dataset: Any, tokenizer: Any, name: str, columns: Sequence[str] = ("prompt_ids", "target")) -> None:
    """The dataset has what the trainer reads, and its targets are items.

    Raises:
        TrainingError: a column is missing, or it is empty.
        IncompatibleComponentsError: a target outside the catalogue (row named).
    """
    missing = [column for column in columns if column not in (getattr(dataset, "column_names", None) or ())]
    if missing:
        raise TrainingError(
            f"the {name} dataset has no column {', '.join(missing)}: build it with hf_genrec.alignment.rollouts.item_prompts."
        )
    if not isinstance(dataset, Dataset):
        return
    if not len(dataset):
        raise TrainingError(f"the {name} dataset is empty.")
    targets_M = np.asarray(dataset["target"][:])
    bad_M = (targets_M < 0) | (targets_M >= tokenizer.num_items)
    if bad_M.any():
        row = int(bad_M.argmax())
        raise IncompatibleComponentsError(
            f"row {row} of the {name} dataset: target {int(targets_M[row])} is outside 0..{tokenizer.num_items - 1}; build "
            "the prompts with the tokenizer of this catalogue."
        )
