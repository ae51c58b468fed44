"""Every distinct question is asked once, and its answer kept at once, whatever file is there."""

from __future__ import annotations

import json

import pytest
from chat_cases import TITLES, shown

from hf_genrec.errors import IncompatibleComponentsError, RequestError
from hf_genrec.generation.ranking.answer_cache import AnswerCache
from hf_genrec.generation.ranking.zero_shot import ZeroShotRanker


class Chat:
    """Answers with the candidates as listed; stops after `limit` answers."""

    def __init__(self, limit=None, **settings):
        self.limit, self.settings, self.seen = limit, settings, []

    def identity(self):
        return {"model": "echo", **self.settings}

    def __call__(self, conversations, on_answer):
        for row, messages in enumerate(conversations):
            if self.limit is not None and len(self.seen) >= self.limit:
                raise KeyboardInterrupt
            self.seen.append(messages)
            on_answer(row, "\n".join(shown(messages)) + "\ud800")  # any text can be kept


def test_a_run_that_stops_goes_on_with_what_is_missing(tmp_path) -> None:
    path, candidates = tmp_path / "answers.jsonl", [list(range(first, first + 9)) for first in (1, 11, 21)]
    with pytest.raises(KeyboardInterrupt):
        ZeroShotRanker(AnswerCache(Chat(limit=4), path), TITLES).rank([[0]] * 3, candidates)
    assert len(path.read_text().splitlines()) == 4
    chat, steps = Chat(), []
    cache = AnswerCache(chat, path, progress=steps.append)
    scores = ZeroShotRanker(cache, TITLES).rank([[0]] * 3, candidates)
    assert (cache.asked, cache.reused, sum(steps)) == (5, 4, 9)
    assert scores.tolist() == ZeroShotRanker(AnswerCache(Chat(), None), TITLES).rank([[0]] * 3, candidates).tolist()
    for other in (Chat(temperature=1), Chat()):
        cache = AnswerCache(other, path)
        ZeroShotRanker(cache, TITLES).rank([[0]] * 3, candidates)
        assert len(other.seen) == (9 if other.settings else 0)


def test_damaged_lines_are_passed_over_and_nothing_is_appended_to_one(tmp_path, caplog) -> None:
    path, request = tmp_path / "answers.jsonl", [[{"role": "user", "content": 'turn to next:\n1. "x"\n\nRank all'}]]
    good = {"request": {"model": "echo", "messages": request[0]}, "answer": "kept"}
    path.write_text("[" * 5000 + "\n{}\n" + json.dumps(good) + '\n\n{"request": {"mod')
    cache = AnswerCache(Chat(), path)
    assert cache(request) == ["kept"] and "2 lines hold no answer" in caplog.text
    other = [[{"role": "user", "content": request[0][0]["content"].replace('"x"', '"y"')}]]
    assert cache(other) == AnswerCache(Chat(), path)(other) == ["y\ud800"]
    path.unlink()
    path.mkdir()
    with pytest.raises(RequestError, match="cannot be read"):
        AnswerCache(Chat(), path)
    with pytest.raises(RequestError, match="cannot be written"):
        cache([[{"role": "user", "content": request[0][0]["content"].replace('"x"', '"z"')}]])


def test_what_the_chat_function_cannot_do_its_cache_cannot() -> None:
    with pytest.raises(IncompatibleComponentsError, match="no complete_lists"):
        ZeroShotRanker(AnswerCache(Chat(), None), TITLES, constrained=True)
