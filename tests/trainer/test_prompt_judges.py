"""Judges of prompts: difficulty, number of intentions and topic, and what select makes of them."""

import json
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from conftest import write_recipe
from faultserver import FaultServer
from hypothesis import given
from hypothesis import strategies as st
from test_judge import between_tags, items, scorer, values
from training import stage_in

from strop.trainer.cli import load_recipe
from strop.trainer.config import Scorer
from strop.trainer.errors import UserError
from strop.trainer.main import main
from strop.trainer.reports.judging import between
from strop.trainer.run.files import read_json
from strop.trainer.run.tables import Drops, read_table
from strop.trainer.scoring.judge import read_verdict
from strop.trainer.stages.select import limit_topics, within

ABC = ("A", "B", "C")


def test_a_prompt_is_judged_once_and_its_completions_share_the_value():
    judge = scorer(lambda text, n: f"[[{len(between_tags(text, 'request'))}]]", mode="difficulty")
    found = judge.score([*items("a", "b", prompt="ab"), *items("a", prompt="abc")], lambda n: None)
    assert values(found) == [0.5, 0.5, 1.0] and sum(judge.models[0].model.asked.values()) == 2
    (text, *_) = judge.models[0].model.asked
    assert "1 (easy) to 3 (hard)" in text and "<answer>" not in text
    judge = scorer(lambda text, n: "[[4]]", mode="intentions")
    assert values(judge.score(items("a"), lambda n: None)) == [pytest.approx(1 / 3)]


def test_a_topic_is_the_label_that_most_judges_name():
    def says(letter):
        return lambda text, n: f"It is about [[{letter}]]" if "B. code" in text else pytest.fail(text)

    found = scorer(says("B"), says("B"), says("A"), mode="topic", labels=["maths", "code"]).score(
        items("a", "b"), lambda n: None)
    assert [(s.value, s.detail, s.error) for s in found] == [(None, "code", None)] * 2
    for panel in ([says("B"), says("A")], [says("tie")]):  # no majority; no topic
        found = scorer(*panel, mode="topic", labels=["maths", "code"]).score(items("a"), lambda n: None)
        assert found[0].detail is None


@pytest.mark.parametrize("text, expected", [
    ("[[B]]", "B"), ("[[b. code]]", "B"), ("B", "B"), ("**C**", "C"), ("B. code", "B"), ("[[D]]", None),
    ("[[A]] [[C]]", "C"), ("A request about code", None), ("Because", None), ("", None), ("C) other", "C"),
    ("<think>[[A]]</think>[[B]]", "B")])
def test_letters_of_topics(text, expected):
    assert read_verdict(text, ABC) == expected


@given(st.text())
def test_no_text_makes_the_reader_of_letters_raise(text):
    assert read_verdict(text, ABC) in (None, *ABC)


def test_agreement_on_topics_is_no_correlation():
    one = [{"prompt": p, "first": "topic", "second": None, "verdict": v} for p, v in zip("pqr", "ABA", strict=True)]
    other = [row | {"verdict": v} for row, v in zip(one, "AAA", strict=True)]
    assert between(one, other)["same"]["rate"] == pytest.approx(2 / 3) and "correlation" not in between(one, other)


@pytest.mark.parametrize("keys, words", [
    ({"mode": "topic"}, "name at least two topics"), ({"mode": "topic", "labels": ["a", "a"]}, "all different"),
    ({"mode": "rubric", "labels": ["a", "b"]}, "labels is not read"),
    ({"mode": "difficulty", "rubric": "x"}, "rubric is not read"),
    ({"mode": "topic", "labels": ["a", "b"], "scale": [1, 2]}, "scale is not read"),
    ({"mode": "difficulty", "opponents": 2}, "opponents is not read"),
    ({"mode": "topic", "labels": ["a", "b"], "template": "{prompt} {verdict}"}, "must contain {labels}"),
    ({"mode": "topic", "labels": [str(i) for i in range(27)]}, "at most 26")])
def test_keys_that_a_judge_of_prompts_does_not_read(keys, words):
    with pytest.raises(ValueError, match=words):
        Scorer.model_validate({"judge": keys})


def test_it_has_no_weight_and_ranks_no_completions():
    assert Scorer.model_validate({"judge": {"mode": "difficulty"}}).weight == 0
    with pytest.raises(ValueError, match="says the same of all completions"):
        Scorer.model_validate({"judge": {"mode": "difficulty"}, "weight": 2})
    hard = {"judge": {"mode": "difficulty"}, "name": "hard"}
    topic = {"judge": {"mode": "topic", "labels": ["a", "b"]}, "name": "topic"}

    def load(keys, *scorers):
        data = {"sources": [{"name": "s", "path": "x", "scorers": [{"rule": "exact"}, *scorers]}]}
        return load_recipe({"data": data} | keys)

    for keys in ({"select": {"by": "hard"}}, {"score": {"correct_by": "hard"}}, {"merge": {"promote_on": "mean:hard"}},
                 {"filter": {"quality": "topic"}}):
        with pytest.raises(UserError, match="judges prompts, not completions"):
            load(keys, hard, topic)
    good = {"values": {"hard": [0.5, None]}, "topic_share": 0.5}
    load({"filter": {"difficulty": "hard"}, "select": good}, hard, topic)
    for keys, words in (({"values": {"topic": [0, 1]}}, "select.values names topic, .* there are exact, hard"),
                        ({"values": {"nobody": [0, 1]}}, "select.values names nobody"),
                        ({"values": {"hard": [1, 0]}}, "the lowest value is above the highest")):
        with pytest.raises(UserError, match=words):
            load({"select": keys}, hard, topic)
    with pytest.raises(UserError, match="needs a source with a topic judge"):
        load({"select": {"topic_share": 0.5}}, hard)


def test_values_outside_the_window_are_dropped(tmp_path):
    drops = Drops(stage_in(tmp_path / "select", "select"))
    samples = [{"prompt_id": "p", "source": "s", "sample_index": i, "round": 0, "values": {"hard": (v, None)}}
               for i, v in enumerate((0.1, 0.5, 0.9, None))] + [
        {"prompt_id": "q", "source": "t", "sample_index": 0, "round": 0, "values": {"exact": (1.0, None)}}]
    assert [s["sample_index"] for s in within({"hard": (0.5, None)}, samples, drops)] == [1, 2, 0]
    assert [d["detail"] for d in drops.rows] == ["round-00: hard 0.1", "round-00: hard has no value"]


@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=60), st.floats(0.26, 1.0))
def test_no_topic_has_more_than_its_share(topics, share):
    rows = [{"row_id": str(i), "topic": t, "quality": 1.0, "difficulty": i / 100, "source": "s", "prompt_id": "p",
             "sample_index": i} for i, t in enumerate(topics)] + [{"row_id": "ready", "source": "r"}]
    drops = Drops(SimpleNamespace(name="select"))
    if len(set(topics)) * share < 1:
        with pytest.raises(UserError, match=r"select.topic_share=.*raise it, or give more topics"):
            limit_topics(rows, share, drops)
        return
    kept = limit_topics(rows, share, drops)
    counts, before = Counter(row["topic"] for row in kept[:-1]), Counter(topics)
    assert kept[-1]["row_id"] == "ready" and len(kept) + len(drops.rows) == len(rows)
    assert max(counts.values()) <= share * sum(counts.values()) + 1e-6
    most = max(counts.values())
    assert all(counts[t] == min(n, most) for t, n in before.items())
    wider = {t: min(n, most + 1) for t, n in before.items()}  # one more does not fit
    assert not drops.rows or max(wider.values()) > share * sum(wider.values()) - 1e-6
    for topic in counts:  # the hardest stay
        mine = [row["difficulty"] for row in rows[:-1] if row["topic"] == topic]
        assert [row["difficulty"] for row in kept[:-1] if row["topic"] == topic] == mine[len(mine) - counts[topic]:]


def test_a_recipe_selects_by_topic_and_difficulty(tiny_model, tmp_path):
    def answer(n, body):
        text = body["messages"][0]["content"]
        first = between_tags(text, "request").split()[1]
        return f"[[{'A' if int(first) < 5 else 'B'}]]" if "A. low" in text else f"[[{1 + int(first) % 3}]]"

    server = FaultServer(answer)
    model = {"engine": "openai", "base_url": server.url, "model": "m"}
    scorers = [{"rule": "regex", "args": {"pattern": "[0-9]"}},
               {"judge": {"mode": "difficulty", "models": [model]}, "name": "hard"},
               {"judge": {"mode": "topic", "labels": ["low", "high"], "models": [model]}, "name": "topic"}]
    path = write_recipe(tmp_path, tiny_model)
    path.write_text(path.read_text().replace('verifier: regex\n      verifier_args: {pattern: "[0-9]"}',
                                             f"scorers: {json.dumps(scorers)}"))
    threads = torch.get_num_threads()
    assert main([str(path), "rounds=1", "select.sft_min_score=0", "select.sft_cut=true", "dpo.enabled=false",
                 "select.values={hard: [0.5, 1]}", "select.topic_share=0.5", "select.sft_per_prompt=2"]) == 0
    torch.set_num_threads(threads)
    server.close()
    run = tmp_path / "runs/tiny"
    prompts = {r["prompt_id"]: r["messages"][-1]["content"].split()[1]
               for r in read_table(run / "prompts/prompts.parquet").to_pylist()}
    rows = read_table(run / "round-00/select/sft.parquet").to_pylist()
    firsts = [int(prompts[row["prompt_id"]]) for row in rows]
    assert rows and all(first % 3 for first in firsts)
    assert sum(first < 5 for first in firsts) == sum(first >= 5 for first in firsts)
    reasons = Counter(d["reason"] for d in read_table(run / "round-00/select/drops.parquet").to_pylist())
    assert reasons["value"] and reasons["topic"]
    found = read_json(run / "round-00/score/sources.json")["digits"]
    assert found["topic"]["topics"].keys() == {"low", "high"} and 0 < found["hard"]["mean"] < 1
    page = (run / "report.html").read_text()
    assert "Scores by source" in page and "low " in page
    assert len(server.requests) == 2 * 24  # two questions about each prompt of the round, none about held-out ones
    held = read_table(run / "baseline/scores.parquet")["scorer"].to_pylist()
    assert set(held) == {"regex"}
