"""As much of vLLM as Strop's worker uses. FAKE_VLLM is a JSON object: logprobs (file with those of the check, by token
ids; others are made up), version, load and sample (a fault each: "memory", "raise", "crash", "kill", "hang"), after
(samples before the fault), child (file that gets the id of a process that it starts) and log (file that gets a line
per call)."""

import json
import os
import signal
import subprocess
import time
from types import SimpleNamespace

HOW = json.loads(os.environ.get("FAKE_VLLM", "{}"))
__version__ = HOW.get("version", "0.32.0")


def note(**line):
    if "log" in HOW:
        with open(HOW["log"], "a") as f:
            f.write(json.dumps(line | {"pid": os.getpid()}) + "\n")


def fail(how):
    if how == "memory":
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
    if how == "raise":
        raise ValueError("unsupported\nmodel")
    if how == "crash":
        print("the engine is broken", flush=True)
        os._exit(3)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "hang":
        time.sleep(600)


class SamplingParams:
    def __init__(self, **how):
        self.__dict__.update(how)


class LLM:
    def __init__(self, **how):
        note(load=how, devices=os.environ.get("CUDA_VISIBLE_DEVICES"), ranks=os.environ.get("WORLD_SIZE"))
        if "child" in HOW:
            child = subprocess.Popen(["sleep", "600"])
            with open(HOW["child"], "a") as f:
                f.write(f"{child.pid}\n")
        fail(HOW.get("load"))
        print("vLLM says something on stdout", flush=True)
        self.samples = 0

    def generate(self, prompts, params, use_tqdm):
        assert use_tqdm is False and params.detokenize is False
        prompts = [p["prompt_token_ids"] for p in prompts]
        if hasattr(params, "prompt_logprobs"):
            note(logprobs=len(prompts), longest=max(map(len, prompts)))
            with open(HOW["logprobs"]) as f:
                known = json.load(f)
            return [SimpleNamespace(prompt_logprobs=[None] + [
                {token: SimpleNamespace(logprob=x)}
                for token, x in zip(ids[1:], known.get(str(ids)) or [-(t % 13) / 13 for t in ids[1:]], strict=True)])
                for ids in prompts]
        note(sample=prompts, how=vars(params))
        if self.samples == HOW.get("after", 0):
            fail(HOW.get("sample"))
        self.samples += 1
        return [SimpleNamespace(outputs=[self.output(ids, i, params) for i in reversed(range(params.n))])
                for ids in prompts]

    def output(self, ids, i, params):
        stops = i % 4 < 3
        tokens = [20 + (sum(ids) + i) % 9, 30 + i % 9, params.stop_token_ids[0]][:3 if stops else 2]
        return SimpleNamespace(index=i, token_ids=tokens, finish_reason="stop" if stops else "length",
                               logprobs=[{t: SimpleNamespace(logprob=-0.5)} for t in tokens])
