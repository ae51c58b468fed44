"""Training of candidate rankers: stages and what they leave alone, curriculum, alignment, resume, learning."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from candidate_training_cases import LORA, N, arguments, cases, changed, dataset, split, tensors

from hf_genrec.alignment.trainers.candidate_alignment import CollaborativeTextAligner
from hf_genrec.alignment.trainers.candidate_data import (
    CandidateCollator,
    candidate_preference_rows,
    closed_lists,
)
from hf_genrec.alignment.trainers.candidate_metrics import list_metrics
from hf_genrec.alignment.trainers.candidate_stages import RANKER_METHODS, LoraOptions, RankerStage
from hf_genrec.alignment.trainers.candidate_training import (
    CandidateTrainer,
    closed_list_scores,
    evaluate_written_answers,
    train_candidate_ranker,
)
from hf_genrec.data.sequences import Sequences
from hf_genrec.data.splits import Split
from hf_genrec.errors import IncompatibleComponentsError, TrainingError
from hf_genrec.evaluation.recommenders import ModelRecommender
from hf_genrec.models.auto import AutoModelForRecommendation

# -- stages ------------------------------------------------------------------------------------------------------------


def test_collm_trains_adapters_first_and_the_mapping_alone_afterwards(tmp_path):
    method = RANKER_METHODS["collm"]
    model, items, _ = cases.ranker(**method.fields)
    before, states = tensors(model), []

    original = CandidateTrainer.train

    def train(self, *args, **kwargs):
        states.append((self.stage.name, tensors(self.model)))
        result = original(self, *args, **kwargs)
        states.append((self.stage.name, tensors(self.model)))
        return result

    CandidateTrainer.train = train
    try:
        result = train_candidate_ranker(
            model, items, split(), arguments(tmp_path), stages=method.stages, lora=LORA, merge=False
        )
    finally:
        CandidateTrainer.train = original
    assert [name for name, _ in states] == ["text", "text", "mapping", "mapping"]
    (_, start), (_, text), (_, same), (_, mapped) = states
    moved = {name for name in text if not torch.equal(text[name], start[name])}
    assert moved and all(".lora_" in name for name in moved)
    assert all(torch.equal(text[name], same[name]) for name in text)
    moved = {name for name in mapped if not torch.equal(mapped[name], text[name])}
    assert any(name.startswith("item_injector.") for name in moved)
    assert any(name.startswith("user_injector.") for name in moved)
    assert not any(".lora_" in name or name.startswith(("language_model.", "retriever.")) for name in moved)
    for name, tensor in before.items():  # base and retriever never moved
        if name.startswith("retriever."):
            assert torch.equal(tensor, mapped[name])
    assert list(result.stages) == ["text", "mapping"]
    saved = sorted(path.name for path in tmp_path.iterdir() if path.name.endswith("-result"))
    assert saved == ["1-text-result", "2-mapping-result"]


def test_merged_it_is_a_plain_model_again(tmp_path):
    method = RANKER_METHODS["llamarec"]
    fields = {**method.fields, "num_candidates": 5}
    model, items, _ = cases.ranker(**fields)
    names = set(model.state_dict())
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    before = tensors(model)
    base = [["i1", "i2"], ["i7"]]
    result = train_candidate_ranker(model, items, split(), arguments(tmp_path / "run"), stages=method.stages, lora=LORA)
    assert result.model is model and set(model.state_dict()) == names
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    moved = changed(before, model)
    assert moved and all("q_proj" in name or "v_proj" in name for name in moved)
    found = model.recommend(base, tokenizer=items)
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModelForRecommendation.from_pretrained(tmp_path / "model")
    assert loaded.recommend(base, tokenizer=items) == found


def test_llara_shows_soft_tokens_ever_more_often(tmp_path):
    method = RANKER_METHODS["llara"]
    model, items, _ = cases.ranker(**{**method.fields, "num_candidates": 4})
    trainer = CandidateTrainer(
        model=model,
        args=arguments(tmp_path),
        data_collator=CandidateCollator(model, "both"),
        train_dataset=dataset(num_candidates=4),
        processing_class=items,
        stage=method.stages[0],
    )
    trainer.state.max_steps = 2000
    hybrid = []
    for step in range(2001):
        trainer.state.global_step = step
        hybrid.append(trainer.hybrid_now())
    assert not hybrid[0] and hybrid[-1]
    shares = np.array(hybrid[:2000]).reshape(10, 200).mean(1)
    assert np.abs(shares - (np.arange(10) + 0.5) / 10).max() < 0.12  # linear
    # a text batch gives the projector no gradient at all, a hybrid one does
    batch = CandidateCollator(model, "both")([dataset(num_candidates=4)[i] for i in range(4)])
    for step, shown in ((0, False), (2000, True)):
        model.zero_grad()
        trainer.state.global_step = step
        trainer.compute_loss(model, dict(batch)).backward()
        assert all((p.grad is not None) == shown for p in model.item_injector.parameters())
    assert (
        int((batch["input_ids"] == model.config.item_placeholder_id).sum()) == int((batch["slot_items"] >= 0).sum()) > 0
    )
    assert not (batch["text_input_ids"] >= model.config.language_vocab_size).any()


def test_a_llmrec_trains_projectors_only_and_reads_cold_items_from_their_text(tmp_path):
    method = RANKER_METHODS["a_llmrec"]
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(N, 12)).astype(np.float32)
    rows = split()
    cold, other, warm = 5, 11, 7
    vectors[cold] = vectors[other] = vectors[warm]
    train = Sequences.from_rows([[i for i in row.tolist() if i not in (cold, other)] for row in rows.train])
    rows = Split(rows.protocol, train, rows.validation, rows.test, {})
    latents = np.zeros((N, 6), np.float32)
    model, items, _ = cases.ranker(**{**method.fields, "num_candidates": 4}, item_vectors=latents)
    before = tensors(model)
    result = train_candidate_ranker(model, items, rows, arguments(tmp_path), stages=method.stages, text_vectors=vectors)
    assert result.stages["alignment"]["cold_items"] == 2
    assert torch.equal(model.item_vectors[cold], model.item_vectors[other])  # made of their text alone
    assert not torch.equal(model.item_vectors[cold], model.item_vectors[warm])
    moved = changed(before, model)
    assert "item_vectors" in moved
    assert all(name == "item_vectors" or name.startswith(("item_injector.", "user_injector.")) for name in moved)
    assert {name.split(".")[0] for name in moved} == {"item_vectors", "item_injector", "user_injector"}
    assert (model.item_vectors > 0).all() and (model.item_vectors < 1).all()  # latents, all of them written
    with pytest.raises(IncompatibleComponentsError, match="text_vectors"):
        train_candidate_ranker(model, items, rows, arguments(tmp_path / "b"), stages=method.stages)


@pytest.mark.parametrize("matching", [1.0, 0.0])
def test_the_text_latent_of_a_cold_item_is_the_item_latent_of_its_twin(matching):
    """Ten cold items have the text of a warm one and vectors that nothing was learned of."""
    torch.manual_seed(0)
    items, cold, twin = torch.randn(40, 8), np.arange(40) >= 30, torch.arange(10)
    texts = items @ torch.randn(8, 10) / 8**0.5  # texts know the collaborative vectors
    texts[30:] = texts[twin]
    aligner = CollaborativeTextAligner(items, texts, latent_size=4, matching=matching)
    optimizer = torch.optim.Adam(aligner.parameters(), lr=0.02)
    for _ in range(600):
        drawn = torch.randint(30, (2, 64))
        optimizer.zero_grad()
        aligner(items[drawn[0]], drawn[0], drawn[1])["loss"].backward()
        optimizer.step()
    mixed, warm = aligner.latents(cold), aligner.latents()
    assert mixed.shape == warm.shape == (40, 4) and torch.equal(mixed[:30], warm[:30])
    assert torch.allclose(mixed[30:], aligner.text_side.encode(texts[twin]), atol=1e-6)
    distance = float((mixed[30:] - warm[twin]).norm(dim=1).mean())
    spread = float(torch.pdist(warm[:30]).mean())
    nearest = torch.cdist(mixed[30:], warm[:30]).argmin(1)
    if matching:
        assert distance < spread / 5 and int((nearest == twin).sum()) >= 9
    else:
        assert distance > spread / 2 and int((nearest == twin).sum()) <= 2


def test_the_alignment_loss_by_hand():
    aligner = CollaborativeTextAligner(torch.tensor([[1.0], [2.0]]), torch.tensor([[0.5], [-1.0]]), latent_size=1)
    with torch.no_grad():
        for side in (aligner.item_side, aligner.text_side):
            for layer in (side.encoder, side.decoder):
                layer.weight.fill_(1.0)
                layer.bias.zero_()
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    expected = 0.0
    for cf, text, label in ((1.0, 0.5, 1), (2.0, -1.0, 0)):
        f, g = sigmoid(cf), sigmoid(text)
        logit = 3.0 * f
        expected += -np.log(sigmoid(logit) if label else 1 - sigmoid(logit))
        expected += (f - g) ** 2 + 0.5 * (f - cf) ** 2 + 0.2 * (g - text) ** 2
    found = aligner(torch.tensor([[3.0]]), torch.tensor([0]), torch.tensor([1]))["loss"]
    assert float(found.detach()) == pytest.approx(expected, abs=1e-5)


def test_generic_instructions_come_first_and_are_left_out_without_rows(tmp_path):
    method = RANKER_METHODS["tallrec"]
    rows = [{"input_ids": [5, 6, 7, 8 + n], "labels": [-100, -100, -100, 8 + n]} for n in range(12)]
    model, items, _ = cases.ranker(**method.fields)
    options = {"stages": method.stages, "lora": LORA, "samples": 16}
    result = train_candidate_ranker(model, items, split(), arguments(tmp_path / "a"), instructions=rows, **options)
    assert list(result.stages) == ["instructions", "yes_no"]
    other, _, _ = cases.ranker(**method.fields)
    result = train_candidate_ranker(other, items, split(), arguments(tmp_path / "b"), **options)
    assert list(result.stages) == ["yes_no"]


@pytest.mark.parametrize(
    ("verbalizer", "prompts"),
    [("title", "hybrid"), ("letters", "curriculum"), ("yes_no", "text"), ("yes_bce", "hybrid")],
)
def test_accumulation_padding_side_and_batch_split_leave_the_losses_as_they_are(verbalizer, prompts, tmp_path):
    fields = (
        {"verbalizer": "yes_no", "answer_loss": "yes_bce"} if verbalizer == "yes_bce" else {"verbalizer": verbalizer}
    )
    histories = {}
    for name, side, options in (
        ("one", "right", {"per_device_train_batch_size": 8}),
        ("left", "left", {"per_device_train_batch_size": 8}),
        ("four", "right", {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}),
        ("eight, left", "left", {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}),
    ):
        model, items, _ = cases.ranker(**fields, slots=["history", "candidates"])
        values = {"train_sampling_strategy": "sequential", "learning_rate": 1e-3, "max_steps": 6}
        trainer = CandidateTrainer(
            model=model,
            args=arguments(tmp_path / name, **values, **options),
            data_collator=CandidateCollator(model, "both" if prompts == "curriculum" else prompts, padding_side=side),
            train_dataset=dataset(pointwise=verbalizer.startswith("yes")),
            processing_class=items,
            stage=RankerStage("all", ("language_model",), prompts),
        )
        trainer.train()
        histories[name] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(histories["one"]) == 6
    for losses in histories.values():
        assert np.abs(np.subtract(losses, histories["one"])).max() <= 1e-5


class Stop(Exception):
    """A run that ends unexpectedly."""


def test_resumed_between_and_inside_stages_it_ends_with_the_same_bits(tmp_path):
    from transformers import TrainerCallback

    class StopAt(TrainerCallback):
        def __init__(self, stage: int, step: int):
            self.stage, self.step = stage, step
            self.seen = 0

        def on_train_begin(self, args, state, control, **kwargs):
            self.seen += 1

        def on_step_end(self, args, state, control, **kwargs):
            if self.seen == self.stage and state.global_step == self.step:
                raise Stop

    method = RANKER_METHODS["collm"]
    options = {"stages": method.stages, "lora": LoraOptions(2, 8, 0.1)}
    args = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    ends = []
    for name, callbacks in (("whole", []), ("broken", [StopAt(2, 5)])):
        model, items, _ = cases.ranker(**method.fields)
        call = (split(), arguments(tmp_path / name, **args))
        if callbacks:
            with pytest.raises(Stop):
                train_candidate_ranker(model, items, *call, callbacks=callbacks, **options)
            model, items, _ = cases.ranker(**method.fields)
            with pytest.raises(TrainingError, match="resume"):
                train_candidate_ranker(model, items, *call, **options)
            model, items, _ = cases.ranker(**method.fields)
            train_candidate_ranker(model, items, *call, resume=True, **options)
        else:
            train_candidate_ranker(model, items, *call, **options)
        ends.append(tensors(model))
    assert not [name for name in ends[0] if not torch.equal(ends[0][name], ends[1][name])]
    from safetensors.torch import load_file

    stored = load_file(tmp_path / "whole" / "1-text" / "checkpoint-6" / "trained.safetensors")
    assert stored and all(".lora_" in name for name in stored)  # a checkpoint holds adapters only


def test_stages_that_make_no_sense(tmp_path):
    for options, message in (
        ({"trains": ("everything",)}, "everything"),
        ({"trains": ()}, "empty"),
        ({"trains": ("lora", "language_model")}, "both"),
        ({"trains": ("projector",), "prompts": "text"}, "projector"),
    ):
        with pytest.raises(TrainingError, match=message):
            RankerStage("s", **options)
    model, items, _ = cases.ranker("letters")
    with pytest.raises(TrainingError, match="nothing"):
        train_candidate_ranker(
            model, items, split(), arguments(tmp_path), stages=[RankerStage("s", ("projector",), "hybrid")]
        )
    with pytest.raises(IncompatibleComponentsError, match="adapters"):
        train_candidate_ranker(
            model,
            items,
            split(),
            arguments(tmp_path / "x"),
            stages=[RankerStage("s", ("lora",), "text")],
            lora=LoraOptions(target_modules=("nothing_like_it",)),
        )


# -- other doors -------------------------------------------------------------------------------------------------------


def test_lists_become_rows_of_preferences(tmp_path):
    from trl import DPOConfig  # noqa: F401  (fails early where TRL is missing)

    from hf_genrec.alignment.trainers.softmax_dpo import SoftmaxDPOConfig, SoftmaxDPOTrainer

    model, _, text = cases.ranker("title")
    rows = candidate_preference_rows(model, dataset(), 3)
    first = dataset()[0]
    assert text.decode(rows[0]["chosen_ids"]) == f'"{cases.titles()[first["target"]]}"</s>'
    others = {f'"{cases.titles()[i]}"</s>' for i in first["candidates"] if i != first["target"]}
    assert {text.decode(one) for one in rows[0]["rejected_ids"]} <= others and len(rows[0]["rejected_ids"]) == 3
    config = SoftmaxDPOConfig(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=4, bf16=False, use_cpu=True, report_to=[],
        gradient_checkpointing=False, disable_tqdm=True, logging_steps=1, save_strategy="no",
    )  # fmt: skip
    trainer = SoftmaxDPOTrainer(
        model=model.language_model, args=config, train_dataset=rows.select(range(8)), processing_class=text
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(np.log(4), abs=1e-4)
    with pytest.raises(TrainingError, match="title"):
        candidate_preference_rows(cases.ranker("letters")[0], dataset(), 3)


@pytest.mark.parametrize("verbalizer", ["title", "list"])
def test_an_answer_that_matches_two_candidates_is_invalid(verbalizer):
    """Of three rows each: the target alone, another candidate alone, two candidates, none."""
    model, _, text = cases.ranker(verbalizer, max_title_tokens=2)  # titles are shown cut, and answered so
    evaluation = split().validation
    lists = closed_lists(list(evaluation.histories), evaluation.targets, 5, N)
    cut = [text.decode(ids) for ids in model.writer.titles]
    assert any(shown != whole for shown, whole in zip(cut, cases.titles()))
    alone = [row for row in range(len(lists)) if len({cut[item] for item in lists[row]}) == 5][:12]
    assert len(alone) == 12
    evaluation = evaluation.take(np.array(alone))
    chosen = []

    def write(histories, shown, **options):
        chosen.append(len(histories))
        answers = []
        for row, (items, target) in enumerate(zip(shown, evaluation.targets)):
            others = [cut[item] for item in items if item != target]
            named = (cut[target], others[0], f"{others[0]} or {cut[target]}", "nothing")[row % 4]
            rest = f"\n{others[1]}" if verbalizer == "list" else ""  # of a list the first line counts
            answers.append(text.encode(f'"{named}"{rest}'))
        return answers

    model.generate_answers = write
    found = evaluate_written_answers(model, text, evaluation)
    assert chosen == [12] and found == {"valid_ratio": 0.5, "hit_rate@1": 0.25, "hit_rate@1_valid": 0.5}
    with pytest.raises(IncompatibleComponentsError, match="titles"):
        evaluate_written_answers(cases.ranker("letters")[0], text, evaluation)


# -- learning ----------------------------------------------------------------------------------------------------------


def test_validation_ranks_all_items_and_closed_lists_and_keeps_the_best(tmp_path):
    model, items, _ = cases.ranker("letters", slots=["history", "candidates"], projector="linear")
    rows = split()
    result = train_candidate_ranker(
        model,
        items,
        rows,
        arguments(
            tmp_path, max_steps=3, learning_rate=0.3, eval_strategy="steps", eval_steps=1, save_strategy="steps",
            save_steps=1, metric_for_best_model="closed_hit_rate@1", load_best_model_at_end=True, save_total_limit=None,
        ),
        stages=[RankerStage("letters", ("projector",))],
    )  # fmt: skip
    found = result.stages["letters"]["validation"]
    scores = closed_list_scores(model, list(rows.validation.histories), rows.validation.targets, seed=42)
    expected = list_metrics(scores.numpy())
    assert found["closed_hit_rate@1"] == pytest.approx(expected["hit_rate@1"], abs=1e-6)
    assert found["uauc"] == pytest.approx(expected["uauc"], abs=1e-6)
    lists = ModelRecommender(model, items).recommend_topk(rows.validation.histories, 10, True)
    hits = (lists == rows.validation.targets[:, None]).any(1).mean()
    assert found["recall@10"] == pytest.approx(hits, abs=1e-6)
    retrieved = ModelRecommender(model.retriever, items).recommend_topk(rows.validation.histories, 10, True)
    assert hits == (retrieved == rows.validation.targets[:, None]).any(1).mean()  # it only reorders
    log = json.loads((tmp_path / "1-letters" / "checkpoint-3" / "trainer_state.json").read_text())["log_history"]
    rates = {e["step"]: e["eval_closed_hit_rate@1"] for e in log if "eval_closed_hit_rate@1" in e}
    assert rates[result.stages["letters"]["best_step"]] == max(rates.values())
