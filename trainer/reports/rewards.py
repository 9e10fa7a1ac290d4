"""How good a reward model is on held-out pairs: accuracy, calibration and length bias."""

import json
import math
from collections import defaultdict

import numpy as np

from strop.trainer.reports.statistics import percent, wilson

BINS = 10  # of the confidence, between 0.5 and 1


def summarize(rows: list[dict]) -> dict:
    """{"all": what describe returns, "by_source": {source: the same}} of rows of held_out.parquet."""
    by_source = defaultdict(list)
    for row in rows:
        by_source[row["source"]].append(row)
    return {"all": describe(rows), "by_source": {source: describe(mine) for source, mine in sorted(by_source.items())}}


def describe(rows: list[dict]) -> dict:
    """accuracy with its 95 % interval low to high, n pairs of so many prompts, log_loss, calibration, and length.

    Pairs of a prompt are not independent: Wilson's interval is over the number of independent pairs with the same
    variance. log_loss is the mean of -log sigmoid(chosen - rejected)."""
    if not rows:
        return {"n": 0, "prompts": 0}
    difference = np.array([row["chosen"] - row["rejected"] for row in rows])
    right = difference > 0
    accuracy, n = float(right.mean()), effective(right, [row["prompt"] for row in rows])
    low, high = wilson(accuracy, n)
    scores = [row[side] for row in rows for side in ("chosen", "rejected")]
    return {"accuracy": accuracy, "low": low, "high": high, "n": len(rows),
            "prompts": len({row["prompt"] for row in rows}), "log_loss": float(np.logaddexp(0.0, -difference).mean()),
            "mean": float(np.mean(scores)), "std": float(np.std(scores)), "calibration": calibration(difference),
            "length": length_bias(rows)}


def effective(right: np.ndarray, prompts: list[str]) -> float:
    """The number of independent trials that would vary as much as these, whose outcomes go together within a prompt:
    at least the number of prompts, at most the number of trials."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    rate = right.mean()
    for ok, prompt in zip(right, prompts, strict=True):
        sums[prompt][0] += float(ok) - rate
        sums[prompt][1] += 1
    spread = sum(s * s for s, _ in sums.values()) / len(right) ** 2
    if spread == 0:
        return float(len(sums))
    return float(min(max(rate * (1 - rate) / spread, len(sums)), len(right)))


def calibration(difference: np.ndarray) -> dict:
    """bins: confidence (mean sigmoid of the absolute difference in score), accuracy, low, high and n of each; error:
    the mean distance of confidence and accuracy (expected calibration error)."""
    confidence = 1 / (1 + np.exp(-np.abs(difference)))
    place = np.minimum(((confidence - 0.5) * 2 * BINS).astype(int), BINS - 1)
    bins, error = [], 0.0
    for i in range(BINS):
        mine = place == i
        if n := int(mine.sum()):
            said, held = float(confidence[mine].mean()), float((difference[mine] > 0).mean())
            low, high = wilson(held, n)
            bins.append({"confidence": said, "accuracy": held, "low": low, "high": high, "n": n})
            error += n / len(difference) * abs(said - held)
    return {"bins": bins, "error": error}


def length_bias(rows: list[dict]) -> dict:
    """correlation: of score and tokens over completions; within_pairs: of the differences within a pair; chosen_longer:
    the share of pairs of different length whose chosen is the longer, higher_longer: whose higher score is."""
    scores = np.array([[row["chosen"], row["rejected"]] for row in rows], dtype=float)
    tokens = np.array([[row["chosen_tokens"], row["rejected_tokens"]] for row in rows], dtype=float)
    by, of = scores[:, 0] - scores[:, 1], tokens[:, 0] - tokens[:, 1]
    differ = of != 0
    return {"correlation": cosine(scores.ravel() - scores.mean(), tokens.ravel() - tokens.mean()),
            "within_pairs": cosine(by, of),
            "chosen_longer": float((of[differ] > 0).mean()) if differ.any() else None,
            "higher_longer": float((by[differ] * of[differ] > 0).mean()) if differ.any() else None}


def cosine(a: np.ndarray, b: np.ndarray) -> float | None:
    norm = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / norm if norm > 0 else None


CARD = """\
---
base_model: {quoted}
{license}library_name: transformers
pipeline_tag: text-classification
tags: [reward-model]
---

# Reward model of {name}

Trained with Strop on pairs of completions (Bradley-Terry). One output: the score, read at the completion's last token.
Pass token ids that end with the end of turn, as the model saw them; chat templates may put a line break behind it.

```python
from transformers import AutoModelForSequenceClassification, AutoTokenizer
model, tokenizer = AutoModelForSequenceClassification.from_pretrained("."), AutoTokenizer.from_pretrained(".")
```

| held-out pairs | n | accuracy | 95 % interval |
|---|---|---|---|
{rows}
"""


def reward_card(name: str, base: dict, summary: dict) -> str:
    """The model card of a reward model. base: of plan.json; summary: reward.json."""
    rows = [("all", summary["all"]), *summary["by_source"].items()]
    lines = [f"| {source} | {r['n']} | {percent(r['accuracy'])} | {percent(r['low'])} to {percent(r['high'])} |"
             for source, r in rows if r["n"]]
    license = f"license: {base['license']}\n" if base.get("license") else ""
    name = str(base.get("base_model") or name)
    return CARD.format(name=name, quoted=json.dumps(name), license=license, rows="\n".join(lines))
