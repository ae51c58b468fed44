"""transformers' own tokenizer tests, run on `ItemTokenizer` and `ItemTextTokenizer`.

The tests come from the source distribution of the installed transformers version (`tests/test_tokenization_common.py`);
they are never part of this repository. Looked for in `$HF_GENREC_TRANSFORMERS_TESTS`, then in
`<environment>/share/transformers-tests`; skipped when absent.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import sys
import tempfile
import types
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, TokenizersBackend

from hf_genrec.identifiers.extend import extend_tokenizer
from hf_genrec.identifiers.tokenization_item import ItemTokenizer, register
from hf_genrec.identifiers.tokenization_item_text import ItemTextTokenizer

pytestmark = pytest.mark.official


def _official_module():
    """`tests/test_tokenization_common.py` as a module of a private package, so that no `tests` package is shadowed."""
    given = os.environ.get("HF_GENREC_TRANSFORMERS_TESTS")
    folder = Path(given) if given else Path(sys.prefix) / "share" / "transformers-tests"
    if not (folder / "tests" / "test_tokenization_common.py").is_file():
        pytest.skip(f"no transformers tests in {folder}: unpack the source distribution there", allow_module_level=True)
    if importlib.util.find_spec("parameterized") is None:
        pytest.skip("parameterized is not installed", allow_module_level=True)
    package = types.ModuleType("_transformers_tests")
    package.__path__ = [str(folder / "tests")]
    sys.modules.setdefault("_transformers_tests", package)
    return importlib.import_module("_transformers_tests.test_tokenization_common")


official = _official_module()
official_rust = importlib.import_module("_transformers_tests.test_tokenizers_backend_mixin")


def _item_tokenizer() -> ItemTokenizer:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (40, 3))
    return ItemTokenizer.from_codes([f"item {i}" for i in range(40)], codes, [16, 16, 16])


def _text_tokenizer() -> ItemTextTokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    corpus = ["he is very happy and the quick brown fox jumps over the lazy dog", "this is the first sentence"] * 20
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<s>", "</s>"]
    )
    backend.train_from_iterator(corpus, trainer)
    base = TokenizersBackend(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    return extend_tokenizer(base, _item_tokenizer())


# test name -> why it is not run
EXCLUDED: dict[str, str] = {
    "test_rust_tokenizer_add_prefix_space_0": "a load option of model classes that rebuild their backend; ours reads "
    "tokenizer.json whole, as transformers' plain TokenizersBackend does (which does not pass this test either)",
}

# test name -> options its tokenizer is loaded with, and why
LOADED_WITH: dict[str, dict] = {
    # written for right truncation; ours cuts the oldest items
    "test_maximum_encoding_length_single_input": {"truncation_side": "right"},
    "test_maximum_encoding_length_pair_input": {"truncation_side": "right"},
}


class _OwnFolder:
    """Gives the official mixin a tokenizer folder of ours."""

    test_tokenizer_from_extractor = False  # rebuilds a tokenizer from vocabulary and merges, without its class

    @classmethod
    def setUpClass(cls):
        register()
        cls.tmpdirname = tempfile.mkdtemp()
        cls.make().save_pretrained(cls.tmpdirname)
        assert type(AutoTokenizer.from_pretrained(cls.tmpdirname)) is cls.tokenizer_class
        cls.from_pretrained_id = [cls.tmpdirname]
        cls.tokenizers_list = [(cls.tokenizer_class, cls.tmpdirname, {})]

    @classmethod
    def tearDownClass(cls):
        shutil.rmtree(cls.tmpdirname, ignore_errors=True)

    def setUp(self):
        super().setUp()
        if self._testMethodName in EXCLUDED:
            self.skipTest(EXCLUDED[self._testMethodName])

    def get_tokenizer(self, pretrained_name=None, **kwargs):
        options = {**LOADED_WITH.get(self._testMethodName, {}), **kwargs}
        return self.tokenizer_class.from_pretrained(pretrained_name or self.tmpdirname, **options)


class TestItemTokenizer(_OwnFolder, official.TokenizerTesterMixin, official.unittest.TestCase):
    tokenizer_class = ItemTokenizer
    make = staticmethod(_item_tokenizer)

    def get_clean_sequence(self, tokenizer, with_prefix_space=False, max_length=20, min_length=5):
        text = "".join(f"<{name}_{code}>" for code in range(7) for name in "abc")  # the official one picks letters
        ids = tokenizer.encode(text, add_special_tokens=False)[:max_length]
        return tokenizer.decode(ids), ids


class TestItemTextTokenizer(_OwnFolder, official.TokenizerTesterMixin, official.unittest.TestCase):
    tokenizer_class = ItemTextTokenizer
    rust_tokenizer_class = ItemTextTokenizer
    make = staticmethod(_text_tokenizer)


class TestItemTextTokenizerBackend(_OwnFolder, official_rust.TokenizersBackendTesterMixin, official.unittest.TestCase):
    tokenizer_class = ItemTextTokenizer
    rust_tokenizer_class = ItemTextTokenizer
    make = staticmethod(_text_tokenizer)
