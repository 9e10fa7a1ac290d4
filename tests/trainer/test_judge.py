"""Judges: both orders, panels, grades, what cannot be read, and verdicts that are asked for once."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from training import stage_in

from strop.trainer.cli import load_recipe
from strop.trainer.config import Judge, Scorer
from strop.trainer.errors import UserError
from strop.trainer.main import main
from strop.trainer.models.loading import ModelFolder
from strop.trainer.reports.judging import about, between, concordance
from strop.trainer.run.files import read_json
from strop.trainer.run.tables import read_table
from strop.trainer.sampling.base import Fake, Settings
from strop.trainer.scoring import judge as judging
from strop.trainer.scoring.base import Compute, Item
from strop.trainer.scoring.judge import (
    ChatJudge,
    JudgeScorer,
    LocalJudge,
    majority,
    opponents,
    outcome,
    read_verdict,
)
from strop.trainer.scoring.table import score_rows
from strop.trainer.scoring.verdicts import Kept, Question, read_verdicts

AB, GRADES = ("A", "B"), tuple(map(str, range(1, 11)))
CPU = torch.device("cpu")


def asked(text):
    return [{"role": "user", "content": text}]


def items(*completions, prompt="which is longer?"):
    return [Item(asked(prompt), c, None, {}, where=c) for c in completions]


def between_tags(text, tag):
    return text.split(f"<{tag}>\n")[1].split(f"\n</{tag}>")[0]


def longer(text, n):
    """A judge that prefers the longer answer."""
    a, b = (len(between_tags(text, f"answer_{side}")) for side in "ab")
    return "Compared. [[A]]" if a > b else "Compared. [[B]]" if b > a else "[[C]]"


def scorer(*answers, work=None, **config):
    config = Judge.model_validate({"mode": "pairwise"} | config)
    models = [ChatJudge(f"judge{i}", f"fake{i}", Fake(answer=answer), Settings(64), 2)
              for i, answer in enumerate(answers)]
    return JudgeScorer(config, models, Kept(work, 0))


def values(found):
    return [s.value for s in found]


def test_the_score_is_the_share_of_comparisons_won():
    judge = scorer(longer)
    found = judge.score([*items("aa", "a", "aaa", "aa"), *items("x", "xx", prompt="another")], lambda n: None)
    assert values(found) == pytest.approx([1.5 / 3, 0.0, 1.0, 1.5 / 3, 0.0, 1.0])
    assert json.loads(found[0].detail) == {"won": 1.5, "of": 3, "undecided": 0, "inconsistent": 0, "unparsed": 0}
    assert sum(judge.models[0].model.asked.values()) == 9  # a question is asked once, also within a call


def test_only_verdicts_that_agree_in_both_orders_count():
    def first(text, n):  # pure position bias
        return "[[A]]"

    found = scorer(first).score(items("aa", "a"), lambda n: None)
    assert values(found) == [None, None] and json.loads(found[0].detail)["inconsistent"] == 1
    found = scorer(first, longer).score(items("aa", "a"), lambda n: None)
    assert values(found) == [1.0, 0.0]  # the other judge decides


def test_a_panel_decides_by_majority():
    def shorter(text, n):
        return {"A": "[[B]]", "B": "[[A]]"}.get(longer(text, n)[-3], "[[C]]")

    assert values(scorer(longer, longer, shorter).score(items("aa", "a"), lambda n: None)) == [1.0, 0.0]
    assert values(scorer(longer, shorter).score(items("aa", "a"), lambda n: None)) == [None, None]
    assert majority(["first", "second", "tie"]) is None and majority([]) is None and majority(["tie"]) == "tie"


@pytest.mark.parametrize("one, other, expected", [
    ("A", "B", "first"), ("B", "A", "second"), ("tie", "tie", "tie"), ("A", "A", "inconsistent"),
    ("B", "B", "inconsistent"), ("A", "tie", "inconsistent"), (None, "A", "unparsed"), ("A", None, "unparsed")])
def test_outcomes(one, other, expected):
    assert outcome(one, other) == expected


@given(st.integers(1, 12), st.integers(1, 12))
def test_each_completion_has_its_opponents_and_no_pair_comes_twice(n, most):
    pairs = opponents(list(range(n)), most)
    assert len({frozenset(p) for p in pairs}) == len(pairs) and all(a != b for a, b in pairs)
    met = [sum(i in p for p in pairs) for i in range(n)]
    assert met == [min(2 * most, n - 1)] * n


def test_a_single_completion_has_no_value():
    assert values(scorer(longer).score(items("a"), lambda n: None)) == [None]


@pytest.mark.parametrize("text, labels, expected", [
    ("[[A]]", AB, "A"), ("It says [[A]] but no: [[B]]", AB, "B"), ("**B**", AB, "B"), ("Answer A.", AB, "A"),
    ("b", AB, "B"), ("Verdict: A", AB, "A"), ("The better is: **Answer B**.", AB, "B"), ("[[C]]", AB, "tie"),
    ("[[tie]]", AB, "tie"), ("<think>[[A]]</think> [[B]]", AB, "B"), ("A cat sat", AB, None), ("", AB, None),
    ("Both are good", AB, None), ("I prefer neither", AB, None), ("[[D]]", AB, None), ("A or B", AB, None),
    ("[[7]]", GRADES, "7"), ("Good. [[8.5]]", GRADES, "8.5"), ("[[7/10]]", GRADES, "7"), ("9", GRADES, "9"),
    ("Grade: 4/10", GRADES, "4"), ("[[11]]", GRADES, None), ("[[0]]", GRADES, None), ("ten", GRADES, None),
    ("There are 3 mistakes in it", GRADES, None), ("Score: 5.", GRADES, "5"), ("[[3]] then [[6]]", GRADES, "6")])
def test_verdicts_are_read_from_text(text, labels, expected):
    assert read_verdict(text, labels) == expected


@given(st.text())
def test_no_text_makes_the_reader_raise(text):
    assert read_verdict(text, AB) in (None, "A", "B", "tie")
    assert read_verdict(text, GRADES) is None or 1 <= float(read_verdict(text, GRADES)) <= 10


def test_grades_are_scaled_and_a_panel_takes_the_median():
    def grade(text, n):
        return f"[[{len(between_tags(text, 'answer'))}]]"

    rubric = {"mode": "rubric", "scale": [1, 5], "rubric": "Length."}
    assert values(scorer(grade, **rubric).score(items("a", "aaa", "aaaaa"), lambda n: None)) == [0.0, 0.5, 1.0]
    found = scorer(grade, lambda t, n: "[[5]]", lambda t, n: "[[5]]", **rubric).score(items("a"), lambda n: None)
    assert values(found) == [1.0]
    found = scorer(lambda t, n: "no idea", **rubric).score(items("a"), lambda n: None)
    assert values(found) == [None] and json.loads(found[0].detail) == {"grades": [], "unparsed": 1}


def test_what_a_completion_spells_is_not_replaced():
    seen = []

    def keep(text, n):
        seen.append(text)
        return "[[A]]"

    scorer(keep, template="{prompt}|{first}|{second}|{verdict}").score(items("{second}", "{verdict}"), lambda n: None)
    assert all("|{second}|{verdict}|" in t or "|{verdict}|{second}|" in t for t in seen) and len(seen) == 2


def test_a_question_is_asked_once_also_after_a_kill(tmp_path):
    first = scorer(longer, work=tmp_path)
    whole = values(first.score(items("aa", "a", "aaa"), lambda n: None))
    assert sum(first.models[0].model.asked.values()) == 6
    again = scorer(lambda t, n: pytest.fail("asked again"), work=tmp_path)
    assert values(again.score(items("aa", "a", "aaa"), lambda n: None)) == whole
    file = tmp_path / "verdicts-0.jsonl"
    file.write_bytes(file.read_bytes()[:-20])  # the last line was cut
    third = scorer(longer, work=tmp_path)
    assert values(third.score(items("aa", "a", "aaa"), lambda n: None)) == whole
    assert sum(third.models[0].model.asked.values()) == 1 and len(read_verdicts(tmp_path)) == 6
    assert values(scorer(longer, work=tmp_path).score(items("aa", "a", "aaa"), lambda n: None)) == whole
    other = scorer(longer, work=tmp_path, rubric="Another.")
    other.score(items("aa", "a"), lambda n: None)
    assert sum(other.models[0].model.asked.values()) == 2


def test_what_was_asked_before_an_error_is_kept(tmp_path, monkeypatch):
    def flaky(text, n):
        if "<answer_a>\nfive" in text:
            raise ConnectionError
        return longer(text, n)

    judge = scorer(flaky, work=tmp_path)
    judge.score(items("aa", "a"), lambda n: None)
    with pytest.raises(ConnectionError):
        judge.score(items("aa", "a", "five"), lambda n: None)
    assert len(read_verdicts(tmp_path)) >= 2


def test_a_local_judge_gives_the_shares_of_its_labels(tiny_model):
    compute = Compute(CPU, torch.float32, {})
    judge = LocalJudge("tiny", tiny_model, compute)
    questions = [Question(asked("x" * n), labels, "", "", None) for n in (5, 60, 300, 600) for labels in (AB, GRADES)]
    found = [v for _, v in sorted(judge.answer(questions))]
    assert [v.label for v in found[-2:]] == [None, None]  # longer than the context
    model, tokenizer = ModelFolder(tiny_model).load(torch.float32, CPU, "eager"), ModelFolder(tiny_model).tokenizer()
    for question, verdict in list(zip(questions, found, strict=True))[:-2]:
        sums = []
        for label in question.labels:
            whole = tokenizer.apply_chat_template([*question.messages, {"role": "assistant", "content": label}],
                                                  tokenize=True, return_dict=False)[:-1]  # the new line behind the turn
            start = len(tokenizer.apply_chat_template(question.messages, tokenize=True, return_dict=False,
                                                      add_generation_prompt=True))
            with torch.no_grad():
                logp = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            sums.append(sum(logp[i - 1, whole[i]] for i in range(start, len(whole))))
        shares = torch.stack(sums).softmax(0).tolist()
        assert list(verdict.shares.values()) == pytest.approx(shares, abs=1e-4)
        assert verdict.label == question.labels[shares.index(max(shares))]


def test_a_local_judge_grades_by_the_expectation(tiny_model, monkeypatch):
    monkeypatch.setattr(judging, "BUDGET", 700)
    compute = Compute(CPU, torch.float32, {"": Path(tiny_model)})
    panel = judging.open_judge(Judge(mode="rubric", scale=(1, 3)), compute)
    found = panel.score(items("a", "bb"), lambda n: None)
    assert all(0 < value < 1 for value in values(found)) and panel.models[0].name == "start"


def test_bias_and_agreement():
    def row(first, second, verdict, judge="j"):
        return {"judge": judge, "prompt": "p", "first": first, "second": second, "verdict": verdict}

    rows = [row("a", "b", "A"), row("b", "a", "A"), row("a", "c", "A"), row("c", "a", "B"), row("b", "c", None),
            row("c", "b", "B")]
    found = about(rows)
    assert found["asked"] == 6 and found["unparsed"] == 1
    assert found["first"]["rate"] == 3 / 5 and found["consistent"]["rate"] == 1 / 2
    other = [row("a", "b", "B"), row("b", "a", "A")]
    assert between(rows, other)["same"]["rate"] == 1 / 2
    grades = [row(str(i), None, str(i)) for i in range(1, 5)], [row(str(i), None, str(2 * i)) for i in range(1, 5)]
    assert between(*grades)["correlation"] == pytest.approx(1.0)
    values = {("p", 0): {"judge": 1.0, "rule": 1.0}, ("p", 1): {"judge": 0.0, "rule": 0.0},
              ("p", 2): {"judge": 0.5, "rule": 0.0}, ("q", 0): {"judge": 0.0, "rule": 1.0},
              ("q", 1): {"judge": None, "rule": 0.0}}
    assert concordance(values, "judge", "rule")["same"] == pytest.approx(
        {"rate": 1.0, "n": 2, "low": pytest.approx(0.342, abs=1e-3), "high": 1.0})


def test_a_recipe_judges_with_the_start_weights(tiny_recipe, tmp_path):
    path = tmp_path / "judged.yaml"
    path.write_text(tiny_recipe.read_text().replace(
        "verifier: regex\n      verifier_args: {pattern: \"[0-9]\"}", """scorers:
        - {rule: regex, args: {pattern: "[0-9]"}}
        - {judge: {mode: pairwise, opponents: 1, template: "{prompt} {first} {second} {verdict}"}, weight: 0}
        - {judge: {mode: rubric, scale: [1, 3], models: [{}, {name: again}]}, weight: 0}"""))
    threads = torch.get_num_threads()
    assert main([str(path), "rounds=1", "sample.prompts=6", "sample.k=4", "select.sft_min_score=0",
                 "select.sft_cut=true", "dpo.enabled=false"]) == 0
    torch.set_num_threads(threads)
    run = tmp_path / "runs/tiny"
    verdicts = read_table(run / "round-00/score/verdicts.parquet").to_pylist()
    assert {row["judge"] for row in verdicts} == {"start", "again"} and all(row["share"] for row in verdicts)
    summary = read_json(run / "round-00/score/judge.json")
    assert summary["judges"]["start"]["consistent"]["n"] > 5 and summary["between"][0]["judges"] == ["again", "start"]
    assert {(w["judge"], w["scorer"]) for w in summary["with"]} == {("judge_pairwise", "regex"),
                                                                    ("judge_rubric", "regex")}
    assert "Judges" in (run / "report.html").read_text()
    assert (run / "baseline/judge.json").exists()
    rows = read_table(run / "round-00/score/scores.parquet").to_pylist()
    assert all(0 <= r["value"] <= 1 for r in rows if r["scorer"] == "judge_rubric")


def test_a_server_judges(tmp_path):
    """A server with OpenAI's protocol, which fails once in between: what it answered is not asked for again."""
    asked, failing = [], []

    class Answers(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text = body["messages"][0]["content"]
            if failing and "<answer_a>\naaa" in text:
                self.send_response(400)
                self.end_headers()
                return
            asked.append((text, body["max_tokens"], body["temperature"]))
            said = {"choices": [{"message": {"content": longer(text, 0)}, "finish_reason": "stop"}]}
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(said).encode())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    config = Judge.model_validate({"mode": "pairwise", "models": [{
        "engine": "openai", "base_url": f"http://127.0.0.1:{server.server_port}/v1", "model": "m", "concurrency": 2,
        "max_new_tokens": 99}]})
    compute = Compute(CPU, torch.float32, {}, tmp_path)
    failing.append(True)
    with pytest.raises(UserError, match="the server refuses the request, status 400"):
        judging.open_judge(config, compute).score(items("aa", "a", "aaa"), lambda n: None)
    kept = len(read_verdicts(tmp_path))
    assert kept == len(asked)
    failing.clear()
    found = judging.open_judge(config, compute).score(items("aa", "a", "aaa"), lambda n: None)
    server.shutdown()
    assert values(found) == [0.5, 0.0, 1.0] and len(asked) == 6
    assert {(tokens, temperature) for _, tokens, temperature in asked} == {(99, 0.0)}


def test_verdicts_are_kept_where_a_stage_resumes(tmp_path, monkeypatch):
    """The stage stops after its verdicts and before its shard is written; then it asks nothing."""
    stage = stage_in(tmp_path / "score", "score")
    rows = [{"prompt_id": "p", "sample_index": i, "source": "s"} for i in range(3)]
    recipe = load_recipe({"data": {"sources": [{"name": "s", "path": "x", "scorers": [
        {"judge": {"mode": "pairwise"}}]}]}, "dtype": "float32"})
    key = {"prompt_id": pa.string(), "sample_index": pa.int32()}

    def run(answer):
        monkeypatch.setattr("strop.trainer.scoring.table.version_of", lambda *_: "v")
        monkeypatch.setattr("strop.trainer.scoring.table.open_scorer", lambda c, f, w, compute: JudgeScorer(
            c.judge, [ChatJudge("j", "j", Fake(answer=answer), Settings(8))], Kept(compute.work, 0)))
        return score_rows(stage, rows, key, lambda row: items("a" * (1 + row["sample_index"]))[0],
                          {"s": recipe.data.sources[0].scoring}, {}, recipe.score, recipe.only("dtype", "device"))

    first = run(longer)
    for shard in stage.work.glob("*.parquet"):
        shard.unlink()
    assert run(lambda t, n: pytest.fail("asked again")) == first
    assert first["value"].to_pylist() == [0.0, 0.5, 1.0]


@pytest.mark.parametrize("keys, words", [
    ({"mode": "pairwise", "scale": [1, 5]}, "scale is not read"),
    ({"mode": "rubric", "opponents": 2}, "opponents is not read"),
    ({"mode": "rubric", "scale": [5, 5]}, "best grade must be above"),
    ({"mode": "rubric", "template": "{prompt}"}, "verdict"),
    ({"mode": "pairwise", "template": "{prompt}{verdict}{first}"}, "second"),
    ({"mode": "rubric", "models": [{"engine": "openai", "base_url": "http://x", "model": "m", "budget": 3}]},
     "budget is not read"),
    ({"mode": "rubric", "models": [{}, {}]}, "two are named start"), ({"mode": "rubric", "models": []}, "at least 1")])
def test_keys_that_a_judge_does_not_read_are_refused(keys, words):
    with pytest.raises(ValueError, match=words):
        Scorer.model_validate({"judge": keys})
