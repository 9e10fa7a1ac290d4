"""What `strop` does beside running a recipe: look at runs, compare them, take a model out."""

from dataclasses import dataclass

from strop.trainer.errors import UserError


@dataclass(frozen=True)
class Verb:
    """One command: how it is called, what it is for, how many arguments it takes (`most` None: any number)."""

    usage: str
    purpose: str
    least: int
    most: int | None


VERBS = {
    "show": Verb("strop show RUN", "state, lineage and next step of a run, in the terminal", 1, 1),
    "watch": Verb("strop watch RUN [--port N]", "a live page of a run, served to this machine only", 1, 1),
    "compare": Verb("strop compare RUN RUN ...", "recipes, paired pass rates and cost side by side", 2, None),
    "export": Verb("strop export RUN DIR", "the promoted model with its card and its parents' license", 2, 2),
}
HELP = """\
usage: {usage}

{purpose}.

RUN is a run directory (runs/quickstart) or the name of one under runs/ (quickstart).{more}"""
MORE = {"watch": "\n--port N listens there instead of 8765. Ctrl-C stops the page, not the run.",
        "export": "\nDIR must not exist yet. Hashes are checked first; the copy shares nothing with the run.",
        "compare": "\nThe others are compared with the first RUN."}


def run_verb(name: str, arguments: list[str]) -> None:
    """Carries out `strop NAME ARGUMENTS`. Raises UserError, one line, for what a user can get wrong."""
    from strop.trainer.run.console import Console

    verb, console = VERBS[name], Console()
    if "--help" in arguments or "-h" in arguments:
        print(HELP.format(usage=verb.usage, purpose=verb.purpose[:1].upper() + verb.purpose[1:],
                          more=MORE.get(name, "")), flush=True)
        return
    arguments, port = take_port(arguments) if name == "watch" else (arguments, 0)
    if unknown := [a for a in arguments if a.startswith("--")]:
        raise UserError(f"{unknown[0]}: unknown option of {name}; usage: {verb.usage}")
    if len(arguments) < verb.least or (verb.most is not None and len(arguments) > verb.most):
        raise UserError(f"{name} takes {'at least ' if verb.most is None else ''}{verb.least} "
                         f"argument{'s' if verb.least > 1 else ''}, {len(arguments)} given; usage: {verb.usage}")
    if name == "show":
        from strop.trainer.reports.show import show

        show(console, *arguments)
    elif name == "compare":
        from strop.trainer.reports.compare import compare

        compare(console, *arguments)
    elif name == "export":
        from strop.trainer.reports.export import export

        export(console, *arguments)
    else:
        from strop.trainer.reports.watch import watch

        watch(console, *arguments, port=port)


def take_port(arguments: list[str]) -> tuple[list[str], int | None]:
    """(arguments without --port N, N); None where it is not given."""
    rest, port = [], None
    waiting = iter(arguments)
    for argument in waiting:
        if argument == "--port" or argument.startswith("--port="):
            text = argument.partition("=")[2] or next(waiting, "")
            if not text.isdigit() or not 0 < int(text) < 65536:
                raise UserError(f"--port {text}: a number from 1 to 65535 is needed")
            port = int(text)
        else:
            rest.append(argument)
    return rest, port
