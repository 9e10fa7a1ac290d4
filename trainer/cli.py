"""Command line and recipe files to a checked Recipe; every mistake is one line with its place."""

import copy
import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from strop.trainer.config import Recipe
from strop.trainer.engines import picked, sections_of, spoken, tag_key, tag_of
from strop.trainer.errors import UserError
from strop.trainer.help import SHIPPED, help_text, shipped_recipes
from strop.trainer.method_recipes import RECIPES, has_key, recipe_class
from strop.trainer.planning.hardware import Hardware, hardware_of
from strop.trainer.reports.commands import VERBS, run_verb

SECRET = re.compile(r"(api|access|private|secret|auth|ssh|account|signing|encryption)[\W_]*keys?(?![a-z])"
                    r"|token(?!(?-i:[a-z]))|(api|access|auth|hf|hub|bearer|refresh)[\W_]*tokens|secrets?(?!(?-i:[a-z]))"
                    r"|passphrase|passw(or)?ds?|(^|[\W_])(auth|pwd)(?![a-z])|authorization|bearer|credentials?", re.I)
MOST, DEEPEST, LONGEST = 100_000, 32, 1 << 20  # entries (aliases written out), levels and bytes of a recipe
@dataclass
class Command:
    recipe: Recipe | None = None
    plan: bool = False
    on: Hardware | None = None  # what the plan is for, if not this machine
    debug: bool = False
    help: list[str] | None = None  # what --help is about; empty: everything in short
    verb: str | None = None  # one of VERBS, with its arguments, instead of a recipe
    arguments: list[str] = field(default_factory=list)


@dataclass
class _Read:
    """A YAML tree and the place of each key."""

    data: dict = field(default_factory=dict)
    lines: dict[tuple, str] = field(default_factory=dict)


def parse(argv: list[str]) -> Command:
    """Raises UserError, one mistake a line."""
    if argv[:1] and argv[0] in VERBS:
        return Command(verb=argv[0], arguments=[a for a in argv[1:] if a != "--debug"], debug="--debug" in argv)
    command, read, overrides, rest = Command(), None, [], iter(argv)
    for argument in rest:
        if argument in ("--help", "-h"):
            command.help = []
        elif argument == "--plan":
            command.plan = True
        elif argument == "--debug":
            command.debug = True
        elif argument.partition("=")[0] == "--on":
            command.on = hardware_of(argument.partition("=")[2] if "=" in argument else next(rest, ""))
        elif argument.startswith("-"):
            raise UserError(f"{argument.partition('=')[0]}: unknown option; see --help")
        elif "=" in argument:
            overrides.append(argument)
        elif command.help is not None:
            command.help.append(argument)
        elif read is None:
            read = read_recipe(find_recipe(argument))
        else:
            raise UserError(f"{argument}: a second recipe; give one, and override its keys with key=value")
    if command.help is not None:
        if read and not command.help and read.data.get("method", "rounds") != "rounds":
            command.help.append(str(read.data["method"]))
        return command
    if command.on and not command.plan:
        raise UserError("--on: is read with --plan only, a run takes the machine it is started on; add --plan")
    read = read or read_recipe(find_recipe("quickstart"))
    for override in overrides:
        apply_override(read, override)
    command.recipe = check(read)
    return command


def answer(command: Command) -> None:
    """Carries out a command that runs no recipe: help, or one of VERBS."""
    if command.verb:
        run_verb(command.verb, command.arguments)
    else:
        print(help_text(command.help), flush=True)


def find_recipe(argument: str) -> Path:
    """A recipe file by its path or by the name it ships under. Raises UserError if there is neither."""
    path = Path(argument)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise UserError(f"{path}: no such recipe file")
        return path
    shipped = SHIPPED / f"{argument}.yaml"
    if not shipped.is_file():
        near = difflib.get_close_matches(argument, [*VERBS, *shipped_recipes()], n=1, cutoff=0.6)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"{argument}: no such recipe; {hint}there are {', '.join(shipped_recipes())}, or name a .yaml "
                         f"file (other commands: {', '.join(VERBS)})")
    return shipped


def read_recipe(path: Path) -> _Read:
    """The file as data with the line of every key; its stem is the default name. Raises UserError on broken YAML."""
    try:
        if path.stat().st_size > LONGEST:
            raise UserError(f"{path}: has more than {LONGEST:,} bytes; a recipe names data, it does not hold it")
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not UTF-8 text ({e.reason} at byte {e.start})") from e
    read = _Read()
    read.data = read_yaml(text, (), lambda line: f"{path}:{line}", read.lines)
    if not read.lines:
        raise UserError(f"{path}: the file is empty; a recipe is a mapping of keys, see --help")
    if not isinstance(read.data, dict):
        raise UserError(f"{path}:1: a recipe is a mapping of keys to values, this is a {type(read.data).__name__}")
    if "name" not in read.data:
        read.data["name"] = path.stem
        read.lines[("name",)] = f"{path} (a run without a name takes the file's; set name=)"
    return read


def read_yaml(text: str, at: tuple, where: Callable[[int], str], lines: dict[tuple, str]) -> Any:
    """The value of the key `at` from YAML; notes where(line) of each key in `lines`. Raises UserError, also where
    aliases make it endless or huge."""
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check_node(loader, node, at, where, lines)
        return unshared(loader.construct_document(node))
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        line = mark.line if mark else text.count("\n", 0, getattr(e, "position", 0))
        problem = getattr(e, "problem", None) or str(e).splitlines()[0]
        raise UserError(f"{where(line + 1)}: not YAML ({problem})") from None  # the cause quotes the text
    except RecursionError:
        raise UserError(f"{where(1)}: not YAML that a recipe needs (nested too deeply)") from None


def unshared(value: Any, depth: int = 0) -> Any:
    """A copy in which no two keys hold one object, as those with aliases of YAML do: an override of one must not change
    the other. Raises UserError at more than DEEPEST levels."""
    if depth > DEEPEST:
        raise UserError(f"recipe: more than {DEEPEST} levels, or a value that holds itself; a recipe needs neither")
    if isinstance(value, dict):
        return {key: unshared(below, depth + 1) for key, below in value.items()}
    if isinstance(value, list):
        return [unshared(below, depth + 1) for below in value]
    return copy.deepcopy(value)


def _check_node(loader, node, at: tuple, where: Callable[[int], str], lines: dict) -> None:
    here = where(node.start_mark.line + 1)
    if len(lines) > MOST or len(at) > DEEPEST:
        raise UserError(f"{here}: {'.'.join(map(str, at[:4]))}: not YAML that a recipe needs (an alias that holds "
                         f"itself, more than {MOST:,} entries or more than {DEEPEST} levels)")
    if node.tag.rpartition(":")[2] in ("omap", "pairs", "set"):
        raise UserError(f"{here}: not YAML that a recipe needs (the tag {node.tag})")
    lines[at] = here
    if isinstance(node, yaml.ScalarNode):
        try:
            value = loader.construct_object(node)
            str(value).encode()  # fails on lone surrogates and on integers of thousands of digits
        except (ValueError, LookupError, AttributeError, TypeError) as e:  # what PyYAML raises for e.g. !!float x
            raise UserError(f"{here}: not YAML ({node.tag.rpartition(':')[2]}: {str(e)[:100]})") from None
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            _check_node(loader, value, (*at, i), where, lines)
    else:
        seen = set()
        for key, value in node.value:
            here, kind = where(key.start_mark.line + 1), key.tag.rpartition(":")[2]
            name = key.value if isinstance(key, yaml.ScalarNode) else "?"
            if name == "?" or (kind not in ("str", "merge") and len(at) <= 4):  # deeper are arguments of a library
                raise UserError(f"{here}: {name}: a key must be text, this is {kind}; correct it or put it in quotes")
            if name in seen:
                raise UserError(f"{here}: {name}: duplicate key")
            seen.add(name)
            _check_node(loader, value, (*at, name), where, lines)
            lines[(*at, name)] = here


def apply_override(read: _Read, override: str) -> None:
    """Sets `a.b.0.c=value` in the tree. Raises UserError if the path leads nowhere or the value is not YAML."""
    key, _, text = override.partition("=")
    refuse_secrets({key: None}, (), {(): "command line"})
    if len(key) > 200:
        raise UserError(f"command line: {key[:80]}...: no such key; keys look like sample.k or data.sources.0.path")
    value = read_yaml(text, tuple(key.split(".")), lambda line: f"command line: {key}", {})
    set_key(read, key, value, "command line")


def set_key(read: _Read, key: str, value: Any, where: str) -> None:
    """Sets the dotted key in the tree; errors about it name `where`. Raises UserError if the path leads nowhere."""
    refuse_secrets({key: value}, (), {(): where})
    path = tuple(int(part) if re.fullmatch("[0-9]{1,9}", part) else part for part in key.split("."))
    if "" in path or len(path) > DEEPEST:
        raise UserError(f"{where}: {key}={shown(value)}: no such key; keys look like sample.k or data.sources.0.path")
    at: Any = read.data
    for i, part in enumerate(path):
        last, above = i == len(path) - 1, ".".join(map(str, path[:i]))
        if isinstance(at, list):
            if not isinstance(part, int) or part >= len(at):
                raise UserError(f"{where}: {key}={shown(value)}: {above} is a list of {len(at)}; its entries are .0, "
                                 ".1, ...")
        elif not isinstance(at, dict):
            raise UserError(f"{where}: {key}={shown(value)}: {above} is a value, it has no keys")
        elif not last and at.get(part) is None:
            at[part] = {}
        if last:
            at[part] = unshared(value)
        else:
            at = at[part]
    read.lines = {k: v for k, v in read.lines.items() if k[:len(path)] != path} | {path: where}


def load_recipe(recipe: str | Path | dict | Recipe = "quickstart", overrides: dict[str, Any] | None = None) -> Recipe:
    """A checked recipe: from a YAML file, the name of a shipped recipe, a dict of keys or another recipe.

    overrides: dotted keys and their values, e.g. {"sample.k": 16}. Raises UserError, one mistake per line."""
    if isinstance(recipe, Recipe | dict):
        read = _Read(unshared(recipe) if isinstance(recipe, dict) else recipe.model_dump(mode="json"))
    else:
        read = read_recipe(find_recipe(str(recipe)))
    for key, value in (overrides or {}).items():
        set_key(read, key, value, "overrides")
    return check(read)


def check(read: _Read) -> Recipe:
    """Validates. Raises UserError with a line for each mistake: where, key=value, what is wrong, the nearest name."""
    refuse_secrets(read.data, (), read.lines)
    method = read.data.get("method", "rounds")
    if isinstance(method, str) and method not in RECIPES:
        near = difflib.get_close_matches(method, RECIPES, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}? there are" if near else "there are"
        raise UserError(f"{read.lines.get(('method',), 'recipe')}: method={shown(method)}: no such method; {hint} "
                        f"{', '.join(RECIPES)}")
    try:
        return recipe_class(read.data).model_validate(read.data)
    except ValidationError as e:
        raise UserError(*dict.fromkeys(_explain(error, read) for error in e.errors()[:20])) from e


def shown(value) -> str:
    text = str(value)
    return text if len(text) <= 200 else text[:197] + "..."


def refuse_secrets(value, path: tuple, lines: dict) -> None:
    """Raises UserError at a key that is named like a secret, without its value: a recipe goes into files and logs."""
    for key, below in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        if isinstance(key, str) and SECRET.search(key):
            near = (lines[p] for p in ((*path, key)[:n] for n in range(len(path) + 1, -1, -1)) if p in lines)
            where = next(near, "recipe")
            raise UserError(f"{where}: {'.'.join(map(str, (*path, key)))}: secrets are not taken from recipes or the "
                             "command line, which are written down; set the environment variable of the service")
        refuse_secrets(below, (*path, key), lines)


def _explain(error: dict, read: _Read) -> str:
    at, path, is_tag = read.data, [], False
    for part in error["loc"]:  # unions put names of types and engines into loc; they are no keys of ours
        if is_tag:
            is_tag = False
            continue
        if isinstance(at, dict) and (part in at or error["type"] in ("missing", "extra_forbidden")):
            at = at.get(part)
        elif isinstance(at, list) and isinstance(part, int) and part < len(at):
            at = at[part]
        else:
            break
        path.append(part)
        is_tag = len(_sections_at(path, read.data, every=True)) > 1 and not isinstance(at, list)
    if error["type"] == "union_tag_invalid":
        key = tag_key(_sections_at(path, read.data, every=True)[0])
        path, at = [*path, key], at.get(key) if isinstance(at, dict) else at
    below = [line for k, line in read.lines.items()
             if k[:len(path)] == tuple(path) != () and line in ("command line", "overrides")]
    above = [read.lines[k] for k in (tuple(path[:n]) for n in range(len(path), -1, -1)) if k in read.lines]
    where = (below + above + ["recipe"])[0]
    key = ".".join(map(str, path))
    if error["type"] == "union_tag_invalid":
        tags = [tag_of(s) for s in _sections_at(path[:-1], read.data, every=True)]
        return f"{where}: {key}={shown(at)}: input should be {' or '.join(tag for tag in tags if tag != 'models')}"
    if error["type"] == "extra_forbidden":
        engines, known = _sections_at(path[:-1], read.data, every=True), fields_at(path[:-1], read.data)
        near = difflib.get_close_matches(str(path[-1]), [n for s in engines for n in s.model_fields], n=1, cutoff=0.5)
        prefix = "".join(f"{p}." for p in path[:-1])
        hint = f"did you mean {prefix}{near[0]}?" if near else f"known there: {', '.join(known)}"
        if theirs := [spoken(s) for s in engines if path[-1] in s.model_fields]:
            mine = spoken(_sections_at(path[:-1], read.data)[0])
            hint = f"{mine} has no such key, {' or '.join(theirs)} has; remove one of them"
        elif others := [f"method={method}" for method, recipe in RECIPES.items() if has_key(recipe, path)]:
            hint = f"method={read.data.get('method', 'rounds')} has no such key, {' or '.join(others)} has"
        return f"{where}: {key}={shown(at)}: unknown key; {hint}"
    if error["type"] == "missing":
        return f"{where}: {key} is missing; {fields_meaning(path, read.data)}"
    message = error["msg"].removeprefix("Value error, ")
    if not path:  # about the recipe as a whole: it begins with the key it is about
        path = [int(p) if p.isdigit() else p for p in re.match(r"[\w.]*\w|", message)[0].split(".")]
        known = (read.lines[k] for k in (tuple(path[:n]) for n in range(len(path), -1, -1)) if k in read.lines)
        return f"{next(known, 'recipe')}: {message}"
    message = message[:1].lower() + message[1:] if message.startswith("Input") else message
    if path[-1] in ("key_env", "base_url"):  # the value may hold a secret
        return f"{where}: {key}: {message}"
    if not path or (isinstance(at, dict | list) and error["type"] == "value_error"):
        return f"{where}: {key + ': ' if key else ''}{message}"
    return f"{where}: {key}={shown(at)}: {message}"


def _sections_at(path: list, data: Any = None, every: bool = False) -> list[type[BaseModel]]:
    """The section at a path, in a list of one; empty if there is none. data: the recipe's, which says which engine's
    section it is where there are several. every: the sections of all engines."""
    sections = [recipe_class(data) if isinstance(data, dict) else Recipe]
    for i, part in enumerate(path):
        if not isinstance(part, int):
            fields = sections[0].model_fields if sections else {}
            sections = sections_of(fields[part].annotation) if part in fields else []
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            data = None
        if not isinstance(data, list) and not (every and i == len(path) - 1):
            sections = (picked(sections, data) if len(sections) > 1 else sections) or sections[:1]
    return sections


def fields_at(path: list, data: Any = None) -> list[str]:
    return [name for section in _sections_at(path, data)[:1] for name in section.model_fields]


def fields_meaning(path: list, data: Any = None) -> str:
    for section in _sections_at(path[:-1], data)[:1]:
        if path[-1] in section.model_fields:
            return section.model_fields[path[-1]].description or ""
    return ""
