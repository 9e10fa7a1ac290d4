"""What `strop --help` prints: usage, recipes, methods, and the keys of a recipe by section."""

import difflib
import itertools
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import get_args, get_origin

from strop.trainer.config import Recipe
from strop.trainer.engines import sections_of, spoken, tag_key, tag_of
from strop.trainer.errors import UserError
from strop.trainer.method_recipes import RECIPES
from strop.trainer.reports.commands import VERBS

SHIPPED = Path(__file__).parent / "recipes"
USAGE = """\
usage: strop [RECIPE | FILE.yaml] [key=value ...] [--plan [--on HARDWARE]] [--debug] [--help [SECTION | METHOD ...]]
{verbs}
Runs a post-training method: rounds of sampling, scoring and training. Without arguments it runs the recipe quickstart.

  RECIPE      a recipe that ships with Strop, see below
  FILE.yaml   a recipe of your own
  key=value   overrides a key, e.g. sample.k=16 dpo.beta=0.2 merge.members='[sft, dpo]' data.sources.0.size=500
  --plan      print the resolved recipe, what each stage would do, and the memory, time and disk it needs; start nothing
  --on        with --plan: needs on other hardware than this machine: devices x memory or GPU, e.g. 8x80GB, 1x24GB,
              8xH100; 8x8x80GB is 8 nodes of 8, 8x80GB+1000GB names a node's host memory
  --debug     show the traceback of an error
  --help      this text; --help sample dpo: the keys of these sections; --help llama3: those that only this method has;
              --help all: every key

The same command resumes a run that stopped; changing a key re-runs what depends on it.
Each of the other commands has its own --help, e.g. `strop show --help`.
In a checkout, `torchrun trainer/main.py` is `strop`; two processes: torchrun --nproc-per-node=2 trainer/main.py ...

Recipes:
{recipes}
Methods, one of which a recipe names as `method`:
{methods}"""


def help_text(topics: list[str]) -> str:
    """Usage and the names of all sections; or the keys of `topics`: sections, methods, or `all`. Raises UserError on
    an unknown one."""
    if topics == ["all"]:
        return "\n".join([usage(), "Keys, with type, default and meaning:\n", *every_key()])
    if not topics:
        return "\n".join([usage(), "Keys, with type, default and meaning:\n", *overview()])
    return "\n".join(line for topic in topics for line in about_topic(topic)).lstrip("\n")


def usage() -> str:
    verbs = "".join(f"       {verb.usage:<32} {verb.purpose}\n" for verb in VERBS.values())
    recipes = "".join(f"  {name:<15} {about(SHIPPED / f'{name}.yaml')}\n" for name in shipped_recipes())
    methods = "".join(f"  {method:<15} {recipe.model_fields['method'].description}\n"
                      for method, recipe in RECIPES.items())
    return USAGE.format(recipes=recipes, methods=methods, verbs=verbs)


def overview() -> Iterator[str]:
    """The keys that are in no section, and a line per section."""
    sections = []
    for name, info in Recipe.model_fields.items():
        if sections_of(info.annotation):
            sections += wrap(f"{name:<15} {info.description}", 2, 18)
        else:
            yield from key_lines(name, info)
    yield "\nSections; `strop --help SECTION` lists the keys of one, e.g. `strop --help sample dpo`:\n"
    yield from sections


def about_topic(topic: str) -> Iterator[str]:
    if topic in Recipe.model_fields:
        yield from key_lines(topic, Recipe.model_fields[topic])
    elif topic in list(RECIPES)[1:]:
        yield from method_lines(topic, set())
        yield "  and the sections of every method: strop --help"
    else:
        own = [(method, recipe.model_fields[topic]) for method, recipe in RECIPES.items()
               if topic in recipe.model_fields]
        if not own:
            known = ["all", *Recipe.model_fields, *list(RECIPES)[1:],
                     *(n for recipe in RECIPES.values() for n in recipe.model_fields if n not in Recipe.model_fields)]
            near = difflib.get_close_matches(topic, known, n=1, cutoff=0.5)
            raise UserError(f"--help {topic}: no section or method has this name; "
                            + (f"did you mean {near[0]}?" if near else "--help alone lists them"))
        distinct = {id(info.annotation): info for _, info in own}
        for kind, info in distinct.items():
            names = ", ".join(method for method, its in own if id(its.annotation) == kind)
            yield f"\nmethod={names}:"
            yield from key_lines(topic, info)


def every_key() -> Iterator[str]:
    for name, info in Recipe.model_fields.items():
        yield from key_lines(name, info)
    shown = set()
    for method in list(RECIPES)[1:]:
        yield from method_lines(method, shown)


def method_lines(method: str, shown: set) -> Iterator[str]:
    """The keys that a method has of its own, and its other defaults. shown: what was listed before, to which this
    adds."""
    recipe = RECIPES[method]
    sections = {id(annotation): name for name, info in Recipe.model_fields.items()
                for annotation in (info.annotation, *sections_of(info.annotation))}
    yield f"\nmethod={method}: {recipe.model_fields['method'].description}"
    defaults = [f"{key}={show(value)}" for key, value in recipe.DEFAULTS.items()]
    yield from wrap(f"without {', '.join(recipe.UNREAD)}", 6)
    yield from wrap(f"other defaults: {' '.join(defaults)}", 6) if defaults else ()
    for name, info in recipe.model_fields.items():
        if name in Recipe.model_fields:
            continue
        inner = sections_of(info.annotation)
        like = sections.get(id(info.annotation)) or sections.get(id(inner[0].__base__))
        if (name, id(info.annotation)) in shown:
            yield f"  {name}: as above"
        elif like:
            yield f"  {name}: {info.description}; keys as in {like}"
            own = inner[0].model_fields if info.annotation is inner[0] else {}
            for key, one in own.items():
                if key in inner[0].__annotations__:
                    yield from key_lines(f"{name}.{key}", one)
        else:
            yield from key_lines(name, info)
        shown.add((name, id(info.annotation)))


def key_lines(key: str, info) -> Iterator[str]:
    """A key with type, default and meaning, or all keys of a section."""
    inner, listed = sections_of(info.annotation), get_origin(info.annotation) is list
    if not inner:
        default = "required" if info.is_required() else f"default {show(info.default)}"
        yield f"  {key}  ({type_name(info.annotation)}, {default}{limits(info)})\n      {info.description}"
        return
    is_empty = "default empty" if not info.is_required() else "required"
    optional = type(None) in get_args(info.annotation)
    yield (f"  {key}  (list, {is_empty})\n      {info.description}; each entry has" if listed
           else f"  {key}  (mapping, default null)\n      {info.description}; it has" if optional
           else f"\n{key}: {info.description}")
    prefix, several = key + (".N." if listed else "."), len(inner) > 1
    tag = tag_key(inner[0])
    shared = [n for n in inner[0].model_fields if several and (n == tag or all(n in s.model_fields for s in inner))]
    for n in shared:
        if n == tag:
            tags = [tag_of(s) for s in inner if tag in s.model_fields]
            yield (f"  {prefix}{tag}  ({' | '.join(tags)}, default {tags[0]})\n      "
                   f"{inner[0].model_fields[n].description}")
        else:
            yield from key_lines(prefix + n, inner[0].model_fields[n])
    for model in inner:
        if several and model.model_fields.keys() - set(shared):
            yield f"  with {prefix}{spoken(model)}:"
        for n, its in model.model_fields.items():
            if n not in shared:
                yield from key_lines(prefix + n, its)


def shipped_recipes() -> list[str]:
    return sorted(p.stem for p in SHIPPED.glob("*.yaml"))


def type_name(annotation) -> str:
    """A field's type as a reader of recipes says it."""
    if annotation is type(None):
        return "null"
    name = getattr(get_origin(annotation), "__name__", "")
    if name == "Literal":
        return " | ".join(map(str, get_args(annotation)))
    if name == "Annotated":
        return type_name(get_args(annotation)[0])
    if name in ("Union", "UnionType"):
        return " | ".join(type_name(a) for a in get_args(annotation))
    if name in ("list", "tuple"):
        inner = " | ".join(dict.fromkeys(type_name(a) for a in get_args(annotation)))
        return f"list of {inner}"
    return "mapping" if name == "dict" else getattr(annotation, "__name__", str(annotation))


def wrap(text: str, indent: int, hanging: int | None = None) -> list[str]:
    return textwrap.wrap(text, 120, initial_indent=" " * indent, subsequent_indent=" " * (hanging or indent + 2),
                         break_long_words=False, break_on_hyphens=False)


def about(path: Path) -> str:
    """The first sentence of a shipped recipe's comment."""
    comment = itertools.takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
    return re.split(r"(?<=[A-Za-z)])[.:] ", " ".join(line.strip("# ") for line in comment))[0].rstrip(".")


def show(value) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def limits(info) -> str:
    """What a number may be, e.g. ', >= 0, < 1'."""
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    found = [f", {signs[a]} {getattr(m, a)}" for m in info.metadata for a in signs if getattr(m, a, None) is not None]
    for m in info.metadata:
        found += [f", {signs[a]} {getattr(x, a)}" for x in getattr(m, "metadata", []) for a in signs
                  if getattr(x, a, None) is not None]
    return "".join(found)
