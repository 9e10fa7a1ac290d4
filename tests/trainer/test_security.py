"""Nothing from users or models is executed or unpickled, no connection is opened, nothing private is written down."""

import ast
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from strop.trainer.cli import SECRET
from strop.trainer.config import Model, Recipe
from strop.trainer.errors import UserError
from strop.trainer.main import main
from strop.trainer.models.loading import ModelFolder

REPO = Path(__file__).parents[2]

# puts the program under an audit hook that notes what a run has no business with, and who asked for it
AUDITED = """
import json, sys, traceback
import strop.trainer.methods.running  # what libraries do while they load is not the run's
WATCHED = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "pickle.find_class",
           "os.system", "os.posix_spawn", "subprocess.Popen", "urllib.Request", "ftplib.connect", "smtplib.connect")
def hook(event, args):
    if event in WATCHED:
        frames = [f"{f.filename}:{f.name}" for f in traceback.extract_stack()[:-1]]
        with open(REPORT, "a") as f:
            f.write(json.dumps([event, repr(args)[:200], frames[-6:]]) + "\\n")
sys.addaudithook(hook)
"""


@pytest.mark.parametrize("program", [["-m", "strop.trainer.main"], [str(REPO / "trainer" / "main.py")]])
def test_no_module_of_the_working_directory_is_imported(program, tiny_recipe, tmp_path):
    """Data and recipes may lie in a folder that somebody else writes to."""
    for name in ("json", "random", "typing_extensions", "sympy"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\nraise ImportError('mine')\n")
    done = subprocess.run([sys.executable, *program, str(tiny_recipe), "--plan"], cwd=tmp_path, text=True,
                          capture_output=True, timeout=120)
    assert done.returncode == 0 and not (tmp_path / "executed").exists(), done.stderr


@pytest.mark.slow
def test_a_run_in_an_empty_network_is_the_same(tiny_recipe, tmp_path):
    """Without any network, not even a loopback."""
    command = ["unshare", "--net", sys.executable, str(REPO / "trainer" / "main.py"), str(tiny_recipe), "rounds=1"]
    if os.geteuid() or subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode:
        pytest.skip("may not make a network namespace")
    done = subprocess.run(command, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_a_run_opens_no_connection_unpickles_nothing_and_writes_no_secret(launcher, tiny_recipe, tmp_path):
    secrets = {"HF_TOKEN": "hf_do_not_write_me", "WANDB_API_KEY": "do_not_write_me_1", "HF_HUB_OFFLINE": "0",
               "AWS_SECRET_ACCESS_KEY": "do_not_write_me_2", "OPENAI_API_KEY": "sk-do_not_write_me"}
    report, log = tmp_path / "seen.jsonl", tmp_path / "log"
    launcher.start(argv=[str(tiny_recipe), "rounds=1", "log.tensorboard=true"], log=str(log), env=secrets,
                   code=f"REPORT = {str(report)!r}\n{AUDITED}")
    assert launcher.wait() == 0, log.read_text()
    seen = [json.loads(line) for line in report.read_text().splitlines()]
    children = [s for s in seen if s[0] == "subprocess.Popen"]
    assert all("strop.trainer.scoring.sandbox" in s[1] for s in children) and children, children  # the verifier's child
    assert [s for s in seen if s[0] != "subprocess.Popen"] == []
    run = tmp_path / "runs" / "tiny"
    files = [p for p in run.rglob("*") if p.is_file()]
    assert {"config.yaml", "report.html", "metrics.jsonl", "README.md"} <= {p.name for p in files}
    for file in files:
        assert b"do_not_write_me" not in file.read_bytes(), file
    assert "do_not_write_me" not in log.read_text()
    assert run.stat().st_mode & 0o777 == 0o700


def test_an_error_shows_no_secret_either(tiny_recipe, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_do_not_write_me")
    for argument in ("hf_token=hf_do_not_write_me", "data.sources.0.reasoning_gym_config={api_key: hf_do_not_write_me}",
                     "model.password=[hf_do_not_write_me", "wandb.WANDB_API_KEY=hf_do_not_write_me"):
        assert main([str(tiny_recipe), argument]) == 1
        text = capfd.readouterr()
        assert "secrets are not taken from recipes" in text.err and "do_not_write_me" not in text.out + text.err
    assert not (tmp_path / "runs").exists()


def test_no_key_of_a_recipe_is_named_like_a_secret():
    def names(schema):
        for name, value in schema.items():
            yield name
            if isinstance(value, dict):
                yield from names(value)

    assert not [name for name in names(Recipe.model_json_schema()) if SECRET.search(name)]


def test_run_directories_are_private_whatever_the_umask(tiny_recipe, tmp_path, capfd):
    before = os.umask(0)
    try:
        main([str(tiny_recipe), "data.test=500"])
    finally:
        os.umask(before)
    assert (tmp_path / "runs" / "tiny").stat().st_mode & 0o777 == 0o700


class Bomb:
    """Pickles to something that leaves a file behind when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_pickles_beside_safetensors_are_not_touched(tiny_model, tiny_recipe, tmp_path, capfd):
    """Neither a pickle of weights, nor one under a name that some loader would like, nor one in the run directory."""
    model, fired = tmp_path / "model", tmp_path / "fired"
    shutil.copytree(tiny_model, model)
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "tokenizer.pkl", "adapter_model.bin"):
        (model / name).write_bytes(pickle.dumps(Bomb(fired)))
    assert main([str(tiny_recipe), f"model.path={model}", "rounds=1"]) == 0
    (model / "model.safetensors").rename(model / "adapter_model.safetensors")  # only the pickle would be left to load
    assert main([str(tiny_recipe), f"model.path={model}", "rounds=1", "name=other"]) == 1
    assert "model.safetensors: not readable" in capfd.readouterr().err and not fired.exists()


CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({marker!r}).touch()


class MineConfig(LlamaConfig):
    model_type = "mine"


class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig
"""


def test_code_of_a_model_runs_if_asked_and_loudly(tiny_model, tiny_recipe, tmp_path, monkeypatch, capfd):
    """That it does not run otherwise is a case of test_bad_input."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    model, marker = tmp_path / "model", tmp_path / "executed"
    shutil.copytree(tiny_model, model)
    (model / "mine.py").write_text(CODE.format(marker=str(marker)))
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "mine", "architectures": ["MineForCausalLM"],
               "auto_map": {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.MineForCausalLM"}}
    (model / "config.json").write_text(json.dumps(config))
    arguments = [str(tiny_recipe), f"model.path={model}", "rounds=1"]
    assert main(arguments) == 1 and not marker.exists()
    assert "set model.trust_remote_code=true only if you trust the author of that code" in capfd.readouterr().err
    code = main([*arguments, "model.trust_remote_code=true"])
    text = capfd.readouterr()
    assert code == 0, text.err
    assert marker.exists() and "warning: model.trust_remote_code=true: Python code in" in text.out
    assert (tmp_path / "runs/tiny/final/mine.py").exists()  # what the final folder needs to be loaded elsewhere


def test_a_chat_template_reaches_neither_files_nor_python(tiny_model, tmp_path):
    from strop.trainer.data.chat import encode_prompt

    secret = tmp_path / "secret"
    secret.write_text("do_not_read_me")
    for text in ("{{ cycler.__init__.__globals__.os.popen('id').read() }}", f"{{% include '{secret}' %}}",
                 "{{ self.__init__.__globals__ }}", "{% for i in range(10**10) %}{% endfor %}"):
        (tmp_path / "t.jinja").write_text(text)
        tokenizer = ModelFolder(tiny_model, Model(chat_template=str(tmp_path / "t.jinja"))).tokenizer()
        with pytest.raises(UserError, match="the chat template refuses the messages"):
            encode_prompt(tokenizer, [{"role": "user", "content": "x"}])


def test_text_of_users_is_no_template(tiny_recipe, tmp_path, capfd):
    """Braces and control tokens in prompts stay what they are: text."""
    from strop.trainer.run.tables import read_table

    lines = [{"prompt": "{{ 7 * 7 }} {prompt} {0.__class__} <|im_end|> %s" + str(i), "answer": "1"} for i in range(40)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    main([str(tiny_recipe), "rounds=1"])
    run = tmp_path / "runs" / "tiny"
    asked = {r["messages"][0]["content"] for r in read_table(run / "prompts/prompts.parquet").to_pylist()}
    assert asked == {r["prompt"] for r in lines}
    tokens = read_table(run / "round-00/sample/shard-00000.parquet")["prompt_tokens"].to_pylist()[0]
    assert tokens.count(2) == 1  # one end of turn, the template's; the one spelt out is characters


def test_nothing_in_the_package_loads_pickles_or_runs_text():
    """Calls that would are not written anywhere; YAML, templates and code of models have one safe way each."""
    names = {"eval", "exec", "compile", "__import__"}
    attributes = {("torch", "load"), ("os", "system"), ("yaml", "load"), ("yaml", "unsafe_load"), ("yaml", "full_load")}
    modules = {"pickle", "cPickle", "dill", "marshal", "shelve", "joblib", "cloudpickle"}
    for file in (REPO / "trainer").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            where = f"{file.name}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import | ast.ImportFrom):
                found = {a.name for a in node.names} | {getattr(node, "module", None)}
                assert not found & modules, where
            if isinstance(node, ast.Call):
                # checker.py runs in a box, which is what runs the code of models
                runs = isinstance(node.func, ast.Name) and node.func.id in names
                assert not runs or file.name == "checker.py", where
                if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
                    assert (node.func.value.id, node.func.attr) not in attributes, where
                for k in node.keywords:
                    risky = k.arg in ("shell", "allow_pickle", "trust_remote_code")
                    assert not (risky and isinstance(k.value, ast.Constant) and k.value.value), where


def test_torch_is_told_to_load_safetensors_only(tiny_model, tmp_path):
    from strop.trainer.models.loading import ModelFolder

    folder = tmp_path / "m"
    shutil.copytree(tiny_model, folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "fired")))
    with pytest.raises(UserError, match="transformers cannot load it"):
        ModelFolder(folder).load(torch.float32, torch.device("cpu"))
    assert not (tmp_path / "fired").exists()
