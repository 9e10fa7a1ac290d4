"""What judges can be trusted with: position bias, agreement between judges and with other scorers."""

from collections import defaultdict
from itertools import combinations

import numpy as np

from strop.trainer.reports.statistics import wilson


def summarize_judges(verdicts: list[dict], values: dict[tuple, dict[str, float | None]], judges: set[str]) -> dict:
    """{"judges": a dict per judge, "between": per two judges, "with": per judging scorer and other scorer}.

    verdicts: rows of verdicts.parquet. values: (prompt_id, ...) -> scorer -> value; judges: the scorers that judge."""
    by_judge: dict[str, list[dict]] = defaultdict(list)
    for row in verdicts:
        by_judge[row["judge"]].append(row)
    return {"judges": {name: about(rows) for name, rows in sorted(by_judge.items())},
            "between": [{"judges": list(pair)} | between(*(by_judge[name] for name in pair))
                        for pair in combinations(sorted(by_judge), 2)],
            "with": [{"judge": judge, "scorer": other} | concordance(values, judge, other)
                     for judge in sorted(judges) for other in sorted({n for v in values.values() for n in v} - judges)]}


def about(rows: list[dict]) -> dict:
    """asked, unparsed; of pairs also first: how often the answer shown first wins, without ties, and consistent: the
    share of pairs with the same verdict in both orders, both with 95 % intervals low to high."""
    found = {"asked": len(rows), "unparsed": sum(row["verdict"] is None for row in rows)}
    pairs = {(row["prompt"], row["first"], row["second"]): row["verdict"] for row in rows if row["second"] is not None}
    said = [verdict for verdict in pairs.values() if verdict in ("A", "B")]
    turned = {"A": "B", "B": "A"}
    both = [(verdict, pairs[p, b, a]) for (p, a, b), verdict in pairs.items()
            if a < b and verdict is not None and pairs.get((p, b, a)) is not None]
    if said:
        found["first"] = rate(said.count("A"), len(said))
    if both:
        found["consistent"] = rate(sum(turned.get(b, b) == a for a, b in both), len(both))
    return found


def rate(n: int, of: int) -> dict:
    low, high = wilson(n / of, of)
    return {"rate": n / of, "low": low, "high": high, "n": of}


def between(one: list[dict], other: list[dict]) -> dict:
    """How often two judges give the same verdict on a pair or topic, and the correlation of their grades."""
    verdicts = [{(r["prompt"], r["first"], r["second"]): r["verdict"] for r in rows if r["verdict"] is not None}
                for rows in (one, other)]
    common = sorted(verdicts[0].keys() & verdicts[1].keys(), key=str)
    both = [tuple(v[key] for v in verdicts) for key in common]
    pairs = [one for one in both if any(verdict[:1].isalpha() for verdict in one)]
    grades = np.array([[float(v) for v in one] for one in both if one not in pairs]).reshape(-1, 2)
    found = {"same": rate(sum(a == b for a, b in pairs), len(pairs))} if pairs else {}
    if len(grades) > 1 and all(grades.std(0) > 0):
        found["correlation"] = float(np.corrcoef(grades.T)[0, 1])
    return found


def concordance(values: dict[tuple, dict[str, float | None]], judge: str, other: str) -> dict:
    """Of two completions of a prompt that both scorers value differently: how often both prefer the same."""
    by_prompt: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for key, found in values.items():
        if found.get(judge) is not None and found.get(other) is not None:
            by_prompt[key[0]].append((found[judge], found[other]))
    same = [(a[0] > b[0]) == (a[1] > b[1]) for rows in by_prompt.values() for a, b in combinations(rows, 2)
            if a[0] != b[0] and a[1] != b[1]]
    return {"same": rate(sum(same), len(same))} if same else {}
