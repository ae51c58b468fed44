"""P5: whole words, packed prefixes, decoding, and what it is without its own parts."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM, T5Config, T5ForConditionalGeneration

from hf_genrec.errors import IncompatibleComponentsError
from hf_genrec.generation.trie import ItemTrie
from hf_genrec.identifiers.item_names import tokenizer_from_names
from hf_genrec.identifiers.path_identifiers import path_codes, path_tokens
from hf_genrec.identifiers.text_vocabulary import train_text_tokenizer
from hf_genrec.identifiers.tokenization_item import ItemTokenizer
from hf_genrec.models.p5.configuration_p5 import P5Config
from hf_genrec.models.p5.modeling_p5 import P5ForConditionalGeneration
from hf_genrec.models.p5.whole_words import word_start_flags

N = 12
IDS = [f"i{n}" for n in range(N)]
SMALL = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2}


def tokenizer_of(kind: str):
    base = train_text_tokenizer(
        ["next item after: Star Wars Star Trek Trek what is next"] * 5 + [f"{n:02d}" for n in range(100)] * 3, 400
    )
    if kind == "numbers":
        return tokenizer_from_names(base, IDS, [f"item_{7390 + n}" for n in range(N)])
    if kind == "titles":
        titles = ["Star Wars", "Star Trek", "Trek", "Wars of the Roses"] + [f"Film {n}" for n in range(N - 4)]
        return tokenizer_from_names(base, IDS, titles)
    return tokenizer_from_names(base, IDS, path_tokens(path_codes([("a", "b"), ("a", "c"), ("d",)] * 4)))


def model_of(tokenizer, seed: int = 0, **options) -> P5ForConditionalGeneration:
    torch.manual_seed(seed)
    model = P5ForConditionalGeneration(P5Config.from_tokenizer(tokenizer, **(SMALL | options)))
    model.set_words(tokenizer)
    return model.eval()


def prompt(tokenizer, *segments) -> torch.Tensor:
    from hf_genrec.identifiers.segments import encode_segments

    return torch.tensor([encode_segments(tokenizer, list(segments))])


@pytest.fixture(scope="module", params=["numbers", "titles", "paths"])
def tokenizer(request):
    return tokenizer_of(request.param)


def test_all_tokens_of_a_name_share_their_word(tokenizer):
    model = model_of(tokenizer)
    ids = prompt(
        tokenizer,
        ("template", "what is next after: "),
        ("items", ["i0", "i1"]),
        ("template", " or "),
        ("items", ["i2"]),
    )
    words = model.encoder.word_ids(ids)[0]
    place = 0
    found = []
    for item in ("i0", "i1", "i2"):
        name = torch.tensor(tokenizer.item_token_ids(item))
        starts = [s for s in range(place, ids.shape[1]) if torch.equal(ids[0, s : s + len(name)], name)]
        inside = words[starts[0] : starts[0] + len(name)]
        assert inside.unique().numel() == 1
        found.append(int(inside[0]))
        place = starts[0] + len(name)
    assert found[1] == found[0] + 1 and found[2] > found[1] + 1
    assert words[0] == 1 and (words.diff() >= 0).all() and (words.diff() <= 1).all()
    assert found[0] > 4  # the words before it were counted


def test_the_longest_name_counts():
    tokenizer = tokenizer_of("titles")
    model = model_of(tokenizer)
    words = model.encoder.word_ids(prompt(tokenizer, ("items", ["i1", "i2"])))[0]
    assert words.unique_consecutive().tolist() == [1, 2]  # "Star Trek" is one word although "Trek" is a name too


def test_padding_does_not_change_words(tokenizer):
    model = model_of(tokenizer)
    batch = tokenizer.encode_histories([["i0", "i3", "i5"], ["i7"]], return_tensors="pt")
    words = model.encoder.word_ids(batch["input_ids"], batch["attention_mask"])
    alone = model.encoder.word_ids(tokenizer.encode_histories([["i7"]], return_tensors="pt")["input_ids"])
    mask = batch["attention_mask"][1].bool()
    assert torch.equal(words[1, mask], alone[0]) and (words[1, ~mask] == 0).all()
    right = torch.cat([batch["input_ids"][1:, mask], batch["input_ids"][1:, ~mask]], 1)
    right_mask = torch.cat([torch.ones(1, int(mask.sum())), torch.zeros(1, int((~mask).sum()))], 1).long()
    assert torch.equal(model.encoder.word_ids(right, right_mask)[0, : len(alone[0])], alone[0])


def test_without_the_row_the_encoder_says_something_else(tokenizer):
    model = model_of(tokenizer)
    ids = prompt(tokenizer, ("items", ["i0", "i1"]))
    with torch.no_grad():
        before = model.encoder(input_ids=ids).last_hidden_state
        model.encoder.whole_words.weight[2].zero_()  # the row of the second word
        after = model.encoder(input_ids=ids).last_hidden_state
    assert (before - after).abs().max() > 1e-2


def test_given_words_equal_derived_ones(tokenizer):
    model = model_of(tokenizer)
    ids, labels = prompt(tokenizer, ("items", ["i0", "i1"])), torch.tensor([tokenizer.item_token_ids("i2")])
    words = model.encoder.word_ids(ids)
    derived = model(input_ids=ids, labels=labels)
    assert torch.equal(derived.logits, model(input_ids=ids, labels=labels, whole_word_ids=words).logits)
    other = model(input_ids=ids, labels=labels, whole_word_ids=words + 1)
    assert (derived.logits - other.logits).abs().max() > 1e-4


def test_everything_off_is_t5():
    tokenizer = tokenizer_of("numbers")
    model = model_of(tokenizer, whole_word=False, pooled_dropout=False)
    stock = T5ForConditionalGeneration(
        T5Config(**SMALL, vocab_size=len(tokenizer), decoder_start_token_id=tokenizer.pad_token_id)
    ).eval()
    missing, unexpected = stock.load_state_dict(model.state_dict(), strict=False)
    assert not missing and set(unexpected) == {"encoder.word_starts", "encoder.item_tokens"}
    batch = tokenizer.encode_histories([["i0", "i3"], ["i7"]], return_tensors="pt")
    labels = torch.tensor([tokenizer.item_token_ids("i2"), tokenizer.item_token_ids("i5")])
    ours, theirs = model(**batch, labels=labels), stock(**batch, labels=labels)
    assert torch.equal(ours.logits, theirs.logits) and abs(ours.loss.item() - theirs.loss.item()) < 1e-6


@pytest.mark.parametrize("whole_word", [True, False])
def test_packed_targets_equal_prefixes_alone(tokenizer, whole_word):
    model = model_of(tokenizer, causal_encoder=True, whole_word=whole_word)
    head = prompt(tokenizer, ("template", "next item after: "))[0].tolist()
    items = ["i0", "i4", "i2", "i9", "i1"]
    names = [tokenizer.item_token_ids(item) for item in items]
    source = torch.tensor([head + list(chain(*names[:-1]))])
    visible = torch.tensor([[len(head) + sum(map(len, names[:t])) for t in range(1, len(items))]])
    longest = max(map(len, names))
    labels = torch.full((1, len(items) - 1, longest), -100)
    for t, name in enumerate(names[1:]):
        labels[0, t, : len(name)] = torch.tensor(name)
    packed = model(input_ids=source, labels=labels, history_lengths=visible).logits
    for t, seen in enumerate(visible[0].tolist()):
        alone = model(input_ids=source[:, :seen], labels=labels[:, t]).logits
        assert torch.allclose(packed[:, t], alone, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_search_scores_are_the_models_own(tokenizer, causal):
    model = model_of(tokenizer, causal_encoder=causal)
    model.config.prompt_ids = prompt(tokenizer, ("template", "next item after: "))[0].tolist()
    batch = tokenizer.encode_histories([["i0", "i3", "i5"], ["i7"]], return_tensors="pt")
    scores = model.score_all(**batch, trie=ItemTrie.from_tokenizer(tokenizer))
    ids, mask = model.prompted(batch["input_ids"], batch["attention_mask"])
    for item in range(N):
        name = torch.tensor(tokenizer.item_token_ids(IDS[item])).expand(2, -1)
        logits = model(input_ids=ids, attention_mask=mask, labels=name).logits.log_softmax(-1)
        exact = logits.gather(-1, name.unsqueeze(-1)).squeeze(-1).sum(-1)
        assert torch.allclose(scores[:, item], exact, atol=1e-4)
    found = model.recommend([["i0", "i3", "i5"]], tokenizer=tokenizer, k=5, num_beams=N, exclude_seen=False)[0]
    order = scores[0].argsort(descending=True)[:5].tolist()
    assert [entry.item_id for entry in found] == [IDS[item] for item in order]


def test_generate_reads_whole_words_too():
    tokenizer = tokenizer_of("numbers")
    model = model_of(tokenizer, seed=4)
    ids = prompt(tokenizer, ("items", ["i0", "i1"]))
    out = model.generate(
        ids, max_new_tokens=4, num_beams=1, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    first = model(input_ids=ids, decoder_input_ids=torch.tensor([[model.config.decoder_start_token_id]])).logits[:, -1]
    assert torch.allclose(out.logits[0], first, atol=1e-5)
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id, tokenizer.item_end_token_id]


def test_saving_and_loading(tmp_path, tokenizer):
    model = model_of(tokenizer, causal_encoder=True)
    model.config.prompt_ids = [7, 8]
    model.save_pretrained(tmp_path)
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    assert type(again) is P5ForConditionalGeneration and again.config.prompt_ids == [7, 8]
    assert type(AutoConfig.from_pretrained(tmp_path)) is P5Config
    ids, labels = prompt(tokenizer, ("items", ["i0", "i1"])), torch.tensor([tokenizer.item_token_ids("i2")])
    assert torch.equal(model(input_ids=ids, labels=labels).logits, again(input_ids=ids, labels=labels).logits)
    assert torch.equal(model.encoder.item_tokens, again.encoder.item_tokens)


def test_word_starts_of_other_tokenizers(data_dir):
    from transformers import AutoTokenizer

    real = AutoTokenizer.from_pretrained(data_dir / "t5_tokenizer")
    flags = word_start_flags(real)
    pieces = real.convert_ids_to_tokens(real("the next item_7391 please", add_special_tokens=False)["input_ids"])
    starts = [piece for piece in pieces if flags[real.convert_tokens_to_ids(piece)]]
    assert [piece.strip("▁") for piece in starts] == ["the", "next", "item", "please"]


def test_errors():
    with pytest.raises(IncompatibleComponentsError, match="by words"):
        P5Config.from_tokenizer(ItemTokenizer.from_codes(["a", "b"], np.array([[0], [1]])))
    with pytest.raises(IncompatibleComponentsError, match="vocabulary of 32"):
        P5Config(vocab_size=32, codebook_sizes=[40], level_offsets=[0])
    model = model_of(tokenizer_of("numbers"))
    with pytest.raises(IncompatibleComponentsError, match="set_catalogue"):
        model.set_catalogue(np.zeros((3, 2)))
