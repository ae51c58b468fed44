"""Zero-shot ranking: prompts, parser, bootstrapping, chat models with hostile titles, a client against a loopback server."""

from __future__ import annotations

import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "identifiers"))
from hostile_strings import hostile_strings
from text_tokenizers import byte_level_bpe

from hf_genrec.data.sequences import Sequences
from hf_genrec.data.splits import EvaluationSet
from hf_genrec.errors import IncompatibleComponentsError, RequestError
from hf_genrec.evaluation.baselines import Popularity
from hf_genrec.evaluation.evaluator import evaluate
from hf_genrec.generation.logits_process import ItemTrieLogitsProcessor
from hf_genrec.generation.ranking.bootstrap import draw_permutation
from hf_genrec.generation.ranking.chat_client import ChatEndpoint, ChatEndpointError
from hf_genrec.generation.ranking.chat_model import ChatModel, chat_token_ids
from hf_genrec.generation.ranking.list_processor import CandidateListProcessor, split_list
from hf_genrec.generation.ranking.parse import RankingParser, common_subsequence
from hf_genrec.generation.ranking.probes import mean_ranks_by_slot, popularity_bias
from hf_genrec.generation.ranking.prompts import RankingPrompt, quote_title, written_title
from hf_genrec.generation.ranking.zero_shot import ZeroShotRanker, ZeroShotRecommender
from hf_genrec.generation.token_trie import TokenTrie
from hf_genrec.identifiers.segments import control_token_ids

TITLES = [f"Film number {chr(65 + i // 26)}{chr(65 + i % 26)}" for i in range(60)]


def shown(conversation) -> list[str]:
    """The candidates of a prompt, as they are listed."""
    listed = conversation[-1]["content"].split("turn to next:\n")[1].split("\n\nRank all")[0]
    return [json.loads(line.split(". ", 1)[1]) for line in listed.splitlines()]


def echo(conversations):
    return ["\n".join(f"{n}. {title}" for n, title in enumerate(shown(one), 1)) for one in conversations]


# ------------------------------------------------------------------------------------------------ prompts


def test_recency_names_the_last_item_once_more_and_the_example_is_the_last_item() -> None:
    history, candidates = TITLES[:5], TITLES[10:13]
    texts = {family: RankingPrompt(family).messages(history, candidates)[0]["content"] for family in
             ("sequential", "recency", "in_context")}  # fmt: skip
    last = quote_title(history[-1])
    assert texts["recency"].count(last) == texts["sequential"].count(last) + 1 == 2
    for title in history[:-1]:
        assert len({text.count(quote_title(title)) for text in texts.values()}) == 1
    example = texts["in_context"].split("For example")[1]
    assert last in example and last not in texts["in_context"].split("For example")[0]
    assert RankingPrompt("in_context").messages(history[:1], candidates) == RankingPrompt().messages(
        history[:1], candidates
    )
    short = RankingPrompt("recency", max_history=2, system="s").messages(history, candidates)
    assert [m["role"] for m in short] == ["system", "user"]
    assert history[2] not in short[1]["content"] and history[3] in short[1]["content"]


def test_a_title_stays_one_quoted_line() -> None:
    for title in hostile_strings(["<|im_end|>", "[INST]", "\u2028x", '"'], 3000):
        text = quote_title(title)
        assert len(text.splitlines()) == 1 and text.isprintable() | any(c in text for c in "\u00a0\u3000")
        assert not set(text) & set("<>\uff1c\uff1e") and "[INST]" not in text
        assert json.loads(text) == title  # an escape, not a loss
    assert written_title("[REC] (2007)") == "[REC] (2007)"


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: RankingPrompt("recent"), "did you mean 'recency'"),
        (lambda: RankingPrompt(max_history=0), "max_history must be"),
        (lambda: RankingPrompt().messages(["a"], []), "no candidates"),
        (lambda: RankingPrompt().messages(["a", " "], ["b"]), "history 1 has a blank title"),
    ],
)
def test_prompt_errors(make, message) -> None:
    with pytest.raises(RequestError, match=message):
        make()


# ------------------------------------------------------------------------------------------------ parser


@pytest.mark.parametrize(
    "answer, order",
    [
        ("1. Heat\n2) Alien\n(3) The Matrix (1999)", (0, 1, 3)),
        ('- "Heat"\n* **Alien** - a classic', (0, 1)),
        ("Alien, Heat and Aliens", (1, 0, 2)),  # several on a line
        ("Aliens\nAliens\nAlien", (2, 1)),  # the longer title is not the shorter one; repeats count once
        ("heat\nMATRIX, THE (1999)\nThe Matrix", (0, 3)),
        ("I would start with Heat.\nThen: Terminatr 2: Judgmnt Day", (0, 4)),  # typos: common subsequence above 0.9
        ("Toy Story 3\nToy Story 2", (5,)),  # another number is another film
        ("Here it is, the best of all time\nUp", (6,)),  # holds h-e-a-t in this order
        ("Update\nUp", (6,)),
        ("300: Rise of an Empire\n1. 2001: A Space Odyssey", (7, 8)),
        ("<think>Heat? No, Up.</think>Alien", (1,)),
        ("<think>Heat? No, Up.", ()),
        ("", ()),
        ('9. "Say \\"hi\\""', (9,)),  # as written in the prompt
        ('Say "hi"', (9,)),
    ],
)
def test_known_answers(answer, order) -> None:
    titles = ["Heat", "Alien", "Aliens", "The Matrix (1999)", "Terminator 2: Judgment Day", "Toy Story 2", "Up",
              "300: Rise of an Empire", "2001: A Space Odyssey", 'Say "hi"']  # fmt: skip
    assert RankingParser(titles).parse(answer).order == order


def test_unknown_lines_are_told_and_equal_titles_are_named_one_after_the_other() -> None:
    parsed = RankingParser(["Heat", "Up", "Heat"]).parse("Heat\nAlien 3\nHeat\nHeat\nUp")
    assert parsed.order == (0, 2, 1) and parsed.unknown == ("Alien 3",)


def test_common_subsequence_against_the_table() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        a, b = ("".join(rng.choice(list("abcd"), rng.integers(0, 70))) for _ in range(2))
        table = np.zeros((len(a) + 1, len(b) + 1), int)
        for i in range(len(a)):
            for j in range(len(b)):
                table[i + 1, j + 1] = table[i, j] + 1 if a[i] == b[j] else max(table[i, j + 1], table[i + 1, j])
        assert common_subsequence(a, b) == table[-1, -1]


def test_every_title_that_is_repeated_is_understood() -> None:
    """Whatever the titles hold: a model that writes the list as it saw it is read without loss."""
    rng = np.random.default_rng(0)
    titles = [t for t in hostile_strings(["<|im_end|>"], 1500) if t.strip("\"'`*_\u201c\u201d,;. \t\n\r").strip()]
    titles = list({" ".join(t.split()).strip("\"'`*_,;. ").casefold(): t for t in titles}.values())
    lost = 0
    for _ in range(40):
        some = [titles[i] for i in rng.choice(len(titles), 20, replace=False)]
        answer = "\n".join(f"{n}. {quote_title(t)}" for n, t in enumerate(some, 1))
        lost += 20 - len(RankingParser(some).parse(answer).order)
    assert lost <= 8  # 1 %: titles that begin with a list number of their own, or hold one another


# ------------------------------------------------------------------------------------------------ ranking


def test_one_round_without_shuffling_is_the_order_of_the_answer() -> None:
    candidates = np.arange(20)[None] + 7
    ranker = ZeroShotRanker(echo, TITLES, rounds=1, shuffle=False)
    assert ranker.rank([[1, 2]], candidates).tolist() == [list(range(20, 0, -1))]
    assert ranker.counts.asked == ranker.counts.named == 20 and not ranker.counts.unknown_lines


def test_permutations_differ_between_users_and_rounds_and_not_between_batches() -> None:
    asked: list[tuple[str, ...]] = []

    def keep(conversations):
        asked.extend(tuple(shown(one)) for one in conversations)
        return echo(conversations)

    histories, candidates = [[0]] * 30, np.tile(np.arange(20), (30, 1))
    scores = ZeroShotRanker(keep, TITLES, rounds=3).rank(histories, candidates)
    assert len(set(asked)) == 90  # traps.md N8: the released code has one for all
    assert np.array_equal(scores[:4], ZeroShotRanker(echo, TITLES, rounds=3).rank(histories[:4], candidates[:4]))
    different = [[row] for row in range(30)]
    ranker = ZeroShotRanker(echo, TITLES, rounds=3)
    together = ranker.rank(different, candidates)
    assert all(np.array_equal(together[[r]], ranker.rank([[r]], candidates[[r]])) for r in range(30))
    assert len({tuple(row) for row in together.tolist()}) == 30
    assert not np.array_equal(scores, ZeroShotRanker(echo, TITLES, seed=1).rank(histories, candidates))
    drawn = [draw_permutation(6, seed=0, key=r, round_number=b) for r in range(300) for b in range(2)]
    counts = np.stack([np.bincount(np.array(drawn)[:, place], minlength=6) for place in range(6)])
    assert ((counts - 100) ** 2 / 100).sum() < 52  # chi-square with 25 degrees of freedom: p = .001


def test_bootstrapping_takes_the_position_bias_away() -> None:
    """A model that returns the list as given: the target's rank is its slot, and after bootstrapping it is not."""
    users, slots = 120, [0, 5, 10, 15, 19]
    histories, candidates = [[0]] * users, np.tile(np.arange(20) + 1, (users, 1))
    targets = np.full(users, 7)
    biased = mean_ranks_by_slot(
        ZeroShotRanker(echo, TITLES, rounds=1, shuffle=False), histories, candidates, targets, slots
    )
    assert biased == {slot: slot + 1.0 for slot in slots}
    fair = mean_ranks_by_slot(ZeroShotRanker(echo, TITLES, rounds=3), histories, candidates, targets, slots)
    error = np.sqrt((20**2 - 1) / 12 / users)  # of a mean of uniform ranks
    assert all(abs(mean - 10.5) < 4 * error for mean in fair.values())


def test_agreement_between_two_input_orders_rises_with_the_rounds() -> None:
    """Quality plus a bonus for early places: the more rounds, the less the order of the input decides."""
    quality = {title: i % 20 for i, title in enumerate(TITLES)}

    def biased(conversations):
        answers = []
        for titles in map(shown, conversations):
            keys = {title: quality[title] - 1.2 * place for place, title in enumerate(titles)}
            answers.append("\n".join(sorted(titles, key=lambda title: -keys[title])))
        return answers

    candidates = np.tile(np.arange(20), (20, 1))
    other = candidates[:, ::-1]

    def tau(**options):
        one = ZeroShotRanker(biased, TITLES, seed=1, **options).rank([[0]] * 20, candidates)
        two = ZeroShotRanker(biased, TITLES, seed=2, **options).rank([[0]] * 20, other)[:, ::-1]
        signs = [np.sign(np.subtract.outer(row, row)) for row in (*one, *two)]
        return np.mean([(a * b).sum() / (20 * 19) for a, b in zip(signs[:20], signs[20:])])

    found = [tau(rounds=1, shuffle=False), tau(rounds=1), tau(rounds=3), tau(rounds=12)]
    assert found == sorted(found) and found[-1] > found[1] + 0.3 and found[0] < 0


def test_nothing_is_dropped_and_the_retriever_decides_what_is_not_named() -> None:
    def two_only(conversations):
        return [f"Some Other Film\n{shown(one)[3]}\n{shown(one)[1]}" for one in conversations]

    class Retriever:
        def recommend_topk(self, histories, k, exclude_seen):
            items = np.full((len(histories), k), -1)
            items[0, : min(k, 9)] = np.arange(30, 39)[:k]
            items[1, :2] = [40, 41]  # a user to whom little may be recommended
            return items

    ranker = ZeroShotRanker(two_only, TITLES, rounds=1, shuffle=False)
    recommender = ZeroShotRecommender(ranker, Retriever(), num_candidates=6)
    histories = Sequences.from_rows([[1, 2], [3], []])
    ranker.chat = lambda conversations: [
        two_only([one])[0] if len(shown(one)) > 3 else shown(one)[1] for one in conversations
    ]
    items = recommender.recommend_topk(histories, 8, True)
    assert items[0].tolist() == [33, 31, 30, 32, 34, 35, 36, 37]
    assert items[1].tolist() == [41, 40, -1, -1, -1, -1, -1, -1]
    assert items[2].tolist() == [-1] * 8  # nothing to rank, nothing asked
    assert recommender.recommend_topk(histories, 1, True).tolist() == [[33], [41], [-1]]
    assert ranker.counts.unknown_lines == 2


def test_the_evaluator_counts_what_the_retriever_misses() -> None:
    """Re-ranking m candidates changes no recall at m, and a model that knows the answer reaches exactly that recall at 1."""
    rng = np.random.default_rng(0)
    histories = Sequences.from_rows([rng.integers(0, 60, 4) for _ in range(40)])
    targets = rng.integers(0, 12, 40).astype(np.int32)
    popular = Popularity().fit(Sequences.from_rows([np.repeat(np.arange(60), 60 - np.arange(60))]), 60)
    asked = iter(targets.tolist())

    def knowing(conversations):
        return [TITLES[next(asked)] for _ in conversations]

    ranker = ZeroShotRanker(knowing, TITLES, rounds=1)
    recommender = ZeroShotRecommender(ranker, popular, num_candidates=6)
    rows = EvaluationSet(np.arange(40), histories, targets)
    options = {"num_items": 60, "ks": (1, 6), "bootstrap": 0, "exclude_seen": False, "progress": False}
    found = evaluate(recommender, rows, **options)
    plain = evaluate(popular, rows, **options)
    assert 0 < plain["recall@6"] == found["recall@6"] == found["recall@1"] < 1


def test_missing_score_decides_between_forgiving_and_not() -> None:
    def forgetful(conversations):  # one round of five leaves the best item out
        answers = ["\n".join(sorted(shown(one))) for one in conversations]
        return [answers[0].split("\n", 1)[1], *answers[1:]]

    candidates = [[0, 1, 2]]
    assert ZeroShotRanker(forgetful, TITLES, rounds=5).rank([[5]], candidates).argmax() == 0
    assert ZeroShotRanker(forgetful, TITLES, rounds=5, missing_score=-1e4).rank([[5]], candidates).argmin() == 0


def test_retries_answers_without_any_candidate_and_never_looks_for_a_target() -> None:
    asked = []

    def shy(conversations):
        asked.append(len(conversations))
        return ["I cannot help with that." if len(asked) == 1 else shown(one)[0] for one in conversations]

    ranker = ZeroShotRanker(shy, TITLES, rounds=2, retries=3)
    scores = ranker.rank([[0], [1]], [[3, 4], [5, 6]])
    assert asked == [4, 4] and ranker.counts.unreadable == 4  # one named candidate is a readable answer
    assert ((scores > 0).sum(axis=1) >= 1).all()


def test_popularity_bias_of_known_rankers() -> None:
    rng = np.random.default_rng(0)
    counts = rng.permutation(60)
    candidates = np.stack([rng.choice(60, 10, replace=False) for _ in range(50)])

    class By:
        def __init__(self, key):
            self.key = key

        def rank(self, histories, candidates):
            return self.key(np.asarray(candidates))

    histories = [[0]] * 50
    popular = popularity_bias(By(lambda items: counts[items]), histories, candidates, counts)
    assert popular.correlation == 1.0 and (np.diff(popular.popularity) < 0).all()
    assert popularity_bias(By(lambda items: -counts[items]), histories, candidates, counts).correlation == -1.0
    fair = popularity_bias(By(lambda items: rng.random(items.shape)), histories, candidates, counts)
    assert abs(fair.correlation) < 0.15
    assert popularity_bias(By(np.zeros_like), histories, candidates, counts).correlation == 0.0


@pytest.mark.parametrize(
    "histories, candidates, message",
    [
        ([[0]], [[1, 1]], "row 0 lists a candidate twice"),
        ([[0], [0]], [[1], [-1]], "row 1 has no candidates"),
        ([[0]], [[1, -1, 2]], "gaps between them"),
        ([[99]], [[1]], "outside the 60 titles"),
        ([[0]], [[1], [2]], "2 candidate lists for 1 histories"),
    ],
)
def test_ranker_errors(histories, candidates, message) -> None:
    with pytest.raises(RequestError, match=message):
        ZeroShotRanker(echo, TITLES).rank(histories, candidates)


def test_wrong_chat_functions_are_named() -> None:
    with pytest.raises(IncompatibleComponentsError, match="one string for each"):
        ZeroShotRanker(lambda conversations: [""], TITLES).rank([[0]], [[1, 2]])
    with pytest.raises(IncompatibleComponentsError, match="no complete_lists"):
        ZeroShotRanker(echo, TITLES, constrained=True)


# ------------------------------------------------------------------------------------------------ chat models


def _chat_model(seed=0, **options) -> ChatModel:
    tokenizer = byte_level_bpe()
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.4, max_position_embeddings=2048,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=None,
    )  # fmt: skip
    return ChatModel(LlamaForCausalLM(config).eval(), tokenizer, **options)


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


# ------------------------------------------------------------------------------------------------ endpoints


class Server:
    """A loopback chat server that plays a script: per request a status (and headers), then echoes the last word."""

    def __init__(self, script=()):
        self.script, self.requests, self.times = list(script), [], []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    outer.requests.append((self.path, dict(self.headers), body))
                    outer.times.append(time.monotonic())
                    status, headers, raw = outer.script.pop(0) if outer.script else (200, {}, None)
                if status == "drop":
                    self.connection.close()
                    return
                if raw is None:
                    answer = body["messages"][-1]["content"].split()[-1]
                    raw = json.dumps({"choices": [{"message": {"role": "assistant", "content": answer}}]})
                raw = raw.encode()
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(raw))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, *args):
                pass

        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *args):
        self.server.shutdown()
        self.server.server_close()


def _ask(words):
    return [[{"role": "user", "content": f"say {word}"}] for word in words]


def test_endpoint_sends_the_request_and_keeps_the_order() -> None:
    words = [f"w{n}" for n in range(20)]
    with Server() as server:
        chat = ChatEndpoint(server.url + "/", "tiny", api_key="key-1", temperature=0.2, max_tokens=5)
        assert chat(_ask(words)) == words
        path, headers, body = server.requests[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer key-1"
    assert body["model"] == "tiny" and body["temperature"] == 0.2 and body["max_tokens"] == 5
    assert "key-1" not in repr(chat)


def test_endpoint_waits_out_rate_limits_and_failures() -> None:
    script = [(429, {"Retry-After": "0.15"}, "slow down"), (503, {}, "busy"), ("drop", {}, None), (500, {}, "oops")]
    with Server(script) as server:
        chat = ChatEndpoint(server.url, "tiny", backoff=0.02, retries=4)
        assert chat(_ask(["done"])) == ["done"]
        gaps = np.diff(server.times)
    assert len(gaps) == 4 and gaps[0] >= 0.15  # what the server asked for
    assert gaps[1] >= 0.04 and gaps[2] >= 0.08 and gaps[3] >= 0.16  # doubled each time


@pytest.mark.parametrize(
    "script, message, requests",
    [
        ([(401, {}, '{"error": {"message": "bad key"}}')], "status 401: bad key; check api_key", 1),
        ([(404, {}, '{"detail": "no model"}')], "status 404: .*check base_url", 1),
        ([(302, {"Location": "http://127.0.0.1:9/steal"}, "")], "status 302", 1),
        ([(429, {}, "wait")] * 3, r"status 429: wait \(3 attempts\)", 3),
        ([(200, {}, "<html>")], "no chat completion: '<html>'", 1),
        ([(200, {}, '{"choices": []}')], "no chat completion", 1),
    ],
)
def test_endpoint_errors_are_typed_and_never_show_the_key(script, message, requests) -> None:
    with Server(script) as server:
        chat = ChatEndpoint(server.url, "tiny", api_key="sk-secret", backoff=0.001, retries=2)
        with pytest.raises(ChatEndpointError, match=message) as error:
            chat(_ask(["x"]))
        assert len(server.requests) == requests and "sk-secret" not in str(error.value)


def test_endpoint_timeout_and_nobody_there() -> None:
    with Server() as server:
        closed = server.url
    with pytest.raises(ChatEndpointError, match=r"2 attempts\); is the server running"):
        ChatEndpoint(closed, "tiny", retries=1, backoff=0.001, timeout=1)(_ask(["x"]))
    for url in ("file:///etc/passwd", "localhost:8000", "http://user:pw@host/v1"):
        with pytest.raises(RequestError, match="base_url must look like"):
            ChatEndpoint(url, "tiny")
    with pytest.raises(RequestError, match="api_key holds characters"):
        ChatEndpoint("http://h/v1", "tiny", api_key="a\nb")


def test_an_endpoint_ranks() -> None:
    """End to end over HTTP: the server names the last word of the prompt; the ranker copes with that."""
    with Server() as server:
        ranker = ZeroShotRanker(ChatEndpoint(server.url, "tiny"), TITLES, rounds=2)
        scores = ranker.rank([[0]], [[1, 2, 3]])
    assert scores.tolist() == [[0.0, 0.0, 0.0]] and ranker.counts.unreadable == 2
