"""A box: model-written programs run in it, each in a process of its own that a small server forks.

The server knows nothing of the run: no environment, no files but what it is told. A program gets
- one of MODES: namespaces of its own for users, processes, mounts, network and IPC; or bubblewrap's; or, where neither
  is allowed, none. With namespaces it sees a file system of system folders and Python, read-only, and no /proc.
- Landlock where the kernel has it: it reads system folders and Python only, and writes in its working folder only.
- a seccomp filter: no sockets, no tracing, no mounts, no changes of modes and owners; without a process namespace also
  no signals and no further processes.
- limits on memory, CPU and wall time, processes, file sizes and output, and no capabilities.
Nothing of a program is believed but what it writes to its stdout; what judges it runs in another process (checker.py).
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import json
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from strop.trainer.errors import UserError
from strop.trainer.scoring import confine

MODES = ("namespaces", "bubblewrap", "landlock")
SYSTEM = ("/usr", "/lib", "/lib64", "/lib32", "/bin", "/sbin", "/etc/ld.so.cache", "/etc/alternatives",
          "/etc/localtime", "/etc/ssl/openssl.cnf")
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
WORK, DISK = "/box", 64 << 20  # the working folder, a file system in memory of so many bytes
ENVIRONMENT = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": WORK, "TMPDIR": WORK, "LANG": "C.UTF-8",
               "PYTHONDONTWRITEBYTECODE": "1", "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1",
               "OPENBLAS_NUM_THREADS": "1"}
NOBODY = 65534
THREADS = 32
NEW_MOUNTS, NEW_USER, NEW_PROCESSES, NEW_REST = 1 << 17, 1 << 28, 1 << 29, 1 << 25 | 1 << 26 | 1 << 27 | 1 << 30


class Limits(NamedTuple):
    """Of a program. processes: 1 forbids further ones; threads are bounded by their own number."""

    seconds: float = 10.0
    memory: int = 1 << 30
    output: int = 1 << 20
    processes: int = 1


class Outcome(NamedTuple):
    """How a program ended. code: its exit status, negative for a signal, None if it was stopped after the time limit;
    stdout and stderr hold up to the limit's bytes."""

    code: int | None
    stdout: bytes
    stderr: bytes
    seconds: float

    @property
    def ended(self) -> str:
        if self.code is None:
            return f"stopped after {self.seconds:.1f} s"
        if self.code < 0:
            name = signal.Signals(-self.code).name if -self.code in list(signal.Signals) else f"signal {-self.code}"
            return "more output than allowed" if name == "SIGXFSZ" else f"ended by {name}"
        return f"exit status {self.code}"


def memory_file(content: bytes = b"") -> int:
    """A descriptor of a file in memory, at its start."""
    fd = os.memfd_create("box", os.MFD_CLOEXEC)
    with open(os.dup(fd), "wb") as file:
        file.write(content)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def content_of(fd: int, most: int) -> bytes:
    return os.pread(fd, most, 0)


class Box:
    """A server that runs one program at a time. mode: None takes the first one that works here.

    Raises UserError where no mode works, with the reason for each."""

    def __init__(self, mode: str | None = None):
        if sys.platform != "linux":
            raise UserError("programs of a model run in a sandbox that needs Linux; score this source with other "
                            "scorers, or run on Linux")
        reasons = []
        for self.mode in [mode] if mode else MODES:
            if not (reason := self._start()):
                return
            self.close()
            reasons.append(f"{self.mode}: {reason}")
        raise UserError(f"no sandbox for programs can be made here ({'; '.join(reasons)}); allow unprivileged user "
                        "namespaces, install bubblewrap, or use a kernel with Landlock (5.13 or newer)")

    def run(self, do: str, source: bytes, limits: Limits, **more) -> Outcome:
        """Runs a program and waits. do: "python" runs `source` as a script; "command" writes it to `file` in the
        working folder and executes argv; "serve" and "check" are the two sides of checker.py."""
        return self.start(do, source, limits, **more)()

    def start(self, do: str, source: bytes, limits: Limits, *, stdin: bytes = b"", argv: list[str] | None = None,
              file: str = "", further: tuple[int, ...] = ()):
        """As `run`, without waiting: returns the function that waits. further: descriptors that the program gets."""
        if (self._process is None or self._process.poll() is not None) and (reason := self._start()):
            raise UserError(f"the sandbox cannot start again ({self.mode}: {reason})")
        files = [memory_file(stdin), memory_file(), memory_file(), memory_file(source)]
        passed = [*files, *further]
        request = {"do": do, "limits": limits, "argv": argv, "file": file}
        socket.send_fds(self._control, [json.dumps(request).encode()], passed)

        def wait() -> Outcome:
            try:
                answer = self._answer(limits.seconds + 30)
                if answer is None:
                    self.close()
                    answer = {"code": None, "seconds": limits.seconds + 30}
                if "error" in answer:
                    raise UserError(f"the sandbox cannot run a program ({self.mode}: {answer['error']})")
                out, err = (content_of(fd, limits.output) for fd in files[1:3])
                return Outcome(answer["code"], out, err, answer["seconds"])
            finally:
                for fd in files:
                    os.close(fd)

        return wait

    def close(self) -> None:
        if self._process is not None:
            self._control.close()
            self._process.kill()
            self._process.wait()
        self._process = None

    _process: subprocess.Popen | None = None

    def _start(self) -> str:
        """Starts the server; why it cannot, or ""."""
        self.close()
        read = readable()
        bwrap = shutil.which("bwrap")
        if self.mode == "bubblewrap" and bwrap is None:
            return "bwrap is not installed"
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        server = [sys.executable, "-P", "-m", "strop.trainer.scoring.box", self.mode, str(theirs.fileno())]
        path = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if os.path.isabs(p)]
        environment = ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(path)} | {
            k: os.environ[k] for k in ("VIRTUAL_ENV", "LD_LIBRARY_PATH") if k in os.environ}
        if self.mode == "bubblewrap":
            binds = [word for p in [*read, *own_code()] if os.path.exists(p) for word in ("--ro-bind", p, p)]
            server = [bwrap, "--unshare-all", "--die-with-parent", "--new-session", *binds, "--dev", "/dev",
                      "--size", str(DISK), "--tmpfs", WORK, "--chdir", WORK, *server]
        with tempfile.TemporaryFile() as errors:
            self._process = subprocess.Popen(
                server, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors, env=environment,
                pass_fds=[theirs.fileno()], cwd=tempfile.gettempdir(), start_new_session=True)
            theirs.close()
            atexit.register(self.close)
            answer = self._answer(60)
            if answer == {"map": True}:
                try:
                    map_users(self._process.pid)
                    self._control.send(json.dumps({"read": read}).encode())
                    answer = self._answer(60)
                except OSError as e:
                    return f"cannot map users ({e.strerror})"
            if answer is None:
                errors.seek(0)
                lines = errors.read().decode(errors="replace").strip().splitlines()
                return lines[-1][:300] if lines else "its server ended"
        return answer.get("error", "")

    def _answer(self, seconds: float) -> dict | None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._control, selectors.EVENT_READ)
            message = self._control.recv(65536) if selector.select(seconds) else b""
        return json.loads(message) if message else None


def readable() -> list[str]:
    """What programs may read: the system's folders and this Python's."""
    python = [sys.prefix, sys.base_prefix, *(p for p in sys.path if os.path.isdir(p) and "site-packages" in p)]
    link = Path(sys.executable)
    while link.is_symlink():  # a virtual environment's Python may be a link to another one's
        link = link.parent / link.readlink()
        python.append(str(link.parent))
    return list(dict.fromkeys([*SYSTEM, *(str(Path(p)) for p in python)]))


def own_code() -> list[str]:
    """What the server itself reads to start: the folder of this package."""
    return [str(Path(__file__).parents[1])]


def map_users(pid: int) -> None:
    """Maps this user, and nobody if this user is root, into the user namespace of `pid`. Raises OSError."""
    for kind, own in (("uid", os.geteuid()), ("gid", os.getegid())):
        if kind == "gid" and os.geteuid():
            Path(f"/proc/{pid}/setgroups").write_text("deny")
        text = f"{own} {own} 1\n" + (f"{NOBODY} {NOBODY} 1\n" if os.geteuid() == 0 else "")
        Path(f"/proc/{pid}/{kind}_map").write_text(text)


# ---- in the server

def main() -> None:
    mode, control = sys.argv[1], socket.socket(fileno=int(sys.argv[2]))
    control.set_inheritable(False)
    from strop.trainer.scoring import checker  # so that programs need not read this package

    def send(message: dict) -> None:
        control.send(json.dumps(message).encode())

    try:
        confine.prctl(confine.PR_SET_PDEATHSIG, signal.SIGKILL)
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000")
        read = readable()
        if mode == "namespaces":
            unshare(NEW_USER | NEW_MOUNTS | NEW_REST)
            send({"map": True})
            read = json.loads(control.recv(65536))["read"]
            build_root(read)
        elif mode == "landlock" and not confine.landlock_version():
            raise OSError(0, "the kernel has no Landlock")
        box = Server(mode, read, checker)
        nothing = {"do": "nothing", "limits": Limits(), "argv": None, "file": ""}
        if "error" in (answer := box.launch(nothing, [os.open("/dev/null", os.O_RDWR) for _ in range(4)])):
            raise OSError(0, answer["error"])
    except OSError as e:
        send({"error": f"{e.strerror or e}"})
        return
    send({})
    while True:
        message, fds, _, _ = socket.recv_fds(control, 65536, 8)
        if not message:
            return
        send(box.launch(json.loads(message), fds))


def unshare(flags: int) -> None:
    """Raises OSError if the kernel refuses."""
    if confine.libc().unshare(flags):
        raise OSError(ctypes.get_errno(), f"unshare: {os.strerror(ctypes.get_errno())}")


def mount(source: str, target: str, kind: str | None, flags: int, data: str = "") -> None:
    """Raises OSError if the kernel refuses."""
    if confine.libc().mount(source.encode(), target.encode(), kind and kind.encode(), ctypes.c_ulong(flags),
                            data.encode()):
        raise OSError(ctypes.get_errno(), f"mount {target}: {os.strerror(ctypes.get_errno())}")


def mount_point(read: list[str]) -> str:
    """A folder that a file system can be mounted over without hiding any of `read`. Raises OSError."""
    kept = [p for path in read for p in (path, os.path.realpath(path))]
    for folder in (tempfile.gettempdir(), "/mnt", "/media", "/srv", "/opt", "/run"):
        if os.path.isdir(folder) and not any(f"{p}/".startswith(f"{folder}/") for p in kept):
            return folder
    raise OSError("every folder that its file system could be built in holds this Python")


def build_root(read: list[str]) -> None:
    """Makes a file system of `read`, devices and an empty working folder the root. Raises OSError."""
    bind, recursive, private, remount, read_only, no_suid, no_dev = 4096, 16384, 1 << 18, 32, 1, 2, 4
    mount("none", "/", None, recursive | private)
    top = mount_point(read)
    mount("box", top, "tmpfs", no_suid | no_dev, "size=1m,mode=755")
    for path in [*read, *DEVICES]:
        if not os.path.exists(path):
            continue
        target = f"{top}{path}"
        if os.path.islink(path):  # /bin -> usr/bin
            if not os.path.lexists(target):
                os.makedirs(os.path.dirname(target), exist_ok=True)
                os.symlink(os.readlink(path), target)
            continue
        if os.path.exists(target):  # inside of one that is bound already
            continue
        os.makedirs(target if os.path.isdir(path) else os.path.dirname(target), exist_ok=True)
        if not os.path.isdir(path):
            os.close(os.open(target, os.O_CREAT, 0o644))
        mount(path, target, None, bind | recursive)
        kept = os.statvfs(target).f_flag & (no_suid | no_dev | os.ST_NOEXEC | os.ST_NOATIME | os.ST_NODIRATIME
                                            | os.ST_RELATIME)
        flags = {os.ST_NOSUID: 2, os.ST_NODEV: 4, os.ST_NOEXEC: 8, os.ST_NOATIME: 1024, os.ST_NODIRATIME: 2048,
                 os.ST_RELATIME: 1 << 21}
        if path not in DEVICES:
            mount("none", target, None, bind | remount | read_only | sum(v for k, v in flags.items() if kept & k))
    os.mkdir(f"{top}{WORK}")
    os.mkdir(f"{top}/old")
    os.chdir(top)
    if confine.libc().syscall({"x86_64": 155, "aarch64": 41}[os.uname().machine], b".", b"old"):
        raise OSError(ctypes.get_errno(), f"pivot_root: {os.strerror(ctypes.get_errno())}")
    os.chdir("/")
    if confine.libc().umount2(b"/old", 2):
        raise OSError(ctypes.get_errno(), f"umount: {os.strerror(ctypes.get_errno())}")
    os.rmdir("/old")


class Server:
    """Forks a process for each program and tells how it ended."""

    def __init__(self, mode: str, read: list[str], checker):
        self.mode, self.read, self.checker = mode, read, checker

    def launch(self, request: dict, fds: list[int]) -> dict:
        """Runs a program to its end. {"code", "seconds"}, or {"error"} if the box failed."""
        read, write = os.pipe()
        request["limits"] = Limits(*request["limits"])
        if self.mode == "namespaces":
            flags = NEW_PROCESSES | NEW_MOUNTS | signal.SIGCHLD
            pid = confine.libc().syscall({"x86_64": 56, "aarch64": 220}[os.uname().machine],
                                         ctypes.c_ulong(flags), 0, 0, 0, 0)
            if pid < 0:
                return {"error": f"clone: {os.strerror(ctypes.get_errno())}"}
        else:
            pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.close(read)
                os.write(write, json.dumps(self.supervise(request, fds)).encode())
                code = 0
            except BaseException as e:
                os.write(write, json.dumps({"error": f"{type(e).__name__}: {e}"}).encode())
            finally:
                os._exit(code)
        os.close(write)
        for fd in fds:
            os.close(fd)
        with open(read, "rb") as answer:
            text = answer.read()
        os.waitpid(pid, 0)
        return json.loads(text or b'{"error": "its supervisor was killed"}')

    def supervise(self, request: dict, fds: list[int]) -> dict:
        """The first process of a program's namespace: forks the program, and ends with it or at the time limit."""
        confine.prctl(confine.PR_SET_PDEATHSIG, signal.SIGKILL)
        folder = WORK
        if self.mode == "namespaces":
            mount("box", WORK, "tmpfs", 2 | 4, f"size={DISK},nr_inodes=4096,mode=777")
        else:
            folder = tempfile.mkdtemp(prefix="box-", dir=WORK if self.mode == "bubblewrap" else tempfile.gettempdir())
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
        failed, fail = os.pipe()
        began = time.monotonic()
        pid = os.fork()
        if pid == 0:
            os.close(failed)
            try:
                self.become(request, fds, folder, fail)
            except BaseException as e:  # before the program began
                os.write(fail, f"{type(e).__name__}: {e}".encode()[:1000])
            os._exit(125)
        os.close(fail)
        try:
            code = None
            while (left := began + request["limits"].seconds - time.monotonic()) > 0:
                if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                    break
                signal.sigtimedwait([signal.SIGCHLD], left)
            else:
                os.kill(pid, signal.SIGKILL)
            took = time.monotonic() - began
            _, status = os.waitpid(pid, 0)
            if took < request["limits"].seconds:
                code = os.waitstatus_to_exitcode(status)
        finally:
            if self.mode != "namespaces":  # where it goes with the namespace
                for left in Path(WORK).iterdir() if self.mode == "bubblewrap" else [folder]:
                    shutil.rmtree(left, ignore_errors=True)
        with open(failed, "rb") as text:
            if error := text.read().decode():
                return {"error": error}
        return {"code": code, "seconds": round(took, 4)}

    def become(self, request: dict, fds: list[int], folder: str, fail: int) -> None:
        """The program: gives up its rights, then runs. Raises OSError where the kernel refuses."""
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
        os.setsid()
        limits, alone = request["limits"], self.mode != "namespaces"
        command = request["do"] == "command"
        if alone and (limits.processes > 1):
            raise OSError(0, "programs that start processes need user namespaces here; set processes=1")
        for target, fd in enumerate(fds[:3]):
            os.dup2(fd, target)
        rest = [os.dup(fd) for fd in [*fds[3:], fail]]  # dup is not inherited by a command
        keep = {0, 1, 2, *rest}
        for fd in range(3, 256):
            if fd not in keep:
                with contextlib.suppress(OSError):
                    os.close(fd)
        fail, rest = rest[-1], rest[:-1]
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(ENVIRONMENT | {"HOME": folder, "TMPDIR": folder})
        tempfile.tempdir = None
        if command:
            with open(rest[0], "rb") as source, open(request["file"], "wb") as file:
                file.write(source.read())
        if not alone and os.getuid() == 0:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
        confine.drop_capabilities()
        seconds = int(limits.seconds) + 1
        confine.limit(AS=limits.memory, CPU=seconds, FSIZE=limits.output, CORE=0, NOFILE=256, MSGQUEUE=0, MEMLOCK=0)
        if not alone:
            confine.limit(NPROC=limits.processes + THREADS)
        confine.prctl(confine.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        if not confine.landlock(confine.EVERYTHING, read=[*self.read, *DEVICES], write=[folder, "/dev/null"],
                                scope=True) and self.mode == "landlock":
            raise OSError(0, "Landlock is refused")
        confine.seccomp(execute=command, fork=limits.processes > 1, signals=not alone)
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # too much output ends it
        os.close(fail)
        if command:
            os.execvp(request["argv"][0], request["argv"])
        os._exit(self.checker.run(request["do"], rest))


if __name__ == "__main__":
    main()
