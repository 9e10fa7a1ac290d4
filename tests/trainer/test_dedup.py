"""Near duplicates: the same verdicts as comparing every pair, without comparing every pair."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strop.trainer.data import dedup
from strop.trainer.data.dedup import near_duplicates
from strop.trainer.data.text import normalize, same_symbols


def shingles(text):
    """{(part, 5 characters)} of each part."""
    parts = [normalize(part).ljust(5, "\uffff") for part in text]
    return [{(k, part[i:i + 5]) for i in range(len(part) - 4)} for k, part in enumerate(parts)]


def jaccard(a, b):
    shared = len(a & b)
    return shared / (len(a) + len(b) - shared)


def by_every_pair(texts, threshold):
    """The definition, in plain Python."""
    known = [shingles(text) for text in texts]
    surveyed = [set().union(*parts) for parts in known[::max(1, len(texts) // 2000)]]
    least = max(0.05 * len(surveyed), 5)
    common = {s for s, n in Counter(s for own in surveyed for s in own).items() if n > least}
    rare, kept, found = [set().union(*parts) - common for parts in known], [], []
    for i in range(len(texts)):
        for j in kept:
            if not rare[i] or not rare[j] or jaccard(rare[i], rare[j]) < threshold:
                continue
            alike = min(jaccard(a, b) for a, b in zip(known[i], known[j], strict=True))
            if alike >= threshold and same_symbols("\n".join(texts[i]), "\n".join(texts[j])):
                found.append((i, j, alike))
                break
        else:
            kept.append(i)
    return found


WORD = st.text("abcdeA²2 é", min_size=1, max_size=6)
TEXT = st.lists(WORD, max_size=12).map(" ".join)


@st.composite
def collections(draw):
    """Texts with near copies among them, some from a template, of one part or of two."""
    template = draw(st.sampled_from(["{}", "how many {} are in the box?", "{} and then {}"]))
    bases = draw(st.lists(TEXT, min_size=1, max_size=6))
    texts = []
    for _ in range(draw(st.integers(0, 40))):
        words = draw(st.sampled_from(bases)).split(" ")
        for _ in range(draw(st.integers(0, 2))):
            words[draw(st.integers(0, len(words) - 1))] = draw(WORD)
        texts.append(template.replace("{}", " ".join(words)))
    parts = draw(st.integers(1, 2))
    return [tuple(texts[i:i + parts]) for i in range(0, len(texts) - parts + 1)]


@settings(max_examples=200, deadline=None)
@given(collections(), st.sampled_from([0.2, 0.5, 2 / 3, 0.7, 0.9, 1.0]))
def test_verdicts_are_those_of_every_pair(texts, threshold):
    assert list(near_duplicates(texts, threshold)) == by_every_pair(texts, threshold)


def vocabulary(draw, n=300):
    return ["".join(draw.choice("bdfgklmnprst") + draw.choice("aeiou") for _ in range(draw.randint(1, 4)))
            for _ in range(n)]


def shape(name, n, seed=0):
    """n texts of a hostile kind."""
    draw = random.Random(seed)
    words = vocabulary(draw)

    def text(n):
        return " ".join(draw.choices(words, k=n))

    def copy(own):
        own = own.split()
        own[draw.randrange(len(own))] = draw.choice(words)
        return " ".join(own)

    base, bases = text(30), [text(25) for _ in range(25)]
    return {
        "long template": lambda: [f"{base} {text(2)} {base[::-1]} {text(1)}" for _ in range(n)],
        "25 templates": lambda: [f"{draw.choice(bases)} {text(3)}" for _ in range(n)],
        "identical": lambda: [base] * n,
        "one cluster": lambda: [copy(base) for _ in range(n)],
        "25 clusters": lambda: [copy(draw.choice(bases)) for _ in range(n)],
        "chain": lambda: [" ".join(words[i % 280:i % 280 + 20]) for i in range(n)],
        "very short": lambda: ["".join(draw.choices("ab1", k=draw.randint(0, 3))) for _ in range(n)],
        "empty": lambda: [""] * n,
        "very long": lambda: [f"{text(400)} {base}" for _ in range(n // 10)] + [text(400)] * 3,
        "one character": lambda: ["a" * k for k in range(n)],
        "mixed": lambda: [t for _ in range(n // 2) for own in [text(20)] for t in (own, copy(own))],
    }[name]()


SHAPES = ["long template", "25 templates", "identical", "one cluster", "25 clusters", "chain", "very short", "empty",
          "very long", "one character", "mixed"]


@pytest.mark.parametrize("name", SHAPES)
def test_hostile_shapes_have_the_same_verdicts(name):
    for threshold in (0.5, 0.7, 1.0):
        texts = [(text,) for text in shape(name, 300)]
        assert list(near_duplicates(texts, threshold)) == by_every_pair(texts, threshold)


@pytest.mark.parametrize("name", SHAPES)
def test_work_grows_with_the_texts_and_not_with_their_pairs(name, monkeypatch):
    """Every pair of 2,500 texts would be 1,250 comparisons a text."""
    compared = []

    class Counted(dedup._Index):
        def _similar(self, i, js):
            compared.append(len(js))
            return super()._similar(i, js)

    monkeypatch.setattr(dedup, "_Index", Counted)
    for n in (1000, 2500):
        compared.clear()
        list(near_duplicates([(text,) for text in shape(name, n)], 0.7))
        assert sum(compared) <= 5 * n


@pytest.mark.slow
def test_a_template_seen_in_a_sample_is_a_template_of_all():
    """Above 2,000 texts, common shingles are counted in a sample of them."""
    draw = random.Random(1)
    texts = [(f"how many of the {draw.randrange(10**6)} boxes in the yard are open?",) for _ in range(4100)]
    assert list(near_duplicates(texts, 0.7)) == by_every_pair(texts, 0.7)
