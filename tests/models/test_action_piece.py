"""ActionPiece's T5: plain T5 on one segmentation, ensembles, packed stretches, set permutation in training."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, T5Config, T5ForConditionalGeneration

import hf_genrec
from hf_genrec.alignment.trainers.set_permutation import SetPermutationCollator
from hf_genrec.data.collators import PrefixCollator
from hf_genrec.errors import IncompatibleComponentsError
from hf_genrec.generation.fusion import discounted_rank
from hf_genrec.identifiers.extend import extend_tokenizer
from hf_genrec.identifiers.tokenization_action_piece import ActionPieceTokenizer
from hf_genrec.identifiers.tokenization_item import ItemTokenizer
from hf_genrec.models.action_piece.configuration_action_piece import ActionPieceConfig
from hf_genrec.models.action_piece.modeling_action_piece import ActionPieceForConditionalGeneration

N, SIZES = 30, [5, 5, 30]
SMALL = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_decoder_layers": 1, "num_heads": 2}


@pytest.fixture(scope="module")
def tokenizer():
    rng = np.random.default_rng(0)
    features = np.column_stack([rng.integers(0, 5, (N, 2)), np.arange(N)])
    ids = [f"i{n}" for n in range(N)]
    walks = [[ids[(start + step) % N] for step in range(6)] for start in rng.integers(0, N, 80)]
    return ActionPieceTokenizer.train(ids, features, walks, feature_sizes=SIZES, vocabulary_size=120)


def model_of(tokenizer, **options):
    torch.manual_seed(0)
    return ActionPieceForConditionalGeneration(ActionPieceConfig.from_tokenizer(tokenizer, **SMALL, **options)).eval()


HISTORIES = [["i1", "i2", "i3", "i4"], ["i9", "i10"], ["i20"]]


def test_one_segmentation_is_plain_t5(tokenizer):
    model = model_of(tokenizer)
    names = set(T5Config().to_dict()) | {"decoder_start_token_id", "pad_token_id"}
    plain = T5ForConditionalGeneration(
        T5Config(**{k: v for k, v in model.config.to_dict().items() if k in names})
    ).eval()
    plain.load_state_dict(model.state_dict())
    batch = tokenizer.encode_histories(HISTORIES, return_tensors="pt")
    table = tokenizer.item_token_table[[4, 11, 21]]
    labels = torch.as_tensor(np.where(table < 0, -100, table))
    ours, theirs = model(**batch, labels=labels), plain(**batch, labels=labels)
    assert torch.equal(ours.logits, theirs.logits) and torch.allclose(ours.loss, theirs.loss)
    count = int((labels >= 0).sum())
    assert torch.allclose(model(**batch, labels=labels, num_items_in_batch=2 * count).loss, ours.loss / 2)
    found = model.recommend(HISTORIES, tokenizer=tokenizer, k=5, num_beams=N)
    expected = hf_genrec.recommend(plain, HISTORIES, tokenizer=tokenizer, k=5, num_beams=N)
    assert [[r.item_id for r in row] for row in found] == [[r.item_id for r in row] for row in expected]


@pytest.fixture
def several(tokenizer):
    some = copy.deepcopy(tokenizer)
    some.segmentations = 3
    return some


def test_ensemble_adds_discounted_ranks_of_its_segmentations(tokenizer, several):
    model = model_of(tokenizer)
    options = {"k": 6, "num_beams": 8}
    found = model.recommend(HISTORIES, tokenizer=several, decoding="segmentation_ensemble", **options)
    encoded = tokenizer.encode_ensemble(HISTORIES, segmentations=3, seed=0, return_tensors="pt")
    for row, history in enumerate(HISTORIES):
        total: dict[str, float] = {}
        for draw in range(3):
            ids, mask = (encoded[name][3 * row + draw][None] for name in ("input_ids", "attention_mask"))
            one = hf_genrec.recommend(
                model, [history], ids, mask, tokenizer=tokenizer, k=8, num_beams=8, exclude_seen=True
            )
            for rank, recommendation in enumerate(one[0], start=1):
                total[recommendation.item_id] = total.get(recommendation.item_id, 0) + 1 / math.log2(rank + 1)
        assert [r.score for r in found[row]] == pytest.approx(sorted(total.values(), reverse=True)[:6])
        assert all(total[r.item_id] == pytest.approx(r.score) for r in found[row])


def test_ensemble_of_one_is_the_single_segmentation(tokenizer):
    model = model_of(tokenizer)
    single = model.recommend(HISTORIES, tokenizer=tokenizer, k=6)
    assert model.recommend(HISTORIES, tokenizer=tokenizer, k=6, decoding="segmentation_ensemble") == single
    items, scores = torch.tensor([[4, 2, 7]]), torch.tensor([[-0.5, -1.0, -3.0]])
    assert discounted_rank([(items, scores)])[0].tolist() == items.tolist()


def test_encodings_of_several_segmentations(tokenizer, several):
    for histories in (HISTORIES, [[]]):
        encoded = several.encode_histories(histories, return_tensors="pt")
        flat = tokenizer.encode_ensemble(histories, segmentations=3, seed=0, return_tensors="pt")
        assert encoded["input_ids"].shape[:2] == (len(histories), 3)
        assert torch.equal(encoded["input_ids"].flatten(0, 1), flat["input_ids"])
    nested = several.encode_histories(HISTORIES, padding=False)["input_ids"]
    assert [len(row) for row in nested] == [3, 3, 3]
    assert several.decode_histories(several.encode_histories([["i5"]], return_tensors="pt")["input_ids"]) == [["i5"]]
    with pytest.raises(IncompatibleComponentsError, match="segmentations is 0"):
        ActionPieceTokenizer.from_features(["a"], [[0, 0]], segmentations=0)


def test_one_search_cannot_read_several_segmentations(tokenizer, several):
    with pytest.raises(IncompatibleComponentsError, match="segmentation_ensemble"):
        model_of(tokenizer).recommend(HISTORIES, tokenizer=several, k=3)
    plain = T5ForConditionalGeneration(T5Config(vocab_size=len(tokenizer), decoder_start_token_id=0, **SMALL)).eval()
    with pytest.raises(IncompatibleComponentsError, match=r"segmentations = 1"):
        hf_genrec.recommend(plain, HISTORIES, tokenizer=several, k=3)


def test_packed_targets_equal_single_ones(tokenizer):
    model = model_of(tokenizer, causal_encoder=True)
    collator = SetPermutationCollator(tokenizer, seed=3, stretch=2.0)
    windows = [np.arange(3, 12), np.arange(20, 24), np.array([7, 8])]
    batch = collator([{"items": window} for window in windows])
    output = model(**batch)
    full = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        decoder_input_ids=model._shift_right(batch["labels"]),
        history_lengths=batch["history_lengths"],
    ).logits
    labelled = batch["labels"] >= 0
    assert torch.allclose(output.logits, full[labelled], atol=1e-5)
    total, checked = 0.0, 0
    for b, window in enumerate(windows):
        tokens = batch["input_ids"][b][batch["attention_mask"][b] == 1]
        for t, place in enumerate(collator.target_places(window)):
            length = int(batch["history_lengths"][b, t])
            labels = batch["labels"][b, t][None]
            alone = model(input_ids=tokens[:length][None], labels=labels)
            assert torch.allclose(alone.logits[0], full[b, t], atol=1e-4)
            # the tokens before the cut spell exactly the items before the target
            spelled = tokenizer.decode_histories([tokens[:length].tolist()])[0]
            assert sorted(spelled) == sorted(tokenizer.item_ids[n] for n in window[:place])
            assert labels[labels >= 0].tolist() == tokenizer.item_token_ids(tokenizer.item_ids[window[place]])
            total += float(alone.loss) * int((labels >= 0).sum())
            checked += 1
    assert checked > 5 and float(output.loss) == pytest.approx(total / int(labelled.sum()), abs=1e-4)
    assert SetPermutationCollator(tokenizer, stretch=1).target_places(np.arange(5)) == [1, 2, 3, 4]
    with pytest.raises(IncompatibleComponentsError, match="causal_encoder=True"):
        model_of(tokenizer)(**batch)


def test_every_epoch_has_its_own_segmentation(tokenizer):
    collator = SetPermutationCollator(tokenizer, seed=1)
    samples = [{"items": np.arange(n, n + 8), "target": n + 8} for n in range(10)]
    first = collator(samples)["input_ids"]
    assert torch.equal(collator(samples)["input_ids"], first)
    collator.set_epoch(1)
    assert collator(samples)["input_ids"].tolist() != first.tolist()
    collator.set_epoch(0)
    assert torch.equal(collator(samples)["input_ids"], first)
    assert tokenizer._segmentation_seed is None  # the tokenizer itself goes on as before
    off, plain = SetPermutationCollator(tokenizer, permute=False)(samples), PrefixCollator(tokenizer)(samples)
    assert all(torch.equal(off[name], plain[name]) for name in plain)
    with pytest.raises(IncompatibleComponentsError, match="ActionPieceTokenizer"):
        SetPermutationCollator(ItemTokenizer.from_codes(["a"], [[0, 0]]))


def test_saved_and_loaded(tokenizer, tmp_path):
    model = model_of(tokenizer, causal_encoder=True)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert type(loaded) is ActionPieceForConditionalGeneration
    assert loaded.recommend(HISTORIES, tokenizer=tokenizer, k=4) == model.recommend(HISTORIES, tokenizer=tokenizer, k=4)


def test_sizes_that_do_not_fit_are_named():
    with pytest.raises(IncompatibleComponentsError, match="from_tokenizer"):
        ActionPieceConfig(codebook_sizes=[30, 30], level_offsets=[0], **SMALL)
    with pytest.raises(IncompatibleComponentsError, match="vocab_size 20"):
        ActionPieceConfig(codebook_sizes=[30], vocab_size=20, **SMALL)


def test_items_in_a_prompt_are_seen_whatever_their_segmentation(tokenizer):
    model = model_of(tokenizer)
    for seed in (None, 5):
        own = copy.deepcopy(tokenizer)
        own.resegment(seed)
        batch = own.encode_histories([["i1", "i2", "i3"], ["i7"]], return_tensors="pt")
        found = hf_genrec.recommend(
            model, None, batch["input_ids"], batch["attention_mask"], tokenizer=own, k=N, num_beams=2 * N
        )
        for row, seen in zip(found, (["i1", "i2", "i3"], ["i7"])):
            assert {r.item_id for r in row} == set(own.item_ids) - set(seen)


def test_merged_tokens_are_refused_in_a_text_tokenizer(tokenizer):
    from hf_genrec.identifiers.text_vocabulary import train_text_tokenizer

    base = train_text_tokenizer(["some words to learn from"], 300)
    with pytest.raises(IncompatibleComponentsError, match="start at token 0"):
        extend_tokenizer(base, tokenizer)
