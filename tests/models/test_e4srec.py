"""E4SRec: one forward pass, frozen parts, both layouts of training, padding, LoRA inside the model, a row for a new item."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "alignment"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "identifiers"))
from text_tokenizers import byte_level_bpe
from trainer_cases import small_arguments, successor_split

from hf_genrec import AutoModelForRecommendation, ItemTokenizer
from hf_genrec.alignment.trainers.recommender import train_recommender
from hf_genrec.data.collators import PrefixCollator, SequenceCollator
from hf_genrec.errors import IncompatibleComponentsError
from hf_genrec.models.e4srec.configuration_e4srec import E4SRecConfig
from hf_genrec.models.e4srec.modeling_e4srec import E4SRecForRecommendation

N, D = 12, 6
LLAMA = {
    "model_type": "llama", "vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3, "bos_token_id": 1,
}  # fmt: skip
GPT2 = {"model_type": "gpt2", "vocab_size": 20, "n_embd": 16, "n_layer": 2, "n_head": 2, "resid_pdrop": 0.0,
        "embd_pdrop": 0.0, "attn_pdrop": 0.0, "initializer_range": 0.3, "bos_token_id": 1}  # fmt: skip
HISTORIES = [["i3", "i1", "i4", "i1", "i5"], ["i9"], [], ["i2", "i2", "i7"]]
PROMPT = {"instruction_tokens": [1, 7, 9], "response_tokens": [4, 5], "prefix_training": True}


def _tokenizer(items: int = N) -> ItemTokenizer:
    return ItemTokenizer.from_codes([f"i{n}" for n in range(items)], np.arange(items)[:, None], [items])


def _vectors(items: int = N, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(items, D)).astype(np.float32)


def _model(seed: int = 0, language: dict = LLAMA, **options) -> E4SRecForRecommendation:
    torch.manual_seed(seed)
    config = E4SRecConfig.from_tokenizer(
        _tokenizer(), language_model=language, item_feature_dim=D, initializer_range=0.3, **options
    )
    model = E4SRecForRecommendation(config).eval()
    model.set_catalogue(_tokenizer().codes, _vectors())
    return model


def _by_hand(model, history: list[int]) -> torch.Tensor:
    """Logits of all items: one row, no padding, the language model called as anybody would."""
    vectors = torch.tensor(_vectors())[history]
    parts = [
        model.get_input_embeddings()(torch.tensor(model.config.instruction_tokens)),
        vectors @ model.item_projection.weight.T + model.item_projection.bias,
        model.get_input_embeddings()(torch.tensor(model.config.response_tokens, dtype=torch.long)),
    ]
    hidden = model.language_model(inputs_embeds=torch.cat(parts)[None]).last_hidden_state[0, -1]
    return hidden @ model.item_head.weight.T


def _numbers(history: list[str]) -> list[int]:
    return [int(item[1:]) for item in history]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("options", [{}, PROMPT, {"language": GPT2}], ids=["windows", "prompt", "gpt2"])
def test_scores_are_those_of_the_unpadded_row(side, options) -> None:
    model, tokenizer = _model(**options), _tokenizer()
    tokenizer.padding_side = side
    with torch.no_grad():
        batch = tokenizer.encode_histories(HISTORIES, return_tensors="pt")
        scores = model.score_dense(model.start_decoding(**batch))
        logits = model(**batch).logits
        for row, history in enumerate(HISTORIES):
            expected = _by_hand(model, _numbers(history))[1:]
            assert torch.allclose(scores[row], expected.log_softmax(-1), atol=1e-4)
            assert torch.allclose(logits[row, -1], expected, atol=1e-4)
    assert model.item_head.weight.shape == (N + 1, 16)  # the catalogue and a column for padding


def test_one_forward_pass_whatever_k_and_always_items() -> None:
    model, tokenizer = _model(), _tokenizer()
    calls = []
    model.language_model.register_forward_hook(lambda *args: calls.append(1))
    for k in (1, 5, 11):
        answers = model.recommend(HISTORIES[:1], tokenizer=tokenizer, k=k, exclude_seen=False)
        assert len({r.item_id for r in answers[0]}) == k
    assert len(calls) == 3
    scores = model.score_dense(model.start_decoding(**tokenizer.encode_histories(HISTORIES, return_tensors="pt")))
    found = model.recommend(HISTORIES, tokenizer=tokenizer, k=4, allowed_items=["i1", "i5", "i8", "i9", "i0"])
    for row, history in enumerate(HISTORIES):
        left = [i for i in (0, 1, 5, 8, 9) if f"i{i}" not in history]
        assert [r.item_id for r in found[row]] == [
            f"i{i}" for i in sorted(left, key=lambda i: -scores[row, i].item())[:4]
        ]
    assert torch.allclose(model.score_all(HISTORIES, tokenizer=tokenizer), scores, atol=1e-5)
    beam = model.recommend(HISTORIES, tokenizer=tokenizer, k=3, decoding="beam")
    assert beam == model.recommend(HISTORIES, tokenizer=tokenizer, k=3, decoding="beam", num_beams=N)


@pytest.mark.parametrize("side", ["left", "right"])
def test_window_loss_is_the_sum_over_the_prefixes(side) -> None:
    model, tokenizer = _model(), _tokenizer()
    tokenizer.padding_side = side
    samples = [{"items": np.array(_numbers(h))} for h in HISTORIES if len(h) > 1]
    batch = SequenceCollator(tokenizer)(samples)
    terms = [
        -_by_hand(model, row["items"][:n].tolist()).log_softmax(-1)[row["items"][n] + 1]
        for row in samples
        for n in range(1, len(row["items"]))
    ]
    loss = model(**batch).loss
    assert torch.allclose(loss, torch.stack(terms).mean(), atol=1e-4)
    assert torch.allclose(model(**batch, num_items_in_batch=3).loss, torch.stack(terms).sum() / 3, atol=1e-4)
    # a first item that is labelled is predicted from the instruction alone
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    first = [-_by_hand(model, []).log_softmax(-1)[row["items"][0] + 1] for row in samples]
    assert torch.allclose(model(**batch).loss, torch.stack(terms + first).mean(), atol=1e-4)


def test_prefix_loss_has_one_target_behind_the_response() -> None:
    model, tokenizer = _model(**PROMPT), _tokenizer()
    samples = [{"items": np.array(_numbers(h)), "target": (3 * n + 2) % N} for n, h in enumerate(HISTORIES)]
    expected = [-_by_hand(model, s["items"].astype(int).tolist()).log_softmax(-1)[s["target"] + 1] for s in samples]
    loss = model(**PrefixCollator(tokenizer)(samples)).loss
    assert torch.allclose(loss, torch.stack(expected).mean(), atol=1e-4)


def test_both_layouts_are_one_model_without_a_response() -> None:
    """The last position of a window is the one target of its prefix."""
    windows = _model()
    prefixes = _model(prefix_training=True)
    prefixes.load_state_dict(windows.state_dict())
    rows = [np.array([1, 5, 2, 7]), np.array([3, 3, 4])]
    batch = SequenceCollator(_tokenizer())([{"items": row} for row in rows])
    batch["labels"][:, :-1] = -100
    one = PrefixCollator(_tokenizer())([{"items": row[:-1], "target": row[-1]} for row in rows])
    assert torch.allclose(windows(**batch).loss, prefixes(**one).loss, atol=1e-5)


# ------------------------------------------------------------------------------------------------ what trains


def _train(model, folder, **options):
    return train_recommender(
        model, _successor_tokenizer(), successor_split(N), small_arguments(folder, eval_strategy="no", **options)
    ).model


def _successor_tokenizer() -> ItemTokenizer:
    return _tokenizer()


def test_lora_trains_adapters_and_the_two_maps_and_nothing_else(tmp_path) -> None:
    model = _model(lora={"r": 4, "alpha": 8})
    with torch.no_grad():
        plain = _model()
        plain.language_model.load_state_dict(
            {name.replace(".base_layer", ""): value for name, value in model.language_model.state_dict().items()
             if "lora_" not in name}
        )  # fmt: skip
        plain.item_projection.load_state_dict(model.item_projection.state_dict())
        plain.item_head.load_state_dict(model.item_head.state_dict())
        batch = _tokenizer().encode_histories(HISTORIES, return_tensors="pt")
        assert torch.equal(plain(**batch).logits, model(**batch).logits)  # new adapters change nothing
    before = {name: value.clone() for name, value in model.state_dict().items()}
    _train(model, tmp_path, num_train_epochs=1, learning_rate=1e-2)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    expected = {name for name in before if "lora_" in name or name.startswith("item_projection")} | {"item_head.weight"}
    assert moved == expected and sum("lora_B" in name for name in moved) == 6  # gate, up, down of two layers
    trainable = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trainable == expected

    logits = model(**batch).logits
    model.save_pretrained(tmp_path / "adapted")
    loaded = AutoModelForRecommendation.from_pretrained(tmp_path / "adapted").eval()
    assert type(loaded) is E4SRecForRecommendation and torch.equal(loaded(**batch).logits, logits)
    assert {name for name, weight in loaded.named_parameters() if weight.requires_grad} == expected
    loaded.merge_lora()
    assert not any("lora" in name or "base_layer" in name for name in loaded.state_dict())
    assert torch.allclose(loaded(**batch).logits, logits, atol=1e-4)
    assert not any(weight.requires_grad for weight in loaded.language_model.parameters())
    loaded.save_pretrained(tmp_path / "merged")
    again = AutoModelForRecommendation.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(again(**batch).logits, loaded(**batch).logits)
    answers = [one.recommend(HISTORIES, tokenizer=_tokenizer(), k=5) for one in (model, again)]
    assert [[r.item_id for r in row] for row in answers[0]] == [[r.item_id for r in row] for row in answers[1]]
    again.add_lora({"r": 2})  # a merged model can be adapted anew
    assert torch.equal(again(**batch).logits, loaded(**batch).logits)


def test_successor_catalogue(tmp_path) -> None:
    """Item i is always followed by i + 1: Hit@1 = 1, trained from scratch on windows of item vectors."""
    model = _model(1, language=LLAMA | {"hidden_size": 32, "initializer_range": 0.1})
    result = train_recommender(
        model, _tokenizer(), successor_split(N),
        small_arguments(tmp_path, num_train_epochs=12, learning_rate=1e-2, eval_epochs=12),
    )  # fmt: skip
    assert result.summary["validation"]["recall@1"] == 1.0
    assert torch.equal(model.item_vectors, torch.tensor(_vectors()))
    histories = [[f"i{(start + step) % N}" for step in range(4)] for start in range(N)]
    found = model.recommend(histories, tokenizer=_tokenizer(), k=1, exclude_seen=False)
    assert [row[0].item_id for row in found] == [f"i{(start + 4) % N}" for start in range(N)]


# ------------------------------------------------------------------------------------------------ around a language model


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_from_a_language_model(kind, tmp_path) -> None:
    text = byte_level_bpe()
    torch.manual_seed(0)
    if kind == "llama":
        config = LlamaConfig(**{**LLAMA, "vocab_size": len(text)})
        language, lora = LlamaForCausalLM(config), {}
    else:
        language, lora = GPT2LMHeadModel(GPT2Config(**{**GPT2, "vocab_size": len(text)})), {"target_modules": ["c_fc"]}
    language.save_pretrained(tmp_path)
    model = E4SRecForRecommendation.from_language_model(
        tmp_path, _tokenizer(), _vectors(), text_tokenizer=text, instruction="these items were bought <|im_end|>",
        response="next:", lora=lora,
    ).eval()  # fmt: skip
    assert model.config.prefix_training and model.config.response_tokens == text("next:")["input_ids"]
    assert model.config.instruction_tokens[0] == text.bos_token_id
    assert text.eos_token_id in model.config.instruction_tokens  # the text is the caller's own
    backbone = AutoModelForCausalLM.from_pretrained(tmp_path).base_model.state_dict()
    ours = {name.replace(".base_layer", ""): value for name, value in model.language_model.state_dict().items()}
    assert all(torch.equal(ours[name], value) for name, value in backbone.items())
    scores = model.score_dense(model.start_decoding(**_tokenizer().encode_histories(HISTORIES, return_tensors="pt")))
    for row, history in enumerate(HISTORIES):
        expected = _by_hand(model, _numbers(history))[1:].log_softmax(-1)
        assert torch.allclose(scores[row], expected, atol=1e-4)


def test_a_new_item_is_a_row(tmp_path) -> None:
    model = _model()
    # a head that is linear in the vectors, so that the fit has a right answer
    mixing = torch.randn(D, 16)
    with torch.no_grad():
        model.item_head.weight[1:] = torch.tensor(_vectors()) @ mixing
    before = copy.deepcopy(model)
    more = np.concatenate([_vectors(), _vectors(2, seed=5)])
    model.add_items(_tokenizer(N + 2), more[N:])
    batch = _tokenizer().encode_histories(HISTORIES, return_tensors="pt")
    logits = model(**batch).logits
    assert logits.shape[-1] == N + 2 and torch.equal(logits[..., :N], before(**batch).logits)
    for name, value in before.language_model.state_dict().items():
        assert torch.equal(model.language_model.state_dict()[name], value)
    assert torch.allclose(model.item_head.weight[N + 1 :], torch.tensor(more[N:]) @ mixing, atol=0.1)
    found = model.recommend([["i12", "i13"]], tokenizer=_tokenizer(N + 2), k=N)
    assert len(found[0]) == N and not {"i12", "i13"} & {r.item_id for r in found[0]}
    model.save_pretrained(tmp_path)
    loaded = AutoModelForRecommendation.from_pretrained(tmp_path).eval()
    again = loaded.recommend([["i12", "i13"]], tokenizer=_tokenizer(N + 2), k=N)
    assert [r.item_id for r in again[0]] == [r.item_id for r in found[0]]
    assert torch.allclose(loaded(**batch).logits, logits, atol=1e-5)
    exact = copy.deepcopy(before)
    exact.add_items(_tokenizer(N + 1), more[N : N + 1], torch.full((1, 16), 2.0))
    assert bool((exact.item_head.weight[-1] == 2).all())
    with pytest.raises(IncompatibleComponentsError, match="first 12 items are not this model's"):
        before.add_items(ItemTokenizer.from_codes(["a"], [[0]]), more[:0])
    with pytest.raises(IncompatibleComponentsError, match="2 new items need finite vectors of width 6"):
        before.add_items(_tokenizer(N + 2), more[N:, :3])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"response_tokens": [3]}, "set prefix_training to true"),
        ({"instruction_tokens": [99]}, "instruction_tokens holds 99, the language model has 20 tokens"),
        ({"language_model": {"model_type": "t5"}}, "'t5', which is no causal language model"),
        ({"lora": {"rank": 3}}, "lora has no option 'rank'"),
        ({"lora": {"r": 0}}, "r >= 1"),
        ({"language_model": LLAMA | {"max_position_embeddings": 20}}, "51 positions are needed"),
    ],
)
def test_configuration_errors(options, message) -> None:
    with pytest.raises(IncompatibleComponentsError, match=message):
        E4SRecConfig(**{"language_model": LLAMA, **options})


def test_other_errors() -> None:
    with pytest.raises(IncompatibleComponentsError, match=r"\['gate_proj', .*name no layer of GPT2Model.*c_attn, c_fc"):
        _model(language=GPT2, lora={})
    model = _model()
    with pytest.raises(IncompatibleComponentsError, match="pass item_features"):
        model.set_catalogue(_tokenizer().codes)
    with pytest.raises(IncompatibleComponentsError, match="must be finite"):
        model.set_catalogue(_tokenizer().codes, np.full((N, D), np.nan))
    with pytest.raises(IncompatibleComponentsError, match="exceeds max_position_embeddings=50"):
        model(**_tokenizer().encode_histories([["i1"] * 51], return_tensors="pt"))
    with pytest.raises(IncompatibleComponentsError, match="text_tokenizer"):
        E4SRecForRecommendation.from_language_model(model.language_model, _tokenizer(), _vectors(), response="x")
    long = [["i1"] * 30 + ["i2"] * 30]
    newest = model.recommend([long[0][-50:]], tokenizer=_tokenizer(), k=3)
    assert model.recommend(long, tokenizer=_tokenizer(), k=3) == newest  # of longer histories the newest are read


def test_gradient_accumulation_changes_nothing() -> None:
    model = _model()
    rows = [{"items": np.array(row)} for row in ([1, 2, 3], [4, 5], [6, 7, 8, 9])]
    whole = SequenceCollator(_tokenizer())(rows)
    count = int((whole["labels"] != -100).sum())
    model(**whole).loss.backward()
    gradient = model.item_projection.weight.grad.clone()
    model.zero_grad()
    for row in rows:
        model(**SequenceCollator(_tokenizer())([row]), num_items_in_batch=count).loss.backward()
    assert torch.allclose(model.item_projection.weight.grad, gradient, atol=1e-6)
