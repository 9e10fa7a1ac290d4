"""A server with OpenAI's protocol as a ChatModel: requests with retries and rate limits, and errors in one line."""

from __future__ import annotations

import http.client
import json
import os
import random
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from strop.trainer.engines import OpenAI
from strop.trainer.errors import UserError
from strop.trainer.run.files import reason_of
from strop.trainer.sampling.base import Reply, Settings, Stopped

PASSING = {408, 409, 425, 429}  # and 5xx: statuses that may pass
FIRST_DELAY, LONGEST_DELAY = 0.5, 60.0  # seconds between tries, doubled every time, with jitter
LONGEST_WAIT = 600.0  # seconds that a server may ask to wait (Retry-After)
FEW = 2  # further tries if a server has never answered, or gives no choices
LONGEST_ANSWER = 64 << 20  # bytes
OVERLONG = ("context length", "context_length", "context size", "maximum context", "too many tokens", "too long")


class Passing(Exception):
    """A failure that may pass. wait: seconds that the server asks for, if it does."""

    def __init__(self, what: str, wait: float | None = None):
        super().__init__(what)
        self.wait = wait


class Unreached(Passing):
    """No connection to the server."""


class Pace:
    """Spends at most `per_minute` of something; may be called from several threads."""

    def __init__(self, per_minute: float | None):
        self.rate, self.lock, self.free = per_minute and per_minute / 60, threading.Lock(), 0.0

    def take(self, amount: float, sleep: Callable[[float], object]) -> None:
        """Waits until `amount` may be spent."""
        if self.rate:
            with self.lock:
                start = max(self.free, time.monotonic())
                self.free = start + amount / self.rate
            sleep(max(0.0, start - time.monotonic()))

    def give_back(self, amount: float) -> None:
        if self.rate:
            with self.lock:
                self.free -= amount / self.rate


class Server:
    """The model that a section with engine=openai names; `key` is the section's place in the recipe.

    ranks: how many processes share the rate limits. Raises UserError if the environment lacks the server's key.
    """

    def __init__(self, section: OpenAI, key: str, model: str | None = None, ranks: int = 1):
        self.section, self.key, self.model = section, key, model or section.model
        self.secret = None
        if section.key_env is not None:
            self.secret = os.environ.get(section.key_env, "").strip()
            if not self.secret or not (self.secret.isascii() and self.secret.isprintable()):
                state = "holds characters that no key has" if self.secret else "is not set"
                raise UserError(f"{key}.key_env={section.key_env}: this environment variable {state}; set it to the "
                                "server's key")
        at = urlsplit(section.base_url)
        self.https, self.host, self.port, self.path = at.scheme == "https", at.hostname, at.port, at.path
        share = ranks if ranks > 1 else 1
        self.requests = Pace(section.requests_per_minute and section.requests_per_minute / share)
        self.tokens = Pace(section.tokens_per_minute and section.tokens_per_minute / share)
        self.halt = threading.Event()  # set: requests that fail are not tried again
        self.not_before = 0.0  # the server asked all requests to wait until then
        self.answered = False

    def ask(self, messages: Sequence[dict], settings: Settings) -> Reply:
        """One completion. Raises UserError if the server refuses the request or keeps failing, Stopped after `halt`."""
        body = {"model": self.model, "messages": list(messages), "max_tokens": settings.max_new_tokens,
                "temperature": settings.temperature}
        body |= {"top_p": settings.top_p} if settings.top_p < 1 else {}
        body |= {"top_k": settings.top_k} if settings.top_k else {}
        body = {name: value for name, value in (body | self.section.request).items() if value is not None}
        expected = estimate(messages, settings)
        for tries in range(1, self.section.retries + 2):
            self._sleep(self.not_before - time.monotonic())
            self.requests.take(1, self._sleep)
            self.tokens.take(expected, self._sleep)
            try:
                reply = self._answer(*self._send("POST", "/chat/completions", body))
                used = (reply.prompt_tokens or 0) + (reply.completion_tokens or 0)
                self.tokens.give_back(expected - used if used else 0)
                return reply
            except Passing as e:
                self.tokens.give_back(expected)
                failure = e
            hopeless = isinstance(failure, Empty) or (isinstance(failure, Unreached) and not self.answered)
            last = tries > min(self.section.retries, FEW if hopeless else self.section.retries)
            if last and isinstance(failure, Empty):
                return Reply("", "empty", 0, 0, str(failure))
            if last:
                raise UserError(f"{self.key}.base_url={self.section.base_url}: {failure} ({tries} tries); see to the "
                                "server, or raise timeout and retries; answers so far are kept, and the same command "
                                "resumes") from failure
            if failure.wait is not None and failure.wait > LONGEST_WAIT:
                raise UserError(f"{self.key}.base_url={self.section.base_url}: {failure}, and asks to wait "
                                f"{failure.wait:,.0f} seconds; the same command resumes then") from failure
            delay = min(LONGEST_DELAY, FIRST_DELAY * 2 ** (tries - 1)) * random.uniform(0.5, 1.5)
            if failure.wait is not None:
                delay = failure.wait + random.uniform(0, min(1.0, failure.wait))
                self.not_before = max(self.not_before, time.monotonic() + failure.wait)
            self._sleep(delay)
        raise AssertionError("the last try returns or raises")

    def _sleep(self, seconds: float) -> None:
        if self.halt.wait(max(0.0, seconds)) if seconds > 0 else self.halt.is_set():
            raise Stopped

    def _send(self, method: str, path: str, body: dict | None = None) -> tuple[int, http.client.HTTPMessage, bytes]:
        """(status, headers, content). Raises Passing if there is no complete answer in time."""
        seconds, late = self.section.timeout, threading.Event()
        connection, target = self._connect(seconds)

        def cut() -> None:  # the socket's own timeout starts anew with every byte
            late.set()
            if connection.sock is not None:
                with suppress(OSError):
                    connection.sock.shutdown(socket.SHUT_RDWR)

        timer = threading.Timer(seconds, cut)
        timer.daemon = True
        timer.start()
        headers = {"Content-Type": "application/json", "Accept": "application/json", "Connection": "close"}
        if self.secret:
            headers["Authorization"] = f"Bearer {self.secret}"
        try:
            connection.connect()
        except (OSError, http.client.HTTPException) as e:
            timer.cancel()
            connection.close()
            if isinstance(e, ssl.SSLCertVerificationError):
                raise self._refused(f"its certificate is not valid ({reason_of(e)}); correct the address") from e
            raise Unreached(f"no answer within {seconds:g} seconds" if late.is_set() or isinstance(e, TimeoutError)
                            else f"cannot be reached ({reason_of(e)})") from e
        try:
            data = None if body is None else json.dumps(body).encode()
            connection.request(method, target + path, data, headers)
            response = connection.getresponse()
            content = response.read(LONGEST_ANSWER)
            if late.is_set():
                raise TimeoutError
            self.answered = True
            return response.status, response.headers, content
        except (OSError, http.client.HTTPException) as e:
            if late.is_set() or isinstance(e, TimeoutError):
                raise Passing(f"no complete answer within {seconds:g} seconds") from e
            raise Passing(f"the connection broke ({type(e).__name__}: {reason_of(e)})") from e
        finally:
            timer.cancel()
            connection.close()

    def _connect(self, seconds: float) -> tuple[http.client.HTTPConnection, str]:
        """(a connection, not yet open; what comes before a path in a request)"""
        kind = http.client.HTTPSConnection if self.https else http.client.HTTPConnection
        is_here = self.host in ("localhost", "::1") or self.host.startswith("127.")
        proxy = None if is_here or proxy_bypass(self.host) else getproxies().get("https" if self.https else "http")
        if not proxy:
            return kind(self.host, self.port, timeout=seconds), self.path
        at = urlsplit(proxy if "//" in proxy else f"//{proxy}")
        connection = kind(at.hostname, at.port, timeout=seconds)
        if self.https:
            connection.set_tunnel(self.host, self.port)
            return connection, self.path
        return connection, self.section.base_url

    def _answer(self, status: int, headers, content: bytes) -> Reply:
        if status == 200:
            return read_reply(content)
        said, code = complaint(content)
        said = said.replace(self.secret, "***") if self.secret else said
        said = f" ({said})" if said else ""
        if code == "insufficient_quota" or status == 402:
            raise self._refused(f"the account has no credit left{said}; add some", "key_env", self.section.key_env)
        if status in PASSING or status >= 500:
            raise Passing(f"answers with status {status}{said}", retry_after(headers))
        if status in (401, 403):
            name = self.section.key_env
            remedy = f"check the key in {name}" if name else "set it to the name of the variable that holds the key"
            raise self._refused(f"the server refuses the key, status {status}{said}; {remedy}", "key_env", name)
        if status == 404:
            there = self._served()
            if there:
                raise self._refused(f"the server has no such model{said}; it has: {', '.join(there)}", "model",
                                    self.model)
            raise self._refused(f"there is no such model or address, status 404{said}; correct model={self.model} or "
                                "base_url, which often ends in /v1")
        if status in (400, 413, 422) and any(words in said.lower() for words in OVERLONG):
            return Reply("", "overlong", 0, 0, said.strip(" ()")[:200])
        if status == 400 and (code == "content_filter" or "content management policy" in said):
            return Reply("", "refused", 0, 0, said.strip(" ()")[:200])
        raise self._refused(f"the server refuses the request, status {status}{said}; correct the keys of {self.key}, "
                            "its field request among them")

    def _refused(self, why: str, name: str = "base_url", value: str | None = None) -> UserError:
        value = self.section.base_url if name == "base_url" else value
        return UserError(f"{self.key}.{name}={value}: {why}")

    def _served(self) -> list[str]:
        """Names of the server's models, at most ten; empty if it does not tell."""
        try:
            status, _, content = self._send("GET", "/models")
            names = [str(model["id"]) for model in json.loads(content)["data"]] if status == 200 else []
        except (Passing, ValueError, KeyError, TypeError):
            return []
        return [] if self.model in names else names[:10]


class Empty(Passing):
    """A good answer without a choice: some servers give that if they refuse a prompt."""


def estimate(messages: Sequence[dict], settings: Settings) -> int:
    """Tokens that a request may use, at most."""
    return sum(len(str(m.get("content") or "")) // 3 + 8 for m in messages) + settings.max_new_tokens


def read_reply(content: bytes) -> Reply:
    """The first choice of an answer. Raises Passing if the content is not such an answer."""
    try:
        data = json.loads(content)
    except (ValueError, RecursionError) as e:
        raise Passing(f"the answer is not JSON, {len(content):,} bytes that begin with {content[:40]!r}") from e
    try:
        if data.get("error"):
            raise Passing(f"answers with an error: {complaint(content)[0]}")
        if not data["choices"]:
            raise Empty("the answer has no choices")
        choice, usage = data["choices"][0], data.get("usage") or {}
        message, finish = choice["message"], choice.get("finish_reason")
        text = message.get("content") or ""
        if isinstance(text, list):
            text = "".join(part.get("text", "") for part in text)
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # half a character is no text
        counts = [int(usage[name]) if usage.get(name) is not None else None
                  for name in ("prompt_tokens", "completion_tokens")]
    except (AttributeError, LookupError, TypeError, ValueError) as e:
        raise Passing(f"the answer is not a chat completion (begins with {content[:40]!r})") from e
    detail = ""
    if message.get("refusal") or finish == "content_filter":
        finish, detail = "refused", str(message.get("refusal") or finish)[:200]
    elif finish == "length":
        pass
    elif finish in ("error", "abort"):
        raise Passing(f"the answer ended with finish_reason={finish}")
    elif not text.strip():
        detail, finish = str(finish or ""), "empty"
    else:
        finish = "stop"
    return Reply(text, finish, *counts, detail)


def complaint(content: bytes) -> tuple[str, str]:
    """(message, code) of a server's error, shortened; empty where there is none."""
    try:
        error = json.loads(content)
        error = error.get("error", error.get("detail", error)) if isinstance(error, dict) else error
        if isinstance(error, dict):
            return " ".join(str(error.get("message") or error).split())[:300], str(error.get("code") or "")
        return " ".join(str(error).split())[:300], ""
    except (ValueError, RecursionError):
        return " ".join(content[:300].decode("utf-8", "replace").split()), ""


def retry_after(headers) -> float | None:
    """Seconds that the header Retry-After asks for."""
    value = (headers.get("Retry-After") or "").strip()
    for read in (float, lambda date: parsedate_to_datetime(date).timestamp() - time.time()):
        with suppress(ValueError, TypeError, OverflowError):
            return max(0.0, read(value))
    return None
