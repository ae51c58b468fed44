"""extend_tokenizer: text as before, items behind it, everything back from disk."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from text_tokenizers import FAMILIES, byte_level_bpe, family, llama2_bpe
from transformers import AutoTokenizer, ByT5Tokenizer, LlamaConfig, LlamaForCausalLM, TokenizersBackend

from hf_genrec.errors import ArtifactError, IncompatibleComponentsError, UnknownItemError
from hf_genrec.identifiers.catalogue_file import FILE_NAME
from hf_genrec.identifiers.extend import encode_segments, extend_tokenizer
from hf_genrec.identifiers.tokenization_item import ItemTokenizer, register
from hf_genrec.identifiers.tokenization_item_text import ItemTextTokenizer

register()

IDS = ["shoe", "sock", "hat", "coat"]
CODES = [[0, 1], [0, 2], [3, 1], [0, 2]]
TEXTS = [
    "Because you watched The Matrix (1999)",
    "  two  spaces\tand\na newline ",
    "Amélie 七人の侍 🙂 <b>bold</b>",
    "",
    "ALL CAPS and ﬁne ligatures Ⅷ",
]
BASES = [*FAMILIES, "t5", "minilm"]


def items(**kwargs) -> ItemTokenizer:
    return ItemTokenizer.from_codes(IDS, CODES, **kwargs)


@pytest.fixture(scope="module")
def bases():
    made = {}

    def get(name, request):
        if name in FAMILIES:
            return family(name)
        if name not in made:
            fixture = "data_dir" if name == "t5" else "minilm_dir"
            folder = request.getfixturevalue(fixture)
            made[name] = AutoTokenizer.from_pretrained(folder / "t5_tokenizer" if name == "t5" else folder)
        return made[name]

    return get


@pytest.fixture(params=BASES)
def base(request, bases):
    return bases(request.param, request)


def files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "config.json"}


def test_text_stays_the_same(base):
    base(TEXTS)  # any call resets the padding that a tokenizer.json may hold
    before = base.backend_tokenizer.to_str()
    tokenizer = extend_tokenizer(base, items())
    assert dict(tokenizer(TEXTS)) == dict(base(TEXTS))
    pairs = list(zip(TEXTS, TEXTS[::-1]))
    assert dict(tokenizer(pairs)) == dict(base(pairs))
    for text in TEXTS:
        ids = base(text)["input_ids"]
        for skip in (False, True):
            assert tokenizer.decode(ids, skip_special_tokens=skip) == base.decode(ids, skip_special_tokens=skip)
    for name in ("padding_side", "truncation_side", "model_max_length", "model_input_names", "chat_template"):
        assert getattr(tokenizer, name) == getattr(base, name)
    had = base.special_tokens_map
    assert {name: tokenizer.special_tokens_map[name] for name in had} == had
    assert tokenizer.extra_special_tokens == base.extra_special_tokens
    assert base.backend_tokenizer.to_str() == before  # the base is not touched


def test_item_tokens_follow_the_vocabulary(base):
    tokenizer = extend_tokenizer(base, items(num_user_tokens=2))
    grown = len(base) + (base.pad_token is None)
    assert len(tokenizer) == grown + 2 + 4 + 3
    assert tokenizer.level_offsets.tolist() == [grown + 2, grown + 6]
    assert tokenizer.convert_tokens_to_ids(["<user_0>", "<a_0>", "<b_2>"]) == [grown, grown + 2, len(tokenizer) - 1]
    added = tokenizer.added_tokens_decoder
    for index in range(grown, len(tokenizer)):
        assert added[index].special and not added[index].normalized
    ids = tokenizer("next <a_3><b_1>", add_special_tokens=False)["input_ids"]
    assert ids[-2:] == tokenizer.item_token_ids("hat")
    assert "<a_3>" in tokenizer.decode(ids) and "<a_3>" not in tokenizer.decode(ids, skip_special_tokens=True)


def test_same_item_methods_as_the_item_tokenizer(base):
    plain = items(num_user_tokens=5, max_history=2, unknown_items="skip")
    tokenizer = extend_tokenizer(base, plain)
    shift = tokenizer.level_offsets[0] - plain.level_offsets[0]
    assert tokenizer.item_ids == plain.item_ids and tokenizer.codebook_sizes == plain.codebook_sizes
    assert tokenizer.catalogue_fingerprint == plain.catalogue_fingerprint
    assert (tokenizer.codes == plain.codes).all()
    assert (tokenizer.item_token_table == plain.item_token_table + shift).all()
    assert tokenizer.codes_to_items(CODES) == plain.codes_to_items(CODES)
    assert tokenizer.item_to_codes("hat").tolist() == [3, 1]
    assert tokenizer.token_ids_to_items([1, *tokenizer.item_token_ids("coat"), 1]) == [["sock", "coat"]]
    histories = [["shoe", "hat", "sock"], [], ["nope", "coat"]]
    tokenizer.padding_side = "left"
    ours = tokenizer.encode_histories(histories, list("xyz"), return_tensors="pt")
    theirs = plain.encode_histories(histories, list("xyz"), return_tensors="pt")
    assert torch.equal(ours["attention_mask"], theirs["attention_mask"])
    real = theirs["attention_mask"] == 1
    assert torch.equal(ours["input_ids"][real], theirs["input_ids"][real] + shift)
    assert (ours["input_ids"][~real] == tokenizer.pad_token_id).all()
    assert ours.skipped_items == 1
    assert tokenizer.decode_histories(ours["input_ids"]) == plain.decode_histories(theirs["input_ids"])


def test_round_trip(base, tmp_path):
    tokenizer = extend_tokenizer(base, items(num_user_tokens=2, max_history=3, unknown_items="skip"))
    first, second = tmp_path / "first", tmp_path / "second"
    tokenizer.save_pretrained(first)
    assert {"tokenizer.json", "tokenizer_config.json", FILE_NAME} <= set(files(first))
    for load in (AutoTokenizer.from_pretrained, ItemTextTokenizer.from_pretrained):
        loaded = load(first)
        assert type(loaded) is ItemTextTokenizer
        loaded.save_pretrained(second)
        assert files(first) == files(second)
        assert loaded.catalogue_fingerprint == tokenizer.catalogue_fingerprint
        assert loaded.level_offsets.tolist() == tokenizer.level_offsets.tolist()
        assert (loaded.num_user_tokens, loaded.max_history, loaded.unknown_items) == (2, 3, "skip")
        assert loaded.get_vocab() == tokenizer.get_vocab()
        assert dict(loaded(TEXTS)) == dict(base(TEXTS))
        segments = [("template", "you like <a_0>"), ("text", "</s><a_0>"), ("items", ["hat"])]
        assert encode_segments(loaded, segments) == encode_segments(tokenizer, segments)
        for name in ("add_bos_token", "add_eos_token", "padding_side", "model_max_length", "chat_template"):
            assert getattr(loaded, name) == getattr(tokenizer, name)


MODEL_TYPES = ["t5", "llama", "gpt2", "qwen3", "gemma2", "bert", "smollm3"]
# transformers 5.23 ignores the class that a folder names beside these (see identifiers/auto_tokenizer.py)
DECIDED_BY_MODEL_TYPE = ["qwen2", "qwen3_5", "mistral", "phi3", "modernbert"]


@pytest.mark.parametrize("model_type", MODEL_TYPES + DECIDED_BY_MODEL_TYPE)
def test_auto_tokenizer_beside_a_model(tmp_path, model_type):
    for tokenizer in (items(), extend_tokenizer(family("byte_level_bpe"), items())):
        folder = tmp_path / type(tokenizer).__name__
        tokenizer.save_pretrained(folder)
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
        for options in ({}, {"trust_remote_code": True}, {"use_fast": True}, {"padding_side": "left"}):
            loaded = AutoTokenizer.from_pretrained(folder, **options)
            assert type(loaded) is type(tokenizer) and loaded.item_ids == IDS


@pytest.mark.parametrize("model_type", DECIDED_BY_MODEL_TYPE)
def test_why_auto_tokenizer_is_wrapped(tmp_path, model_type):
    # fails when a later transformers honours the class name: then the wrapper can go
    extend_tokenizer(family("byte_level_bpe"), items()).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    usual = AutoTokenizer.from_pretrained.__func__.__wrapped__
    assert not hasattr(usual(AutoTokenizer, tmp_path), "item_ids")


def test_auto_tokenizer_is_unchanged_for_others(tmp_path):
    register()
    register()
    assert not hasattr(AutoTokenizer.from_pretrained.__func__.__wrapped__, "__wrapped__")  # wrapped once
    family("byte_level_bpe").save_pretrained(tmp_path)
    assert type(AutoTokenizer.from_pretrained(tmp_path)) is TokenizersBackend
    with pytest.raises(OSError):
        AutoTokenizer.from_pretrained(tmp_path / "nothing")
    (tmp_path / "tokenizer_config.json").write_text("{ broken")
    with pytest.raises(ValueError):
        AutoTokenizer.from_pretrained(tmp_path)


def test_pickle_and_deepcopy(base):
    tokenizer = extend_tokenizer(base, items())
    tokenizer.encode_histories([["shoe"]])
    for other in (pickle.loads(pickle.dumps(tokenizer)), copy.deepcopy(tokenizer)):  # noqa: S301 (our own bytes)
        assert other.encode_histories([["hat"]]) == tokenizer.encode_histories([["hat"]])
        assert dict(other(TEXTS)) == dict(tokenizer(TEXTS))


def test_base_without_padding_token(tmp_path):
    base = llama2_bpe()
    assert base.pad_token is None
    tokenizer = extend_tokenizer(base, items())
    assert tokenizer.pad_token == "<pad>" and tokenizer.pad_token_id == len(base)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    batch = tokenizer(["a", "a longer text"], padding=True)
    assert tokenizer.pad_token_id in batch["input_ids"][0]
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).pad_token_id == len(base)
    chosen = extend_tokenizer(base, items(), pad_token="</s>")  # an existing token may be named
    assert chosen.pad_token_id == base.eos_token_id and len(chosen) == len(base) + 7
    assert base.pad_token is None


def test_settings_made_after_loading_are_kept(tmp_path):
    base = byte_level_bpe(pad="<|endoftext|>")
    base.padding_side, base.model_max_length, base.chat_template = "left", 77, "{{ messages }}"
    extend_tokenizer(base, items()).save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert (loaded.padding_side, loaded.model_max_length, loaded.chat_template) == ("left", 77, "{{ messages }}")


def test_automatic_tokens_are_reported(base):
    tokenizer = extend_tokenizer(base, items())
    ids = base("the")["input_ids"]
    assert tokenizer.add_bos_token == (base.bos_token_id is not None and ids[0] == base.bos_token_id)
    assert tokenizer.add_eos_token == (base.eos_token_id is not None and ids[-1] == base.eos_token_id)


def test_history_end(base):
    if base.eos_token is None:
        with pytest.raises(IncompatibleComponentsError, match="history_eos"):
            extend_tokenizer(base, items(history_eos=True))
        return
    tokenizer = extend_tokenizer(base, items(history_eos=True))
    ids = tokenizer.encode_histories([["hat"]])["input_ids"][0]
    assert ids == [*tokenizer.item_token_ids("hat"), base.eos_token_id]


def test_model_grows_with_the_tokenizer():
    base = family("byte_level_bpe")
    config = LlamaConfig(
        vocab_size=len(base), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    tokenizer = extend_tokenizer(base, items())
    model.resize_token_embeddings(len(tokenizer))
    ids = encode_segments(tokenizer, [("template", "<|im_start|>"), ("text", "Amélie"), ("items", IDS)])
    assert model(torch.tensor([ids])).logits.shape == (1, len(ids), len(tokenizer))


def test_refused_bases():
    base = family("byte_level_bpe")
    extended = extend_tokenizer(base, items())
    with pytest.raises(IncompatibleComponentsError, match="already carries a catalogue of 4 items"):
        extend_tokenizer(extended, items())
    with pytest.raises(IncompatibleComponentsError, match="no Rust backend"):
        extend_tokenizer(ByT5Tokenizer(), items())
    with pytest.raises(IncompatibleComponentsError, match="no Rust backend"):
        extend_tokenizer(items(), items())
    with pytest.raises(IncompatibleComponentsError, match="carries no catalogue"):
        extend_tokenizer(base, base)
    taken = byte_level_bpe()
    taken.add_tokens(["<b_2>"])
    with pytest.raises(IncompatibleComponentsError, match="'<b_2>' is already in the base tokenizer"):
        extend_tokenizer(taken, items())

    class Shouting(TokenizersBackend):
        def __call__(self, text, **kwargs):
            return super().__call__(text.upper(), **kwargs)

    with pytest.raises(IncompatibleComponentsError, match="Python code of its own"):
        extend_tokenizer(Shouting(tokenizer_object=base.backend_tokenizer), items())


def test_foreign_files_are_refused(tmp_path):
    extend_tokenizer(family("byte_level_bpe"), items()).save_pretrained(tmp_path)
    ItemTokenizer.from_codes(IDS, CODES, [9, 9]).save_pretrained(tmp_path / "other")
    (tmp_path / FILE_NAME).write_bytes((tmp_path / "other" / FILE_NAME).read_bytes())
    with pytest.raises(ArtifactError, match="does not belong to this catalogue"):
        AutoTokenizer.from_pretrained(tmp_path)
    ItemTokenizer.from_codes(IDS, CODES, [2**30, 3]).save_pretrained(tmp_path / "huge")
    (tmp_path / FILE_NAME).write_bytes((tmp_path / "huge" / FILE_NAME).read_bytes())
    with pytest.raises(ArtifactError, match="does not belong to this catalogue"):
        AutoTokenizer.from_pretrained(tmp_path)
    (tmp_path / FILE_NAME).unlink()
    with pytest.raises(ArtifactError, match=FILE_NAME):
        AutoTokenizer.from_pretrained(tmp_path)


def test_unknown_items_in_segments():
    tokenizer = extend_tokenizer(family("byte_level_bpe"), items())
    with pytest.raises(UnknownItemError):
        encode_segments(tokenizer, [("items", ["nope"])])
    tokenizer.unknown_items = "skip"
    assert encode_segments(tokenizer, [("items", ["nope", "hat"])]) == tokenizer.item_token_ids("hat")
