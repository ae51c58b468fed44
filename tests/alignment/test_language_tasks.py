"""Mixtures of task families for causal language models: draws, prompts, hostile texts, what alignment tasks are good for."""

from __future__ import annotations

import logging
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from language_cases import (
    CHATML,
    IDS,
    ROWS,
    TEXT_TOKENIZERS,
    TITLES,
    data_with,
    hostile_strings,
    make_tokenizer,
    runs,
)
from transformers import LlamaConfig, LlamaForCausalLM

from hf_genrec.alignment.tasks.families import TaskData
from hf_genrec.alignment.tasks.language_families import LanguageFamily
from hf_genrec.alignment.tasks.language_mixture import (
    language_mixture,
)
from hf_genrec.alignment.tasks.language_rows import LanguageEncoder
from hf_genrec.alignment.tasks.templates_language import (
    LANGUAGE_FAMILIES,
    SERVING_WORDING,
)
from hf_genrec.data.sequences import Sequences
from hf_genrec.errors import TrainingError


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module", params=["plain", "chat"])
def encoder(request, tokenizer):
    return LanguageEncoder(tokenizer, style=request.param, max_length=4096)


# ---------------------------------------------------------------------------------------------------- mixtures


def test_rows_depend_on_seed_epoch_and_index_alone(encoder):
    weights = {**dict.fromkeys(LANGUAGE_FAMILIES, 1.0), "direct": 1.0, "rating": 0.5}

    def mixture():
        return language_mixture(data_with("rating"), encoder, weights, num_candidates=4, windows=True, seed=5)

    first, second = mixture(), mixture()
    before = [first[n] for n in range(len(first))]
    assert before == [second[n] for n in reversed(range(len(second)))][::-1]
    first.set_epoch(1)
    assert before != [first[n] for n in range(len(first))]
    first.set_epoch(0)
    assert before == [first[n] for n in range(len(first))]
    assert {row["family"] for row in before} == set(weights)
    other = language_mixture(data_with("rating"), encoder, weights, num_candidates=4, windows=True, seed=6)
    assert before != [other[n] for n in range(len(other))]
    copy = pickle.loads(pickle.dumps(first))  # noqa: S301 - as data loader workers get it
    assert before == [copy[n] for n in range(len(first))]
    with pytest.raises(IndexError):
        first[len(first)]


def test_weights_are_passes_and_other_rows_come_in_other_epochs(tokenizer):
    encoder = LanguageEncoder(tokenizer)
    mixture = language_mixture(data_with(), encoder, {"next_item": 2.0, "index_to_item:title": 0.3})
    assert mixture.counts == {"next_item": 20, "index_to_item:title": 3} and len(mixture) == len(mixture.lengths) == 23
    targets = Counter(tokenizer.decode([t for t in mixture[n]["labels"] if t >= 0]) for n in range(20))
    wanted = Counter(item for row in ROWS for item in row[1:])
    assert targets == {tokenizer.decode(encoder.item(IDS[item])): 2 * count for item, count in wanted.items()}
    seen = set()
    for epoch in range(40):
        mixture.set_epoch(epoch)
        seen |= {tokenizer.decode([t for t in mixture[n]["labels"] if t >= 0]) for n in range(20, 23)}
    assert len(seen) == 10
    with pytest.raises(TrainingError, match="positive weight"):
        language_mixture(data_with(), encoder, {"next_item": 0.0})


def test_lengths_order_rows_as_their_tokens_do(tokenizer):
    rng = np.random.default_rng(0)
    data = data_with("rating")
    long = TaskData(Sequences.from_rows([rng.integers(0, 10, n).tolist() for n in range(2, 40)]), IDS, TITLES)
    for source, name in ((long, "next_item"), (long, "candidates"), (data, "yes_no")):
        mixture = language_mixture(source, LanguageEncoder(tokenizer, max_length=10_000), {name: 1.0}, num_candidates=4)
        real = np.array([len(mixture[n]["input_ids"]) for n in range(len(mixture))])
        assert np.corrcoef(real, mixture.lengths)[0, 1] > 0.8 and 0.6 < mixture.lengths.mean() / real.mean() < 1.6


def test_families_of_p5_take_part_and_their_histories_fit(tokenizer):
    encoder = LanguageEncoder(tokenizer, max_length=60)
    mixture = language_mixture(data_with("rating"), encoder, {"sequential": 5.0, "direct": 1.0, "rating": 1.0})
    for n in range(len(mixture)):
        row = mixture[n]
        assert len(row["input_ids"]) <= 60
        if row["family"] == "sequential":
            assert tokenizer.decode([t for t in row["labels"] if t >= 0]) in map(
                tokenizer.decode, map(encoder.item, IDS)
            )


def test_a_tokenizer_without_catalogue_speaks_of_titles(caplog):
    plain = TEXT_TOKENIZERS["byte_level_bpe"](pad="<|endoftext|>")
    encoder = LanguageEncoder(plain)
    with caplog.at_level(logging.WARNING):
        mixture = language_mixture(data_with(), encoder, {"fused_history": 1.0, "next_item": 1.0, "direct": 1.0})
    assert set(mixture.families) == {"fused_history"} and "'next_item' is left out" in caplog.text
    assert {w.kind for w in mixture.families["fused_history"].family.wordings} == {"titles_to_title"}
    assert runs(plain, encoder(mixture.families["fused_history"].family.example(0, np.random.default_rng(0)))) == [
        "Title 1<|im_end|>"
    ]


# ---------------------------------------------------------------------------------------------------- hostile texts


def hostile_data(texts: list[str], harmless: bool) -> TaskData:
    """An item per text, every text once a target and in histories; harmless texts of the same kind in its place."""
    blank = [not text.strip() for text in texts]
    shown = ["" if empty else f"t{n}" if harmless else text for n, (text, empty) in enumerate(zip(texts, blank))]
    rows = [list(range(start, min(start + 8, len(texts)))) for start in range(0, len(texts), 8)]
    columns = {"intention": np.array(shown, object), "preference": np.array(shown, object)}
    if len(texts) % 2:  # odd sizes: with ratings
        columns["rating"] = np.resize([5.0, 1.0, 4.0, 3.0], len(texts))
    texts_of_items = {"description": shown, "genres": shown}
    return TaskData(Sequences.from_rows(rows), [f"h{n}" for n in range(len(texts))], shown, columns, texts_of_items)


def forged(tokenizer, style: str, texts: list[str], every: int = 1) -> list[str]:
    """Rows in which hostile texts change the control tokens that harmless ones give."""
    control = set(tokenizer.get_added_vocab().values()) | set(tokenizer.all_special_ids)
    names = list(tokenizer.special_tokens_map.values())
    if names.count(tokenizer.unk_token) == 1:
        control.discard(tokenizer.unk_token_id)
    encoder = LanguageEncoder(tokenizer, style=style, max_length=1_000_000)
    found = []
    for name in LANGUAGE_FAMILIES:
        pair = [
            LanguageFamily(name, hostile_data(texts, harmless), max_history=8, num_candidates=4)
            for harmless in (False, True)
        ]
        assert pair[0].units.tolist() == pair[1].units.tolist()
        # families about histories show up to eight texts per row: every so-many-th row is enough to show all of them
        step = 1 if pair[0].about_items else every
        for index in range(step - 1, len(pair[0]), step):
            rows = [encoder(family.example(index, np.random.default_rng(index))) for family in pair]
            written = [[token for token in row.input_ids if token in control] for row in rows]
            if written[0] != written[1]:
                found.append(f"{name} {index}")
    return found


def hostile_tokenizer(name: str, number: int):
    codes = [[n // 100, n % 100] for n in range(number)]
    return make_tokenizer(name, CHATML, [f"h{n}" for n in range(number)], codes)


@pytest.mark.parametrize("style", ["plain", "chat"])
def test_ten_thousand_hostile_titles_forge_nothing(style):
    texts = hostile_strings(["<|im_start|>", "<|im_end|>", "<a_1>", "<b_7>"], 10_000)
    assert forged(hostile_tokenizer("merged_marker_bpe", 10_000), style, texts, every=7) == []


# ---------------------------------------------------------------------------------------------------- training


def fitted(
    weights: dict[str, float], tokenizer, data: TaskData, steps: int
) -> tuple[LlamaForCausalLM, LanguageEncoder]:
    """A tiny language model trained on the rows of a mixture."""
    encoder = LanguageEncoder(tokenizer)
    mixture = language_mixture(data, encoder, weights, windows=True)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    order = np.random.default_rng(0)
    for step in range(steps):
        mixture.set_epoch(step)
        rows = [mixture[index] for index in order.permutation(len(mixture))[:16].tolist()]
        width = max(len(row["input_ids"]) for row in rows)
        ids = torch.tensor(
            [row["input_ids"] + [tokenizer.pad_token_id] * (width - len(row["input_ids"])) for row in rows]
        )
        labels = torch.tensor([row["labels"] + [-100] * (width - len(row["labels"])) for row in rows])
        mask = torch.arange(width) < torch.tensor([len(row["input_ids"]) for row in rows])[:, None]
        optimizer.zero_grad()
        model(input_ids=ids, attention_mask=mask.long(), labels=labels).loss.backward()
        optimizer.step()
    return model.eval(), encoder


def exact(model, encoder, talks) -> float:
    """Share of answers that greedy decoding writes exactly."""
    hits = []
    for talk in talks:
        row, prompt = encoder(talk), encoder.prompt(talk)
        answer = row.input_ids[len(prompt) :]
        with torch.no_grad():
            written = model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt)),
                max_new_tokens=len(answer),
                do_sample=False,
            )
        hits.append(written[0, len(prompt) :].tolist() == answer)
    return float(np.mean(hits))


@pytest.mark.slow
def test_without_the_alignment_tasks_titles_do_not_find_their_items():
    """CHECK of the LC-Rec card: item_to_index goes from about 1 to about 0, next items stay."""
    number = 12
    ids = [f"s{n}" for n in range(number)]
    words = ["quick", "brown", "fox", "lazy", "dog", "happy", "films", "person", "system", "watch", "Berlin", "friends"]
    tokenizer = make_tokenizer(ids=ids, codes=[[n // 4, n % 4] for n in range(number)])
    data = TaskData(Sequences.from_rows([[(s + n) % number for n in range(8)] for s in range(number)]), ids, words)
    scores = {}
    for name, weights in {"both": {"next_item": 1.0, "item_to_index": 2.0}, "alone": {"next_item": 1.0}}.items():
        model, encoder = fitted(weights, tokenizer, data, 150)
        found = LanguageFamily("item_to_index", data)
        follow = LanguageFamily("next_item", data)
        wording, serving = found.wordings[0], SERVING_WORDING
        scores[name] = (
            exact(model, encoder, [found.example(i, np.random.default_rng(0), wording) for i in range(number)]),
            exact(
                model, encoder, [follow.example(i, np.random.default_rng(0), serving) for i in range(0, len(follow), 7)]
            ),
        )
    assert scores["both"][0] >= 0.9 and scores["alone"][0] <= 0.2
    assert scores["both"][1] >= 0.9 and scores["alone"][1] >= 0.9
