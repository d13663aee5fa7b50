"""The kernel plane, escape: what leaves the container or reaches the kernel, with its control."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import signal
import stat
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mis_run.events import Verdict
from mis_run.guards import lsm, lsm_abi
from mis_run.linux import abi, libc

EPERM = errno.EPERM
# Some calls make another error of the hook's EPERM.
REFUSED = (EPERM, errno.EACCES, errno.ENOKEY)
pytestmark = pytest.mark.parametrize("tree", ["tmpfs"], indirect=True, scope="module")
LIBC = ctypes.CDLL(None, use_errno=True)
Act = Callable[[Any], object]


def call(name: str, *arguments: int | bytes | None) -> int:
    """A system call by name; buffers are passed by address."""
    words = [
        ctypes.c_long(one) if isinstance(one, int) else ctypes.c_char_p(one) for one in arguments
    ]
    result = int(LIBC.syscall(ctypes.c_long(abi.number(name)), *words))
    if result < 0:
        raise OSError(ctypes.get_errno(), name)
    return result


@pytest.fixture(scope="module")
def outsider() -> Iterator[int]:
    """A process that belongs to no agent."""
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process.pid
        process.kill()


def traced_by_parent(_: object) -> None:
    """PTRACE_TRACEME in a child whose parent is in the agent as well."""
    pid = os.fork()
    if pid == 0:
        try:
            call("ptrace", 0, 0, 0, 0)
        except OSError as error:
            os._exit(error.errno or 255)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code:
        raise OSError(code, "traceme")


def child_killed(_: object) -> None:
    """A signal to a child of one's own."""
    pid = os.fork()
    if pid == 0:
        time.sleep(60)
        os._exit(0)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def ring(flags: int) -> None:
    os.close(call("io_uring_setup", 4, struct.pack("=4I104x", 0, 0, flags, 0)))


def typed(_: object) -> None:
    """TIOCSTI on a terminal of one's own."""
    _, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSTI, b"x")


def own_status(_: object) -> None:
    """What ps(1) reads of one's own."""
    Path("/proc/self/maps").read_bytes()


def attr(kind: int, config: int) -> bytes:
    """struct perf_event_attr: a software event, this thread only."""
    return struct.pack("=IIQ", kind, 112, config).ljust(112, b"\0")


def file_system(command: int, key: bytes | None, value: bytes | None) -> None:
    """A context for a new tmpfs, and one fsconfig(2) on it; nothing is mounted."""
    context = call("fsopen", b"tmpfs", 0)
    try:
        call("fsconfig", context, command, key, value, 0)
    finally:
        os.close(context)


def other_user(tree: Any) -> None:
    """A set-user-ID program of somebody else; where it ran, the child's error is none."""
    os.execv(tree.open / "set_id", ["set_id"])


CLONE_NEWUSER, CLONE_NEWNS = 0x10000000, 0x20000
# What the act is, the hook that refuses it to an agent with all capabilities ("": it is theirs
# alone), and what it gives where nobody guards (None: not EPERM).
ROWS: dict[str, tuple[Act, str, int | None]] = {
    "mount": (lambda t: libc.mount("none", "/", "mis"), "mount", errno.ENODEV),
    "remount": (lambda t: libc.mount("none", "/proc", "", libc.MS_REMOUNT), "mount", None),
    "bind": (lambda t: libc.mount("/dev", point(t, "other"), "", libc.MS_BIND), "mount", 0),
    "umount": (lambda t: libc.umount(point(t, "mounted"), libc.MNT_DETACH), "umount", 0),
    "pivot_root": (lambda t: call("pivot_root", b"/", b"/"), "pivot_root", None),
    "chroot": (lambda t: os.chroot("/usr"), "chroot", 0),
    "unshare user": (lambda t: libc.unshare(CLONE_NEWUSER), "userns", 0),
    "unshare mnt": (lambda t: libc.unshare(CLONE_NEWNS), "", 0),
    "setns": (lambda t: libc.setns(os.open("/proc/self/ns/uts", os.O_RDONLY)), "", 0),
    "fsopen": (lambda t: call("fsopen", b"tmpfs", 0), "", None),
    "fsconfig": (lambda t: file_system(1, b"size", b"1m"), "fsconfig", 0),
    "a file system is made": (lambda t: file_system(6, None, None), "fsconfig", 0),
    "userfaultfd": (lambda t: call("userfaultfd", 1), "userfaultfd", 0),
    "a set-user-ID program": (other_user, "set_id", 0),
    "open_tree": (lambda t: call("open_tree", -100, b"/", 1), "", None),
    "sethostname": (lambda t: call("sethostname", b"mis", 3), "", 0),
    "bpf map": (lambda t: libc.bpf(0, struct.pack("=5I", 2, 4, 4, 1, 0)), "bpf", None),
    "perf": (
        lambda t: call("perf_event_open", attr(1, 0), 0, -1, -1, 0),
        "perf_event_open",
        None,
    ),
    "module": (lambda t: call("init_module", b"", 0, b""), "", None),
    "add_key": (
        lambda t: call("add_key", b"user", b"mis", b"x", 1, -4),
        "key",
        None,
    ),
    "keyctl": (lambda t: call("keyctl", 0, -3, 1), "key", None),
    "io_uring polled": (lambda t: ring(2), "io_uring", None),
    "settimeofday": (
        lambda t: call("settimeofday", None, struct.pack("=2i", 0, 0)),
        "clock",
        0,
    ),
    "clock_settime": (lambda t: time.clock_settime(0, time.time()), "clock", 0),
    "syslog": (lambda t: call("syslog", 10, 0, 0), "syslog", None),
    "quotactl": (lambda t: call("quotactl", 0x80000100, None, 0, 0), "quota", None),
    "swapon": (lambda t: call("swapon", b"/none", 0), "", None),
    "reboot": (lambda t: call("reboot", 0xFEE1DEAD, 672274793, 0, 0), "", 0),
    "open by handle": (
        lambda t: call("open_by_handle_at", -100, struct.pack("=Ii8x", 8, 1), 0),
        "",
        None,
    ),
    "a device node": (
        lambda t: os.mknod(t.open / "device", stat.S_IFCHR | 0o600, os.makedev(1, 3)),
        "mknod",
        0,
    ),
    "type into a terminal": (typed, "tty", None),
}
# What the same calls do when they stay inside.
FINE: dict[str, Act] = {
    "kill a child": child_killed,
    "be traced by a parent": traced_by_parent,
    "lower one's own priority": lambda t: os.setpriority(os.PRIO_PROCESS, 0, 5),
    "ask for its own status": own_status,
    "a whiteout is no device": lambda t: os.mknod(t.open / "white", stat.S_IFCHR, 0),
    "a ring without a thread": lambda t: ring(0),
    "chown, a capability it has": lambda t: os.chown(t.open / "file", 1, 1),
    "a program of its own user": lambda t: os.execv(t.open / "prog", ["prog"]),
}
ACROSS: dict[str, tuple[Callable[[int], object], str]] = {
    "signal": (lambda pid: os.kill(pid, 0), "kill"),
    "trace": (lambda pid: call("ptrace", 0x4206, pid, 0, 0), "ptrace"),
    "memory": (lambda pid: os.listdir(f"/proc/{pid}/map_files"), "ptrace"),
    "priority": (lambda pid: os.setpriority(os.PRIO_PROCESS, pid, 1), "scheduler"),
    "scheduler": (
        lambda pid: os.sched_setscheduler(pid, os.SCHED_BATCH, os.sched_param(0)),
        "scheduler",
    ),
    "affinity": (lambda pid: os.sched_setaffinity(pid, {0}), "scheduler"),
    "io priority": (lambda pid: call("ioprio_set", 1, pid, 0), "scheduler"),
    "pages": (lambda pid: call("migrate_pages", pid, 0, None, None), "ptrace"),
}


def point(tree: Any, name: str) -> str:
    """A folder to mount on."""
    return str(tree.none / name)


def settled(tree: Any) -> None:
    """Undo what a control did; leave something mounted that could be unmounted."""
    for name in ("device", "white"):
        (tree.open / name).unlink(missing_ok=True)
    shutil.copy("/bin/true", tree.open / "set_id")
    os.chown(tree.open / "set_id", 1, -1)
    os.chmod(tree.open / "set_id", 0o4755)
    for name in ("mounted", "other"):
        os.makedirs(point(tree, name), exist_ok=True)
    if not os.path.ismount(point(tree, "mounted")):
        libc.mount("/dev", point(tree, "mounted"), "", libc.MS_BIND)


@pytest.fixture(scope="module")
def mighty(tree: Any, cgroups: Any) -> Iterator[tuple[Path, lsm.LsmGuard]]:
    """An agent with all capabilities: what is refused to it, a hook of its own refuses."""
    folder = cgroups()
    calm = lsm.Defcon(act=False)
    policy = tree.policy(capabilities=lsm_abi.CAPABILITIES, defcon=calm)
    with lsm.attach(folder, policy) as guard:
        yield folder, guard


def refused(name: str, tree: Any, guarded: tuple[Path, lsm.LsmGuard], kinds: set[str]) -> None:
    group, guard = guarded
    settled(tree)
    guard.read()
    before = guard.counts().denied
    assert lsm.in_cgroup(group, lambda: ROWS[name][0](tree)) in REFUSED
    events = guard.read()
    assert {event.kind for event in events} <= kinds, events
    assert events[0].verdict == Verdict.DENY
    assert guard.counts().denied - before == len(events)


@pytest.mark.parametrize("name", ROWS)
def test_refused(name: str, tree: Any, guarded: tuple[Path, lsm.LsmGuard], neighbour: Path) -> None:
    """Refused, told and counted; without the guard it is not refused."""
    act, what, without = ROWS[name]
    refused(name, tree, guarded, {"escape.capability", f"escape.{what}"})
    settled(tree)
    met = lsm.in_cgroup(neighbour, lambda: act(tree))
    assert met == without if without is not None else met not in REFUSED
    assert guarded[1].read() == []


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row[1]])
def test_refused_to_an_agent_with_capabilities(
    name: str, tree: Any, mighty: tuple[Path, lsm.LsmGuard]
) -> None:
    """Where capabilities would not stop it, its own hook does."""
    refused(name, tree, mighty, {f"escape.{ROWS[name][1]}"})


@pytest.mark.parametrize("name", FINE)
def test_within_the_agent(name: str, tree: Any, guarded: tuple[Path, lsm.LsmGuard]) -> None:
    """What stays inside is not touched."""
    if tree.top.name == "merged" and "whiteout" in name:
        pytest.skip("overlayfs keeps that number for itself")
    group, guard = guarded
    settled(tree)
    guard.read()
    assert lsm.in_cgroup(group, lambda: FINE[name](tree)) == 0
    assert guard.read() == []


@pytest.mark.parametrize("name", ACROSS)
def test_across_the_boundary(
    name: str, outsider: int, guarded: tuple[Path, lsm.LsmGuard], neighbour: Path
) -> None:
    """A process outside cannot be touched from inside; the neighbour can, so it is the guard."""
    act, what = ACROSS[name]
    group, guard = guarded
    guard.read()
    assert lsm.in_cgroup(group, lambda: act(outsider)) in REFUSED
    assert guard.read()[0].kind == f"escape.{what}"
    assert lsm.in_cgroup(neighbour, lambda: act(outsider)) not in REFUSED
    assert guard.read() == []


def test_the_host_may_trace_the_agent(guarded: tuple[Path, lsm.LsmGuard]) -> None:
    """The guard judges the agent, not who looks at it from outside."""
    group, guard = guarded
    with subprocess.Popen(["sleep", "60"]) as process:
        (group / "cgroup.procs").write_text(str(process.pid))
        guard.read()
        call("ptrace", 0x4206, process.pid, 0, 0)  # PTRACE_SEIZE
        assert Path(f"/proc/{process.pid}/maps").read_text()
        os.kill(process.pid, signal.SIGKILL)
    assert guard.read() == []
