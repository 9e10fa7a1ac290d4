"""A writer of completions without a model."""

import hashlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from strop.trainer.sampling.base import Completion, Reply, Settings


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
