"""Taking rights away from the calling process: limits, capabilities, Landlock and a seccomp filter. Linux only."""

import ctypes
import errno
import os
import platform
import resource
import struct
import sys
from contextlib import suppress

# numbers of system calls: x86_64, aarch64 (None: it has none)
CALLS = {
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "pidfd_send_signal": (424, 424), "process_madvise": (440, 440),
    "socket": (41, 198), "connect": (42, 203), "bind": (49, 200), "listen": (50, 201), "accept": (43, 202),
    "accept4": (288, 242), "sendto": (44, 206),
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "chroot": (161, 51), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265),
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, None),
    "lchown": (94, None), "fchown": (93, 55), "fchownat": (260, 54), "truncate": (76, 45), "utime": (132, None),
    "utimes": (235, None), "futimesat": (261, None), "utimensat": (280, 88), "setxattr": (188, 5),
    "lsetxattr": (189, 6), "fsetxattr": (190, 7), "removexattr": (197, 14), "lremovexattr": (198, 15),
    "fremovexattr": (199, 16), "mknod": (133, None), "mknodat": (259, 33),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "keyctl": (250, 219),
    "add_key": (248, 217), "request_key": (249, 218), "memfd_create": (319, 279), "memfd_secret": (447, 447),
    "shmget": (29, 194), "shmat": (30, 196), "shmctl": (31, 195), "msgget": (68, 186), "semget": (64, 190),
    "mq_open": (240, 180), "personality": (135, 92), "acct": (163, 89), "swapon": (167, 224), "reboot": (169, 142),
    "kexec_load": (246, 104), "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106),
    "syslog": (103, 116), "quotactl": (179, 60), "iopl": (172, None), "ioperm": (173, None),
    "clock_settime": (227, 112), "settimeofday": (164, 170), "sethostname": (170, 161), "fanotify_init": (300, 262),
    "move_pages": (279, 239), "migrate_pages": (256, 238), "mbind": (237, 235), "set_mempolicy": (238, 237),
    "seccomp": (317, 277), "ioctl": (16, 29), "sched_setscheduler": (144, 119), "sched_setattr": (314, 274),
    "setpriority": (141, 140), "ioprio_set": (251, 30)}
MISSING = {"clone3": (435, 435), "io_uring_setup": (425, 425), "openat2": (437, 437)}  # callers fall back
EXECUTES = {"execve": (59, 221), "execveat": (322, 281)}
FORKS = {"fork": (57, None), "vfork": (58, None)}
SIGNALS = {"kill": (62, 129), "tkill": (200, 130), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240)}
CLONE, TGKILL, IOCTL_ALLOWED = (56, 220), (234, 131), (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
CLONE_THREAD, NEW_NAMESPACES = 0x00010000, 0x7E020000
AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, PR_SET_PDEATHSIG, PR_SET_DUMPABLE = 38, 22, 1, 4
READ = 0b1101  # rights of Landlock: execute, read files and folders
EVERYTHING = (1 << 16) - 1
EXECUTE_AND_CHANGE = EVERYTHING & ~0b1100 & ~(1 << 15)


def libc():
    return ctypes.CDLL(None, use_errno=True)


def prctl(*arguments: int) -> None:
    """Raises OSError if the kernel refuses."""
    if libc().prctl(*(ctypes.c_ulong(a) for a in arguments)):
        raise OSError(ctypes.get_errno(), f"prctl({arguments[0]}): {os.strerror(ctypes.get_errno())}")


def limit(**limits: int) -> None:
    """Resource limits by their name, e.g. AS=2**30; those that the system does not have are left out."""
    for what, most in limits.items():
        with suppress(ValueError, OSError, AttributeError):  # macOS has no limit on address space
            resource.setrlimit(getattr(resource, f"RLIMIT_{what}"), (most, most))


def drop_capabilities() -> None:
    """Raises OSError if the kernel refuses."""
    header, none = struct.pack("Ii", 0x20080522, 0), bytes(24)
    if libc().syscall({"x86_64": 126, "aarch64": 91}[platform.machine()], header, none):
        raise OSError(ctypes.get_errno(), "capset")


def landlock_version() -> int:
    """0 where the kernel has no Landlock or it is off."""
    return max(0, libc().syscall(444, None, ctypes.c_size_t(0), 1)) if sys.platform == "linux" else 0


def landlock(handled: int, *, read: list[str] = (), write: list[str] = (), scope: bool = False) -> bool:
    """Forbids TCP and the file rights `handled` (bits) except below the folders `read` and `write`; with `scope` also
    signals and abstract sockets to processes outside. False if there is no Landlock."""
    version = landlock_version()
    if not version:
        return False
    known = (1 << (13 + (version > 1) + (version > 2) + (version > 4))) - 1
    handled &= known
    ports, scopes = 0 if version < 4 else 0b11, 0b11 if scope and version > 5 else 0
    attributes = struct.pack("QQQ", handled, ports, scopes)
    ruleset = libc().syscall(444, attributes, ctypes.c_size_t(24 if version > 5 else 16 if version > 3 else 8), 0)
    if ruleset < 0:
        return False
    for rights, paths in ((READ, read), (known, write)):
        for path in paths:
            with suppress(FileNotFoundError):
                place = os.open(path, os.O_PATH | os.O_CLOEXEC)
                mine = rights & handled if os.path.isdir(path) else rights & handled & (0b111 | 3 << 14)
                libc().syscall(445, ruleset, 1, struct.pack("=Qi", mine, place), 0)
                os.close(place)
    failed = libc().syscall(446, ruleset, 0)
    os.close(ruleset)
    return not failed


def seccomp(*, execute: bool, fork: bool, signals: bool) -> None:
    """Forbids system calls that reach out of a sandbox. execute, fork, signals: what stays allowed, apart from threads
    and signals to itself. Raises OSError if the kernel cannot."""
    machine = platform.machine()
    if machine not in AUDIT:
        raise OSError(errno.ENOSYS, f"no seccomp filter for {machine}")
    i = list(AUDIT).index(machine)
    refuse, absent = 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS
    allow, kill = 0x7FFF0000, 0x80000000
    code: list[tuple[int, int, int, int]] = [
        (0x20, 0, 0, 4), (0x15, 1, 0, AUDIT[machine]), (0x06, 0, 0, kill), (0x20, 0, 0, 0)]
    if machine == "x86_64":  # the calls of x32
        code += [(0x35, 0, 1, 0x40000000), (0x06, 0, 0, kill)]

    def on(number: int | None, *then: tuple[int, int, int, int]) -> None:
        if number is not None:
            code.extend([(0x15, 0, len(then), number), *then])

    def answer(value: int) -> tuple[int, int, int, int]:
        return 0x06, 0, 0, value

    denied = CALLS | ({} if execute else EXECUTES) | ({} if fork else FORKS) | ({} if signals else SIGNALS)
    for name, numbers in denied.items():
        if name != "ioctl":
            on(numbers[i], answer(refuse))
    for numbers in MISSING.values():
        on(numbers[i], answer(absent))
    first_argument, second_argument = 16, 24
    if fork:
        on(CLONE[i], (0x20, 0, 0, first_argument), (0x45, 0, 1, NEW_NAMESPACES), answer(refuse), answer(allow))
    else:
        on(CLONE[i], (0x20, 0, 0, first_argument), (0x45, 1, 0, CLONE_THREAD), answer(refuse), answer(allow))
    if not signals:
        on(TGKILL[i], (0x20, 0, 0, first_argument), (0x15, 1, 0, os.getpid()), answer(refuse), answer(allow))
    asks = [(0x15, len(IOCTL_ALLOWED) - n, 0, number) for n, number in enumerate(IOCTL_ALLOWED)]
    on(CALLS["ioctl"][i], (0x20, 0, 0, second_argument), *asks, answer(refuse), answer(allow))
    code.append(answer(allow))
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
    head = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(code), ctypes.addressof(program)))
    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    prctl(PR_SET_SECCOMP, 2, ctypes.addressof(head), 0, 0)
