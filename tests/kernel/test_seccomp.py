"""The escape guard against real processes under a real filter, without a container."""

from __future__ import annotations

import ctypes
import errno
import os
import select
import signal
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from filters import ALLOW, attempt, caged, compiled
from hypothesis import given
from hypothesis import strategies as st

from mis_run.defcon import Effects, Stance, Tracker
from mis_run.errors import VerifyError
from mis_run.events import Event, Verdict
from mis_run.guards import escape, escape_rules
from mis_run.linux import abi, memfd, seccomp
from mis_run.linux.seccomp import Notification
from mis_run.model import Defcon

pytestmark = pytest.mark.root
Peer = socket.socket
PROGRAM = compiled(escape_rules.notify_rules(), default=ALLOW)
UNGUARDED = compiled([{"names": ["vhangup"], "action": "SCMP_ACT_NOTIFY"}], default=ALLOW)


def serve(guard: escape.EscapeGuard, reports: Peer, seconds: float = 10.0) -> list[Event]:
    """Answer until the child has said something; what happened meanwhile."""
    events: list[Event] = []
    poll = select.poll()
    poll.register(guard.fileno(), select.POLLIN)
    poll.register(reports.fileno(), select.POLLIN)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        ready = [fd for fd, _ in poll.poll(100)]
        events += guard.read()
        if reports.fileno() in ready:
            return events
    raise AssertionError(f"the child said nothing within {seconds} s")


def errors(data: bytes) -> list[int]:
    """The numbers in a report."""
    return list(struct.unpack(f"={len(data) // 4}i", data))


def tries(*calls: tuple[object, ...]) -> Callable[[Peer], None]:
    """A child's act: make each call, report their errnos."""

    def act(peer: Peer) -> None:
        found = [attempt(*call) for call in calls]  # type: ignore[arg-type]
        peer.send(struct.pack(f"={len(found)}i", *found))

    return act


def test_this_kernel_is_supported() -> None:
    """The probe really asks the kernel, and here it says yes."""
    assert escape.supported()["seccomp-notify"].ok
    assert not seccomp.available(0x12340000)  # negative control: an action no kernel has


NAMES = sorted({*escape_rules.DENIED} & set(abi.numbers(abi.machine())))


def test_every_listed_call_is_denied_and_told_once() -> None:
    """Each call fails with EPERM and becomes one violation with its name, pid and command."""
    # Newer than libseccomp: in a container the default action refuses it (tested there).
    names = [n for n in NAMES if n != "open_tree_attr"]
    with caged(PROGRAM, tries(*((name,) for name in names))) as (listener, reports, pid):
        with escape.attach(listener) as guard:
            events = serve(guard, reports)
        assert errors(reports.recv(4096)) == [errno.EPERM] * len(names)
    assert [event.kind for event in events] == [f"escape.{name}" for name in names]
    assert {(e.verdict, e.pid) for e in events} == {(Verdict.DENY, pid)}
    assert all(event.comm for event in events)


def test_without_the_rules_the_same_calls_reach_the_kernel() -> None:
    """Negative control: unguarded, the harmless ones of these calls succeed or fail otherwise."""
    calls = [("unshare", 0x4000000), ("kcmp", 0, 0, 0), ("socket", 16, 3, 15), ("personality", 8)]
    with caged(UNGUARDED, tries(*calls)) as (listener, reports, _):
        with escape.attach(listener) as guard:
            assert serve(guard, reports) == []
        assert errno.EPERM not in errors(reports.recv(4096))
    with caged(PROGRAM, tries(*calls)) as (listener, reports, _):
        with escape.attach(listener) as guard:
            assert len(serve(guard, reports)) == 3
        assert errors(reports.recv(4096)) == [1, 1, errno.EPROTONOSUPPORT, 0]


def test_audit_lets_calls_run_and_tells_them() -> None:
    """With enforce off the call runs as it would without us and is an audit violation."""
    with caged(PROGRAM, tries(("unshare", 0x4000000), ("io_uring_setup", 1, 0))) as (
        listener,
        reports,
        _,
    ):
        with escape.attach(listener, Stance(enforce=False)) as guard:
            events = serve(guard, reports)
        assert errors(reports.recv(4096)) == [0, errno.ENOSYS]
    assert [(e.kind, e.verdict) for e in events] == [
        ("escape.unshare", Verdict.AUDIT),
        ("escape.io_uring_setup", None),
    ]


def test_memory_is_denied_from_the_level_on() -> None:
    """W+X mappings pass until the effect is on, then fail with EACCES; W^X ones always pass."""
    mapping = (0, 4096, 7, 0x22, -1, 0)
    now = Effects()
    calls = tries(("mmap", *mapping), ("mmap", 0, 4096, 5, 0x22, -1, 0))
    for now, wanted in ((Effects(), 0), (Effects(wx_memory=True), errno.EACCES)):
        with caged(PROGRAM, calls) as (listener, reports, _):
            with escape.attach(listener, Stance(effects=lambda now=now: now)) as guard:
                events = serve(guard, reports)
            assert errors(reports.recv(64)) == [wanted, 0]
            assert len(events) == (1 if wanted else 0)


def test_when_the_listener_is_gone_the_calls_fail() -> None:
    """Every descriptor closed: ENOSYS, from the kernel, for what is denied and what is not."""

    def act(peer: Peer) -> None:
        time.sleep(0.2)
        tries(("unshare", 0x4000000), ("mount",), ("personality", 0))(peer)

    with caged(PROGRAM, act) as (listener, reports, _):
        os.close(os.dup(listener))
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, listener)  # the last copy is closed
        os.close(null)
        assert errors(reports.recv(64)) == [errno.ENOSYS] * 3


def test_a_call_that_waits_fails_when_the_listener_goes() -> None:
    """Closing the listener ends waiting calls with ENOSYS: nothing hangs, nothing passes."""
    with caged(PROGRAM, tries(("unshare", 0x4000000))) as (listener, reports, _):
        while not seccomp.state(listener)[0]:
            time.sleep(0.01)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, listener)
        os.close(null)
        assert errors(reports.recv(64)) == [errno.ENOSYS]


def test_no_second_listener() -> None:
    """An agent cannot put a listener of its own in front of ours."""
    with caged(PROGRAM, tries(("seccomp", 1, 8, 0))) as (listener, reports, _):
        with escape.attach(listener) as guard:
            events = serve(guard, reports)
        assert errors(reports.recv(64)) == [errno.EBUSY]
    assert [event.kind for event in events] == ["escape.seccomp"]


@pytest.mark.parametrize("delay", [0.0001, 0.001, 0.01])
def test_denials_are_late_by_what_defcon_says(
    delay: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The median answer leaves later than undelayed ones by the delay, within 20 %, and the agent
    waits at least that long (how much longer depends on how deep its CPU went to sleep)."""
    times: list[float] = []
    received = [0.0]
    receive, deny = seccomp.receive, seccomp.deny

    def timed_receive(listener: int) -> Notification | None:
        found = receive(listener)
        received[0] = time.monotonic()
        return found

    def timed_deny(listener: int, ident: int, error: int) -> bool:
        times.append(time.monotonic() - received[0])
        return deny(listener, ident, error)

    monkeypatch.setattr(seccomp, "receive", timed_receive)
    monkeypatch.setattr(seccomp, "deny", timed_deny)

    def act(peer: Peer) -> None:
        took = []
        for _ in range(40):
            began = time.perf_counter()
            attempt("vhangup")
            took.append(time.perf_counter() - began)
        peer.send(struct.pack("=40d", *took))

    def medians(wait: float) -> tuple[float, float]:
        times.clear()
        with caged(PROGRAM, act) as (listener, reports, _):
            with escape.attach(listener, Stance(delay=lambda: wait)) as guard:
                serve(guard, reports)
            theirs = struct.unpack("=40d", reports.recv(4096))
        return statistics.median(times), statistics.median(theirs)

    # A busy machine adds its own noise to a wait of 0.1 ms: rounds are added until the median is
    # precise, and a delay that is wrong never becomes right.
    ours: list[float] = []
    theirs: list[float] = []
    while len(ours) < 5 or (not right(ours, delay) and len(ours) < 40):
        with_delay, without = medians(delay), medians(0.0)
        ours.append(with_delay[0] - without[0])
        theirs.append(with_delay[1])
    assert right(ours, delay), ours
    assert statistics.median(theirs) >= delay


def right(measured: list[float], delay: float) -> bool:
    """Whether what was measured is ``delay``, within 20 %; noise only adds, so the better half
    of the rounds is asked."""
    better = sorted(measured)[: (len(measured) + 1) // 2]
    return 0.8 * delay <= statistics.median(better) <= 1.2 * delay


def test_slowness_is_the_callers_alone() -> None:
    """While ten denials wait 200 ms each, another process gets its answer at once, and all ten
    wait together rather than in turn."""
    waiting = 10

    def slow(peer: Peer) -> None:
        for _ in range(waiting):
            if os.fork() == 0:
                attempt("reboot")
                os._exit(0)
        time.sleep(0.05)
        began = time.monotonic()
        attempt("personality", 0)
        quick = time.monotonic() - began
        for _ in range(waiting):
            os.wait()
        peer.send(struct.pack("=2d", quick, time.monotonic() - began))

    with caged(PROGRAM, slow) as (listener, reports, _):
        with escape.attach(listener, Stance(delay=lambda: 0.2)) as guard:
            events = serve(guard, reports)
        quick, every = struct.unpack("=2d", reports.recv(64))
    assert len(events) == waiting
    assert quick < 0.05 and 0.1 < every < 1.0


def test_an_interrupted_call_is_one_violation() -> None:
    """A signal that restarts the waiting call makes no second violation, nor a longer wait."""

    def act(peer: Peer) -> None:
        signal.signal(signal.SIGUSR1, lambda *_: None)
        libc = ctypes.CDLL(None)
        libc.siginterrupt(signal.SIGUSR1, 0)
        me = os.getpid()
        stop = threading.Event()

        def pester() -> None:
            while not stop.wait(0.02):
                os.kill(me, signal.SIGUSR1)

        thread = threading.Thread(target=pester)
        thread.start()
        began = time.monotonic()
        met = attempt("reboot")
        took = time.monotonic() - began
        stop.set()
        thread.join()
        peer.send(struct.pack("=2d", met, took))

    with caged(PROGRAM, act) as (listener, reports, _):
        with escape.attach(listener, Stance(delay=lambda: 0.3)) as guard:
            events = serve(guard, reports)
        met, took = struct.unpack("=2d", reports.recv(64))
    assert len(events) == 1
    assert met in (errno.EPERM, errno.EINTR) and took < 0.6


WAYS = ["children", "threads", "grandchildren"]


def violate(way: str, times: int) -> Callable[[Peer], None]:
    """A child's act: ``times`` identical denials, made by whom ``way`` says."""

    def act(peer: Peer) -> None:
        if way == "threads":
            threads = [threading.Thread(target=attempt, args=("reboot",)) for _ in range(times)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        else:
            reader, writer = os.pipe()
            for _ in range(times):
                pid = os.fork()
                if pid == 0:
                    if way == "grandchildren":
                        os.setsid()
                        if os.fork():
                            os._exit(0)
                    attempt("reboot")
                    os.write(writer, b"x")
                    os._exit(0)
                os.waitpid(pid, 0)
            seen = 0
            while seen < times:
                seen += len(os.read(reader, times))
        peer.send(b"done")

    return act


@pytest.mark.parametrize("way", WAYS)
def test_twenty_denials_reach_defcon_1(way: str) -> None:
    """Twenty denials of children, threads or double-forked grandchildren: 3, 6, 10, 15 exactly."""
    tracker = Tracker(Defcon(delays=(0, 0, 0)))
    with (
        caged(PROGRAM, violate(way, 20)) as (listener, reports, _),
        escape.attach(listener, Stance(delay=tracker.delay)) as guard,
    ):
        changes = [tracker.violation(event) for event in serve(guard, reports)]
    seen = [(c.event.subject["violations"], c.level) for c in changes if c]
    assert seen == [(3, 4), (6, 3), (10, 2), (15, 1)]


def test_thresholds_are_exact_under_sixteen_concurrent_violators() -> None:
    """16 processes violating at once: each level begins at its own count, and none is skipped."""
    tracker = Tracker(Defcon(delays=(0, 0, 0)))

    def act(peer: Peer) -> None:
        start, go = os.pipe()
        for _ in range(16):
            if os.fork() == 0:
                os.read(start, 1)
                for number in range(5):
                    attempt("reboot", number)
                os._exit(0)
        os.write(go, b"x" * 16)
        for _ in range(16):
            os.wait()
        peer.send(b"done")

    with (
        caged(PROGRAM, act) as (listener, reports, _),
        escape.attach(listener, Stance(delay=tracker.delay)) as guard,
    ):
        events = serve(guard, reports)
    assert len(events) == 80
    seen = [(c.event.subject["violations"], c.level) for e in events if (c := tracker.violation(e))]
    assert seen == [(3, 4), (6, 3), (10, 2), (15, 1)]
    assert tracker.count == 80


def test_verify_sees_its_own_attempts_and_tells_nobody() -> None:
    """The canaries are denied and seen, and are no violations."""
    with caged(PROGRAM, prober) as (listener, reports, _), escape.attach(listener) as guard:
        told: list[Event] = []
        guard.verify(asker(guard, reports, told))
        assert told == []


def test_verify_fails_without_the_rules() -> None:
    """Negative control: a filter that hands nothing over is noticed."""
    with (
        caged(UNGUARDED, prober) as (listener, reports, _),
        escape.attach(listener) as guard,
        pytest.raises(VerifyError, match="not seen"),
    ):
        guard.verify(asker(guard, reports, []))


def prober(peer: Peer) -> None:
    """A stand-in for the shim: makes the calls it is told, and answers with their errnos."""
    while words := peer.recv(4096).split():
        name = abi.names(abi.machine())[int(words[1])]
        peer.send(struct.pack("=i", attempt(name, *map(int, words[2:]))))


def asker(guard: escape.EscapeGuard, reports: Peer, told: list[Event]) -> Callable[[str], int]:
    """A ``probe`` that serves the guard while it waits, as the supervisor's loop does."""

    def probe(act: str) -> int:
        reports.send(act.encode())
        told.extend(serve(guard, reports))
        return errors(reports.recv(64))[0]

    return probe


def test_an_abandoned_listener_is_quiet() -> None:
    """When the last guarded process is gone the guard stops being ready: no spinning loop."""
    with (
        caged(PROGRAM, lambda peer: peer.send(b"bye")) as (listener, reports, pid),
        escape.attach(listener) as guard,
    ):
        serve(guard, reports)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        deadline = time.monotonic() + 5
        while not guard.over and time.monotonic() < deadline:
            guard.read()
        poll = select.poll()
        poll.register(guard.fileno(), select.POLLIN)
        assert guard.over and poll.poll(50) == [] and guard.read() == []


@given(st.binary(max_size=200))
def test_parsing_takes_any_bytes(data: bytes) -> None:
    """Malformed notifications are None or a Notification, never an exception."""
    found = seccomp.parse(data)
    assert found is None or isinstance(found, Notification)


@given(st.lists(st.binary(min_size=80, max_size=80), max_size=8))
def test_the_guard_survives_any_notification(many: list[bytes]) -> None:
    """Whatever a notification says, it is answered with an error or ignored; no exception."""
    answers: list[int] = []
    queue = [found for data in many if (found := seccomp.parse(data))]
    reader, writer = os.pipe()
    patch = pytest.MonkeyPatch()
    patch.setattr(seccomp, "state", lambda fd: (bool(queue), False))
    patch.setattr(seccomp, "receive", lambda fd: queue.pop())
    patch.setattr(seccomp, "deny", lambda fd, ident, error: answers.append(error) or True)
    patch.setattr(seccomp, "proceed", lambda fd, ident: pytest.fail("let an unknown call run"))
    patch.setattr(seccomp, "alive", lambda fd, ident: True)
    try:
        with escape.attach(reader) as guard:
            known = {abi.AUDIT_ARCH[name] for name in abi.AUDIT_ARCH}
            queue[:] = [found for found in queue if found.arch not in known]
            wanted = len(queue)
            events = guard.read()
            while queue:  # each read ends with the first violation
                events += guard.read()
            assert len(answers) == wanted and all(error > 0 for error in answers)
            assert all(event.json() for event in events)
    finally:
        patch.undo()
        os.close(reader)
        os.close(writer)


IN_A_NAMESPACE = """
import os, sys
sys.stdin.readline()
fd = os.memfd_create("x", 0)
os.write(fd, open("/bin/true", "rb").read())
try:
    print(os.waitpid(os.posix_spawn(f"/proc/self/fd/{fd}", ["x"], {}), 0)[1])
except PermissionError:
    print("refused")
"""


@pytest.mark.skipif(not memfd.sealable(), reason="needs vm.memfd_noexec, Linux 6.3")
@pytest.mark.parametrize(("seal", "met"), [(True, "refused"), (False, "0")])
def test_memfds_of_a_sealed_namespace_cannot_be_executed(seal: bool, met: str) -> None:
    """Sealing a pid namespace makes its plain memfds not executable; ours stays as it was."""
    before = memfd.SETTING.read_text()
    words = ["unshare", "--pid", "--fork", "--kill-child", "--", sys.executable, "-c"]
    child = subprocess.Popen(
        [*words, IN_A_NAMESPACE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    children = Path(f"/proc/{child.pid}/task/{child.pid}/children")
    try:
        end = time.monotonic() + 5
        while not (found := children.read_text().split()) and time.monotonic() < end:
            time.sleep(0.01)
        pidfd = os.pidfd_open(int(found[0]))
        if seal:
            memfd.seal(pidfd)
        os.close(pidfd)
        out, _ = child.communicate("\n", timeout=10)
    finally:
        child.kill()
        child.wait()
    assert out.strip() == met
    assert memfd.SETTING.read_text() == before
