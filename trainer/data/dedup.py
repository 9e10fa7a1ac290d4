"""Near duplicates: MinHash candidates, exact Jaccard similarity of character shingles, in any language."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterator, Sequence

from strop.trainer.data.text import normalize

COMMON = 0.05  # what more than this share of a source's prompts has is its template
COMMON_LEAST = 5  # and more than this many, so that a few copies in a small source are no template
PERMUTATIONS, BANDS = 128, (32, 4)  # MinHash; at these bands a pair of similarity 0.7 is missed once in 6,000
SHINGLE = 5  # characters
SURVEYED = 2000  # prompts of a source that are looked at for its template's shingles


def near_duplicates(texts: Sequence[tuple[str, ...]], threshold: float) -> Iterator[tuple[int, int, float]]:
    """(i, j, similarity) for every text i that is like an earlier one, j, which is none itself.

    A text has one part or several, all texts as many. Similarity is the Jaccard index of the sets of 5-character
    shingles of the normalized parts (Broder 1997), that of the least similar part. It is at least `threshold`, in
    (0, 1], and so is that of all parts together without the shingles that more than 5 % of the texts have: what a
    template writes makes nothing alike. Candidates come from MinHash with banding, the similarity itself is exact.
    """
    from datasketch import MinHash, MinHashLSH

    surveyed = texts[::max(1, len(texts) // SURVEYED)]
    counts = Counter()
    for text in surveyed:
        counts.update(set().union(*_shingles(text)))
    common = frequent(counts, len(surveyed))
    index = MinHashLSH(num_perm=PERMUTATIONS, params=BANDS)
    for i, text in enumerate(texts):
        mine = _shingles(text)
        rare = set().union(*mine) - common
        if not rare:
            continue
        signature = MinHash(PERMUTATIONS, hashfunc=int)
        signature.update_batch(sorted(rare))
        for j in sorted(index.query(signature)):
            other = _shingles(texts[j])
            alike = [_jaccard(a, b) for a, b in zip(mine, other, strict=True)]
            if min(*alike, _jaccard(rare, set().union(*other) - common)) >= threshold:
                yield i, j, min(alike)
                break
        else:
            index.insert(i, signature)


def _shingles(parts: tuple[str, ...]) -> list[set[int]]:
    found = []
    for k, part in enumerate(parts):
        data = normalize(part)
        starts = range(max(1, len(data) - SHINGLE + 1))
        found.append({zlib.crc32(data[i:i + SHINGLE].encode(), k) for i in starts})
    return found


def _jaccard(a: set, b: set) -> float:
    return len(a & b) / len(a | b)


def frequent(counts: Counter, of: int) -> set:
    return {key for key, n in counts.items() if n > max(COMMON * of, COMMON_LEAST)}


# ---- quality
