"""What a program of a model may not do. Each attempt is made as a program in every kind of box that works here, and
what it is after is watched from outside."""

import os
import shutil
import socket
import sys
import time
from pathlib import Path

import pytest

from strop.trainer.errors import UserError
from strop.trainer.scoring import box as module
from strop.trainer.scoring import confine
from strop.trainer.scoring.box import MODES, Box, Limits

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
QUICK = Limits(seconds=3.0, memory=512 << 20, output=256 << 10)


@pytest.fixture(scope="module", params=MODES)
def box(request):
    try:
        made = Box(request.param)
    except UserError as e:
        pytest.skip(str(e))
    yield made
    made.close()


@pytest.fixture
def secret(monkeypatch):
    """A file in the home folder, and a variable, that hold what nobody may read."""
    monkeypatch.setenv("STROP_SECRET", "do-not-read-me")
    folder = Path.home() / ".strop-test-secret"
    folder.mkdir(exist_ok=True)
    (folder / "key").write_text("do-not-read-me")
    yield folder
    shutil.rmtree(folder)


def run(box, code, limits=QUICK):
    return box.run("python", code.encode(), limits)


def said(outcome) -> str:
    return (outcome.stdout + outcome.stderr).decode(errors="replace")


def test_an_honest_program_runs(box):
    done = run(box, "import math, json, collections\nopen('mine', 'w').write('x')\nprint(open('mine').read(), 6 * 7)")
    assert (done.code, done.stdout) == (0, b"x 42\n"), done


TRY = """
import ctypes, os, signal, socket, subprocess, sys, threading, glob
libc = ctypes.CDLL(None, use_errno=True)
def tries(*attempts):
    for attempt in attempts:
        try:
            found = attempt()
            print("GOT", repr(found)[:300])
        except BaseException as e:
            print("refused", type(e).__name__, e)
def call(*arguments):
    found = libc.syscall(*arguments)
    if found < 0:
        raise OSError(ctypes.get_errno(), "no")
    return found
"""
X86 = os.uname().machine == "x86_64"
ATTEMPTS = {
    "a connection": "tries(lambda: socket.create_connection(('127.0.0.1', {port}), 1))",
    "a socket of another kind": "tries(lambda: socket.socket(socket.AF_UNIX), lambda: socket.socket(socket.AF_PACKET, "
                                "socket.SOCK_RAW), lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW))",
    "a name on the network": "tries(lambda: socket.getaddrinfo('localhost', 80) and socket.create_connection("
                             "('localhost', {port}), 1))",
    "the environment of the parent": "tries(lambda: open(f'/proc/{{os.getppid()}}/environ').read(), "
                                     "lambda: open('/proc/self/environ').read(), "
                                     "lambda: open('/proc/1/environ').read())",
    "its own environment": "print(os.environ); tries(lambda: os.environ['STROP_SECRET'])",
    "other processes": "tries(lambda: os.listdir('/proc'), lambda: glob.glob('/proc/[0-9]*')[0], "
                       "lambda: open('/proc/{pid}/cmdline').read())",
    "the home folder": "tries(lambda: os.listdir({home!r}), lambda: open({home!r} + '/key').read())",
    "a file of the machine": "tries(lambda: open('/etc/passwd').read(), lambda: open('/etc/shadow').read(), "
                             "lambda: os.listdir('/etc'), lambda: os.listdir('/'))",
    "a file through a link": "tries(lambda: os.symlink({home!r} + '/key', 'link') or open('link').read(), "
                             "lambda: os.link({home!r} + '/key', 'hard') or open('hard').read(), "
                             "lambda: os.symlink('/', 'top') or os.listdir('top/root'))",
    "a file by its way up": "tries(lambda: open('../' * 9 + {home!r} + '/key').read())",
    "a file outside": "tries(lambda: open({victim!r}, 'w'), "
                      "lambda: open({victim!r}, 'a'), lambda: os.truncate({victim!r}, 0), "
                      "lambda: os.open({victim!r}, os.O_RDONLY | os.O_TRUNC), lambda: os.unlink({victim!r}))",
    "a new file outside": "tries(lambda: open({folder!r} + '/new', 'w'), lambda: os.mkdir({folder!r} + '/new'), "
                          "lambda: os.symlink('a', {folder!r} + '/new'), lambda: open('/tmp/strop-new', 'w'), "
                          "lambda: open('/dev/shm/strop-new', 'w'), lambda: open(sys.prefix + '/strop-new', 'w'), "
                          "lambda: os.rename('mine', {folder!r} + '/new'))",
    "a mode or an owner": "tries(lambda: os.chmod({victim!r}, 0o777), "
                          "lambda: os.utime({victim!r}), lambda: os.chown({victim!r}, 0, 0), "
                          "lambda: os.setxattr({victim!r}, 'user.a', b'1'))",
    "a program": "tries(lambda: os.execv('/bin/sh', ['sh', '-c', 'echo GOT']), "
                 "lambda: subprocess.run(['echo', 'GOT']), "
                 "lambda: os.posix_spawn('/bin/sh', ['sh'], {{}}), lambda: os.system('true') == 127 << 8 and 1/0)",
    "tracing": "tries(lambda: call(101 if {x86} else 117, 16, os.getppid(), 0, 0), "
               "lambda: call(310 if {x86} else 270, {pid}, 0, 0, 0, 0, 0), lambda: call(434, os.getppid(), 0))",
    "namespaces and mounts": "tries(lambda: call(272 if {x86} else 97, 1 << 28), "
                             "lambda: call(165 if {x86} else 40, b'none', b'/', b'tmpfs', 0, 0), "
                             "lambda: os.chroot('.'), lambda: call(161 if {x86} else 51, b'/'))",
    "kernel doors": "tries(lambda: call(321 if {x86} else 280, 0, 0, 0), lambda: call(425, 1, 0), "
                    "lambda: call(250 if {x86} else 219, 0, 0), lambda: call(323 if {x86} else 282, 0), "
                    "lambda: call(319 if {x86} else 279, b'x', 0), lambda: call(435, 0, 0))",
    "rights": "tries(lambda: os.setuid(0) or open('/etc/shadow').read(), lambda: os.setgroups([0]), "
              "lambda: os.nice(-5))",
    "limits": "import resource\ntries(lambda: resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30)), "
              "lambda: resource.setrlimit(resource.RLIMIT_CPU, (999, 999)))",
    "descriptors of others": "tries(*[lambda fd=fd: os.fstat(fd) for fd in range({first}, 300)])",
    "devices": "tries(lambda: os.mknod('disk', 0o60666, os.makedev(8, 0)), lambda: open('/dev/mem', 'rb'), "
               "lambda: os.listdir('/dev'), lambda: open('/dev/tty'))",
}


@pytest.mark.parametrize("what", ATTEMPTS)
def test_an_attempt_is_refused(box, what, secret, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("as it was")
    before = victim.stat()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)  # who connected while the program ran is in the queue
        places = {"port": server.getsockname()[1], "pid": os.getpid(), "home": str(secret), "victim": str(victim),
                  "folder": str(tmp_path), "x86": X86, "first": 3}
        done = run(box, TRY + ATTEMPTS[what].format(**places))
        with pytest.raises(BlockingIOError):
            server.accept()
    text = said(done)
    assert "refused" in text and "GOT" not in text and "do-not-read-me" not in text, text
    after = victim.stat()
    assert victim.read_text() == "as it was" and (before.st_mode, before.st_mtime_ns, before.st_uid) == (
        after.st_mode, after.st_mtime_ns, after.st_uid)
    assert [p.name for p in tmp_path.iterdir()] == ["victim"] and not Path("/tmp/strop-new").exists()


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSTOP", "SIGTERM"])
def test_a_signal_reaches_nobody_else(box, name):
    server = box._process.pid
    run(box, TRY + f"import time\nfor pid in (os.getppid(), {os.getpid()}, {server}, -1, 1):\n"
        f"    tries(lambda: os.kill(pid, signal.{name}))\n")
    assert box._process.pid == server and box._process.poll() is None
    began = time.perf_counter()
    assert run(box, "print(1)").stdout == b"1\n" and time.perf_counter() - began < 2


BOMBS = {
    "forks": "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError: pass",
    "threads": "import threading, time\nwhile True:\n    threading.Thread(target=time.sleep, args=(99,)).start()",
    "memory": "x = []\nwhile True:\n    x.append(bytearray(50_000_000))",
    "shared memory": "import mmap\nx = [mmap.mmap(-1, 100 << 20) for _ in range(100)]\n"
                     "for m in x: m[:] = b'1' * len(m)",
    "output": "import sys\nwhile True:\n    sys.stdout.write('x' * 10_000)",
    "output by descriptor": "import os\nwhile True:\n    try: os.write(1, b'x' * 10_000)\n    except OSError: pass",
    "errors": "import os\nwhile True:\n    os.write(2, b'x' * 10_000)",
    "a large file": "with open('big', 'wb') as f:\n    while True: f.write(b'x' * 1_000_000)",
    "time": "while True: pass",
    "time in C": "9 ** 9 ** 9 ** 9",
    "sleep": "import time; time.sleep(99)",
    "ignored signals": "import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n"
                       "    except (OSError, ValueError): pass\nwhile True: pass",
    "recursion": "import sys; sys.setrecursionlimit(10**9)\ndef f(): f()\nf()",
    "descriptors": "x = []\nwhile True: x.append(open('/dev/null'))",
}
ENDLESS = ("forks", "output by descriptor", "time", "time in C", "sleep", "ignored signals")  # the clock ends them


@pytest.mark.parametrize("what", BOMBS)
def test_a_bomb_ends_alone(box, what):
    began = time.perf_counter()
    done = run(box, BOMBS[what], QUICK._replace(seconds=0.8 if what in ENDLESS else 1.5))
    assert done.code != 0 and time.perf_counter() - began < 8, done
    assert len(done.stdout) <= QUICK.output and len(done.stderr) <= QUICK.output
    assert run(box, "print(2)").stdout == b"2\n"


def test_nothing_is_left_to_the_next_program(box):
    run(box, "open('left', 'w').write('behind')\nimport builtins, sys\nbuiltins.print = None\nsys.modules['json'] = 1")
    done = run(box, "import os, json\nprint(os.listdir('.'), json.dumps(1))")
    assert done.stdout == b"[] 1\n", done


def test_files_together_are_limited(box):
    if box.mode == "landlock":
        pytest.skip("without mounts a file is limited, not all together")
    code = "n = 0\ntry:\n    while True:\n        open(str(n), 'wb').write(b'x' * 200_000)\n        n += 1\n" \
           "except OSError:\n    print(n)"
    count = int(run(box, code).stdout)
    assert 0 < count * 200_000 <= 2 * module.DISK


def test_processes_of_a_command_are_counted_and_end_with_it(box):
    limits, script = QUICK._replace(processes=4, seconds=2.0), b"sleep 60 & sleep 60 & echo started"
    if box.mode != "namespaces":
        with pytest.raises(UserError, match="programs that start processes need user namespaces"):
            box.run("command", script, limits, argv=["sh", "run.sh"], file="run.sh")
        return
    done = box.run("command", script, limits, argv=["sh", "run.sh"], file="run.sh")
    assert (done.code, done.stdout) == (0, b"started\n") and done.seconds < 1
    bomb = b":(){ :|:& };:\nwait; echo over"
    done = box.run("command", bomb, limits, argv=["bash", "run.sh"], file="run.sh")
    assert run(box, "print(3)").stdout == b"3\n"


def test_a_box_whose_server_died_starts_again(box):
    box._process.kill()
    box._process.wait()
    assert run(box, "print(4)").stdout == b"4\n"


def test_it_works_without_root(tmp_path):
    """As another user, who may make no more than user namespaces."""
    if os.geteuid():
        pytest.skip("this user is not root")
    code = "import os, sys\nos.setgroups([]); os.setgid(65534); os.setuid(65534)\n" \
           "from strop.trainer.scoring.box import Box, Limits\n" \
           "for mode in sys.argv[1:]:\n    b = Box(mode)\n" \
           "    print(mode, b.run('python', b'import os; print(os.getuid())', Limits()).stdout)\n"
    import subprocess

    python = Path(os.path.realpath(sys.executable))
    if any(not p.stat().st_mode & 0o001 for p in [python, *python.parents]):
        pytest.skip("Python is in a folder that other users may not enter")
    done = subprocess.run([sys.executable, "-c", code, "namespaces", "landlock"], capture_output=True, text=True,
                          cwd="/", timeout=120)
    assert done.stdout == "namespaces b'65534\\n'\nlandlock b'65534\\n'\n", done.stderr


def test_it_refuses_to_start_where_nothing_works(monkeypatch):
    monkeypatch.setattr(Box, "_start", lambda self: f"no {self.mode} here")
    with pytest.raises(UserError, match="namespaces: no namespaces here; bubblewrap: no bubblewrap here; landlock: no"):
        Box()


def test_the_filter_is_for_this_machine(monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    with pytest.raises(OSError, match="no seccomp filter for riscv64"):
        confine.seccomp(execute=False, fork=False, signals=False)
