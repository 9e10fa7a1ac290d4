"""Which training engine a recipe gets."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from strop.trainer.config import Lora, Part, Train
from strop.trainer.errors import UserError
from strop.trainer.models.loading import DTYPES, ModelFolder, read_tensors
from strop.trainer.run.store import Stage
from strop.trainer.run.world import World
from strop.trainer.sharding import Auto, DeepSpeed, Fsdp, Local, Trainer
from strop.trainer.training import deepspeed, fsdp, local
from strop.trainer.training.deepspeed import check_deepspeed
from strop.trainer.training.engine import Training

SHARE = 0.8  # of the free memory that weights and their training state may take; the rest is for activations


def open_engine(folder: ModelFolder, section: Train, stage: Stage, steps: int, *, compute: Part, lora: Lora, seed: int,
                reward: bool = False) -> Training:
    """The engine that compute.engine names, with the model of `folder`; see Training for the arguments."""
    options = settle(compute.engine, folder.path, section, lora, DTYPES[compute.dtype], stage.world)
    if isinstance(compute.engine, Auto) and not isinstance(options, Local):
        stage.console.line(f"{stage.name}: engine {options.kind}, because the model does not fit on one rank")
    if why := section.unfit(options.kind, str(DTYPES[compute.dtype]).removeprefix("torch.")):
        raise UserError(f"{stage.name}: {why}")
    engine = {"local": local, "fsdp": fsdp, "deepspeed": deepspeed}[options.kind].Engine
    return engine(folder, section, stage, steps, compute=compute, lora=lora, seed=seed, reward=reward, options=options)


def open_frozen(folder: ModelFolder, stage: Stage, *, compute: Part) -> tuple[nn.Module, Callable, bool]:
    """(causal LM, run, whether it is sharded), to score with: run(function, *arguments) calls a function of the model,
    on every rank at once if it is sharded: with engine.kind=fsdp, and with auto and deepspeed where it does not fit."""
    world, dtype = stage.world, DTYPES[compute.dtype]
    options = compute.engine
    fits = world.size == 1 or isinstance(options, Local) or (
        not isinstance(options, Fsdp) and count_of(folder.path) * dtype.itemsize <= SHARE * free_memory(world))
    if all(world.gather(fits)):
        return (folder.load(dtype, world.device, backend=compute.attention),
                lambda function, *arguments: function(*arguments), False)
    model = folder.load(dtype, world.device, backend=compute.attention, on_host=True).requires_grad_(False)
    return model, fsdp.sharded(model, world, dtype, Fsdp(timeout=options.timeout)), True


def check_engine(options: Trainer, online: bool) -> None:
    """Raises UserError, before anything runs, if a stage of `online` training cannot use the section engine, or if a
    package that it needs is missing."""
    if online and not isinstance(options, Auto | Local):
        raise UserError(f"engine.kind={options.kind}: online training samples from whole weights on every rank; set "
                        "engine.kind=local")
    if isinstance(options, DeepSpeed):
        check_deepspeed()


def settle(options: Trainer, path: Path, section: Train, lora: Lora, dtype: torch.dtype, world: World) -> Trainer:
    """`options` with kind=auto resolved, the same on every rank: local for one rank, where it fits and for what fsdp
    cannot train, else fsdp."""
    if not isinstance(options, Auto):
        return options
    is_local = world.size == 1 or section.unfit("fsdp", "auto") is not None or (
        bytes_needed(path, section, lora, dtype) <= SHARE * free_memory(world))
    kind = Local if all(world.gather(is_local)) else Fsdp
    return kind(timeout=options.timeout, sequence_parallel=options.sequence_parallel)


def bytes_needed(path: Path, section: Train, lora: Lora, dtype: torch.dtype) -> int:
    """Bytes on each rank of what a local engine keeps. Of a trained parameter 20: in bfloat16 weight 2, gradient 2,
    fp32 master 4, moments 8, gradient sum 4; in float32 weight 4, gradient 4, moments 8, gradient sum 4. Cheaper forms
    of the state take less, averages come on top. Of a frozen one its weight."""
    count = count_of(path)
    if lora.rank:  # adapters are small beside the weights
        return dtype.itemsize * count
    averages = 8 if section.bema else 4 if section.ema_decay else 0
    state = {"float32": 8, "bfloat16": 4, "int8": 2}[section.moments] if section.optimizer == "adamw" else 4
    return (12 + state - 2 * (section.masters == "split") + averages) * count


def count_of(path: Path) -> int:
    """Parameters of a model folder."""
    return sum(tensor.numel() for _, tensor in read_tensors(path).values())


def free_memory(world: World) -> int:
    """Bytes that are free for this rank: of its GPU, or its share of the host's memory."""
    if world.device.type == "cuda":
        return torch.cuda.mem_get_info(world.device)[0]
    text = Path("/proc/meminfo").read_text() if Path("/proc/meminfo").exists() else ""
    found = [int(line.split()[1]) << 10 for line in text.splitlines() if line.startswith("MemAvailable:")]
    return found[0] // world.size if found else 1 << 62
