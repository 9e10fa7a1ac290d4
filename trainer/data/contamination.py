"""Overlap of prompts with held-out prompts, by n-grams of words."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from strop.trainer.data.dedup import most
from strop.trainer.data.splits import HELD_OUT
from strop.trainer.data.text import words
from strop.trainer.run.tables import read_table

PHRASE = 3  # words of the shortest stretch of a template
SHORTEST = 5  # a held-out prompt of at least that many words, and fewer than an n-gram has, counts as an n-gram


class HeldOut:
    """The n-grams of held-out prompts, to find other prompts that repeat them.

    A text is contaminated if the n-grams that it shares with one held-out prompt cover half of that prompt's own words,
    or 1.5 n of them; n at least, or all where there are fewer. A prompt's own words are those outside of n-grams, down
    to 3-grams, that more than 5 % of a source's prompts have: two questions of one template share the template, and
    perhaps one number of two. A held-out prompt of fewer than n words is one n-gram itself, one of fewer than five must
    be repeated as a whole, and so must all held-out prompts of the text's own source if that is templated. Words are
    compared after `normalize`: x² repeats x2, since losing a training prompt costs less than testing on it.
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
        self.indexed = False

    def survey(self, texts: Iterable[str]) -> None:
        """Takes n-grams that are common among `texts`, all prompts of one source, for its template."""
        counts, total = Counter(), 0
        for text in texts:
            counts.update({gram for _, gram in _grams(words(text), PHRASE)} & self.known)
            total += 1
        self.common |= {gram for gram, n in counts.items() if n > most(total)}
        self.indexed = False

    def match(self, text: str, source: str | None = None) -> tuple[str, str] | None:
        """(id of the held-out prompt that `text`, of `source`, repeats, the words that they share), or None."""
        if not self.indexed:
            self._index()
            self.indexed = True
        own = words(text)
        if (joined := " ".join(own)) in self.whole:
            return self.whole[joined], joined
        covered: dict[str, int] = defaultdict(int)  # places as bits
        for gram in {gram for size in self.sizes for _, gram in _grams(own, size) if gram in self.places}:
            size = gram.count(" ") + 1
            for name, start in self.places[gram]:
                covered[name] |= ((1 << size) - 1) << start
        matches = [name for name, bits in covered.items() if (bits & self.own[name]).bit_count() >= self.least[name]
                   and (source not in self.templated or source != self.source[name])]
        if not matches:
            return None
        name = min(matches)
        return name, " ".join(word for i, word in enumerate(self.words[name]) if covered[name] >> i & 1)

    def _index(self) -> None:
        """`own`: the places of each prompt's own words, as bits; `least`: how many of them make a match; `places`:
        n-gram with such a word -> (prompt, first place)."""
        self.own: dict[str, int] = {}
        self.least: dict[str, float] = {}
        self.places: dict[str, list[tuple[str, int]]] = defaultdict(list)
        self.sizes: set[int] = set()
        for name, all_ in self.words.items():
            self.own[name] = (1 << len(all_)) - 1
            for start, gram in _grams(all_, PHRASE):
                if gram in self.common:
                    self.own[name] &= ~(((1 << PHRASE) - 1) << start)
            total = self.own[name].bit_count()
            self.least[name] = min(total, max(self.n, min(1.5 * self.n, total / 2)))
            size = min(self.n, len(all_))
            if size < min(self.n, SHORTEST):
                continue
            self.sizes.add(size)
            for start, gram in _grams(all_, size):
                if self.own[name] >> start & ((1 << size) - 1):
                    self.places[gram].append((name, start))


def _grams(own: list[str], size: int) -> Iterator[tuple[int, str]]:
    return ((i, " ".join(own[i:i + size])) for i in range(len(own) - size + 1))


def said(messages: list[dict]) -> str:
    """What the filters see of a prompt: all but system messages."""
    return "\n".join(m["content"] for m in messages if m["role"] != "system")


def held_out(rows: list[dict], n: int, templated: set[str]) -> HeldOut:
    """The held-out prompts among `rows`, which have prompt_id, source, split and text.

    n: words of an n-gram; templated: names of sources whose prompts are alike by nature."""
    texts = defaultdict(list)
    for row in rows:
        texts[row["source"]].append(row["text"])
    held = HeldOut([(row["prompt_id"], row["source"], row["text"]) for row in rows if row["split"] in HELD_OUT],
                   n, templated)
    for of_source in texts.values():
        held.survey(of_source)
    return held


def held_out_of(prompts: Path, n: int, sources: dict[str, dict]) -> HeldOut | None:
    """The held-out prompts of a prompts artifact, without the text that their source's template put around them; None
    if n is 0. sources: name -> prompt_template and templated."""
    if not n:
        return None
    rows = read_table(prompts / "prompts.parquet").select(["prompt_id", "source", "split", "messages"]).to_pylist()
    return held_out(with_texts(rows, sources), n, {name for name, source in sources.items() if source["templated"]})


def with_texts(rows: list[dict], sources: dict[str, dict]) -> list[dict]:
    """Rows of prompts.parquet with their `text`: what is asked, without the text of their source's template."""
    found = []
    for row in rows:
        before, *_, after = sources[row["source"]]["prompt_template"].split("{prompt}")
        *earlier, last = row["messages"]
        asked = last["content"].removeprefix(before).removesuffix(after)
        found.append(row | {"text": said([*earlier, last | {"content": asked}])})
    return found
