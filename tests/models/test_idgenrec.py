"""IDGenRec: distinct names, the differentiable way from recommender to generator, phases, saving."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import T5ForConditionalGeneration

from hf_genrec.alignment.trainers.joint import alternating_schedule, train_jointly
from hf_genrec.alignment.trainers.text_to_text import train_text_to_text
from hf_genrec.data.collators import PackedPrefixCollator
from hf_genrec.errors import IncompatibleComponentsError, TrainingError
from hf_genrec.generation.trie import ItemTrie
from hf_genrec.identifiers.keywords import (
    keyword_names,
    lengthen,
    text_rows,
    train_word_tokenizer,
    unique_names,
    word_named_tokenizer,
)
from hf_genrec.models.auto import AutoModelForRecommendation, register_auto_classes
from hf_genrec.models.idgenrec.configuration_idgenrec import IDGenRecConfig
from hf_genrec.models.idgenrec.modeling_idgenrec import IDGenRecForConditionalGeneration
from hf_genrec.models.idgenrec.naming import diverse_names

TINY = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2, "num_layers": 1, "num_decoder_layers": 1}
TEXTS = [
    "Toy Story (1995) Animation Comedy", "Toy Story 2 (1999) Animation Comedy", "Heat (1995) Action Crime",
    "Heat Wave (1999) Crime", "Star Wars (1977) Action", "Star Trek (1979) Action", "Star Wars (1977) Action",
    "</s> <pad> (1995) Comedy", "!!!",
]  # fmt: skip
LEVELS = 4


def case(dropout: float = 0.0, **options):
    base = train_word_tokenizer(TEXTS, min_count=1)
    rows = text_rows(base, TEXTS)
    special = base.all_special_ids
    words = [token for token in range(len(base)) if token not in special]
    names = keyword_names([row[row >= 0].tolist() for row in rows], LEVELS - 1, special)
    ids = [f"i{n}" for n in range(len(TEXTS))]
    tokenizer = word_named_tokenizer(base, ids, unique_names(names, words, LEVELS - 1), LEVELS)
    torch.manual_seed(0)
    parts = {"recommender_t5": TINY | {"dropout_rate": dropout}, "generator_t5": TINY | {"dropout_rate": dropout}}
    model = IDGenRecForConditionalGeneration(
        IDGenRecConfig.from_tokenizer(tokenizer, text_tokens=8, **(parts | options))
    )
    model.set_texts(text_rows(tokenizer, TEXTS, 8))
    model.set_catalogue(tokenizer.codes)
    return model.eval(), tokenizer


def packed_batch(tokenizer) -> dict[str, torch.Tensor]:
    return PackedPrefixCollator(tokenizer)([{"items": np.array([0, 5, 7, 2])}, {"items": np.array([3, 4])}])


# ---------------------------------------------------------------------------------------------------------------- names


def test_hostile_text_gives_words_only() -> None:
    base = train_word_tokenizer(TEXTS, min_count=1)
    rows = text_rows(base, ["</s> <pad> <item_end> Toy <unk>", ""])
    allowed = {base.unk_token_id, -1} | {base.get_vocab()[word] for word in ("toy", "s", "pad")}
    assert set(rows.flatten().tolist()) <= allowed


def test_keyword_names_are_distinct_and_coarse_to_fine() -> None:
    _, tokenizer = case()
    assert len(np.unique(tokenizer.codes, axis=0)) == len(TEXTS) and tokenizer.num_levels == LEVELS
    assert tokenizer.codes[4].tolist() != tokenizer.codes[6].tolist()  # the same text
    names = keyword_names([[1, 2, 9], [1, 2, 8], [1, 7]], 2)
    assert names[0] == (2, 9)  # 1 is in every text and says nothing
    with pytest.raises(IncompatibleComponentsError, match="larger vocabulary"):
        lengthen((5,), [5, 6], {(5,), (6,), (5, 6)}, 2)


@pytest.mark.parametrize(("num_names", "rounds"), [(1, 1), (3, 2), (5, 4)])
def test_regenerated_names_have_no_duplicates(num_names, rounds) -> None:
    """By brute force over all pairs, also for equal texts and texts without words; the trie has one leaf per item."""
    model, _ = case()
    codes = model.name_items(num_names=num_names, rounds=rounds)
    rows = codes.tolist()
    assert all(rows[a] != rows[b] for a in range(len(rows)) for b in range(a))
    end = model.config.item_end_token_id
    for row in rows:
        stop = row.index(end)
        assert stop >= 1 and set(row[stop + 1 :]) <= {-1} and not {0, 1, 2, 3, end} & set(row[:stop])
    assert ItemTrie.from_codes(codes, list(model.config.codebook_sizes)).num_leaves == len(TEXTS)
    assert np.array_equal(codes, model.name_items(num_names=num_names, rounds=rounds))


def test_new_items_get_names_that_nobody_has() -> None:
    model, tokenizer = case()
    taken = [tuple(token for token in row if token >= 0)[:-1] for row in tokenizer.codes.tolist()]
    codes = model.name_items(text_rows(tokenizer, TEXTS[:3], 8), taken=taken)
    assert codes.shape == (3, LEVELS)
    assert not {tuple(row) for row in codes.tolist()} & {tuple(row) for row in tokenizer.codes.tolist()}


def test_the_popular_item_chooses_first() -> None:
    model, _ = case()
    for first in (4, 6):  # equal texts, so equal wishes
        priority = np.zeros(len(TEXTS))
        priority[first] = 1
        codes = model.name_items(priority=priority)
        greedy = diverse_names(
            model.generator, model.item_texts[[first]].long(), num_names=1, levels=LEVELS,
            end_token=model.config.item_end_token_id, barred=[0, 1, 2, 3],
        )  # fmt: skip
        assert codes[first].tolist() == greedy[0, 0].tolist()


def test_groups_differ_and_the_first_is_greedy() -> None:
    model, _ = case()
    texts, end = model.item_texts[:2].long(), model.config.item_end_token_id
    options = {"levels": LEVELS, "end_token": end, "barred": [0, 1, 2, 3]}
    plain = diverse_names(model.generator, texts, num_names=3, diversity_penalty=0.0, **options)
    assert torch.equal(plain[:, 0], plain[:, 1])
    spread = diverse_names(model.generator, texts, num_names=3, diversity_penalty=100.0, **options)
    assert torch.equal(spread[:, 0], plain[:, 0])
    assert all(len(set(first)) == 3 for first in spread[:, :, 0].tolist())
    longer = diverse_names(model.generator, texts, num_names=1, min_words=3, **options)
    assert (longer[:, 0, 3] == end).all() and (longer[:, 0, :3] != end).all()


# --------------------------------------------------------------------------------------------------------------- phases


@pytest.mark.parametrize("side", ["tokenizer", "recommender"])
def test_gradient_reaches_the_learning_side_only(side) -> None:
    model, tokenizer = case()
    model.start_phase(side)
    model.train()(**packed_batch(tokenizer)).loss.backward()
    learning, frozen = model.generator, model.recommender
    if side == "recommender":
        learning, frozen = frozen, learning
    assert all(parameter.requires_grad for parameter in learning.parameters())
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert all(parameter.grad is None for parameter in frozen.parameters())
    assert sum(float(p.grad.abs().sum()) for p in learning.parameters() if p.grad is not None) > 0
    assert learning.training and not frozen.training


def test_soft_names_of_a_certain_generator_are_the_words() -> None:
    """A generator that puts all its mass on the present words: soft histories are the hard ones."""
    model, tokenizer = case()
    model.start_phase("tokenizer")
    model.train()
    hard = model.recommender.shared.weight

    class Certain(torch.nn.Module):
        def forward(self, input_ids, attention_mask, decoder_input_ids):
            following = torch.cat([decoder_input_ids[:, 1:], decoder_input_ids[:, :1]], dim=1)
            logits = torch.nn.functional.one_hot(following, hard.shape[0]).float() * 1e4
            return type("Output", (), {"logits": logits})()

        _shift_right = staticmethod(model.generator._shift_right)

    del model.generator
    model.generator = Certain()
    batch = packed_batch(tokenizer)
    from hf_genrec.models.idgenrec.modeling_idgenrec import named_item_numbers

    numbers = named_item_numbers(batch["input_ids"], model.config.item_end_token_id)
    soft = model.soft_histories(batch["input_ids"], batch["attention_mask"], numbers)
    assert torch.allclose(soft, model.recommender.shared(batch["input_ids"]), atol=1e-5)


def test_packed_prefixes_equal_single_ones() -> None:
    model, tokenizer = case()
    packed = model(**packed_batch(tokenizer)).loss
    batch = tokenizer.encode_item_indices([np.array(r) for r in ([0], [0, 5], [0, 5, 7], [3])], return_tensors="pt")
    labels = torch.tensor(np.where(tokenizer.codes[[5, 7, 2, 4]] < 0, -100, tokenizer.codes[[5, 7, 2, 4]])).long()
    single = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
    assert float(packed) == pytest.approx(float(single), abs=1e-5)


def test_without_causal_encoder_it_is_a_stock_t5_over_words() -> None:
    model, tokenizer = case(causal_encoder=False)
    t5 = T5ForConditionalGeneration(model.config.t5_config("recommender")).eval()
    t5.load_state_dict(model.recommender.state_dict())
    batch = tokenizer.encode_item_indices([np.array([0, 5]), np.array([3])], return_tensors="pt")
    labels = torch.tensor(np.where(tokenizer.codes[[7, 4]] < 0, -100, tokenizer.codes[[7, 4]])).long()
    ours = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
    theirs = t5(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_stale_names_are_refused() -> None:
    model, tokenizer = case()
    batch = packed_batch(tokenizer)
    codes = tokenizer.codes.copy()
    codes[0] = codes[0][[1, 0, 2, 3]]
    model.set_catalogue(codes)
    model.start_phase("tokenizer")
    with pytest.raises(IncompatibleComponentsError, match="no item of this index version"):
        model.train()(**batch)


def test_names_change_after_generator_phases_only(tmp_path) -> None:
    from hf_genrec.alignment.trainers.arguments import RecommenderTrainingArguments
    from hf_genrec.data.sequences import Sequences
    from hf_genrec.data.splits import EvaluationSet, Split

    rows = [[(start + step) % len(TEXTS) for step in range(6)] for start in range(len(TEXTS))]
    everything = Sequences.from_rows(rows)
    held = EvaluationSet(np.arange(len(rows)), everything, np.array([(row[-1] + 1) % len(TEXTS) for row in rows]))
    model, tokenizer = case(dropout=0.1)
    seen = []

    def reassign(model, tokenizer):
        seen.append((model.side, model._trie))
        return model.name_items()

    args = RecommenderTrainingArguments(
        output_dir=str(tmp_path), max_history=5, eval_ks=[1, 5, 10], eval_num_beams=9, eval_exclude_seen=False,
        warmup_steps=1, disable_tqdm=True, use_cpu=True, per_device_train_batch_size=4,
    )  # fmt: skip
    schedule = alternating_schedule(2, recommender_epochs=1, final_epochs=1)
    options = {"tokenizer_args": {"learning_rate": 0.05}, "progress": False}
    result = train_jointly(
        model, tokenizer, Split("leave_one_out", everything, held, held, {}), args, schedule, reassign, **options
    )
    history = result.summary["phases"]
    assert [entry["side"] for entry in history] == ["tokenizer", "recommender"] * 2 + ["recommender"]
    assert [entry["codes_changed"] > 0 for entry in history] == [True, False, True, False, False]
    assert [side for side, _ in seen] == ["tokenizer", "tokenizer"]
    assert len({id(trie) for _, trie in seen} | {id(model._trie)}) == 3  # rebuilt after each
    assert len(np.unique(result.tokenizer.codes, axis=0)) == len(TEXTS)
    assert model.config.catalogue_fingerprint == result.tokenizer.catalogue_fingerprint


# ---------------------------------------------------------------------------------------------------------------- saving


def test_saved_model_recommends_and_names_the_same(tmp_path) -> None:
    register_auto_classes()
    model, tokenizer = case()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForRecommendation.from_pretrained(tmp_path).eval()
    histories = [["i0", "i5"], ["i3"], []]
    assert loaded.recommend(histories, tokenizer=tokenizer, k=4) == model.recommend(histories, tokenizer=tokenizer, k=4)
    assert np.array_equal(loaded.name_items(), model.name_items())
    scores = loaded.score_all(histories, tokenizer=tokenizer)
    best = loaded.recommend(histories, tokenizer=tokenizer, k=9, num_beams=9, exclude_seen=False)
    order = [[f"i{n}" for n in row.argsort(descending=True).tolist()] for row in scores]
    assert [[one.item_id for one in row] for row in best] == order


def test_generator_learns_to_write_keywords() -> None:
    model, tokenizer = case()
    texts = model.item_texts.numpy()
    loss = train_text_to_text(
        model.generator, texts, tokenizer.codes, max_steps=150, learning_rate=0.01, progress=False
    )
    assert loss < 0.7
    assert (model.name_items()[:4] == tokenizer.codes[:4]).mean() > 0.8
    with pytest.raises(TrainingError, match="no row"):
        train_text_to_text(model.generator, texts[-1:], tokenizer.codes[-1:], progress=False)


def test_errors_name_the_fix() -> None:
    model, _ = case()
    with pytest.raises(IncompatibleComponentsError, match="unknown side"):
        model.start_phase("both")
    with pytest.raises(IncompatibleComponentsError, match="set_texts"):
        model.set_texts(np.zeros((2, 8)))
    with pytest.raises(IncompatibleComponentsError, match="set_catalogue"):
        model.set_catalogue(np.zeros((2, LEVELS), int))
    with pytest.raises(IncompatibleComponentsError, match="no field of T5Config"):
        IDGenRecConfig(generator_t5={"width": 3})
    with pytest.raises(IncompatibleComponentsError, match="keywords"):
        IDGenRecConfig.from_tokenizer(object())
