"""Several nodes: each notices within a minute that another one failed, was killed or is cut off, and says why.

Without this a rank whose peers are gone waits in a collective: gloo notices a closed connection, NCCL and a cut network
nothing. One rank per node, its leader, writes a heartbeat into a store that rank 0 hosts, and reads those of the other
nodes. A rank that fails leaves its error there, so that every node can show it.
"""

import os
import socket
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the entry point imports this before it knows whether it needs torch
    import torch.distributed as dist

BEAT = 2.0  # seconds between heartbeats
LOST = 40.0  # seconds without one after which a node counts as lost
ERROR = "error"
LEFT = "left"
REMEDY = "completed stages are kept, and the same command resumes, also on fewer nodes"

_watch: "Watch | None" = None


class Watch:
    """The connection of a rank to the store, and on a node's leader the threads that watch the other nodes."""

    def __init__(self, store: "dist.Store", rank: int, node: int, nodes: int, leader: bool):
        self.store, self.rank, self.node, self.nodes = store, rank, node, nodes
        self.hosts: dict[int, str] = {}
        self.failed: str | None = None  # what another node left as its error
        self.ended = threading.Event()
        self.seen = {n: ("", time.monotonic()) for n in range(nodes)}  # last heartbeat and when it changed
        self.turned = time.monotonic()  # when the last round of heartbeats came through
        if leader:
            store.set(f"host/{node}", socket.gethostname())
            for target in (self._beat, self._judge):
                threading.Thread(target=target, daemon=True, name=f"nodes{target.__name__}").start()

    def _beat(self) -> None:
        """Writes and reads heartbeats. A cut network may hold it up forever, so it judges nothing."""
        count = 0
        while not self.ended.is_set():
            with suppress(RuntimeError):  # the store is gone, or does not answer
                count += 1
                self.store.set(f"beat/{self.node}", str(count))
                for n in range(self.nodes):
                    self.hosts[n] = self.hosts.get(n) or self._read(f"host/{n}")
                    beat = self._read(f"beat/{n}")
                    if beat != self.seen[n][0]:
                        self.seen[n] = beat, time.monotonic()
                self.failed = self.error()
                self.turned = time.monotonic()
            self.ended.wait(BEAT)

    def _judge(self) -> None:
        """Ends this process, and so this node, when another node failed or is lost. Never waits for the store."""
        while not self.ended.wait(BEAT):
            now, lost = time.monotonic(), None
            late = [n for n, (beat, since) in self.seen.items() if beat != LEFT and now - since > LOST]
            if now - self.turned > LOST:
                lost = f"no connection to node 0 ({os.environ.get('MASTER_ADDR', '?')}) for {now - self.turned:.0f} s"
            elif late and now - self.turned < 2 * BEAT:
                lost = f"{self._name(late[0])} has not answered for {now - self.seen[late[0]][1]:.0f} s"
            elif self.failed is not None:
                self.ended.wait(3 * BEAT)  # this rank's collectives most likely fail too, and it says the same
            else:
                continue
            if not self.ended.is_set():
                print("error: " + (self.failed or f"{lost}; {REMEDY}"), file=sys.stderr, flush=True)
                os._exit(1)

    def _read(self, key: str) -> str:
        """The value of a key, or an empty string."""
        return self.store.get(key).decode() if self.store.check([key]) else ""

    def _name(self, node: int) -> str:
        return f"node {node} ({self.hosts[node]})" if self.hosts.get(node) else f"node {node}"

    def error(self) -> str | None:
        """The error that a rank of another node left, with the node's name."""
        node, _, text = self._read(ERROR).partition(" ")
        if not node or int(node) == self.node:
            return None
        self.hosts[int(node)] = self._read(f"host/{node}")  # on ranks that are not leaders, too
        return f"{self._name(int(node))}: {text}"

    def leave(self) -> None:
        if not self.ended.is_set():
            self.ended.set()
            with suppress(RuntimeError):
                self.store.set(f"beat/{self.node}", LEFT)


def several() -> bool:
    """Whether torchrun started ranks on several nodes."""
    return os.environ.get("GROUP_WORLD_SIZE", "1") != "1"


def watch(rank: int) -> None:
    """Begins to watch the other nodes, if there are several. Every rank calls it, after the process group is
    initialized."""
    global _watch
    if not several():
        return
    node, nodes = int(os.environ["GROUP_RANK"]), int(os.environ["GROUP_WORLD_SIZE"])
    import torch.distributed as dist

    limit, port = timedelta(seconds=LOST), [0]
    store = None
    if rank == 0:
        store = dist.TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False, timeout=limit)
        port = [store.port]
    dist.broadcast_object_list(port, src=0)
    if store is None:
        store = dist.TCPStore(os.environ["MASTER_ADDR"], port[0], is_master=False, timeout=limit)
    _watch = Watch(store, rank, node, nodes, leader=os.environ.get("LOCAL_RANK") == "0")


def tell(text: str) -> None:
    """Leaves this rank's error for the other nodes; the first one counts."""
    if _watch is not None and not _watch.ended.is_set():
        with suppress(RuntimeError):
            _watch.store.compare_set(ERROR, "", f"{_watch.node} {text}")
        _watch.ended.set()
        if _watch.rank == 0:
            time.sleep(2 * BEAT)  # the store ends with this process


def cause(patience: float = 3 * BEAT) -> str | None:
    """The error of another node, which most likely broke a collective here. Waits up to `patience` seconds for it."""
    until = time.monotonic() + patience
    while _watch is not None and not _watch.ended.is_set():
        with suppress(RuntimeError):
            if found := _watch.error():
                _watch.ended.set()
                return found
        if time.monotonic() > until:
            break
        time.sleep(0.2)
    return None


def leave() -> None:
    """Ends the watch; the other nodes no longer wait for this one."""
    global _watch
    if _watch is not None:
        _watch.leave()
        _watch = None
