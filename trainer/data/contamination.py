"""Overlap of prompts with held-out prompts, by n-grams of words."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from strop.trainer.data.dedup import most
from strop.trainer.data.splits import HELD_OUT
from strop.trainer.data.text import words
from strop.trainer.run.tables import read_table

PHRASE = 3  # words that make a template's shortest stretch
SHORTEST = 5  # words from which a held-out prompt that is shorter than an n-gram counts as one


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
        self.common |= {gram for gram, n in counts.items() if n > most(total)}
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
    for row in rows:
        before, *_, after = sources[row["source"]]["prompt_template"].split("{prompt}")
        last = row["messages"][-1]
        last["content"] = last["content"].removeprefix(before).removesuffix(after)
        row["text"] = said(row["messages"])
    return held_out(rows, n, {name for name, source in sources.items() if source["templated"]})
