"""What holds for every family of the tables, a new one too: labels are answers alone, texts forge nothing, items stay whole."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from language_cases import CHATML, TEXT_TOKENIZERS, hostile_strings, make_tokenizer, runs, texts_of

from hf_genrec.alignment.tasks import fill as fill_module
from hf_genrec.alignment.tasks import language_rows
from hf_genrec.alignment.tasks.families import COLUMNS, ITEM_COLUMNS, FamilyExamples, TaskData, usable
from hf_genrec.alignment.tasks.fill import ExampleEncoder
from hf_genrec.alignment.tasks.language_families import LanguageFamily, p5_conversation, usable_wordings
from hf_genrec.alignment.tasks.language_mixture import LanguageWindowRows, language_mixture
from hf_genrec.alignment.tasks.language_rows import Conversation, LanguageEncoder
from hf_genrec.alignment.tasks.mixture import PrefixRows, TaskCollator, WindowRows, pair_row, task_mixture
from hf_genrec.alignment.tasks.templates import FAMILIES, TEMPLATES, wordings
from hf_genrec.alignment.tasks.templates_language import LANGUAGE_FAMILIES, WORDINGS, language_wordings
from hf_genrec.data.sequences import Sequences
from hf_genrec.errors import TrainingError
from hf_genrec.identifiers.item_names import tokenizer_from_names

NAMES = tuple(dict.fromkeys(FAMILIES + LANGUAGE_FAMILIES))


def table_data(texts: list[str], *, rated: bool = True) -> TaskData:
    """An item per text; every text field of the tables holds the text of its item."""
    rows = [list(range(start, min(start + 8, len(texts)))) for start in range(0, len(texts), 8)]
    shown = np.array(texts, object)
    columns = {name: shown for name in COLUMNS if name != "rating"}
    if rated:
        columns["rating"] = np.resize([5.0, 1.0, 4.0, 3.0], len(texts))
    ids = [f"h{n}" for n in range(len(texts))]
    return TaskData(Sequences.from_rows(rows), ids, texts, columns, dict.fromkeys(ITEM_COLUMNS, texts))


def conversations(name: str, data: TaskData, rounds: int = 1) -> list[Conversation]:
    """Conversations of a family, one per unit and round, as rows of a language model hold them."""
    if name in FAMILIES:
        drawn = FamilyExamples(name, data)
        generators = [np.random.default_rng(place) for place in range(rounds * len(drawn))]
        return [p5_conversation(drawn.draw(generator)) for generator in generators]
    family = LanguageFamily(name, data, max_history=8, num_candidates=4)
    return [
        family.example(index, np.random.default_rng([seed, index]))
        for seed in range(rounds)
        for index in range(len(family))
    ]


def tokenizer_of(name: str, number: int):
    codes = [[n // 100, n % 100] for n in range(number)]
    return make_tokenizer(name, CHATML, [f"h{n}" for n in range(number)], codes)


def control_of(tokenizer) -> set[int]:
    control = set(tokenizer.get_added_vocab().values()) | set(tokenizer.all_special_ids)
    if list(tokenizer.special_tokens_map.values()).count(tokenizer.unk_token) == 1:
        control.discard(tokenizer.unk_token_id)
    return control


@pytest.mark.parametrize("name", NAMES)
def test_the_data_of_these_tests_feed_every_wording(name):
    """A new family or field that they do not feed fails here, so that the tests below always hold for the whole table."""
    assert {template.family for template in TEMPLATES} | {wording.family for wording in WORDINGS} == set(NAMES)
    data = table_data([f"text {n}" for n in range(24)])
    rated, unrated = data, table_data([f"text {n}" for n in range(24)], rated=False)
    if name in FAMILIES:
        seen = {talk.template for talk in conversations(name, data, rounds=20)}
        assert usable(name, data) == wordings(name) and seen == {template.name for template in wordings(name)}
    else:
        assert {*usable_wordings(name, rated), *usable_wordings(name, unrated)} == set(language_wordings(name))
        seen = {talk.template for one in (rated, unrated) for talk in conversations(name, one, rounds=20)}
        assert seen == {wording.name for wording in language_wordings(name)}


# ---------------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize("style", ["plain", "chat"])
@pytest.mark.parametrize("name", NAMES)
def test_labels_are_the_answers_and_their_ends_alone(name, style):
    tokenizer = tokenizer_of("byte_level_bpe", 24)
    encoder = LanguageEncoder(tokenizer, style=style, max_length=4096)
    ends = {"", tokenizer.eos_token}
    for rated in (True, False):
        data = table_data([f"text {n}" for n in range(24)], rated=rated)
        if not rated and name in FAMILIES:
            data.columns["rating"] = np.ones(24)
        for talk in conversations(name, data, rounds=3):
            found = runs(tokenizer, encoder(talk))
            answers = [tokenizer.decode(encoder.encode(answer)) for _, answer in talk.turns]
            assert len(found) == len(answers)
            for run, answer in zip(found, answers):
                assert run.startswith(answer) and run[len(answer) :] in ends


@pytest.mark.parametrize("name", FAMILIES)
def test_labels_of_encoder_decoders_are_the_targets_alone(name):
    tokenizer = tokenizer_of("byte_level_bpe", 24)
    encoder = ExampleEncoder(tokenizer)
    examples, generator = FamilyExamples(name, table_data([f"text {n}" for n in range(24)])), np.random.default_rng(0)
    for _ in range(30):
        example = examples.draw(generator)
        batch = TaskCollator(tokenizer.pad_token_id, packed=False)([[pair_row(encoder(example))]])
        answer, labels = encoder.encode(example.target), batch["labels"][0].tolist()
        assert labels[: len(answer)] == answer and labels[len(answer) :] in ([], [tokenizer.eos_token_id])
        assert batch["input_ids"][0].tolist() == encoder.encode(example.source)


# ---------------------------------------------------------------------------------------------------- hostile texts


def hostile_pair(texts: list[str], *, rated: bool = True) -> list[TaskData]:
    """The texts, and harmless ones in their place (blank where they are)."""
    harmless = [f"t{n}" if text.strip() else "" for n, text in enumerate(texts)]
    return [
        table_data(["" if not text.strip() else text for text in texts], rated=rated),
        table_data(harmless, rated=rated),
    ]


def forged_rows(name: str, tokenizer, style: str, texts: list[str]) -> list[str]:
    """Rows of language models in which hostile texts change the control tokens that harmless ones give."""
    control = control_of(tokenizer)
    encoder = LanguageEncoder(tokenizer, style=style, max_length=1_000_000)
    found = []
    for rated in (True, False) if name in LANGUAGE_FAMILIES else (True,):
        for pair in zip(*(conversations(name, data) for data in hostile_pair(texts, rated=rated)), strict=True):
            written = [[token for token in encoder(talk).input_ids if token in control] for talk in pair]
            if written[0] != written[1]:
                found.append(pair[0].template)
    return found


def forged_pairs(name: str, tokenizer, texts: list[str]) -> list[str]:
    """The same of sources and targets of encoder-decoders."""
    control = control_of(tokenizer)
    encoder = ExampleEncoder(tokenizer, max_source=1_000_000, max_target=1_000_000)
    families = [FamilyExamples(name, data) for data in hostile_pair(texts)]
    found = []
    for seed in range(len(texts)):
        pair = [encoder(family.draw(np.random.default_rng(seed))) for family in families]
        for side in range(2):
            written = [[token for token in row[side] if token in control] for row in pair]
            if written[0] != written[1]:
                found.append(f"{name} {seed}")
    return found


@pytest.mark.parametrize("text_tokenizer", TEXT_TOKENIZERS)
@pytest.mark.parametrize("name", NAMES)
def test_no_text_of_any_family_forges_a_token(name, text_tokenizer):
    tokenizer = tokenizer_of(text_tokenizer, 96)
    texts = hostile_strings(list(tokenizer.get_added_vocab())[:8], 2400)[NAMES.index(name) :: 25]  # others for each
    for style in ("plain", "chat"):
        assert forged_rows(name, tokenizer, style, texts) == []
    if name in FAMILIES:
        assert forged_pairs(name, tokenizer, texts) == []


@pytest.mark.parametrize("name", NAMES)
def test_the_check_of_forged_tokens_can_fail(name, monkeypatch):
    """Encoded like templates the same texts do forge tokens, in every family whose wordings show any."""
    tokenizer = tokenizer_of("byte_level_bpe", 80)
    texts = hostile_strings(["<|im_start|>", "<|im_end|>"], 80)
    for module in (language_rows, fill_module):
        real = module.encode_segments
        careless = lambda tokenizer, segments, real=real: real(
            tokenizer, [("template" if kind == "text" else kind, content) for kind, content in segments]
        )
        monkeypatch.setattr(module, "encode_segments", careless)
    talks = conversations(name, hostile_pair(texts)[0])
    said = {text for talk in talks for turn in talk.turns for side in turn for text in texts_of(side)}
    shows = any("<|im_" in text for text in said)  # not so where a family speaks in item tokens and numbers alone
    assert shows or name in ("sequential", "rating", "next_item")
    assert bool(forged_rows(name, tokenizer, "chat", texts)) == shows
    if name in FAMILIES:
        assert bool(forged_pairs(name, tokenizer, texts)) == shows


# ---------------------------------------------------------------------------------------------------- whole items


ITEMS = 30


@pytest.fixture(scope="module")
def named():
    """Items by names of one to four tokens, so that a cut in the middle of one would show."""
    base = TEXT_TOKENIZERS["byte_level_bpe"](pad="<|endoftext|>")
    names = [[f"<N{(n + level) % 9}>" for level in range(1 + n % 4)] + [f"<last_{n}>"] for n in range(ITEMS)]
    return tokenizer_from_names(base, [f"h{n}" for n in range(ITEMS)], names)


def random_data(generator: np.random.Generator) -> TaskData:
    rows = [generator.integers(0, ITEMS, generator.integers(1, 25)).tolist() for _ in range(6)]
    number = sum(map(len, rows))
    texts = ["word " * int(generator.integers(1, 12)) for _ in range(ITEMS)]
    columns = {
        name: np.array(["word " * int(n) for n in generator.integers(1, 40, number)], object) for name in COLUMNS
    }
    columns["rating"] = generator.integers(1, 6, number).astype(float)
    ids = [f"h{n}" for n in range(ITEMS)]
    return TaskData(Sequences.from_rows(rows), ids, texts, columns, dict.fromkeys(ITEM_COLUMNS, texts))


def without_history(example, kept: int):
    """The example with the newest `kept` items of its history."""
    source = list(example.source)
    source[example.history] = ("items", source[example.history][1][-kept:])
    return source


@pytest.mark.parametrize("name", FAMILIES)
def test_encoder_decoders_lose_whole_items_the_oldest_first(name, named):
    """Over random histories and lengths: the source holds as many of the newest items as fit, or says that it cannot."""
    generator, seen = np.random.default_rng(len(name)), set()
    for _ in range(12):
        examples = FamilyExamples(name, random_data(generator), max_items=20)
        for _ in range(25):
            example = examples.draw(generator)
            wide = ExampleEncoder(named, 100_000, 100_000)
            full, target = wide(example)
            encoder = ExampleEncoder(named, int(generator.integers(5, len(full) + 3)), int(generator.integers(2, 30)))
            length = 0 if example.history is None else len(example.source[example.history][1])
            fitting = [
                kept
                for kept in range(length, 0, -1)
                if len(wide.encode(without_history(example, kept))) <= encoder.max_source
            ]
            of_items = example.target[-1][0] == "items"
            try:
                source, answer = encoder(example)
            except TrainingError as error:
                seen.add("refused")
                assert example.where in str(error) and "max_" in str(error)
                assert (of_items and len(target) > encoder.max_target) or (
                    not fitting and len(full) > encoder.max_source
                )
                continue
            assert len(source) <= encoder.max_source and len(answer) <= encoder.max_target
            assert answer == target if of_items else answer[-1] == named.eos_token_id
            if not of_items:  # a text loses its end, nothing else
                assert answer[:-1] == target[: len(answer) - 1] and len(answer) == min(len(target), encoder.max_target)
            if fitting:
                assert source == wide.encode(without_history(example, fitting[0]))
                seen.add("cut" if fitting[0] < length else "whole")
    assert seen >= ({"refused", "cut", "whole"} if name in ("sequential", "direct") else set())


def test_a_target_of_an_item_is_never_half_an_item(named):
    data = TaskData(Sequences.from_rows([[0, 1, 2, 3]]), [f"h{n}" for n in range(ITEMS)])
    examples = FamilyExamples("sequential", data)
    template = wordings("sequential")[0]
    example = examples.example(template, 3, np.random.default_rng(0))
    with pytest.raises(
        TrainingError,
        match=r"'sequential', item 'h3' of training row 0.*the target, item 'h3', takes 6 tokens.*raise max_target",
    ):
        ExampleEncoder(named, max_target=2)(example)
    with pytest.raises(TrainingError, match=r"'sequential', item 'h3'.*the source, with one item.*raise max_source"):
        ExampleEncoder(named, max_source=5)(example)
    short = len(ExampleEncoder(named)(examples.example(template, 1, np.random.default_rng(0)))[0])
    one = short - len(named.item_token_ids("h0")) + len(named.item_token_ids("h2"))
    source, _ = ExampleEncoder(named, max_source=one + 1)(example)
    assert len(source) == one and source[-len(named.item_token_ids("h2")) :] == named.item_token_ids("h2")


def test_texts_of_a_source_lose_their_end_and_wordings_nothing(named):
    examples = FamilyExamples("review", table_data(["one two three four five six seven eight"] * ITEMS))
    template = next(t for t in wordings("review") if t.kind == "headline")
    example = examples.example(template, 3, np.random.default_rng(0))
    full, _ = ExampleEncoder(named)(example)
    question = named.encode(template.source.partition("{")[0], add_special_tokens=False)
    source, target = ExampleEncoder(named, max_source=len(full) - 4, max_target=6)(example)
    assert source == full[:-4] and source[: len(question)] == question
    assert len(target) == 6 and target[-1] == named.eos_token_id


def shorter(talk: Conversation, oldest: int) -> Conversation:
    """The conversation without the entries of its histories before a time."""

    def cut(segments):
        kept = []
        for kind, content in segments:
            if kind == "history":
                content = replace(content, entries=tuple(entry for entry in content.entries if entry[0] >= oldest))
            kept.append((kind, content))
        return kept

    return Conversation(tuple((cut(question), answer) for question, answer in talk.turns), talk.template)


def test_what_cannot_fit_is_said_before_training(named):
    """Long reviews are shown in part; items that leave no room are an error when the mixture is made."""
    data = table_data(["word " * 400] * ITEMS)
    tokenizer = tokenizer_of("byte_level_bpe", ITEMS)
    mixture = language_mixture(data, LanguageEncoder(tokenizer, max_length=1200), dict.fromkeys(FAMILIES, 1.0))
    assert (
        set(mixture.families) == set(FAMILIES)
        and max(len(mixture[n]["input_ids"]) for n in range(len(mixture))) <= 1200
    )
    with pytest.raises(TrainingError, match=r"task family 'review', item 'h\d+' of training row.*raise max_length"):
        language_mixture(data, LanguageEncoder(tokenizer, max_length=100), {"review": 1.0})
    with pytest.raises(TrainingError, match=r"task family 'direct', item 'h\d+'.*the target, item.*raise max_target"):
        task_mixture(data, ExampleEncoder(named, max_target=2), {"direct": 1.0}, packed=False)


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_language_models_lose_whole_items_the_oldest_first(name):
    """The same of causal rows: as many of the newest items, or titles, as there is room for, and nothing else goes."""
    wide = LanguageEncoder(tokenizer_of("byte_level_bpe", ITEMS), max_length=100_000)
    generator, seen = np.random.default_rng(len(name)), set()
    for _ in range(12):
        talks = conversations(name, random_data(generator))
        for place in generator.permutation(len(talks))[:8].tolist():
            talk = talks[place]
            histories = [c for question, _ in talk.turns for kind, c in question if kind == "history"]
            times = sorted({time for history in histories for time, _ in history.entries}) or [0]
            rows = [wide(shorter(talk, time)) for time in times]
            least, most = len(rows[-1].input_ids), len(rows[0].input_ids)
            encoder = LanguageEncoder(wide.tokenizer, max_length=int(generator.integers(least - 3, most + 2)))
            fitting = [row for row in rows if len(row.input_ids) <= encoder.max_length]
            if not fitting:
                with pytest.raises(TrainingError, match=r"row 7: .*raise max_length"):
                    encoder(talk, "row 7")
                continue
            assert encoder(talk, "row 7") == fitting[0]
            seen.add(len(times) > 1 and fitting[0] is not rows[0])
    histories = any(
        {"history", "titles", "liked"} & wording.fields() for wording in [*wordings(name), *language_wordings(name)]
    )
    assert (True in seen) == histories


def test_windows_and_prefixes_hold_whole_items(named):
    """What trains every item of a history at once is cut between items too."""
    names = {tuple(named.item_token_ids(f"h{n}")) for n in range(ITEMS)}
    generator = np.random.default_rng(0)
    data = random_data(generator)
    encoder = ExampleEncoder(named)
    for rows in (WindowRows(data, encoder, 5), PrefixRows(data, encoder, 5)):
        for index in range(len(rows)):
            for row in rows.rows(index, generator):
                assert {tuple(target) for target in row.targets} <= names
                assert all(
                    any(tuple(row.source[seen - n : seen]) in names for n in range(1, 9)) for seen in row.visible
                )
    tokenizer = tokenizer_of("byte_level_bpe", ITEMS)
    causal = LanguageWindowRows(data, LanguageEncoder(tokenizer, max_length=60), window=50)
    pairs = {tuple(tokenizer.item_token_ids(f"h{n}")) for n in range(ITEMS)}
    for index in range(len(causal)):
        labels = [token for token in causal.row(index, generator).labels if token >= 0]
        assert {tuple(labels[n : n + 2]) for n in range(0, len(labels), 2)} <= pairs
