"""A client of servers that speak OpenAI's chat protocol (vLLM, SGLang, llama.cpp, hosted ones), standard library only.

`POST {base_url}/chat/completions`, a few requests at a time, answers in the order of the questions. Rate limits and failures
of the server are waited for and tried again; what cannot get better by waiting fails at once, naming the fix. The key goes
into the request header and nowhere else: no message, no answer and no `repr` shows it, and redirects are not followed.
"""

from __future__ import annotations

import email.utils
import http.client
import json
import logging
import re
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any
from urllib.parse import urlsplit

from ...errors import GenRecError, RequestError
from .prompts import Message

logger = logging.getLogger(__name__)

_TRY_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529)
_LONGEST_ANSWER = 2**24  # bytes of a response that are read
_LONGEST_COMPLAINT = 4096  # bytes of an error's text that are read
_HINTS = {
    400: "the server does not accept the request (a prompt longer than its context, or an option it does not know)",
    401: "check api_key",
    403: "check api_key and what it may use",
    404: "check base_url (it ends in /v1 for most servers) and the name of the model",
    413: "the prompt is too long: lower max_history or the number of candidates",
    422: "the server does not know one of the options",
    **dict.fromkeys(
        (301, 302, 303, 307, 308), "redirects are not followed, as they carry the key away: give the final base_url"
    ),
}


class ChatEndpointError(GenRecError):
    """A chat server cannot be reached, refuses a request, or answers with something that is no chat completion."""


class ChatEndpoint:
    """A remote chat model as a chat function: `chat(conversations) -> answers`.

    Args:
        base_url: up to and without "/chat/completions", e.g. "http://localhost:8000/v1".
        model: name of the model at the server.
        api_key: sent as a bearer token; None sends none.
        timeout: seconds until the server must have begun to answer, and seconds until its answer must be complete.
        retries: further attempts after a rate limit, a failure of the server or a broken connection.
        backoff, max_backoff: seconds before the second attempt, doubled each time, and their limit. Where the server says
            how long to wait (`Retry-After`), that is done instead, within the same limit.
        concurrency: requests under way at a time.
        parameters: more fields of the request; authors of LLMRank: `temperature=0.2, max_tokens=512`.

    Attributes:
        requests: requests sent so far, further attempts included.

    Raises:
        RequestError: a URL that is not http(s) or that no request can go to, a number out of range, parameters that are no
            JSON.
        ChatEndpointError: (when called) see above.

    Example:
        >>> ChatEndpoint("http://localhost:8000/v1", "qwen3", api_key="secret")
        ChatEndpoint('http://localhost:8000/v1', 'qwen3')
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        api_key: str | None = None,
        *,
        timeout: float = 60.0,
        retries: int = 5,
        backoff: float = 1.0,
        max_backoff: float = 60.0,
        concurrency: int = 8,
        **parameters: Any,
    ) -> None:
        _check_address(base_url)
        if not timeout > 0 or retries < 0 or not backoff >= 0 or not max_backoff >= 0 or concurrency < 1:
            raise RequestError(
                "timeout must be above 0, retries and both backoffs at least 0, concurrency at least 1; got "
                f"{timeout}, {retries}, {backoff}, {max_backoff}, {concurrency}."
            )
        if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
            raise RequestError("api_key holds characters that no header may hold (a line break at its end?).")
        if {"messages", "model", "stream", "n"} & parameters.keys():
            raise RequestError("messages, model, stream and n are set by the client and cannot be given as parameters.")
        try:
            json.dumps(parameters, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise RequestError(f"parameters cannot be written as JSON: {error}; use plain values.") from error
        self.base_url, self.model, self.parameters = base_url.rstrip("/"), model, parameters
        self.timeout, self.retries, self.concurrency = timeout, retries, concurrency
        self.backoff, self.max_backoff = backoff, max_backoff
        self.requests = 0
        self._lock = threading.Lock()
        self._key = api_key
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._opener = urllib.request.build_opener(_NoRedirects)

    def __repr__(self) -> str:
        return f"ChatEndpoint({self.base_url!r}, {self.model!r})"

    def identity(self) -> dict[str, Any]:
        """What of this object an answer depends on, as JSON values (see `AnswerCache`); not the key."""
        return {"endpoint": self.base_url, "model": self.model, "parameters": self.parameters}

    def __call__(
        self, conversations: Sequence[Sequence[Message]], on_answer: Callable[[int, str], None] | None = None
    ) -> list[str]:
        """One answer per conversation.

        Args:
            on_answer: called with the row and the answer as soon as it is there, one at a time, from several threads. What
                is under way when another request fails, or when the run is interrupted, still comes to it.
        """
        stop = threading.Event()
        told = threading.Event()

        def ask(row: int, messages: list[Message]) -> str:
            answer = self._ask(messages, stop, told)
            if on_answer is not None:
                with self._lock:
                    on_answer(row, answer)
            return answer

        with ThreadPoolExecutor(self.concurrency) as pool:
            futures = [pool.submit(ask, row, list(messages)) for row, messages in enumerate(conversations)]
            try:
                for future in as_completed(futures):
                    future.result()
            finally:  # after a failure, what has not begun need not begin, and nothing is waited for
                stop.set()
                for future in futures:
                    future.cancel()
            return [future.result() for future in futures]

    def _ask(self, messages: list[Message], stop: threading.Event, told: threading.Event) -> str:
        body = json.dumps({"model": self.model, "messages": messages, **self.parameters}).encode()
        attempt = 0
        while True:
            try:
                return self._attempt(body)
            except _Trouble as trouble:
                problem, hint, again, wait = trouble.args
            if not again:
                raise self._failed(problem, hint)
            seconds = min(self.max_backoff, self.backoff * 2.0 ** min(attempt, 60) if wait is None else wait)
            if attempt < self.retries and not told.is_set():  # once per call: its requests have the same trouble
                told.set()
                logger.warning("%s: %s; waiting and trying again", self.base_url, self._without_key(problem))
            attempt += 1
            if attempt > self.retries or stop.wait(seconds):
                raise self._failed(f"{problem} ({attempt} attempts)", hint)

    def _attempt(self, body: bytes) -> str:
        """One request; `_Trouble` where it fails."""
        request = urllib.request.Request(f"{self.base_url}/chat/completions", body, self._headers, method="POST")
        with self._lock:
            self.requests += 1
        try:
            with self._opener.open(request, timeout=self.timeout) as response:
                return self._content(_read(response, _LONGEST_ANSWER + 1, self.timeout))
        except urllib.error.HTTPError as error:
            with error:
                message, out_of_money = _complaint(error, self.timeout)
                problem = f"status {error.code}: {message}"
                again = error.code in _TRY_AGAIN and not out_of_money
                wait = _seconds_to_wait(error.headers.get("Retry-After"))
                raise _Trouble(problem, _HINTS.get(error.code), again, wait) from None
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            hint, again = self._what_to_do(reason)
            raise _Trouble(f"{type(error).__name__}: {error}", hint, again, None) from None

    def _what_to_do(self, reason: Any) -> tuple[str, bool]:
        """A hint, and whether another attempt may succeed, for a request that got no response."""
        if isinstance(reason, TimeoutError):
            return f"raise timeout (now {self.timeout:g} s), or lower concurrency or the length of answers", True
        if isinstance(reason, ssl.SSLError) and not isinstance(reason, (ssl.SSLEOFError, ssl.SSLZeroReturnError)):
            return "no secure connection: check base_url (https or http?) and the server's certificate", False
        if isinstance(reason, socket.gaierror) and reason.errno == socket.EAI_NONAME:
            return "no machine has this name: check base_url", False
        if isinstance(reason, http.client.BadStatusLine) and not isinstance(reason, ConnectionError):
            return "this is no HTTP server: check base_url (https or http?) and its port", False
        if isinstance(reason, (http.client.InvalidURL, UnicodeError)):
            return "check base_url", False
        return "is the server running, and base_url right?", True  # refused, reset, cut off

    def _content(self, raw: bytes) -> str:
        if len(raw) > _LONGEST_ANSWER:
            raise self._failed(f"a response of more than {_LONGEST_ANSWER} bytes", "set max_tokens")
        try:
            content = json.loads(raw)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError, RecursionError):
            start = raw[:200].decode("utf-8", "replace")
            raise self._failed(f"a response that is no chat completion: {start!r}", "check base_url") from None
        if content is None:  # a model that only thought, or was filtered, has said nothing
            return ""
        if not isinstance(content, str):
            raise self._failed(f"a message whose content is a {type(content).__name__}", "use a text model")
        return self._without_key(content)

    def _failed(self, problem: str, hint: str | None) -> ChatEndpointError:
        text = f"{self.base_url} ({self.model}): {problem}" + (f"; {hint}." if hint else ".")
        return ChatEndpointError(self._without_key(text))

    def _without_key(self, text: str) -> str:
        """Servers may repeat what they were sent."""
        return text.replace(self._key, "[api_key]") if self._key else text


class _Trouble(Exception):
    """A failed attempt: (problem, hint, may another attempt succeed, seconds to wait before it)."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host, and turn the request into a GET."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _check_address(base_url: str) -> None:
    """Find what no request could go to before the first one is made, waited for and made again."""
    begin = "base_url must look like http://host:port/v1"
    try:
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
            raise RequestError(f"{begin}, without user or password; give api_key=....")
        if not re.fullmatch("[!-~]+", base_url) or parts.query or parts.fragment:
            raise RequestError(f"{begin}, without blanks, query or letters other than ASCII; got {base_url!r}.")
        if parts.port == 0:
            raise RequestError(f"{begin} with a port of 1 to 65535; got 0.")
        parts.hostname.encode("idna")  # an empty or overlong label
    except RequestError:
        raise
    except ValueError as error:  # of a port, of brackets, of a host
        raise RequestError(f"{begin}: {error}.") from error


def _read(response: Any, limit: int, timeout: float) -> bytes:
    """At most `limit` bytes; a server that sends them one by one does not hold the request for ever."""
    deadline = time.monotonic() + timeout
    parts: list[bytes] = []
    left = limit
    while left and (part := response.read1(min(left, 2**16))):
        parts.append(part)
        left -= len(part)
        if time.monotonic() > deadline:
            raise TimeoutError("the response was not complete in time")
    if left and response.length:  # closed before its end
        raise http.client.IncompleteRead(b"", response.length)
    return b"".join(parts)


def _complaint(error: urllib.error.HTTPError, timeout: float) -> tuple[str, bool]:
    """What the server says, one short printable line, and whether it is about an account without money."""
    try:
        text = _read(error, _LONGEST_COMPLAINT, timeout).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        text = ""
    out_of_money = "insufficient_quota" in text
    try:
        found = json.loads(text)
        found = found.get("error", found.get("message", found))
        text = str(found.get("message", found) if isinstance(found, dict) else found)
    except (ValueError, AttributeError, RecursionError):
        pass
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    return " ".join(text.split())[:300] or str(error.reason), out_of_money


def _seconds_to_wait(header: str | None) -> float | None:
    """`Retry-After` in seconds: a number or a date."""
    if not header:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError, OSError):
        return None
