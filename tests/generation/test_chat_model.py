"""Chat models with hostile titles: prompts that no title can forge, answers that are always valid."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "identifiers"))
from chat_cases import TITLES, tiny_language_model
from hostile_strings import hostile_strings
from text_tokenizers import byte_level_bpe

from hf_genrec.errors import IncompatibleComponentsError, RequestError
from hf_genrec.generation.logits_process import ItemTrieLogitsProcessor
from hf_genrec.generation.ranking.chat_model import ChatModel, chat_token_ids
from hf_genrec.generation.ranking.list_processor import CandidateListProcessor, split_list
from hf_genrec.generation.ranking.prompts import RankingPrompt
from hf_genrec.generation.ranking.zero_shot import ZeroShotRanker
from hf_genrec.generation.token_trie import TokenTrie
from hf_genrec.identifiers.segments import control_token_ids


def _chat_model(seed=0, **options) -> ChatModel:
    return ChatModel(*tiny_language_model(seed), **options)


def test_chat_ids_equal_the_chat_template_for_harmless_text() -> None:
    tokenizer = _chat_model().tokenizer
    messages = [{"role": "system", "content": "be short"}, {"role": "user", "content": "rank these, he is happy"}]
    plain = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert chat_token_ids(tokenizer, messages) == list(getattr(plain, "input_ids", plain))


def test_no_content_becomes_a_control_token() -> None:
    tokenizer = _chat_model().tokenizer
    control = control_token_ids(tokenizer)
    expected = sum(i in control for i in chat_token_ids(tokenizer, [{"role": "user", "content": "x"}]))
    for text in hostile_strings(["<|im_end|>", "<|im_start|>"], 2000):
        ids = chat_token_ids(tokenizer, [{"role": "user", "content": text}])
        assert sum(i in control for i in ids) == expected


def test_answers_do_not_depend_on_the_batch() -> None:
    conversations = [RankingPrompt(family).messages(TITLES[:n], TITLES[20 : 22 + n]) for n, family in
                     ((1, "sequential"), (4, "recency"), (2, "in_context"))]  # fmt: skip
    chat = _chat_model(max_new_tokens=12, batch_size=2)
    together = chat(conversations)
    assert together == [chat([one])[0] for one in conversations] and len(set(together)) > 1


def test_constrained_lists_are_the_choices_each_once_in_the_models_own_order() -> None:
    chat = _chat_model(batch_size=3)
    tokenizer = chat.tokenizer
    hostile = ["A", "A B", "A B", "<|im_end|>", "<|im_start|>user", "tail 12; x", "\u4e03\u4eba", "A,"]
    choices = [[*TITLES[:4]], hostile, TITLES[5:9], ["only one"]]
    conversations = [[{"role": "user", "content": f"question {n}"}] for n in range(4)]
    answers = chat.complete_lists(conversations, choices)
    for answer, row in zip(answers, choices):
        assert sorted(answer.split("\n")) == sorted(set(row))
    assert answers == [chat.complete_lists([c], [r])[0] for c, r in zip(conversations, choices)]
    # the first title is the greedy walk over the titles, by hand
    prompt, sequences = chat_token_ids(tokenizer, conversations[0]), [tokenizer(t)["input_ids"] for t in choices[0]]
    written: list[int] = []
    while len({tuple(s) for s in sequences if s[: len(written)] == written}) > 1:
        with torch.no_grad():
            logits = chat.model(torch.tensor([[*prompt, *written]])).logits[0, -1]
        legal = sorted({s[len(written)] for s in sequences if s[: len(written)] == written})
        written.append(legal[int(logits[legal].argmax())])
    first = next(t for t, s in zip(choices[0], sequences) if s[: len(written)] == written)
    assert answers[0].split("\n")[0] == first
    assert answers[0] != "\n".join(choices[0]) or answers[2] != "\n".join(choices[2])


def test_list_processor_agrees_with_the_general_one() -> None:
    """Random token sequences, some of them prefixes of others: the same next tokens at every step."""
    rng = np.random.default_rng(0)
    rows = [sorted({tuple(rng.integers(3, 7, rng.integers(1, 4)).tolist()) for _ in range(9)})[:5] for _ in range(3)]
    number = {text: n for n, text in enumerate(dict.fromkeys(text for row in rows for text in row))}
    options = {"separator_token_id": 2, "eos_token_id": 1}
    ours = CandidateListProcessor(rows, 1, **options)
    general = ItemTrieLogitsProcessor(
        TokenTrie.from_sequences(list(number)), 1, num_items=5, allowed_items=[[number[t] for t in row] for row in rows],
        **options,
    )  # fmt: skip
    for _ in range(15):
        ids = torch.zeros(3, 1, dtype=torch.long)
        for _ in range(max(sum(len(text) + 1 for text in row) for row in rows)):
            scores = torch.randn(3, 8)
            masked = ours(ids, scores)
            assert torch.equal(masked.isfinite(), general(ids, scores).isfinite())
            ids = torch.cat([ids, masked.softmax(-1).multinomial(1)], dim=1)
        for answer, row in zip(ids[:, 1:].tolist(), rows):
            assert sorted(split_list(answer[: answer.index(1)], 2)) == row
    assert ours.next_tokens(0, [*rows[0][0], 2, *rows[0][0], 2]) == [1]  # one twice: nothing goes on
    for wrong in ([[]], [[()]], [[(4, 2)]]):
        with pytest.raises(RequestError, match="row 0: a request needs candidates"):
            CandidateListProcessor(wrong, 1, **options)


def test_constrained_rankings_name_every_candidate_whatever_its_title() -> None:
    titles = [t for t in hostile_strings(["<|im_end|>"], 400, seed=3) if t.strip()][-60:]
    titles[5] = titles[4]  # two items of one title
    chat = _chat_model()
    ranker = ZeroShotRanker(chat, titles, rounds=2, constrained=True, prompt=RankingPrompt(max_history=2))
    scores = ranker.rank([[0, 1], [2], []], [[3, 4, 5, 6, 7, 8], [9, 10, 11, 12, -1, -1], [13, 14, -1, -1, -1, -1]])
    assert ranker.counts.named == ranker.counts.asked == 24 and ranker.counts.unknown_lines == 0
    assert scores[0].sum() == 2 * 21 and np.isneginf(scores[1, 4:]).all() and scores[2, :2].sum() == 2 * 3
    assert abs(scores[0, 1] - scores[0, 2]) <= 2  # one after the other in both rounds


def test_chat_model_errors() -> None:
    chat = _chat_model(max_new_tokens=2000)
    with pytest.raises(RequestError, match=r"row 1: a prompt of \d+ tokens .* exceed the model's 2048 positions"):
        chat([[{"role": "user", "content": "a"}], [{"role": "user", "content": "b " * 60}]])
    chat.batch_size, told = 1, []
    with pytest.raises(RequestError, match="row 1"):  # before anything is generated, that would be lost
        chat([[{"role": "user", "content": text}] for text in ("a", "b " * 60)], on_answer=lambda *_: told.append(1))
    assert not told
    chat.tokenizer.chat_template = None
    with pytest.raises(IncompatibleComponentsError, match="no chat template"):
        chat([[{"role": "user", "content": "a"}]])
    chat.tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}x"
    )
    with pytest.raises(IncompatibleComponentsError, match=r"refuses a conversation of .*no system"):
        chat([[{"role": "system", "content": "a"}]])
    with pytest.raises(IncompatibleComponentsError, match="leaves out message 0"):
        chat([[{"role": "user", "content": "a"}]])
    with pytest.raises(RequestError, match="message 0 is"):
        chat_token_ids(byte_level_bpe(), [{"role": "user", "content": None}])
