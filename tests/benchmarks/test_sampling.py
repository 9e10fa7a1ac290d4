"""The sampling benchmark: every contender on a tiny model, and the floor."""

import json
from types import SimpleNamespace

import pytest

from benchmarks import docs, measure, sampling


@pytest.mark.slow
def test_a_run_keeps_each_contender_s_numbers_or_its_reason(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    monkeypatch.setattr(measure, "rates", lambda device, names: {"copy": 1e10} | dict.fromkeys(names, 1e11))
    assert sampling.main(["--model", "tiny", "--contenders", "strop,transformers generate,vllm", "--k", "2",
                          "--prompt", "8", "--new", "5", "--prompts", "3", "--batch-size", "4", "--rounds", "2",
                          "--vllm-python", str(tmp_path / "none"), "--write"]) == 0
    (path,) = tmp_path.glob("*/sampling.json")
    (case,) = json.loads(path.read_text())["cases"].values()
    for name in ("strop", "transformers generate"):
        found = case["contenders"][name]
        assert found["tokens"] == 3 * 2 * 5 and len(found["seconds"]) == 2 and found["peak_bytes"] > 1 << 20
        assert 0 < found["fraction_of_floor"] < 1
    assert case["contenders"]["vllm"]["failed"].startswith("cannot be started")
    section = docs.sampling_section()
    assert "| tiny K=2 8:5 |" in section and "- Not run: vllm: cannot be started" in section
    assert "tokens/s" in capsys.readouterr().out


def test_the_floor_counts_what_must_be_done():
    config = SimpleNamespace(hidden_size=4, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=3,
                             intermediate_size=8, vocab_size=16, head_dim=2)
    job = {"prompts": 2, "k": 3, "prompt": 5, "new": 1, "dtype": "float32", "batch_size": 6}
    body, head = 3 * (4 * 2 * 6 + 3 * 4 * 8), 64
    flops, moved = sampling.floor_of(config, job)
    assert flops == 2 * body * 10 + 2 * head * 2 + 4 * 12 * 30  # only prefill: every prompt once, whatever k is
    assert moved == (body + head) * 4
    one, more = (sampling.floor_of(config, job | {"new": 9, "batch_size": size})[1] for size in (6, 3))
    assert more - one == 8 * (body + head) * 4  # half the batch reads the weights twice as often


def test_no_interpreter_for_vllm_is_said():
    assert "--vllm-python" in sampling.run({"contender": "vllm"}, None)["failed"]


def test_a_contender_that_dies_is_said(tmp_path):
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\nexit 3\n")
    script.chmod(0o755)
    assert sampling.run({"threads": 1}, str(script)) == {"failed": "ended by itself, status 3"}


@pytest.mark.parametrize("name", ["sampling"])
def test_the_page_has_the_section(name):
    assert f"<!-- begin {name} -->" in docs.PAGE.read_text() and name in docs.SECTIONS
