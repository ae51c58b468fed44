"""The model card: valid front matter and Markdown whatever the data is called, honest where the model loses."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml
from hub_hostile import HOSTILE, PARSER
from hub_samples import make_metrics, make_tokenizer, result_block
from huggingface_hub import ModelCard, parse_eval_result_entries

from hf_genrec.data.items import ItemTable
from hf_genrec.errors import ArtifactError
from hf_genrec.hub.card import ModelFacts, model_card, readme_for_repo
from hf_genrec.hub.card_metadata import CARD_DATA_KEYS, eval_result_files
from hf_genrec.hub.card_results import comparison, identifier_health
from hf_genrec.identifiers.tokenization_item import ItemTokenizer

FACTS = ModelFacts("TigerForConditionalGeneration", "tiger", 1234, "hf_genrec")
RECIPE = {"name": "tiger", "status": "works", "paper": ["2305.05065", "arXiv:2203.01941v2"], "model": {"d_model": 128}}
HEADINGS = ["Usage", "Results", "Protocol", "Identifiers", "Data", "Training", "Limitations", "Citation"]


def body_of(readme: str) -> tuple[dict, list]:
    """Front matter and Markdown tokens of a card; the front matter must end where the Hub thinks it does."""
    card = ModelCard(readme)
    return yaml.safe_load(readme.split("\n---\n")[0].removeprefix("---\n")), PARSER.parse(card.text)


def headings(tokens, level="h2") -> list[str]:
    return [tokens[i + 1].content for i, t in enumerate(tokens) if t.type == "heading_open" and t.tag == level]


def test_front_matter():
    metadata, tokens = body_of(
        model_card(model=FACTS, tokenizer=make_tokenizer(), recipe=RECIPE, metrics=make_metrics(),
                   card_data={"license": "apache-2.0", "tags": ["My Tag"], "language": "en", "base_model": "google/t5"})
    )  # fmt: skip
    assert metadata["library_name"] == "hf_genrec"
    assert metadata["license"] == "apache-2.0"
    assert {"generative-recommendation", "hf_genrec", "tiger", "my-tag"} <= set(metadata["tags"])
    assert metadata["base_model"] == "google/t5"
    result = metadata["model-index"][0]["results"][0]
    assert result["dataset"] == {"name": "MovieLens 100K", "type": "movielens-100k", "split": "test"}
    assert {m["type"]: m["value"] for m in result["metrics"]} == {"recall_at_10": 0.2, "ndcg_at_10": 0.105}
    assert headings(tokens) == HEADINGS


def test_the_base_is_the_recipes_where_it_is_one_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "smollm2").mkdir(parents=True)

    def base(value, **card_data):
        readme = model_card(model=FACTS, recipe=RECIPE | {"model": {"base": value}}, card_data=card_data)
        return body_of(readme)[0].get("base_model")

    assert base("HuggingFaceTB/SmolLM2-135M-Instruct") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert base("HuggingFaceTB/SmolLM2-135M-Instruct", base_model="somebody/else") == "somebody/else"
    assert [base(value) for value in ("models/smollm2", str(tmp_path), "smollm2", "no\nid/x: 1", None)] == [None] * 5


def test_empty_card_is_valid():
    metadata, tokens = body_of(model_card())
    assert metadata["license"] == "unknown"
    assert "model-index" not in metadata
    assert headings(tokens) == HEADINGS


def test_numbers_and_sources_are_on_the_card():
    text = model_card(model=FACTS, tokenizer=make_tokenizer(), recipe=RECIPE, metrics=make_metrics())
    for wanted in (
        "**0.2000** [0.1800, 0.2200]", "1,234 parameters", "eprint = {2305.05065}", "eprint = {2203.01941}",
        "10.1145/2827872", "GroupLens terms", "943 users, 1,682 items", "1,000 rating &#60; 3", "collision_rate",
        "Seen items removed from the ranking (headline)", "Seen items kept in the ranking", "One seed (0)",
        "the held-out item of 12 users depends on it", "d_model: 128", "2.0% of the items share their code",
    ):  # fmt: skip
        assert wanted in text, wanted


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [(0.10, 0.12, "**Below Popularity**"), (0.12, 0.10, "Above Popularity"), (0.1, 0.1, "Equal to Popularity")],
)
def test_comparison_follows_the_numbers(ours, theirs, expected):
    text = "\n".join(comparison({"ndcg@10": ours}, {"popularity": {"ndcg@10": theirs}}))
    assert expected in text
    assert sum(word in text for word in ("**Below Popularity**", "Above Popularity", "Equal to Popularity")) == 1


def test_losses_come_first_and_in_the_summary():
    baselines = {"popularity": (0.08, 0.04), "item_graph": (0.20, 0.106), "sasrec_ce": (0.1, 0.1)}
    metrics = make_metrics(baselines={name: result_block(*values) for name, values in baselines.items()})
    text = model_card(model=FACTS, recipe=RECIPE, metrics=metrics)
    summary = text.split("## Usage")[0]
    assert "**Above it on at least one of these: Item graph (forward co-occurrence).**" in summary
    assert text.index("**Below Item graph") < text.index("Above Popularity")
    assert "Above or equal to every baseline" not in text


def test_winning_is_said_only_when_no_baseline_is_above():
    metrics = make_metrics(baselines={"popularity": result_block(0.1, 0.05)})
    text = model_card(model=FACTS, metrics=metrics)
    assert "No baseline of the table is above it (1 compared)" in text
    assert "Above or equal to every baseline of this table" in text
    assert "Not compared with the item graph heuristic nor SASRec" in text


def test_without_baselines_the_card_says_that_it_shows_nothing():
    text = model_card(model=FACTS, metrics=make_metrics(baselines={}))
    assert "No baseline was evaluated" in text
    assert "Above" not in text


def test_doubt_is_taken_from_paired_differences_then_intervals():
    ours, theirs = result_block(0.2, 0.1), result_block(0.21, 0.2)
    paired = {"sasrec_ce": {"ndcg@10": {"difference": -0.1, "low": -0.2, "high": -0.05}}}
    lines = comparison(ours, {"sasrec_ce": theirs}, paired)
    assert "paired difference -0.1000 [-0.2000, -0.0500], a clear difference" in lines[0]
    assert "intervals overlap: no clear difference" in lines[1]
    assert "no interval: may be noise" in comparison({"ndcg@10": 0.1}, {"popularity": {"ndcg@10": 0.2}})[0]


def test_several_seeds_and_variants():
    block = result_block(0.2, 0.1) | {"seeds": 3, "seed_values": {"ndcg@10": [0.09, 0.1, 0.11]}}
    variants = {"tiger, generation only": result_block(0.15, 0.07)}
    text = model_card(model=FACTS, metrics=make_metrics(test=block, seed=[0, 1, 2], variants=variants))
    assert "means over the seeds 0, 1, 2" in text
    assert "NDCG@10 of each seed: 0.0900, 0.1000, 0.1100." in text
    assert "| tiger, generation only | 0.1500" in text


@pytest.mark.parametrize("text", HOSTILE, ids=lambda t: repr(t[:25]))
def test_strangers_text_never_becomes_structure(text):
    """Data set name, item ids, titles, baseline names, recipe values, captions: all of them at once."""
    if not text.strip() or "\ud800" in text:
        ids = ["a", "b"]
    else:
        ids = [text, "b"]
    tokenizer = ItemTokenizer.from_codes(ids, np.array([[0, 0], [0, 1]]))
    items = ItemTable.from_source({"item_id": ids, "title": [text.replace("\ud800", "")[:2000], "plain"]})
    metrics = make_metrics(
        dataset=text or "x",
        baselines={text or "x": result_block(0.1, 0.3), "popularity": result_block(0.1, 0.1)},
        identifiers={text or "x": text, "nested": {text or "x": [text, 1.0]}},
        notes=[text],
        wall_seconds={text or "x": 1.0},
        data={"users": 3, "items": 2, "interactions": 5, "rows_read": 5, "dropped": {text or "x": 1}, "notes": [text],
              "tie_policy": text, "ties_rows": 1},
    )  # fmt: skip
    long = text[:30_000]  # the YAML writer takes seconds for a million characters
    recipe = {"name": long, "status": long, "paper": long, long: {"value": [long]}}
    plain = model_card(
        model=FACTS, tokenizer=make_tokenizer(2), items=None, recipe={"name": "x"}, plots={"x": "plots/x.png"},
        metrics=make_metrics("x", baselines={"x": result_block(0.1, 0.3), "popularity": result_block(0.1, 0.1)}),
        card_data={"limitations": ["x"]},
    )  # fmt: skip
    hostile = model_card(
        model=FACTS, tokenizer=tokenizer, items=items, recipe=recipe, metrics=metrics, plots={text: "plots/x.png"},
        card_data={"title": text or "x", "limitations": [text], "data_terms": text, "tags": [text]},
    )  # fmt: skip
    hostile.encode("utf-8")
    metadata, tokens = body_of(hostile)
    _, plain_tokens = body_of(plain)
    assert {*metadata} <= {"library_name", "license", "tags", "model-index"}
    assert all(re.fullmatch(r"[a-z0-9._-]+", tag) for tag in metadata["tags"])
    assert headings(tokens) == headings(plain_tokens) == [*HEADINGS[:-1], "Pictures", "Citation"]
    assert headings(tokens, "h3") == headings(plain_tokens, "h3")
    kinds = Counter(t.type for t in tokens)
    assert kinds["html_block"] == 0
    children = Counter(child.type for t in tokens if t.type == "inline" for child in t.children)
    assert children["html_inline"] == 0
    links = [c.attrs.get("href") or c.attrs.get("src") for t in tokens if t.type == "inline" for c in t.children
             if c.type in ("link_open", "image")]  # fmt: skip
    assert links == ["plots/x.png"]
    assert kinds["table_open"] == Counter(t.type for t in plain_tokens)["table_open"]
    assert len(hostile) < 60_000


@pytest.mark.parametrize("text", HOSTILE, ids=lambda t: repr(t[:25]))
def test_usage_is_python_whatever_the_ids_are(text):
    if not text.strip() or "\ud800" in text:
        pytest.skip("not an item id")
    tokenizer = ItemTokenizer.from_codes([text, "b"], np.array([[0, 0], [0, 1]]))
    for block in re.findall(r"^(`{3,})python\n(.*?)\n\1$", model_card(model=FACTS, tokenizer=tokenizer), re.M | re.S):
        compile(block[1], "usage", "exec")
        assert len(block[1].splitlines()) <= 5


def test_identifiers_before_the_policy_are_a_column():
    text = identifier_health({"collision_rate": 0.0, "policy": "counter", "before_policy": {"collision_rate": 0.5}})
    assert "| `collision_rate` | 0 | 0.5 |" in text
    assert "| `policy` | counter |  |" in text
    assert identifier_health({}) == "Not measured."


def test_repo_id_stands_in_the_snippets():
    text = model_card(model=FACTS, tokenizer=make_tokenizer(), card_data={"repo_id": "me/rec"})
    assert 'load_artifact("me/rec")' in text
    assert '(".")' not in text
    assert readme_for_repo('load_artifact(".") from_pretrained(".") other(".")', "a/b") == (
        'load_artifact("a/b") from_pretrained("a/b") other(".")'
    )


def test_card_data_is_checked():
    with pytest.raises(ArtifactError, match="did you mean 'license'"):
        model_card(card_data={"licence": "mit"})
    for bad in ({"datasets": "a b"}, {"dataset_id": "../x"}, {"license": "My License!"}, {"repo_id": 'x"); evil("'}):
        with pytest.raises(ArtifactError, match=next(iter(bad))):
            model_card(card_data=bad)
    assert "license" in CARD_DATA_KEYS


def test_eval_results_only_for_a_hub_data_set():
    metrics = make_metrics()
    assert eval_result_files(metrics, {}) == {}
    assert eval_result_files(None, {"dataset_id": "me/data"}) == {}
    ((path, content),) = eval_result_files(metrics, {"dataset_id": "me/data"}).items()
    assert path == ".eval_results/me-data.yaml"
    entries = parse_eval_result_entries(yaml.safe_load(content))
    assert [(e.dataset_id, e.task_id, e.value) for e in entries] == [
        ("me/data", "leave_one_out_recall_at_10", 0.2),
        ("me/data", "leave_one_out_ndcg_at_10", 0.105),
    ]
    assert "seen items removed" in entries[0].notes


def test_machine_paths_do_not_reach_the_file():
    for source in ("/home/somebody/data/u.data", "C:\\Users\\somebody\\u.data", "/home/somebody/u.data/"):
        assert make_metrics(data={"source": source})["data"]["source"] == "u.data"


def test_template_is_packaged():
    import hf_genrec.hub.card as card

    assert Path(card.TEMPLATE).read_text(encoding="utf-8").startswith("---\n")


def test_identifiers_are_described_as_what_they_are():
    import numpy as np

    from hf_genrec.hub.card import _naming
    from hf_genrec.identifiers.text_vocabulary import train_text_tokenizer
    from hf_genrec.identifiers.tokenization_item_words import ItemWordsTokenizer

    assert _naming(ItemTokenizer.from_codes(["a"], [[0, 1]], [4, 5])) == "2 codes each (codebooks 4 × 5)"
    long = ItemTokenizer.from_codes(["a"], np.zeros((1, 32), int), [64] * 32)
    assert _naming(long) == "32 codes each (32 codebooks of 64)"
    words = ItemWordsTokenizer.from_texts(train_text_tokenizer(["ab"], 260), ["a"], ["ab"])
    assert _naming(words) == f"texts of at most {words.num_levels} tokens (vocabulary {len(words)})"
    masked = ModelFacts("LLaDARecForMaskedLM", "llada_rec", 10, "hf_genrec")
    assert "AutoModelForMaskedLM.from_pretrained" in model_card(model=masked, tokenizer=long)
