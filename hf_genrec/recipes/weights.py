"""Weights of `recommend` that a recipe leaves to the validation part: `generation: {dense_weight: validation}`.

Each user is searched once; every weight of the grid only ranks what was found anew. NDCG@10 decides, and of equal weights
the one that changes least.

Shape legend: B users, K candidates, k items returned.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from tqdm.auto import trange

from hf_genrec.data.splits import Split
from hf_genrec.evaluation.metrics import ndcg_at_k, ranks_from_topk
from hf_genrec.evaluation.recommenders import encode_batch
from hf_genrec.generation.item_filter import ItemFilter
from hf_genrec.generation.recommend import recommendation_config_of
from hf_genrec.generation.scorers import scorer_for
from hf_genrec.generation.search import evaluating, merge_repeats, search_items
from hf_genrec.generation.trie import ItemTrie

DENSE_WEIGHTS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
REPEAT_WEIGHTS = (0.0, -0.5, 0.5, -1.0, 1.0, -2.0, 2.0, -3.0, 3.0, -4.0, -6.0, -8.0, -16.0)


def choose_dense_weight(model: Any, tokenizer: Any, split: Split, progress: bool = True) -> dict[str, float]:
    """NDCG@10 on the validation part per fusion weight, seen items removed."""
    config = model.recommendation_config.merged(dense_weight=0.0)
    config = config.merged(k=config.num_beams)
    ranks: dict[float, list[np.ndarray]] = {weight: [] for weight in DENSE_WEIGHTS}
    for state, trie, seen, targets in _validation_batches(
        model, model, tokenizer, config, split, "fusion weight", progress
    ):
        left = ItemFilter.from_rows(trie, seen)
        items_BK, scores_BK = search_items(model, state, trie, config, left, batch_size=len(seen))
        for weight in DENSE_WEIGHTS:
            fused_BK = model.rescore_items(state, items_BK, scores_BK, config.merged(dense_weight=weight))
            fused_BK = fused_BK.masked_fill(items_BK < 0, -torch.inf)
            order_BK = fused_BK.argsort(dim=1, descending=True, stable=True)
            ranks[weight].append(ranks_from_topk(items_BK.gather(1, order_BK).cpu().numpy(), targets))
    return {f"{weight:g}": ndcg_at_k(np.concatenate(found), 10) for weight, found in ranks.items()}


def choose_repeat_weight(model: Any, tokenizer: Any, split: Split, progress: bool = True) -> dict[str, float]:
    """NDCG@10 on the validation part per `repeat_weight`, seen items kept; stock language models too."""
    config = recommendation_config_of(model)
    stock = not hasattr(model, "recommend_indices")
    decoder = scorer_for(model, tokenizer, restrict_to_level=config.restrict_to_level) if stock else model
    ranks: dict[float, list[np.ndarray]] = {weight: [] for weight in REPEAT_WEIGHTS}
    for state, trie, seen, targets in _validation_batches(
        model, decoder, tokenizer, config, split, "repeat weight", progress
    ):
        filters = ItemFilter.from_rows(trie, seen), ItemFilter.from_rows(trie, None, seen)
        new, again = (search_items(decoder, state, trie, config, one, batch_size=len(seen)) for one in filters)
        for weight in REPEAT_WEIGHTS:
            items_Bk, _ = merge_repeats(*new, *again, weight)
            ranks[weight].append(ranks_from_topk(items_Bk.cpu().numpy(), targets))
    return {f"{weight:g}": ndcg_at_k(np.concatenate(found), 10) for weight, found in ranks.items()}


def _validation_batches(
    model: Any, decoder: Any, tokenizer: Any, config: Any, split: Split, name: str, progress: bool
) -> Iterator[tuple[Any, ItemTrie, list[np.ndarray], np.ndarray]]:
    """Decoder state, trie, seen items and targets of the validation part, `config.batch_size` users at a time."""
    trie = ItemTrie.from_tokenizer(tokenizer, model.device)
    histories, targets = split.validation.histories, np.asarray(split.validation.targets)
    with evaluating(model):
        for start in trange(0, len(targets), config.batch_size, desc=name, disable=not progress, leave=False):
            rows = [histories[row] for row in range(start, min(start + config.batch_size, len(targets)))]
            inputs = encode_batch(model, tokenizer, config, rows)
            state = decoder.start_decoding(inputs["input_ids"], inputs["attention_mask"])
            yield state, trie, [np.unique(row) for row in rows], targets[start : start + len(rows)]


CHOICES = {"dense_weight": choose_dense_weight, "repeat_weight": choose_repeat_weight}


def choose_weights(
    model: Any, tokenizer: Any, split: Split, names: list[str], progress: bool = True
) -> dict[str, dict[str, float]]:
    """Set the named weights of `model.recommendation_config`, one after the other; returns what each value reached."""
    reached = {}
    for name in names:
        reached[name] = found = CHOICES[name](model, tokenizer, split, progress)
        best = max(found, key=lambda weight: found[weight])  # the first of equals
        model.recommendation_config = recommendation_config_of(model).merged(**{name: float(best)})
        if progress:
            print(f"{name.replace('_', ' ')} {best} (NDCG@10 on the validation part {found[best]:.4f})", flush=True)
    return reached
