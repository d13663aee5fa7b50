"""The file guard against a process with one mount of its own, without a container.

Only that mount is marked: a tmpfs in the child's mount namespace, which nobody else can see.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import select
import shutil
import signal
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mis_run.defcon import CALM, Effects, Stance
from mis_run.errors import VerifyError
from mis_run.events import Event, Verdict
from mis_run.file_rules import Effect, Rule, compile_rules
from mis_run.guards import file, marks
from mis_run.guards.file_judge import Judge
from mis_run.guards.file_objects import Outlaw
from mis_run.guards.file_policy import Policy
from mis_run.linux import fanotify, libc, statx

pytestmark = pytest.mark.root
Talk = Callable[[str, str], Any]
REAL = marks.mounts


class Child:
    """A process that lives in its own mounts and does what it is told."""

    def __init__(self, box: Path) -> None:
        self.box = box
        self.talk, theirs = socket.socketpair()
        self.pid = os.fork()
        if self.pid == 0:
            self.talk.close()
            self._live(theirs)
        theirs.close()
        assert self.talk.recv(100) == b"ready"

    def _live(self, talk: socket.socket) -> None:
        try:
            libc.unshare(libc.CLONE_NEWNS)
            libc.mount("none", "/", "", libc.MS_REC | libc.MS_PRIVATE)
            libc.mount("tmpfs", str(self.box), "tmpfs")
            for name in ("open", "secret", "more"):
                (self.box / name).write_text(name)
            shutil.copy("/usr/bin/true", self.box / "tool")
            talk.send(b"ready")
            while words := talk.recv(1000):
                act, path = words.decode().split(" ", 1)
                talk.send(str(self._try(act, str(self.box / path))).encode())
        finally:
            os._exit(0)

    def _try(self, act: str, path: str) -> int:
        try:
            if act == "open":
                os.close(os.open(path, os.O_RDONLY))
            elif act == "exec":
                return self._execute(path)
            elif act == "link":
                os.link(f"{self.box}/secret", path)
            elif act == "rename":
                os.rename(f"{self.box}/secret", path)
            elif act == "write":
                Path(path).write_text("changed")
            elif act == "spin":
                for _ in range(100):
                    os.close(os.open(path, os.O_RDONLY))
            return 0
        except OSError as error:
            return error.errno or -1

    def _execute(self, path: str) -> int:
        pid = os.fork()
        if pid == 0:
            try:
                os.execv(path, [path])
            except OSError as error:
                os._exit(error.errno or 255)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def end(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self.talk.close()


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Child]:
    box = tmp_path / "box"
    box.mkdir()
    made = Child(box)
    monkeypatch.setattr(marks, "mounts", lambda pid: [m for m in REAL(pid) if m.point == str(box)])
    yield made
    made.end()


def policy(box: Path, *, deny: tuple[str, ...] = ("secret",), **more: Any) -> Policy:
    allowed = [Rule(f"{box}/**", Effect.ALLOW, "box")]
    denied = [Rule(f"{box}/{name}", Effect.DENY, f"deny {name}") for name in deny]
    rules = {"opens": compile_rules([*allowed, *denied]), "execs": compile_rules(allowed)}
    return Policy(**{**rules, **more})


@contextmanager
def guarding(child: Child, made: Policy, **more: Any) -> Iterator[file.FileGuard]:
    with file.attach(child.pid, made, (0, 0), **more) as guard:
        yield guard


def act(
    guard: file.FileGuard, child: Child, words: str, seconds: float = 10
) -> tuple[int, list[Event]]:
    """What the act met, and the events it caused."""
    child.talk.send(words.encode())
    events: list[Event] = []
    poll = select.poll()
    poll.register(guard.fileno(), select.POLLIN)
    poll.register(child.talk.fileno(), select.POLLIN)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        ready = [fd for fd, _ in poll.poll(100)]
        events += guard.read()
        if child.talk.fileno() in ready:
            return int(child.talk.recv(100)), events
    raise AssertionError(f"{words}: no answer within {seconds} s")


def test_this_kernel_is_supported() -> None:
    assert file.supported()["fanotify"].ok


def test_allowed_and_denied(child: Child) -> None:
    """The denied file fails with EPERM and is one event; the other opens; without the guard, and
    in audit mode, both open."""
    with guarding(child, policy(child.box)) as guard:
        assert act(guard, child, "open open") == (0, [])
        met, (event,) = act(guard, child, "open secret")
        assert (met, event.kind, event.rule) == (errno.EPERM, "file.open", "deny secret")
        assert event.subject["path"] == f"{child.box}/secret" and event.pid == child.pid
    child.talk.send(b"open secret")
    assert child.talk.recv(10) == b"0"
    with guarding(child, policy(child.box), stance=Stance(enforce=False)) as guard:
        met, (event,) = act(guard, child, "open secret")
        assert (met, event.verdict) == (0, Verdict.AUDIT)


def test_the_host_is_not_asked(child: Child, tmp_path: Path) -> None:
    """The same path outside the child's mounts is nobody's business."""
    outside = child.box / "secret"
    outside.write_text("host")
    with guarding(child, policy(child.box)) as guard:
        assert outside.read_text() == "host"
        assert guard.read() == []


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """The answers that are given, from now on."""
    given: list[bool] = []
    real = fanotify.answer
    monkeypatch.setattr(
        fanotify, "answer", lambda g, fd, *, allow: (given.append(allow), real(g, fd, allow=allow))
    )
    return given


def test_an_allowed_object_is_remembered_until_it_changes(child: Child, asked: list[bool]) -> None:
    """The kernel asks once for a hundred opens, again after a write, and again after a level."""
    levels = [CALM]
    with guarding(child, policy(child.box), stance=Stance(effects=lambda: levels[0])) as guard:
        act(guard, child, "spin open")
        assert asked == [True]
        act(guard, child, "write open")
        act(guard, child, "spin open")
        assert 2 <= len(asked) <= 3
        before = len(asked)
        levels[0] = Effects(binaries=True)
        guard.read()
        act(guard, child, "spin open")
        assert len(asked) == before + 1
        act(guard, child, "spin secret")
        assert asked[before + 1 :] == [False]  # the first denial ends the loop


def test_an_object_of_two_names_is_remembered_where_nobody_gives_names(
    child: Child, asked: list[bool]
) -> None:
    """Asked once in a folder that the agent cannot write, each time in one that it can."""
    child.talk.send(b"link other")
    assert child.talk.recv(10) == b"0"
    for writable, times in ((False, 1), (True, 100)):
        with guarding(child, policy(child.box, deny=(), places={str(child.box): writable})) as one:
            act(one, child, "spin other")
        assert len(asked) == times, writable
        asked.clear()


def test_a_denied_object_by_another_name(child: Child) -> None:
    """A hard link in an allowed place is the same object, where that is known; a control without
    that knowledge opens."""
    path = f"/proc/{child.pid}/root{child.box}/secret"
    info = os.stat(path)
    known = Outlaw(Rule("", Effect.DENY, "deny secret"), statx.birth(path))
    with guarding(child, policy(child.box)) as guard:
        assert act(guard, child, "link other")[0] == 0
        assert act(guard, child, "open other") == (0, [])
    objects = {(info.st_dev, info.st_ino): known}
    with guarding(child, policy(child.box, objects=objects)) as guard:
        assert act(guard, child, "open other")[0] == errno.EPERM


def test_a_file_refused_by_its_name_once(child: Child) -> None:
    """It stays refused whatever it is called afterwards; renamed unseen, the control, it opens."""
    with guarding(child, policy(child.box)) as guard:
        assert act(guard, child, "open secret")[0] == errno.EPERM
        assert act(guard, child, "rename other")[0] == 0
        met, (event,) = act(guard, child, "open other")
        assert (met, event.rule) == (errno.EPERM, "deny secret")
    with guarding(child, policy(child.box)) as guard:
        assert act(guard, child, "open other") == (0, [])


def test_the_number_of_a_deleted_file_denies_nothing(tmp_path: Path) -> None:
    """A new file with the device and inode of a denied one that is gone is another object."""
    file = tmp_path / "file"
    file.write_text("x")
    born, info = statx.birth(str(file)), file.stat()
    if born is None:
        pytest.skip("this file system does not keep when a file was made")
    rule = Rule("", Effect.DENY, "deny secret")
    allowed = compile_rules([Rule(f"{tmp_path}/**", Effect.ALLOW, "box")])
    for birth, verdict in ((born, rule), (None, rule), (born - 1, None)):
        objects = {(info.st_dev, info.st_ino): Outlaw(rule, birth)}
        judge = Judge(Policy(allowed, allowed, objects), (0, 0))
        with file.open() as one:
            opened = fanotify.Opened(one.fileno(), False, 0)
            assert judge.judge(opened, str(file), info) is verdict


def test_programs(child: Child) -> None:
    """Executed where a rule allows; bound to its content; after level 3 only what ran before."""
    tool = Path(f"/proc/{child.pid}/root{child.box}/tool")
    digest = hashlib.sha256(tool.read_bytes()).hexdigest()

    def only(text: str) -> Policy:
        rule = Rule(f"{child.box}/tool", Effect.ALLOW, "tool", explicit=True, sha256=text)
        return policy(child.box, execs=compile_rules([rule]))

    with guarding(child, only("")) as guard:
        assert act(guard, child, "exec tool") == (0, [])
    with guarding(child, only(digest)) as guard:
        assert act(guard, child, "exec tool") == (0, [])
    with guarding(child, only("0" * 64)) as guard:
        met, (event,) = act(guard, child, "exec tool")
        assert met == errno.EPERM and "another content" in event.rule
    raised = Effects(binaries=True)
    with guarding(child, only(""), stance=Stance(effects=lambda: raised)) as guard:
        met, (event,) = act(guard, child, "exec tool")
        assert met == errno.EPERM and event.rule.startswith("defcon")


def tainting(child: Child, **more: Any) -> Policy:
    rules = compile_rules([Rule(f"{child.box}/secret", Effect.TAINT, "taint secret")])
    return policy(child.box, deny=(), taints=rules, **more)


def test_an_open_that_marks_waits_until_its_caller_has_acted(child: Child) -> None:
    """What reads the events puts in force what follows, and only its next call answers; an open
    that marks nobody is answered at once, as is this one once the agent is marked."""
    marked = [False]
    with guarding(child, tainting(child), stance=Stance(marked=lambda: marked[0])) as guard:
        for path, waits in (("more", False), ("secret", True)):
            child.talk.settimeout(0.3)
            child.talk.send(f"open {path}".encode())
            assert select.select([guard.fileno()], [], [], 5)[0]
            events = guard.read()
            assert [event.kind for event in events] == ["file.tainted"] * waits
            if waits:
                with pytest.raises(TimeoutError):
                    child.talk.recv(10)
                assert events[0].rule == "taint secret" and not events[0].violation
                assert select.select([guard.fileno()], [], [], 0)[0]  # it asks to be read again
                assert guard.read() == []
            assert child.talk.recv(10) == b"0"
        marked[0] = True
        assert act(guard, child, "open secret") == (0, [])


def test_what_taints_is_asked_about_until_it_has(child: Child, asked: list[bool]) -> None:
    """The kernel remembers no such object before the agent is marked; afterwards it does."""
    for marked, times in ((False, 100), (True, 1)):
        stance = Stance(marked=lambda marked=marked: marked)
        with guarding(child, tainting(child), stance=stance) as guard:
            _, events = act(guard, child, "spin secret")
        assert len(asked) == times, marked
        assert len(events) == (0 if marked else 100)
        asked.clear()


@pytest.mark.parametrize("way", ["link", "rename"])
def test_what_taints_by_another_name(child: Child, way: str) -> None:
    """A link or a rename is the same object where that is known; the control is not known."""
    path = f"/proc/{child.pid}/root{child.box}/secret"
    info, rule = os.stat(path), Rule("", Effect.TAINT, "taint secret")
    known = {(info.st_dev, info.st_ino): Outlaw(rule, statx.birth(path))}
    with guarding(child, tainting(child)) as guard:
        assert act(guard, child, f"{way} other")[0] == 0
        assert act(guard, child, "open other") == (0, [])
    with guarding(child, tainting(child, tainted=known)) as guard:
        met, (event,) = act(guard, child, "open other")
        assert (met, event.rule) == (0, "taint secret")


def test_a_denied_open_marks_nobody(child: Child) -> None:
    """The verdict of the other rules stands, and who was refused has read nothing."""
    made = policy(child.box, taints=tainting(child).taints)
    with guarding(child, made) as guard:
        met, (event,) = act(guard, child, "open secret")
        assert (met, event.kind) == (errno.EPERM, "file.open")


def test_who_waits_when_the_guard_ends_is_denied(child: Child) -> None:
    """An open that would have marked the agent is not let go on by the end of the guard."""
    with guarding(child, tainting(child)) as guard:
        child.talk.send(b"open secret")
        assert select.select([guard.fileno()], [], [], 5)[0]
        assert len(guard.read()) == 1
    child.talk.settimeout(5)
    assert int(child.talk.recv(10)) == errno.EPERM


@pytest.mark.parametrize("delay", [0.001, 0.01])
def test_denials_are_late(child: Child, delay: float) -> None:
    """A denial is answered late by what DEFCON says; noise of the machine only adds."""
    with guarding(child, policy(child.box), stance=Stance(delay=lambda: delay)) as guard:
        times = []
        for _ in range(30):
            began = time.perf_counter()
            act(guard, child, "open secret")
            times.append(time.perf_counter() - began)
    with guarding(child, policy(child.box)) as guard:
        bare = []
        for _ in range(30):
            began = time.perf_counter()
            act(guard, child, "open secret")
            bare.append(time.perf_counter() - began)
    assert statistics.median(times) >= delay
    assert statistics.median(times) > statistics.median(bare)


def test_an_open_waits_while_a_copy_is_held(child: Child) -> None:
    """When the guard is gone but a copy of its descriptor is not, opens wait; when the last copy
    goes the kernel lets them pass: that is why somebody must hold one."""
    with guarding(child, policy(child.box)) as guard:
        copy = os.dup(guard.group)
    child.talk.settimeout(0.3)
    child.talk.send(b"open more")
    with pytest.raises(TimeoutError):
        child.talk.recv(10)
    os.close(copy)
    child.talk.settimeout(5)
    assert child.talk.recv(10) == b"0"


def test_a_killed_caller_needs_no_answer(child: Child) -> None:
    """A process that dies while it waits for a verdict is gone at once, and the guard goes on."""
    with guarding(child, policy(child.box), stance=Stance(delay=lambda: 5.0)) as guard:
        child.talk.send(b"open secret")
        poll = select.poll()
        poll.register(guard.fileno(), select.POLLIN)
        assert poll.poll(5000)
        assert len(guard.read()) == 1
        began = time.monotonic()
        os.kill(child.pid, signal.SIGKILL)
        os.waitpid(child.pid, 0)
        assert time.monotonic() - began < 1
        assert guard.read() == []
    child.pid = os.fork()
    if child.pid == 0:
        signal.pause()


def test_no_descriptor_is_left(child: Child) -> None:
    """After a thousand verdicts and the end of the guard as many are open as before."""
    before = len(os.listdir("/proc/self/fd"))
    with guarding(child, policy(child.box)) as guard:
        for _ in range(50):
            act(guard, child, "open secret")
            act(guard, child, "spin open")
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_mount_that_cannot_be_marked_refuses(
    child: Child, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mark that the kernel refuses, or that is not there afterwards, ends the launch."""
    monkeypatch.setattr(fanotify, "mark_mount", lambda group, fd: None)
    with pytest.raises(VerifyError, match="has no mark"), guarding(child, policy(child.box)):
        pass

    def refuse(group: int, fd: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(fanotify, "mark_mount", refuse)
    with pytest.raises(VerifyError, match="cannot be guarded"), guarding(child, policy(child.box)):
        pass


def test_a_probe_that_is_not_seen_refuses(child: Child) -> None:
    """Verification fails when the canary opens, and when it fails without having been seen."""
    for met in (0, errno.EPERM):
        with guarding(child, policy(child.box)) as guard, pytest.raises(VerifyError):
            guard.verify(lambda words, met=met: met)


def test_what_cannot_be_received_is_told(child: Child, monkeypatch: pytest.MonkeyPatch) -> None:
    """An event whose descriptor cannot be made is an event of ours, and no violation."""
    with guarding(child, policy(child.box)) as guard:

        def full(group: int) -> list[fanotify.Opened]:
            raise OSError(errno.EMFILE, "Too many open files")

        monkeypatch.setattr(fanotify, "receive", full)
        (event,) = guard.read()
        assert event.kind == "file.unanswerable" and not event.violation
        json.dumps(event.json())
