"""What writes completions: `Sampler` for token ids with log-probs, `ChatModel` for messages and text, and a fake."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol


@dataclass
class Completion:
    """tokens: as sampled, with the stop token. logp: summed over them at temperature 1, in nats; None if unknown.
    logps: that of each token, if the in-process sampler wrote it. finish: "stop", "length", or why there is nothing to
    use, with `detail`. text: if it was written as text, and `tokens` are its encoding; else None."""

    tokens: list[int] = field(default_factory=list)
    logp: float | None = 0.0
    finish: str = ""
    text: str | None = None
    detail: str = ""
    logps: list[float] = field(default_factory=list)

    def take(self, token: int, logp: float, stop: Collection[int], most: int) -> bool:
        """Appends a drawn token; whether it is the last: one of `stop`, or number `most`."""
        self.tokens.append(token)
        self.logp += logp
        self.logps.append(logp)
        if token in stop or len(self.tokens) == most:
            self.finish = "stop" if token in stop else "length"
        return bool(self.finish)


@dataclass(frozen=True)
class Settings:
    """How to draw: temperature 0 is greedy; top_k=0 and top_p=1 are off. seed: of engines that are deterministic."""

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    stop_ids: frozenset[int] = frozenset()
    seed: int = 0


@dataclass(frozen=True)
class Reply:
    """A chat model's answer. finish: "stop", "length" (cut), "refused" or "empty"; detail: what was said about it.
    prompt_tokens, completion_tokens: as the model counts them, None if it does not say."""

    text: str
    finish: str
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    detail: str = ""


class Sampler(Protocol):
    """Continues token ids."""

    def sample(self, prompts: Sequence[Sequence[int]], n: int, settings: Settings, *, ids: Sequence[str],
               first: int = 0, on_progress: Callable[[int, int], None] | None = None) -> list[list[Completion]]:
        """Completions number `first` to `first + n - 1` of every prompt, in the prompts' order. ids: names of the
        prompts, which seed their draws. on_progress(completions finished, tokens drawn)."""

    def expect(self, prompts: Sequence[Sequence[int]], n: int, settings: Settings, *, ids: Sequence[str],
               first: int = 0) -> None:
        """Says what the call of `sample` after the next one gets, so that it can be prepared."""

    def close(self) -> None:
        """Frees its memory and ends its processes."""


class Stopped(Exception):
    """A request was given up because `halt` is set."""


class ChatModel(Protocol):
    """Answers messages. May be called from several threads. Once `halt` is set, nothing is tried again."""

    halt: threading.Event

    def ask(self, messages: Sequence[dict], settings: Settings) -> Reply:
        """Raises UserError if no answer can be had, and Stopped."""


@dataclass
class Fake:
    """A deterministic Sampler and ChatModel: the answer to a prompt depends on the prompt and on the number
    of times that it was drawn or asked.

    tokens: what completions are drawn from. answer(text of the last message, number) -> text.
    """

    tokens: Sequence[int] = (3, 4, 5)
    answer: Callable[[str, int], str] = lambda text, i: f"answer {i} to {text}"
    asked: dict[str, int] = field(default_factory=dict)
    halt: threading.Event = field(default_factory=threading.Event)
    closed: bool = False

    def sample(self, prompts, n, settings, *, ids, first=0, on_progress=None):
        return [[self._draw(prompt, i, settings) for i in range(first, first + n)] for prompt in prompts]

    def expect(self, prompts, n, settings, *, ids, first=0):
        pass

    def _draw(self, prompt: Sequence[int], i: int, settings: Settings) -> Completion:
        draws = hashlib.blake2b(f"{settings.seed}:{list(prompt)}:{i}".encode()).digest()
        length = 1 + draws[0] % settings.max_new_tokens
        tokens = [self.tokens[draws[1 + j % 63] % len(self.tokens)] for j in range(length - 1)]
        end = min(settings.stop_ids) if settings.stop_ids and draws[0] % 4 else self.tokens[0]
        return Completion([*tokens, end], -float(length), "stop" if end in settings.stop_ids else "length")

    def ask(self, messages: Sequence[dict], settings: Settings) -> Reply:
        text = messages[-1]["content"]
        self.asked[text] = self.asked.get(text, 0) + 1
        said = self.answer(text, self.asked[text] - 1)
        return Reply(said, "stop" if said else "empty", len(text.split()), len(said.split()))

    def close(self) -> None:
        self.closed = True
