"""One contender of benchmarks.sampling, in a process of its own: a job as JSON in argv, a result as JSON on stdout.

It may run in another environment's Python, so it imports nothing of this repository before it is known that the
contender is Strop. Every contender continues the same prompts by K completions of `new` tokens at temperature 1, none
of which may stop before.
"""

import json
import os
import random
import re
import sys
import time
from pathlib import Path

HERE = os.path.dirname(os.path.abspath(__file__))
if __name__ == "__main__":
    sys.path[:] = [folder for folder in sys.path if os.path.abspath(folder) != HERE]  # it has modules of common names


def prompts_of(job, vocab):
    draw = random.Random(0)
    return [[draw.randrange(10, vocab - 10) for _ in range(job["prompt"])] for _ in range(job["prompts"])]


def strop(job):
    import torch

    from strop.trainer.models.loading import ModelFolder
    from strop.trainer.sampling.in_process import Generator, load_for_generation

    dtype = getattr(torch, job["dtype"])
    generator = Generator(load_for_generation(ModelFolder(Path(job["model"])), dtype, torch.device("cpu")))
    prompts = prompts_of(job, generator.model.config.vocab_size)

    def run(new):
        found = generator.generate(prompts, k=job["k"], max_new_tokens=new, batch_size=job["batch_size"])
        return sum(len(c.tokens) for drawn in found for c in drawn)

    return run


def load(job):
    import torch
    from transformers import AutoModelForCausalLM, logging

    logging.set_verbosity_error()
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=getattr(torch, job["dtype"]),
                                                 attn_implementation="sdpa").eval()
    model.generation_config.eos_token_id = None
    return model, prompts_of(job, model.config.vocab_size)


def generate(job):
    import torch

    model, prompts = load(job)
    each = max(1, job["batch_size"] // job["k"])  # prompts at a time

    @torch.inference_mode()
    def run(new):
        total = 0
        for first in range(0, len(prompts), each):
            ids = torch.tensor(prompts[first:first + each])
            found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0,
                                   top_k=0, top_p=1.0, num_return_sequences=job["k"], min_new_tokens=new,
                                   max_new_tokens=new, pad_token_id=0)
            total += found[:, ids.shape[1]:].numel()
        return total

    return run


def generate_batch(job):
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model, prompts = load(job)
    cache = ContinuousBatchingConfig(max_memory_percent=0.1)  # its default takes nearly all memory for the cache
    repeated = [ids for ids in prompts for _ in range(job["k"])]

    def run(new):
        config = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=new,
                                  eos_token_id=-1, pad_token_id=0)
        found = model.generate_batch(inputs=repeated, generation_config=config, progress_bar=False,
                                     continuous_batching_config=cache)
        if len(found) != len(repeated):
            raise RuntimeError(f"{len(found)} of {len(repeated)} requests were answered")
        return sum(len(one.generated_tokens) for one in found.values())

    return run


def vllm(job):
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "2"}
    from vllm import LLM, SamplingParams

    llm = LLM(model=job["model"], dtype=job["dtype"], skip_tokenizer_init=True, enable_prefix_caching=True,
              max_model_len=job["prompt"] + job["new"], max_num_seqs=job["batch_size"], disable_log_stats=True)
    prompts = [{"prompt_token_ids": ids} for ids in prompts_of(job, llm.llm_engine.model_config.get_vocab_size())]

    def run(new):
        how = SamplingParams(n=job["k"], temperature=1.0, max_tokens=new, ignore_eos=True, detokenize=False)
        llm.reset_prefix_cache()  # a run does not read prompts that the last one computed
        return sum(len(one.token_ids) for out in llm.generate(prompts, how, use_tqdm=False) for one in out.outputs)

    return run


CONTENDERS = {"strop": strop, "transformers generate": generate, "transformers generate_batch": generate_batch,
              "vllm": vllm}


def peak_bytes():
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) << 10


def measure(job):
    """{"seconds": of each round, "tokens": of a round, "peak_bytes": of the process from the warm-up on}"""
    run = CONTENDERS[job["contender"]](job)
    run(4)
    Path("/proc/self/clear_refs").write_text("5")
    seconds, tokens = [], 0
    for _ in range(job["rounds"]):
        began = time.perf_counter()
        tokens = run(job["new"])
        seconds.append(time.perf_counter() - began)
        if tokens != job["prompts"] * job["k"] * job["new"]:
            raise RuntimeError(f"{tokens} tokens, not {job['prompts'] * job['k'] * job['new']}")
    return {"seconds": seconds, "tokens": tokens, "peak_bytes": peak_bytes()}


def main():
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print to stdout, too
    try:
        found = measure(json.loads(sys.argv[1]))
    except Exception as e:  # a peer may raise anything; the reason is its result
        found = {"failed": f"{type(e).__name__}: {' '.join(str(e).split())}"[:200]}
    answers.write(json.dumps(found) + "\n")
    answers.flush()
    os._exit(0)  # engines may leave threads


if __name__ == "__main__":
    main()
