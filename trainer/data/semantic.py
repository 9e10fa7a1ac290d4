"""Semantic duplicates by the cosine of embeddings (Abbas et al. 2023, arXiv 2303.09540; Llama 3, section 4.3.2).

Rows are clustered, each cluster is sorted by quality x difficulty, and a row is kept if no better row that was kept is
within the threshold. Only rows of one cluster are compared: two similar rows on either side of a border are both kept.
Up to CLUSTER rows are one cluster, so nothing is missed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

CLUSTER = 10_000  # rows of a cluster, on average
BLOCK = 1024  # rows that are compared at once
KEPT = 8192  # kept rows that they are compared with at once
SURVEYED = 256  # rows per cluster that centroids are fitted to
ITERATIONS = 20  # of k-means


def semantic_duplicates(embeddings: Tensor, threshold: float, order: Sequence[int], seed: int = 0,
                        clusters: int | None = None) -> Iterator[tuple[int, int, float]]:
    """Yields (i, j, cosine) for each row i that is dropped for the row j: the best row kept before it in its cluster
    whose cosine is at least `threshold`.

    embeddings [rows, width], float16 or float32 of length 1, on a CPU; computed in float32 by block. order: all rows,
    the best first. clusters: by default one per CLUSTER rows.
    """
    groups = cluster(embeddings, clusters or -(-len(embeddings) // CLUSTER), seed)
    order = torch.as_tensor(np.asarray(order, np.int64))
    for c in range(int(groups.max()) + 1 if len(groups) else 0):
        yield from _greedy(embeddings, order[groups[order] == c], threshold)


def cluster(embeddings: Tensor, k: int, seed: int = 0) -> Tensor:
    """The cluster of each row, int64 in [0, k): spherical k-means (Dhillon and Modha 2001) from k-means++ centroids,
    fitted to at most SURVEYED * k rows."""
    n = len(embeddings)
    if k <= 1 or n <= k:
        return torch.zeros(n, dtype=torch.int64)
    draw = np.random.default_rng(seed)
    rows = np.sort(draw.choice(n, min(n, SURVEYED * k), replace=False))
    rows = embeddings[torch.from_numpy(rows)].float()
    centroids = _spread(rows, k, draw)
    for _ in range(ITERATIONS):
        nearest = _nearest(rows, centroids)
        sums = torch.zeros_like(centroids).index_add_(0, nearest, rows)
        lengths = sums.norm(dim=1, keepdim=True)
        moved = torch.where(lengths > 0, sums / lengths.clamp_min(1e-12), centroids)  # an empty cluster stays
        if torch.equal(moved, centroids):
            break
        centroids = moved
    return torch.cat([_nearest(embeddings[a:a + KEPT].float(), centroids) for a in range(0, n, KEPT)])


def ranked(quality: Sequence[float | None], difficulty: Sequence[float | None]) -> list[int]:
    """The rows by falling quality x difficulty, then quality, then as given. Values are shifted so that none is below
    0. A row without one of them comes first: ready-made rows were chosen before."""
    factors = []
    for values in (quality, difficulty):
        least = min(0.0, *(v for v in values if v is not None), 0.0)
        factors.append([None if v is None else v - least for v in values])

    def key(i: int) -> tuple:
        q, d = factors[0][i], factors[1][i]
        return (0, 0.0, 0.0, i) if q is None or d is None else (1, -q * d, -q, i)

    return sorted(range(len(quality)), key=key)


def _spread(rows: Tensor, k: int, draw: np.random.Generator) -> Tensor:
    """k of the rows by k-means++ (Arthur and Vassilvitskii 2007)."""
    chosen = [int(draw.integers(len(rows)))]
    far = (1 - rows @ rows[chosen[0]]).clamp_min(0)
    while len(chosen) < k:
        weight = np.cumsum(far.double().numpy())
        at = int(np.searchsorted(weight, draw.random() * weight[-1], side="right"))
        chosen.append(min(at, len(rows) - 1))
        far = torch.minimum(far, (1 - rows @ rows[chosen[-1]]).clamp_min(0))
    return rows[chosen]


def _nearest(rows: Tensor, centroids: Tensor) -> Tensor:
    return (rows @ centroids.T).argmax(1)


def _greedy(embeddings: Tensor, members: Tensor, threshold: float) -> Iterator[tuple[int, int, float]]:
    """semantic_duplicates of one cluster. members: its rows, the best first."""
    kept = torch.empty(0, dtype=torch.int64)
    for a in range(0, len(members), BLOCK):
        block = members[a:a + BLOCK]
        mine = embeddings[block].float()
        found: list[tuple[int, float] | None] = [None] * len(block)
        open_ = torch.arange(len(block))  # those without a duplicate so far
        for b in range(0, len(kept), KEPT):
            if not len(open_):
                break
            cosines = mine[open_] @ embeddings[kept[b:b + KEPT]].float().T
            is_close = cosines >= threshold
            first = is_close.byte().argmax(1)
            hit = is_close.any(1)
            for row, at in zip(open_[hit].tolist(), zip(hit.nonzero()[:, 0].tolist(), first[hit].tolist(), strict=True),
                               strict=True):
                found[row] = int(kept[b + at[1]]), float(cosines[at])
            open_ = open_[~hit]
        among = mine[open_] @ mine[open_].T
        close, alone = (among >= threshold).numpy(), np.zeros(len(open_), bool)
        for i, row in enumerate(open_.tolist()):
            earlier = np.flatnonzero(close[i, :i] & alone[:i])
            if len(earlier):
                found[row] = int(block[open_[earlier[0]]]), float(among[i, earlier[0]])
            else:
                alone[i] = True
        kept = torch.cat([kept, block[open_[torch.from_numpy(alone)]]])
        for i, match in zip(block.tolist(), found, strict=True):
            if match is not None:
                yield i, *match
