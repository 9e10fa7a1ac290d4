"""A copy of this process, with all that it has loaded, for checks that change what cannot be changed back."""

import os
import tempfile
import traceback

import torch


def in_a_fork(check) -> None:
    """Runs check() in a fork of this process. Raises AssertionError with the traceback if it raises."""
    with tempfile.TemporaryFile() as report:
        pid = os.fork()
        if pid == 0:
            try:
                torch.set_num_threads(1)  # OpenMP's other threads are not in the fork, and it would wait for them
                check()
            except BaseException:
                os.write(report.fileno(), traceback.format_exc().encode())
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        report.seek(0)
        text = report.read().decode()
    assert status == 0 and not text, text or f"status {status}"
