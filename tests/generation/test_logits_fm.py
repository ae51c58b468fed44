"""FMIndexLogitsProcessor: any substring of a title, from any place, and nothing else (TransRec)."""

from __future__ import annotations

import pytest
import torch
from logits_cases import (
    EOS,
    answers,
    generate,
    left_padded,
    legal_tokens,
    log_probs,
    prompt_length,
    tiny_model,
    word_tokenizer,
)

from hf_genrec.errors import IncompatibleComponentsError, RequestError
from hf_genrec.generation.fm_index import FMIndex
from hf_genrec.generation.logits_process import ItemTrieLogitsProcessor, real_beams
from hf_genrec.generation.logits_process_fm import FMIndexLogitsProcessor
from hf_genrec.generation.token_trie import TokenTrie

WORDS = ["Star", "Wars", "The", "Empire", "Strikes", "Back", "Return", "of", "Jedi", "Space", "Opera", "Drama"]
TITLES = ["Star Wars", "Star Wars The Empire Strikes Back", "Return of The Jedi", "Back of The Empire"]
GENRES = ["Space Opera", "Drama"]
PROMPTS = [[9, 10], [4, 5, 6, 7], [12]]


@pytest.fixture(scope="module")
def words():
    return word_tokenizer(WORDS)


@pytest.fixture(scope="module")
def index(words):
    return FMIndex.from_texts(words, TITLES)


def tokens(words, text):
    return tuple(words(text, add_special_tokens=False)["input_ids"])


def all_substrings(words, texts=TITLES):
    rows = [tokens(words, text) for text in texts]
    return {row[start:end] for row in rows for start in range(len(row)) for end in range(start + 1, len(row) + 1)}


@pytest.mark.parametrize("end", ["anywhere", "document_end"])
@pytest.mark.parametrize("renormalize", [False, True])
def test_every_next_token(end, renormalize, words, index):
    processor = FMIndexLogitsProcessor(index, 1, eos_token_id=EOS, end=end, renormalize=renormalize)
    known, whole = all_substrings(words), [tokens(words, title) for title in TITLES]
    for length in range(7):
        rows = sorted(string for string in known | {()} if len(string) == length)
        scores = torch.randn(len(rows), len(words)).log_softmax(-1)
        masked = processor(torch.tensor([[0, *row] for row in rows]), scores)
        for row, values, original in zip(rows, masked, scores):
            may_end = row and (end == "anywhere" or any(title[-length:] == row for title in whole))
            options = sorted([EOS] * bool(may_end) + [longer[-1] for longer in known if longer[:-1] == row])
            assert legal_tokens(values) == options
            expected = original[options] - (original[options].logsumexp(0) if renormalize else 0)
            torch.testing.assert_close(values[options], expected)


def test_the_middle_of_a_title_is_out_of_reach_of_a_prefix_tree(words, index):
    middle = torch.tensor([[0, *tokens(words, "Empire Strikes")]])
    scores = torch.zeros(1, len(words))
    assert legal_tokens(FMIndexLogitsProcessor(index, 1, eos_token_id=EOS)(middle, scores)[0]) == sorted(
        [EOS, *tokens(words, "Back")]
    )
    prefix_tree = ItemTrieLogitsProcessor(TokenTrie.from_texts(words, TITLES), 1, eos_token_id=EOS)
    assert tokens(words, "Empire")[0] not in legal_tokens(prefix_tree(middle[:, :1], scores)[0])
    assert legal_tokens(prefix_tree(middle, scores)[0]) == [EOS]  # no beginning of a title


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_beams_are_the_most_probable_substrings(kind, words, index):
    """As many beams as substrings: all of them, ranked by probability; each one is in a title."""
    model, inputs = tiny_model(kind, len(words) + 2), left_padded(PROMPTS)
    known = all_substrings(words)
    processor = FMIndexLogitsProcessor(index, prompt_length(model, inputs), eos_token_id=EOS)
    count = len(known)
    output = generate(model, inputs, processor, num_beams=count, num_return_sequences=count, max_new_tokens=8)
    assert real_beams(output.sequences_scores).all()
    got = answers(model, inputs, output)
    for row, prompt in enumerate(PROMPTS):
        exact = {string: float(log_probs(model, prompt, (*string, EOS)).sum()) for string in known}
        assert got[count * row : count * (row + 1)] == sorted(known, key=lambda string: -exact[string])
    assert all(len(index.documents_containing(string)) for string in got)


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "num_return_sequences": 30}, {"num_beams": 4}])
@pytest.mark.parametrize("end", ["anywhere", "document_end"])
def test_generated_texts_are_substrings(options, end, words, index):
    model, inputs = tiny_model("llama", len(words), seed=1), left_padded(PROMPTS)
    processor = FMIndexLogitsProcessor(index, prompt_length(model, inputs), eos_token_id=EOS, end=end)
    torch.manual_seed(0)
    got = answers(model, inputs, generate(model, inputs, processor, **options))
    assert set(got) <= all_substrings(words)
    if end == "document_end":
        endings = {tokens(words, title)[place:] for title in TITLES for place in range(6)}
        assert set(got) <= endings


def test_a_facet_for_each_request(words, index):
    """Three requests of a batch write a title, a genre and a title; each alone gives the same."""
    genres = FMIndex.from_texts(words, GENRES)
    model, inputs = tiny_model("llama", len(words)), left_padded(PROMPTS)
    options = {"num_beams": 4, "num_return_sequences": 4}
    processor = FMIndexLogitsProcessor([index, genres], 4, eos_token_id=EOS, facets=[0, 1, 0])
    got = answers(model, inputs, generate(model, inputs, processor, **options))
    assert set(got[:4] + got[8:]) <= all_substrings(words) and set(got[4:8]) == all_substrings(words, GENRES)
    for row, facet in enumerate([index, genres, index]):
        alone = left_padded(PROMPTS[row : row + 1])
        one = FMIndexLogitsProcessor(facet, alone["input_ids"].shape[1], eos_token_id=EOS)
        assert answers(model, alone, generate(model, alone, one, **options)) == got[4 * row : 4 * row + 4]


def test_an_answer_outside_the_corpus_can_only_end(words, index):
    ids = torch.tensor([[0, *tokens(words, "Wars Star")], [0, 2, 2]])
    for end in ("anywhere", "document_end"):
        scores = torch.randn(2, len(words))
        masked = FMIndexLogitsProcessor(index, 1, eos_token_id=EOS, end=end)(ids, scores)
        assert [legal_tokens(row) for row in masked] == [[EOS], [EOS]] and torch.equal(masked[:, EOS], scores[:, EOS])


def test_bad_arguments_are_named(words, index):
    ended = FMIndex.from_sequences([[4, EOS]])
    cases = [
        (RequestError, "no end token", lambda: FMIndexLogitsProcessor(index)),
        (RequestError, "no index", lambda: FMIndexLogitsProcessor([], eos_token_id=EOS)),
        (RequestError, "end must be one of", lambda: FMIndexLogitsProcessor(index, eos_token_id=EOS, end="title")),
        (RequestError, "2 indexes need facets", lambda: FMIndexLogitsProcessor([index, index], eos_token_id=EOS)),
        (RequestError, r"do not name indexes 0\.\.0", lambda: FMIndexLogitsProcessor(index, eos_token_id=EOS, facets=[1])),
        (IncompatibleComponentsError, "holds the end token", lambda: FMIndexLogitsProcessor(ended, eos_token_id=EOS)),
        (IncompatibleComponentsError, "scores 10 tokens", lambda: FMIndexLogitsProcessor(index, eos_token_id=EOS)(
            torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 10))),
        (IncompatibleComponentsError, "3 rows for item lists of 2", lambda: FMIndexLogitsProcessor(
            [index, index], eos_token_id=EOS, facets=[0, 1])(torch.zeros(3, 1, dtype=torch.long), torch.zeros(3, 20))),
    ]  # fmt: skip
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()
