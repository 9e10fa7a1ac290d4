"""The Python API: what docs/api.md says, from scripts and from notebooks."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import strop

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "api.md").read_text(), re.S)


def test_importing_strop_is_light():
    code = "import sys, strop; assert not {'torch', 'transformers', 'pydantic'} & set(sys.modules), list(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")


def test_the_documented_names_are_there_with_types_in_the_docs():
    text = (ROOT / "docs" / "api.md").read_text()
    for name in strop.__all__:
        assert getattr(strop, name).__doc__, name
        assert re.search(rf"\b{name}\b", text), f"docs/api.md does not mention {name}"
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        strop.trian  # noqa: B018


def test_verbs_of_the_docs_are_those_of_run():
    text = (ROOT / "docs" / "api.md").read_text().split("| verb of `Run` |")[1]
    documented = set(re.findall(r"^\| `(\w+)\(", text, re.M))
    public = {n for n, value in vars(strop.Run).items() if callable(value) and not n.startswith("_")}
    assert documented == public


@pytest.fixture
def workplace(tiny_recipe, tmp_path, monkeypatch):
    """A folder with tiny.yaml, whose runs go to runs/ in it."""
    tiny_recipe.write_text(tiny_recipe.read_text().replace(str(tmp_path / "runs"), "runs"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_code_blocks_of_the_docs_run(workplace, capsys):
    space = {}
    for block in BLOCKS:
        exec(compile(block, "docs/api.md", "exec"), space)  # our own documentation
    out = capsys.readouterr().out
    assert "runs/tiny/final" in out and "round-00/dpo stale dpo.beta: 0.1 -> 0.2" in out and "runs/mine/final" in out
    assert space["published"].hash
    mine = strop.load_run("mine")
    assert [s["stage"] for s in mine.stages] == [
        "prompts", "baseline-held-out", "baseline",
        *(f"round-00/{s}" for s in ("sample", "score", "select", "sft", "held-out", "evaluate")), "final"]
    assert mine.finished and mine.model == Path("runs/mine/final")
    assert "<iframe" in mine._repr_html_() and "srcdoc=" in mine._repr_html_()


def test_train_takes_keys_files_and_recipes(workplace, tiny_run):
    keys = strop.load_run(tiny_run).config
    for recipe in (keys, strop.load_recipe(keys), tiny_run / "config.yaml"):
        assert {s["state"] for s in strop.plan(recipe)} == {"done"}
    assert {s["state"] for s in strop.plan(keys, {"name": "other"})} == {"to run"}


@pytest.mark.parametrize("recipe, overrides, message", [
    ("tiny.yaml", {"sample.kk": 4}, r"overrides: sample.kk=4: unknown key; did you mean sample\.k\?"),
    ("tiny.yaml", {"sample.k": 0}, r"overrides: sample.k=0: input should be greater than 0"),
    ("tiny.yaml", {"sample.k.x": 0}, r"overrides: sample.k.x=0: sample.k is a value, it has no keys"),
    ({"sample": {"k": "many"}}, None, r"recipe: sample.k=many: input should be a valid integer"),
    ({"model": {"api_key": "x"}}, None, r"recipe: model.api_key: secrets are not taken"),
    ({"method": "llama4"}, None, r"method"),
    ("absent.yaml", None, "absent.yaml: no such recipe file"),
])
def test_mistakes_are_user_errors(workplace, recipe, overrides, message):
    with pytest.raises(strop.UserError, match=message):
        strop.load_recipe(recipe, overrides)


def test_load_run_names_what_there_is(workplace):
    with pytest.raises(strop.UserError, match="absent: no such run directory"):
        strop.load_run("absent")


def test_a_table_that_is_not_there(tiny_run):
    run = strop.load_run(tiny_run)
    with pytest.raises(strop.UserError, match="no table nothing; there are: difficulty, drops, judged, pairs, rated, "
                       "sft"):
        run.table("round-00/select", "nothing")
    assert run.table("round-00/score").num_rows == run.table("round-00/sample").num_rows == 24 * 8


KERNEL = """
import os
from ipykernel.kernelapp import IPKernelApp
os.chdir({folder!r})
del os.environ["CI"]
IPKernelApp.launch_instance(["-f", {file!r}])
os._exit(0)
"""


def test_a_notebook_shows_progress_and_the_report(launcher, workplace):
    """Run by a real Jupyter kernel, which is forked."""
    pytest.importorskip("ipykernel")
    from jupyter_client import BlockingKernelClient, write_connection_file

    file, _ = write_connection_file(str(workplace / "kernel.json"))
    launcher.start(argv=[], log=str(workplace / "kernel.log"), code=KERNEL.format(folder=str(workplace), file=file))
    client, shown = BlockingKernelClient(connection_file=file), []
    client.load_connection_file()
    client.start_channels()
    client.wait_for_ready(timeout=60)
    for cell in ('import strop\nrun = strop.train("tiny.yaml", {"rounds": 1})', "run"):
        shown.append([])
        reply = client.execute_interactive(cell, timeout=120, output_hook=shown[-1].append)
        assert reply["content"]["status"] == "ok", reply
    client.shutdown()
    client.stop_channels()
    assert launcher.wait() == 0
    first, second = ([(m["msg_type"], m["content"]) for m in messages] for messages in shown)
    bars = [content["data"] for kind, content in first if kind in ("display_data", "update_display_data")]
    assert any("<progress" in bar.get("text/html", "") and "round-00/dpo" in bar["text/plain"] for bar in bars)
    printed = "".join(content["text"] for kind, content in first if kind == "stream")
    assert "round-00: promoted" in printed and "Traceback" not in printed
    (report,) = [content["data"]["text/html"] for kind, content in second if kind == "execute_result"]
    assert report.startswith("<iframe") and "Pass rates" in report
