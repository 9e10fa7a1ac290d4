"""The engine on PyTorch's FSDP2: every rank keeps a part of each layer's weights, gradients and optimizer.

The sharded fp32 parameters are the master weights. A layer's weights are gathered in the compute dtype when it runs;
what lies outside the layers (embedding, last norm, head) once for a whole microbatch.
"""

from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from strop.trainer.config import Lora, Part, Train
from strop.trainer.errors import UserError
from strop.trainer.models.loading import ModelFolder
from strop.trainer.run.store import Stage
from strop.trainer.run.world import World
from strop.trainer.sharding import Fsdp
from strop.trainer.training.engine import Training
from strop.trainer.training.masters import Masters
from strop.trainer.training.policy import Policy, base_of, export, layers_of
from strop.trainer.training.waits import Waits

# methods of FSDP's groups of parameters in which a rank waits for others: on a CPU, and on a GPU its stream
EXCHANGES = ("unshard", "wait_for_unshard", "post_backward", "finalize_backward")


class Engine(Training):
    """Every method is called on every rank."""

    together = True

    def __init__(self, folder: ModelFolder, section: Train, stage: Stage, steps: int, *, compute: Part, lora: Lora,
                 seed: int, reward: bool = False, options: Fsdp | None = None):
        super().__init__(folder, section, stage, steps, compute=compute, lora=lora, seed=seed, reward=reward,
                         options=options or Fsdp(), on_host=True)
        self.group = self.world.group(self.timeout)
        self.policy = sharded(self.model, self.world, self.dtype, self.options)
        self.parts = [*layers_of(self.base), self.policy]
        time_waits(self.parts, self.waits)
        self.run(lambda: None)  # FSDP allocates its buffers when it first runs; the optimizer takes those
        trained = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        self.names, self.params = [n for n, _ in trained], [p for _, p in trained]
        # the same memory as the parts that FSDP gathers from
        shards = [nn.Parameter(p.detach().to_local()) for p in self.params]
        self.weights = Masters(shards, section, World(device=self.world.device), norm_of_all=self._norm_of_all,
                               starts=[start for start, _ in self._slices()])
        self._begin_averages()

    @property
    def masters(self) -> list[torch.Tensor]:
        return self.weights.masters

    def run(self, function, *arguments):
        found = self.policy(function, *arguments)
        # a backward pass frees what is outside the layers; without one it would be stale after the next step
        if not any(t.requires_grad for t in tree_leaves(found) if isinstance(t, torch.Tensor)):
            self.policy.reshard()
        return found

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        if not self.options.sync_each_microbatch:
            self.policy.set_requires_gradient_sync(last)
        loss.backward()

    def _update(self, number: int, lr: float) -> torch.Tensor:
        for param, local in zip(self.params, self.weights.params, strict=True):
            local.grad = None if param.grad is None else param.grad.to_local()
            param.grad = None
        return self.weights.step(number, lr)

    def _norm_of_all(self, norm: torch.Tensor) -> torch.Tensor:
        total = norm.to(self.world.device).square()
        with self.waits:
            dist.all_reduce(total, group=self.group)
        return total.sqrt().to(norm.device)

    def _set_weights(self, values: list[torch.Tensor]) -> None:
        self.weights.set(values)

    def _moments(self) -> list[dict[str, torch.Tensor]]:
        return self.weights.moments()

    def _set_moments(self, moments: list[dict[str, torch.Tensor]]) -> None:
        self.weights.set_moments(moments, self.step_index)

    def _slices(self) -> list[tuple[int, int]]:
        """FSDP cuts the first dimension as torch.chunk does."""
        found = []
        for param in self.params:
            rows, width = param.shape[0], param.shape[1:].numel()
            first = min(rows, -(-rows // self.world.size) * self.world.rank)
            found.append((first * width, param.to_local().numel()))
        return found

    @torch.no_grad()
    def _weights(self):
        return export(self.model, self.parts, self._whole, is_whole, self.world, bool(self.lora.rank))

    @contextmanager
    def _whole(self, part: nn.Module):
        part.unshard()
        yield
        part.reshard()


def time_waits(parts: list[nn.Module], waits: Waits) -> None:
    """Counts as waits what FSDP does with other ranks, with the copies to and from the buffers that are sent."""
    for part in parts:
        state = part._get_fsdp_state()
        for group in getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]:
            for name in EXCHANGES:
                setattr(group, name, waits.around(getattr(group, name)))


def is_whole(tensor: torch.Tensor) -> bool:
    return not isinstance(tensor, DTensor)


def check_unshared(base: nn.Module, layers: list[nn.Module]) -> None:
    """Raises UserError if a layer has weights that are also elsewhere in the model: FSDP gathers each on its own."""
    modules = {id(m) for layer in layers for m in layer.modules()}
    outside = [p for m in base.modules() if id(m) not in modules for p in m._parameters.values() if p is not None]
    owners = [{id(p) for p in layer.parameters()} for layer in layers] + [{id(p) for p in outside}]
    if len(set().union(*owners)) < sum(map(len, owners)):
        raise UserError(f"engine.kind=fsdp: layers of {type(base).__name__} share weights, which FSDP cannot shard; "
                        "set another engine.kind")


def sharded(model: nn.Module, world: World, dtype: torch.dtype, options: Fsdp) -> Policy:
    """The model, from the host's memory, sharded over all ranks, each layer and what is outside them; trained weights
    become fp32. Raises UserError if layers share weights."""
    base, policy = base_of(model), Policy(model)
    parts = [*layers_of(base), policy]
    check_unshared(base, parts[:-1])
    mesh = DeviceMesh.from_group(world.group(options.timeout), world.device.type)
    # the inputs of layers have the dtype that the model gives them, as without FSDP
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    offload = CPUOffloadPolicy(pin_memory=world.device.type == "cuda") if options.cpu_offload else OffloadPolicy()
    for part in parts:
        for param in part.parameters():
            if param.requires_grad and is_whole(param):
                param.data = param.data.float()
        is_root = part is parts[-1]
        fully_shard(part, mesh=mesh, mp_policy=precision, offload_policy=offload,
                    reshard_after_forward=options.reshard_after_forward and not is_root)
        part.set_gradient_divide_factor(1.0)  # our losses are normalized over the global batch
        part.set_force_sum_reduction_for_comms(True)
    return policy
