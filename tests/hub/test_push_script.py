"""scripts/push.py without a network: what it would upload, and what it refuses."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from hf_genrec.errors import ArtifactError
from hf_genrec.hub import save_artifact


@pytest.fixture
def script(monkeypatch):
    path = Path(__file__).resolve().parents[2] / "scripts" / "push.py"
    spec = importlib.util.spec_from_file_location("push_script", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "push_script", module)
    spec.loader.exec_module(module)
    return module


def test_dry_run_lists_files_and_writes_the_card(script, tmp_path, tokenizer, model, capsys):
    folder = save_artifact(tmp_path / "a", model=model, tokenizer=tokenizer)
    (folder / ".env").write_text("SECRET=1")
    script.main(script.PushArguments(folder=str(folder), repo_id="me/x", license="mit", dry_run=True))
    listed = {line.split()[-1] for line in capsys.readouterr().out.splitlines()}
    assert {"config.json", "manifest.json", "README.md", "item_codes.safetensors"} <= listed
    assert ".env" not in listed
    assert "license: mit" in (folder / "README.md").read_text()


def test_refusals(script, tmp_path):
    with pytest.raises(ArtifactError, match="exclude"):
        script.main(script.PushArguments(folder=str(tmp_path), repo_id="me/x", private=True, public=True))
    with pytest.raises(ArtifactError, match="manifest"):
        script.main(script.PushArguments(folder=str(tmp_path), repo_id="me/x", dry_run=True))
