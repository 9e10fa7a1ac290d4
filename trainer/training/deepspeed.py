"""The engine on DeepSpeed's ZeRO: optimizer (stage 1), gradients (2), weights (3) in parts, also on the host.

Each rank keeps the fp32 masters and moments of its part of every parameter: with stages 1 and 2 where its slice of all
parameters laid end to end meets the parameter, with stage 3 an equal part of it.
"""

import logging
import os
import weakref
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from strop.kernels import optimizer
from strop.trainer.config import Lora, Part, Train
from strop.trainer.models.loading import ModelFolder
from strop.trainer.run.store import Stage
from strop.trainer.run.world import WAIT
from strop.trainer.sharding import DeepSpeed
from strop.trainer.training.engine import Training
from strop.trainer.training.policy import Policy, export, layers_of, merged_weights
from strop.trainer.training.waits import Waits

MOMENTS = ("exp_avg", "exp_avg_sq")
BUCKET = 500_000_000  # gradients that are sent together, at most
# methods in which a rank waits for others
EXCHANGES = ("wait", "all_reduce", "reduce", "reduce_scatter", "reduce_scatter_tensor", "all_gather", "broadcast",
             "all_gather_into_tensor", "all_gather_coalesced", "all_reduce_coalesced")
WHOLE = 100_000  # elements up to which stage 3 leaves a weight whole on every rank


class AdamW(torch.optim.AdamW):
    """Updates in one pass over memory, as Masters does, so that its numbers are those of the other engines.

    number: the step, from 1; set it before each."""

    number = 0

    @torch.no_grad()
    def step(self, closure=None) -> None:
        pairs = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        in_one_pass = optimizer.available([param for param, _ in pairs])
        for param, group in pairs:
            state = self.state[param]
            if not state:
                state |= {"step": torch.zeros((), device=param.device)} | {m: torch.zeros_like(param) for m in MOMENTS}
            if in_one_pass:
                optimizer.adamw_(param, param.grad, *(state[m] for m in MOMENTS), None,
                                 torch.ones((), device=param.device), step=self.number,
                                 **{key: group[key] for key in ("lr", "betas", "eps", "weight_decay")})
            else:
                state["step"].fill_(self.number - 1)  # PyTorch counts up itself
        if not in_one_pass:
            super().step()


class Timed:
    """DeepSpeed's communication backend, or a collective under way, with waits for other ranks counted."""

    def __init__(self, backend, waits: Waits):
        self.backend, self.waits = backend, waits

    def __getattr__(self, name: str):
        found = getattr(self.backend, name)
        if name not in EXCHANGES:
            return found

        def timed(*args, **kwargs):
            with self.waits:
                work = found(*args, **kwargs)
            return Timed(work, self.waits) if hasattr(work, "wait") else work

        return timed


class Engine(Training):
    """Every method is called on every rank."""

    together = True

    def __init__(self, folder: ModelFolder, section: Train, stage: Stage, steps: int, *, compute: Part, lora: Lora,
                 seed: int, reward: bool = False, options: DeepSpeed | None = None):
        options = options or DeepSpeed()
        super().__init__(folder, section, stage, steps, compute=compute, lora=lora, seed=seed, reward=reward,
                         options=options, on_host=options.zero_stage == 3)
        self.deepspeed = import_deepspeed(self.world.device)
        self.is_cut = options.zero_stage == 3  # whether the weights are
        self.world.group(self.timeout)  # makes the default group where a single rank has none
        trained = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        self.names, self.params = [n for n, _ in trained], [p for _, p in trained]
        self.shapes = [p.shape for p in self.params]
        settings = settings_of(options, section, self.dtype, sum(shape.numel() for shape in self.shapes))
        if self.is_cut:  # a parameter at a time; initialize would put the whole model on the device first
            where = None if options.offload_param == "none" else options.offload_param
            self.deepspeed.zero.Init(module=self.model, config_dict_or_path=settings, dtype=self.dtype,
                                     remote_device=where)
            for buffer in self.model.buffers():
                buffer.data = buffer.data.to(self.world.device)
        self.adamw = AdamW(self.params, lr=section.lr, betas=section.betas, eps=section.eps,
                           weight_decay=section.weight_decay, fused=True)
        policy, inside = Policy(self.model), self._inside_layers()
        for param in policy.parameters() if self.is_cut else ():
            if id(param) not in inside:  # gathered once for a whole pass: the fused head reads weights of modules
                self.deepspeed.zero.register_external_parameter(policy, param)  # that it does not call
        self.engine, self.optimizer, *_ = self.deepspeed.initialize(
            model=policy, optimizer=self.adamw, model_parameters=self.params, config=settings,
            dist_init_required=False)
        self._wait(WAIT)
        comm = self.deepspeed.comm.comm
        comm.cdb = Timed(comm.cdb.backend if isinstance(comm.cdb, Timed) else comm.cdb, self.waits)
        weakref.finalize(self, release, self.engine, list(self.model.parameters())).atexit = False
        self._begin_averages()

    @property
    def masters(self) -> list[torch.Tensor]:
        return [self._read(i) for i in range(len(self.params))]

    def run(self, function, *arguments):
        # in a tuple, since DeepSpeed's hooks look for tensors in what is returned, and take no plain value
        return self.engine(lambda: (function(*arguments),))[0]

    @contextmanager
    def within(self, what: str):
        """DeepSpeed's collectives are on the default group and a copy of it, which wait for days outside of steps."""
        self._wait(timedelta(seconds=self.timeout))
        try:
            with super().within(what):
                yield
        finally:
            self._wait(WAIT)

    def _wait(self, limit: timedelta) -> None:
        for group in (dist.group.WORLD, self.engine.data_parallel_group):
            dist.distributed_c10d._set_pg_timeout(limit, group)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        self.engine.backward(loss * self.world.size)  # it averages over the ranks; our losses sum up

    def _update(self, number: int, lr: float) -> torch.Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.adamw.number = number
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        return norm.float() if torch.is_tensor(norm) else torch.tensor(float(norm))

    def _slices(self) -> list[tuple[int, int]]:
        found = []
        for param, shape in zip(self.params, self.shapes, strict=True):
            if self.is_cut:
                part, whole = param.ds_tensor.ds_numel, shape.numel()
                start = min(whole, part * self.world.rank)
                found.append((start, min(whole - start, part)))
            else:
                at = param._hp_mapping and param._hp_mapping.lp_fragment_address
                found.append((at.start, at.numel) if at else (0, 0))
        return found

    def _read(self, i: int, moment: str | None = None) -> torch.Tensor:
        """This rank's slice of master i, or of its moment."""
        param = self.params[i]
        if self.is_cut:
            utils = self.deepspeed.utils
            part = (utils.safe_get_local_optimizer_state(param, moment) if moment
                    else utils.safe_get_local_fp32_param(param))
            return part[:self._slices()[i][1]]
        held = param._hp_mapping
        return held.get_hp_fragment(moment) if held else torch.zeros(0, device=self.world.device)

    def _write(self, i: int, value: torch.Tensor, moment: str | None = None) -> None:
        param = self.params[i]
        if not self.is_cut:
            if param._hp_mapping:
                param._hp_mapping.get_hp_fragment(moment).copy_(value)
            return
        padded = torch.zeros(param.ds_tensor.ds_numel, device=value.device)
        padded[:len(value)] = value
        utils = self.deepspeed.utils
        if moment:
            utils.safe_set_local_optimizer_state(param, padded, moment)
        else:
            utils.safe_set_local_fp32_param(param, padded)
            param.ds_tensor.data.copy_(padded)

    def _set_weights(self, values: list[torch.Tensor]) -> None:
        if self.is_cut:  # small weights are whole, and would stay as they are
            self.optimizer.empty_partition_cache()
        for i, value in enumerate(values):
            self._write(i, value)
        for param in self.params if not self.is_cut else ():
            param.data.copy_(self.deepspeed.utils.safe_get_full_fp32_param(param))

    def _moments(self) -> list[dict[str, torch.Tensor]]:
        if not self.step_index:
            return [{} for _ in self.params]
        return [{key: self._read(i, key) for key in MOMENTS} for i in range(len(self.params))]

    def _set_moments(self, moments: list[dict[str, torch.Tensor]]) -> None:
        with torch.enable_grad():
            self.fill(last=True)  # DeepSpeed makes the moments in its first step, which here moves nothing
        self._update(1, 0.0)
        for i, found in enumerate(moments):
            for key, value in found.items():
                self._write(i, value, key)

    def _inside_layers(self) -> set[int]:
        return {id(p) for layer in layers_of(self.base) for p in layer.parameters()}

    @torch.no_grad()
    def _weights(self):
        if not self.is_cut:
            return merged_weights(self.model) if self.lora.rank else None, None

        inside = self._inside_layers()

        def gather(part):
            params = [p for p in part.parameters() if part is not self.model or id(p) not in inside]
            return self.deepspeed.zero.GatheredParameters(params)

        return export(self.model, [*layers_of(self.base), self.model], gather, lambda t: t.numel() > 0, self.world,
                      bool(self.lora.rank))


def release(engine, params: list[torch.nn.Parameter]) -> None:
    """Frees the memory of a DeepSpeed engine, whose modules some of its global caches keep for ever."""
    engine.destroy()
    for param in params:
        param.data = torch.empty(0, dtype=param.dtype, device=param.device)  # in a context of another one, too
        vars(param).clear()
    for held in (engine.basic_optimizer, engine.optimizer):
        vars(held).clear()


def import_deepspeed(device: torch.device):
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", "0")  # it insists on it, also without torchrun
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # an operator for ranks on one machine without GPUs, which would be compiled for minutes
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def settings_of(options: DeepSpeed, section: Train, dtype: torch.dtype, count: int) -> dict:
    """DeepSpeed's configuration. count: of trained parameters."""
    zero = {"stage": options.zero_stage, "reduce_bucket_size": min(BUCKET, count)}
    if options.zero_stage == 3:
        zero["stage3_param_persistence_threshold"] = WHOLE
    for key in ("offload_optimizer", "offload_param"):
        if (where := getattr(options, key)) != "none":
            zero[key] = {"device": where}
    return {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "steps_per_print": 1 << 60,
            "managed_gradient_accumulation": False, "gradient_clipping": section.grad_clip,
            "bf16": {"enabled": dtype == torch.bfloat16, "check_grad_overflow": False},
            "data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32", "zero_optimization": zero,
            "zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True}
