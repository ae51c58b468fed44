"""SpecGR: TIGER with the retriever off, contrastive losses against plain arithmetic, the two phases, drafts of cold items."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from hf_genrec.alignment.trainers.arguments import RecommenderTrainingArguments
from hf_genrec.alignment.trainers.recommender import train_recommender
from hf_genrec.data.sequences import Sequences
from hf_genrec.data.splits import EvaluationSet, Split
from hf_genrec.errors import IncompatibleComponentsError
from hf_genrec.generation.custom_generate import ItemGeneration
from hf_genrec.generation.decoding.speculative import speculate
from hf_genrec.generation.trie import ItemTrie
from hf_genrec.identifiers.tokenization_item import ItemTokenizer
from hf_genrec.models.specgr.configuration_specgr import SpecGRConfig
from hf_genrec.models.specgr.modeling_specgr import SpecGRForConditionalGeneration

SIZES = (4, 5, 6)
TINY = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_heads": 3, "num_layers": 2, "num_decoder_layers": 2}
NUM_ITEMS = 40


def catalogue(num_items: int = NUM_ITEMS) -> ItemTokenizer:
    grid = np.stack(np.meshgrid(*map(np.arange, SIZES), indexing="ij"), -1).reshape(-1, 3)
    codes = np.random.default_rng(0).permutation(grid)[:num_items]
    return ItemTokenizer.from_codes([f"i{index}" for index in range(num_items)], codes, SIZES)


TOKENIZER = catalogue()
HISTORIES = [["i3", "i1", "i4", "i1", "i5"], ["i9"], ["i6", "i5", "i30"], ["i2", "i2"]]
TARGETS = [7, 8, 7, 20]  # two rows share a target


def small_model(seed: int = 0, **options) -> SpecGRForConditionalGeneration:
    torch.manual_seed(seed)
    config = SpecGRConfig.from_tokenizer(TOKENIZER, **{"projection_size": 8, **TINY, **options})
    model = SpecGRForConditionalGeneration(config).eval()
    model.set_catalogue(TOKENIZER.codes)
    with torch.no_grad():  # far from uniform, so that nothing agrees by being small
        for parameter in model.parameters():
            parameter.mul_(2.0)
    return model


def batch_of(histories=HISTORIES, targets=TARGETS) -> dict:
    batch = dict(TOKENIZER.encode_histories(histories, return_tensors="pt"))
    return batch | {"labels": torch.tensor(TOKENIZER.item_token_table[targets])}


def embedding_of(model, ids: list[int]) -> torch.Tensor:
    """One unpadded row through transformers' encoder: mean, projection, length 1."""
    states = model.encoder(input_ids=torch.tensor([ids])).last_hidden_state[0]
    return normalize(model.projection(states.mean(0)), dim=-1)


def queries_of(model) -> torch.Tensor:
    rows = [TOKENIZER.encode_histories([row])["input_ids"][0] for row in HISTORIES]
    return torch.stack([embedding_of(model, row) for row in rows])


def items_of(model, items=range(NUM_ITEMS)) -> torch.Tensor:
    return torch.stack([embedding_of(model, TOKENIZER.item_token_table[item].tolist()) for item in items])


@torch.no_grad()
def test_drafts_are_cosines_of_mean_encoder_states():
    model, batch = small_model(), batch_of()
    state = model.start_decoding(batch["input_ids"], batch["attention_mask"])
    torch.testing.assert_close(model.draft_scores(state), queries_of(model) @ items_of(model).T, atol=1e-5, rtol=1e-5)
    empty = model.start_decoding(torch.zeros(2, 0, dtype=torch.long))
    assert model.draft_scores(empty).isfinite().all()


@torch.no_grad()
def test_table_follows_the_weights_until_it_is_fixed():
    model, batch = small_model(), batch_of()
    state = model.start_decoding(batch["input_ids"], batch["attention_mask"])
    first = model.draft_scores(state)
    assert model.item_table() is model.item_table(), "not encoded again while nothing changes"
    model.encoder.block[0].layer[1].DenseReluDense.wo.weight.data = torch.randn(16, 32)  # as a swapped average is
    assert not torch.allclose(model.draft_scores(state), first)
    model.start_finetuning()
    fixed = model.draft_scores(state)
    torch.testing.assert_close(model.item_table(), items_of(model), atol=1e-5, rtol=1e-5)
    model.encoder.block[0].layer[1].DenseReluDense.wo.weight.data = torch.randn(16, 32)
    assert torch.equal(model.draft_scores(state), fixed)


@torch.no_grad()
def test_pretraining_loss_by_hand():
    model, batch = small_model(generation_loss_weight=0.5, embedding_loss_weight=3.0), batch_of()
    query, item = queries_of(model), items_of(model, TARGETS)
    total = 0.0
    for row, target in enumerate(TARGETS):
        logits = {other: float(query[row] @ item[other]) / 0.07 for other in range(4)}
        kept = [value for other, value in logits.items() if other == row or TARGETS[other] != target]
        total += math.log(sum(map(math.exp, kept))) - logits[row]
    model.config.embedding_loss_weight = 0.0
    codes = float(model(**batch).loss)  # already times 0.5
    model.config.embedding_loss_weight = 3.0
    assert float(model(**batch).loss) == pytest.approx(codes + 3.0 * total / 4, rel=1e-4)


@torch.no_grad()
def test_finetuning_loss_by_hand_leaves_cold_items_out():
    model, batch = small_model(generation_loss_weight=0.0, embedding_loss_weight=1.0), batch_of()
    counts = np.ones(NUM_ITEMS, int)
    counts[[0, 20, 33]] = 0  # 20 is a target all the same, as in validation
    model.prepare_training(counts)
    model.start_finetuning()
    query, item, total = queries_of(model), items_of(model), 0.0
    for row, target in enumerate(TARGETS):
        kept = [i for i in range(NUM_ITEMS) if counts[i] or i == target]
        logits = query[row] @ item[kept].T / 0.07
        total += float(logits.logsumexp(0) - query[row] @ item[target] / 0.07)
    assert float(model(**batch).loss) == pytest.approx(total / 4, rel=1e-4)


def test_finetuning_trains_the_queries_only():
    model, batch = small_model(generation_loss_weight=0.0), batch_of()
    model.start_finetuning()
    before = model.item_embeddings.clone()
    model.train()
    model(**batch).loss.backward()
    assert model.projection.weight.grad.abs().sum() > 0 and torch.equal(model.item_embeddings, before)


@torch.no_grad()
def test_loss_parts_add_up_to_the_loss_of_the_step():
    """`num_items_in_batch` counts labels; the contrast counts rows."""
    model = small_model()
    model.start_finetuning()  # negatives that do not depend on how a batch is cut
    batch = batch_of()
    whole = model(**batch, num_items_in_batch=batch["labels"].numel()).loss
    assert whole.item() == pytest.approx(model(**batch).loss.item(), rel=1e-5)
    parts = [
        model(**{name: value[rows] for name, value in batch.items()}, num_items_in_batch=batch["labels"].numel()).loss
        for rows in (slice(0, 1), slice(1, 4))
    ]
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-5)


@torch.no_grad()
def test_generates_as_the_same_t5_without_a_retriever():
    from hf_genrec.models.tiger.configuration_tiger import TigerConfig
    from hf_genrec.models.tiger.modeling_tiger import TigerForConditionalGeneration

    model, batch = small_model(embedding_loss_weight=0.0), batch_of()
    tiger = TigerForConditionalGeneration(TigerConfig.from_tokenizer(TOKENIZER, **TINY)).eval()
    extra = {"projection.weight", "projection.bias", "item_codes", "cold_items", "item_embeddings", "finetuning"}
    missing = tiger.load_state_dict({k: v for k, v in model.state_dict().items() if k not in extra}, strict=True)
    assert not missing.missing_keys
    assert torch.equal(model(**batch).loss, tiger(**batch).loss)
    ours = model.recommend(HISTORIES, tokenizer=TOKENIZER, k=5, num_beams=7)
    theirs = tiger.recommend(HISTORIES, tokenizer=TOKENIZER, k=5, num_beams=7)
    assert [[(r.item_id, pytest.approx(r.score, abs=1e-5)) for r in row] for row in theirs] == [
        [(r.item_id, r.score) for r in row] for row in ours
    ]


@torch.no_grad()
def test_verifies_what_score_all_says():
    model = small_model()
    options = {"num_drafts": NUM_ITEMS, "threshold": -math.inf}
    found = model.recommend(
        HISTORIES, tokenizer=TOKENIZER, k=8, exclude_seen=False, decoding="speculative", decoding_options=options
    )
    best = (model.score_all(HISTORIES, tokenizer=TOKENIZER) / 3).topk(8)
    for row, items, scores in zip(found, best.indices.tolist(), best.values.tolist()):
        assert [r.item_id for r in row] == [f"i{item}" for item in items]
        assert [r.score for r in row] == pytest.approx(scores, abs=1e-4)


def test_saves_and_loads_catalogue_and_phase(tmp_path):
    model, batch = small_model(), batch_of()
    counts = np.ones(NUM_ITEMS, int)
    counts[3] = 0
    model.prepare_training(counts)
    model.start_finetuning()
    model.save_pretrained(tmp_path)
    again = SpecGRForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert bool(again.finetuning) and again.cold_items.nonzero().flatten().tolist() == [3]
    with torch.no_grad():
        state, same = (m.start_decoding(batch["input_ids"], batch["attention_mask"]) for m in (model, again))
        assert torch.equal(model.draft_scores(state), again.draft_scores(same))


def test_bad_sizes():
    for options in ({"contrast_temperature": 0.0}, {"projection_size": 0}, {"finetune_share": 1.5}):
        with pytest.raises(IncompatibleComponentsError):
            SpecGRConfig.from_tokenizer(TOKENIZER, **options)
    with pytest.raises(IncompatibleComponentsError, match="shape"):
        small_model().set_catalogue(TOKENIZER.codes[:-1])
    bare = SpecGRForConditionalGeneration(SpecGRConfig(codebook_sizes=SIZES, **TINY)).eval()
    with pytest.raises(IncompatibleComponentsError, match="catalogue"):
        bare.draft_scores(bare.start_decoding(torch.tensor([[4, 8, 13]])))


# ---------------------------------------------------------------------------------------------------------- training


def successor_split(num_items: int, leave_out: list[int]) -> Split:
    """Item i is always followed by i + 1; rows with an item of `leave_out` are in no training row."""
    rng = np.random.default_rng(0)
    rows = [
        [(start + step) % num_items for step in range(length)]
        for start, length in zip(rng.integers(0, num_items, 90), rng.integers(5, 10, 90))
    ]
    train = Sequences.from_rows([[item for item in row[:-1] if item not in leave_out] for row in rows])
    everything = Sequences.from_rows(rows)
    held_out = EvaluationSet(
        np.arange(len(rows)), everything.truncate_tail(1), np.array([row[-1] for row in rows], np.int32)
    )
    return Split("leave_one_out", train, held_out, held_out, {})


def trained(tmp_path, leave_out: list[int], **options):
    items = np.arange(24)
    tokenizer = ItemTokenizer.from_codes([f"i{i}" for i in items], np.stack([items // 5, items % 5, items * 0], axis=1))
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4, "num_layers": 1, "num_decoder_layers": 1}
    config = SpecGRConfig.from_tokenizer(tokenizer, dropout_rate=0.0, projection_size=16, **sizes)
    model = SpecGRForConditionalGeneration(config)
    model.set_catalogue(tokenizer.codes)
    args = RecommenderTrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=32,
        learning_rate=8e-3,
        num_train_epochs=20,
        warmup_steps=5,
        max_history=2,
        eval_ks=[1, 5, 10],
        eval_num_beams=10,
        eval_exclude_seen=False,
        eval_epochs=10,
        metric_for_best_model="ndcg@10",
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    split = successor_split(24, leave_out)
    return train_recommender(model, tokenizer, split, args), tokenizer, split


def test_learns_the_successor_catalogue_and_ends_in_the_second_phase(tmp_path):
    """Both halves: the decoder's first item, and the drafter's first item, are the successor."""
    result, tokenizer, split = trained(tmp_path, [])
    assert result.summary["validation"]["recall@1"] == 1.0
    model = result.model
    assert bool(model.finetuning) and not model.cold_items.any()
    histories = [[f"i{item}" for item in row] for row in split.test.histories]
    batch = tokenizer.encode_histories(histories, max_items=2, return_tensors="pt")
    with torch.no_grad():
        state = model.start_decoding(batch["input_ids"], batch["attention_mask"])
        drafted = model.draft_scores(state).argmax(-1)
    assert drafted.tolist() == split.test.targets.tolist()
    options = {"num_drafts": 3, "threshold": -1.0}
    found = model.recommend(
        histories, tokenizer=tokenizer, k=1, exclude_seen=False, decoding="speculative", decoding_options=options
    )
    assert [row[0].item_id for row in found] == [f"i{target}" for target in split.test.targets]


def test_recommends_items_that_training_never_saw(tmp_path):
    cold = [7, 16]
    result, tokenizer, _ = trained(tmp_path, cold, eval_strategy="no")
    model = result.model
    assert model.cold_items.nonzero().flatten().tolist() == cold
    histories = [["i5", "i6"], ["i14", "i15"]]
    batch = tokenizer.encode_histories(histories, return_tensors="pt")
    with torch.no_grad():
        state = model.start_decoding(batch["input_ids"], batch["attention_mask"])
        config = model.recommendation_config.merged(k=3, num_beams=10)
        trie = ItemTrie.from_tokenizer(tokenizer)
        found = speculate(model, state, trie, config, batch_size=2, num_drafts=3, threshold=-math.inf)
        beam_only = speculate(model, state, trie, config, batch_size=2, num_drafts=3, threshold=math.inf)
    assert all(item in row for item, row in zip(cold, found.items_Bk.tolist())), "the successor that was never seen"
    assert not set(cold) & set(beam_only.items_Bk.flatten().tolist())


def test_generate_with_our_search_gives_the_same():
    codes = np.stack([np.arange(12) // 4, np.arange(12) % 4], axis=1)
    tokenizer = ItemTokenizer.from_codes([f"i{n}" for n in range(12)], codes, [4, 4])
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2, "num_layers": 1, "num_decoder_layers": 1}
    model = SpecGRForConditionalGeneration(SpecGRConfig.from_tokenizer(tokenizer, **sizes)).eval()
    model.set_catalogue(tokenizer.codes)
    inputs = tokenizer.encode_histories([["i1", "i2"], ["i5"]], return_tensors="pt")
    answers = model.generate(
        **inputs, custom_generate=ItemGeneration(tokenizer), num_beams=6, num_return_sequences=6, max_new_tokens=2
    )
    found = model.recommend(
        [["i1", "i2"], ["i5"]], tokenizer=tokenizer, k=6, num_beams=6, exclude_seen=False, decoding="beam"
    )
    expected = [tokenizer.item_token_ids(entry.item_id) for row in found for entry in row]
    assert answers[:, 1:].tolist() == expected
