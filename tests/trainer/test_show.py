"""`strop show`: state, lineage and next step of runs that are finished, under way, stopped or damaged."""

import io
import json
import os
import shutil
import sys
from contextlib import suppress

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import Size, make_run, plan_of
from test_watch import at_work, note

from strop.trainer.errors import UserError
from strop.trainer.main import main
from strop.trainer.reports.compare import compare
from strop.trainer.reports.html import write_report
from strop.trainer.reports.reading import find_run, holder, next_stage, read_run
from strop.trainer.reports.show import show
from strop.trainer.run.console import Console
from strop.trainer.run.files import write_json
from strop.trainer.run.store import PLAN


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "demo")


def shown(run_dir):
    console = Console(file=io.StringIO(), plain=True)
    show(console, str(run_dir))
    return console.file.getvalue()


def line(text, start):
    return next(found for found in text.splitlines() if found.startswith(start))


def test_a_finished_run(finished):
    text = shown(finished)
    assert line(text, "state:") == "state: finished, 2 of 2 rounds done"
    assert line(text, "next: strop export")
    assert line(text, "round-01/dpo").split()[:3] == ["round-01/dpo", "done", "60.0"]
    assert line(text, "final").endswith("round-01/dpo") and "base from outside" in line(text, "baseline")
    promotion = json.loads((finished / "round-01/evaluate/summary.json").read_text())["dpo"]["test"]["pass_rate"]
    assert f"round 1 dpo {promotion:.1%}, gain +" in line(text, "test split: base")


def test_a_run_that_stopped_says_where_and_how_to_go_on(tmp_path):
    run = make_run(tmp_path / "demo", until="round-00/select")
    (run / "round-00" / "sft.partial").mkdir()
    text = shown(run)
    assert line(text, "state:") == "state: stopped before round-00/sft, partly done, 0 of 2 rounds done"
    assert line(text, "round-00/sft").split() == ["round-00/sft", "partly", "done"]
    assert line(text, "round-01/dpo").split() == ["round-01/dpo", "to", "run"]
    assert f"next: strop {run}/config.yaml" in text and "--plan" in text


def test_a_run_at_work(tmp_path):
    run = make_run(tmp_path / "demo", until="round-00/select")
    (run / "round-00" / "sft.partial").mkdir()
    note(run, 12)
    assert holder(run) is None
    with at_work(run) as pid:
        text = shown(run)
        assert f"running (process {pid}), 0 of 2 rounds done; round-00/sft 12/40, 321 tok/s, 1:15 left" in text
        assert line(text, "round-00/sft").split() == ["round-00/sft", "running"]
        assert line(text, "next: strop watch")
    assert holder(run) is None  # its id stands there still, the process is gone
    (run / ".lock").write_text(str(os.getpid()))
    assert holder(run) is None  # a process of that id is there, but another one: it does not hold the lock


def test_what_the_recipe_leaves_out_is_not_waited_for(finished, tmp_path):
    run = tmp_path / "demo"
    shutil.copytree(finished, run)
    for r in (0, 1):
        shutil.rmtree(run / f"round-0{r}" / "sft")
    assert next_stage(read_run(run)) == "round-00/sft"
    text = (run / "config.yaml").read_text().replace("sft:\n  enabled: true", "sft:\n  enabled: false")
    plan = plan_of(run, yaml.safe_load(text))
    for entry in plan["stages"]:
        entry["state"] = "done"
    write_json(run / PLAN, plan)
    assert next_stage(read_run(run)) is None and read_run(run).finished
    plan["stages"][-1]["state"] = "stale"  # its folder is there, but the plan says that it is re-run
    write_json(run / PLAN, plan)
    assert next_stage(read_run(run)) == "final" and not read_run(run).finished


def test_damage_is_named(finished, tmp_path):
    run = tmp_path / "demo"
    shutil.copytree(finished, run)
    (run / "round-00/merge/manifest.json").write_text("{")
    text = shown(run)
    assert "warning: round-00/merge/manifest.json" in text and "stopped before round-00/merge" in text


def test_a_run_is_found_by_path_and_by_name(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(finished.parent.parent)
    assert find_run(str(finished)) == finished
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "runs" / "mine", until="prompts")
    assert find_run("mine").resolve() == tmp_path / "runs" / "mine"
    with pytest.raises(UserError, match=r"mind: no such run directory; did you mean mine\?"):
        find_run("mind")
    with pytest.raises(UserError, match=r"it has no config\.yaml"):
        find_run(str(tmp_path))


@pytest.mark.parametrize("arguments, message", [
    (["show"], "show takes 1 argument, 0 given; usage: strop show RUN"),
    (["show", "a", "b"], "show takes 1 argument, 2 given"),
    (["compare", "a"], "compare takes at least 2 arguments, 1 given"),
    (["export", "a", "b", "--force"], "--force: unknown option of export"),
    (["watch", "a", "--port", "x"], "--port x: must be a number from 1 to 65535"),
    (["watch", "a", "--port=99999"], "--port 99999: must be a number"),
    (["show", "nowhere"], "nowhere: no such run directory"),
    (["shwo"], "did you mean show?"),
])
def test_a_mistake_on_the_command_line_is_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


def test_the_commands_explain_themselves(capsys, monkeypatch):
    for verb in ("show", "watch", "compare", "export"):
        assert main([verb, "--help"]) == 0
        assert capsys.readouterr().out.startswith(f"usage: strop {verb} RUN")
    assert main(["--help"]) == 0
    assert "strop compare RUN RUN ..." in capsys.readouterr().out


def test_looking_at_runs_needs_no_torch(finished):
    import subprocess

    code = ("import sys\nfrom strop.trainer.main import main\n"
            "assert main(['show', sys.argv[1]]) == 0 and main(['compare', sys.argv[1], sys.argv[2]]) == 0\n"
            "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n")
    other = finished.parent / "other"
    if not other.exists():
        shutil.copytree(finished, other)
    done = subprocess.run([sys.executable, "-c", code, str(finished), str(other)], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
                    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
                    max_leaves=3)


def spoil(node, draw):
    """The tree with one value, somewhere, replaced or removed."""
    if node and isinstance(node, dict | list) and draw(st.integers(0, 5)):
        key = draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
        if draw(st.integers(0, 5)):
            node[key] = spoil(node[key], draw)
        else:
            del node[key]
        return node
    return draw(JSON)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "small", size=Size(test=6, validation=3, train=4, k=2, steps=4))


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_any_damage_to_a_file_of_a_run_is_told_in_one_line(small, data):
    """`show`, the report and `compare` work with whatever is left, or say what is wrong."""
    files = sorted([*small.rglob("*.json"), small / "metrics.jsonl", small / "config.yaml"])
    path = data.draw(st.sampled_from(files))
    before = path.read_bytes()
    try:
        if path.suffix == ".jsonl":
            lines = before.decode().splitlines()
            at = data.draw(st.sampled_from(range(len(lines))))
            lines[at] = json.dumps(spoil(json.loads(lines[at]), data.draw))
            path.write_text("\n".join(lines))
        else:
            path.write_text(json.dumps(spoil(yaml.safe_load(before), data.draw)))
        for look in (lambda: shown(small), lambda: write_report(small),
                     lambda: compare(Console(file=io.StringIO(), plain=True), *[str(small)] * 2)):
            with suppress(UserError):
                look()
    finally:
        path.write_bytes(before)
