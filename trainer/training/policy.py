"""The model of a training stage, as every engine loads and exports it."""

import re
from collections.abc import Callable, Iterator
from itertools import chain

import torch
from torch import nn

from strop.kernels.integrations.peft import fuse_adapters
from strop.trainer.config import Lora, Part, Train
from strop.trainer.errors import UserError
from strop.trainer.models.loading import DTYPES, ModelFolder
from strop.trainer.run.world import World
from strop.trainer.training.offload import offload


class Policy(nn.Module):
    """Wraps a model so that an engine that shards it has one forward pass to hook: `policy(function, *arguments)` calls
    the function while the hooks provide the weights that it uses, those outside the layers for the whole call."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, function: Callable, *arguments):
        return function(*arguments)


def load_policy(folder: ModelFolder, section: Train, device: torch.device, *, compute: Part, lora: Lora, seed: int,
                reward: bool, on_host: bool = False) -> nn.Module:
    """The model in training mode, in the compute dtype, for `device`; with on_host its weights stay on the host.

    seed: initializes adapters and a new score head, the same on every rank. reward: a sequence classifier with one
    output, not a causal LM."""
    model = folder.load(DTYPES[compute.dtype], device, backend=compute.attention, reward=reward, on_host=on_host,
                        fuse=not section.compile, head_seed=seed % 2**63 if reward else None)
    if section.activation_checkpointing:
        # transformers before 5.20 has the older name only
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        if section.activation_offload:
            offload(model, device)
    disable_dropout(model)
    if lora.rank:
        model = add_lora(model, lora, seed, "SEQ_CLS" if reward else "CAUSAL_LM")
        if not section.compile:  # which fuses them itself
            fuse_adapters(model)
    return model.train()


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


def base_of(model: nn.Module) -> nn.Module:
    """The model without adapters around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def tensors_of(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of a state dict, tied ones under each of their names, without the hooks of `state_dict`, which
    shard the weights of some engines."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        kept = {n: b for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set}
        for name, value in chain(module._parameters.items(), kept.items()):
            if value is not None:
                yield f"{prefix}.{name}" if prefix else name, value.detach()


@torch.no_grad()
def merged_weights(model: nn.Module, is_whole: Callable[[torch.Tensor], bool] = lambda _: True
                   ) -> dict[str, torch.Tensor]:
    """The base model's state dict with the adapters merged, one matrix at a time; merged ones are on the host. Leaves
    out tensors that are not whole on this rank."""
    base, merged, found = model.get_base_model(), {}, {}
    for module in base.modules():
        if hasattr(module, "get_delta_weight") and is_whole(module.get_base_layer().weight):
            weight, (adapter,) = module.get_base_layer().weight, module.active_adapters
            merged[weight.data_ptr()] = (weight + module.get_delta_weight(adapter).to(weight.dtype)).cpu()
    for name, value in tensors_of(base):
        # of a reward model's head the trained copy counts
        if ".lora_" not in name and ".original_module." not in name and is_whole(value):
            name = re.sub(r"\.modules_to_save\.\w+\.", ".", name)
            found[name.replace(".base_layer.", ".")] = merged.get(value.data_ptr(), value)
    return found


@torch.no_grad()
def export(model: nn.Module, parts: list[nn.Module], gather: Callable, is_whole: Callable[[torch.Tensor], bool],
           world: World, has_adapters: bool) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor] | None]:
    """State dicts of a sharded model with adapters merged, and of its adapters, on the first rank's host; empty on
    others. Parts are gathered on the device one after another: inside `gather(part)` the tensors of a part of the model
    are whole."""
    weights, adapter = {}, {}
    for part in parts:
        with gather(part):
            if not world.first:
                continue
            inside = {name: t for name, t in tensors_of(model) if is_whole(t)}
            copies: dict[int, torch.Tensor] = {}  # one for tied tensors, so that they are saved once
            for found, target in ((merged_weights(model, is_whole) if has_adapters else inside, weights),
                                  ({n: t for n, t in inside.items() if is_adapter(n)}, adapter)):
                for name, tensor in found.items():
                    if name not in target:
                        at = tensor.data_ptr()
                        copies[at] = copies[at] if at in copies else tensor.detach().to("cpu", copy=True)
                        target[name] = copies[at]
    return weights, adapter if has_adapters else None


def is_adapter(name: str) -> bool:
    return ".lora_" in name or ".modules_to_save." in name


def layers_of(base: nn.Module) -> list[nn.Module]:
    """The model's layers: the entries of its largest list of modules."""
    lists = [m for m in base.modules() if isinstance(m, nn.ModuleList)]
    return list(max(lists, key=lambda m: sum(p.numel() for p in m.parameters()), default=()))


def disable_dropout(model: nn.Module) -> None:
    """Log-ratios of policy and reference are meaningless under dropout, so the model's dropout is off."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
