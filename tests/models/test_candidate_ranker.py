"""Candidate ranker: scores against the plain language model, the retriever's order behind them, soft tokens, prompts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from candidate_ranker_cases import NUM_ITEMS, item_tokenizer, language_model, ranker, retriever, text_tokenizer, titles
from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_outputs import CausalLMOutput

import hf_genrec
from hf_genrec.data.sequences import Sequences
from hf_genrec.errors import IncompatibleComponentsError, ItemTableError, RequestError
from hf_genrec.evaluation.recommenders import ModelRecommender
from hf_genrec.identifiers.segments import control_token_ids
from hf_genrec.identifiers.tokenization_item import ItemTokenizer
from hf_genrec.models.auto import AutoModelForRecommendation, register_auto_classes
from hf_genrec.models.candidate_ranker.configuration_candidate_ranker import CandidateRankerConfig
from hf_genrec.models.candidate_ranker.injection import EmbeddingInjector
from hf_genrec.models.candidate_ranker.modeling_candidate_ranker import CandidateRankerForCausalLM
from hf_genrec.models.candidate_ranker.prompts import PromptRow, item_token_table, padded, prompt_values

register_auto_classes()
HISTORIES = [[1, 2, 3], [5], [], [7, 8, 9, 10, 11, 12]]
CANDIDATES = np.array([[4, 9, 0, 13, 2], [1, 2, 3, -1, -1], [20, 21, 22, 23, -1], [0, 1, 2, 3, 4]])


def log_probs(model, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model.language_model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)


# -- scores ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_letters_are_the_logits_behind_the_prompt(kind):
    model, _, _ = ranker("letters", kind)
    model.rank_candidates(HISTORIES, CANDIDATES)  # the head is tried out once
    calls = []
    handle = model.language_model.base_model.register_forward_hook(lambda *_: calls.append(1))
    scores = model.rank_candidates(HISTORIES, CANDIDATES)
    handle.remove()
    assert len(calls) == 1 and scores.shape == (4, 5)  # one pass ranks all candidates of all users
    for row, history in enumerate(HISTORIES):
        items = [int(item) for item in CANDIDATES[row] if item >= 0]
        ids = model.writer.write(history, items).ids
        expected = log_probs(model, ids)[-1, list(model.config.answer_tokens)[: len(items)]].log_softmax(-1)
        assert torch.allclose(scores[row, : len(items)], expected, atol=1e-4)
        assert (scores[row, len(items) :] == -torch.inf).all()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("verbalizer", ["yes_no", "title"])
def test_candidates_behind_a_shared_prompt_score_as_when_read_whole(verbalizer, kind):
    model, _, _ = ranker(verbalizer, kind)
    scores = model.rank_candidates(HISTORIES, CANDIDATES)
    for row, history in enumerate(HISTORIES):
        items = [int(item) for item in CANDIDATES[row] if item >= 0]
        prompt = model.writer.write(history, items).ids
        for place, item in enumerate(items):
            if verbalizer == "yes_no":
                logp = log_probs(model, prompt + model.writer.target(item).ids)[-1]
                expected = logp[list(model.config.answer_tokens)].log_softmax(-1)[0]
            else:
                answer = model.writer.answer(item)
                logp = log_probs(model, prompt + answer)
                expected = sum(logp[len(prompt) - 1 + at, token] for at, token in enumerate(answer))
            assert scores[row, place] == pytest.approx(float(expected), abs=1e-3)
    alone = torch.cat([model.rank_candidates([h], c[None]) for h, c in zip(HISTORIES, CANDIDATES)])
    assert torch.allclose(scores, alone, atol=1e-4)
    model.language_model._is_stateful = True  # no cache that can be shared: the prompt is read again
    assert torch.allclose(model.rank_candidates(HISTORIES, CANDIDATES), scores, atol=1e-4)


def test_yes_no_reads_exactly_the_answer_slot():
    model, _, _ = ranker("yes_no")
    before = model.rank_candidates(HISTORIES, CANDIDATES).exp()
    model.config.answer_tokens = model.config.answer_tokens[::-1]
    after = model.rank_candidates(HISTORIES, CANDIDATES).exp()
    shown = torch.from_numpy(CANDIDATES >= 0)
    assert torch.allclose(after[shown], 1 - before[shown], atol=1e-6)
    assert float((after[shown] - before[shown]).abs().max()) > 0.01


def test_the_score_of_the_yes_loss_is_one_logit():
    model, _, _ = ranker("yes_no", answer_loss="yes_bce")
    before = model.rank_candidates(HISTORIES[:2], CANDIDATES[:2])
    with torch.no_grad():  # no other column of the head may matter
        keep = model.language_model.lm_head.weight[model.config.answer_tokens[0]].clone()
        model.language_model.lm_head.weight.normal_()
        model.language_model.lm_head.weight[model.config.answer_tokens[0]] = keep
    assert torch.equal(before, model.rank_candidates(HISTORIES[:2], CANDIDATES[:2]))


class ReadingStub(nn.Module):
    """Reads the candidate list and prefers items by their text, wherever they stand; `bias` prefers early letters."""

    base_model_prefix = "none"

    def __init__(self, model, bias: float = 0.0):
        super().__init__()
        size = model.config.language_vocab_size
        self.table = nn.Embedding.from_pretrained(torch.eye(size))
        self.marks = {tuple(mark): place for place, mark in enumerate(model.config.candidate_marks)}
        self.quote = model.config.item_close[0]
        self.letters, self.bias, self.config = list(model.config.answer_tokens), bias, PreTrainedConfig()

    def get_input_embeddings(self):
        return self.table

    def get_output_embeddings(self):
        return None

    def forward(self, inputs_embeds, attention_mask, **kwargs):
        ids = inputs_embeds.argmax(-1)
        logits = torch.zeros(*ids.shape, inputs_embeds.shape[-1])
        for row, tokens in enumerate(ids.tolist()):
            for mark, place in self.marks.items():
                starts = [at for at in range(len(tokens)) if tuple(tokens[at : at + len(mark)]) == mark]
                if starts:
                    name = tokens[starts[-1] + len(mark) + 1 :]
                    name = name[: name.index(self.quote)]
                    taste = np.random.default_rng(name).normal()
                    logits[row, -1, self.letters[place]] = taste - self.bias * place
        return CausalLMOutput(logits=logits)


def test_permuted_candidates_get_permuted_scores():
    model, _, _ = ranker("letters")
    model.language_model = ReadingStub(model)
    rng, items = np.random.default_rng(0), np.array([4, 9, 0, 13, 2])
    orders = [rng.permutation(5) for _ in range(40)]
    scores = model.rank_candidates([[1, 2]] * 40, np.stack([items[order] for order in orders]))
    base = model.rank_candidates([[1, 2]], items[None])[0]
    assert len(set(base.tolist())) == 5
    for row, order in enumerate(orders):
        assert torch.allclose(scores[row], base[order.tolist()], atol=1e-5)
    # a model that likes early letters ranks by place; means over drawn orders undo it
    model.language_model = ReadingStub(model, bias=10.0)
    assert model.rank_candidates([[1, 2]], items[None])[0].argsort(descending=True).tolist() == [0, 1, 2, 3, 4]
    model.config.candidate_permutations = 64
    fair = model.rank_candidates([[1, 2]], items[None])[0]
    again = model.rank_candidates([[1, 2]], items[None, ::-1].copy())[0]
    assert torch.allclose(fair, again.flip(0), atol=1e-4)  # a function of the set
    assert float(fair.std()) < 5  # one order alone spreads by 15


def test_a_written_list_holds_every_candidate_once_in_the_models_order():
    model, _, text = ranker("list", candidate_permutations=0)
    between, end = model.config.answer_end
    assert text.decode([between]) == "\n" and end == text.eos_token_id
    scores = model.rank_candidates(HISTORIES, CANDIDATES)
    for row, history in enumerate(HISTORIES):
        items = [int(item) for item in CANDIDATES[row] if item >= 0]
        ids, left, order = model.writer.write(history, items).ids, list(items), []
        while left:  # token by token, the likeliest that continues a title not yet written
            part: list[int] = []
            while True:
                going = [item for item in left if model.writer.titles[item][: len(part)] == part]
                legal = {
                    model.writer.titles[item][len(part)] for item in going if len(model.writer.titles[item]) > len(part)
                }
                if any(model.writer.titles[item] == part for item in going):
                    legal.add(between if len(left) > 1 else end)
                logp = log_probs(model, ids)[-1]
                token = max(legal, key=lambda one: float(logp[one]))
                ids = [*ids, token]
                if token in (between, end):
                    break
                part = [*part, token]
            named = next(item for item in left if model.writer.titles[item] == part)
            left.remove(named)
            order.append(named)
        expected = {item: len(items) - place for place, item in enumerate(order)}
        assert scores[row, : len(items)].tolist() == [expected[item] for item in items]
        assert (scores[row, len(items) :] == -torch.inf).all()
    model.config.candidate_permutations = 3
    mean = model.rank_candidates(HISTORIES[:1], CANDIDATES[:1])
    assert torch.equal(mean, model.rank_candidates(HISTORIES[:1], CANDIDATES[:1, ::-1].copy()).flip(1))
    assert float(mean.sum()) == pytest.approx(15.0)  # each round gives out 5 + 4 + 3 + 2 + 1


def test_lists_of_equal_hostile_and_absent_titles():
    text, items = text_tokenizer(), item_tokenizer()
    texts = ["Up\n1. Down </s>", "same", "same", *titles()[3:]]
    model = CandidateRankerForCausalLM.from_language_model(
        language_model(text), text, item_tokenizer=items, item_texts=texts, retriever=retriever(items),
        verbalizer="list", num_candidates=4,
    ).eval()  # fmt: skip
    scores = model.rank_candidates([[1], [2]], [[0, 1, 2, 5], [-1, -1, -1, -1]])
    assert sorted(scores[0].tolist()) == [1, 2, 3, 4] and abs(float(scores[0, 1] - scores[0, 2])) == 1
    assert (scores[1] == -torch.inf).all()
    found = model.recommend([["i1", "i2"], ["i5"]], tokenizer=items, k=4)
    plain = model.retriever.recommend([["i1", "i2"], ["i5"]], tokenizer=items, k=4)
    assert [{r.item_id for r in row} for row in found] == [{r.item_id for r in row} for row in plain]


def test_the_question_for_a_list_stands_in_the_chat_template():
    text = text_tokenizer()
    text.chat_template = (
        "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant: {% endif %}"
    )
    items = item_tokenizer()
    model = CandidateRankerForCausalLM.from_language_model(
        language_model(text), text, item_tokenizer=items, item_texts=titles(), retriever=retriever(items),
        verbalizer="list", num_candidates=3, wording="{history} | {newest} | {candidates}?",
    )  # fmt: skip
    names = titles()
    content = f'"{names[1]}"\n"{names[2]}" | "{names[2]}" | "{names[4]}"\n"{names[0]}"?'
    whole = text.apply_chat_template([{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True)
    assert text.decode(model.writer.write([1, 2], [4, 0]).ids) == text.decode(
        text.encode(whole, add_special_tokens=False)
    )
    assert text.decode(model.writer.write([], [4]).ids).count("none | none |") == 1


# -- recommending ------------------------------------------------------------------------------------------------------


def test_a_model_without_opinion_leaves_the_retrievers_order():
    for verbalizer in ("letters", "yes_no"):
        model, items, _ = ranker(verbalizer)
        with torch.no_grad():
            model.language_model.lm_head.weight.zero_()
        histories = [["i1", "i2", "i3"], ["i5"], []]
        found = model.recommend(histories, tokenizer=items, k=12)
        plain = model.retriever.recommend(histories, tokenizer=items, k=12)
        assert [[r.item_id for r in row] for row in found] == [[r.item_id for r in row] for row in plain]


def test_only_the_retrievers_best_are_ranked_again():
    model, items, _ = ranker("letters")
    histories = [["i1", "i2", "i3"], ["i5", "i9"], ["i0"]]
    for options in ({}, {"num_beams": 1}, {"k": 20, "exclude_seen": False}):
        found = model.recommend(histories, tokenizer=items, **{"k": 10, **options})
        plain = model.retriever.recommend(
            histories,
            tokenizer=items,
            num_beams=NUM_ITEMS,
            **{"k": 10, **{n: v for n, v in options.items() if n != "num_beams"}},
        )
        for ours, theirs in zip(found, plain):
            ours_ids, their_ids = [r.item_id for r in ours], [r.item_id for r in theirs]
            assert set(ours_ids[:5]) == set(their_ids[:5])  # an item beyond m stays a miss
            width = len(ours_ids)
            assert ours_ids[5:] == their_ids[5:width]
            scores = [r.score for r in ours]
            assert scores == sorted(scores, reverse=True)
            shown = [int(one[1:]) for one in their_ids[:5]]
            history = [int(one[1:]) for one in histories[found.index(ours)]]
            expected = model.rank_candidates([history], [shown])[0]
            assert ours_ids[:5] == [f"i{shown[at]}" for at in expected.argsort(descending=True).tolist()]
    assert any(
        [r.item_id for r in a] != [r.item_id for r in b][: len(a)] for a, b in zip(found, plain)
    )  # the language model does have a say


def test_seen_and_allowed_items_and_every_door():
    model, items, _ = ranker("letters")
    allowed = ["i1", "i4", "i7", "i9", "i20", "i21", "i22"]
    for row in model.recommend([["i1", "i2"], ["i5"]], tokenizer=items, k=7, allowed_items=allowed):
        assert {r.item_id for r in row} <= set(allowed) - {"i1"} | ({"i1"} if len(row) == 7 else set())
    same = hf_genrec.recommend(model, [["i1", "i2"], ["i5"]], tokenizer=items, k=7)
    assert same == model.recommend([["i1", "i2"], ["i5"]], tokenizer=items, k=7)
    lists = ModelRecommender(model, items).recommend_topk(Sequences.from_rows([[1, 2], [5]]), 7, True)
    assert lists.tolist() == [[int(r.item_id[1:]) for r in row] for row in same]


def test_a_retriever_with_several_codes_per_item():
    from hf_genrec.models.vq_rec.configuration_vq_rec import VQRecConfig
    from hf_genrec.models.vq_rec.modeling_vq_rec import VQRecForRecommendation

    torch.manual_seed(0)
    codes = np.stack([np.arange(NUM_ITEMS) // 6, np.arange(NUM_ITEMS) % 6], 1)
    items = ItemTokenizer.from_codes([f"i{n}" for n in range(NUM_ITEMS)], codes)
    other = VQRecForRecommendation(VQRecConfig.from_tokenizer(items, hidden_size=8, num_attention_heads=2)).eval()
    other.set_catalogue(items.codes)
    text = text_tokenizer()
    model = CandidateRankerForCausalLM.from_language_model(
        language_model(text), text, item_tokenizer=items, item_texts=titles(), retriever=other, num_candidates=4
    ).eval()
    found = model.recommend([["i1", "i2"], []], tokenizer=items, k=6)
    plain = other.recommend([["i1", "i2"], []], tokenizer=items, k=6)
    for ours, theirs in zip(found, plain):
        assert {r.item_id for r in ours[:4]} == {r.item_id for r in theirs[:4]}
    encoded = items.encode_histories([["i1", "i2"], ["i7"]], return_tensors="pt")
    assert [row.tolist() for row in model.history_items(**encoded)] == [[1, 2], [7]]
    with pytest.raises(IncompatibleComponentsError, match="item_vectors"):
        CandidateRankerForCausalLM.from_language_model(
            language_model(text), text, item_tokenizer=items, item_texts=titles(), retriever=other, slots=["history"]
        )


@pytest.mark.parametrize("tied", [False, True])
def test_saved_and_loaded_it_recommends_the_same(tied, tmp_path):
    language = language_model(text_tokenizer(), tie_word_embeddings=tied)
    model, items, _ = ranker("letters", language=language, slots=["user", "history"], tokens_per_item=2)
    found = model.recommend([["i1", "i2", "i3"], ["i5"]], tokenizer=items)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForRecommendation.from_pretrained(tmp_path)
    assert type(loaded) is CandidateRankerForCausalLM
    assert loaded.recommend([["i1", "i2", "i3"], ["i5"]], tokenizer=items) == found
    head = loaded.language_model.lm_head.weight
    assert (head is loaded.language_model.model.embed_tokens.weight) == tied
    with pytest.raises(IncompatibleComponentsError):
        other = ItemTokenizer.from_codes([f"j{n}" for n in range(NUM_ITEMS)], np.arange(NUM_ITEMS)[:, None])
        loaded.recommend([["j1"]], tokenizer=other)


# -- soft tokens -------------------------------------------------------------------------------------------------------


def test_the_injector_changes_placeholders_only_and_learns_only_from_them():
    torch.manual_seed(0)
    injector = EmbeddingInjector(3, 4, placeholder_token_id=9, tokens_per_vector=2)
    ids = torch.tensor([[1, 9, 9, 2], [9, 9, 3, 0], [1, 2, 3, 4]])
    embeds, vectors = torch.randn(3, 4, 4), torch.randn(2, 3)
    mixed = injector(ids, embeds, vectors)
    soft = injector.project(vectors)
    assert torch.equal(mixed[0, 1:3], soft[0]) and torch.equal(mixed[1, :2], soft[1])
    text = ids != 9
    assert torch.equal(mixed[text], embeds[text])
    plain = injector(ids[2:], embeds[2:], None)
    assert plain is not None and torch.equal(plain, embeds[2:])
    mixed[text].sum().backward()  # text places tell the projector nothing
    assert all(p.grad is None or not p.grad.any() for p in injector.parameters())
    injector(ids, embeds, vectors)[0, 1].sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in injector.projector.parameters())
    with pytest.raises(IncompatibleComponentsError, match="4 placeholders"):
        injector(ids, embeds, vectors[:1])


def test_text_only_prompts_do_not_know_of_soft_tokens():
    model, _, _ = ranker("letters", slots=["user", "history", "candidates"])
    plain, _, _ = ranker("letters")
    text = model.rank_candidates(HISTORIES, CANDIDATES, text_only=True)
    assert torch.equal(
        text, plain.rank_candidates(HISTORIES, CANDIDATES)
    )  # removing the soft tokens gives TALLRec's form
    hybrid = model.rank_candidates(HISTORIES, CANDIDATES)
    with torch.no_grad():
        model.item_vectors.normal_()
    assert torch.equal(model.rank_candidates(HISTORIES, CANDIDATES, text_only=True), text)
    assert not torch.allclose(model.rank_candidates(HISTORIES, CANDIDATES), hybrid)


def test_a_constant_projector_is_a_word():
    """A projector that always gives the embedding of one word equals the text prompt with that word in its place."""
    model, _, _ = ranker("yes_no", slots=["history", "candidates"], projector="linear", neutral="x")
    word = model.config.neutral
    assert len(word) == 1
    with torch.no_grad():
        model.item_injector.projector.weight.zero_()
        model.item_injector.projector.bias.copy_(model.get_input_embeddings().weight[word[0]])
    hybrid = model.rank_candidates(HISTORIES, CANDIDATES)
    assert torch.allclose(hybrid, model.rank_candidates(HISTORIES, CANDIDATES, text_only=True), atol=1e-5)


def test_every_item_span_of_a_hybrid_prompt_has_its_soft_token():
    model, _, _ = ranker("title", slots=["user", "history", "candidates"], tokens_per_item=2)
    row = model.writer.write([3, 1, 4], [9, 2])
    assert row.slot_items == [3, 1, 4, 9, 2]
    assert row.ids.count(model.config.item_placeholder_id) == 10
    assert row.ids.count(model.config.user_placeholder_id) == 2
    text = model.writer.write([3, 1, 4], [9, 2], text_only=True)
    assert text.slot_items == [] and max(text.ids) < model.config.language_vocab_size


def test_the_users_vector_counts():
    model, _, _ = ranker("letters", slots=["user"], projector="linear")
    scores = model.rank_candidates([[1, 2, 3], [3, 2, 1]], CANDIDATES[[0, 0]])
    with torch.no_grad():
        state = model.retriever.model(input_ids=model.retriever_inputs([np.array([1, 2, 3])])[0]).last_hidden_state[
            :, -1
        ]
    users = model.user_vectors(*model.retriever_inputs([np.array([1, 2, 3]), np.zeros(0, int)]))
    assert torch.allclose(users[0], state[0], atol=1e-5) and not users[1].any()
    with torch.no_grad():
        model.user_injector.projector.weight.zero_()
    assert not torch.allclose(scores, model.rank_candidates([[1, 2, 3], [3, 2, 1]], CANDIDATES[[0, 0]]))


# -- the loss ----------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_cross_entropy_of_the_answer_on_either_padding_side():
    model, _, _ = ranker("letters", slots=["history"])
    rows = [model.writer.write(h, [1, 2, 3]) + PromptRow([t]) for h, t in (([5, 6], 70), ([7], 80))]
    losses = []
    for left in (False, True):
        batch = padded(rows, 0, left=left)
        labels = torch.full_like(batch["input_ids"], -100)
        for place, row in enumerate(rows):
            end = labels.shape[1] if left else len(row.ids)
            labels[place, end - 1] = row.ids[-1]
        losses.append(model(**batch, labels=labels).loss)
        assert torch.allclose(model(**batch, labels=labels, num_items_in_batch=4).loss, losses[-1] / 2)
    assert torch.allclose(losses[0], losses[1], atol=1e-5)
    expected = []
    for row in rows:
        single = padded([row], 0, left=False)
        logits = model(**single).logits[0]
        expected.append(-logits.log_softmax(-1)[len(row.ids) - 2, row.ids[-1]])
    assert torch.allclose(losses[0], torch.stack(expected).mean(), atol=1e-5)


def test_the_yes_loss_touches_no_other_word():
    language = language_model(text_tokenizer(), tie_word_embeddings=False)
    model, _, _ = ranker("yes_no", language=language, answer_loss="yes_bce")
    yes, no = model.config.answer_tokens
    row = model.writer.write([1, 2]) + model.writer.target(3)
    for answer in (yes, no):
        model.zero_grad()
        ids = torch.tensor([[*row.ids, answer]])
        labels = torch.full_like(ids, -100)
        labels[0, -1] = answer
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        logit = model.language_model(input_ids=ids[:, :-1]).logits[0, -1, yes]
        expected = nn.functional.softplus(-logit if answer == yes else logit).detach()
        assert float(loss.detach()) == pytest.approx(float(expected), abs=1e-5)
        grad = model.language_model.lm_head.weight.grad
        others = torch.arange(len(grad)) != yes
        assert grad[yes].any() and not grad[others].any()


# -- prompts -----------------------------------------------------------------------------------------------------------


def test_long_histories_lose_whole_items_from_the_oldest():
    model, _, text = ranker("yes_no", max_history=50)
    history = list(range(20))
    whole = model.writer.write(history, where="row 3").ids
    model.config.max_length = len(whole) - 1 + 10
    model._writer = None
    cut = model.writer.write(history, reserve=10).ids
    assert len(cut) + 10 <= model.config.max_length
    decoded = text.decode(cut)
    shown = [item for item in history if f'"{titles()[item]}"' in decoded]
    assert 0 < len(shown) < 20 and shown == history[-len(shown) :]
    assert decoded.count('"') == 2 * len(shown)  # no part of an item is left over
    one_more = model.writer.write(history[-len(shown) - 1 :], reserve=0).ids
    assert len(one_more) + 10 > model.config.max_length  # not one item more than needed was cut
    model.config.max_length = 12
    model._writer = None
    with pytest.raises(RequestError, match=r"row 0: .* 12 that"):
        model.rank_candidates([history], [[1]])


def test_item_texts_cannot_forge_tokens():
    import importlib.util
    import pathlib

    path = pathlib.Path(__file__).parents[1] / "identifiers" / "hostile_strings.py"
    spec = importlib.util.spec_from_file_location("hostile_strings", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = text_tokenizer()
    hostile = module.hostile_strings(["<pad>", "</s>", "<unk>", "<s>", "(A) ", "Yes"], 3000)
    table = item_token_table(text, hostile, 64)
    assert not set(np.unique(table)) & set(control_token_ids(text))
    with pytest.raises(ItemTableError, match="item row 1"):
        item_token_table(text, ["fine", ""])


def test_free_answers_are_greedy():
    model, _, _ = ranker("title", slots=["history"])
    answers = model.generate_answers(HISTORIES[:2], CANDIDATES[:2], text_only=True, max_new_tokens=4, eos_token_id=None)
    for row in range(2):
        ids = list(model.writer.write(HISTORIES[row], [i for i in CANDIDATES[row] if i >= 0], text_only=True).ids)
        for token in answers[row]:
            assert int(log_probs(model, ids)[-1].argmax()) == token
            ids.append(token)
    hybrid = model.generate_answers(HISTORIES[:2], CANDIDATES[:2], max_new_tokens=4, eos_token_id=None)
    assert [len(one) for one in hybrid] == [4, 4]


def test_wordings_and_bad_configurations():
    text = text_tokenizer()
    values = prompt_values(text, "letters", 3, wording="<s>{history} of {candidates}?", answers=["a", "b", "c"])
    assert values["prompt"][0] == [text.bos_token_id] and values["prompt"][1] == "history"
    base = {**values, "num_items": 3}
    for change, message in (
        ({"verbalizer": "yes_no"}, "target"),
        ({"num_candidates": 4}, "answer_tokens"),
        ({"slots": ["history"]}, "projector"),
        ({"slots": ["history"], "projector": "mlp"}, "item_vector_size"),
        ({"slots": ["user"], "projector": "mlp", "user_vector_size": 4}, "user"),
        ({"answer_loss": "yes_bce"}, "yes_no"),
        ({"verbalizer": "list", "answer_end": [7]}, "answer_end"),
        ({"prompt": ["candidates", "candidates"]}, "twice"),
        ({"language_model": {"model_type": "nonsense"}}, "nonsense"),
    ):
        with pytest.raises(IncompatibleComponentsError, match=message):
            CandidateRankerConfig(**{**base, **change})
    with pytest.raises(IncompatibleComponentsError, match="nobody"):
        prompt_values(text, "letters", 3, wording="{nobody}")
    with pytest.raises(IncompatibleComponentsError, match="single token"):
        prompt_values(text, "yes_no", 3, answers=["Certainly so", "No"])
    model, _, _ = ranker("letters")
    with pytest.raises(RequestError, match="6 candidates"):
        model.rank_candidates([[1]], [[1, 2, 3, 4, 5, 6]])
    with pytest.raises(RequestError, match="row 1"):
        model.rank_candidates([[1], [99]], [[1], [2]])
    with pytest.raises(IncompatibleComponentsError, match="item_texts"):
        CandidateRankerForCausalLM.from_language_model(
            language_model(text),
            text,
            item_tokenizer=item_tokenizer(),
            item_texts=titles()[:-1],
            retriever=retriever(item_tokenizer()),
        )
