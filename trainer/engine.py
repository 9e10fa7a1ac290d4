"""Model, optimizer, step and checkpoint: bf16 compute over fp32 masters, moments and accumulated gradients."""

import math
import os
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from strop.kernels import PackedGroups, linear_logprob
from strop.trainer.batch import Example, Packing, collate, microbatches
from strop.trainer.config import Recipe, Train
from strop.trainer.masters import Masters
from strop.trainer.models import DTYPES, head_of, load_model, save_model
from strop.trainer.perf import peak_flops, sizes_of, training_flops
from strop.trainer.store import Stage, check_file, list_files, read_json, write_json, write_table, writing


class Scorer:
    """A loaded model that gives per-token log-probs of packed groups."""

    def __init__(self, model: nn.Module, packed: bool = True):
        """packed=False runs one completion a row, for models whose state crosses completions (see probe)."""
        self.model, self.packed = model, packed

    def __call__(self, groups: PackedGroups, stats: tuple[str, ...] = ()):
        """fp32 log-probs [targets] of `groups.target`; with `stats` also a dict of fp32 [targets] tensors."""
        model = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        head, body = head_of(model), model.get_decoder()
        if self.packed:
            hidden = body(input_ids=groups.input_ids[None], position_ids=groups.position_ids[None], groups=groups,
                          use_cache=False).last_hidden_state[0].index_select(0, groups.pred_index)
        else:
            hidden = hidden_of_separate_rows(body, groups)
        return linear_logprob(hidden, head.weight, groups.target, head.bias, logit_scale=head.scale,
                              softcap=head.softcap, stats=stats)


def hidden_of_separate_rows(body: nn.Module, groups: PackedGroups) -> torch.Tensor:
    """Hidden states [targets, D] at the predicting positions, every prompt and completion run as a row of its own.

    No padding and no mask, so that this is exact for any causal model, recurrent ones included.
    """
    parts = []
    for (start, end), g, (first, last) in zip(groups.completion_bounds, groups.completion_group, groups.target_bounds,
                                              strict=True):
        p0, p1 = groups.prompt_bounds[g]
        row = torch.cat([groups.input_ids[p0:p1], groups.input_ids[start:end]])[None]
        hidden = body(input_ids=row, use_cache=False).last_hidden_state[0]
        parts.append(hidden.index_select(0, groups.position_ids[groups.pred_index[first:last]]))
    return torch.cat(parts)


def learning_rate(step: int, steps: int, section: Train) -> float:
    """The rate of step 0 <= step < steps: a linear warm-up that reaches the peak, then the schedule."""
    warmup = math.ceil(steps * section.warmup_ratio)
    if step < warmup:
        return section.lr * (step + 1) / warmup
    if section.schedule == "constant":
        return section.lr
    progress = (step - warmup) / max(1, steps - warmup)
    shape = 1 - progress if section.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return section.lr * (section.min_lr_ratio + (1 - section.min_lr_ratio) * shape)


class Engine:
    """A model in training. Every rank holds all of it; gradients are added over the ranks once a step."""

    def __init__(self, model_dir: Path, section: Train, recipe: Recipe, stage: Stage, steps: int):
        self.section, self.recipe, self.world, self.steps = section, recipe, stage.world, steps
        self.model_dir = model_dir
        dtype = DTYPES[recipe.dtype]
        model = load_model(model_dir, dtype, stage.world.device, trust_remote_code=recipe.model.trust_remote_code,
                           backend=recipe.attention)
        if section.activation_checkpointing:
            # the older name serves transformers before 5.20
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        disable_dropout(model)
        if recipe.lora.rank:
            model = add_lora(model, recipe)
        model.train()
        self.model = model
        self.names = [n for n, p in model.named_parameters() if p.requires_grad]
        self.weights = Masters([p for p in model.parameters() if p.requires_grad], section, stage.world)
        self.ema = [m.detach().clone() for m in self.masters] if section.ema_decay else None
        self.step_index = 0
        self.kept: dict[str, dict] = {}  # files of snapshots with their hashes, as the resume point knows them

    @property
    def masters(self) -> list[torch.Tensor]:
        return self.weights.masters

    @torch.no_grad()
    def step(self) -> torch.Tensor:
        """Adds gradients over the ranks, clips, updates masters and weights. Returns the gradient norm, unclipped."""
        norm = self.weights.step(self.step_index + 1, learning_rate(self.step_index, self.steps, self.section))
        if self.ema is not None:
            torch._foreach_lerp_(self.ema, [m.detach() for m in self.masters], 1 - self.section.ema_decay)
        self.step_index += 1
        return norm

    # -- what is written ----------------------------------------------------------------------------------------------

    def save(self, target: Path) -> None:
        """Writes the weights as a Hugging Face folder (adapters merged in; the adapter beside them). Rank 0 only."""
        if not self.world.first:
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        if not self.recipe.lora.rank:
            save_model(self.model, self.model_dir, target)
            return
        import copy

        merged = copy.deepcopy(self.model).merge_and_unload()
        save_model(merged, self.model_dir, target)
        self.model.save_pretrained(target / "adapter")

    def save_ema(self, target: Path) -> None:
        """Writes the averaged weights, leaving the model's own as they are."""
        if self.ema is None or not self.world.first:
            return
        own = [m.detach().clone() for m in self.masters]
        self.weights.copy(self.ema)
        self.save(target)
        self.weights.copy(own)

    def save_checkpoint(self, work: Path) -> None:
        """A resume point: masters, moments, average, step, and hashes. The one before goes when this is complete.

        Raises ValueError where it cannot be written; the one before then stands."""
        if not self.world.first:
            return
        tensors = {}
        for name, master in zip(self.names, self.masters, strict=True):
            tensors[f"master/{name}"] = master.detach()
            for key, value in self.weights.optimizer.state[master].items():
                tensors[f"{key}/{name}"] = value
        for name, value in zip(self.names, self.ema or [], strict=self.ema is not None):
            tensors[f"ema/{name}"] = value
        for folder in (work.parent / "snapshots").glob("step-*"):
            if not any(name.startswith(f"snapshots/{folder.name}/") for name in self.kept):
                self.kept |= {f"snapshots/{folder.name}/{n}": entry for n, entry in list_files(folder).items()}
        target = work / f"step-{self.step_index:06}"
        temporary = work / f".checkpoint-{self.step_index:06}"
        with writing(target, temporary):
            temporary.mkdir()
            save_file({k: v.contiguous() for k, v in tensors.items()}, temporary / "state.safetensors")
            with open(temporary / "state.safetensors", "rb") as f:
                os.fsync(f.fileno())
            write_json(temporary / "state.json", {"step": self.step_index, "steps": self.steps, "kept": self.kept,
                                                  "files": list_files(temporary / "state.safetensors")})
            shutil.rmtree(target, ignore_errors=True)
            os.replace(temporary, target)
        for old in work.glob("step-*"):
            if old != target:
                shutil.rmtree(old)

    @torch.no_grad()
    def resume(self, work: Path) -> bool:
        """Loads the newest resume point, if there is one. Raises ValueError if it is damaged."""
        self.world.barrier()
        points = sorted(work.glob("step-*"))
        if not points:
            return False
        state = read_json(points[-1] / "state.json")
        if self.world.first:
            remedy = f"delete the folder {work} to have the stage trained anew from its start"
            for name, entry in state["files"].items():
                check_file(points[-1] / name, entry, remedy)
            for name, entry in state["kept"].items():
                check_file(work.parent / name, entry, remedy)
        self.world.barrier()
        self.kept = state["kept"]
        tensors = load_file(points[-1] / "state.safetensors", device=str(self.world.device))
        for name, master in zip(self.names, self.masters, strict=True):
            master.copy_(tensors[f"master/{name}"])
            keys = [k for k in ("step", "exp_avg", "exp_avg_sq") if f"{k}/{name}" in tensors]
            self.weights.optimizer.state[master] = {k: tensors[f"{k}/{name}"] for k in keys}
        if self.ema is not None:
            self.ema = [tensors[f"ema/{name}"] for name in self.names]
        self.weights.copy(self.masters)
        self.step_index = state["step"]
        self.world.barrier()  # nobody overwrites what another rank still reads
        return True


def add_lora(model: nn.Module, recipe: Recipe) -> nn.Module:
    """Wraps the model with fresh adapters, the same ones on every rank."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as e:
        raise ValueError("lora.rank is set, but peft is not installed: pip install peft") from e
    lora = recipe.lora
    torch.manual_seed(recipe.seed)
    model = get_peft_model(model, LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout,
                                             target_modules=lora.target_modules, task_type="CAUSAL_LM"))
    if hasattr(model.get_base_model().get_output_embeddings(), "lora_A"):
        raise ValueError(f"lora.target_modules={lora.target_modules}: an adapter on the head is not supported, the "
                         "fused head would ignore it; leave it out")
    return model


def disable_dropout(model: nn.Module) -> None:
    """Log-ratios of policy and reference mean nothing under dropout, so the model's own is off."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0


@dataclass
class Step:
    """What a microbatch's loss function may use: its rows and the counts of the whole global step."""

    index: int
    rows: list[int]
    totals: dict[str, int] = field(default_factory=dict)


def train(stage: Stage, engine: Engine, scorer: Scorer, examples: list[Example], plan: list[list[int]], totals, loss,
          names: tuple[str, ...], finish) -> None:
    """Runs the steps of `plan`, resumes and checkpoints, logs.

    totals(rows) -> dict of counts over a global step; loss(groups, step) -> (scalar, fp32 vector of sums in the order
    of `names`) for one microbatch, already normalised by the step's totals, so that adding over microbatches and ranks
    gives the step's loss. finish(sums [names] on the host) -> the values to log.
    """
    section, world, work = engine.section, engine.world, stage.work
    if engine.resume(work):
        stage.console.line(f"{stage.name}: resumed at step {engine.step_index} of {len(plan)}")
        stage.metrics.rewind(stage.name, engine.step_index)
    keep = {round(len(plan) * (i + 1) / (section.snapshots + 1)) for i in range(section.snapshots)} - {0, len(plan)}
    peak = peak_flops(world.device, DTYPES[engine.recipe.dtype])
    sizes = sizes_of(engine.model)
    costs = [training_flops(sizes, example) for example in examples]
    whole, packing = (Packing(examples, costs, section.max_tokens) for _ in range(2))
    for rows in plan[:engine.step_index]:  # steps that were done before count too
        whole.add(microbatches(examples, rows, costs, section.max_tokens, world.size))
    sums, seen = torch.zeros(len(names), device=world.device), []  # seen: loss and gradient norm of each step
    started = time.perf_counter()
    with stage.console.progress(stage.name, total=len(plan), unit="steps", done=engine.step_index) as bar:
        while engine.step_index < len(plan):
            rows = plan[engine.step_index]
            if engine.recipe.lora.dropout:
                torch.manual_seed(hash((engine.recipe.seed, engine.step_index, world.rank)))
            step, value_sum = Step(engine.step_index, [], totals(rows)), torch.zeros((), device=world.device)
            shares = microbatches(examples, rows, costs, section.max_tokens, world.size)
            for i, step.rows in enumerate(shares[world.rank]):
                if i:
                    engine.weights.fold()
                groups = collate(examples, step.rows, world.device)
                value, vector = loss(groups, step)
                value.backward()
                sums += vector
                value_sum += value.detach()
            seen.append(torch.stack([value_sum, engine.step()]))
            whole.add(shares)
            packing.add(shares)
            distinct = sum(examples[i].tokens for i in rows)
            if engine.step_index % engine.recipe.log.interval == 0 or engine.step_index == len(plan):
                seconds = time.perf_counter() - started
                packed = torch.cat([sums, *seen])
                world.sum_([packed])  # the one reduction of the interval
                host = packed.cpu()  # and the one wait for the device
                stop_if_not_finite(stage, engine, examples, plan, host[len(names):])
                values = finish(host[:len(names)])
                values |= {"grad_norm": host[len(names) + 1::2].mean().item() / world.size,
                           "learning_rate": learning_rate(engine.step_index - 1, len(plan), section),
                           "tokens_per_second": packing.tokens / seconds,
                           "mfu": packing.flops / seconds / peak / world.size, **packing.values()}
                if world.device.type == "cuda":
                    values["memory_peak"] = torch.cuda.max_memory_allocated() / 2**30
                stage.metrics.log(stage.name, engine.step_index, values, total=len(plan))
                sums.zero_()
                seen.clear()
                packing = Packing(examples, costs, section.max_tokens)
                started = time.perf_counter()
            bar.advance(1, tokens=distinct)
            is_point = engine.step_index % section.checkpoint_steps == 0 and engine.step_index < len(plan)
            if seen and (is_point or engine.step_index in keep):  # what is not finite is never written
                packed = torch.cat(seen)
                world.sum_([packed])
                stop_if_not_finite(stage, engine, examples, plan, packed.cpu())
            if engine.step_index in keep:
                engine.save(stage.dir / "snapshots" / f"step-{engine.step_index:06}")
            if is_point:
                engine.save_checkpoint(work)
    stage.counts |= {"microbatches": whole.microbatches} | whole.values()
    engine.save(stage.dir / "model")
    engine.save_ema(stage.dir / "ema")


def stop_if_not_finite(stage: Stage, engine: Engine, examples: list[Example], plan: list[list[int]],
                       seen: torch.Tensor) -> None:
    """Raises ValueError at the first of the last steps whose loss or gradient norm is not finite, and writes its batch
    beside the resume point. seen [2 * steps] on the host: loss and gradient norm of each, added over the ranks."""
    bad = (~seen.view(-1, 2).isfinite()).any(1).nonzero()
    if not len(bad):
        return
    first = int(bad[0])
    index = engine.step_index - len(seen) // 2 + first
    loss, norm = seen[2 * first:2 * first + 2].tolist()
    rows = [examples[i] for i in plan[index]]
    path, points = stage.work / f"bad-step-{index + 1:06}.parquet", sorted(stage.work.glob("step-*"))
    if engine.world.first:
        write_table(path, pa.Table.from_pylist([{
            "row_id": e.row_id, "prompt_tokens": list(e.group.prompt), "weight": e.weight,
            "completion_tokens": [list(c) for c in e.group.completions],
            "loss_masks": [list(m) for m in e.group.loss_masks] if e.group.loss_masks else None} for e in rows]))
    ids = ", ".join(e.row_id for e in rows[:4]) + (f" and {len(rows) - 4} more" if len(rows) > 4 else "")
    raise ValueError(f"{stage.name}: step {index + 1}: loss={loss:g} and grad_norm={norm / engine.world.size:g} must "
                     f"be finite; its batch (rows {ids}) is in {path}, the last good checkpoint is "
                     f"{points[-1] if points else 'the start of the stage'}; lower {stage.name.split('/')[-1]}.lr or "
                     "look at these rows")
