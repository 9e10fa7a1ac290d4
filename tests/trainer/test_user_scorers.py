"""Python functions of the user as scorers: their forms, their limits, and what an error says."""

import datetime
import json
import math
import os
import re
import time
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from faultserver import FaultServer

from strop.trainer.errors import UserError
from strop.trainer.main import main
from strop.trainer.scoring.base import Item
from strop.trainer.scoring.user import UserScorer


def items(*completions, conversational=False, **row):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "ask"}]
    return [Item(messages, c, "4", {"answer": "4", "level": i} | row, conversational, [1, 2], f"row {i}")
            for i, c in enumerate(completions)]


def score(tmp_path, code, given, function="grade", seconds=5.0, memory_gb=4.0, workers=1):
    file = tmp_path / "mine.py"
    file.write_text(code)
    scorer = UserScorer(file, function, seconds, memory_gb, workers)
    try:
        return scorer.score(given, lambda n: None)
    finally:
        scorer.close()


FORMS = {
    "one at a time": "def grade(prompt, completion, row):\n"
                     "    return prompt == 'ask' and len(completion) + row['level']",
    "by position": "def grade(p, c, r):\n    return len(c) + r['level']",
    "what it needs": "def grade(row, completion):\n    return len(completion) + row['level']",
    "async": "import asyncio\nasync def grade(completion, row):\n    await asyncio.sleep(0)\n"
             "    return len(completion) + row['level']",
    "a dict": "def grade(completion, row):\n    return {'score': len(completion) + row['level'], 'why': 'x'}",
    "TRL": "def grade(completions, **kwargs):\n"
           "    return [float(len(c)) + n for c, n in zip(completions, kwargs['level'])]",
    "TRL, named columns": "def grade(prompts, completions, completion_ids, answer, level, **kwargs):\n"
                          "    assert (prompts, completion_ids, answer) == (['ask'] * 2, [[1, 2]] * 2, ['4'] * 2)\n"
                          "    return [len(c) + n for c, n in zip(completions, level)]",
    "TRL, no keywords": "def grade(completions, level):\n    return [len(c) + n for c, n in zip(completions, level)]",
    "TRL, async": "async def grade(completions, level, **_):\n"
                  "    return [len(c) + n for c, n in zip(completions, level)]",
    "rows": "def grade(completions, rows):\n    return [len(c) + r['level'] for c, r in zip(completions, rows)]",
    "an array": "import numpy\ndef grade(completions, level):\n"
                "    return numpy.array([len(c) for c in completions]) + level",
    "a class": "class Grade:\n    def __call__(self, completion, row):\n        return len(completion) + row['level']\n"
               "grade = Grade()",
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(tmp_path, form):
    found = score(tmp_path, FORMS[form], items("ab", "abc"))
    assert [s.value for s in found] == [2, 4] and not any(s.error for s in found), found
    assert [s.detail for s in found] == (['{"why": "x"}'] * 2 if form == "a dict" else [None, None])


def test_conversational_data_reaches_trl_functions_as_messages(tmp_path):
    """The format reward of TRL's documentation, as it is for conversational prompts."""
    code = """
import re

def grade(completions, **kwargs):
    pattern = r"^<think>.*?</think><answer>.*?</answer>$"
    contents = [completion[0]["content"] for completion in completions]
    assert kwargs["prompts"][0][0]["role"] == "system" and completions[0][0]["role"] == "assistant"
    return [1.0 if re.match(pattern, content) else 0.0 for content in contents]
"""
    found = score(tmp_path, code, items("<think>a</think><answer>b</answer>", "b", conversational=True))
    assert [s.value for s in found] == [1, 0]
    code = "def grade(prompt, completion, row):\n    return completion == 'b' and prompt[1]['content'] == 'ask'"
    assert [s.value for s in score(tmp_path, code, items("a", "b", conversational=True))] == [0, 1]


@pytest.mark.parametrize("value,kept", [("True", 1.0), ("False", 0.0), ("-3", -3.0), ("None", None), ("10**9", 1e9)])
def test_values(tmp_path, value, kept):
    for code in (f"def grade(completion):\n    return {value}", f"def grade(completions):\n    return [{value}]"):
        assert score(tmp_path, code, items("a"))[0][:] == (kept, None, None)


BAD = {  # what follows line 2, `if completion != "bad": return 1`
    "an exception": ("x = {}\n    return x['no']", r"mine\.py:4: KeyError: 'no'; row 1"),
    "nan": ("return float('nan')", r"mine\.py:1: returned nan, which is not a finite number; row 1"),
    "inf": ("return 1e999", r"mine\.py:1: returned inf, .*; row 1"),
    "a text": ("return '1'", r"mine\.py:1: returned '1', not a number; row 1"),
    "a dict without score": ("return {'points': 1}", r"mine\.py:1: returned a dict without score, with points; row 1"),
    "exit": ("raise SystemExit(0)", r"mine\.py:3: SystemExit: 0; row 1"),
    "too long": ("import time; time.sleep(60)", r"mine\.py:3: took more than 1 s; row 1"),
    "a loop that catches": ("while True:\n        try: pass\n        except Exception: pass",
                            r"mine\.py:\d+: took more than 1 s; row 1"),
    "too much memory": ("return len(bytearray(3 << 30))", r"mine\.py:3: out of memory \(memory_gb\); row 1"),
    "a crash": ("import os; os.kill(os.getpid(), 11)", r"mine\.py:1: grade ended its process \(.*\); row 1"),
    "os._exit": ("import os; os._exit(0)", r"mine\.py:1: grade ended its process \(.*\); row 1"),
    "output where answers go": ("import os; os.write(1, b'[[1, null, null]]\\n' * 9); return 1 / 0",
                                r"mine\.py:3: ZeroDivisionError: .*; row 1"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_failure_is_one_clear_line_and_the_others_are_scored(tmp_path, what):
    body, said = BAD[what]
    code = f"def grade(completion):\n    if completion != 'bad': return 1\n    {body}\n"
    found = score(tmp_path, code, items("a", "bad", "b"), seconds=1.0, memory_gb=1.0)
    assert [s.value for s in found] == [1, None, 1]
    assert re.search(said, found[1].error) and "\n" not in found[1].error, found[1].error


@pytest.mark.parametrize("code,said", [
    ("def grade(completions):\n    return [1.0]", r"mine.py:1: returned 1 values for 2 completions; row 0 to row 1"),
    ("def grade(completions, nothing):\n    return 1", r"TypeError: .*nothing.*; row 0 to row 1"),
    ("def grade(completions):\n    return 1 / 0", r"mine.py:2: ZeroDivisionError: division by zero; row 0 to row 1"),
    ("def grade(completions):\n    import time; time.sleep(9)", r"mine.py:2: took more than 1 s; row 0 to row 1")])
def test_a_failure_of_a_whole_call(tmp_path, code, said):
    found = score(tmp_path, code, items("a", "b"), seconds=0.5)
    assert all(s.value is None and re.search(said, s.error) for s in found), found


@pytest.mark.parametrize("code,said", [
    ("def other(completion):\n    return 1", "mine.py: has no function grade; there are: other"),
    ("x = (", "mine.py:1: .*never closed"), ("import nothing_of_that_name", "mine.py:1: ModuleNotFoundError"),
    ("def grade(text, other):\n    return 1", r"grade\(text, other\): a scorer takes prompt, completion and row"),
    ("raise SystemExit(3)", "mine.py:1: SystemExit: 3")])
def test_a_file_that_cannot_be_used(tmp_path, code, said):
    with pytest.raises(UserError, match=said):
        score(tmp_path, code, items("a"))


def test_the_workers_work_side_by_side_and_modules_beside_the_file_are_found(tmp_path):
    (tmp_path / "shared.py").write_text("import os\ndef pid():\n    return os.getpid()\n")
    code = "import time\nfrom shared import pid\ndef grade(completion):\n    time.sleep(0.01)\n    return pid()"
    found = score(tmp_path, code, items(*map(str, range(256))), workers=2)
    assert len({s.value for s in found}) == 2 and os.getpid() not in {s.value for s in found}


def test_a_function_of_the_user_is_fast(tmp_path):
    began = time.perf_counter()
    found = score(tmp_path, "def grade(completion):\n    return len(completion)", items(*["abc"] * 20_000))
    assert len(found) == 20_000 and time.perf_counter() - began < 10


# ---- in a run, and before one

CODE = """
import math

def grade(prompt, completion, row):
    digits = sum(c.isdigit() for c in completion)
    return -math.log(1 + len(completion)) + digits
"""


def test_a_run_learns_from_a_rule_and_a_function_together(tiny_recipe, tmp_path, capfd):
    from strop.trainer.run.tables import read_table

    (tmp_path / "mine.py").write_text(CODE)
    text = tiny_recipe.read_text().replace("      verifier: regex\n      verifier_args: {pattern: \"[0-9]\"}\n", f"""\
      scorers:
        - {{rule: regex, args: {{pattern: "[0-9]"}}}}
        - {{python: {tmp_path / "mine.py"}:grade, weight: 0.5}}
""")
    tiny_recipe.write_text(text + "select: {sft_min_score: null, pair_margin: 0.1}\nscore: {correct_by: regex}\n"
                           "merge: {promote_on: 'win_rate:grade'}\n")
    assert main([str(tiny_recipe), "rounds=1"]) == 0, capfd.readouterr().err
    run = tmp_path / "runs/tiny"
    rows = read_table(run / "round-00/score/scores.parquet").to_pylist()
    texts = {(r["prompt_id"], r["sample_index"]): r["completion"] for p in (run / "round-00/sample").glob("shard-*")
             for r in read_table(p).to_pylist()}
    for row in rows:
        completion = texts[row["prompt_id"], row["sample_index"]]
        digits = sum(c.isdigit() for c in completion)
        assert row["value"] == (digits > 0 if row["scorer"] == "regex" else
                                pytest.approx(digits - math.log(1 + len(completion))))
    assert {r["scorer"] for r in rows} == {"regex", "grade"} and len({r["version"] for r in rows}) == 2
    judged = {(r["prompt_id"], r["sample_index"]): r["score"] for r in
              read_table(run / "round-00/select/judged.parquet").to_pylist()}
    values = {(r["prompt_id"], r["sample_index"], r["scorer"]): r["value"] for r in rows}
    assert all(s == pytest.approx(values[*k, "regex"] + 0.5 * values[*k, "grade"]) for k, s in judged.items())
    pairs = read_table(run / "round-00/select/pairs.parquet").to_pylist()
    assert {r["decided_by"] for r in pairs} <= {"regex", "grade"} and pairs
    summary = json.loads((run / "baseline/summary.json").read_text())["base"]["validation"]
    assert summary["scorers"].keys() == {"regex", "grade"} and summary["scorers"]["grade"]["n"] == summary["n"] == 10
    report = (run / "report.html").read_text()
    assert "grade" in report and "win rate" in report
    sampled = (run / "round-00/sample/manifest.json").read_bytes()
    (tmp_path / "mine.py").write_text(CODE + "\n# changed\n")
    capfd.readouterr()
    assert main([str(tiny_recipe), "rounds=1", "--plan"]) == 0
    plan = dict(line.split()[:2] for line in capfd.readouterr().out.splitlines() if len(line.split()) > 1)
    assert plan["round-00/score"] == plan["baseline"] == "stale"
    assert plan["round-00/sample"] == plan["baseline-held-out"] == plan["prompts"] == "done"
    assert main([str(tiny_recipe), "rounds=1"]) == 0
    assert (run / "round-00/sample/manifest.json").read_bytes() == sampled


def test_try_gives_columns_as_a_run_does(tmp_path, monkeypatch, capfd):
    """Dates, decimals and bytes of Parquet are text in a run's metadata."""
    monkeypatch.chdir(tmp_path)
    table = {"prompt": ["a"], "completion": ["b"], "day": [datetime.date(2020, 1, 2)], "price": [Decimal("1.50")],
             "raw": [b"x"], "map": pa.array([[(1, "y")]], pa.map_(pa.int64(), pa.string()))}
    pq.write_table(pa.table(table), "data.parquet")
    (tmp_path / "mine.py").write_text("def grade(row):\n    return {'score': 1, 'said': [row['day'], row['price'], "
                                      "row['raw'], row['map']['1']]}\n")
    assert main(["try", "mine.py:grade", "data.parquet"]) == 0
    assert '["2020-01-02", "1.50", "b\'x\'", "y"]' in capfd.readouterr().out


def test_try_asks_judges(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}))
    server = FaultServer(lambda n, body: "[[7]]")
    judge = {"mode": "rubric", "models": [{"engine": "openai", "base_url": server.url, "model": "m"}]}
    assert main(["try", f"judge={json.dumps(judge)}", "data.jsonl"]) == 0
    assert "0.666667" in capfd.readouterr().out and len(server.requests) == 1
    server.close()
    for models, words in (([{}], "without path the judge is a run's start weights"),
                          ([{"path": "nowhere"}], "path=nowhere: no such folder")):
        assert main(["try", f"judge={json.dumps(judge | {'models': models})}", "data.jsonl"]) == 1
        assert words in capfd.readouterr().err


def test_try_shows_scores(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("def grade(completion, row):\n    if completion == 'x': raise ValueError('no')\n"
                                      "    return {'score': completion == row['answer'], 'said': completion}")
    rows = [{"prompt": "2 + 2", "completion": c, "answer": "4"} for c in ("4", "5")]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert main(["try", "mine.py:grade", "data.jsonl"]) == 0
    out = capfd.readouterr().out
    assert "data.jsonl:1" in out and '{"said": "4"}' in out and " 1 " in out and " 0 " in out
    assert main(["try", "number", "data.jsonl", "rows=1"]) == 0
    assert "data.jsonl:2" not in capfd.readouterr().out
    (tmp_path / "data.jsonl").write_text(json.dumps({"prompt": "a", "completion": "x"}))
    assert main(["try", "mine.py:grade", "data.jsonl"]) == 1
    assert "error: 1 of 1 rows failed; the first: mine.py:2: ValueError: no; data.jsonl:1" in capfd.readouterr().err
    assert main(["try", "mine.py:grade", "data.jsonl", "prompt_column=question"]) == 1
    assert "needs the columns question and completion" in capfd.readouterr().err
    assert main(["try", "numbre", "data.jsonl"]) == 1
