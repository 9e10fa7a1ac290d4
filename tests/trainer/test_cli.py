import re
from typing import get_origin

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from strop.trainer.cli import load_recipe, parse, read_yaml
from strop.trainer.config import Recipe, to_yaml
from strop.trainer.engines import sections_of
from strop.trainer.errors import UserError
from strop.trainer.help import help_text, shipped_recipes
from strop.trainer.main import main
from strop.trainer.run.world import World

GOOD = "data:\n  sources:\n    - name: a\n      path: a.jsonl\n      verifier: exact\n"


@pytest.fixture
def recipe(tmp_path):
    def write(text, name="mine.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return str(path)
    return write


def test_shipped_recipes_are_valid_and_named_after_their_file():
    assert "quickstart" in shipped_recipes()
    for name in shipped_recipes():
        assert parse([name]).recipe.name == name


def test_a_resolved_recipe_reads_back_as_itself(recipe):
    resolved = parse(["quickstart", "seed=3"]).recipe
    assert parse([recipe(to_yaml(resolved))]).recipe == resolved


def test_nothing_is_the_quickstart():
    assert parse([]).recipe == parse(["quickstart"]).recipe


def test_overrides_reach_every_depth(recipe):
    path = recipe(GOOD + "sft: {lr: 1e-5}\n")
    r = parse([path, "sft.lr=3e-4", "merge.method=average", "merge.members=[sft]", "data.sources.0.size=7",
               "dpo.enabled=false", "data.sources.0.system_prompt=Be brief"]).recipe
    assert (r.name, r.sft.lr, r.merge.members) == ("mine", 3e-4, ["sft"])
    assert (r.data.sources[0].size, r.data.sources[0].system_prompt, r.dpo.enabled) == (7, "Be brief", False)
    assert parse([path]).recipe.sft.lr == 1e-5


SHARED = {
    "alias": "sft: &x {lr: 1e-3, betas: [0.5, 0.6]}\ndpo: *x\n",
    "merge key": "sft: &x {lr: 1e-3, betas: [0.5, 0.6]}\ndpo: {<<: *x}\n",
    "value below": "sft: {lr: 1e-3, betas: &x [0.5, 0.6]}\ndpo: {lr: 1e-3, betas: *x}\n",
}


@pytest.mark.parametrize("text", SHARED.values(), ids=SHARED)
def test_an_override_of_an_alias_changes_no_other_key(recipe, text):
    r = parse([recipe(GOOD + text), "dpo.lr=3e-4", "dpo.betas.0=0.9", "sft.betas.1=0.7"]).recipe
    assert (r.sft.lr, r.sft.betas, r.dpo.lr, r.dpo.betas) == (1e-3, (0.5, 0.7), 3e-4, (0.9, 0.6))


def test_an_override_of_a_shared_object_changes_no_other_key_nor_the_callers():
    x = {"lr": 1e-3, "betas": [0.5, 0.6]}
    sources = [{"name": "a", "path": "a.jsonl", "verifier": "exact"}]
    for data, overrides in (({"sft": x, "dpo": x}, {}), ({}, {"sft": x, "dpo": x})):
        r = load_recipe({"data": {"sources": sources}} | data, overrides | {"dpo.lr": 3e-4, "dpo.betas.0": 0.9})
        assert (r.sft.lr, r.sft.betas, r.dpo.lr, r.dpo.betas) == (1e-3, (0.5, 0.6), 3e-4, (0.9, 0.6))
        assert x == {"lr": 1e-3, "betas": [0.5, 0.6]}


def test_a_recipe_that_holds_itself_is_refused():
    data = {"sft": {}}
    data["sft"]["x"] = data
    with pytest.raises(UserError, match="a value that holds itself"):
        load_recipe(data)


@settings(max_examples=60, deadline=None)
@given(st.recursive(st.integers(), lambda below: st.lists(below, max_size=3) | st.dictionaries(
    st.sampled_from("abc"), below, max_size=3), max_leaves=8))
def test_aliases_are_values_of_their_own(tree):
    document = {"first": tree, "second": [tree, {"below": tree}], "third": {"x": tree}}
    read = read_yaml(yaml.safe_dump(document), (), str, {})
    assert read == document
    objects = []

    def walk(value):
        if isinstance(value, dict | list):
            objects.append(id(value))
            for below in value.values() if isinstance(value, dict) else value:
                walk(below)

    walk(read)
    assert len(objects) == len(set(objects))


@pytest.mark.parametrize("text, arguments, message", [
    (GOOD + "sft: {lrr: 1}\n", [], "mine.yaml:6: sft.lrr=1: unknown key; did you mean sft.lr?"),
    (GOOD + "sampel: {k: 1}\n", [], "mine.yaml:6: sampel={'k': 1}: unknown key; did you mean sample?"),
    (GOOD + "sft:\n  lr: fast\n", [], "mine.yaml:7: sft.lr=fast: input should be a valid number"),
    (GOOD + "sft:\n  lr: -1\n", [], "mine.yaml:7: sft.lr=-1: input should be greater than 0"),
    (GOOD + "sft:\n  schedule: cos\n", [], "mine.yaml:7: sft.schedule=cos: input should be 'cosine', 'linear' or"),
    (GOOD + "select: {pass_rate_min: 0.9, pass_rate_max: 0.1}\n", [],
     "mine.yaml:6: select: pass_rate_min=0.9 is above"),
    (GOOD, ["sft.lr=abc"], "command line: sft.lr=abc: input should be a valid number"),
    (GOOD, ["sft.x.y=1"], "command line: sft.x={'y': 1}: unknown key"),
    (GOOD, ["data.sources.3.size=1"], "data.sources is a list of 1"),
    (GOOD, ["seed.x=1"], "command line: seed"),
    (GOOD, ["--paln"], "--paln: unknown option"),
    (GOOD, ["other.yaml"], "other.yaml: a second recipe"),
    (GOOD, ["merge.method=ema"], "merge.method=ema takes the average that dpo keeps; set dpo.ema_decay"),
    (GOOD, ["merge.weights=[1.0]"], "weights has 1 entries, members 2"),
    (GOOD, ["sft.bema_lag=5"], "bema_lag is read with bema=true only; leave it out, or set bema=true"),
    (GOOD, ["dpo.bema=true", "dpo.ema_decay=0.5"], "ema_decay=0.5 is not read with bema=true; leave one of them out"),
    (GOOD, ["dpo.rpo_eta=2.0"], "rpo_eta is read with loss=rpo only; leave it out, or set loss=rpo"),
    (GOOD, ["merge.t=0.2"], "t is not read by method=last; leave it out, or set method=slerp or warp"),
    (GOOD, ["merge.members=[sft]"], "members is not read by method=last; leave it out, or set method=average or"),
    (GOOD, ["merge.method=slerp", "merge.weights=[1.0, 2.0]"], "weights is not read by method=slerp"),
    (GOOD, ["merge.method=average", "merge.t=0.2"], "t is not read by method=average"),
    (GOOD, ["merge.method=average", "merge.weights=[1.0, -2.0]"], "an average must be above 0"),
    (GOOD, ["merge.method=warp", "merge.members=[dpo]"], "method=warp needs two members, members has 1"),
    (GOOD, ["merge.method=warp", "merge.members=[start, dpo]"], "members names start, but method=warp adds"),
    (GOOD, ["merge.method=task_arithmetic"], "method=task_arithmetic needs weights"),
    (GOOD, ["merge.method=task_arithmetic", "merge.weights=[0, 1]"], "method=task_arithmetic needs weights"),
    (GOOD, ["merge.method=slerp", "sft.enabled=false"], "members names sft, but sft.enabled=false"),
    ("data: {sources: [{name: a, path: x, verifier: exact}, {name: a, path: y, verifier: exact}]}", [],
     "two sources share a name"),
    ("data: {sources: [{name: a, path: x}]}", [], "mine.yaml:1: data.sources.0: verifier is missing"),
    ("data: {sources: [{path: x, verifier: exact}]}", [], "data.sources.0.name is missing; name of the source"),
    ("data: {sources: [{name: a, verifier: exact}]}", [], "name exactly one of path and reasoning_gym"),
    ("rounds: 2\n", [], "data.sources is empty"),
    (GOOD + "seed: 1\nseed: 2\n", [], "mine.yaml:7: seed: duplicate key"),
    (GOOD + "  x: [\n", [], "not YAML"),
    ("", [], "mine.yaml: the file is empty"),
    ("- a\n", [], "mine.yaml:1: a recipe is a mapping of keys to values, this is a list"),
    (GOOD + "name: ../up\n", [], "mine.yaml:6: name=../up: String should match pattern"),
])
def test_a_mistake_is_one_line_that_says_where(recipe, text, arguments, message):
    path = recipe(text)
    with pytest.raises(UserError) as e:
        parse([path, *arguments])
    assert message.lower() in str(e.value).lower() and "\n" not in str(e.value), str(e.value)


def test_several_mistakes_are_a_line_each(recipe):
    with pytest.raises(UserError) as e:
        parse([recipe(GOOD + "sft: {lrr: 1}\ndpo: {beta: x}\n")])
    assert len(str(e.value).splitlines()) == 2


def test_missing_files_are_named(tmp_path):
    with pytest.raises(UserError, match="no such recipe; did you mean quickstart"):
        parse(["quickstrat"])
    with pytest.raises(UserError, match=r"gone\.yaml: no such recipe file"):
        parse([str(tmp_path / "gone.yaml")])
    (tmp_path / "latin.yaml").write_bytes("name: caf\xe9\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.yaml: not UTF-8"):
        parse([str(tmp_path / "latin.yaml")])


def test_help_names_every_key_with_type_default_and_meaning():
    text = help_text(["all"])

    def keys(model, prefix):
        for name, info in model.model_fields.items():
            inner = sections_of(info.annotation)
            for section in inner:
                yield from keys(section, prefix + name + (".N." if get_origin(info.annotation) is list else "."))
            if not inner:
                assert info.description, prefix + name
                yield prefix + name

    for key in keys(Recipe, ""):
        assert f"\n  {key}  (" in text, key
    assert "  sft.lr  (float, default 1e-05, > 0" in text
    assert "  dpo.lr  (float, default 1e-06" in text
    assert "data.sources.N.name  (str, required)" in text


def test_help_is_short_and_says_more_of_what_it_is_asked_about(tmp_path):
    short, sections = help_text([]), [n for n, i in Recipe.model_fields.items() if sections_of(i.annotation)]
    assert len(short.splitlines()) < 120 and "sft.lr" not in short and "\n  seed  (int, default 0" in short
    assert all(re.search(rf"^  {name:<15} \w", short, re.M) for name in sections)
    text = help_text(["sft", "dpo"])
    assert "  sft.lr  (float" in text and "  dpo.beta  (float" in text and "evaluate" not in text
    assert "\n  annotate.k  (" in help_text(["annotate"]) and "method=llama3" in help_text(["annotate"])
    assert "average.sft.N.lr" in help_text(["llama3"]) and "sft.lr  (" not in help_text(["llama3"])
    with pytest.raises(UserError, match=r"--help smaple: no section or method has this name; did you mean sample\?"):
        help_text(["smaple"])
    assert parse(["--help", "sft", "dpo"]).help == ["sft", "dpo"] and parse(["quickstart", "-h"]).help == []
    assert parse(["llama3", "--help"]).help == ["llama3"] and parse(["quickstart"]).help is None
    (tmp_path / "a.yaml").write_text("method: nosuch\n")
    assert main([str(tmp_path / "a.yaml"), "--help"]) == 1


@pytest.mark.parametrize(("multiplies", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_auto_computes_in_bf16_only_where_the_device_multiplies_it(tiny_recipe, monkeypatch, capsys, multiplies, dtype):
    monkeypatch.setattr(World, "multiplies_bf16", multiplies)
    assert main([str(tiny_recipe), "dtype=auto", "--plan"]) == 0
    assert f"\ndtype: {dtype}\n" in capsys.readouterr().out
