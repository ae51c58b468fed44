"""save_artifact and load_artifact: everything comes back, damage is named, nothing of the user is lost."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_samples import NUM_ITEMS, make_items, make_metrics, make_model, make_tokenizer
from safetensors import safe_open
from transformers import AutoModel, AutoModelForSeq2SeqLM, AutoTokenizer

from hf_genrec.artifacts import verify_manifest
from hf_genrec.errors import ArtifactError, IncompatibleComponentsError, UnsafeArtifactError
from hf_genrec.generation.configuration_recommendation import RecommendationConfig
from hf_genrec.generation.recommend import recommend
from hf_genrec.hub import load_artifact, save_artifact
from hf_genrec.hub.artifact_files import part_of
from hf_genrec.models.rq_transformer.configuration_rq_transformer import RQTransformerConfig
from hf_genrec.models.rq_transformer.modeling_rq_transformer import RQTransformerForCausalLM
from hf_genrec.models.sasrec.configuration_sasrec import SASRecConfig
from hf_genrec.models.sasrec.modeling_sasrec import SASRecForCausalLM
from hf_genrec.models.tiger.configuration_tiger import TigerConfig
from hf_genrec.models.tiger.modeling_tiger import TigerForConditionalGeneration

FILES = {
    "config.json", "model.safetensors", "generation_config.json", "recommendation_config.json", "tokenizer_config.json",
    "item_codes.safetensors", "items.parquet", "recipe.yaml", "metrics.json", "manifest.json", "README.md",
}  # fmt: skip
RECIPE = {"name": "tiny", "paper": ["2305.05065"], "training": {"learning_rate": 1e-3}}
HISTORIES = [["B0001", "B0002"], ["B0020"]]
PNG = b"\x89PNG\r\n\x1a\n" + b"rest"


def atomic_tokenizer():
    from hf_genrec.identifiers.tokenization_item import ItemTokenizer

    return ItemTokenizer.from_codes([f"B{i:04d}" for i in range(NUM_ITEMS)], [[i] for i in range(NUM_ITEMS)])


def models():
    """One model of each kind with its tokenizer."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    yield "t5", make_model(tokenizer), tokenizer
    tiny = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_heads": 2, "num_layers": 1, "num_decoder_layers": 1}
    yield "tiger", TigerForConditionalGeneration(TigerConfig.from_tokenizer(tokenizer, **tiny)), tokenizer
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    flagship = RQTransformerForCausalLM(RQTransformerConfig.from_tokenizer(tokenizer, **small))
    flagship.set_catalogue(tokenizer.codes, None)
    yield "rq_transformer", flagship, tokenizer
    atomic = atomic_tokenizer()
    yield "sasrec", SASRecForCausalLM(SASRecConfig.from_tokenizer(atomic, **small)), atomic


KINDS = {name: (model.eval(), tokenizer) for name, model, tokenizer in models()}


def items_of(artifact, **options):
    return [[(r.item_id, round(r.score, 5)) for r in row] for row in artifact.recommend(HISTORIES, k=5, **options)]


def everything(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ---------------------------------------------------------------------------------------------------------- round trip


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(kind, tmp_path):
    model, tokenizer = KINDS[kind]
    items, metrics = make_items(tokenizer), make_metrics()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    config, generation = dict(vars(model.config)), copy.deepcopy(getattr(model, "generation_config", None))
    folder = save_artifact(
        tmp_path / "a", model=model, tokenizer=tokenizer, items=items, recipe=RECIPE, metrics=metrics,
        recommendation_config=RecommendationConfig(k=7, num_beams=20),
    )  # fmt: skip
    assert dict(vars(model.config)) == config, "saving changed the live configuration"
    assert getattr(model, "generation_config", None) == generation
    assert set(everything(folder)) == FILES
    assert not list(tmp_path.glob(".*")), "temporary folders are left"

    artifact = load_artifact(folder)
    assert type(artifact.model) is type(model)
    assert artifact.model.state_dict().keys() == state.keys()
    for name, value in artifact.model.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert artifact.tokenizer.catalogue_fingerprint == tokenizer.catalogue_fingerprint
    assert artifact.items.item_ids == list(tokenizer.item_ids)
    assert artifact.items.titles() == items.titles()
    assert artifact.recipe == RECIPE
    assert artifact.metrics == metrics
    assert artifact.title("B0003") == "Title 3"
    assert artifact.title("unknown") == ""
    assert len(artifact.recommend(HISTORIES)[0]) == 7

    expected = [
        [(r.item_id, round(r.score, 5)) for r in row]
        for row in recommend(model, HISTORIES, tokenizer=tokenizer, k=5, num_beams=20)
    ]
    assert items_of(artifact) == expected
    # the same folder with nothing but transformers' own doors
    plain = AutoTokenizer.from_pretrained(folder)
    assert plain.item_ids == tokenizer.item_ids
    assert AutoModel.from_pretrained(folder).config.model_type == model.config.model_type

    again = save_artifact(
        tmp_path / "b", model=artifact.model, tokenizer=artifact.tokenizer, items=artifact.items,
        recipe=artifact.recipe, metrics=artifact.metrics, recommendation_config=RecommendationConfig(k=7, num_beams=20),
    )  # fmt: skip
    first, second = everything(folder), everything(again)
    assert {name for name in first if first[name] != second[name]} <= {"manifest.json", "tokenizer_config.json"}
    for content in second.values():
        assert str(tmp_path).encode() not in content, "a path of this machine is in the artefact"


@pytest.mark.parametrize("kind", KINDS)
def test_the_snippets_of_the_card_run_from_the_folder(kind, tmp_path, monkeypatch):
    model, tokenizer = KINDS[kind]
    folder = save_artifact(tmp_path / "a", model=model, tokenizer=tokenizer, items=make_items(tokenizer))
    monkeypatch.chdir(folder)
    snippets = re.findall(r"^```python\n(.*?)\n```$", (folder / "README.md").read_text(), re.M | re.S)
    assert len(snippets) == 2
    for number, snippet in enumerate(snippets):
        assert len(snippet.splitlines()) <= 5
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile(snippet, "README.md", "exec"), {"__name__": "snippet"})
        if number == 0:
            lines = output.getvalue().splitlines()
            assert len(lines) == 10
            assert re.match(r"1 B\d{4} Title \d+ -?\d", lines[0]), lines[0]
        else:
            assert output.getvalue().count("Recommendation(item_id='B") == 10


def test_model_without_generate_gets_a_generation_config(tmp_path):
    model, tokenizer = KINDS["sasrec"]
    folder = save_artifact(tmp_path / "a", model=model, tokenizer=tokenizer)
    assert json.loads((folder / "generation_config.json").read_text())["pad_token_id"] == 0


def test_stock_model_remembers_its_catalogue(tmp_path, tokenizer, model):
    folder = save_artifact(tmp_path / "a", model=model, tokenizer=tokenizer)
    assert not hasattr(model.config, "catalogue_fingerprint")
    other = make_tokenizer(prefix="X")
    other.save_pretrained(folder)
    rewrite_manifest(folder)
    with pytest.raises(IncompatibleComponentsError, match="catalogue"):
        load_artifact(folder)


def test_items_are_brought_into_catalogue_order(tmp_path, tokenizer, model, items):
    shuffled = items.align(list(reversed(items.item_ids)))
    folder = save_artifact(tmp_path / "a", model=model, tokenizer=tokenizer, items=shuffled)
    assert load_artifact(folder).title("B0003") == "Title 3"


def test_plots_extra_files_and_eval_results(tmp_path, tokenizer, model, metrics):
    source = tmp_path / "picture.png"
    source.write_bytes(PNG)
    folder = save_artifact(
        tmp_path / "a", model=model, tokenizer=tokenizer, metrics=metrics,
        plots={"results.png": PNG, "Loss <b>": source}, card_data={"dataset_id": "me/data"},
        extra_files={"reports/notes.txt": b"hello", "log.json": source},
    )  # fmt: skip
    assert {
        "plots/results.png",
        "plots/loss-b.png",
        "reports/notes.txt",
        "log.json",
        ".eval_results/me-data.yaml",
    } <= set(everything(folder))
    assert "![results](plots/results.png)" in (folder / "README.md").read_text()
    load_artifact(folder)


@pytest.mark.parametrize(
    "name", ["../x", "/x", "a/../../x", "config.json", "model.safetensors", ".", "plots/x.png", "a//b"]
)
def test_extra_files_stay_inside_and_off_our_names(name, tmp_path, tokenizer):
    with pytest.raises(ArtifactError, match="extra_files"):
        save_artifact(tmp_path / "a", tokenizer=tokenizer, extra_files={name: b""})
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("name", ["run.py", "weights.bin", "state.pt", "data.pkl"])
def test_what_could_run_is_not_saved(name, tmp_path, tokenizer):
    with pytest.raises(UnsafeArtifactError, match=name):
        save_artifact(tmp_path / "a", tokenizer=tokenizer, extra_files={name: b"x"})
    assert not list(tmp_path.iterdir())


def test_bad_input_leaves_the_old_artefact(tmp_path, tokenizer, model, metrics):
    folder = save_artifact(tmp_path / "a", model=model, tokenizer=tokenizer, metrics=metrics)
    before = everything(folder)
    for bad, error in (
        ({"metrics": {"dataset": "x"}}, ArtifactError),
        ({"plots": {"x": b"not a picture"}}, ArtifactError),
        ({"plots": {"a b": PNG, "a-b": PNG}}, ArtifactError),
        ({"recipe": {"x": object()}}, ArtifactError),
        ({"card_data": {"nonsense": 1}}, ArtifactError),
        ({"tokenizer": make_tokenizer(prefix="X")}, IncompatibleComponentsError),
        ({"items": make_items(make_tokenizer(5))}, IncompatibleComponentsError),
        ({"model": KINDS["tiger"][0], "tokenizer": make_tokenizer(prefix="X")}, IncompatibleComponentsError),
    ):
        with pytest.raises(error):
            save_artifact(folder, **{"tokenizer": tokenizer, "model": None, **bad})
        assert everything(folder) == before
        assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_nothing_to_save(tmp_path):
    with pytest.raises(ArtifactError, match="model="):
        save_artifact(tmp_path / "a", metrics=make_metrics())
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArtifactError, match="is a file"):
        save_artifact(tmp_path / "file", tokenizer=make_tokenizer())


# ---------------------------------------------------------------------------------------------- over an existing folder


def test_new_numbers_keep_the_model(tmp_path, tokenizer, model, items, metrics):
    folder = save_artifact(
        tmp_path / "a", model=model, tokenizer=tokenizer, items=items, recipe=RECIPE, plots={"loss": PNG},
        card_data={"license": "apache-2.0"},
    )  # fmt: skip
    before = everything(folder)
    assert "metrics.json" not in before
    save_artifact(folder, metrics=metrics)
    after = everything(folder)
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {"metrics.json", "README.md", "manifest.json"}
    readme = after["README.md"].decode()
    assert "**0.2000**" in readme
    assert "license: apache-2.0" in readme
    assert "![loss](plots/loss.png)" in readme
    parameters = sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
    assert f"{parameters:,} parameters" in readme
    assert load_artifact(folder).metrics == metrics
    save_artifact(folder, card_data={"title": "Mine"})
    readme = (folder / "README.md").read_text()
    assert "# Mine" in readme and "license: apache-2.0" in readme and "**0.2000**" in readme


def test_a_new_model_drops_numbers_of_the_old_one(tmp_path, tokenizer, model, items, metrics):
    folder = save_artifact(
        tmp_path / "a", model=model, tokenizer=tokenizer, items=items, recipe=RECIPE, metrics=metrics,
        plots={"loss": PNG}, max_shard_size="8KB",
    )  # fmt: skip
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 1
    assert load_artifact(folder).model is not None
    save_artifact(folder, model=make_model(tokenizer, seed=1))
    names = set(everything(folder))
    assert names == FILES - {"recipe.yaml", "metrics.json"}
    artifact = load_artifact(folder)
    assert torch.equal(artifact.model.shared.weight, make_model(tokenizer, seed=1).shared.weight)
    assert artifact.items.titles()[3] == "Title 3"

    other = make_tokenizer(12, prefix="X")  # another catalogue: the old item table does not belong to it
    save_artifact(folder, model=make_model(other), tokenizer=other)
    assert load_artifact(folder).items is None


def test_files_of_the_user_are_carried_over_and_stay_editable(tmp_path, tokenizer, model, metrics):
    folder = save_artifact(
        tmp_path / "a", model=model, tokenizer=tokenizer, metrics=metrics, extra_files={"log.json": b"{}"}
    )
    (folder / "notes.txt").write_text("mine")
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("ref: refs/heads/main")
    save_artifact(folder, model=make_model(tokenizer, seed=1), tokenizer=tokenizer)
    assert (folder / "notes.txt").read_text() == "mine"
    assert (folder / ".git" / "HEAD").read_text() == "ref: refs/heads/main"
    assert (folder / "log.json").read_bytes() == b"{}"
    listed = set(verify_manifest(folder, deep=True)["files"])
    assert "log.json" in listed
    assert not {"notes.txt", ".git/HEAD"} & listed
    (folder / "notes.txt").write_text("mine, edited")
    load_artifact(folder)
    save_artifact(folder, metrics=metrics)
    assert (folder / "notes.txt").read_text() == "mine, edited"


def test_nothing_of_the_user_is_lost_anywhere(tmp_path, tokenizer, model):
    """Whatever cannot live in an artefact (code, checkpoints) is still on disk after a save."""
    folder = save_artifact(tmp_path / "a", model=model, tokenizer=tokenizer)
    mine = {
        "train.py": b"print()",
        "checkpoint-5/optimizer.pt": b"\x80",
        "figures/curve.pdf": b"%PDF",
        "todo.md": b"- x",
    }
    for name, content in mine.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    save_artifact(folder, model=model, tokenizer=tokenizer)
    left = {p.name: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert {Path(name).name: content for name, content in mine.items()}.items() <= left.items()
    load_artifact(folder)


def test_an_edited_card_is_kept(tmp_path, tokenizer, model, metrics):
    folder = save_artifact(tmp_path / "a", model=model, tokenizer=tokenizer)
    (folder / "README.md").write_text("# my own words")
    load_artifact(folder)
    save_artifact(folder, metrics=metrics)
    assert (folder / "README.previous-1.md").read_text() == "# my own words"
    assert "## Results" in (folder / "README.md").read_text()
    save_artifact(folder, metrics=metrics, card="# chosen words")
    assert (folder / "README.md").read_text() == "# chosen words"
    assert (folder / "README.previous-1.md").exists()
    load_artifact(folder)


def test_a_damaged_artefact_is_replaced_but_not_built_upon(tmp_path, tokenizer, model, items, metrics):
    folder = save_artifact(tmp_path / "a", model=model, tokenizer=tokenizer, items=items)
    flip(folder / "model.safetensors")
    with pytest.raises(ArtifactError, match=r"model\.safetensors"):
        save_artifact(folder, metrics=metrics)  # would give the damaged weights a fresh hash
    save_artifact(folder, model=model, tokenizer=tokenizer, metrics=metrics)
    assert load_artifact(folder).metrics == metrics


def test_a_folder_of_something_else_is_not_replaced(tmp_path, tokenizer):
    (tmp_path / "thesis.docx").write_text("years of work")
    with pytest.raises(ArtifactError):
        save_artifact(tmp_path, tokenizer=tokenizer)
    assert (tmp_path / "thesis.docx").exists()


def test_part_of():
    assert part_of("model-00001-of-00002.safetensors") == "model"
    assert part_of("item_codes.safetensors") == "tokenizer"
    assert part_of("reports/config.json") is None
    assert part_of("my_config.json") is None


# -------------------------------------------------------------------------------------------------------------- damage


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def rewrite_manifest(folder: Path) -> None:
    """As an attacker would: a manifest that fits the files."""
    import hashlib

    names = [name for name in everything(folder) if name != "manifest.json"]
    table = {n: {"size": (folder / n).stat().st_size, "sha256": hashlib.sha256((folder / n).read_bytes()).hexdigest()}
             for n in names}  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps({"format": "hf_genrec", "version": 1, "files": table}))


@pytest.fixture
def saved(tmp_path, tokenizer, model, items, metrics):
    return save_artifact(tmp_path / "a", model=model, tokenizer=tokenizer, items=items, recipe=RECIPE, metrics=metrics)


@pytest.mark.parametrize("name", sorted(FILES - {"README.md", "manifest.json"}))
def test_missing_truncated_and_changed_files_are_named(saved, name):
    content = (saved / name).read_bytes()
    for damage in (None, content[:-1], content[:0], content + b" "):
        if damage is None:
            (saved / name).unlink()
        else:
            (saved / name).write_bytes(damage)
        with pytest.raises(ArtifactError, match=re.escape(name)):
            load_artifact(saved)
        (saved / name).write_bytes(content)
    flip(saved / name)
    with pytest.raises(ArtifactError, match=re.escape(name)):
        load_artifact(saved)


def test_a_folder_without_manifest_is_refused(saved, tmp_path):
    (saved / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match="manifest"):
        load_artifact(saved)
    for missing in (tmp_path / "nothing", "./nothing", "no/such/folder/here"):
        with pytest.raises(ArtifactError, match="not a folder"):
            load_artifact(missing)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "modeling.py", "sub/x.pkl", "optimizer.pt"])
def test_unsafe_files_are_refused(saved, name):
    (saved / name).parent.mkdir(exist_ok=True)
    (saved / name).write_bytes(b"x")
    rewrite_manifest(saved)
    with pytest.raises(UnsafeArtifactError, match=re.escape(name)):
        load_artifact(saved)


def test_links_out_of_the_folder_are_refused(saved, tmp_path):
    (tmp_path / "secret.json").write_text("{}")
    (saved / "recipe.yaml").unlink()
    (saved / "recipe.yaml").symlink_to(tmp_path / "secret.json")
    rewrite_manifest(saved)
    with pytest.raises(UnsafeArtifactError, match=r"recipe\.yaml"):
        load_artifact(saved)


def test_code_named_by_a_configuration_never_runs(saved, tmp_path, monkeypatch):
    """auto_map to a module beside the folder, and architectures that name something else: refused, never imported."""
    trap = tmp_path / "trap.py"
    trap.write_text("raise SystemExit('the trap ran')")
    monkeypatch.syspath_prepend(tmp_path)
    original = (saved / "config.json").read_text()
    for change in (
        {"architectures": ["trap"]},
        {"architectures": ["Trainer"]},
        {"architectures": ["os.system"]},
        {"auto_map": {"AutoModelForSeq2SeqLM": "trap.Trap", "AutoConfig": "trap.Config"}, "model_type": "trap"},
        {"model_type": "trap"},
    ):
        (saved / "config.json").write_text(json.dumps(json.loads(original) | change))
        rewrite_manifest(saved)
        with pytest.raises(ArtifactError, match="config"):
            load_artifact(saved)
    (saved / "config.json").write_text(json.dumps(json.loads(original) | {"auto_map": {"AutoModel": "trap.Trap"}}))
    rewrite_manifest(saved)
    assert type(load_artifact(saved).model).__name__ == "T5ForConditionalGeneration"
    (saved / "config.json").write_text(original)
    tokenizer_config = json.loads((saved / "tokenizer_config.json").read_text())
    tokenizer_config |= {"auto_map": {"AutoTokenizer": ["trap.Trap", None]}, "tokenizer_class": "Trap"}
    (saved / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    rewrite_manifest(saved)
    with pytest.raises(ArtifactError):
        load_artifact(saved)
    assert "trap" not in sys.modules
    with pytest.raises(ArtifactError, match="trust_remote_code"):
        load_artifact(saved, trust_remote_code=True)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("recipe.yaml", b"a: ["),
        ("recipe.yaml", b"- a"),
        ("recipe.yaml", b"!!python/object/apply:os.system ['true']"),
        ("metrics.json", b"[]"),
        ("metrics.json", b"\xff"),
        ("items.parquet", b"PAR1 nonsense"),
        ("config.json", b"[]"),
        ("config.json", b"{}"),
        ("model.safetensors", b"\x00" * 64),
        ("item_codes.safetensors", b"\x00" * 64),
        ("tokenizer_config.json", b"{"),
    ],
)
def test_nonsense_that_fits_the_manifest_is_still_a_typed_error(saved, name, content):
    (saved / name).write_bytes(content)
    rewrite_manifest(saved)
    with pytest.raises(ArtifactError):
        load_artifact(saved)


def test_weights_alone_are_read(saved):
    with safe_open(saved / "model.safetensors", framework="np") as file:
        assert "shared.weight" in file.keys()  # noqa: SIM118
    assert AutoModelForSeq2SeqLM.from_pretrained(saved).config.d_model == 16


def test_the_network_is_never_tried(tmp_path):
    """A process that is online as far as it knows, with a dead Hub: saving and loading open no connection."""
    env = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")}
    env |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    driver = Path(__file__).with_name("hub_offline_driver.py")
    done = subprocess.run(
        [sys.executable, driver, tmp_path / "a"], env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {"connections": [], "recommended": 5}
