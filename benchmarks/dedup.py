"""Seconds and peak memory of the filters on prompts: near duplicates, and overlap with held-out prompts.

    python -m benchmarks.dedup [--rows 20000 200000 ...] [--cases mixed "one template" ...] [--write]

The prompts are random words of a vocabulary with Zipf's frequencies, 25 a prompt. Each case is a process of its own;
peak memory includes the interpreter and the prompts. --write keeps the numbers in
benchmarks/results/<device>/dedup.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import time
from itertools import accumulate

from strop.trainer.data.contamination import HeldOut
from strop.trainer.data.dedup import near_duplicates

THRESHOLD, GRAM, HELD_OUT, WORDS = 0.7, 8, 2000, 25
CASES = {
    "mixed": "a third are near copies of earlier prompts",
    "one template": "all from one template with three numbers and two names",
    "25 templates": "each from one of 25 templates, too rare to be set aside as templates",
    "one cluster": "all near copies of one prompt",
    "25 clusters": "all near copies of one of 25 prompts",
    "contamination": f"mixed prompts against {HELD_OUT} held-out ones of them",
    "contamination, 25 templates": f"prompts of 25 templates against {HELD_OUT} held-out ones of them",
}


def prompts(case: str, rows: int) -> list[str]:
    draw = random.Random(0)
    vocabulary = ["".join(draw.choice("bcdfghklmnprstvw") + draw.choice("aeiou") for _ in range(draw.randint(1, 4)))
                  for _ in range(20000)]
    weights = list(accumulate(1 / (k + 10) for k in range(len(vocabulary))))

    def text(n: int = WORDS) -> list[str]:
        return draw.choices(vocabulary, cum_weights=weights, k=n)

    def copy(own: list[str]) -> list[str]:
        at = draw.randrange(len(own))
        return [*own[:at], *text(1), *own[at + draw.randrange(2):]]

    def fill(template: list[str]) -> list[str]:
        slots = [str(draw.randrange(1000)) for _ in range(3)] + [word.capitalize() for word in text(2)]
        rest = zip(template[10::2], slots, template[11::2], strict=True)
        return template[:10] + [word for words in rest for word in words]

    if "template" in case:
        templates = [text(20) for _ in range(25 if "25" in case else 1)]
        made = (fill(draw.choice(templates)) for _ in range(rows))
    elif "cluster" in case:
        originals = [text() for _ in range(25 if "25" in case else 1)]
        made = (copy(draw.choice(originals)) for _ in range(rows))
    else:
        originals = [text() for _ in range(rows - rows // 3)]
        made = originals + [copy(draw.choice(originals)) for _ in range(rows // 3)]
        draw.shuffle(made)
    return [" ".join(own) for own in made]


def child(case: str, rows: int) -> None:
    texts = prompts(case, rows)
    started = time.perf_counter()
    if case.startswith("contamination"):
        held = HeldOut([(str(i), "s", text) for i, text in enumerate(texts[:HELD_OUT])], GRAM)
        held.survey(texts)
        found = sum(held.match(text, "s") is not None for text in texts[HELD_OUT:])
    else:
        found = sum(1 for _ in near_duplicates([(text,) for text in texts], THRESHOLD))
    print(json.dumps({"seconds": time.perf_counter() - started, "found": found,
                      "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10}))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog="\n".join(f"{name}: {what}" for name, what in CASES.items()))
    parser.add_argument("--rows", type=int, nargs="+", default=[200_000])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--write", action="store_true", help="keep the results")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        child(options.cases[0], options.rows[0])
        return 0
    kept = {}
    for rows in options.rows:
        for case in options.cases:
            command = [sys.executable, "-m", "benchmarks.dedup", "--child", "--rows", str(rows), "--cases", case]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            result = kept[f"{case}, {rows}"] = {"case": case, "rows": rows} | json.loads(done.stdout.splitlines()[-1])
            print(f"{rows:9,} prompts  {case:28} {result['seconds']:8.1f} s {result['peak_bytes'] / 2**20:8,.0f} MiB "
                  f"{result['found']:9,} found   load {os.getloadavg()[0]:.1f}", flush=True)
    if options.write:
        import torch

        from . import measure

        measure.keep_cases("dedup.json", torch.device("cpu"), kept)
    return 0


if __name__ == "__main__":
    sys.exit(main())
