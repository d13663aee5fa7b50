"""The kernel plane, files and programs: act, place, verdict; each with a neighbour as control."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import shutil
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mis_run.events import Verdict
from mis_run.guards import lsm

OK, EPERM, EXDEV = 0, errno.EPERM, errno.EXDEV
LIBC = ctypes.CDLL(None, use_errno=True)
AT_FDCWD, RENAME_EXCHANGE, AT_EMPTY_PATH = -100, 2, 0x1000
LOADER = "/lib64/ld-linux-x86-64.so.2"
Act = Callable[[Any], object]


@dataclass(frozen=True)
class Row:
    """One act. ``expected`` is its errno in the agent, ``word`` the event's act; the control must
    give ``control`` without the guard (None: anything but EPERM)."""

    act: Act
    expected: int
    word: str = ""
    prepare: Act = lambda t: None
    control: int | None = OK
    rule: str | None = None


def check(result: int) -> int:
    """A libc call's result, or its error raised."""
    if result < 0:
        raise OSError(ctypes.get_errno(), "libc")
    return result


def opened(path: Path, flags: int = os.O_RDONLY) -> None:
    os.close(os.open(path, flags, 0o600))


def reopened(path: Path) -> None:
    fd = os.open(path, os.O_PATH)
    os.close(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY))


def run(*argv: object) -> None:
    """Run a program to its end; its failure is EPERM, as the loader's message says."""
    words = [os.fspath(word) for word in argv]  # type: ignore[call-overload]
    pid = os.posix_spawn(words[0], words, {})
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
        raise OSError(errno.EPERM, "the program failed")


def mapped(path: Path, protection: int, later: int = 0) -> None:
    fd = os.open(path, os.O_RDONLY)
    LIBC.mmap.restype = ctypes.c_void_p
    LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    at = LIBC.mmap(None, 4096, protection, mmap.MAP_PRIVATE, fd, 0)
    if at == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), "mmap")
    if later:
        check(LIBC.mprotect(ctypes.c_void_p(at), 4096, later))


def memory(protection: int) -> None:
    mmap.mmap(-1, 4096, prot=protection).close()


def memfd(_: object) -> None:
    fd = os.memfd_create("program", 0)
    os.write(fd, Path("/bin/true").read_bytes())
    pid = os.fork()
    if pid == 0:
        try:
            os.execve(fd, ["true"], {})
        except OSError as error:
            os._exit(error.errno or 255)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code:
        raise OSError(code, "execve of a memfd")


def written_memfd(_: object) -> None:
    fd = os.memfd_create("data", 0)
    os.write(fd, b"data")
    os.close(os.open(f"/proc/self/fd/{fd}", os.O_RDWR))


def written_pipe(_: object) -> None:
    reader, _ = os.pipe()
    os.close(os.open(f"/proc/self/fd/{reader}", os.O_RDONLY | os.O_NONBLOCK))


def exchange(one: Path, other: Path) -> None:
    names = os.fsencode(one), os.fsencode(other)
    check(LIBC.renameat2(AT_FDCWD, names[0], AT_FDCWD, names[1], RENAME_EXCHANGE))


def bound(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))


def temporary(folder: Path) -> None:
    os.close(os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o600))


def received(path: Path, flags: int = os.O_RDONLY) -> Act:
    """A descriptor that somebody outside opened, sent over a socket before the agent reads it."""
    ours, theirs = socket.socketpair()
    fd = os.open(path, flags)
    socket.send_fds(ours, [b"x"], [fd])
    os.close(fd)

    def act(_: object) -> None:
        _, fds, _, _ = socket.recv_fds(theirs, 1, 1)
        if not fds:  # the kernel leaves out what may not be received
            raise OSError(errno.EPERM, "not received")

    return act


def watched(path: Path) -> None:
    check(LIBC.inotify_add_watch(check(LIBC.inotify_init()), os.fsencode(path), 2))


def flagged(path: Path) -> None:
    fcntl.ioctl(os.open(path, os.O_RDONLY), 0x40086602, struct.pack("=q", 0x40))


def attribute(folder: Path, call: Callable[..., None], *value: bytes) -> None:
    """A call on an extended attribute. Before 6.6 tmpfs has none, and says so when allowed."""
    try:
        call(folder / "file", "user.mis", *value)
    except OSError as error:
        if error.errno not in (errno.ENOTSUP, errno.ENODATA):
            raise


def access_list(folder: Path) -> None:
    """Owner and group read and write; others nothing."""
    entries = ((1, 6), (4, 6), (32, 0))  # ACL_USER_OBJ, ACL_GROUP_OBJ, ACL_OTHER
    value = struct.pack("=I", 2) + b"".join(struct.pack("=HHI", *e, 0xFFFFFFFF) for e in entries)
    os.setxattr(folder / "file", "system.posix_acl_access", value)


def fresh(folder: Path, name: str) -> Path:
    """A path where nothing is."""
    path = folder / name
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    return path


def again(path: Path, text: str = "content") -> Path:
    """A file with content."""
    path.unlink(missing_ok=True)
    path.write_text(text)
    return path


def folder(path: Path) -> Path:
    path.mkdir(exist_ok=True)
    return path


def link(name: str, target: Callable[[Any], Path]) -> Act:
    def prepare(t: Any) -> None:
        fresh(t.open, name).symlink_to(target(t))

    return prepare


def hard(name: str, target: Callable[[Any], Path]) -> Act:
    def prepare(t: Any) -> None:
        fresh(t.open, name).hardlink_to(target(t))

    return prepare


def interpreted(where: str, interpreter: str) -> Act:
    """A script in ``where`` for a program in ``interpreter``."""

    def prepare(t: Any) -> None:
        script = again(getattr(t, where) / "inter", f"#!{getattr(t, interpreter)}/prog\n")
        script.chmod(0o755)

    return prepare


TIME = (1e9, 1e9)
PLACES: dict[str, dict[str, int]] = {
    # act: expected errno in open, ro, noexec, hidden, none
    "read": {"open": OK, "ro": OK, "noexec": OK, "hidden": EPERM, "none": EPERM},
    "write": {"open": OK, "ro": EPERM, "noexec": OK, "hidden": EPERM, "none": EPERM},
    "exec": {"open": OK, "ro": OK, "noexec": EPERM, "hidden": EPERM, "none": EPERM},
}
ACTS: dict[str, tuple[str, str, Callable[[Path], object], Callable[[Path], object]]] = {
    # name: (which places, word, preparation in the folder, act in the folder)
    "read": ("read", "open", lambda f: None, lambda f: opened(f / "file")),
    "list": ("read", "open", lambda f: None, lambda f: os.listdir(f)),
    "reopen": ("read", "open", lambda f: None, lambda f: reopened(f / "file")),
    "spell": ("read", "open", lambda f: None, lambda f: opened(f / ".." / f.name / "file")),
    "root": ("read", "open", lambda f: None, lambda f: opened(Path(f"/proc/self/root{f}/file"))),
    "watch": ("read", "notify", lambda f: None, lambda f: watched(f / "file")),
    "write": ("write", "open", lambda f: None, lambda f: opened(f / "file", os.O_WRONLY)),
    "update": ("write", "open", lambda f: None, lambda f: opened(f / "file", os.O_RDWR)),
    "empty": (
        "write",
        "open",
        lambda f: None,
        lambda f: opened(f / "file", os.O_WRONLY | os.O_TRUNC),
    ),
    "truncate": ("write", "truncate", lambda f: None, lambda f: os.truncate(f / "file", 3)),
    "chmod": ("write", "chmod", lambda f: None, lambda f: os.chmod(f / "file", 0o640)),
    "chown": ("write", "chown", lambda f: None, lambda f: os.chown(f / "file", 0, 0)),
    "utime": ("write", "setattr", lambda f: None, lambda f: os.utime(f / "file", TIME)),
    "setxattr": ("write", "setxattr", lambda f: None, lambda f: attribute(f, os.setxattr, b"x")),
    "removexattr": ("write", "setxattr", lambda f: None, lambda f: attribute(f, os.removexattr)),
    "acl": ("write", "acl", lambda f: None, access_list),
    "create": (
        "write",
        "mknod",
        lambda f: fresh(f, "new"),
        lambda f: opened(f / "new", os.O_CREAT | os.O_EXCL | os.O_WRONLY),
    ),
    "mkdir": ("write", "mkdir", lambda f: fresh(f, "new"), lambda f: os.mkdir(f / "new")),
    "fifo": ("write", "mknod", lambda f: fresh(f, "new"), lambda f: os.mkfifo(f / "new")),
    "socket": ("write", "mknod", lambda f: fresh(f, "new"), lambda f: bound(f / "new")),
    "symlink": (
        "write",
        "symlink",
        lambda f: fresh(f, "new"),
        lambda f: os.symlink("x", f / "new"),
    ),
    "tmpfile": ("write", "open", lambda f: None, temporary),
    "unlink": ("write", "unlink", lambda f: again(f / "old"), lambda f: os.unlink(f / "old")),
    "rmdir": ("write", "rmdir", lambda f: folder(f / "olddir"), lambda f: os.rmdir(f / "olddir")),
    "rename": (
        "write",
        "rename",
        lambda f: (again(f / "old"), fresh(f, "new")),
        lambda f: os.rename(f / "old", f / "new"),
    ),
    "replace": (
        "write",
        "rename",
        lambda f: (again(f / "old"), again(f / "new")),
        lambda f: os.rename(f / "old", f / "new"),
    ),
    "link": (
        "write",
        "link",
        lambda f: (again(f / "old"), fresh(f, "new")),
        lambda f: os.link(f / "old", f / "new"),
    ),
    "run": ("exec", "", lambda f: None, lambda f: run(f / "prog")),
    "script": ("exec", "", lambda f: None, lambda f: run(f / "script")),
}


@pytest.mark.parametrize("name", ACTS)
def test_acts_and_places(
    name: str, tree: Any, guarded: tuple[Path, lsm.LsmGuard], neighbour: Path
) -> None:
    """Each kind of act in each kind of place: the verdict, its event, its count, its control."""
    row, word, prepare, act = ACTS[name]
    rules = {"open": "", "ro": "default", "none": "default"}

    def made(place: str) -> Row:
        where = getattr(tree, place)
        return Row(
            act=lambda t: act(where),
            prepare=lambda t: prepare(where),
            expected=PLACES[row][place],
            word=word,
            rule=rules.get(place, place),
        )

    judged([made(place) for place in PLACES[row]], tree, guarded, neighbour)


def errnos(group: Path, rows: list[Row], tree: Any) -> list[int]:
    """The errno of each row's act, all by one process in ``group``."""
    results = mmap.mmap(-1, 4096)

    def act() -> None:
        for index, row in enumerate(rows):
            code = 0
            try:
                row.act(tree)
            except OSError as error:
                code = error.errno or 255
            struct.pack_into("=i", results, 4 * index, code)

    assert lsm.in_cgroup(group, act) == 0
    return list(struct.unpack_from(f"={len(rows)}i", results))


def judged(rows: list[Row], tree: Any, guarded: tuple[Path, lsm.LsmGuard], neighbour: Path) -> None:
    """Run the rows in the agent, then in the neighbour."""
    group, guard = guarded
    for row in rows:
        row.prepare(tree)
    guard.read()
    before = guard.counts()
    got = errnos(group, rows, tree)
    if set(got) == {errno.ENOTSUP}:
        pytest.skip("this file system has no such call")
    assert got == [row.expected for row in rows]
    events = guard.read()
    assert guard.counts().denied - before.denied == len(events)
    denied = [row for row in rows if row.expected == EPERM]
    assert len(events) == len(denied), events
    for row, event in zip(denied, events, strict=True):
        words = (row.word, "setxattr") if row.word == "acl" else (row.word,)  # setxattr before 6.2
        assert event.kind in ([f"file.{word}" for word in words] if row.word else ["exec.run"])
        assert row.rule in (None, event.rule)
        assert event.verdict == Verdict.DENY
        assert event.pid not in (0, os.getpid())
    for row in rows:
        row.prepare(tree)
    got = errnos(neighbour, rows, tree)
    assert all(
        code == row.control if row.control is not None else code != EPERM
        for code, row in zip(got, rows, strict=True)
    ), got
    assert guard.read() == []


ROWS: dict[str, Row] = {
    "symlink to the hidden": Row(
        lambda t: opened(t.open / "link"),
        EPERM,
        "open",
        link("link", lambda t: t.hidden / "file"),
    ),
    "symlink to the allowed": Row(
        lambda t: opened(t.open / "link"), OK, prepare=link("link", lambda t: t.ro / "file")
    ),
    "hard link to a file with its own rule": Row(
        lambda t: opened(t.open / "hard"),
        EPERM,
        "open",
        hard("hard", lambda t: t.sealed),
        rule="sealed",
    ),
    # A rule on a directory is about what is reached through it.
    "hard link out of a denied folder, made outside": Row(
        lambda t: opened(t.open / "hard"), OK, prepare=hard("hard", lambda t: t.hidden / "file")
    ),
    "stat of the hidden": Row(lambda t: os.stat(t.hidden / "file"), OK),
    "O_PATH of the hidden": Row(lambda t: opened(t.hidden / "file", os.O_PATH), OK),
    "link the hidden into the open": Row(
        lambda t: os.link(t.hidden / "file", t.open / "gain"),
        EPERM,
        "link",
        lambda t: fresh(t.open, "gain"),
    ),
    "link the read-only into the open": Row(
        lambda t: os.link(t.ro / "file", t.open / "gain"),
        EXDEV,
        prepare=lambda t: fresh(t.open, "gain"),
    ),
    "link what must not run into the open": Row(
        lambda t: os.link(t.noexec / "prog", t.open / "gain"),
        EXDEV,
        prepare=lambda t: fresh(t.open, "gain"),
    ),
    "link from the open to where less is allowed": Row(
        lambda t: os.link(t.open / "file", t.noexec / "less"),
        OK,
        prepare=lambda t: fresh(t.noexec, "less"),
    ),
    "move what must not run into the open": Row(
        lambda t: os.rename(t.noexec / "old", t.open / "gain"),
        EXDEV,
        prepare=lambda t: (again(t.noexec / "old"), fresh(t.open, "gain")),
    ),
    "mv copies then": Row(
        lambda t: shutil.move(t.noexec / "old", t.open / "gain"),
        OK,
        prepare=lambda t: (again(t.noexec / "old"), fresh(t.open, "gain")),
    ),
    "move the read-only into the open": Row(
        lambda t: os.rename(t.ro / "old", t.open / "gain"),
        EPERM,
        "rename",
        lambda t: (again(t.ro / "old"), fresh(t.open, "gain")),
    ),
    "move the open into the read-only": Row(
        lambda t: os.rename(t.open / "old", t.ro / "new"),
        EPERM,
        "rename",
        lambda t: (again(t.open / "old"), fresh(t.ro, "new")),
    ),
    "move the denied file": Row(
        lambda t: os.rename(t.sealed, t.open / "moved"),
        EPERM,
        "rename",
        control=OK,
        prepare=lambda t: (
            os.rename(t.open / "moved", t.sealed) if (t.open / "moved").exists() else None
        ),
        rule="sealed",
    ),
    "move a folder above a denial": Row(
        lambda t: os.rename(t.open / "deep", t.open / "moved-dir"),
        EPERM,
        "rename",
        prepare=lambda t: (
            os.rename(t.open / "moved-dir", t.open / "deep")
            if (t.open / "moved-dir").exists()
            else None
        ),
        rule="a rule hangs on it or below",
        control=None,  # an overlay moves no folder of its lower layer
    ),
    "exchange the open and the hidden": Row(
        lambda t: exchange(t.open / "old", t.hidden / "file"),
        EPERM,
        "rename",
        lambda t: (
            os.rename(t.open / "moved-dir", t.open / "deep")
            if (t.open / "moved-dir").exists()
            else None,
            again(t.open / "old"),
        ),
    ),
    "exchange within the open": Row(
        lambda t: exchange(t.open / "old", t.open / "file"),
        OK,
        prepare=lambda t: again(t.open / "old"),
    ),
    "exchange with what must not run": Row(
        lambda t: exchange(t.open / "old", t.noexec / "file"),
        EXDEV,
        prepare=lambda t: again(t.open / "old"),
    ),
    "read what must not be written": Row(lambda t: opened(t.fixed), OK),
    "write what must not be written": Row(
        lambda t: opened(t.fixed, os.O_WRONLY), EPERM, "open", rule="fixed"
    ),
    "replace what must not be written": Row(
        lambda t: os.rename(t.open / "old", t.fixed),
        EPERM,
        "rename",
        lambda t: again(t.open / "old"),
        rule="a rule hangs on it or below",
    ),
    "a memfd is data": Row(written_memfd, OK),
    "a memfd is no program": Row(memfd, EPERM),
    "a pipe by its number": Row(written_pipe, OK),
    "script here, interpreter denied": Row(
        lambda t: run(t.open / "inter"), EPERM, prepare=interpreted("open", "noexec")
    ),
    "script denied, interpreter here": Row(
        lambda t: run(t.noexec / "inter"), EPERM, prepare=interpreted("noexec", "open")
    ),
    "script and interpreter here": Row(
        lambda t: run(t.open / "inter"), OK, prepare=interpreted("open", "open")
    ),
    "a library is mapped": Row(lambda t: mapped(t.ro / "prog", 5), OK),
    "executable memory of what must not run": Row(
        lambda t: mapped(t.noexec / "prog", 5), EPERM, "mmap"
    ),
    "the same, made executable later": Row(
        lambda t: mapped(t.noexec / "prog", 1, 5), EPERM, "mmap"
    ),
    "made executable later where allowed": Row(lambda t: mapped(t.open / "prog", 1, 5), OK),
    "the loader runs what may run": Row(lambda t: run(LOADER, t.open / "prog"), OK),
    "the loader runs what must not": Row(lambda t: run(LOADER, t.noexec / "prog"), EPERM, "mmap"),
    "memory to write": Row(lambda t: memory(3), OK),
    "memory to execute": Row(lambda t: memory(5), OK),
    "memory to write and execute": Row(lambda t: memory(7), EPERM, "wx_memory"),
    "file flags by ioctl": Row(lambda t: flagged(t.ro / "file"), EPERM, "ioctl", control=None),
}


@pytest.mark.parametrize("name", ROWS)
def test_ways_around(
    name: str, tree: Any, guarded: tuple[Path, lsm.LsmGuard], neighbour: Path
) -> None:
    """Links, moves, descriptors, interpreters and memory: each way to the same object."""
    judged([ROWS[name]], tree, guarded, neighbour)


@pytest.mark.parametrize(
    ("place", "flags", "arrives"),
    [
        ("open", os.O_RDWR, True),
        ("ro", os.O_RDONLY, True),
        ("ro", os.O_RDWR, False),
        ("ro", os.O_PATH, True),
        ("hidden", os.O_RDONLY, False),
        ("none", os.O_RDONLY, False),
    ],
)
def test_a_descriptor_from_outside(
    place: str,
    flags: int,
    arrives: bool,
    tree: Any,
    guarded: tuple[Path, lsm.LsmGuard],
    neighbour: Path,
) -> None:
    """A file that somebody else opened is judged when its descriptor arrives."""
    group, guard = guarded
    guard.read()
    path = getattr(tree, place) / "file"
    act = received(path, flags)
    assert lsm.in_cgroup(group, lambda: act(tree)) == (OK if arrives else EPERM)
    assert [event.kind for event in guard.read()] == ([] if arrives else ["file.receive"])
    control = received(path, flags)
    assert lsm.in_cgroup(neighbour, lambda: control(tree)) == OK


def test_an_event_names_the_path(tree: Any, guarded: tuple[Path, lsm.LsmGuard]) -> None:
    """A denial shows path, inode and rights."""
    group, guard = guarded
    guard.read()
    path = tree.hidden / "file"
    assert lsm.in_cgroup(group, lambda: opened(path, os.O_RDWR)) == EPERM
    (event,) = guard.read()
    assert event.subject["path"] == str(path)
    assert event.subject["inode"] == path.stat().st_ino
    assert event.subject["rights"] == "read write"
    assert event.rule == "hidden"
