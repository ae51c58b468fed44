"""ColaRec: the four tasks, packed against one prefix at a time, and what the card asks to check (arXiv 2403.18480)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hf_genrec.errors import IncompatibleComponentsError
from hf_genrec.identifiers.tokenization_item import ItemTokenizer
from hf_genrec.models.colarec.configuration_colarec import ColaRecConfig
from hf_genrec.models.colarec.modeling_colarec import ITEM, ColaRecForConditionalGeneration
from hf_genrec.models.t5_packed import prefix_states

ITEMS, LEVELS, CONTENT = 12, 2, 3
SMALL = {
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_heads": 2,
    "num_layers": 1,
    "num_decoder_layers": 1,
    "dropout_rate": 0.0,
}


def _tokenizer() -> ItemTokenizer:
    codes = [[item // 4, item % 4] for item in range(ITEMS)]
    return ItemTokenizer.from_codes([f"i{item}" for item in range(ITEMS)], codes)


def _model(tokenizer: ItemTokenizer, **options) -> ColaRecForConditionalGeneration:
    torch.manual_seed(0)
    config = ColaRecConfig.from_tokenizer(
        tokenizer, content_vocab_size=10, content_length=CONTENT, **(SMALL | {"causal_encoder": True} | options)
    )
    model = ColaRecForConditionalGeneration(config)
    model.set_catalogue(tokenizer.codes)
    content = np.random.default_rng(0).integers(0, 10, (ITEMS, CONTENT))
    content[::3, 2] = -1  # contents of different lengths
    model.set_content(content)
    return model


def _packed(tokenizer: ItemTokenizer, windows: list[list[int]]) -> dict[str, torch.Tensor]:
    from hf_genrec.data.collators import PackedPrefixCollator

    return PackedPrefixCollator(tokenizer)([{"items": np.array(row)} for row in windows])


def test_packed_equals_one_prefix_at_a_time() -> None:
    tokenizer = _tokenizer()
    model = _model(tokenizer, indexing=False, ranking_weight=0.0, contrast_weight=0.0).eval()
    windows = [[0, 5, 3, 9, 7], [2, 8], [11, 1, 4]]
    batch = _packed(tokenizer, windows)
    packed = model(**batch)
    total, labels = 0.0, 0
    for row, window in enumerate(windows):
        for target in range(1, len(window)):
            alone = tokenizer.encode_item_indices([window[:target]], return_tensors="pt")
            label = torch.tensor(np.asarray(tokenizer.item_token_table)[[window[target]]], dtype=torch.long)
            one = model(input_ids=alone["input_ids"], attention_mask=alone["attention_mask"], labels=label)
            torch.testing.assert_close(packed.logits[row, target - 1], one.logits[0], atol=1e-5, rtol=1e-5)
            total, labels = total + one.loss.item() * LEVELS, labels + LEVELS
    assert packed.loss.item() == pytest.approx(total / labels, rel=1e-5)


def test_without_its_own_tasks_the_loss_is_the_cross_entropy() -> None:
    tokenizer = _tokenizer()
    model = _model(tokenizer, indexing=False, ranking_weight=0.0, contrast_weight=0.0, generation_weight=1.0).eval()
    batch = _packed(tokenizer, [[0, 5, 3], [1, 2, 8]])
    output = model(**batch)
    expected = F.cross_entropy(output.logits.flatten(0, 2), batch["labels"].flatten(), ignore_index=-100)
    torch.testing.assert_close(output.loss, expected)


def test_loss_under_gradient_accumulation_is_that_of_the_whole_batch() -> None:
    """All targets indexed, other items fixed by the seed: parts with `num_items_in_batch` sum to the mean of the parts."""
    tokenizer = _tokenizer()
    model = _model(tokenizer, contrast_weight=0.0, ranking_weight=0.0, indexed_items=None).eval()
    parts = [_packed(tokenizer, [[0, 5, 3]]), _packed(tokenizer, [[1, 2, 8]])]
    labels = sum(int((part["labels"] >= 0).sum()) for part in parts)
    torch.manual_seed(1)
    split = sum(float(model(**part, num_items_in_batch=labels).loss) for part in parts)
    torch.manual_seed(1)
    means = [float(model(**part).loss) for part in parts]
    assert split == pytest.approx(sum(means) / 2, rel=1e-5)


def test_search_equals_brute_force_and_generate() -> None:
    tokenizer = _tokenizer()
    model = _model(tokenizer).eval()
    histories = [["i3", "i0", "i7"], ["i11"], []]
    found = model.recommend(histories, tokenizer=tokenizer, k=9, num_beams=ITEMS)
    for history, answers in zip(histories, found):
        batch = tokenizer.encode_histories([history], return_tensors="pt")
        scores = {}
        for item in range(ITEMS):
            if f"i{item}" in history:
                continue
            label = torch.tensor(np.asarray(tokenizer.item_token_table)[[item]], dtype=torch.long)
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=label).logits
            logp = logits.log_softmax(-1).gather(-1, label.unsqueeze(-1)).sum()
            scores[f"i{item}"] = float(logp)
        best = sorted(scores, key=lambda item: -scores[item])
        assert [one.item_id for one in answers] == best[:9]
        assert [one.score for one in answers] == pytest.approx([scores[item] for item in best[:9]], abs=1e-4)

    # plain `generate` reads the encoder's own mask
    batch = tokenizer.encode_histories(histories[:2], return_tensors="pt")
    out = model.generate(**batch, max_new_tokens=LEVELS, num_beams=1, do_sample=False)
    state = model.start_decoding(**batch)
    first = model.score_codes(state, torch.empty(2, 1, 0, dtype=torch.long), 0).argmax(-1)[:, 0]
    assert (out[:, 1] - model.config.level_offsets[0]).tolist() == first.tolist()


def test_item_vectors_start_at_their_own_size() -> None:
    sizes = {"codebook_sizes": [2000], "num_items": 2000, "content_vocab_size": 2000, "d_model": 64}
    model = ColaRecForConditionalGeneration(ColaRecConfig(**sizes, item_embedding_std=0.05))
    stds = [float(table.weight.std()) for table in (model.item_embedding, model.content_embedding, model.shared)]
    assert stds == pytest.approx([0.05, 0.05, 1.0], rel=0.05)


def test_sampled_items() -> None:
    tokenizer = _tokenizer()
    model = _model(tokenizer)
    rows = torch.arange(ITEMS).repeat(200)
    same = model._of_same_cluster(rows)
    assert (same // 4 == rows // 4).all() and (same != rows).all()
    counts = torch.bincount(same[rows == 5], minlength=ITEMS)[[4, 6, 7]]
    assert (counts > 30).all()  # uniform over the other three
    other = model._another(rows, same)
    assert ((other != rows) & (other != same)).all() and len(other.unique()) == ITEMS


def test_heads_are_not_shared_between_levels() -> None:
    tokenizer = _tokenizer()
    model = _model(tokenizer, indexing=False, ranking_weight=0.0, contrast_weight=0.0)
    batch = _packed(tokenizer, [[0, 5]])
    batch["labels"][..., 1] = -100  # only the first level is learned
    model(**batch).loss.backward()
    gradient = model.lm_head.weight.grad
    second = slice(model.config.level_offsets[1], model.config.level_offsets[1] + model.config.codebook_sizes[1])
    first = slice(model.config.level_offsets[0], model.config.level_offsets[0] + model.config.codebook_sizes[0])
    assert gradient[first].abs().sum() > 0 and gradient[second].abs().sum() == 0


@pytest.fixture(scope="module")
def trained() -> dict[bool, ColaRecForConditionalGeneration]:
    """The successor log, learned with and without the indexing task."""
    tokenizer, models = _tokenizer(), {}
    for indexing in (True, False):
        model = _model(tokenizer, indexing=indexing, generation_weight=1.0, d_model=32).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        for _ in range(150):
            starts = torch.randint(ITEMS, (8,)).tolist()
            batch = _packed(tokenizer, [[(start + n) % ITEMS for n in range(6)] for start in starts])
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
        models[indexing] = model.eval()
    return models


def test_indexing_accuracy_needs_its_task(trained) -> None:
    assert trained[True].indexing_accuracy() == 1.0
    assert trained[False].indexing_accuracy() < 0.5


def test_user_state_is_nearer_to_the_target_than_to_others(trained) -> None:
    model, tokenizer = trained[True], _tokenizer()
    batch = tokenizer.encode_histories([[f"i{n}", f"i{n + 1}"] for n in range(9)], return_tensors="pt")
    with torch.no_grad():
        states, mask, _ = model._encode_history(batch["input_ids"], batch["attention_mask"])
        users = prefix_states(states, mask, mask.sum(1, keepdim=True)).squeeze(1)
        items, item_mask, _ = model._encode(torch.arange(ITEMS).unsqueeze(1), ITEM)
        vectors = prefix_states(items, item_mask, item_mask.sum(1, keepdim=True)).squeeze(1)
        scores = users @ vectors.T
    target = torch.arange(9) + 2
    others = torch.ones_like(scores, dtype=torch.bool).scatter_(1, target.unsqueeze(1), False)
    others[torch.arange(9), target - 1] = others[torch.arange(9), target - 2] = False  # the history itself
    margin = (scores[torch.arange(9), target].unsqueeze(1) - scores)[others]
    assert (margin > 0).float().mean() > 0.8


def test_round_trip(tmp_path) -> None:
    from transformers import AutoModelForSeq2SeqLM

    tokenizer = _tokenizer()
    model = _model(tokenizer).eval()
    model.save_pretrained(tmp_path)
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert isinstance(again, ColaRecForConditionalGeneration)
    history = [["i3", "i9"]]
    assert again.recommend(history, tokenizer=tokenizer, k=5) == model.recommend(history, tokenizer=tokenizer, k=5)


def test_bad_input() -> None:
    tokenizer = _tokenizer()
    model = _model(tokenizer)
    with pytest.raises(IncompatibleComponentsError, match="share their codes"):
        model.set_catalogue(np.zeros((ITEMS, LEVELS), int))
    with pytest.raises(IncompatibleComponentsError, match="content_vocab_size"):
        model.set_content(np.full((ITEMS, 2), 10))
    with pytest.raises(IncompatibleComponentsError, match="3 contents"):
        model.set_content(np.zeros((3, 2), int))
    with pytest.raises(IncompatibleComponentsError, match="whole items"):
        model(input_ids=torch.tensor([[4, 9, 5]]), labels=torch.tensor([[6, 11]]))
    with pytest.raises(IncompatibleComponentsError, match="causal_encoder"):
        plain = _model(tokenizer, causal_encoder=False)
        plain(**_packed(tokenizer, [[0, 1, 2]]))
    with pytest.raises(IncompatibleComponentsError, match="num_user_tokens"):
        ColaRecConfig.from_tokenizer(ItemTokenizer.from_codes(["a", "b"], [[0], [1]], num_user_tokens=2))
    with pytest.raises(IncompatibleComponentsError, match="ranking_weight"):
        ColaRecConfig(ranking_weight=-1.0)
