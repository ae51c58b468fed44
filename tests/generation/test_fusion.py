"""List fusion against its definitions, item by item in plain Python; the CHECK lines of the published rules."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hf_genrec.errors import RequestError
from hf_genrec.generation.fusion import (
    fuse_prior,
    gamma_prior,
    log_linear,
    minmax,
    reciprocal_rank,
    softmax_product,
    stream_sum,
    votes,
)


def ranked(items, scores=None):
    """One user's list as tensors; default scores -1, -2, ..."""
    scores = [-1.0 - i for i in range(len(items))] if scores is None else scores
    return torch.tensor([items], dtype=torch.long), torch.tensor([scores], dtype=torch.float32)


def random_lists(seed, streams=3, users=4, length=6, catalogue=15):
    rng = np.random.default_rng(seed)
    lists = []
    for stream in range(streams):
        width = length + stream
        items = np.full((users, width), -1)
        scores = np.full((users, width), -np.inf)
        for user in range(users):
            count = int(rng.integers(0 if stream else 1, width + 1))
            items[user, :count] = rng.choice(catalogue, count, replace=False)
            scores[user, :count] = -np.sort(rng.integers(0, 12, count) / 2.0)
        lists.append((torch.from_numpy(items), torch.from_numpy(scores).float()))
    return lists


def by_definition(lists, user, value, weights):
    """Items of the union sorted by `value(stream -> (rank or None, score or None))`, ties by best rank, then stream."""
    places = {}
    for stream, (items, scores) in enumerate(lists):
        if weights[stream] == 0:
            continue
        for rank, (item, score) in enumerate(zip(items[user].tolist(), scores[user].tolist()), start=1):
            if item >= 0:
                places.setdefault(item, {})[stream] = (rank, score)
    values = {item: value(found) for item, found in places.items()}
    first = {item: min((rank, stream) for stream, (rank, _) in found.items()) for item, found in places.items()}
    return sorted(places, key=lambda item: (-round(values[item], 9), first[item])), values


WEIGHTS = [(1.0, 1.0, 1.0), (0.5, 2.0, 0.0), (0.0, 0.0, 3.0)]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("seed", range(5))
def test_rules_equal_their_definitions(weights, seed):
    lists = random_lists(seed)

    def floor(user, stream):
        finite = [s for s in lists[stream][1][user].tolist() if math.isfinite(s)]
        return min(finite) - 1.0 if finite else 0.0

    kept = [stream for stream in range(3) if weights[stream]]
    rules = {
        "rank": (
            reciprocal_rank(lists, weights),
            lambda user: lambda found: sum(weights[s] / (60 + rank) for s, (rank, _) in found.items()),
        ),
        "vote": (
            votes(lists, weights, top=3),
            lambda user: lambda found: sum(weights[s] * (rank <= 3) for s, (rank, _) in found.items()),
        ),
        "log": (
            log_linear(lists, weights),
            lambda user: lambda found: sum(weights[s] * (found[s][1] if s in found else floor(user, s)) for s in kept),
        ),
    }
    for name, ((items, scores), rule) in rules.items():
        for user in range(4):
            order, values = by_definition(lists, user, rule(user), weights)
            assert [item for item in items[user].tolist() if item >= 0] == order, name
            assert (items[user, len(order) :] == -1).all() and torch.isneginf(scores[user, len(order) :]).all()
            expected = [values[item] for item in order]
            assert scores[user, : len(order)].tolist() == pytest.approx(expected, abs=1e-5), name


@pytest.mark.parametrize(
    "fuse",
    [
        reciprocal_rank,
        votes,
        log_linear,
        stream_sum,
        lambda lists: softmax_product(lists, [0.7] * len(lists)),
        lambda lists: fuse_prior(lists[0], torch.linspace(0, 1, 15), 0.0),
    ],
    ids=["reciprocal_rank", "votes", "log_linear", "stream_sum", "softmax_product", "fuse_prior"],
)
def test_one_list_keeps_its_order_and_padding(fuse):
    for seed in range(5):
        items, scores = random_lists(seed, streams=1)[0]
        width = max(1, int((items >= 0).sum(-1).max()))
        fused, values = fuse([(items, scores)])
        assert fused.tolist() == items[:, :width].tolist()
        assert torch.isneginf(values[fused < 0]).all() and torch.isfinite(values[fused >= 0]).all()
    empty = torch.full((2, 0), -1), torch.zeros(2, 0)
    assert fuse([empty])[0].tolist() == [[-1], [-1]]


def test_a_batch_equals_each_user_alone():
    lists = random_lists(7, users=6)
    rules = (reciprocal_rank, votes, log_linear, lambda lists: softmax_product(lists, [1.0, 0.5, 2.0]))
    for fuse in rules:
        items, scores = fuse(lists)
        for user in range(6):
            alone, own = fuse([(i[user : user + 1], s[user : user + 1]) for i, s in lists])
            count = int((alone >= 0).sum())
            assert items[user, :count].tolist() == alone[0, :count].tolist() and (items[user, count:] == -1).all()
            torch.testing.assert_close(scores[user, :count], own[0, :count])


def test_an_item_in_all_lists_outranks_one_in_a_single_list_at_equal_rank():
    """SC-Rec."""
    both = [ranked([5, 1]), ranked([2, 1])]  # 1 is second twice; 5 and 2 are first once
    single = [ranked([9, 1]), ranked([8, 1]), ranked([7, 6])]  # 1 second twice, 6 second once
    for fuse in (reciprocal_rank, votes):
        items = fuse(single)[0][0].tolist()
        assert items.index(1) < items.index(6)
    assert votes(both)[0][0].tolist() == [1, 5, 2]
    scores = [ranked([9, 1], [-1.0, -2.0]), ranked([8, 1], [-1.0, -2.0]), ranked([7, 6], [-1.0, -2.0])]
    items = log_linear(scores)[0][0].tolist()
    assert items.index(1) < items.index(6)


def test_ties_fall_to_the_better_rank_then_the_earlier_stream():
    assert votes([ranked([4, 3]), ranked([2, 1])])[0].tolist() == [[4, 2, 3, 1]]
    assert reciprocal_rank([ranked([4, 3]), ranked([2, 1])])[0].tolist() == [[4, 2, 3, 1]]
    assert votes([ranked([4, 3]), ranked([2, 1])], k=3)[0].tolist() == [[4, 2, 3]]


def test_log_linear_is_the_mixture_of_d3():
    """arXiv 2406.14900: a = 1 is the language model alone, a = 0 the recommender alone; in between the sums."""
    model, assistant = ranked([1, 2, 3], [-1.0, -2.0, -3.0]), ranked([3, 2, 1], [-0.5, -0.6, -4.0])
    assert log_linear([model, assistant], [1.0, 0.0])[0].tolist() == [[1, 2, 3]]
    assert log_linear([model, assistant], [0.0, 1.0])[0].tolist() == [[3, 2, 1]]
    items, scores = log_linear([model, assistant], [0.5, 0.5])
    assert items.tolist() == [[2, 3, 1]] and scores[0].tolist() == pytest.approx([-1.3, -1.75, -2.5])


def test_stream_sum_scores_the_union_with_both_streams():
    """EAGER: union of both top lists, sum of both log-probabilities; the union holds both tops."""
    table = torch.log_softmax(torch.randn(2, 3, 30, generator=torch.Generator().manual_seed(0)), -1)
    lists = []
    for stream in table:
        top = stream.topk(5)
        lists.append((top.indices, top.values))
    scorers = [lambda items, stream=stream: stream.gather(1, items) for stream in table]
    items, scores = stream_sum(lists, scorers)
    for user in range(3):
        union = set(lists[0][0][user].tolist()) | set(lists[1][0][user].tolist())
        total = table.sum(0)[user]
        expected = sorted(union, key=lambda item: -float(total[item]))
        assert items[user][items[user] >= 0].tolist() == expected
        assert scores[user, : len(expected)].tolist() == pytest.approx([float(total[i]) for i in expected], abs=1e-5)
    # one stream alone is that stream
    assert stream_sum(lists[:1], scorers[:1])[0].tolist() == lists[0][0].tolist()
    only_first, _ = stream_sum(lists, [None, scorers[1]])
    assert only_first.shape == items.shape


def test_softmax_product_of_cobra():
    """psi = 0 ranks by the beam, tau = 0 by the vectors; in between the product of two softmaxes."""
    beam, dense = ranked([1, 2, 3], [-0.1, -0.2, -5.0]), ranked([3, 2, 1], [0.9, 0.8, 0.1])
    assert softmax_product([beam, dense], [1.0, 0.0])[0].tolist() == [[1, 2, 3]]
    assert softmax_product([beam, dense], [0.0, 1.0])[0].tolist() == [[3, 2, 1]]
    tau, psi = 0.8, 16.0
    items, scores = softmax_product([beam, dense], [tau, psi])
    left = torch.softmax(tau * torch.tensor([-0.1, -0.2, -5.0]), 0)
    right = torch.softmax(psi * torch.tensor([0.1, 0.8, 0.9]), 0)
    product = (left * right).double()
    order = product.sort(descending=True).indices
    assert items[0].tolist() == [int(i) + 1 for i in order]
    assert scores[0].tolist() == pytest.approx(product[order].tolist(), rel=1e-5)
    assert items.tolist() == log_linear([beam, dense], [tau, psi])[0].tolist()
    far = softmax_product([ranked([1, 2, 3], [0.0, -900.0, -901.0])], [1.0])
    assert far[0].tolist() == [[1, 2, 3]]  # still in order where probabilities have become 0


def test_gamma_prior_is_the_formula():
    distances = torch.tensor([[3.0, 1.0, 5.0, 5.0]])
    prior = torch.tensor([[10.0, 20.0, 20.0, 10.0]])
    for gamma in (0.0, 0.5, 3.0):
        expected = [(d - 1) / 4 * (1 + (p - 10) / 10) ** -gamma for d, p in zip([3, 1, 5, 5], [10, 20, 20, 10])]
        assert gamma_prior(distances, prior, gamma)[0].tolist() == pytest.approx(expected)
    assert minmax(torch.full((2, 3), 4.0)).tolist() == [[0.0] * 3] * 2


def test_fuse_prior():
    """The best item stays first under every gamma; a large prior lifts a far item over a nearer one."""
    items, scores = ranked([4, 7, 2], [-1.0, -2.0, -2.2])
    prior = torch.zeros(9)
    prior[2] = 100.0
    prior[8] = 50.0  # not in the list, but part of the scale
    assert fuse_prior((items, scores), prior, 0.0)[0].tolist() == [[4, 7, 2]]
    fused, values = fuse_prior((items, scores), prior, 1.0)
    assert fused.tolist() == [[4, 2, 7]]
    assert values[0].tolist() == pytest.approx([0.0, -0.5, -1.0 / 1.2], abs=1e-5)
    assert fuse_prior((items, scores), prior.expand(1, -1), 99.0, k=2)[0].tolist() == [[4, 2]]
    impossible = ranked([4, 7, 2, 5], [-1.0, -2.0, -2.2, -math.inf])
    again, more = fuse_prior(impossible, prior, 1.0)
    assert again.tolist() == [[4, 2, 7, 5]] and more[0, :3].tolist() == values[0].tolist()
    assert torch.isneginf(more[0, 3])


def test_impossible_items_stay_candidates():
    items, scores = log_linear([ranked([1, 2], [-1.0, -math.inf]), ranked([3], [-1.0])])
    assert items.tolist() == [[1, 3, 2]] and torch.isneginf(scores[0, 2])
    both = softmax_product([ranked([1, 2], [-math.inf, -math.inf])], [1.0])
    assert both[0].tolist() == [[1, 2]]


def test_bad_input_names_list_and_row():
    good = ranked([1, 2])
    two = torch.tensor([[1], [2]]), torch.zeros(2, 1)
    cases = [
        (lambda: votes([]), "nothing to fuse"),
        (lambda: votes([good], [1.0, 2.0]), "2 weights for 1 lists"),
        (lambda: votes([good], [0.0]), "all weights are 0"),
        (lambda: votes([good, good], [1.0, -1.0]), "list 1: weight -1.0"),
        (lambda: votes([good], [math.nan]), "list 0: weight nan"),
        (lambda: votes([good, two]), "list 1: 2 users, list 0 has 1"),
        (lambda: votes([(good[0], good[1][:, :1])]), "list 0: items .* and scores .* must be two tables"),
        (lambda: votes([(good[0].float(), good[1])]), "items must be integer indices"),
        (lambda: votes([ranked([3, 3])]), "list 0, row 0: item 3 is listed twice"),
        (lambda: log_linear([good, ranked([1], [math.nan])]), "list 1, row 0: a score is NaN"),
        (lambda: votes([good], k=0), "k must be at least 1"),
        (lambda: votes([good], top=0), "top must be at least 1"),
        (lambda: reciprocal_rank([good], rank_offset=-1.0), "rank_offset must be above -1"),
        (lambda: log_linear([good], missing_margin=-1.0), "missing_margin must be"),
        (lambda: log_linear([good, good], score_missing=[None]), "1 score_missing functions"),
        (lambda: stream_sum([good, ranked([3])], [None, lambda items: items[:, :1]]), "list 1: score_missing returned"),
        (lambda: fuse_prior(good, torch.ones(9), -1.0), "gamma must be a finite number >= 0"),
        (lambda: fuse_prior(good, torch.ones(2), 1.0), "the prior must have shape"),
        (lambda: fuse_prior(good, torch.tensor([1.0, math.nan, 1.0]), 1.0), "item 1: the prior is not finite"),
    ]
    for call, message in cases:
        with pytest.raises(RequestError, match=message):
            call()
