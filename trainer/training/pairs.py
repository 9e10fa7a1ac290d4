"""Preference pairs as examples, and their reference log-probs."""

from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch

from strop.kernels import Group
from strop.trainer.config import Dpo, Part
from strop.trainer.errors import UserError
from strop.trainer.run.store import Stage
from strop.trainer.run.tables import Drops, read_table
from strop.trainer.training.batch import Example, mixed

SIDES = ("chosen", "rejected")


class Origin(NamedTuple):
    """Where a completion comes from. logp: under its writer; None if unknown."""

    writer: str | None
    writer_hash: str | None
    logp: float | None


def load_pairs(stage: Stage, path: Path, section: Dpo | Part, context: int, record: bool,
               mix: dict[str, float] | None = None) -> list[Example]:
    """Rows of pairs.parquet as examples of two completions, chosen first. Their NLL masks keep what
    section.mask_template_tokens takes out of the loss: else nothing would teach to stop. Pairs that do not fit, whose
    completions are equal or that lack a loss token on one side are dropped. record: write the drops. mix: factors of
    the weights by source. Raises UserError if no pair is left in the first round."""
    drops, examples = Drops(stage), []
    limit = min(section.max_length or 1 << 30, context)
    for row in mixed(read_table(path).to_pylist(), mix, drops):
        nll_masks, masks = None, [row["chosen_mask"], row["rejected_mask"]]
        if section.mask_template_tokens:
            nll_masks = masks
            masks = [[m and not t for m, t in zip(mask, row[f"{side}_template"], strict=True)]
                     for side, mask in zip(SIDES, masks, strict=True)]
        completions = [row["chosen_tokens"], row["rejected_tokens"]]
        example = Example(row["row_id"], Group(row["prompt_tokens"], completions, masks, nll_masks), row["weight"])
        longest = len(row["prompt_tokens"]) + max(map(len, completions))
        reason = detail = None
        if longest > limit:
            reason, detail = "overlong", f"{longest} tokens, {limit} fit"
        elif example.tokens > section.max_tokens:
            reason, detail = "overlong", f"a pair of {example.tokens} tokens, dpo.max_tokens={section.max_tokens}"
        elif completions[0] == completions[1]:
            reason = "identical"
        elif 0 in example.targets():
            reason, detail = "empty", "one side has no loss token"
        if reason:
            drops.add(reason, prompt_id=row["prompt_id"], source=row["source"], detail=detail or "")
        else:
            examples.append(example)
    if record and stage.world.first:
        drops.write()
    if not examples and (record or not stage.round):  # DPO warns, its reference need not
        stage.nothing_to_learn(f"{path}: no pair is left to train on; pairs of {section.max_tokens} tokens fit "
                               f"(dpo.max_tokens), sides of {limit} (dpo.max_length, the model's context), see "
                               f"drops.parquet there and in {stage.dir}, or set dpo.enabled=false")
    return examples


def origins_of(path: Path, examples: list[Example]) -> list[tuple[Origin, ...]]:
    """Of the completions of each example of pairs.parquet."""
    found = {row["row_id"]: tuple(Origin(*(row.get(f"{side}_{name}") for name in Origin._fields)) for side in SIDES)
             for row in read_table(path).to_pylist()}
    return [found[example.row_id] for example in examples]


def off_policy(origins: list[tuple[Origin, ...]], examples: list[Example], table: "ReferenceTable",
               policy: str | None) -> dict[str, float]:
    """How far the examples are from the policy.

    off_policy_share: those with a completion that weights of another hash than `policy` wrote, ready data included.
    writer_log_ratio: mean per token of log p(writer) - log p(reference), an estimate of KL(writer || reference) from
    the log-probs that were stored in sampling; left out if no completion has any.
    """
    others, difference, tokens = 0, 0.0, 0
    for example, written in zip(examples, origins, strict=True):
        others += any(policy is None or origin.writer_hash != policy for origin in written)
        for origin, logps in zip(written, table.rows[example.row_id]["logps"], strict=True):
            if origin.logp is not None:
                difference, tokens = difference + origin.logp - sum(logps), tokens + len(logps)
    found = {"off_policy_share": others / len(examples)} if examples else {}
    return found | ({"writer_log_ratio": difference / tokens} if tokens else {})


def reward_margin(row: dict) -> float | None:
    """How much better a row of pairs.parquet says that chosen is than rejected: ready data's margin, or the difference
    in score; None if it does not say."""
    if row["margin"] is None and row["chosen_score"] is not None and row["rejected_score"] is not None:
        return row["chosen_score"] - row["rejected_score"]
    return row["margin"]


def reward_margins(path: Path, examples: list[Example]) -> list[float]:
    """reward_margin of each example of pairs.parquet. Raises UserError if one has none."""
    found = {row["row_id"]: reward_margin(row) for row in read_table(path).to_pylist()}
    missing = [e.row_id for e in examples if found[e.row_id] is None]
    if missing:
        raise UserError(f"{path}: {len(missing)} of {len(examples)} pairs (first: {missing[0]}) have no scores, which "
                         "dpo.loss=rpo needs; give the ready data a column margin, or set another dpo.loss")
    return [found[e.row_id] for e in examples]


class ReferenceTable:
    """fp32 reference log-probs by row, of the tokens in the loss or the NLL term."""

    def __init__(self, path: Path):
        self.rows = {r["row_id"]: r for r in read_table(path).to_pylist()}
        self.path = path

    def of(self, examples: list[Example], indices: list[int], device: torch.device) -> torch.Tensor:
        """fp32 [targets] in the order of the packed examples. Raises UserError if a row's tokens or masks changed."""
        values: list[float] = []
        for i in indices:
            row = self.rows.get(examples[i].row_id)
            if row is None or row["fingerprint"] != examples[i].fingerprint():
                raise UserError(f"{self.path}: row {examples[i].row_id} is missing or has other tokens or masks; "
                                 "delete its folder to re-run the stage")
            values += chain.from_iterable(row["logps"])
        tensor = torch.tensor(values, dtype=torch.float32)
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
