"""The alternating schedule and the index versions: who learns, when codes change, what is stale afterwards, resuming."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from trainer_cases import NUM_ITEMS, same, small_arguments, successor_split, weights

from hf_genrec.alignment.trainers.joint import (
    RECOMMENDER,
    TOKENIZER,
    JointTrainer,
    Phase,
    alternating_schedule,
    finished_phases,
    train_jointly,
)
from hf_genrec.alignment.trainers.recommender import train_recommender
from hf_genrec.alignment.trainers.versions import CatalogueIndex, with_codes
from hf_genrec.data.collators import PackedPrefixCollator
from hf_genrec.errors import IncompatibleComponentsError, TrainingError
from hf_genrec.generation.trie import ItemTrie
from hf_genrec.identifiers.collision_fixed import fixed_counter
from hf_genrec.identifiers.collision_groups import code_groups
from hf_genrec.identifiers.quantizers.configuration_rq_vae import RQVAEConfig
from hf_genrec.identifiers.quantizers.rq_vae import RQVAEModel
from hf_genrec.identifiers.tokenization_item import ItemTokenizer
from hf_genrec.models.etegrec.configuration_etegrec import EtegrecConfig
from hf_genrec.models.etegrec.modeling_etegrec import EtegrecForConditionalGeneration

SIZES = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2, "num_layers": 1, "num_decoder_layers": 1}


def item_vectors() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(NUM_ITEMS, 6)).astype(np.float32)


def small_case(seed: int = 0, **options):
    """Model with a quantizer, and the tokenizer of its codes (3 levels, the last a counter with room to spare)."""
    torch.manual_seed(seed)
    config = RQVAEConfig(
        input_size=6, hidden_sizes=[8], latent_size=4, codebook_sizes=[4, 4], codebook_update="gradient"
    )
    quantizer = RQVAEModel(config).initialise_codebooks(item_vectors())
    codes = resolved(quantizer, 12)
    tokenizer = ItemTokenizer.from_codes([f"i{i}" for i in range(NUM_ITEMS)], codes, codebook_sizes=[4, 4, 12])
    torch.manual_seed(seed)
    values = {"causal_encoder": True, "dropout_rate": 0.1} | SIZES | options
    model = EtegrecForConditionalGeneration(EtegrecConfig.from_tokenizer(tokenizer, **values))
    model.attach_quantizer(quantizer, item_vectors())
    model.set_catalogue(tokenizer.codes)
    return model, tokenizer


def resolved(quantizer, size: int) -> np.ndarray:
    return fixed_counter(
        quantizer.encode(item_vectors()).numpy(),
        quantizer.codebook_sizes,
        size,
        codebooks=quantizer.codebooks,
        features=quantizer.transform(item_vectors()).numpy(),
    )


def reassign(model, tokenizer) -> np.ndarray:
    return resolved(model.quantizer, tokenizer.codebook_sizes[-1])


def arguments(folder, **options):
    return small_arguments(folder, **({"max_train_seconds": None, "per_device_train_batch_size": 16} | options))


FAST = {"learning_rate": 0.05}  # moves the codes of this tiny quantizer within one epoch


def run(folder, schedule, *, resume=False, **options):
    model, tokenizer = small_case()
    return train_jointly(
        model,
        tokenizer,
        successor_split(),
        arguments(folder, **options),
        schedule,
        reassign,
        tokenizer_args=FAST,
        progress=False,
        resume=resume,
    )


def test_schedule_warms_up_alternates_and_ends_with_the_recommender() -> None:
    phases = alternating_schedule(2, recommender_epochs=2, warm_epochs=1, final_epochs=4)
    assert [(phase.side, phase.epochs) for phase in phases] == [
        (RECOMMENDER, 1),
        (TOKENIZER, 1),
        (RECOMMENDER, 2),
        (TOKENIZER, 1),
        (RECOMMENDER, 2),
        (RECOMMENDER, 4),
    ]
    assert not phases[0].aligned and phases[1].aligned
    assert [phase.final for phase in phases] == [False] * 5 + [True]
    with pytest.raises(TrainingError, match="must end with the recommender"):
        alternating_schedule(1, recommender_epochs=0)


class Watch(JointTrainer):
    """Notes weights and codes before and after each phase."""

    def _phase(self, number, schedule, resume):
        before, codes, trie = weights(self.model), self.index.tokenizer.codes, self.model._trie
        result = super()._phase(number, schedule, resume)
        after = weights(self.model)
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        self.seen.append((schedule[number], changed, codes, self.index.tokenizer.codes, trie, self.model._trie))
        return result


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    model, tokenizer = small_case()
    trainer = Watch(
        model,
        tokenizer,
        successor_split(),
        arguments(tmp_path_factory.mktemp("joint")),
        reassign,
        tokenizer_args=FAST,
        progress=False,
    )
    trainer.seen = []
    result = trainer.run(alternating_schedule(2, recommender_epochs=1, warm_epochs=1, final_epochs=2))
    return trainer, result


def test_only_the_learning_side_changes(watched) -> None:
    trainer, _ = watched
    assert len(trainer.seen) == 6
    for phase, changed, *_ in trainer.seen:
        quantizer = {name for name in changed if name.startswith("quantizer.")}
        assert changed, phase
        assert quantizer == (changed if phase.side == TOKENIZER else set()), phase


def test_codes_change_in_tokenizer_phases_only_and_never_after_the_freeze(watched) -> None:
    trainer, result = watched
    for phase, _, before, after, old_trie, new_trie in trainer.seen:
        assert np.array_equal(before, after) == (phase.side == RECOMMENDER)
        assert (old_trie is new_trie) == (phase.side == RECOMMENDER)  # the trie moves with the codes
        assert len(np.unique(after, axis=0)) == NUM_ITEMS
    history = result.summary["phases"]
    assert [entry["index_version"] for entry in history] == [0, 1, 1, 2, 2, 2]
    assert [entry["codes_changed"] > 0 for entry in history] == [False, True, False, True, False, False]
    assert result.summary["index_version"] == 2 and "ndcg@10" in result.summary["validation"]


def test_tokenizer_model_and_trie_are_of_one_version_at_the_end(watched) -> None:
    trainer, result = watched
    model, tokenizer = result.model, result.tokenizer
    assert model.config.catalogue_fingerprint == tokenizer.catalogue_fingerprint
    items = torch.arange(NUM_ITEMS)
    assert torch.equal(model._trie.first_items(model._trie.lookup(torch.tensor(tokenizer.codes).long())), items)
    assert np.array_equal(reassign(model, tokenizer), tokenizer.codes)  # the saved quantizer gives these very codes
    assert len(model.recommend([["i3", "i4"]], tokenizer=tokenizer, k=5)[0]) == 5
    assert all(not name.endswith("running") for name in (path.name for path in trainer.folder.iterdir()))


def test_stale_codes_are_refused_everywhere(tmp_path) -> None:
    model, tokenizer = small_case()
    index = CatalogueIndex(model, tokenizer)
    collator, samples = index.collator(PackedPrefixCollator), [{"items": np.array([0, 1, 2])}]
    stale = collator(samples)
    codes = tokenizer.codes.copy()
    codes[[0, 1]] = codes[[1, 0]]
    codes[2] = [3, 3, 11]  # nobody had this code, nobody has the old one any more
    assert index.reassign(codes) == 3 and index.version == 1
    with pytest.raises(IncompatibleComponentsError, match="index version 0, the model speaks version 1"):
        collator(samples)
    with pytest.raises(IncompatibleComponentsError, match="was made for catalogue"):
        train_recommender(model, tokenizer, successor_split(), arguments(tmp_path))
    with pytest.raises(IncompatibleComponentsError, match="was made for catalogue"):
        model.recommend([["i0"]], tokenizer=tokenizer, k=2)
    with pytest.raises(IncompatibleComponentsError, match="no item of this index version"):
        model.train()(**stale)
    assert index.collator(PackedPrefixCollator)(samples)["labels"].shape == (1, 2, 3)
    fresh = ItemTrie.from_tokenizer(index.tokenizer)
    assert int(fresh.first_items(fresh.lookup(torch.tensor([[3, 3, 11]])))) == 2
    with pytest.raises(IncompatibleComponentsError, match="keeps items and levels"):
        with_codes(tokenizer, codes[:, :2])
    other = ItemTokenizer.from_codes(tokenizer.item_ids, codes, codebook_sizes=[4, 4, 13])
    with pytest.raises(IncompatibleComponentsError, match="one layout"):
        index.adopt(other, 2)


def test_one_recommender_phase_is_train_recommender(tmp_path) -> None:
    result = run(tmp_path / "a", [Phase(RECOMMENDER, 2, final=True)])
    model, tokenizer = small_case()
    model.start_phase(RECOMMENDER, aligned=True)
    train_recommender(model, tokenizer, successor_split(), arguments(tmp_path / "b"))
    assert same(weights(result.model), weights(model))


def test_a_run_that_stopped_between_phases_goes_on_bit_for_bit(tmp_path) -> None:
    schedule = alternating_schedule(2, recommender_epochs=1, final_epochs=1)
    whole = run(tmp_path / "whole", schedule)

    class Stop(Exception):
        pass

    calls = []

    def stopping(model, tokenizer):
        calls.append(1)
        if len(calls) == 2:
            raise Stop
        return reassign(model, tokenizer)

    model, tokenizer = small_case()
    options = {"tokenizer_args": FAST, "progress": False}
    with pytest.raises(Stop):
        train_jointly(model, tokenizer, successor_split(), arguments(tmp_path / "cut"), schedule, stopping, **options)
    assert [path.name for path in finished_phases(tmp_path / "cut")] == ["phase-1"]
    with pytest.raises(TrainingError, match="phases of an earlier run"):
        run(tmp_path / "cut", schedule)
    resumed = run(tmp_path / "cut", schedule, resume=True)
    assert same(weights(whole.model), weights(resumed.model))
    assert whole.tokenizer.catalogue_fingerprint == resumed.tokenizer.catalogue_fingerprint
    keys = ("side", "train_loss", "codes_changed", "index_version")
    pick = [[entry[key] for key in keys] for entry in whole.summary["phases"]]
    assert pick == [[entry[key] for key in keys] for entry in resumed.summary["phases"]]


def test_fixed_counter_is_the_counter_while_there_is_room_and_unique_when_not() -> None:
    rng = np.random.default_rng(1)
    books = [rng.normal(size=(3, 2)) for _ in range(2)]
    features = rng.normal(size=(40, 2))
    codes = np.stack([rng.integers(0, 2, 40), rng.integers(0, 2, 40)], axis=1)
    largest = int(code_groups(codes, (3, 3))[1].max())
    roomy = fixed_counter(codes, (3, 3), largest, codebooks=books, features=features)
    assert np.array_equal(roomy[:, :2], codes)
    tight = fixed_counter(codes, (3, 3), 8, codebooks=books, features=features)
    assert len(np.unique(tight, axis=0)) == 40 and tight[:, 2].max() < 8
    assert np.array_equal(tight[:, 0], codes[:, 0])
    kept = (tight[:, 1] == codes[:, 1]).sum()
    assert kept == sum(min(8, size) for size in code_groups(codes, (3, 3))[1])
    with pytest.raises(IncompatibleComponentsError, match="a larger counter"):
        fixed_counter(codes, (3, 3), 2, codebooks=books, features=features)
