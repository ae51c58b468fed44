"""Training methods that do more than train: a number chosen on validation, and code vectors of another domain."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hf_genrec import ItemTokenizer, ItemTrie, load_artifact
from hf_genrec.alignment.trainers.arguments import RecommenderTrainingArguments
from hf_genrec.data.sequences import Sequences
from hf_genrec.data.splits import EvaluationSet, Split
from hf_genrec.errors import IncompatibleComponentsError, RecipeError
from hf_genrec.models.setrec.configuration_setrec import SETRecConfig
from hf_genrec.models.setrec.modeling_setrec import SETRecForCausalLM
from hf_genrec.models.vq_rec.configuration_vq_rec import VQRecConfig
from hf_genrec.models.vq_rec.modeling_vq_rec import VQRecForRecommendation
from hf_genrec.recipes.pipeline import train_recipe
from hf_genrec.recipes.resolver import resolve_recipe
from hf_genrec.recipes.stages.context import StageContext, TrainingJob
from hf_genrec.recipes.stages.transfer import transfer_codes
from hf_genrec.recipes.stages.tuned import score_values, tuned_next_item

N = 30


def _split() -> Split:
    rng = np.random.default_rng(0)
    rows = [[(start + step) % N for step in range(10)] for start in rng.integers(0, N, 40)]
    everything = Sequences.from_rows(rows)
    targets = np.array([row[-1] for row in rows], np.int32)
    held_out = EvaluationSet(np.arange(len(rows)), everything.truncate_tail(1), targets)
    return Split("leave_one_out", everything.truncate_tail(1), held_out, held_out, {})


def _job(model, tokenizer, folder, epochs: float = 2.0) -> TrainingJob:
    args = RecommenderTrainingArguments(
        output_dir=str(folder),
        num_train_epochs=epochs,
        learning_rate=5e-3,
        max_history=10,
        per_device_train_batch_size=8,
        eval_ks=[10],
        disable_tqdm=True,
        use_cpu=True,
    )
    data = SimpleNamespace(num_items=N)
    return TrainingJob(None, StageContext(data, _split(), progress=False), model, tokenizer, args)  # type: ignore[arg-type]


def _setrec() -> tuple[SETRecForCausalLM, ItemTokenizer]:
    tokenizer = ItemTokenizer.from_codes([f"i{n}" for n in range(N)], np.arange(N)[:, None])
    sizes = {"item_feature_dims": [8, 8], "hidden_size": 16, "intermediate_size": 16, "autoencoder_sizes": [8]}
    torch.manual_seed(0)
    model = SETRecForCausalLM(SETRecConfig.from_tokenizer(tokenizer, num_semantic_tokens=2, dropout=0.0, **sizes))
    model.set_catalogue(tokenizer.codes, np.random.default_rng(0).normal(size=(N, 16)))
    return model, tokenizer


def test_the_value_with_the_best_validation_score_is_chosen_and_nothing_else_changes(tmp_path) -> None:
    model, tokenizer = _setrec()
    values = [0.0, 0.5, 1.0]
    result = tuned_next_item(_job(model, tokenizer, tmp_path), field="semantic_weight", values=values)
    chosen = result.summary["chosen"]
    assert chosen["field"] == "semantic_weight" and list(chosen["ndcg@10"]) == ["0", "0.5", "1"]
    best = max(chosen["ndcg@10"], key=lambda value: chosen["ndcg@10"][value])
    assert result.model.config.semantic_weight == chosen["value"] == float(best)
    json.dumps(result.summary)
    # brute force: the same number from one ranking of our own
    validation = _split().validation
    batch = tokenizer.encode_item_indices(list(validation.histories), return_tensors="pt")
    with torch.no_grad():
        seen = [np.unique(row) for row in validation.histories]
        trie = ItemTrie.from_tokenizer(tokenizer)
        items, _ = result.model.recommend_indices(
            batch["input_ids"], batch["attention_mask"], trie=trie, k=10, seen=seen
        )
    hit = items.numpy() == validation.targets[:, None]
    assert np.isclose((hit / np.log2(np.arange(10) + 2)).sum(1).mean(), chosen["ndcg@10"][best])
    # the measurement leaves the configuration as it was
    before = result.model.config.semantic_weight
    score_values(result.model, tokenizer, validation, "semantic_weight", [0.3])
    assert result.model.config.semantic_weight == before


def test_a_field_that_is_no_number_names_the_nearest(tmp_path) -> None:
    job = _job(*_setrec(), tmp_path)
    with pytest.raises(RecipeError, match="semantic_weight"):
        tuned_next_item(job, field="semantic_weigth", values=[0.0])
    with pytest.raises(RecipeError, match="list of numbers"):
        tuned_next_item(job, field="semantic_weight", values=["all"])
    with pytest.raises(RecipeError, match="method_options"):
        resolve_recipe("setrec", {"training.method_options": {"fields": "semantic_weight"}})


def _vq_rec(seed: int, **options) -> tuple[VQRecForRecommendation, ItemTokenizer]:
    codes = np.random.default_rng(seed).integers(0, 6, (N, 3))
    tokenizer = ItemTokenizer.from_codes([f"i{n}" for n in range(N)], codes, [6] * 3)
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "max_position_embeddings": 10, "dropout": 0.0}
    model = VQRecForRecommendation(VQRecConfig.from_tokenizer(tokenizer, **(sizes | options)))
    model.set_catalogue(tokenizer.codes)
    return model, tokenizer


def test_transfer_learns_the_permutation_first_and_all_weights_then(tmp_path, monkeypatch) -> None:
    source, _ = _vq_rec(0)
    source.save_pretrained(tmp_path / "source")
    target, tokenizer = _vq_rec(1)
    after_first = {}
    end = VQRecForRecommendation.end_transfer

    def record(self) -> None:
        after_first.update({name: weight.detach().clone() for name, weight in self.model.named_parameters()})
        end(self)

    monkeypatch.setattr(VQRecForRecommendation, "end_transfer", record)
    job = _job(target, tokenizer, tmp_path / "run")
    result = transfer_codes(job, source=str(tmp_path / "source"), permutation_epochs=1.0)
    old = dict(source.model.named_parameters())
    for name, weight in after_first.items():
        if not name.startswith(("code_embedding", "permutation")):
            assert torch.equal(weight, old[name]), name  # frozen while the permutation was learned
    assert result.model.model.permutation is None
    assert any(not torch.equal(weight, old[name]) for name, weight in result.model.model.named_parameters())
    transfer = result.summary["transfer"]
    assert transfer["permutation"]["epochs"] == 1.0 and transfer["source"].endswith("source")
    # a second model of the same run goes on from its checkpoint, without the source
    job = _job(_vq_rec(1)[0], tokenizer, tmp_path / "run", epochs=3.0)
    job.resume = True
    again = transfer_codes(job, source=str(tmp_path / "gone"))
    assert again.summary["epochs"] == 3.0 and "permutation" not in again.summary["transfer"]


def test_a_source_of_another_kind_is_refused(tmp_path) -> None:
    other, _ = _setrec()
    other.save_pretrained(tmp_path / "setrec")
    job = _job(*_vq_rec(1), tmp_path / "run")
    with pytest.raises(IncompatibleComponentsError, match="SETRecForCausalLM"):
        transfer_codes(job, source=str(tmp_path / "setrec"))
    with pytest.raises(RecipeError, match="source"):
        transfer_codes(job, source="")
    with pytest.raises(IncompatibleComponentsError, match="transferable_codes"):
        resolve_recipe("sasrec", {"training.method": "transfer_codes"})


@pytest.mark.slow
def test_from_movielens_100k_to_movielens_latest_small(tmp_path, ml100k_dir, minilm_dir, data_dir) -> None:
    """The popular films of two real catalogues: the old Transformer with permuted code vectors, then fine-tuned."""
    small = {
        "num_codebooks": 8,
        "codebook_size": 16,
        "pca_dim": 32,
        "model.intermediate_size": 64,
        "training.num_train_epochs": 8,
        "logging_steps": 1000,
        "eval_epochs": 4,
    }
    source = resolve_recipe("vq_rec", small | {"data.min_item": 200, "model.pretrain_share": 0.5})
    train_recipe(source, "movielens-100k", tmp_path / "old", baselines=[], progress=False)
    options = {"source": str(tmp_path / "old"), "permutation_epochs": 4.0}
    recipe = resolve_recipe(
        "vq_rec",
        small | {"data.min_item": 100, "training.method": "transfer_codes", "training.method_options": options},
    )
    trained = train_recipe(
        recipe, "movielens-latest-small", tmp_path / "new", data_dir=data_dir, baselines=["popularity"], progress=False
    )
    summary = trained.metrics["training"]["transfer"]["permutation"]
    # frozen weights of the old domain and a learned order of its code vectors already rank better than chance
    assert summary["validation"]["recall@10"] > 1.5 * 10 / trained.data.num_items
    assert trained.metrics["test"]["recall@10"] > summary["validation"]["recall@10"]
    assert load_artifact(tmp_path / "new").recommend([[trained.data.item_ids[0]]], k=3)[0][0].rank == 1
