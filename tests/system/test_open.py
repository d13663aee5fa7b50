"""``on_loss = "open"``: the agent outlives its supervisor, unguarded and loudly so, until
``mis attach`` takes it over, guards it again and follows it to its end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from harness import MIS, MIS_RUN, mis, wait_for
from leftovers import snapshot

pytestmark = pytest.mark.root

PROFILE = """
extends = "default"
[files]
deny = ["...", "**/.env"]
[defcon]
effects = { binaries = 0, explicit = 0, writes = 0, kill = 0 }
[liveness]
on_loss = "open"
deadline = "1s"
beat = "50ms"
canary = "200ms"
"""
LOOP = """
import os, socket, sys, time
def read():
    try:
        os.close(os.open(".env", os.O_RDONLY))
        return "read"
    except PermissionError:
        return "refused"
def mount():
    import ctypes
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall(175, 0, 0, 0)
    return str(ctypes.get_errno())
def connect():
    try:
        socket.create_connection(("192.0.2.9", 80), timeout=0.05)
    except OSError as error:
        return str(error.errno)
while not os.path.exists("stop"):
    print(read(), mount(), connect(), flush=True)
    time.sleep(0.1)
sys.exit(7)
"""


LATER = """
import os, socket, sys, time
while not os.path.exists("stop"):
    print("waiting", flush=True)
    time.sleep(0.1)
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
    print(udp.connect_ex(("192.0.2.7", 9)), flush=True)
sys.exit(7)
"""
STORM = """
import ctypes, os, signal, time
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
def read():
    try:
        os.close(os.open(".env", os.O_RDONLY))
    except PermissionError:
        pass
mount = lambda mount=ctypes.CDLL(None).mount: mount(None, None, None, 0, None)
print("begun", flush=True)
for number in range(8):
    if not os.fork():
        out = os.open(f"acts-{number}", os.O_WRONLY | os.O_CREAT)
        acts = 0
        while True:
            ACT()
            acts += 1
            os.pwrite(out, str(acts).encode(), 0)
while not os.path.exists("stop"):
    time.sleep(0.05)
"""


@pytest.fixture
def workspace(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "workspace"
    folder.mkdir()
    (folder / ".env").write_text("SECRET")
    (folder / "loop.py").write_text(LOOP)
    (tmp_path / "open.toml").write_text(PROFILE)
    yield folder
    (folder / "stop").touch()  # whatever failed, the agent ends


def lines(folder: Path) -> list[list[str]]:
    return [line.split() for line in (folder / "out").read_text().splitlines()]


def begin(folder: Path, name: str, lines_first: int = 3) -> subprocess.Popen[bytes]:
    """The loop under an open profile, its output in a file: it outlives our pipes."""
    options = ("--profile", str(folder.parent / "open.toml"), "--name", name)
    options += ("--log", str(folder.parent / "record.jsonl"))
    quiet = subprocess.DEVNULL
    with (folder.parent / "err").open("w") as err:
        agent = subprocess.Popen(
            [*MIS_RUN, *options, "--", "sh", "-c", "exec /usr/bin/python3 loop.py >> out"],
            cwd=folder,
            stdin=quiet,
            stdout=quiet,
            stderr=err,
        )
    wait_for(lambda: (folder / "out").exists() and len(lines(folder)) >= lines_first, 20)
    return agent


def records(folder: Path, kind: str) -> list[dict[str, object]]:
    text = (folder.parent / "record.jsonl").read_text().rpartition("\n")[0]  # no half a line
    return [e for line in text.splitlines() if (e := json.loads(line))["kind"].startswith(kind)]


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_an_agent_outlives_its_supervisor_and_is_guarded_again(
    fault: signal.Signals, workspace: Path
) -> None:
    """Refused before the loss; let through, and told, after it, with the network still closed;
    refused again after ``mis attach``, with the level kept; the exit code arrives, nothing is
    left behind."""
    before = snapshot()
    agent = begin(workspace, "outlives")
    guarded = lines(workspace)
    os.kill(agent.pid, fault)
    agent.wait(10)
    mark = len(lines(workspace))
    wait_for(lambda: len(lines(workspace)) > mark + 6)
    lost = lines(workspace)[mark + 4 :]
    assert {line[0] for line in guarded} == {"refused"}
    assert {line[0] for line in lost} == {"read"}
    assert {line[2] for line in lost} == {"1"}  # the kernel's own rules stay in force
    assert "unguarded" in mis("ps").stdout
    assert records(workspace, "watchdog.open")
    assert "UNGUARDED" in (workspace.parent / "err").read_text()
    level = records(workspace, "defcon.change")[-1]["subject"]["to"]  # type: ignore[index]
    again = subprocess.Popen([*MIS, "attach", "outlives"], stderr=subprocess.PIPE, text=True)
    wait_for(lambda: records(workspace, "run.attached"))
    assert records(workspace, "run.attached")[0]["subject"]["level"] <= level  # type: ignore[index]
    mark = len(lines(workspace)) + 1
    wait_for(lambda: len(lines(workspace)) > mark + 5)
    assert {line[0] for line in lines(workspace)[mark:]} == {"refused"}
    assert "running" in mis("ps").stdout
    (workspace / "stop").touch()
    assert again.wait(20) == 7
    agent.wait(10)
    assert again.stderr is not None and "supervising" in again.stderr.read()
    assert records(workspace, "run.exit")[0]["subject"]["code"] == 7  # type: ignore[index]
    assert snapshot() == before


def test_an_agent_that_ends_alone_is_cleaned_up(workspace: Path) -> None:
    """Nobody attaches: when it ends the watchdog removes what is left."""
    before = snapshot()
    agent = begin(workspace, "alone")
    agent.kill()
    agent.wait(10)
    time.sleep(0.5)
    assert mis("gc").returncode == 0  # takes nothing of a run that goes on
    mark = len(lines(workspace))
    wait_for(lambda: len(lines(workspace)) > mark)
    (workspace / "stop").touch()
    wait_for(lambda: records(workspace, "watchdog.ended"))
    with suppress(AssertionError):  # compared below, with a difference to read
        wait_for(lambda: snapshot() == before)
    assert snapshot() == before


def test_a_second_supervisor_can_be_lost_too(workspace: Path) -> None:
    """What attached is watched as the first was: its loss opens again, and a third takes over."""
    before = snapshot()
    agent = begin(workspace, "twice")
    agent.kill()
    agent.wait(10)
    for number in (1, 2):
        second = subprocess.Popen([*MIS, "attach", "twice"], stderr=subprocess.DEVNULL)
        wait_for(lambda number=number: len(records(workspace, "run.attached")) == number)
        if number == 1:
            second.kill()
            second.wait()
            wait_for(lambda: len(records(workspace, "watchdog.open")) == 2)
    (workspace / "stop").touch()
    assert second.wait(20) == 7
    assert snapshot() == before


@pytest.mark.parametrize("act", ["read", "mount"])
@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_whoever_waits_for_an_answer_when_it_is_lost_goes_on(
    fault: signal.Signals, act: str, workspace: Path
) -> None:
    """What the supervisor had taken and not answered, or would have answered late, is let pass."""
    before = snapshot()
    (workspace / "loop.py").write_text(STORM.replace("ACT", act))
    agent = begin(workspace, f"waits-{act}", lines_first=1)
    wait_for(lambda: len(acts(workspace)) == 8)
    os.kill(agent.pid, fault)
    agent.wait(10)
    mark = acts(workspace)
    wait_for(lambda: all(now > then for now, then in zip(acts(workspace), mark, strict=True)))
    again = subprocess.Popen([*MIS, "attach", f"waits-{act}"], stderr=subprocess.DEVNULL)
    wait_for(lambda: records(workspace, "run.attached"))
    (workspace / "stop").touch()
    assert again.wait(20) == 0
    assert snapshot() == before


def acts(folder: Path) -> list[int]:
    """How much each process of the storm has done."""
    return [int(file.read_text() or 0) for file in sorted(folder.glob("acts-*"))]


@pytest.mark.parametrize(("level", "met"), [(5, "0"), (3, "1")])
def test_the_network_keeps_its_level(level: int, met: str, workspace: Path) -> None:
    """At DEFCON 3 a destination never used is denied, by a second supervisor too; at 5 it is not.

    A connected UDP socket has sent nothing yet.
    """
    (workspace / "loop.py").write_text(LATER)
    with (workspace.parent / "open.toml").open("a") as profile:
        profile.write('[network]\nallow = ["192.0.2.7:9/udp"]\n')
    agent = begin(workspace, "levels")
    mis("defcon", "levels", str(level))
    wait_for(lambda: level == 5 or records(workspace, "defcon.change"))
    agent.kill()
    agent.wait(10)
    again = subprocess.Popen([*MIS, "attach", "levels"], stderr=subprocess.DEVNULL)
    wait_for(lambda: records(workspace, "run.attached"))
    (workspace / "stop").touch()
    assert again.wait(20) == 7
    assert lines(workspace)[-1] == [met]


def test_what_cannot_be_attached(workspace: Path) -> None:
    """A run with a supervisor, one that is closed, none: a message and a hint."""
    agent = begin(workspace, "has-one")
    done = mis("attach", "has-one")
    assert done.returncode == 2 and "has a supervisor" in done.stderr
    (workspace / "stop").touch()
    assert agent.wait(20) == 7
    done = mis("attach", "has-one")
    assert done.returncode == 127 and "no live run" in done.stderr
