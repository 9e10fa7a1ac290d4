"""Starting again without the user: every rank replaces its process by a new one of the same command, which resumes.

A rank that runs out of memory among collectives cannot repeat its step alone, because the others wait in them. It asks
for a restart in torchrun's store, which outlives the workers; a thread on every rank looks there. When all have seen it
they call exec at the same moment. That ends whatever a thread waits for, on a GPU too, and frees all memory, and for
torchrun the processes stay the same. The new ones meet under another prefix of the store.
"""

import os
import sys
import threading
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING

from strop.trainer.errors import UserError
from strop.trainer.run import nodes, stopping

if TYPE_CHECKING:  # the entry point imports this before it knows whether it needs torch
    from strop.trainer.run.world import World

LOOK = 0.5  # seconds between looks into the store
PATIENCE = 60.0  # seconds that ranks wait for each other before exec
MOST = 32  # restarts of a command; each has halved a microbatch, so this is never reached
COUNT, REASON = "STROP_RESTARTS", "STROP_RESTART_REASON"

_is_program = False


class Restart(Exception):
    """Asks for a restart; the text says why, and is printed after it."""


def allow() -> None:
    """This process is the program, not a script or notebook that calls it, so it may be replaced."""
    global _is_program
    _is_program = True


def count() -> int:
    """How often this command has started again."""
    return int(os.environ.get(COUNT, 0))


def reason() -> str | None:
    """Why this process was started again; None the second time, and if it was not."""
    return os.environ.pop(REASON, None)


def possible(world: "World") -> bool:
    """Whether all ranks can be started again: the program's own processes, alone or under torchrun."""
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return _is_program and count() < MOST and (world.size == 1 or shared)


def name() -> str:
    """A prefix in torchrun's store that no other start of these ranks has."""
    return f"strop/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{count()}"


class Watch:
    """Looks for a request in the store, on a thread, and then replaces this process."""

    def __init__(self, world: "World", store):
        self.world, self.store, self.ended = world, store, threading.Event()
        self.thread = threading.Thread(target=self._look, daemon=True, name="restart")
        self.thread.start()

    def asked(self) -> bool:
        return self.has("asked")

    def has(self, key: str) -> bool:
        with suppress(RuntimeError):  # the store is gone: torchrun ends this process
            return self.store.check([key])
        return False

    def ask(self, why: str) -> None:
        """Asks all ranks, and waits to be replaced with them; returns if that fails."""
        with suppress(RuntimeError):
            self.store.compare_set("asked", "", why)
            self.thread.join()

    def _look(self) -> None:
        while not self.ended.wait(LOOK):
            if not self.asked():
                continue
            why = self.store.get("asked").decode()
            if self.store.add("ready", 1) == self.world.size:
                self.store.set("go", "")
            with suppress(RuntimeError):
                self.store.wait(["go"], timedelta(seconds=PATIENCE))
            return replace_process(why, self.world.first)


@contextmanager
def watched(world: "World"):
    """Restarts all ranks if one raises Restart in this block, in which every rank is at the same time. After the
    UserError of one rank, others whose collectives broke end without a word, on one machine."""
    watch = None
    if world.size > 1 and possible(world):
        from torch.distributed import PrefixStore, TCPStore

        server = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
                          timeout=timedelta(seconds=PATIENCE))
        watch = Watch(world, PrefixStore(f"{name()}/restart", server))
    try:
        yield
    except Restart as e:
        if watch:
            watch.ask(str(e))
        else:
            replace_process(str(e), world.first)
        raise
    except Exception as e:
        if watch and watch.asked():  # a collective broke because another rank was replaced a moment earlier
            watch.thread.join()
        if watch and isinstance(e, UserError):
            with suppress(RuntimeError):
                watch.store.set("failed", "")
        elif watch and watch.has("failed") and not nodes.several():  # several nodes show it each
            raise SystemExit(1) from e
        raise
    finally:
        if watch:
            watch.ended.set()


def replace_process(why: str, first: bool) -> None:
    """Starts this process's command again in its place."""
    if stopping.requested():
        os._exit(stopping.report(first))
    os.environ |= {COUNT: str(count() + 1), REASON: why}
    with suppress(OSError):
        for number in map(int, os.listdir("/proc/self/fd")):
            if number > 2:
                with suppress(OSError):
                    os.set_inheritable(number, False)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
