"""The client of chat servers against a loopback server."""

from __future__ import annotations

import time

import numpy as np
import pytest
from chat_cases import Server, completion

from hf_genrec.errors import RequestError
from hf_genrec.generation.ranking.chat_client import ChatEndpoint, ChatEndpointError


def _ask(words):
    return [[{"role": "user", "content": f"say {word}"}] for word in words]


def test_endpoint_sends_the_request_and_keeps_the_order() -> None:
    words = [f"w{n}" for n in range(20)]
    with Server() as server:
        chat = ChatEndpoint(server.url + "/", "tiny", api_key="key-1", temperature=0.2, max_tokens=5)
        assert chat(_ask(words)) == words
        path, headers, body = server.requests[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer key-1"
    assert body["model"] == "tiny" and body["temperature"] == 0.2 and body["max_tokens"] == 5
    assert "key-1" not in repr(chat)


def test_endpoint_waits_out_rate_limits_and_failures() -> None:
    script = [(429, {"Retry-After": "0.15"}, "slow down"), (503, {}, "busy"), ("drop", {}, None), (500, {}, "oops")]
    with Server(script) as server:
        chat = ChatEndpoint(server.url, "tiny", backoff=0.02, retries=4)
        assert chat(_ask(["done"])) == ["done"]
        gaps = np.diff(server.times)
    assert len(gaps) == 4 and gaps[0] >= 0.15  # what the server asked for
    assert gaps[1] >= 0.04 and gaps[2] >= 0.08 and gaps[3] >= 0.16  # doubled each time


@pytest.mark.parametrize(
    "script, message, requests",
    [
        ([(401, {}, '{"error": {"message": "bad key"}}')], "status 401: bad key; check api_key", 1),
        ([(404, {}, '{"detail": "no model"}')], "status 404: .*check base_url", 1),
        ([(302, {"Location": "http://127.0.0.1:9/steal"}, "")], "status 302", 1),
        ([(429, {}, "wait")] * 3, r"status 429: wait \(3 attempts\)", 3),
        ([(200, {}, "<html>")], "no chat completion: '<html>'", 1),
        ([(200, {}, '{"choices": []}')], "no chat completion", 1),
    ],
)
def test_endpoint_errors_are_typed_and_never_show_the_key(script, message, requests) -> None:
    with Server(script) as server:
        chat = ChatEndpoint(server.url, "tiny", api_key="sk-secret", backoff=0.001, retries=2)
        with pytest.raises(ChatEndpointError, match=message) as error:
            chat(_ask(["x"]))
        assert len(server.requests) == requests and "sk-secret" not in str(error.value)


def test_endpoint_timeout_and_nobody_there() -> None:
    with Server() as server:
        closed = server.url
    with pytest.raises(ChatEndpointError, match=r"2 attempts\); is the server running"):
        ChatEndpoint(closed, "tiny", retries=1, backoff=0.001, timeout=1)(_ask(["x"]))
    for url in ("file:///etc/passwd", "localhost:8000", "http://user:pw@host/v1"):
        with pytest.raises(RequestError, match="base_url must look like"):
            ChatEndpoint(url, "tiny")
    with pytest.raises(RequestError, match="api_key holds characters"):
        ChatEndpoint("http://h/v1", "tiny", api_key="a\nb")


# ------------------------------------------------------------------------------------------------ nothing is waited for in vain


@pytest.mark.parametrize(
    "url, message",
    [
        ("http://h:abc/v1", "'abc'"),
        ("http://h:70000/v1", "0-65535"),
        ("http://h:0/v1", "1 to 65535"),
        ("http://[::1/v1", "Invalid IPv6 URL"),
        ("http://a..b/v1", "label"),
        ("http://h/v 1", "without blanks"),
        ("http://h/v1\n", "without blanks"),
        ("http://h/\u00fc", "ASCII"),
        ("http://h/v1?api-version=3", "query"),
    ],
)
def test_addresses_that_no_request_can_go_to_are_refused_before_any(url, message) -> None:
    with pytest.raises(RequestError, match=f"base_url must look like .*{message}"):
        ChatEndpoint(url, "tiny")


def _raw(text: bytes, pause: float = 0.0):
    def act(handler):
        try:
            for start in range(0, len(text), max(1, len(text) if not pause else 1)):
                handler.wfile.write(text[start : start + (1 if pause else len(text))])
                handler.wfile.flush()
                time.sleep(pause)
        except OSError:  # the client has had enough
            pass
        handler.close_connection = True

    return act


@pytest.mark.parametrize(
    "script, message",
    [
        ((429, {}, '{"error": {"code": "insufficient_quota", "message": "no money"}}'), "status 429: no money"),
        ((307, {"Location": "http://127.0.0.1:9/steal"}, ""), "status 307: .*give the final base_url"),
        ((308, {"Location": "/v2/chat/completions"}, ""), "status 308"),
        ((403, {}, "[" * 4000), "status 403"),  # nested deeper than the reader of JSON goes
        ((200, {}, "[" * 200_000), "no chat completion"),
        ((400, {}, '{"error": "\\u001b[31mred\\u0000"}'), r"status 400: \[31mred;"),  # nothing reaches the terminal
        (_raw(b"SSH-2.0-OpenSSH_9.6\r\n\r\n"), "no HTTP server"),
    ],
)
def test_what_no_waiting_can_mend_fails_at_once(script, message) -> None:
    with Server([script]) as server:
        chat = ChatEndpoint(server.url, "tiny", backoff=0.001)
        with pytest.raises(ChatEndpointError, match=message):
            chat([_ask(["x"])[0]])
        assert len(server.requests) == chat.requests == 1


def test_https_to_a_plain_server_and_unknown_machines_fail_at_once() -> None:
    with Server() as server:
        begun = time.monotonic()
        with pytest.raises(ChatEndpointError, match="no secure connection"):
            ChatEndpoint(server.url.replace("http:", "https:"), "tiny", timeout=2)(_ask(["x"]))
        assert time.monotonic() - begun < 2.5 and not server.requests


def test_unknown_machine_is_not_asked_again(monkeypatch) -> None:
    import socket

    asked = []

    def nobody(host, *args, **kwargs):
        asked.append(host)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", nobody)
    with pytest.raises(ChatEndpointError, match="no machine has this name"):
        ChatEndpoint("http://nowhere.invalid/v1", "tiny", backoff=0.001)(_ask(["x"]))
    assert len(asked) == 1


def test_a_response_that_is_cut_off_is_asked_for_again() -> None:
    cut = (200, {}, None)
    whole = completion("w0").encode()
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(whole)}\r\n\r\n".encode()
    with Server([_raw(head + whole[:-9]), cut]) as server:
        assert ChatEndpoint(server.url, "tiny", backoff=0.001)(_ask(["w0"])) == ["w0"]
        assert len(server.requests) == 2


def test_a_server_that_sends_byte_by_byte_runs_into_the_timeout() -> None:
    whole = completion("w0" * 60).encode()
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(whole)}\r\n\r\n".encode()

    def drip(handler):
        _raw(head)(handler)
        _raw(whole, pause=0.03)(handler)  # more than 5 seconds in all

    with Server([drip]) as server:
        begun = time.monotonic()
        with pytest.raises(ChatEndpointError, match=r"raise timeout \(now 0.3 s\)"):
            ChatEndpoint(server.url, "tiny", timeout=0.3, retries=0)(_ask(["w0"]))
        assert time.monotonic() - begun < 2


def test_a_server_that_repeats_the_key_does_not_get_it_printed_or_stored() -> None:
    key = "sk-secret-1"
    echoes = [(401, {}, f"no such key: {key}"), (200, {}, f"<html>{key}"), (200, {}, completion(f"you are {key}"))]
    with Server(echoes) as server:
        chat = ChatEndpoint(server.url, "tiny", api_key=key)
        for _ in range(2):
            with pytest.raises(ChatEndpointError, match=r"\[api_key\]") as error:
                chat(_ask(["x"]))
            assert key not in str(error.value)
        assert chat(_ask(["x"])) == ["you are [api_key]"]
    assert key not in str(chat.identity())


def test_answers_are_told_as_they_come_and_those_under_way_after_a_failure_too() -> None:
    def refuse(handler):
        time.sleep(0.1)
        handler.send_error(401)

    def slow(handler):
        time.sleep(0.4)
        _raw(b"HTTP/1.1 200 OK\r\n\r\n" + completion("late").encode())(handler)

    def reply(messages):
        time.sleep(0.05)
        return "later"

    told: list[str] = []
    with Server([(200, {}, completion("early")), refuse, slow], reply) as server:
        chat = ChatEndpoint(server.url, "tiny", concurrency=3)
        with pytest.raises(ChatEndpointError, match="status 401"):
            chat(_ask(f"w{n}" for n in range(40)), on_answer=lambda row, answer: told.append(answer))
        assert {"early", "late"} <= set(told) and len(server.requests) < 10


@pytest.mark.parametrize("header, low, high", [("nan", 0, 0), ("inf", 9e9, np.inf), ("-3", 0, 0), ("soon", None, None),
                                               ("Mon, 01 Jan 99999 00:00:00 GMT", None, None)])  # fmt: skip
def test_any_retry_after_is_survived(header, low, high) -> None:
    from hf_genrec.generation.ranking.chat_client import _seconds_to_wait

    found = _seconds_to_wait(header)
    assert found is None if low is None else low <= found <= high


def test_parameters_that_are_no_json() -> None:
    for wrong in (float("nan"), object()):
        with pytest.raises(RequestError, match="cannot be written as JSON"):
            ChatEndpoint("http://h/v1", "tiny", temperature=wrong)
