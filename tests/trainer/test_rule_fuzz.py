"""Every rule against spellings that mean the same, which must agree, and near misses, which must differ. Numbers have
theirs in test_verifiers.py."""

import importlib.util
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strop.trainer.scoring.rules import verify

needs_math = pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="needs math-verify")
needs_gym = pytest.mark.skipif(importlib.util.find_spec("reasoning_gym") is None, reason="needs reasoning-gym")
WORDS = st.sampled_from(["paris", "london", "river", "mountain", "stone", "blue", "engine", "copper", "seven", "garden",
                         "northern", "light", "oak", "maple", "harbor", "winter", "silver", "falcon", "bridge"])
WRAPPERS = ["{}", "The answer is {}.", "**Answer:** {}", "\\boxed{{{}}}", "<answer>{}</answer>", "So it is **{}**.",
            "Let me think.\n\nIt could be many things.\n\nFinal answer: {}", "<think>maybe Rome</think>{}",
            "### Answer\n{}",
            "the answer is Rome. Wait, no, it is {}", "\"{}\"", "{}\n\nNote: I checked it twice.", "#### {}"]
PUT = st.sampled_from(WRAPPERS)


def score(rule, completion, answer, row=None, **args):
    return verify(rule, completion, answer, args, row or {})[0]


def spellings(draw, text: str) -> str:
    """`text` as someone else may write it."""
    text = draw(st.sampled_from([text, text.upper(), text.capitalize(), text.title()]))
    text = draw(st.sampled_from([text, f" {text} ", f"*{text}*", f"`{text}`", text.replace(" ", "  ")]))
    return text


@settings(max_examples=200, deadline=None)
@given(st.lists(WORDS, min_size=1, max_size=3, unique=True), PUT, st.data())
def test_exact(words, wrapper, data):
    answer = " ".join(words)
    assert score("exact", wrapper.format(spellings(data.draw, answer)), answer) == 1
    other = data.draw(WORDS.filter(lambda w: w not in words))
    for miss in (f"{answer} {other}", answer[:-1], answer + "s", other, f"not {answer}", f"{answer} or {other}",
                 f"{answer}, {other}", " ".join(words[::-1]) if len(words) > 1 else other):
        assert score("exact", wrapper.format(miss), answer) == 0, miss


@settings(max_examples=200, deadline=None)
@given(st.lists(WORDS, min_size=3, max_size=5, unique=True), st.integers(0, 2), PUT, st.data())
def test_choice(choices, right, wrapper, data):
    wrapper = wrapper.replace("Rome", "another one")
    label, wrong = "ABCDE"[right], "ABCDE"[(right + 1) % len(choices)]

    def forms(letter: str) -> list[str]:
        text = choices["ABCDE".index(letter)]
        return [letter, f"({letter})", f"{letter}) {text}", f"{letter}. {text}", f"{letter}: {text}",
                text, text.upper()]

    for answer in (label, choices[right]):
        said = data.draw(st.sampled_from(forms(label)))
        assert score("choice", wrapper.format(said), answer, choices=choices) == 1, (wrapper, said)
        miss = data.draw(st.sampled_from([*forms(wrong), f"{label} or {wrong}", f"({label}) ({wrong})", "none of them",
                                          f"{choices[right]}ish"]))
        assert score("choice", wrapper.format(miss), answer, choices=choices) == 0, (wrapper, miss)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["{}", "{:,}", "{}.0", "${}$", " {} "]))
def test_regex(value, form):
    said = f"Some 12 first.\nRESULT: {form.format(value)}\nThat is all."
    assert score("regex", said, str(value), pattern=r"RESULT: ([^\n]+)") == 1
    assert score("regex", said, str(value + 1), pattern=r"RESULT: ([^\n]+)") == 0
    assert score("regex", said.replace("RESULT", "RESULTS"), str(value), pattern=r"RESULT: ([^\n]+)") == 0


def same_terms(a: int, b: int, c: int) -> list[tuple[list[str], list[str]]]:
    """(equal terms, terms that are not)"""
    return [
        ([f"\\frac{{{a}}}{{{b}}}", f"{a}/{b}", f"\\dfrac{{{2 * a}}}{{{2 * b}}}", f"\\tfrac{{{a}}}{{{b}}}",
          f"{a} / {b}", f"\\frac{{{-a}}}{{{-b}}}"],
         [f"\\frac{{{a}}}{{{b + 1}}}", f"-\\frac{{{a}}}{{{b}}}", f"\\frac{{{a + 1}}}{{{b}}}", f"{a}x/{b}"]),
        ([f"{a}\\sqrt{{{c}}}", f"\\sqrt{{{c}}} \\cdot {a}", f"{a} \\sqrt{{{c}}}", f"\\sqrt{{{a * a * c}}}"],
         [f"{a}\\sqrt{{{c + 1}}}", f"{a + 1}\\sqrt{{{c}}}", f"-{a}\\sqrt{{{c}}}", f"{a} + \\sqrt{{{c}}}"]),
        ([f"x^2 + {a}x + {b}", f"{b} + {a}x + x^2", f"x^{{2}}+{a}x+{b}", f"x(x + {a}) + {b}"],
         [f"x^2 - {a}x + {b}", f"x^2 + {a}x + {b + 1}", f"x^3 + {a}x + {b}", f"y^2 + {a}y + {b}"]),
        ([f"({a}, {b + a})", f"\\left({a}, {b + a}\\right)", f"({a},{b + a})"],
         [f"({b + a}, {a})", f"({a}, {b + a + 1})", f"({a}, {b + a}, {c})"]),
        ([f"\\{{{a}, {a + b}\\}}", f"\\left\\{{{a}, {a + b}\\right\\}}"],
         [f"\\{{{a}, {a + b + 1}\\}}", f"\\{{{a}\\}}"])]


@needs_math
@settings(max_examples=120, deadline=None)
@given(st.integers(2, 9), st.integers(11, 19), st.sampled_from([2, 3, 5, 7]), st.integers(0, 4), st.data())
def test_math(a, b, c, kind, data):
    equal, other = same_terms(a, b, c)[kind]
    answer, said, miss = (data.draw(st.sampled_from(terms)) for terms in (equal[:1], equal, other))
    wrapper = data.draw(st.sampled_from(["\\boxed{{{}}}", "So it is ${}$.", "The answer is ${}$.",
                                         "First $3 + 4 = 7$.\n\nThus $\\boxed{{{}}}$.", "<answer>{}</answer>"]))
    assert score("math", wrapper.format(said), f"${answer}$") == 1, (wrapper.format(said), answer)
    assert score("math", wrapper.format(miss), f"${answer}$") == 0, (wrapper.format(miss), answer)


@needs_gym
@settings(max_examples=60, deadline=None)
@given(st.integers(-999, 999), st.sampled_from([w for w in WRAPPERS if "Rome" not in w and '"' not in w]))
def test_reasoning_gym(value, wrapper):
    row = {"answer": str(value), "metadata": {"source_dataset": "chain_sum"}}
    for way in (str(value), f"{value}.0", f"${value}$" if "boxed" not in wrapper else str(value)):
        assert score("reasoning_gym", wrapper.format(way), str(value), row) == 1, wrapper.format(way)
    for miss in (value + 1, -value or 5, value * 10 or 7, f"{value} or {value + 1}"):
        assert score("reasoning_gym", wrapper.format(miss), str(value), row) == 0, wrapper.format(miss)


@settings(max_examples=100, deadline=None)
@given(st.lists(WORDS, min_size=2, max_size=30), st.sampled_from([" ", "\n", "  ", ", ", ". ", " - "]))
def test_instructions_at_their_bounds(words, between):
    text, n = between.join(words), len(words)
    bounds = {
        "length_constraints:number_words": ("num_words", "relation", n),
        "keywords:frequency": ("frequency", "relation", len(re.findall(words[0], text))),
        "keywords:letter_frequency": ("let_frequency", "let_relation", text.count("e"))}
    for name, (count, relation, exact) in bounds.items():
        row = {"instruction_id_list": [name] * 4, "kwargs": [
            {count: bound, relation: how, "keyword": words[0], "letter": "e"}
            for how in ("at least", "less than") for bound in (exact, exact + 1)]}
        assert score("instructions", text, None, row) == 0.5
        assert verify("instructions", text, None, {}, row)[1] == f"not followed: {name}, {name}"
    comma = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    assert score("instructions", text, None, comma) == ("," not in text)
