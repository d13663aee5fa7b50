"""The kernel plane around a container: another mount namespace, an overlay as root, bind mounts."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from mis_run.guards import lsm, lsm_plane, lsm_policy
from mis_run.guards.lsm_abi import Right
from mis_run.guards.lsm_policy import Line
from mis_run.linux import libc

OK, EPERM = 0, errno.EPERM
NO, ALL, READ = Right(0), Right.ALL, Right.READ | Right.LIST
WRITE, EXEC = Right.WRITE, Right.EXEC


@dataclass(frozen=True)
class Box:
    """A process in mount and pid namespaces of its own, on an overlay of the machine's own root."""

    pid: int
    workspace: Path

    def root(self) -> int:
        return os.open(f"/proc/{self.pid}/root", os.O_PATH | os.O_DIRECTORY)


LAYOUT = """
set -e
mount --make-rprivate /
mount -t tmpfs layer "$1"
mkdir "$1"/upper "$1"/work "$1"/root
mount -t overlay -o lowerdir=/,upperdir="$1"/upper,workdir="$1"/work,xino=on overlay "$1"/root
cd "$1"/root
mkdir -p workspace
mount --bind "$2" workspace
mount -t proc proc proc
mount -t tmpfs tmp tmp
pivot_root . mnt
cd /
umount -l mnt
echo ready
exec sleep 600
"""


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    folder = tmp_path_factory.mktemp("box")
    layer, workspace = folder / "layer", folder / "ws"
    layer.mkdir()
    (workspace / ".git" / "hooks").mkdir(parents=True)
    (workspace / "file").write_text("mine")
    argv = ["unshare", "--mount", "sh", "-c", LAYOUT, "sh", str(layer), str(workspace)]
    with subprocess.Popen(argv, stdout=-1, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        yield Box(process.pid, workspace)
        process.kill()


LINES = [
    Line("/", READ, NO, "the system"),
    Line("/usr", READ | EXEC, NO, "programs"),
    Line("/workspace", ALL, NO, "workspace"),
    Line("/workspace/.git/hooks", READ, ALL & ~READ, "hooks"),
    Line("/etc/shadow", NO, ALL, "secrets"),
    Line("/tmp", ALL & ~EXEC, NO, "scratch"),
    Line("/proc", READ | WRITE, NO, "proc"),
    Line("/dev", READ | WRITE, NO, "dev"),
]


@pytest.fixture(scope="module")
def agent(box: Box, cgroups: Callable[[], Path]) -> Iterator[tuple[Path, lsm.LsmGuard]]:
    """The container's policy, compiled from outside."""
    group, root = cgroups(), box.root()
    device, mounts = lsm_policy.devices(box.pid), lsm_policy.points(box.pid)
    assert {"/", "/workspace", "/proc", "/tmp"} <= set(mounts)
    rules = lsm_policy.compile(LINES, root, device, mounts)
    os.close(root)
    assert rules.missing == ()
    lsm_plane.ensure().close()
    policy = lsm.LsmPolicy(rules=rules, defcon=lsm.Defcon(act=False))
    with lsm.attach(group, policy) as guard:
        yield group, guard


def opened(path: str, flags: int = os.O_RDONLY) -> Callable[[], object]:
    return lambda: os.close(os.open(path, flags, 0o600))


def new(path: str) -> Callable[[], object]:
    return opened(path, os.O_CREAT | os.O_WRONLY)


ROWS: dict[str, tuple[Callable[[], object], int, str]] = {
    "read a program's file": (opened("/usr/bin/env"), OK, ""),
    "read what the root's rule gives": (opened("/etc/passwd"), OK, ""),
    "read a secret": (opened("/etc/shadow"), EPERM, "secrets"),
    "write a system file (copy up)": (opened("/etc/passwd", os.O_WRONLY), EPERM, "the system"),
    "write into the workspace": (new("/workspace/new"), OK, ""),
    "write where git would execute": (new("/workspace/.git/hooks/pre-commit"), EPERM, "hooks"),
    "move the hooks away": (
        lambda: os.rename("/workspace/.git/hooks", "/workspace/.git/old"),
        EPERM,
        "hooks",
    ),
    "move what is above them away": (
        lambda: os.rename("/workspace/.git", "/workspace/.gut"),
        EPERM,
        "a rule hangs on it or below",
    ),
    "write scratch, across a mount": (new("/tmp/new"), OK, ""),
    "change times in the workspace": (lambda: os.utime("/workspace/file"), OK, ""),
    "change times of a system file": (lambda: os.utime("/etc/passwd"), EPERM, "the system"),
    "read a process's file": (opened("/proc/self/status"), OK, ""),
    "list the root": (lambda: os.listdir("/"), OK, ""),
    "make a folder in the root": (lambda: os.mkdir("/new"), EPERM, "the system"),
}


def errno_in(box: Box, group: Path, act: Callable[[], object]) -> int:
    """Errno of ``act`` by a process of the container that is then put into the cgroup."""
    namespace, root = os.open(f"/proc/{box.pid}/ns/mnt", os.O_RDONLY), box.root()
    reader, writer = os.pipe()
    go, went = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 0
        try:
            libc.setns(namespace, libc.CLONE_NEWNS)
            os.fchdir(root)
            os.chroot(".")
            os.write(writer, b"x")
            os.read(go, 1)
            act()
        except OSError as error:
            code = error.errno or 255
        os.write(writer, bytes([code]))
        os._exit(0)
    assert os.read(reader, 1) == b"x"  # entering is not the agent's act
    (group / "cgroup.procs").write_text(str(pid))
    os.write(went, b"x")
    code = os.read(reader, 1)
    os.waitpid(pid, 0)
    for fd in (reader, writer, go, went, namespace, root):
        os.close(fd)
    return code[0]


@pytest.mark.parametrize("name", ROWS)
def test_container(name: str, box: Box, agent: tuple[Path, lsm.LsmGuard], neighbour: Path) -> None:
    """What a profile's lines say, by the paths that the agent sees, holds in the container."""
    act, expected, rule = ROWS[name]
    group, guard = agent
    guard.read()
    assert errno_in(box, group, act) == expected
    events = guard.read()
    assert {event.rule for event in events} == ({rule} if expected else set()), events
    if expected and "move" not in name:
        assert errno_in(box, neighbour, act) == OK


def test_the_same_file_outside_is_untouched(box: Box, agent: tuple[Path, lsm.LsmGuard]) -> None:
    """Rules are on the overlay's inodes: the host's own file has none, for anybody."""
    assert Path("/etc/shadow").read_bytes()
    assert os.kill(box.pid, signal.SIGCONT) is None
