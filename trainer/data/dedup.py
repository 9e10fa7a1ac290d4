"""Near duplicates by the exact Jaccard similarity of character shingles, in any language."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from strop.trainer.data.text import normalize, same_symbols

COMMON = 0.05  # what more than this share of a source's prompts has belongs to a template
COMMON_LEAST = 5  # and more than this many, so that a few copies in a small source are no template
SHINGLE = 5  # characters
SURVEYED = 2000  # prompts of a source that are searched for its template's shingles
BLOCK = 1 << 20  # characters, shingles or postings that are worked on at once
BITS = 512  # of a bitmap
SLACK = 1e-6  # for rounding, where a number of shingles is compared with a share of them


def near_duplicates(texts: Sequence[tuple[str, ...]], threshold: float,
                    known: int = 0) -> Iterator[tuple[int, int, float]]:
    """Yields (i, j, similarity) for each text i that is similar to an earlier text j that is not itself dropped so.
    The first `known` texts are kept, whatever they are similar to.

    A text has one part or several, and all texts have the same number. Similarity is the Jaccard index of the sets of
    5-character shingles of the normalized parts (Broder 1997), for several parts the lowest. It is at least
    `threshold`, in (0, 1], and so is that of all parts together without the shingles of more than 5 % of the texts: a
    shared template does not make texts similar. Texts whose symbols differ (`same_symbols`) are never similar.

    j is the earliest such text, and no pair is missed. Texts are compared if they share one of their rarest shingles
    (prefix filter: Chaudhuri et al. 2006; with positions: PPJoin, Xiao et al. 2008), then by bitmaps of their shingles
    (Sandes et al. 2020), then exactly. Shingles count as equal if their 32-bit hashes are.
    """
    index = _Index(texts, threshold) if texts else None
    for i in range(len(texts)):
        if i >= known and (match := index.match(i)):
            yield i, *match
        else:
            index.keep(i)


def most(of: int) -> float:
    """How many of `of` texts may share an n-gram that does not belong to a template."""
    return max(COMMON * of, COMMON_LEAST)


class _Index:
    """The shingles of all texts, and which kept texts have which of them among their rarest.

    Shingles are numbered by rising frequency, the common ones last; those of a single text are only counted. `tokens`
    holds the numbers by text and part, `starts` the bounds of the parts, `sizes` [texts, parts] all shingles of each
    part. Per text, `rare` counts the shingles that are not common, `shared` those of them that other texts have, too.
    """

    def __init__(self, texts: Sequence[tuple[str, ...]], threshold: float):
        self.texts, self.threshold, self.parts = texts, threshold, len(texts[0])
        self.share = threshold / (1 + threshold)  # similar sets of x and y shingles have share * (x + y) in common
        self._number_shingles()
        self._take_prefixes()

    def _number_shingles(self) -> None:
        n, parts = len(self.texts), self.parts
        tokens, sizes = map(np.concatenate, zip(*_hashed(self.texts), strict=True))
        starts = _bounds(sizes)
        surveyed = np.arange(0, n, max(1, n // SURVEYED))
        rows = (surveyed[:, None] * parts + np.arange(parts)).ravel()
        known, times = np.unique(tokens[_ranges(starts[rows], sizes[rows])], return_counts=True)
        common = known[times > most(len(surveyed))]
        known = np.sort(tokens)
        known, times = np.unique(known[1:][known[1:] == known[:-1]], return_counts=True)  # of n texts, n - 1 times
        times[np.searchsorted(known, common)] = len(tokens)
        number = np.empty(len(known), np.uint32)
        number[np.argsort(times, kind="stable")] = np.arange(len(known))
        is_shared = np.zeros(len(tokens), bool)
        for at in range(0, len(tokens) if len(known) else 0, BLOCK):
            block = slice(at, at + BLOCK)
            where = np.minimum(np.searchsorted(known, tokens[block]), len(known) - 1)
            is_shared[block] = known[where] == tokens[block]
            tokens[block] = number[where]
        self.first_common = len(known) - len(common)
        is_common = is_shared & (tokens >= self.first_common)
        held, common = (np.add.reduceat(mask, starts[:-1], dtype=np.int64) for mask in (is_shared, is_common))
        self.sizes, self.held, self.starts = sizes.reshape(n, parts), held, _bounds(held)
        self.rare, self.shared = ((s - common).reshape(n, parts).sum(1) for s in (sizes, held))
        self.tokens, self.counted = tokens[is_shared], np.zeros(len(known), np.int64)

    def _take_prefixes(self) -> None:
        """`prefix`: each text's rarest shingles, of which similar texts share one; `left`: how many shingles of the
        text come from there on; `maps`: bitmaps of the shared shingles. Postings are empty at first."""
        n, text_starts = len(self.texts), self.starts[::self.parts]
        length = self.rare - np.ceil(self.threshold * self.rare - SLACK).astype(np.int64) + 1
        self.need, self.maps = self.share * self.rare, np.empty((n, BITS // 64), np.uint64)
        found = []
        for a in range(0, n, BLOCK // BITS):
            b = min(n, a + BLOCK // BITS)
            tokens = self.tokens[text_starts[a]:text_starts[b]]
            keys = np.repeat(np.arange(b - a, dtype=np.uint64) << np.uint64(32), np.diff(text_starts[a:b + 1])) | tokens
            keys = np.sort(keys[tokens < self.first_common])
            text, tokens = (keys >> np.uint64(32)).astype(np.int64), keys.astype(np.uint32)
            bits = np.zeros((b - a, BITS), bool)
            bits[text, tokens * np.uint32(0x9E3779B1) >> np.uint32(23)] = True
            self.maps[a:b] = np.packbits(bits, 1).view(np.uint64)
            left = np.repeat(np.cumsum(self.shared[a:b]), self.shared[a:b]) - np.arange(len(text))
            text += a
            keep = self.rare[text] - left < length[text]
            found.append((text[keep], tokens[keep], left[keep].astype(np.int32)))
        text, prefix, left = map(np.concatenate, zip(*found, strict=True))
        times = np.bincount(prefix)
        keep = times[prefix] > 1
        self.prefix, self.left = prefix[keep], left[keep]
        self.ends = _bounds(np.bincount(text[keep], minlength=n))
        self.first = _bounds(times)  # of a shingle's postings
        self.filled = np.zeros(len(times), np.int64)
        self.spare, self.least = np.zeros(len(times)), np.full(len(times), np.inf)  # max of left - need, min of need
        self.posted, self.posted_left = np.empty(len(prefix), np.int32), np.empty(len(prefix), np.int32)

    def match(self, i: int) -> tuple[int, float] | None:
        """(j, similarity) of the earliest kept text that is similar to text i."""
        mine, need = slice(self.ends[i], self.ends[i + 1]), self.need[i]
        prefix, left = self.prefix[mine], self.left[mine]
        # Of two texts, let this be the rarest shingle that both have. They share at most what is left of either, and
        # must share the need of both.
        useful = (self.spare[prefix] >= need - SLACK) & (self.least[prefix] <= left - need + SLACK)
        prefix, left = prefix[useful], left[useful]
        filled = self.filled[prefix]
        slots = _ranges(self.first[prefix], filled)
        if not len(slots):
            return None
        j = self.posted[slots]
        j = j[np.minimum(np.repeat(left, filled), self.posted_left[slots]) >= need + self.need[j] - SLACK]
        j.sort()
        j = j[np.append(True, j[1:] != j[:-1])[:len(j)]]
        differ = np.bitwise_count(self.maps[j] ^ self.maps[i]).sum(1, dtype=np.int64)
        j = j[self.shared[i] + self.shared[j] - differ >= 2 * (need + self.need[j] - SLACK)]
        at, size = 0, 8
        while at < len(j):
            for other, similarity in self._similar(i, j[at:at + size]):
                if same_symbols("\n".join(self.texts[i]), "\n".join(self.texts[other])):
                    return other, similarity
            at, size = at + size, 512
        return None

    def keep(self, i: int) -> None:
        """Lets later texts be compared with text i."""
        mine = slice(self.ends[i], self.ends[i + 1])
        prefix, left = self.prefix[mine], self.left[mine]
        slots = self.first[prefix] + self.filled[prefix]
        self.posted[slots], self.posted_left[slots] = i, left
        self.filled[prefix] += 1
        self.spare[prefix] = np.maximum(self.spare[prefix], left - self.need[i])
        self.least[prefix] = np.minimum(self.least[prefix], self.need[i])

    def _similar(self, i: int, js: np.ndarray) -> list[tuple[int, float]]:
        """(j, similarity) of those of `js` that reach the threshold, by exact comparison."""
        parts, mine = self.parts, self.tokens[self.starts[i * self.parts]:self.starts[(i + 1) * self.parts]]
        rows = (js[:, None].astype(np.int64) * parts + np.arange(parts)).ravel()
        held = self.held[rows]
        self.counted[mine] = 1 + ((mine < self.first_common).astype(np.int64) << 32)  # all, and those that are rare
        counts = _bounds(self.counted[self.tokens[_ranges(self.starts[rows], held)]])[_bounds(held)]
        self.counted[mine] = 0
        both = (counts[1:] - counts[:-1]).reshape(-1, parts)
        rare, both = (both >> 32).sum(1), both & 0xFFFFFFFF
        alike = (both / (self.sizes[i] + self.sizes[js] - both)).min(1)
        passed = np.minimum(alike, rare / (self.rare[i] + self.rare[js] - rare)) >= self.threshold
        return list(zip(js[passed].tolist(), alike[passed].tolist(), strict=True))


def _hashed(texts: Sequence[tuple[str, ...]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Blocks of (hashes of the distinct shingles of each part of each text, uint32; their number per part)."""
    parts: list[str] = []
    characters = 0
    for i, text in enumerate(texts, 1):
        # a part shorter than a shingle is one itself
        parts += (normalize(part).ljust(SHINGLE, "\uffff") for part in text)
        characters += sum(map(len, parts[-len(text):]))
        if characters < BLOCK and i < len(texts):
            continue
        codes = np.frombuffer("".join(parts).encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
        row = np.repeat(np.arange(len(parts), dtype=np.uint64), [len(part) for part in parts])
        n = len(codes) - SHINGLE + 1
        hashed = row[:n] % np.uint64(len(text))  # equal shingles of different parts are not equal
        for k in range(SHINGLE):
            hashed = hashed * np.uint64(0x9E3779B97F4A7C15) + codes[k:n + k]
        hashed = (hashed ^ (hashed >> np.uint64(31))) * np.uint64(0xBF58476D1CE4E5B9) >> np.uint64(32)
        keys = np.sort((row[:n] << np.uint64(32) | hashed)[row[:n] == row[SHINGLE - 1:]])
        keys = keys[np.append(True, keys[1:] != keys[:-1])]
        yield keys.astype(np.uint32), np.bincount((keys >> np.uint64(32)).astype(np.int64), minlength=len(parts))
        parts, characters = [], 0


def _bounds(sizes: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(sizes)])


def _ranges(starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The indices of [start, start + size) of each, one after the other."""
    ends = np.cumsum(sizes)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - ends + sizes, sizes)
