"""Replacing each round's data against accumulating it (2404.01413): two runs of four rounds and a figure.

    python -m benchmarks.collapse [RECIPE] [key=value ...]

Every round fine-tunes the start weights on completions of the weights before, unfiltered: on the newest ones alone
(select.accumulate=false), or on those of all rounds. Writes runs/collapse/collapse.svg and collapse.md with the test
pass rate, the KL to the start weights and the share of distinct completions of every round.
"""

from __future__ import annotations

import sys
from pathlib import Path

import strop
from strop.trainer.cli import parse
from strop.trainer.config import Recipe
from strop.trainer.reports import charts
from strop.trainer.run.files import read_json

WAYS = {"replace": False, "accumulate": True}
SETTINGS = {"rounds": 4, "sft.start": "base", "dpo.enabled": False, "merge.method": "last",
            "merge.promote": "last", "merge.max_cut_rise": 1.0, "select.sft_min_score": None, "select.sft_cut": True,
            "select.sft_per_prompt": 2, "select.tie_break": "random", "sft.eval_steps": 0}
MEASURES = {"pass_rate": "test pass rate", "kl": "KL to the start weights, nats per token",
            "distinct": "distinct completions"}
WIDTH, HEIGHT, HEAD = 340, 190, 40


def collapse(recipe: Recipe, settings: dict = SETTINGS) -> dict[str, list[dict]]:
    """Way -> a row of measures for the start weights (of samples: of the first round) and each round."""
    found = {}
    for way, accumulate in WAYS.items():
        run = strop.train(recipe, settings | {"select.accumulate": accumulate, "name": f"collapse-{way}"})
        found[way] = measures(run.dir, run.rounds)
    return found


def measures(run: Path, rounds: int) -> list[dict]:
    rows = [{"round": 0, "pass_rate": read_json(run / "baseline/summary.json")["base"]["test"]["pass_rate"], "kl": 0.0,
             "distinct": None}]
    record = strop.load_run(run)
    for r in range(rounds):
        samples = record.table(f"round-{r:02}/sample")
        texts = list(zip(samples["prompt_id"].to_pylist(), samples["completion"].to_pylist(), strict=True))
        rows[-1]["distinct"] = len(set(texts)) / len(texts)  # the round's samples are of the weights before it
        here = run / f"round-{r:02}"
        rows.append({"round": r + 1, "pass_rate": read_json(here / "evaluate/summary.json")["sft"]["test"]["pass_rate"],
                     "kl": read_json(here / "held-out/kl.json")["sft"]["kl"], "distinct": None})
    return rows


def figure(found: dict[str, list[dict]]) -> str:
    body = []
    for i, (key, title) in enumerate(MEASURES.items()):
        x = i * (WIDTH + 10)
        body.append(charts.text(x + charts.LEFT, 16, title, "start", charts.INK))
        body += [charts.text(x + charts.LEFT + 90 * j, 32, way, "start", charts.COLORS[j])
                 for j, way in enumerate(found)]
        lines = [charts.Line(way, [row["round"] for row in rows], [row[key] for row in rows])
                 for way, rows in found.items()]
        chart = charts.line_chart(lines, WIDTH, HEIGHT, zero=True)
        body.append(chart.replace("<svg ", f'<svg x="{x}" y="{HEAD}" height="{HEIGHT}" ', 1))
    return charts.svg(body, 3 * (WIDTH + 10), HEAD + HEIGHT, "replacing and accumulating data over rounds")


def table(found: dict[str, list[dict]]) -> str:
    head = ["round", *(f"{title}, {way}" for title in MEASURES.values() for way in found)]
    lines = [f"| {' | '.join(head)} |", "|---:" * len(head) + "|"]
    for rows in zip(*found.values(), strict=True):
        cells = [row[key] for key in MEASURES for row in rows]
        lines.append(f"| {' | '.join([str(rows[0]['round']), *('' if v is None else f'{v:.3f}' for v in cells)])} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> None:
    command = parse(arguments)
    found = collapse(command.recipe)
    folder = Path(command.recipe.output_dir) / "collapse"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "collapse.svg").write_text(figure(found), encoding="utf-8")
    (folder / "collapse.md").write_text("# Replace against accumulate\n\n![](collapse.svg)\n\n" + table(found),
                                        encoding="utf-8")
    print(f"{table(found)}\nwrote {folder / 'collapse.svg'} and collapse.md", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
