"""Which training engine a recipe gets."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from strop.trainer.config import Lora, Part, Train
from strop.trainer.errors import UserError
from strop.trainer.models.loading import DTYPES, ModelFolder, read_tensors
from strop.trainer.planning import estimates
from strop.trainer.planning.memory import Setting
from strop.trainer.planning.shape import read_shape
from strop.trainer.run.store import Stage
from strop.trainer.run.world import World
from strop.trainer.sharding import Auto, DeepSpeed, Fsdp, Local, Trainer, deepspeed_fault
from strop.trainer.training import deepspeed, fsdp, local
from strop.trainer.training.engine import Training
from strop.trainer.training.machine import ranks_here

SHARE = 0.8  # of the free memory that weights and their training state may take where no formula knows the model


def open_engine(folder: ModelFolder, section: Train, stage: Stage, steps: int, *, compute: Part, lora: Lora, seed: int,
                reward: bool = False) -> Training:
    """The engine that compute.engine names, with the model of `folder`; see Training for the arguments."""
    options = settle(compute.engine, folder.path, section, lora, DTYPES[compute.dtype], stage.world, steps)
    if isinstance(compute.engine, Auto) and not isinstance(options, Local):
        keys = options.model_dump(exclude_defaults=True, exclude={"timeout"})
        said = " ".join(f"engine.{key}={value}" for key, value in ({"kind": options.kind} | keys).items())
        stage.console.line(f"{stage.name}: {said}, because a rank has no room for all of its training")
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
        not isinstance(options, Fsdp) and count_of(folder.path) * dtype.itemsize <= SHARE * room(world))
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
    if isinstance(options, DeepSpeed) and (fault := deepspeed_fault()):
        raise UserError(f"engine.kind=deepspeed: {fault}: pip install 'strop[deepspeed]'")


def settle(options: Trainer, path: Path, section: Train, lora: Lora, dtype: torch.dtype, world: World,
           steps: int = 0) -> Trainer:
    """`options` with kind=auto resolved, the same on every rank: the first of estimates.ways that fits on all of
    them. steps: of the stage."""
    if not isinstance(options, Auto):
        return options
    try:
        shape = read_shape(path)
    except UserError:  # a kind of model without a formula
        is_local = world.size == 1 or section.unfit("fsdp", "auto") is not None or (
            bytes_needed(path, section, lora, dtype) <= SHARE * room(world))
        setting = Setting(engine="local" if all(world.gather(is_local)) else "fsdp")
    else:
        on = ranks_here(world)
        checks = getattr(section, "eval_prompts", 0) if 0 < getattr(section, "eval_steps", 0) <= steps else 0
        setting = estimates.setting_of(
            section, shape, ranks=world.size, device=on.device, width=dtype.itemsize, lora_rank=lora.rank,
            sequence=options.sequence_parallel, checks=checks, points=steps > section.checkpoint_steps)
        there = min(world.gather(estimates.engines()), key=len)  # on every machine
        found = estimates.ways(setting, there, section)
        setting = found[max(world.gather(estimates.first_fit(shape, found, on)))]
    if setting.engine == "deepspeed":
        return DeepSpeed(timeout=options.timeout, zero_stage=setting.zero, offload_optimizer=setting.offload,
                         offload_param=setting.offload if setting.offload_weights else "none")
    both = {"timeout": options.timeout, "sequence_parallel": options.sequence_parallel}
    return Local(**both) if setting.engine == "local" else Fsdp(**both, cpu_offload=bool(setting.offload))


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


def room(world: World) -> int:
    """Bytes that this rank may fill: of its GPU, or its share of the host's memory."""
    on = ranks_here(world)
    return on.memory // (on.per_node if on.device == "cpu" else 1)
