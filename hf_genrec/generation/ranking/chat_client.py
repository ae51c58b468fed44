"""A client of servers that speak OpenAI's chat protocol (vLLM, SGLang, llama.cpp, hosted ones), standard library only.

`POST {base_url}/chat/completions`, a few requests at a time, answers in the order of the questions. Rate limits and failures
of the server are waited for and tried again; what cannot get better by waiting fails at once, naming the fix. The key goes
into the request header and nowhere else: no message and no `repr` shows it, and redirects are not followed.
"""

from __future__ import annotations

import email.utils
import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

from ...errors import GenRecError, RequestError
from .prompts import Message

_TRY_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)
_LONGEST_ANSWER = 2**24  # bytes of a response that are read
_HINTS = {
    400: "the server does not accept the request (a prompt longer than its context, or an option it does not know)",
    401: "check api_key",
    403: "check api_key and what it may use",
    404: "check base_url (it ends in /v1 for most servers) and the name of the model",
    413: "the prompt is too long: lower max_history or the number of candidates",
    422: "the server does not know one of the options",
}


class ChatEndpointError(GenRecError):
    """A chat server cannot be reached, refuses a request, or answers with something that is no chat completion."""


class ChatEndpoint:
    """A remote chat model as a chat function: `chat(conversations) -> answers`.

    Args:
        base_url: up to and without "/chat/completions", e.g. "http://localhost:8000/v1".
        model: name of the model at the server.
        api_key: sent as a bearer token; None sends none.
        timeout: seconds a request may take.
        retries: further attempts after a rate limit, a failure of the server or a broken connection.
        backoff, max_backoff: seconds before the second attempt, doubled each time, and their limit. Where the server says
            how long to wait (`Retry-After`), that is done instead, within the same limit.
        concurrency: requests under way at a time.
        parameters: more fields of the request; authors of LLMRank: `temperature=0.2, max_tokens=512`.

    Raises:
        RequestError: a URL that is not http(s), or a number out of range.
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
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
            raise RequestError(
                "base_url must look like http://host:port/v1, without user or password; give api_key=...."
            )
        if timeout <= 0 or retries < 0 or backoff < 0 or max_backoff < 0 or concurrency < 1:
            raise RequestError(
                "timeout must be above 0, retries and both backoffs at least 0, concurrency at least 1; got "
                f"{timeout}, {retries}, {backoff}, {max_backoff}, {concurrency}."
            )
        if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
            raise RequestError("api_key holds characters that no header may hold (a line break at its end?).")
        if {"messages", "model", "stream", "n"} & parameters.keys():
            raise RequestError("messages, model, stream and n are set by the client and cannot be given as parameters.")
        self.base_url, self.model, self.parameters = base_url.rstrip("/"), model, parameters
        self.timeout, self.retries, self.concurrency = timeout, retries, concurrency
        self.backoff, self.max_backoff = backoff, max_backoff
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._opener = urllib.request.build_opener(_NoRedirects)

    def __repr__(self) -> str:
        return f"ChatEndpoint({self.base_url!r}, {self.model!r})"

    def __call__(self, conversations: Sequence[Sequence[Message]]) -> list[str]:
        """One answer per conversation."""
        with ThreadPoolExecutor(self.concurrency) as pool:
            futures = [pool.submit(self._ask, list(messages)) for messages in conversations]
            try:
                return [future.result() for future in futures]
            finally:  # after a failure, what has not begun need not begin
                for future in futures:
                    future.cancel()

    def _ask(self, messages: list[Message]) -> str:
        body = json.dumps({"model": self.model, "messages": messages, **self.parameters}).encode()
        attempt = 0
        while True:
            request = urllib.request.Request(f"{self.base_url}/chat/completions", body, self._headers, method="POST")
            wait: float | None = None
            try:
                with self._opener.open(request, timeout=self.timeout) as response:
                    return self._content(response.read(_LONGEST_ANSWER + 1))
            except urllib.error.HTTPError as error:
                with error:
                    problem = f"status {error.code}: {_server_message(error)}"
                    hint = _HINTS.get(error.code)
                    if error.code not in _TRY_AGAIN:
                        raise self._failed(problem, hint) from None
                    wait = _seconds_to_wait(error.headers.get("Retry-After"))
            except (OSError, http.client.HTTPException) as error:  # refused, reset, timed out, cut off
                problem, hint = f"{type(error).__name__}: {error}", "is the server running, and base_url right?"
            if attempt >= self.retries:
                raise self._failed(f"{problem} ({attempt + 1} attempts)", hint)
            time.sleep(min(self.max_backoff, self.backoff * 2**attempt if wait is None else wait))
            attempt += 1

    def _content(self, raw: bytes) -> str:
        if len(raw) > _LONGEST_ANSWER:
            raise self._failed(f"a response of more than {_LONGEST_ANSWER} bytes", "set max_tokens")
        try:
            content = json.loads(raw)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError):
            start = raw[:200].decode("utf-8", "replace")
            raise self._failed(f"a response that is no chat completion: {start!r}", "check base_url") from None
        if content is None:  # a model that only thought, or was filtered, has said nothing
            return ""
        if not isinstance(content, str):
            raise self._failed(f"a message whose content is a {type(content).__name__}", "use a text model")
        return content

    def _failed(self, problem: str, hint: str | None) -> ChatEndpointError:
        return ChatEndpointError(f"{self.base_url} ({self.model}): {problem}" + (f"; {hint}." if hint else "."))


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host, and turn the request into a GET."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _server_message(error: urllib.error.HTTPError) -> str:
    """What the server says, one short line."""
    try:
        text = error.read(4096).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        return str(error.reason)
    try:
        found = json.loads(text)
        found = found.get("error", found.get("message", found))
        text = str(found.get("message", found) if isinstance(found, dict) else found)
    except (ValueError, AttributeError):
        pass
    return " ".join(text.split())[:300] or str(error.reason)


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
    except (ValueError, TypeError):
        return None
