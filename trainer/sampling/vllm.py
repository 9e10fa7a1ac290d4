"""vLLM for samples and for judges: an engine per replica in a process group of its own, started for one set of
weights."""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from strop.trainer.engines import Vllm
from strop.trainer.errors import UserError
from strop.trainer.models.loading import ModelFolder
from strop.trainer.run.store import Stage
from strop.trainer.run.world import World
from strop.trainer.sampling.base import Completion, Settings

if TYPE_CHECKING:
    from strop.trainer.sampling.writers import Job

WORKER = Path(__file__).with_name("vllm_worker.py")
CHECKED, LONGEST_CHECKED, CHECKED_TOKENS = 4, 512, 8  # the check of weights: prompts, their tokens, tokens after them
# mean difference per token of vLLM's log-probs from ours that passes, by dtype
TOLERANCE = {torch.float32: 0.01, torch.bfloat16: 0.1}
PATIENCE = 20.0  # seconds for an engine to end by itself


class Replicas:
    """Engines of one model. Raises UserError if vLLM does not start, or if its log-probs are not those of the weights.

    key: the section's place in the recipe. prompts: token ids for the check, the first few. longest: most tokens of a
    prompt and what follows it."""

    def __init__(self, stage: Stage, section: Vllm, key: str, weights: ModelFolder, prompts: Sequence[Sequence[int]],
                 longest: int, dtype: torch.dtype, seed: int = 0):
        self.key, self.section, self.name = key, section, stage.name
        world = stage.world
        room = min(LONGEST_CHECKED, weights.context_length() - CHECKED_TOKENS - 1)
        expected = own_logprobs(weights, dtype, world.device, [list(prompt[:room]) for prompt in prompts[:CHECKED]])
        longest = max(longest, *(len(tokens) + 1 for tokens, _ in expected))
        load = {"model": str(weights.path.resolve()), "dtype": str(dtype).removeprefix("torch."),
                "skip_tokenizer_init": True, "generation_config": "vllm", "enable_prefix_caching": True,
                "max_model_len": longest, "trust_remote_code": weights.options.trust_remote_code,
                "tensor_parallel_size": self.section.tensor_parallel_size, "disable_log_stats": True,
                "gpu_memory_utilization": self.section.memory or (0.85 if world.device.type == "cuda" else 0.3)}
        self.replicas: list[Replica] = []
        started = time.monotonic()
        try:
            for i, devices in enumerate(placement(world, self.section, self.key)):
                own = {"seed": (seed + 7919 * (world.rank * 1024 + i)) % (1 << 31)}
                log = stage.work / f"vllm-{world.rank:03}-{i:03}-{re.sub('[^A-Za-z0-9]+', '-', key)}.log"
                replica = Replica(self.section.python or sys.executable, devices, log, self.key, self.section)
                self.replicas.append(replica)
                replica.send(load=load | own | self.section.engine_args)
            versions = [replica.receive()["ready"] for replica in self.replicas]
            gap = self._check(expected, dtype)
        except BaseException:
            self.close()
            raise
        stage.console.line(f"{stage.name}: vLLM {versions[0]}, {len(versions)} replica(s), ready after "
                           f"{time.monotonic() - started:.0f} s; its log-probs are within {gap:.1g} of ours")

    def _check(self, expected: list[tuple[list[int], list[float]]], dtype: torch.dtype) -> float:
        """Largest mean difference of a replica's log-probs per token from ours."""
        worst = 0.0
        for replica in self.replicas:
            replica.send(logprobs=[tokens for tokens, _ in expected], last=[len(ours) for _, ours in expected])
            found = replica.receive()["done"]
            gaps = [abs(a - b) for theirs, (_, ours) in zip(found, expected, strict=True)
                    for a, b in zip(theirs, ours, strict=True)]
            mean = sum(gaps) / max(1, len(gaps))
            if not mean <= TOLERANCE[dtype]:  # NaN fails too
                raise UserError(f"{self.name}: vLLM's log-probs differ from those of the weights by {mean:.2g} per "
                                f"token, {TOLERANCE[dtype]:g} passes: it serves other weights, or computes this model "
                                f"in another way; nothing was sampled. Correct {self.key}.engine_args or use "
                                f"{self.key}.engine=in_process")
            worst = max(worst, mean)
        return worst

    def each(self, n: int, question: Callable[[list[int]], dict]) -> Iterator[tuple[int, Any]]:
        """(place, answer) of n parts of a question that the replicas share; question(places) -> what one is asked."""
        shares = [list(range(n))[i::len(self.replicas)] for i in range(len(self.replicas))]
        busy = [(replica, share) for replica, share in zip(self.replicas, shares, strict=True) if share]
        for replica, share in busy:
            replica.send(**question(share))
        for replica, share in busy:
            yield from zip(share, replica.receive()["done"], strict=True)

    def logprobs(self, rows: Sequence[Sequence[int]], last: Sequence[int]) -> list[list[float]]:
        """The log-probs of the last tokens of each row, so many as `last` says."""
        found = dict(self.each(len(rows), lambda share: {"logprobs": [list(rows[i]) for i in share],
                                                         "last": [last[i] for i in share]}))
        return [found[i] for i in range(len(rows))]

    def close(self) -> None:
        """Returns once all processes are gone."""
        for replica in self.replicas:
            replica.end_input()
        for replica in self.replicas:
            replica.close()


class VllmSampler:
    """Replicas of the weights that write; see Replicas."""

    def __init__(self, job: Job, rows: list[dict], longest: int, dtype: torch.dtype):
        prompts = [row["tokens"] for row in rows[:CHECKED]]
        self.replicas = Replicas(job.stage, job.section, job.key, job.weights, prompts, longest, dtype,
                                 job.settings.seed)

    def sample(self, prompts: Sequence[Sequence[int]], n: int, settings: Settings, *, ids, first=0, on_progress=None):
        how = {"n": n, "max_tokens": settings.max_new_tokens, "temperature": settings.temperature,
               "top_p": settings.top_p, "top_k": settings.top_k, "stop_token_ids": sorted(settings.stop_ids)}
        done: list[list[Completion]] = [[] for _ in prompts]
        for i, drawn in self.replicas.each(len(prompts), lambda share: {"sample": [list(prompts[i]) for i in share],
                                                                        "how": how}):
            done[i] = [Completion(tokens, logp, finish) for tokens, logp, finish in drawn]
            if on_progress:
                on_progress(len(drawn), sum(len(c.tokens) for c in done[i]))
        return done

    def expect(self, prompts, n, settings, *, ids, first=0):
        pass

    def close(self) -> None:
        self.replicas.close()


class Replica:
    """A worker process and its group."""

    def __init__(self, python: str, devices: str | None, log: Path, key: str, section: Vllm):
        self.python, self.log, self.key, self.section, self.is_busy = python, log, key, section, False
        environment = os.environ | {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
        # the ranks' variables would make vLLM join the trainer's process group
        for name in [n for n in environment if n.startswith(("TORCHELASTIC_", "MASTER_")) or n in (
                "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK")]:
            del environment[name]
        if devices is not None:
            environment["CUDA_VISIBLE_DEVICES"] = devices
        if section.tensor_parallel_size == 1:
            environment.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        try:
            with open(log, "wb") as errors:
                self.process = subprocess.Popen(
                    [str(Path(python).expanduser()), str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                    stderr=errors, env=environment, start_new_session=True, text=True)
        except OSError as e:
            raise UserError(f"{key}.python={python}: cannot be started ({e.strerror}); name the Python interpreter of "
                            "an environment with vLLM") from e

    def send(self, **question) -> None:
        with suppress(BrokenPipeError):  # receive() says why
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()

    def receive(self) -> dict:
        """The next answer. Raises UserError if it is an error, or if the process has ended."""
        self.is_busy = True
        line = self.process.stdout.readline()
        self.is_busy = False
        answer = json.loads(line) if line.endswith("\n") else {"error": "ended", "detail": self.last_words()}
        if "error" not in answer:
            return answer
        kind, detail = answer["error"], answer["detail"]
        kept = "completed shards are kept, and the same command resumes"
        python = f"{self.key}.python={self.python}"
        raise UserError({
            "missing": f"{python}: vLLM cannot be imported there ({detail}); pip install vllm into it, or name another "
                       "interpreter",
            "old": f"{python}: vLLM {detail} is too old; install 0.10 or later",
            "memory": f"{self.key}.engine=vllm: not enough memory ({detail}); {kept}: with another {self.key}."
                      "memory, a larger tensor_parallel_size or a lower max_new_tokens",
            "failed": f"{self.key}.engine=vllm: the engine failed ({detail}); {kept}",
            "ended": f"{self.key}.engine=vllm: the engine's process ended ({detail}); {kept}"}[kind])

    def last_words(self) -> str:
        """The last line of the log."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        lines = self.log.read_text(encoding="utf-8", errors="replace").split("\n")
        return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "it said nothing")

    def end_input(self) -> None:
        with suppress(OSError):
            self.process.stdin.close()

    def close(self) -> None:
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(0 if self.is_busy else PATIENCE)  # busy: this process was interrupted
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process.stdout.close()


def placement(world: World, section: Vllm, key: str) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES of each replica that this rank starts; [None] on a CPU.

    A rank alone uses all GPUs. Several ranks have one each, and every tensor_parallel_size-th starts a replica."""
    size = section.tensor_parallel_size
    if world.device.type != "cuda":
        if size > 1:
            raise UserError(f"{key}.tensor_parallel_size={size}: there are no GPUs; set it to 1")
        return [None]
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = seen.split(",") if seen else [str(i) for i in range(torch.cuda.device_count())]
    if world.size > 1:
        local = int(os.environ.get("LOCAL_RANK", world.device.index or 0))
        names = names[:int(os.environ.get("LOCAL_WORLD_SIZE", len(names)))][local:local + size]
    if len(names) < size:
        raise UserError(f"{key}.tensor_parallel_size={size}: there are {len(names)} GPUs; lower it")
    return [",".join(names[i:i + size]) for i in range(0, len(names) - size + 1, size)]


def lane(world: World, section) -> tuple[int, int]:
    """(this rank's number among the ranks that sample, their number); the first is too large on ranks that do not."""
    size = getattr(section, "tensor_parallel_size", 1)
    if world.size == 1 or size == 1 or world.device.type != "cuda":
        return world.rank, world.size
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
    per_node, (node, local) = local_size // size, divmod(world.rank, local_size)
    if not per_node:
        return 0, 1  # placement() refuses
    samples = local % size == 0 and local // size < per_node
    number = per_node * (world.size // local_size)
    return (node * per_node + local // size if samples else 1 << 30), number


@torch.inference_mode()
def own_logprobs(folder: ModelFolder, dtype: torch.dtype, device: torch.device,
                 prompts: list[list[int]]) -> list[tuple[list[int], list[float]]]:
    """(tokens, log-prob of each after the first) of every prompt with a few greedy tokens behind it, from the trainer's
    own model, whose memory is free again on return."""
    model, found = folder.load(dtype, device, attention="sdpa"), []
    for prompt in prompts:
        tokens = list(prompt)
        for _ in range(CHECKED_TOKENS):
            logits = model(input_ids=torch.tensor([tokens], device=device), use_cache=False).logits[0]
            tokens.append(int(logits[-1].argmax()))
        logp = logits.float().log_softmax(-1)
        ids = torch.tensor(tokens[1:], device=device)
        found.append((tokens, logp.gather(1, ids[:, None])[:, 0].tolist()))
    del model
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return found
