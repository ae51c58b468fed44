"""Task families as texts: wordings, what the data can feed, mixtures per epoch, response-only labels, hostile texts."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_genrec.alignment.tasks.families import FamilyExamples, TaskData, usable
from hf_genrec.alignment.tasks.fill import ITEM_FIELDS, ExampleEncoder, fill
from hf_genrec.alignment.tasks.mixture import (
    PairRows,
    PrefixRows,
    TaskCollator,
    TaskMixtureDataset,
    TaskRow,
    WindowRows,
    pair_row,
    serving_prompt,
    task_mixture,
)
from hf_genrec.alignment.tasks.requested import usable_families
from hf_genrec.alignment.tasks.templates import FAMILIES, FIELDS, TEMPLATES, template_texts, wordings
from hf_genrec.data.interactions import load_data
from hf_genrec.data.sequences import Sequences
from hf_genrec.data.splits import make_split
from hf_genrec.errors import ItemTableError, TrainingError
from hf_genrec.identifiers.item_names import tokenizer_from_names
from hf_genrec.identifiers.text_vocabulary import train_text_tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "identifiers"))
from hostile_strings import hostile_strings
from text_tokenizers import FAMILIES as TEXT_TOKENIZERS
from text_tokenizers import family as text_tokenizer

ROWS = [[0, 1, 2, 3, 4], [5, 6, 7], [8, 9, 1, 0], [2, 4]]
IDS = [f"i{n}" for n in range(10)]


@pytest.fixture(scope="module")
def tokenizer():
    base = train_text_tokenizer(template_texts() + [f"{n:02d}" for n in range(100)], 600)
    return tokenizer_from_names(base, IDS, [f"item_{n}" for n in range(1, 11)])


def data_with(*columns: str) -> TaskData:
    rng = np.random.default_rng(0)
    count = sum(map(len, ROWS))
    made = {
        "rating": rng.integers(1, 6, count).astype(float),
        "review": np.array([f"review {n}" for n in range(count)], object),
        "headline": np.array([f"headline {n}" for n in range(count)], object),
        "explanation": np.array([f"reason {n}" for n in range(count)], object),
        "feature": np.array([f"feature {n}" for n in range(count)], object),
    }
    return TaskData(
        Sequences.from_rows(ROWS), IDS, [f"Title {n}" for n in range(10)], {name: made[name] for name in columns}
    )


EVERYTHING = ("rating", "review", "headline", "explanation", "feature")


def text_of(tokenizer, ids) -> str:
    return tokenizer.decode([token for token in ids if token >= 0])


# ---------------------------------------------------------------------------------------------------- wordings


def test_wordings_are_complete_and_named_once():
    assert FAMILIES == ("sequential", "direct", "rating", "explanation", "review")
    assert len({template.name for template in TEMPLATES}) == len(TEMPLATES)
    assert len({template.source for template in TEMPLATES}) == len(TEMPLATES)
    for family in FAMILIES:
        kinds = {template.kind for template in wordings(family)}
        assert len(wordings(family)) >= 3 and wordings(family, held_out=True)
        # every question that is kept for zero-shot is trained in another wording
        assert {template.kind for template in wordings(family, held_out=True)} <= kinds
    for template in TEMPLATES:
        assert template.fields() <= set(FIELDS) and template.family in FAMILIES


def test_filling_keeps_texts_texts_and_items_items():
    example = fill(wordings("rating", "stars")[0], {"user": "user_1", "item": "i3", "rating": 4.0})
    assert example.target == [("text", "4")] and ("items", ["i3"]) in example.source
    with pytest.raises(ItemTableError, match=r"rating-1: no value for \{rating\}"):
        fill(wordings("rating", "stars")[0], {"user": "user_1", "item": "i3"})


def test_targets_end_once(tokenizer):
    encoder = ExampleEncoder(tokenizer)
    values = {"user": "user_1", "item": "i3", "rating": 4.0, "history": ["i0"]}
    _, stars = encoder(fill(wordings("rating", "stars")[0], values))
    _, item = encoder(fill(wordings("sequential")[0], values))
    assert stars[-1] == tokenizer.eos_token_id and item == tokenizer.item_token_ids("i3")


# ---------------------------------------------------------------------------------------------------- families


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_fed(family, tokenizer):
    examples = FamilyExamples(family, data_with(*EVERYTHING))
    encoder, generator = ExampleEncoder(tokenizer), np.random.default_rng(0)
    seen = set()
    for _ in range(200):
        example = examples.draw(generator)
        seen.add(example.template)
        source, target = encoder(example)
        assert source and target
    assert seen == {template.name for template in wordings(family)}


def test_what_the_data_cannot_feed_is_left_out_and_said(caplog):
    with caplog.at_level(logging.WARNING):
        kept = usable_families(list(FAMILIES), data_with("rating"))
    assert kept == ["sequential", "direct", "rating"]
    assert "'explanation' is left out: this data has no explanation" in caplog.text
    assert "'review' is left out: this data has no headline and no review" in caplog.text
    assert usable_families(["sequential", "rating"], data_with()) == ["sequential"]
    with pytest.raises(TrainingError, match="unknown task family 'ratings'"):
        usable_families(["ratings"], data_with("rating"))
    with pytest.raises(TrainingError, match="none of the task families"):
        usable_families(["review"], data_with("rating"))


def test_wordings_with_a_missing_field_are_left_out():
    bare = TaskData(Sequences.from_rows(ROWS), IDS)
    assert "yes_no_title" not in {template.kind for template in usable("direct", bare)}
    assert "stars_of_review" not in {template.kind for template in usable("review", data_with("review", "headline"))}
    assert {t.kind for t in usable("explanation", data_with("explanation"))} == {"explain"}


def test_an_interaction_without_the_value_is_never_asked_about():
    data = data_with("rating", "review", "headline")
    data.columns["rating"][::2] = np.nan
    data.columns["review"][1::2] = ""
    generator = np.random.default_rng(0)
    for _ in range(100):
        example = FamilyExamples("rating", data).draw(generator)
        assert "nan" not in str(example.source) + str(example.target)
        assert all(
            content != ""
            for kind, content in FamilyExamples("review", data_with("review", "headline")).draw(generator).source
            if kind == "text"
        )
    positions = {int(p) for _, held in FamilyExamples("rating", data).choices for p in held}
    assert positions == set(range(1, 14, 2))


def test_answers_are_true():
    data = data_with("rating")
    examples, generator = {name: FamilyExamples(name, data) for name in ("direct", "rating")}, np.random.default_rng(0)
    owned = [set(row) for row in ROWS]
    answers = {"yes": 0, "no": 0}
    for _ in range(400):
        example = examples["direct"].draw(generator)
        user = next(content for kind, content in example.source if kind == "text" and content.startswith("user_"))
        row = int(user.removeprefix("user_")) - 1
        if example.target[-1][0] == "items":
            lists = [content for kind, content in example.source if kind == "items"]
            assert example.target[-1][1][0] in lists[-1] and len(set(lists[-1])) == len(lists[-1])
            mine = [item for item in lists[-1] if IDS.index(item) in owned[row]]
            assert mine == example.target[-1][1]  # the other candidates are items the user has not had
            continue
        answer = example.target[-1][1]
        answers[answer] += 1
        asked = [content for kind, content in example.source if kind == "items"]
        if asked:
            assert (IDS.index(asked[-1][0]) in owned[row]) == (answer == "yes")
    assert min(answers.values()) > 50
    rated = {
        (r + 1, item): data.columns["rating"][data.train.offsets[r] + p]
        for r, row in enumerate(ROWS)
        for p, item in enumerate(row)
    }
    for _ in range(300):
        example = examples["rating"].draw(generator)
        texts = [content for kind, content in example.source if kind == "text"]
        user = int(next(t for t in texts if t.startswith("user_")).removeprefix("user_"))
        stars = rated[user, IDS.index(next(content for kind, content in example.source if kind == "items")[0])]
        answer, kind = example.target[-1][1], next(t.kind for t in TEMPLATES if t.name == example.template)
        if kind == "stars":
            assert float(answer) == stars
        elif kind == "like":
            assert answer == ("like" if stars >= 4 else "dislike")
        else:
            shown = next(t for t in texts if not t.startswith("user_"))
            assert (float(shown) == stars) == (answer == "yes")


def test_titles_that_are_asked_about_exist_and_their_answers_are_true():
    """Half of the items have no title, and an item that nobody shares has the title of one that users had."""
    titles = [["", " "][n % 4 // 2] if n % 2 else f"Title {n}" for n in range(10)]
    titles[6] = "Title 0"
    data = data_with(*EVERYTHING)
    data = TaskData(data.train, IDS, titles, data.columns)
    generator, answers, shown = np.random.default_rng(0), Counter(), Counter()
    asked = {template.name for template in TEMPLATES if template.kind == "yes_no_title"}
    for family in FAMILIES:
        examples, kinds = FamilyExamples(family, data), {t.name for t in wordings(family) if "title" in t.fields()}
        for _ in range(400 if kinds else 0):
            example = examples.draw(generator)
            if example.template not in kinds:
                continue
            shown[family] += 1
            texts = [content for kind, content in example.source + example.target if kind == "text"]
            assert all(text.strip() for text in texts)
            if example.template not in asked:
                continue
            user, title = texts[:2] if texts[0].startswith("user_") else texts[1::-1]
            answers[texts[2]] += 1
            had = {titles[item] for item in ROWS[int(user.removeprefix("user_")) - 1]}
            assert title in titles and (title in had) == (texts[2] == "yes")
    assert min(answers["yes"], answers["no"]) > 10 and set(shown) == {"direct", "explanation"}


def test_ratings_come_from_the_log_and_the_training_part(tmp_path):
    log = {"user_id": [], "item_id": [], "timestamp": [], "stars": []}
    for user in range(4):
        for step in range(6):
            for name, value in zip(log, (f"u{user}", f"i{(user + step) % 7}", step, user + step / 10)):
                log[name].append(value)
    data = load_data(log, min_user=0, min_item=0, extra_columns=["stars", "review"])
    assert data.extra["stars"].tolist() == sorted(log["stars"]) and "no column 'review' in the log" in data.report.notes
    tasks = TaskData.from_split(data, make_split(data))
    expected = [user + step / 10 for user in range(4) for step in range(4)]  # the last two of each are held out
    assert tasks.columns["rating"].tolist() == expected
    assert load_data(log, min_user=0, min_item=0).extra == {}


# ---------------------------------------------------------------------------------------------------- mixtures


def test_windows_show_every_prefix(tokenizer):
    rows = WindowRows(data_with(), ExampleEncoder(tokenizer), window=50)
    row = rows.rows(0, np.random.default_rng(0))[0]
    names = [tokenizer.item_token_ids(IDS[item]) for item in ROWS[0]]
    assert row.targets == names[1:]
    for t, seen in enumerate(row.visible):
        shown = row.source[:seen]
        assert shown[-sum(map(len, names[: t + 1])) :] == list(chain(*names[: t + 1]))
    assert len(row.source) == row.visible[-1]


def test_the_serving_prompt_is_a_training_wording(tokenizer):
    encoder = ExampleEncoder(tokenizer)
    rows = WindowRows(data_with(), encoder, window=50)
    seen = {
        tuple(rows.rows(0, np.random.default_rng(seed))[0].source[: len(serving_prompt(encoder))]) for seed in range(40)
    }
    assert tuple(serving_prompt(encoder)) in seen and len(seen) > 2
    assert text_of(tokenizer, serving_prompt(encoder)) == "next item after: "


def test_every_epoch_draws_again_and_only_the_epoch_decides(tokenizer):
    weights = {"sequential": 1.0, "direct": 2.0, "rating": 0.5}

    def mixture() -> TaskMixtureDataset:
        return task_mixture(data_with("rating"), ExampleEncoder(tokenizer), weights, packed=True, group=2, seed=5)

    first, second = mixture(), mixture()
    assert len(first) == sum(first.counts.values()) and first.counts["direct"] == 2 * len(first.families["direct"])
    before = [first[n] for n in range(len(first))]
    assert before == [second[n] for n in reversed(range(len(second)))][::-1]  # whatever the order of reading
    first.set_epoch(1)
    assert before != [first[n] for n in range(len(first))]
    first.set_epoch(0)
    assert before == [first[n] for n in range(len(first))]


def test_weights_are_passes(tokenizer):
    encoder, data = ExampleEncoder(tokenizer), data_with("rating")
    rows = {"rating": PairRows(FamilyExamples("rating", data), encoder, 1), "sequential": WindowRows(data, encoder, 50)}
    mixture = TaskMixtureDataset(rows, {"rating": 0.5, "sequential": 3.0})
    assert mixture.counts == {"rating": 7, "sequential": 12}
    for bad in ({"rating": 1.0}, {"rating": 1.0, "sequential": 0.0}):
        with pytest.raises(TrainingError, match="positive weight"):
            TaskMixtureDataset(rows, bad)


def test_labels_are_responses_alone():
    batch = TaskCollator(0)([[TaskRow([5, 6, 7], [[8, 9], [9]], [2, 3])], [TaskRow([5], [[7]], [1])]])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [5, 0, 0]] and batch["attention_mask"].tolist() == [
        [1, 1, 1],
        [1, 0, 0],
    ]
    assert batch["labels"].tolist() == [[[8, 9], [9, -100]], [[7, -100], [-100, -100]]]
    assert batch["history_lengths"].tolist() == [[2, 3], [1, 0]]
    flat = TaskCollator(0, packed=False)([[TaskRow([5, 6, 7], [[8, 9], [9]], [2, 3])]])
    assert flat["input_ids"].tolist() == [[5, 6, 0], [5, 6, 7]] and flat["labels"].tolist() == [[8, 9], [9, -100]]
    assert "history_lengths" not in flat


def test_prefixes_for_models_that_do_not_pack(tokenizer):
    rows = PrefixRows(data_with(), ExampleEncoder(tokenizer), max_items=3, group=8)
    table = {tuple(tokenizer.item_token_ids(item)): n for n, item in enumerate(IDS)}
    for row in rows.rows(0, np.random.default_rng(0)):
        target = table[tuple(row.targets[0])]
        assert any(target in sequence[1:] for sequence in ROWS) and row.visible == [len(row.source)]


# ---------------------------------------------------------------------------------------------------- hostile texts


@pytest.mark.parametrize("name", [*TEXT_TOKENIZERS, "own"])
def test_no_title_and_no_review_forges_a_token(name, tokenizer):
    """10,000 hostile texts over five tokenizers (2,000 each, and the library's own), in all wordings and text fields."""
    if name != "own":
        tokenizer = tokenizer_from_names(text_tokenizer(name), IDS, [[f"<I{n}>"] for n in range(10)])
    encoder = ExampleEncoder(tokenizer, max_source=10_000, max_target=10_000)
    control = set(tokenizer.get_added_vocab().values()) | set(tokenizer.all_special_ids)
    if list(tokenizer.special_tokens_map.values()).count(tokenizer.unk_token) == 1:
        control.discard(tokenizer.unk_token_id)
    text_fields = [name for name in FIELDS if name not in ITEM_FIELDS]
    templates = [template for template in TEMPLATES if template.fields() & set(text_fields)]
    texts = hostile_strings(list(tokenizer.get_added_vocab()), 2000)
    forged = []
    for place, text in enumerate(texts):
        template = templates[place % len(templates)]
        example = fill(template, dict.fromkeys(text_fields, text) | dict.fromkeys(ITEM_FIELDS, "i1"))
        sides = encoder(example)
        for side, segments in zip(sides, (example.source, example.target)):
            allowed = tokenizer.item_token_ids("i1") * sum(kind == "items" for kind, _ in segments)
            if segments is example.target and segments[-1][0] != "items" and tokenizer.eos_token_id is not None:
                allowed = [*allowed, tokenizer.eos_token_id]
            if [token for token in side if token in control] != [token for token in allowed if token in control]:
                forged.append(text)
    assert forged == []


def test_pair_row_sees_its_whole_source():
    assert pair_row(([1, 2, 3], [4])) == TaskRow([1, 2, 3], [[4]], [3])
    assert torch.equal(TaskCollator(0)([[pair_row(([1, 2], [4]))]])["history_lengths"], torch.tensor([[2]]))
