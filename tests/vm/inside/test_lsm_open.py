"""``on_loss = "open"`` on the kernel plane: a run goes on without its supervisor, all of it told
and nothing refused, until ``mis attach`` guards it again by what the kernel has of it."""

from __future__ import annotations

import errno
import json
import os
import signal
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import MIS, MIS_RUN, wait_for
from leftovers import snapshot

from mis_run.dataclass import replace
from mis_run.errors import SetupError
from mis_run.events import Verdict
from mis_run.guards import kernel, lsm, lsm_plane
from mis_run.guards.lsm_abi import LAYOUT, OWN, STATE

pytestmark = pytest.mark.usefixtures("plane")
# What no rule names is the kernel's to refuse, what a pattern names the file guard's too.
PROFILE = """
extends = "default"
[files]
read = ["@system", "$WORKSPACE/open"]
write = ["$WORKSPACE/open"]
deny = [DENY]
[exec]
allow = ["@system", "$WORKSPACE/open"]
[defcon]
thresholds = [2, ELEVATED, 2000, 3000]
decay = "1h"
[liveness]
on_loss = "open"
deadline = "4s"
beat = "200ms"
canary = "CANARY"
"""
LOOP = """
import os, sys, time
def tried(name):
    try:
        os.close(os.open(name, os.O_RDONLY))
        return "read"
    except PermissionError:
        return "refused"
while not os.path.exists("open/stop"):
    print(*map(tried, sys.argv[1:]), flush=True)
    time.sleep(0.3)
sys.exit(7)
"""


@pytest.fixture
def workspace(tmp_path: Path) -> Iterator[Path]:
    """A folder to work in; after the test nothing of any run may be left, in the maps neither."""
    folder = tmp_path / "ws"
    for name in ("open", "none"):
        (folder / name).mkdir(parents=True)
    (folder / "none/file").write_text("SECRET")
    (folder / "open/a.key").write_text("SECRET")
    before, known = snapshot(), entries()
    yield folder
    (folder / "open/stop").touch()  # whatever failed, the agent ends
    wait_for(lambda: snapshot() == before and entries() == known, 30)


def entries() -> list[set[bytes]]:
    """Every key of the plane's maps."""
    plane = lsm_plane.ensure()
    try:
        return [set(known.items()) for known in (plane.slots, plane.rings, plane.rules)]
    finally:
        plane.close()


def known() -> tuple[bytes | None, bytes | None, int]:
    """Slot and ring of the only agent, and its count of violations."""
    plane = lsm_plane.ensure()
    try:
        (agent,) = plane.slots.items()
        slot = plane.slots.lookup(agent, 4)
        state = plane.states.lookup(slot or b"", STATE.size)
        return slot, plane.rings.lookup(agent, 4), STATE.unpack(state or b"")[1]
    finally:
        plane.close()


def lines(folder: Path) -> list[str]:
    out = folder / "open/out"
    return out.read_text().splitlines() if out.exists() else []


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    text = (folder.parent / "record").read_text().rpartition("\n")[0]  # the last may be half a line
    return [e for line in text.splitlines() if (e := json.loads(line))["kind"].startswith(kind)]


def begin(
    folder: Path,
    name: str,
    *files: str,
    deny: str = '"..."',
    elevated: int = 1000,
    canary: str = "2s",
) -> subprocess.Popen[bytes]:
    """The loop, its output in a file: it outlives our pipes."""
    text = PROFILE.replace("DENY", deny).replace("ELEVATED", str(elevated))
    (folder.parent / "open.toml").write_text(text.replace("CANARY", canary))
    words = ("--profile", str(folder.parent / "open.toml"), "--name", name, "--net", "none")
    words += ("--plane", "kernel", "--log", str(folder.parent / "record"))
    loop = f"exec /usr/bin/python3 -I -c '{LOOP}' {' '.join(files)} >> open/out"
    with (folder.parent / "err").open("w") as err:
        argv = [*MIS_RUN, *words, "--", "sh", "-c", loop]
        agent = subprocess.Popen(argv, cwd=folder, stdin=-3, stdout=-3, stderr=err)
    try:
        wait_for(lambda: len(lines(folder)) > 6, 60)
    except AssertionError:
        agent.terminate()
        print((folder.parent / "err").read_text())
        raise
    return agent


def attach(folder: Path, name: str, number: int) -> subprocess.Popen[str]:
    """A supervisor for it, the ``number``-th that attaches."""
    again = subprocess.Popen(
        [*MIS, "attach", name], stdin=-3, stdout=-3, stderr=subprocess.PIPE, text=True
    )
    attached = lambda: len(records(folder, "run.attached")) == number  # noqa: E731
    wait_for(lambda: again.poll() is not None or attached(), 60)
    assert again.poll() is None, again.stderr and again.stderr.read()
    return again


@pytest.mark.parametrize(
    ("fault", "deny", "files", "elevated", "level"),
    [
        (signal.SIGKILL, '"..."', ("none/file",), 1000, 4),
        (signal.SIGSTOP, '"...", "**/*.key"', ("none/file", "open/a.key"), 60, 3),
    ],
    ids=["killed", "hangs-both-planes"],
)
def test_it_is_taken_over(
    fault: signal.Signals,
    deny: str,
    files: tuple[str, ...],
    elevated: int,
    level: int,
    workspace: Path,
) -> None:
    """Refused before the loss; past the deadline let through, and told; refused again after ``mis
    attach``, by the same entries in the maps, with count and level as the kernel kept them; the
    exit code arrives."""
    agent = begin(workspace, "outlives", *files, deny=deny, elevated=elevated)
    refused, read = (" ".join([word] * len(files)) for word in ("refused", "read"))
    assert set(lines(workspace)) == {refused}
    before, rules = known(), entries()
    os.kill(agent.pid, fault)
    agent.wait(30)
    wait_for(lambda: lines(workspace)[-3:] == [read] * 3, 30)
    assert records(workspace, "watchdog.open")
    if level == 3:
        assert before[2] < elevated
        wait_for(lambda: known()[2] >= elevated, 60)
    assert entries() == rules
    again = attach(workspace, "outlives", 1)
    mark = len(lines(workspace)) + 1
    wait_for(lambda: len(lines(workspace)) > mark + 5, 30)
    assert set(lines(workspace)[mark:]) == {refused}
    after = known()
    assert after[:2] == before[:2] and entries() == rules
    assert after[2] > before[2] > 2
    (workspace / "open/stop").touch()
    assert again.wait(30) == 7
    (attached,) = records(workspace, "run.attached")
    assert attached["subject"]["level"] == 4
    assert attached["subject"]["kernel"]["audited"] >= 3
    told = [(event["time"], event["verdict"]) for event in records(workspace, "file.open")]
    lost, back = records(workspace, "watchdog.open")[0]["time"], attached["time"]
    # The kernel's deadline and the watchdog's are a beat apart.
    assert {verdict for when, verdict in told if when < lost - 0.5} == {"deny"}
    assert "audit" in {verdict for when, verdict in told if lost < when < back}
    assert {verdict for when, verdict in told if when > back} == {"deny"}
    assert records(workspace, "run.exit")[0]["subject"]["level"] == level
    causes = [event["subject"]["cause"] for event in records(workspace, "defcon.change")]
    assert causes == ["file.open", *["kernel"] * (level == 3)]


def test_nobody_attaches(workspace: Path) -> None:
    """It goes on and is not refused again; what its rules name stays held; when it ends by itself
    the watchdog leaves nothing (see the fixture)."""
    agent = begin(workspace, "alone", "none/file")
    plane = lsm_plane.ensure()
    number = len(plane.rules.items())
    plane.close()
    agent.kill()
    agent.wait(30)
    wait_for(lambda: lines(workspace)[-3:] == ["read"] * 3, 30)
    (dog,) = (
        entry
        for entry in Path("/proc").glob("[0-9]*")
        if b"mis-watchdog" in (entry / "cmdline").read_bytes()
    )
    assert len(list((dog / "fd").iterdir())) > number * 0.8  # stdin, stdout, stderr are not held
    mark = len(lines(workspace))
    time.sleep(5)
    assert set(lines(workspace)[mark:]) == {"read"}
    (workspace / "open/stop").touch()
    wait_for(lambda: records(workspace, "watchdog.ended"), 30)


def test_a_second_supervisor_can_be_lost_too(workspace: Path) -> None:
    """What attached is watched as the first was, and a third guards by the same entries."""
    agent = begin(workspace, "twice", "none/file", canary="1h")
    before, rules = known(), entries()
    agent.kill()
    agent.wait(30)
    second = attach(workspace, "twice", 1)
    wait_for(lambda: lines(workspace)[-2:] == ["refused"] * 2, 30)
    second.kill()
    second.wait(30)
    wait_for(lambda: lines(workspace)[-2:] == ["read"] * 2, 30)
    third = attach(workspace, "twice", 2)
    wait_for(lambda: lines(workspace)[-2:] == ["refused"] * 2, 30)
    mark = len(lines(workspace))
    time.sleep(6)  # longer than the deadline, which no canary puts off here
    assert set(lines(workspace)[mark:]) == {"refused"}
    assert known()[:2] == before[:2] and entries() == rules
    (workspace / "open/stop").touch()
    assert third.wait(30) == 7


def read(path: Path) -> Any:
    return lambda: os.close(os.open(path, os.O_RDONLY))


@pytest.mark.parametrize("tree", ["tmpfs"], indirect=True)
def test_another_version_takes_it_over(
    tree: Any, agent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guard anew, by what the first one left: in the maps that it began with although ours are
    others, with its count, and what was told meanwhile is read; a plane that is not here or is
    written otherwise, and an agent that it does not know, are refused."""
    calm = lsm.Defcon(thresholds=(2, 4, 90, 99))
    policy = tree.policy(deadline=0.5, on_loss="open", defcon=calm)
    first = lsm.LsmGuard(agent, policy, lsm_plane.ensure())
    first.register()
    ring, secret = os.dup(first.ring), tree.hidden / "file"
    left = kernel.Left(
        lsm_plane.version(), LAYOUT, replace(policy, rules=replace(policy.rules, held=[]))
    )
    slot = lsm_plane.Plane(lsm_plane.TOP / left.version).slot(first.id)
    assert lsm.in_cgroup(agent, read(secret)) == errno.EPERM
    first.release()  # from here on nobody renews
    time.sleep(0.7)
    for _ in range(3):
        assert lsm.in_cgroup(agent, read(secret)) == 0
    monkeypatch.setattr(lsm_plane, "version", lambda: "another")
    monkeypatch.setattr(lsm, "own_words", lambda _: [0] * OWN)
    left.check()
    for other in (replace(left, version="none"), replace(left, layout=LAYOUT[1:])):
        with pytest.raises(SetupError):
            other.check()
    with kernel.adopt(left, agent, ring, 4) as guard:
        assert guard.counts().audited == 3
        assert guard.level() == 3
        verdicts = [event.verdict for event in kernel.backlog(guard)]
        assert verdicts == [Verdict.DENY, *[Verdict.AUDIT] * 3]
        assert lsm.in_cgroup(agent, read(secret)) == errno.EPERM
        assert [event.verdict for event in guard.read()] == [Verdict.DENY]
        assert (guard.counts().denied, guard.counts().count) == (2, 5)
        assert guard._plane.slot(guard.id) == slot and slot is not None
        with lsm_plane.locked():
            guard._plane.forget(guard.id)
        with pytest.raises(SetupError):
            guard.take_over(4)
    os.close(ring)
    assert struct.pack("=Q", first.id) not in entries()[0]
