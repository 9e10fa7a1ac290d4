"""The verbs of `strop`: show, watch and compare runs, export a model, try a scorer."""

import importlib
from dataclasses import dataclass

from strop.trainer.errors import UserError


@dataclass(frozen=True)
class Verb:
    """A command: usage, purpose, and the range of its number of arguments (`most` None: no limit)."""

    usage: str
    purpose: str
    least: int
    most: int | None
    home: str = ""  # module:function; by default the one of its name in a module of its name in reports


VERBS = {
    "show": Verb("strop show RUN", "state, lineage and next step of a run, in the terminal", 1, 1),
    "watch": Verb("strop watch RUN [--port N]", "a live page of a run, served to this machine only", 1, 1),
    "compare": Verb("strop compare RUN RUN ...", "recipes, paired pass rates and cost side by side", 2, None),
    "best-of": Verb("strop best-of RUN", "what the best of n samples is worth, n up to the K that a run stored", 1, 1,
                    "strop.trainer.reports.best_of:best_of"),
    "export": Verb("strop export RUN DIR", "the promoted model with its card and its parents' license", 2, 2),
    "try": Verb("strop try SCORER DATA [key=value ...]", "scores of the first rows of a file, before any run", 2, None,
                "strop.trainer.scoring.trying:try_scorer"),
}
HELP = """\
usage: {usage}

{purpose}.

{more}"""
RUN = "RUN is a run directory (runs/quickstart) or the name of one under runs/ (quickstart)."
MORE = {"show": RUN, "watch": f"{RUN}\n--port N listens there instead of 8765. Ctrl-C stops the page, not the run.",
        "best-of": f"{RUN}\nWrites best_of.svg and best_of.md to the run directory.",
        "export": f"{RUN}\nDIR must not exist yet. File hashes are checked first; the copy is independent of the run.",
        "compare": f"{RUN}\nAll runs are compared with the first RUN.",
        "try": "SCORER is file.py:function or a rule (number, exact, ...). DATA is a file of rows with prompt and\n"
               "completion, or with prompt and answer, which is then scored. Keys: rows=10, prompt_column=,\n"
               "completion_column=, answer_column=, and those of a scorer in `strop --help data`,\n"
               "e.g. args='{tolerance: 0.1}'."}


def run_verb(name: str, arguments: list[str]) -> None:
    """Runs `strop NAME ARGUMENTS`: the function NAME in module NAME. Raises UserError on a user's mistake."""
    from strop.trainer.run.console import Console

    verb, console = VERBS[name], Console()
    if "--help" in arguments or "-h" in arguments:
        print(HELP.format(usage=verb.usage, purpose=verb.purpose[:1].upper() + verb.purpose[1:],
                          more=MORE[name]), flush=True)
        return
    options = {}
    if name == "watch":
        arguments, options["port"] = take_port(arguments)
    if unknown := [a for a in arguments if a.startswith("--")]:
        raise UserError(f"{unknown[0]}: unknown option of {name}; usage: {verb.usage}")
    if len(arguments) < verb.least or (verb.most is not None and len(arguments) > verb.most):
        raise UserError(f"{name} takes {'at least ' if verb.most is None else ''}{verb.least} "
                         f"argument{'s' if verb.least > 1 else ''}, {len(arguments)} given; usage: {verb.usage}")
    module, _, function = (verb.home or f"strop.trainer.reports.{name}:{name}").partition(":")
    getattr(importlib.import_module(module), function)(console, *arguments, **options)


def take_port(arguments: list[str]) -> tuple[list[str], int | None]:
    """(arguments without --port N, N or None)."""
    rest, port = [], None
    waiting = iter(arguments)
    for argument in waiting:
        if argument == "--port" or argument.startswith("--port="):
            text = argument.partition("=")[2] or next(waiting, "")
            if not text.isdigit() or not 0 < int(text) < 65536:
                raise UserError(f"--port {text}: must be a number from 1 to 65535")
            port = int(text)
        else:
            rest.append(argument)
    return rest, port
