"""PerLevelLogitsProcessor: the code block of the current level and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from logits_cases import EOS, answers, generate, left_padded, legal_tokens, prompt_length, tiny_model

from hf_genrec.errors import IncompatibleComponentsError, RequestError
from hf_genrec.generation.logits_process import ItemTrieLogitsProcessor
from hf_genrec.generation.logits_process_levels import PerLevelLogitsProcessor
from hf_genrec.generation.trie import ItemTrie
from hf_genrec.identifiers.tokenization_item import ItemTokenizer

SIZES, OFFSETS, VOCAB = (3, 4, 2), (4, 7, 11), 15


def test_blocks_one_after_the_other():
    processor = PerLevelLogitsProcessor(
        None, 2, level_offsets=OFFSETS, codebook_sizes=SIZES, eos_token_id=EOS, num_items=2
    )
    renormalized = PerLevelLogitsProcessor(
        None, 2, level_offsets=OFFSETS, codebook_sizes=SIZES, eos_token_id=EOS, num_items=2, renormalize=True
    )
    blocks = [list(range(4, 7)), list(range(7, 11)), [11, 12]] * 2
    for step, block in enumerate(blocks):
        ids, scores = torch.randint(0, VOCAB, (5, 2 + step)), torch.randn(5, VOCAB)
        masked = processor(ids, scores)
        assert all(legal_tokens(row) == block for row in masked)
        assert torch.equal(masked[:, block], scores[:, block])
        torch.testing.assert_close(renormalized(ids, scores)[:, block], scores[:, block].log_softmax(-1))
    after = processor(torch.zeros(2, 8, dtype=torch.long), torch.randn(2, VOCAB))
    assert all(legal_tokens(row) == [EOS] for row in after) and (after[:, EOS] == 0).all()


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_equals_a_full_catalogue(kind):
    """A catalogue that holds every combination of codes constrains nothing but the levels."""
    model, inputs = tiny_model(kind, VOCAB), left_padded([[4, 5], [6, 7, 8]])
    length = prompt_length(model, inputs)
    codes = np.stack(np.unravel_index(np.arange(24), SIZES), axis=1)
    tokenizer = ItemTokenizer.from_codes([str(i) for i in range(24)], codes, SIZES)
    options = {"num_beams": 24, "num_return_sequences": 24, "max_new_tokens": 4}
    one = generate(model, inputs, PerLevelLogitsProcessor(tokenizer, length), **options)
    trie = ItemTrieLogitsProcessor(ItemTrie.from_codes(codes, SIZES), length, level_offsets=OFFSETS, eos_token_id=EOS)
    two = generate(model, inputs, trie, **options)
    assert (
        answers(model, inputs, one) == answers(model, inputs, two) and len(set(answers(model, inputs, one)[:24])) == 24
    )
    torch.testing.assert_close(one.sequences_scores, two.sequences_scores)


def test_bad_arguments_are_named():
    with pytest.raises(IncompatibleComponentsError, match="tokens of each level are unknown"):
        PerLevelLogitsProcessor(object(), 1, eos_token_id=EOS)
    with pytest.raises(IncompatibleComponentsError, match="one number per level"):
        PerLevelLogitsProcessor(None, 1, level_offsets=[4], codebook_sizes=[2, 3], eos_token_id=EOS)
    with pytest.raises(RequestError, match="no end token"):
        PerLevelLogitsProcessor(None, 1, level_offsets=[4], codebook_sizes=[2])
    with pytest.raises(RequestError, match="num_items must be >= 1"):
        PerLevelLogitsProcessor(None, 1, level_offsets=[4], codebook_sizes=[2], eos_token_id=EOS, num_items=0)
    processor = PerLevelLogitsProcessor(None, 3, level_offsets=[4], codebook_sizes=[20], eos_token_id=EOS)
    with pytest.raises(RequestError, match="prompt_length is 3"):
        processor(torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, VOCAB))
    with pytest.raises(IncompatibleComponentsError, match="scores 15 tokens, the item tokens need 24"):
        processor(torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, VOCAB))
