"""Data that is prepared ahead, and the time that a rank waits for it and for other ranks."""

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch


class Waits:
    """Adds up the time in its `with` blocks: of the host, and on a GPU of the stream that waits there."""

    def __init__(self, device: torch.device):
        self.is_cuda, self.seconds, self.events = device.type == "cuda", 0.0, deque()

    def __enter__(self) -> None:
        self.started = time.perf_counter()
        if self.is_cuda:
            self.events.append([torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)])
            self.events[-1][0].record()

    def __exit__(self, *error) -> None:
        if self.is_cuda:
            self.events[-1][1].record()
        else:
            self.seconds += time.perf_counter() - self.started

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
