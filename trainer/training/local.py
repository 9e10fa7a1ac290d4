"""A model in training: bf16 compute over fp32 masters, moments and accumulated gradients; steps and checkpoints."""

import math
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from strop.trainer.config import Lora, Part, Train
from strop.trainer.errors import UserError
from strop.trainer.models.folders import save_model
from strop.trainer.models.loading import DTYPES, ModelFolder
from strop.trainer.run.artifacts import check_file, list_files
from strop.trainer.run.files import read_json, write_json, writing
from strop.trainer.run.store import Stage
from strop.trainer.training.masters import Masters


def learning_rate(step: int, steps: int, section: Train) -> float:
    """The learning rate of step 0 <= step < steps: linear warm-up to the peak, then the schedule."""
    warmup = math.ceil(steps * section.warmup_ratio)
    if step < warmup:
        return section.lr * (step + 1) / warmup
    if section.schedule == "constant":
        return section.lr
    progress = (step - warmup) / max(1, steps - warmup)
    shape = 1 - progress if section.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return section.lr * (section.min_lr_ratio + (1 - section.min_lr_ratio) * shape)


def bema_powers(step: int, section: Train) -> tuple[float, float]:
    """(alpha, beta) of BEMA after `step` steps, from 1: (lag + step)^-bias_power and (lag + step)^-ema_power, arXiv
    2508.00180 algorithm 1, with an update after every step."""
    age = section.bema_lag + step
    return age**-section.bema_bias_power, age**-section.bema_ema_power


class Engine:
    """A model in training, replicated on every rank; gradients are summed over the ranks once per step."""

    def __init__(self, folder: ModelFolder, section: Train, stage: Stage, steps: int, *, compute: Part, lora: Lora,
                 seed: int, reward: bool = False):
        """compute: the recipe's dtype and attention. seed: initializes adapters and a new score head, the same on every
        rank. reward: train a sequence classifier with one output, not a causal LM."""
        self.section, self.world, self.steps, self.folder = section, stage.world, steps, folder
        self.lora, self.seed, self.dtype = lora, seed, DTYPES[compute.dtype]
        self.tokenizer_files = folder.path  # the folder whose tokenizer is saved with the weights
        model = folder.load(self.dtype, stage.world.device, backend=compute.attention, reward=reward,
                            head_seed=seed % 2**63 if reward else None)
        if section.activation_checkpointing:
            # transformers before 5.20 has the older name only
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        disable_dropout(model)
        if lora.rank:
            model = add_lora(model, lora, seed, "SEQ_CLS" if reward else "CAUSAL_LM")
        model.train()
        self.model = model
        self.names = [n for n, p in model.named_parameters() if p.requires_grad]
        self.weights = Masters([p for p in model.parameters() if p.requires_grad], section, stage.world)
        averages = section.ema_decay or section.bema
        self.ema = [m.detach().clone() for m in self.masters] if averages else None
        self.start = [m.detach().clone() for m in self.masters] if section.bema else None
        self.step_index = 0
        self.extra: dict[str, torch.Tensor] = {}  # what a loss keeps from step to step, part of the checkpoints
        self.kept: dict[str, dict] = {}  # files of snapshots with their hashes, stored in the checkpoint

    @property
    def masters(self) -> list[torch.Tensor]:
        return self.weights.masters

    @torch.no_grad()
    def step(self) -> torch.Tensor:
        """Sums gradients over the ranks, clips, updates masters and weights. Returns the unclipped gradient norm."""
        norm = self.weights.step(self.step_index + 1, learning_rate(self.step_index, self.steps, self.section))
        if self.ema is not None:
            section = self.section
            share = bema_powers(self.step_index + 1, section)[1] if section.bema else 1 - section.ema_decay
            torch._foreach_lerp_(self.ema, [m.detach() for m in self.masters], share)
        self.step_index += 1
        return norm

    def save(self, target: Path) -> None:
        """Writes the weights as a Hugging Face folder, with adapters merged and also in adapter/. Rank 0 only."""
        if not self.world.first:
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        if not self.lora.rank:
            save_model(self.model, self.tokenizer_files, target)
            return
        save_model(self.model.get_base_model(), self.tokenizer_files, target, merged_weights(self.model))
        self.model.save_pretrained(target / "adapter")

    def save_ema(self, target: Path) -> None:
        """Writes the averaged weights; the model's weights stay as they are.

        With section.bema: EMA + alpha (weights - start), arXiv 2508.00180 algorithm 1, which corrects the EMA's lag.
        """
        if self.ema is None or not self.world.first:
            return
        current = [m.detach().clone() for m in self.masters]
        averaged = self.ema
        if self.start is not None and self.step_index:
            alpha, _ = bema_powers(self.step_index, self.section)
            averaged = [e + alpha * (m - s) for e, m, s in zip(self.ema, current, self.start, strict=True)]
        self.weights.copy(averaged)
        self.save(target)
        self.weights.copy(current)

    def save_checkpoint(self, work: Path) -> None:
        """Writes masters, moments, EMA, step and hashes, then deletes the previous checkpoint.

        Raises UserError if it cannot be written; the previous checkpoint is then kept."""
        if not self.world.first:
            return
        tensors = {}
        for name, master in zip(self.names, self.masters, strict=True):
            tensors[f"master/{name}"] = master.detach()
            for key, value in self.weights.optimizer.state[master].items():
                tensors[f"{key}/{name}"] = value
        for name, value in zip(self.names, self.ema or [], strict=self.ema is not None):
            tensors[f"ema/{name}"] = value
        tensors |= {f"extra/{name}": value for name, value in self.extra.items()}
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
        """Loads the newest checkpoint, if there is one. Raises UserError if it is damaged."""
        self.world.barrier()
        points = sorted(work.glob("step-*"))
        if not points:
            return False
        state = read_json(points[-1] / "state.json")
        if self.world.first:
            for folder, files in ((points[-1], state["files"]), (work.parent, state["kept"])):
                for name, entry in files.items():
                    check_file(folder / name, entry, f"delete the folder {work} to train the stage from its start")
        self.world.barrier()
        self.kept = state["kept"]
        tensors = load_file(points[-1] / "state.safetensors", device=str(self.world.device))
        for name, master in zip(self.names, self.masters, strict=True):
            master.copy_(tensors[f"master/{name}"])
            keys = [k for k in ("step", "exp_avg", "exp_avg_sq") if f"{k}/{name}" in tensors]
            self.weights.optimizer.state[master] = {k: tensors[f"{k}/{name}"] for k in keys}
        if self.ema is not None:
            self.ema = [tensors[f"ema/{name}"] for name in self.names]
        self.extra = {name: tensors[f"extra/{name}"] for name in self.extra}
        self.weights.copy(self.masters)
        self.step_index = state["step"]
        self.world.barrier()  # rank 0 must not replace a checkpoint that another rank still reads
        return True


def add_lora(model: nn.Module, lora: Lora, seed: int, task: str = "CAUSAL_LM") -> nn.Module:
    """Wraps the model with new adapters, initialized from `seed`. Raises UserError if peft is missing or an adapter
    lands on the head."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as e:
        raise UserError("lora.rank is set, but peft is not installed: pip install peft") from e
    torch.manual_seed(seed % 2**63)
    try:
        model = get_peft_model(model, LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout,
                                                 target_modules=lora.target_modules, task_type=task),
                               autocast_adapter_dtype=False)  # fp32 adapters would cast all activations; see Masters
    except (ValueError, TypeError, re.error) as e:  # no such module, or one that peft cannot adapt
        raise UserError(f"lora.target_modules={lora.target_modules}: {str(e)[:300]}; name linear layers, or all-linear"
                         ) from e
    if hasattr(model.get_base_model().get_output_embeddings(), "lora_A"):
        raise UserError(f"lora.target_modules={lora.target_modules}: an adapter on the head is not supported, the "
                         "fused head would ignore it; remove the head from the list")
    return model


@torch.no_grad()
def merged_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The base model's state dict with the adapters merged, one matrix at a time; merged ones are on the host."""
    base, merged, found = model.get_base_model(), {}, {}
    for module in base.modules():
        if hasattr(module, "get_delta_weight"):
            weight, (adapter,) = module.get_base_layer().weight, module.active_adapters
            merged[weight.data_ptr()] = (weight + module.get_delta_weight(adapter).to(weight.dtype)).cpu()
    for name, value in base.state_dict().items():
        if ".lora_" not in name and ".original_module." not in name:  # of a reward model's head the trained copy counts
            name = re.sub(r"\.modules_to_save\.\w+\.", ".", name)
            found[name.replace(".base_layer.", ".")] = merged.get(value.data_ptr(), value)
    return found


def disable_dropout(model: nn.Module) -> None:
    """Log-ratios of policy and reference are meaningless under dropout, so the model's dropout is off."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
