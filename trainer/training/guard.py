"""Watches what training metrics hide: a few greedy completions by the weights in training, every eval_steps steps.

Accuracy can read 100 % while the policy forgets to stop. If cut share, length or KL run away, the stage ends with the
weights of the last check that was within the limits. The verdict depends on the weights alone, so a resumed stage comes
to the same one.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch

from strop.kernels import Group
from strop.kernels.integrations.compiled import eagerly
from strop.trainer.config import Part
from strop.trainer.data.chat import prompt_tokens, stop_ids
from strop.trainer.errors import UserError
from strop.trainer.models.folders import save_model
from strop.trainer.models.head import head_of
from strop.trainer.models.kl import CHUNK, exact, log_probs
from strop.trainer.run.files import read_json, write_json
from strop.trainer.run.store import Stage
from strop.trainer.run.tables import read_table
from strop.trainer.sampling.in_process import lent
from strop.trainer.training.batch import Example, collate
from strop.trainer.training.checkpoint import checkpoints_in
from strop.trainer.training.engine import Training

KL_TOKENS = 128  # positions whose next-token distributions under the start weights are kept
GROWTH = 8  # tokens: shorter growth is not a runaway, whatever the ratio


def open_guard(stage: Stage, engine: Training, examples: list[Example], prompts: Path | None,
               evaluate: Part | None) -> Guard | None:
    """A guard over the first validation prompts; None without prompts, with eval_steps=0, in a stage of fewer steps, or
    for a model that the sampler does not support. Call it before a checkpoint is loaded: it measures the start weights
    first."""
    section, folder = engine.section, engine.folder
    if prompts is None or not 0 < section.eval_steps <= engine.steps:
        return None
    tokenizer, room = folder.tokenizer(), folder.context_length() - evaluate.max_new_tokens
    rows = [r for r in read_table(prompts / "prompts.parquet").to_pylist() if r["split"] == "validation"]
    tokens = (prompt_tokens(tokenizer, row) for row in sorted(rows, key=lambda r: r["prompt_id"]))
    fits = [t for t, _ in zip((t for t in tokens if len(t) <= room), range(section.eval_prompts), strict=False)]
    if not fits:
        return None
    try:
        return Guard(stage, engine, fits, stop_ids(tokenizer, folder.path), evaluate.max_new_tokens, examples)
    except UserError as e:
        stage.console.warn(f"{stage.name}: no completions are checked during training: {e}")
        return None


class Guard:
    """checks: what was measured, by step; the first are the start weights'."""

    def __init__(self, stage: Stage, engine: Training, prompts: list[list[int]], stop: set[int], max_new_tokens: int,
                 examples: list[Example]):
        self.stage, self.engine, self.section = stage, engine, engine.section
        self.prompts, self.stop, self.max_new_tokens = prompts, stop, max_new_tokens
        self.name = stage.name.split("/")[-1]
        # training legitimately goes to the length of the completions that it learns
        lengths = [len(e.group.completions[0]) for e in examples] or [0]
        self.learned = {"cut_share": sum(n > max_new_tokens for n in lengths) / len(lengths),
                        "mean_length": sum(min(n, max_new_tokens) for n in lengths) / len(lengths)}
        self.own: list[Example] = []  # the start weights' completions
        self.before: list[torch.Tensor] = []  # log-probs [positions, V] of the start weights on each
        self.checks, self.stopped = [self._measure() | {"step": 0}], ""

    def resume(self) -> None:
        """Forgets checks after the step that the engine resumed at."""
        path = self.stage.work / "guard.json"
        if path.exists():
            self.checks += [c for c in read_json(path) if 0 < c["step"] <= self.engine.step_index]

    def due(self) -> bool:
        step, steps = self.engine.step_index, self.engine.steps
        return step % self.section.eval_steps == 0 or step == steps

    def check(self) -> dict[str, float]:
        """Measures the weights; keeps them if they are within the limits, else sets `stopped` to the reason. Returns
        metrics to log."""
        found = self._measure()
        self.stopped = self._why(found)
        if not self.stopped:
            self.checks.append(found | {"step": self.engine.step_index})
            folder = self._folder(self.engine.step_index)
            if self.engine.step_index < self.engine.steps:  # after the last step the weights are saved anyway
                self.engine.save(folder / "model")
                self.engine.save_ema(folder / "ema")
            if self.engine.world.first:
                write_json(self.stage.work / "guard.json", self.checks)
                self._forget()
        return {f"eval/{name}": value for name, value in found.items()} | {"eval/stopped": float(bool(self.stopped))}

    def finish(self) -> None:
        """Writes guard.json; if training was stopped, also the weights of the last good check in place of model/,
        snapshots/ after it and ema/."""
        stage, best = self.stage, self.checks[-1]["step"]
        if self.stopped:
            stage.counts |= {"stopped_at_step": self.engine.step_index, "kept_step": best}
            stage.console.warn(f"{stage.name}: stopped at step {self.engine.step_index} of {self.engine.steps}: "
                               f"{self.stopped}; the weights of step {best} are kept")
        if not self.engine.world.first:
            return
        write_json(stage.dir / "guard.json", {"checks": self.checks, "kept_step": best, "why": self.stopped})
        if self.stopped:
            for folder in (stage.dir / "snapshots").glob("step-*"):
                if int(folder.name.removeprefix("step-")) > best:
                    shutil.rmtree(folder)
            for part in ("model", *(["ema"] if self.engine.ema is not None else [])):
                self._restore(self._folder(best) / part, stage.dir / part)

    def _restore(self, source: Path, target: Path) -> None:
        if self.checks[-1]["step"] == 0:
            engine = self.engine
            model = engine.folder.load(engine.dtype, torch.device("cpu"))
            save_model(model, engine.folder.path, target)
            return
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target, copy_function=os.link)  # the source stays for a stage that is killed here

    def _folder(self, step: int) -> Path:
        return self.stage.work / f"good-{step:06}"

    def _forget(self) -> None:
        """Deletes kept weights that no stage resumed from the newest checkpoint can want."""
        resumable = max((int(p.name.removeprefix("step-")) for p in checkpoints_in(self.stage.work)), default=0)
        kept = sorted(int(p.name.removeprefix("good-")) for p in self.stage.work.glob("good-*"))
        oldest = max((step for step in kept if step <= resumable), default=0)
        for step in kept:
            if step < oldest:
                shutil.rmtree(self._folder(step))

    def _why(self, found: dict) -> str:
        """Why the measured weights are beyond the limits; empty if they are not."""
        section, start = self.section, self.checks[0]
        cut, length = (max(start[name], self.learned[name]) for name in ("cut_share", "mean_length"))
        if found["cut_share"] > cut + section.max_cut_rise:
            return (f"{found['cut_share']:.0%} of {len(self.prompts)} greedy completions of validation prompts do not "
                    f"stop within evaluate.max_new_tokens={self.max_new_tokens}, {start['cut_share']:.0%} at the start "
                    f"({self.name}.max_cut_rise={section.max_cut_rise:g})")
        if found["mean_length"] > max(section.max_length_ratio * length, length + GROWTH):
            return (f"greedy completions of validation prompts have {found['mean_length']:.1f} tokens on average, "
                    f"{start['mean_length']:.1f} at the start ({self.name}.max_length_ratio="
                    f"{section.max_length_ratio:g})")
        if section.max_kl is not None and not found["kl"] <= section.max_kl:
            return (f"the KL of the start weights to these is {found['kl']:.2g} nats per token ({self.name}.max_kl="
                    f"{section.max_kl:g})")
        return ""

    @torch.no_grad()
    def _measure(self) -> dict[str, float]:
        """cut_share, mean_length in tokens, and kl: of the start weights to the current ones, in nats per token along
        the start weights' completions, exact over the vocabulary."""
        world = self.engine.world
        values = torch.zeros(3, dtype=torch.float64, device=world.device)
        if world.first or self.engine.together:
            found = self.engine.run(self._values)
            if world.first:
                values.copy_(torch.tensor(found))
        world.sum_([values])
        return dict(zip(("cut_share", "mean_length", "kl"), values.tolist(), strict=True))

    def _values(self) -> list[float]:
        self.engine.model.eval()
        done = self._complete()
        if not self.own:
            self._remember(done)
        cut = sum(c.finish == "length" for c in done) / len(done)
        found = [cut, sum(len(c.tokens) for c in done) / len(done), self._kl()]
        self.engine.model.train()
        return found

    def _complete(self) -> list:
        """Greedy completions by the weights in training, whose layers are exchanged for as long as that takes."""
        with lent(self.engine.model, pack=not self.engine.together) as generator:
            found = generator.generate(self.prompts, max_new_tokens=self.max_new_tokens, temperature=0.0,
                                       stop_ids=self.stop, batch_size=len(self.prompts))
        return [completion for completion, in found]

    def _remember(self, done: list) -> None:
        left = KL_TOKENS
        for i, (prompt, completion) in enumerate(zip(self.prompts, done, strict=True)):
            tokens = completion.tokens[:left]
            left -= len(tokens)
            if tokens:
                self.own.append(Example(str(i), Group(prompt, [tokens])))
        self.before = [log_probs(hidden, exact(head_of(self.engine.base))) for hidden in self._hidden()]

    def _hidden(self) -> list[torch.Tensor]:
        """Hidden states [positions, D] that predict the start weights' completions."""
        groups = collate(self.own, list(range(len(self.own))), self.engine.world.device)
        with eagerly(self.engine.model):
            return list(self.engine.scorer.hidden(groups).split(CHUNK))

    def _kl(self) -> float:
        head, total, count = exact(head_of(self.engine.base)), 0.0, 0
        for hidden, p in zip(self._hidden(), self.before, strict=True):
            q = log_probs(hidden, head)
            total += torch.where(p == -torch.inf, 0.0, p.exp() * (p - q)).sum().item()
            count += len(p)
        return total / count
