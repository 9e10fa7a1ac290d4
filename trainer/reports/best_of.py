"""`strop best-of`: what taking the best of n samples is worth, for every n up to the K that a run stored."""

import math
from collections import defaultdict
from itertools import groupby

import numpy as np

from strop.trainer.errors import UserError
from strop.trainer.reports import charts
from strop.trainer.reports.reading import find_run, read_run
from strop.trainer.reports.statistics import percent
from strop.trainer.run.files import write_atomic
from strop.trainer.run.tables import read_table

WIDTH, HEIGHT, HEAD = 340, 190, 40  # of a chart, and of its title


def best_of(console, argument: str) -> None:
    """Prints the table of each round's samples and writes best_of.svg and best_of.md to the run directory. Raises
    UserError if it has no scored samples."""
    run = read_run(find_run(argument))
    curves: dict[str, list[dict]] = {}
    for stage in (s["stage"] for s in run.of_kind("selection")):
        rows = read_table(run.dir / stage / "judged.parquet").to_pylist()
        if rows:
            curves[stage.replace("/select", "").replace("round-", "round ")] = curve(rows)
    if not curves:
        raise UserError(f"{run.dir}: no scored samples; run it until its first selection is done")
    text = [f"# Best of n: {run.name}", "", "![best of n](best_of.svg)", ""]
    for name, rows in curves.items():
        prompts = f"{name}, {rows[0]['prompts']} prompts" + f", {rows[0]['left_out']} with fewer samples left out" * (
            rows[0]["left_out"] > 0)
        cells = [[str(r["n"]), f"{percent(r['pass_rate'])} ± {100 * r['error']:.1f}", f"{r['score']:.3f}",
                  percent(r["win_rate"]) if r["win_rate"] is not None else "", percent(r["win_bound"]),
                  f"{r['kl_bound']:.3f}"] for r in rows]
        head = ["n", "pass rate", "mean score", "wins over one sample", "at most", "KL at most (nats)"]
        console.table(prompts, head, cells)
        text += [f"## {prompts}", "", f"| {' | '.join(head)} |", "|---:" * len(head) + "|"]
        text += [f"| {' | '.join(row)} |" for row in cells] + [""]
    text.append("Unbiased estimates from the K stored samples of each prompt, 95 % intervals over prompts. The best "
                "is that with the highest score; wins are by correctness, ties count half. Bounds for n samples of one "
                "policy: KL(best of n || policy) <= log n - (n-1)/n, win rate <= n/(n+1) (2401.01879).")
    write_atomic(run.dir / "best_of.svg", lambda p: p.write_text(figure(curves), encoding="utf-8"))
    write_atomic(run.dir / "best_of.md", lambda p: p.write_text("\n".join(text) + "\n", encoding="utf-8"))
    console.line(f"wrote {run.dir / 'best_of.svg'} and best_of.md")


def kl_bound(n: int) -> float:
    """The most that the best of n samples is from their policy, in nats (arXiv 2401.01879, theorem 1)."""
    return math.log(n) - (n - 1) / n


def curve(rows: list[dict]) -> list[dict]:
    """A row for n = 1, 2, 4, ... and K of judged.parquet's rows: estimates over the prompts with K scored samples, the
    most that any prompt has. error, win_error: half of the pass rate's and the win rate's 95 % intervals over prompts;
    left_out: other prompts. Instead of whether it is correct, `correct` may be any value of a sample."""
    by_prompt = defaultdict(list)
    for row in rows:
        if row["score"] is not None:
            by_prompt[row["prompt_id"]].append((row["score"], float(row["correct"])))
    most = max(map(len, by_prompt.values()), default=0)
    whole = [np.array(samples) for samples in by_prompt.values() if len(samples) == most]
    found = []
    for n in dict.fromkeys([*(2**i for i in range(most.bit_length())), most] if most else []):
        right, scores, wins = [], [], []
        for samples in whole:
            chance = chances(samples[:, 0], n)
            right.append(chance @ samples[:, 1])
            scores.append(chance @ samples[:, 0])
            if n < most:
                wins.append(wins_over_one(samples, n))
        found.append({"n": n, "pass_rate": float(np.mean(right)), "score": float(np.mean(scores)), "win_rate":
                      float(np.mean(wins)) if wins else None, "win_bound": n / (n + 1), "kl_bound": kl_bound(n),
                      "error": half_interval(right), "win_error": half_interval(wins) if wins else None,
                      "prompts": len(whole), "left_out": len(by_prompt) - len(whole)})
    return found


def half_interval(values: list[float]) -> float:
    """Half of the 95 % interval of a mean over prompts; 1 for a single one."""
    return 1.96 * float(np.std(values, ddof=1)) / len(values) ** 0.5 if len(values) > 1 else 1.0


def chances(scores: np.ndarray, n: int) -> np.ndarray:
    """[K] the chance of each of K samples to be the best of n that are drawn without replacement, ties broken at
    random. Its dot product with any value of the samples is an unbiased estimate of that value's mean over the best of
    n fresh samples."""
    order, chance, below = np.argsort(scores, kind="stable"), np.zeros(len(scores)), 0
    for _, tied in groupby(order, key=lambda i: scores[i]):
        tied = list(tied)
        upto = below + len(tied)
        chance[tied] = (math.comb(upto, n) - math.comb(below, n)) / math.comb(len(scores), n) / len(tied)
        below = upto
    return chance


def wins_over_one(samples: np.ndarray, n: int) -> float:
    """The chance that the best of n by samples[:, 0] has a higher samples[:, 1] than another sample, ties half."""
    total = 0.0
    for i in range(len(samples)):
        rest = np.delete(samples, i, axis=0)
        beats = (rest[:, 1] > samples[i, 1]) + 0.5 * (rest[:, 1] == samples[i, 1])
        total += chances(rest[:, 0], n) @ beats
    return total / len(samples)


def figure(curves: dict[str, list[dict]]) -> str:
    """Pass rates, wins with their bound, and the bound on the KL, against n, as one SVG."""
    first = next(iter(curves.values()))
    ns = [row["n"] for row in first]

    def lines(key: str) -> list[charts.Line]:
        return [charts.Line(name, [r["n"] for r in rows], [r[key] for r in rows]) for name, rows in curves.items()]

    parts = {"pass rate of the best of n": lines("pass_rate"),
             "wins over one sample; bound n/(n+1)": [*lines("win_rate"), charts.Line(
                 "bound", ns, [row["win_bound"] for row in first])],
             "KL to the policy at most, in nats": [charts.Line("log n - (n-1)/n", ns, [r["kl_bound"] for r in first])]}
    body = []
    for i, (title, drawn) in enumerate(parts.items()):
        x = i * (WIDTH + 10)
        body.append(charts.text(x + charts.LEFT, 16, title, "start", charts.INK))
        for j, line in enumerate(drawn):
            color = charts.COLORS[j % len(charts.COLORS)]
            body.append(charts.text(x + charts.LEFT + 90 * j, 32, line.name, "start", color))
        chart = charts.line_chart(drawn, WIDTH, HEIGHT, zero=True)
        body.append(chart.replace("<svg ", f'<svg x="{x}" y="{HEAD}" height="{HEIGHT}" ', 1))
    return charts.svg(body, 3 * (WIDTH + 10), HEAD + HEIGHT, "best of n")
