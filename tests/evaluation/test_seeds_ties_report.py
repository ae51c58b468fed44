"""Seeds, ties, tables, picture and catalogue alignment."""

from __future__ import annotations

import builtins
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest

from hf_genrec.data.interactions import load_data
from hf_genrec.data.sequences import Sequences
from hf_genrec.data.splits import EvaluationSet, leave_one_out, make_split
from hf_genrec.errors import GenRecError, IncompatibleComponentsError, RequestError
from hf_genrec.evaluation.baselines import Markov, Popularity
from hf_genrec.evaluation.catalogue import align_to_catalogue
from hf_genrec.evaluation.evaluator import ScoreRecommender, evaluate, training_counts
from hf_genrec.evaluation.report import (
    buckets_table,
    comparison_table,
    differences,
    markdown_table,
    plot_results,
    results_table,
)
from hf_genrec.evaluation.seeds import aggregate_seeds, t_interval
from hf_genrec.evaluation.ties import (
    evaluate_with_shuffled_ties,
    order_follows_ids,
    print_tie_report,
    score_ties,
    shuffle_ascending_runs,
    tie_report,
)

N = 40
ROWS = EvaluationSet(
    np.arange(200),
    Sequences.from_rows([[m % N] for m in range(200)]),
    np.random.default_rng(0).integers(0, N, size=200),
)


def _report(seed, name="model", strength=0.0, rows=ROWS, **options):
    """Random scores; `strength` is added to the target's score, so more is better."""
    scores = np.random.default_rng(seed).random((len(rows), N))
    scores[np.arange(len(rows)), rows.targets] += strength
    place = {(int(h[0]), m): m for m, h in enumerate(rows.histories)}
    order = iter(sorted(place.values()) * 2)
    recommender = ScoreRecommender(lambda h: np.stack([scores[next(order)] for _ in range(len(h))]), N)
    options = {"ks": (1, 10), "progress": False, "bootstrap": 200} | options
    return evaluate(recommender, rows, num_items=N, name=name, **options)


# ------------------------------------------------------------------------------------------------------------- seeds


def test_t_interval_known_answer():
    mean, std, low, high = t_interval([1.0, 2.0, 3.0])
    half = 4.302652729911275 / np.sqrt(3)  # Student quantile .975 with 2 degrees of freedom
    assert (mean, std) == (2.0, 1.0)
    assert (low, high) == pytest.approx((2 - half, 2 + half))
    assert np.isnan(t_interval([0.3])[2])


def test_aggregate_seeds():
    reports = [_report(seed, strength=0.3, train_counts=np.arange(N)) for seed in range(3)]
    summary = aggregate_seeds(reports)
    values = [report["ndcg@10"] for report in reports]
    assert summary["ndcg@10"] == pytest.approx(np.mean(values))
    assert summary.values("ndcg@10").mean() == pytest.approx(np.mean(values))
    block = json.loads(json.dumps(summary.to_dict(), allow_nan=False))
    assert block["seeds"] == 3 and block["seed_values"]["ndcg@10"] == pytest.approx(values)
    assert block["seed_intervals"]["ndcg@10"] == pytest.approx(list(t_interval(values)[2:]))
    low, high = block["intervals"]["ndcg@10"]
    assert low < summary["ndcg@10"] < high
    head = summary.removed.buckets["head"]
    assert head["targets"] == reports[0].removed.buckets["head"]["targets"]
    assert head["recall@10"] == pytest.approx(np.mean([r.removed.buckets["head"]["recall@10"] for r in reports]))
    assert "seeds and users" in results_table([summary])


def test_seeds_compare_as_averages():
    ours = aggregate_seeds([_report(seed, strength=1.0) for seed in range(3)], name="ours")
    theirs = aggregate_seeds([_report(seed + 9) for seed in range(2)], name="theirs")
    found = ours.compare(theirs)
    assert found.verdict == "better" and found.difference == pytest.approx(ours["ndcg@10"] - theirs["ndcg@10"])
    assert theirs.compare(_report(1, strength=1.0)).verdict == "worse"


def test_one_seed_has_no_seed_interval():
    block = aggregate_seeds([_report(0)]).to_dict()
    assert block["seed_intervals"]["recall@10"] is None and block["seed_std"]["recall@10"] is None
    json.dumps(block, allow_nan=False)


def test_seeds_must_share_rows_and_settings():
    with pytest.raises(RequestError, match="same rows"):
        aggregate_seeds([_report(0), _report(1, ks=(1, 5))])
    with pytest.raises(RequestError, match="same rows"):
        aggregate_seeds([_report(0), _report(1, exclude_seen=True)])
    with pytest.raises(RequestError, match="at least one"):
        aggregate_seeds([])


# -------------------------------------------------------------------------------------------------------------- ties


def _tied_log(users=60, seed=0):
    """Every user has two triples of interactions, each at one time; the file lists i, i + 1, i + 2."""
    rng = np.random.default_rng(seed)
    log = {"user_id": [], "item_id": [], "timestamp": []}
    for user in range(users):
        for time, start in enumerate(rng.permutation(10)[:2] * 3):
            log["user_id"] += [f"u{user}"] * 3
            log["item_id"] += [f"i{start + step:03d}" for step in range(3)]
            log["timestamp"] += [1_000_000 + time] * 3
    return log


def _load(shuffle=None):
    return load_data(_tied_log(), min_user=0, min_item=0, shuffle_ties=shuffle)


def test_tie_report_counts_targets_that_depend_on_the_policy():
    data = _load()
    report = tie_report(data, leave_one_out(data))
    assert report["users"] == 60 and report["rows"] == 360 and report["largest"] == 3
    assert report["test_target_tied_share"] == 1.0
    text = print_tie_report(report)
    assert "60 of 60 test rows" in text and "100.0%" in text
    untimed = load_data(_tied_log(), min_user=0, min_item=0, timestamp_column=None)
    assert "no timestamps" in print_tie_report(tie_report(untimed, leave_one_out(untimed)))


def test_shuffling_ties_takes_away_what_the_file_order_gave():
    """In file order the target is the successor of the last item; shuffled, half of the guesses are seen items."""

    def run(shuffle):
        data = _load(shuffle)
        split = make_split(data)
        markov = Markov(last=1).fit(split.train, data.num_items)
        return evaluate(markov, split.test, num_items=data.num_items, ks=(1, 10), progress=False, bootstrap=0)

    found = evaluate_with_shuffled_ties(run, seeds=(0, 1, 2, 3))
    spread = found.spread("recall@1", "kept")
    assert spread["declared"] > 0.9 > spread["shuffled_max"] >= spread["shuffled_mean"] >= spread["shuffled_min"]
    assert run(0).kept["recall@1"] == found.shuffled[0].kept["recall@1"]
    block = json.loads(json.dumps(found.to_dict()))
    assert block["seen_kept"]["recall@1"] == spread and block["seeds"] == [0, 1, 2, 3]
    assert re.search(r"recall@10 +seen removed +declared [01]\.\d{4} +shuffled", str(found))
    with pytest.raises(RequestError, match="at least one seed"):
        evaluate_with_shuffled_ties(run, seeds=())


def test_score_ties_of_a_constant_and_of_a_strict_scorer():
    constant = ScoreRecommender(lambda h: np.zeros((len(h), N)), N)
    found = score_ties(constant, ROWS, k=10, exclude_seen=False)
    assert found["targets_tied"] == len(ROWS) and found["largest_tie"] == N
    assert found["optimistic"]["recall@10"] == 1.0 and found["pessimistic"]["recall@10"] == 0.0
    strict = ScoreRecommender(lambda h: np.tile(np.arange(N), (len(h), 1)), N)
    found = score_ties(strict, ROWS, k=10)
    assert found["targets_tied"] == 0 and found["optimistic"] == found["pessimistic"]


def test_order_follows_ids():
    rng = np.random.default_rng(0)
    shuffled = Sequences.from_rows([rng.permutation(N)[:9] for _ in range(300)])
    keys = [f"{rank:02d}" for rank in rng.permutation(N)]
    chance = order_follows_ids(shuffled, keys)
    assert abs(chance["z"]) < 4 and chance["ascending"] == pytest.approx(0.5, abs=0.04)
    by_key = Sequences.from_rows([sorted(row, key=lambda i: keys[i]) for row in shuffled])
    found = order_follows_ids(by_key, keys)
    assert found["ascending"] == found["last_pair_ascending"] == 1.0 and found["pairs"] == 300 * 8
    last_only = Sequences.from_rows([[2, 1, 0, 3], [5, 4, 6], [7]])
    found = order_follows_ids(last_only, list(range(N)))
    assert found["last_pair_ascending"] == 1.0 and found["ascending"] == 2 / 5
    assert order_follows_ids(Sequences.from_rows([[1], []]), list(range(N)))["pairs"] == 0


def test_shuffle_ascending_runs_keeps_the_runs():
    rows = Sequences.from_rows([[5, 1, 2, 3, 0], [], [4, 4, 9]])
    seen = set()
    for seed in range(40):
        found = shuffle_ascending_runs(rows, list(range(N)), seed)
        assert [row.tolist()[0] for row in (found[0],)] == [5] and found[0][-1] == 0
        assert sorted(found[0][1:4].tolist()) == [1, 2, 3] and found[2][0] == 4
        seen.add(tuple(found[0][1:4].tolist()))
    assert len(seen) == 6
    again = shuffle_ascending_runs(rows, list(range(N)), 3)
    np.testing.assert_array_equal(again.items, shuffle_ascending_runs(rows, list(range(N)), 3).items)


def test_amazon_toys_are_sorted_by_asin(data_dir):
    """The public cut: histories ascend in the ASIN far more often than chance, at the target even more."""
    lines = (data_dir / "amazon_toys" / "items.jsonl").read_text(encoding="utf-8").splitlines()
    asins = {str(row["item_id"]): row["parent_id"] for row in map(json.loads, lines)}
    data = load_data("amazon-toys", data_dir=data_dir)
    keys = [asins[item_id] for item_id in data.item_ids]
    found = order_follows_ids(data.sequences, keys)
    assert found["ascending"] == pytest.approx(0.720, abs=0.001)
    assert found["last_pair_ascending"] == pytest.approx(0.752, abs=0.001)
    shuffled = shuffle_ascending_runs(data.sequences, keys, seed=0)
    assert order_follows_ids(shuffled, keys)["ascending"] < 0.5


# ------------------------------------------------------------------------------------------------------------- tables


def test_results_table_lines_up_and_names_the_setting():
    counts = np.arange(N)
    reports = [_report(0, "a", train_counts=counts), _report(1, "a_longer_name", 0.5, train_counts=counts)]
    text = results_table(reports, ("recall@10", "ndcg@10"), buckets=True)
    table = text.split("\n\n")[0].splitlines()
    assert "200 test rows, 40 items" in table[0] and "seen items removed" in table[0]
    column = table[1].index("HR@10")
    assert all(re.match(r"[-0-9]", line[column]) for line in table[2:])
    assert [line.split()[:2] for line in table[3:]] == [
        [n, s] for s in ("removed", "kept") for n in ("a", "a_longer_name")
    ]
    assert f"{reports[1]['recall@10']:.4f} [" in text
    assert "head (" in text and "cold (" in text
    assert "[" not in results_table(reports, ("recall@10",), intervals=False).split("\n", 1)[1]
    assert str(reports[0]) == results_table(reports[:1])


def test_tables_read_the_blocks_of_a_metrics_file():
    report = _report(0, "ours", train_counts=np.arange(N))
    blocks = json.loads(json.dumps({"ours": report.to_dict(), "old": {"recall@10": 0.5, "seen_items": "removed"}}))
    assert results_table({"ours": blocks["ours"]}) == results_table([report])
    text = results_table(blocks, ("recall@10", "ndcg@10"))
    assert "0.5000" in text and re.search(r"old +removed \* +0\.5000 +-", text)
    assert "pass train_counts" in buckets_table({"old": blocks["old"]})


def test_markdown_table_escapes_names():
    text = markdown_table([_report(0, "a|b")], ("recall@10",))
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 4 and rows[2].startswith("| a\\|b | removed ★ | 0.")
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1
    assert "headline (★): seen items removed" in text


def test_comparison_says_where_ours_loses():
    ours, weak, strong = _report(0, "ours", 0.5), _report(1, "weak"), _report(2, "strong", 2.0)
    twin = _report(0, "twin", 0.5)
    text = comparison_table(ours, [weak, strong, twin], ("recall@10",))
    beats, loses, unclear = text.splitlines()[-3:]
    assert beats.startswith("ours beats: weak on HR@10, seen removed (+") and "strong" not in beats
    assert loses.startswith("ours LOSES to: strong on HR@10, seen removed (-") and "weak" not in loses
    assert unclear == "No clear difference: twin on HR@10, seen removed (+0.0000); twin on HR@10, seen kept (+0.0000)."
    assert "LOSES to: nothing here." in comparison_table(strong, [weak], ("recall@10",))
    found = differences(ours, [strong], ("recall@10",))["strong"]["recall@10"]
    assert found.verdict == "worse" and found.to_dict()["difference"] == found.difference


def test_reports_need_different_names():
    with pytest.raises(RequestError, match="share a name"):
        results_table([_report(0), _report(1)])
    with pytest.raises(RequestError, match="no reports"):
        results_table([])


def test_picture(tmp_path):
    pytest.importorskip("matplotlib")
    path = plot_results([_report(0, "a $x$ name"), _report(1, "b")], tmp_path / "results.png")
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and len(content) > 5_000


def test_picture_without_matplotlib_names_the_extra(tmp_path, monkeypatch):
    real = builtins.__import__

    def blocked(name, *args, **kwargs):
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", blocked)
    with pytest.raises(GenRecError, match=r"hf_genrec\[viz\]"):
        plot_results([_report(0)], tmp_path / "x.png")
    with pytest.warns(UserWarning, match=r"hf_genrec\[viz\]"):
        assert plot_results([_report(0)], tmp_path / "x.png", required=False) is None
    assert not (tmp_path / "x.png").exists()


# ---------------------------------------------------------------------------------------------------------- catalogue


def test_align_to_catalogue_gives_the_same_numbers_in_another_item_order():
    data = _load()
    order = list(np.random.default_rng(0).permutation(data.item_ids)) + ["never-consumed"]
    moved = align_to_catalogue(data, order)
    assert moved.item_ids == order and moved.num_items == data.num_items + 1
    for row, again in zip(data.sequences, moved.sequences):
        assert [data.item_ids[i] for i in row] == [moved.item_ids[i] for i in again]
    assert align_to_catalogue(data, data.item_ids) is data
    results = []
    for each in (data, moved):
        split = leave_one_out(each)
        counts = training_counts(split.train, each.num_items)
        # strict scores, so that the order of equal scores (by index) cannot differ
        rng = {item_id: i for i, item_id in enumerate(sorted(order))}
        tie_break = np.array([rng[item_id] for item_id in each.item_ids]) * 1e-6
        popular = Popularity().fit(split.train, each.num_items)
        popular.counts_N = popular.counts_N + tie_break
        results.append(
            evaluate(popular, split.test, num_items=each.num_items, train_counts=counts, progress=False, bootstrap=0)
        )
    assert results[0].removed.metrics == results[1].removed.metrics
    with pytest.raises(IncompatibleComponentsError, match="not in the model's catalogue"):
        align_to_catalogue(data, data.item_ids[1:])


def test_tie_report_needs_only_reports():
    found = SimpleNamespace(
        tie_policy="input order", ties_rows=None, ties_users=None, ties_largest=None, ties_last_two=None, interactions=9
    )
    split = SimpleNamespace(report={"ties": None}, test=ROWS)
    assert tie_report(SimpleNamespace(report=found), split)["test_target_tied_share"] is None
