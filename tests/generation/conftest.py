"""A small exact model (fixed random tables) and random catalogues for the generation tests."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_genrec.generation.recommend import RecommendationMixin
from hf_genrec.identifiers.tokenization_item import ItemTokenizer


class TableModel(RecommendationMixin):
    """Scores codes from fixed random tables; the user is the last token of the history. Counts its calls."""

    def __init__(self, codebook_sizes, seed=0, width=12, sharpness=2.0):
        generator = torch.Generator().manual_seed(seed)
        self.device = torch.device("cpu")
        self.users = torch.randn(97, width, generator=generator)
        self.embeddings = [torch.randn(size, width, generator=generator) for size in codebook_sizes]
        self.heads = [sharpness * torch.randn(width, size, generator=generator) for size in codebook_sizes]
        self.calls: list[tuple[int, int]] = []  # (rows, beams) of each call of score_codes
        self.starts = 0

    def start_decoding(self, input_ids, attention_mask):
        self.starts += 1
        return self.users[input_ids[:, -1] % len(self.users)]

    def score_codes(self, state, prefix_BKl, level):
        assert prefix_BKl.shape[-1] == level
        self.calls.append(tuple(prefix_BKl.shape[:2]))
        hidden = state.unsqueeze(1).expand(-1, prefix_BKl.shape[1], -1)
        for depth in range(level):
            hidden = hidden + (depth + 1) * self.embeddings[depth][prefix_BKl[..., depth]]
        return (hidden.tanh() @ self.heads[level]).log_softmax(-1)


def brute_force_scores(model, state, codes_NL, renormalize=False, allowed_BN=None):
    """Log-probability of every item, one item and one level at a time, with prefixes compared as Python tuples."""
    codes = [tuple(int(c) for c in row) for row in codes_NL]
    users = state.shape[0]
    scores = np.zeros((users, len(codes)))
    for user in range(users):
        legal_items = [i for i in range(len(codes)) if allowed_BN is None or bool(allowed_BN[user, i])]
        for item in range(len(codes)):
            for level in range(len(codes[item])):
                prefix = torch.tensor([[codes[item][:level]]], dtype=torch.long).reshape(1, 1, level)
                logp = model.score_codes(state[user : user + 1], prefix, level)[0, 0].double()
                if renormalize:
                    followers = {codes[j][level] for j in legal_items if codes[j][:level] == codes[item][:level]}
                    if followers:
                        logp = logp - logp[sorted(followers)].logsumexp(0)
                scores[user, item] += float(logp[codes[item][level]])
    return scores


@pytest.fixture
def table_model():
    return TableModel


@pytest.fixture
def brute_force():
    return brute_force_scores


@pytest.fixture
def random_codes():
    def make(num_items, codebook_sizes, seed=0, unique=False):
        rng = np.random.default_rng(seed)
        codes = np.stack([rng.integers(0, size, num_items) for size in codebook_sizes], axis=1)
        if unique:
            flat = rng.choice(int(np.prod([float(s) for s in codebook_sizes])), num_items, replace=False)
            codes = np.stack(np.unravel_index(flat, codebook_sizes), axis=1)
        return codes

    return make


@pytest.fixture
def tokenizer(random_codes):
    """60 items of three levels (6, 5, 4); items 10..13 and 20 share a code."""
    codes = random_codes(60, (6, 5, 4), seed=3)
    codes[10:14] = codes[20]
    return ItemTokenizer.from_codes([f"item-{i}" for i in range(60)], codes, (6, 5, 4))


@pytest.fixture
def histories():
    """Five histories of the catalogue of `tokenizer`."""
    rng = np.random.default_rng(0)
    return [[f"item-{i}" for i in rng.integers(0, 60, length)] for length in (1, 3, 9, 2, 20)]
