"""Faults of our own processes while an agent tries a forbidden file without pause.

``closed``: whatever is killed, stopped or starved, no read ever succeeds, and the agent ends.  The
control is the same agent under a profile without the rule, which reads at once.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from harness import PACE, mis, run, start, wait_for
from leftovers import snapshot

from mis_run import cgroup

pytestmark = pytest.mark.root

ROUNDS = 10
PROFILE = f"""
extends = "default"
[files]
deny = ["...", "**/.env"]
[defcon]
act = false
[liveness]
deadline = "{PACE}s"
beat = "{PACE * 50}ms"
canary = "{PACE * 100}ms"
"""
READER = """
import os, sys
for _ in range(3):
    os.fork()
print("up", flush=True)
tries = 0
while True:
    try:
        fd = os.open(".env", os.O_RDONLY)
    except PermissionError:
        tries += 1
        continue
    with open("leak", "a") as file:
        file.write(os.read(fd, 100).decode())
    if len(sys.argv) > 1:
        sys.exit(0)
"""


def children(pid: int) -> list[int]:
    """The direct children of a process: for a supervisor, its watchdog among them."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def watchdog(supervisor: int) -> int:
    """The watchdog of a running mis-run."""
    return next(
        pid
        for pid in children(supervisor)
        if b"mis-watchdog" in Path(f"/proc/{pid}/cmdline").read_bytes()
    )


def kill_supervisor(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def stop_supervisor(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)


def kill_watchdog(pid: int) -> None:
    os.kill(watchdog(pid), signal.SIGKILL)


def kill_both(pid: int) -> None:
    dog = watchdog(pid)
    os.kill(pid, signal.SIGKILL)
    os.kill(dog, signal.SIGKILL)


def kill_both_reversed(pid: int) -> None:
    """The supervisor dies while it ends the agent for the watchdog's death: nothing half done may
    keep the init from finishing that."""
    dog = watchdog(pid)
    os.kill(dog, signal.SIGKILL)
    time.sleep(random.random() * 0.004)
    os.kill(pid, signal.SIGKILL)


def stop_the_watchdog_too(pid: int) -> None:
    """The supervisor dies while the watchdog hangs: the init is alone, and nobody answers."""
    dog = watchdog(pid)
    os.kill(dog, signal.SIGSTOP)
    os.kill(pid, signal.SIGKILL)
    time.sleep(0.3)
    os.kill(dog, signal.SIGCONT)


def starve_supervisor(pid: int) -> None:
    """CPU only now and then, as a loaded scheduler gives it, and in the end never again."""
    for _ in range(4):
        os.kill(pid, signal.SIGSTOP)
        time.sleep(0.15)
        os.kill(pid, signal.SIGCONT)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)


FAULTS: dict[str, Callable[[int], None]] = {
    fault.__name__: fault
    for fault in (
        kill_supervisor,
        stop_supervisor,
        kill_watchdog,
        kill_both,
        kill_both_reversed,
        stop_the_watchdog_too,
        starve_supervisor,
    )
}


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    folder = tmp_path / "workspace"
    folder.mkdir()
    (folder / ".env").write_text("SECRET")
    (folder / "reader.py").write_text(READER)
    (tmp_path / "closed.toml").write_text(PROFILE)
    return folder


def alive(folder: Path) -> list[str]:
    """Processes whose working directory is the workspace: the agent's."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if (entry / "cwd").readlink() == folder and entry.name != str(os.getpid()):
                found.append(entry.name)
        except OSError:
            continue
    return found


@pytest.mark.parametrize("name", FAULTS)
def test_closed_never_lets_a_read_through(name: str, workspace: Path) -> None:
    """Ten times the fault at a random moment: no leak, and the agent is gone within seconds."""
    options = ("--profile", str(workspace.parent / "closed.toml"), "--net", "none")
    for number in range(ROUNDS):
        agent = start("/usr/bin/python3", "reader.py", cwd=workspace, options=options)
        assert agent.stdout is not None
        assert agent.stdout.readline() == "up\n", agent.communicate(timeout=10 * PACE)[1]
        time.sleep(random.random() * 0.2 if number else 0)  # once before the first beat
        FAULTS[name](agent.pid)
        agent.wait(20 * PACE)
        wait_for(lambda: not in_cgroups(workspace), 10)
        agent.communicate(timeout=20 * PACE)
        assert not (workspace / "leak").exists()
    assert mis("gc").returncode == 0


@pytest.fixture
def cell() -> Iterator[Path]:
    """A v2 cgroup, as a service manager makes one for what it starts."""
    unified = cgroup.detect()[1]
    assert unified is not None
    made = unified / f"mis-test-{os.getpid()}"
    made.mkdir()
    yield made
    (made / "cgroup.freeze").write_text("0")
    (made / "cgroup.kill").write_text("1")
    wait_for(lambda: "populated 0" in (made / "cgroup.events").read_text(), 10)
    made.rmdir()


@pytest.mark.parametrize("what", ["kill", "freeze"])
def test_the_whole_cgroup_of_the_supervisor(what: str, cell: Path, workspace: Path) -> None:
    """Killed or frozen as a service is: the watchdog is elsewhere, ends the agent and cleans up.

    The control: with the watchdog in there too nobody ends an agent whose supervisor is frozen.
    """
    before = snapshot()
    options = ("--profile", str(workspace.parent / "closed.toml"), "--net", "none")
    agent = start("/usr/bin/python3", "reader.py", cwd=workspace, options=options)
    assert agent.stdout is not None and agent.stdout.readline() == "up\n"
    (cell / "cgroup.procs").write_text(str(agent.pid))
    (cell / f"cgroup.{what}").write_text("1")
    assert wait_for(lambda: snapshot() == before, 10)
    assert not (workspace / "leak").exists()
    assert agent.wait(10 * PACE) == -signal.SIGKILL
    agent.communicate(timeout=10 * PACE)

    if what == "freeze":
        agent = start("/usr/bin/python3", "reader.py", cwd=workspace, options=options)
        assert agent.stdout is not None and agent.stdout.readline() == "up\n"
        for pid in (agent.pid, watchdog(agent.pid)):
            (cell / "cgroup.procs").write_text(str(pid))
        (cell / "cgroup.freeze").write_text("1")
        time.sleep(3)
        assert in_cgroups(workspace)
        (cell / "cgroup.freeze").write_text("0")
        (cell / "cgroup.kill").write_text("1")
        agent.wait(10 * PACE)
        agent.communicate(timeout=10 * PACE)
        wait_for(lambda: not in_cgroups(workspace), 10)
        assert mis("gc").returncode == 0
        with suppress(AssertionError):  # the watchdog may have come to clean up before its end
            wait_for(lambda: snapshot() == before, 10)
        assert snapshot() == before


def in_cgroups(folder: Path) -> list[str]:
    """The agent's processes: those in a cgroup of ours with this workspace."""
    return [
        pid
        for pid in alive(folder)
        if "/mis/" in _text(Path(f"/proc/{pid}/cgroup"))
        and " Z " not in _text(Path(f"/proc/{pid}/stat"))
    ]


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def test_without_the_rule_the_same_agent_reads(workspace: Path) -> None:
    """The control: it is the guard that keeps the reader out."""
    done = run("/usr/bin/python3", "reader.py", "once", cwd=workspace, options=("--net", "none"))
    assert done.code == 0
    assert "SECRET" in (workspace / "leak").read_text()


def test_an_oom_kill_of_the_supervisor(workspace: Path) -> None:
    """The kernel's own choice of a victim is a SIGKILL like another: the supervisor is put into a
    memory cgroup of its own that is too small, and its agent ends without a leak."""
    controller = Path("/sys/fs/cgroup/memory")
    if not (controller / "memory.limit_in_bytes").exists():
        pytest.skip("needs the v1 memory controller to move one process only")
    group = controller / f"mis-test-oom-{os.getpid()}"
    group.mkdir()
    options = ("--profile", str(workspace.parent / "closed.toml"), "--net", "none")
    try:
        agent = start("/usr/bin/python3", "reader.py", cwd=workspace, options=options)
        assert agent.stdout is not None and agent.stdout.readline() == "up\n"
        (group / "memory.limit_in_bytes").write_text("65536")
        (group / "cgroup.procs").write_text(str(agent.pid))
        agent.wait(30 * PACE)
        assert agent.returncode == -signal.SIGKILL
        wait_for(lambda: not in_cgroups(workspace), 10)
        agent.communicate(timeout=20 * PACE)
        assert not (workspace / "leak").exists()
    finally:
        wait_for(lambda: not (group / "cgroup.procs").read_text(), 10)
        group.rmdir()
    assert mis("gc").returncode == 0
