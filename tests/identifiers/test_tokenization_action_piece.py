"""ActionPieceTokenizer: contextual tokens, permuted segmentations that read back, targets, files, generation."""

from __future__ import annotations

import copy
import itertools
import pickle

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

import hf_genrec
from hf_genrec.data.sequences import Sequences
from hf_genrec.errors import ArtifactError, IncompatibleComponentsError, ItemTableError, UnknownItemError
from hf_genrec.generation.trie import ItemTrie
from hf_genrec.identifiers.catalogue_file import FILE_NAME
from hf_genrec.identifiers.set_merges_file import MERGES_FILE_NAME
from hf_genrec.identifiers.tokenization_action_piece import ActionPieceTokenizer
from hf_genrec.identifiers.tokenization_item import ItemTokenizer

SIZES = [6, 6, 6, 40]
N = 40


def make_data(seed: int = 0):
    rng = np.random.default_rng(seed)
    features = np.concatenate([rng.integers(0, 6, (N, 3)), np.arange(N)[:, None]], axis=1)
    ids = [f"i{number}" for number in range(N)]
    walks = [(rng.integers(N) + np.cumsum(rng.integers(1, 4, rng.integers(1, 9)))) % N for _ in range(200)]
    return ids, features, [[ids[item] for item in walk] for walk in walks]


@pytest.fixture(scope="module")
def data():
    return make_data()


@pytest.fixture(scope="module")
def trained(data):
    ids, features, histories = data
    return ActionPieceTokenizer.train(ids, features, histories, feature_sizes=SIZES, vocabulary_size=300)


@pytest.fixture
def tokenizer(trained):
    return copy.deepcopy(trained)


def test_vocabulary_layout(tokenizer):
    assert len(tokenizer) == tokenizer.vocab_size == 4 + 300
    vocab = tokenizer.get_vocab()
    assert list(vocab.values()) == list(range(304))
    assert tokenizer.convert_ids_to_tokens(list(range(304))) == list(vocab)
    assert tokenizer.convert_tokens_to_ids(list(vocab)) == list(range(304))
    assert [vocab["<a_0>"], vocab["<d_0>"], vocab["<set_0>"]] == [4, 22, 62]
    for unknown in ("<set_242>", "<a_6>", "<e_0>", "<set_01>", "<user_0>", "word"):
        assert tokenizer(unknown)["input_ids"] == [2]
    text = tokenizer.decode([4, 62, 303])
    assert text == "<a_0><set_0><set_241>" and tokenizer(text)["input_ids"] == [4, 62, 303]


def test_without_merges_it_is_the_item_tokenizer_of_the_features(data):
    ids, features, histories = data
    options = {"num_user_tokens": 3, "history_eos": True, "max_history": 4}
    mine = ActionPieceTokenizer.from_features(ids, features, SIZES, **options)
    theirs = ItemTokenizer.from_codes(ids, features, SIZES, **options)
    users = [f"u{row}" if row % 3 else None for row in range(len(histories))]
    assert len(mine) == len(theirs)
    for padding in (True, False):
        ours, expected = (one.encode_histories(histories, user_ids=users, padding=padding) for one in (mine, theirs))
        assert dict(ours) == dict(expected)
    assert np.array_equal(mine.item_token_table, theirs.item_token_table)
    assert mine.decode_histories(mine.encode_histories(histories)["input_ids"]) == [row[-4:] for row in histories]


def test_the_same_item_has_other_tokens_beside_other_neighbours(tokenizer, data):
    _, _, histories = data
    rows = tokenizer.encode_histories(histories, padding=False)["input_ids"]
    alone = [list(itertools.chain(*map(tokenizer.item_token_ids, row))) for row in histories]
    assert sum(map(len, rows)) < sum(map(len, alone)) < 4 * sum(map(len, histories))
    masks = tokenizer.set_vocabulary.level_masks
    spanning = [any(masks[token - 4] < 0 for token in row) for row in rows]
    assert sum(spanning) > 50
    # a history of one item is the item's own tokens
    single = tokenizer.encode_histories([[item] for item in tokenizer.item_ids], padding=False)["input_ids"]
    assert single == [tokenizer.item_token_ids(item) for item in tokenizer.item_ids]


@pytest.mark.parametrize("seed", [None, 0, (5, 1)])
def test_every_segmentation_spells_and_reads_back_the_history(tokenizer, data, seed):
    _, features, histories = data
    tokenizer.resegment(seed)
    encoded = tokenizer.encode_histories(histories, return_tensors="pt")
    decoded = tokenizer.decode_histories(encoded["input_ids"])
    level_starts = np.cumsum([0, *SIZES[:-1]])
    equal = 0
    for row, history, read in zip(encoded["input_ids"].tolist(), histories, decoded):
        pieces = [token - 4 for token in row if token]
        spelled = sorted(itertools.chain(*map(tokenizer.set_vocabulary.features, pieces)))
        index = tokenizer.item_index(history)
        assert spelled == sorted((features[index] + level_starts).reshape(-1).tolist())
        reading = tokenizer.set_vocabulary.read(pieces, tokenizer._known_sets().__contains__)
        assert read == history or not reading.unique
        equal += read == history
    assert equal > 0.65 * len(histories)  # the others hold tokens that do not say which of two items came first


def test_seeds(tokenizer, data):
    _, _, histories = data
    histories = [row for row in histories if len(row) > 3]

    def rows(seed, some=histories):
        tokenizer.resegment(seed)
        return tokenizer.encode_histories(some, padding=False)["input_ids"]

    first = rows(3)
    assert rows(3) == first and rows((3, 1)) != first and rows(None) == rows(None) != first
    different = [a != b for a, b in zip(first, rows(4))]
    assert np.mean(different) > 0.9
    # the segmentation of a row does not depend on the batch around it
    assert [rows(3, [row])[0] for row in histories] == first
    assert rows(3, histories[::-1]) == first[::-1]
    assert rows(3, [histories[0]] * 2) == [first[0]] * 2
    # orders are even: each feature of an item comes first equally often
    plain = ActionPieceTokenizer.from_features(tokenizer.item_ids, tokenizer.features, SIZES)
    leading = []
    for seed in range(20):
        plain.resegment(seed)
        encoded = plain.encode_histories([[item] for item in plain.item_ids], return_tensors="np")["input_ids"]
        leading += np.searchsorted([4, 10, 16, 22], encoded[:, 0], side="right").tolist()
    counts = np.bincount(leading, minlength=5)[1:]
    assert counts.sum() == 800 and counts.min() > 150


def test_ensemble(tokenizer, data):
    _, _, histories = data
    one = tokenizer.encode_ensemble(histories, segmentations=1, seed=9, return_tensors="pt")
    tokenizer.resegment(9)
    single = tokenizer.encode_histories(histories, return_tensors="pt")
    assert torch.equal(one["input_ids"], single["input_ids"])
    many = tokenizer.encode_ensemble(histories, segmentations=3, seed=9, padding=False)["input_ids"]
    assert len(many) == 3 * len(histories)
    assert many[::3] == tokenizer.encode_histories(histories, padding=False)["input_ids"]
    long = [row for row, history in enumerate(histories) if len(history) > 3]
    assert np.mean([many[3 * row] != many[3 * row + 1] for row in long]) > 0.9
    with pytest.raises(IncompatibleComponentsError, match="segmentations is 0"):
        tokenizer.encode_ensemble(histories, segmentations=0)


def test_rows_by_index_equal_rows_by_id(tokenizer, data):
    _, _, histories = data
    index = [tokenizer.item_index(row) for row in histories]
    by_id = tokenizer.encode_histories(histories, max_items=3, return_tensors="np")
    for rows in (index, Sequences.from_rows([row.tolist() for row in index])):
        by_index = tokenizer.encode_item_indices(rows, max_items=3, return_tensors="np")
        assert np.array_equal(by_id["input_ids"], by_index["input_ids"])
        assert np.array_equal(by_id["attention_mask"], by_index["attention_mask"])


def test_training_takes_ids_or_rows(trained, data):
    ids, features, histories = data
    rows = Sequences.from_rows([trained.item_index(row).tolist() for row in histories])
    again = ActionPieceTokenizer.train(ids, features, rows, feature_sizes=SIZES, vocabulary_size=300)
    assert again.catalogue_fingerprint == trained.catalogue_fingerprint
    fewer = ActionPieceTokenizer.train(ids, features, rows, feature_sizes=SIZES, vocabulary_size=100)
    assert np.array_equal(fewer.set_vocabulary.merges, trained.set_vocabulary.merges[:42])
    assert fewer.catalogue_fingerprint != trained.catalogue_fingerprint


def test_targets(tokenizer):
    vocabulary = tokenizer.set_vocabulary
    table = tokenizer.item_token_table
    lengths = (table >= 0).sum(axis=1)
    assert lengths.min() < 4 and set(tokenizer.codebook_sizes) == {304}
    for item, row in zip(tokenizer.item_ids, table.tolist()):
        target = [token for token in row if token >= 0]
        assert target == tokenizer.item_token_ids(item)
        assert tokenizer.token_ids_to_items(target) == [[item]] == tokenizer.token_ids_to_items([*target, 1])
        assert tokenizer.codes_to_items(tokenizer.item_to_codes(item)) == [[item]]
        if len(target) > 1:
            assert tokenizer.token_ids_to_items(target[:-1]) == []
    targets = {tuple(token for token in row if token >= 0) for row in table.tolist()}
    assert not any(a != b and b[: len(a)] == a for a in targets for b in targets)  # no target starts another
    assert vocabulary.size == 300


def test_generated_sequences_of_any_segmentation(tokenizer, data):
    _, features, _ = data
    pieces = features[7] + np.cumsum([0, *SIZES[:-1]]) + 4
    for order in itertools.permutations(pieces.tolist()):
        assert tokenizer.token_ids_to_items(order) == [["i7"]]
        assert tokenizer.token_ids_to_items(order[:3]) == []
    other = [*pieces[:3], 22 + (features[7, 3] + 1) % 40]
    assert tokenizer.token_ids_to_items(other) in ([[]], [["i8"]])
    assert tokenizer.token_ids_to_items([*pieces[:3], pieces[0]]) == []  # one level twice
    assert tokenizer.token_ids_to_items([]) == tokenizer.token_ids_to_items([0, 1, 2]) == []


def test_legal_continuations_by_brute_force(tokenizer, data):
    _, features, _ = data
    numbered = features + np.cumsum([0, *SIZES[:-1]])
    spelled = [tokenizer.set_vocabulary.features(piece) for piece in range(300)]
    items = [set(row) for row in numbered.tolist()]
    rng = np.random.default_rng(0)
    checked = 0
    for _ in range(60):
        prefix: list[int] = []
        while True:
            used = list(itertools.chain(*(spelled[token - 4] for token in prefix)))
            expected = [
                piece + 4
                for piece in range(300)
                if len({*used, *spelled[piece]}) == len(used) + len(spelled[piece])
                and any({*used, *spelled[piece]} <= item for item in items)
            ]
            legal = tokenizer.legal_continuations(prefix).tolist()
            assert legal == expected
            checked += 1
            if not legal:
                break
            prefix.append(int(rng.choice(legal)))
        assert len(tokenizer.token_ids_to_items(prefix)) == 1 and tokenizer.token_ids_to_items(prefix)[0]
    assert checked > 150
    assert tokenizer.legal_continuations([1]).tolist() == []
    # every target is one of the ways
    for item in tokenizer.item_ids:
        target = tokenizer.item_token_ids(item)
        assert all(token in tokenizer.legal_continuations(target[:place]) for place, token in enumerate(target))


def test_a_plain_encoder_decoder_recommends(tokenizer, data):
    _, _, histories = data
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=16,
            d_kv=8,
            d_ff=16,
            num_layers=1,
            num_heads=2,
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=1,
        )
    ).eval()
    found = hf_genrec.recommend(model, histories[:4], tokenizer=tokenizer, k=N, num_beams=2 * N, exclude_seen=False)
    for row, recommended in zip(histories, found):
        assert sorted(one.item_id for one in recommended) == sorted(tokenizer.item_ids)
        # the score of an item is the log-probability of its target's tokens
        best = recommended[0]
        encoded = tokenizer.encode_histories([row], return_tensors="pt")
        labels = torch.tensor([tokenizer.item_token_ids(best.item_id)])
        with torch.no_grad():
            logits = model(**encoded, labels=labels).logits.log_softmax(-1)
        assert best.score == pytest.approx(logits.gather(2, labels[..., None]).sum().item(), abs=1e-4)
    assert ItemTrie.from_tokenizer(tokenizer).num_items == N


# --- files -------------------------------------------------------------------------------------------------------


def test_loads_through_auto_tokenizer(data, tmp_path):
    ids, features, histories = data
    tokenizer = ActionPieceTokenizer.train(
        ids, features, histories, feature_sizes=SIZES, vocabulary_size=200, num_user_tokens=5, max_history=6
    )
    tokenizer.resegment(1)
    tokenizer.save_pretrained(tmp_path / "one")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "one")
    assert type(loaded) is ActionPieceTokenizer
    assert loaded.catalogue_fingerprint == tokenizer.catalogue_fingerprint
    assert (loaded.num_user_tokens, loaded.max_history, len(loaded)) == (5, 6, 209)
    assert np.array_equal(loaded.item_token_table, tokenizer.item_token_table)
    users = ["u"] * len(histories)
    tokenizer.resegment(None)  # the seed is not saved
    assert dict(loaded.encode_histories(histories, users)) == dict(tokenizer.encode_histories(histories, users))
    loaded.save_pretrained(tmp_path / "two")
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file.name


def test_damaged_files_are_named(trained, data, tmp_path):
    ids, features, _ = data
    trained.save_pretrained(tmp_path)
    merges = (tmp_path / MERGES_FILE_NAME).read_bytes()
    (tmp_path / MERGES_FILE_NAME).write_bytes(merges[:-9])
    with pytest.raises(ArtifactError, match=r"set_merges.safetensors: cannot be read"):
        AutoTokenizer.from_pretrained(tmp_path)
    (tmp_path / MERGES_FILE_NAME).write_bytes((tmp_path / FILE_NAME).read_bytes())
    with pytest.raises(ArtifactError, match="not a merges file"):
        AutoTokenizer.from_pretrained(tmp_path)
    other = ActionPieceTokenizer.from_features(ids, features, [6, 6, 7, 40])
    other.save_pretrained(tmp_path / "other")
    (tmp_path / MERGES_FILE_NAME).write_bytes((tmp_path / "other" / MERGES_FILE_NAME).read_bytes())
    with pytest.raises(ArtifactError, match="do not belong to a catalogue"):
        AutoTokenizer.from_pretrained(tmp_path)
    (tmp_path / MERGES_FILE_NAME).unlink()
    with pytest.raises(ArtifactError, match=r"set_merges.safetensors is missing"):
        AutoTokenizer.from_pretrained(tmp_path)


def test_copies(tokenizer, data):
    _, _, histories = data
    tokenizer.legal_continuations([])
    tokenizer.decode_histories(tokenizer.encode_histories(histories)["input_ids"])
    for other in (copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):  # noqa: S301 (our own bytes)
        assert other.catalogue_fingerprint == tokenizer.catalogue_fingerprint
        assert dict(other.encode_histories(histories)) == dict(tokenizer.encode_histories(histories))
        assert other.legal_continuations([5]).tolist() == tokenizer.legal_continuations([5]).tolist()


def test_new_items_join_an_old_vocabulary(tokenizer, data):
    ids, features, _ = data
    more = np.concatenate([features, [[0, 1, 2, 3]]])
    wider = ActionPieceTokenizer.from_features([*ids, "new"], more, set_vocabulary=tokenizer.set_vocabulary)
    assert len(wider) == len(tokenizer)
    assert np.array_equal(wider.item_token_table[:N], tokenizer.item_token_table)
    assert wider.token_ids_to_items(wider.item_token_ids("new")) == [["new"]]


def test_items_of_equal_features_share_their_tokens():
    tokenizer = ActionPieceTokenizer.from_features(["x", "y", "z"], [[0, 0], [0, 0], [1, 0]])
    assert tokenizer.token_ids_to_items(tokenizer.item_token_ids("y")) == [["x", "y"]]
    assert tokenizer.decode_histories(tokenizer.encode_histories([["y", "z"]])["input_ids"]) == [["x", "z"]]


def test_bad_input_is_named(data):
    ids, features, histories = data
    with pytest.raises(IncompatibleComponentsError, match="give 58 or more"):
        ActionPieceTokenizer.train(ids, features, histories, feature_sizes=SIZES, vocabulary_size=57)
    with pytest.raises(UnknownItemError, match="'nope'"):
        ActionPieceTokenizer.train(ids, features, [["nope"]], vocabulary_size=100)
    with pytest.raises(UnknownItemError, match="row 1"):
        ActionPieceTokenizer.train(ids, features, Sequences.from_rows([[0], [N]]), vocabulary_size=100)
    with pytest.raises(ItemTableError, match=r"row 1 \(item 'y'\)"):
        ActionPieceTokenizer.from_features(["x", "y"], [[0, 0], [0, -1]])
    tokenizer = ActionPieceTokenizer.from_features(ids, features)
    for arguments in ({"padding": "max_length"}, {"return_tensors": "tf"}, {"max_items": -1}):
        with pytest.raises(IncompatibleComponentsError):
            tokenizer.encode_histories(histories, **arguments)
    with pytest.raises(ValueError):
        tokenizer.resegment(-1)
    with pytest.raises(IncompatibleComponentsError, match="num_user_tokens"):
        ActionPieceTokenizer.from_features(ids, features, num_user_tokens=-2)
