"""Task families for causal language models: wordings, what the data can feed, true answers."""

from __future__ import annotations

import logging
from collections import Counter

import numpy as np
import pytest
from language_cases import (
    FLAT,
    GROUPS,
    IDS,
    ROWS,
    STARTS,
    TITLES,
    data_with,
    make_tokenizer,
    runs,
    texts_of,
)

from hf_genrec.alignment.tasks.families import TaskData
from hf_genrec.alignment.tasks.fill import clipped
from hf_genrec.alignment.tasks.language_families import LanguageFamily
from hf_genrec.alignment.tasks.language_mixture import feedable, language_mixture
from hf_genrec.alignment.tasks.language_rows import LanguageEncoder
from hf_genrec.alignment.tasks.templates_language import (
    LANGUAGE_FAMILIES,
    LANGUAGE_FIELDS,
    WORDINGS,
    language_wordings,
)
from hf_genrec.data.interactions import load_data
from hf_genrec.data.sequences import Sequences
from hf_genrec.data.splits import make_split
from hf_genrec.errors import IncompatibleComponentsError, TrainingError


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module", params=["plain", "chat"])
def encoder(request, tokenizer):
    return LanguageEncoder(tokenizer, style=request.param, max_length=4096)


# ---------------------------------------------------------------------------------------------------- wordings


def test_wordings_are_complete_and_named_once():
    assert len({wording.name for wording in WORDINGS}) == len(WORDINGS)
    assert len({turn.source for wording in WORDINGS for turn in wording.turns[:1]}) == len(WORDINGS)
    assert len(language_wordings("next_item")) >= 6
    for wording in WORDINGS:
        assert wording.fields() <= set(LANGUAGE_FIELDS)
        if wording.family == "next_item":  # a window of items can follow
            assert wording.turns[0].parts("source")[-1] == ("history",) and wording.turns[0].target == "{item}"
    for family in LANGUAGE_FAMILIES:
        trained = {wording.kind for wording in language_wordings(family)}
        assert {wording.kind for wording in language_wordings(family, held_out=True)} == trained
    assert all(len(wording.turns) > 1 for wording in language_wordings("chat"))


# ---------------------------------------------------------------------------------------------------- truth of answers


def drawn(name: str, data: TaskData, rounds: int = 12, **options):
    """(unit, wording kind, conversation) of every unit, several times."""
    family = LanguageFamily(name, data, **options)
    kinds = {wording.name: wording.kind for wording in WORDINGS}
    for seed in range(rounds):
        for index, unit in enumerate(family.units.tolist()):
            talk = family.example(index, np.random.default_rng([seed, index]))
            yield unit, kinds[talk.template], talk


def test_every_wording_of_every_family_is_drawn_and_encoded(encoder):
    for data in (data_with("rating"), data_with()):
        for name in LANGUAGE_FAMILIES:
            expected = {w.name for w in language_wordings(name) if w.kind != ("taken" if data.columns else "rated")}
            if name == "yes_no":
                assert expected
            seen = set()
            for _, _, talk in drawn(name, data, rounds=20):
                seen.add(talk.template)
                assert runs(encoder.tokenizer, encoder(talk))
            assert seen == expected


def test_histories_come_before_and_targets_follow():
    for unit, kind, talk in [*drawn("next_item", data_with()), *drawn("fused_history", data_with(), max_history=2)]:
        (question, answer), *_ = talk.turns
        cut = 20 if kind == "next" else 2
        before = FLAT[max(STARTS[unit], unit - cut) : unit]
        if kind in ("next", "items_to_title"):
            assert texts_of(question, "items") == [IDS[item] for item in before]
        else:
            assert texts_of(question) == [TITLES[item] for item in before]
        if kind in ("next", "titles_to_item"):
            assert answer == [("items", [IDS[FLAT[unit]]])]
        else:
            assert answer == [("text", TITLES[FLAT[unit]])]


def test_items_and_their_texts():
    data = data_with()
    for item, kind, talk in [*drawn("item_to_index", data), *drawn("index_to_item", data)]:
        (question, answer), *_ = talk.turns
        texts = {"title": [TITLES[item]], "description": [f"About {item}."], "genres": [GROUPS[item]]}
        texts["title_description"] = texts["title"] + texts["description"]
        sides = (question, answer) if talk.template.startswith("item_to") else (answer, question)
        assert texts_of(sides[0]) == texts[kind] and sides[1][1 if sides[1][0][0] == "template" else 0] == (
            "items",
            [IDS[item]],
        )


def test_candidates_hold_the_target_once_and_nothing_owned():
    data = data_with(titles=[*TITLES[:8], "Title 5", ""])  # item 8 shares its title with item 5, item 9 has none
    places = Counter()
    for name in ("candidates", "candidate_letters"):
        for unit, _, talk in drawn(name, data, num_candidates=4):
            (question, answer), *_ = talk.turns
            row = next(row for row, start in zip(ROWS, (0, 5, 8, 12)) if start == STARTS[unit])
            flat = [segment for segment in question if segment[0] != "history"]
            listed = texts_of(flat)
            target = data.titles[FLAT[unit]]
            assert len(set(listed)) == len(listed) == 4 and listed.count(target) == 1
            others = set(listed) - {target}
            assert not others & {data.titles[item] for item in row if item != 8} and "" not in listed
            if name == "candidate_letters":
                letter = answer[0][1]
                place = listed.index(target)
                assert answer == [("template", "ABCD"[place])] and len(letter) == 1
                marks = [content for kind, content in flat if kind == "template" and f"({letter}) " in content]
                assert len(marks) == 1
                places[letter] += 1
            else:
                assert answer == [("text", target)]
    assert set(places) == set("ABCD") and min(places.values()) > sum(places.values()) / 8  # no favoured place


def test_likes_are_ratings_of_four_fifths_and_more():
    data = data_with("rating")
    data.columns["rating"][[1, 6]] = np.nan
    stars = data.columns["rating"]
    answers = set()
    for unit, kind, talk in drawn("yes_no", data):
        assert kind == "rated" and unit not in (1, 6)
        question, answer = talk.turns[0]
        assert answer == [("template", "Yes." if stars[unit] >= 4 else "No.")]
        answers.add(answer[0][1])
        window = range(STARTS[unit], unit)
        lists = [content for kind, content in question if kind == "history"]
        shown = [{text for _, entry in part.entries for text in texts_of(entry)} for part in lists]
        liked = {TITLES[FLAT[n]] for n in window if stars[n] >= 4}
        disliked = {TITLES[FLAT[n]] for n in window if stars[n] < 4}
        assert shown == [titles for titles in (liked, disliked) if titles]
        assert texts_of(question)[-1] == TITLES[FLAT[unit]]
    assert answers == {"Yes.", "No."}


def test_without_ratings_yes_means_taken():
    counts = Counter()
    for unit, kind, talk in drawn("yes_no", data_with()):
        assert kind == "taken"
        question, answer = talk.turns[0]
        row = next(row for row, start in zip(ROWS, (0, 5, 8, 12)) if start == STARTS[unit])
        asked = TITLES.index(texts_of(question)[-1])
        assert (answer == [("template", "Yes.")]) == (asked in row)
        assert asked == FLAT[unit] or asked not in row
        counts[answer[0][1]] += 1
    assert min(counts.values()) > 0.35 * sum(counts.values())


def test_wishes_and_tastes_from_columns_or_declared_stand_ins(caplog):
    with caplog.at_level(logging.INFO):
        for unit, _, talk in drawn("preference", data_with(), rounds=3):
            counts = Counter(g for item in FLAT[STARTS[unit] : unit] for g in GROUPS[item].split(", "))
            best = texts_of(talk.turns[0][1])[0].split(", ")
            assert sorted((counts[g] for g in best), reverse=True) == sorted(counts.values(), reverse=True)[:3]
        wishes = {texts_of(t.turns[0][0])[0] for u, _, t in drawn("item_search", data_with(), 3) if FLAT[u] == 4}
    assert wishes == {"About 4."}
    assert "'preference': no column of the data holds preferences, groups of items stand in" in caplog.text
    assert "'item_search': no column of the data holds intentions, descriptions of items stand in" in caplog.text
    data = data_with("intention", "preference")
    data.columns["intention"][3] = " "
    for unit, _, talk in drawn("item_search", data, rounds=3):
        assert texts_of(talk.turns[0][0]) == [f"wish {unit}"] and unit != 3
        assert talk.turns[0][1] == [("items", [IDS[FLAT[unit]]])]
    for unit, _, talk in drawn("preference", data, rounds=3):
        assert texts_of(talk.turns[0][1]) == [f"taste {unit}"]
    only_groups = data_with(texts=("genres",))
    assert {texts_of(t.turns[0][0])[0] for u, _, t in drawn("item_search", only_groups, 3) if FLAT[u] == 4} == {
        GROUPS[4]
    }


def test_chat_turns_follow_one_another():
    for unit, kind, talk in drawn("chat", data_with()):
        answers = [answer[0] for _, answer in talk.turns]
        item = FLAT[unit]
        if kind in ("again", "titles"):
            assert STARTS[unit + 1] == STARTS[unit]  # the next one is of the same person
            following = FLAT[unit + 1]
            expected = (
                [("items", [IDS[item]]), ("items", [IDS[following]])]
                if kind == "again"
                else [("text", TITLES[item]), ("text", TITLES[following])]
            )
        else:
            expected = [("items", [IDS[item]]), ("text", TITLES[item])]
        assert answers == expected


def test_what_an_item_lacks_is_never_asked_about():
    data = data_with(titles=["" if n % 2 else f"Title {n}" for n in range(10)])
    data.item_texts["description"] = ["" if n < 5 else f"About {n}." for n in range(10)]
    data.item_texts["genres"] = [""] * 5 + GROUPS[5:]
    for name in LANGUAGE_FAMILIES:
        for _, _, talk in drawn(name, data, rounds=8):
            for side in (side for turn in talk.turns for side in turn):
                assert all(text.strip() for text in texts_of(side))
    assert len(LanguageFamily("index_to_item:title", data)) == 5


def test_missing_columns_leave_families_out_and_are_named(caplog):
    bare = TaskData(Sequences.from_rows(ROWS), IDS)
    with caplog.at_level(logging.WARNING):
        assert feedable([*LANGUAGE_FAMILIES, "direct", "review"], bare) == ["next_item", "chat", "direct"]
    assert "'candidates' is left out: this data has no candidates and no title and no titles" in caplog.text
    assert "'preference' is left out: this data has no preference" in caplog.text
    assert {w.kind for w in LanguageFamily("chat", bare).wordings} == {"again"}
    with pytest.raises(TrainingError, match=r"unknown task family 'next_items': choose of sequential.*next_item"):
        feedable(["next_items"], bare)
    with pytest.raises(TrainingError, match="unknown task family 'chat:x': its kinds are again, explain"):
        feedable(["chat:x"], bare)
    with pytest.raises(TrainingError, match="none of the task families"):
        feedable(["candidates"], bare)
    with pytest.raises(IncompatibleComponentsError, match="num_candidates is 27: letters allow 2 to 26"):
        language_mixture(data_with(), LanguageEncoder(make_tokenizer()), {"candidate_letters": 1.0}, num_candidates=27)


def test_long_texts_are_cut_at_a_blank():
    assert clipped("one two three", 9) == "one two" and clipped("one two", 7) == "one two"
    assert clipped("unbroken" * 3, 5) == "unbro"
    data = data_with(titles=["word " * 100, *TITLES[1:]])
    shown = LanguageFamily("index_to_item:title", data).titles[0]
    assert shown.endswith("word") and 140 < len(shown) <= 150


def test_texts_of_the_item_table_by_field():
    log = {"user_id": [], "item_id": [], "timestamp": [], "query": []}
    for user in range(3):
        for step in range(5):
            for name, value in zip(log, (f"u{user}", f"i{(user + step) % 6}", step, f"q{user}{step}")):
                log[name].append(value)

    def texts(**columns) -> dict:
        items = {"item_id": [f"i{n}" for n in range(6)], "title": TITLES[:6], **columns}
        data = load_data(log, items=items, min_user=0, min_item=0, extra_columns=["query"])
        made = TaskData.from_split(data, make_split(data))
        assert made.columns["intention"].tolist() == [f"q{user}{step}" for user in range(3) for step in range(3)]
        return made.item_texts

    assert texts() == {}
    plots = [f"plot {n}" for n in range(6)]
    assert texts(plot=plots, genres=["A|B", "B", "A", "", "(no genres listed)", "B|A"]) == {
        "description": plots,
        "genres": ["A, B", "B", "A", "", "", "B, A"],
    }
    assert texts(category=[["A b", "C"], ["C"], [], ["A b"], ["C"], ["D"]])["genres"][0] == "A b, C"
    spaced = ["Action War", "War", "Action", "Sci-Fi War", "Sci-Fi", "Action Sci-Fi"]
    assert texts(genres=spaced)["genres"][0] == "Action, War"
    assert (
        texts(genres=["Video Games", "Board Games", "Card Games", "Toys", "Toys", "Dolls"])["genres"][0]
        == "Video Games"
    )
