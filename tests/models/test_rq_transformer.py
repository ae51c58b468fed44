"""RQ-Transformer: identities, brute force over small catalogues, and the successor catalogue."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_genrec
from hf_genrec import ItemTokenizer, ItemTrieLogitsProcessor, RQTransformerConfig, RQTransformerForCausalLM
from hf_genrec.errors import IncompatibleComponentsError
from hf_genrec.generation.trie import ItemTrie

ITEMS = 40


def _tokenizer(num_items: int = ITEMS, sizes: tuple[int, ...] = (4, 4, 4), seed: int = 0) -> ItemTokenizer:
    every = np.array(list(itertools.product(*(range(size) for size in sizes))))
    codes = every[np.random.default_rng(seed).permutation(len(every))[:num_items]]
    return ItemTokenizer.from_codes([f"i{n}" for n in range(num_items)], codes, codebook_sizes=sizes)


def _model(tokenizer: ItemTokenizer, features: int = 5, seed: int = 0, **options) -> RQTransformerForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 8}
    config = RQTransformerConfig.from_tokenizer(tokenizer, item_feature_dim=features, **(sizes | options))
    model = RQTransformerForCausalLM(config).eval()
    generator = np.random.default_rng(seed)
    model.set_catalogue(tokenizer.codes, generator.normal(size=(tokenizer.num_items, features)))
    for parameter in model.parameters():  # away from the symmetric start, so that nothing is equal by accident
        parameter.data.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed + 1)) * 0.1)
    return model


def _batch(tokenizer: ItemTokenizer, rows: list[list[int]]) -> dict[str, torch.Tensor]:
    batch = tokenizer.encode_item_indices([np.array(row) for row in rows], return_tensors="pt")
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def _labels(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)


HISTORIES = [[3, 7, 1, 3], [5], [9, 2, 30, 31, 8, 2]]


def test_loss_is_minus_the_log_probability_of_score_all() -> None:
    tokenizer = _tokenizer()
    model = _model(tokenizer, dense_head=False)
    row = [3, 7, 1, 3, 12]
    batch = _batch(tokenizer, [row])
    total = 0.0
    for end in range(len(row)):
        history = _batch(tokenizer, [row[:end]]) if end else {k: v[:, :0] for k, v in batch.items()}
        total -= model.score_all(**history, tokenizer=tokenizer)[0, row[end]].item()
    loss = model(**batch, labels=_labels(batch)).loss.item()
    assert loss == pytest.approx(total / len(row), abs=1e-5)


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_dense_loss_is_minus_the_log_probability_of_score_dense(similarity: str) -> None:
    tokenizer = _tokenizer()
    model = _model(tokenizer, dense_similarity=similarity, norm_first=similarity == "cosine")
    row = [3, 7, 1, 3, 12]
    batch = _batch(tokenizer, [row])
    expected = [
        -model.score_dense(model.start_decoding(*(v[:, : end * 3] for v in batch.values())))[0, row[end]].item()
        for end in range(len(row))
    ]
    output = model(**batch, labels=_labels(batch))
    assert output.dense_loss.item() == pytest.approx(np.mean(expected), abs=1e-5)
    assert output.loss.item() == pytest.approx(output.code_loss.item() + output.dense_loss.item(), abs=1e-5)


def test_padding_side_and_batch_do_not_matter() -> None:
    tokenizer = _tokenizer()
    model = _model(tokenizer)
    left = _batch(tokenizer, HISTORIES)
    together = model.score_all(**left, tokenizer=tokenizer)
    right = {key: torch.zeros_like(value) for key, value in left.items()}
    for row, history in enumerate(HISTORIES):
        alone = _batch(tokenizer, [history])
        assert torch.allclose(model.score_all(**alone, tokenizer=tokenizer)[0], together[row], atol=1e-5)
        for key in right:
            right[key][row, : alone[key].shape[1]] = alone[key][0]
    assert torch.allclose(model.score_all(**right, tokenizer=tokenizer), together, atol=1e-5)
    losses = [model(**batch, labels=_labels(batch)).loss.item() for batch in (left, right)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_history_longer_than_the_window_reads_the_newest_items_but_remembers_all_seen() -> None:
    tokenizer = _tokenizer()
    model = _model(tokenizer, learn_repeat_weight=False)
    long, newest = _batch(tokenizer, [list(range(20))]), _batch(tokenizer, [list(range(12, 20))])
    assert torch.allclose(
        model.score_all(**long, tokenizer=tokenizer), model.score_all(**newest, tokenizer=tokenizer), atol=1e-6
    )
    repeating = _model(tokenizer)
    dense = [repeating.score_dense(repeating.start_decoding(**batch)) for batch in (long, newest)]
    assert not torch.allclose(*dense)


def test_repeat_weight_zero_is_the_model_without_it() -> None:
    tokenizer = _tokenizer()
    model, plain = _model(tokenizer), _model(tokenizer, learn_repeat_weight=False)
    model.depth.repeat_weight.data.zero_()
    model.dense.repeat_weight.data.zero_()
    batch = _batch(tokenizer, HISTORIES)
    outputs = [m(**batch, labels=_labels(batch)).loss for m in (model, plain)]
    assert torch.allclose(*outputs)
    assert torch.allclose(*(m.score_all(**batch, tokenizer=tokenizer) for m in (model, plain)))


@pytest.mark.parametrize("weight", [-0.4, 0.2])
def test_repeat_weight_is_exact_where_items_are_equally_likely(weight: float) -> None:
    """A full tree and constant logits: a seen item must be exactly exp(a) times as likely as an unseen one."""
    from hf_genrec.models.rq_transformer.modeling_rq_transformer import REPEAT_GAIN

    tokenizer = _tokenizer(27, (3, 3, 3))
    model = _model(tokenizer)
    model.depth.code_head.weight.data.zero_()
    model.depth.code_head.bias.data.zero_()
    model.depth.repeat_weight.data.fill_(weight)
    history = [4, 4, 9, 20]
    logp = model.score_all(**_batch(tokenizer, [history]), tokenizer=tokenizer)[0]
    expected = torch.zeros(27)
    expected[[4, 9, 20]] = REPEAT_GAIN * weight
    assert torch.allclose(logp, expected.log_softmax(0), atol=1e-4)


def test_repeat_term_by_history_and_by_node_agree() -> None:
    tokenizer = _tokenizer()
    model = _model(tokenizer)
    state = model.start_decoding(**_batch(tokenizer, HISTORIES))
    trie = ItemTrie.from_tokenizer(tokenizer)
    for level in range(3):
        prefixes = trie.node_prefixes(level).unsqueeze(0).expand(3, -1, -1)
        many = model.score_codes(state, prefixes, level)
        for beam in range(prefixes.shape[1]):
            one = model.score_codes(state, prefixes[:, beam : beam + 1], level)
            assert torch.allclose(one[:, 0], many[:, beam], atol=1e-5)


def test_recommend_equals_generate_with_the_trie_processor() -> None:
    tokenizer = _tokenizer()
    model = _model(tokenizer, dense_head=False)
    histories = [[tokenizer.item_ids[i] for i in row] for row in HISTORIES]
    ours = model.recommend(histories, tokenizer=tokenizer, k=5, num_beams=10, exclude_seen=False)
    batch = _batch(tokenizer, HISTORIES)
    processor = ItemTrieLogitsProcessor(tokenizer, prompt_length=batch["input_ids"].shape[1])
    generated = model.generate(
        **batch,
        num_beams=10,
        num_return_sequences=5,
        max_new_tokens=3,
        do_sample=False,
        length_penalty=0.0,
        logits_processor=[processor],
        return_dict_in_generate=True,
        output_scores=True,
    )
    for row, answer in enumerate(ours):
        tokens = generated.sequences[row * 5 : row * 5 + 5, -3:]
        items = [tokenizer.token_ids_to_items(line.tolist())[0] for line in tokens]
        assert [[r.item_id] for r in answer] == [list(item) for item in items]
        scores = generated.sequences_scores[row * 5 : row * 5 + 5]
        assert [r.score for r in answer] == pytest.approx(scores.tolist(), abs=1e-4)


def test_wide_beam_is_exact_and_dense_weight_one_ranks_by_the_dense_head() -> None:
    tokenizer = _tokenizer()
    model = _model(tokenizer)
    batch = _batch(tokenizer, HISTORIES)
    trie = ItemTrie.from_tokenizer(tokenizer)
    items, scores = model.recommend_indices(**batch, trie=trie, k=10, num_beams=ITEMS)
    exact = model.score_all(**batch, tokenizer=tokenizer)
    best = exact.topk(10, dim=1)
    assert torch.equal(items, best.indices) and torch.allclose(scores, best.values, atol=1e-5)
    config = model.recommendation_config.merged(dense_weight=1.0)
    items, _ = model.recommend_indices(**batch, trie=trie, k=10, num_beams=ITEMS, config=config)
    assert torch.equal(items, model.score_dense(model.start_decoding(**batch)).topk(10, dim=1).indices)


def test_gradient_accumulation_leaves_the_gradient_unchanged() -> None:
    tokenizer = _tokenizer()
    gradients = []
    for rows in ([HISTORIES], [HISTORIES[:1], HISTORIES[1:]]):
        model = _model(tokenizer)
        count = sum(len(row) for row in HISTORIES) * 3
        for part in rows:
            batch = _batch(tokenizer, part)
            model(**batch, labels=_labels(batch), num_items_in_batch=torch.tensor(count)).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert torch.allclose(*gradients, atol=1e-6)


def test_save_and_load_keep_catalogue_and_recommendations(tmp_path) -> None:
    tokenizer = _tokenizer()
    model = _model(tokenizer)
    model.recommendation_config = model.recommendation_config.merged(dense_weight=0.5, num_beams=20)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    histories = [["i3", "i7"], []]
    pairs = zip(
        again.recommend(histories, tokenizer=loaded), model.recommend(histories, tokenizer=tokenizer), strict=True
    )
    for ours, theirs in pairs:
        assert [r.item_id for r in ours] == [r.item_id for r in theirs]
        assert [r.score for r in ours] == pytest.approx([r.score for r in theirs], abs=1e-5)
    assert isinstance(again, RQTransformerForCausalLM) and again.recommendation_config.dense_weight == 0.5


def test_codes_shared_by_items_are_expanded() -> None:
    tokenizer = ItemTokenizer.from_codes(["a", "b", "c"], [[0, 0], [0, 0], [1, 1]])
    model = _model(tokenizer, max_position_embeddings=4)
    answer = model.recommend([["c"]], tokenizer=tokenizer, k=3, exclude_seen=True)[0]
    assert sorted(r.item_id for r in answer) == ["a", "b"]


def test_wrong_shapes_are_typed_errors() -> None:
    tokenizer = _tokenizer()
    model = _model(tokenizer)
    with pytest.raises(IncompatibleComponentsError, match="item_codes has shape"):
        model.set_catalogue(tokenizer.codes[:5])
    with pytest.raises(IncompatibleComponentsError, match="item_feature_dim=9"):
        model.set_catalogue(tokenizer.codes, np.zeros((ITEMS, 9)))
    with pytest.raises(IncompatibleComponentsError, match="multiple"):
        RQTransformerConfig.from_tokenizer(tokenizer, hidden_size=10, num_attention_heads=4)
    with pytest.raises(IncompatibleComponentsError, match="cosine"):
        RQTransformerConfig.from_tokenizer(tokenizer, dense_similarity="angle")
    with pytest.raises(IncompatibleComponentsError):
        model.recommend([["i0"]], tokenizer=_tokenizer(seed=3))


def test_an_item_never_trained_on_is_scored_by_its_codes_and_features() -> None:
    """Cold items: with a free item vector of 0, equal codes and features give equal scores up to the item's own bias."""
    tokenizer = ItemTokenizer.from_codes(["a", "b", "cold"], [[0, 0], [1, 1], [0, 0]])
    model = _model(tokenizer, features=3)
    model.model.item_features[2] = model.model.item_features[0]
    model.model.item_embedding.weight.data.zero_()
    model.dense.item_bias.data.zero_()
    batch = tokenizer.encode_histories([["b"]], return_tensors="pt")
    dense = model.score_dense(model.start_decoding(batch["input_ids"], batch["attention_mask"]))[0]
    assert dense[0].item() == pytest.approx(dense[2].item(), abs=1e-6) and dense[0].item() != dense[1].item()


def test_inductive_dense_head_knows_content_only_and_leaves_cold_items_out(tmp_path) -> None:
    tokenizer = _tokenizer()
    plain = _model(tokenizer)
    assert plain.cold_items is None and not any("cold" in name for name in plain.state_dict())
    model = _model(tokenizer, inductive_dense_head=True, dense_similarity="cosine")
    counts = np.ones(ITEMS, int)
    counts[[2, 30]] = 0
    assert model.prepare_training(counts) == []
    assert not model.model.item_embedding.weight[[2, 30]].any()
    history, target = [3, 7, 1], 12
    batch = _batch(tokenizer, [[*history, target]])
    labels = _labels(batch)
    labels[:, :-3] = -100
    dense = model.score_dense(model.start_decoding(**_batch(tokenizer, [history])))[0]
    expected = (dense[torch.tensor(counts > 0)].logsumexp(0) - dense[target]).item()
    assert model(**batch, labels=labels).dense_loss.item() == pytest.approx(expected, abs=1e-5)
    # the free vectors of items outside the history change nothing
    model.model.item_embedding.weight.data[[target, 20]] += 1.0
    moved = model.score_dense(model.start_decoding(**_batch(tokenizer, [history])))[0]
    assert torch.equal(moved, dense)
    model.save_pretrained(tmp_path)
    again = RQTransformerForCausalLM.from_pretrained(tmp_path)
    assert again.cold_items.nonzero().flatten().tolist() == [2, 30]


def test_timeline_length_is_the_number_of_items() -> None:
    tokenizer = _tokenizer()
    model = _model(tokenizer)
    states = model.model(**_batch(tokenizer, [[1, 2, 3]])).last_hidden_state
    assert states.shape == (1, 4, 16)  # a start state and one per item, whatever the number of levels


@pytest.mark.slow
def test_successor_catalogue(tmp_path) -> None:
    """Item i is always followed by item i + 1: Hit@1 must be 1.0."""
    import time

    num_items = 120
    tokenizer = _tokenizer(num_items, (8, 8, 8))
    model = _model(tokenizer, hidden_size=32, max_position_embeddings=16, dropout=0.0)
    torch.set_num_threads(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator, started = np.random.default_rng(0), time.perf_counter()
    for _ in range(300):
        starts = generator.integers(0, num_items - 11, size=16)
        batch = _batch(tokenizer, [list(range(s, s + 12)) for s in starts])
        optimizer.zero_grad()
        model(**batch, labels=_labels(batch)).loss.backward()
        optimizer.step()
    assert time.perf_counter() - started < 60
    rows = [list(range(max(0, n - 5), n + 1)) for n in range(num_items - 1)]
    batch = _batch(tokenizer, rows)
    items, _ = model.recommend_indices(**batch, trie=ItemTrie.from_tokenizer(tokenizer), k=1, num_beams=20)
    assert items[:, 0].tolist() == list(range(1, num_items))
    assert hf_genrec.__version__
