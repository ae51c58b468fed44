"""Registers the markers that transformers' own tests carry (unknown markers are errors here)."""

from __future__ import annotations

_MARKERS = (
    "accelerate_tests",
    "flash_attn_test",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "all_flash_attn_test",
    "generate",
    "torch_compile_test",
    "torch_export_test",
    "skip_ci",
)


def pytest_configure(config):
    for marker in _MARKERS:
        config.addinivalue_line("markers", f"{marker}: set by transformers' own tests")
