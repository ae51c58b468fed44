"""Zero-shot ranking: prompts, parser, bootstrapping."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "identifiers"))
from chat_cases import TITLES, Server, echo, shown
from hostile_strings import hostile_strings

from hf_genrec.data.sequences import Sequences
from hf_genrec.data.splits import EvaluationSet
from hf_genrec.errors import IncompatibleComponentsError, RequestError
from hf_genrec.evaluation.baselines import Popularity
from hf_genrec.evaluation.evaluator import evaluate
from hf_genrec.generation.ranking.bootstrap import draw_permutation
from hf_genrec.generation.ranking.chat_client import ChatEndpoint
from hf_genrec.generation.ranking.parse import RankingParser, common_subsequence
from hf_genrec.generation.ranking.probes import mean_ranks_by_slot, popularity_bias
from hf_genrec.generation.ranking.prompts import RankingPrompt, quote_title, written_title
from hf_genrec.generation.ranking.zero_shot import ZeroShotRanker, ZeroShotRecommender

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


def test_answers_that_had_to_be_repaired_are_counted() -> None:
    """Complete; with a line too many; with a candidate missing; with one twice; naming none."""
    answers = ["{a}\n{b}", "Sure:\n{a}\n{b}", "{b}", "{a}\n{b}\n{a}", "no idea"]

    def chat(conversations):
        return [text.format(a=shown(one)[0], b=shown(one)[1]) for text, one in zip(answers, conversations)]

    ranker = ZeroShotRanker(chat, TITLES, rounds=5)
    ranker.rank([[0]], [[1, 2]])
    counts = ranker.counts
    assert (counts.answers, counts.repaired, counts.unreadable, counts.unknown_lines) == (5, 3, 1, 2)
    assert (counts.asked, counts.named) == (10, 7)
    shares = counts.to_dict()
    assert (shares["repaired_share"], shares["unreadable_share"], shares["named_share"]) == (0.6, 0.2, 0.7)
    assert RankingParser(["Heat", "Up"]).parse("Up\nHeat\nUp\nUp").repeats == 2


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


def test_an_endpoint_ranks() -> None:
    """End to end over HTTP: the server names the last word of the prompt; the ranker copes with that."""
    with Server() as server:
        ranker = ZeroShotRanker(ChatEndpoint(server.url, "tiny"), TITLES, rounds=2)
        scores = ranker.rank([[0]], [[1, 2, 3]])
    assert scores.tolist() == [[0.0, 0.0, 0.0]] and ranker.counts.unreadable == 2
