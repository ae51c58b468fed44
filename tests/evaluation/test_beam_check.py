"""Beam versus exact: wide beams miss nothing, narrow ones what brute force says, equal scores are interchangeable."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from hf_genrec.data.sequences import Sequences
from hf_genrec.errors import RequestError
from hf_genrec.evaluation.beam_check import beam_versus_exact, certified_versus_exact
from hf_genrec.generation.configuration_recommendation import RecommendationConfig
from hf_genrec.generation.recommend import RecommendationMixin
from hf_genrec.identifiers.tokenization_item import ItemTokenizer


class TrapModel(RecommendationMixin):
    """First codes look almost equal, second codes differ much and depend on the first: narrow beams are misled."""

    def __init__(self, sizes, vocabulary, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.device = torch.device("cpu")
        self.first = 0.3 * torch.randn(vocabulary, sizes[0], generator=generator)
        self.second = 3.0 * torch.randn(vocabulary, sizes[0], sizes[1], generator=generator)
        self.dense_calls = 0

    def start_decoding(self, input_ids, attention_mask):
        return input_ids[:, -1]

    def score_codes(self, state, prefix_BKl, level):
        if level == 0:
            return self.first[state].log_softmax(-1).unsqueeze(1).expand(-1, prefix_BKl.shape[1], -1)
        return self.second[state.unsqueeze(1), prefix_BKl[..., 0]].log_softmax(-1)

    def rescore_items(self, state, items_BK, scores_BK, config):
        self.dense_calls += config.dense_weight > 0
        return scores_BK


def _case(sizes=(12, 12), num_items=100, rows=40, seed=0):
    rng = np.random.default_rng(seed)
    cells = rng.permutation(int(np.prod(sizes)))[:num_items]
    tokenizer = ItemTokenizer.from_codes(
        [f"item-{i}" for i in range(num_items)], np.stack(np.unravel_index(cells, sizes), axis=1)
    )
    model = TrapModel(sizes, tokenizer.vocab_size, seed)
    histories = Sequences.from_rows([rng.permutation(num_items)[: rng.integers(1, 8)] for _ in range(rows)])
    return model, tokenizer, histories


@pytest.mark.parametrize("exclude_seen", [True, False])
def test_missed_share_equals_a_count_by_hand_and_falls_with_the_width(exclude_seen):
    model, tokenizer, histories = _case()
    k, widths = 5, (5, 8, 12, 100)
    check = beam_versus_exact(
        model, tokenizer, histories, widths=widths, k=k, exclude_seen=exclude_seen, batch_size=7, progress=False
    )
    exact = model.score_all([[tokenizer.item_ids[i] for i in row] for row in histories], tokenizer=tokenizer).numpy()
    for width in widths:
        missed = affected = 0
        for scores, history in zip(exact, histories):
            scores = scores.copy()
            if exclude_seen:
                scores[history] = -np.inf
            best = set(np.argsort(-scores, kind="stable")[:k].tolist())
            found = model.recommend(
                [[tokenizer.item_ids[i] for i in history]],
                tokenizer=tokenizer,
                k=k,
                num_beams=width,
                exclude_seen=exclude_seen,
            )[0]
            lost = len(best - {int(r.item_id.split("-")[1]) for r in found})
            missed, affected = missed + lost, affected + (lost > 0)
        assert check.widths[width]["missed_share"] == pytest.approx(missed / (k * len(histories)))
        assert check.widths[width]["histories_with_a_miss"] == pytest.approx(affected / len(histories))
    shares = [check.widths[width]["missed_share"] for width in widths]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.02 and shares[-1] == 0.0


def test_items_of_one_code_stand_for_one_another():
    """Five items of one code fill a top 3 in ten ways, none of which is a miss."""
    tokenizer = ItemTokenizer.from_codes([f"item-{i}" for i in range(8)], [[0, 0]] * 5 + [[1, 0], [1, 1], [2, 2]])
    model = TrapModel((3, 3), tokenizer.vocab_size)
    model.first.zero_()[:, 0] = 9.0
    check = beam_versus_exact(model, tokenizer, Sequences.from_rows([[7], [6, 5]]), widths=(3,), k=3, progress=False)
    assert check.widths[3]["missed_share"] == 0.0


def test_targets_give_metrics_and_the_dense_head_stays_off():
    model, tokenizer, histories = _case()
    model.recommendation_config = RecommendationConfig(dense_weight=0.7)
    targets = np.random.default_rng(0).integers(0, 100, size=len(histories))
    check = beam_versus_exact(model, tokenizer, histories, widths=(10, 200), k=10, targets=targets, progress=False)
    assert model.dense_calls == 0
    assert check.widths[200]["ndcg@10"] == check.exact["ndcg@10"]
    block = json.loads(json.dumps(check.to_dict()))
    assert block["widths"]["200"]["missed_share"] == 0.0 and block["histories"] == len(histories)
    assert "200 beams: 0.00% of the exact top 10 missed" in str(check)


def test_fewer_items_than_k_is_no_miss():
    model, tokenizer, _ = _case(num_items=6)
    histories = Sequences.from_rows([[0, 1, 2], [3]])
    check = beam_versus_exact(model, tokenizer, histories, widths=(10,), k=10, progress=False)
    assert check.widths[10]["missed_share"] == 0.0


def test_bad_requests():
    model, tokenizer, histories = _case()
    with pytest.raises(RequestError, match="at least k"):
        beam_versus_exact(model, tokenizer, histories, widths=(5,), k=10)
    with pytest.raises(RequestError, match="at least one history"):
        beam_versus_exact(model, tokenizer, Sequences.from_rows([]), widths=(10,))


@pytest.mark.parametrize("exclude_seen", [True, False])
def test_wide_beams_miss_nothing_under_renormalisation(exclude_seen):
    """Leaving out seen items changes renormalised scores; beam and exact ranking must speak of the same ones."""
    model, tokenizer, histories = _case()
    config = RecommendationConfig(renormalize=True)
    options = {"k": 5, "config": config, "exclude_seen": exclude_seen, "progress": False}
    check = beam_versus_exact(model, tokenizer, histories, widths=(5, 100), **options)
    assert check.widths[100]["missed_share"] == 0.0 < check.widths[5]["missed_share"]


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("exclude_seen", [True, False])
def test_certified_lists_are_right_and_cheap_enough(renormalize, exclude_seen):
    model, tokenizer, histories = _case()
    config = RecommendationConfig(renormalize=renormalize)
    options = {"k": 5, "config": config, "exclude_seen": exclude_seen, "progress": False}
    check = certified_versus_exact(model, tokenizer, histories, max_beams=(5, 11, None), batch_size=7, **options)
    shares = [check.limits[limit]["certified_share"] for limit in (5, 11, None)]
    assert shares[0] < shares[1] <= shares[2] == 1.0, shares
    assert all(found["wrong_share"] == 0.0 for found in check.limits.values())
    assert check.limits[None]["missed_share"] == 0.0 < check.limits[5]["missed_share"]
    # a first walk of 5 beams is the beam search of that width
    beam = beam_versus_exact(model, tokenizer, histories, widths=(5,), **options)
    assert check.limits[5]["missed_share"] == beam.widths[5]["missed_share"]
    assert check.limits[5]["beams_max"] == 5 and check.limits[None]["beams_max"] <= 12
    assert check.exhaustive_rows == 13  # the root and 12 first codes
    assert json.loads(json.dumps(check.to_dict()))["limits"]["none"]["certified_share"] == 1.0
    assert "no limit: 100.0% certified" in str(check)


def test_certified_check_refuses_bad_limits():
    model, tokenizer, histories = _case(rows=2)
    with pytest.raises(RequestError, match="max_beams must be at least k = 10"):
        certified_versus_exact(model, tokenizer, histories, max_beams=(5,))
    with pytest.raises(RequestError, match="at least one history"):
        certified_versus_exact(model, tokenizer, Sequences.from_rows([]))
