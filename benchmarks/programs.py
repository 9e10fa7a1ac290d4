"""Programs a second that the sandbox runs against tests, and how long one takes: python -m benchmarks.programs"""

import time

from strop.trainer.config import Scorer
from strop.trainer.scoring.base import Item, open_scorer

CHECK = "def check(candidate):\n" + "".join(f"    assert candidate({i}, {i}) == {2 * i}\n" for i in range(8))
KINDS = {"asserts": CHECK, "stdio": [{"input": "1 2", "output": "3"}]}
PROGRAMS = {"asserts": "def add(a, b):\n    return a + b", "stdio": "print(sum(map(int, input().split())))"}


def measure(kind: str, workers: int, n: int = 200) -> tuple[float, float]:
    """(programs a second, median seconds of one)"""
    code = {"kind": kind, "tests_column": "tests"} | ({"entry_column": "entry"} if kind == "asserts" else {})
    scorer = open_scorer(Scorer.model_validate({"code": code}), None, workers)
    item = Item([], f"```python\n{PROGRAMS[kind]}\n```", None, {"tests": KINDS[kind], "entry": "add"})
    scorer.score([item] * workers, lambda n: None)
    began = time.perf_counter()
    assert all(found.value == 1 for found in scorer.score([item] * n, lambda n: None))
    rate, times = n / (time.perf_counter() - began), []
    for _ in range(21):
        began = time.perf_counter()
        scorer.score([item], lambda n: None)
        times.append(time.perf_counter() - began)
    scorer.close()
    return rate, sorted(times)[10]


def main() -> None:
    for kind in KINDS:
        for workers in (1, 2):
            rate, seconds = measure(kind, workers)
            print(f"{kind}, {workers} worker(s): {rate:.0f} programs/s, {1000 * seconds:.0f} ms each")


if __name__ == "__main__":
    main()
