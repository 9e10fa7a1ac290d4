"""The revise stage: conversations, lineage, resume and drops, with a fake writer and with the tiny model."""

import json
import sys
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from conftest import character_tokenizer
from faultserver import FaultServer
from pydantic import ValidationError
from stagecalls import select
from test_sample import files, make_stage, prompt_row, recipe

from strop.trainer.data.chat import encode_completion, encode_prompt
from strop.trainer.engines import CRITIQUES, Revise, ReviseOpenAI
from strop.trainer.errors import UserError
from strop.trainer.methods.running import open_run
from strop.trainer.run.tables import read_table, write_table
from strop.trainer.sampling.base import Completion
from strop.trainer.scoring.table import VALUES
from strop.trainer.stages import revise as revise_stage
from strop.trainer.stages.prompts import SCHEMA
from strop.trainer.stages.sample import SCHEMA as SAMPLES
from strop.trainer.stages.sample import gather

sys.path.insert(0, str(Path(__file__).parent))

SHORT = {"critique": "C {feedback}", "revision": "R", "principles": ["x"], "max_new_tokens": 40}  # of 512 characters
WEIGHTS = {"digits": {"exact": 1.0}}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Writer:
    """Answers every row by its last turn; `answer` may replace that. Records what it was asked."""

    def __init__(self, answer=None):
        self.answer, self.asked, self.closed = answer, [], 0

    def write(self, rows, n, first, on_progress):
        assert (n, first) == (1, 0)
        on_progress(len(rows), 7)
        self.asked += rows
        return [[self._one(row)] for row in rows]

    def _one(self, row) -> Completion:
        kind = row["prompt_id"].split("/")[-1]
        said = self.answer(row) if self.answer else None
        return said or Completion([], None, "stop", f" {kind} of {row['messages'][-3]['content']} ")

    def close(self):
        self.closed += 1


@pytest.fixture
def world(tmp_path):
    """Folders of prompts, samples (two of each prompt) and their scores: sample 1 of p000 and all of p001 are wrong."""
    rows = [prompt_row(i, f"say {i}") for i in range(3)]
    write_table(tmp_path / "prompts.parquet", pa.Table.from_pylist(rows, schema=SCHEMA))
    tokenizer = character_tokenizer()
    samples, scores = [], []
    for row in rows:
        for s in (0, 1):
            text, i = f"draft {s} of {row['prompt_id']}", {"prompt_id": row["prompt_id"], "sample_index": s}
            tokens = encode_completion(tokenizer, row["messages"], [{"role": "assistant", "content": text}]).tokens
            samples.append(i | {"prompt_tokens": encode_prompt(tokenizer, row["messages"]), "completion": text,
                                "completion_tokens": tokens, "logp": -1.0, "finish": "stop", "writer": "current",
                                "writer_hash": "h", "from_text": False})
            wrong = row["prompt_id"] == "p001" or (row["prompt_id"], s) == ("p000", 1)
            scores.append(i | {"scorer": "exact", "version": "v", "value": float(not wrong), "error": None,
                               "detail": f"line {s}: {{feedback}}"})
    for name in ("sample", "score"):
        (tmp_path / name).mkdir()
    write_table(tmp_path / "sample" / "shard-00000.parquet", pa.Table.from_pylist(samples, schema=SAMPLES))
    schema = pa.schema([("prompt_id", pa.string()), ("sample_index", pa.int32()), *VALUES])
    write_table(tmp_path / "score" / "scores.parquet", pa.Table.from_pylist(scores, schema=schema))
    return tmp_path


def revise(world, model, section, writer=None, name="out", scored=False, monkeypatch=None):
    stage, r = make_stage(world / name), recipe()
    stage.work.mkdir(parents=True, exist_ok=True)
    if writer is not None:
        monkeypatch.setattr(revise_stage, "open_writer", lambda job: writer)
    how = {"scores": world / "score", "score": r.score, "judging": WEIGHTS} if scored else {}
    revise_stage.revise(stage, revise=section, model=r.model, compute=r, seed=0, round=0, weights=model, prompts=world,
                        sample=world / "sample", student=model, writer_hash="w", **how)
    rows = [row for path in sorted(stage.dir.glob("shard-*")) for row in read_table(path).to_pylist()]
    return rows, read_table(stage.dir / "drops.parquet").to_pylist(), stage


def test_a_revision_goes_on_from_the_one_before_and_says_where_it_comes_from(tiny_model, world, monkeypatch):
    writer = Writer()
    section = Revise(times=2, principles=["be kind", "be short"], critique="C {feedback}", revision="R {feedback}",
                     max_new_tokens=40)
    rows, drops, stage = revise(world, tiny_model, section, writer, monkeypatch=monkeypatch)
    assert not drops and writer.closed == 1
    assert [(r["prompt_id"], r["sample_index"]) for r in rows] == [(f"p00{i}", 2) for i in range(3)]
    assert all(r["revised_from"] == {"prompt_id": r["prompt_id"], "sample_index": 0} for r in rows)
    asked = [row["messages"] for row in writer.asked if row["prompt_id"].startswith("p001")]
    assert [len(messages) for messages in asked] == [3, 5, 3, 5]
    first, then = (asked[i][2]["content"].removeprefix("C ") for i in (0, 2))
    assert {first, then} == {"be kind", "be short"}
    draft = "draft 0 of p001"
    assert asked[0] == [{"role": "user", "content": "say 1"}, {"role": "assistant", "content": draft},
                        {"role": "user", "content": f"C {first}"}]
    assert [m["content"] for m in asked[1][3:]] == [rows[1]["steps"][0]["critique"], f"R {first}"]
    revised = rows[1]["steps"][0]["revision"]
    assert asked[2][1]["content"] == revised and revised.startswith("revision-1 of ")
    assert rows[1]["completion"] == rows[1]["steps"][1]["revision"].strip() and len(rows[1]["steps"]) == 2
    tokenizer = character_tokenizer()
    answer = [{"role": "assistant", "content": rows[1]["completion"]}]
    assert rows[1]["completion_tokens"] == encode_completion(tokenizer, asked[0][:1], answer).tokens
    assert rows[1]["prompt_tokens"] == encode_prompt(tokenizer, asked[0][:1])
    assert (rows[1]["finish"], rows[1]["writer"], rows[1]["writer_hash"]) == ("stop", "revise-current", "w")
    assert stage.counts == {"completions": 6, "chosen": 3, "revised": 3}


def test_errors_revise_what_is_not_correct_by_what_its_scorers_said(tiny_model, world, monkeypatch):
    writer = Writer()
    section = Revise(feedback="errors", per_prompt=2, revision="R", max_new_tokens=40)
    rows, _, _ = revise(world, tiny_model, section, writer, scored=True, monkeypatch=monkeypatch)
    assert [(r["prompt_id"], r["revised_from"]["sample_index"], r["sample_index"]) for r in rows] == [
        ("p000", 1, 3), ("p001", 0, 2), ("p001", 1, 3)]
    said = "line 1: {feedback}"  # not a place of the template
    assert writer.asked[0]["messages"][2]["content"] == CRITIQUES["errors"].replace("{feedback}", said)
    assert rows[0]["steps"][0]["feedback"] == said


def test_if_all_is_correct_nothing_is_asked(tiny_model, world, monkeypatch):
    table = read_table(world / "score" / "scores.parquet")
    values = pa.array([1.0] * len(table), pa.float64())
    write_table(world / "score" / "scores.parquet", table.set_column(
        table.schema.get_field_index("value"), "value", values))
    rows, drops, stage = revise(world, tiny_model, Revise(feedback="errors"), Writer(), scored=True,
                                monkeypatch=monkeypatch)
    assert not rows and not drops and stage.counts["chosen"] == 0
    both = make_stage(world / "both")
    gather(both, writers={"drawn": world / "sample", "revised": stage.dir})
    assert both.counts["samples"] == 6 and both.counts["samples/revised"] == 0


@pytest.mark.parametrize(("kind", "said", "reason"), [
    ("revision", Completion([], None, "length", "cut of"), "cut"),
    ("critique", Completion([], None, "stop", " "), "empty"),
    ("critique", Completion([], None, "refused", "", "no"), "refused"),
    ("revision", Completion([], None, "empty", ""), "empty")])
def test_what_cannot_be_used_is_dropped_with_its_reason(tiny_model, world, monkeypatch, kind, said, reason):
    bad = lambda row: said if row["prompt_id"].startswith(f"p001/0/{kind}") else None  # noqa: E731
    rows, drops, stage = revise(world, tiny_model, Revise(**SHORT), Writer(bad), monkeypatch=monkeypatch)
    assert [r["prompt_id"] for r in rows] == ["p000", "p002"]
    assert [(d["prompt_id"], d["sample_index"], d["reason"]) for d in drops] == [("p001", 2, reason)]
    assert stage.counts[f"dropped/{reason}"] == 1 and drops[0]["detail"].startswith(f"of sample 0: {kind} 1")
    with pytest.raises(UserError, match=r"none of 3 revisions can be used \(cut 3\); raise revise.max_new_tokens"):
        revise(world, tiny_model, Revise(**SHORT), Writer(lambda row: Completion([], None, "length", "x")),
               name="none", monkeypatch=monkeypatch)


def test_a_conversation_that_does_not_fit_is_overlong(tiny_model, world, monkeypatch):
    wordy = lambda row: Completion([], None, "stop", "w" * 450) if row["prompt_id"] == "p001/0/critique-1" else None  # noqa: E731
    rows, drops, _ = revise(world, tiny_model, Revise(**SHORT), Writer(wordy), monkeypatch=monkeypatch)
    assert len(rows) == 2 and [(d["prompt_id"], d["reason"]) for d in drops] == [("p001", "overlong")]


def test_killed_between_shards_it_resumes_and_gives_the_same_files(tiny_model, world, monkeypatch):
    section = Revise(shard_prompts=1, times=2, **SHORT)
    revise(world, tiny_model, section, Writer(), name="whole", monkeypatch=monkeypatch)

    def dies(row):
        if row["prompt_id"] == "p002/0/revision-1":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        revise(world, tiny_model, section, Writer(dies), name="killed", monkeypatch=monkeypatch)
    writer = Writer()
    revise(world, tiny_model, section, writer, name="killed", monkeypatch=monkeypatch)
    assert {row["prompt_id"][:4] for row in writer.asked} == {"p002"}
    assert files(world / "whole") == files(world / "killed")


def test_revisions_are_gathered_with_their_samples_and_selected(tiny_model, world, monkeypatch):
    rows, _, stage = revise(world, tiny_model, Revise(**SHORT), Writer(), monkeypatch=monkeypatch)
    both = make_stage(world / "both")
    gather(both, writers={"drawn": world / "sample", "revised": stage.dir})
    table = read_table(world / "score" / "scores.parquet").to_pylist()
    more = [{"prompt_id": r["prompt_id"], "sample_index": r["sample_index"], "scorer": "exact", "version": "v",
             "value": 2.0, "detail": None, "error": None} for r in rows]
    (world / "both-score").mkdir()
    write_table(world / "both-score" / "scores.parquet", pa.Table.from_pylist(
        table + more, schema=read_table(world / "score" / "scores.parquet").schema))
    out = make_stage(world / "select")
    select(out, recipe(), round=0, prompts=world, model=tiny_model, history=[(both.dir, world / "both-score")])
    picked = {(r["prompt_id"], r["sample_index"]) for r in read_table(out.dir / "sft.parquet").to_pylist()}
    assert picked == {(f"p00{i}", 2) for i in range(3)}
    (pair, *more) = read_table(out.dir / "pairs.parquet").to_pylist()
    assert pair["chosen_tokens"] == rows[0]["completion_tokens"] and pair["chosen_score"] == 2 and len(more) == 2


def test_a_server_revises(tiny_model, world):
    def answer(n, body):
        messages = body["messages"]
        return "C" if len(messages) == 3 else f"better than {messages[1]['content']}"

    server = FaultServer(answer)
    try:
        rows, _, stage = revise(world, tiny_model, ReviseOpenAI(base_url=server.url, model="m", **SHORT))
    finally:
        server.close()
    assert [r["completion"] for r in rows] == [f"better than draft 0 of p00{i}" for i in range(3)]
    assert stage.counts["requests"] == 6 and {r["writer"] for r in rows} == {"revise-m"}


def test_sections_that_make_no_sense_are_refused():
    for how, message in ((dict(critique="no place"), "critique must contain {feedback}"),
                         (dict(feedback="errors", times=2), "before it is scored"),
                         (dict(feedback="errors", principles=["x"]), "principles is not read")):
        with pytest.raises(ValidationError, match=message):
            Revise(**how)
    assert Revise().critique == CRITIQUES["principles"] and json.dumps(Revise().key())


def test_the_verbs_revise_score_and_select_and_do_so_once(tiny_recipe):
    """Samples and their revisions in one selection; another critique makes the revisions stale, not the samples."""
    def method(run, critique="C {feedback}"):
        prompts, section = run.prompts(), run.recipe.sample
        for _ in run.rounds(1):
            samples = run.sample(section, run.start, prompts)
            scores = run.score(run.recipe.score, samples, prompts)
            with pytest.raises(UserError, match=r"feedback=errors needs the scores of the samples; pass scores"):
                run.revise(Revise(feedback="errors"), run.start, samples, prompts)
            short = SHORT | {"critique": critique, "max_new_tokens": 60}
            revised = run.revise(Revise(per_prompt=4, **short), run.start, samples, prompts)
            by_errors = run.revise(Revise(feedback="errors", revision="R", critique=critique, max_new_tokens=60),
                                   run.start, samples, prompts, scores, name="corrected")
            both = run.gather({"drawn": samples, "revised": revised}, "both")
            selected = run.select(run.recipe.select, prompts, [
                (both, run.score(run.recipe.score, both, prompts, name="both-score"))])
        return samples, revised, by_errors, selected

    made = []
    for critique, name in (("C {feedback}", "tiny"), ("C {feedback}", "tiny"), ("D {feedback}", "tiny"),
                           ("C {feedback}", "other")):
        with open_run(tiny_recipe, {"name": name, "sample.prompts": 8, "sample.k": 4}) as run:
            made.append(method(run, critique))
    hashes = [[artifact.hash for artifact in found] for found in made]
    assert hashes[0] == hashes[1] == hashes[3] and hashes[2][0] == hashes[0][0] and hashes[2][1] != hashes[0][1]
    counts = json.loads((made[2][1].path / "manifest.json").read_text())["counts"]
    assert 0 < counts["revised"] < counts["chosen"] == counts["revised"] + sum(
        n for name, n in counts.items() if name.startswith("dropped/"))
