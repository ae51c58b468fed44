"""How often does a free beam search name an item that does not exist? (P5, arXiv 2203.13366, searches without a trie.)

Legend: M histories, K beams, L tokens of an item name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from hf_genrec.errors import IncompatibleComponentsError
from hf_genrec.generation.logits_process import ItemTrieLogitsProcessor, real_beams
from hf_genrec.generation.requests import check_fingerprint
from hf_genrec.generation.token_trie import TokenTrie


def names_items(tokenizer: Any, answers: Sequence[Sequence[int]]) -> np.ndarray:
    """(answers,) boolean: is the answer, up to and with its first item end token, the name of an item?"""
    end = tokenizer.item_end_token_id
    known = {tuple(row[row >= 0].tolist()) for row in np.asarray(tokenizer.item_token_table)}
    cut = [list(answer[: list(answer).index(end) + 1]) if end in answer else list(answer) for answer in answers]
    return np.array([tuple(answer) in known for answer in cut], bool)


@torch.no_grad()
def invalid_id_rate(
    model: Any,
    tokenizer: Any,
    histories: Sequence[Sequence[str]],
    *,
    num_beams: int = 20,
    constrained: bool = False,
    batch_size: int = 32,
    max_items: int | None = None,
) -> float:
    """Share of the beams of `model.generate` that name no item of the catalogue.

    Args:
        model: an encoder-decoder; a model with `prompted` puts its own prompt before the histories.
        tokenizer: an `ItemWordsTokenizer`.
        histories: M lists of item ids.
        num_beams: all of them are counted.
        constrained: search with the catalogue's trie: the rate is then 0.
        max_items: newest items read of each history; default: what the model recommends with.

    Raises:
        IncompatibleComponentsError: items that are not named by words, another catalogue, no histories, or a search that
            returned nothing.
    """
    check_fingerprint(model, tokenizer)
    if not hasattr(tokenizer, "item_end_token_id") or not histories:
        raise IncompatibleComponentsError("invalid_id_rate needs histories and an ItemWordsTokenizer.")
    if max_items is None:
        max_items = getattr(getattr(model, "recommendation_config", None), "max_history", None)
    processors = None
    if constrained:
        names = [row[row >= 0][:-1].tolist() for row in np.asarray(tokenizer.item_token_table)]
        trie = TokenTrie.from_sequences(names)
        processors = [ItemTrieLogitsProcessor(trie, eos_token_id=tokenizer.item_end_token_id)]
    was_training = model.training
    model.eval()
    wrong = total = 0
    for start in range(0, len(histories), batch_size):
        encoded = tokenizer.encode_histories(
            histories[start : start + batch_size], max_items=max_items, return_tensors="pt"
        ).to(model.device)
        ids, mask = encoded["input_ids"], encoded["attention_mask"]
        if hasattr(model, "prompted"):
            ids, mask = model.prompted(ids, mask)
        end = tokenizer.item_end_token_id
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            num_beams=num_beams,
            num_return_sequences=num_beams,
            length_penalty=0.0,
            max_new_tokens=tokenizer.num_levels,
            logits_processor=processors,
            eos_token_id=end,
            pad_token_id=tokenizer.pad_token_id,
            return_dict_in_generate=True,
            output_scores=True,
        )
        answers = out.sequences[real_beams(out.sequences_scores), 1:].tolist()
        valid = names_items(tokenizer, answers)
        wrong, total = wrong + int((~valid).sum()), total + len(valid)
    model.train(was_training)
    if total == 0:  # 0.0 would read as "every name was valid"
        raise IncompatibleComponentsError("invalid_id_rate: the search returned no beam to judge; check num_beams.")
    return wrong / total
