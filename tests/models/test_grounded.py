"""BIGRec: distance ranking against brute force, exact titles first, gamma, item vectors that follow the weights."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "alignment"))
from trainer_cases import small_arguments, successor_split

from hf_genrec import AutoModelForRecommendation, ItemTokenizer
from hf_genrec.alignment.trainers.recommender import train_recommender
from hf_genrec.data.collators import PrefixCollator, SequenceCollator
from hf_genrec.errors import IncompatibleComponentsError, RequestError
from hf_genrec.identifiers.text_vocabulary import train_text_tokenizer
from hf_genrec.identifiers.tokenization_item_words import ItemWordsTokenizer
from hf_genrec.models.grounded.configuration_grounded import GroundedLanguageConfig
from hf_genrec.models.grounded.item_texts import ItemTexts
from hf_genrec.models.grounded.modeling_grounded import GroundedLanguageRecommender

WORDS = ["star", "war", "trek", "night", "day", "of", "the", "king", "queen", "x"]
N = 30
LANGUAGE = {
    "model_type": "llama", "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3,
}  # fmt: skip
GPT2 = {"model_type": "gpt2", "n_embd": 24, "n_layer": 2, "n_head": 2, "initializer_range": 0.3}
ASSISTANT = {"model_type": "sasrec", "hidden_size": 16, "dropout": 0.0, "initializer_range": 0.4, "embedding_std": 0.6}
HISTORIES = [["i3", "i28", "i29"], ["i5"], ["i1", "i2", "i28", "i7", "i9"], []]


def _titles() -> list[str]:
    rng = np.random.default_rng(0)
    titles = [" ".join(rng.choice(WORDS, rng.integers(1, 5))) for _ in range(27)] + ["star king x", "star", "star war"]
    titles[9] = titles[4] = "day of the king"  # two items of one title
    return titles


@pytest.fixture(scope="module")
def tokenizer() -> ItemWordsTokenizer:
    return ItemWordsTokenizer.from_texts(train_text_tokenizer(_titles(), 300), [f"i{n}" for n in range(N)], _titles())


def _model(tokenizer, seed: int = 0, **options) -> GroundedLanguageRecommender:
    torch.manual_seed(seed)
    config = GroundedLanguageConfig.from_tokenizer(tokenizer, **({"language_model": LANGUAGE} | options))
    model = GroundedLanguageRecommender(config)
    model.set_catalogue(tokenizer.codes)
    return model.eval()


def _words(tokenizer, item: int) -> list[int]:
    return tokenizer.item_token_ids(f"i{item}")


@torch.no_grad()
def _by_hand(model, tokenizer, history: list[str]) -> tuple[list[int], torch.Tensor]:
    """What is written behind a history, token by token, and its distances to all titles: one row, no padding."""
    begin = [tokenizer.bos_token_id]
    history_tokens = [t for item in history for t in tokenizer.item_token_ids(item)]
    prompt = begin + model.config.prompt_before + history_tokens + model.config.prompt_after
    written: list[int] = []
    ends = [tokenizer.item_end_token_id, tokenizer.eos_token_id]
    while len(written) < model.config.max_new_tokens:
        logits = model.language_model(input_ids=torch.tensor([prompt + written])).logits[0, -1]
        if not written:
            logits[ends] = -torch.inf
        token = int(logits.argmax())
        if token in ends:
            break
        written.append(token)

    def embed(tokens):
        out = model.language_model(input_ids=torch.tensor([begin + tokens]), output_hidden_states=True)
        return out.hidden_states[-1][0, -1].double()

    items = torch.stack([embed(_words(tokenizer, item)[:-1]) for item in range(N)])
    return written, (items - embed(written)).norm(dim=-1)


def _first(tokenizer) -> list[int]:
    """The lowest item of each item's title."""
    texts = [tuple(row) for row in tokenizer.codes.tolist()]
    return [texts.index(text) for text in texts]


def _order(values: torch.Tensor, left_out: set[int] = frozenset()) -> list[int]:
    return [i for i in sorted(range(N), key=lambda i: (round(float(values[i]), 5), i)) if i not in left_out]


# ------------------------------------------------------------------------------------------------ CHECKs of the card


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prompt_before": [5, 6], "prompt_after": [7], "prefix_training": True},
        {"language_model": GPT2},
        {"lora": {}},
    ],
    ids=["plain", "prompt", "gpt2", "lora"],
)
def test_gamma_zero_is_the_distance_of_what_was_written(options, tokenizer) -> None:
    model = _model(tokenizer, **options)
    found = model.recommend(HISTORIES, tokenizer=tokenizer, k=8)
    allowed = [f"i{i}" for i in range(0, 30, 3)]
    some = model.recommend(HISTORIES, tokenizer=tokenizer, k=4, allowed_items=allowed)
    for row, history in enumerate(HISTORIES):
        written, distances = _by_hand(model, tokenizer, history)
        batch = tokenizer.encode_histories([history], return_tensors="pt")
        state = model.start_decoding(**batch)
        assert model.write_texts(state.ids_BT, state.mask_BT) == [tuple(written)]
        seen = {int(item[1:]) for item in history}
        order = _order(distances, seen)
        assert [int(r.item_id[1:]) for r in found[row]] == order[:8]
        assert [r.score for r in found[row]] == pytest.approx([-float(distances[i]) for i in order[:8]], abs=2e-3)
        assert [int(r.item_id[1:]) for r in some[row]] == [i for i in order if i % 3 == 0][:4]


def test_everything_is_in_the_catalogue_and_an_exact_title_comes_first(tokenizer) -> None:
    model = _model(tokenizer)
    for item in sorted(set(_first(tokenizer)))[::4]:
        written = tuple(_words(tokenizer, item)[:-1])
        model.write_texts = lambda ids, mask, written=written: [written] * len(ids)
        answers = model.recommend([[]], tokenizer=tokenizer, k=N)[0]
        assert sorted(r.item_id for r in answers) == sorted(tokenizer.item_ids)
        assert answers[0].item_id == f"i{item}" and answers[0].score == 0.0
    model.write_texts = lambda ids, mask: [tuple(_words(tokenizer, 4)[:-1])] * len(ids)
    twins = model.recommend([[], ["i4"]], tokenizer=tokenizer, k=3)
    assert [r.item_id for r in twins[0]][:2] == ["i4", "i9"]  # one title, two items: one behind the other
    assert twins[1][0].item_id == "i9"


def test_gamma_multiplies_the_prior_in(tokenizer) -> None:
    counts = np.random.default_rng(1).integers(0, 50, N)
    model = _model(tokenizer, gamma=0.7)
    model.prepare_training(counts)
    for history in HISTORIES:
        _, distances = _by_hand(model, tokenizer, history)
        near = (distances - distances.min()) / (distances.max() - distances.min())
        prior = torch.tensor((counts - counts.min()) / (counts.max() - counts.min()))
        values = near * (1 + prior) ** -0.7
        groups = torch.tensor(_first(tokenizer))
        values = torch.stack([values[groups == group].min() for group in groups])  # of one title the best value
        found = model.recommend([history], tokenizer=tokenizer, k=10, exclude_seen=False)[0]
        assert [int(r.item_id[1:]) for r in found] == _order(values)[:10]


def test_assistants_scores_as_prior_and_a_huge_gamma(tokenizer) -> None:
    model = _model(tokenizer, assistant=ASSISTANT, prior="assistant", gamma=99.0)
    batch = tokenizer.encode_histories(HISTORIES, return_tensors="pt")
    state = model.start_decoding(**batch)
    prior = model._prior(state.rows_BS)
    for row, history in enumerate(HISTORIES):
        # items of one title are one to the assistant's input
        ids = torch.tensor([[4 + _first(tokenizer)[int(i[1:])] for i in history]], dtype=torch.long)
        if history:
            alone = model.assistant.start_decoding(ids, torch.ones_like(ids))
            expected = model.assistant.score_codes(alone, ids.new_zeros(1, 1, 0), 0)[0, 0]
            assert torch.allclose(prior[row], expected, atol=1e-4)
    best = model.recommend(HISTORIES, tokenizer=tokenizer, k=1, exclude_seen=False)
    nearest = model.grounder().ground(state.vectors_BH, 1)[0][:, 0]
    for row, answer in enumerate(best):  # the nearest item has distance 0 after scaling; no prior passes it
        assert int(answer[0].item_id[1:]) == int(nearest[row])


def test_choose_gamma_is_the_best_of_the_grid(tokenizer) -> None:
    model = _model(tokenizer)
    model.prepare_training(np.arange(N)[::-1])
    rng = np.random.default_rng(0)
    histories = [rng.integers(0, N, rng.integers(1, 5)) for _ in range(40)]
    targets = [int(i) for i in rng.integers(0, 6, 40)]  # popular items: a prior must help
    names = [[f"i{i}" for i in row] for row in histories]
    values = {}
    for gamma in (0.0, 0.5, 2.0, 20.0):
        model.config.gamma = gamma
        found = model.recommend(names, tokenizer=tokenizer, k=10, exclude_seen=False)
        # a target counts at the rank of the best item of its title
        first = _first(tokenizer)
        ranks = [
            next((r.rank for r in row if first[int(r.item_id[1:])] == first[t]), np.inf)
            for row, t in zip(found, targets)
        ]
        values[gamma] = np.mean([1 / np.log2(1 + rank) if rank < np.inf else 0.0 for rank in ranks])
    choice = model.choose_gamma(tokenizer, histories, targets, grid=(0.0, 0.5, 2.0, 20.0), exclude_seen=False)
    assert choice.grid == pytest.approx(values, abs=1e-6)
    assert model.config.gamma == choice.gamma == max(values, key=values.get) > 0
    with pytest.raises(RequestError, match="1 targets for 2 histories"):
        model.choose_gamma(tokenizer, histories[:2], targets[:1])


# ------------------------------------------------------------------------------------------------ vectors and weights


def test_item_vectors_follow_the_weights_and_are_saved(tokenizer, tmp_path) -> None:
    model = _model(tokenizer)
    assert bool(model.item_vectors.isnan().all())
    calls = []
    made, model.refresh_item_vectors = model.refresh_item_vectors, lambda: (calls.append(1), made())
    first = model.recommend(HISTORIES, tokenizer=tokenizer, k=5)
    assert model.recommend(HISTORIES, tokenizer=tokenizer, k=5) == first and len(calls) == 1
    before = model.item_vectors.clone()
    optimiser = torch.optim.SGD(model.language_model.parameters(), lr=0.5)  # training behind the model's back
    model.language_model(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()
    optimiser.step()
    model.save_pretrained(tmp_path)
    assert len(calls) == 2 and not torch.allclose(model.item_vectors, before, atol=1e-3)
    loaded = AutoModelForRecommendation.from_pretrained(tmp_path).eval()
    assert type(loaded) is GroundedLanguageRecommender and torch.equal(loaded.item_vectors, model.item_vectors)
    loaded.refresh_item_vectors = lambda: pytest.fail("the folder's vectors are those of its weights")
    answers = [one.recommend(HISTORIES, tokenizer=tokenizer, k=5) for one in (model, loaded)]
    assert [[r.item_id for r in row] for row in answers[0]] == [[r.item_id for r in row] for row in answers[1]]
    with torch.no_grad():
        for weight in loaded.language_model.parameters():
            weight.mul_(1.01)
    with pytest.raises(pytest.fail.Exception):
        loaded.recommend(HISTORIES, tokenizer=tokenizer, k=5)


def test_beam_decoding_scores_the_titles(tokenizer) -> None:
    model = _model(tokenizer, prompt_before=[5])
    scores = model.score_all(HISTORIES, tokenizer=tokenizer)
    for row, history in enumerate(HISTORIES):
        prompt = [tokenizer.bos_token_id, 5] + [t for item in history for t in tokenizer.item_token_ids(item)]
        for item in range(0, N, 9):
            words = _words(tokenizer, item)
            logits = model.language_model(input_ids=torch.tensor([prompt + words])).logits[0].log_softmax(-1)
            expected = sum(float(logits[len(prompt) - 1 + at, word].detach()) for at, word in enumerate(words))
            assert scores[row, item] == pytest.approx(expected, abs=1e-3)


# ------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("side", ["left", "right"])
def test_window_loss_by_hand(side, tokenizer) -> None:
    model = _model(tokenizer, prompt_before=[5, 6])
    rows = [np.array([3, 28, 29]), np.array([5, 6]), np.array([1, 2, 28, 7])]
    tokenizer.padding_side = side
    try:
        batch = SequenceCollator(tokenizer)([{"items": row} for row in rows])
        parts = [SequenceCollator(tokenizer)([{"items": row}]) for row in rows]
    finally:
        tokenizer.padding_side = "left"
    total, count = 0.0, 0
    for row in rows:
        words = [_words(tokenizer, item) for item in row]
        flat = [tokenizer.bos_token_id, 5, 6, *(t for item in words for t in item)]
        logits = model.language_model(input_ids=torch.tensor([flat])).logits[0].detach().log_softmax(-1)
        for at in range(3 + len(words[0]), len(flat)):
            total, count = total - float(logits[at - 1, flat[at]]), count + 1
    assert model(**batch).loss.item() == pytest.approx(total / count, abs=1e-4)
    assert sum(model(**one, num_items_in_batch=count).loss.item() for one in parts) == pytest.approx(
        total / count, abs=1e-4
    )


def test_prefix_loss_labels_the_answer_alone(tokenizer) -> None:
    model = _model(tokenizer, prompt_before=[5], prompt_after=[6, 7], prefix_training=True)
    samples = [{"items": np.array([3, 28]), "target": 29}, {"items": np.array([], int), "target": 1}]
    total, count = 0.0, 0
    for sample in samples:
        history = [t for item in sample["items"] for t in _words(tokenizer, item)]
        prompt, answer = [tokenizer.bos_token_id, 5, *history, 6, 7], _words(tokenizer, sample["target"])
        logits = model.language_model(input_ids=torch.tensor([prompt + answer])).logits[0].detach().log_softmax(-1)
        for at, token in enumerate(answer):
            total, count = total - float(logits[len(prompt) - 1 + at, token]), count + 1
    batch = PrefixCollator(tokenizer)(samples)
    assert model(**batch).loss.item() == pytest.approx(total / count, abs=1e-4)
    with_assistant = _model(
        tokenizer, prompt_before=[5], prompt_after=[6, 7], prefix_training=True, assistant=ASSISTANT
    )
    with_assistant.language_model.load_state_dict(model.language_model.state_dict())
    ids = torch.tensor([[4 + _first(tokenizer)[item] for item in (3, 28, 29)]])
    labels = torch.where(torch.arange(3) < 2, -100, ids)
    own = with_assistant.assistant(input_ids=ids, labels=labels).loss.item()  # the second row has no history
    assert with_assistant(**batch).loss.item() == pytest.approx(total / count + own, abs=1e-4)


def test_successor_catalogue(tmp_path) -> None:
    """Titles alone, i is followed by i + 1: what is written is the next title, and grounding finds it."""
    titles = [f"{WORDS[i // 10]} {WORDS[i % 10]}" for i in range(N)]
    tokenizer = ItemWordsTokenizer.from_texts(train_text_tokenizer(titles, 300), [f"i{i}" for i in range(N)], titles)
    language = LANGUAGE | {"hidden_size": 32, "intermediate_size": 64, "initializer_range": 0.1}
    model = _model(tokenizer, language_model=language)
    args = small_arguments(tmp_path, num_train_epochs=25, learning_rate=5e-3, max_history=14, eval_epochs=25)
    result = train_recommender(model, tokenizer, successor_split(), args)
    assert result.summary["validation"]["recall@1"] > 0.9  # a few histories are longer than most that were trained
    assert model.popularity.sum() == len(successor_split().train.items)
    histories = [[f"i{(start + step) % N}" for step in range(5)] for start in range(N)]
    found = model.recommend(histories, tokenizer=tokenizer, k=1, exclude_seen=False)
    assert [row[0].item_id for row in found] == [f"i{(start + 5) % N}" for start in range(N)]


# ------------------------------------------------------------------------------------------------ around a language model


def test_from_a_language_model_and_lora(tmp_path) -> None:
    base = train_text_tokenizer(_titles(), 300)
    torch.manual_seed(0)
    values = {name: value for name, value in LANGUAGE.items() if name != "model_type"}
    language = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(base), tie_word_embeddings=True, eos_token_id=base.eos_token_id, **values)
    )
    ids = [f"i{n}" for n in range(N)]
    added = ItemWordsTokenizer.from_texts(base, ids, _titles())
    model = GroundedLanguageRecommender.from_language_model(language, added, lora=False)
    table, old = model.get_input_embeddings().weight, language.get_input_embeddings().weight
    assert len(table) == len(added) > len(base) and torch.equal(table[: len(base)], old)
    assert torch.equal(table[added.item_end_token_id], old[base.eos_token_id])
    assert model.get_output_embeddings().weight is table

    own = ItemWordsTokenizer.from_texts(base, ids, _titles(), item_end_token=base.eos_token)
    model = GroundedLanguageRecommender.from_language_model(language, own, prompt_before="star", prompt_after="the")
    assert (
        model.config.prefix_training and model.config.prompt_after == own("the", add_special_tokens=False)["input_ids"]
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    args = small_arguments(
        tmp_path / "run", num_train_epochs=1, learning_rate=1e-2, eval_strategy="no", samples_per_epoch=64
    )
    train_recommender(model, own, successor_split(), args)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    adapters = {name for name in before if "lora_" in name}
    assert moved - {"item_vectors", "popularity"} == adapters and len(adapters) == 8  # q and v of two layers
    answers = model.recommend(HISTORIES, tokenizer=own, k=5)
    model.save_pretrained(tmp_path / "adapted")
    loaded = AutoModelForRecommendation.from_pretrained(tmp_path / "adapted").eval()
    assert {n for n, w in loaded.named_parameters() if w.requires_grad} == adapters
    loaded.merge_lora()
    loaded.language_model.save_pretrained(tmp_path / "plain")
    plain = LlamaForCausalLM.from_pretrained(tmp_path / "plain")  # a stock model, for any server
    assert plain.state_dict().keys() == language.state_dict().keys()
    again = loaded.recommend(HISTORIES, tokenizer=own, k=5)
    assert [[r.item_id for r in row] for row in again] == [[r.item_id for r in row] for row in answers]


def test_items_in_texts() -> None:
    texts = ItemTexts(torch.tensor([[5, 6, 2], [7, 2, -1], [5, 6, 2]]), 2)
    ids = torch.tensor([[7, 2, 5, 6, 2, 5], [9, 9, 7, 2, 9, 2]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
    assert texts.rows(ids, mask).tolist() == [[1, 0], [1, -1]]  # an unfinished text and an unknown one name nothing
    assert texts.rows(ids[:, :0], mask[:, :0]).shape == (2, 0)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"language_model": {"model_type": "lama"}}, r"language_model.model_type is 'lama'"),
        ({"prompt_after": [3]}, "set prefix_training to true"),
        ({"prior": "assistant"}, "'assistant' needs an assistant"),
        ({"prior": "fame"}, "prior is 'fame'"),
        ({"gamma": -1.0}, "gamma must be at least 0"),
    ],
)
def test_configuration_errors(options, message, tokenizer) -> None:
    with pytest.raises(IncompatibleComponentsError, match=message):
        GroundedLanguageConfig.from_tokenizer(tokenizer, **options)


def test_other_errors(tokenizer) -> None:
    with pytest.raises(IncompatibleComponentsError, match="does not name items by words"):
        GroundedLanguageConfig.from_tokenizer(ItemTokenizer.from_codes(["a"], [[0]]))
    model = GroundedLanguageRecommender(GroundedLanguageConfig.from_tokenizer(tokenizer, language_model=LANGUAGE))
    with pytest.raises(IncompatibleComponentsError, match="call set_catalogue"):
        model.recommend([["i1"]], tokenizer=tokenizer)
    with pytest.raises(IncompatibleComponentsError, match="item_codes has shape"):
        model.set_catalogue([[1]])
