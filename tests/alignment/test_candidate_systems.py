"""What the papers of candidate rankers promise, on small cases: LlamaRec, TALLRec, A-LLMRec with another backbone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from candidate_training_cases import N, arguments, cases, split

from hf_genrec.alignment.trainers.candidate_metrics import auc
from hf_genrec.alignment.trainers.candidate_stages import RANKER_METHODS, LoraOptions
from hf_genrec.alignment.trainers.candidate_training import train_candidate_ranker
from hf_genrec.data.sequences import Sequences
from hf_genrec.data.splits import EvaluationSet, Split
from hf_genrec.errors import IncompatibleComponentsError
from hf_genrec.identifiers.tokenization_item import ItemTokenizer
from hf_genrec.models.candidate_ranker.modeling_candidate_ranker import CandidateRankerForCausalLM
from hf_genrec.models.rq_transformer.configuration_rq_transformer import RQTransformerConfig
from hf_genrec.models.rq_transformer.modeling_rq_transformer import RQTransformerForCausalLM
from hf_genrec.models.tiger.configuration_tiger import TigerConfig
from hf_genrec.models.tiger.modeling_tiger import TigerForConditionalGeneration


def test_llamarec_scores_twenty_candidates_of_all_users_in_one_pass():
    model, items, _ = cases.ranker(**RANKER_METHODS["llamarec"].fields)
    assert model.config.num_candidates == 20
    histories = [[1, 2, 3], [5], [], [7, 8, 9, 10]]
    lists = np.stack([np.random.default_rng(row).permutation(N)[:20] for row in range(4)])
    model.rank_candidates(histories, lists)  # the head is tried out once
    calls = []
    handle = model.language_model.base_model.register_forward_hook(lambda *_: calls.append(1))
    scores = model.rank_candidates(histories, lists)
    assert len(calls) == 1 and scores.shape == (4, 20)
    assert torch.allclose(scores.exp().sum(1), torch.ones(4), atol=1e-5)
    assert len(torch.unique(scores[0])) == 20
    found = model.recommend([["i1", "i2"], ["i5"]], tokenizer=items, k=20)
    handle.remove()
    assert len(calls) == 2 and [len(row) for row in found] == [20, 20]


# -- TALLRec -----------------------------------------------------------------------------------------------------------

SIZE = 120
LIKED_WORDS = ("red", "blue", "old", "tiny", "happy")


def tasteful_ranker(seed: int = 0):
    """A ranker over 120 titles, of which those that begin with a certain word are liked by everyone."""
    text, items = cases.text_tokenizer(), cases.item_tokenizer(SIZE)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "initializer_range": 0.1}
    model = CandidateRankerForCausalLM.from_language_model(
        cases.language_model(text, seed=seed, **sizes), text, item_tokenizer=items, item_texts=cases.titles(SIZE),
        retriever=cases.retriever(items), num_candidates=20, max_history=4, **RANKER_METHODS["tallrec"].fields,
    )  # fmt: skip
    return model.eval(), items, text


@pytest.mark.slow
def test_tallrec_learns_taste_from_64_samples_and_not_from_general_instructions(tmp_path):
    liked = np.array([title.split()[0] in LIKED_WORDS for title in cases.titles(SIZE)])
    rng = np.random.default_rng(0)
    table = [rng.permutation(SIZE)[:8].tolist() for _ in range(60)]
    train, unseen = Sequences.from_rows(table), [rng.permutation(SIZE)[:4].tolist() for _ in range(4)]
    nobody = EvaluationSet(np.zeros(0, np.int64), Sequences.from_rows([]), np.zeros(0, np.int64))
    rows = Split("leave_one_out", train, nobody, nobody, {})
    ratings = np.where(liked[train.items], 5.0, 1.0)

    def separation(model) -> float:
        scores = model.rank_candidates(unseen, np.stack([np.arange(SIZE)] * len(unseen)))
        return float(np.mean([auc(row, liked) for row in scores.numpy()]))

    method = RANKER_METHODS["tallrec"]
    reached = {}
    for name, stages in (("instructions", method.stages[:1]), ("both", method.stages)):
        model, items, text = tasteful_ranker()
        assert abs(separation(model) - 0.5) < 0.15
        instructions = [text.encode(f"Say the number {n}: {n}") for n in range(40)]
        before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        train_candidate_ranker(
            model,
            items,
            rows,
            arguments(tmp_path / name, max_steps=100, learning_rate=1e-2, per_device_train_batch_size=16),
            stages=[stage.__class__(**{**vars(stage), "options": {}}) for stage in stages],
            lora=LoraOptions(8, 16, 0.0, "all-linear"),
            instructions=[{"input_ids": ids, "labels": ids} for ids in instructions],
            ratings=ratings,
            samples=64,
            merge=False,
        )
        after = {key.replace(".base_layer", ""): tensor for key, tensor in model.state_dict().items()}
        assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())  # adapters alone have moved
        assert any(".lora_" in key for key in after)
        reached[name] = separation(model)
    assert abs(reached["instructions"] - 0.5) < 0.2 and reached["both"] > 0.8, reached


# -- A-LLMRec ----------------------------------------------------------------------------------------------------------


def joint_ranker(retriever, items: ItemTokenizer):
    text = cases.text_tokenizer()
    fields = {**RANKER_METHODS["a_llmrec"].fields, "num_candidates": 4}
    return CandidateRankerForCausalLM.from_language_model(
        cases.language_model(text), text, item_tokenizer=items, item_texts=cases.titles(), retriever=retriever,
        item_vectors=np.zeros((N, 6), np.float32), **fields,
    ).eval()  # fmt: skip


def test_a_llmrecs_backbone_can_be_another_without_touching_the_language_model(tmp_path):
    items, texts = cases.item_tokenizer(), np.random.default_rng(0).normal(size=(N, 12)).astype(np.float32)
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    other = RQTransformerForCausalLM(RQTransformerConfig.from_tokenizer(items, **sizes)).eval()
    language, scores = [], []
    for number, backbone in enumerate((cases.retriever(items), other)):
        model = joint_ranker(backbone, items)
        before = {name: tensor.clone() for name, tensor in model.retriever.state_dict().items()}
        stages = RANKER_METHODS["a_llmrec"].stages
        train_candidate_ranker(
            model, items, split(), arguments(tmp_path / str(number)), stages=stages, text_vectors=texts
        )
        language.append(model.language_model.state_dict())
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.retriever.state_dict().items())
        assert len(torch.unique(model.item_vectors, dim=0)) == N
        scores.append(model.rank_candidates([[1, 2]], [[3, 4, 5]]))
        with torch.no_grad():  # the user's token is the backbone's state
            ids, mask = model.retriever_inputs([np.array([1, 2])])
            state = backbone.base_model(input_ids=ids, attention_mask=mask).last_hidden_state[:, -1]
        assert torch.allclose(model.user_vectors(ids, mask), state, atol=1e-5)
        assert len(model.recommend([["i1"]], tokenizer=items, k=5)[0]) == 5
    assert all(torch.equal(tensor, language[1][name]) for name, tensor in language[0].items())
    assert torch.isfinite(scores[1]).all() and not torch.allclose(scores[0], scores[1])


def test_a_backbone_without_user_states_is_refused():
    items = cases.item_tokenizer()
    sizes = {"d_model": 16, "d_ff": 16, "num_layers": 1, "num_heads": 2, "d_kv": 8}
    tiger = TigerForConditionalGeneration(TigerConfig.from_tokenizer(items, **sizes)).eval()
    with pytest.raises(
        IncompatibleComponentsError, match=r"decoder-only retriever .* such as SASRec or RQ-Transformer"
    ):
        joint_ranker(tiger, items)
