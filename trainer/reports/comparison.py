"""The figure of Stiennon et al. (2020) and Gao et al. (2022): best of n and trained policies over their KL."""

from strop.trainer.reports import charts
from strop.trainer.reports.best_of import HEAD, HEIGHT, WIDTH, kl_bound
from strop.trainer.reports.statistics import percent

COLUMNS = ["policy", "KL (nats)", "wins over one sample", "at most", "mean score", "mean reward"]
NOTE = ("Wins are by score, ties count half; 95 % intervals over prompts. The reward picks the best of n. KL of the "
        "best of n samples: at most log n - (n-1)/n (2401.01879); of a policy: measured on its completions.")


def cells(row: dict) -> list[str]:
    wins = "" if row["win_rate"] is None else f"{percent(row['win_rate'])} ± {100 * row['win_error']:.1f}"
    kl = f"≤ {row['kl']:.3f}" if row["kl_error"] is None else f"{row['kl']:.3f} ± {row['kl_error']:.3f}"
    return [row["name"], kl, wins, "" if row["win_bound"] is None else percent(row["win_bound"]),
            f"{row['score']:.3f} ± {row['score_error']:.3f}", f"{row['reward']:.3f}"]


def page(rows: list[dict]) -> str:
    lines = ["# Best of n and trained policies", "", "![comparison](comparison.svg)", "", f"| {' | '.join(COLUMNS)} |",
             "|---|" + "---:|" * (len(COLUMNS) - 1), *(f"| {' | '.join(cells(row))} |" for row in rows), "", NOTE]
    return "\n".join(lines) + "\n"


def figure(rows: list[dict]) -> str:
    """Win rate with its bound, mean score and mean reward over the KL as one SVG. A policy is a cross of its
    intervals."""
    best, trained = [row for row in rows if row["n"]], [row for row in rows if not row["n"]]
    most = max(row["kl"] + (row["kl_error"] or 0.0) for row in rows)
    ns = [1.25**i for i in range(200)]
    ns = ns[:1 + next(i for i, n in enumerate(ns) if kl_bound(n) >= most)]
    bound = charts.Line("bound n/(n+1)", [kl_bound(n) for n in ns], [n / (n + 1) for n in ns])
    body = []
    for i, (key, error, title) in enumerate((("win_rate", "win_error", "wins over one sample"),
                                             ("score", "score_error", "mean score"), ("reward", None, "mean reward"))):
        x = i * (WIDTH + 10)
        lines = [charts.Line("best of n", [row["kl"] for row in best], [row[key] for row in best])]
        lines += [cross(row, key, error) for row in trained]
        lines += [bound] if i == 0 else []
        body.append(charts.text(x + charts.LEFT, 16, f"{title}, over the KL in nats", "start", charts.INK))
        body += [charts.text(x + charts.LEFT + 90 * j, 32, line.name, "start", charts.COLORS[j % len(charts.COLORS)])
                 for j, line in enumerate(lines)]
        chart = charts.line_chart(lines, WIDTH, HEIGHT, whole=False)
        body.append(chart.replace("<svg ", f'<svg x="{x}" y="{HEAD}" height="{HEIGHT}" ', 1))
    return charts.svg(body, 3 * (WIDTH + 10), HEAD + HEIGHT, "best of n and trained policies")


def cross(row: dict, key: str, error: str | None) -> charts.Line:
    """A point with its intervals, drawn in one stroke."""
    x, y, wide = row["kl"], row[key], row["kl_error"]
    high = row[error] if error else 0.0
    return charts.Line(row["name"], [x - wide, x + wide, x, x, x], [y, y, y, y - high, y + high])
