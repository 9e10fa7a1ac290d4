"""The entry point of `strop` and torchrun: parse, run, print errors."""

import os
import sys

if __name__ == "__main__" and not sys.flags.safe_path:  # a json.py beside a recipe is not Python's json
    del sys.path[0]

import time

try:
    from strop.trainer.environment import check_process, prepare_environment

    prepare_environment()  # before torch is imported
    from strop.trainer.cli import Command, answer, parse
    from strop.trainer.errors import UserError, explained
    from strop.trainer.run import nodes, restart, stopping
except ModuleNotFoundError as e:
    if __name__ != "__main__":
        raise
    sys.exit(f"{e}: install Strop first, with `make run` or `pip install -e .` in the folder above trainer/")


def run(command: Command) -> None:
    from strop.trainer.methods.running import show_plan, train
    from strop.trainer.reports.statistics import print_results
    from strop.trainer.run.console import Console

    started, console = time.perf_counter(), Console(enabled=os.environ.get("RANK", "0") == "0")
    if command.plan:
        show_plan(command.recipe, console, command.on)
        return
    done = train(command.recipe, console=console)
    print_results(console, done.results())
    console.line(f"{time.perf_counter() - started:.0f} s   weights {done.model}   report {done.dir / 'report.html'}")


def main(argv: list[str] | None = None) -> int:
    if argv is None:
        argv = sys.argv[1:]
        restart.allow()
    first = os.environ.get("RANK", "0") == "0"
    try:
        check_process()
        command = parse(argv)
        if command.recipe is not None:
            with stopping.handled(first):
                run(command)
        elif first:
            answer(command)
    except BrokenPipeError:  # the reader of --help or --plan closed its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except KeyboardInterrupt:
        return stopping.report(first)
    except Exception as e:
        if stopping.requested() and not isinstance(e, UserError):  # the terminal is gone, or another rank stopped
            return stopping.report(first)
        if "--debug" in argv:
            raise
        time.sleep(0 if first else 2)  # rank 0 most likely prints the same error, and torchrun then ends this process
        text = (None if isinstance(e, UserError) else nodes.cause()) or explained(e)
        nodes.tell(text)
        print("error: " + text.replace("\n", "\nerror: "), file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
