"""No agent leaves a set-user-ID file on the host's file systems, in whatever way it makes it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from harness import run

pytestmark = pytest.mark.root
NOBODY = 65534

WAYS = r"""
import ctypes, errno, os, mmap, shutil, stat, subprocess, sys
libc = ctypes.CDLL(None, use_errno=True)
CALLS = {"chmod": 90, "fchmod": 91, "fchmodat": 268, "fchmodat2": 452}
MODE = int(sys.argv[1], 8)

def plain(name):
    with open(name, "wb") as file:
        file.write(b"#!/bin/sh\n")
    return name

def filled(fd):
    os.write(fd, b"#!/bin/sh\n")

def syscall(name):
    fd = os.open(plain(name), os.O_RDWR)
    first = {"chmod": (name.encode(),), "fchmod": (fd,)}.get(name, (-100, name.encode()))
    high = ctypes.c_ulong(1 << 40 | MODE)  # bits that the kernel does not look at
    if libc.syscall(CALLS[name], *first, high, 0) < 0:
        raise OSError(ctypes.get_errno(), name)

def create():
    filled(os.open("create", os.O_CREAT | os.O_WRONLY, MODE))

def creat_mapped():
    fd = os.open("mapped", os.O_CREAT | os.O_RDWR, MODE)
    os.ftruncate(fd, 4096)
    with mmap.mmap(fd, 4096) as memory:
        memory[:10] = b"#!/bin/sh\n"

def node():
    os.mknod("node", stat.S_IFREG | MODE)
    filled(os.open("node", os.O_WRONLY))

def nameless():
    fd = os.open(".", os.O_TMPFILE | os.O_RDWR, MODE)
    filled(fd)
    libc.linkat(-100, f"/proc/self/fd/{fd}".encode(), -100, b"nameless", 0x400)

def copied():
    fd, there = os.open("copied", os.O_CREAT | os.O_WRONLY, MODE), os.open(plain("p"), os.O_RDONLY)
    os.copy_file_range(there, fd, 10)

def spliced():
    fd, (end, other) = os.open("spliced", os.O_CREAT | os.O_WRONLY, MODE), os.pipe()
    os.write(other, b"#!/bin/sh\n")
    os.splice(end, fd, 10)

def moved():
    os.open("filled-later", os.O_CREAT | os.O_WRONLY, MODE)
    os.rename("filled-later", "moved")
    filled(os.open("moved", os.O_WRONLY | os.O_APPEND))

def capability():
    os.setxattr(plain("capable"), "security.capability",
                bytes.fromhex("0100000200200000000000000000000000000000"))

for name in CALLS:
    try:
        syscall(name)
    except OSError as error:
        print(name, errno.errorcode[error.errno])
for way in (create, creat_mapped, node, nameless, copied, spliced, moved, capability):
    try:
        way()
    except OSError as error:
        print(way.__name__, errno.errorcode[error.errno])
"""


def marked(folder: Path) -> set[str]:
    """Files with content that run as another user or group, or with a capability."""
    found = set()
    for path in folder.iterdir():
        facts = path.stat()
        if facts.st_size and facts.st_mode & 0o6000:
            found.add(path.name)
        if "security.capability" in os.listxattr(path):
            found.add(path.name)
    return found


@pytest.fixture
def open_work(tmp_path: Path) -> Path:
    """A workspace that every user may write to, on a disk (a tmpfs has no O_TMPFILE before 6.6)."""
    folder = tmp_path / "work"
    folder.mkdir()
    folder.chmod(0o777)
    for parent in folder.parents:
        if parent == Path("/tmp"):
            break
        parent.chmod(parent.stat().st_mode | 0o055)
    return folder


CASES = [(0, "4755"), (0, "2755"), (0, "6755"), (NOBODY, "4755"), (NOBODY, "6755")]
CHMODS = {"chmod", "fchmod", "fchmodat"}  # and fchmodat2 from Linux 6.6 on


@pytest.mark.parametrize(("uid", "mode"), CASES)
def test_nothing_is_left_set_user_id(uid: int, mode: str, open_work: Path) -> None:
    """Every way leaves no such file; chmod is refused, counted and explained."""
    done = run("python3", "-c", WAYS, mode, cwd=open_work, options=("--user", str(uid)))
    assert done.code == 0, done.err
    assert marked(open_work) == set()
    refused = dict(line.split() for line in done.out.splitlines())
    assert {name: refused[name] for name in CHMODS} == dict.fromkeys(CHMODS, "EPERM")
    assert refused["fchmodat2"] in ("EPERM", "ENOSYS") and refused["capability"] == "EPERM"
    told = {event["kind"]: event["subject"] for event in done.denied("escape.")}
    assert set(told) >= {f"escape.{name}" for name in CHMODS}
    assert told["escape.chmod"] == {"mode": f"0{mode}"[-4:]}


def test_without_the_guard_such_files_are_made(open_work: Path) -> None:
    """Negative control: root with all its capabilities leaves them in nearly every way, a user
    by chmod."""
    subprocess.run([sys.executable, "-I", "-c", WAYS, "4755"], cwd=open_work, check=True)
    ways = {"create", "node", "nameless", "copied", "spliced", "moved", "capable"}
    assert marked(open_work) >= CHMODS | ways


def test_a_user_without_the_guard(open_work: Path) -> None:
    """Negative control: a user's own set-user-ID file, which others could run as that user."""
    argv = ["setpriv", "--reuid", str(NOBODY), "--clear-groups", "--", "/usr/bin/python3", "-c"]
    subprocess.run([*argv, WAYS, "4755"], cwd=open_work, check=True)
    assert marked(open_work) >= CHMODS


def test_ordinary_modes(open_work: Path) -> None:
    """Every other mode is set as ever, and a user's folder passes its group on."""
    done = run(
        *("sh", "-ec", "mkdir d; chmod 2775 d; touch f; chmod 0751 f; stat -c %a d f"),
        cwd=open_work,
        options=("--user", str(NOBODY)),
    )
    assert done.out.split() == ["2775", "751"] and not done.denied(), done.err
