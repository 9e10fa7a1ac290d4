"""What must not be trained on, told by its content: near duplicates, overlap with held-out prompts, degenerate text.

The rules know no language: they look at characters, at words as white space parts them (where a script has no spaces,
at its characters), at token ids and at marks of punctuation.
"""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence

from strop.trainer.config import Filter

COMMON = 0.05  # what more than this share of a source's prompts has is its template
COMMON_LEAST = 5  # and more than this many, so that a few copies in a small source are no template
PERMUTATIONS, BANDS = 128, (32, 4)  # MinHash; at these bands a pair of similarity 0.7 is missed once in 6,000
SHINGLE = 5  # characters
SURVEYED = 2000  # prompts of a source that are looked at for its template's shingles
PHRASE = 3  # words that make a template's shortest stretch
SHORTEST = 5  # words from which a held-out prompt that is shorter than an n-gram counts as one

_EDGES = ".,;:!?…\"'()[]{}«»“”‘’、。，；：！？（）「」『』"
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
                   r"|[^\s\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]+")
_SENTENCE_END = re.compile(r"[.!?…。！？؟।][\"'”’»」』)\]*_]*(?=\s|$)|[。！？]")


def normalise(text: str) -> str:
    """`text` as prompts are compared: NFKC, case folded, white space collapsed."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def words(text: str) -> list[str]:
    """The words of the normalised text without the punctuation around them; of kana and Chinese characters each."""
    return [word for found in _WORD.findall(normalise(text)) if (word := found.strip(_EDGES))]


# ---- near duplicates

def near_duplicates(texts: Sequence[tuple[str, ...]], threshold: float) -> Iterator[tuple[int, int, float]]:
    """(i, j, similarity) for every text i that is like an earlier one, j, which is none itself.

    A text has one part or several, all texts as many. Similarity is the Jaccard index of the sets of 5-character
    shingles of the normalised parts (Broder 1997), that of the least similar part. It is at least `threshold`, in
    (0, 1], and so is that of all parts together without the shingles that more than 5 % of the texts have: what a
    template writes makes nothing alike. Candidates come from MinHash with banding, the similarity itself is exact.
    """
    from datasketch import MinHash, MinHashLSH

    surveyed = texts[::max(1, len(texts) // SURVEYED)]
    counts = Counter()
    for text in surveyed:
        counts.update(set().union(*_shingles(text)))
    common = _frequent(counts, len(surveyed))
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
        data = normalise(part)
        starts = range(max(1, len(data) - SHINGLE + 1))
        found.append({zlib.crc32(data[i:i + SHINGLE].encode(), k) for i in starts})
    return found


def _jaccard(a: set, b: set) -> float:
    return len(a & b) / len(a | b)


def _frequent(counts: Counter, of: int) -> set:
    return {key for key, n in counts.items() if n > max(COMMON * of, COMMON_LEAST)}


# ---- overlap with held-out prompts

class HeldOut:
    """The n-grams of held-out prompts, to find other prompts that repeat them.

    A text is contaminated if the n-grams that it shares with one held-out prompt cover half of that prompt's own words,
    or 1.5 n of them; n at least, or all where there are fewer. A prompt's own words are those outside of n-grams, down
    to 3-grams, that more than 5 % of a source's prompts have: two questions of one template share the template, and
    perhaps one number of two. A held-out prompt of fewer than n words is one n-gram itself, one of fewer than five must
    be repeated as a whole, and so must those of the text's own source where that one is templated.
    """

    def __init__(self, prompts: Iterable[tuple[str, str, str]], n: int, templated: Collection[str] = ()):
        """`prompts`: id, source and text of each; `n`: words of an n-gram; `templated`: names of sources."""
        self.n, self.templated, self.words, self.source, self.whole = n, templated, {}, {}, {}
        for name, source, text in prompts:
            self.words[name], self.source[name] = words(text), source
            if self.words[name]:
                self.whole.setdefault(" ".join(self.words[name]), name)
        self.known = {gram for own in self.words.values() for _, gram in _grams(own, PHRASE)}
        self.common: set[str] = set()
        self._index()

    def survey(self, texts: Iterable[str]) -> None:
        """Takes what is common among `texts`, all prompts of one source, for its template."""
        counts, total = Counter(), 0
        for text in texts:
            counts.update({gram for _, gram in _grams(words(text), PHRASE)} & self.known)
            total += 1
        self.common |= _frequent(counts, total)
        self._index()

    def match(self, text: str, source: str | None = None) -> tuple[str, str] | None:
        """(id of the held-out prompt that `text`, of `source`, repeats, the words that they share), or None."""
        own = words(text)
        if (joined := " ".join(own)) in self.whole:
            return self.whole[joined], joined
        covered: dict[str, set[int]] = defaultdict(set)
        for gram in {gram for size in self.sizes for _, gram in _grams(own, size) if gram in self.places}:
            for name, start in self.places[gram]:
                if source not in self.templated or source != self.source[name]:
                    covered[name] |= set(range(start, start + gram.count(" ") + 1))
        for name in sorted(covered):
            told = self.own[name]
            if len(covered[name] & told) >= min(len(told), max(self.n, min(1.5 * self.n, len(told) / 2))):
                return name, " ".join(self.words[name][i] for i in sorted(covered[name]))
        return None

    def _index(self) -> None:
        """`own`: places of each prompt's own words; `places`: n-gram with such a word -> (prompt, first word)."""
        self.own: dict[str, set[int]] = {}
        self.places: dict[str, list[tuple[str, int]]] = defaultdict(list)
        self.sizes: set[int] = set()
        for name, all_ in self.words.items():
            template = {i for start, gram in _grams(all_, PHRASE) if gram in self.common
                        for i in range(start, start + PHRASE)}
            self.own[name] = set(range(len(all_))) - template
            size = min(self.n, len(all_))
            if size < min(self.n, SHORTEST):
                continue
            self.sizes.add(size)
            for start, gram in _grams(all_, size):
                if not self.own[name].isdisjoint(range(start, start + size)):
                    self.places[gram].append((name, start))


def _grams(own: list[str], size: int) -> Iterator[tuple[int, str]]:
    return ((i, " ".join(own[i:i + size])) for i in range(len(own) - size + 1))


# ---- quality

def repetition(items: Sequence, n: int = 4, least: int = 32) -> float:
    """The share of n-grams that stood there before (seq-rep-n of Welleck et al. 2020, 1908.04319); 0 where there are
    fewer than `least` of them, since a short text may well say something twice."""
    grams = [tuple(items[i:i + n]) for i in range(len(items) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if len(grams) >= least else 0.0


def unfit_tokens(tokens: Sequence[int], filters: Filter) -> tuple[str, str]:
    """(reason, detail) why a completion's tokens are none to learn from, or empty."""
    if len(tokens) < filters.min_tokens:
        return "too_short", f"{len(tokens)} tokens"
    if filters.max_tokens is not None and len(tokens) > filters.max_tokens:
        return "too_long", f"{len(tokens)} tokens"
    share = repetition(tokens)
    return ("repetitive", f"{share:.2f} of its 4-grams stood before") if share > filters.max_repetition else ("", "")


def truncation(text: str) -> str:
    """Why `text` seems to break off in the middle, or nothing.

    Its last code block or tag stays open; it ends in a mark that something must follow; or its last sentence ends in a
    letter, where two sentences or more before it have their full stop and no other line does without. A text that
    breaks off in its first two sentences, or behind a number, is not told from one that ends there.
    """
    text = text.rstrip()
    if text.count("```") % 2:
        return "a code block is not closed"
    for tag in ("think", "answer", "tool_call"):
        if text.rfind(f"<{tag}>") > text.rfind(f"</{tag}>"):
            return f"<{tag}> is not closed"
    if not text:
        return ""
    smiles = len(text) > 1 and text[-2] in ":;-="
    if text[-1] in ",;:、，；：" or (unicodedata.category(text[-1]) == "Ps" and not smiles):
        return f"it ends in {text[-1]!r}"
    if not unicodedata.category(text[-1]).startswith("L"):
        return ""
    *before, last = [line.strip() for line in text.splitlines() if line.strip()]
    ends = [m.end() for m in _SENTENCE_END.finditer(text)]
    rest = last[max((m.end() for m in _SENTENCE_END.finditer(last)), default=0):]
    style = any(line[-1].isalpha() and len(words(line)) >= 2 for line in before)
    signature = "," in rest and len(words(rest)) < 3
    begun = len(words(rest)) >= 2 and not signature
    return "its last sentence has no end" if len(ends) >= 2 and begun and not style else ""
