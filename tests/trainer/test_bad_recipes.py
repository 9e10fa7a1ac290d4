"""Recipes and command lines that are wrong: one line with the key, never a hang, a traceback or a secret."""

import os
import subprocess
import sys
import time

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from strop.kernels.layout import Group
from strop.trainer.cli import load_recipe, parse
from strop.trainer.config import Lora
from strop.trainer.errors import UserError
from strop.trainer.models.loading import ModelFolder
from strop.trainer.training.batch import MOST_ROWS, Example, plan_steps

BOMB = "\n".join(["a0: &a0 [x, x, x, x, x, x, x, x, x]"] + [
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)])
MERGES = "\n".join(["a0: &a0 {x: 1}"] + [
    f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, 10)])
YAML = {  # name: (lines that are added, the first of them being line 20, what is said)
    "a bomb": (BOMB, "not YAML that a recipe needs"),
    "a bomb of merges": (MERGES, "not YAML that a recipe needs"),
    "an alias of itself": ("x: &x [1, *x]", "tiny.yaml:20: x.1.1.1: not YAML that a recipe needs"),
    "a mapping of itself": ("x: &x {y: *x}", "tiny.yaml:20: x.y.y.y: not YAML that a recipe needs"),
    "deep": ("x: " + "[" * 5000 + "]" * 5000, "not YAML that a recipe needs"),
    "pairs": ("x: !!pairs [token: sk-secret]", "tiny.yaml:20: not YAML that a recipe needs"),
    "a null key": ("~: 3", "tiny.yaml:20: ~: a key must be text, this is null"),
    "a key that YAML takes for a boolean": ("on: 3", "tiny.yaml:20: on: a key must be text, this is bool"),
    "a number for a key": ("merge: {3: 4}", "tiny.yaml:20: 3: a key must be text, this is int"),
    "a list for a key": ("? [a, b]\n: 1", "tiny.yaml:20: ?: a key must be text, this is seq"),
    "an empty key": ("'': 1", "tiny.yaml:20: =1: unknown key"),
    "a date that is none": ("seed: 2020-13-45", "tiny.yaml:20: not YAML (timestamp"),
    "a float that is none": ("seed: !!float x", "tiny.yaml:20: not YAML (float"),
    "a boolean that is none": ("seed: !!bool x", "tiny.yaml:20: not YAML (bool"),
    "digits without end": ("seed: " + "9" * 5000, "tiny.yaml:20: not YAML (int"),
    "hex digits without end": ("seed: 0x" + "f" * 9000, "tiny.yaml:20: not YAML (int"),
    "half a surrogate": ('sample: {k: "\\ud800"}', "tiny.yaml:"),
    "NUL": ("# \0", "tiny.yaml:20: not YAML (unacceptable character"),
    "two documents": ("--- \nx: 1", "not YAML (but found another document)"),
    "megabytes": ("#" * (1 << 20), "tiny.yaml: has more than 1,048,576 bytes"),
    "a key in another alphabet": ("ѕft: {lr: 1.0e-3}", "did you mean sft?"),
    "a line break in a key": ('"a\\nerror: b": 1', "tiny.yaml:20: a\\nerror: b=1: unknown key"),
    "a terminal's codes in a key": ('"\\e[2J": 1', "tiny.yaml:20: \\x1b[2J=1: unknown key"),
}


def told(*arguments) -> str:
    with pytest.raises(UserError) as e:
        parse([str(a) for a in arguments])
    return str(e.value)


@pytest.mark.parametrize("name", YAML)
def test_yaml_that_no_recipe_needs_is_one_line_at_once(name, tiny_recipe):
    text, said = YAML[name]
    tiny_recipe.write_text(tiny_recipe.read_text() + text + "\n", encoding="utf-8")
    started = time.perf_counter()
    line = told(tiny_recipe)
    assert said in line and "\n" not in line and len(line) < 700 and line.isprintable(), line
    assert time.perf_counter() - started < 5 and "sk-secret" not in line


ARGUMENTS = {
    "=5": "command line: =5: no such key", "data..test=3": "command line: data..test=3: no such key",
    ".=1": "no such key", "seed.=1": "command line: seed.=1: no such key",
    "a" + ".a" * 9999 + "=1": "no such key",
    "data.sources.99999999999999999999=1": "data.sources is a list of 1", "data.sources.²=1": "is a list of 1",
    "sample.k=" + "9" * 5000: "command line: sample.k: not YAML", "sample.k=[": "command line: sample.k: not YAML",
    "sample.k=x\udcff": "command line: sample.k: not YAML", "sample.k={a: 1, a: 2}": "sample.k: a: duplicate key",
    "sft.lr=a\\nb\x1b[2J": "command line: sft.lr: not YAML", "name=" + "a" * 999 + " ": "String should match pattern",
    "output_dir=~nosuchuser/x": "output_dir=~nosuchuser/x: there is no user nosuchuser",
    "model.path=~nosuchuser/m": "there is no user", 'model.chat_template="a\\0b"': "a path cannot hold a NUL character",
    "lora.dropout=1.0": "lora.dropout=1.0: input should be less than 1", "sft.betas=[0.9, 1.0]": "sft.betas.1=1.0",
    "sft.eps=1.0e-60": "sft.eps=1e-60: is too close to 0", "dpo.beta=1.0e-60": "dpo.beta",
    "sample.temperature=1.0e-60": "sample.temperature", "lora.alpha=1.0e+300": "lora.alpha=1e+300",
    "sft.epochs=1.0e+9": "sft.epochs", "sample.k=100000000": "sample.k", "rounds=1000000000": "rounds",
    "sft.snapshots=1000000000": "sft.snapshots", "evaluate.bootstrap=100000000000": "evaluate.bootstrap",
    "threads=100000": "threads", "lora.rank=1000000000": "lora.rank", "data.sources.0.size=1000000000000": "size",
    "data.sources.0.share=1.0e+300": "data.sources.0.share", "seed=-1": "seed=-1",
}


@pytest.mark.parametrize("argument", ARGUMENTS, ids=range(len(ARGUMENTS)))
def test_an_override_that_is_wrong_is_one_line_with_its_key(argument, tiny_recipe):
    line = told(tiny_recipe, argument)
    assert line.startswith("command line: ") and ARGUMENTS[argument] in line and "\n" not in line, line
    assert line.isprintable() and len(line) < 11000


def leaves(tree, prefix=""):
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key


VALUES = ["-1", "0", "0.5", "1e999", ".nan", "-.inf", "1.0e-60", "1.0e+300", "1" + "0" * 40, "-" + "9" * 400, "''", "~",
          "[]", "{}", "[[1], {a: b}]", "true", '"\\0"', '"\\e[2J\\nerror: x"', "x" * 5000, "2020-01-01"]


def test_any_value_of_any_key_passes_or_is_a_line_that_names_the_key(tiny_recipe):
    recipe = parse([str(tiny_recipe)]).recipe.model_dump(mode="json")
    sources = recipe["data"].pop("sources")[0]
    keys = [*leaves(recipe), *(f"data.sources.0.{key}" for key in sources), "data", "sft", "data.sources",
            "data.sources.0"]
    data = yaml.safe_load(tiny_recipe.read_text())
    for key in keys:
        for text in VALUES:
            try:
                load_recipe(data, {key: yaml.safe_load(text)})
            except UserError as e:
                for line in str(e).splitlines():
                    assert key.split(".")[0] in line and line.isprintable() and len(line) < 900, (key, text, line)


SECRETS = ["token", "hf_token", "HF_TOKEN", "hf-token", "authToken", "authtoken", "accessTokens", "tokenValue",
           "hub.token", "api_key", "API-KEY", "apiKey", "api key", "openaiApiKeys", "private_key", "secret",
           "clientSecret", "secrets", "secretKey", "password", "passwd", "dbPassword", "PASSPHRASE", "credentials",
           "Authorization", "bearer", "wandb.api.key", "auth", "aws_secret_access_key"]


@pytest.mark.parametrize("name", SECRETS)
def test_the_value_of_a_secret_is_never_told(name, tiny_recipe):
    for arguments in ([f"{name}=sk-secret"], [f"x.{name}=sk-secret"], [f"{name}.x=sk-secret"], [f"{name}=[sk-secret"],
                      [f"x=[{{'{name}': sk-secret}}]"], [f"sample.k.x={{'{name}': sk-secret}}"],
                      [f"--{name}=sk-secret"],
                      [f"data.sources.9={{'{name}': [sk-secret]}}"], [f"x={{a: [{{'{name}': {{b: sk-secret}}}}]}}"]):
        line = told(tiny_recipe, *arguments)
        assert "sk-secret" not in line and ("secrets are not taken" in line or arguments[0].startswith("--")), line
    tiny_recipe.write_text(tiny_recipe.read_text() + f"x: [[{{'{name}': sk-secret}}]]\n")
    line = told(tiny_recipe)
    assert "tiny.yaml:20" in line and "secrets are not taken" in line and "sk-secret" not in line


@pytest.mark.parametrize("key", ["max_tokens", "maxTokens", "tokenizer", "tokens", "sft.max-tokens", "keys", "monkey"])
def test_what_is_no_secret_is_told(key, tiny_recipe):
    assert "unknown key" in told(tiny_recipe, f"{key}=7")


def test_no_name_means_the_files_and_the_line_says_so(tiny_recipe):
    spaced = tiny_recipe.with_name("my run.yaml")
    spaced.write_text(tiny_recipe.read_text().replace("name: tiny\n", ""))
    assert "my run.yaml (a run without a name takes the file's; set name=): name=my run: " in told(spaced)
    assert parse([str(spaced), "name=mine"]).recipe.name == "mine"


def test_a_tilde_is_the_home_and_a_seed_of_any_size_is_a_seed(tiny_recipe, monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    recipe = parse([str(tiny_recipe), "output_dir=~/runs", f"seed=1{'0' * 40}"]).recipe
    assert (recipe.output_dir, recipe.seed) == ("/somewhere/runs", 10**40)


@given(st.text())
def test_an_error_is_one_printable_line_whatever_it_quotes(text):
    assert str(UserError(f"a{text}")).isprintable()
    assert len(str(UserError(text, f"b{text}")).split("\n")) == 2


@pytest.mark.parametrize("weight, epochs", [(1e6, 100.0), (1.0, 1e5)])
def test_a_plan_is_bounded(weight, epochs):
    examples = [Example(str(i), Group([1], [[2]]), weight) for i in range(1000)]
    with pytest.raises(UserError, match=r"epochs=.*: 1,000 weighted rows make .*more than 50,000,000; lower epochs"):
        plan_steps(examples, epochs, 4, 0)
    assert MOST_ROWS == 50_000_000 and len(plan_steps(examples[:1], 2.0, 4, 0)) == (weight > 1) * 499_999 + 1


@pytest.mark.parametrize("modules", ["nonsense", ["q_proj", "nonsense"][1:], "(", []])
def test_an_adapter_on_nothing_names_its_key(modules, tiny_model):
    pytest.importorskip("peft")
    import torch

    from strop.trainer.training.policy import add_lora

    model = ModelFolder(tiny_model).load(torch.float32, torch.device("cpu"))
    with pytest.raises(UserError, match=r"lora\.target_modules="):
        add_lora(model, Lora(rank=2, target_modules=modules), 10**40)


def test_closed_streams_and_a_deleted_folder(tmp_path):
    run = f"{sys.executable} -m strop.trainer.main"
    (tmp_path / "gone").mkdir()
    for line, code, said in ((f"{run} --help >&-", 0, ""), (f"{run} nosuch >&- 2>&-", 1, ""),
                             (f"cd gone && rmdir ../gone && {run} quickstart", 1, "the working directory was deleted")):
        done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, env=os.environ)
        assert done.returncode == code and said in done.stderr and "Traceback" not in done.stderr, (line, done.stderr)
