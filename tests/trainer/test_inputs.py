"""What a run is made from is what its manifests say, also if someone edits it meanwhile."""

import json
import os
import shutil

import pytest
from conftest import CHATML, character_tokenizer, write_recipe

from strop.trainer.errors import UserError
from strop.trainer.main import main
from strop.trainer.methods import run as verbs
from strop.trainer.methods.running import train
from strop.trainer.run.artifacts import check_unchanged, external
from strop.trainer.run.files import read_json
from strop.trainer.run.tables import read_table

ROWS = [{"prompt": "ab", "completion": f"cd{i}"} for i in range(8)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def ready_recipe(folder, model, path):
    """Two rounds of SFT on ready data alone."""
    recipe = folder / "ready.yaml"
    recipe.write_text(f"""\
name: tiny
output_dir: {folder / 'runs'}
dtype: float32
rounds: 2
threads: 1
model: {{path: {model}}}
data: {{sft: [{{name: mine, path: {path}, near_duplicates: false}}]}}
filter: {{near_duplicates: 0}}
sft: {{batch_size: 4, checkpoint_steps: 1}}
dpo: {{enabled: false}}
log: {{tensorboard: false}}
""")
    return recipe


def before(monkeypatch, stage: str, at: int, change) -> None:
    """Calls change() when the stage `stage` begins for the time `at`, counted from 0."""
    real, calls = getattr(verbs, stage), []

    def begin(*args, **kwargs):
        calls.append(None)
        if len(calls) == at + 1:
            change()
        return real(*args, **kwargs)

    begin.__name__ = stage
    monkeypatch.setattr(verbs, stage, begin)


def test_a_template_that_is_edited_while_the_run_goes_on_counts_from_the_next_start(tiny_model, tmp_path, monkeypatch):
    recipe, template = write_recipe(tmp_path, tiny_model), tmp_path / "chat.jinja"
    template.write_text(CHATML)
    edited = CHATML.replace("'<|im_start|>' + m", "'<|im_start|>ZZ' + m")
    before(monkeypatch, "evaluate", 0, lambda: template.write_text(edited))
    keys = {"model.chat_template": str(template), "rounds": 1}
    run, tokenizer = train(str(recipe), keys).dir, character_tokenizer()

    def used() -> list[tuple[str, str, bool]]:
        tokens = read_table(run / "round-00/sample/shard-00000.parquet")["prompt_tokens"][0].as_py()
        final = read_json(run / "final/manifest.json")["config"]["recipe"]["model"]["chat_template"]
        text = tokenizer.decode(tokens).replace(" ", "")
        return [(read_json(run / f"{stage}/manifest.json")["config"]["model"]["chat_template"], final, "ZZ" in text)
                for stage in ("baseline-held-out", "round-00/sample", "round-00/held-out")]

    assert used() == [(CHATML, CHATML, False)] * 3
    train(str(recipe), keys)
    assert used() == [(edited, edited, True)] * 3


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("how", ["replaced", "rewritten", "deleted"])
def test_data_that_changes_while_the_run_goes_on_stops_it(tiny_model, tmp_path, monkeypatch, at, how):
    path = write(tmp_path / "ready.jsonl", ROWS)
    recipe, stat = ready_recipe(tmp_path, tiny_model, path), path.stat()

    def change():
        other = write(tmp_path / "other.jsonl", [row | {"completion": "xy9"} | {"prompt": f"a{i}"}
                                                 for i, row in enumerate(ROWS)])
        if how == "deleted":
            path.unlink()
        elif how == "replaced":  # of the same size and time of change
            os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
            assert other.stat().st_size == stat.st_size
            os.replace(other, path)
        else:
            path.write_text(other.read_text())
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    with monkeypatch.context() as patch:
        # the first time while select reads it, the second time between two rounds
        before(patch, "select" if at == 0 else "merge", 0, change)
        with pytest.raises(UserError, match=r"ready\.jsonl: (changed while|deleted while|no such file)"):
            train(str(recipe))
    if how == "deleted":
        return
    run = tmp_path / "runs" / "tiny"
    assert (run / "round-00/select/manifest.json").exists() == (at == 1) and not (run / "round-01/select").exists()
    train(str(recipe))  # what was made from the old file is made again
    for r in (0, 1):
        rows = read_table(run / f"round-0{r}/select/sft.parquet")["completion_tokens"].to_pylist()
        assert [character_tokenizer().decode(row).replace(" ", "") for row in rows] == ["xy9<|im_end|>"] * len(ROWS)


def starts_again(recipe, capsys) -> str:
    assert main([str(recipe), "rounds=1"]) == 0
    capsys.readouterr()
    assert main([str(recipe), "rounds=1"]) == 0
    return capsys.readouterr().out


def test_a_run_directory_inside_the_model_folder_is_no_part_of_the_model(tiny_model, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    recipe = write_recipe(tmp_path, model)
    recipe.write_text(recipe.read_text().replace(str(tmp_path / "runs"), str(model / "runs")))
    (model / "notes.txt.swp").write_text("x")
    out = starts_again(recipe, capsys)
    assert "re-running" not in out and "final: up to date" in out
    weights = model / "config.json"
    weights.write_text(weights.read_text() + "\n")
    assert main([str(recipe), "rounds=1"]) == 0
    assert "baseline: re-running" in capsys.readouterr().out


def test_what_datasets_writes_beside_saved_rows_does_not_count(tiny_model, tmp_path, capsys):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    recipe = ready_recipe(tmp_path, tiny_model, tmp_path / "saved")
    assert main([str(recipe), "rounds=1"]) == 0
    rows = datasets.load_from_disk(str(tmp_path / "saved"))
    rows.map(lambda row: {"n": len(row["prompt"])})  # its result is cached in the folder
    assert list((tmp_path / "saved").glob("cache-*.arrow"))
    capsys.readouterr()
    assert main([str(recipe), "rounds=1"]) == 0
    assert "re-running" not in capsys.readouterr().out
    shutil.rmtree(tmp_path / "saved")
    datasets.Dataset.from_list(ROWS[:5]).save_to_disk(tmp_path / "saved")
    assert main([str(recipe), "rounds=1"]) == 0
    assert "round-00/select: re-running, because input files.sft.mine changed" in capsys.readouterr().out


def test_files_are_checked_by_content(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "one").write_text("1")
    (tmp_path / "a" / "b" / "two").write_text("2")
    found, counted = external(tmp_path / "a"), external(tmp_path / "a", lambda name: "/" not in name)
    assert set(found.files) == {"one", "b/two"} and set(counted.files) == {"one"} and found.hash != counted.hash
    check_unchanged(found)
    (tmp_path / "a" / "one").touch()  # the same content
    check_unchanged(found)
    (tmp_path / "a" / "b" / "two").write_text("3")
    check_unchanged(counted)
    with pytest.raises(UserError, match=r"b/two: changed while the run was going; the same command re-runs"):
        check_unchanged(found)
    (tmp_path / "a" / "b" / "two").unlink()
    with pytest.raises(UserError, match="b/two: deleted while"):
        check_unchanged(found)
