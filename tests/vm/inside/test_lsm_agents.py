"""The kernel plane's agents: who belongs to one, how long it lasts, what is left of it."""

from __future__ import annotations

import errno
import mmap
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from acts import OPENING

from mis_run.dataclass import replace
from mis_run.errors import VerifyError
from mis_run.events import Verdict
from mis_run.guards import lsm, lsm_plane
from mis_run.guards.lsm_abi import PLACE, Right, RuleFlag

OK, EPERM, EROFS = 0, errno.EPERM, errno.EROFS
pytestmark = pytest.mark.parametrize("tree", ["tmpfs"], indirect=True, scope="module")
CALM = lsm.Defcon(act=False)
NEVER = 0xFFFFFFFF


def read(path: Path) -> Callable[[], object]:
    def act() -> None:
        os.close(os.open(path, os.O_RDONLY))

    return act


# ---- who belongs --------------------------------------------------------------------------


def forked(act: Callable[[], object], how: str) -> Callable[[], object]:
    """``act`` in a descendant of some kind; its error is ours."""

    def child() -> int:
        try:
            act()
        except OSError as error:
            return error.errno or 255
        return 0

    def by_fork() -> None:
        pid = os.fork()
        if pid == 0:
            if how == "double fork":
                os.setsid()
                pid = os.fork()
                if pid:
                    os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
            os._exit(child())
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code:
            raise OSError(code, how)

    def by_thread() -> None:
        codes: list[int] = []
        thread = threading.Thread(target=lambda: codes.append(child()))
        thread.start()
        thread.join()
        if codes[0]:
            raise OSError(codes[0], how)

    return by_thread if how == "thread" else by_fork


@pytest.mark.parametrize("how", ["fork", "double fork", "thread"])
def test_descendants_belong(
    how: str, tree: Any, guarded: tuple[Path, lsm.LsmGuard], neighbour: Path
) -> None:
    """Whatever an agent starts is the agent; the same outside is not."""
    act = forked(read(tree.hidden / "file"), how)
    assert lsm.in_cgroup(guarded[0], act) == EPERM
    assert lsm.in_cgroup(guarded[0], forked(read(tree.open / "file"), how)) == OK
    assert lsm.in_cgroup(neighbour, act) == OK


def test_programs_belong(tree: Any, guarded: tuple[Path, lsm.LsmGuard], neighbour: Path) -> None:
    """Executing another program changes nothing."""

    def act() -> None:
        pid = os.posix_spawn("/bin/cat", ["cat", str(tree.hidden / "file")], {})
        if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
            raise OSError(EPERM, "cat failed")

    assert lsm.in_cgroup(guarded[0], act) == EPERM
    assert lsm.in_cgroup(neighbour, act) == OK


def test_cgroups_below_belong(tree: Any, guarded: tuple[Path, lsm.LsmGuard]) -> None:
    """A process in a cgroup far below is judged as one in the agent's own."""
    below = guarded[0] / "a" / "b" / "c"
    below.mkdir(parents=True)
    assert lsm.in_cgroup(below, read(tree.hidden / "file")) == EPERM
    assert lsm.in_cgroup(below, read(tree.open / "file")) == OK


def test_moves_are_seen(tree: Any, guarded: tuple[Path, lsm.LsmGuard], neighbour: Path) -> None:
    """One process that is moved in and out is judged by where it is at each act."""
    path, codes = tree.hidden / "file", []
    with subprocess.Popen(
        [sys.executable, "-I", "-c", OPENING, str(path)], stdin=-1, stdout=-1, text=True, bufsize=1
    ) as process:
        assert process.stdin and process.stdout
        for group in (neighbour, guarded[0], neighbour, guarded[0]):
            (group / "cgroup.procs").write_text(str(process.pid))
            process.stdin.write("\n")
            codes.append(int(process.stdout.readline()))
        process.kill()
    assert codes == [OK, EPERM, OK, EPERM]


def test_who_was_there_before(tree: Any, agent: Path) -> None:
    """A process that was in the cgroup before the guard came is judged from then on, and one that
    remembered to belong nowhere too."""
    with subprocess.Popen(
        [sys.executable, "-I", "-c", OPENING, str(tree.hidden / "file")],
        stdin=-1, stdout=-1, text=True, bufsize=1,
    ) as process:  # fmt: skip
        assert process.stdin and process.stdout
        (agent / "cgroup.procs").write_text(str(process.pid))
        codes = []
        process.stdin.write("\n")
        codes.append(int(process.stdout.readline()))
        with lsm.attach(agent, tree.policy(defcon=CALM)):
            process.stdin.write("\n")
            codes.append(int(process.stdout.readline()))
        process.stdin.write("\n")
        codes.append(int(process.stdout.readline()))
        process.kill()
    assert codes == [OK, EPERM, OK]


def test_two_agents(tree: Any, agent: Path, cgroups: Callable[[], Path]) -> None:
    """Each has its rules, its count and its events; the inner one of two nested has its own."""
    other = cgroups()
    inner = agent / "inner"
    inner.mkdir()
    generous = tree.policy(defcon=CALM)
    rules = {
        place: entry for place, entry in generous.rules.entries.items() if entry.deny != Right.ALL
    }
    lax = lsm.LsmPolicy(rules=lsm.Compiled(rules, generous.rules.texts), defcon=CALM)
    path = read(tree.hidden / "file")
    with (
        lsm.attach(agent, tree.policy(defcon=CALM)) as one,
        lsm.attach(other, lax) as two,
        lsm.attach(inner, lax) as three,
    ):
        assert [lsm.in_cgroup(group, path) for group in (agent, other, inner)] == [EPERM, OK, OK]
        assert [guard.counts().denied for guard in (one, two, three)] == [1, 0, 0]
        assert [len(guard.read()) for guard in (one, two, three)] == [1, 0, 0]
        for guard in (two, three):
            assert guard.id != one.id


# ---- verdicts -----------------------------------------------------------------------------


def test_audit(tree: Any, agent: Path) -> None:
    """Without enforcement all goes on, and is told once as what it would have been."""
    with lsm.attach(agent, tree.policy(enforce=False)) as guard:
        assert lsm.in_cgroup(agent, read(tree.hidden / "file")) == OK
        (event,) = guard.read()
        assert event.verdict == Verdict.AUDIT
        assert (guard.counts().audited, guard.counts().denied) == (1, 0)


def test_audit_of_a_program(tree: Any, agent: Path) -> None:
    """A program is opened and then executed, and is one event."""

    def act() -> None:
        os.execv(tree.noexec / "prog", ["prog"])

    with lsm.attach(agent, tree.policy(enforce=False)) as guard:
        assert lsm.in_cgroup(agent, act) == OK
        kinds = [event.kind for event in guard.read()]
        assert kinds.count("exec.run") == 1, kinds


def loop(paths: tuple[Path, ...], times: int, done: Any) -> Callable[[], object]:
    """Reads that take turns; ``done`` counts the refused and the others."""

    def act() -> None:
        for turn in range(times):
            try:
                read(paths[turn % len(paths)])()
            except OSError:
                struct.pack_into("=i", done, 0, struct.unpack_from("=i", done)[0] + 1)
            else:
                struct.pack_into("=i", done, 4, struct.unpack_from("=i", done, 4)[0] + 1)

    return act


def shared() -> Any:
    import mmap

    return mmap.mmap(-1, 8)


def test_level_1_kills_at_once(tree: Any, agent: Path) -> None:
    """The violation that reaches level 1 is the last act."""
    done = shared()
    with lsm.attach(agent, tree.policy()) as guard:
        paths = tree.hidden / "file", tree.hidden / "prog"  # no act is a retry of the last
        assert lsm.in_cgroup(agent, loop(paths, 50, done)) == EPERM
        refused, succeeded = struct.unpack("=2i", done)
        assert (refused, succeeded) == (14, 0)
        events = guard.read()
        assert [event.verdict for event in events[-2:]] == [Verdict.DENY, Verdict.KILL]
        assert len(events) == 15
        assert events[-1].subject["level"] == 1
        # Whoever comes later dies of its first act, even of an allowed one.
        assert lsm.in_cgroup(agent, read(tree.open / "file")) == EPERM
        assert guard.read()[-1].verdict == Verdict.KILL


def test_retries_are_one_violation(tree: Any, agent: Path) -> None:
    """A library that tries again at once is no attack; every try is refused and told."""
    done = shared()
    with lsm.attach(agent, tree.policy()) as guard:
        assert lsm.in_cgroup(agent, loop((tree.hidden / "file",), 4, done)) == OK
        assert guard.counts().denied == len(guard.read()) == 4
        # One, or two where the emulator took more than 10 ms for it.
        assert guard.counts().count in (1, 2)


def marked(tree: Any, flag: RuleFlag) -> lsm.LsmPolicy:
    """The tree's policy, with ``flag`` on the line of the hidden folder."""
    made = tree.policy().rules
    line = made.texts.index("hidden") + 1
    rules = {
        place: replace(entry, flags=entry.flags | flag) if entry.number == line else entry
        for place, entry in made.entries.items()
    }
    return lsm.LsmPolicy(rules=replace(made, entries=rules))


def test_a_fatal_rule(tree: Any, agent: Path) -> None:
    """The denial of a rule marked fatal is DEFCON 1, and the end."""
    with lsm.attach(agent, marked(tree, RuleFlag.FATAL)) as guard:
        assert lsm.in_cgroup(agent, read(tree.none / "file")) == EPERM
        assert guard.counts().killed == 0
        assert lsm.in_cgroup(agent, read(tree.hidden / "file")) == EPERM
        assert [event.verdict for event in guard.read()] == [Verdict.DENY, Verdict.KILL]
        assert guard.counts().killed == 1


def test_canaries_are_no_violations(tree: Any, agent: Path) -> None:
    """What we try ourselves is refused and counted, apart from the agent's doing the same."""
    with lsm.attach(agent, marked(tree, RuleFlag.CANARY)) as guard:
        tried = read(tree.hidden / "file")
        for _ in range(3):
            guard.beat(lambda _: lsm.in_cgroup(agent, tried))
        assert guard.read() == []
        assert guard.counts() == lsm.Counts(0, 0, 0, 0, canaries=3)
        assert lsm.in_cgroup(agent, tried) == EPERM
        assert [event.kind for event in guard.read()] == ["file.open"]
        assert guard.counts() == lsm.Counts(1, 1, 0, 0, canaries=3)


def test_levels_take_rights_away(tree: Any, agent: Path) -> None:
    """At 3 writing is for the workspace, and programs are those that ran; at 2 what is explicit."""
    run_old, run_new = (
        lambda: _spawn(tree.open / "prog"),
        lambda: _spawn(tree.ro / "prog"),
    )
    write = lambda folder: lambda: os.close(os.open(folder / "file", os.O_WRONLY))  # noqa: E731
    with lsm.attach(agent, tree.policy()) as guard:
        assert lsm.in_cgroup(agent, run_old) == OK
        assert lsm.in_cgroup(agent, write(tree.noexec)) == OK
        guard.set_level(3)
        assert lsm.in_cgroup(agent, run_old) == OK
        assert lsm.in_cgroup(agent, run_new) == EPERM
        assert lsm.in_cgroup(agent, write(tree.open)) == OK
        assert lsm.in_cgroup(agent, read(tree.noexec / "file")) == OK
        before = guard.counts()
        assert lsm.in_cgroup(agent, write(tree.noexec)) == EROFS  # as of a mount that is read-only
        assert guard.counts().count == before.count
        assert {event.rule for event in guard.read()} == {"defcon: the level denies it"}
        guard.set_level(2)
        assert lsm.in_cgroup(agent, read(tree.ro / "file")) == OK
        assert lsm.in_cgroup(agent, read(tree.noexec / "file")) == EPERM
        guard.set_level(5)
        assert lsm.in_cgroup(agent, read(tree.noexec / "file")) == OK
        assert lsm.in_cgroup(agent, run_new) == OK


def _spawn(path: Path) -> None:
    pid = os.posix_spawn(path, [str(path)], {})
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
        raise OSError(EPERM, "it failed")


@pytest.mark.parametrize(("spin", "act"), [(0.0002, True), (0.0002, False), (0.0001, True)])
def test_denials_wait_in_the_kernel(spin: float, act: bool, tree: Any, agent: Path) -> None:
    """The quickest of many denials at a raised level takes that much longer than an open that is
    allowed; where levels have no effect it does not."""
    raised = lsm.Defcon(thresholds=(1, NEVER, NEVER, NEVER), delays=(spin, 0.0, 0.0), act=act)
    shared = mmap.mmap(-1, 16)

    def measure() -> None:
        quickest = [1.0, 1.0]
        for _ in range(300):
            for number, path in enumerate((tree.hidden / "file", tree.open / "file")):
                began = time.perf_counter()
                with suppress(PermissionError):
                    os.close(os.open(path, os.O_RDONLY))
                quickest[number] = min(quickest[number], time.perf_counter() - began)
        shared[:] = struct.pack("=dd", *quickest)

    with lsm.attach(agent, tree.policy(defcon=raised)) as guard:
        assert lsm.in_cgroup(agent, measure) == OK
        assert guard.counts().denied == 300
    denied, allowed = struct.unpack("=dd", shared)
    assert (denied - allowed > spin) == act, (denied, allowed)


def test_the_count_halves(tree: Any, agent: Path) -> None:
    """Violations fade, so that the same number over a longer time is no emergency."""
    calm = lsm.Defcon(decay=0.2, thresholds=(2, 3, 4, 5))
    with lsm.attach(agent, tree.policy(defcon=calm)) as guard:
        for _ in range(8):
            assert lsm.in_cgroup(agent, read(tree.hidden / "file")) == EPERM
            time.sleep(0.5)
        assert lsm.in_cgroup(agent, read(tree.open / "file")) == OK
        counts = guard.counts()
        assert (counts.denied, counts.killed) == (8, 0)
        assert counts.count < 5


def test_a_full_ring_is_counted(tree: Any, agent: Path) -> None:
    """Events that nobody reads are lost, and their number is known; denials go on."""
    done = shared()
    with lsm.attach(agent, tree.policy(defcon=CALM)) as guard:
        assert lsm.in_cgroup(agent, loop((tree.hidden / "file",), 1000, done)) == OK
        assert struct.unpack("=2i", done) == (1000, 0)
        counts = guard.counts()
        assert counts.denied == 1000
        events = [event for batch in iter(guard.read, []) for event in batch]
        kept = sum(event.kind == "file.open" for event in events)
        assert counts.lost == {"file.open": 1000 - kept}
        (told,) = (event for event in events if event.kind != "file.open")
        assert (told.kind, told.subject) == ("kernel.lost", {"events": counts.lost})
        assert 0 < kept < 1000


# ---- life and death -----------------------------------------------------------------------


def test_a_missed_deadline_kills(tree: Any, agent: Path) -> None:
    """Closed: past the deadline even an allowed act is the last one; a beat makes it go on."""
    with lsm.attach(agent, tree.policy(deadline=0.5)) as guard:
        assert lsm.in_cgroup(agent, read(tree.open / "file")) == OK
        time.sleep(0.7)
        assert lsm.in_cgroup(agent, read(tree.open / "file")) == EPERM
        event = guard.read()[-1]
        assert (event.verdict, event.rule) == (Verdict.KILL, "liveness: the deadline passed")
        guard.renew()
        assert lsm.in_cgroup(agent, read(tree.open / "file")) == OK


def test_a_missed_deadline_audits(tree: Any, agent: Path) -> None:
    """Open: past the deadline nothing is denied any more, and everything is told."""
    with lsm.attach(agent, tree.policy(deadline=0.5, on_loss="open")) as guard:
        assert lsm.in_cgroup(agent, read(tree.hidden / "file")) == EPERM
        time.sleep(0.7)
        assert lsm.in_cgroup(agent, read(tree.hidden / "file")) == OK
        assert [event.verdict for event in guard.read()] == [Verdict.DENY, Verdict.AUDIT]
        guard.renew()
        assert lsm.in_cgroup(agent, read(tree.hidden / "file")) == EPERM


def supervised(agent: Path, tree: Any, deadline: float) -> int:
    """A process that guards ``agent``, beats once and then does nothing; its pid."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        policy = tree.policy(deadline=deadline, defcon=CALM)
        guard = lsm.LsmGuard(agent, policy, lsm_plane.ensure())
        guard.register()
        os.write(writer, b"ready")
        time.sleep(3600)
    assert os.read(reader, 5) == b"ready"
    os.close(reader)
    os.close(writer)
    return pid


def killed(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_death_of_the_supervisor(tree: Any, agent: Path) -> None:
    """SIGKILL of the supervisor while the agent tries a forbidden read in a loop: not one succeeds,
    and when the deadline has passed the agent is dead."""
    supervisor = supervised(agent, tree, 2.0)
    hooks = lsm_plane.ensure().hooks()
    done = shared()
    child = os.fork()
    if child == 0:
        (agent / "cgroup.procs").write_text("0")
        loop((tree.hidden / "file",), 10**9, done)()
        os._exit(0)
    time.sleep(0.5)
    killed(supervisor)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    refused, succeeded = struct.unpack("=2i", done)
    assert refused > 0
    assert succeeded == 0
    assert lsm_plane.ensure().hooks() == hooks  # links are pinned
    assert lsm.in_cgroup(agent, read(tree.open / "file")) == EPERM  # nobody may act there any more


def test_sweep_forgets_the_dead(tree: Any, cgroups: Any) -> None:
    """What a killed supervisor left is removed with its cgroup, and only that."""
    plane = lsm_plane.ensure()
    root = Path("/sys/fs/cgroup")
    group = root / "mistest-swept"
    group.mkdir()
    lsm_plane.sweep(root)
    before = sorted(plane.registered())
    supervisor = supervised(group, tree, 60.0)
    killed(supervisor)
    agent = group.stat().st_ino
    assert lsm_plane.sweep(root) == []
    assert agent in plane.registered()
    group.rmdir()
    assert agent in lsm_plane.sweep(root)
    assert sorted(plane.registered()) == before
    assert not [key for key in plane.rules.items() if PLACE.unpack(key)[0] == agent]
    plane.close()


def test_detached_leaves_nothing(tree: Any, cgroups: Any) -> None:
    """Agents come and go: the maps are as before, and so is who is judged."""
    plane = lsm_plane.ensure()
    group = cgroups()
    keys = lambda: [  # noqa: E731
        len(plane.slots.items()),
        len(plane.rings.items()),
        len(plane.rules.items()),
    ]
    before = keys()
    for _ in range(5):
        with lsm.attach(group, tree.policy()) as guard:
            assert plane.slot(guard.id) is not None
    assert keys() == before
    assert lsm.in_cgroup(group, read(tree.hidden / "file")) == OK
    plane.close()


@pytest.mark.parametrize("quarter", range(4))
def test_a_thousand_agents_leave_nothing(quarter: int, tree: Any, agent: Path) -> None:
    """250 times an agent comes, now and then does something, and goes: as many entries in the maps
    and open files here as before, and the epoch has moved on each time."""
    policy = tree.policy()
    plane = lsm_plane.ensure()

    def held() -> list[int]:
        entries = [len(one.items()) for one in (plane.slots, plane.rings, plane.rules)]
        return [*entries, len(os.listdir("/proc/self/fd"))]

    before = held()
    rules = lsm.Compiled(policy.rules.entries, policy.rules.texts)  # held by `policy` all the time
    spent = 0.0
    for turn in range(250):
        began = time.perf_counter()
        guard = lsm.LsmGuard(agent, replace(policy, rules=rules), lsm_plane.ensure())
        guard.register()
        spent += time.perf_counter() - began
        if turn % 50 == 0:
            assert lsm.in_cgroup(agent, read(tree.hidden / "file")) == EPERM
        began = time.perf_counter()
        guard.close()
        spent += time.perf_counter() - began
    assert held() == before
    plane.close()
    policy.rules.release()
    each = spent / 250 * 1000
    print(f"an agent of {len(rules.entries)} rules comes and goes in {each:.1f} ms")


def test_loaded_once(tree: Any) -> None:
    """The second start finds the programs of the first, and is quick."""
    first = lsm_plane.ensure()
    began = time.monotonic()
    second = lsm_plane.ensure()
    assert time.monotonic() - began < 0.5
    assert first.folder == second.folder
    assert len(first.hooks()) >= 55
    first.close()
    second.close()


def test_versions_live_side_by_side(
    tree: Any, agent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An upgrade loads its own programs; the agent of the old ones stays guarded until it ends."""
    with lsm.attach(agent, tree.policy(defcon=CALM)) as guard:
        old = lsm_plane.version()
        monkeypatch.setattr(lsm_plane, "version", lambda: "another")
        new = lsm_plane.ensure()
        assert {folder.name for folder in lsm_plane.TOP.iterdir()} == {old, "another"}
        below = agent / "new"
        below.mkdir()
        assert lsm.in_cgroup(agent, read(tree.hidden / "file")) == EPERM
        assert guard.counts().denied == 1
        assert guard.id in lsm_plane.Plane(lsm_plane.TOP / old).registered()
        lsm_plane.sweep(Path("/sys/fs/cgroup"))
        assert (lsm_plane.TOP / old).exists()
        assert lsm.in_cgroup(agent, read(tree.hidden / "file")) == EPERM
        new.close()
    monkeypatch.undo()
    lsm_plane.sweep(Path("/sys/fs/cgroup"))
    assert not (lsm_plane.TOP / "another").exists()


def test_verify(tree: Any, agent: Path) -> None:
    """Proof passes where the guard works, leaves no trace, and fails where it does not."""
    with lsm.attach(agent, tree.policy(deadline=60)) as guard:
        guard.verify()
        assert guard.read() == []
        assert guard.counts() == lsm.Counts(0, 0, 0, 0)
        with lsm_plane.locked():
            guard._plane.forget(guard.id)
        guard.renew = lambda: None  # type: ignore[method-assign]
        with pytest.raises(VerifyError):
            guard.verify()


def test_verify_in_audit(tree: Any, agent: Path) -> None:
    """In audit the canary's acts go on, and are counted."""
    with lsm.attach(agent, tree.policy(enforce=False)) as guard:
        guard.verify()
        assert guard.counts() == lsm.Counts(0, 0, 0, 0)


@pytest.fixture(scope="module", autouse=True)
def _plane() -> Iterator[None]:
    """Loading takes seconds in an emulated machine: before the clock of any one test runs."""
    lsm_plane.ensure().close()
    yield
