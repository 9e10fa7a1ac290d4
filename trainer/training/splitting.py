"""Running out of memory in a training step: the step runs again in smaller microbatches, and so do all later ones.

A step's loss is normalized over its global batch, so how it is cut changes nothing but rounding.
"""

from pathlib import Path

import torch

from strop.trainer.config import Train
from strop.trainer.errors import UserError
from strop.trainer.run import restart
from strop.trainer.run.files import read_json, write_json
from strop.trainer.run.store import Stage
from strop.trainer.training.batch import Example


class Budget:
    """tokens: of a microbatch, section.max_tokens or what memory allows: less once a step ran out of memory, in this
    stage or in one of the same name before it. Each rank has its own; all begin with the lowest that any kept."""

    def __init__(self, stage: Stage, section: Train):
        self.stage, self.asked = stage, section.max_tokens
        self.key = stage.name.split("/")[-1]
        kept = [read_json(path) for path in sorted(self._folder().glob("max_tokens-*.json"))]
        self.tokens = min((found[self.key][1] for found in kept if found.get(self.key, [0])[0] == self.asked),
                          default=self.asked)

    def _folder(self) -> Path:
        """The run directory; in a test of a stage alone its scratch folder."""
        names = self.stage.name.split("/")
        inside = self.stage.dir.name == f"{names[-1]}.partial"
        return self.stage.dir.parents[len(names) - 1] if inside else self.stage.work

    def lower(self, step: int, rows: list[Example], alone: bool) -> None:
        """Halves the microbatch of `rows`, which ran out of memory. alone: this rank can run the step again by itself,
        else all start again: raises Restart, or UserError where that is not possible. Raises UserError if the
        microbatch is a single row."""
        world, size, several = self.stage.world, sum(row.tokens for row in rows), len(rows) > 1
        if not several:
            raise UserError(f"{self.stage.name}: step {step}: out of memory with row {rows[0].row_id} alone, which has "
                            f"{size:,} tokens; lower {self.key}.max_length, set {self.key}.activation_checkpointing="
                            "true, or see what fits with --plan")
        self.tokens = -(-size // 2)
        path = self._folder() / f"max_tokens-{world.rank}.json"
        write_json(path, (read_json(path) if path.exists() else {}) | {self.key: [self.asked, self.tokens]})
        what = f"{self.stage.name}: step {step}: out of memory in a microbatch of {size:,} tokens"
        with_less = f"with at most {self.tokens:,} ({self.key}.max_tokens={self.asked})"
        if alone:
            self.stage.console.warn(f"{what}; it runs again, and this run goes on, {with_less}")
        elif restart.possible(world):
            whose, who = (f" on rank {world.rank}", "all ranks start") if world.size > 1 else ("", "the run starts")
            raise restart.Restart(f"{what}{whose}; {who} again from the newest resume point, {with_less}")
        else:
            raise UserError(f"{what}, in which other ranks took part; the same command resumes {with_less}")


def free_cached(device: torch.device) -> None:
    """Returns freed blocks to the GPU, so that smaller ones fit where the larger ones were."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
