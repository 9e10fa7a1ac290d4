"""A stage of a few steps on some ranks, and what it left behind; for sharded.py."""

import math
from pathlib import Path

import torch
from stagecalls import dpo, reward, sft
from training import Log, recipe_of, weights_of

from strop.trainer.method_recipes import RewardRecipe
from strop.trainer.run.console import Console
from strop.trainer.run.files import read_json
from strop.trainer.run.store import Stage
from strop.trainer.run.world import World
from strop.trainer.stages import preference as preference_stage
from strop.trainer.stages import reward as reward_stage
from strop.trainer.stages import sft as sft_stage
from strop.trainer.training.checkpoint import Saved, checkpoints_in

SECTION = {"batch_size": 5, "lr": 1e-3, "max_tokens": 48, "weight_decay": 0.1, "grad_clip": 0.2}
SFT_TOKENS = {"max_tokens": 22}  # so that a rank has several microbatches in a step
STAGES = {"sft": (sft, sft_stage), "dpo": (dpo, preference_stage), "reward": (reward, reward_stage)}
# norm of the difference of the masters, relative to the norm of the way that they went, on the same microbatches
SAME = {"float32": 1e-4, "bfloat16": 1e-2}
LOGGED = {"float32": 1e-4, "bfloat16": 1e-3}  # relative difference of what is logged


class Run:
    """A stage of a few steps that ran: its stage, engine, logged rows, and masters (fp32, flat, by name)."""

    def __init__(self, kind: str, folder: Path, world: World, engine: dict, *, model="tied", dtype="float32", rows=14,
                 lora=None, log=None, read=True, prompts=None, prepare=None, **keys):
        """folder: of the stage, which it resumes if it is there. read: also read the masters. prepare(engine): called
        once it is open."""
        top = folder.parent
        if world.first:
            folder.mkdir(exist_ok=True)
        world.barrier()
        self.log = log or Log()
        self.stage = Stage(f"round-00/{kind}", folder, world, Console(enabled=False), self.log)
        section = SECTION | (SFT_TOKENS if kind == "sft" else {}) | keys
        options = {"engine": engine, "dtype": dtype, "lora": lora or {}, kind: section}
        if kind == "reward":
            recipe = RewardRecipe.model_validate({"data": {"preferences": [{"name": "x", "path": "x"}]}} | options)
        else:
            recipe = recipe_of(**options, evaluate={"max_new_tokens": 6})
        inputs = {"select": top / f"select-{rows}"}
        if kind == "dpo":
            table = table_of(top, model, dtype, keys.get("loss", ""))
            inputs |= {"policy": top / model, "reference": table, "same_weights": True}
        else:
            inputs |= {"start": top / model}
        if prompts:
            inputs |= {"prompts": top / prompts, "evaluate": recipe.evaluate}
        train, module = STAGES[kind]
        opened = module.open_engine

        def opens(*args, **options):
            self.engine = opened(*args, **options)
            if prepare:
                prepare(self.engine)
            return self.engine

        module.open_engine = opens
        try:
            train(self.stage, recipe, **inputs)
        finally:
            module.open_engine = opened
        self.start = top / model
        self.masters = self._masters() if read else {}

    def _masters(self) -> dict[str, torch.Tensor]:
        work, world = self.stage.dir / "masters", self.stage.world
        if world.first:
            work.mkdir()
        world.barrier()
        self.engine.save_checkpoint(work)
        self.engine.checkpoints.finish()
        world.barrier()
        point = checkpoints_in(work)[-1]
        saved = Saved(point, list(read_json(point / "state.json")["files"]))
        return {name.removeprefix("master/"): saved.read(name, 0, max(end for _, end, _ in parts))
                for name, parts in list(saved.parts.items()) if name.startswith("master/")}

    def equals(self, other: "Run", dtype: str, factor: float = 1.0) -> None:
        """The masters are the other's within `factor` times rounding, and so is what was logged."""
        assert self.masters.keys() == other.masters.keys() and self.masters
        before, moved, apart = weights_of(self.start), 0.0, 0.0
        for name, value in self.masters.items():
            start = before.get(name, torch.zeros(()))
            moved += (value - start.to(getattr(torch, dtype)).float().flatten()).square().sum().item()
            apart += (value - other.masters[name]).square().sum().item()
        share = math.sqrt(apart / moved)
        print(f"    apart by {share:.2g}", flush=True)
        assert share <= factor * SAME[dtype], share
        assert len(self.log.rows) == len(other.log.rows) > 1
        for one, two in zip(self.log.rows, other.log.rows, strict=True):
            for key in one.keys() & two.keys() & {"loss", "grad_norm", "rewards/margins", "accuracy", "kl", "delta"}:
                apart = abs(one[key] - two[key]) / (1 + abs(one[key]))
                assert apart <= factor * LOGGED[dtype], (key, one[key], two[key])


def largest(a: Path, b: Path) -> float:
    one, two = weights_of(a), weights_of(b)
    assert one.keys() == two.keys() and all(one[k].dtype == two[k].dtype for k in one)
    return max((one[k].float() - two[k].float()).abs().max().item() for k in one)


def table_of(top: Path, model: str, dtype: str, loss: str) -> Path:
    return top / f"reference-{model}-{dtype}-{loss}"
