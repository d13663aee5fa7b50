"""The kernel plane's memory of verdicts: that it is used, and all that must make it void.

Each test first opens a file until it is known, and proves it by the kernel's counters; then
something changes, and the very next act is judged anew.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from acts import OPENING

from mis_run.dataclass import replace
from mis_run.guards import lsm, lsm_plane

OK, EPERM, EROFS = 0, errno.EPERM, errno.EROFS
CALM = lsm.Defcon(act=False)
TIMES = 256


def read(path: Path, flags: int = os.O_RDONLY) -> Callable[[], object]:
    return lambda: os.close(os.open(path, flags))


def often(path: Path, times: int, flags: int = os.O_RDONLY) -> Callable[[], object]:
    def act() -> None:
        for _ in range(times):
            os.close(os.open(path, flags))

    return act


def run(path: Path) -> Callable[[], object]:
    def act() -> None:
        pid = os.posix_spawn(path, [str(path)], {})
        if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
            raise OSError(EPERM, "it failed")

    return act


def warm(guard: lsm.LsmGuard, group: Path, path: Path) -> None:
    """Open a file until it is known; proven."""
    assert lsm.in_cgroup(group, read(path)) == OK
    before = guard.counts()
    assert lsm.in_cgroup(group, often(path, TIMES)) == OK
    after = guard.counts()
    assert after.asked - before.asked <= 2
    assert after.walks - before.walks <= 2  # somebody else on this machine moved something


def fresh(folder: Path) -> Path:
    """A folder with a file and a program."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "file").write_text("content")
    shutil.copy("/bin/true", folder / "prog")
    return folder


@pytest.fixture
def guard(tree: Any, agent: Path) -> Iterator[lsm.LsmGuard]:
    with lsm.attach(agent, tree.policy(defcon=CALM)) as attached:
        yield attached


@pytest.fixture(scope="module", autouse=True)
def _plane() -> Iterator[None]:
    """Loading takes seconds in an emulated machine: before the clock of any one test runs."""
    lsm_plane.ensure().close()
    yield


# ---- it is used ---------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_RDWR])
def test_it_is_used(flags: int, tree: Any, agent: Path, guard: lsm.LsmGuard) -> None:
    """Of a thousand opens in one folder nearly all are known; without it none is."""
    before = guard.counts()
    assert lsm.in_cgroup(agent, often(tree.open / "file", 1000, flags)) == OK
    after = guard.counts()
    assert after.asked - before.asked <= 100
    assert 1 <= after.walks - before.walks <= 20
    assert (after.denied, after.killed) == (before.denied, before.killed)


def test_off(tree: Any, agent: Path) -> None:
    """The switch that the costs are compared by."""
    with lsm.attach(agent, tree.policy(defcon=CALM, cache=False)) as guard:
        assert lsm.in_cgroup(agent, often(tree.open / "file", 500)) == OK
        assert guard.counts().asked >= 500
        assert guard.counts().walks == 0
        assert lsm.in_cgroup(agent, read(tree.hidden / "file")) == EPERM


def test_programs_are_known(tree: Any, agent: Path, guard: lsm.LsmGuard) -> None:
    """A program that ran before runs by what is known of its folder; so does its memory."""
    assert lsm.in_cgroup(agent, run(tree.open / "prog")) == OK
    before = guard.counts().walks
    for _ in range(5):
        assert lsm.in_cgroup(agent, run(tree.open / "prog")) == OK
    assert guard.counts().walks - before <= 2
    assert lsm.in_cgroup(agent, run(tree.noexec / "prog")) == EPERM


@pytest.mark.parametrize("tree", ["tmpfs"], indirect=True, scope="module")
def test_looked_up_anew(tree: Any, agent: Path, guard: lsm.LsmGuard) -> None:
    """Where names are looked up anew each time nothing is remembered: a process in /proc."""
    before = guard.counts()
    assert lsm.in_cgroup(agent, often(Path("/proc/self/status"), TIMES)) == OK
    after = guard.counts()
    assert after.asked - before.asked >= TIMES
    assert after.walks - before.walks <= 2


# ---- rules of a file's own ----------------------------------------------------------------


def test_a_rule_of_its_own(tree: Any, agent: Path, guard: lsm.LsmGuard) -> None:
    """What is known of the folder says nothing of a file that has a rule."""
    warm(guard, agent, tree.open / "file")
    assert lsm.in_cgroup(agent, read(tree.sealed)) == EPERM
    assert lsm.in_cgroup(agent, read(tree.fixed)) == OK
    assert lsm.in_cgroup(agent, read(tree.fixed, os.O_WRONLY)) == EPERM
    assert lsm.in_cgroup(agent, read(tree.hidden, os.O_RDONLY | os.O_DIRECTORY)) == EPERM


def test_denials_are_told(tree: Any, agent: Path, guard: lsm.LsmGuard) -> None:
    """A denial is never answered from memory: each has its rule and its event."""
    warm(guard, agent, tree.ro / "file")
    for _ in range(3):
        assert lsm.in_cgroup(agent, read(tree.ro / "file", os.O_WRONLY)) == EPERM
    assert [(event.kind, event.rule) for event in guard.read()] == [("file.open", "default")] * 3
    assert lsm.in_cgroup(agent, lambda: os.truncate(tree.ro / "file", 0)) == EPERM


# ---- moves --------------------------------------------------------------------------------


def test_moved_by_the_agent(tree: Any, agent: Path, guard: lsm.LsmGuard) -> None:
    """A folder above is moved by the agent to where nothing may be executed."""
    way = fresh(tree.open / "way" / "a").parent
    shutil.rmtree(tree.noexec / "way", ignore_errors=True)
    warm(guard, agent, way / "a" / "prog")
    for _ in range(3):
        assert lsm.in_cgroup(agent, run(way / "a" / "prog")) == OK
    assert lsm.in_cgroup(agent, lambda: way.rename(tree.noexec / "way")) == OK
    assert lsm.in_cgroup(agent, run(tree.noexec / "way" / "a" / "prog")) == EPERM
    assert lsm.in_cgroup(agent, read(tree.noexec / "way" / "a" / "file")) == OK


def test_moved_by_somebody_else(tree: Any, agent: Path, guard: lsm.LsmGuard) -> None:
    """A folder above is moved from outside to where nothing is allowed, and back."""
    away, way = tree.none / "way", fresh(tree.open / "way" / "a").parent
    shutil.rmtree(away, ignore_errors=True)
    for _ in range(3):
        warm(guard, agent, way / "a" / "file")
        way.rename(away)
        assert lsm.in_cgroup(agent, read(away / "a" / "file")) == EPERM
        away.rename(way)
        assert lsm.in_cgroup(agent, read(way / "a" / "file")) == OK


def test_exchanged(tree: Any, agent: Path, guard: lsm.LsmGuard) -> None:
    """Two folders change places: each has the other's rights."""
    import ctypes

    one, other = fresh(tree.open / "way" / "a").parent, fresh(tree.none / "way" / "a").parent
    warm(guard, agent, one / "a" / "file")
    names = os.fsencode(one), os.fsencode(other)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.renameat2(-100, names[0], -100, names[1], 2) == 0
    assert lsm.in_cgroup(agent, read(other / "a" / "file")) == EPERM
    assert lsm.in_cgroup(agent, read(one / "a" / "file")) == OK


def test_a_hard_link(tree: Any, agent: Path, guard: lsm.LsmGuard) -> None:
    """One inode has two places: it is judged by the one it is opened at."""
    way, link = fresh(tree.open / "way"), tree.none / "link"
    link.unlink(missing_ok=True)
    warm(guard, agent, way / "file")
    os.link(way / "file", link)
    assert lsm.in_cgroup(agent, read(link)) == EPERM
    assert lsm.in_cgroup(agent, read(way / "file")) == OK
    (way / "file").unlink()
    assert lsm.in_cgroup(agent, read(link)) == EPERM
    os.link(link, way / "file")
    assert lsm.in_cgroup(agent, read(way / "file")) == OK


@contextmanager
def ext4(point: Path) -> Iterator[Path]:
    """A file system that gives a removed inode's number to the next."""
    image = point.with_suffix(".img")
    point.mkdir()
    subprocess.run(["modprobe", "-a", "loop", "ext4"], check=True)
    subprocess.run(["truncate", "-s", "16M", str(image)], check=True)
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(point)], check=True)
    try:
        yield point
    finally:
        subprocess.run(["umount", "-l", str(point)], check=True)
        image.unlink()
        point.rmdir()


@pytest.mark.parametrize("tree", ["tmpfs"], indirect=True, scope="module")
def test_an_inode_number_again(tree: Any, agent: Path, guard: lsm.LsmGuard) -> None:
    """A folder is removed, and another gets its number where nothing is allowed."""
    with ext4(tree.top / "disk") as disk:
        (disk / "yes").mkdir()
        (disk / "no").mkdir()
        subprocess.run(["mount", "--bind", disk / "yes", fresh(tree.open / "disk")], check=True)
        try:
            met = 0
            for _ in range(10):
                way, away = fresh(disk / "yes" / "way"), disk / "no" / "way"
                number = way.stat().st_ino
                warm(guard, agent, tree.open / "disk" / "way" / "file")
                assert lsm.in_cgroup(agent, read(way / "file")) == EPERM  # by the other mount
                shutil.rmtree(way)
                shutil.rmtree(away, ignore_errors=True)
                away.mkdir()
                met += away.stat().st_ino == number
                (away / "file").write_text("secret")
                assert lsm.in_cgroup(agent, read(away / "file")) == EPERM
                shutil.rmtree(away)
            assert met
        finally:
            subprocess.run(["umount", "-l", tree.open / "disk"], check=True)


# ---- mounts -------------------------------------------------------------------------------


@contextmanager
def bound(source: Path, point: Path) -> Iterator[Path]:
    """A folder at a second place."""
    point.mkdir(exist_ok=True)
    subprocess.run(["mount", "--bind", str(source), str(point)], check=True)
    try:
        yield point
    finally:
        subprocess.run(["umount", str(point)], check=True)


def test_a_second_mount(tree: Any, agent: Path, guard: lsm.LsmGuard) -> None:
    """The same folder under another mount lies elsewhere; the address of a mount comes again."""
    way = fresh(tree.open / "way")
    warm(guard, agent, way / "file")
    for _ in range(8):
        with bound(way, tree.none / "here") as here:
            assert lsm.in_cgroup(agent, read(here / "file")) == EPERM
        with bound(way, tree.open / "here") as here:
            assert lsm.in_cgroup(agent, often(here / "file", 3)) == OK
    assert lsm.in_cgroup(agent, read(way / "file")) == OK


def test_a_moved_mount(tree: Any, agent: Path, guard: lsm.LsmGuard) -> None:
    """A mount moves to where nothing is allowed: its address and all in it stay."""
    place, away = fresh(tree.open / "place"), fresh(tree.none / "place")
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(place)], check=True)
    now = place
    try:
        fresh(place / "a")
        for _ in range(3):
            warm(guard, agent, place / "a" / "file")
            subprocess.run(["mount", "--move", str(place), str(away)], check=True)
            now = away
            assert lsm.in_cgroup(agent, read(away / "a" / "file")) == EPERM
            subprocess.run(["mount", "--move", str(away), str(place)], check=True)
            now = place
            assert lsm.in_cgroup(agent, read(place / "a" / "file")) == OK
    finally:
        subprocess.run(["umount", "-l", str(now)], check=True)


def test_a_mount_over_it(tree: Any, agent: Path, guard: lsm.LsmGuard) -> None:
    """What is mounted over a folder is another folder; one with a denial keeps that."""
    way = fresh(tree.open / "way")
    warm(guard, agent, way / "file")
    with bound(tree.hidden, way):
        assert lsm.in_cgroup(agent, read(way / "file")) == EPERM
    assert lsm.in_cgroup(agent, read(way / "file")) == OK


# ---- the agent ----------------------------------------------------------------------------


def without(policy: lsm.LsmPolicy, *texts: str) -> lsm.LsmPolicy:
    """A policy that lacks some lines."""
    rules = policy.rules
    numbers = {rules.texts.index(text) + 1 for text in texts}
    kept = {place: one for place, one in rules.entries.items() if one.number not in numbers}
    return replace(policy, rules=replace(rules, entries=kept))


def test_other_rules(tree: Any, agent: Path, guard: lsm.LsmGuard) -> None:
    """A change of the rules makes all void, in both directions."""
    for _ in range(3):
        warm(guard, agent, tree.open / "file")
        guard.replace(without(tree.policy(), "open").rules)
        assert lsm.in_cgroup(agent, read(tree.open / "file")) == EPERM
        guard.replace(tree.policy().rules)
        assert lsm.in_cgroup(agent, read(tree.open / "file")) == OK
        assert lsm.in_cgroup(agent, read(tree.sealed)) == EPERM


def test_levels(tree: Any, agent: Path) -> None:
    """The level is judged in each act: by hand, and by violations."""
    with lsm.attach(agent, tree.policy()) as guard:
        warm(guard, agent, tree.noexec / "file")
        assert lsm.in_cgroup(agent, read(tree.noexec / "file", os.O_WRONLY)) == OK
        guard.set_level(3)
        assert lsm.in_cgroup(agent, read(tree.noexec / "file", os.O_WRONLY)) == EROFS
        assert lsm.in_cgroup(agent, read(tree.open / "file", os.O_WRONLY)) == OK
        guard.set_level(2)
        assert lsm.in_cgroup(agent, read(tree.noexec / "file")) == EPERM
        assert lsm.in_cgroup(agent, read(tree.ro / "file")) == OK
        guard.set_level(5)
        assert lsm.in_cgroup(agent, read(tree.noexec / "file")) == OK
        guard.recount(12)
        assert lsm.in_cgroup(agent, read(tree.noexec / "file")) == EPERM
        guard.recount(20)
        assert lsm.in_cgroup(agent, read(tree.open / "file")) == EPERM
        assert guard.counts().killed == 1


def test_the_deadline(tree: Any, agent: Path) -> None:
    """An agent that nobody watches any more dies of what it did a thousand times."""
    with lsm.attach(agent, tree.policy(deadline=3.0)) as guard:
        warm(guard, agent, tree.open / "file")
        time.sleep(3.5)
        assert lsm.in_cgroup(agent, read(tree.open / "file")) == EPERM
        assert guard.counts().killed == 1


def test_a_slot_again(tree: Any, cgroups: Callable[[], Path]) -> None:
    """An agent goes, another gets its slot: neither its verdicts nor its tasks are the other's."""
    one, other = cgroups(), cgroups()
    plane = lsm_plane.ensure()
    with subprocess.Popen(
        [sys.executable, "-I", "-c", OPENING, str(tree.hidden / "file")], stdin=-1, stdout=-1,
        text=True, bufsize=1,
    ) as process:  # fmt: skip
        assert process.stdin and process.stdout

        def asked() -> int:
            assert process.stdin and process.stdout
            process.stdin.write("\n")
            return int(process.stdout.readline())

        assert asked() == OK
        (one / "cgroup.procs").write_text(str(process.pid))

        for _ in range(3):
            with lsm.attach(one, tree.policy(defcon=CALM)) as guard:
                slot = plane.slot(guard.id)
                warm(guard, one, tree.open / "file")
                assert asked() == EPERM
            with lsm.attach(other, without(tree.policy(defcon=CALM), "open")) as guard:
                assert plane.slot(guard.id) == slot
                assert lsm.in_cgroup(other, read(tree.open / "file")) == EPERM
                assert asked() == OK
                assert guard.counts().denied == 1
        process.kill()
    plane.close()


# ---- at the same time ---------------------------------------------------------------------


def looping(group: Path | None, program: str, *words: object) -> subprocess.Popen[str]:
    """A process that runs Python until it is told to stop, and then prints numbers."""
    process = subprocess.Popen(
        [sys.executable, "-I", "-c", LOOP + program, *map(str, words)],
        stdin=-1, stdout=-1, text=True,
    )  # fmt: skip
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    if group is not None:
        (group / "cgroup.procs").write_text(str(process.pid))
    return process


LOOP = """
import os, signal, sys, time
going = True
def stop(*_):
    global going
    going = False
signal.signal(signal.SIGTERM, stop)
print("ready", flush=True)
sys.stdin.readline()
def tried(path):
    try:
        os.close(os.open(path, os.O_RDONLY))
        return 0
    except OSError as error:
        return error.errno
"""
TRY = """
met = {}
while going:
    for path in sys.argv[1:]:
        key = path, tried(path)
        met[key] = met.get(key, 0) + 1
print(met, flush=True)
"""
LINK = """
turns = 0
while going:
    os.link(sys.argv[1], sys.argv[2])
    os.unlink(sys.argv[2])
    turns += 1
print(turns, flush=True)
"""
MOVE = """
turns = 0
while going:
    os.rename(sys.argv[1], sys.argv[2])
    os.rename(sys.argv[2], sys.argv[1])
    turns += 1
print(turns, flush=True)
"""


def together(*processes: subprocess.Popen[str], seconds: float = 4.0) -> list[Any]:
    """What each says in the end."""
    for process in processes:
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.flush()
    time.sleep(seconds)
    for process in processes:
        process.send_signal(signal.SIGTERM)
    return [eval(process.communicate(timeout=30)[0]) for process in processes]


def test_links_come_and_go(tree: Any, agent: Path, guard: lsm.LsmGuard) -> None:
    """A link to a known file comes and goes where nothing is allowed, under the eyes of two tasks:
    dentries are freed and their addresses used again, and no open of it ever succeeds."""
    way, link = fresh(tree.open / "way"), tree.none / "link"
    link.unlink(missing_ok=True)
    one, two, turns = together(
        looping(agent, TRY, way / "file", link),
        looping(agent, TRY, link, way / "file"),
        looping(None, LINK, way / "file", link),
    )
    for met in (one, two):
        assert met.get((str(link), OK), 0) == 0
        assert met.get((str(way / "file"), EPERM), 0) == 0
        assert met[str(way / "file"), OK] > 50
        assert sum(count for (path, _), count in met.items() if path == str(link)) > 50
    assert sum(met.get((str(link), EPERM), 0) for met in (one, two)) > 0
    assert turns > 50


def test_moves_all_the_time(tree: Any, agent: Path, guard: lsm.LsmGuard) -> None:
    """While something is moved without end, known or not, what is allowed stays so."""
    way = fresh(tree.open / "way")
    met, turns = together(
        looping(agent, TRY, way / "file", tree.hidden / "file"),
        looping(None, MOVE, tree.none / "file", tree.none / "other"),
    )
    assert set(met) == {(str(way / "file"), OK), (str(tree.hidden / "file"), EPERM)}
    assert turns > 50


def test_two_agents_in_one_folder(tree: Any, cgroups: Callable[[], Path]) -> None:
    """Both write what is known of the folder; neither ever has the other's verdict."""
    one, other = cgroups(), cgroups()
    path = tree.open / "file"
    with (
        lsm.attach(one, tree.policy(defcon=CALM)) as first,
        lsm.attach(other, without(tree.policy(defcon=CALM), "open")),
    ):
        yes, no = together(looping(one, TRY, path), looping(other, TRY, path))
        assert set(yes) == {(str(path), OK)}
        assert set(no) == {(str(path), EPERM)}
        assert first.counts().walks > 10
