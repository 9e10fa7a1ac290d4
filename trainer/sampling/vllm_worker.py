"""Runs vLLM for Strop: questions as lines of JSON on stdin, answers on stdout. Its Python may be another environment's,
so it imports nothing of Strop. `vllm.py` beside it is the other side.

    {"load": {arguments of vllm.LLM}}                     -> {"ready": version}
    {"sample": [token ids, ...], "how": {...}}            -> {"done": [[[token ids], logp, finish], ...] per prompt}
    {"logprobs": [token ids, ...], "last": [n, ...]}      -> {"done": [log-probs of the last n tokens, ...]}

An answer may be {"error": kind, "detail": text} instead.
"""

import ctypes
import json
import os
import re
import signal
import sys

OLDEST = (0, 10)  # log-probs are those of the model, before temperature and top_p
MEMORY = ("out of memory", "free memory on device", "memory utilization", "no available memory",
          "can't allocate memory", "kv cache is needed", "larger than the available kv cache")
HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [folder for folder in sys.path if os.path.abspath(folder) != HERE]  # it has a vllm.py, too


def die_with_parent(signal_number):
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(1, signal_number)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os.kill(os.getpid(), signal_number)


def supervise():
    """Forks. The child goes on and runs vLLM, whose processes stay in this process group; the parent waits, and ends
    the whole group when Strop is gone or the child has ended."""
    child = os.fork()
    if child == 0:
        die_with_parent(signal.SIGKILL)
        return

    def end_group(*_):
        os.killpg(0, signal.SIGKILL)

    signal.signal(signal.SIGTERM, end_group)
    die_with_parent(signal.SIGTERM)
    os.close(0)
    os.close(1)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code < 0:  # for Strop to see
        print(f"the engine was ended by signal {-code}", file=sys.stderr, flush=True)
    os.killpg(0, signal.SIGKILL)


def main():
    supervise()
    questions, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # vLLM prints to stdout, too

    def say(**answer):
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    def fails(error):
        text = " ".join(str(error).split()) or type(error).__name__
        memory = isinstance(error, MemoryError) or any(words in text.lower() for words in MEMORY)
        say(error="memory" if memory else "failed", detail=f"{type(error).__name__}: {text[:400]}")

    try:
        import vllm
    except ImportError as e:
        return say(error="missing", detail=str(e))
    version = re.match(r"(\d+)\.(\d+)", vllm.__version__)  # a build from source may have none
    if version and tuple(map(int, version.groups())) < OLDEST:
        return say(error="old", detail=vllm.__version__)
    llm = None
    for line in questions:
        ask = json.loads(line)
        try:
            if "load" in ask:
                llm = vllm.LLM(**ask["load"])
                say(ready=vllm.__version__)
            elif "sample" in ask:
                say(done=sample(vllm, llm, ask["sample"], ask["how"]))
            else:
                say(done=logprobs(vllm, llm, ask["logprobs"], ask["last"]))
        except Exception as e:
            return fails(e)


def sample(vllm, llm, prompts, how):
    params = vllm.SamplingParams(**how, logprobs=0, detokenize=False)
    found = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    rows = []
    for request in found:
        drawn = []
        for one in sorted(request.outputs, key=lambda o: o.index):
            if one.finish_reason not in ("stop", "length"):
                raise RuntimeError(f"a completion ended with finish_reason={one.finish_reason}")
            tokens = list(one.token_ids)
            logp = sum(at[token].logprob for at, token in zip(one.logprobs, tokens, strict=True))
            drawn.append([tokens, logp, one.finish_reason])
        rows.append(drawn)
    return rows


def logprobs(vllm, llm, sequences, last):
    params = vllm.SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    found = llm.generate([{"prompt_token_ids": ids} for ids in sequences], params, use_tqdm=False)
    return [[at[token].logprob for at, token in zip(request.prompt_logprobs[-n:], ids[-n:], strict=True)]
            for request, ids, n in zip(found, sequences, last, strict=True)]


if __name__ == "__main__":
    main()
