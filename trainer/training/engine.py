"""What every training engine has: a model in training, its learning rate and averages, saving and resuming.

The loop and the stages use five verbs: logprobs, backward, step, save, resume. Engines differ in where weights,
gradients and optimizer are, and in how ranks exchange them.
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from strop.kernels import Group, PackedGroups, optimizer
from strop.kernels.integrations.compiled import compile_layers
from strop.trainer.config import Lora, Part, Train
from strop.trainer.errors import UserError, is_out_of_memory
from strop.trainer.models.folders import save_model
from strop.trainer.models.loading import DTYPES, ModelFolder
from strop.trainer.models.reward import Rewarder
from strop.trainer.run.artifacts import list_files
from strop.trainer.run.files import reason_of
from strop.trainer.run.store import Stage
from strop.trainer.run.world import WAIT
from strop.trainer.sharding import Trainer
from strop.trainer.training.batch import nothing
from strop.trainer.training.checkpoint import Checkpoints, Saved, check_checkpoint, checkpoints_in
from strop.trainer.training.flops import sizes_of
from strop.trainer.training.logprobs import Scorer
from strop.trainer.training.mesh import mesh_of
from strop.trainer.training.policy import base_of, load_policy
from strop.trainer.training.probe import TOLERANCE
from strop.trainer.training.waits import Waits


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


def slice_of(kind: str, shape: torch.Size, start: int) -> tuple[int, torch.Size]:
    """(first element, shape) of what belongs to a master of `shape`, whose first element is `start` of the whole
    tensor's: as many elements, or the scales of its rows."""
    if not kind.endswith("_scale"):
        return start, shape
    scales = optimizer.scales_shape(shape)
    return start // shape[1:].numel() * scales[1], scales


class Training:
    """A model in training. An engine sets `names` and `masters`, the fp32 weights that this rank keeps, whole tensors
    or slices, and has `backward`, `_update`, `_set_weights`, `_moments`, `_slices`, `_set_moments` and `_weights`.

    together: every rank must take part in every forward and backward pass. scorer: computes what the loss is made of
    (log-probs, a reward model's scores); the stage sets it after its probe. mesh: which ranks share microbatches.
    """

    together = False
    names: list[str]
    masters: Sequence[torch.Tensor]
    scorer: Scorer | Rewarder

    def __init__(self, folder: ModelFolder, section: Train, stage: Stage, steps: int, *, compute: Part, lora: Lora,
                 seed: int, reward: bool, options: Trainer, on_host: bool = False):
        """compute: the recipe's dtype and attention. seed: initializes adapters and a new score head, the same on every
        rank. reward: train a sequence classifier with one output, not a causal LM. options: the section engine.
        on_host: load the weights into the host's memory."""
        self.options, self.timeout = options, options.timeout
        self.waits = Waits(stage.world.device)  # for other ranks
        self.waits.is_on = False  # but in steps
        self.mesh = mesh_of(stage.world, options, self.waits)
        self.section, self.world, self.steps, self.folder = section, stage.world, steps, folder
        self.lora, self.seed, self.dtype = lora, seed, DTYPES[compute.dtype]
        self.tokenizer_files = folder.path  # the folder whose tokenizer is saved with the weights
        self.model = load_policy(folder, section, stage.world.device, compute=compute, lora=lora, seed=seed,
                                 reward=reward, on_host=on_host)
        self.sizes = sizes_of(self.model)  # for FLOPs
        self.hosts = stage.world.group(self.timeout, "gloo") if self.together else None
        self.checkpoints = Checkpoints(self.world, self.world.group(WAIT.total_seconds(), "gloo", "checkpoints")
                                       if self.together else None)
        self.step_index = 0
        self.ema = self.start = None
        self.extra: dict[str, torch.Tensor] = {}  # what a loss keeps from step to step, the same on every rank
        self.kept: dict[str, dict] = {}  # files of snapshots with their hashes, stored in the checkpoint

    def _begin_averages(self) -> None:
        """Call it when the masters are there."""
        if self.section.ema_decay or self.section.bema:
            self.ema = [m.detach().clone() for m in self.masters]
        if self.section.bema:
            self.start = [m.detach().clone() for m in self.masters]

    @property
    def base(self) -> torch.nn.Module:
        """The model without adapters around it."""
        return base_of(self.model)

    def score_with(self, scorer: Scorer | Rewarder) -> None:
        """Sets the scorer, after its probe, and compiles the model's layers where the section asks for it. Raises
        UserError if they do not compile, or then compute something else."""
        self.scorer = scorer
        if not self.section.compile:
            return
        key = f"{type(self.section).__name__.lower()}.compile"
        # sizes of 0 and 1 would be compiled apart
        groups = PackedGroups.pack([Group([1, 2, 3, 4], [[5, 6, 7], [8, 9]])] * 2).to(self.world.device)
        with torch.no_grad():
            before = scorer(groups)
        if not (scorer.packed and compile_layers(self.model)):
            raise UserError(f"{key}=true, but the layers of {type(self.base).__name__} cannot be compiled; set {key}="
                            "false")
        try:
            after = scorer(groups).detach()
        except Exception as e:
            if is_out_of_memory(e):
                raise
            raise UserError(f"torch.compile fails on {type(self.base).__name__} ({reason_of(e)}); set {key}=false"
                            ) from e
        if not (after - before).abs().mean().item() <= TOLERANCE[self.base.dtype]:
            raise UserError(f"{type(self.base).__name__} compiled computes other numbers; set {key}=false")

    def run(self, function: Callable, *arguments):
        """function(*arguments), which may use the model. If `together`, every rank calls it with functions that make
        the same passes through the layers."""
        return function(*arguments)

    def logprobs(self, groups: PackedGroups, stats: tuple[str, ...] = ()):
        """fp32 log-probs [targets] of `groups.target`; with `stats` also a dict of fp32 [targets] tensors."""
        return self.run(self.scorer, groups, stats)

    @contextmanager
    def within(self, what: str):
        """Around a step, in which waits are counted: a rank that waits for others longer than engine.timeout raises
        UserError, which says `what` it was doing."""
        self.waits.is_on = True
        try:
            with self.world.within(self.timeout, what):
                yield
        finally:
            self.waits.is_on = False

    @functools.cached_property
    def nothing(self) -> PackedGroups:
        return nothing(self.world.device, self.mesh.sequence)

    def fill(self, last: bool) -> None:
        """Takes part in the passes over a microbatch that only other ranks have."""
        self.backward(self.run(self.scorer, self.nothing).sum() * 0.0, last)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Adds the loss's gradients to those of the step. last: no further microbatch of this step follows here."""
        raise NotImplementedError

    def discard(self) -> bool:
        """Forgets the gradients of this step. False if other ranks have a part in them, so that this rank cannot begin
        the step anew alone."""
        return False

    @torch.no_grad()
    def step(self) -> torch.Tensor:
        """Sums gradients over the ranks, clips, updates masters and weights. Returns the unclipped gradient norm."""
        norm = self._update(self.step_index + 1, learning_rate(self.step_index, self.steps, self.section))
        if self.ema is not None:
            section = self.section
            share = bema_powers(self.step_index + 1, section)[1] if section.bema else 1 - section.ema_decay
            if isinstance(self.masters, list):
                torch._foreach_lerp_(self.ema, [m.detach() for m in self.masters], share)
            else:  # not all at once in memory
                for average, master in zip(self.ema, self.masters, strict=True):
                    average.lerp_(master, share)
        self.step_index += 1
        return norm

    def agree(self, stop: bool, sound: bool) -> tuple[bool, bool]:
        """(whether to stop, whether what is trained is sound): what this rank says or, if ranks save together, whether
        any says stop and all are sound. Raises UserError if a resume point could not be written."""
        failed = self.checkpoints.error is not None
        if self.together:
            flags = torch.tensor([stop, not sound, failed], dtype=torch.int32)
            dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.hosts)
            stop, unsound, failed = map(bool, flags.tolist())
            sound = not unsound
        if failed:
            self.checkpoints.finish()
        return stop, sound

    @property
    def writes(self) -> bool:
        """Whether this rank takes part in saving."""
        return self.world.first or self.together

    def save(self, target: Path) -> None:
        """Writes the weights as a Hugging Face folder, with adapters merged and also in adapter/. Every rank calls
        it."""
        if not self.writes:
            return
        weights, adapter = self._weights()
        if self.world.first:
            target.parent.mkdir(parents=True, exist_ok=True)
            save_model(self.base, self.tokenizer_files, target, weights)
            if self.lora.rank:
                self.model.save_pretrained(target / "adapter", state_dict=adapter)
        if self.together:
            self.world.barrier()  # not to wait for the first rank inside a step, which has a time-out

    @contextmanager
    def averaged(self):
        """The model with the EMA's weights, without dropout. They change places with the masters and back, bit for bit,
        which takes no memory."""
        training = self.model.training
        self._exchange_average()
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(training)
            self._exchange_average()

    @torch.no_grad()
    def _exchange_average(self) -> None:
        def averages():  # a tensor at a time
            for master, average in zip(self.masters, self.ema, strict=True):
                kept = master.detach().clone()
                yield average
                average.copy_(kept)

        self._set_weights(averages())

    @torch.no_grad()
    def save_ema(self, target: Path) -> None:
        """Writes the averaged weights; the model's weights stay as they are. Every rank calls it.

        With section.bema: EMA + alpha (weights - start), arXiv 2508.00180 algorithm 1, which corrects the EMA's lag.
        """
        if self.ema is None or not self.writes:
            return
        current = [m.detach().clone() for m in self.masters]
        averaged = self.ema
        if self.start is not None and self.step_index:
            alpha, _ = bema_powers(self.step_index, self.section)
            averaged = [e + alpha * (m - s) for e, m, s in zip(self.ema, current, self.start, strict=True)]
        self._set_weights(averaged)
        self.save(target)
        self._set_weights(current)

    def save_checkpoint(self, work: Path) -> None:
        """Begins to write masters, moments, EMA, step and hashes; then the previous checkpoint is deleted. Every rank
        calls it.

        Raises UserError if the previous one could not be written. `agree` or `checkpoints.finish` raise it for this
        one; the previous checkpoint is then kept."""
        if not self.writes:
            return
        copies = not isinstance(self.masters, list)  # of which all at once would fill the device
        tensors = {f"master/{name}": m.cpu() if copies else m.detach()
                   for name, m in zip(self.names, self.masters, strict=True)}
        for name, moments in zip(self.names, self._moments(), strict=True):
            tensors |= {f"{key}/{name}": value for key, value in moments.items()}
        for name, value in zip(self.names, self.ema or [], strict=self.ema is not None):
            tensors[f"ema/{name}"] = value
        if self.world.first:
            tensors |= {f"extra/{name}": value for name, value in self.extra.items()}
        snapshots = [folder for folder in (work.parent / "snapshots").glob("step-*")
                     if not any(name.startswith(f"snapshots/{folder.name}/") for name in self.kept)]

        def kept() -> dict:
            for folder in snapshots:
                self.kept |= {f"snapshots/{folder.name}/{n}": entry for n, entry in list_files(folder).items()}
            return self.kept

        starts = None
        if self.together:
            where = {name: (master.shape, start) for name, master, (start, _) in zip(
                self.names, self.masters, self._slices(), strict=True)}
            tensors = {key: value.flatten() for key, value in tensors.items()}
            of = {key: key.split("/", 1) for key in tensors}
            starts = {key: slice_of(kind, *where[name])[0] if name in where else 0 for key, (kind, name) in of.items()}
        self.checkpoints.begin(work, {"step": self.step_index, "steps": self.steps}, kept, tensors, starts)

    @torch.no_grad()
    def resume(self, work: Path) -> bool:
        """Loads the newest checkpoint, if there is one, of any engine and number of ranks. Raises UserError if it is
        damaged."""
        self.world.barrier()
        points = checkpoints_in(work)
        if not points:
            return False
        point = points[-1]
        state = check_checkpoint(point, self.world)
        self.kept, self.step_index = state["kept"], state["step"]
        saved = Saved(point, list(state["files"]))
        masters, moments, ema = [], [], []
        for name, master, (start, _) in zip(self.names, self.masters, self._slices(), strict=True):
            def read(kind: str, name=name, master=master, start=start) -> torch.Tensor:
                first, shape = slice_of(kind, master.shape, start)
                return saved.read(f"{kind}/{name}", first, shape.numel()).view(shape).to(master.device)

            masters.append(read("master"))
            keys = [k for k in (*optimizer.STATE, "momentum_buffer") if f"{k}/{name}" in saved]
            moments.append({k: read(k) for k in keys})
            if self.ema is not None:
                ema.append(read("ema"))
        if self.ema is not None:
            self.ema = ema
        for name, value in self.extra.items():
            value.copy_(saved.read(f"extra/{name}", 0, value.numel()).view(value.shape))
        self._set_moments(moments)
        self._set_weights(masters)
        self.world.barrier()  # rank 0 must not replace a checkpoint that another rank still reads
        return True

    def _update(self, number: int, lr: float) -> torch.Tensor:
        """The optimizer's step `number`, from 1. Returns the unclipped gradient norm, over all ranks."""
        raise NotImplementedError

    def _set_weights(self, values: Iterable[torch.Tensor]) -> None:
        """Sets masters and weights to `values`, one for each master."""
        raise NotImplementedError

    def _moments(self) -> list[dict[str, torch.Tensor]]:
        """The optimizer's state of each master, by optimizer.STATE or momentum_buffer."""
        raise NotImplementedError

    def _set_moments(self, moments: list[dict[str, torch.Tensor]]) -> None:
        """Sets what `_moments` returned, after step `step_index`."""
        raise NotImplementedError

    def _slices(self) -> list[tuple[int, int]]:
        """(first element, number of elements) of the whole tensor that each master holds."""
        return [(0, m.numel()) for m in self.masters]

    def _weights(self) -> tuple[dict[str, torch.Tensor] | None, dict[str, torch.Tensor] | None]:
        """State dicts of the model with adapters merged, and of the adapters; None for what the model itself holds."""
        raise NotImplementedError
