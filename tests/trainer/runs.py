"""Run directories of small runs, written by hand: the plan is the one that the method itself makes."""

import json
import math
import random
from typing import NamedTuple

import pyarrow as pa
import yaml

from strop.trainer.config import Recipe
from strop.trainer.methods import METHODS
from strop.trainer.methods.run import Run
from strop.trainer.models.folders import Base
from strop.trainer.run.artifacts import content_hash, list_files
from strop.trainer.run.files import write_json
from strop.trainer.run.store import PLAN, Store
from strop.trainer.run.tables import DROPS, write_table
from strop.trainer.run.world import World

SOURCES = ("sums", "products")
EVIL = '</div><script>alert("x")</script><b onclick=x>&amp; {{ 7*7 }}'


class Size(NamedTuple):
    """How much a run holds: prompts of each source by split, completions per prompt, words around the answer in each
    prompt and completion, steps per training stage, and a factor of the number of dropped rows."""

    test: int = 80
    validation: int = 30
    train: int = 40
    k: int = 8
    words: int = 0
    steps: int = 40
    drops: int = 1


SMALL = Size()
LARGE = Size(test=1000, validation=250, train=3125, words=200, steps=5000, drops=1000)  # 100,000 samples in two rounds
SHARD = 32  # prompts
WORDS = ("so", "then", "we", "add", "<both>", "sides", "again", "twice", "and", "'halve'", "it")


def plan_of(run_dir, config) -> dict:
    """plan.json of a recipe with two sources of prompts, as a run begins with it: nothing is done."""
    sources = {"data": {"sources": [{"name": name, "reasoning_gym": "chain_sum"} for name in SOURCES]}}
    recipe = Recipe.model_validate(config | sources)
    store = Store(run_dir / "nothing", World(), None, planning=True)
    METHODS[recipe.method](Run(store, recipe, Base(run_dir / "no-weights", "some_model", True, None)), recipe)
    return store.about | {"stages": store.plan}


def make_run(run_dir, rounds=2, until=None, size=SMALL):
    """A run directory with the files and numbers of a finished run; it ends after stage `until`."""
    words = random.Random(1)

    def more():
        return "".join(f" {word}" for word in words.choices(WORDS, k=size.words))

    rng = random.Random(0)
    run_dir.mkdir(parents=True, exist_ok=True)
    config = {"name": "demo", "seed": 3, "rounds": rounds, "model": {"path": "package:some_model"},
              "evaluate": {"bootstrap": 500}, "sft": {"enabled": True}, "dpo": {"enabled": True}}
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    plan = plan_of(run_dir, config)
    entries, made = {entry["stage"]: entry for entry in plan["stages"]}, {}

    class Stop(Exception):
        pass

    def finish(stage, inputs, seconds, counts=None):
        files = list_files(run_dir / stage)
        made[stage] = content_hash(files)
        assert set(inputs) <= {*entries[stage]["inputs"], "promotions"}, (stage, entries[stage]["inputs"])
        write_json(run_dir / stage / "manifest.json", {
            "stage": stage, "key": "k", "kind": entries[stage]["kind"], "config": {},
            "inputs": {n: made.get(h, h) for n, h in inputs.items()}, "files": files, "counts": counts or {},
            "seconds": seconds, "versions": {"strop": "0.1.0"}, "created": f"2026-01-01T00:{len(made):02}:00+00:00"})
        entries[stage]["state"] = "done"
        write_json(run_dir / PLAN, plan)
        if stage == until:
            raise Stop

    def table(stage, name, rows, schema=None):
        (run_dir / stage).mkdir(parents=True, exist_ok=True)
        write_table(run_dir / stage / name, pa.Table.from_pylist(rows, schema=schema))

    prompts = [{"prompt_id": f"{s}-{i:03}", "source": s, "split": "test" if i < size.test else "validation" if i <
                size.test + size.validation else "train", "messages": [{"role": "system", "content": "Be brief."}, {
                    "role": "user", "content": f"What is {i} {'+' if s == 'sums' else '*'} {i}?{more()}"}],
                "answer": str(2 * i if s == "sums" else i * i)}
               for s in SOURCES for i in range(size.test + size.validation + size.train)]
    prompts[0]["messages"][1]["content"] = EVIL

    def evaluate(stage, candidates):
        rows, summary = [], {}
        for name, rate in candidates.items():
            held = [p for p in prompts if p["split"] != "train"]
            mine = [{"candidate": name, "split": p["split"], "source": p["source"], "prompt_id": p["prompt_id"],
                     "completion": EVIL if n == 0 else f"The answer is {p['answer']}.{more()}",
                     "completion_tokens": 12, "finish": "stop", "score": float(ok), "correct": ok}
                    for n, p in enumerate(held)
                    for ok in [rng.random() < rate * (1.3 if p["source"] == "sums" else 0.7)]]
            rows += mine
            summary[name] = {}
            for split in ("validation", "test"):
                part = [r for r in mine if r["split"] == split]
                by = {s: [r["correct"] for r in part if r["source"] == s] for s in SOURCES}
                summary[name][split] = {
                    "pass_rate": sum(r["correct"] for r in part) / len(part), "n": len(part), "mean_length": 12.0,
                    "cut_share": 0.05, "by_source": {s: {"pass_rate": sum(c) / len(c), "n": len(c)}
                                                     for s, c in by.items()}}
        table(stage, "results.parquet", rows)
        write_json(run_dir / stage / "summary.json", summary)

    def train(stage, metrics):
        lines = []
        for step in range(1, size.steps + 1):
            values = {name: round(f(step) + rng.gauss(0, 0.02), 4) for name, f in metrics.items()}
            values["tokens_per_second"] = 1500 + rng.gauss(0, 60)
            lines.append({"stage": stage, "step": step, "time": 1.8e9 + step} | values)
        with (run_dir / "metrics.jsonl").open("a") as f:
            f.writelines(json.dumps(line) + "\n" for line in lines)
        folder = run_dir / stage / "model"
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(stage.encode())

    def dropped(stage, reasons):
        rows = [{"stage": stage, "prompt_id": None, "sample_index": None, "source": "sums", "reason": r, "detail": EVIL}
                for r, n in reasons.items() for _ in range(n * size.drops)]
        table(stage, "drops.parquet", rows, DROPS)
        return {f"dropped/{r}": n * size.drops for r, n in reasons.items()}

    try:
        table("prompts", "prompts.parquet", prompts)
        finish("prompts", {}, 2.5, {"prompts": len(prompts)} | dropped("prompts", {"duplicate": 7}))
        table("baseline-held-out", "completions.parquet", [{"prompt_id": "p"}])
        finish("baseline-held-out", {"prompts": "prompts", "candidates.base": "b" * 32}, 30.0)
        evaluate("baseline", {"base": 0.12})
        finish("baseline", {"prompts": "prompts", "candidates.base": "b" * 32}, 1.0,
               {"prompts": 2 * (size.test + size.validation)})
        promotions, weights, at = [], "b" * 32, ["baseline", "base"]
        for r in range(rounds):
            name = f"round-{r:02}"
            train_prompts = [p for p in prompts if p["split"] == "train"]
            samples = [(p, k, rng.random() < 0.2 + 0.2 * r) for p in train_prompts for k in range(size.k)]
            for first in range(0, len(samples), SHARD * size.k):
                table(f"{name}/sample", f"shard-{first // (SHARD * size.k):05}.parquet", [
                    {"prompt_id": p["prompt_id"], "sample_index": k, "completion_tokens":
                     [1] * (rng.randint(4, 40) + size.words), "completion":
                     (f"It is {p['answer']}." if ok else EVIL) + more(), "finish": "stop" if ok else "length"}
                    for p, k, ok in samples[first:first + SHARD * size.k]])
            finish(f"{name}/sample", {"prompts": "prompts", "weights": weights}, 75.0,
                   {"prompts": len(train_prompts), "samples": len(samples), "tokens": 27000,
                    "cut_share": sum(not ok for *_, ok in samples) / len(samples), "mean_length": 27000 / len(samples)})
            table(f"{name}/score", "scores.parquet", [
                {"prompt_id": p["prompt_id"], "sample_index": k, "scorer": "reasoning_gym", "value": float(ok)}
                for p, k, ok in samples])
            finish(f"{name}/score", {"prompts": "prompts", "sample": f"{name}/sample"}, 1.2)
            counts = dropped(f"{name}/select", {"tie": 12, "unsolved": 30})
            table(f"{name}/select", "judged.parquet", [
                {"prompt_id": p["prompt_id"], "sample_index": k, "score": float(ok), "correct": ok}
                for p, k, ok in samples])
            finish(f"{name}/select", {f"history.{r}.1": f"{name}/score"}, 0.8, {"sft rows": 50, "pairs": 44} | counts)
            train(f"{name}/sft", {"loss": lambda s: 1.5 * math.exp(-s / 15) + 0.4, "mean_token_accuracy":
                                  lambda s: 0.9 - 0.4 * math.exp(-s / 12), "grad_norm": lambda s: 1 + 2 / s,
                                  "learning_rate": lambda s: 0})
            finish(f"{name}/sft", {"select": f"{name}/select", "start": weights}, 85.0,
                   {"rows": 50, "steps": 40, "tokens": 5000})
            table(f"{name}/reference", "reference.parquet", [{"row_id": "a"}])
            finish(f"{name}/reference", {"select": f"{name}/select"}, 9.0)
            train(f"{name}/dpo", {"loss": lambda s: 0.69 * math.exp(-s / 60), "rewards/margins": lambda s: s / 50,
                                  "rewards/accuracies": lambda s: 1 - 0.5 * math.exp(-s / 10),
                                  "rewards/chosen": lambda s: s / 120, "rewards/rejected": lambda s: -s / 90,
                                  "something_new": lambda s: s})
            finish(f"{name}/dpo", {"select": f"{name}/select"}, 60.0, {"pairs": 44, "steps": 40})
            train(f"{name}/merge", {})
            finish(f"{name}/merge", {"start": weights}, 2.0)
            (run_dir / name / "held-out").mkdir(parents=True)
            write_json(run_dir / name / "held-out" / "kl.json", {s: {
                "kl": 0.05 * (r + 1) * (i + 1), "stderr": 0.01, "prompts": 16, "tokens": 320}
                for i, s in enumerate(("sft", "dpo", "merge"))})
            finish(f"{name}/held-out", {"prompts": "prompts"}, 61.0)
            evaluate(f"{name}/evaluate", {"sft": 0.25 + 0.1 * r, "dpo": 0.3 + 0.12 * r, "merge": 0.29 + 0.1 * r})
            stops = {"start": at} | {s: [f"{name}/evaluate", s] for s in ("sft", "dpo", "merge")}
            promotions.append({"round": r, "promoted": "dpo", "hash": "c", "weights": f"{name}/dpo/model",
                               "candidates": stops})
            weights, at = made[f"{name}/dpo"], stops["dpo"]
            write_json(run_dir / "promotions.json", promotions)
            finish(f"{name}/evaluate", {"prompts": "prompts"}, 1.0)
        (run_dir / "final").mkdir()
        finish("final", {"weights": weights}, 0.4)
    except Stop:
        pass
    return run_dir
