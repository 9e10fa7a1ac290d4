"""The sides of benchmarks.field, each phase in a process of its own: Strop's stages, and TRL's trainers on their
rows."""

from __future__ import annotations

import gc
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median

import torch

from strop.trainer.config import Dpo, Recipe, Train
from strop.trainer.errors import UserError
from strop.trainer.run.metrics import read_metrics
from strop.trainer.run.tables import read_table

TRIAL_STEPS = 4  # of which the first does not count
IGNORED = -100  # label of tokens without loss


@dataclass(frozen=True)
class Job:
    """recipe: all of its keys. name: of this side and seed, and of its folders. epochs: factors of those of sft and
    dpo. ways: how TRL trains each, see `ways_of`. start, selected: folders of the start weights and of the selection.
    trained: {candidate: folder} to evaluate."""

    recipe: dict
    name: str = ""
    seed: int = 0
    epochs: tuple[float, float] = (1.0, 1.0)
    ways: tuple[str, str] = ("", "")
    start: str = ""
    selected: str = ""
    work: str = ""
    trained: tuple[tuple[str, str], ...] = ()


class Meter:
    """Seconds of each lap and the peak memory since it began: of the GPU, or of the process."""

    def __init__(self, device: torch.device):
        self.cuda, self.laps = device.type == "cuda", []
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")
        self.last = time.perf_counter()

    def lap(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.laps.append(now - self.last)
        self.last = now

    def found(self) -> dict:
        if self.cuda:
            peak = torch.cuda.max_memory_allocated()
        else:
            fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            peak = int(fields["VmHWM"].split()[0]) << 10
        return {"sft_seconds": self.laps[0], "dpo_seconds": self.laps[1], "peak_bytes": peak}


# -- Strop ------------------------------------------------------------------------------------------------------------


def begin(run):
    """(prompts, selection) of the samples that all sides learn from; cached in the run directory."""
    recipe = run.recipe
    prompts = run.prompts()
    run.evaluate(recipe.evaluate, prompts, {"base": run.start}, name="baseline")
    next(run.rounds(1))
    samples = run.sample(recipe.sample, run.start, prompts, score=recipe.score)
    return prompts, run.select(recipe.select, prompts, [(samples, run.score(recipe.score, samples, prompts))])


def opened(job: Job):
    from strop.trainer.methods.running import open_run
    from strop.trainer.run.console import Console

    return open_run(job.recipe, console=Console(enabled=False))


def shared(job: Job) -> dict:
    """Samples once, and says what both sides need of it."""
    with opened(job) as run:
        _, selected = begin(run)
        rows = {name: read_table(selected.path / f"{name}.parquet") for name in ("sft", "pairs")}
        for name, table in rows.items():
            if set(table["weight"].to_pylist()) - {1.0}:
                raise UserError(f"{name}: rows have weights, which TRL's trainers do not know; leave out ready data")
        masks = [rows["pairs"][f"{side}_mask"] for side in ("chosen", "rejected")]
        if not all(on for column in masks for mask in column.to_pylist() for on in mask):
            raise UserError("pairs: tokens are masked, which TRL's DPOTrainer does not know; leave out ready data")
        return {"start": str(run.start.path), "selected": str(selected.path), "rows": rows["sft"].num_rows,
                "pairs": rows["pairs"].num_rows}


def strop(job: Job) -> dict:
    """SFT, then DPO against its weights, as stages of the run."""
    with opened(job) as run:
        _, selected = begin(run)
        sft, dpo = (section.model_copy(update={"epochs": section.epochs * factor})
                    for section, factor in zip((run.recipe.sft, run.recipe.dpo), job.epochs, strict=True))
        meter = Meter(run.store.world.device)
        tuned = run.sft(sft, selected, run.start, name=f"{job.name}-sft", seed=job.seed)
        meter.lap()
        done = run.prefer(dpo, selected, tuned.model, tuned.model, name=f"{job.name}-dpo", seed=job.seed)
        meter.lap()
        logged = read_metrics(run.store.run_dir / "metrics.jsonl")
        # TRL logs the sum of its losses
        losses = [[row["loss"] + run.recipe.dpo.nll_weight * row.get("nll_loss", 0.0) for row in logged
                   if row["stage"] == f"round-00/{job.name}-{task}" and "loss" in row] for task in ("sft", "dpo")]
        return meter.found() | {"steps": [len(mine) for mine in losses], "losses": [fmean(mine) for mine in losses],
                                "weights": [str(a.model.path) for a in (tuned, done)]}


def evaluated(job: Job) -> dict:
    """{candidate: {prompt_id: whether its greedy answer is correct}} of test prompts, for the start weights too."""
    from strop.trainer.models.hub import is_loaded
    from strop.trainer.reports.statistics import correct
    from strop.trainer.run.artifacts import external

    with opened(job) as run:
        prompts, _ = begin(run)
        candidates = {name: external(folder, is_loaded) for name, folder in job.trained}
        run.evaluate(run.recipe.evaluate, prompts, candidates, name="field")
        where = {name: run.measured[a.hash] for name, a in ({"base": run.start} | candidates).items()}
        return {name: correct(run.store.run_dir, (str(a.path.relative_to(run.store.run_dir)), candidate), "test")
                for name, (a, candidate) in where.items()}


# -- TRL --------------------------------------------------------------------------------------------------------------


def check_recipe(recipe: Recipe) -> None:
    """Raises UserError if TRL's side cannot train as the recipe says."""
    wanted = {"method": (recipe.method, "rounds"), "log.interval": (recipe.log.interval, 1),
              "lora.rank": (recipe.lora.rank, 0), "dpo.loss": (recipe.dpo.loss, "sigmoid"),
              "dpo.nll_normalization": (recipe.dpo.nll_normalization, "batch_tokens"),
              **{f"{key}.min_lr_ratio": (getattr(recipe, key).min_lr_ratio, 0.0) for key in ("sft", "dpo")},
              **{f"{key}.enabled": (getattr(recipe, key).enabled, True) for key in ("sft", "dpo")}}
    for key, (value, needed) in wanted.items():
        if value != needed:
            raise UserError(f"{key}={value}: both sides must train alike; set {key}={str(needed).lower()}")


def ways_of(task: str, dtype: str) -> list[str]:
    """How TRL may train: fp32 weights under bf16 autocast or bf16 weights with fp32 masters, SFT padded or not. All
    take the same rows in a step."""
    numbers = ["autocast", "masters"] if dtype == "bfloat16" else ["fp32"]
    return [f"{kind} {layout}" for kind in numbers for layout in (["padded", "padding-free"] if task == "sft" else
                                                                  ["padded"])]


def trl_rows(task: str, selected: Path) -> list[dict]:
    """The selection's rows as TRL's trainers take them once they are tokenized: the same tokens, the same loss."""
    if task == "sft":
        return [{"input_ids": r["prompt_tokens"] + r["completion_tokens"],
                 "labels": [IGNORED] * len(r["prompt_tokens"]) + [token if on else IGNORED for token, on in zip(
                     r["completion_tokens"], r["loss_mask"], strict=True)]}
                for r in read_table(selected / "sft.parquet").to_pylist()]
    return [{"prompt_ids": r["prompt_tokens"], "chosen_ids": r["chosen_tokens"], "rejected_ids": r["rejected_tokens"]}
            for r in read_table(selected / "pairs.parquet").to_pylist()]


def trl_trainer(task: str, section: Train, folder: Path, rows: list[dict], way: str, *, seed: int, cuda: bool,
                epochs: float, steps: int = -1, output: str):
    """TRL's trainer of the rows, ready to `train()`, with Liger's layers on a GPU. DPO's reference is precomputed."""
    import datasets
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    from .step_sides import MasterAdamW, has_flash_attn

    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    kind, layout = way.split()
    options = {"attn_implementation": "flash_attention_2"} if cuda and has_flash_attn() else {}
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16 if kind == "masters" else torch.float32, **options).to("cuda" if cuda else "cpu")
    adamw = {"lr": section.lr, "betas": section.betas, "eps": section.eps, "weight_decay": section.weight_decay}
    optimizer = MasterAdamW(model.parameters(), **adamw) if kind == "masters" else None
    config = {
        "output_dir": output, "num_train_epochs": epochs, "max_steps": steps, "seed": seed,
        "per_device_train_batch_size": section.batch_size, "gradient_accumulation_steps": 1,
        "learning_rate": section.lr, "lr_scheduler_type": {"constant": "constant_with_warmup"}.get(
            section.schedule, section.schedule), "warmup_steps": section.warmup_ratio,
        "weight_decay": section.weight_decay, "adam_beta1": section.betas[0], "adam_beta2": section.betas[1],
        "adam_epsilon": section.eps, "max_grad_norm": section.grad_clip, "optim": "adamw_torch_fused",
        "gradient_checkpointing": section.activation_checkpointing, "bf16": kind == "autocast", "use_cpu": not cuda,
        "use_liger_kernel": cuda, "dataloader_pin_memory": cuda, "report_to": [], "logging_steps": 1,
        "save_strategy": "no", "disable_tqdm": True, "max_length": None,
    }
    common = {"train_dataset": datasets.Dataset.from_list(rows), "optimizers": (optimizer, None),
              "processing_class": AutoTokenizer.from_pretrained(folder)}
    if task == "sft":
        config |= {"padding_free": layout == "padding-free", "dataset_kwargs": {"skip_prepare_dataset": True}}
        return SFTTrainer(model, args=SFTConfig(**config), **common)

    class Trainer(DPOTrainer):
        def _prepare_dataset(self, dataset, *args):
            return dataset

    assert isinstance(section, Dpo)
    config |= {"beta": section.beta, "label_smoothing": section.label_smoothing, "precompute_ref_log_probs": True}
    if section.nll_weight:
        config |= {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, section.nll_weight]}
    return Trainer(model, args=DPOConfig(**config), **common)


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def trial(job: Job) -> dict:
    """{task: {way: seconds of a step}} of every way that runs here, on the first rows."""
    from transformers import TrainerCallback

    recipe, cuda = Recipe.model_validate(job.recipe), job.recipe["device"] == "cuda"
    found: dict[str, dict] = {}
    for task in ("sft", "dpo"):
        section = getattr(recipe, task)
        rows = trl_rows(task, Path(job.selected))[:TRIAL_STEPS * section.batch_size]
        for way in ways_of(task, job.recipe["dtype"]):
            times = []

            class Steps(TrainerCallback):
                def on_step_begin(self, args, state, control, times=times, **kwargs):
                    times.append(time.perf_counter())

                def on_step_end(self, args, state, control, times=times, **kwargs):
                    if cuda:
                        torch.cuda.synchronize()
                    times[-1] = time.perf_counter() - times[-1]

            try:
                trainer = trl_trainer(task, section, Path(job.start), rows, way, seed=job.seed, cuda=cuda, epochs=1,
                                      steps=TRIAL_STEPS, output=job.work)
                trainer.add_callback(Steps())
                trainer.train()
                found.setdefault(task, {})[way] = median(times[1:] or times)
                del trainer
            except (RuntimeError, ValueError, ImportError) as e:
                found.setdefault(task, {})[f"{way}, failed"] = str(e).splitlines()[0][:200]
            free()
    return found


def trl(job: Job) -> dict:
    """SFTTrainer, then DPOTrainer from and against its weights."""
    import accelerate  # noqa: F401 - what is imported here takes no time of the first lap
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401
    from trl import DPOTrainer, SFTTrainer  # noqa: F401

    recipe, cuda = Recipe.model_validate(job.recipe), job.recipe["device"] == "cuda"
    folder, steps, losses, weights = Path(job.start), [], [], []
    meter = Meter(torch.device("cuda" if cuda else "cpu"))
    for task, way, factor in zip(("sft", "dpo"), job.ways, job.epochs, strict=True):
        section, target = getattr(recipe, task), Path(job.work) / f"{job.name}-{task}"
        trainer = trl_trainer(task, section, folder, trl_rows(task, Path(job.selected)), way, seed=job.seed, cuda=cuda,
                              epochs=section.epochs * factor, output=str(target))
        trainer.train()
        trainer.save_model(str(target))
        steps.append(trainer.state.global_step)
        losses.append(fmean(row["loss"] for row in trainer.state.log_history if "loss" in row))
        weights.append(str(target))
        folder = target
        del trainer
        free()
        meter.lap()
    return meter.found() | {"steps": steps, "losses": losses, "weights": weights}


PHASES = {"shared": shared, "strop": strop, "trl": trl, "trial": trial, "evaluated": evaluated}


def main(phase: str, given: str, target: str) -> None:
    """A phase of the job in a JSON file; its result goes to another one."""
    try:
        found = PHASES[phase](Job(**json.loads(Path(given).read_text())))
    except UserError as e:
        sys.exit(str(e))
    Path(target).write_text(json.dumps(found))


def as_json(job: Job) -> str:
    return json.dumps(asdict(job))
