"""Peak memory of stages beside what docs/memory.md predicts, and step times beside predicted ones.

    python -m benchmarks.memory [--cases REGEX] [--write]

Each case is a process of its own: it imports everything, notes its resident memory, runs a stage of two steps (or a
sampler) and takes the peak. Rows fill their microbatches exactly. --write keeps the numbers in
benchmarks/results/<device>/memory.json; those of other cases stay.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import torch

from strop.trainer.config import Dpo, Log, Lora, Model, Recipe, Reward, Sft
from strop.trainer.models.folders import find_base
from strop.trainer.models.loading import DTYPES, ModelFolder
from strop.trainer.planning.shape import read_shape
from strop.trainer.run.console import Console
from strop.trainer.run.store import Stage
from strop.trainer.run.tables import write_table
from strop.trainer.run.world import World, keep_freed_memory
from strop.trainer.sampling.in_process import Generator, load_for_generation
from strop.trainer.stages.preference import dpo
from strop.trainer.stages.reference import reference
from strop.trainer.stages.reward import reward
from strop.trainer.stages.sft import sft

from . import measure
from .fits import predicted

ROW = 256  # tokens of a row; of a pair
RANDOM = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8,
          "num_key_value_heads": 4, "tie_word_embeddings": False}


def case(kind: str, model: str = "smollm2", **keys) -> dict:
    return {"kind": kind, "model": model, "dtype": "bfloat16", "max_tokens": 2048, "microbatches": 2} | keys


CASES = {
    "sft, 2048 tokens": case("sft"),
    "sft, 512 tokens": case("sft", max_tokens=512),
    "sft, 8192 tokens": case("sft", max_tokens=8192, microbatches=1),
    "sft, one microbatch": case("sft", microbatches=1),
    "sft, 4096 tokens, checkpointing": case("sft", max_tokens=4096, checkpointing=True),
    "sft, LoRA": case("sft", lora=16),
    "sft, EMA": case("sft", max_tokens=512, ema_decay=0.9),
    "sft, int8 moments, split masters": case("sft", moments="int8", masters="split"),
    "sft, bf16 moments": case("sft", moments="bfloat16"),
    "sft, Muon": case("sft", optimizer="muon"),
    "sft, fp32": case("sft", dtype="float32", max_tokens=1024),
    "sft, random Llama": case("sft", "random", max_tokens=4096),
    "dpo, 2048 tokens": case("dpo"),
    "dpo, 4096 tokens, checkpointing": case("dpo", max_tokens=4096, checkpointing=True),
    "dpo, LoRA": case("dpo", lora=16),
    "dpo, random Llama": case("dpo", "random"),
    "reference, 4096 tokens": case("reference", max_tokens=4096),
    "reward, 2048 tokens": case("reward"),
    "reward, random Llama": case("reward", "random"),
    "sample, K 8": case("sample", prompts=32, k=8, batch_size=128, prompt=128, new_tokens=64),
    "sample, K 64": case("sample", prompts=8, k=64, batch_size=256, prompt=512, new_tokens=48),
    "sample, random Llama": case("sample", "random", prompts=64, k=4, batch_size=256, prompt=128, new_tokens=64),
}


def model_of(name: str, folder: Path) -> Path:
    base = find_base(Model(), Console(enabled=False)).path
    if name == "smollm2":
        return base
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(base)
    config.update(RANDOM)
    config.head_dim = 64
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(folder)
    for file in base.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def rows_of(folder: Path, kind: str, n: int) -> Path:
    """A selection of n rows, or n pairs, of ROW tokens each."""
    draw = random.Random(0)

    def ids(count: int) -> list[int]:
        return [draw.randrange(3, 40_000) for _ in range(count)]

    shared = {"source": "s", "weight": 1.0, "origin": "x"}
    folder.mkdir(parents=True)
    if kind == "sft":
        rows = [shared | {"row_id": f"r{i}", "prompt_id": f"p{i}", "sample_index": 0, "score": 1.0,
                          "prompt_tokens": ids(ROW // 4), "completion_tokens": ids(ROW * 3 // 4),
                          "loss_mask": [True] * (ROW * 3 // 4)} for i in range(n)]
    else:
        side = ROW * 3 // 8
        rows = [shared | {"row_id": f"r{i}", "prompt_id": f"p{i}", "prompt_tokens": ids(ROW // 4), "margin": None,
                          "chosen_score": 1.0, "rejected_score": 0.0}
                | {f"{s}_{name}": value for s in ("chosen", "rejected") for name, value in
                   {"tokens": ids(side), "mask": [True] * side, "template": [False] * side}.items()}
                for i in range(n)]
    write_table(folder / ("sft.parquet" if kind == "sft" else "pairs.parquet"), pa.Table.from_pylist(rows))
    return folder


class Quiet:
    """Stands in for the metrics of a run; keeps the values."""

    def __init__(self):
        self.values = []

    def log(self, stage, step, values, total=None):
        self.values.append(values)


def run(case: dict, model: Path, folder: Path) -> dict:
    """Runs the case in this process and returns what it measured, in bytes and seconds."""
    kind, work = case["kind"], folder / "work"
    n = case["max_tokens"] // ROW * case["microbatches"]
    keys = {"batch_size": n, "max_tokens": case["max_tokens"], "epochs": 2, "lr": 1e-6,
            "activation_checkpointing": case.get("checkpointing", False), "ema_decay": case.get("ema_decay", 0.0)}
    keys |= {name: case[name] for name in ("moments", "masters", "optimizer") if name in case}
    section = {"sft": Sft, "dpo": Dpo, "reference": Dpo, "reward": Reward}.get(kind, Sft)
    section = section(**keys, **({"held_out": 0.0} if kind == "reward" else {}))
    lora, part = Lora(rank=case.get("lora", 0)), Model()
    recipe = Recipe(dtype=case["dtype"], data={"sft": [{"name": "x", "path": "x"}]})
    quiet = Quiet()
    work.mkdir(parents=True)
    stage = Stage(f"round-00/{kind}", work, World(), Console(enabled=False), quiet)
    select = rows_of(folder / "select", kind, n)
    load_everything(model, lora)
    training = {"lora": lora, "model": part, "compute": recipe, "log": Log(), "seed": 0, "select": select}
    if kind == "dpo":  # in another process, which leaves no memory behind
        command = [sys.executable, "-m", "benchmarks.memory", "--reference", json.dumps(case), str(model), str(folder)]
        subprocess.run(command, check=True)
    keep_freed_memory()
    Path("/proc/self/clear_refs").write_text("5")
    before, started = measure._status_bytes("VmRSS"), time.perf_counter()
    if kind == "sft":
        sft(stage, sft=section, start=model, **training)
    elif kind == "dpo":
        dpo(stage, dpo=section, policy=model, reference=folder / "reference", same_weights=False, **training)
    elif kind == "reference":
        reference(stage, dpo=section, model=part, compute=recipe, seed=0, select=select, weights=model)
    elif kind == "reward":
        reward(stage, reward=section, start=model, history=[], **training)
    else:
        draw = random.Random(0)
        prompts = [[draw.randrange(3, 40_000) for _ in range(case["prompt"])] for _ in range(case["prompts"])]
        loaded = load_for_generation(ModelFolder(model, part), DTYPES[case["dtype"]], torch.device("cpu"))
        Generator(loaded).generate(prompts, k=case["k"], max_new_tokens=case["new_tokens"],
                                   batch_size=case["batch_size"])
    found = {"process": before, "growth": measure._status_bytes("VmHWM") - before,
             "seconds": time.perf_counter() - started}
    if quiet.values and "tokens_per_second" in quiet.values[-1]:
        tokens = case["max_tokens"] * case["microbatches"]
        found |= {"step_seconds": tokens / quiet.values[-1]["tokens_per_second"], "mfu": quiet.values[-1]["mfu"]}
    return found


def load_everything(model: Path, lora: Lora) -> None:
    """Imports what the stage imports, so that it does not count."""
    import transformers
    from transformers import AutoConfig, AutoTokenizer

    AutoTokenizer.from_pretrained(model)
    getattr(transformers, AutoConfig.from_pretrained(model).architectures[0])
    transformers.AutoModelForSequenceClassification  # noqa: B018 - imports it
    if lora.rank:
        import peft  # noqa: F401


def write_reference(case: dict, model: Path, folder: Path) -> None:
    stage = Stage("reference", folder / "reference", World(), Console(enabled=False), Quiet())
    section = Dpo(batch_size=case["max_tokens"] // ROW * case["microbatches"], max_tokens=case["max_tokens"], epochs=2)
    reference(stage, dpo=section, model=Model(), compute=Recipe(dtype=case["dtype"], data={"sft": [
        {"name": "x", "path": "x"}]}), seed=0, select=folder / "select", weights=model)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="", help="only cases whose name this regular expression finds")
    parser.add_argument("--write", action="store_true", help="keep the numbers in benchmarks/results")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--reference", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if one := options.one or options.reference:
        of, model, folder = json.loads(one[0]), Path(one[1]), Path(one[2])
        if options.reference:
            write_reference(of, model, folder)
        else:
            print("measured", json.dumps(run(of, model, folder)))
        return 0
    results = {}
    with tempfile.TemporaryDirectory() as temporary:
        folders = {name: model_of(name, Path(temporary) / name) for name in ("smollm2", "random")}
        for i, (name, of) in enumerate(CASES.items()):
            if re.search(options.cases, name):
                results[name] = measured(of, folders[of["model"]], Path(temporary) / str(i))
                print(line(name, results[name]), flush=True)
    if options.write:
        device = torch.device("cpu")
        path = measure.results_folder(device) / "memory.json"
        before = json.loads(path.read_text())["cases"] if path.exists() else {}
        kept = before | results
        measure.keep_cases("memory.json", device, {name: kept[name] for name in CASES if name in kept})
        print(f"results in {path}")
    return 0


def measured(of: dict, model: Path, folder: Path) -> dict:
    """A case in a process of its own, beside its prediction; the folder is deleted."""
    command = [sys.executable, "-m", "benchmarks.memory", "--one", json.dumps(of), str(model), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    if done.returncode:
        raise SystemExit(f"{of}: {done.stderr}")
    found = json.loads(re.search(r"^measured (.*)$", done.stdout, re.M)[1])
    shutil.rmtree(folder)
    result = {"case": of, "shape": asdict(read_shape(model)), "measured": found}
    return result | {"predicted": predicted(result)}


def line(name: str, result: dict) -> str:
    real, ours = result["measured"]["growth"], sum(result["predicted"].values())
    rest = result["measured"]
    return (f"{name:32} measured {real / 1e6:7,.0f} MB  predicted {ours / 1e6:7,.0f} MB  {ours / real - 1:+6.1%}"
            f"  process {rest['process'] / 1e6:,.0f} MB  {rest['seconds']:.0f} s"
            + (f"  step {rest['step_seconds']:.2f} s, MFU {rest['mfu']:.0%}" if "mfu" in rest else ""))


if __name__ == "__main__":
    sys.exit(main())
