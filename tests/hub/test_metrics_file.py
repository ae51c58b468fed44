"""metrics.json: what fits the layout, and which field an error names when something does not."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from hf_genrec.errors import ArtifactError
from hf_genrec.hub.metrics_file import build_metrics, check_metrics, metric_names, read_metrics, seeds_of

GOOD = {
    "dataset": "shop",
    "protocol": "leave_one_out",
    "seed": 0,
    "test": {"recall@10": 0.2, "intervals": {"recall@10": [0.1, 0.3]}, "seen_items": "removed"},
    "baselines": {"popularity": {"recall@10": 0.1}},
    "identifiers": {},
    "wall_seconds": {},
}


class Report:
    def to_dict(self):
        return {"recall@10": np.float32(0.25), "rows": np.int64(3)}


def test_numpy_and_reports_become_plain_json():
    built = build_metrics(
        dataset="shop", protocol="p", seed=np.int64(3), test=Report(), identifiers={"utilisation": np.array([1.0, 0.5])}
    )
    assert json.loads(json.dumps(built)) == built
    assert built["test"] == {"recall@10": 0.25, "rows": 3}
    assert built["identifiers"]["utilisation"] == [1.0, 0.5]
    assert built["seed"] == 3


def test_an_evaluation_report_is_a_result_block():
    evaluation_report = pytest.importorskip("hf_genrec.evaluation.evaluation_report")
    ranks = np.array([1.0, np.inf, 3.0])
    result = evaluation_report.RankingResult(ranks, {"recall@10": 2 / 3, "ndcg@10": 0.5}, {"recall@10": (0.3, 0.9)})
    report = evaluation_report.EvaluationReport(
        name="m",
        headline="removed",
        results={"removed": result, "kept": result},
        ks=(10,),
        num_items=5,
        users_M=np.arange(3),
        targets_M=np.arange(3),
    )
    built = build_metrics(dataset="shop", protocol="p", seed=0, test=report, baselines={"popularity": report})
    assert built["test"]["seen_kept"]["ndcg@10"] == 0.5
    assert metric_names(built["test"]) == ["recall@10", "ndcg@10"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"test": None}, "test"),
        ({"test": {}}, "test"),
        ({"test": {"recall@10": "much"}}, "recall@10"),
        ({"test": {"recall@10": True}}, "recall@10"),
        ({"test": {"recall@10": math.nan}}, "recall@10"),
        ({"test": {"recall@10": 0.1, "intervals": {"recall@10": [0.1]}}}, "intervals"),
        ({"test": {"recall@10": 0.1, "seen_items": "some"}}, "seen_items"),
        ({"test": {"recall@10": 0.1, "seen_kept": {}}}, "seen_kept"),
        ({"baselines": {"popularity": 0.1}}, "popularity"),
        ({"baselines": []}, "baselines"),
        ({"differences": {"nobody": {}}}, "nobody"),
        ({"differences": {"popularity": {"recall@10": [0.1]}}}, "popularity"),
        ({"seed": "one"}, "seed"),
        ({"seed": []}, "seed"),
        ({"dataset": ""}, "dataset"),
        ({"wall_seconds": 3}, "wall_seconds"),
        ({"notes": object()}, "notes"),
    ],
)
def test_bad_fields_are_named(change, named):
    with pytest.raises(ArtifactError, match=named.replace("[", r"\[")):
        check_metrics({**GOOD, **change})


def test_side_figures_that_are_not_finite_become_null(caplog):
    checked = check_metrics({**GOOD, "identifiers": {"x": float("inf"), "y": np.float32("nan")}})
    assert checked["identifiers"] == {"x": None, "y": None}
    assert "identifiers x is inf" in caplog.text


@pytest.mark.parametrize("key", list(GOOD))
def test_missing_keys_are_named(key):
    with pytest.raises(ArtifactError, match=key):
        check_metrics({name: value for name, value in GOOD.items() if name != key})


def test_files(tmp_path):
    path = tmp_path / "metrics.json"
    path.write_text(json.dumps(GOOD | {"unknown": [1]}))
    assert read_metrics(path) == GOOD | {"unknown": [1]}
    path.write_text("{")
    with pytest.raises(ArtifactError, match=r"metrics\.json"):
        read_metrics(path)


def test_seeds():
    assert seeds_of({"seed": 4}) == [4]
    assert seeds_of({"seed": [5, 6]}) == [5, 6]
