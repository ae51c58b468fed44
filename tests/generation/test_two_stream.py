"""Two-stream search: the fused ranking by brute force, filters, exact scores of what one stream missed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_genrec.errors import IncompatibleComponentsError, RequestError
from hf_genrec.generation.configuration_recommendation import RecommendationConfig
from hf_genrec.generation.decoding.two_stream import filter_for, stream_tries
from hf_genrec.generation.item_filter import ItemFilter
from hf_genrec.generation.recommend import RecommendationMixin
from hf_genrec.generation.strategies import resolve_strategy
from hf_genrec.generation.trie import ItemTrie
from hf_genrec.identifiers.tokenization_item import ItemTokenizer

SIZES, LEVELS, ITEMS = (4, 12, 5, 10), (2, 2), 40


class TwoTables(RecommendationMixin):
    """Two independent table models, one per stream."""

    def __init__(self, table_model):
        self.parts = [table_model(SIZES[:2], seed=1), table_model(SIZES[2:], seed=2)]
        self.device = torch.device("cpu")
        self.stream_levels = list(LEVELS)

    def start_decoding(self, input_ids, attention_mask):
        return [part.start_decoding(input_ids, attention_mask) for part in self.parts]

    def score_stream(self, state, stream, prefix_BKl, level):
        return self.parts[stream].score_codes(state[stream], prefix_BKl, level)

    def score_codes(self, state, prefix_BKl, level):
        stream = int(level >= LEVELS[0])
        return self.score_stream(state, stream, prefix_BKl[..., 2 * stream :], level - 2 * stream)


@pytest.fixture
def tokenizer(random_codes):
    parts = [random_codes(ITEMS, SIZES[:2], seed=3, unique=True), random_codes(ITEMS, SIZES[2:], seed=4, unique=True)]
    return ItemTokenizer.from_codes([f"i{i}" for i in range(ITEMS)], np.concatenate(parts, 1), codebook_sizes=SIZES)


def expected(model, tokenizer, token, brute_force, allowed=None, streams=(0, 1), beams=None):
    """The fused ranking written out: items that a stream's beams reach, scored in all streams, best first."""
    state = model.start_decoding(torch.tensor([[token]]), None)
    codes = np.array(tokenizer.codes)
    scores = [brute_force(model.parts[s], state[s], codes[:, 2 * s : 2 * s + 2])[0] for s in range(2)]
    legal = np.arange(ITEMS) if allowed is None else np.array(sorted(allowed))
    reached = set()
    for s in streams:
        own = codes[:, 2 * s : 2 * s + 2]
        first = model.parts[s].score_codes(state[s], torch.zeros(1, 1, 0, dtype=torch.long), 0)[0, 0].numpy()
        prefixes = sorted({own[item, 0] for item in legal}, key=lambda code: -first[code])[:beams]
        inside = [item for item in legal if own[item, 0] in prefixes]
        reached |= set(sorted(inside, key=lambda item: -scores[s][item])[:beams])
    total = sum(scores[s] for s in streams)
    ranked = sorted(reached, key=lambda item: -total[item])[:beams]
    return [f"i{item}" for item in ranked], [total[item] for item in ranked]


def token_of(tokenizer, item):
    return tokenizer.item_token_ids(item)[-1]


@pytest.mark.parametrize("beams", [1, 3, 8, 40])
@pytest.mark.parametrize("streams", [None, [0], [1], [1, 0]])
def test_fused_ranking_by_brute_force(beams, streams, table_model, tokenizer, brute_force) -> None:
    model = TwoTables(table_model)
    histories = [["i0"], ["i5", "i9"], ["i11"]]
    options = {"tokenizer": tokenizer, "k": beams, "num_beams": beams, "exclude_seen": False, "decoding": "two_stream"}
    found = model.recommend(histories, decoding_options={"streams": streams}, **options)
    for history, row in zip(histories, found, strict=True):
        items, scores = expected(
            model, tokenizer, token_of(tokenizer, history[-1]), brute_force, None, streams or (0, 1), beams
        )
        assert [entry.item_id for entry in row] == items
        assert [entry.score for entry in row] == pytest.approx(scores, abs=1e-4)


@pytest.mark.parametrize("beams", [4, 40])
def test_seen_items_and_allow_lists(beams, table_model, tokenizer, brute_force) -> None:
    model = TwoTables(table_model)
    allowed = [f"i{item}" for item in range(0, 40, 3)]
    histories = [["i3", "i6"], ["i5"]]
    options = {"tokenizer": tokenizer, "k": beams, "num_beams": beams, "decoding": "two_stream"}
    for lists in (allowed, None):
        found = model.recommend(histories, allowed_items=lists, **options)
        for history, row in zip(histories, found, strict=True):
            legal = {int(name[1:]) for name in (lists or tokenizer.item_ids)} - {int(name[1:]) for name in history}
            items, _ = expected(model, tokenizer, token_of(tokenizer, history[-1]), brute_force, legal, (0, 1), beams)
            assert [entry.item_id for entry in row] == items
            assert len(row) == min(beams, len(legal))


def test_enough_beams_give_the_exhaustive_search_and_renormalised_scores_sum_to_one(table_model, tokenizer) -> None:
    model = TwoTables(table_model)
    options = {"tokenizer": tokenizer, "k": 40, "num_beams": 40, "exclude_seen": False}
    wide = model.recommend([["i2"]], decoding="two_stream", **options)[0]
    exact = model.recommend([["i2"]], decoding="exhaustive", **options)[0]
    assert [entry.item_id for entry in wide] == [entry.item_id for entry in exact]
    assert [entry.score for entry in wide] == pytest.approx([entry.score for entry in exact], abs=1e-5)
    options |= {"decoding_options": {"streams": [1]}, "renormalize": True, "allowed_items": ["i1", "i4", "i9"]}
    few = model.recommend([["i2"]], decoding="two_stream", **options)[0]
    assert sum(np.exp(entry.score) for entry in few) == pytest.approx(1.0, abs=1e-5)


def test_filter_moves_to_another_trie_of_the_same_items(tokenizer) -> None:
    trie = ItemTrie.from_tokenizer(tokenizer)
    for own in stream_tries(trie, LEVELS):
        assert torch.equal(own.node_prefixes(2)[own.item_leaf_N].sum(0), own.node_prefixes(2).sum(0))
        for lists in ({"excluded": [[1, 2], [30]]}, {"allowed": [[1, 2], [30]]}):
            moved = filter_for(own, ItemFilter.from_rows(trie, **lists))
            alive = moved.alive_slots(own.slots_of(torch.arange(ITEMS)).expand(2, -1))
            listed = torch.zeros(2, ITEMS, dtype=torch.bool)
            listed[0, 1:3] = listed[1, 30] = True
            assert torch.equal(alive, listed if "allowed" in lists else ~listed)
    assert stream_tries(trie, LEVELS)[0] is stream_tries(trie, list(LEVELS))[0]  # made once


def test_errors(table_model, tokenizer) -> None:
    model = TwoTables(table_model)
    for wrong in ([2], [0, 0], []):
        with pytest.raises(RequestError, match="streams must be different numbers from 0 to 1"):
            model.recommend([["i1"]], tokenizer=tokenizer, decoding="two_stream", decoding_options={"streams": wrong})
    model.stream_levels = [2, 3]
    with pytest.raises(IncompatibleComponentsError, match=r"streams of \[2, 3\] codes, the catalogue has 4"):
        model.recommend([["i1"]], tokenizer=tokenizer, decoding="two_stream")
    with pytest.raises(IncompatibleComponentsError, match="TableModel has no score_stream"):
        resolve_strategy(table_model(SIZES), RecommendationConfig(decoding="two_stream"))
    with pytest.raises(IncompatibleComponentsError, match="different lengths"):
        stream_tries(ItemTrie.from_codes([[0, 1, 1], [0, 2, -1]]), (1, 2))
