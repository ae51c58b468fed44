"""RPG: identities, brute force over small catalogues, one forward per request, and the successor catalogue."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from hf_genrec import (
    AutoModelForRecommendation,
    ItemTokenizer,
    ItemTrieLogitsProcessor,
    ProductQuantizer,
    RPGConfig,
    RPGForCausalLM,
)
from hf_genrec.errors import IncompatibleComponentsError
from hf_genrec.generation.decoding import parallel as decoding
from hf_genrec.generation.trie import ItemTrie
from hf_genrec.models.rpg.modeling_rpg import RPGModel

ITEMS, SIZES = 40, (5, 5, 5, 5)
HISTORIES = [[3, 7, 1, 3], [5], [9, 2, 30, 31, 8, 2]]


def _tokenizer(num_items: int = ITEMS, sizes: tuple[int, ...] = SIZES, seed: int = 0) -> ItemTokenizer:
    flat = np.random.default_rng(seed).permutation(int(np.prod(sizes)))[:num_items]
    codes = np.stack(np.unravel_index(flat, sizes), axis=1)
    return ItemTokenizer.from_codes([f"i{n}" for n in range(num_items)], codes, codebook_sizes=sizes)


def _model(tokenizer: ItemTokenizer, seed: int = 0, shaken: bool = True, **options) -> RPGForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 8}
    model = RPGForCausalLM(RPGConfig.from_tokenizer(tokenizer, **(sizes | options))).eval()
    if shaken:  # away from the start, so that nothing is equal by accident
        generator = torch.Generator().manual_seed(seed + 1)
        for parameter in model.parameters():
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def _batch(tokenizer: ItemTokenizer, rows: list[list[int]], left: bool = True) -> dict[str, torch.Tensor]:
    tokenizer.padding_side = "left" if left else "right"
    batch = tokenizer.encode_item_indices([np.array(row, int) for row in rows], return_tensors="pt")
    tokenizer.padding_side = "left"
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def _labels(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)


def _scores(model, tokenizer: ItemTokenizer, batch) -> torch.Tensor:
    """Mean log-probability of every item, (B, N), item by item."""
    logp = model.score_digits(model.start_decoding(**batch))
    levels = torch.arange(tokenizer.num_levels)
    return torch.stack([logp[:, levels, torch.tensor(row)].mean(-1) for row in tokenizer.codes.astype(int)], dim=1)


# ------------------------------------------------------------------------------------------------------ the model


@pytest.mark.parametrize("sizes", [SIZES, (9, 3, 4, 5)])
def test_loss_is_minus_the_mean_score_of_every_next_item(sizes) -> None:
    tokenizer = _tokenizer(sizes=sizes)
    model = _model(tokenizer)
    row = [3, 7, 1, 3, 12]
    batch = _batch(tokenizer, [row])
    total = 0.0
    for end in range(len(row)):
        history = {key: value[:, : end * 4] for key, value in batch.items()}
        total -= _scores(model, tokenizer, history)[0, row[end]].item()
    assert model(**batch, labels=_labels(batch)).loss.item() == pytest.approx(total / len(row), abs=1e-5)


def test_score_all_is_the_number_of_digits_times_the_mean() -> None:
    tokenizer = _tokenizer()
    model = _model(tokenizer)
    batch = _batch(tokenizer, HISTORIES)
    exact = model.score_all(**batch, tokenizer=tokenizer)
    assert torch.allclose(exact, 4 * _scores(model, tokenizer, batch), atol=1e-5)


def test_a_digit_is_a_softmax_over_cosines_and_heads_start_as_the_identity() -> None:
    tokenizer = _tokenizer()
    model = _model(tokenizer, shaken=False, cosine_temperature=0.5)
    states = torch.randn(3, 16)
    vectors = model.model.code_embedding.weight
    for level, offset in enumerate(tokenizer.level_offsets.tolist()):
        expected = torch.nn.functional.cosine_similarity(
            states[:, None], vectors[None, offset : offset + SIZES[level]], dim=-1
        )
        assert torch.allclose(model.digit_logits(states)[level], expected / 0.5, atol=1e-5)
    model.heads.weight.data[2] = torch.eye(16)
    model.heads.bias.data[2] = -1.0
    bent = states + torch.nn.functional.silu(states - 1.0)
    assert torch.allclose(model.heads(states)[2], bent, atol=1e-6) and torch.equal(model.heads(states)[1], states)


def test_smaller_codebooks_have_no_further_codes() -> None:
    tokenizer = _tokenizer(sizes=(9, 3, 4, 5))
    model = _model(tokenizer)
    logp = model.score_digits(model.start_decoding(**_batch(tokenizer, HISTORIES)))
    assert logp.shape == (3, 4, 9) and torch.allclose(logp.exp().sum(-1), torch.ones(3, 4), atol=1e-5)
    for level, size in enumerate((9, 3, 4, 5)):
        assert (logp[:, level, size:] == -torch.inf).all() and (logp[:, level, :size] > -torch.inf).all()
        assert (model.digit_vectors()[level, size:] == 0).all()


def test_an_item_is_the_mean_of_its_codes_and_the_timeline_counts_items() -> None:
    tokenizer = _tokenizer()
    model = _model(tokenizer)
    batch = _batch(tokenizer, [[1, 2, 3]])
    assert model.model(**batch).last_hidden_state.shape == (1, 4, 16)  # a start state and one per item
    vectors = model.model.item_vectors(batch["input_ids"].view(1, 3, 4))
    expected = model.model.code_embedding(batch["input_ids"]).view(1, 3, 4, 16).mean(2)
    assert torch.allclose(vectors, expected, atol=1e-6)


def test_exchanging_digit_slots_with_heads_and_tables_changes_no_score() -> None:
    tokenizer = _tokenizer(sizes=(5, 7, 3, 4))
    model = _model(tokenizer)
    order = [2, 0, 3, 1]
    turned = ItemTokenizer.from_codes(tokenizer.item_ids, tokenizer.codes[:, order], [(5, 7, 3, 4)[i] for i in order])
    other = _model(turned, seed=7)
    other.load_state_dict(model.state_dict())
    other.heads.weight.data = model.heads.weight.data[order]
    other.heads.bias.data = model.heads.bias.data[order]
    old, new = tokenizer.level_offsets, turned.level_offsets
    for slot, source in enumerate(order):
        size = turned.codebook_sizes[slot]
        table = model.model.code_embedding.weight.data
        other.model.code_embedding.weight.data[new[slot] : new[slot] + size] = table[old[source] : old[source] + size]
    scores = [_scores(m, t, _batch(t, HISTORIES)) for m, t in ((model, tokenizer), (other, turned))]
    assert torch.allclose(*scores, atol=1e-5)
    histories = [[f"i{n}" for n in row] for row in HISTORIES]
    answers = [
        m.recommend(histories, tokenizer=t, decoding="parallel", k=10) for m, t in ((model, tokenizer), (other, turned))
    ]
    assert [[r.item_id for r in row] for row in answers[0]] == [[r.item_id for r in row] for row in answers[1]]


def test_padding_side_and_batch_do_not_matter() -> None:
    tokenizer = _tokenizer()
    model = _model(tokenizer)
    rows = [*HISTORIES, []]
    left, right = _batch(tokenizer, rows), _batch(tokenizer, rows, left=False)
    assert not torch.equal(left["input_ids"], right["input_ids"])
    together = _scores(model, tokenizer, left)
    assert torch.allclose(_scores(model, tokenizer, right), together, atol=1e-5)
    for row, history in enumerate(rows):
        assert torch.allclose(_scores(model, tokenizer, _batch(tokenizer, [history]))[0], together[row], atol=1e-5)
    losses = [model(**batch, labels=_labels(batch)).loss.item() for batch in (left, right)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_what_stands_at_padding_does_not_matter() -> None:
    tokenizer = _tokenizer()
    model = _model(tokenizer)
    for left in (True, False):
        batch = _batch(tokenizer, HISTORIES, left)
        other = batch | {"input_ids": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 9)}
        assert torch.equal(_scores(model, tokenizer, batch), _scores(model, tokenizer, other))


def test_longer_histories_are_cut_to_the_newest_items() -> None:
    tokenizer = _tokenizer()
    model = _model(tokenizer)
    long, newest = _batch(tokenizer, [list(range(20))]), _batch(tokenizer, [list(range(12, 20))])
    assert torch.allclose(_scores(model, tokenizer, long), _scores(model, tokenizer, newest), atol=1e-6)
    with pytest.raises(IncompatibleComponentsError, match="max_position_embeddings=8"):
        model.model(**long)


# --------------------------------------------------------------------------------------------------------- training


def test_gradient_accumulation_leaves_the_gradient_unchanged() -> None:
    tokenizer = _tokenizer()
    rows = [[3, 7, 1, 3, 5], [5, 6], [9, 2, 30, 31, 8, 2]]
    gradients = []
    for parts in ([rows], [rows[:1], rows[1:]], [rows[:2], rows[2:]]):
        model = _model(tokenizer)
        batches = [_batch(tokenizer, part) for part in parts]
        count = sum(int((_labels(batch) != -100).sum()) for batch in batches)
        for batch in batches:
            model(**batch, labels=_labels(batch), num_items_in_batch=torch.tensor(count)).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    whole = _model(tokenizer)
    batch = _batch(tokenizer, rows)
    whole(**batch, labels=_labels(batch)).loss.backward()
    gradients.append(torch.cat([p.grad.flatten() for p in whole.parameters()]))
    assert all(torch.allclose(gradients[0], other, atol=1e-6) for other in gradients[1:])


def test_gradient_checkpointing_leaves_the_gradient_unchanged() -> None:
    tokenizer = _tokenizer()
    batch = _batch(tokenizer, HISTORIES)
    gradients = []
    for checkpointing in (False, True):
        model = _model(tokenizer, dropout=0.3).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        torch.manual_seed(0)
        model(**batch, labels=_labels(batch)).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.allclose(*gradients, atol=1e-6)


def test_items_without_labels_are_no_targets() -> None:
    tokenizer = _tokenizer()
    model = _model(tokenizer)
    batch = _batch(tokenizer, [[3, 7, 1], [4, 4, 9]])
    labels = _labels(batch)
    labels[0, 4:8] = -100
    labels[1] = -100
    scores = [
        _scores(model, tokenizer, _batch(tokenizer, [history]))[0, target].item()
        for history, target in (([], 3), ([3, 7], 1))
    ]
    assert model(**batch, labels=labels).loss.item() == pytest.approx(-np.mean(scores), abs=1e-5)
    assert model(**batch, labels=torch.full_like(labels, -100)).loss.item() == 0.0


def test_wrong_tokens_are_typed_errors() -> None:
    tokenizer = _tokenizer()
    model = _model(tokenizer)
    batch = _batch(tokenizer, [[3, 7]])
    labels = _labels(batch)
    labels[0, 5] = 4  # a code of digit 0
    with pytest.raises(IncompatibleComponentsError, match="token 4 at digit 1"):
        model(**batch, labels=labels)
    with pytest.raises(IncompatibleComponentsError, match="6 tokens are no whole items of 4 digits"):
        model.start_decoding(batch["input_ids"][:, :6])
    for wrong, message in (
        ({"hidden_size": 10, "num_attention_heads": 4}, "multiple"),
        ({"cosine_temperature": 0}, "above 0"),
        ({"codebook_sizes": [4]}, "1 codebook_sizes but 4 level_offsets"),
    ):
        with pytest.raises(IncompatibleComponentsError, match=message):
            RPGConfig.from_tokenizer(tokenizer, **wrong)
    with pytest.raises(IncompatibleComponentsError):
        model.recommend([["i0"]], tokenizer=_tokenizer(seed=3))


# --------------------------------------------------------------------------------------------------- recommendation


def test_beam_parallel_and_graph_agree_where_they_must() -> None:
    tokenizer = _tokenizer()
    model = _model(tokenizer)
    histories = [[f"i{n}" for n in row] for row in HISTORIES]
    wide = {"k": 10, "num_beams": ITEMS, "tokenizer": tokenizer}
    beam, full = (model.recommend(histories, decoding=name, **wide) for name in ("beam", "parallel"))
    walk = model.recommend(
        histories, decoding="graph", decoding_options={"num_neighbours": ITEMS, "num_steps": 1}, **wide
    )
    for user in range(3):
        names = [r.item_id for r in full[user]]
        assert names == [r.item_id for r in beam[user]] == [r.item_id for r in walk[user]] and len(names) == 10
        assert not set(names) & set(histories[user])
        assert [4 * r.score for r in full[user]] == pytest.approx([r.score for r in beam[user]], abs=1e-4)
        assert [r.score for r in full[user]] == pytest.approx([r.score for r in walk[user]], abs=1e-5)
    exact = _scores(model, tokenizer, _batch(tokenizer, HISTORIES))
    exact[torch.tensor([0, 0, 0, 1, 2, 2, 2, 2, 2]), torch.tensor([3, 7, 1, 5, 9, 2, 30, 31, 8])] = -torch.inf
    assert [[int(r.item_id[1:]) for r in row] for row in full] == exact.topk(10, dim=1).indices.tolist()


@pytest.mark.parametrize("name", ["parallel", "graph", "beam"])
def test_one_backbone_forward_per_request(name) -> None:
    tokenizer = _tokenizer()
    model = _model(tokenizer)
    calls = []
    model.model.register_forward_hook(lambda module, args, output: calls.append(output.last_hidden_state.shape[:2]))
    model.recommend([["i1", "i2"], ["i3"]], tokenizer=tokenizer, decoding=name, num_beams=20, k=5)
    assert calls == [(2, 3)]  # both users at once: a start and two items


def test_items_that_share_a_code_are_all_returned() -> None:
    tokenizer = ItemTokenizer.from_codes(["a", "b", "c"], [[0, 0], [0, 0], [1, 1]])
    model = _model(tokenizer)
    for name in ("parallel", "graph"):
        answer = model.recommend([["c"], ["a"]], tokenizer=tokenizer, k=3, decoding=name)
        assert [r.item_id for r in answer[0]] == ["a", "b"] and {r.item_id for r in answer[1]} == {"b", "c"}
        assert answer[0][0].score == answer[0][1].score


def test_graph_follows_the_weights_after_training() -> None:
    tokenizer = _tokenizer(200, (8, 8, 8, 8))
    model = _model(tokenizer)
    options = {"decoding": "graph", "decoding_options": {"num_neighbours": 4, "num_steps": 2}, "num_beams": 5, "k": 5}
    histories = [[f"i{n}"] for n in range(30)]
    answers = [model.recommend(histories, tokenizer=tokenizer, **options)]
    trie = ItemTrie.from_tokenizer(tokenizer)
    before = decoding.neighbour_graph(model.digit_vectors(), trie, 4)
    batch = _batch(tokenizer, [[n, n + 1, n + 2] for n in range(0, 150, 3)])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(5):
        optimizer.zero_grad()
        model(**batch, labels=_labels(batch)).loss.backward()
        optimizer.step()
    answers.append(model.recommend(histories, tokenizer=tokenizer, **options))
    after = decoding.neighbour_graph(model.digit_vectors(), trie, 4)
    assert not torch.equal(before, after) and answers[0] != answers[1]
    decoding._graphs.clear()
    assert model.recommend(histories, tokenizer=tokenizer, **options) == answers[1]


def test_recommend_equals_generate_with_the_trie_processor() -> None:
    tokenizer = _tokenizer()
    model = _model(tokenizer)
    histories = [[tokenizer.item_ids[i] for i in row] for row in HISTORIES]
    ours = model.recommend(histories, tokenizer=tokenizer, k=5, num_beams=10, exclude_seen=False, decoding="beam")
    batch = _batch(tokenizer, HISTORIES)
    processor = ItemTrieLogitsProcessor(tokenizer, prompt_length=batch["input_ids"].shape[1])
    generated = model.generate(
        **batch,
        num_beams=10,
        num_return_sequences=5,
        max_new_tokens=4,
        do_sample=False,
        length_penalty=0.0,
        logits_processor=[processor],
        return_dict_in_generate=True,
        output_scores=True,
    )
    for row, answer in enumerate(ours):
        tokens = generated.sequences[row * 5 : row * 5 + 5, -4:]
        items = [tokenizer.token_ids_to_items(line.tolist())[0] for line in tokens]
        assert [[r.item_id] for r in answer] == [list(item) for item in items]
        scores = generated.sequences_scores[row * 5 : row * 5 + 5]
        assert [r.score for r in answer] == pytest.approx(scores.tolist(), abs=1e-4)


def test_token_logits_are_the_digits_of_the_next_item() -> None:
    tokenizer = _tokenizer()
    model = _model(tokenizer)
    ids = _batch(tokenizer, [[3, 7, 1]])["input_ids"]
    for length in (12, 10, 9, 3):
        logits = model(input_ids=ids[:, :length]).logits
        assert logits.shape == (1, length, len(tokenizer))
        assert torch.equal(model(input_ids=ids[:, :length], logits_to_keep=2).logits, logits[:, -2:])
        for position in range(length):
            item, level = divmod(position + 1, 4)
            expected = model.score_digits(model.start_decoding(ids[:, : item * 4]))[0, level]
            offset = int(tokenizer.level_offsets[level])
            assert torch.allclose(logits[0, position, offset : offset + 5], expected, atol=1e-5)
            rest = torch.cat([logits[0, position, :offset], logits[0, position, offset + 5 :]])
            assert (rest == torch.finfo(torch.float32).min).all()
    long = _batch(tokenizer, [list(range(12))])["input_ids"]  # more than the model reads: one pass per item
    last = model(input_ids=long, logits_to_keep=1).logits[0, 0, 4:9]
    assert torch.allclose(last, model.score_digits(model.start_decoding(long))[0, 0], atol=1e-5)


def test_save_and_load_through_the_auto_classes(tmp_path) -> None:
    tokenizer = _tokenizer()
    model = _model(tokenizer)
    model.recommendation_config = model.recommendation_config.merged(
        decoding="graph", decoding_options={"num_neighbours": 5, "num_steps": 2}, num_beams=12
    )
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for auto_class in (AutoModelForCausalLM, AutoModelForRecommendation):
        again = auto_class.from_pretrained(tmp_path)
        assert type(again) is RPGForCausalLM and again.config.cosine_temperature == 0.07
        assert again.recommendation_config == model.recommendation_config
        histories = [["i3", "i7"], []]
        assert again.recommend(histories, tokenizer=loaded) == model.recommend(histories, tokenizer=tokenizer)
    assert type(AutoModel.from_pretrained(tmp_path)) is RPGModel


def test_bfloat16_ranks_nearly_as_float32() -> None:
    tokenizer = _tokenizer()
    model = _model(tokenizer)
    batch = _batch(tokenizer, HISTORIES)
    exact = _scores(model, tokenizer, batch)
    half = _scores(model.to(torch.bfloat16), tokenizer, batch)
    assert half.dtype == torch.float32 and (half - exact).abs().max() < 0.3


# --------------------------------------------------------------------------------------------- successor catalogue


def _successors(tmp_path, tokenizer: ItemTokenizer, num_items: int, **options):
    from hf_genrec.alignment.trainers.arguments import RecommenderTrainingArguments
    from hf_genrec.alignment.trainers.recommender import train_recommender
    from hf_genrec.data.sequences import Sequences
    from hf_genrec.data.splits import EvaluationSet, Split

    rng = np.random.default_rng(0)
    rows = [[(start + i) % num_items for i in range(12)] for start in rng.integers(0, num_items, 150)]
    everything = Sequences.from_rows(rows)
    targets = np.array([row[-2] for row in rows], np.int32)
    held_out = EvaluationSet(np.arange(len(rows)), everything.truncate_tail(2), targets)
    split = Split("leave_one_out", everything.truncate_tail(2), held_out, held_out, {})
    model = _model(tokenizer, shaken=False, hidden_size=32, max_position_embeddings=12, dropout=0.1, **options)
    model.recommendation_config = model.recommendation_config.merged(decoding="parallel", k=1, num_beams=5)
    arguments = RecommenderTrainingArguments(
        output_dir=str(tmp_path / "run"),
        num_train_epochs=25,
        learning_rate=5e-3,
        max_history=12,
        per_device_train_batch_size=8,
        eval_ks=[1, 10],
        eval_num_beams=10,
        eval_exclude_seen=False,
        eval_epochs=25,
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
    )
    return train_recommender(model, tokenizer, split, arguments)


@pytest.mark.slow
@pytest.mark.parametrize(("levels", "size"), [(8, 8), (32, 4)])
def test_successor_catalogue(tmp_path, levels: int, size: int) -> None:
    """Item i is always followed by item i + 1, items are known by OPQ codes of random vectors: Hit@1 must be 1.0."""
    num_items = 60
    features = np.random.default_rng(1).normal(size=(num_items, 64))
    codes = ProductQuantizer([size] * levels, rounds=5).fit(features).encode(features).numpy()
    assert len({tuple(row) for row in codes.tolist()}) == num_items
    tokenizer = ItemTokenizer.from_codes([f"i{n}" for n in range(num_items)], codes, [size] * levels)
    result = _successors(tmp_path, tokenizer, num_items)
    assert result.summary["validation"]["recall@1"] == 1.0
    histories = [[f"i{(n + step) % num_items}" for step in range(3)] for n in range(num_items)]
    expected = [[f"i{(n + 3) % num_items}"] for n in range(num_items)]
    for name in ("parallel", "graph"):
        options = {"decoding_options": {"num_neighbours": 20}, "num_beams": 10} if name == "graph" else {}
        answers = result.model.recommend(histories, tokenizer=tokenizer, k=1, decoding=name, **options)
        found = [[r.item_id for r in row] for row in answers]
        share = np.mean([one == other for one, other in zip(found, expected, strict=True)])
        assert share == 1.0 if name == "parallel" else share > 0.9, (name, share)


@pytest.mark.slow
def test_the_recipe_runs_on_a_small_log(tmp_path) -> None:
    from hf_genrec import load_artifact, resolve_recipe, train_recipe

    rng = np.random.default_rng(0)
    lines = ["user_id,item_id,timestamp"]
    for user in range(80):
        start = int(rng.integers(50))
        lines += [f"u{user},i{(start + step) % 50:03d},{1000 + user * 50 + step}" for step in range(12)]
    (tmp_path / "log.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    overrides = {
        "num_codebooks": 8,
        "codebook_size": 8,
        "features.cooccurrence.dim": 16,
        "num_train_epochs": 25,
        "learning_rate": 5e-3,
        "per_device_train_batch_size": 8,
        "max_history": 12,
        "ema_decay": None,
        "dropout": 0.0,
        "eval_epochs": 25,
    }
    trained = train_recipe(
        resolve_recipe("rpg", overrides), str(tmp_path / "log.csv"), tmp_path / "out", baselines=(), progress=False
    )
    assert trained.model.recommendation_config.decoding == "parallel"
    assert trained.tokenizer.codebook_sizes == (8,) * 8
    artifact = load_artifact(tmp_path / "out")
    answer = artifact.recommend([["i010", "i011", "i012"], ["i047", "i048", "i049"]], k=3)
    assert [row[0].item_id for row in answer] == ["i013", "i000"]
