"""Models and datasets by their names on the hub, against a stand-in for it on this machine."""

import errno
import importlib.util
import json
import os
import pickle
import re
import resource
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import huggingface_hub.constants
import pytest
import yaml
from hubserver import Hub

from strop.trainer.config import Data, Model
from strop.trainer.environment import ASKED_OFFLINE
from strop.trainer.errors import UserError
from strop.trainer.main import main
from strop.trainer.models.folders import find_base
from strop.trainer.models.hub import find_data, is_model_name
from strop.trainer.run.console import Console
from strop.trainer.run.files import read_json

REPO = Path(__file__).parents[2]
CONSOLE = Console(enabled=False)
TURN = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


def jsonl(rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    hub = Hub()
    for name, value in {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), ASKED_OFFLINE: "0",
                        "XDG_CACHE_HOME": str(tmp_path / "cache"), "NO_PROXY": "*"}.items():
        monkeypatch.setenv(name, value)
    for name in ("HF_TOKEN", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_XET_CACHE", "TRANSFORMERS_OFFLINE",
                 "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.chdir(tmp_path)
    yield hub
    hub.close()


@pytest.fixture
def tiny(hub, tiny_model):
    """The commit of owner/tiny, a model with a card, and with files that must not be downloaded."""
    files = {p.name: p.read_bytes() for p in tiny_model.iterdir()}
    junk = {"pytorch_model.bin": pickle.dumps(1), "consolidated.safetensors": b"x", "onnx/config.json": b"x",
            "code.py": b"x"}
    return hub.push("models/owner/tiny", files | junk | {"README.md": b"---\nlicense: mit\n---\n# Tiny\n"})


@pytest.fixture
def rows(hub):
    """The commit of owner/rows: 100 prompts."""
    return hub.push("datasets/owner/rows", {"train.jsonl": jsonl(
        {"prompt": f"say {a} or {b}", "answer": str(a)} for a in range(10) for b in range(10))})


def data(path: str, kind: str = "sft") -> Data:
    return Data.model_validate({kind: [{"name": "d", "path": path}]})


def dataset(path: str, download: bool = True, pins=()) -> tuple[Path, str]:
    return find_data(data(path), CONSOLE, download, dict(pins))[path]


def test_a_run_from_names_keeps_their_commits(hub, tiny, rows, tiny_recipe, tmp_path, capfd):
    first = hub.push("datasets/owner/chats", {
        "README.md": yaml_front({"configs": [{"config_name": "small", "data_files": "small.jsonl"},
                                             {"config_name": "big", "data_files": "big.jsonl"}]}),
        "small.jsonl": jsonl({"messages": TURN, "n": i} for i in range(9)), "big.jsonl": b"{}"}, "v1.0")
    hub.push("datasets/owner/chats", {"README.md": b""})
    chats = "hf:owner/chats/small@v1.0:train[:5]"
    command = [str(tiny_recipe), "rounds=1", "model.path=owner/tiny", "data.sources.0.path=hf:owner/rows:train",
               f"data.sft=[{{name: chats, path: '{chats}', near_duplicates: false, ignore_columns: [n]}}]"]
    assert main([*command, "--plan"]) == 0
    assert hub.asked() == [] and "model.path=owner/tiny: not downloaded yet" in capfd.readouterr().out
    assert main(command) == 0
    text, asked = capfd.readouterr().out, hub.asked()
    assert re.search(rf"downloading owner/tiny: \d files of commit {tiny[:12]}, \d\.\d MB", text)
    assert re.search(r"owner/rows \(MB\) .* took 0:0\d", text)
    assert all(any(re.match(rf"\w+ (/api)?{part}(/|$)", a) for part in (
        "(/models)?/owner/tiny", "/datasets/owner/rows", "/datasets/owner/chats")) for a in asked), asked
    assert not [a for a in asked if re.search(r"\.bin|/code\.py|consolidated|onnx|big", a)]
    run = tmp_path / "runs" / "tiny"
    expected = {"owner/tiny": tiny, "hf:owner/rows:train": rows, chats: first}
    base = read_json(run / "plan.json")["base"]
    assert base["revisions"] == expected and base["revision"] == tiny and base["base_model"] == "owner/tiny"
    card = (run / "final/README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["base_model"] == "owner/tiny" and front["datasets"] == ["owner/chats", "owner/rows"]
    assert front["license"] == "mit" and f"Post-trained from `owner/tiny` at commit {tiny} with Strop" in card
    assert f"| digits | hf:owner/rows:train at commit {rows} | regex | 100 |" in card
    assert f"| chats | hf:owner/chats/small@v1.0:train\\[:5\\] at commit {first} |" in card
    assert "'dropped/duplicate': 4" in str(read_json(run / "round-00/select/manifest.json")["counts"])
    assert main(["show", str(run)]) == 0
    assert f"from owner/tiny at commit {tiny}" in capfd.readouterr().out

    hub.push("models/owner/tiny", {"config.json": b"{}"})  # main moves on, and another tool fills the same cache
    hub.push("datasets/owner/rows", {"train.jsonl": b"{}"})
    (find_base(Model(path="owner/tiny"), CONSOLE, False).path / "flax_model.msgpack").write_bytes(b"x")
    assert main(command) == 0
    assert hub.asked() == [] and "final: up to date" in capfd.readouterr().out
    hub.close()
    assert main([*command, "--plan"]) == 0
    assert "stale" not in capfd.readouterr().out


def yaml_front(front: dict) -> bytes:
    return f"---\n{yaml.safe_dump(front)}---\n".encode()


def test_a_name_is_asked_for_once_and_another_revision_anew(hub, tiny, tiny_model):
    base = find_base(Model(path="owner/tiny"), CONSOLE)
    assert (base.name, base.revision, base.license, base.path.name) == ("owner/tiny", tiny, "mit", tiny)
    hub.asked()
    moved = hub.push("models/owner/tiny", tiny_model, "v2")
    assert find_base(Model(path="owner/tiny"), CONSOLE, pin=tiny) == base
    assert find_base(Model(path=f"owner/tiny@{tiny}"), CONSOLE) == base and hub.asked() == []
    assert find_base(Model(path="owner/tiny@v2"), CONSOLE).revision == moved
    assert not [a for a in hub.asked() if "GET" in a and "model.safetensors" in a]  # cached, by its content
    shutil.rmtree("hf")
    assert find_base(Model(path="owner/tiny"), CONSOLE, pin=tiny) == base


def test_a_cache_is_enough_without_a_network(hub, tiny, rows, monkeypatch, capfd):
    base, found = find_base(Model(path="owner/tiny"), CONSOLE), dataset("hf:owner/rows")
    hub.asked()
    monkeypatch.setenv(ASKED_OFFLINE, "1")
    assert find_base(Model(path="owner/tiny"), CONSOLE) == base and dataset("hf:owner/rows@main:train") == found
    assert hub.asked() == []
    monkeypatch.setenv(ASKED_OFFLINE, "0")
    hub.close()
    assert find_base(Model(path="owner/tiny"), Console()) == base
    assert f"cannot be reached (Connection refused); commit {tiny} from the cache is used" in capfd.readouterr().out
    assert dataset("hf:owner/rows") == found == dataset("hf:owner/rows", download=False)


def test_a_local_folder_goes_before_the_hub(hub, tiny, tiny_model, tmp_path):
    shutil.copytree(tiny_model, "owner/tiny")
    assert find_base(Model(path="owner/tiny"), CONSOLE).revision is None
    with pytest.raises(UserError, match=r"model\.path=owner/tinny: no such folder; "):
        find_base(Model(path="owner/tinny"), CONSOLE)
    assert hub.asked() == []
    assert [is_model_name(p) for p in ("a/b", "a/b@refs/pr/1", "a", "/a/b", "./a/b", "~/b", "a/b/c", "a/b.gguf")] == [
        True, True, *[False] * 6]


def test_rows_arrive_as_they_are_and_errors_name_them(hub, tiny_recipe, capfd):
    from strop.trainer.data.rows import read_rows

    sent = [{"messages": TURN, "chat_template_kwargs": {"a": [1, None], "b": {"c": 0.5}}, "empty": [], "no": None,
             "text": "ä\u2028\n"}] * 3
    hub.push("datasets/owner/rows", {"data/dev.jsonl": jsonl(sent), "README.md": yaml_front(
        {"configs": [{"config_name": "default", "data_files": [{"split": "dev", "path": "data/dev.jsonl"}]}]})})
    read = list(read_rows(dataset("hf:owner/rows:dev")[0]))
    assert [r.data for r in read] == sent and read[1].where == "hf:owner/rows:dev, row 2"
    assert main([str(tiny_recipe), "data.sources.0.path=hf:owner/rows:dev", "name=other"]) == 1
    assert "error: hf:owner/rows:dev, row 1: column 'prompt' is missing" in capfd.readouterr().err


def test_a_token_opens_what_is_private_and_is_never_shown(hub, tiny, monkeypatch, capfd, tmp_path):
    hub.repos["models/owner/tiny"].private = hub.repos["models/owner/tiny"].gated = True
    monkeypatch.setenv("HF_TOKEN", "hf_do_not_write_me")
    assert find_base(Model(path="owner/tiny"), Console()).revision == tiny
    assert hub.tokens == {"Bearer hf_do_not_write_me"}
    text = capfd.readouterr()
    assert "do_not_write_me" not in text.out + text.err
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and b"do_not_write_me" in p.read_bytes()]


@contextmanager
def small_files_only():
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def kill_the_download(place):
    class Killed(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.kill()

    place.setattr(subprocess, "Popen", Killed)


def without_datasets(patch):
    find = importlib.util.find_spec
    patch.setattr(importlib.util, "find_spec", lambda name: None if name == "datasets" else find(name))


# name: (what is wrong, the model or dataset, what the line says)
CASES = {
    "no server": (lambda hub, patch: hub.close(), "owner/tiny", "model.path=owner/tiny: http://127.0.0.1"),
    "no server for data": (lambda hub, patch: hub.close(), "hf:owner/rows", "Connection refused)"),
    "no such host": (lambda hub, patch: patch.setenv("HF_ENDPOINT", "http://nowhere.invalid"), "owner/tiny",
                     "http://nowhere.invalid cannot be reached"),
    "a server that fails": (lambda hub, patch: setattr(hub, "status", 503), "owner/tiny", "(HTTP 503)"),
    "offline": (lambda hub, patch: patch.setenv(ASKED_OFFLINE, "1"), "owner/tiny", "revision main is not cached"),
    "offline for data": (lambda hub, patch: patch.setenv("HF_DATASETS_OFFLINE", "1"), "hf:owner/rows@v1",
                         "revision v1 is not cached"),
    "no such model": (None, "owner/tinny", "there is no repository owner/tinny"),
    "no such dataset": (None, "hf:owner/rowz", "data.sft.0.path=hf:owner/rowz: there is no repository owner/rowz"),
    "no such revision": (None, "owner/tiny@v3", "no revision v3"),
    "no such revision of data": (None, "hf:owner/rows@v3", "no revision v3"),
    "a private model": (lambda hub, patch: setattr(hub.repos["models/owner/tiny"], "private", True), "owner/tiny",
                        "set HF_TOKEN in the environment"),
    "a gated model": (lambda hub, patch: setattr(hub.repos["models/owner/tiny"], "gated", True), "owner/tiny",
                      "accept the terms on its page"),
    "gated data": (lambda hub, patch: setattr(hub.repos["datasets/owner/rows"], "gated", True), "hf:owner/rows",
                   "accept the terms on its page"),
    "a name that cannot be": (None, "owner/tiny.git", "it cannot be read (HFValidationError"),
    "pickles only": (lambda hub, patch: hub.push("models/owner/tiny", {"config.json": b"{}", "model.bin": b""}),
                     "owner/tiny", "no config.json with *.safetensors"),
    "no such config": (None, "hf:owner/rows/main", "there is no config main; there are: default"),
    "no config": (lambda hub, patch: hub.push("datasets/owner/rows", {"a.jsonl": b"{}", "README.md": yaml_front(
        {"configs": [{"config_name": c, "data_files": "a.jsonl"} for c in "ab"]})}), "hf:owner/rows",
        "the config is missing; there are: a, b; name one as hf:owner/rows/CONFIG:SPLIT"),
    "no such split": (None, "hf:owner/rows:test", "there is no split test; there are: train"),
    "no rows at all": (lambda hub, patch: hub.push("datasets/owner/rows", {"a.bin": b""}), "hf:owner/rows",
                       "it cannot be read"),
    "broken rows": (lambda hub, patch: hub.push("datasets/owner/rows", {"a.jsonl": b"{"}), "hf:owner/rows",
                    "it cannot be read"),
    "no name": (None, "hf:rows", "data.sft.0.path=hf:rows: not a dataset name"),
    "no datasets": (lambda hub, patch: without_datasets(patch), "hf:owner/rows", "pip install datasets"),
    "a killed download": (lambda hub, patch: kill_the_download(patch), "owner/tiny", "was interrupted"),
    "a full disk": (None, "owner/tiny", os.strerror(errno.EFBIG)),
}
SLOW = {"gated data", "no such config", "no config", "no rows at all", "broken rows", "no server for data"}
TABLE = REPO / "docs" / "errors.md"


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in CASES])
def test_a_mistake_is_one_line(name, hub, tiny, rows, monkeypatch):
    spoil, path, said = CASES[name]
    if spoil:
        spoil(hub, monkeypatch)
    started = time.monotonic()
    with pytest.raises(UserError) as error, small_files_only() if name == "a full disk" else nullcontext():
        dataset(path) if path.startswith("hf:") else find_base(Model(path=path), CONSOLE)
    text = str(error.value)
    assert said in text and path in text and "\n" not in text and len(text) < 400, text
    assert time.monotonic() - started < 20
    table = TABLE.read_text(encoding="utf-8").split("## Names on the hub\n")[1].split("\n## ")[0]
    rows = [line.split("`")[1] for line in table.splitlines() if line.startswith("| `")]
    assert len([r for r in rows if re.search(".*".join(map(re.escape, r.split("…"))), text)]) == 1, text


@pytest.mark.slow
def test_a_network_that_swallows_everything_costs_seconds(hub, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        with pytest.raises(UserError, match="cannot be reached"):
            find_base(Model(path="owner/tiny"), CONSOLE)
        assert time.monotonic() - started < 20


def test_only_the_users_own_environment_says_offline():
    code = ("from strop.trainer.environment import prepare_environment as p, user_is_offline as o; p(); p()\n"
            "import os, subprocess, sys; print(o(), os.environ['HF_HUB_OFFLINE'])\n"
            "if len(sys.argv) < 3: subprocess.run([sys.executable, '-c', sys.argv[1], sys.argv[1], '2'],"
            " env=os.environ | ({'HF_HUB_OFFLINE': '1'} if len(sys.argv) < 2 else {}))")
    bare = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", ASKED_OFFLINE)}

    def says(*arguments, **environment):
        return subprocess.run([sys.executable, "-c", code, *arguments], env=bare | environment, text=True,
                              capture_output=True, check=True).stdout.split()

    assert says(code) == ["False", "ON", "False", "ON"]  # a process that we start is not offline for what we have set
    assert says(code, HF_HUB_OFFLINE="1") == ["True", "ON", "True", "ON"]


@pytest.mark.slow
def test_two_ranks_download_once(hub, tiny, rows, tiny_recipe):
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone",
                           str(REPO / "trainer/main.py"), str(tiny_recipe), "rounds=1", "model.path=owner/tiny",
                           "data.sources.0.path=hf:owner/rows"], text=True, capture_output=True, timeout=300,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "0"})
    assert done.returncode == 0, done.stderr
    asked = [a for a in hub.asked() if a.startswith("GET") and "model.safetensors" in a]
    assert len(asked) == 1
