"""Real cgroups: limits seen, everything killed whatever it forks, nothing left.

No container here: processes enter the cgroup as the runtime would put them, in every hierarchy.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from mis_run import cgroup, cgroup_kill, cgroup_systemd
from mis_run.cgroup import Cgroup
from mis_run.cgroup_detect import PROBE
from mis_run.errors import SetupError
from mis_run.linux import programs
from mis_run.model import Host

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make cgroups"),
]

KIND, UNIFIED, CONTROLLERS = cgroup.detect()
TOPS = list(dict.fromkeys([*([UNIFIED] if UNIFIED else []), *CONTROLLERS.values()]))


def host(*, systemd: bool = False) -> Host:
    return Host(
        mechanisms={},
        cgroup=KIND,
        unified=UNIFIED,
        controllers=CONTROLLERS,
        runtime=None,
        systemd=systemd,
    )


def left(name: str) -> list[Path]:
    return [path for top in TOPS for path in top.glob(f"**/*{name}*")]


def leaves(group: Cgroup) -> list[Path]:
    """The agent's directory in every hierarchy, made as the runtime makes them."""
    found = [top / group.oci_path[1:] for top in TOPS]
    for leaf in found:
        leaf.mkdir(exist_ok=True)
        for name in ("cpuset.cpus", "cpuset.mems"):  # v1 starts with none: nobody may enter
            if (leaf / name).exists() and not (leaf / name).read_text().strip():
                for folder in (leaf.parent.parent, leaf.parent, leaf):
                    value = (folder.parent / name).read_text()
                    (folder / name).write_text(value)
    return found


def limit(group: Cgroup, controller: str, v1: str, v2: str, value: str) -> None:
    top = CONTROLLERS[controller]
    name = v2 if top == UNIFIED else v1
    (top / group.oci_path[1:] / name).write_text(value)


@contextmanager
def inside(group: Cgroup, script: str) -> Iterator[subprocess.Popen[bytes]]:
    """A Python script running in the cgroup; killed with it by the test's end."""
    enter = "import os\n" + "".join(
        f"open({str(leaf / 'cgroup.procs')!r}, 'w').write('0')\n" for leaf in leaves(group)
    )
    child = subprocess.Popen([sys.executable, "-I", "-c", enter + script], stdout=subprocess.PIPE)
    try:
        yield child
    finally:
        group.kill()
        child.wait(10)
        assert child.stdout is not None
        child.stdout.close()


def line_from(child: subprocess.Popen[bytes]) -> str:
    assert child.stdout is not None
    return child.stdout.readline().decode().strip()


def kinds(group: Cgroup) -> set[str]:
    return {event.kind for event in group.poll_events()}


def test_made_everywhere_and_removed_everywhere() -> None:
    """The identity directory exists in every hierarchy while the run lasts, and nowhere after."""
    with cgroup.create("mistest-life", host()) as group:
        assert [top / "mis/mistest-life" for top in TOPS] == [
            path for path in left("mistest-life") if path.is_dir()
        ]
        assert group.oci_path == "/mis/mistest-life/agent"
        assert group.wait_empty(1.0) < 1.0
    assert left("mistest-life") == []
    assert not group.populated()


def test_removed_with_its_processes() -> None:
    """An error in the launch ends the agent's processes and removes the cgroup."""
    with (
        pytest.raises(RuntimeError, match="launch"),
        cgroup.create("mistest-error", host()) as group,
        inside(group, "print('in', flush=True); import time; time.sleep(60)") as child,
    ):
        assert line_from(child) == "in"
        assert group.procs() == {child.pid}
        raise RuntimeError("launch")
    assert child.returncode == -signal.SIGKILL
    assert left("mistest-error") == []


def test_a_taken_id_is_refused_and_left_alone() -> None:
    """A second run of the same id fails before it touches anything of the first."""
    with (
        cgroup.create("mistest-taken", host()) as group,
        inside(group, "print('in', flush=True); import time; time.sleep(60)") as child,
    ):
        assert line_from(child) == "in"
        with (
            pytest.raises(SetupError, match="cannot make"),
            cgroup.create("mistest-taken", host()),
        ):
            pass
        assert child.poll() is None
        assert group.populated()
    assert left("mistest-taken") == []


@pytest.mark.parametrize("name", ["", "..", "a/b", ".hidden"])
def test_names_that_leave_the_tree(name: str) -> None:
    """An id cannot name another place."""
    with pytest.raises(SetupError, match="run id"), cgroup.create(name, host()):
        pass


def test_adopt_moves_a_process() -> None:
    """A process that the runtime put elsewhere is brought into the agent's v2 cgroup."""
    with cgroup.create("mistest-adopt", host()) as group:
        child = subprocess.Popen(["sleep", "60"])
        assert not group.populated()
        group.adopt(child.pid)
        assert group.populated()
        assert group.procs() == {child.pid}
        group.kill()
        assert child.wait(10) == -signal.SIGKILL
        with pytest.raises(SetupError, match="cannot put process"):
            group.adopt(child.pid)


BOMB = """
import os, time
failed = 0
for number in range(60):
    try:
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
    except BlockingIOError:
        failed += 1
print(failed, flush=True)
time.sleep(60)
"""


def test_fork_bomb_stays_below_the_limit() -> None:
    """Forks over the pids limit fail and are seen; without a limit the same forks succeed."""
    with cgroup.create("mistest-bomb", host()) as group:
        leaves(group)
        limit(group, "pids", "pids.max", "pids.max", "20")
        with inside(group, BOMB) as child:
            assert int(line_from(child)) == 41
            usage = group.usage()
            assert usage.pids == 20
            assert usage.pids_denied == 41
            assert kinds(group) == {"limits.pids"}
            assert kinds(group) == set()
    with cgroup.create("mistest-calm", host()) as group, inside(group, BOMB) as child:
        assert int(line_from(child)) == 0
        assert group.usage().pids == 61
        assert kinds(group) == set()


HOG = "data = bytearray(96 << 20); print(len(data), flush=True)"


def test_memory_hog_is_killed_and_seen() -> None:
    """The kernel's kill at the memory limit is an event; the same hog lives without a limit."""
    size = str(32 << 20)
    with cgroup.create("mistest-hog", host()) as group:
        leaves(group)
        limit(group, "memory", "memory.limit_in_bytes", "memory.max", size)
        if CONTROLLERS["memory"] == UNIFIED:
            limit(group, "memory", "", "memory.swap.max", "0")
        else:
            limit(group, "memory", "memory.memsw.limit_in_bytes", "", size)
        with inside(group, HOG) as child:
            assert child.wait(20) == -signal.SIGKILL
            usage = group.usage()
            assert usage.oom_kills == 1
            assert usage.memory_peak is not None
            assert 24 << 20 < usage.memory_peak <= 33 << 20  # the parent's own pages on top
            assert kinds(group) == {"limits.oom"}
    with cgroup.create("mistest-fine", host()) as group, inside(group, HOG) as child:
        assert child.wait(20) == 0
        usage = group.usage()
        assert usage.oom_kills == 0
        assert usage.memory_peak is not None
        assert usage.memory_peak > 96 << 20
        assert kinds(group) == set()


BURN = """
import time
end = time.process_time() + 0.15
while time.process_time() < end:
    pass
print('done', flush=True)
"""


def test_throttling_is_seen() -> None:
    """A CPU limit that holds the agent back is an event; the same work without one is not."""
    with cgroup.create("mistest-slow", host()) as group:
        leaves(group)
        limit(group, "cpu", "cpu.cfs_quota_us", "cpu.max", "10000")
        with inside(group, BURN) as child:
            assert line_from(child) == "done"
            usage = group.usage()
            assert usage.nr_throttled
            assert usage.throttled_seconds
            assert usage.throttled_seconds > 0.1
            assert usage.cpu_seconds is not None
            assert 0.15 <= usage.cpu_seconds < 0.6
            assert kinds(group) == {"limits.throttled"}
    with cgroup.create("mistest-fast", host()) as group, inside(group, BURN) as child:
        assert line_from(child) == "done"
        assert group.usage().nr_throttled == 0
        assert kinds(group) == set()


SPIN = "print('in', flush=True)\nwhile True: pass"


def test_frozen_processes_use_no_cpu() -> None:
    """After freeze the CPU time stands still, after thaw it runs on."""
    with cgroup.create("mistest-frost", host()) as group, inside(group, SPIN) as child:

        def burnt(seconds: float) -> float:
            before = group.usage().cpu_seconds
            time.sleep(seconds)
            after = group.usage().cpu_seconds
            assert before is not None
            assert after is not None
            return after - before

        line_from(child)
        assert burnt(0.2) > 0.02
        assert group.freeze(True)
        assert burnt(0.2) == 0
        assert group.freeze(False)
        assert burnt(0.2) > 0.02


# A process that forks for ever: each child lives on, so killing a list made while it runs misses
# some.  The pids limit of the test bounds it.
FORKS = """
import os, sys, time
for number in range(100):
    if os.fork() == 0:
        time.sleep(60)
        os._exit(0)
print('in', flush=True)
while True:
    try:
        if os.fork() == 0:
            os.setsid()
    except BlockingIOError:
        time.sleep(0.001)
"""


def by_hand_v1(group: Cgroup) -> None:
    freezer = CONTROLLERS["freezer"] / group.place[1:]
    cgroup_kill.kill_by_hand(group.unified, freezer, group.place, 10)


@pytest.mark.parametrize("how", ["cgroup.kill", "freeze", "v1 freezer"])
def test_kill_beats_forks(how: str, record_property: pytest.RecordProperty) -> None:
    """100 processes and a fork bomb are gone at once, with and without cgroup.kill."""
    if how == "v1 freezer" and CONTROLLERS.get("freezer") in (None, UNIFIED):
        pytest.skip("no v1 freezer on this machine")
    kill = {"cgroup.kill": Cgroup.kill, "freeze": Cgroup.kill_by_hand, "v1 freezer": by_hand_v1}
    with cgroup.create("mistest-kill", host()) as group:
        leaves(group)
        limit(group, "pids", "pids.max", "pids.max", "300")
        with inside(group, FORKS) as child:
            assert line_from(child) == "in"
            while len(group.procs()) < 200:
                time.sleep(0.01)
            began = time.monotonic()
            kill[how](group)
            group.wait_empty(10)
            took = time.monotonic() - began
            assert not group.populated()
            assert group.procs() == set()
        time.sleep(0.05)
        assert not group.populated()
    record_property("milliseconds", round(took * 1000, 1))
    print(f"{how}: populated 0 after {took * 1000:.1f} ms")
    assert took < 5
    assert left("mistest-kill") == []


def test_frozen_processes_are_killed() -> None:
    """A frozen cgroup needs no thaw to be killed and removed."""
    with cgroup.create("mistest-ice", host()) as group, inside(group, SPIN) as child:
        line_from(child)
        assert group.freeze(True)
        group.kill()
        assert group.wait_empty(5) < 5
    assert left("mistest-ice") == []


def test_wait_empty_tells_that_it_is_not() -> None:
    """With a process inside, the time returned is at least the time given."""
    with cgroup.create("mistest-busy", host()) as group, inside(group, SPIN) as child:
        line_from(child)
        assert group.wait_empty(0.05) >= 0.05
        assert group.populated()


@pytest.mark.skipif(KIND != "hybrid", reason="needs v1 hierarchies")
def test_a_process_in_one_v1_hierarchy_only() -> None:
    """A process that is in a v1 directory of the run but not in its v2 cgroup is ended too."""
    with cgroup.create("mistest-stray", host()) as group:
        child = subprocess.Popen(["sleep", "60"])
        (CONTROLLERS["pids"] / group.place[1:] / "cgroup.procs").write_text(str(child.pid))
        assert not group.populated()
    assert child.wait(10) == -signal.SIGKILL
    assert left("mistest-stray") == []


def test_a_stranger_is_never_killed() -> None:
    """The kill by process number looks at membership first: a reused number is safe."""
    child = subprocess.Popen(["sleep", "60"])
    cgroup_kill.kill_member(child.pid, "/mis/mistest-none")
    time.sleep(0.02)
    assert child.poll() is None
    child.kill()
    child.wait(10)
    cgroup_kill.kill_member(child.pid, "/mis/mistest-none")


def test_parallel_begin_and_end() -> None:
    """Runs that begin while others end never lose their common parent."""
    errors: list[Exception] = []

    def many(number: int) -> None:
        try:
            for turn in range(15):
                with cgroup.create(f"mistest-p{number}-{turn}", host()) as group:
                    (group.agent).mkdir()
        except (SetupError, OSError) as error:
            errors.append(error)

    threads = [threading.Thread(target=many, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert left("mistest-p") == []


def test_gc_removes_only_dead_runs() -> None:
    """gc ends runs that are not live; live ones and directories that are no run stay."""
    dead, live, other = "deadbee0", "deadbee1", "mistest-other"
    ours = {path.name for top in TOPS for path in top.glob("mis/*")} - {dead}
    with cgroup.create(other, host()), cgroup.create(live, host()) as running:
        assert UNIFIED is not None
        group = Cgroup(dead, UNIFIED, CONTROLLERS)
        group.make()
        with inside(group, SPIN) as child, inside(running, SPIN) as survivor:
            line_from(child)
            line_from(survivor)
            assert cgroup.gc(ours | {live}) == [dead]
            assert child.wait(10) == -signal.SIGKILL
            assert survivor.poll() is None
            assert left(dead) == []
            assert left(other)
            assert cgroup.gc(ours | {live}) == []


def test_gc_removes_what_a_killed_probe_left() -> None:
    """The cgroup of a process that is gone; that of one that is there stays, and is no obstacle."""
    assert UNIFIED is not None
    ended = subprocess.Popen(["true"])
    ended.wait()
    left_behind, of_the_living = (UNIFIED / f"{PROBE}{pid}" for pid in (ended.pid, os.getpid()))
    ours = {path.name for top in TOPS for path in top.glob("mis/*")}
    left_behind.mkdir()
    of_the_living.mkdir()
    try:
        assert cgroup.gc(ours) == [left_behind.name]
        assert not left_behind.exists()
        assert of_the_living.exists()
        assert cgroup.supported(*cgroup.detect())["cgroup-v2"].ok
        assert not of_the_living.exists()  # it was taken for our own
    finally:
        for path in (left_behind, of_the_living):
            with suppress(FileNotFoundError):
                path.rmdir()


READ_ONLY = """
from mis_run import cgroup
from mis_run.linux import libc
libc.unshare(libc.CLONE_NEWNS)
libc.mount("", "/", "", libc.MS_REC | libc.MS_PRIVATE)
kind, unified, controllers = cgroup.detect()
print(cgroup.supported(kind, unified, controllers)["cgroup-v2"].ok)
libc.mount("", str(unified), "", 32 | libc.MS_RDONLY)  # 32: MS_REMOUNT
found = cgroup.supported(kind, unified, controllers)["cgroup-v2"]
print(found.ok, "read-only" in found.detail, "--privileged" in found.fix)
"""


def test_read_only_mount_in_a_container() -> None:
    """Where the cgroup mount is read-only the finding says so and names the container's flag."""
    # Remounting a shared superblock read-only in a namespace of its own affects that mount only
    # when it is a bind; so the script binds first.
    script = READ_ONLY.replace(
        'libc.mount("", str(unified), "", 32 |',
        'libc.mount(str(unified), str(unified), "", 4096)  # MS_BIND\n'
        'libc.mount("", str(unified), "", 4096 | 32 |',
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", script], capture_output=True, text=True, timeout=20
    )
    assert done.stdout.splitlines() == ["True", "False True True"], done.stderr


PRIVATE = """
import sys
from pathlib import Path
from mis_run import cgroup
from mis_run.errors import SetupError
from mis_run.linux import libc
where = Path(sys.argv[1])
try:
    cgroup.mount_private(where)
except SetupError as error:
    print(error)
libc.unshare(libc.CLONE_NEWNS)
libc.mount("", "/", "", libc.MS_REC | libc.MS_PRIVATE)
print((cgroup.mount_private(where) / "cgroup.procs").exists())
"""


def test_private_mount(tmp_path: Path) -> None:
    """cgroup2 can be mounted for us alone, and is refused while others would see it."""
    where = tmp_path / "cgroup2"
    done = subprocess.run(
        [sys.executable, "-I", "-c", PRIVATE, str(where)],
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert "own mount namespace" in first
    assert second == "True"
    assert list(where.iterdir()) == []


# What systemd-run(1) does with --scope, as far as we rely on it: a cgroup named by the unit in the
# slice, the caller moved there, the command executed, stdin passed on.
FAKE_SYSTEMD_RUN = """#!/bin/sh
for word; do
    shift
    case "$word" in --unit=*) unit=${word#--unit=};; --slice=*) slice=${word#--slice=};;
    --) break;; esac
done
mkdir -p UNIFIED/$slice/$unit && echo $$ > UNIFIED/$slice/$unit/cgroup.procs
exec "$@"
"""


@pytest.fixture
def fake_systemd_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    program = tmp_path / "systemd-run"
    program.write_text(FAKE_SYSTEMD_RUN.replace("UNIFIED", str(UNIFIED)))
    program.chmod(0o755)
    monkeypatch.setattr(programs, "FOLDERS", f"{tmp_path}:{programs.FOLDERS}")
    return program


def test_systemd_scope(fake_systemd_run: Path) -> None:
    """On a systemd host the run lives in a scope, next to the holder that keeps the scope."""
    with cgroup.create("deadbee2", host(systemd=True)) as group:
        assert group.oci_path == "/mis.slice/mis-deadbee2.scope/deadbee2/agent"
        assert (group.unified.parent / "holder/cgroup.procs").read_text()
        with inside(group, SPIN) as child:
            line_from(child)
            assert group.procs() == {child.pid}
            group.kill()
            assert group.wait_empty(5) < 5
    assert UNIFIED is not None
    scope = UNIFIED / "mis.slice/mis-deadbee2.scope"
    assert [path.name for path in scope.iterdir() if path.is_dir()] == ["holder"]
    for folder in (scope / "holder", scope, scope.parent):  # systemd would do this
        folder.rmdir()
    assert left("deadbee2") == []


def test_systemd_scope_that_fails(fake_systemd_run: Path) -> None:
    """When systemd refuses, its words and the way around are in the message, and nothing is left;
    that way then works."""
    fake_systemd_run.write_text("#!/bin/sh\necho 'Failed to connect to bus' >&2\nexit 1\n")
    with (
        pytest.raises(SetupError, match="Failed to connect to bus") as caught,
        cgroup.create("deadbee3", host(systemd=True)),
    ):
        pass
    assert "MIS_CGROUP=direct" in caught.value.hint
    os.environ["MIS_CGROUP"] = "direct"
    try:
        with cgroup.create("deadbee3", host(systemd=True)) as group:
            assert group.place == "/mis/deadbee3"
    finally:
        del os.environ["MIS_CGROUP"]
    assert left("deadbee3") == []


def test_systemd_command() -> None:
    """The command delegates the scope and never waits for a terminal."""
    words = cgroup_systemd.command("deadbee4")
    assert "--scope" in words
    assert "--property=Delegate=yes" in words
    assert words[words.index("--") + 1 :] == ["cat"]
