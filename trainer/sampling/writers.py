"""Opens the engine that a section of the recipe names, as a writer of completions in the student's tokens.

The student is the model that learns from them. An engine that runs a model with the student's tokenizer and template
gets token ids; from any other one comes text, which is encoded as the student's template renders it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from strop.trainer.config import Part
from strop.trainer.data.chat import encode_completion, prompt_tokens, stop_ids
from strop.trainer.data.splits import hash_int
from strop.trainer.engines import InProcess, OpenAI
from strop.trainer.errors import UserError, is_out_of_memory
from strop.trainer.models.loading import DTYPES, ModelFolder
from strop.trainer.run.store import Stage
from strop.trainer.sampling.asking import Journal, Pool, Question
from strop.trainer.sampling.base import Completion, Reply, Sampler, Settings
from strop.trainer.sampling.in_process import Generator, load_for_generation
from strop.trainer.sampling.openai import Server
from strop.trainer.sampling.shards import Writer
from strop.trainer.sampling.vllm import VllmSampler


@dataclass(frozen=True)
class Job:
    """What a stage wants written. section: the engine's; key: its place in the recipe. weights: the model that writes;
    of a server, what {weights} stands for. student: whose tokens are wanted; tokenizer: the student's. asked_as: tells
    questions of this job from others of its stage. compute: the recipe's dtype."""

    stage: Stage
    section: InProcess | OpenAI
    key: str
    weights: ModelFolder
    student: ModelFolder
    tokenizer: object
    settings: Settings
    compute: Part
    rows: list[dict]
    asked_as: str = ""


def open_writer(job: Job) -> Writer:
    """Raises UserError if the engine does not start."""
    if isinstance(job.section, OpenAI):
        return ServerWriter(job)
    own = None
    if job.weights.path != job.student.path:
        own = job.weights.tokenizer()
        own = None if same_tokens(own, job.tokenizer) else own
    settings, rows = job.settings, job.rows
    if own is not None:
        settings = Settings(**vars(settings) | {"stop_ids": frozenset(stop_ids(own, job.weights.path))})
        rows = [row | {"tokens": prompt_tokens(own, row)} for row in rows]
    dtype, world = DTYPES[job.compute.dtype], job.stage.world
    if isinstance(job.section, InProcess):
        sampler: Sampler = InProcessSampler(job.weights, dtype, world.device, job.section.batch_size, job.key)
    else:
        longest = max(len(row["tokens"]) for row in rows) + settings.max_new_tokens
        sampler = VllmSampler(job, rows, longest, dtype)
    return SamplerWriter(sampler, settings, own, job)


def same_tokens(one, other) -> bool:
    """Whether two tokenizers turn messages into the same tokens."""
    return one.get_chat_template() == other.get_chat_template() and one.get_vocab() == other.get_vocab() and (
        getattr(one, "backend_tokenizer", one).to_str() == getattr(other, "backend_tokenizer", other).to_str()
        if hasattr(getattr(one, "backend_tokenizer", one), "to_str") else type(one) is type(other))


class InProcessSampler:
    """Strop's own engine as a Sampler. key: of its section in the recipe."""

    def __init__(self, folder: ModelFolder, dtype, device, batch_size: int, key: str):
        self.generator = Generator(load_for_generation(folder, dtype, device))
        self.batch_size, self.key = batch_size, key

    def sample(self, prompts, n, settings: Settings, *, ids, first=0, on_progress=None):
        """Raises UserError if it runs out of memory: a smaller batch rounds otherwise, so it is the user's choice."""
        try:
            return self.generator.generate(prompts, **self._options(n, settings, ids, first), on_progress=on_progress)
        except Exception as e:
            if not is_out_of_memory(e):
                raise
            remedy = f"set {self.key}.batch_size={self.batch_size // 2}" if self.batch_size > 1 else \
                f"lower {self.key}.max_new_tokens"
            raise UserError(f"{self.key}.batch_size={self.batch_size}: out of memory while sampling; {remedy}, or see "
                            "what fits with --plan") from e

    def expect(self, prompts, n, settings: Settings, *, ids, first=0) -> None:
        self.generator.expect(prompts, **self._options(n, settings, ids, first))

    def _options(self, n: int, settings: Settings, ids: Sequence[str], first: int) -> dict:
        return {"k": n, "ids": ids, "seed": hash_int(settings.seed, "from", first) if first else settings.seed,
                "max_new_tokens": settings.max_new_tokens, "temperature": settings.temperature,
                "top_k": settings.top_k, "top_p": settings.top_p, "stop_ids": settings.stop_ids,
                "batch_size": self.batch_size}

    def close(self) -> None:
        self.generator = None


class SamplerWriter:
    """own: the tokenizer of a model whose tokens are not the student's."""

    def __init__(self, sampler: Sampler, settings: Settings, own, job: Job):
        self.sampler, self.settings, self.own, self.job = sampler, settings, own, job

    def _prompts(self, rows: list[dict]) -> list[list[int]]:
        return [row["tokens"] if self.own is None else prompt_tokens(self.own, row) for row in rows]

    def expect(self, rows, n, first):
        self.sampler.expect(self._prompts(rows), n, self.settings, ids=[row["prompt_id"] for row in rows], first=first)

    def write(self, rows, n, first, on_progress):
        found = self.sampler.sample(self._prompts(rows), n, self.settings, ids=[row["prompt_id"] for row in rows],
                                    first=first, on_progress=on_progress)
        if self.own is None:
            return found
        return [[as_tokens(self.job, row, Completion([], c.logp, c.finish, self.own.decode(
            c.tokens, skip_special_tokens=True))) for c in drawn] for row, drawn in zip(rows, found, strict=True)]

    def close(self) -> None:
        self.sampler.close()


class ServerWriter:
    def __init__(self, job: Job):
        section, world = job.section, job.stage.world
        name = section.model.replace("{weights}", str(Path(job.weights.path).resolve()))
        self.job, self.journal = job, Journal(job.stage)
        self.pool = Pool(Server(section, job.key, name, world.size), job.settings, self.journal,
                         concurrency=section.concurrency, budget=section.budget, key=job.key)

    def expect(self, rows, n, first):
        pass

    def write(self, rows, n, first, on_progress):
        def length(text: str) -> int:
            return len(self.job.tokenizer(text, add_special_tokens=False)["input_ids"])

        questions = [Question((self.job.asked_as, row["prompt_id"], s), row["messages"], len(row["tokens"]), length)
                     for row in rows for s in range(first, first + n)]
        on_progress(sum(q.id in self.journal.replies for q in questions), 0)
        replies = self.pool.ask(questions, lambda reply: on_progress(1, reply.completion_tokens or 0))
        return [[self._completion(row, replies[self.job.asked_as, row["prompt_id"], s])
                 for s in range(first, first + n)] for row in rows]

    def _completion(self, row: dict, reply: Reply) -> Completion:
        return as_tokens(self.job, row, Completion([], None, reply.finish, reply.text, reply.detail))

    def close(self) -> None:
        self.journal.close()


def as_tokens(job: Job, row: dict, written: Completion) -> Completion:
    """A completion of text with its tokens: what the template renders after the prompt, end of turn included; the text
    alone if it is cut. `finish` says why if there are none."""
    if written.finish == "length":
        written.tokens = job.tokenizer(written.text, add_special_tokens=False)["input_ids"]
    elif written.finish == "stop" and not written.text.strip():
        written.finish = "empty"
    elif written.finish == "stop":
        try:
            answer = {"role": "assistant", "content": written.text}
            written.tokens = encode_completion(job.tokenizer, row["messages"], [answer]).tokens
        except UserError as e:
            written.finish, written.detail = "template", str(e)
        total, room = len(row["tokens"]) + len(written.tokens), job.student.context_length()
        if total > room:
            written.finish, written.detail = "overlong", f"{total} tokens, {room} fit"
    return written


def until_enough(writer: Writer, rows: list[dict], n: int, enough: int, is_correct: Callable[[dict, Completion], bool],
                 on_progress: Callable[[int, int], None]) -> list[list[Completion]]:
    """Up to `n` completions of each row, in waves that double; a row with `enough` correct ones gets no more."""
    done: list[list[Completion]] = [[] for _ in rows]
    correct, first = [0] * len(rows), 0
    while first < n and (active := [i for i in range(len(rows)) if correct[i] < enough]):
        size = min(n - first, max(enough, first))
        for i, drawn in zip(active, writer.write([rows[i] for i in active], size, first, on_progress), strict=True):
            done[i] += drawn
            correct[i] += sum(is_correct(rows[i], c) for c in drawn)
        first += size
    on_progress(sum(n - len(drawn) for drawn in done), 0)
    return done
