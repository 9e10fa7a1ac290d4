"""Preference losses that need no pairs: KTO and BCO on single completions, desirable or not, and Plackett-Luce on the
scored completions of a prompt, packed as one group."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, chain, groupby
from pathlib import Path

import torch
from torch import Tensor

from strop.kernels import PREFERENCE_METRICS, Group, PackedGroups, preference_loss, preference_means
from strop.kernels.preference import plackett_luce_loss, sequence_sums
from strop.trainer.config import Dpo, Part
from strop.trainer.errors import UserError
from strop.trainer.run.store import Stage
from strop.trainer.run.tables import Drops, read_table
from strop.trainer.sampling.kv_cache import onto
from strop.trainer.training.batch import Example, collate, ends_first, microbatches, mixed
from strop.trainer.training.engine import Training
from strop.trainer.training.flops import training_flops
from strop.trainer.training.pairs import Origin, ReferenceTable

COUNT = PREFERENCE_METRICS.index("count")
KERNEL = {"kto": "kto", "bco": "bco_pair"}  # the names of losses of labels in strop.kernels


@dataclass(frozen=True)
class Rated(Example):
    """A prompt with one labeled completion (ratings: 1 if it is desirable, else 0) or with several, best first."""

    ratings: tuple[float, ...] = ()
    origins: tuple[Origin, ...] = ()

    @property
    def ranks(self) -> list[int]:
        """Of the completions, ascending from 0; equal ratings have equal ranks."""
        places = {rating: i for i, rating in enumerate(sorted(set(self.ratings), reverse=True))}
        return [places[rating] for rating in self.ratings]


def load_rated(stage: Stage, path: Path, section: Dpo | Part, rows: str, context: int, record: bool,
               mix: dict[str, float] | None = None) -> list[Rated]:
    """Rows of rated.parquet as examples: of a completion each (rows: labels), or of all completions of a list, the best
    first (lists). section.mask_template_tokens takes template tokens out of the loss.

    Completions that do not fit, that occur twice in a list or that have no loss token are dropped, and lists without
    two different scores. record: write the drops. mix: factors of the weights by source. Raises UserError if nothing is
    left in the first round."""
    drops, examples = Drops(stage), []
    table, limit = mixed(read_table(path).to_pylist(), mix, drops), limit_of(section, context)
    for row in table:
        masks = zip(row["loss_mask"], row["template"], strict=True)
        row["mask"] = [on and not (section.mask_template_tokens and template) for on, template in masks]
    for name, part in groupby(table, key=lambda row: row["row_id" if rows == "labels" else "list_id"]):
        kept = sorted(_usable(list(part), limit, drops), key=lambda row: -row["score"] if rows == "lists" else 0)
        lengths = [len(row["completion_tokens"]) for row in kept]
        fit = ends_first(lengths, section.max_tokens - len(kept[0]["prompt_tokens"])) if kept else []
        for i in set(range(len(kept))) - set(fit):
            _drop(drops, "overlong", kept[i], f"no room in dpo.max_tokens={section.max_tokens}")
        kept = [kept[i] for i in fit]
        ratings = tuple(row["score"] if rows == "lists" else float(row["desirable"]) for row in kept)
        if rows == "lists" and kept and len(set(ratings)) < 2:
            drops.add("tie", prompt_id=kept[0]["prompt_id"], source=kept[0]["source"],
                      detail=f"{name}: {len(kept)} completions have no two scores")
        elif kept:
            group = Group(kept[0]["prompt_tokens"], [row["completion_tokens"] for row in kept],
                          [row["mask"] for row in kept])
            origins = tuple(Origin(row["writer"], row["writer_hash"], row["logp"]) for row in kept)
            examples.append(Rated(name, group, kept[0]["weight"], ratings, origins))
    if record and stage.world.first:
        drops.write()
    if not examples and (record or not stage.round):
        what = "completion" if rows == "labels" else "list of completions"
        stage.nothing_to_learn(f"{path}: no {what} is left to train on; groups of {section.max_tokens} tokens fit "
                               f"(dpo.max_tokens), sides of {limit} (dpo.max_length, the model's context), see "
                               f"drops.parquet there and in {stage.dir}, or set dpo.enabled=false")
    return examples


def limit_of(section: Dpo | Part, context: int) -> int:
    """Most tokens of a prompt and a completion."""
    return min(section.max_length or context, context)


def _usable(part: list[dict], limit: int, drops: Drops) -> list[dict]:
    found: dict[tuple, dict] = {}
    for row in part:
        alone = Group(row["prompt_tokens"], [row["completion_tokens"]], [row["mask"]])
        length = len(row["prompt_tokens"]) + len(row["completion_tokens"])
        if length > limit:
            _drop(drops, "overlong", row, f"{length} tokens, {limit} fit")
        elif not alone.targets(0):
            _drop(drops, "empty", row, "no loss token")
        elif found.setdefault(tuple(row["completion_tokens"]), row) is not row:
            _drop(drops, "duplicate", row, "twice in its list")
    return list(found.values())


def _drop(drops: Drops, reason: str, row: dict, detail: str) -> None:
    drops.add(reason, prompt_id=row["prompt_id"], sample_index=row["sample_index"], source=row["source"],
              detail=f"{row['row_id']}: {detail}")


def mismatched(examples: list[Example], plan: list[list[int]], limit: int) -> tuple[list[Example], list[list[int]]]:
    """KTO's prompts with completions of other prompts, and by step the indices of those that it uses.

    In a step each prompt gets the completion before it, the first one the last (arXiv 2402.01306, section 4.1), or
    where that is of the same prompt or does not fit, the next one before it, in the step or else in the data. Raises
    UserError if all completions are of one prompt.
    """
    prompts = [tuple(e.group.prompt) for e in examples]
    if len(examples) and len(set(prompts)) < 2:
        raise UserError("dpo.loss=kto compares completions with those of other prompts, but all are of one prompt; add "
                        "prompts, or set dpo.loss=bco")
    found, places, steps = [], {}, []
    for rows in plan:
        step = []
        for at, i in enumerate(rows):
            before = chain((rows[(at - n) % len(rows)] for n in range(1, len(rows))),
                           ((i - n) % len(examples) for n in range(1, len(examples))))
            j = next((j for j in before if prompts[j] != prompts[i]
                      and len(prompts[i]) + len(examples[j].group.completions[0]) <= limit), None)
            if j is None:
                continue
            if (i, j) not in places:
                places[i, j] = len(found)
                other = examples[j].group
                found.append(Example(f"{examples[i].row_id} < {examples[j].row_id}",
                                     Group(prompts[i], other.completions, other.loss_masks)))
            step.append(places[i, j])
        steps.append(step)
    return found, steps


class Baseline:
    """KTO's z or BCO's d of a step, from a pass without gradients over its whole global batch before the loss.

    z is the mean log-ratio of the mismatched completions, at least 0. d is the mean reward of all completions so far,
    this step's included; its sum is part of the checkpoints.
    """

    def __init__(self, section: Dpo, engine: Training, table: ReferenceTable, examples: list[Example],
                 plan: list[list[int]], limit: int):
        self.section, self.engine, self.table = section, engine, table
        self.examples, self.steps = examples, plan
        self.name = {"kto": "kl", "bco": "delta"}[section.loss]  # TRL's names
        if section.loss == "kto":
            self.examples, self.steps = mismatched(examples, plan, limit)
        else:
            engine.extra["rewards"] = torch.zeros(2, dtype=torch.float64, device=engine.world.device)  # sum, count
        self.costs = [training_flops(engine.sizes, example) for example in self.examples]

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """fp32, 0-dim, on the device."""
        world, mesh, rows = self.engine.world, self.engine.mesh, self.steps[self.engine.step_index]
        total = torch.zeros((), dtype=torch.float64, device=world.device)
        shares = microbatches(self.examples, rows, self.costs, self.section.max_tokens, mesh.size)
        for indices in shares[mesh.rank]:
            groups = collate(self.examples, indices, world.device, mesh.sequence)
            total += (self.engine.logprobs(groups) - self.table.of(self.examples, indices, world.device)).double().sum()
        for _ in range(max(map(len, shares)) - len(shares[mesh.rank]) if self.engine.together else 0):
            self.engine.logprobs(self.engine.nothing)
        mesh.sum_([total])
        if self.section.loss == "kto":
            return (total / max(1, len(rows))).clamp_min(0).float()
        self.engine.extra["rewards"] += torch.stack([self.section.beta * total, torch.full_like(total, len(rows))])
        rewards, count = self.engine.extra["rewards"]
        return (rewards / count).float()


def labeled_loss(section: Dpo, examples: list[Rated], rows: list[int], groups: PackedGroups, logp: Tensor, ref: Tensor,
                 baseline: Tensor, completions: int) -> tuple[Tensor, Tensor]:
    """(loss, sums of PREFERENCE_METRICS and the baseline) of a microbatch of a step of `completions`."""
    desirable = onto(logp.device, [int(examples[i].ratings[0]) for i in rows])[0].bool()
    value, metrics = preference_loss(
        logp, ref, segments=groups.target_segment, num_segments=groups.num_completions, loss_type=KERNEL[section.loss],
        beta=section.beta, desirable=desirable, desirable_weight=section.desirable_weight,
        undesirable_weight=section.undesirable_weight, baseline=baseline, pair_denominator=completions)
    return value, torch.cat([metrics, (baseline * len(rows)).view(1)])


def listed_loss(section: Dpo, examples: list[Rated], rows: list[int], groups: PackedGroups, logp: Tensor, ref: Tensor,
                prompts: int) -> tuple[Tensor, Tensor]:
    """(loss, sums of PREFERENCE_METRICS) of a microbatch of a step of `prompts`; the metrics take the best completion
    of a prompt for chosen and the worst for rejected."""
    counts = [len(examples[i].ratings) for i in rows]
    how = {"segments": groups.target_segment, "num_segments": groups.num_completions}
    total = plackett_luce_loss(logp, ref, **how, completions=counts, ranks=[r for i in rows for r in examples[i].ranks],
                               beta=section.beta, denominator=1)
    with torch.no_grad():
        sides = [at for end, n in zip(accumulate(counts), counts, strict=True) for at in (end - n, end - 1)]
        first, last = zip(*groups.target_bounds, strict=True)
        places, lengths = onto(logp.device, sides, [last[at] - first[at] for at in sides])
        policy, reference = (sequence_sums(values, **how).index_select(0, places) for values in (logp, ref))
        metrics = preference_loss(policy, reference, beta=section.beta, lengths=lengths)[1]
        at = PREFERENCE_METRICS.index("loss")
        metrics = torch.cat([metrics[:at], total.float().view(1), metrics[at + 1:]])
    return total / prompts, metrics


def means_of(name: str) -> Callable[[Tensor], dict[str, float]]:
    """preference_means of the sums of labeled_loss, with the baseline under `name`."""
    def finish(sums: Tensor) -> dict[str, float]:
        metrics, baseline = sums[:-1], sums[-1].item()
        means = preference_means(metrics) | {name: baseline / max(1.0, metrics[COUNT].item())}
        del means["nll_loss"]  # there is none
        return means

    return finish
