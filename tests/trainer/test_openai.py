"""The engine openai against a server on the loopback that misbehaves: retries, limits, budget, and what is kept."""

import json
import os
import signal
import threading
import time
from collections import Counter
from email.utils import formatdate
from pathlib import Path

import pyarrow as pa
import pytest
import yaml
from conftest import write_recipe
from faultserver import FaultServer
from stagecalls import measure, sample
from test_sample import make_stage, prompt_row

from strop.trainer.cli import load_recipe
from strop.trainer.config import Recipe
from strop.trainer.data.chat import encode_completion, encode_prompt
from strop.trainer.errors import UserError
from strop.trainer.main import main
from strop.trainer.models.loading import ModelFolder
from strop.trainer.run.files import read_json
from strop.trainer.run.tables import read_table, write_table
from strop.trainer.sampling import openai
from strop.trainer.sampling.base import Settings
from strop.trainer.stages.prompts import SCHEMA

SETTINGS = Settings(max_new_tokens=8)
ASK = [{"role": "user", "content": "hello"}]


@pytest.fixture
def server():
    found = FaultServer()
    yield found
    found.close()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(openai, "FIRST_DELAY", 0.01)


def section(server, **keys):
    data = {"engine": "openai", "base_url": server.url, "model": "the-model", "retries": 3, "timeout": 5} | keys
    return Recipe.model_validate({"data": {"sources": [{"name": "digits", "path": "x", "verifier": "exact"}]},
                                  "sample": data}).sample


def ask(server, **keys):
    return openai.Server(section(server, **keys), "sample").ask(ASK, SETTINGS)


# -- one request -------------------------------------------------------------------------------------------------------


def test_a_request_says_what_the_recipe_says(server, monkeypatch):
    monkeypatch.setenv("THE_KEY", "sk-secret\n")
    how = Settings(9, 0.5, 4, 0.9)
    extra = {"max_tokens": None, "max_completion_tokens": 9, "chat_template_kwargs": {"enable_thinking": False}}
    reply = openai.Server(section(server, key_env="THE_KEY", request=extra), "sample").ask(ASK, how)
    assert (reply.text, reply.finish, reply.prompt_tokens, reply.completion_tokens) == ("answer", "stop", 10, 1)
    sent = {k: v for k, v in server.requests[0].items() if k not in ("path", "at")}
    assert server.requests[0]["path"] == "/v1/chat/completions"
    assert sent == {"model": "the-model", "messages": ASK, "temperature": 0.5, "top_p": 0.9, "top_k": 4,
                    "max_completion_tokens": 9, "chat_template_kwargs": {"enable_thinking": False}}
    assert server.headers[0]["Authorization"] == "Bearer sk-secret"
    openai.Server(section(server), "sample").ask(ASK, SETTINGS)
    assert "Authorization" not in server.headers[1]


FAULTS = {
    "429": {"status": 429}, "500": {"status": 500, "body": b"oops"}, "503": {"status": 503}, "529": {"status": 529},
    "408": {"status": 408}, "truncated": {"answer": "answer", "short": True}, "reset": {"reset": True},
    "html": {"body": b"<html>busy</html>"}, "no choices": {"body": {"choices": []}},
    "list": {"body": b"[1, 2]"}, "null": {"body": b"null"}, "no message": {"body": {"choices": [{"index": 0}]}},
    "error in a good answer": {"body": {"error": {"message": "overloaded"}}},
    "aborted": {"answer": "half", "finish": "abort"}, "not UTF-8": {"body": b'{"choices": "\xff"}'},
    "deep": {"body": b"[" * 100_000},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_may_pass_is_tried_again(server, fault):
    server.plan = lambda n, body: FAULTS[fault] if n < 2 else "answer"
    assert ask(server).text == "answer" and len(server.requests) == 3


@pytest.mark.parametrize("fault", sorted(FAULTS.keys() - {"no choices"}))
def test_what_does_not_pass_is_one_line(server, fault):
    server.plan = lambda n, body: FAULTS[fault]
    with pytest.raises(UserError) as e:
        ask(server)
    assert len(server.requests) == 4
    line = str(e.value)
    assert line.startswith(f"sample.base_url={server.url}: ") and "(4 tries)" in line and "\n" not in line
    assert len(line) < 700 and "the same command resumes" in line


def test_answers_that_are_none(server):
    server.plan = lambda n, body: FAULTS["no choices"]
    assert ask(server).finish == "empty" and len(server.requests) == 3
    for fault, finish in (({"answer": ""}, "empty"), ({"answer": None}, "empty"), ({"answer": " \n"}, "empty"),
                          ({"answer": None, "message": {"refusal": "no"}}, "refused"),
                          ({"answer": "I", "finish": "content_filter"}, "refused"),
                          ({"answer": None, "finish": "tool_calls"}, "empty"),
                          ({"answer": "half a", "finish": "length"}, "length"),
                          ({"status": 400, "body": {"error": {"code": "content_filter"}}}, "refused"),
                          ({"status": 400, "body": {"error": {
                              "message": "This model's maximum context length is 8 tokens"}}}, "overlong"),
                          ({"answer": "yes", "finish": None}, "stop")):
        server.plan = lambda n, body, fault=fault: fault
        assert ask(server).finish == finish, fault
    server.plan = lambda n, body: {"body": b'{"choices": [{"message": {"content": "a\\ud800b"}}]}'}
    found = ask(server)
    assert found.text == "a\N{REPLACEMENT CHARACTER}b" and found.prompt_tokens is None
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    server.plan = lambda n, body: {"body": {"choices": [{"message": {"content": parts}}]}}
    assert ask(server).text == "one two"


def test_slow_answers_end_after_the_timeout(server):
    server.plan = lambda n, body: {"answer": "x" * 400, "slow": 0.05} if n == 0 else "answer"
    started = time.monotonic()
    assert ask(server, timeout=0.5).text == "answer"
    assert time.monotonic() - started < 5
    server.plan = lambda n, body: {"answer": "x" * 400, "slow": 0.05}
    with pytest.raises(UserError, match=r"no complete answer within 0\.3 seconds \(2 tries\)"):
        ask(server, timeout=0.3, retries=1)


def test_a_proxy_is_used_but_for_this_machine(server, monkeypatch):
    proxy = FaultServer(lambda n, body: "by proxy")
    monkeypatch.setenv("http_proxy", proxy.url.removesuffix("/v1"))
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    try:
        assert ask(server).text == "answer"
        far = section(server, base_url="http://llm.invalid/v1")
        assert openai.Server(far, "sample").ask(ASK, SETTINGS).text == "by proxy"
        assert proxy.requests[0]["path"] == "http://llm.invalid/v1/chat/completions"
    finally:
        proxy.close()


def test_a_server_that_is_not_there_is_said_soon():
    gone = FaultServer()
    gone.close()
    started = time.monotonic()
    with pytest.raises(UserError, match=r"sample\.base_url=http://127\.0\.0\.1:\d+/v1: cannot be reached .*\(3 tri"):
        ask(gone, retries=8)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("as_date", [False, True])
def test_retry_after_is_honored_by_all_requests(server, as_date):
    wait = 1.0
    value = formatdate(time.time() + 2, usegmt=True) if as_date else str(wait)
    server.plan = lambda n, body: {"status": 429, "headers": {"Retry-After": value}} if n == 0 else "answer"
    one = openai.Server(section(server), "sample")
    assert one.ask(ASK, SETTINGS).text == "answer"
    gap = server.requests[1]["at"] - server.requests[0]["at"]
    assert gap > (0.5 if as_date else wait)
    one.not_before = time.monotonic() + 0.5
    one.ask(ASK, SETTINGS)
    assert server.requests[2]["at"] - server.requests[1]["at"] > 0.4
    server.plan = lambda n, body: {"status": 429, "headers": {"Retry-After": "86400"}}
    with pytest.raises(UserError, match=r"status 429, and asks to wait 86,400 seconds; the same command resumes then"):
        ask(server)


@pytest.mark.parametrize(("fault", "line"), [
    ({"status": 401, "body": {"error": {"message": "bad key sk-secret"}}},
     r"sample\.key_env=THE_KEY: the server refuses the key, status 401 \(bad key \*\*\*\); check the key in THE_KEY"),
    ({"status": 403}, r"sample\.key_env=THE_KEY: the server refuses the key, status 403; check"),
    ({"status": 429, "body": {"error": {"message": "pay", "code": "insufficient_quota"}}},
     r"sample\.key_env=THE_KEY: the account has no credit left \(pay\); add some"),
    ({"status": 402}, r"the account has no credit left"),
    ({"status": 400, "body": {"error": {"message": "top_k is unknown"}}},
     r"the server refuses the request, status 400 \(top_k is unknown\); correct the keys of sample"),
    ({"status": 301, "headers": {"Location": "http://elsewhere/"}}, r"refuses the request, status 301"),
])
def test_what_cannot_pass_is_one_line_at_once(server, monkeypatch, fault, line):
    monkeypatch.setenv("THE_KEY", "sk-secret")
    server.plan = lambda n, body: fault
    with pytest.raises(UserError, match=line) as e:
        ask(server, key_env="THE_KEY")
    assert len(server.requests) == 1 and "sk-secret" not in str(e.value)


def test_a_wrong_model_names_those_that_are_there(server):
    server.plan = lambda n, body: {"status": 404, "body": {"error": {"message": "no model"}}}
    with pytest.raises(UserError, match=r"sample\.model=mine: the server has no such model \(no model\); it has: the-"):
        ask(server, model="mine")
    with pytest.raises(UserError, match=r"no such model or address, status 404 .*; correct model=the-model or "):
        ask(server)


def test_a_key_is_needed_where_the_recipe_names_one(server, monkeypatch):
    monkeypatch.delenv("THE_KEY", raising=False)
    with pytest.raises(UserError, match=r"sample\.key_env=THE_KEY: this environment variable is not set"):
        ask(server, key_env="THE_KEY")
    monkeypatch.setenv("THE_KEY", "a\x01b")
    with pytest.raises(UserError, match="holds characters that no key has"):
        ask(server, key_env="THE_KEY")
    with pytest.raises(UserError, match=r"set it to the name of the variable that holds the key"):
        server.plan = lambda n, body: {"status": 401}
        ask(server)


@pytest.mark.parametrize(("keys", "said"), [
    ({"key_env": "sk-12345"}, "must be the name of an environment variable in capitals, not the key itself"),
    ({"base_url": "http://user:sk-12345@host/v1"}, "must be an address without user, password and parameters"),
    ({"base_url": "https://host/v1?key=sk-12345"}, "must be an address without user, password and parameters"),
    ({"request": {"api_key": "sk-12345"}}, "secrets are not taken from recipes"),
])
def test_keys_in_recipes_are_refused_and_not_repeated(tiny_recipe, keys, said):
    data = {"engine": "openai", "base_url": "http://localhost/v1", "model": "m"} | keys
    with pytest.raises(UserError, match=said) as e:
        load_recipe(yaml.safe_load(tiny_recipe.read_text()) | {"sample": data})
    assert "sk-12345" not in str(e.value)


def test_limits_per_minute(server):
    one = openai.Server(section(server, requests_per_minute=600), "sample")
    for _ in range(4):
        one.ask(ASK, SETTINGS)
    assert server.requests[3]["at"] - server.requests[0]["at"] > 0.28
    two = openai.Server(section(server, requests_per_minute=600), "sample", ranks=2)
    for _ in range(3):
        two.ask(ASK, SETTINGS)
    assert server.requests[6]["at"] - server.requests[4]["at"] > 0.38
    # an answer uses 11 tokens, of 17 that are reserved: the difference is given back
    three = openai.Server(section(server, tokens_per_minute=60 * 50), "sample")
    for _ in range(5):
        three.ask(ASK, SETTINGS)
    assert 0.8 < server.requests[11]["at"] - server.requests[7]["at"] < 1.3


# -- stages ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def prompts(tmp_path):
    rows = [prompt_row(i, f"say {i * 7}") for i in range(12)]
    rows += [prompt_row(i, f"test {i}", ("validation", "test")[i % 2]) for i in range(50, 58)]
    write_table(tmp_path / "prompts.parquet", pa.Table.from_pylist(rows, schema=SCHEMA))
    return tmp_path


def recipe(server, **keys) -> Recipe:
    sources = [{"name": "digits", "path": "none.jsonl", "verifier": "exact"}]
    own = {"engine": "openai", "base_url": server.url, "model": "the-model", "retries": 2} | keys
    data = {"prompts": 10, "k": 3, "max_new_tokens": 8, "shard_prompts": 4} | own
    ev = {k: v for k, v in own.items() if k != "enough"} | {"max_new_tokens": 8}
    return Recipe.model_validate({"dtype": "float32", "data": {"sources": sources}, "sample": data, "evaluate": ev})


def rows_of(stage) -> list[dict]:
    return pa.concat_tables([read_table(p) for p in sorted(stage.dir.glob("shard-*"))]).to_pylist()


def test_completions_are_the_template_s_tokens(server, prompts, tiny_model, tmp_path):
    server.plan = lambda n, body: f"it is {n} <|im_end|>"
    stage = make_stage(tmp_path / "out")
    sample(stage, recipe(server, prompt_price=2.0, completion_price=10.0), round=0, model=tiny_model, prompts=prompts)
    rows = rows_of(stage)
    assert len(rows) == len(server.requests) == 30 and len({r["completion"] for r in rows}) == 30
    tokenizer = ModelFolder(tiny_model).tokenizer()
    asked = {r["prompt_id"]: r["messages"] for r in read_table(prompts / "prompts.parquet").to_pylist()}
    for row in rows:
        said = [{"role": "assistant", "content": row["completion"]}]
        assert row["prompt_tokens"] == encode_prompt(tokenizer, asked[row["prompt_id"]])
        assert row["completion_tokens"] == encode_completion(tokenizer, asked[row["prompt_id"]], said).tokens
        assert row["completion_tokens"][-1] == tokenizer.eos_token_id
        assert row["completion_tokens"].count(tokenizer.eos_token_id) == 1  # the one spelled out is text
        assert (row["writer"], row["writer_hash"], row["from_text"], row["logp"]) == ("the-model", None, True, None)
    assert {tuple(m["content"] for m in r["messages"]) for r in server.requests} == {
        tuple(m["content"] for m in asked[i]) for i in {r["prompt_id"] for r in rows}}
    counts = stage.counts
    assert (counts["requests"], counts["prompt_tokens"], counts["completion_tokens"]) == (30, 300, 120)
    assert counts["cost"] == pytest.approx((300 * 2 + 120 * 10) / 1e6)
    assert server.most <= 16


def test_what_cannot_be_used_is_dropped_with_its_reason(server, prompts, tiny_model, tmp_path):
    def plan(n, body):
        kinds = [{"answer": "cut", "finish": "length"}, {"answer": ""}, {"answer": None, "message": {"refusal": "no"}},
                 {"answer": "x" * 600}]
        return kinds[n % 6] if n % 6 < 4 else "fine"

    server.plan = plan
    stage = make_stage(tmp_path / "out")
    sample(stage, recipe(server, concurrency=1), round=0, model=tiny_model, prompts=prompts)
    rows, drops = rows_of(stage), read_table(stage.dir / "drops.parquet").to_pylist()
    assert Counter(d["reason"] for d in drops) == {"cut": 5, "empty": 5, "refused": 5, "overlong": 5}
    assert {r["completion"] for r in rows} == {"fine"} and len(rows) == 10 == stage.counts["samples"]
    ids = [(d["prompt_id"], d["sample_index"]) for d in drops] + [(r["prompt_id"], r["sample_index"]) for r in rows]
    assert len(set(ids)) == len(ids) == 30
    assert stage.counts["dropped/refused"] == 5 and all(d["source"] == "digits" for d in drops)
    before = {p.name: p.read_bytes() for p in stage.dir.glob("*.parquet")}
    sample(stage, recipe(server), round=0, model=tiny_model, prompts=prompts)  # all shards are done
    assert len(server.requests) == 30 and before == {p.name: p.read_bytes() for p in stage.dir.glob("*.parquet")}
    server.plan = lambda n, body: {"answer": "cut", "finish": "length"}
    with pytest.raises(UserError, match=r"none of 30 completions of the-model can be used \(cut 30\); raise samp"):
        sample(make_stage(tmp_path / "none"), recipe(server), round=0, model=tiny_model, prompts=prompts)


def test_a_failure_keeps_what_is_paid_and_the_resume_asks_the_rest(server, prompts, tiny_model, tmp_path):
    server.plan = lambda n, body: {"status": 401} if n == 17 else f"answer {n}"
    stage = make_stage(tmp_path / "out")
    with pytest.raises(UserError, match="refuses the key"):
        sample(stage, recipe(server, concurrency=3), round=0, model=tiny_model, prompts=prompts)
    asked = len(server.requests)
    journal = [json.loads(line) for line in (stage.work / "answers-000.jsonl").read_text().splitlines()]
    assert len(journal) == asked - 1 >= 17
    with open(stage.work / "answers-000.jsonl", "ab") as f:
        f.write(b'{"id": ["", "p0')  # a kill in the middle of a line
    sample(stage, recipe(server), round=0, model=tiny_model, prompts=prompts)
    assert len(server.requests) == 31
    assert {r["completion"] for r in rows_of(stage)} == {f"answer {n}" for n in range(31) if n != 17}


def test_two_ranks_ask_each_its_share_once_and_one_resumes_both(server, prompts, tiny_model, tmp_path):
    server.plan = lambda n, body: f"answer {n}"
    for rank in (1, 0):
        sample(make_stage(tmp_path / "two", rank, 2), recipe(server), round=0, model=tiny_model, prompts=prompts)
    assert len(server.requests) == 30
    work = tmp_path / "two/work"
    assert sorted(p.name for p in work.glob("answers*")) == ["answers-000.jsonl", "answers-001.jsonl"]
    for shard in (tmp_path / "two").glob("shard-*"):
        shard.unlink()
    stage = make_stage(tmp_path / "two")
    sample(stage, recipe(server), round=0, model=tiny_model, prompts=prompts)
    assert len(server.requests) == 30 == len(rows_of(stage)) == stage.counts["requests"]


def test_the_budget_stops_the_stage_and_a_higher_one_resumes_it(server, prompts, tiny_model, tmp_path):
    stage = make_stage(tmp_path / "out")
    with pytest.raises(UserError, match=r"sample\.budget=300: \d+ tokens are used, .* \d+ answers are kept, and a"):
        sample(stage, recipe(server, budget=300), round=0, model=tiny_model, prompts=prompts)
    asked = len(server.requests)
    assert 300 - 60 < asked * 11 <= 300  # an answer uses 11, a request may need 40 and more
    with pytest.raises(UserError, match=r"sample\.budget=300"):
        sample(make_stage(tmp_path / "out"), recipe(server, budget=300), round=0, model=tiny_model, prompts=prompts)
    assert len(server.requests) == asked
    sample(stage, recipe(server, budget=3000), round=0, model=tiny_model, prompts=prompts)
    assert len(server.requests) == 30 and stage.counts["requests"] == 30


def test_the_budget_counts_over_ranks(server, prompts, tiny_model, tmp_path):
    sample(make_stage(tmp_path / "two", 1, 2), recipe(server, budget=200), round=0, model=tiny_model, prompts=prompts)
    assert len(server.requests) == 12
    with pytest.raises(UserError, match=r"sample\.budget=200: 1\d\d tokens are used"):
        sample(make_stage(tmp_path / "two", 0, 2), recipe(server, budget=200), round=0, model=tiny_model,
               prompts=prompts)
    assert 12 < len(server.requests) <= 200 // 11


def test_a_server_that_does_not_count_is_counted_by_the_student_s_tokens(server, prompts, tiny_model, tmp_path):
    server.plan = lambda n, body: {"answer": "four", "more": {"usage": None}}
    stage = make_stage(tmp_path / "out")
    sample(stage, recipe(server), round=0, model=tiny_model, prompts=prompts)
    rows = rows_of(stage)
    assert stage.counts["completion_tokens"] == 4 * 30
    assert stage.counts["prompt_tokens"] == sum(len(r["prompt_tokens"]) for r in rows)


def test_concurrency_is_bounded_and_used(server, prompts, tiny_model, tmp_path):
    server.plan = lambda n, body: time.sleep(0.05) or "answer"
    sample(make_stage(tmp_path / "out"), recipe(server, concurrency=4), round=0, model=tiny_model, prompts=prompts)
    assert server.most == 4


def test_evaluation_counts_cut_and_empty_answers_as_wrong(server, prompts, tiny_model, tmp_path):
    server.plan = lambda n, body: {0: {"answer": "1", "finish": "length"}, 1: {"answer": ""}}.get(n % 4, "1")
    stage, lines = make_stage(tmp_path / "out"), []
    stage.console.warn = lines.append
    asked = measure(stage, recipe(server, concurrency=1), prompts=prompts, candidates={"base": tiny_model},
                    start=tiny_model)
    rows = read_table(stage.dir / "results.parquet").to_pylist()
    assert len(rows) == 8 and Counter((r["finish"], r["correct"]) for r in rows) == {
        ("stop", True): 4, ("length", False): 2, ("empty", False): 2}
    assert all(r["temperature"] == 0 for r in server.requests) and asked.counts["requests"] == 8
    assert "the server's model's" in lines[0] and not (asked.dir / "kl.json").exists()
    stage = make_stage(tmp_path / "own")
    candidates = {"a": tiny_model, "b": tiny_model}
    measure(stage, recipe(server, model="at {weights}"), prompts=prompts, candidates=candidates)
    assert {r["model"] for r in server.requests[8:]} == {f"at {tiny_model.resolve()}"} and len(server.requests) == 24
    assert len(lines) == 1


# -- whole runs --------------------------------------------------------------------------------------------------------


def test_a_run_with_a_server_killed_in_the_middle_asks_nothing_twice(server, launcher, tiny_model, tmp_path):
    path = write_recipe(tmp_path, tiny_model)
    ready, asked = threading.Event(), []

    def plan(n, body):
        asked.append(body["messages"][0]["content"])
        if n == 30:
            ready.set()
        if n >= 30 and not server.go:
            time.sleep(30)
        return ("it is 7", "nothing")[n % 2]

    server.go, server.plan = False, plan
    text = path.read_text().replace("sample: {prompts: 24, k: 8, max_new_tokens: 24, shard_prompts: 6, batch_size: 32}",
                                    f"sample: {{prompts: 12, k: 4, shard_prompts: 6, engine: openai, concurrency: 2, "
                                    f"base_url: {server.url}, model: the-model, key_env: THE_KEY}}")
    path.write_text(text.replace("rounds: 2", "rounds: 1").replace("pattern: \"[0-9]\"", "pattern: \"7\""))
    pid = launcher.start(argv=[str(path)], log=str(tmp_path / "log"), env={"THE_KEY": "sk-secret"})
    assert ready.wait(120), (tmp_path / "log").read_text()
    time.sleep(0.3)
    os.kill(pid, signal.SIGKILL)
    launcher.wait()
    done = [json.loads(line) for line in (
        tmp_path / "runs/tiny/round-00/sample.partial" / "work" / "answers-000.jsonl").read_text().splitlines()]
    assert len(done) == 30
    server.go, before = True, len(server.requests)
    os.environ["THE_KEY"] = "sk-secret"
    try:
        assert main([str(path), "sample.concurrency=4"]) == 0
        assert len(server.requests) - before == 48 - 30
        assert main([str(path), "sample.retries=1", "sample.key_env=null", "dpo.lr=1e-3"]) == 0
        assert len(server.requests) - before == 48 - 30
    finally:
        del os.environ["THE_KEY"]
    run = tmp_path / "runs/tiny"
    manifest = read_json(run / "round-00/sample/manifest.json")
    assert manifest["counts"]["requests"] == 48 and manifest["counts"]["prompt_tokens"] == 480
    assert Counter(asked[:30] + asked[before:]) == dict.fromkeys(asked, 4)
    for file in Path(run).rglob("*"):
        assert file.is_dir() or b"sk-secret" not in file.read_bytes(), file
    assert "480" in (run / "report.html").read_text()
