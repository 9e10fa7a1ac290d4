"""Shards are scored while the next ones are drawn: the same artifacts, and nothing is scored twice."""

import json
import threading
from collections import Counter

import pytest
import torch
from conftest import write_recipe
from faultserver import FaultServer

from strop.trainer.config import Scorer
from strop.trainer.errors import UserError
from strop.trainer.methods import run as verbs
from strop.trainer.methods.running import open_run
from strop.trainer.run.artifacts import list_files
from strop.trainer.run.console import Console
from strop.trainer.run.tables import read_table
from strop.trainer.scoring.ahead import Ahead, ready_of
from strop.trainer.scoring.known import Lines

GRADE = """
import json
def grade(prompt, completion):
    with open({log!r}, "a") as f:
        f.write(json.dumps([prompt, completion]) + "\\n")
    return len(completion)
"""
PATIENCE = 20.0  # seconds until the test gives up waiting for what must happen at the same time


@pytest.fixture(autouse=True)
def same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


class World:
    """A server that writes and judges, a function that scores, and the recipe of a run with both."""

    def __init__(self, folder, model, **sample):
        self.written, self.judged, self.folder, self.plan = [], Counter(), folder, lambda: None
        self.seen = threading.Event()  # a judge was asked
        self.server, self.log = FaultServer(self.answer), folder / "graded"
        (folder / "mine.py").write_text(GRADE.format(log=str(self.log)))
        scorers = [{"rule": "regex", "args": {"pattern": "[0-9]"}}, {"python": f"{folder}/mine.py:grade", "weight": 0},
                   {"judge": {"mode": "rubric", "scale": [1, 5], "models": [self.at("judge", name="served")]},
                    "weight": 0}]
        path = write_recipe(folder, model)
        text = path.read_text().replace('verifier: regex\n      verifier_args: {pattern: "[0-9]"}',
                                        f"scorers: {json.dumps(scorers)}")
        how = {"prompts": 12, "k": 2, "max_new_tokens": 24, "shard_prompts": 3} | sample
        self.recipe = path
        path.write_text("\n".join(f"sample: {json.dumps(how)}" if line.startswith("sample:") else line
                                  for line in text.splitlines()))

    def at(self, model, **how):
        return {"engine": "openai", "base_url": self.server.url, "model": model} | how

    def answer(self, n, body):
        text = body["messages"][0]["content"]
        if body["model"] == "judge":
            self.judged[text] += 1
            self.seen.set()
            return f"[[{1 + len(text) % 5}]]"
        self.written.append(text)
        self.plan()
        return f"{self.written.count(text)} to {text}"

    @property
    def graded(self):
        return Counter(self.log.read_text().splitlines()) if self.log.exists() else Counter()

    def run(self, name, keys=None):
        """The artifacts of sample and score, and what was printed."""
        console = Console(enabled=False)
        console.line = console.warn = (lines := []).append
        with open_run(self.recipe, {"name": name, "rounds": 1} | (keys or {}), console=console) as run:
            for _ in run.rounds(1):
                prompts = run.prompts()
                samples = run.sample(run.recipe.sample, run.start, prompts, score=run.recipe.score)
                return samples, run.score(run.recipe.score, samples, prompts), lines.copy()


@pytest.fixture
def world(tiny_model, tmp_path):
    made = World(tmp_path, tiny_model)
    text = made.recipe.read_text().replace('"shard_prompts": 3', '"shard_prompts": 3, ' + json.dumps(
        made.at("writer", concurrency=1))[1:-1])
    made.recipe.write_text(text)
    yield made
    made.server.close()


def test_scoring_overlaps_sampling_and_changes_nothing(world, monkeypatch):
    """The server holds the second shard back until a judge and a function have seen the first one."""
    late = []

    def hold():
        if len(world.written) > 6:  # of the second shard on
            late.append(not world.seen.wait(PATIENCE) or not world.graded)

    world.plan = hold
    samples, scores, _ = world.run("a")
    assert late and not any(late)
    assert set(world.judged.values()) == {1} and set(world.graded.values()) == {1} and len(world.graded) == 24
    assert not list(scores.path.parent.glob("*.scored"))
    monkeypatch.setattr(verbs, "Ahead", lambda *args, **how: Ahead(*args, **how | {
        "scorers": {source: [] for source in how["scorers"]}}))
    world.written.clear()
    world.plan = lambda: None
    again = world.run("b")
    assert again[0].hash == samples.hash and again[1].hash == scores.hash
    assert list_files(again[1].path) != {} and set(world.graded.values()) == {2}
    rows = read_table(scores.path / "scores.parquet").to_pylist()
    assert len(rows) == 24 * 3 and all(r["value"] is not None for r in rows)


def test_a_stopped_run_scores_nothing_twice(world, monkeypatch):
    def stop():
        if len(world.written) == 20:  # in the fourth shard; the first ones are scored by then
            for _ in range(int(PATIENCE * 100)):
                if len(world.graded) >= 12 and len(world.judged) >= 12:
                    break
                threading.Event().wait(0.01)
            raise KeyboardInterrupt

    from strop.trainer.sampling import openai
    real = openai.Server.ask

    def ask(self, messages, settings):
        if self.model == "writer":
            stop()
        return real(self, messages, settings)

    monkeypatch.setattr(openai.Server, "ask", ask)
    with pytest.raises(KeyboardInterrupt):
        world.run("a")
    assert len(world.graded) >= 12
    monkeypatch.setattr(openai.Server, "ask", real)
    _, scores, _ = world.run("a")
    assert set(world.judged.values()) == {1} and len(world.judged) == len(world.graded) == 24
    assert sum(world.graded.values()) == 24 and len(read_table(scores.path / "scores.parquet")) == 72


def test_a_judge_that_fails_does_not_stop_sampling(world, monkeypatch):
    real = world.answer
    world.server.plan = lambda n, body: {"status": 401} if body["model"] == "judge" else real(n, body)
    with pytest.raises(UserError, match="refuses the key, status 401"):
        world.run("a")
    assert len(world.written) == 24  # all of them
    world.server.plan = real
    _, _, lines = world.run("a")
    assert len(world.written) == 24 and "round-00/sample: up to date" in lines
    assert set(world.judged.values()) == {1} and len(world.graded) == 24


def test_what_sample_enough_scored_is_not_scored_again(tiny_model, tmp_path):
    world = World(tmp_path, tiny_model, enough=1, max_new_tokens=8)
    _, scores, _ = world.run("a")
    world.server.close()
    rows = read_table(scores.path / "scores.parquet").to_pylist()
    assert set(world.graded.values()) == {1} and set(world.judged.values()) == {1} and len(rows) > 36
    assert not list(scores.path.parent.glob("*.scored"))


def test_what_can_be_scored_ahead():
    served = {"engine": "openai", "base_url": "http://localhost:1/v1", "model": "m"}
    rubric = Scorer.model_validate({"judge": {"mode": "rubric", "models": [{}, served]}})
    assert [m.name for m in ready_of(rubric, False, False).judge.models] == ["m"]
    assert ready_of(Scorer.model_validate({"judge": {"mode": "rubric"}}), True, True) is None
    pairs = Scorer.model_validate({"judge": {"mode": "pairwise", "models": [served]}})
    assert ready_of(pairs, False, True) == pairs and ready_of(pairs, True, False) is None
    rule, model = Scorer(rule="exact"), Scorer(reward_model="x")
    assert ready_of(rule, True, False) == rule and ready_of(rule, False, True) is ready_of(model, True, True) is None


def test_functions_of_lists_and_failures_wait(world):
    mine = world.folder / "mine.py"
    mine.write_text(mine.read_text().replace("return len(completion)", "return None if '2' in completion else 1 / 0"))
    for name, function in (("a", ""), ("b", "\nseen = grade\n\ndef grade(prompts, completions):\n    for pair in "
                                            "zip(prompts, completions):\n        try:\n            seen(*pair)\n"
                                            "        except ZeroDivisionError:\n            pass\n"
                                            "    return [len(set(completions))] * len(completions)\n")):
        with mine.open("a") as f:
            f.write(function)
        world.log.unlink(missing_ok=True)
        _, scores, _ = world.run(name, {"score.max_errors": 99})
        rows = [r for r in read_table(scores.path / "scores.parquet").to_pylist() if r["scorer"] == "grade"]
        assert {r["value"] for r in rows} == ({None} if name == "a" else {24.0})
        if name == "b":
            assert set(world.graded.values()) == {1}
        else:
            failed = {r["error"].split(": ")[1] for r in rows if r["error"]}
            assert failed == {"ZeroDivisionError"} and any(r["error"] is None for r in rows)


def test_lines_of_several_writers_and_half_a_line(tmp_path):
    one, two = Lines(tmp_path, "values", "0"), Lines(tmp_path, "values", "1")
    one.add([{"key": "a", "value": 0.1 + 0.2}])
    two.catch_up()
    assert two.found["a"]["value"] == 0.1 + 0.2
    with open(one.file, "ab") as f:
        f.write(b'{"key": "b", "val')
    two.add([{"key": "c", "value": None}])
    again = Lines(tmp_path, "values", "0")
    assert again.found.keys() == {"a", "c"}
    again.add([{"key": "d", "value": 1.0}])
    assert Lines(tmp_path, "values", "2").found.keys() == {"a", "c", "d"}
    assert Lines(tmp_path, "verdicts", "2").found == Lines(None, "values", "0").found == {}
