"""How evenly attention's programs fill a GPU: a simulation of their order, without a GPU.

    python -m benchmarks.schedule [--slots 132]

A program takes as long as its tile has keys to read or rows that read it. Programs start in order, each in the first
free slot. Prints the time until the last one ends over that of an even division: in row order, head by head, and in the
order of PackedGroups.tiles.
"""

from __future__ import annotations

import argparse
import heapq
from collections.abc import Iterable

from strop.kernels import Group, PackedGroups

from .attention import HEADS, LAYOUTS, LLAMA_8B

START = 64  # a program's start and end take as long as so many keys


def work(groups: PackedGroups) -> tuple[list[int], list[int]]:
    """Per tile, the keys that its rows read, and the rows that read its keys."""
    own_start = {row: start for start, end in groups.completion_bounds for row in range(start, end)}
    ends, keys, readers = groups.readers_end.tolist(), [], []
    for start, end, group_start, prompt_end, *_ in groups.tiles.tolist():
        first = group_start if start < prompt_end else own_start[start] - (prompt_end - group_start)
        keys.append(end - first)
        readers.append(max(ends[start], ends[end - 1]) - start)
    return keys, readers


def makespan(durations: Iterable[float], slots: int) -> float:
    free = [0.0] * slots
    for duration in durations:
        heapq.heapreplace(free, free[0] + duration)
    return max(free)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", type=int, default=132, help="programs that run at once: SMs times programs per SM")
    slots = parser.parse_args(arguments).slots
    heads, key_heads, _ = HEADS[LLAMA_8B]
    for name, (number, prompt, count, length) in LAYOUTS.items():
        groups = PackedGroups.pack([Group([1] * prompt, [[1] * length] * count)] * number)
        for kernel, of, column, tiles in zip(("by query", "by key"), (heads, key_heads), (4, 5), work(groups),
                                             strict=True):
            rows = range(len(tiles))[:: -1 if column == 4 else 1]
            ordered = groups.tiles[:, column].tolist()
            plain = [START + tiles[i] for _ in range(of) for i in rows]
            longest = [START + tiles[i] for i in ordered for _ in range(of)]
            even = max(sum(plain) / slots, max(plain))
            print(f"{name:18} {kernel:8}: in row order {makespan(plain, slots) / even:.2f}, "
                  f"longest first {makespan(longest, slots) / even:.2f}")


if __name__ == "__main__":
    main()
