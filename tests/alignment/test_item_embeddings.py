"""add_item_tokens: old rows keep their bits, codes start near their vectors or words, wrong models are refused."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from sft_cases import SIZES, base_lm, base_tokenizer, item_tokenizer, text_tokenizer
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, T5Config, T5ForConditionalGeneration

from hf_genrec.alignment.item_embeddings import add_item_tokens
from hf_genrec.errors import IncompatibleComponentsError, ItemTableError
from hf_genrec.generation.recommend import recommend
from hf_genrec.identifiers.extend import extend_tokenizer
from hf_genrec.identifiers.segments import control_token_ids

TITLES = [f"The Matrix ({1990 + item * item})" for item in range(16)]
BASE = len(base_tokenizer())


def codebooks(width: int, seed: int = 0) -> list[np.ndarray]:
    return [np.random.default_rng(seed + level).normal(size=(4, width)) * (1 + level) for level in range(2)]


def tables(model) -> list[torch.Tensor]:
    return [model.get_input_embeddings().weight.detach(), model.get_output_embeddings().weight.detach()]


def level_rows(table: torch.Tensor, level: int) -> torch.Tensor:
    start = int(text_tokenizer().level_offsets[level])
    return table[start : start + 4]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("init", ["mean", "codebook", "text"])
def test_old_rows_keep_their_bits_and_new_rows_lie_among_them(tied, init):
    model = base_lm(tied)
    before, tokenizer = [table.clone() for table in tables(model)], text_tokenizer()
    torch.manual_seed(5)
    expected_draw = torch.rand(1)
    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert add_item_tokens(model, tokenizer, init=init, codebooks=codebooks(6), item_texts=TITLES) is model
    assert torch.equal(torch.rand(1), expected_draw)  # the caller's random numbers are his own
    after = tables(model)
    for old, new in zip(before, after):
        assert torch.equal(new[:BASE], old) and len(new) == len(tokenizer) == model.config.vocab_size
        norms, usual = new[BASE:].norm(dim=1), old.norm(dim=1)
        assert torch.isfinite(new).all() and norms.max() < 2 * usual.max()
        distances = torch.cdist(level_rows(new, 0), level_rows(new, 0))
        assert distances[~torch.eye(4, dtype=torch.bool)].min() > 1e-3  # no two codes are the same
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    assert (model.config.catalogue_fingerprint, model.config.base_vocab_size) == (tokenizer.catalogue_fingerprint, BASE)
    again = add_item_tokens(base_lm(tied), tokenizer, init=init, codebooks=codebooks(6), item_texts=TITLES)
    other = add_item_tokens(base_lm(tied), tokenizer, init=init, codebooks=codebooks(6), item_texts=TITLES, seed=1)
    assert all(torch.equal(one, two) for one, two in zip(after, tables(again)))
    assert not torch.equal(after[0], tables(other)[0])


def test_noise_of_mean_has_the_directions_of_the_old_rows():
    model = base_lm()
    weight = model.get_input_embeddings().weight
    with torch.no_grad():  # spread along two directions, one three times as wide
        directions = torch.linalg.qr(torch.randn(16, 2, generator=torch.Generator().manual_seed(0))).Q
        generator = torch.Generator().manual_seed(1)
        weight.copy_(2.0 + torch.randn(BASE, 2, generator=generator) * torch.tensor([3.0, 1.0]) @ directions.T)
    codes = np.arange(400)[:, None]
    from hf_genrec.identifiers.tokenization_item import ItemTokenizer

    many = extend_tokenizer(base_tokenizer(), ItemTokenizer.from_codes([f"i{i}" for i in range(400)], codes))
    add_item_tokens(model, many)
    noise = model.get_input_embeddings().weight[BASE:].detach() - weight.mean(dim=0)
    inside = noise @ directions
    assert (noise - inside @ directions.T).abs().max() < 1e-5
    wide, narrow = inside.std(dim=0).tolist()
    assert 0.24 < wide < 0.36 and 0.08 < narrow < 0.12  # a tenth of 3 and of 1


@pytest.mark.parametrize("width", [6, 40])
@pytest.mark.parametrize("tied", [True, False])
def test_codebook_rows_keep_distances_up_to_one_factor(tied, width):
    """Also for vectors wider than the model: 4 of them span 3 directions only."""
    books = codebooks(width)
    model = add_item_tokens(base_lm(tied), text_tokenizer(), init="codebook", codebooks=[*map(torch.as_tensor, books)])
    upper = torch.triu(torch.ones(4, 4, dtype=torch.bool), 1)
    for table in tables(model):
        old = table[:BASE]
        mean, usual = old.mean(dim=0), (old - old.mean(dim=0)).norm(dim=1).mean()
        for level, book in enumerate(books):
            rows = level_rows(table, level)
            vectors = torch.as_tensor(book, dtype=torch.float32)
            ratios = (torch.cdist(rows, rows) / torch.cdist(vectors, vectors))[upper]
            torch.testing.assert_close(ratios, ratios[:1].expand_as(ratios), rtol=1e-4, atol=0)
            torch.testing.assert_close((rows - mean).norm(dim=1).mean(), usual)


def test_a_level_without_a_codebook_starts_from_the_mean():
    plain = add_item_tokens(base_lm(), text_tokenizer())
    model = add_item_tokens(base_lm(), text_tokenizer(), init="codebook", codebooks=[codebooks(6)[0], None])
    (table, _), (other, _) = tables(model), tables(plain)
    assert torch.equal(level_rows(table, 1), level_rows(other, 1))
    assert not torch.equal(level_rows(table, 0), level_rows(other, 0))


@pytest.mark.parametrize("tied", [True, False])
def test_text_rows_are_means_over_the_items_of_a_code(tied):
    tokenizer = text_tokenizer()
    texts = {
        f"i{item}": "" if item % 4 == 3 else TITLES[item] for item in range(16)
    }  # code 3 of level b: no text at all
    model = add_item_tokens(base_lm(tied), tokenizer, init="text", item_texts=texts)
    plain = add_item_tokens(base_lm(tied), tokenizer)
    for table, mean_start in zip(tables(model), tables(plain)):
        for level in range(2):
            for code in range(4):
                titles = [texts[f"i{item}"] for item in range(16) if (item // 4, item % 4)[level] == code]
                ids = [base_tokenizer().encode(title, add_special_tokens=False) for title in titles if title]
                expected = level_rows(mean_start, level)[code]
                if ids:
                    expected = torch.stack([table[each].mean(dim=0) for each in ids]).mean(dim=0)
                torch.testing.assert_close(level_rows(table, level)[code], expected)


def test_titles_cannot_reach_control_tokens():
    tokenizer, model = text_tokenizer(), base_lm()
    with torch.no_grad():
        control = [index for index in control_token_ids(tokenizer) if index < BASE]
        model.get_input_embeddings().weight[control] = 1e6
    hostile = ["<|im_end|>", "<a_0><b_1>", "<pad><|im_start|>system", *["x<|im_end|>y"] * 13]
    add_item_tokens(model, tokenizer, init="text", item_texts=hostile)
    assert model.get_input_embeddings().weight[tokenizer.level_offsets[0] :].abs().max() < 10


def test_padded_vocabularies_use_their_spare_rows():
    """Qwen and others have more rows than tokens: the items move in, the rows behind them stay as they are."""
    tokenizer = text_tokenizer()
    assert len(tokenizer) < 320
    model = base_lm(vocab_size=320)
    before = model.get_input_embeddings().weight.detach().clone()
    add_item_tokens(model, tokenizer)
    after = model.get_input_embeddings().weight.detach()
    changed = (before != after).any(dim=1).nonzero().squeeze(1).tolist()
    assert changed == list(range(int(tokenizer.level_offsets[0]), len(tokenizer)))
    assert model.config.vocab_size == 320


def test_other_architectures_and_a_head_with_bias():
    tokenizer = text_tokenizer()
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=BASE, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )
    neox = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=BASE, **SIZES))
    for model in (t5, neox):
        add_item_tokens(model, tokenizer, init="codebook", codebooks=codebooks(6))
        result = recommend(model, [["i1", "i2"]], tokenizer=tokenizer, k=14)
        assert len({entry.item_id for entry in result[0]}) == 14
    head = torch.nn.Linear(16, BASE)
    biased = base_lm(tied=False)
    biased.set_output_embeddings(head)
    old = head.bias.detach().clone()
    add_item_tokens(biased, tokenizer)
    bias = biased.get_output_embeddings().bias.detach()
    assert torch.equal(bias[:BASE], old) and torch.allclose(bias[BASE:], old.mean())


def test_wrong_models_and_options_are_refused():
    tokenizer = text_tokenizer()
    for words, model, options in [
        ("already has item tokens", add_item_tokens(base_lm(), tokenizer), {}),
        ("already larger", base_lm(vocab_size=len(tokenizer) + 3), {}),
        ("extend the tokenizer that belongs", base_lm(vocab_size=BASE - 2), {}),
        ("init is 'zero'", base_lm(), {"init": "zero"}),
        ("none given for 2 levels", base_lm(), {"init": "codebook"}),
        ("1 given for 2 levels", base_lm(), {"init": "codebook", "codebooks": codebooks(6)[:1]}),
        (r"codebooks\[1\] has shape \(3, 6\)", base_lm(), {"init": "codebook", "codebooks": [None, np.ones((3, 6))]}),
        (r"codebooks\[0\] holds NaN", base_lm(), {"init": "codebook", "codebooks": [np.full((4, 6), np.nan), None]}),
        ("needs item_texts", base_lm(), {"init": "text"}),
    ]:
        before = model.get_input_embeddings().weight.shape[0]
        with pytest.raises(IncompatibleComponentsError, match=words):
            add_item_tokens(model, tokenizer, **options)
        assert model.get_input_embeddings().weight.shape[0] == before  # nothing happened
    with pytest.raises(ItemTableError, match="no entry for item 'i1'"):
        add_item_tokens(base_lm(), tokenizer, init="text", item_texts={"i0": "a"})
    with pytest.raises(ItemTableError, match="2 texts for 16 items"):
        add_item_tokens(base_lm(), tokenizer, init="text", item_texts=["a", "b"])
    with pytest.raises(ItemTableError, match="text of item 'i3' is a NoneType"):
        add_item_tokens(base_lm(), tokenizer, init="text", item_texts=[*TITLES[:3], None, *TITLES[4:]])
    with pytest.raises(IncompatibleComponentsError, match="carries no catalogue"):
        add_item_tokens(base_lm(), base_tokenizer())


def test_a_model_is_bound_to_its_catalogue():
    model = add_item_tokens(base_lm(), text_tokenizer())
    other = extend_tokenizer(base_tokenizer(), item_tokenizer(15))
    with pytest.raises(IncompatibleComponentsError, match="the model was made for catalogue"):
        recommend(model, [["i1"]], tokenizer=other)
