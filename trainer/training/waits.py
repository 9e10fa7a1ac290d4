"""Data that is prepared ahead, and the time that a rank waits for it and for other ranks."""

import functools
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch


class Waits:
    """Adds up the time in its `with` blocks, which do not nest: of the host, and on a GPU of the stream that computes
    and waits there, by events. Blocks on other streams are no waits and do not count, nor do any while is_on is
    false."""

    def __init__(self, device: torch.device):
        self.is_cuda, self.is_on, self.seconds, self.events = device.type == "cuda", True, 0.0, deque()
        self.started: list = []

    def __enter__(self) -> None:
        if not self.is_on or (self.is_cuda and torch.cuda.current_stream() != torch.cuda.default_stream()):
            self.started.append(None)
        elif self.is_cuda:
            self.started.append(torch.cuda.Event(enable_timing=True))
            self.started[-1].record()
        else:
            self.started.append(time.perf_counter())

    def __exit__(self, *error) -> None:
        started = self.started.pop()
        if started is None:
            return
        if self.is_cuda:
            self.events.append((started, torch.cuda.Event(enable_timing=True)))
            self.events[-1][1].record()
        else:
            self.seconds += time.perf_counter() - started

    def around(self, function: Callable) -> Callable:
        """The function within a block."""
        @functools.wraps(function)
        def timed(*args, **kwargs):
            with self:
                return function(*args, **kwargs)
        return timed

    def take(self) -> float:
        """Seconds since the last call. Waits that a GPU has not finished yet count in the next one."""
        found, self.seconds = self.seconds, 0.0
        while self.events and self.events[0][1].query():
            start, end = self.events.popleft()
            found += start.elapsed_time(end) / 1000
        return found


class Ahead:
    """Iterates over `items` on a thread, one item ahead of its reader. waits: the time that the reader waits."""

    def __init__(self, items: Iterator, device: torch.device):
        self.items, self.waits = items, Waits(torch.device("cpu"))
        # a thread begins on the first GPU, and pinning memory would make a context there
        prepare = (None, ()) if device.index is None else (torch.cuda.set_device, (device,))
        self.thread = ThreadPoolExecutor(1, "data", *prepare)
        self.coming = self.thread.submit(next, items)

    def next(self):
        """The next item; there must be one."""
        with self.waits:
            item = self.coming.result()
        self.coming = self.thread.submit(next, self.items, None)
        return item

    def restart(self, items: Iterator) -> None:
        """Forgets what is prepared, and goes on with `items`."""
        self.items, self.coming = items, self.thread.submit(next, items)

    def close(self) -> None:
        self.thread.shutdown(wait=True, cancel_futures=True)
