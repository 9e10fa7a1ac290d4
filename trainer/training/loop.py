"""The training loop: steps of packed microbatches, logging, checkpoints, snapshots."""

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import torch

from strop.kernels import PackedGroups
from strop.trainer.errors import UserError, is_out_of_memory
from strop.trainer.run import restart, stopping
from strop.trainer.run.store import Stage
from strop.trainer.run.tables import write_table
from strop.trainer.training.batch import Example, Packing, collate, microbatches
from strop.trainer.training.checkpoint import checkpoints_in
from strop.trainer.training.engine import Training, learning_rate
from strop.trainer.training.flops import peak_flops, training_flops
from strop.trainer.training.guard import Guard
from strop.trainer.training.logged import Interval
from strop.trainer.training.splitting import Budget, free_cached
from strop.trainer.training.waits import Ahead


@dataclass
class Step:
    """Arguments of a microbatch's loss: its rows, and the counts and the like of the global step."""

    index: int
    rows: list[int]
    totals: dict[str, Any] = field(default_factory=dict)


def train(stage: Stage, engine: Training, examples: list[Example], plan: list[list[int]], totals, loss,
          names: tuple[str, ...], finish, interval: int = 1, guard: Guard | None = None) -> int:
    """Runs the steps of `plan`: resumes, logs every `interval` steps, writes checkpoints and snapshots. Returns the
    number of steps run, which are fewer than planned if the guard stopped them. On a GPU a row is read when the next
    step is launched, so that the device always has work; before weights are written or checked all rows are.

    totals(rows) -> dict of counts over a global step, and of what else its losses share. loss(groups, step) -> (scalar,
    fp32 vector of sums in the order of `names`) of a microbatch, normalized by the step's totals, so that the sum over
    microbatches and ranks is the step's loss. finish(sums [names] on the host) -> the values to log.
    """
    section, world, mesh, work = engine.section, engine.world, engine.mesh, stage.work
    keep = resume(stage, engine, len(plan), guard)
    peak = peak_flops(world.device, engine.dtype)
    costs = [training_flops(engine.sizes, example) for example in examples]
    budget = Budget(stage, section)
    if engine.together or mesh.sequence:  # ranks that run passes together must agree, also where each node kept its own
        budget.tokens = min(world.gather(budget.tokens))
    whole, packing = (Packing(examples, costs, section.max_tokens) for _ in range(2))
    for rows in plan[:engine.step_index]:  # steps before the resume count too
        whole.add(microbatches(examples, rows, costs, section.max_tokens, mesh.size))
    sums, seen = torch.zeros(len(names), device=world.device), []  # seen: loss and gradient norm of each step
    ahead = Ahead(batches(engine, examples, plan[engine.step_index:], costs, budget), world.device)
    late: Interval | None = None

    def write(row: Interval, started: float, guard: Guard | None = None) -> Interval:
        """Logs the steps since `started`, and what the guard finds. Raises UserError if a number is not finite."""
        row.read()
        stop_if_not_finite(stage, engine, examples, plan, row.last, row.seen)
        seconds = row.time - started
        values = finish(row.sums)
        values |= {"grad_norm": row.seen[1::2].mean().item() / mesh.size,
                   "learning_rate": learning_rate(row.last - 1, len(plan), section),
                   "tokens_per_second": row.packing.tokens / seconds,
                   "mfu": row.packing.flops / seconds / peak / world.size, **row.packing.values(), **row.waited()}
        values |= guard.check() if guard else {}
        if row.peak_memory is not None:
            values["memory_peak"] = row.peak_memory / 2**30
        stage.metrics.log(stage.name, row.last, values, total=len(plan))
        return row

    started = time.perf_counter()
    with restart.watched(world), engine.checkpoints, closing(ahead), stage.console.progress(
            stage.name, total=len(plan), unit="steps", done=engine.step_index) as bar:
        while engine.step_index < len(plan) and not (guard and guard.stopped):
            rows = plan[engine.step_index]
            step, added = Step(engine.step_index, [], totals(rows)), None
            with engine.within(f"{stage.name}: step {engine.step_index + 1}"):
                while added is None:
                    shares, added = attempt(engine, ahead, step, loss, 1 + len(names))
                    if added is None:  # with a smaller budget
                        alone = engine.discard()
                        free_cached(world.device)
                        budget.lower(engine.step_index + 1, [examples[i] for i in step.rows], alone)
                        ahead.restart(batches(engine, examples, plan[engine.step_index:], costs, budget))
                sums += added[1:]
                seen.append(torch.stack([added[0], engine.step()]))
            whole.add(shares)
            packing.add(shares)
            distinct = sum(examples[i].tokens for i in rows)
            if late:
                started, late = write(late, started).time, None
            checks, is_last = guard is not None and guard.due(), engine.step_index == len(plan)
            saves = is_last or engine.step_index % section.checkpoint_steps == 0 or engine.step_index in keep
            if engine.step_index % interval == 0 or is_last or checks:
                late = Interval.end(engine, sums, seen, packing, ahead.waits)
                if checks or saves or not late.readback.is_late:  # else it is read after the next step's launches
                    write(late, started, guard if checks else None)
                    started, late = time.perf_counter(), None
                sums.zero_()
                seen.clear()
                packing = Packing(examples, costs, section.max_tokens)
            bar.advance(1, tokens=distinct)
            # a stage that the guard stopped is resumed from before that check, and comes to it again
            ends = is_last or (guard is not None and bool(guard.stopped))
            is_point = engine.step_index % section.checkpoint_steps == 0 and not ends
            if seen and saves:  # never write weights that are not finite
                packed = torch.cat(seen)
                mesh.sum_([packed])
                stop_if_not_finite(stage, engine, examples, plan, engine.step_index, packed.cpu())
            if engine.step_index in keep:
                engine.save(stage.dir / "snapshots" / f"step-{engine.step_index:06}")
            # ranks stop at different steps, so check this rank's values only; after the last step the weights are saved
            asked, sound = stopping.requested(), True
            if asked:
                if late:
                    started, late = write(late, started).time, None
                sound = all(values.isfinite().all() for values in seen)
            with engine.within(f"{stage.name}: step {engine.step_index}"):
                asked, sound = engine.agree(asked, sound)
            if is_point or (asked and sound and not ends):
                engine.save_checkpoint(work)
            if asked and not ends:
                engine.checkpoints.finish()
                raise KeyboardInterrupt
    stage.counts |= {"microbatches": whole.microbatches} | whole.values()
    save_last(stage, engine, guard)
    return engine.step_index


def resume(stage: Stage, engine: Training, steps: int, guard: Guard | None) -> set[int]:
    """Goes to the last resume point of a stage of `steps` optimizer steps, if there is one. Returns the steps after
    which a snapshot is due."""
    if engine.resume(stage.work):
        stage.console.line(f"{stage.name}: resumed at step {engine.step_index} of {steps}")
        stage.metrics.rewind(stage.name, engine.step_index)
        if guard:
            guard.resume()
    count = engine.section.snapshots
    return {round(steps * (i + 1) / (count + 1)) for i in range(count)} - {0, steps}


def save_last(stage: Stage, engine: Training, guard: Guard | None) -> None:
    """Writes the last weights and their average, or what the guard kept if it stopped the stage."""
    if not (guard and guard.stopped):
        engine.save(stage.dir / "model")
        engine.save_ema(stage.dir / "ema")
    if guard:
        guard.finish()


def attempt(engine: Training, ahead: Ahead, step: Step, loss, count: int
            ) -> tuple[list[list[list[int]]], torch.Tensor | None]:
    """Runs a step's microbatches forward and backward. Returns every rank's microbatches, and the loss and the sums
    [count]; None for these if a microbatch ran out of memory, whose rows are then those of `step`."""
    if engine.lora.dropout:
        torch.manual_seed(hash((engine.seed, engine.step_index, engine.world.rank)))
    added = torch.zeros(count, device=engine.world.device)
    shares, number = ahead.next()
    try:
        for i in range(number):
            step.rows, groups = ahead.next()
            if groups is None:
                engine.fill(i == number - 1)
                continue
            value, vector = loss(groups, step)
            engine.backward(value, i == number - 1)
            added += torch.cat([value.detach()[None], vector])
    except Exception as e:  # the error holds the microbatch's tensors, so it must not live longer
        if not step.rows or not is_out_of_memory(e):
            raise
        return shares, None
    return shares, added


def batches(engine: Training, examples: list[Example], plan: list[list[int]], costs: list[int], budget: Budget
            ) -> Iterator[tuple[list, int] | tuple[list[int], PackedGroups | None]]:
    """What this rank needs, in the order in which the loop takes it: of every step (the microbatches of every rank, or
    of every group of ranks that share them, the number of microbatches that this rank runs), then of each microbatch
    (its rows, the packed row on the device). No rows and None: only other ranks have that microbatch, and this one must
    take part."""
    mesh = engine.mesh
    for rows in plan:
        shares = microbatches(examples, rows, costs, budget.tokens, mesh.size)
        mine = shares[mesh.rank]
        count = max(map(len, shares)) if engine.together else len(mine)
        yield shares, count
        for indices in mine:
            yield indices, collate(examples, indices, engine.world.device, mesh.sequence)
        for _ in range(count - len(mine)):
            yield [], None


def stop_if_not_finite(stage: Stage, engine: Training, examples: list[Example], plan: list[list[int]], last: int,
                       seen: torch.Tensor) -> None:
    """Raises UserError if the loss or gradient norm of a step is not finite, and writes its batch next to the
    checkpoint. seen [2 * steps] on the host: loss and gradient norm of the steps up to `last`, summed over the mesh."""
    bad = (~seen.view(-1, 2).isfinite()).any(1).nonzero()
    if not len(bad):
        return
    first = int(bad[0])
    index = last - len(seen) // 2 + first
    loss, norm = seen[2 * first:2 * first + 2].tolist()
    rows = [examples[i] for i in plan[index]]
    path, points = stage.work / f"bad-step-{index + 1:06}.parquet", checkpoints_in(stage.work)
    if engine.world.first:
        write_table(path, pa.Table.from_pylist([{
            "row_id": e.row_id, "prompt_tokens": list(e.group.prompt), "weight": e.weight,
            "completion_tokens": [list(c) for c in e.group.completions],
            "loss_masks": [list(m) for m in e.group.loss_masks] if e.group.loss_masks else None,
            "nll_masks": [list(m) for m in e.group.nll_masks] if e.group.nll_masks else None} for e in rows]))
    ids = ", ".join(e.row_id for e in rows[:4]) + (f" and {len(rows) - 4} more" if len(rows) > 4 else "")
    raise UserError(f"{stage.name}: step {index + 1}: loss={loss:g} and grad_norm={norm / engine.mesh.size:g} must "
                     f"be finite; its batch (rows {ids}) is in {path}, the last good checkpoint is "
                     f"{points[-1] if points else 'the start of the stage'}; lower {stage.name.split('/')[-1]}.lr or "
                     "check these rows")
