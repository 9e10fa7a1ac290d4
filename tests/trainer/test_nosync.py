"""A training step never waits for the device: the real steps run on tensors that have a device but no values.

Twice: on device "cuda" in FakeTensorMode, which takes the branches that a GPU takes, but whose autograd needs a CUDA
build of PyTorch, so that backward passes only hand out gradients there; and on device "meta", backward passes included.
"""

import contextlib
import dataclasses
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from stagecalls import dpo, reference, reward, sft
from test_rated import rated_of
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from training import Log, recipe_of, select_of, stage_in
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from strop.kernels import PackedGroups
from strop.kernels.integrations.transformers import register
from strop.trainer.errors import UserError
from strop.trainer.method_recipes import RewardRecipe
from strop.trainer.planning.hardware import Hardware
from strop.trainer.run import stopping
from strop.trainer.run.world import World
from strop.trainer.training import engines as opening
from strop.trainer.training import logged, rewards
from strop.trainer.training.local import Engine
from strop.trainer.training.masters import Masters
from strop.trainer.training.policy import add_lora
from strop.trainer.training.waits import Waits


def without_fused(optimizer, *args, fused, **options):
    return optimizer(*args, **options)


class InTurn:
    """Ahead without its thread: fake tensors are not for two threads at once."""

    def __init__(self, items, device):
        self.items, self.waits = items, Waits(torch.device("cpu"))

    def next(self):
        return next(self.items)

    def close(self):
        pass


class Waited(RuntimeError):
    """Something asked the device for a value."""


class Event:
    """Of a GPU that is not there."""

    def record(self):
        pass

    def query(self):
        return False

    def synchronize(self):
        raise Waited("synchronize()")


class BlockingCopies(TorchDispatchMode):
    """Raises on a copy between host and device that the host waits for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source = args[1] if func is torch.ops.aten.copy_.default else args[0]
            blocking = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
            if blocking and source.device.type != out.device.type and source.dim():
                raise Waited(f"{func} from {source.device} to {out.device}")
        return out


class WithoutCuda(TorchFunctionMode):
    """x[...] by views and copies as nothing: PyTorch's own refuse a CUDA tensor where CUDA is not built in, even one
    without values."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.copy_ and "cuda" in (args[0].device.type, args[1].device.type):
            if args[0].device.type != args[1].device.type and not (kwargs or {}).get("non_blocking"):
                raise Waited("copy_")
            return args[0]
        if func is not torch.Tensor.__getitem__ or args[0].device.type != "cuda":
            return func(*args, **(kwargs or {}))
        x, at = args
        at = list(at) if isinstance(at, tuple) else [at]
        if any(isinstance(i, torch.Tensor) for i in at):
            if any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in at):
                raise Waited("a mask")
            assert len(at) == 1, at
            return x.index_select(0, at[0].flatten()).unflatten(0, at[0].shape)
        missing = x.dim() - sum(i is not None and i is not Ellipsis for i in at)
        spot = next((n for n, i in enumerate(at) if i is Ellipsis), len(at))
        at[spot:spot + 1] = [slice(None)] * missing
        dim = 0
        for i in at:
            if isinstance(i, int):
                x = x.select(dim, i)
            elif i is None:
                x, dim = x.unsqueeze(dim), dim + 1
            else:
                start, stop, step = i.indices(x.shape[dim])
                x, dim = torch.ops.aten.slice(x, dim, start, stop, step), dim + 1
        return x


@pytest.fixture(params=["cuda", "meta"])
def device(request, monkeypatch, tiny_model):
    """Runs a stage on a device without values."""
    is_fake, where, attention, is_lora = request.param == "cuda", torch.device(request.param), register(), []
    mode = FakeTensorMode() if is_fake else contextlib.nullcontext()

    def moved(tensor):
        with mode:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device=where)

    def load(folder, dtype, *_, reward=False, **__):
        with unset_fake_temporarily():
            config = AutoConfig.from_pretrained(tiny_model, num_labels=1)
            kind = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
            model = kind.from_config(config, attn_implementation=attention).to(dtype)
        return model if is_lora else on_device(model)

    def on_device(model):
        seen = {}
        for module in model.modules():
            for name, p in module._parameters.items():
                if p is not None:
                    module._parameters[name] = seen.setdefault(id(p), nn.Parameter(moved(p)))
            for name, b in module._buffers.items():
                if b is not None:
                    module._buffers[name] = moved(b)
        return model

    def with_adapters(*arguments):
        with unset_fake_temporarily():
            model = add_lora(*arguments)
        return on_device(model)

    def collate(examples, indices, *_):
        with unset_fake_temporarily():
            groups = PackedGroups.pack([examples[i].group for i in indices])
        on_host = {"segments": mode.from_tensor(groups.segments)} if is_fake else {}
        return dataclasses.replace(groups, **{k: moved(v) for k, v in groups._tensors().items()}, **on_host)

    def pair_tensors(rows, _):
        with unset_fake_temporarily():
            tensors = rewards.pair_tensors(rows, torch.device("cpu"))
        return tuple(map(moved, tensors))

    def onto(_, *columns):
        with unset_fake_temporarily():
            tensors = [torch.tensor(column) for column in columns]
        return tuple(map(moved, tensors))

    def of(table, examples, indices, _):
        return torch.zeros(sum(examples[i].predicted() for i in indices), device=where)

    def cpu(tensor):
        raise Waited("cpu()")

    tensor = torch.tensor

    def from_host(*args, device=None, **kwargs):
        if device is not None and torch.device(device).type != "cpu":
            raise Waited("torch.tensor(..., device)")  # it copies from pageable memory, and waits
        return tensor(*args, device=device, **kwargs)

    for module, name, value in (
            ("models.loading.ModelFolder", "load", load), ("training.policy", "add_lora", with_adapters),
            ("training.loop", "Ahead", InTurn), ("training.loop", "collate", collate),
            ("training.rated", "collate", collate), ("training.rated", "onto", onto),
            ("training.loop", "peak_flops", lambda *_: 1.0),
            ("stages.preference", "probe", lambda *_: True), ("stages.sft", "probe", lambda *_: True),
            ("training.pairs.ReferenceTable", "of", of), ("training.pairs.ReferenceTable", "__init__", lambda *_: None),
            ("stages.reward", "packs", lambda *_: True), ("stages.reward", "set_padding", lambda *_: None),
            ("stages.reward", "pair_tensors", pair_tensors), ("training.local.Engine", "resume", lambda *_: False)):
        monkeypatch.setattr(f"strop.trainer.{module}.{name}", value)
    monkeypatch.setattr(torch.Tensor, "cpu", cpu)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)  # a fake one cannot be pinned
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch, "tensor", from_host)

    def backward(tensor):
        for p in engines[-1].weights.params:
            p.grad = torch.empty_like(p)

    monkeypatch.setattr(opening, "ranks_here", lambda world: Hardware("a GPU", "cuda", 1, 1, 1 << 36, 1 << 36))
    engines, init = [], Engine.__init__
    monkeypatch.setattr(Engine, "__init__", lambda self, *a, **keys: engines.append(self) or init(self, *a, **keys))
    if is_fake:
        monkeypatch.setattr(torch.Tensor, "backward", backward)
    else:  # neither autocast nor fused AdamW for meta
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
        monkeypatch.setattr(torch.optim, "AdamW", partial(without_fused, torch.optim.AdamW))

    def run(stage, folder, recipe):
        """Trains until something waits for the device; returns the number of steps done by then, and what waited."""
        made = dataclasses.replace(stage_in(folder / "stage", stage.__name__), world=World(device=where))
        steps, step = [], Engine.step
        monkeypatch.setattr(Engine, "step", lambda self: steps.append(1) or step(self))
        inputs = {"select": select_of(folder / "select", 16)}
        rated_of(folder / "select", 16)
        inputs |= {"start": tiny_model} if stage in (sft, reward) else {"policy": tiny_model, "reference": folder,
                                                              "same_weights": False}
        is_lora.extend([True] * recipe.lora.rank)
        with mode, BlockingCopies(), WithoutCuda(), torch.set_grad_enabled(not is_fake), \
                pytest.raises(RuntimeError) as error:
            stage(made, recipe, **inputs)
        return len(steps), str(error.value)

    return SimpleNamespace(run=run, interval=(4, "synchronize()") if is_fake else (3, "cpu()"))


KEYS = {"batch_size": 4, "max_tokens": 48, "ema_decay": 0.9}
# What waits first in a run with an interval of three steps, `device.interval`: it fetches the metrics, on a GPU after
# the launches of the next step.


@pytest.mark.parametrize("keys", [{}, {"activation_checkpointing": True}, {"nll_weight": 0.2, "loss": "ipo"}, {
    "loss": "kto"}, {"loss": "bco"}, {"loss": "listwise"}], ids=str)
def test_dpo_steps_wait_for_nothing(device, tmp_path, keys):
    recipe = recipe_of(dtype="bfloat16", dpo=KEYS | keys, log={"interval": 3})
    assert device.run(dpo, tmp_path, recipe) == device.interval


@pytest.mark.parametrize("keys", [{}, {"moments": "int8"}, {"optimizer": "muon", "moments": "bfloat16",
                                                            "masters": "split"}], ids=str)
def test_sft_steps_wait_for_nothing(device, tmp_path, keys):
    recipe = recipe_of(dtype="bfloat16", sft=KEYS | keys, log={"interval": 3})
    assert device.run(sft, tmp_path, recipe) == device.interval


def test_reward_steps_wait_for_nothing(device, tmp_path):
    recipe = RewardRecipe.model_validate({
        "dtype": "bfloat16", "data": {"preferences": [{"name": "x", "path": "x"}]}, "log": {"interval": 3},
        "reward": KEYS | {"held_out": 0.0, "label_smoothing": 0.1, "centering": 0.01}})
    assert device.run(reward, tmp_path, recipe) == device.interval


def test_lora_steps_wait_for_nothing(device, tmp_path):
    pytest.importorskip("peft")
    recipe = recipe_of(dtype="bfloat16", dpo=KEYS, lora={"rank": 4}, log={"interval": 3})
    assert device.run(dpo, tmp_path, recipe) == device.interval


WAITS = {"item": lambda x: x.sum().item(), "tolist": lambda x: x.tolist(), "bool": lambda x: bool((x > 0).any()),
         "mask": lambda x: x[x > 0], "nonzero": lambda x: x.nonzero(), "cpu": lambda x: x.cpu(),
         "to": lambda x: x.to("cpu"), "from pageable memory": lambda x: torch.zeros(3).to(x.device),
         "tensor": lambda x: torch.tensor([1.0], device=x.device)}


@pytest.mark.parametrize("wait", WAITS)
def test_a_planted_wait_is_found(device, tmp_path, monkeypatch, wait):
    gradients = Masters.gradients  # every step calls it
    monkeypatch.setattr(Masters, "gradients", lambda self: (WAITS[wait](self.masters[0].detach()), gradients(self))[1])
    assert device.run(sft, tmp_path, recipe_of(dtype="bfloat16", sft=KEYS, log={"interval": 3}))[0] == 1  # the first


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_metrics_are_fetched_and_reduced_once_an_interval(tmp_path, tiny_model, monkeypatch, stage):
    """Seven steps, an interval of three: three fetches and three reductions, beside one of the gradients each step."""
    recipe, select = recipe_of(**{stage: {"batch_size": 2, "max_tokens": 32}}, log={"interval": 3}), tmp_path / "select"
    select_of(select, 14)
    table = stage_in(tmp_path / "reference", "reference")
    reference(table, recipe, select=select, model=tiny_model)
    fetched, reduced, log, cpu = [], [], Log(), torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: fetched.append(x.numel()) or cpu(x))
    monkeypatch.setattr(World, "sum_", lambda self, tensors: reduced.append(len(tensors)))
    module = {"sft": "sft", "dpo": "preference"}[stage]
    monkeypatch.setattr(f"strop.trainer.stages.{module}.probe", lambda *_: True)
    made = stage_in(tmp_path / stage, stage, log)
    if stage == "sft":
        sft(made, recipe, select=select, start=tiny_model)
    else:
        dpo(made, recipe, select=select, policy=tiny_model, reference=table.dir, same_weights=True)
    assert made.counts["steps"] == 7 and len(log.rows) == 3
    assert len(fetched) == 3 and reduced.count(1) == 3 and len(reduced) == 3 + 7
    assert all(math.isfinite(row["loss"]) for row in log.rows)


class Late(logged.Readback):
    """A GPU's on the CPU."""

    order: list

    def __init__(self, x):
        self.host, self.event = x.clone(), object()

    def wait(self):
        self.order.append("read")
        return self.host


@pytest.mark.parametrize("keys", [{}, {"checkpoint_steps": 3}, {"snapshots": 1}], ids=str)
def test_a_row_is_read_when_the_next_step_is_launched(tmp_path, tiny_model, monkeypatch, keys):
    """And at once before weights are written; what is logged does not depend on it."""
    recipe = recipe_of(sft={"batch_size": 2, "max_tokens": 32, **keys}, log={"interval": 1})
    select, found, order, step = select_of(tmp_path / "select", 10), [], [], Engine.step
    monkeypatch.setattr(Engine, "step", lambda self: (order.append(self.step_index + 1), step(self))[1])
    for name, readback in (("usual", logged.Readback), ("late", Late)):
        Late.order = order
        order.clear()
        monkeypatch.setattr(logged, "Readback", readback)
        log = Log()
        sft(stage_in(tmp_path / name, "sft", log), recipe, select=select, start=tiny_model)
        timed = ("tokens_per_second", "mfu", "wait/")
        found.append([{k: v for k, v in row.items() if not k.startswith(timed)} for row in log.rows])
    assert found[0] == found[1] and len(found[0]) == 5
    at_once = 3 if keys.get("checkpoint_steps") else 2 if keys else None
    expected = []
    for number in range(1, 6):
        expected.append(number)
        expected += ["read"] * (number > 1 and number - 1 != at_once) + ["read"] * (number in (at_once, 5))
    assert order == expected


def test_a_row_that_is_late_is_written_before_the_stage_stops(tmp_path, tiny_model, monkeypatch):
    """A resumed run then has every row, and none twice."""
    recipe, select, rows = recipe_of(sft={"batch_size": 2, "max_tokens": 32}), select_of(tmp_path / "select", 10), []
    monkeypatch.setattr(logged, "Readback", Late)
    Late.order = []
    whole = stage_in(tmp_path / "whole", "sft")
    sft(whole, recipe, select=select, start=tiny_model)
    steps, step = [], Engine.step
    monkeypatch.setattr(Engine, "step", lambda self: (steps.append(1), step(self))[1])
    with monkeypatch.context() as patch:
        patch.setattr(stopping, "requested", lambda: len(steps) == 3)
        with pytest.raises(KeyboardInterrupt):
            sft(stage_in(tmp_path / "stopped", "sft", stopped := Log()), recipe, select=select, start=tiny_model)
    assert len(stopped.rows) == 3
    sft(stage_in(tmp_path / "stopped", "sft", resumed := Log()), recipe, select=select, start=tiny_model)
    assert resumed.rewound_to == 3
    rows = [row["loss"] for row in stopped.rows + resumed.rows]
    assert rows == [row["loss"] for row in whole.metrics.rows]


@pytest.mark.parametrize("late", [False, True])
def test_a_step_that_is_not_finite_is_named_and_never_saved(tmp_path, tiny_model, monkeypatch, late):
    if late:
        monkeypatch.setattr(logged, "Readback", Late)
        Late.order = []
    step, log = Engine.step, Log()
    monkeypatch.setattr(Engine, "step", lambda self: step(self) * (math.nan if self.step_index == 2 else 1.0))
    stage = stage_in(tmp_path / "stage", "sft", log)
    with pytest.raises(UserError, match=r"sft: step 2: loss=.* grad_norm=nan"):
        sft(stage, recipe_of(sft={"batch_size": 2, "max_tokens": 32, "checkpoint_steps": 3}),
            select=select_of(tmp_path / "select", 10), start=tiny_model)
    assert len(log.rows) == 1 and not list(stage.work.glob("step-*")) and list(stage.work.glob("bad-step-000002*"))


def test_times_of_all_ranks_come_with_the_numbers():
    """Rank 1 of 3: the sums over the ranks, and each rank's times at its place."""
    reduced = []

    class Ranks(World):
        def sum_(self, tensors):
            reduced.append([x.clone() for x in tensors])
            for x in tensors:
                x += torch.tensor([[2.0, 0.0, 3.0], [4.0, 0.0, 6.0]]) if x.dim() == 2 else x

    world = Ranks(rank=1, size=3)
    waits = [SimpleNamespace(take=lambda seconds=seconds: seconds) for seconds in (1.0, 2.0)]
    engine = SimpleNamespace(world=world, mesh=world, waits=waits[1], step_index=7)
    seen = [torch.tensor([0.5, 1.0]), torch.tensor([0.25, 2.0])]
    row = logged.Interval.end(engine, torch.tensor([1.0, 2.0, 3.0]), seen, None, waits[0])
    row.read()
    assert len(reduced) == 2 and torch.equal(reduced[1][0], torch.tensor([[0.0, 0.5, 0.0], [0.0, 1.0, 0.0]]))
    assert row.sums.tolist() == [2.0, 4.0, 6.0] and row.seen.tolist() == [1.0, 2.0, 0.5, 4.0] and row.last == 7
    assert row.waited() == pytest.approx({"wait/data": 5.5 / 3, "wait/data_max": 3.0, "wait/ranks": 11 / 3,
                                          "wait/ranks_max": 6.0})


def test_waits_that_a_gpu_has_not_finished_count_later(monkeypatch):
    class Timed(Event):
        done = False

        def __init__(self, **_):
            pass

        def query(self):
            return self.done

        def elapsed_time(self, end):
            return 500.0

    monkeypatch.setattr(torch.cuda, "Event", Timed)
    for name in ("current_stream", "default_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    waits = Waits(torch.device("cuda"))
    for _ in range(3):
        with waits:
            pass
    for pair in list(waits.events)[:2]:
        pair[1].done = True
    assert waits.take() == 1.0 and waits.take() == 0.0
    waits.events[0][1].done = True
    assert waits.take() == 0.5 and not waits.events
