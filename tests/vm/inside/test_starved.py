"""The supervisor's own cgroup is out of CPU, or frozen: what limits and floods on our side do.

The watchdog has no cgroup of its own (docs/decisions/watchdog.md): here is what that rests on.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from harness import MIS_RUN, wait_for
from runtimes import PYTHON, clean_workspace, options  # noqa: F401 - one is a fixture

GROUP = Path("/sys/fs/cgroup/mistest-ours")
LOOP = """
import os
out = os.open("counts", os.O_WRONLY | os.O_CREAT)
refused = read = 0
while True:
    try:
        os.close(os.open("/etc/shadow", os.O_RDONLY)); read += 1
    except OSError:
        refused += 1
    os.pwrite(out, b"%12d %12d" % (refused, read), 0)
"""
BEATS = """
import sys, time
while True:
    time.sleep(0.1)
    sys.stdout.write("x"); sys.stdout.flush()
"""


@pytest.fixture
def group() -> Iterator[Path]:
    """A cgroup with a CPU controller for us to be put into."""
    Path("/sys/fs/cgroup/cgroup.subtree_control").write_text("+cpu")
    GROUP.mkdir()
    yield GROUP
    (GROUP / "cgroup.kill").write_text("1")
    wait_for(lambda: "populated 0" in (GROUP / "cgroup.events").read_text())
    GROUP.rmdir()


@contextmanager
def agent_of(workspace: Path, group: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A supervisor that was put into ``group`` with its watchdog, and its agent elsewhere."""
    argv = [*MIS_RUN, *options(workspace, "[defcon]\nact = false\n"), "--", *PYTHON, LOOP]
    with subprocess.Popen(argv, cwd=workspace, stdin=-3, stdout=-3, stderr=-3) as supervisor:
        try:
            wait_for(lambda: counts(workspace)[0] > 5, 80)
            ours = [supervisor.pid, *watchdogs(supervisor.pid)]
            assert len(ours) == 2
            for pid in ours:
                (group / "cgroup.procs").write_text(str(pid))
            yield supervisor
        finally:
            (group / "cgroup.freeze").write_text("0")
            supervisor.kill()


def watchdogs(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    names = {int(child): Path(f"/proc/{child}/comm").read_text().strip() for child in children}
    return [child for child, name in names.items() if name == "mis-watchdog"]


def counts(workspace: Path) -> list[int]:
    path = workspace / "counts"
    words = path.read_text().split() if path.exists() else []
    return [int(word) for word in words] or [0, 0]


def populated() -> bool:
    files = Path("/sys/fs/cgroup/mis").glob("*/cgroup.events")
    return any("populated 1" in file.read_text() for file in files)


def test_no_cpu_for_us(workspace: Path, group: Path) -> None:
    """One hundredth of a core for our whole cgroup, a flood in it, and a supervisor that hangs: the
    watchdog, of real-time priority, still ends the agent in time. An ordinary process there is the
    control: it comes late by seconds."""
    beats = workspace.parent / "beats"
    with agent_of(workspace, group) as supervisor:
        with beats.open("w") as out:
            ordinary = subprocess.Popen([sys.executable, "-I", "-c", BEATS], stdout=out)
        wait_for(lambda: beats.stat().st_size > 3, 20)
        burners = [subprocess.Popen(["sh", "-c", "while :; do :; done"]) for _ in range(4)]
        for process in (ordinary, *burners):
            (group / "cgroup.procs").write_text(str(process.pid))
        (group / "cpu.max").write_text("1000 100000")
        before, began = beats.stat().st_size, time.monotonic()
        os.kill(supervisor.pid, signal.SIGSTOP)
        wait_for(lambda: not populated(), 20)
        took = time.monotonic() - began
        came = beats.stat().st_size - before
        (group / "cpu.max").write_text("max 100000")  # what follows is gc's, and not urgent
        for process in (ordinary, *burners):
            process.kill()
            process.wait()
    print(f"agent ended after {took:.1f} s; the ordinary process came {came} times")
    assert 3 < took < 7  # the deadline is 4 s
    assert came < took / 0.1 / 2
    assert counts(workspace)[1] == 0
    wait_for(lambda: not list(Path("/run/mis").glob("*/state.json")), 60)


def test_frozen(workspace: Path, group: Path) -> None:
    """Frozen, neither of ours can end the agent, and no forbidden read succeeds: it waits. Thawed,
    either goes on judging or ends it."""
    with agent_of(workspace, group):
        (group / "cgroup.freeze").write_text("1")
        wait_for(lambda: "frozen 1" in (group / "cgroup.events").read_text())
        time.sleep(0.5)
        first = counts(workspace)
        time.sleep(6)
        assert counts(workspace) == first  # the very next open still waits
        assert populated()
        (group / "cgroup.freeze").write_text("0")
        wait_for(lambda: counts(workspace)[0] > first[0] or not populated(), 20)
        assert counts(workspace)[1] == 0
    wait_for(lambda: not populated(), 20)
    wait_for(lambda: not list(Path("/run/mis").glob("*/state.json")), 60)
    Path("/etc/shadow").read_bytes()  # the control: nobody keeps us from it
