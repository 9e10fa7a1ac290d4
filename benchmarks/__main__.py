"""Run the suite, keep its results, and regenerate the tables and plots of docs/performance.md.

    python -m benchmarks [CASES] [--rounds N] [--case-seconds S] [--results FOLDER] [--list]

CASES is a regular expression: "dpo|gather", "head/SmolLM2". Results go to benchmarks/results/<device>/<date>.json, case
by case: a run of a part replaces its cases there and leaves the others. `python -m benchmarks.docs` makes the documents
again from what is kept.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest
import torch

from . import suite

HERE = Path(__file__).parent


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="?", default="", help="only cases whose name this regular expression finds")
    parser.add_argument("--rounds", type=int, help="rounds of each case")
    parser.add_argument("--case-seconds", type=float, help="about how long a case's rounds may take together")
    parser.add_argument("--results", type=Path, help="instead of benchmarks/results; the documents are left")
    parser.add_argument("--list", action="store_true", help="list cases and contenders, run nothing")
    options = parser.parse_args(arguments)
    command = [str(HERE / "bench_kernels.py"), "--cases", options.cases, "-p", "no:cacheprovider", "--tb=short", "-rs"]
    if options.list:
        return pytest.main([*command, "--collect-only"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    path = suite.results_path(device, options.results)
    command += ["--results", str(path), "--benchmark-columns=median,iqr,min,rounds"]
    command += [f"--rounds={options.rounds}"] if options.rounds else []
    command += [f"--case-seconds={options.case_seconds}"] if options.case_seconds else []
    status = pytest.main(command)
    print(f"results in {path}")
    if not options.results:
        from . import docs  # its plots need matplotlib, measuring does not

        docs.main([])
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
