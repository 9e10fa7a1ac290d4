"""Several writers in a round, models with another tokenizer, and sample.enough."""

import json
from collections import Counter

import pyarrow as pa
import pytest
import torch
from conftest import write_recipe
from faultserver import FaultServer
from hypothesis import given, settings
from hypothesis import strategies as st
from stagecalls import sample
from test_sample import files, make_stage, prompt_row, recipe
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from strop.trainer.cli import load_recipe
from strop.trainer.config import Score
from strop.trainer.data.chat import encode_completion
from strop.trainer.errors import UserError
from strop.trainer.main import main
from strop.trainer.models.loading import ModelFolder
from strop.trainer.run.files import read_json
from strop.trainer.run.tables import read_table, write_table
from strop.trainer.sampling import writers
from strop.trainer.sampling.base import Completion, Fake, Settings
from strop.trainer.sampling.writers import same_tokens, until_enough
from strop.trainer.stages import sample as sample_stage
from strop.trainer.stages.prompts import SCHEMA


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def stranger(tiny_model, tmp_path_factory):
    """A model with the same characters under other ids."""
    folder = tmp_path_factory.mktemp("models") / "stranger"
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = data["model"]["vocab"]
    plain = [t for t in vocab if t not in tokenizer.all_special_tokens]
    turned = dict(zip(plain, reversed([vocab[t] for t in plain]), strict=True))
    data["model"]["vocab"] = vocab | turned
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(data))
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(LlamaConfig.from_pretrained(tiny_model))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def prompts(tmp_path):
    rows = [prompt_row(i, f"say {i * 7}") for i in range(24)]
    write_table(tmp_path / "prompts.parquet", pa.Table.from_pylist(rows, schema=SCHEMA))
    return tmp_path


def rows_of(folder) -> list[dict]:
    return pa.concat_tables([read_table(p) for p in sorted(folder.glob("shard-*"))]).to_pylist()


@pytest.fixture
def teacher():
    found = FaultServer(lambda n, body: f"it is {n % 10}")
    yield found
    found.close()


def committee(tmp_path, tiny_model, models, **sample) -> str:
    path = write_recipe(tmp_path, tiny_model)
    text = json.dumps({"prompts": 24, "k": 8, "max_new_tokens": 24, "shard_prompts": 6, "models": models} | sample)
    lines = [f"sample: {text}" if line.startswith("sample:") else line for line in path.read_text().splitlines()]
    path.write_text("\n".join(lines))
    return str(path)


def test_a_committee_over_two_rounds(tiny_model, stranger, teacher, tmp_path, capsys):
    models = [{"name": "now", "share": 3, "batch_size": 32}, {"name": "first", "weights": "round-00"},
              {"name": "base", "weights": "start"}, {"name": "other", "path": str(stranger)},
              {"name": "teacher", "engine": "openai", "base_url": teacher.url, "model": "the-model", "share": 2}]
    path = committee(tmp_path, tiny_model, models, prompts=12)
    assert main([path]) == 0
    printed, run = capsys.readouterr().out, tmp_path / "runs/tiny"
    for r, names in ((0, ("now", "base", "other", "teacher")), (1, ("now", "first", "base", "other", "teacher"))):
        folder = run / f"round-0{r}"
        rows = rows_of(folder / "sample")
        assert {p.name for p in folder.glob("sample-*")} == {f"sample-{name}" for name in names}
        drawn = Counter(row["writer"] for row in rows)
        assert drawn["now"] == 12 * (4 if r == 0 else 3) and drawn["base"] == 12 and drawn["teacher"] == 24
        dropped = [d for name in names for d in read_table(folder / f"sample-{name}/drops.parquet").to_pylist()]
        ids = Counter((row["prompt_id"], row["sample_index"]) for row in [*rows, *dropped])
        assert len(ids) == 12 * 8 and set(ids.values()) == {1}
        hashes = {row["writer"]: row["writer_hash"] for row in rows}
        assert hashes["teacher"] is None and len(set(hashes.values())) == len(names) - 1  # now is base, then first
        assert len({tuple(row["prompt_tokens"]) for row in rows if row["prompt_id"] == rows[0]["prompt_id"]}) == 1
    promoted = read_json(run / "promotions.json")[0]["hash"]
    assert hashes["now"] == hashes["first"] == promoted
    asked = len(teacher.requests)
    assert asked == 2 * 12 * 2
    pairs = read_table(run / "round-01/select/pairs.parquet").to_pylist()
    mixed = sum(p["chosen_writer"] != p["rejected_writer"] for p in pairs)
    assert mixed and read_json(run / "round-01/dpo/manifest.json")["counts"]["mixed_writer_pairs"] == mixed
    assert f"round-01/dpo: {mixed} of {len(pairs)} pairs have sides by different writers (off-policy)" in printed
    report = (run / "report.html").read_text()
    assert '<table id="writers">' in report and report.count("<td>teacher</td>") == 2
    # another share of training changes what the weights write, not what the teacher wrote
    assert main([path, "sft.lr=5e-4"]) == 0
    assert len(teacher.requests) == asked
    assert "round-01/sample-teacher: up to date" in capsys.readouterr().out


def test_one_writer_s_keys_are_its_own(tiny_model, teacher, tmp_path, capsys):
    models = [{"name": "now"}, {"name": "teacher", "engine": "openai", "base_url": teacher.url, "model": "the-model"}]
    path = committee(tmp_path, tiny_model, models, prompts=6)
    assert main([path, "rounds=1"]) == 0
    capsys.readouterr()
    assert main([path, "rounds=1", "sample.models.1.model=another", "--plan"]) == 0
    plan = capsys.readouterr().out
    assert "round-00/sample-now" in plan
    states = dict(line.split()[:2] for line in plan.splitlines() if line.startswith("round-00/sample"))
    assert states == {"round-00/sample-now": "done", "round-00/sample-teacher": "stale", "round-00/sample": "stale"}


def test_shares_must_give_each_writer_a_completion(tiny_model, tmp_path, capsys):
    path = committee(tmp_path, tiny_model, [{"name": "a", "share": 100}, {"name": "b"}])
    assert main([path]) == 1
    assert "sample.models: the share of b in sample.k=8 is less than one completion" in capsys.readouterr().err
    path = committee(tmp_path, tiny_model, [{"name": "a", "weights": "round-01"}])
    assert main([path]) == 1
    assert "sample.models: no writer has weights in round 0" in capsys.readouterr().err
    for models, said in (([{"name": "a"}, {"name": "a"}], "two writers share a name"),
                         ([{"name": "a", "weights": "start", "path": "x"}], "name one of weights and path"),
                         ([{"name": "a/b"}], "sample.models.0.name=a/b: "),
                         ([{"name": f"n{i}"} for i in range(9)], "k=8 completions cannot be divided among 9 models"),
                         ([{"name": "a", "weights": "round-1"}], "sample.models.0.weights=round-1")):
        with pytest.raises(UserError, match=said):
            load_recipe(committee(tmp_path, tiny_model, models))


def test_greedy_writers_have_one_completion_each(tiny_model, tmp_path):
    models = [{"name": "now"}, {"name": "base", "weights": "start"}]
    load_recipe(committee(tmp_path, tiny_model, models, k=2, temperature=0))
    with pytest.raises(UserError, match=r"greedy, so of sample\.k=3 completions of a prompt at most 2 can differ"):
        load_recipe(committee(tmp_path, tiny_model, models, k=3, temperature=0))
    with pytest.raises(UserError, match=r"at most 1 can differ; raise it or set sample\.k=1"):
        load_recipe(write_recipe(tmp_path, tiny_model), {"sample.temperature": 0})


def test_a_stranger_s_completions_become_the_student_s_tokens(tiny_model, stranger, prompts, tmp_path):
    own, student = ModelFolder(stranger).tokenizer(), ModelFolder(tiny_model).tokenizer()
    assert same_tokens(student, ModelFolder(tiny_model).tokenizer()) and not same_tokens(own, student)
    one = recipe()
    stage = make_stage(tmp_path / "out")
    sample_stage.sample(stage, sample=one.sample, model=one.model, compute=one, seed=0, round=0, weights=stranger,
                        shares={"digits": 1.0}, prompts=prompts, student=tiny_model)
    asked = {r["prompt_id"]: r["messages"] for r in read_table(prompts / "prompts.parquet").to_pylist()}
    rows, drops = rows_of(stage.dir), read_table(stage.dir / "drops.parquet").to_pylist()
    assert len(rows) + len(drops) == 30 and {d["reason"] for d in drops} <= {"cut", "empty"}
    for row in rows:
        said = [{"role": "assistant", "content": row["completion"]}]
        assert row["completion_tokens"] == encode_completion(student, asked[row["prompt_id"]], said).tokens
        assert row["from_text"] and row["logp"] < 0


# -- enough ------------------------------------------------------------------------------------------------------------


class Drawer:
    """Writes completions whose text says whether they are correct."""

    def __init__(self, right):
        self.right, self.waves = right, []

    def write(self, rows, n, first, on_progress):
        self.waves.append((len(rows), n, first))
        on_progress(len(rows) * n, 0)
        return [[Completion([1], 0.0, "stop", str(self.right[row["i"]][s])) for s in range(first, first + n)]
                for row in rows]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_no_prompt_gets_more_once_it_has_enough(data):
    k = data.draw(st.integers(1, 20))
    enough = data.draw(st.integers(1, 8))
    right = data.draw(st.lists(st.lists(st.booleans(), min_size=k, max_size=k), min_size=1, max_size=6))
    drawer, counted = Drawer(right), []
    found = until_enough(drawer, [{"i": i} for i in range(len(right))], k, enough, lambda row, c: c.text == "True",
                         lambda items, tokens: counted.append(items))
    starts = [first for _, _, first in drawer.waves]
    assert starts == sorted(set(starts)) and sum(counted) == k * len(right)
    for drawn, truth in zip(found, right, strict=True):
        assert [c.text for c in drawn] == [str(t) for t in truth[:len(drawn)]]
        before = max((first for _, _, first in drawer.waves if first < len(drawn)), default=0)
        assert sum(truth[:before]) < enough  # the last wave was needed
        assert len(drawn) == k or sum(truth[:len(drawn)]) >= enough


class OddLengths:
    """Scores 1 for a text of odd length, in place of a source's scorers."""

    def __call__(self, source, item):
        return {"odd": (float(len(item.completion) % 2), None)}

    def close(self):
        pass


def test_released_completions_are_recorded_and_resumed(tiny_model, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr(sample_stage, "Verdicts", lambda *_: OddLengths())
    one, stage, lines = recipe(k=8, enough=1, max_new_tokens=6), make_stage(tmp_path / "out"), []
    stage.console.warn = lines.append
    how = {"sample": one.sample, "model": one.model, "compute": one, "seed": 0, "round": 0, "weights": tiny_model,
           "shares": {"digits": 1.0}, "prompts": prompts, "score": Score(), "scorers": {}, "files": {},
           "columns": {"digits": ["prompt", "answer", "{prompt}"]}, "judging": {"digits": {"odd": 1.0}}}
    monkeypatch.setattr(sample_stage, "stop_ids", lambda *_: set(range(3, 98, 3)))
    sample_stage.sample(stage, **how)
    rows, drops = rows_of(stage.dir), read_table(stage.dir / "drops.parquet").to_pylist()
    assert len(rows) + len(drops) == 80 and {d["reason"] for d in drops} == {"released"}
    assert stage.counts["dropped/released"] == len(drops) > 0 and stage.counts["samples"] == len(rows)
    assert f"sample.enough=1 released {len(drops)} of 80 completions; pass rates are too high" in lines[0]
    for prompt_id in {r["prompt_id"] for r in rows}:
        mine = [r for r in rows if r["prompt_id"] == prompt_id]
        right = [r["finish"] == "stop" and len(r["completion"]) % 2 == 1 for r in mine]
        assert [r["sample_index"] for r in mine] == list(range(len(mine))) and (len(mine) == 8 or any(right))
    before = files(stage.dir)
    (stage.dir / "shard-00001.parquet").unlink()
    sample_stage.sample(stage, **how)
    assert files(stage.dir) == before


def test_enough_scores_with_the_recipe_s_bar_and_the_report_says_so(tiny_model, tmp_path, capsys):
    path = str(write_recipe(tmp_path, tiny_model))
    assert main([path, "sample.enough=1", "rounds=1"]) == 0
    released = read_json(tmp_path / "runs/tiny/round-00/sample/manifest.json")["counts"]["dropped/released"]
    assert f"sample.enough released {released} completions" in (tmp_path / "runs/tiny/report.html").read_text()
    capsys.readouterr()
    assert main([path, "sample.enough=1", "rounds=1", "score.correct_at=0.5", "--plan"]) == 0
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()
            if line.startswith("round-00/sample")] == ["stale"]


# -- the fake ----------------------------------------------------------------------------------------------------------


def test_the_fake_is_a_sampler_and_a_chat_model(tiny_model, prompts, tmp_path, monkeypatch):
    fake = Fake(tokens=range(10, 20))
    monkeypatch.setattr(writers, "InProcessSampler", lambda *_: fake)
    sample(make_stage(tmp_path / "a"), recipe(), round=0, model=tiny_model, prompts=prompts)
    sample(make_stage(tmp_path / "b"), recipe(), round=0, model=tiny_model, prompts=prompts)
    assert files(tmp_path / "a") == files(tmp_path / "b") and fake.closed
    rows = rows_of(tmp_path / "a")
    assert {r["finish"] for r in rows} == {"stop", "length"} and all(len(r["completion_tokens"]) <= 8 for r in rows)
    said = [fake.ask([{"role": "user", "content": "hi"}], Settings(8)).text for _ in range(2)]
    assert said == ["answer 0 to hi", "answer 1 to hi"]
