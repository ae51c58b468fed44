"""The table of searches: names, options and needs are checked; random searches are seeded by the user's row."""

from __future__ import annotations

import pytest
import torch

from hf_genrec.errors import IncompatibleComponentsError, RequestError
from hf_genrec.generation.configuration_recommendation import RecommendationConfig
from hf_genrec.generation.strategies import DECODING_STRATEGIES, resolve_strategy
from hf_genrec.identifiers.tokenization_item import ItemTokenizer

SIZES = (6, 5, 4)
GENERAL = ("beam", "sample", "diverse_beam", "exhaustive", "certified")  # for every model with score_codes


@pytest.fixture
def tokenizer(random_codes):
    codes = random_codes(60, SIZES, seed=11)
    return ItemTokenizer.from_codes([f"item-{i}" for i in range(60)], codes, codebook_sizes=SIZES)


def test_every_line_of_the_table_loads():
    assert all(callable(strategy.load()) for strategy in DECODING_STRATEGIES.values())


def test_unknown_names_and_options(table_model, tokenizer):
    model, histories = table_model(SIZES), [["item-1"]]
    with pytest.raises(RequestError, match="unknown decoding 'beem'; did you mean 'beam'"):
        model.recommend(histories, tokenizer=tokenizer, decoding="beem")
    with pytest.raises(RequestError, match="decoding 'sample' has no option 'temprature'; it takes temperature, seed"):
        model.recommend(histories, tokenizer=tokenizer, decoding="sample", decoding_options={"temprature": 1.0})
    with pytest.raises(RequestError, match="seed must be a whole number, got 'x'"):
        model.recommend(histories, tokenizer=tokenizer, decoding="sample", decoding_options={"seed": "x"})
    with pytest.raises(IncompatibleComponentsError, match="TableModel has no score_digits, which decoding 'parallel'"):
        resolve_strategy(model, RecommendationConfig(decoding="parallel"))


@pytest.mark.parametrize("decoding", GENERAL)
@pytest.mark.parametrize("num_items", [1, 2, 4, 100])
def test_valid_distinct_and_the_same_alone(decoding, num_items, table_model, random_codes):
    """Every search, catalogues of 1, 2, beams - 1 and many items: legal distinct items, a batch like each user alone."""
    codes = random_codes(num_items, SIZES, seed=num_items)
    ids = [f"item-{i}" for i in range(num_items)]
    tokenizer = ItemTokenizer.from_codes(ids, codes, codebook_sizes=SIZES)
    model = table_model(SIZES)
    histories = [["item-0"], [ids[-1], ids[0]], [ids[num_items // 2]]]
    options = {"num_beams": 5, "k": min(5, num_items), "decoding": decoding}
    batch = model.recommend(histories, tokenizer=tokenizer, **options)
    for row, history in enumerate(histories):
        found = [entry.item_id for entry in batch[row]]
        left = set(ids) - set(history)
        assert len(found) == len(set(found)) and set(found) <= left
        # groups of diverse beams look for fewer items each; all other searches find all there are
        assert len(found) == min(options["k"], len(left)) or (decoding == "diverse_beam" and (found or not left))
        seed = {"decoding_options": {"seed": row}} if decoding == "sample" else {}
        alone = model.recommend([history], tokenizer=tokenizer, **options, **seed)[0]
        assert [entry.item_id for entry in alone] == found
        assert [entry.score for entry in alone] == pytest.approx([entry.score for entry in batch[row]], abs=1e-4)


def test_rows_of_later_batches_are_seeded_on(table_model, tokenizer):
    model, histories = table_model(SIZES), [["item-1"]] * 5
    whole = model.recommend(histories, tokenizer=tokenizer, decoding="sample", k=6)
    parts = model.recommend(histories, tokenizer=tokenizer, decoding="sample", k=6, batch_size=2)
    assert whole == parts and len({tuple(entry.item_id for entry in row) for row in whole}) > 1


def test_lossless_searches_agree_with_exact_scores(table_model, tokenizer):
    model, histories = table_model(SIZES), [["item-1"], ["item-2", "item-9"]]
    exact = model.score_all(histories, tokenizer=tokenizer)
    for decoding in ("exhaustive", "certified"):
        found = model.recommend(
            histories, tokenizer=tokenizer, decoding=decoding, k=10, num_beams=10, exclude_seen=False
        )
        for row, scores in zip(found, exact, strict=True):
            assert [entry.score for entry in row] == pytest.approx(scores.topk(10).values.tolist(), abs=1e-5)


def test_another_decoding_drops_the_options_of_the_saved_one(table_model, tokenizer, tmp_path):
    config = RecommendationConfig(decoding="sample", decoding_options={"seed": 3})
    config.save_pretrained(tmp_path)
    assert RecommendationConfig.from_pretrained(tmp_path) == config
    assert config.merged(decoding="beam").decoding_options == {}
    assert config.merged(k=3).decoding_options == {"seed": 3}
    with pytest.raises(RequestError, match="decoding_options must map names"):
        RecommendationConfig(decoding_options=[1])
    with pytest.raises(RequestError, match="decoding must be the name"):
        RecommendationConfig(decoding="")
    model = table_model(SIZES)
    model.recommendation_config = config
    assert (
        torch.tensor([entry.score for entry in model.recommend([["item-1"]], tokenizer=tokenizer, decoding="beam")[0]])
        .diff()
        .le(0)
        .all()
    )


@pytest.mark.parametrize("decoding", GENERAL)
def test_a_hundred_thousand_items(decoding, table_model, random_codes):
    sizes = (64, 64, 64)
    codes = random_codes(100_000, sizes, seed=7)
    ids = [str(i) for i in range(100_000)]
    tokenizer = ItemTokenizer.from_codes(ids, codes, codebook_sizes=sizes)
    model = table_model(sizes)
    histories = [["5", "99999"], ["31"]]
    allowed = [str(i) for i in range(0, 100_000, 7)]
    options = {"num_beams": 20, "k": 20, "decoding": decoding, "allowed_items": allowed}
    batch = model.recommend(histories, tokenizer=tokenizer, **options)
    for row, history in enumerate(histories):
        found = [entry.item_id for entry in batch[row]]
        assert len(found) == len(set(found)) == 20 and set(found) <= set(allowed) - set(history)
        seed = {"decoding_options": {"seed": row}} if decoding == "sample" else {}
        alone = model.recommend([history], tokenizer=tokenizer, **options, **seed)[0]
        assert [entry.item_id for entry in alone] == found
