"""The house rules that a machine can check: import arrows between rooms, file length, no code execution from data."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "hf_genrec"
ROOT = PACKAGE.parent
# A room may import the rooms behind it in this list (and artifacts, errors), never one in front of it.
ROOMS = ["cli", "recipes", "hub", "alignment", "evaluation", "models", "generation", "identifiers", "data"]
FREE = {"errors", "artifacts"}  # everybody may import these; testing may import everything
SIBLING_STAGES = {  # components of a stage never import a sibling component
    "models": {path.name for path in (PACKAGE / "models").iterdir() if (path / "__init__.py").is_file()},
}
MODULES = sorted(PACKAGE.rglob("*.py"))


def _imports(path: Path) -> list[tuple[int, str]]:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                base = path.relative_to(ROOT).with_suffix("").parts[: -node.level]
                module = ".".join([*base, *([node.module] if node.module else [])])
            else:
                module = node.module or ""
            found += [(node.lineno, module)] + [(node.lineno, f"{module}.{alias.name}") for alias in node.names]
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downwards(path: Path) -> None:
    parts = path.relative_to(PACKAGE).parts
    room = parts[0] if len(parts) > 1 else path.stem
    if room in {"testing", "__init__", "conftest"}:
        return
    for line, name in _imports(path):
        target = name.split(".")
        if target[0] != "hf_genrec" or len(target) < 2 or target[1] in FREE | {"__version__"}:
            continue
        assert target[1] in ROOMS, f"{path}:{line} imports {name}: not a room"
        assert room in ROOMS, f"{path}:{line}: {room} stands below every room and imports {name}"
        assert ROOMS.index(target[1]) >= ROOMS.index(room), f"{path}:{line}: {room} must not import {target[1]}"


@pytest.mark.parametrize("stage", SIBLING_STAGES)
def test_components_do_not_import_siblings(stage: str) -> None:
    for component in SIBLING_STAGES[stage]:
        for path in (PACKAGE / stage / component).rglob("*.py"):
            for line, name in _imports(path):
                others = SIBLING_STAGES[stage] - {component}
                for other in others:
                    sibling = f"hf_genrec.{stage}.{other}"
                    assert not f"{name}.".startswith(f"{sibling}."), f"{path}:{line} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_stay_short(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= 600, f"{path} has {lines} lines: split it by idea"
    assert path.stem != "utils", f"{path}: name the idea, there is no utils.py"


@pytest.mark.parametrize(
    "path",
    sorted([*MODULES, *(ROOT / "scripts").glob("*.py"), *(ROOT / "examples").glob("*.py")]),
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_no_code_execution_from_data(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for line, name in _imports(path):
        assert name.split(".")[0] not in {"pickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"}, (
            f"{path}:{line}"
        )
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        assert called not in {"eval", "exec", "torch.load", "yaml.load", "yaml.unsafe_load"}, (
            f"{path}:{node.lineno} {called}"
        )
        if called.endswith(("np.load", "numpy.load")):
            allowed = [ast.unparse(k.value) for k in node.keywords if k.arg == "allow_pickle"]
            assert allowed in ([], ["False"]), f"{path}:{node.lineno}: np.load must not allow pickle"
        for keyword in node.keywords:
            if keyword.arg == "trust_remote_code":
                assert ast.unparse(keyword.value) == "False", f"{path}:{node.lineno}: trust_remote_code"


def test_every_module_says_what_it_is() -> None:
    for path in MODULES:
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), f"{path} has no docstring"
