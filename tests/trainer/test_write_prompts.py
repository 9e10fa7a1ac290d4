"""Prompts that a model writes: parsing, filters, votes, resume, and their way through a run."""

import json
import re
from collections import Counter

import pyarrow as pa
import pytest
from conftest import write_recipe
from faultserver import FaultServer
from hypothesis import given
from hypothesis import strategies as st
from test_sample import files, make_stage

from strop.trainer.cli import load_recipe
from strop.trainer.config import Recipe
from strop.trainer.data.dedup import near_duplicates
from strop.trainer.data.sources import content_hash
from strop.trainer.errors import UserError
from strop.trainer.main import main
from strop.trainer.run.files import read_json
from strop.trainer.run.tables import read_table, write_table
from strop.trainer.sampling.base import Completion
from strop.trainer.stages import write_prompts as module
from strop.trainer.stages.prompts import SCHEMA
from strop.trainer.stages.write_prompts import ASKS, parse, write_prompts

TEMPLATE = "{examples} {topic} {format}"


class Scripted:
    """A writer whose replies a function of (row, number) gives; None is a cut one."""

    def __init__(self, reply):
        self.reply, self.asked, self.closed = reply, [], 0

    def write(self, rows, n, first, on_progress):
        self.asked += [(row["prompt_id"], s) for row in rows for s in range(n)]
        on_progress(len(rows) * n, 0)
        texts = [[self.reply(row, s) for s in range(n)] for row in rows]
        return [[Completion([], None, "length" if t is None else "stop", t or "") for t in drawn] for drawn in texts]

    def close(self):
        self.closed += 1


def recipe(verifier="number", args=None, **write) -> Recipe:
    source = {"name": "sums", "path": "none.jsonl", "verifier": verifier, "prompt_template": "Q: {prompt}"}
    return Recipe.model_validate({
        "dtype": "float32", "data": {"sources": [source | ({"verifier_args": args} if args else {})]},
        "write_prompts": {"enabled": True, "template": TEMPLATE, "max_new_tokens": 40, "max_tokens": 80,
                          "examples": 1, "shard_asks": 4} | write})


QUESTIONS = {"train": ["how many legs have two dogs", "what is the number of days in a week"],
             "test": ["which number of minutes has the longest hour of any day"]}


def id_of(text: str) -> str:
    return content_hash([{"role": "user", "content": f"Q: {text}"}])


@pytest.fixture
def prompts(tmp_path):
    rows = [{"prompt_id": id_of(text), "source": "sums", "split": split, "answer": "7", "conversational": False,
             "metadata": "{}", "messages": [{"role": "user", "content": f"Q: {text}"}]}
            for split, texts in QUESTIONS.items() for text in texts]
    write_table(tmp_path / "prompts.parquet", pa.Table.from_pylist(rows, schema=SCHEMA))
    return tmp_path


def run(folder, one, model, prompts, reply, monkeypatch):
    stage, scripted = make_stage(folder), Scripted(reply)
    stage.lines = []
    stage.console.warn = stage.lines.append
    monkeypatch.setattr(module, "open_writer", lambda job: scripted)
    source = one.seed_source
    write_prompts(stage, write=one.write_prompts, source=source, filter=one.filter, model=one.model, compute=one,
                  rules=[(c.rule, c.args) for c in source.scoring if c.rule], seed=0, round=0, weights=model,
                  sources={s.name: {"prompt_template": s.prompt_template, "templated": s.templated}
                           for s in one.sources}, prompts=prompts)
    return stage, scripted


def said(prompt: str, answer: str = "3") -> str:
    return f"Sure!\n<prompt>{prompt}</prompt>\n<answer>{answer}</answer>"


NEW = ["a cat has so many kittens plus one", "count all vowels of queue", "seven ate nine, who is left over",
       "boxes of eggs come in a dozen minus five", "triangle corners are this many", "wheels under an old tricycle"]


def test_every_reason_is_counted_and_what_is_left_is_kept(tiny_model, prompts, tmp_path, monkeypatch):
    bad = [None, "no tags", said("a?"), said("x" * 81), said("no answer can be read here", "unknown"),
           said(QUESTIONS["train"][0]), said(QUESTIONS["test"][0] + "?"), said(NEW[0] + "!"), said(NEW[1], "4"),
           said("b") + said("c")]
    script = [said(NEW[0]), *bad, *map(said, NEW[2:])]
    solutions = {NEW[1]: "5"}

    def reply(row, s):
        if row["prompt_id"].startswith("ask"):
            return script[int(row["prompt_id"][4:])]
        return f"the answer is {solutions.get(row['text'], '3')}"

    one = recipe(prompts=4, asks=len(script), votes=3)
    stage, scripted = run(tmp_path / "out", one, tiny_model, prompts, reply, monkeypatch)
    rows = read_table(stage.dir / "prompts.parquet").to_pylist()
    new = [row for row in rows if row["synthetic"]]
    assert [r["messages"][-1]["content"] for r in new] == [f"Q: {NEW[0]}", *(f"Q: {t}" for t in NEW[2:5])]
    assert {(r["source"], r["split"], r["answer"]) for r in new} == {("written", "train", "3")}
    assert [r["prompt_id"] for r in rows[:3]] == [id_of(t) for texts in QUESTIONS.values() for t in texts]
    assert [r["prompt_id"] for r in new] == [id_of(t) for t in (NEW[0], *NEW[2:5])] and scripted.closed == 1
    drops = read_table(stage.dir / "drops.parquet").to_pylist()
    by_ask = {int(re.match(r"ask (\d+)", d["detail"])[1]): d["reason"] for d in drops}
    assert by_ask == {1: "cut", 2: "unparsed", 3: "too_short", 4: "too_long", 5: "unverifiable", 6: "duplicate",
                      7: "contaminated", 8: "near_duplicate", 9: "inconsistent", 10: "unparsed", 14: "surplus"}
    assert {k.removeprefix("dropped/"): n for k, n in stage.counts.items() if "/" in k} == Counter(by_ask.values())
    asks = read_table(stage.dir / "asks.parquet")
    assert asks.schema == ASKS and len(asks) == stage.counts["asks"] == len(new) + len(drops) == len(script)


def test_asking_stops_once_there_are_enough(tiny_model, prompts, tmp_path, monkeypatch):
    one = recipe("regex", {"pattern": "[0-9]"}, prompts=3, asks=1000)
    stage, scripted = run(tmp_path / "out", one, tiny_model, prompts,
                          lambda row, s: f"<prompt>{NEW[int(row['prompt_id'][4:])]}</prompt>", monkeypatch)
    assert len(scripted.asked) == 4 and stage.counts["prompts"] == 3 and not stage.lines  # a shard, and no solutions
    shown = {i for ids in read_table(stage.dir / "asks.parquet")["examples"].to_pylist() for i in ids}
    assert shown <= set(map(id_of, QUESTIONS["train"]))  # never a held-out prompt


def test_too_few_prompts_are_warned_of(tiny_model, prompts, tmp_path, monkeypatch):
    one = recipe(prompts=2, asks=6)
    stage, _ = run(tmp_path / "out", one, tiny_model, prompts, lambda row, s: "no", monkeypatch)
    assert stage.counts == {"prompts": 0, "asks": 6, "synthetic": 0, "dropped/unparsed": 6}
    assert "0 of 2 prompts after 6 asks (dropped: unparsed 6)" in stage.lines[0]


@pytest.mark.parametrize(("right", "kept"), [(0, 0), (2, 0), (3, 1), (5, 1)])
def test_more_than_half_of_the_solutions_must_agree(tiny_model, prompts, tmp_path, monkeypatch, right, kept):
    def reply(row, s):
        return said(NEW[0]) if row["prompt_id"].startswith("ask") else "3" if s < right else "4"

    stage, _ = run(tmp_path / "out", recipe(prompts=1, asks=1, votes=5), tiny_model, prompts, reply, monkeypatch)
    assert stage.counts["prompts"] == kept
    assert read_table(stage.dir / "asks.parquet")["votes"].to_pylist() == [right]


def test_a_killed_stage_resumes_by_shard_with_the_same_files(tiny_model, prompts, tmp_path, monkeypatch):
    def reply(row, s):
        return said(NEW[int(row["prompt_id"][4:]) % 6]) if row["prompt_id"].startswith("ask") else "3"

    class Killed(BaseException):
        pass

    calls = []

    def dies(row, s):
        calls.append(row["prompt_id"])
        if len(calls) == 6:
            raise Killed
        return reply(row, s)

    one = recipe(prompts=6, asks=8, votes=1)
    whole, scripted = run(tmp_path / "whole", one, tiny_model, prompts, reply, monkeypatch)
    with pytest.raises(Killed):
        run(tmp_path / "killed", one, tiny_model, prompts, dies, monkeypatch)
    stage, again = run(tmp_path / "killed", one, tiny_model, prompts, reply, monkeypatch)
    assert files(stage.dir) == files(whole.dir) and stage.counts == whole.counts
    assert {i for i, _ in scripted.asked} - {i for i, _ in again.asked} == {f"ask-{i:06}" for i in range(4)}


def test_the_model_itself_gives_the_same_replies_again(tiny_model, prompts, tmp_path):
    one = recipe(prompts=2, asks=4, template="{examples}{format}", max_new_tokens=8)
    for name in ("a", "b"):
        stage = make_stage(tmp_path / name)
        stage.console.warn = lambda line: None
        write_prompts(stage, write=one.write_prompts, source=one.seed_source, filter=one.filter, model=one.model,
                      compute=one, rules=[("number", {})], seed=0, round=0, weights=tiny_model, prompts=prompts,
                      sources={s.name: {"prompt_template": s.prompt_template, "templated": s.templated}
                               for s in one.sources})
    assert files(tmp_path / "a") == files(tmp_path / "b")
    replies = read_table(tmp_path / "a/asks.parquet")["reply"].to_pylist()
    assert len(set(replies)) > 1 and all(replies)


@given(st.text(), st.text(), st.text())
def test_a_reply_is_read_if_it_has_exactly_one_prompt(before, prompt, answer):
    plain = not re.search("[<>]|THINK", before + prompt + answer)
    text = f"{before}<prompt>{prompt}</prompt><answer>{answer}</answer>"
    if plain:
        expected = (prompt.strip(), answer.strip()) if prompt.strip() else None
        assert parse(text, True) == expected
        assert parse(f"<think>{text}</think>{text}", True) == expected
        assert parse(text + text, True) is None and parse(before + prompt, False) is None
    parse(text, False)


def test_known_texts_are_kept_whatever_they_are_similar_to():
    texts = [("one two three four five",)] * 3 + [("another thing entirely",)]
    assert [(i, j) for i, j, _ in near_duplicates(texts, 0.7, known=2)] == [(2, 0)]
    assert [(i, j) for i, j, _ in near_duplicates(texts, 0.7)] == [(1, 0), (2, 0)]


@pytest.mark.parametrize(("keys", "said"), [
    ({"source": "other"}, r"write_prompts\.source=other: no such source; there are sums"),
    ({"name": "sums"}, r"write_prompts\.name=sums is a source of data\.sources"),
    ({"template": "{examples} {topic}"}, r"template must contain \{format\}"),
    ({"topics": ["cats"], "template": "{examples} {format}"}, r"template must contain \{topic\}"),
    ({"prompts": 9, "asks": 8}, r"prompts=9 is above asks=8"),
    ({"min_tokens": 99}, r"min_tokens=99 is above max_tokens=80")])
def test_mistakes_in_the_section(keys, said):
    with pytest.raises(ValueError, match=said):
        recipe(**keys)


@pytest.mark.parametrize("scorer", [{"rule": "instructions"}, {"judge": {
    "mode": "rubric", "template": "{prompt} {completion} {verdict} {answer}"}}, {"rule": "choice"}, {"code": {}},
                                    {"rule": "reasoning_gym", "args": {"dataset": "chain_sum"}}])
def test_scorers_that_need_more_than_an_answer_are_refused(scorer):
    with pytest.raises(ValueError, match=r"write_prompts\.source: scorer .* which a written one does not have"):
        Recipe.model_validate({"data": {"sources": [{"name": "s", "path": "x", "scorers": [scorer]}]},
                               "write_prompts": {"enabled": True}})


@pytest.mark.parametrize("scorer", [{"rule": "choice", "args": {"choices": ["a", "b"]}}, {"rule": "number"},
                                    {"judge": {"mode": "pairwise"}}, {"python": "f.py:g"}])
def test_scorers_that_need_no_more_are_accepted(scorer):
    recipe = Recipe.model_validate({"data": {"sources": [{"name": "s", "path": "x", "scorers": [scorer]}]},
                                    "write_prompts": {"enabled": True}})
    assert [s.name for s in recipe.sources] == ["s", "written"]
    assert recipe.sources[1].scoring == recipe.sources[0].scoring


def test_written_prompts_go_through_a_run(tiny_model, tmp_path, capsys):
    letters = "abcdefghijklmnopqrstuvwxyz"
    server = FaultServer(lambda n, body: f"<prompt>{letters[n % 20:][:6]} {'xyz'[n % 3] * 5} {n * 37}</prompt>")
    keys = json.dumps({"enabled": True, "engine": "openai", "base_url": server.url, "model": "the-model", "prompts": 6,
                       "asks": 12, "share": 5, "template": TEMPLATE, "max_new_tokens": 32, "concurrency": 1})
    path = write_recipe(tmp_path, tiny_model)
    path.write_text(path.read_text() + f"write_prompts: {keys}\n")
    try:
        assert main([str(path)]) == 0
        asked = len(server.requests)
        assert main([str(path)]) == 0 and len(server.requests) == asked
    finally:
        server.close()
    done = tmp_path / "runs/tiny"
    capsys.readouterr()
    first, second = (read_table(done / f"round-0{r}/write_prompts/prompts.parquet").to_pylist() for r in range(2))
    assert sum(r["synthetic"] for r in first) == 6 and sum(r["synthetic"] for r in second) == 12
    drawn = {r["prompt_id"] for p in (done / "round-00/sample").glob("shard-*") for r in read_table(p).to_pylist()}
    assert {r["prompt_id"] for r in first if r["synthetic"]} <= drawn
    selected = read_table(done / "round-00/select/sft.parquet")["source"].to_pylist()
    assert "written" in selected
    assert "synthetic, after digits" in (done / "final/README.md").read_text()
    report = (done / "report.html").read_text()
    assert "Synthetic training prompts, written by a model: round-00/write_prompts: 6" in report
    held = {r["prompt_id"] for r in first if r["split"] != "train"}
    measured = set(read_table(done / "baseline/results.parquet")["prompt_id"].to_pylist())
    assert measured == held and not held & drawn
    counts = read_json(done / "round-00/write_prompts/manifest.json")["counts"]
    assert counts["prompts"] == 6 and counts["requests"] == counts["asks"]
    assert main([str(path), "write_prompts.votes=7", "--plan"]) == 0
    states = dict(line.split()[:2] for line in capsys.readouterr().out.splitlines() if line.startswith(("round", "ba")))
    assert states["round-00/write_prompts"] == states["round-00/sample"] == "stale" and states["baseline"] == "done"


def test_another_model_can_write(tiny_model, tmp_path):
    one = load_recipe(write_recipe(tmp_path, tiny_model), {"write_prompts.enabled": True,
                                                           "write_prompts.path": str(tiny_model)})
    from strop.trainer.methods.running import planned
    from strop.trainer.run.console import Console

    entries = {e["stage"]: e for e in planned(one, Console(enabled=False))[1].plan}
    assert entries["round-00/write_prompts"]["inputs"]["weights"] == "outside"


def test_examples_are_missing(tiny_model, prompts, tmp_path, monkeypatch):
    rows = [r for r in read_table(prompts / "prompts.parquet").to_pylist() if r["split"] == "test"]
    write_table(prompts / "prompts.parquet", pa.Table.from_pylist(rows, schema=SCHEMA))
    with pytest.raises(UserError, match="source sums has no training prompts to show as examples"):
        run(tmp_path / "out", recipe(), tiny_model, prompts, lambda row, s: "", monkeypatch)


