"""Denials of the network's rules, which the kernel gives at once, are late by the agent's cgroup
being frozen; so are those of the kernel plane (tests/vm).

The control: the same denials under a profile that only counts take no time.
"""

from __future__ import annotations

import json
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest
from harness import MIS_RUN, mis, run, wait_for
from leftovers import snapshot

from mis_run import cgroup

pytestmark = pytest.mark.root

DENIALS, DELAY = 20, 0.02
PROFILE = """
extends = "default"
[defcon]
thresholds = [1, 2, 900, 1000]
delays = [0.0001, 0.02, 0.02]
act = ACT
[liveness]
on_loss = "open"
"""
TRIES = """
import os, socket, sys, time
def deny(port):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        try:
            udp.connect(("192.0.2.9", port))
        except PermissionError:
            return
    sys.exit("not denied")
for port in (1, 2, 3):
    deny(port)
time.sleep(0.3)
began = time.monotonic()
for port in range(10, 10 + int(sys.argv[1])):
    deny(port)
time.sleep(0.1)  # the supervisor has heard of all
print(time.monotonic() - began)
"""
STEPS = """
import itertools, os, time
out = os.open("steps", os.O_WRONLY | os.O_CREAT)
for step in itertools.count():
    os.pwrite(out, str(step).encode(), 0)
    time.sleep(0.01)
"""


def freezer(name: str) -> Path:
    """What freezes the agent of a run."""
    unified = cgroup.detect()[1]
    assert unified is not None
    run_id = json.loads(mis("inspect", name).stdout)["state"]["id"]
    return unified / "mis" / run_id / "cgroup.freeze"


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    folder = tmp_path / "workspace"
    folder.mkdir()
    (folder / "tries.py").write_text(TRIES)
    (folder / "steps.py").write_text(STEPS)
    for act in ("true", "false"):
        (tmp_path / f"{act}.toml").write_text(PROFILE.replace("ACT", act))
    return folder


@pytest.mark.parametrize("act", ["true", "false"])
def test_denied_connections_are_late(act: str, workspace: Path) -> None:
    """Together by all their delays: of a burst each is a little late, and the rest follows it."""
    before = snapshot()
    done = run(
        *("/usr/bin/python3", "tries.py", str(DENIALS)),
        cwd=workspace,
        options=("--profile", str(workspace.parent / f"{act}.toml")),
    )
    assert done.code == 0, done.err
    assert len(done.denied("net.connect")) == DENIALS + 3
    late = float(done.out) > DENIALS * DELAY * 0.8
    assert late == (act == "true")
    assert snapshot() == before


def test_other_agents_are_not_slowed(workspace: Path) -> None:
    """Only the violator's cgroup is ever frozen."""
    options = ("--profile", str(workspace.parent / "true.toml"))
    agents = {}
    for name, words in (("quiet", ("steps.py",)), ("noisy", ("tries.py", "100"))):
        argv = [*MIS_RUN, *options, "--name", name, "--", "/usr/bin/python3", *words]
        agents[name] = subprocess.Popen(argv, cwd=workspace, stdout=subprocess.DEVNULL)
        wait_for(lambda name=name: mis("inspect", name).returncode == 0)
    noisy, quiet = freezer("noisy"), freezer("quiet")
    frozen = {noisy: 0, quiet: 0}
    try:
        while agents["noisy"].poll() is None:
            for file in frozen:
                with suppress(OSError):  # the cgroup goes with the agent
                    frozen[file] += file.read_text().strip() == "1"
            time.sleep(0.002)
        assert frozen[noisy] > 10
        assert not frozen[quiet]
    finally:
        agents["quiet"].send_signal(signal.SIGTERM)
        agents["quiet"].wait(20)


def test_what_another_froze_stays_frozen(workspace: Path) -> None:
    """As a pause by an engine: a lost supervisor changes nothing about it, with its control."""
    before = snapshot()
    options = ("--profile", str(workspace.parent / "true.toml"), "--name", "paused")
    agent = subprocess.Popen(
        [*MIS_RUN, *options, "--", "/usr/bin/python3", "steps.py"], cwd=workspace
    )
    steps = workspace / "steps"
    wait_for(lambda: steps.exists() and steps.read_text())
    frozen = freezer("paused")
    frozen.write_text("1")
    wait_for(lambda: "frozen 1" in frozen.with_name("cgroup.events").read_text())
    mark = steps.read_text()
    agent.kill()
    agent.wait(10)
    wait_for(lambda: "unguarded" in mis("ps").stdout)
    time.sleep(0.2)
    assert steps.read_text() == mark
    frozen.write_text("0")
    wait_for(lambda: steps.read_text() != mark)
    frozen.with_name("cgroup.kill").write_text("1")
    with suppress(AssertionError):  # compared below, with a difference to read
        wait_for(lambda: snapshot() == before)
    assert snapshot() == before
