"""`genrec rank` end to end: a tiny random chat model, and a fake server that is interrupted and gone on with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, T5Config

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "generation"))
from chat_cases import Server, shown, tiny_language_model

from hf_genrec.cli.main import main
from hf_genrec.recipes.pipeline import train_recipe
from hf_genrec.recipes.resolver import resolve_recipe

ITEMS, USERS = 40, 40
KEY = "sk-never-shown"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A SASRec of one epoch with titles and one without, a chat model, and the same without a chat template."""
    folder = tmp_path_factory.mktemp("rank")
    log = ["user_id,item_id,timestamp"]
    log += [f"u{u},i{(u * 7 + step) % ITEMS:02d},{1000 + u * 50 + step}" for u in range(USERS) for step in range(8)]
    (folder / "log.csv").write_text("\n".join(log) + "\n", encoding="utf-8")
    items = ["item_id,title", *(f"i{n:02d},Film {chr(65 + n // 8)}{chr(65 + n % 8)}" for n in range(ITEMS))]
    (folder / "items.csv").write_text("\n".join(items) + "\n", encoding="utf-8")
    small = {"model.hidden_size": 16, "num_train_epochs": 1, "logging_steps": 1000, "eval_epochs": 10}
    for name, table in (("model", folder / "items.csv"), ("untitled", None)):
        train_recipe(
            resolve_recipe("sasrec", small),
            folder / "log.csv",
            folder / name,
            items=table,
            baselines=[],
            progress=False,
        )
    model, tokenizer = tiny_language_model()
    model.save_pretrained(folder / "chat")
    tokenizer.save_pretrained(folder / "chat")
    T5Config(d_model=8).save_pretrained(folder / "t5")
    tokenizer.save_pretrained(folder / "t5")
    tokenizer.chat_template = None
    model.save_pretrained(folder / "mute")
    tokenizer.save_pretrained(folder / "mute")
    return folder


def _rank(home, *more, folder="model") -> list[str]:
    log = str(home / "log.csv")
    return ["rank", str(home / folder), "--dataset", log, "--test_users", "6", "--num_candidates", "5", *map(str, more)]


def _at(server, *more) -> list[str]:
    return ["--endpoint", server.url, "--endpoint_model", "tiny", "--batch_size", "2", *more]


def _backwards(messages) -> str:
    """All candidates, the other way round; one line too many."""
    return "\n".join(["Here you are", *shown(messages)[::-1]])


def _answers(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("constrained", [False, True])
def test_a_local_chat_model_ranks_and_is_asked_once(home, tmp_path, capsys, constrained) -> None:
    options = ["--chat_model", home / "chat", "--max_new_tokens", 8, "--bootstraps", 2, "--max_history", 2]
    options += ["--output_dir", tmp_path / "out", "--json", *(["--constrained"] if constrained else [])]
    assert main(_rank(home, *options)) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["test"]["rows"] == 6 and set(found["baselines"]) == {"retriever", "popularity"}
    assert found["answers"]["answers"] == found["answers"]["new"] == found["answers"]["requests"] == 12
    assert found["answers"]["named_share"] == 1.0 or not constrained  # the list of candidates, each once
    assert {"head", "tail", "cold"} == set(found["buckets"]["ndcg@10"]["buckets"])
    # an order of the candidates changes neither what is among them nor what stands behind them
    for k in (5, 10, 20):
        assert found["test"][f"recall@{k}"] == found["baselines"]["retriever"][f"recall@{k}"]
    assert found["targets_among_candidates"] == round(6 * found["test"]["recall@5"])
    assert json.loads((tmp_path / "out/ranking.json").read_text()) == found
    assert main(_rank(home, *options)) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["answers"]["reused"] == 12 and again["answers"]["new"] == again["answers"]["requests"] == 0
    assert _metrics(again) == _metrics(found)


def _metrics(found) -> dict:
    return {name: value for name, value in found["test"].items() if "@" in name}


def test_an_answer_is_used_again_only_for_the_same_model_and_request(home, tmp_path, capsys) -> None:
    options = ["--max_new_tokens", 4, "--bootstraps", 1, "--max_history", 2, "--output_dir", tmp_path / "out", "--json"]
    model = AutoModelForCausalLM.from_pretrained(home / "chat")
    for name, change in (("same", 0.0), ("other", 1e-3)):  # same files elsewhere; other weights
        with torch.no_grad():
            model.lm_head.weight[0, 0] += change
        model.save_pretrained(tmp_path / name)
        for file in (home / "chat").glob("*token*"):
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
        (tmp_path / name / "chat_template.jinja").write_bytes((home / "chat/chat_template.jinja").read_bytes())
    new = []
    for chat, more in (
        (home / "chat", []),
        (tmp_path / "same", []),
        (tmp_path / "other", []),
        (home / "chat", ["--prompt", "recency"]),
        (home / "chat", ["--prompt", "in_context"]),
        (home / "chat", ["--max_new_tokens", 5]),
        (home / "chat", ["--seed", 1]),
    ):
        assert main(_rank(home, "--chat_model", chat, *options, *more)) == 0
        new.append(json.loads(capsys.readouterr().out)["answers"]["new"])
    assert new == [6, 0, 6, 6, 6, 6, 6]
    texts = [record["request"]["messages"][-1]["content"] for record in _answers(tmp_path / "out")]
    assert sum("The last of them was" in text for text in texts) == 6
    assert sum("right recommendation for me was" in text for text in texts) == 6


def test_an_endpoint_ranks_in_text_with_buckets_and_no_key_anywhere(home, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with Server(reply=_backwards) as server:
        arguments = _rank(home, *_at(server), "--noun", "films", "--output_dir", tmp_path / "out", "--quiet")
        assert main(arguments) == 0
        assert all(headers["Authorization"] == f"Bearer {KEY}" for _, headers, _ in server.requests)
        assert server.requests[0][2]["temperature"] == 0 and len(server.requests) == 18
    out = capsys.readouterr()
    for part in ("sasrec + tiny", "popularity", "sasrec -> sasrec + tiny, seen items removed", "too few targets",
                 "100% were repaired", "Requests made: 18; answers used again: 0", "among the 5 candidates in"):  # fmt: skip
        assert part in out.out, part
    assert "films" in _answers(tmp_path / "out")[0]["request"]["messages"][0]["content"]
    kept = "".join(path.read_text() for path in (tmp_path / "out").iterdir())
    assert KEY not in out.out + out.err + kept and "OPENAI" not in kept


def test_a_ranker_that_ruins_the_order_is_warned_about(home, capsys) -> None:
    """A better mean that the tail pays for."""
    from hf_genrec.cli.rank import _compared
    from hf_genrec.evaluation.evaluation_report import EvaluationReport, RankingResult

    def report(name, ranks):
        ranks = np.asarray(ranks, float)
        metrics = dict.fromkeys(("recall@10", "ndcg@10"), 0.0)
        mask = np.arange(40) % 2 == 0
        result = RankingResult(ranks, metrics)
        return EvaluationReport(
            name, "removed", {"removed": result}, (10,), 4, np.arange(40), np.arange(40) % 4,
            buckets_M={"head": mask, "tail": ~mask},
        )  # fmt: skip

    answers = {"answers": 1, "unreadable_share": 0, "repaired_share": 0, "named_share": 1, "requests": 1, "reused": 0}
    plain = {"num_candidates": 20, "untitled_items": 3, "answers": answers}
    before, after = report("sasrec", np.tile([5, 1], 20)), report("sasrec + x", np.tile([1, 20], 20))
    found, text = _compared(plain, after, before, report("popularity", np.tile([30, 30], 20)))
    assert found["buckets"]["ndcg@10"]["worse"] == ["tail"] and found["targets_among_candidates"] == 40
    assert "Warning: ndcg@10 got worse from sasrec to sasrec + x on tail items" in text
    assert "3 items have no title" in text


def test_a_failing_server_keeps_what_was_paid_for(home, tmp_path, capsys) -> None:
    refused = [(200, {}, None)] * 7 + [(401, {}, "no more")]
    options = ["--output_dir", tmp_path / "out", "--json"]
    with Server(refused, _backwards) as server:
        assert main(_rank(home, *_at(server), *options)) == 2
        error = " ".join(capsys.readouterr().err.split())
        assert "error: " in error and "status 401: no more" in error and "goes on from there" in error
        kept = _answers(tmp_path / "out")
        assert 7 <= len(kept) == len(server.requests) - 1
        with open(tmp_path / "out/answers.jsonl", "a") as file:
            file.write('{"request": {"mess')  # a kill within a line
        server.requests.clear()
        assert main(_rank(home, *_at(server), *options)) == 0
        found = json.loads(capsys.readouterr().out)
        assert len(server.requests) == 18 - len(kept) == found["answers"]["new"]
        assert found["answers"]["reused"] == len(kept)
        server.requests.clear()
        assert main(_rank(home, *_at(server), "--json")) == 0  # all at once
        whole = json.loads(capsys.readouterr().out)
        assert _metrics(found) == _metrics(whole) and len(server.requests) == 18
        assert found["buckets"] == whole["buckets"]
        assert main(_rank(home, *_at(server), *options)) == 0  # the line that was cut off cost nothing but itself
        assert json.loads(capsys.readouterr().out)["answers"]["new"] == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_loses_nothing(home, tmp_path, number) -> None:
    def slow(messages):
        time.sleep(0.15)
        return _backwards(messages)

    with Server(reply=slow) as server:
        words = [*_rank(home, *_at(server)), "--output_dir", str(tmp_path), "--json"]
        command = [sys.executable, "-m", "hf_genrec.cli.main", *words]
        env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
        process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            begun = time.monotonic()
            while len(server.requests) < 6 and process.poll() is None and time.monotonic() - begun < 300:
                time.sleep(0.02)
            process.send_signal(number)
            _, error = process.communicate(timeout=60)
        finally:
            process.kill()
        sent = len(server.requests)
        kept = len(_answers(tmp_path))
        assert 6 <= sent < 18, error
        if number == signal.SIGINT:  # what was under way is waited for
            assert process.returncode == 130 and "goes on from the answers" in error and kept == sent
        else:
            assert sent - 2 <= kept <= sent  # the two under way
        server.requests.clear()
        server.reply = _backwards
        assert main(words) == 0
        assert len(server.requests) == 18 - kept


def test_seen_items_and_parameters_of_the_request(home, capsys) -> None:
    parameters = '{"max_tokens": null, "max_completion_tokens": 9, "temperature": 0.2}'
    with Server(reply=_backwards) as server:
        arguments = _rank(home, *_at(server), "--bootstraps", 1, "--seen_items", "both", "--parameters", parameters)
        assert main([*arguments, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        body = server.requests[0][2]
        assert "max_tokens" not in body and body["max_completion_tokens"] == 9 and body["temperature"] == 0.2
        assert "seen_kept" in found["test"] and found["answers"]["answers"] == 12
        assert len(server.requests) == found["answers"]["new"] == 12 - found["answers"]["reused"]


def test_the_key_is_not_sent_over_a_network_unencrypted_unless_it_is_named(monkeypatch) -> None:
    from argparse import Namespace

    from hf_genrec.cli.rank import _api_key

    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OTHER_KEY", "other")
    for url, named, key in (
        ("https://api.example/v1", None, KEY),
        ("http://localhost:80/v1", None, KEY),
        ("http://127.0.0.1:80/v1", None, KEY),
        ("http://[::1]/v1", None, KEY),
        ("http://api.example/v1", None, None),
        ("http://localhost.evil.example/v1", None, None),
        ("http://127.0.0.1.evil.example/v1", None, None),
        ("http://api.example/v1", "OTHER_KEY", "other"),
    ):
        assert _api_key(Namespace(endpoint=url, api_key_env=named)) == key, url


SERVER = ["--endpoint", "http://127.0.0.1:9/v1", "--endpoint_model", "m"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "name one chat model"),
        ([*SERVER, "--chat_model", "x"], "name one chat model"),
        (["--endpoint", "http://h/v1"], "--endpoint needs --endpoint_model"),
        ([*SERVER, "--constrained"], "--constrained needs --chat_model"),
        (["--chat_model", "x", "--parameters", "{}"], "--parameters is for --endpoint"),
        ([*SERVER, "--parameters", "[1"], "no JSON object"),
        ([*SERVER, "--parameters", '{"retries": 1}'], "retries is no field"),
        ([*SERVER, "--parameters", '{"stream": true}'], "stream and n are set by the client"),
        ([*SERVER, "--api_key_env", "gsk_a_key_by_mistake"], "name of an environment variable"),
        (["--endpoint", "http://h:abc/v1", "--endpoint_model", "m"], "base_url must look like"),
        ([*SERVER, "--bootstraps", "0"], "--bootstraps must be at least 1"),
        ([*SERVER, "--seed", "-1"], "--seed must be at least 0"),
        ([*SERVER, "--num_candidates", "1000"], "the artefact's search keeps"),
        ([*SERVER, "--output_dir", "HOME/model"], "is a file or an artefact"),
        ([*SERVER, "--output_dir", "HOME/log.csv"], "is a file or an artefact"),
        (["--chat_model", "HOME/mute"], "mute' has no chat template"),
        (["--chat_model", "HOME/nothing"], "cannot be loaded"),
        (["--chat_model", "HOME/model"], "model' has no chat template"),
        (["--chat_model", "HOME/t5"], "cannot be loaded"),
    ],
)
def test_errors_are_one_paragraph_and_show_no_key(home, capsys, monkeypatch, arguments, message) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert main(_rank(home, *[word.replace("HOME", str(home)) for word in arguments])) == 2
    out = capsys.readouterr()
    assert out.err.startswith("error: ") and message in " ".join(out.err.split()) and not out.out
    assert KEY not in out.err and "gsk_a_key" not in out.err


def test_no_titles_and_no_server(home, capsys, monkeypatch) -> None:
    from hf_genrec.generation.ranking import chat_client

    monkeypatch.setattr(chat_client.ChatEndpoint.__init__, "__kwdefaults__", {
        **chat_client.ChatEndpoint.__init__.__kwdefaults__, "backoff": 0.001})  # fmt: skip
    assert main(_rank(home, *SERVER, folder="untitled")) == 2
    assert "hold titles of the items" in " ".join(capsys.readouterr().err.split())
    items = ["--items", str(home / "items.csv")]
    assert main(_rank(home, *SERVER, *items, "--quiet", folder="untitled")) == 2  # titles, but nobody there
    error = " ".join(capsys.readouterr().err.split())
    assert "(6 attempts); is the server running" in error and "give --output_dir" in error
