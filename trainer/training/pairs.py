"""Preference pairs as examples, and their reference log-probs."""

from pathlib import Path

import torch

from strop.kernels import Group
from strop.trainer.config import Dpo, Part
from strop.trainer.errors import UserError
from strop.trainer.run.store import Stage
from strop.trainer.run.tables import Drops, read_table
from strop.trainer.training.batch import Example


def load_pairs(stage: Stage, path: Path, section: Dpo | Part, context: int, record: bool) -> list[Example]:
    """Rows of pairs.parquet as examples of two completions, chosen first. Pairs that do not fit, whose completions are
    equal or that lack a loss token on one side are dropped. record: write the drops. Raises UserError if no pair is
    left in the first round."""
    drops, examples = Drops(stage), []
    limit = min(section.max_length or 1 << 30, context)
    for row in read_table(path).to_pylist():
        masks = [row["chosen_mask"], row["rejected_mask"]]
        if section.mask_template_tokens:
            masks = [[m and not t for m, t in zip(mask, row[f"{side}_template"], strict=True)]
                     for side, mask in zip(("chosen", "rejected"), masks, strict=True)]
        completions = [row["chosen_tokens"], row["rejected_tokens"]]
        example = Example(row["row_id"], Group(row["prompt_tokens"], completions, masks), row["weight"])
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


class ReferenceTable:
    """fp32 reference log-probs by row."""

    def __init__(self, path: Path):
        self.rows = {r["row_id"]: r for r in read_table(path).to_pylist()}
        self.path = path

    def of(self, examples: list[Example], indices: list[int], device: torch.device) -> torch.Tensor:
        """fp32 [targets] in the order of the packed examples. Raises UserError if a row's tokens or masks changed."""
        values: list[float] = []
        for i in indices:
            row = self.rows.get(examples[i].row_id)
            if row is None or row["fingerprint"] != examples[i].fingerprint():
                raise UserError(f"{self.path}: pair {examples[i].row_id} is missing or has other tokens or masks; "
                                 "delete its folder to re-run the stage")
            values += row["chosen"] + row["rejected"]
        tensor = torch.tensor(values, dtype=torch.float32)
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
