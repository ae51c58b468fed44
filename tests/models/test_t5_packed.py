"""Packed prefixes: the same numbers as one prefix per sample, in training and in every decoding path."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from transformers import T5ForConditionalGeneration

from hf_genrec.alignment.trainers.recommender import (
    RecommenderTrainingArguments,
    train_recommender,
    training_layout,
)
from hf_genrec.data.collators import PackedPrefixCollator, PrefixCollator, WindowDataset
from hf_genrec.data.sequences import Sequences
from hf_genrec.data.splits import EvaluationSet, Split
from hf_genrec.errors import IncompatibleComponentsError, TrainingError
from hf_genrec.generation.decoding.encoder_decoder import EncoderDecoderScorer
from hf_genrec.generation.decoding.t5_layers import runs_as_written
from hf_genrec.generation.trie import ItemTrie
from hf_genrec.identifiers.tokenization_item import ItemTokenizer
from hf_genrec.models.specgr.configuration_specgr import SpecGRConfig
from hf_genrec.models.t5_packed import ItemCausalStack, prefix_states, use_recency
from hf_genrec.models.tiger.configuration_tiger import TigerConfig
from hf_genrec.models.tiger.modeling_tiger import TigerForConditionalGeneration, TigerModel

SIZES = (5, 4, 6)
TINY = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_heads": 3, "num_layers": 2, "num_decoder_layers": 2}
WINDOWS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 30, 7], [8, 8, 8]]
USERS = ["ann", "bob", "cid", "dan"]


def catalogue(uneven: bool = False, **kwargs) -> ItemTokenizer:
    generator = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*map(np.arange, SIZES), indexing="ij"), -1).reshape(-1, 3)
    codes = generator.permutation(grid)[:40].copy()
    if uneven:  # some items end after two codes, some after one; no code is the beginning of another
        codes[codes[:, 0] == 2, 1:] = -1
        codes = codes[np.sort(np.unique(codes, axis=0, return_index=True)[1])]
        short = codes[:, 0] == 3
        codes[short, 2] = -1
        codes = codes[np.sort(np.unique(codes, axis=0, return_index=True)[1])]
    return ItemTokenizer.from_codes([f"i{index}" for index in range(len(codes))], codes, SIZES, **kwargs)


def small_model(tokenizer: ItemTokenizer, seed: int = 0, **kwargs) -> TigerForConditionalGeneration:
    torch.manual_seed(seed)
    options = {"causal_encoder": True, "dropout_rate": 0.0, **TINY, **kwargs}
    model = TigerForConditionalGeneration(TigerConfig.from_tokenizer(tokenizer, **options)).eval()
    with torch.no_grad():  # far from uniform, so that nothing agrees by being small
        for name, parameter in model.named_parameters():
            parameter.mul_(3.0 if "relative_attention_bias" in name else 1.5)
    return model


def windows_of(tokenizer: ItemTokenizer, users: bool) -> list[dict]:
    rows = [{"items": np.asarray(row) % tokenizer.num_items} for row in WINDOWS]
    return [{**row, "user_id": user} for row, user in zip(rows, USERS)] if users else rows


def prefixes_of(windows: list[dict]) -> list[dict]:
    """One sample per target, in the order of the packed labels."""
    return [
        {**window, "items": window["items"][:end], "target": int(window["items"][end])}
        for window in windows
        for end in range(1, len(window["items"]))
    ]


CASES = {
    "plain": {},
    "right_padded": {"padding_side": "right"},
    "user_tokens": {"num_user_tokens": 7},
    "uneven": {"uneven": True},
}


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_each_prefix_alone(case: str) -> None:
    options = dict(CASES[case])
    side = options.pop("padding_side", "left")
    tokenizer = catalogue(**options)
    tokenizer.padding_side = side
    model, windows = small_model(tokenizer), windows_of(tokenizer, case == "user_tokens")
    batch = PackedPrefixCollator(tokenizer)(windows)
    assert not bool(batch["attention_mask"].all())
    with torch.no_grad():
        packed = model(**batch)
        real_BT = batch["history_lengths"] > 0
        assert packed.logits.shape[:3] == batch["labels"].shape and int(real_BT.sum()) == 10
        for row, prefix in enumerate(prefixes_of(windows)):
            alone = model(**PrefixCollator(tokenizer)([prefix]))
            assert torch.allclose(packed.logits[real_BT][row], alone.logits[0], atol=1e-5)
        together = model(**PrefixCollator(tokenizer)(prefixes_of(windows)))  # mixed lengths, padded
    assert torch.allclose(packed.logits[real_BT], together.logits, atol=1e-5)
    assert torch.allclose(packed.loss, together.loss, atol=1e-5)
    if case == "uneven":
        assert bool((batch["labels"][real_BT] == -100).any())


def test_encoder_states_are_those_of_the_prefix() -> None:
    tokenizer = catalogue(num_user_tokens=7)
    model, windows = small_model(tokenizer), windows_of(tokenizer, True)
    batch = PackedPrefixCollator(tokenizer)(windows)
    with torch.no_grad():
        states = model(**batch).encoder_last_hidden_state
        found = prefix_states(states, batch["attention_mask"], batch["history_lengths"])[batch["history_lengths"] > 0]
        alone = PrefixCollator(tokenizer)(prefixes_of(windows))
        expected = model.encoder(input_ids=alone["input_ids"], attention_mask=alone["attention_mask"])
    assert torch.allclose(found, expected.last_hidden_state[:, -1], atol=1e-5)


@pytest.mark.parametrize("num_items", [None, 30])
def test_gradients_equal_those_of_all_prefixes_together(num_items: int | None) -> None:
    tokenizer = catalogue()
    windows = windows_of(tokenizer, False)
    gradients = []
    for batches in (
        [PackedPrefixCollator(tokenizer)(windows)],
        [PrefixCollator(tokenizer)([prefix]) for prefix in prefixes_of(windows)],
    ):
        model = small_model(tokenizer).train()
        for batch in batches:
            loss = model(**batch, num_items_in_batch=num_items).loss
            (loss if num_items else loss / len(batches)).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-5, rtol=1e-4), name


def test_later_items_do_not_reach_an_earlier_target() -> None:
    tokenizer = catalogue()
    model = small_model(tokenizer)
    collate = PackedPrefixCollator(tokenizer)
    with torch.no_grad():
        one = model(**collate([{"items": [3, 1, 4, 1, 5]}])).logits[0, :2]
        other = model(**collate([{"items": [3, 1, 4, 9, 7]}])).logits[0, :2]
    assert torch.allclose(one, other, atol=1e-6)


def test_end_token_after_the_codes() -> None:
    tokenizer = catalogue()
    model = small_model(tokenizer)
    batch = PackedPrefixCollator(tokenizer)(windows_of(tokenizer, False))
    without = model(**batch)
    end = torch.where(batch["history_lengths"] > 0, tokenizer.eos_token_id, -100).unsqueeze(-1)
    batch["labels"] = torch.cat([batch["labels"], end], -1)
    outputs = model(**batch)
    assert outputs.logits.shape[2] == 4 and torch.allclose(outputs.logits[:, :, :3], without.logits, atol=1e-6)
    assert torch.allclose(outputs.loss * 4, without.loss * 3, atol=1e-5)  # nothing but the end token may follow


def test_without_causal_encoder_it_is_t5() -> None:
    tokenizer = catalogue()
    model = small_model(tokenizer, causal_encoder=False, restrict_to_level=False)
    reference = T5ForConditionalGeneration(model.config).eval()
    reference.load_state_dict(model.state_dict())
    batch = PrefixCollator(tokenizer)(prefixes_of(windows_of(tokenizer, False)))
    assert torch.equal(model(**batch).logits, reference(**batch).logits)
    assert type(model.encoder) is type(reference.encoder)
    packed = PackedPrefixCollator(tokenizer)(windows_of(tokenizer, False))
    with pytest.raises(IncompatibleComponentsError, match="causal_encoder=True"):
        model(**packed)
    causal = small_model(tokenizer)
    with pytest.raises(IncompatibleComponentsError, match="history_lengths"):
        causal(input_ids=packed["input_ids"], labels=packed["labels"])


def test_same_weights_and_the_recency_table() -> None:
    tokenizer = catalogue()
    plain, causal = small_model(tokenizer, causal_encoder=False), small_model(tokenizer)
    weights = causal.state_dict()
    table = weights.pop("decoder.recency.weight")
    assert plain.state_dict().keys() == weights.keys()
    assert all(torch.equal(one, other) for one, other in zip(plain.state_dict().values(), weights.values()))
    assert table[0].eq(0).all() and (table[1:] < table[:-1]).all()  # the newest first
    one_item = PrefixCollator(tokenizer)([{"items": [7], "target": 2}])  # there is nothing to hide
    several = PrefixCollator(tokenizer)(prefixes_of(windows_of(tokenizer, False)))
    use_recency(plain)  # T5's own encoder before the decoder that knows distances
    with torch.no_grad():
        plain.decoder.recency.weight.copy_(table)
        assert not torch.allclose(plain(**several).logits, causal(**several).logits, atol=1e-3)
        assert torch.allclose(plain(**one_item).logits, causal(**one_item).logits, atol=1e-6)
        plain.decoder.recency.weight.zero_()
        reference = small_model(tokenizer, causal_encoder=False)
        assert torch.allclose(plain(**several).logits, reference(**several).logits, atol=1e-6)


def test_recency_is_the_distance_from_the_end() -> None:
    tokenizer = catalogue()
    model = small_model(tokenizer)
    with torch.no_grad():
        model.decoder.recency.weight.copy_(torch.arange(32.0).unsqueeze(1).expand(-1, 3))
        mask, lengths = torch.tensor([[0, 0, 1, 1, 1, 1]]), torch.tensor([[2, 4, 0]])
        bias = model.decoder.prefix_bias(mask, lengths, torch.float32)[0, 0]
    assert bias[0, 2:4].tolist() == [1, 0] and bias[1, 2:].tolist() == [3, 2, 1, 0]
    assert (bias[0, 4:] < -1e30).all() and (bias[:, :2] < -1e30).all() and (bias[2] < -1e30).all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_searches_agree_with_packed_training(side: str) -> None:
    tokenizer = catalogue()
    tokenizer.padding_side = side
    model, windows = small_model(tokenizer), windows_of(tokenizer, False)
    batch = PackedPrefixCollator(tokenizer)(windows)
    with torch.no_grad():
        logits = model(**batch).logits[batch["history_lengths"] > 0].log_softmax(-1)
    prefixes = prefixes_of(windows)
    trie = ItemTrie.from_tokenizer(tokenizer)
    histories = tokenizer.encode_item_indices([prefix["items"] for prefix in prefixes], return_tensors="pt")
    ids, mask = histories["input_ids"], histories["attention_mask"]
    assert runs_as_written(model)  # the fast engine, not the model's own code
    scores = model.score_all(input_ids=ids, attention_mask=mask, trie=trie, renormalize=False)
    table = torch.tensor(tokenizer.item_token_table)
    for row, prefix in enumerate(prefixes):
        expected = logits[row, torch.arange(3), table[prefix["target"]]].sum()
        assert torch.allclose(scores[row, prefix["target"]], expected, atol=1e-4)
    items, best = model.recommend_indices(ids, mask, trie=trie, k=40, num_beams=120)
    assert torch.allclose(best, scores.gather(1, items), atol=1e-4)
    handle = model.encoder.register_forward_hook(lambda *_: None)  # the model's own encoder, by its own code
    slow = model.score_all(input_ids=ids, attention_mask=mask, trie=trie, renormalize=False)
    handle.remove()
    assert torch.allclose(scores, slow, atol=1e-4)
    scorer = EncoderDecoderScorer(model, tokenizer.level_offsets, SIZES, restrict_to_level=True)  # any model's engine
    with torch.no_grad():
        first_codes = scorer.score_codes(scorer.start_decoding(ids, mask), ids.new_zeros(len(ids), 1, 0), 0)[:, 0]
    codes = slice(tokenizer.level_offsets[0], tokenizer.level_offsets[0] + SIZES[0])
    assert torch.allclose(first_codes, logits[:, 0, codes], atol=1e-4)

    generated = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=3, min_new_tokens=3, do_sample=False,
        output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    first = generated.scores[0].log_softmax(-1)
    assert torch.allclose(first[:, codes], logits[:, 0, codes], atol=1e-4)
    assert generated.sequences[:, 1:].shape == (len(prefixes), 3)


def test_user_token_is_visible_to_all() -> None:
    tokenizer = catalogue(num_user_tokens=7)
    model = small_model(tokenizer)
    ids = torch.tensor(tokenizer.encode_item_indices([[3, 1]], user_ids=["ann"], return_tensors="np")["input_ids"])
    visible = model.encoder.visible_tokens(ids, torch.ones_like(ids))[0]
    assert visible[:, 0].all() and not visible[0, 1:].any()
    assert visible[1:4, 1:4].all() and not visible[1:4, 4:].any() and visible[4:].all()


def test_embeddings_need_item_numbers() -> None:
    tokenizer = catalogue()
    model = small_model(tokenizer)
    batch = PackedPrefixCollator(tokenizer)(windows_of(tokenizer, False))
    ids = batch.pop("input_ids")
    embedded = model.shared(ids)
    with pytest.raises(IncompatibleComponentsError, match="item_numbers"):
        model(inputs_embeds=embedded, **batch)
    given = model(inputs_embeds=embedded, item_numbers=model.encoder.item_numbers(ids), **batch)
    assert torch.allclose(given.logits, model(input_ids=ids, **batch).logits, atol=1e-6)


def test_eager_attention_and_headless_model(tmp_path) -> None:
    tokenizer = catalogue()
    model = small_model(tokenizer)
    batch = PackedPrefixCollator(tokenizer)(windows_of(tokenizer, False))
    with torch.no_grad():
        expected = model(**batch)
    model.save_pretrained(tmp_path)
    eager = TigerForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="eager")
    body = TigerModel.from_pretrained(tmp_path)
    assert isinstance(eager.encoder, ItemCausalStack) and isinstance(body.encoder, ItemCausalStack)
    with torch.no_grad():
        assert torch.allclose(eager(**batch).logits, expected.logits, atol=1e-5)
        states = body.encoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    real = batch["attention_mask"].bool()
    assert torch.allclose(states[real], expected.encoder_last_hidden_state[real], atol=1e-5)


def test_loss_temperature() -> None:
    tokenizer = catalogue()
    batch = PackedPrefixCollator(tokenizer)(windows_of(tokenizer, False))
    plain, sharp = small_model(tokenizer), small_model(tokenizer, loss_temperature=0.5)
    labels = batch["labels"]
    logits = plain(**batch).logits
    real = labels != -100
    expected = nn.functional.cross_entropy(logits[real] * 2, labels[real])
    outputs = sharp(**batch)
    assert torch.equal(outputs.logits, logits)  # training only
    assert torch.allclose(outputs.loss, expected, atol=1e-5)
    outputs.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in sharp.parameters() if p.grad is not None)
    with pytest.raises(IncompatibleComponentsError, match="loss_temperature"):
        TigerConfig(codebook_sizes=[4], loss_temperature=0.0)


def test_collator_says_what_it_cannot_pack() -> None:
    with pytest.raises(IncompatibleComponentsError, match="history_eos"):
        PackedPrefixCollator(catalogue(history_eos=True))
    with pytest.raises(IncompatibleComponentsError, match="causal_encoder"):
        SpecGRConfig(codebook_sizes=[4], causal_encoder=True)


def _split(items: int = 12, users: int = 24, length: int = 8) -> Split:
    rows = [[(user + step) % items for step in range(length)] for user in range(users)]
    train, held = Sequences.from_rows([row[:-1] for row in rows]), np.array([row[-1] for row in rows])
    held_out = EvaluationSet(np.arange(users), train, held)
    return Split("leave_one_out", train, held_out, held_out, {})


def test_trainer_packs_and_learns_the_successor(tmp_path) -> None:
    split = _split()
    codes = np.stack(np.divmod(np.arange(12), 4), 1)
    tokenizer = ItemTokenizer.from_codes([f"i{n}" for n in range(12)], codes, (3, 4), num_user_tokens=3)
    torch.manual_seed(0)
    options = {"causal_encoder": True, **TINY, "d_model": 32, "d_kv": 16, "dropout_rate": 0.0}
    model = TigerForConditionalGeneration(TigerConfig.from_tokenizer(tokenizer, **options))
    assert training_layout(model) == "packed"
    assert training_layout(small_model(tokenizer, causal_encoder=False)) == "prefixes"
    args = RecommenderTrainingArguments(
        output_dir=str(tmp_path / "run"), num_train_epochs=60, eval_epochs=30, max_history=6, use_cpu=True,
        learning_rate=5e-3, warmup_steps=5, eval_exclude_seen=False, disable_tqdm=True,
    )  # fmt: skip
    result = train_recommender(model, tokenizer, split, args, user_ids=[f"u{n}" for n in range(24)])
    assert result.summary["validation"]["recall@5"] == 1.0
    assert isinstance(result.trainer.train_dataset, WindowDataset)
    # one number for the same targets, read as windows while training and as histories while validating
    prefixes = [{"items": split.train[n], "target": int(split.test.targets[n])} for n in range(24)]
    windows = [{"items": np.append(row["items"], row["target"])} for row in prefixes]
    packed = PackedPrefixCollator(tokenizer)(windows)
    packed["labels"][:, :-1] = -100
    with torch.no_grad():
        alone = model(**PrefixCollator(tokenizer)(prefixes)).loss
        assert torch.allclose(model(**packed).loss, alone, atol=1e-5)
    args.output_dir, args.samples_per_epoch = str(tmp_path / "other"), 10
    with pytest.raises(TrainingError, match="samples_per_epoch"):
        train_recommender(model, tokenizer, split, args)
