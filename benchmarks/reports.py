"""Seconds and peak memory of looking at a large run: its report, and the live page's first and later answers.

    python -m benchmarks.reports [--write]

The run is made by tests/trainer/runs.py: 100,000 samples in two rounds, 2,000 test prompts, 200 words a completion,
5,000 steps per training stage. Each case is a process of its own; peak memory (VmHWM) includes the interpreter. --write
keeps the numbers in benchmarks/results/<device>/reports.json.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CASES = {"report": "`report.html` is written", "live page": "the first page of `strop watch`",
         "more rows": "a later page of its sampled prompts"}
TESTS = Path(__file__).parents[1] / "tests" / "trainer"


def child(case: str, run_dir: Path) -> None:
    started = time.perf_counter()
    if case == "report":
        from strop.trainer.reports.html import write_report

        size = write_report(run_dir).stat().st_size
    else:
        from strop.trainer.reports.watch import Page

        page = Page(run_dir)
        text = page.get()[1]
        if case == "more rows":
            started = time.perf_counter()
            text = page.rows("sampled", 7)
        size = len(text.encode())
    seconds = time.perf_counter() - started
    # unlike getrusage's, this peak is not inherited from the parent
    peak = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10
    print(json.dumps({"seconds": seconds, "bytes": size, "peak_bytes": peak}))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="keep the results")
    parser.add_argument("--child", nargs=2, metavar=("CASE", "RUN"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        child(options.child[0], Path(options.child[1]))
        return 0
    kept = {}
    with tempfile.TemporaryDirectory() as folder:
        sys.path.insert(0, str(TESTS))
        from runs import LARGE, make_run

        run_dir = make_run(Path(folder) / "large", size=LARGE)
        for case, what in CASES.items():
            done = subprocess.run([sys.executable, "-m", "benchmarks.reports", "--child", case, str(run_dir)],
                                  stdout=subprocess.PIPE, text=True, check=True)
            found = kept[case] = {"what": what} | json.loads(done.stdout.splitlines()[-1])
            print(f"{case:12} {found['seconds']:6.2f} s {found['peak_bytes'] / 2**20:6,.0f} MiB "
                  f"{found['bytes'] / 1e6:6.2f} MB", flush=True)
    if options.write:
        import torch

        from . import measure

        measure.keep_cases("reports.json", torch.device("cpu"), kept)
    return 0


if __name__ == "__main__":
    sys.exit(main())
