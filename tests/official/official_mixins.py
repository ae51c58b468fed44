"""Loads transformers' own test mixins, which are fetched by `scripts/fetch_transformers_tests.py` and never committed.

The source distribution holds the common test files but not all that they import; the missing modules are replaced here
by small ones of our own, under a private package name so that no other `tests` package is shadowed.
"""

from __future__ import annotations

import fnmatch
import importlib
import importlib.util
import os
import sys
import types
import unittest
from pathlib import Path

import pytest
import torch

PACKAGE = "_transformers_tests"


class ExportTesterMixin:
    """Stands in for the export tests, which are not part of the source distribution."""


class GenerationTesterMixin:
    """Stands in for the generation tests, which are not part of the source distribution: a few of our own."""

    def _models_and_inputs(self):
        for model_class in self.all_generative_model_classes:
            config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
            torch.manual_seed(0)
            model = model_class(config).eval()
            model.generation_config.eos_token_id = None  # full length, so that outputs can be compared
            kept = ("input_ids", "attention_mask")
            yield model, {name: value for name, value in inputs.items() if name in kept}

    def test_generate_is_the_same_with_and_without_a_cache(self):
        for model, inputs in self._models_and_inputs():
            outputs = [
                model.generate(**inputs, max_new_tokens=self.generated_tokens, do_sample=False, use_cache=use_cache)
                for use_cache in (True, False)
            ]
            assert torch.equal(*outputs)

    def test_beam_search_is_sorted_and_starts_with_at_least_the_greedy_score(self):
        for model, inputs in self._models_and_inputs():
            options = {"max_new_tokens": self.generated_tokens, "do_sample": False, "length_penalty": 0.0}
            options.update(return_dict_in_generate=True, output_scores=True)
            beams = model.generate(**inputs, num_beams=4, num_return_sequences=4, **options)
            scores = beams.sequences_scores.view(-1, 4)
            assert bool((scores[:, :-1] >= scores[:, 1:]).all())
            greedy = model.generate(**inputs, num_beams=1, **options)
            steps = model.compute_transition_scores(greedy.sequences, greedy.scores, normalize_logits=True)
            if self.generated_tokens == 1:
                assert torch.allclose(scores[:, 0], steps.sum(1), atol=1e-4)

    def test_sampling_follows_the_seed(self):
        for model, inputs in self._models_and_inputs():
            outputs = []
            for _ in range(2):
                torch.manual_seed(0)
                outputs.append(model.generate(**inputs, max_new_tokens=self.generated_tokens, do_sample=True))
            assert torch.equal(*outputs)


# module of the source repository -> what the common tests take from it
_STUBS = {
    "exporters": {},
    "exporters.test_export": {"ExportTesterMixin": ExportTesterMixin},
    "generation": {},
    "generation.test_utils": {"GenerationTesterMixin": GenerationTesterMixin},
    "utils": {},
    "utils.test_configuration_utils": {
        "config_common_kwargs": {
            "return_dict": False,
            "output_hidden_states": True,
            "chunk_size_feed_forward": 5,
            "architectures": ["BertModel"],
            "id2label": {0: "label"},
            "label2id": {"label": "0"},
            "problem_type": "regression",
        }
    },
}


def tests_folder() -> Path:
    given = os.environ.get("HF_GENREC_TRANSFORMERS_TESTS")
    return Path(given) if given else Path(sys.prefix) / "share" / "transformers-tests"


def load(name: str) -> types.ModuleType:
    """The official test module `tests/<name>.py`; skips the calling test module when it is not there."""
    folder = tests_folder()
    if not (folder / "tests" / f"{name}.py").is_file():
        pytest.skip(
            f"no transformers tests in {folder}: run scripts/fetch_transformers_tests.py", allow_module_level=True
        )
    if importlib.util.find_spec("parameterized") is None:
        pytest.skip("parameterized is not installed", allow_module_level=True)
    if PACKAGE not in sys.modules:
        package = types.ModuleType(PACKAGE)
        package.__path__ = [str(folder / "tests")]
        sys.modules[PACKAGE] = package
    for stub, attributes in _STUBS.items():
        full_name = f"{PACKAGE}.{stub}"
        if full_name not in sys.modules:
            module = types.ModuleType(full_name)
            module.__path__ = []
            module.__dict__.update(attributes)
            sys.modules[full_name] = module
    return importlib.import_module(f"{PACKAGE}.{name}")


def excluded(reasons: dict[str, str]):
    """Class decorator: skip the tests that a name or a `*` pattern matches, each with its reason.

    A name that matches no test is an error, so that the lists stay true.
    """

    def decorate(test_class):
        tests = [name for name in dir(test_class) if name.startswith("test_") and callable(getattr(test_class, name))]
        for pattern, reason in reasons.items():
            names = fnmatch.filter(tests, pattern)
            assert names, f"{test_class.__name__} has no test {pattern}"
            for name in names:
                setattr(test_class, name, unittest.skip(reason)(_never_runs))
        return test_class

    return decorate


def _never_runs(self):
    raise AssertionError("an excluded test was run")
