"""Fixtures of the artefact tests; what they are made of is in `hub_samples.py`."""

from __future__ import annotations

import pytest
from hub_samples import make_items, make_metrics, make_model, make_tokenizer

collect_ignore_glob = ["hub_*_driver.py"]  # programs of their own, started by the tests


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def model(tokenizer):
    return make_model(tokenizer)


@pytest.fixture
def items(tokenizer):
    return make_items(tokenizer)


@pytest.fixture
def metrics():
    return make_metrics()
